"""The processes that a launcher (torchrun, accelerate launch, Slurm) started for one command: who does what, and who has died.

    @one_line_errors
    @together                            a script's main; with one process nothing changes and nothing is imported
    def main(argv=None): ...

    processes = current()                what every stage asks
    processes.share(batches)             this process's part of the work
    processes.gather(captions)           everybody's results, in order
    processes.first_does(write, path)    once, by the first process; the others wait

Everything goes through the launcher's key-value store (torch.distributed's TCPStore, where MASTER_ADDR and MASTER_PORT say), so it works
on CPUs, on any GPU and between machines. Values are JSON or arrays of numbers: nothing that is read there can run code.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import signal
import time

from common import UserError, claim_output
from features.watch import GRACE, INTERRUPTED, START, Watch

CHUNK = 4 << 20  # bytes; the store takes values of at most 8 MiB


class Processes:
    """The processes of one command, this one among them. Alone, every method returns at once.

    Attributes:
        number: of this process, from 0.
        count: how many there are.
        local_count: how many of them run on this machine.
    """

    def __init__(self, store=None, number=0, count=1, local_count=1):
        """Take torch.distributed's Store; None where there is one process."""
        self.number, self.count, self.local_count = number, count, local_count
        self.watch = Watch(store, number, count) if store else None
        self._store, self._calls = store, itertools.count()

    @property
    def is_first(self):
        """Whether this is the process that prints, joins and writes."""
        return self.number == 0

    def share(self, items):
        """Return this process's part of a sequence: neighbours, so that the parts in the order of processes give the whole."""
        return items[self.number * len(items) // self.count : (self.number + 1) * len(items) // self.count]

    def gather(self, value):
        """Bring a plain value of each process to all of them, as JSON does: tuples become lists.

        Returns:
            List of `count` values, in the order of processes; alone, of the value itself.
        """
        if self.count == 1:
            return [value]
        return [json.loads(data) for data in self._exchange(json.dumps(value).encode())]

    def gather_rows(self, array):
        """Bring a numpy array of each process to all of them. Returns a list of `count` arrays."""
        if self.count == 1:
            return [array]
        import numpy as np

        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return [np.load(io.BytesIO(data), allow_pickle=False) for data in self._exchange(file.getvalue())]

    def first_does(self, function, *args):
        """Call a function in the first process while the others wait. All get what it returned, a plain value."""
        if self.count == 1:
            return function(*args)
        call = next(self._calls)
        if self.is_first:
            value = function(*args)
            self._put(call, json.dumps(value).encode())
            return value
        return json.loads(self._take(call, 0))

    @contextlib.contextmanager
    def claim(self, path):
        """Be the only command that writes an output, as common.claim_output: the first process holds the lock for all."""
        with claim_output(path) if self.is_first else contextlib.nullcontext():
            self.first_does(lambda: None)
            yield
            self.gather(None)  # nobody writes any more when the lock is released

    def _exchange(self, data):
        call = next(self._calls)
        self._put(call, data)
        return [self._take(call, number) for number in range(self.count)]

    def _put(self, call, data):
        parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        for place, part in enumerate(parts):
            self._ask("set", f"{call}/{self.number}/{place}", part)
        self._ask("set", f"{call}/{self.number}", str(len(parts)))

    def _take(self, call, number):
        key, pause = f"{call}/{number}", 0.005
        while not self._ask("check", [key]):  # unlike get(), which holds the connection until the key is there
            self.watch.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return b"".join(self._ask("get", f"{key}/{place}") for place in range(int(self._ask("get", key))))

    def _ask(self, method, *args):
        """Call a method of the store; where it has gone, this process is interrupted."""
        try:
            return getattr(self._store, method)(*args)
        except RuntimeError:
            self.watch.lose()
            raise KeyboardInterrupt from None


ALONE = Processes()
_current = ALONE


def current():
    """Return the Processes of this command."""
    return _current


def together(main):
    """Decorate a script's main: under a launcher, its processes share the work, and none goes on when another has died.

    Only the first process prints. An error that all processes meet is printed once. With one process, `main` is called as it is.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        global _current
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            return main(argv)
        _current = processes = _join()
        try:
            with _interrupts(), _silence(not processes.is_first):
                code = main(argv) or 0
            processes.watch.end(code)
            return code
        except BaseException as error:
            raise _explain(error, processes) from (None if isinstance(error, (UserError, OSError)) else error.__cause__)
        finally:
            processes.watch.close()
            _current = ALONE

    return wrapped


def _join():
    """Meet the other processes at the launcher's store. Returns Processes."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is reported with the stack of torch
    from datetime import timedelta

    import torch
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, count = next(rendezvous("env://", timeout=timedelta(seconds=START)))
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the {os.environ['WORLD_SIZE']} processes of this command do not find one another: {reason[:200]}. Start them "
                        "with torchrun or accelerate launch, as docs/scaling.md says.") from error  # fmt: skip
    local, local_count = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", number), ("LOCAL_WORLD_SIZE", count)))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())  # what the device "cuda" means from now on
    from torch.distributed import PrefixStore

    processes = Processes(PrefixStore("prefixcap", store), number, count, local_count)
    processes.watch.start()
    return processes


def _explain(error, processes):
    """Tell the others that this process ends with `error`. Returns what to raise in its place: a line that names who is to blame."""
    watch, code = processes.watch, getattr(error, "code", None)
    if isinstance(error, KeyboardInterrupt) or code == INTERRUPTED:
        watch.end(INTERRUPTED)
        fault = watch.settle(GRACE)
        if fault is None:
            return error
        return UserError(fault) if watch.speaks else SystemExit(2)
    watch.end(code if isinstance(code, int) else 2 if isinstance(error, (UserError, OSError)) else 1, str(error) or type(error).__name__)
    if isinstance(error, (UserError, OSError)) and not processes.is_first and watch.first_failed(seconds=3):
        return SystemExit(2)  # the first process has said it
    return error


@contextlib.contextmanager
def _interrupts():
    """Let SIGTERM and SIGINT interrupt this process once, and nothing disturb its end: launchers send several."""

    def interrupt(number, frame):
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise
    for one, handler in before.items():
        signal.signal(one, handler)


@contextlib.contextmanager
def _silence(silent):
    """Print nothing while the block runs, if `silent`."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
