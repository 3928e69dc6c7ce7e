"""Ctrl-C and SIGTERM during training: finish the step, save, then stop."""

import signal
import threading


class StopRequest:
    """While entered, SIGINT and SIGTERM only set `signal_name`; a second SIGINT interrupts at once, as usual.

    Outside the main thread (a notebook's worker) signals are left as they are.
    """

    def __init__(self):
        self.signal_name = None
        self.exit_code = 0
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        self.exit_code = 128 + number
