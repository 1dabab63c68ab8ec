"""Score tables: the negative log-likelihood of every response token under one model.

Arrow shards with a manifest, one row per sample in pool order: ``id``, ``row`` (pool row),
``positions`` list<int32>, ``token_ids`` list<int32>, ``nll`` list<float32>; index j of ``nll``
belongs to predicting the token at ``positions[j]``. Columns like it (`Column`) follow where they
were asked for; the manifest's ``columns`` lists them. A control table, whose manifest says
``targets: prompt``, holds the prompt tokens in the response tokens' stead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from tokenclean.arrow import (
    MANIFEST,
    ROWS_PER_SHARD,
    ArrowTable,
    complete_folder,
    lists_of,
    spans,
    write_json,
    write_shard,
)
from tokenclean.data.batches import Batch
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.selection.rule import scores
from tokenclean.selection.topk import Histogram, ordered_keys

KIND = "score table"
#: What a table can hold besides losses, float32 each.
#:
#: * ``gap``: log p(most likely token) - log p(token), nats.
#: * ``alone``: the loss with a start token (BOS, else EOS) and the sample's earlier response tokens
#:   before it, and no prompt; nats.
#: * ``attention``: what the token receives from later tokens in a deep layer, ``received`` of
#:   `AttentionReader`; NaN where no later token was computed.
#: * ``attention_keys``: ``keys`` of the first layer, one and the same number for all tokens of a
#:   sample; NaN for a token that was not computed.
#: * ``relevance``, ``relevance_hidden``: nearness to the words of a domain, by the token's input
#:   embedding (1 at their mean, 0 for the farthest entry of the vocabulary) or by its last hidden
#:   state when fed by itself (a cosine). The same for every occurrence of a token.
Column = Literal["gap", "alone", "attention", "attention_keys", "relevance", "relevance_hidden"]
#: Of the scores against the table that a reference was written `against`.
HISTOGRAM = "histogram.npz"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("positions", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("nll", pa.list_(pa.float32())),
    ]
)


class ScoreTable(ArrowTable):
    """One model's losses.

    Attributes:
        rows: pool row of each table row, ascending, int64.
        nll: its losses, float32, one list per row.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, KIND)
        rows = [batch.column("row").to_numpy() for batch in self.batches()]
        self.rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        self.nll = self.lists("nll")
        self._columns = {"nll": self.nll}
        self._columns |= {name: self.lists(name) for name in self.manifest.get("columns", [])}

    def check_pool(self, pool: TokenPool) -> None:
        """Refuse a table made from another pool.

        Raises:
            ValueError: with both fingerprints.
        """
        if self.manifest["pool"] != pool.fingerprint:
            raise ValueError(
                f"{self.folder} holds scores of another pool (fingerprint "
                f"{self.manifest['pool']}, expected {pool.fingerprint}); score it again"
            )

    def trained_on(self) -> set[str]:
        """Ids of the samples that the scoring model was trained on."""
        return set(self.manifest["trained_on"])

    def of_rows(self, rows: np.ndarray, column: str = "nll") -> tuple[np.ndarray, np.ndarray]:
        """Losses, or another column, of many pool rows.

        Args:
            rows: pool rows, int64, shape (R,), in any order.
            column: ``nll`` or one of `Column`.

        Returns:
            Number of values of each row, int64, shape (R,), and the values end to end, float32.

        Raises:
            ValueError: if the table lacks the column or one of the rows.
        """
        self.check_column(column)
        return self._columns[column].take(self.places(rows))

    def check_column(self, column: str) -> None:
        """Refuse a table that was made without a column.

        Raises:
            ValueError: saying how it is made.
        """
        if column not in self._columns and self.manifest.get("imported"):
            raise ValueError(
                f"{self.folder} has no column `{column}`: it was made from log-probabilities "
                "computed elsewhere, which hold losses alone; score with the model itself, or take "
                "a rule that goes by losses"
            )
        if column not in self._columns:
            columns = [*(name for name in self._columns if name != "nll"), column]
            raise ValueError(
                f"{self.folder} has no column `{column}`; score it again, under another --name, "
                f"with --model.columns '[{', '.join(columns)}]'"
            )

    def of_row(self, row: int) -> np.ndarray:
        """Losses of one pool row, float32.

        Raises:
            ValueError: if the table lacks the row.
        """
        return self.of_rows(np.array([row]))[1]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Table row of each pool row, int64.

        Raises:
            ValueError: if the table lacks one of the rows.
        """
        places = np.searchsorted(self.rows, rows)
        found = self.rows.take(places, mode="clip") if len(self.rows) else np.full(len(rows), -1)
        if (found != rows).any():
            missing = rows[found != rows][0]
            raise ValueError(f"{self.folder} has no scores for pool row {missing}")
        return places

    def histogram(self, base: ScoreTable) -> Histogram | None:
        """Of the keys of this table's scores against ``base``, if it was written with that one."""
        if not (self.folder / HISTOGRAM).is_file():
            return None
        with np.load(self.folder / HISTOGRAM) as stored:
            fits = str(stored["against"]) == base.manifest.get("content")
            return Histogram(stored["counts"]) if fits else None


