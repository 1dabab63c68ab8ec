"""The ledger: what adds up, what is written, and how it reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenclean import cli
from tokenclean.costs import (
    COSTS,
    COSTS_TABLE,
    Cost,
    Ledger,
    cost_table,
    directory_bytes,
    peak_memory,
    quantity,
    reset_peak,
)
from tokenclean.models import Network

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time stands still until a test moves it."""
    watch = SimpleNamespace(now=100.0)
    monkeypatch.setattr("tokenclean.costs.time.perf_counter", lambda: watch.now)
    return watch


def test_a_stage_is_timed_and_the_model_asked(tmp_path: Path, clock: SimpleNamespace) -> None:
    network = SimpleNamespace(seconds=5.0, tokens=70)
    ledger = Ledger(tmp_path, CPU, begun=90.0)
    with ledger.measure("arm", "train", 2, lambda: network) as cost:
        clock.now += 4.0
        network.seconds += 3.0
        network.tokens += 30
        cost.samples, cost.tokens, cost.flops = 6, 25, 600
    (row,) = ledger.rows
    assert (row.arm, row.stage, row.round) == ("arm", "train", 2)
    assert (row.seconds, row.model_seconds, row.samples) == (4.0, 3.0, 6)
    assert row.tokens == 30  # counted, where the block knew only the 25 without padding
    # 10 s from the beginning of the call to the stage, 3 of all 14 inside the model
    summary = ledger.summary()
    assert summary["wall_seconds"] == 14.0 and summary["train_seconds"] == 4.0
    assert summary["outside_model_share"] == pytest.approx(1 - 3 / 14, abs=1e-4)


def test_tokens_of_other_processes_count(tmp_path: Path) -> None:
    network = SimpleNamespace(tokens=0)
    ledger = Ledger(tmp_path, CPU, 0.0, rank=1, world=2)
    with ledger.measure("arm", "score", network=lambda: network):
        network.tokens = 40
    assert ledger.rows[0].tokens == 80
    assert not (tmp_path / COSTS).exists()  # the first process writes


def test_a_network_that_counts_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, CPU, 0.0)
    with ledger.measure("arm", "select") as cost:
        cost.tokens = 25
    assert ledger.rows[0].tokens == 25
    assert "outside_model_share" not in ledger.summary()


def test_calls_add_up(tmp_path: Path, clock: SimpleNamespace) -> None:
    """A call that is cut off, one that goes on, and one that finds everything done."""
    first = Ledger(tmp_path, CPU, begun=99.0)
    with pytest.raises(KeyboardInterrupt), first.measure("arm", "train", 1):
        clock.now += 7.0
        raise KeyboardInterrupt
    second = Ledger(tmp_path, CPU, begun=clock.now - 1.0)
    with second.measure("arm", "train", 1) as cost:
        clock.now += 5.0
        cost.samples = 6
    with second.measure("arm", "train", 2) as cost:
        clock.now += 2.0
        cost.samples = 4
    stored = (tmp_path / COSTS).read_bytes()
    third = Ledger(tmp_path, CPU, begun=clock.now)
    clock.now += 100.0
    third.store()
    assert (tmp_path / COSTS).read_bytes() == stored
    value = json.loads(stored)
    assert value["wall_seconds"] == 8.0 + 8.0
    assert [(r["round"], r["seconds"], r["samples"]) for r in value["rows"]] == [
        (1, 12.0, 6),
        (2, 2.0, 4),
    ]
    assert third.summary()["train_seconds"] == 14.0


def test_the_peak_is_the_largest_not_the_sum() -> None:
    cost = Cost("a", "train", peak_memory=5, disk=5)
    cost.add(Cost("a", "train", peak_memory=3, disk=3))
    assert (cost.peak_memory, cost.disk) == (5, 8)


def test_the_table() -> None:
    rows = [
        Cost("base", "score", None, 2.0, 0.5, 10, 1500, 1234567, 3 * 10**9, 2 * 10**9, 12),
        Cost("arm", "train", 3, 130.0, 0.0, 10, 500, 0, 10**9, 10**9, 0),
    ]
    lines = cost_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == [
        *("base", "score", "-", "10", "1.50 k", "1.23 M", "3.00 G", "2.0 s", "0.5 s"),
        *("6.00 G", "2.00 GB", "12 B"),
    ]
    assert cells[3][:3] == ["arm", "train", "3"] and cells[3][7:10] == ["2 min", "-", "-"]
    # the speed of all is that of the stages whose model was timed: 3 G in half a second
    assert cells[4][6:10] == ["4.00 G", "2 min", "0.5 s", "6.00 G"]
    assert cells[4][:4] == ["all", "", "-", "20"] and cells[4][10:] == ["2.00 GB", "12 B"]
    assert {len(line) for line in cells} == {12}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "-"), (7, "7"), (999, "999"), (1000, "1.00 k"), (12345, "12.3 k")),
        *((123456, "123 k"), (999_999_999, "1.00 G"), (4e21, "4.00 Z"), (4e24, "4000 Z")),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


def test_the_files_of_a_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", CPU, 0.0)
    with ledger.measure("arm", "score"):
        pass
    assert "| arm | score |" in (tmp_path / "run" / COSTS_TABLE).read_text()


def test_links_take_no_room(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"12345")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b" / "file")
    assert directory_bytes([tmp_path / "a", tmp_path / "missing"]) == 5


def test_the_peak_holds_what_was_allocated() -> None:
    reset_peak(CPU)
    before = peak_memory(CPU)
    tensor = torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory(CPU) >= before + 200 * 2**20
    del tensor


@pytest.mark.parametrize("verb", ["fit", "score", "clean"])
def test_a_disk_without_room_is_refused_before_a_model_is_read(
    verb: str,
    tmp_path: Path,
    pool_file: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = SimpleNamespace(total=10**6, used=10**6 - 100, free=100)
    monkeypatch.setattr("tokenclean.costs.shutil.disk_usage", lambda _: free)
    arguments = [
        *(verb, "--model.base.name", str(model_folder), "--data.path", str(pool_file)),
        *("--outputs", str(tmp_path), "--data.cache_dir", str(tmp_path / "cache")),
        *("--data.max_length", "128", "--name", "run"),
    ]
    if verb == "clean":
        arguments += ["--loop.arms", '{"full": {"schedule": "fixed_model", "rule": "full"}}']
    monkeypatch.setattr(Network, "load", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(
        r"--outputs: .*run is going to take about [\d.]+ [kM]B more.* 100 B left", error
    )
