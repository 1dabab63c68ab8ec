"""The benchmark runs, its two sides agree, and its baseline does what it should; no times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts import bench, bench_peer, bench_published
from scripts.bench_measure import (
    Line,
    can_measure_memory,
    interleave,
    markdown,
    memory_lines,
    peak_memory,
)
from scripts.bench_published import Row, cleaned, differences, select
from scripts.bench_workload import SOURCES, draw_lengths


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "report.json"
    parts = ["scoring", "attributes", "training", "weighting", "selection", "tables", "memory"]
    bench.main(["--quick", "--out", str(out), "--parts", *parts])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def agreements(report: dict[str, Any], part: str) -> dict[str, Any]:
    return {
        k: v for line in report["lines"] if line["part"] == part for k, v in line["same"].items()
    }


def test_both_sides_compute_the_same_numbers(report: dict[str, Any]) -> None:
    scoring = agreements(report, "scoring")
    assert set(scoring) == {"nll difference, base", "nll difference, reference"}
    assert max(scoring.values()) <= 2e-5
    assert agreements(report, "training")["gradient error"] <= 5e-6
    assert agreements(report, "attributes") == {"nll identical": True}
    assert agreements(report, "selection") == {"selection identical": True}
    assert agreements(report, "tables") == {"table identical": True}


def test_every_line_was_run_or_says_why_not(report: dict[str, Any]) -> None:
    for line in report["lines"]:
        assert line["values"] or line["note"], line
    against_peer = [x for x in report["lines"] if x["part"] == "training" and "TRL" in x["ratio"]]
    (line,) = against_peer
    if bench_peer.version() is None:
        assert line["note"] == bench_peer.MISSING
    else:
        assert line["same"]["gradient error"] <= 5e-6
        assert line["facts"]["TRL"]["gradient_checkpointing"] is False


def test_the_report_says_where_it_comes_from(report: dict[str, Any]) -> None:
    assert report["options"]["seed"] == 0
    assert report["machine"]["threads"] == 1
    assert {"cpu", "torch", "transformers"} <= set(report["machine"])
    assert "--quick" in report["command"]


def test_a_missing_peer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert bench_peer.version() is None


# -- the baseline, by hand --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.2, [[0, 1], [], [0, 0, 0]]),  # of the two 0.5, the earlier
        (0.4, [[0, 1], [], [1, 0, 0]]),
        (0.79, [[1, 1], [], [1, 0, 0]]),  # int(3.95)
        (0.8, [[1, 1], [], [1, 1, 0]]),  # -0.0 and 0.0 are equal
        (1.0, [[1, 1], [], [1, 1, 1]]),
    ],
)
def test_published_selection(keep: float, expected: list[list[int]]) -> None:
    assert select([[0.1, 0.5], [], [0.5, -0.0, 0.0]], keep) == expected


def test_published_tables_become_labels() -> None:
    rows = [Row([5, 6, 7, 8], [-100, -100, 7, 8]), Row([5, 9], [-100, 9])]
    base = [[0.0, 0.0, 3.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0]]
    reference = [[0.0, 0.0, 1.0, 1.5, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0]]
    scores = differences(base, reference, rows)
    assert scores == [[2.0, -0.5], [0.0]]
    kept = cleaned(rows, select(scores, 0.7))
    assert [row.labels for row in kept] == [[-100, -100, 7, -100], [-100, 9]]
    assert [row.input_ids for row in kept] == [row.input_ids for row in rows]


def test_published_batches_are_padded_to_their_longest() -> None:
    batch = bench_published._pad([Row([5, 6, 7], [-100, 6, 7]), Row([8], [-100])], "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# -- the workload and the measuring -----------------------------------------------------------


def test_the_pool_has_the_papers_aggregates() -> None:
    sources, prompts, responses = draw_lengths(50_000, np.random.default_rng(0))
    assert sum(source.samples for source in SOURCES) == 50_000
    tokens, targets = prompts.sum() + responses.sum(), responses.sum()
    assert tokens == pytest.approx(24.1e6, rel=0.03)
    assert targets / tokens == pytest.approx(0.67, rel=0.02)
    assert responses[sources == 0].sum() / targets == pytest.approx(0.89, rel=0.02)
    assert (prompts + responses).max() == 2048


def test_sides_take_turns_and_the_worst_agreement_counts() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str) -> Callable[[int], Callable[[], int]]:
        def prepare(repeat: int) -> Callable[[], int]:
            calls.append((name, repeat))
            return lambda: repeat

        return prepare

    gaps = {0: 0.5, 1: 0.0, 2: 0.25}
    measured = interleave(
        {"ours": side("ours"), "published": side("published")},
        3,
        "cpu",
        "test",
        lambda results: {"gap": gaps[results["ours"]], "equal": results["ours"] != 1},
    )
    assert calls == [(name, i) for i in (-1, 0, 1, 2) for name in ("ours", "published")]
    assert measured.same == {"gap": 0.5, "equal": False}
    assert len(measured.line("part", "case", "published", "ours").values) == 3


@pytest.mark.skipif(not can_measure_memory("cpu"), reason="needs Linux")
def test_peak_memory_is_that_of_the_work_alone() -> None:
    before = bytearray(b"x") * (64 << 20)
    found = peak_memory(lambda: bytearray(b"x") * (32 << 20), "cpu")
    assert found["peak"] == pytest.approx(32 << 20, rel=0.1)
    runs = {
        "ours": lambda: bytearray(b"x") * (16 << 20),
        "published": lambda: before[: 32 << 20],
        "peer": lambda: before[: 16 << 20],
    }
    lines = list(memory_lines("part", "case", runs, "cpu"))
    assert [line.ratio[13:] for line in lines] == ["ours / published", "ours / peer"]
    assert [line.values[0] for line in lines] == pytest.approx([0.5, 1.0], abs=0.1)


def test_the_table() -> None:
    ran = Line("scoring", "small", "time", [2.0, 4.0, 3.0], {"nll": 1e-6, "equal": True}, ">= 2")
    ran.processor = 2.5
    left_out = Line("training", "small", "time, TRL / ours", [], note=bench_peer.MISSING)
    header, _, first, second = markdown([ran, left_out]).splitlines()
    assert (
        header
        == "| part | case | ratio | median | min .. max | processor time | aim | same numbers |"
    )
    assert first == "| scoring | small | time | 3 | 2 .. 4 | 2.5 | >= 2 | nll 1.0e-06, equal yes |"
    assert second.split(" | ")[3:5] == ["not run", bench_peer.MISSING]
