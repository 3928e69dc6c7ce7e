"""How long a test waits for another process or thread: never a measure of speed, only an end to what hangs."""

import time

PATIENCE = 300  # seconds; only what hangs takes so long, on the slowest and busiest machine


def wait_until(condition, describe=lambda: "what was waited for did not happen"):
    """Wait until `condition()` is true, and fail with `describe()` where it does not become so. Returns the condition's value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)
    return value
