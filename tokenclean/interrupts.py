"""Being told to stop: SIGTERM and SIGUSR1 end a verb with what is finished published.

A signal stops the program where it is, which loses nothing that was published. Where a step or a
shard is being computed it waits for that instead: the loop asks `stop_if_requested` after each.
Schedulers send SIGTERM before they kill, and SIGUSR1 ahead of a time limit if asked to.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: What a process ends with after either: as a shell reports SIGTERM.
EXIT_CODE = 143


class Stopped(BaseException):
    """The process was told to stop. No error: whoever catches errors must not catch it."""


_received: signal.Signals | None = None
_deferring = 0


def listen() -> None:
    """Handle the signals from now on; does nothing outside of the main thread."""
    global _received, _deferring
    _received, _deferring = None, 0
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        return  # a scheduler and a launcher may both send one
    _received = signal.Signals(number)
    if not _deferring:
        raise Stopped(_received.name)
    print(f"{_received.name}: stopping after this step or shard", file=sys.stderr, flush=True)


def requested() -> bool:
    """Whether a signal has come."""
    return _received is not None


def stop_if_requested() -> None:
    """Stop, if a signal has come.

    Raises:
        Stopped: naming the signal.
    """
    if _received is not None:
        raise Stopped(_received.name)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals wait inside the block until it asks, or ends.

    Raises:
        Stopped: at its beginning or its end, if a signal has come.
    """
    global _deferring
    # One that was raised where Python swallows exceptions is still to be obeyed.
    stop_if_requested()
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
    if not _deferring:
        stop_if_requested()
