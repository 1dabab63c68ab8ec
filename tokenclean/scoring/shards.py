"""A scoring pass in parts that are kept, so that what was scored is not scored again.

The batch plan is cut into *shards* of neighbouring batches, by nothing but the plan itself. A shard
is published as one file as soon as its last batch is computed. A pass that is started again, with
however many processes and whether or not they hold the model in parts, computes those that are
missing. Batches are never cut anew: a sample gets other low bits in a batch of another shape.

A shard's file is an Arrow IPC stream, one row per sample: ``row`` (pool row) and one list<float32>
for the losses and each further column. The SHA-256 of the stream follows it, which readers of such
streams do not look at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean.arrow import lists_of, spans
from tokenclean.data.datamodule import PlannedBatches
from tokenclean.publish import publish_file, sweep, write_json, writing_to
from tokenclean.scoring.cache import content_key

log = logging.getLogger(__name__)

#: A shard has so many batches: fewer where that would make less than `LEAST` shards, for they are
#: dealt to processes whole, and more where it would make over `MOST` files.
BATCHES, LEAST, MOST = 16, 8, 65_536
PLAN = "plan.json"
_DIGEST = hashlib.sha256().digest_size


@dataclass
class Scored:
    """What was computed of some samples.

    Attributes:
        rows: pool rows, int64, shape (R,).
        counts: targets of each, int64, shape (R,).
        values: losses and further columns, float32, shape (columns, sum of the counts).
    """

    rows: np.ndarray
    counts: np.ndarray
    values: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        return cls(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.values for part in parts], axis=1),
        )


class Shards:
    """The shards of one pass.

    Attributes:
        size: batches of a shard; the last may have fewer.
        count: how many shards there are.

    Args:
        table: the score table that they become; they lie beside it.
        planned: every batch of the pass, whoever computes it.
        manifest: of the table: with rows and plan, all that the numbers depend on.
    """

    def __init__(self, table: Path, planned: PlannedBatches, manifest: dict[str, Any]):
        self.folder, self.planned, self.manifest = shards_folder(table), planned, manifest
        self.columns = ("nll", *manifest.get("columns", []))
        batches = len(planned)
        self.size = max(1, min(BATCHES, batches // LEAST), -(-batches // MOST))
        self.count = -(-batches // self.size)
        digest = hashlib.sha256(content_key(manifest, planned.rows.rows).encode())
        sizes = [self.size, *map(len, planned.plan)]
        digest.update(np.array(sizes, dtype=np.int64).tobytes())
        for batch in planned.plan:
            digest.update(np.ascontiguousarray(batch, dtype=np.int64).tobytes())
        #: of all that the numbers depend on
        self.key = digest.hexdigest()

    def batches(self, number: int) -> list[np.ndarray]:
        """The batches of a shard, as `PlannedBatches.plan` has them."""
        return self.planned.plan[number * self.size : (number + 1) * self.size]

    def missing(self) -> list[int]:
        """Numbers of the shards that are to be computed, for one process to call before it begins.

        Shards of other numbers are discarded, damaged ones too; the log says why.

        Raises:
            NotWritten: if the folder cannot be made.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, everything=True)
        reason = self._foreign()
        if reason is not None:
            if any(self.folder.glob("shard-*")):
                log.warning("%s: the shards there are not used: %s", self.folder, reason)
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            plan = {"kind": "shards", "key": self.key, "shards": self.count}
            write_json(self.folder / PLAN, {**plan, "manifest": self.manifest})
        missing = []
        for number in range(self.count):
            try:
                if self.read(number) is None:
                    missing.append(number)
            except ValueError as error:
                log.warning("%s; it is computed again", error)
                self._path(number).unlink()
                missing.append(number)
        return missing

    def publish(self, number: int, scored: Scored) -> None:
        """Store a shard.

        Raises:
            RuntimeError: if these are not the shard's samples.
            NotWritten: if the disk takes no more.
        """
        if not self._fits(number, scored):
            raise RuntimeError(
                f"{self._path(number)}: what was computed is not shard {number} of the plan"
            )
        lists = [lists_of(scored.counts, np.ascontiguousarray(v)) for v in scored.values]
        batch = pa.record_batch([pa.array(scored.rows), *lists], names=["row", *self.columns])
        schema = batch.schema.with_metadata({"key": self.key, "shard": str(number)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        body = sink.getvalue()
        with publish_file(self._path(number)) as partial, partial.open("wb") as file:
            file.write(body)
            file.write(hashlib.sha256(body).digest())

    def read(self, number: int) -> Scored | None:
        """A shard; None if it is not there.

        Raises:
            ValueError: naming its file, if that is not what was written or belongs to another pass.
        """
        path = self._path(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        # Nothing is parsed that was not written by `publish`.
        body = content[:-_DIGEST]
        if hashlib.sha256(body).digest() != content[-_DIGEST:]:
            raise ValueError(f"{path} is damaged")
        batch = pa.ipc.open_stream(body).read_next_batch()
        stated = batch.schema.metadata or {}
        if (stated.get(b"key"), stated.get(b"shard")) != (self.key.encode(), b"%d" % number):
            raise ValueError(f"{path} is of another pass")
        values = np.stack([batch.column(name).values.to_numpy() for name in self.columns])
        counts = np.diff(batch.column("nll").offsets.to_numpy()).astype(np.int64)
        return Scored(batch.column("row").to_numpy(), counts, values)

    def merged(self) -> np.ndarray:
        """Losses and further columns of all targets of the rows, end to end.

        Returns:
            float32, shape (columns, n), in a file without a name that goes with the array.

        Raises:
            RuntimeError: if a shard is missing, or a sample was not scored exactly once.
            ValueError: for a damaged shard.
            NotWritten: if the disk has no room for them.
        """
        rows = self.planned.rows
        starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
        values = self._room((len(self.columns), int(starts[-1])))
        seen = np.zeros(len(rows), dtype=np.uint8)
        for number in range(self.count):
            try:
                scored = self.read(number)
            except ValueError as error:
                raise ValueError(f"{error}; the same command computes it again") from error
            if scored is None:
                raise RuntimeError(
                    f"{self._path(number)} is not there; all processes must see one file system"
                )
            places = np.searchsorted(rows.rows, scored.rows)
            values[:, spans(starts[places], scored.counts)] = scored.values
            np.add.at(seen, places, 1)  # a row that occurs twice is counted twice
        wrong = int((seen != (rows.counts > 0)).sum())
        if wrong:
            raise RuntimeError(
                f"{self.folder}: {wrong} of {len(rows)} samples were not scored exactly once"
            )
        return values

    def remove(self) -> None:
        """Remove what is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def unmeasured(self) -> Path:
        """A file that says why the noise of a pass is not measured, if it should not be."""
        return self.folder / "unmeasured.txt"

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.arrows"

    def _fits(self, number: int, scored: Scored) -> bool:
        chosen = np.concatenate(self.batches(number))
        rows, order = self.planned.rows, np.argsort(scored.rows, kind="stable")
        wanted = chosen[np.argsort(rows.rows[chosen], kind="stable")]
        return np.array_equal(scored.rows[order], rows.rows[wanted]) and np.array_equal(
            scored.counts[order], rows.counts[wanted]
        )

    def _foreign(self) -> str | None:
        """Why the shards that lie there are of another pass; None if they are of this one."""
        try:
            stored = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
            if stored["key"] == self.key:
                return None
            before = dict(stored["manifest"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"they have no readable {PLAN}"
        names = sorted({*before, *self.manifest})
        changed = [
            n for n in names if before.get(n) != json.loads(json.dumps(self.manifest)).get(n)
        ]
        return f"{', '.join(changed) or 'the rows or their batches'} changed since"

    def _room(self, shape: tuple[int, int]) -> np.ndarray:
        size = 4 * shape[0] * shape[1]
        if not size:
            return np.zeros(shape, dtype=np.float32)
        with writing_to(self.folder / "merged"), tempfile.TemporaryFile(dir=self.folder) as file:
            # Writing through a map to a disk that is full kills the process instead.
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float32, "r+", shape=shape)


def discard_shards(table: Path) -> None:
    """Remove the shards of a table that is finished."""
    shutil.rmtree(shards_folder(table), ignore_errors=True)


def shards_folder(table: Path) -> Path:
    """Where the shards of a score table lie until it is finished."""
    return table.with_name(table.name + ".shards")
