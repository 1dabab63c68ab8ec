"""`clean` over several processes: the same bytes, and mask files that nothing is left of."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_exchange import in_processes

from tokenclean.arrow import TableWriter, list_array
from tokenclean.cleaning import apply
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.cleaned import DATA
from tokenclean.data.pool import KIND, TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.scoring.table import ScoreTable, write_scores
from tokenclean.selection import exchange as exchanges
from tokenclean.selection.exchange import Exchange
from tokenclean.selection.rule import KEPT
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
        with TableWriter(partial) as writer:
            writer.write(pa.record_batch(columns))
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
    monkeypatch.setattr(exchanges, "PIECE", 17)  # of some hundred tokens

    def files(name: str) -> list[bytes]:
        return [(tmp_path / name / file).read_bytes() for file in ("data.parquet", MANIFEST)]

    def work(exchange: Exchange) -> list[Any]:
        assert exchange.processes == count
        found = []
        for i, config in enumerate(CONFIGS):
            selected = clean(scored(tables), config, 5, tmp_path / f"together_{i}")
            facts = selected.tokens, selected.kept, selected.ranked, selected.cut
            found.append((np.array(selected.keep), *facts))
        return found

    assert len(scored(tables).parts) > 2 * count
    together = in_processes(count, tmp_path / "processes", work)
    for i, config in enumerate(CONFIGS):
        alone = clean(scored(tables), config, 5, tmp_path / f"alone_{i}")
        assert 0 < alone.kept < alone.ranked
        assert files(f"together_{i}") == files(f"alone_{i}")
        assert len(alone.keep) == alone.tokens
        stored = pq.read_table(tmp_path / f"together_{i}" / DATA).to_pydict()
        reasons, responses = (np.concatenate(stored[n]) for n in ("reason", "response_mask"))
        assert ((reasons[responses] == KEPT) == alone.keep).all()
        assert np.array_equal(np.concatenate([found[i][0] for found in together]), alone.keep)
        for found in together:
            assert 0 < len(found[i][0]) < alone.tokens
            assert found[i][1:] == (alone.tokens, alone.kept, alone.ranked, alone.cut)
    names = {f"{how}_{i}" for how in ("together", "alone") for i in range(len(CONFIGS))}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "processes"}


def test_an_error_of_the_writer_ends_all(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "BLOCK_VALUES", 64)
    monkeypatch.setattr(exchanges, "PIECE", 17)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    def full_later(folder: Path, batches: Iterator[pa.RecordBatch], *more: Any) -> None:
        for _ in range(len(scored(tables).parts) // 2 + 2):  # the second process has sent some
            next(batches)
        full()

    def work(exchange: Exchange) -> list[str]:
        messages = []
        for place, write in (("write_cleaned_pool", full_later), ("_write", full)):
            with monkeypatch.context() as patch:
                patch.setattr(apply, place, write)
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


def test_a_sender_that_dies_is_missed(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "BLOCK_VALUES", 64)
    monkeypatch.setattr(exchanges, "PIECE", 17)
    folder = tmp_path / "processes"

    def work(exchange: Exchange) -> str:
        if exchange.rank == 1:
            (folder / "1").write_bytes(pickle.dumps(""))
            monkeypatch.setattr(Exchange, "_pass", lambda *_: os._exit(0))
        with pytest.raises(ConnectionError) as caught:
            clean(scored(tables), CONFIGS[0], 5, tmp_path / "cleaned")
        (folder / "0").write_bytes(pickle.dumps(str(caught.value)))
        os._exit(0)  # nobody is left to take leave of

    assert in_processes(2, folder, work)[0].startswith("another process is gone")
    assert [path.name for path in tmp_path.iterdir()] == ["processes"]


def test_a_full_disk_is_an_error_that_names_the_folder(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        if size > 100:  # the second process has more to keep than the first
            raise OSError(errno.ENOSPC, "No space left on device")

    def work(exchange: Exchange) -> str:
        own = scored(tables)
        own.parts = [slice(0, 3), slice(3, ROWS)]
        with pytest.raises(ValueError) as caught:
            clean(own, CONFIGS[0], 5, tmp_path / "cleaned")
        return str(caught.value)

    monkeypatch.setattr(os, "posix_fallocate", full)
    first, second = in_processes(2, tmp_path / "processes", work)
    assert second.startswith(f"{tmp_path / 'cleaned'} could not be written: No space left on")
    assert first == f"process 1: {second}"
    assert [path.name for path in tmp_path.iterdir()] == ["processes"]


def test_a_mask_has_room_and_no_name(tmp_path: Path) -> None:
    mask = apply.mask_beside(tmp_path / "made" / "cleaned", 1_000_000)
    assert mask.shape == (1_000_000,) and mask.dtype == bool and not mask.any()
    assert not list((tmp_path / "made").iterdir())
    mask[999_999] = True
    assert np.flatnonzero(mask).tolist() == [999_999]
    assert apply.mask_beside(tmp_path / "made" / "cleaned", 0).shape == (0,)
