"""Who of the processes of one command has died or failed: signs of life, exchanged through the launcher's store by a thread of each."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

from common import UserError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 35.0  # seconds without one after which a process on another machine counts as dead
GRACE = 20.0  # seconds that the others have to stop by themselves; torchrun kills them after 30
START = 600  # seconds in which all processes must have started
INTERRUPTED = 130  # exit code
ADVICE = "Run the same command again: it resumes where a finished part was saved."


class Watch:
    """Signs of life of all processes. When one has died or failed, this process is interrupted as by Ctrl-C.

    Every process keeps one key in the store: its sign of life, where it runs, and how it ended once it has. A process of this machine is
    also looked for directly, so that its death is noticed in seconds.
    """

    def __init__(self, store, number, count):
        """Take the store, this process's number and how many there are."""
        self._store, self.number, self.count = store, number, count
        self._me = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "place": _process_table(),
            "beat": 0,
            "ended": None,
            "left": False,
        }
        self._speaking = threading.Lock()  # else a sign of life on its way could arrive after the last words, and hide them
        self._others = {}  # number -> what it last said
        self._changed = {}  # number -> when that differed from what it said before
        self._dead = set()
        self._answered = time.monotonic()
        self._over = threading.Event()
        self._main_has_ended = False
        self.fault = None

    def start(self):
        """Wait for all processes, then watch them. Raises UserError when some do not start."""
        from datetime import timedelta

        self._say()
        for number in range(self.count):
            try:
                self._store.wait([_key(number)], timedelta(seconds=START))
            except RuntimeError as error:
                raise UserError(f"process {number} of {self.count} has not started within {START} s. Start all of them at once.") from error
        self._look()
        for target in (self._beat, self._judge):
            threading.Thread(target=target, daemon=True).start()

    def check(self):
        """Raise KeyboardInterrupt when some process has died or failed."""
        if self._find_fault():
            raise KeyboardInterrupt

    def lose(self):
        """Note that the store has gone, with the process that held it or with the launcher."""
        self._answered = -SILENCE
        until = time.monotonic() + BEAT
        while 0 in self._others and time.monotonic() < until:
            if not self._others[0]["ended"] and self._is_gone(self._others[0]):
                self._dead.add(0)
            time.sleep(0.05)

    def end(self, code, message=""):
        """Tell the others how this process ended, after which they expect no sign of life."""
        self._main_has_ended = True
        if self._me["ended"] is None:
            self._me["ended"] = {"code": code, "message": message}
            with contextlib.suppress(RuntimeError):  # the store went with the process that held it
                self._say()

    def settle(self, seconds):
        """Wait until it is known of every process how it ended, or until some died. Returns the fault in words, or None."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._dead:
            if self._find_fault() and self.fault or all(one["ended"] for one in self._others.values()):
                break
            time.sleep(0.1)
        return self._find_fault() and self.fault

    def first_failed(self, seconds):
        """Whether the first process, within some seconds, ends with an error of its own."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (self._others[0]["ended"] or 0 in self._dead):
            time.sleep(0.05)
        return bool(self._others[0]["ended"] and self._others[0]["ended"]["code"])

    @property
    def speaks(self):
        """Whether this is the process that prints a fault: the first of those that did not cause it."""
        ended = {number for number, one in self._others.items() if one["ended"] and one["ended"]["code"] != INTERRUPTED}
        return self.number == min(set(range(self.count)) - self._dead - ended)

    def close(self):
        """Stop watching. The first process, which may hold the store, stays until the others need it no more."""
        if self.number == 0:
            until = time.monotonic() + GRACE
            while time.monotonic() < until and not all(map(self._has_left, self._others)):
                time.sleep(0.02)
        else:
            self._me["left"] = True
            with contextlib.suppress(RuntimeError):
                self._say()
        self._over.set()

    def _say(self):
        with self._speaking:
            self._me["beat"] += 1
            self._store.set(_key(self.number), json.dumps(self._me))

    def _look(self):
        """Read what the others said last."""
        numbers = [number for number in range(self.count) if number != self.number]
        gone = {number for number in numbers if number in self._others and self._is_gone(self._others[number])}
        for number, data in zip(numbers, self._store.multi_get([_key(number) for number in numbers])):
            said = json.loads(data)
            if said != self._others.get(number):
                self._others[number], self._changed[number] = said, time.monotonic()
        self._answered = time.monotonic()
        # Looked for before its last words were read, so that a process that ended properly is not called dead.
        self._dead |= {number for number in gone if not self._others[number]["ended"]}

    def _has_left(self, number):
        return number in self._dead or self._others[number]["left"] or self._is_gone(self._others[number])

    def _is_gone(self, one):
        if not one["place"] or one["place"] != self._me["place"]:
            return False
        try:
            with open(f"/proc/{one['process']}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"  # dead, though nobody has waited for it yet
        except (FileNotFoundError, ProcessLookupError):
            return True

    def _beat(self):
        """Exchange signs of life, until this process ends; the thread of that name."""
        while not self._over.wait(BEAT if self.fault is None else BEAT / 4):
            try:
                self._say()
                self._look()
            except RuntimeError:
                self.lose()
                return

    def _judge(self):
        """Interrupt this process when another has died, and end it when that does not help; the thread of that name."""
        since = None
        while not self._over.wait(BEAT / 2):
            if not self._find_fault() or self._main_has_ended:
                continue
            if since is None:
                since = time.monotonic()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            elif time.monotonic() - since > GRACE:
                if self.speaks and self.fault:
                    print(f"error: {self.fault}", file=sys.__stderr__, flush=True)
                os._exit(2)

    def _find_fault(self):
        """Whether some process has died or failed; `fault` then says which, or stays None where one was only interrupted."""
        now, interrupted = time.monotonic(), False
        for number, one in self._others.items():
            ended = one["ended"]
            if number in self._dead or not ended and now - self._changed[number] > SILENCE:
                self._dead.add(number)
                self.fault = f"{self._name(number)} has died. {ADVICE}"
                return True
            if ended and ended["code"] not in (0, INTERRUPTED):
                self.fault = self.fault or f"{self._name(number)} stopped: {ended['message']}"
            interrupted |= bool(ended and ended["code"])
        if now - self._answered > SILENCE:
            self.fault = f"{self._name(0)} and the launcher do not answer any more. {ADVICE}"
            return True
        return interrupted

    def _name(self, number):
        one = self._others.get(number, self._me)
        return f"process {number} of {self.count} (process {one['process']} on {one['host']})"


def _key(number):
    return f"process/{number}"


def _process_table():
    """Name what process numbers on this machine count in: its boot and process namespace; "" where the system is not Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
