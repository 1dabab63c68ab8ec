"""Score tables: the negative log-likelihood of every response token under one model.

Arrow shards with a manifest, one row per sample in pool order: ``id``, ``row`` (pool row),
``positions`` list<int32>, ``token_ids`` list<int32>, ``nll`` list<float32>; index j of ``nll``
belongs to predicting the token at ``positions[j]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    list_array,
    write_json,
    write_shard,
)
from tokenclean.data.batches import Batch
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows

KIND = "score table"
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
        self.rows = np.asarray(self.values("row"), dtype=np.int64)
        self.nll = self.lists("nll")

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

    def of_row(self, row: int) -> np.ndarray:
        """Losses of one pool row, float32.

        Raises:
            ValueError: if the table lacks the row.
        """
        index = int(np.searchsorted(self.rows, row))
        if index == len(self.rows) or self.rows[index] != row:
            raise ValueError(f"{self.folder} has no scores for pool row {row}")
        return self.nll[index]


class ScoreWriter(BasePredictionWriter):
    """Collects losses as they are computed and writes the table at the end.

    Batches come in order of length and, on several processes, from each its share. They go into one
    memory-mapped file at each row's own place, so memory stays flat, and come out in pool order.

    Args:
        rows: what is being scored, in ascending order of pool rows.
        folder: where the table goes.
        manifest: what to say about model and pool; see `score_manifest`.
    """

    def __init__(self, rows: TokenRows, folder: Path, manifest: dict[str, Any]):
        super().__init__(write_interval="batch")
        self.rows, self.folder, self.manifest = rows, folder, manifest
        self._starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
        self._spool = folder.with_name(folder.name + ".spool")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._spool.mkdir(parents=True, exist_ok=True)
            np.memmap(self._spool / "nll", np.float32, "w+", shape=(self._starts[-1],))
            np.memmap(self._spool / "seen", np.uint8, "w+", shape=(len(self.rows),))
        trainer.strategy.barrier("score table opened")
        self._nll = np.memmap(self._spool / "nll", np.float32, "r+", shape=(self._starts[-1],))
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
        for row, nll in batch.split(prediction.to("cpu", torch.float32)):
            place = int(np.searchsorted(self.rows.rows, row))
            self._nll[self._starts[place] : self._starts[place + 1]] = nll.numpy()
            self._seen[place] += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.received_sigterm:
            return  # an unfinished pass, which Lightning ends as if it were finished
        self._nll.flush()
        self._seen.flush()
        trainer.strategy.barrier("score table filled")
        if trainer.is_global_zero:
            missing = int((self._seen != 1).sum())
            if missing:
                raise RuntimeError(
                    f"{self.folder}: {missing} of {len(self.rows)} samples were not scored exactly "
                    "once"
                )
            self._finish()
        trainer.strategy.barrier("score table written")

    def _finish(self) -> None:
        rows, table = self.rows, self.rows.table
        assert isinstance(table, TokenPool)
        with complete_folder(self.folder) as partial:
            for number, first in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
                places = range(first, min(first + ROWS_PER_SHARD, len(rows)))
                chosen = [int(rows.rows[i]) for i in places]
                positions = [table.response_positions(row).astype(np.int32) for row in chosen]
                tokens = [
                    table.input_ids[row][at] for row, at in zip(chosen, positions, strict=True)
                ]
                nll = [np.asarray(self._nll[self._starts[i] : self._starts[i + 1]]) for i in places]
                batch = pa.record_batch(
                    {
                        "id": [table.ids[row] for row in chosen],
                        "row": chosen,
                        "positions": list_array(positions, pa.int32()),
                        "token_ids": list_array(tokens, pa.int32()),
                        "nll": list_array(nll, pa.float32()),
                    },
                    schema=_SCHEMA,
                )
                write_shard(partial, number, batch)
            write_json(
                partial / MANIFEST,
                {
                    "kind": KIND,
                    **self.manifest,
                    "rows": len(rows),
                    "tokens": int(self._starts[-1]),
                },
            )
        del self._nll, self._seen
        for name in ("nll", "seen"):
            (self._spool / name).unlink()
        self._spool.rmdir()
