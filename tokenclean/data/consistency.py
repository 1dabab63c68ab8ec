"""What the file of a cleaned pool must keep to, whoever wrote it: checked before it is believed.

A Parquet file of a few kilobytes may unpack to rows of any size, so how many values it states is
looked at first, then batches of bounded size are read, and each is checked in one pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenclean.data.pool import hash_id
from tokenclean.data.pretokenised import NO_LOSS, shown

#: Tokens that are read at a time, and that a row group may hold without further question.
TOKENS = 1 << 24
#: Tokens of a larger row group per byte of the file: text never packs as densely.
_PER_BYTE = 4
#: Lists without which nothing can be trained; they hold no nulls.
NEEDED = ("input_ids", "labels", "response_mask", "weight")
#: Columns that may be missing, or null in all rows.
_OPTIONAL = ("priority", "truth")


def checked_batches(
    path: Path, schema: pa.Schema, rows: int, max_length: int | None
) -> Iterator[pa.RecordBatch]:
    """Batches of a cleaned pool's file: its known columns, in their types, lists aligned.

    Args:
        path: the Parquet file.
        schema: the columns that it may have; others are passed over.
        rows: of a batch; fewer where rows are long.
        max_length: tokens that a row may have; None if nobody said.

    Raises:
        ValueError: naming the file, and the sample where there is one, if it cannot be read, states
            more values than it can hold, lacks a column or has one of another type, or if lists of
            a row differ in length, hold nulls where tokens are trained, or exceed ``max_length``.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in schema.names if name in file.schema_arrow.names]
            if missing := [n for n in schema.names if n not in names and n not in _OPTIONAL]:
                raise ValueError(f"{path} is no cleaned pool's table: it lacks {missing[0]}")
            rows = min(rows, _rows_at_once(path, file.metadata, max_length))
            wanted = pa.schema([schema.field(name) for name in names])
            for batch in file.iter_batches(rows, columns=names):
                columns = [batch.column(f.name).cast(f.type) for f in wanted]
                batch = pa.RecordBatch.from_arrays(columns, schema=wanted)
                _check_lists(path, batch, max_length)
                yield batch
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read: {text}; write the pool again") from error


def _rows_at_once(path: Path, stated: Any, max_length: int | None) -> int:
    """How many rows a batch may have, from what the file states of its row groups."""
    size = max(path.stat().st_size * _PER_BYTE, TOKENS)
    longest = 1
    for number in range(stated.num_row_groups):
        group = stated.row_group(number)
        rows = max(group.num_rows, 1)
        values = max(group.column(i).num_values for i in range(group.num_columns))
        if max_length is not None and values > rows * max(max_length, 1):
            raise ValueError(
                f"{path}: {rows:,} row(s) of it hold {values:,} tokens, though the manifest states "
                f"max_length {max_length:,}; write the pool again"
            )
        if values > size:
            raise ValueError(
                f"{path}: a row group of {rows:,} row(s) unpacks to {values:,} tokens, more than "
                "a file of this size can hold; it is no pool of texts"
            )
        longest = max(longest, -(-values // rows))
    return max(TOKENS // longest, 1)


def _check_lists(path: Path, batch: pa.RecordBatch, max_length: int | None) -> None:
    """Lists of a row are equally long, and there."""
    for name in ("id", "source", "round", *NEEDED):
        if batch.column(name).null_count:
            _refuse(path, batch, np.asarray(batch.column(name).is_null()), f"{name} is null")
    counts = _lengths(batch, "input_ids")
    if max_length is not None:
        what = f"it has more tokens than the {max_length:,} that the manifest states as max_length"
        _refuse(path, batch, counts > max_length, what)
    for field in batch.schema:
        column = batch.column(field.name)
        if not pa.types.is_list(field.type):
            continue
        if column.null_count == batch.num_rows and field.name in _OPTIONAL:
            continue
        wrong = _lengths(batch, field.name) != counts
        _refuse(path, batch, wrong, f"{field.name} is not as long as its input_ids")
        if field.name in (*NEEDED, "reason", "truth"):
            nulls = np.asarray(column.flatten().is_null())
            _refuse(path, batch, nulls, f"{field.name} holds a null", counts)


def _lengths(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Of the lists of a column, int64; -1 for a null."""
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(batch.column(name)), -1).to_numpy()
    return lengths.astype(np.int64)


class Consistency:
    """Checks the batches of a pool, one after the other, for what training relies on.

    Attributes:
        largest: the largest token id so far; -1 without one.
        longest: tokens of the longest row so far.
    """

    def __init__(self, path: Path):
        self.path = path
        self.largest, self.longest = -1, 0
        self._hashes = array("Q")  # 8 bytes a row

    def check(self, batch: pa.RecordBatch) -> None:
        """Check a batch of `checked_batches`.

        Raises:
            ValueError: naming file and sample, for a label that is neither the token's id nor
                -100, a negative id, or a weight of a labelled token that is not finite.
        """
        counts = _lengths(batch, "input_ids")
        ids, labels, weights = (
            batch.column(name).flatten().to_numpy() for name in ("input_ids", "labels", "weight")
        )
        _refuse(self.path, batch, ids < 0, "it has a negative token id", counts)
        learnt = labels != NO_LOSS
        wrong = learnt & (labels != ids)
        what = f"a label is neither the id of its token nor {NO_LOSS}"
        _refuse(self.path, batch, wrong, what, counts)
        wrong = learnt & ~np.isfinite(weights)
        _refuse(self.path, batch, wrong, "the weight of a labelled token is not finite", counts)
        self._hashes.extend(map(hash_id, batch.column("id").to_pylist()))
        self.largest = max(self.largest, int(ids.max(initial=-1)))
        self.longest = max(self.longest, int(counts.max(initial=0)))

    def finish(self) -> None:
        """Check what shows at the end alone.

        Raises:
            ValueError: naming one, if two samples have one id.
        """
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.uint64))
        twice = hashes[:-1][hashes[:-1] == hashes[1:]]
        if not len(twice):
            return
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(1024, columns=["id"]):
                for name in batch.column("id").to_pylist():
                    if hash_id(name) == int(twice[0]):
                        raise ValueError(
                            f"{self.path}: sample {shown(name)} is there more than once; ids of a "
                            "cleaned pool are unique"
                        )


def check_ids(path: Path, batches: list[pa.RecordBatch], vocabulary: int) -> None:
    """Refuse the first sample with a token id that a vocabulary does not have.

    Raises:
        ValueError: naming file and sample.
    """
    for batch in batches:
        ids = batch.column("input_ids").flatten().to_numpy()
        what = f"it has a token id beyond the tokenizer's {vocabulary:,}"
        _refuse(path, batch, ids >= vocabulary, what, _lengths(batch, "input_ids"))


def _refuse(
    path: Path,
    batch: pa.RecordBatch,
    wrong: np.ndarray,
    what: str,
    counts: np.ndarray | None = None,
) -> None:
    """Raise for the first row that is wrong, or, given the rows' lengths, holds a wrong token."""
    if not wrong.any():
        return
    at = int(np.argmax(wrong))
    row = at if counts is None else int(np.searchsorted(np.cumsum(counts), at, side="right"))
    name = batch.column("id")[row].as_py()
    raise ValueError(f"{path}: sample {shown(name)}: {what}")
