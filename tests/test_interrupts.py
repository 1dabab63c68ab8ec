"""Signals: at once between steps, after the step inside, and never twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tokenclean import interrupts
from tokenclean.interrupts import Stopped, deferred, requested, stop_if_requested


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    with interrupts.listening():
        yield


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_outside_of_a_step_a_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=number.name):
        os.kill(os.getpid(), number)
        raise AssertionError("not reached")


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_inside_of_a_step_it_waits_until_asked(number: signal.Signals) -> None:
    done = []
    with pytest.raises(Stopped, match=number.name), deferred():
        for step in range(5):
            if step == 2:
                os.kill(os.getpid(), number)
            done.append(step)
            stop_if_requested()
    assert done == [0, 1, 2]


def test_a_block_that_never_asks_is_stopped_at_its_end() -> None:
    done = []
    with pytest.raises(Stopped), deferred():
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        done.append("the outer block goes on")
    assert done and requested()


def test_a_second_signal_does_not_cut_the_step_short() -> None:
    done = []
    with pytest.raises(Stopped, match="SIGUSR1"), deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("step")
        stop_if_requested()
    assert done == ["step"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_swallowed_is_obeyed_at_the_next_step() -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    thing = Swallows()
    del thing  # exceptions of finalisers go nowhere
    with pytest.raises(Stopped), deferred():
        raise AssertionError("not reached")


def test_an_error_of_the_step_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="the step's own"), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the step's own")


def test_typed_twice_it_does_not_wait() -> None:
    done = []
    with pytest.raises(Stopped, match="SIGINT"), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the step goes on")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not reached")
    assert done == ["the step goes on"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_after_one_that_python_swallowed_stops_at_once() -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    thing = Swallows()
    del thing
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_given_back() -> None:
    def other(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, other)
    with interrupts.listening():
        assert signal.getsignal(signal.SIGTERM) is interrupts._handle
    assert signal.getsignal(signal.SIGTERM) is other


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_the_program_ends_with_a_code_of_its_own(number: signal.Signals, ends: int) -> None:
    """The real entry point, stopped while a verb works."""
    code = (
        "import os, sys, types; from tokenclean import cli; work = types.ModuleType('w');"
        f"work.w = lambda argv: os.kill(os.getpid(), {int(number)});"
        "sys.modules['tokenclean.w'] = work; cli.VERBS['w'] = ('w', '');"
        "cli.RESUMED += ('w',); cli.main(['w'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == ends, ended.stderr
    assert "the same command goes on where it stopped" in ended.stderr
