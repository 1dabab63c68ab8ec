"""Killed anywhere, the same command ends the same: the short form of scripts/fault_injection.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# The children that are forked below must not import all of this each.
import tokenclean.commands  # noqa: F401
from scripts import fault_injection as faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Model and pool, and the folder in which runs find them under ``../inputs``."""
    work = tmp_path_factory.mktemp("faults")
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    (work / "inputs").mkdir()
    faults.make_inputs(work / "inputs", samples=16)
    yield work
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


@pytest.mark.parametrize(("verb", "every"), [("score", 9), ("select", 5), ("fit", 9)])
def test_a_killed_run_ends_the_same(inputs: Path, verb: str, every: int) -> None:
    tally = faults.inject([verb], inputs, every, moments=1, seed=1, samples=16)[verb]
    assert tally.points > 5 and tally.at_points >= 2
    assert not tally.wrong, "\n".join(tally.wrong)
    assert (tally.different, tally.again, tally.rests) == (0, 0, 0)


@pytest.mark.slow
def test_a_killed_loop_ends_the_same(inputs: Path) -> None:
    test_a_killed_run_ends_the_same(inputs, "clean", 31)


@pytest.mark.slow
def test_a_killed_loop_of_two_processes_ends_the_same(inputs: Path) -> None:
    tally = faults.several_processes(inputs, processes=2, kills=2, seed=5)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.at_random >= 1 and tally.found > 0


def test_what_is_compared_can_differ(inputs: Path) -> None:
    """The comparison sees a changed byte, a missing file, a file made again, and a rest."""
    place = inputs / "compared"
    place.mkdir()
    ended = faults.run(faults._commands()["score"], place)
    assert ended[0] == 0
    whole, published = faults.contents(place), faults._published(place)
    table = next(place.glob("score/scores/*.arrow"))
    assert not faults._rests(place)
    table.rename(table.with_name("aside"))
    assert faults.contents(place) != whole
    table.with_name("aside").rename(table)
    assert faults.contents(place) == whole
    content = bytearray(table.read_bytes())
    content[-20] ^= 1
    table.write_bytes(content)
    assert faults.contents(place) != whole and faults._published(place) != published
    (place / "x.partial-host-1").touch()
    assert faults._rests(place) == ["x.partial-host-1"]


def test_a_child_is_killed_where_it_says(inputs: Path) -> None:
    place = inputs / "killed"
    assert faults.run(faults._commands()["score"], place, kill_at=1)[0] == -signal.SIGKILL
    assert not list(place.glob("score/scores/manifest.json"))
