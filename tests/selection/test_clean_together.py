"""`clean` over several processes: the same bytes, and a mask file that nothing is left of."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_exchange import in_processes

from tokenclean.arrow import list_array, write_shard
from tokenclean.cleaning import apply
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.pool import KIND, TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.scoring.table import ScoreTable, write_scores
from tokenclean.selection.exchange import Exchange
from tokenclean.selection.select import SelectionConfig

ROWS = 40


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of some hundred tokens and two score tables full of ties."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(4)
    lengths = rng.integers(2, 30, ROWS)
    with complete_folder(folder / "pool") as partial:
        columns = {
            "id": [f"sample-{row}" for row in range(ROWS)],
            "source": [f"source-{row % 3}" for row in range(ROWS)],
            "input_ids": list_array([np.arange(n, dtype=np.int32) for n in lengths], pa.int32()),
            "response_mask": list_array([np.arange(n) >= n // 3 + 1 for n in lengths], pa.bool_()),
        }
        write_shard(partial, 0, pa.record_batch(columns))
        names = ("fingerprint", "tokenizer", "vocabulary", "template")
        stated: dict[str, Any] = dict.fromkeys(names, "made up")
        stated |= {"kind": KIND, "max_length": 30, "eos_id": 1, "statistics": {}, "rows": ROWS}
        write_json(partial / MANIFEST, stated)
    rows = TokenRows(TokenPool(folder / "pool"))
    for model, seen in (("base", []), ("reference", ["sample-3", "sample-30"])):
        losses = rng.integers(0, 8, int(rows.counts.sum())).astype(np.float32) / 4
        manifest = {"pool": "made up", "model": model, "trained_on": seen}
        against = ScoreTable(folder / "base") if model == "reference" else None
        write_scores(folder / model, rows, {"nll": losses}, manifest, against)
    return folder


def scored(tables: Path) -> ScoredRows:
    base, reference = (ScoreTable(tables / name) for name in ("base", "reference"))
    return ScoredRows(TokenPool(tables / "pool"), np.arange(ROWS), base, reference, round=1)


CONFIGS = [
    SelectionConfig(keep=0.4),
    SelectionConfig(keep=0.4, exclude_seen=True, always_keep_eos=True),
    SelectionConfig("random", "sample", 0.5),
    SelectionConfig("length", "whole_sample", 0.5),
    SelectionConfig("soft"),
]


@pytest.mark.parametrize("count", [2, 4])
def test_the_cleaned_pool_has_the_same_bytes(
    count: int, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "BLOCK_VALUES", 64)  # some ten parts instead of one

    def files(name: str) -> list[bytes]:
        return [(tmp_path / name / file).read_bytes() for file in ("data.parquet", MANIFEST)]

    def work(exchange: Exchange) -> list[Any]:
        assert exchange.processes == count
        found = []
        for i, config in enumerate(CONFIGS):
            selected = clean(scored(tables), config, 5, tmp_path / f"together_{i}")
            found.append((np.array(selected.keep), selected.kept, selected.ranked, selected.cut))
        return found

    assert len(scored(tables).parts) > 2 * count
    together = in_processes(count, tmp_path / "processes", work)
    for i, config in enumerate(CONFIGS):
        alone = clean(scored(tables), config, 5, tmp_path / f"alone_{i}")
        assert 0 < alone.kept < alone.ranked
        assert files(f"together_{i}") == files(f"alone_{i}")
        for found in together:
            assert np.array_equal(found[i][0], alone.keep)
            assert found[i][1:] == (alone.kept, alone.ranked, alone.cut)
    names = {f"{how}_{i}" for how in ("together", "alone") for i in range(len(CONFIGS))}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "processes"}


def test_an_error_of_the_writer_ends_all(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    def work(exchange: Exchange) -> list[str]:
        messages = []
        for place in ("_write", "_reserve"):
            with monkeypatch.context() as patch:
                patch.setattr(apply, place, full)
                try:
                    clean(scored(tables), CONFIGS[0], 5, tmp_path / "cleaned")
                except (OSError, ValueError) as error:
                    messages.append(f"{type(error).__name__}: {error}")
        return messages

    text = "[Errno 28] No space left on device: 'there'"
    first, second = in_processes(2, tmp_path / "processes", work)
    assert first == [f"OSError: {text}"] * 2
    assert second == [f"ValueError: process 0: {text}"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["processes"]


def test_a_full_disk_is_an_error_that_names_the_mask(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left .*cleaned\.mask\.partial-"):
        clean(scored(tables), CONFIGS[0], 5, tmp_path / "cleaned")
    assert not list(tmp_path.iterdir())


def test_masks_of_dead_processes_are_swept(tables: Path, tmp_path: Path) -> None:
    clean(scored(tables), CONFIGS[0], 5, tmp_path / "cleaned")
    host = apply.partial_name(tmp_path / "x").name.split("partial-")[1].rsplit("-", 1)[0]
    dead = tmp_path / f"cleaned.mask.partial-{host}-4194305"  # above every process id
    dead.write_bytes(b"\0")
    clean(scored(tables), CONFIGS[0], 5, tmp_path / "cleaned")
    assert [path.name for path in tmp_path.iterdir()] == ["cleaned"]
