"""Score tables on disk: what the model was trained on, and files of many rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tokenclean import arrow
from tokenclean.arrow import TableWriter, list_array
from tokenclean.cleaning.apply import ScoredRows
from tokenclean.data.pool import KIND, TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.scoring import table as table_module
from tokenclean.scoring.table import TRAINED_ON, ScoreTable, write_scores

ROWS = 7


@pytest.fixture
def pool(tmp_path: Path) -> TokenPool:
    """Rows of one prompt token and 1 to 7 response tokens."""
    with complete_folder(tmp_path / "pool") as partial:
        sizes = range(2, ROWS + 2)
        columns = {
            "id": [f"sample-{row}" for row in range(ROWS)],
            "source": ["here"] * ROWS,
            "input_ids": list_array([np.arange(n, dtype=np.int32) for n in sizes], pa.int32()),
            "response_mask": list_array([np.arange(n) > 0 for n in sizes], pa.bool_()),
        }
        with TableWriter(partial) as writer:
            writer.write(pa.record_batch(columns))
        stated: dict[str, Any] = dict.fromkeys(("fingerprint", "tokenizer", "vocabulary"), "made")
        stated |= {"kind": KIND, "eos_id": 1, "statistics": {}, "rows": ROWS}
        write_json(partial / MANIFEST, stated)
    return TokenPool(tmp_path / "pool")


def write(folder: Path, pool: TokenPool, trained_on: list[str]) -> ScoreTable:
    rows = TokenRows(pool)
    losses = np.arange(28, dtype=np.float32)  # 1 + ... + 7
    write_scores(
        folder, rows, {"nll": losses}, {"pool": "made", "model": "m", "trained_on": trained_on}
    )
    return ScoreTable(folder)


def seen(pool: TokenPool, reference: ScoreTable) -> list[int]:
    rows = np.array([0, 2, 3, 5])
    return np.flatnonzero(ScoredRows(pool, rows, None, reference, round=1).seen).tolist()


def test_ids_lie_beside_the_table(pool: TokenPool, tmp_path: Path) -> None:
    table = write(tmp_path / "table", pool, ["sample-5", "elsewhere", "sample-3", "sample-1"])
    assert json.loads((tmp_path / "table" / MANIFEST).read_text())["trained_on"] == 4
    assert set(table.manifest["files"]) == {"part-00000.arrow", TRAINED_ON}
    assert table.trained_on().to_pylist() == ["elsewhere", "sample-1", "sample-3", "sample-5"]
    assert seen(pool, table) == [2, 3]  # rows 3 and 5 of 0, 2, 3, 5


def test_many_ids_come_in_pieces(
    pool: TokenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "_TEXTS", 2)
    ids = ["a", "b", "c", "sample-0", "sample-2"]
    table = write(tmp_path / "table", pool, ids)
    assert table.trained_on().num_chunks == 3 and table.trained_on().to_pylist() == ids
    assert seen(pool, table) == [0, 1]


def test_no_ids_need_no_file(pool: TokenPool, tmp_path: Path) -> None:
    table = write(tmp_path / "table", pool, [])
    assert {path.name for path in table.folder.iterdir()} == {"part-00000.arrow", MANIFEST}
    assert table.manifest["trained_on"] == 0 and table.trained_on().to_pylist() == []
    assert seen(pool, table) == []


def test_ids_in_the_manifest_of_an_older_table_count(pool: TokenPool, tmp_path: Path) -> None:
    write(tmp_path / "table", pool, [])
    manifest = json.loads((tmp_path / "table" / MANIFEST).read_text())
    write_json(tmp_path / "table" / MANIFEST, {**manifest, "trained_on": ["sample-2", "x"]})
    table = ScoreTable(tmp_path / "table")
    assert table.trained_on().to_pylist() == ["sample-2", "x"]
    assert seen(pool, table) == [1]


def test_ids_that_are_damaged_are_refused(pool: TokenPool, tmp_path: Path) -> None:
    folder = write(tmp_path / "table", pool, ["a", "b"]).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "trained_on": 3})
    with pytest.raises(ValueError, match=r"trained_on\.arrow is damaged: it holds 2 ids, and .* 3"):
        ScoreTable(folder).trained_on()
    for wrong in ("yes", None, {"a": 1}):
        write_json(folder / MANIFEST, {**manifest, "trained_on": wrong})
        with pytest.raises(ValueError, match=r"is damaged: it states no trained_on"):
            ScoreTable(folder)
    write_json(folder / MANIFEST, {**manifest, "trained_on": ["a", 1]})
    with pytest.raises(ValueError, match=r"its trained_on holds something else than ids"):
        ScoreTable(folder).trained_on()
    content = (folder / TRAINED_ON).read_bytes()
    write_json(folder / MANIFEST, {k: v for k, v in manifest.items() if k != "files"})
    numbers = pa.record_batch({"value": pa.array([1, 2])}), pa.record_batch({"x": pa.array(["a"])})
    for batch in numbers:
        with TableWriter(tmp_path) as writer:
            writer.write(batch)
        (tmp_path / "part-00000.arrow").rename(folder / TRAINED_ON)
        with pytest.raises(ValueError, match=r"trained_on\.arrow is damaged"):
            ScoreTable(folder).trained_on()
    (folder / TRAINED_ON).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"trained_on\.arrow is damaged"):
        ScoreTable(folder).trained_on()
    (folder / TRAINED_ON).unlink()
    with pytest.raises(ValueError, match=r"trained_on\.arrow is damaged"):
        ScoreTable(folder).trained_on()


def test_how_rows_lie_in_files_changes_nothing(
    pool: TokenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write(tmp_path / "one", pool, ["a"])
    monkeypatch.setattr(table_module, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(arrow, "SHARDS_PER_FILE", 3)
    two = write(tmp_path / "two", pool, ["a"])
    assert len(list(two.folder.glob("part-*"))) == 2  # of 3 + 1 shards
    assert [batch.num_rows for batch in two.batches()] == [2, 2, 2, 1]
    assert two.manifest["content"] == one.manifest["content"]
    for row in range(ROWS):
        start = row * (row + 1) // 2
        assert two.of_row(row).tolist() == list(range(start, start + row + 1))
