"""Waiting for another process: until it has got somewhere, and not for a time that a busy machine needs longer for."""

import time

PATIENCE = 600  # seconds after which a test gives up: nothing is that slow, so something hangs


def until(condition, pause=0.05):
    """Wait until `condition()`, asked every `pause` seconds, holds; say whether it does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True