class ScoreWriter(BasePredictionWriter):
    """Collects losses as they are computed and writes the table at the end.

    Batches come in order of length and, on several processes, from each its share. They go into one
    memory-mapped file at each row's own place, so memory stays flat, and come out in pool order.

    Args:
        rows: what is being scored, in ascending order of pool rows.
        folder: where the table goes.
        manifest: what to say about model and pool; see `score_manifest`.
        against: table of the base model, where this one is a reference: the histogram of the scores
            is then stored with the table, and selection needs one pass less.

    The manifest's ``columns`` are those that predictions hold besides losses, in that order.

    Raises:
        ValueError: if ``against`` lacks one of the rows.
    """

    def __init__(
        self,
        rows: TokenRows,
        folder: Path,
        manifest: dict[str, Any],
        against: ScoreTable | None = None,
    ):
        super().__init__(write_interval="batch")
        self.rows, self.folder, self.manifest = rows, folder, manifest
        self.against = against
        self.columns = ("nll", *manifest.get("columns", []))
        if against is not None:
            against.places(rows.rows)  # raises now rather than after hours of scoring
        self._starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
        self._spool = folder.with_name(folder.name + ".spool")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._spool.mkdir(parents=True, exist_ok=True)
            for name in self.columns:
                np.memmap(self._spool / name, np.float32, "w+", shape=(self._starts[-1],))
            np.memmap(self._spool / "seen", np.uint8, "w+", shape=(len(self.rows),))
        trainer.strategy.barrier("score table opened")
        self._values = {
            name: np.memmap(self._spool / name, np.float32, "r+", shape=(self._starts[-1],))
            for name in self.columns
        }
        self._seen = np.memmap(self._spool / "seen", np.uint8, "r+", shape=(len(self.rows),))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        places = np.searchsorted(self.rows.rows, batch.rows)
        at = spans(self._starts[places], self.rows.counts[places])
        values = prediction.to("cpu", torch.float32).numpy().reshape(len(self.columns), -1)
        for name, row in zip(self.columns, values, strict=True):
            self._values[name][at] = row
        np.add.at(self._seen, places, 1)  # a row that occurs twice is counted twice

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.received_sigterm:
            return  # an unfinished pass, which Lightning ends as if it were finished
        for values in self._values.values():
            values.flush()
        self._seen.flush()
        trainer.strategy.barrier("score table filled")
        if trainer.is_global_zero:
            missing = int((self._seen != 1).sum())
            if missing:
                raise RuntimeError(
                    f"{self.folder}: {missing} of {len(self.rows)} samples were not scored exactly "
                    "once"
                )
            noise = getattr(pl_module, "noise", {})
            self._finish({"noise": noise} if noise else {})
        trainer.strategy.barrier("score table written")

    def _finish(self, measured: dict[str, Any]) -> None:
        manifest = {**self.manifest, **measured}
        write_scores(self.folder, self.rows, self._values, manifest, self.against)
        del self._values, self._seen
        for name in (*self.columns, "seen"):
            (self._spool / name).unlink()
        self._spool.rmdir()


def write_scores(
    folder: Path,
    rows: TokenRows,
    columns: Mapping[str, np.ndarray],
    manifest: dict[str, Any],
    against: ScoreTable | None = None,
) -> None:
    """Write a score table.

    Args:
        folder: where it goes.
        rows: of a token pool, ascending.
        columns: ``nll`` first, then what ``manifest["columns"]`` lists: the values of all targets
            of the rows, end to end, float32, shape (n,) each.
        manifest: what to say about model and pool; see `score_manifest`.
        against: see `ScoreWriter`.
    """
    table = rows.table
    assert isinstance(table, TokenPool)
    starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
    others = [name for name in columns if name != "nll"]
    schema = pa.schema([*_SCHEMA, *(pa.field(name, pa.list_(pa.float32())) for name in others)])
    content, histogram = hashlib.sha256(rows.rows.tobytes()), Histogram()
    with complete_folder(folder) as partial:
        for number, first in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
            chosen = rows.rows[first : first + ROWS_PER_SHARD]
            part = slice(starts[first], starts[first + len(chosen)])
            counts = rows.counts[first : first + len(chosen)]
            positions, tokens = rows.targets_of(first, first + len(chosen))
            batch = pa.record_batch(
                {
                    "id": table.ids.take(chosen),
                    "row": chosen,
                    "positions": lists_of(counts, positions.astype(np.int32)),
                    "token_ids": lists_of(counts, tokens),
                    **{name: lists_of(counts, column[part]) for name, column in columns.items()},
                },
                schema=schema,
            )
            write_shard(partial, number, batch)
            content.update(columns["nll"][part].tobytes())
            if against is not None:
                base = against.of_rows(chosen)[1]
                histogram.add(ordered_keys(scores(base, columns["nll"][part])))
        for name in others:
            content.update(columns[name].data)  # whole, so that shards make no difference
        if against is not None:
            np.savez_compressed(
                partial / HISTOGRAM,
                counts=histogram.counts,
                against=against.manifest.get("content", ""),
            )
        write_json(
            partial / MANIFEST,
            {
                "kind": KIND,
                **manifest,
                "rows": len(rows),
                "tokens": int(starts[-1]),
                "content": content.hexdigest()[:16],
            },
        )
