"""A command that visitors of a page may start, one at a time: what it prints, and how far its progress bars are."""

import codecs
import contextlib
import os
import re
import signal
import struct
import subprocess
import threading
import time

KEPT, SHOWN = 200, 40  # lines of output that are kept, and that a page shows
IDLE, RUNNING, SUCCEEDED, FAILED, OVER = "idle", "running", "succeeded", "failed", "over"
SIZE = 40, 100  # rows and columns of the terminal that the command sees
# What tqdm draws: "tiny CLIP:  34%|███▍      | 204/600 [00:12<00:23, 17.0step/s]". The label may be missing.
BAR = re.compile(r"(?:(?P<label>.*?):)?\s*(?P<percent>\d{1,3})%\|[^|]*\|\s*(?P<rest>.*)")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of a terminal: moves of the cursor, colours
STAGE = "$ "  # a line that begins so names a command; the bars of the one before have ended


class Output:
    """What a command has printed so far, read as a terminal would show it.

    Attributes:
        lines: list of whole lines, the last KEPT of them, without progress bars.
        bars: dict from the label of a progress bar to (percent, what stands beside it).
    """

    def __init__(self):
        self.lines, self.bars, self._rest = [], {}, ""

    def read(self, text):
        """Take in more of what was printed."""
        *pieces, self._rest = re.split(r"[\r\n]+", self._rest + text)
        for piece in pieces:
            piece = CONTROL.sub("", piece).rstrip()
            bar = BAR.fullmatch(piece)
            if bar:
                self.bars[(bar["label"] or "").strip()] = min(int(bar["percent"]), 100), bar["rest"]
            elif piece.strip():
                if piece.startswith(STAGE):
                    self.bars.clear()
                self.lines = [*self.lines[1 - KEPT :], piece]

    def end(self):
        """Take in what stands after the last line break."""
        self.read("\n")

    def reason(self):
        """The line that says why a command failed: the first with "error: " in it, to which later ones may point, else the last."""
        last = self.lines[-1] if self.lines else "it printed nothing"
        return next((line for line in self.lines if "error: " in line), last).strip()


def open_terminal():
    """Open a terminal of SIZE; a pipe, on systems that have none. Returns the descriptors to read from and to write to."""
    try:
        import fcntl
        import termios

        ours, its = os.openpty()
    except (ImportError, OSError):
        return os.pipe()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    return ours, its


class WatchedRun:
    """A command that may be started again and again, but runs once at a time.

    Attributes:
        state: IDLE, RUNNING, SUCCEEDED (what it made is being loaded), FAILED, or OVER (what it was run for is there).
        error: why it failed, or None.
        output: Output of the last run.

    Args:
        command: list of words.
        environment: dict of environment variables to add.
    """

    def __init__(self, command, environment):
        self.command, self.environment = command, environment
        self.state, self.error, self.output = IDLE, None, Output()
        self._changed, self._process, self._began = threading.Condition(), None, None

    def start(self):
        """Start the command, unless it is running or has done its work. Returns whether it was started."""
        with self._changed:
            if self.state not in (IDLE, FAILED):
                return False
            self.state, self.error, self.output, self._began = RUNNING, None, Output(), time.monotonic()
        threading.Thread(target=self._run, name="watched", daemon=True).start()
        return True

    def wait_for_success(self):
        """Wait until the command has succeeded, however often it fails before."""
        with self._changed:
            self._changed.wait_for(lambda: self.state == SUCCEEDED)

    def fail(self, error):
        """Say that the command has failed, or that what it made is of no use: it may be started again."""
        self._set(FAILED, str(error))

    def finish(self):
        """Say that what the command was run for is there."""
        self._set(OVER)

    def describe(self, wait=False):
        """Describe the run for a page. wait: wait first, if it has succeeded, until what it made is loaded. Returns a dict."""
        with self._changed:
            self._changed.wait_for(lambda: not wait or self.state != SUCCEEDED)
            seconds = None if self._began is None else time.monotonic() - self._began
            bars = [{"label": label, "percent": percent, "rest": rest} for label, (percent, rest) in dict(self.output.bars).items()]
            return {"state": self.state, "error": self.error, "seconds": seconds, "lines": self.output.lines[-SHOWN:], "bars": bars}

    def close(self):
        """End the command, and what it started, if it still runs."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM) if os.name == "posix" else process.terminate()
            process.wait()

    def _set(self, state, error=None):
        with self._changed:
            self.state, self.error = state, error
            self._changed.notify_all()

    def _run(self):
        """Run the command, on a thread of its own."""
        try:
            code = self._read_output()
        except OSError as error:
            self.fail(f"{self.command[0]} cannot be run: {error.strerror}")
            return
        self.output.end()
        self._set(*((FAILED, self.output.reason()) if code else (SUCCEEDED,)))

    def _read_output(self):
        """Run the command as on a terminal, so that it shows its progress bars. Returns its exit code."""
        ours, its = open_terminal()
        environment = {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        group = {"start_new_session": True} if os.name == "posix" else {}
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment, **group
                )  # fmt: skip
            finally:
                os.close(its)
            with contextlib.suppress(OSError):  # on Linux, what reading a terminal ends with
                while data := os.read(ours, 65536):
                    self.output.read(decoder.decode(data))
            return self._process.wait()
        finally:
            os.close(ours)
