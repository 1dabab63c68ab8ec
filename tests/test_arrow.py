"""Tables on disk: what is written comes back, mapped and not copied, and never half of it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tokenclean import arrow
from tokenclean.arrow import ArrowTable, ListColumn, TableWriter, TextColumn, list_array, spans
from tokenclean.publish import MANIFEST, complete_folder, read_manifest, write_json

#: Two shards; the second begins with an empty list, the first holds one in the middle.
SHARDS: list[list[list[int]]] = [[[1, 2, 3], [], [4]], [[], [5, 6], [7, 8, 9, 10]]]
ROWS = [row for shard in SHARDS for row in shard]


def write_table(folder: Path, kind: str = "thing", rows: int = 6) -> Path:
    with complete_folder(folder) as partial, TableWriter(partial) as writer:
        for number, shard in enumerate(SHARDS):
            numbers = list_array([np.array(row, dtype=np.int64) for row in shard], pa.int32())
            odd = list_array([np.array([v % 2 == 1 for v in row], bool) for row in shard],
                             pa.bool_())  # fmt: skip
            sparse = pa.array([[v if v > 4 else None for v in row] for row in shard],
                              type=pa.list_(pa.float32()))  # fmt: skip
            names = pa.array([f"{number}/{i}" for i in range(len(shard))])
            batch = pa.record_batch(
                {"name": names, "numbers": numbers, "odd": odd, "sparse": sparse}
            )
            writer.write(batch)
        writer.close()
        write_json(partial / MANIFEST, {"kind": kind, "rows": rows})
    return folder


def test_lists_come_back_row_by_row_and_in_blocks(tmp_path: Path) -> None:
    table = ArrowTable(write_table(tmp_path / "table"), "thing")
    numbers, odd = table.lists("numbers"), table.lists("odd")
    assert len(table) == len(numbers) == 6
    assert table.columns == ["name", "numbers", "odd", "sparse"]
    assert table.values("name") == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [numbers[i].tolist() for i in range(6)] == ROWS
    assert [odd[i].tolist() for i in range(6)] == [[v % 2 == 1 for v in row] for row in ROWS]
    assert numbers.counts().tolist() == [3, 0, 1, 0, 2, 4]
    blocks = [(first, sizes.tolist(), values.tolist()) for first, sizes, values in odd.blocks()]
    assert blocks == [
        (0, [3, 0, 1], [True, False, True, False]),
        (3, [0, 2, 4], [True, False, True, False, True, False]),
    ]
    assert [values.tolist() for _, _, values in numbers.blocks()] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8, 9, 10],
    ]


def test_nulls_come_back_as_nan(tmp_path: Path) -> None:
    sparse = ArrowTable(write_table(tmp_path / "table"), "thing").lists("sparse")
    assert np.isnan(sparse[0]).all()
    assert sparse[0].shape == (3,)
    assert sparse[4].tolist() == [5.0, 6.0]


def test_numbers_are_views_on_the_memory_map(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    table = ArrowTable(write_table(tmp_path / "table"), "thing")
    row = table.lists("numbers")[5]
    assert row.dtype == np.int32
    assert not row.flags.owndata
    assert not row.flags.writeable
    # Nothing of the columns lies in Arrow's own memory: all of it is the file's.
    assert pa.total_allocated_bytes() == before


def test_blocks_are_small_however_long_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenclean.arrow.BLOCK_VALUES", 4)
    rows = [[1], [2, 3], [], [4, 5, 6, 7, 8, 9], [10], [11, 12]]  # ends: 1, 3, 3, 9, 10, 12
    column = ListColumn([list_array([np.array(row) for row in rows], pa.int32())])
    assert [(f, s.tolist(), v.tolist()) for f, s, v in column.blocks()] == [
        (0, [1, 2, 0], [1, 2, 3]),
        (3, [6, 1], [4, 5, 6, 7, 8, 9, 10]),
        (5, [2], [11, 12]),
    ]


def test_sliced_arrays_keep_to_their_slice() -> None:
    whole = list_array([np.array(row) for row in ROWS], pa.int32())
    column = ListColumn([whole.slice(2, 3)])
    assert [column[i].tolist() for i in range(3)] == [[4], [], [5, 6]]
    assert column.counts().tolist() == [1, 0, 2]
    assert [(f, s.tolist(), v.tolist()) for f, s, v in column.blocks()] == [
        (0, [1, 0, 2], [4, 5, 6])
    ]


@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3, 4, 5], [4, 5], [0, 2, 5], [5, 0, 3, 4, 2, 2], [1], [1, 3], []]
)
def test_many_rows_at_once_are_those_rows_end_to_end(tmp_path: Path, rows: list[int]) -> None:
    table = ArrowTable(write_table(tmp_path / "table"), "thing")
    values = [v for row in rows for v in ROWS[row]]
    expected = {
        "numbers": values,
        "odd": [v % 2 == 1 for v in values],
        "sparse": [float(v) if v > 4 else None for v in values],
    }
    for name, want in expected.items():
        counts, got = table.lists(name).take(np.array(rows, dtype=np.int64))
        assert counts.tolist() == [len(ROWS[row]) for row in rows]
        assert [None if v != v else v for v in got.tolist()] == want
    names = table.texts("name")
    wanted = [["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"][row] for row in rows]
    assert names.take(np.array(rows, dtype=np.int64)).to_pylist() == wanted
    assert [names[row] for row in rows] == wanted


def test_neighbours_are_taken_without_a_copy(tmp_path: Path) -> None:
    numbers = ArrowTable(write_table(tmp_path / "table"), "thing").lists("numbers")
    assert not numbers.take(np.array([4, 5]))[1].flags.owndata


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    table = ArrowTable(write_table(tmp_path / "table"), "thing")
    for column in (table.lists("numbers"), table.texts("name")):
        for row in (-1, 6):
            with pytest.raises(IndexError):
                column[row]
            with pytest.raises(IndexError):
                column.take(np.array([2, row]))


def test_texts_in_order_and_which_of_them_are_among_others(tmp_path: Path) -> None:
    names = ArrowTable(write_table(tmp_path / "table"), "thing").texts("name")
    assert list(names) == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert names.among({"1/1", "0/2", "9/9"}).tolist() == [False, False, True, False, True, False]
    assert names.among(set()).tolist() == [False] * 6
    assert TextColumn([]).among({"a"}).tolist() == []


def test_spans_by_hand() -> None:
    found = spans(np.array([7, 0, 3, 3]), np.array([2, 0, 3, 1]))
    assert found.tolist() == [7, 8, 3, 4, 5, 3]


def test_an_empty_column_has_no_rows() -> None:
    column = ListColumn([])
    assert len(column) == 0
    assert column.counts().tolist() == []
    assert list(column.blocks()) == []
    assert list_array([], pa.int32()).to_pylist() == []


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is not a thing: it has no manifest\.json"):
        read_manifest(tmp_path / "nothing", "thing")
    folder = write_table(tmp_path / "table", kind="other")
    with pytest.raises(ValueError, match="holds a other, not a thing"):
        ArrowTable(folder, "thing")


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    folder = write_table(tmp_path / "table")
    (folder / "part-00000.arrow").unlink()
    with pytest.raises(ValueError, match=r"part-00000\.arrow is missing"):
        ArrowTable(folder, "thing")


# -- files of several shards ----------------------------------------------------------------------


def one_number(number: int, rows: int = 2) -> pa.RecordBatch:
    return pa.record_batch({"number": pa.array([number] * rows, pa.int64())})


@pytest.mark.parametrize(
    ("shards", "files"), [(0, []), (1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 3]), (7, [3, 3, 1])]
)
def test_a_file_holds_several_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, files: list[int]
) -> None:
    monkeypatch.setattr(arrow, "SHARDS_PER_FILE", 3)
    with complete_folder(tmp_path / "table") as partial:
        with TableWriter(partial) as writer:
            for number in range(shards):
                writer.write(one_number(number, rows=number % 3))
        rows = sum(number % 3 for number in range(shards))
        write_json(partial / MANIFEST, {"kind": "thing", "rows": rows})
    parts = sorted((tmp_path / "table").glob("part-*"))
    assert [part.name for part in parts] == [f"part-{i:05d}.arrow" for i in range(len(files))]
    assert [pa.ipc.open_file(str(part)).num_record_batches for part in parts] == files
    table = ArrowTable(tmp_path / "table", "thing")
    assert len(table.batches()) == shards
    assert table.values("number") == [n for n in range(shards) for _ in range(n % 3)]


def test_the_same_shards_give_the_same_bytes_and_one_shard_those_it_always_had(
    tmp_path: Path,
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with TableWriter(tmp_path / name) as writer:
            for number in range(arrow.SHARDS_PER_FILE + 1):
                writer.write(one_number(number))
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [len(names) for names in files] == [2, 2]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    alone = pa.BufferOutputStream()
    with pa.ipc.new_file(alone, one_number(0).schema) as plain:
        plain.write_batch(one_number(arrow.SHARDS_PER_FILE))
    assert files[0][1].read_bytes() == alone.getvalue().to_pybytes()


def test_a_file_of_many_shards_is_one_map(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "table") as partial:
        with TableWriter(partial) as writer:
            for number in range(130):  # 64 + 64 + 2
                writer.write(one_number(number))
        write_json(partial / MANIFEST, {"kind": "thing", "rows": 260})
    table = ArrowTable(tmp_path / "table", "thing")
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux
        ours = [line for line in maps.read_text().splitlines() if str(tmp_path) in line]
        assert len(ours) == 3
    assert len(table) == 260


def test_a_writer_holds_no_shard(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    writer = TableWriter(tmp_path)
    for _ in range(50):
        writer.write(one_number(1, rows=1 << 16))  # 512 KB
        assert pa.total_allocated_bytes() - before < 1 << 20
    writer.close()


def test_a_file_without_its_end_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    with pytest.raises(KeyError), TableWriter(folder) as writer:
        writer.write(one_number(1))
        raise KeyError
    write_json(folder / MANIFEST, {"kind": "thing", "rows": 2})
    with pytest.raises(ValueError, match=r"part-00000\.arrow is damaged"):
        ArrowTable(folder, "thing")


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_table(tmp_path / "table")

    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(pa, "memory_map", full)
    with pytest.raises(ValueError, match=r"part-00000\.arrow could not be mapped.*max_map_count"):
        ArrowTable(folder, "thing")
