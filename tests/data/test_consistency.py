"""Cleaned pools from elsewhere: what is not consistent is refused by file and sample."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenclean.data import consistency
from tokenclean.data.cleaned import DATA, CleanedPool, cleaned_schema, read_blocks
from tokenclean.publish import MANIFEST

SCHEMA = cleaned_schema(with_truth=False)


def good(name: str, n: int = 4, **changes: Any) -> dict[str, Any]:
    """A sample of n tokens 10, 11, ..., the second half of which is learnt."""
    ids = list(range(10, 10 + n))
    half = n // 2
    row: dict[str, Any] = {
        "id": name,
        "source": "s",
        "input_ids": ids,
        "labels": [-100] * half + ids[half:],
        "response_mask": [False] * half + [True] * (n - half),
        "weight": [1.0] * n,
        "reason": [0] * n,
        "round": 1,
        **{k: [None] * n for k in ("base_nll", "reference_nll", "score", "priority")},
    }
    return row | changes


def put(folder: Path, table: pa.Table, **manifest: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / DATA)
    stated = {"kind": "cleaned pool", "rows": table.num_rows, **manifest}
    (folder / MANIFEST).write_text(json.dumps(stated))
    return folder


def pool_of(folder: Path, *rows: dict[str, Any], **manifest: Any) -> Path:
    return put(folder, pa.Table.from_pylist(list(rows), schema=SCHEMA), **manifest)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"labels": [300] * 4}, "a label is neither the id of its token nor -100"),
    ({"labels": [-100, -100, 12, 12]}, "a label is neither the id of its token nor -100"),
    ({"response_mask": [False, False, True]}, "response_mask is not as long as its input_ids"),
    ({"labels": [-100, -100, 12]}, "labels is not as long"),
    ({"weight": [1.0] * 5}, "weight is not as long"),
    ({"score": [0.5] * 3}, "score is not as long"),
    ({"score": None}, "score is not as long"),
    ({"weight": None}, "weight is null"),
    ({"labels": None}, "labels is null"),
    ({"input_ids": None}, "input_ids is null"),
    ({"labels": [-100, None, 12, 13]}, "labels holds a null"),
    ({"weight": [1.0, 1.0, None, 1.0]}, "weight holds a null"),
    ({"response_mask": [False, False, True, None]}, "response_mask holds a null"),
    ({"input_ids": [10, 11, -1, 13], "labels": [-100] * 4}, "a negative token id"),
    ({"weight": [1.0, 1.0, float("nan"), 1.0]}, "the weight of a labelled token is not finite"),
    ({"weight": [1.0, 1.0, float("inf"), 1.0]}, "the weight of a labelled token is not finite"),
]
#: what reading alone finds, too
_LISTS = ("is not as long", "null")


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_an_inconsistent_pool_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = pool_of(tmp_path / "p", good("a"), good("b", 6), good("bad one", **changes), good("c"))
    with pytest.raises(ValueError) as caught:
        CleanedPool(folder, tmp_path / "cache")
    assert str(caught.value).startswith(f"{folder / DATA}: sample 'bad one': ")
    assert said in str(caught.value)
    assert not list((tmp_path / "cache").glob("cleaned/*/manifest.json"))
    if any(word in said for word in _LISTS):
        with pytest.raises(ValueError, match="'bad one'"):
            list(read_blocks(folder))


def test_weights_of_tokens_without_a_label_may_be_anything(tmp_path: Path) -> None:
    row = good("a", weight=[float("nan"), float("inf"), 0.5, -1.0])
    table = CleanedPool(pool_of(tmp_path / "p", row), tmp_path / "cache")
    assert table.lists("weight")[0][2:].tolist() == [0.5, -1.0]


def test_ids_are_unique_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenclean.data.cleaned.ROWS_PER_SHARD", 2)
    folder = pool_of(tmp_path / "p", good("a"), good("b"), good("c"), good("b"))
    with pytest.raises(ValueError, match=r"data\.parquet: sample 'b' is there more than once"):
        CleanedPool(folder, tmp_path / "cache")


def test_token_ids_lie_in_the_vocabulary(tmp_path: Path) -> None:
    """Also where the unpacked copy is there already."""
    folder = pool_of(tmp_path / "p", good("a", 3), good("b", 6))  # ids up to 12 and 15
    assert len(CleanedPool(folder, tmp_path / "cache", 16)) == 2
    with pytest.raises(ValueError, match=r"sample 'b': it has a token id beyond .* 15"):
        CleanedPool(folder, tmp_path / "cache", 15)
    with pytest.raises(ValueError, match="sample 'a'"):
        CleanedPool(folder, tmp_path / "cache", 12)


def test_rows_are_no_longer_than_stated(tmp_path: Path) -> None:
    rows = [good("a", 2), good("long", 9), good("c", 2)]
    CleanedPool(pool_of(tmp_path / "p", *rows, max_length=9), tmp_path / "cache")
    folder = pool_of(tmp_path / "p", *rows, max_length=8)
    with pytest.raises(ValueError, match="a sample has 9 tokens, more than the 8"):
        CleanedPool(folder, tmp_path / "cache")  # the copy is there
    for read in (lambda: CleanedPool(folder, tmp_path / "new"), lambda: list(read_blocks(folder))):
        with pytest.raises(ValueError, match="sample 'long': it has more tokens than the 8"):
            read()
    for stated in ("8", 0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"max_length .* is no number of tokens"):
            CleanedPool(pool_of(tmp_path / "p", *rows, max_length=stated), tmp_path / "cache")


@pytest.mark.parametrize(
    ("rows", "manifest"), [(1, {}), (50, {}), (50, {"max_length": 512})], ids=str
)
def test_a_small_file_of_a_huge_row(rows: int, manifest: dict[str, Any], tmp_path: Path) -> None:
    """20 million equal ids in some kilobytes; nothing of them is unpacked."""
    n = 20_000_000
    counts = [0] * (rows - 1) + [n]
    offsets = pa.array(np.append(0, np.cumsum(counts)).astype(np.int32))
    columns: dict[str, Any] = {
        "id": [str(i) for i in range(rows)],
        "source": ["s"] * rows,
        "round": pa.array([1] * rows, pa.int32()),
    }
    for name, kind in (("input_ids", np.int32), ("weight", np.float32)):
        values = pa.array(np.ones(n, kind))
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    columns["labels"] = columns["input_ids"]
    columns["response_mask"] = pa.ListArray.from_arrays(offsets, pa.array(np.ones(n, bool)))
    empty = pa.ListArray.from_arrays(pa.array([0] * (rows + 1), pa.int32()), pa.array([], "int8"))
    columns |= dict.fromkeys(("base_nll", "reference_nll", "score", "priority", "reason"), empty)
    folder = put(tmp_path / "p", pa.table(columns), **manifest)
    del columns
    assert (folder / DATA).stat().st_size < 200_000
    reads: list[Callable[[], Any]] = [
        lambda: CleanedPool(folder, tmp_path / "cache"),
        lambda: list(read_blocks(folder)),
    ]
    for read in reads:
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=r"data\.parquet: .*20,000,0\d\d tokens"):
                read()
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 1_000_000


def test_long_rows_come_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "TOKENS", 20)
    folder = pool_of(tmp_path / "p", *(good(str(i), 8) for i in range(5)))
    blocks = list(read_blocks(folder))
    assert [len(b.ids) for b in blocks] == [2, 2, 1]
    assert [b.first for b in blocks] == [0, 2, 4]


def test_other_writers_types_are_taken_as_ours(tmp_path: Path) -> None:
    """Wider numbers and lists, another order of columns, and a column of somebody's own."""
    table = pa.Table.from_pylist([good("a"), good("b", 6)], schema=SCHEMA)
    wide = table.set_column(
        table.schema.get_field_index("labels"),
        "labels",
        table["labels"].cast(pa.large_list(pa.int64())),
    ).append_column("mine", pa.array([1, 2]))
    folder = put(tmp_path / "p", wide.select(wide.column_names[::-1]))
    found = CleanedPool(folder, tmp_path / "cache")
    assert found.lists("labels")[1].tolist() == [-100, -100, -100, 13, 14, 15]
    assert found.lists("labels")[1].dtype == np.int32 and "mine" not in found.columns


def test_what_is_no_table_of_a_pool(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([good("a")], schema=SCHEMA)
    text = pa.array([["x"] * 4])
    at = table.schema.get_field_index("weight")
    lacking, texts = table.drop_columns(["weight"]), table.set_column(at, "weight", text)
    for wrong, said in ((lacking, "it lacks weight"), (texts, "cannot be read")):
        folder = put(tmp_path / "p", wrong)
        with pytest.raises(ValueError, match=said):
            CleanedPool(folder, tmp_path / "c")
        with pytest.raises(ValueError, match=said):
            list(read_blocks(folder))
    (folder / DATA).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match=r"data\.parquet cannot be read"):
        CleanedPool(folder, tmp_path / "c")
