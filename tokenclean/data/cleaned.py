"""The cleaned pool: what selection makes and any trainer can read (a public contract).

A folder of ``data.parquet`` (no `datasets` metadata) and ``manifest.json``; one row per sample in
pool order. Lists are aligned with ``input_ids``:

=============  =============  ==================================================================
id, source     string
input_ids      list<int32>
labels         list<int32>    the token's id where it carries loss, else -100 (not shifted)
response_mask  list<bool>
base_nll       list<float32>  nats; null where there is none, as is ``reference_nll``
score          list<double>   base nll - reference nll, in float64
priority       list<double>   what the rule went by, where that is not the score; else null
reason         list<int8>     0 kept, 1 prompt, 2 below the cut, 3 row seen by the reference; 4 and
                              up are the rule's own; the manifest's ``reasons`` names them
weight         list<float32>  loss weight, 1 by default; negative: to be unlearnt, see `forgetting`
round          int32          round that cleaned the row; 0 = warm-up
truth          list<int8>     planted pools only: 1 informative, 0 uninformative, -1 corrupted
=============  =============  ==================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenclean.arrow import ROWS_PER_SHARD, ArrowTable, TableWriter
from tokenclean.data.consistency import Consistency, check_ids, checked_batches
from tokenclean.data.rows import NO_LOSS
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.publish import MANIFEST, complete_folder, read_manifest, write_json

KIND = "cleaned pool"
DATA = "data.parquet"
#: of what an unpacked copy has passed
_CHECKS = 2


def cleaned_schema(with_truth: bool) -> pa.Schema:
    columns = [
        ("id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("base_nll", pa.list_(pa.float32())),
        ("reference_nll", pa.list_(pa.float32())),
        ("score", pa.list_(pa.float64())),
        ("priority", pa.list_(pa.float64())),
        ("reason", pa.list_(pa.int8())),
        ("weight", pa.list_(pa.float32())),
        ("round", pa.int32()),
    ]
    if with_truth:
        columns.append(("truth", pa.list_(pa.int8())))
    return pa.schema(columns)


def write_cleaned_pool(
    folder: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, manifest: dict[str, Any]
) -> None:
    """Write a cleaned pool batch by batch; the folder appears when it is complete."""
    rows = 0
    with complete_folder(folder) as partial:
        # Scores hardly ever repeat: to look for repetitions there took most of the time.
        repeating = [
            f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
            for field in schema
            if field.name not in ("base_nll", "reference_nll", "score", "priority")
        ]
        with pq.ParquetWriter(partial / DATA, schema, use_dictionary=repeating) as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
        write_json(partial / MANIFEST, {"kind": KIND, **manifest, "rows": rows})


def is_kept(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Which tokens are to be learnt: bool, like both. A negative weight is for unlearning."""
    kept: np.ndarray = (labels != NO_LOSS) & (weights > 0)
    return kept


def kept_share(manifest: dict[str, Any]) -> float:
    """Kept share of the tokens that a cleaned pool ranked; D_0, which is not cleaned, left out."""
    rounds = manifest.get("rounds", [None, manifest])[1:]
    ranked, kept = (sum(r[k] for r in rounds) for k in ("ranked_tokens", "kept_tokens"))
    return float(kept / max(ranked, 1))


def is_cleaned_pool(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / DATA).is_file()


class CleanedPool(ArrowTable):
    """A cleaned pool opened for random access.

    Parquet cannot be memory-mapped row by row, so it is unpacked once into Arrow shards under
    ``cache_dir``, keyed by its content, and checked on the way.

    Args:
        folder: of the pool.
        cache_dir: gets the unpacked copy.
        vocabulary: how many token ids there are; None to leave that to whoever looks them up.

    Raises:
        ValueError: naming the file and, where there is one, the sample, if the pool is not
            consistent; see `checked_batches` and `Consistency`.
    """

    def __init__(self, folder: Path, cache_dir: Path, vocabulary: int | None = None):
        manifest = read_manifest(folder, KIND)
        path, max_length = folder / DATA, _max_length(folder, manifest)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        # Copies of other checks than these count no more.
        unpacked = cache_dir / "cleaned" / f"{digest}-{_CHECKS}"
        if not (unpacked / MANIFEST).is_file():
            with complete_folder(unpacked) as partial:
                found = Consistency(path)
                schema = cleaned_schema(with_truth=True)
                with TableWriter(partial) as writer:
                    for batch in checked_batches(path, schema, ROWS_PER_SHARD, max_length):
                        found.check(batch)
                        writer.write(batch)
                found.finish()
                seen = {"largest": found.largest, "longest": found.longest}
                write_json(partial / MANIFEST, {**manifest, "found": seen})
        super().__init__(unpacked, KIND)
        seen = self.manifest["found"]
        # The name that it is known by, not that of its unpacked copy.
        self.manifest, self.folder = manifest, Path(folder)
        if vocabulary is not None and seen["largest"] >= vocabulary:
            check_ids(path, self.batches(), vocabulary)
        if max_length is not None and seen["longest"] > max_length:
            raise ValueError(
                f"{path}: a sample has {seen['longest']:,} tokens, more than the {max_length:,} "
                "that the manifest states as max_length"
            )


