"""Ctrl-C and SIGTERM wait for the end of an update, so that a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["deferred_interrupt"]


@contextmanager
def deferred_interrupt(enabled: bool = True) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second one acts at once.

    With ``enabled`` false, or outside the main thread, signals act as before.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    owner, came = os.getpid(), threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a loader worker inherits this: Ctrl-C is for its parent, SIGTERM ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        came.set()
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
