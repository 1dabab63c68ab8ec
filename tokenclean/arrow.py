"""Tables on disk: Arrow shards with a manifest, written once, read through memory maps.

A table is a folder of ``part-00000.arrow`` files (Arrow IPC) and a ``manifest.json``. A file holds
some shards (record batches) of rows and is mapped as one, for a process may have some ten thousand
maps. The folder appears under its final name only when it is complete, so an interrupted writer
leaves nothing that could be mistaken for a result.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, ClassVar, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenclean.publish import MANIFEST, read_manifest

#: Rows per shard, and so what a writer holds in memory: some MB for samples of ordinary length.
ROWS_PER_SHARD = 1024
SHARDS_PER_FILE = 64
#: Strings of `write_texts` in one record batch, which may have 2 GB.
_TEXTS = 1 << 16
#: Values looked at at a time: enough to forget Python, few enough to stay in the cache.
BLOCK_VALUES = 1 << 17


class TableWriter:
    """Writes the shards of a table one after the other, `SHARDS_PER_FILE` to a file.

    `close` ends the last file, as does leaving a ``with`` block without an error. Memory holds none
    of the shards.

    Args:
        folder: gets the files; it must be there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards = 0
        self._open: tuple[pa.OSFile, pa.RecordBatchFileWriter] | None = None

    def write(self, shard: pa.RecordBatch) -> None:
        """Append a shard; all of a table have one schema."""
        if self._open is None:
            number = self._shards // SHARDS_PER_FILE
            sink = pa.OSFile(str(self.folder / f"part-{number:05d}.arrow"), "wb")
            self._open = sink, pa.ipc.new_file(sink, shard.schema)
        self._open[1].write_batch(shard)
        self._shards += 1
        if self._shards % SHARDS_PER_FILE == 0:
            self.close()

    def close(self) -> None:
        """End the file that is being written."""
        if self._open is not None:
            sink, writer = self._open
            self._open = None
            try:
                writer.close()
            finally:
                sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:  # else there is no table, and the error counts
            self.close()


def write_texts(path: Path, values: Sequence[str]) -> None:
    """Write strings as a file of their own, beside the parts of a table."""
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("value", pa.string())])) as writer,
    ):
        for first in range(0, len(values), _TEXTS):
            some = pa.array(values[first : first + _TEXTS], pa.string())
            writer.write_batch(pa.record_batch({"value": some}))


def read_texts(path: Path) -> pa.ChunkedArray:
    """The strings of such a file, on its memory map.

    Raises:
        ValueError: naming the file, if it is not what `write_texts` wrote.
    """
    try:
        chunks = [batch.column("value") for batch in _batches_of(path)]
        return pa.chunked_array(chunks, pa.string())
    except (KeyError, TypeError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _mapped(path: Path) -> pa.MemoryMappedFile:
    try:
        return pa.memory_map(str(path), "r")
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise _damaged(path, error) from error
        # Nothing is wrong with the file, and nobody is to be told to delete it.
        raise ValueError(
            f"{path} could not be mapped. A process may hold so many maps as the kernel's "
            "vm.max_map_count says; raise it, or use fewer tables at once"
        ) from error


def _batches_of(path: Path) -> list[pa.RecordBatch]:
    mapped = _mapped(path)
    try:
        # The arrays keep their map alive.
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged: {str(error)[:200]}; delete the folder and write it again"
    )


def list_array(arrays: list[np.ndarray], dtype: pa.DataType) -> pa.ListArray:
    """NumPy rows as one Arrow list array."""
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return lists_of([len(a) for a in arrays], pa.array(values, type=dtype))


def lists_of(counts: Sequence[int] | np.ndarray, values: np.ndarray | pa.Array) -> pa.ListArray:
    """Values that lie end to end as one Arrow list array.

    Args:
        counts: length of each row, shape (R,), summing to n.
        values: of any type, shape (n,); an Arrow array may hold nulls.
    """
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``starts[i], starts[i] + 1, ...``, ``counts[i]`` of them, for every i, end to end; int64."""
    shifts = starts - (np.cumsum(counts) - counts)
    return np.repeat(shifts, counts) + np.arange(int(counts.sum()))


class _Column:
    """Rows of a column that lies in chunks, one per shard."""

    def __init__(self, chunks: list[pa.Array]):
        # A list, since bisecting one is several times faster than searching an array for one row.
        self._starts = [0, *accumulate(len(c) for c in chunks)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, row: int) -> tuple[int, int]:
        """Chunk of a row, and the row's index in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def _runs(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Neighbours among ``rows`` that share a chunk: the chunk, and their indices in it."""
        if len(rows) == 0:
            return
        if not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        edges = np.flatnonzero(np.diff(chunks)) + 1
        for run, chunk in zip(np.split(rows, edges), chunks[np.append(0, edges)], strict=True):
            yield int(chunk), run - self._starts[chunk]


