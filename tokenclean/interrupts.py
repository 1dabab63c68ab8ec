"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C end a verb with what is finished published.

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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: What a process ends with after SIGTERM or SIGUSR1: as a shell reports SIGTERM.
EXIT_CODE = 143


class Stopped(BaseException):
    """The process was told to stop. No error: whoever catches errors must not catch it."""

    @property
    def exit_code(self) -> int:
        """`EXIT_CODE`; after Ctrl-C 130, as a shell reports it."""
        return 130 if str(self) == signal.SIGINT.name else EXIT_CODE


_received: signal.Signals | None = None
_deferring = 0


@contextmanager
def listening() -> Iterator[None]:
    """`listen` inside the block alone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        listen()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def listen() -> None:
    """Handle the signals from now on, none of which has come; only the main thread can do so."""
    global _received, _deferring
    _received, _deferring = None, 0
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    name, again = signal.Signals(number).name, _received is not None
    _received = _received or signal.Signals(number)
    # Whoever types Ctrl-C twice means it; a scheduler and a launcher may both send the others.
    if not _deferring or (again and number == signal.SIGINT):
        raise Stopped(name)
    if again:
        return
    print(f"{name}: stopping after this step or shard", file=sys.stderr, flush=True)


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