def _max_length(folder: Path, manifest: dict[str, Any]) -> int | None:
    """Tokens that a row may have, as the manifest states it; None if it does not."""
    stated = manifest.get("max_length")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise ValueError(f"{folder / MANIFEST}: max_length {stated!r:.40} is no number of tokens")
    return stated


def check_tokenizer(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Refuse a model whose tokenizer is not the one that made a cleaned pool.

    Returns:
        The pool's manifest.

    Raises:
        ValueError: with both fingerprints.
    """
    manifest = read_manifest(folder, KIND)
    made, now = manifest["tokenizer"], fingerprint_tokenizer(tokenizer)
    if made != now:
        raise ValueError(
            f"data.path: {folder} was tokenised by another tokenizer (fingerprint {made}) than "
            f"model.base has ({now})"
        )
    return manifest


@dataclass
class CleanedBlock:
    """Some neighbouring rows of a cleaned pool: R rows of n tokens, arrays end to end.

    Attributes:
        first: number of the first row.
        ids, sources: of the rows, R of each.
        rounds: int32, shape (R,).
        counts: tokens of each row, int64, shape (R,).
        input_ids, labels: int32, shape (n,).
        response: bool, shape (n,).
        base, reference: losses in nats, float32, shape (n,); NaN where there is none.
        score, priority: float64, shape (n,); NaN where there is none.
        reason: int8, shape (n,).
        weight: float32, shape (n,).
        truth: int8, shape (n,); None unless the pool is planted.
    """

    first: int
    ids: list[str]
    sources: list[str]
    rounds: np.ndarray
    counts: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    response: np.ndarray
    base: np.ndarray
    reference: np.ndarray
    score: np.ndarray
    priority: np.ndarray
    reason: np.ndarray
    weight: np.ndarray
    truth: np.ndarray | None

    @cached_property
    def kept(self) -> np.ndarray:
        """Tokens that are to be learnt: bool, shape (n,)."""
        return is_kept(self.labels, self.weight)

    @cached_property
    def row(self) -> np.ndarray:
        """Row of each token within the block, int64, shape (n,)."""
        return np.repeat(np.arange(len(self.ids)), self.counts)

    @cached_property
    def position(self) -> np.ndarray:
        """Place of each token in its row, int64, shape (n,)."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(len(self.input_ids)) - np.repeat(starts, self.counts)

    def tokens_of(self, row: int) -> slice:
        """The tokens of a row of the block."""
        stop = int(self.counts[: row + 1].sum())
        return slice(stop - int(self.counts[row]), stop)


def read_blocks(folder: Path, rows: int = ROWS_PER_SHARD) -> Iterator[CleanedBlock]:
    """A cleaned pool in pool order, some rows at a time; memory holds one block.

    Raises:
        ValueError: if the folder holds no cleaned pool, or its file is none; see `checked_batches`.
    """
    max_length = _max_length(folder, read_manifest(folder, KIND))
    first = 0
    schema = cleaned_schema(with_truth=True)
    for batch in checked_batches(folder / DATA, schema, rows, max_length):
        lists = [
            f.name
            for f in batch.schema
            if pa.types.is_list(f.type) and batch.column(f.name).null_count == 0
        ]
        columns = {name: batch.column(name).flatten() for name in lists}

        def numbers(name: str, columns: dict[str, pa.Array] = columns) -> np.ndarray:
            array: np.ndarray = columns[name].to_numpy(zero_copy_only=False)
            return array

        score = numbers("score").astype(np.float64)
        yield CleanedBlock(
            first=first,
            ids=batch.column("id").to_pylist(),
            sources=batch.column("source").to_pylist(),
            rounds=batch.column("round").to_numpy(),
            counts=pc.list_value_length(batch.column("input_ids")).to_numpy().astype(np.int64),
            input_ids=numbers("input_ids"),
            labels=numbers("labels"),
            response=numbers("response_mask").astype(bool),
            base=numbers("base_nll").astype(np.float32),
            reference=numbers("reference_nll").astype(np.float32),
            score=score,
            # older pools lack it
            priority=numbers("priority").astype(np.float64)
            if "priority" in columns
            else np.full_like(score, np.nan),
            reason=numbers("reason"),
            weight=numbers("weight"),
            truth=numbers("truth") if "truth" in columns else None,
        )
        first += batch.num_rows