class ListColumn(_Column):
    """One list column as NumPy views on the memory map; ``column[i]`` is row i's array."""

    def __init__(self, chunks: list[pa.Array]):
        self._values = [c.values for c in chunks]
        self._offsets = [c.offsets.to_numpy() for c in chunks]
        super().__init__(chunks)
        self._views = [
            None if pa.types.is_boolean(v.type) or v.null_count else v.to_numpy()
            for v in self._values
        ]

    def __getitem__(self, row: int) -> np.ndarray:
        chunk, i = self._place(row)
        return self._slice(chunk, int(self._offsets[chunk][i]), int(self._offsets[chunk][i + 1]))

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Many rows at once, in any order.

        Args:
            rows: row numbers, int64, shape (R,).

        Returns:
            Their list lengths, int64, shape (R,), and their values end to end; a read-only view
            where the rows are neighbours in one shard.

        Raises:
            IndexError: for a row that the column does not have.
        """
        counts, parts = [], []
        for chunk, places in self._runs(rows):
            starts, stops = self._offsets[chunk][places], self._offsets[chunk][places + 1]
            first = int(starts.min())
            values = self._slice(chunk, first, int(stops.max()))
            if (starts[1:] != stops[:-1]).any():
                values = values[spans(starts.astype(np.int64) - first, stops - starts)]
            counts.append(stops - starts)
            parts.append(values)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0)
        return (
            np.concatenate(counts).astype(np.int64),
            parts[0] if len(parts) == 1 else np.concatenate(parts),
        )

    def _slice(self, chunk: int, start: int, stop: int) -> np.ndarray:
        view = self._views[chunk]
        if view is not None:
            return view[start:stop]
        return self._values[chunk].slice(start, stop - start).to_numpy(zero_copy_only=False)

    def counts(self) -> np.ndarray:
        """List length of every row, int64."""
        if not self._offsets:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([np.diff(o) for o in self._offsets]).astype(np.int64)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Neighbouring rows of a shard, about `BLOCK_VALUES` values at a time.

        Yields:
            The first row, the list lengths of the rows, their values end to end.
        """
        for k, offsets in enumerate(self._offsets):
            places = (offsets - offsets[0]) // BLOCK_VALUES
            edges = np.flatnonzero(np.diff(places[1:])) + 1
            for low, high in pairwise([0, *edges.tolist(), len(offsets) - 1]):
                if low < high:
                    sizes = np.diff(offsets[low : high + 1])
                    values = self._slice(k, offsets[low], offsets[high])
                    yield self._starts[k] + low, sizes, values


class TextColumn(_Column, Sequence[str]):
    """One string column, read from the memory map value by value."""

    def __init__(self, chunks: list[pa.Array]):
        self._chunks = chunks
        super().__init__(chunks)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        chunk, i = self._place(row)
        value: str = self._chunks[chunk][i].as_py()
        return value

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            yield from chunk.to_pylist()

    def take(self, rows: np.ndarray) -> pa.StringArray:
        """Many values at once, in any order.

        Args:
            rows: row numbers, int64, shape (R,).

        Raises:
            IndexError: for a row that the column does not have.
        """
        parts = [self._chunks[chunk].take(pa.array(places)) for chunk, places in self._runs(rows)]
        return pa.concat_arrays(parts) if parts else pa.array([], pa.string())

    def among(self, values: Collection[str] | pa.ChunkedArray) -> np.ndarray:
        """Which rows hold one of the values: bool, shape (rows,).

        Args:
            values: as Python strings, or as Arrow has them, which saves some 100 bytes of each.
        """
        if not isinstance(values, pa.ChunkedArray):
            values = pa.chunked_array([pa.array(sorted(values), pa.string())])
        # One call for all chunks, so that the values are hashed once.
        return pc.is_in(pa.chunked_array(self._chunks, pa.string()), value_set=values).to_numpy()


class ArrowTable:
    """A finished table: memory-mapped, so opening costs the same for any size.

    Class attributes:
        states: what the manifest must state, and as what.

    Raises:
        ValueError: if the folder holds another kind of table, or is damaged.
    """

    states: ClassVar[Mapping[str, type | UnionType]] = {}

    def __init__(self, folder: Path, kind: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, kind)
        for name, wanted in {"rows": int, **self.states}.items():
            if not isinstance(self.manifest.get(name), wanted):
                raise ValueError(
                    f"{self.folder / MANIFEST} is damaged: it states no {name}; delete the folder "
                    "and write it again"
                )
        parts = sorted(self.folder.glob("part-*.arrow"))
        self._batches: list[pa.RecordBatch] = []
        for part in parts:
            self._batches += _batches_of(part)
        rows = sum(b.num_rows for b in self._batches)
        if rows != self.manifest["rows"]:
            raise ValueError(
                f"{folder}: the manifest states {self.manifest['rows']} rows, the shards hold "
                f"{rows}; delete the folder and write it again"
            )

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def columns(self) -> list[str]:
        return list(self._batches[0].schema.names) if self._batches else []

    def lists(self, name: str) -> ListColumn:
        return ListColumn([b.column(name) for b in self._batches])

    def texts(self, name: str) -> TextColumn:
        return TextColumn([b.column(name) for b in self._batches])

    def values(self, name: str) -> list[Any]:
        """A scalar column as Python values (ids, sources)."""
        return [v for b in self._batches for v in b.column(name).to_pylist()]

    def batches(self) -> list[pa.RecordBatch]:
        return self._batches
