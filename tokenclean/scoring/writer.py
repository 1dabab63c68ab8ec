"""`ScoreWriter`: what a pass computes becomes shards, and the shards become the table."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor

from tokenclean.data.batches import Batch
from tokenclean.data.datamodule import PlannedBatches
from tokenclean.interrupts import Stopped, requested, stop_if_requested
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.shards import Scored, Shards
from tokenclean.scoring.table import ScoreTable, write_scores

log = logging.getLogger(__name__)

T = TypeVar("T")
_NOTHING = np.zeros(0, dtype=np.int64)


class ScoreWriter(Callback):
    """Deals shards to processes, publishes them, and writes the table when all are there.

    Every process computes as many batches as the others, some of them empty: one without any would
    be refused or fall out of step (under FSDP2 an empty one is a pass, too). After each shard all
    agree on whether they were told to stop.

    Args:
        planned: every batch of the pass. Its rows are those of a token pool, ascending.
        folder: where the table goes.
        manifest: what to say about model and pool; see `score_manifest`. Its ``columns`` are those
            that predictions hold besides losses, in that order.
        against: table of the base model, where this one is a reference: the histogram of the scores
            is then stored with the table, and selection needs one pass less.
        cache: where the table may be found instead, and is put.

    Attributes:
        values: on the first process at the end of the pass, losses and further columns of all
            targets, float32, shape (columns, n).
        ran: whether there is anything to compute; known when the pass has begun.

    Raises:
        ValueError: if ``against`` lacks one of the rows.
    """

    def __init__(
        self,
        planned: PlannedBatches,
        folder: Path,
        manifest: dict[str, Any],
        against: ScoreTable | None = None,
        cache: ScoreCache | None = None,
    ):
        self.planned, self.folder, self.manifest = planned, folder, manifest
        self.against, self.cache = against, cache
        if against is not None:
            against.places(planned.rows.rows)  # raises now rather than after hours of scoring
        self.shards = Shards(folder, planned, manifest)
        self.values: np.ndarray | None = None
        self.ran = True
        #: this process's last batch of each shard -> the shard, None where others have one more
        self._ends: dict[int, int | None] = {}
        self._scored: list[Scored] = []

    def take(self) -> bool:
        """Make the table from the cache, if that holds it; for one process."""
        rows = self.planned.rows.rows
        if self.cache is None or not self.cache.has(self.manifest, rows):
            return False
        self.cache.take(self.manifest, rows, self.folder)
        self.shards.remove()
        return True

    def deal(self, trainer: Trainer) -> PlannedBatches:
        """This process's batches, once the processes know of one another.

        Raises:
            ValueError: if they do not score the same rows with the same model.
        """
        todo, key = on_first(trainer, self._begin)
        if key != self.shards.key:
            raise ValueError(
                f"process {trainer.global_rank} scores something else than process 0: their data, "
                "weights, devices or versions differ"
            )
        self.ran = todo is not None
        plan: list[np.ndarray] = []
        self._ends, self._scored = {}, []
        world, shards = trainer.world_size, todo or []
        mine: list[int | None] = [*shards[trainer.global_rank :: world]]
        mine += [None] * (-(-len(shards) // world) - len(mine))
        for number in mine:
            batches = [] if number is None else self.shards.batches(number)
            padding = self.shards.size - len(batches) if world > 1 else 0
            plan += [*batches, *([_NOTHING] * padding)]
            self._ends[len(plan) - 1] = number
        # Without a batch Lightning would not come to the end, where the table is written.
        return self.planned.only(plan or [_NOTHING])

    def _begin(self) -> tuple[list[int] | None, str]:
        if self.take():
            return None, self.shards.key
        todo = self.shards.missing()
        if len(todo) < self.shards.count:
            there = self.shards.count - len(todo)
            log.info("%s: %d of %d shards are there already", self.folder, there, self.shards.count)
        return todo, self.shards.key

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.rows:
            losses: Tensor = outputs
            values = losses.float().cpu().numpy().reshape(len(self.shards.columns), -1)
            self._scored.append(Scored(np.array(batch.rows), np.array(batch.counts), values))
        if batch_idx in self._ends:
            number = self._ends[batch_idx]
            if number is not None:
                self.shards.publish(number, Scored.join(self._scored))
            self._scored = []
            _stop_if_any_requested(trainer)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("shards published")
        if self.ran:
            on_first(trainer, self._merge)

    def _merge(self) -> None:
        self.values = self.shards.merged()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        noise = getattr(pl_module, "noise", {})
        if self.ran:
            on_first(trainer, lambda: self._finish({"noise": noise} if noise else {}))

    def _finish(self, measured: dict[str, Any]) -> None:
        assert self.values is not None
        columns = dict(zip(self.shards.columns, self.values, strict=True))
        manifest = {**self.manifest, **measured}
        write_scores(self.folder, self.planned.rows, columns, manifest, self.against)
        self.values = None
        self.shards.remove()
        if self.cache is not None:
            self.cache.put(self.manifest, self.planned.rows.rows, self.folder)


def on_first(trainer: Trainer, work: Callable[[], T]) -> T:
    """Have the first process do something, and give all its result, or its error."""
    result: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as failure:
            error = failure
    said = None if error is None else str(error)
    result, said = trainer.strategy.broadcast((result, said))
    if error is not None:
        raise error
    if said is not None:
        raise ValueError(f"process 0: {said}")
    return cast(T, result)


def _stop_if_any_requested(trainer: Trainer) -> None:
    """Stop all processes if one of them was told to.

    Raises:
        Stopped: on each, after the same shard.
    """
    told: Any = requested()
    if trainer.world_size > 1:
        told = trainer.strategy.reduce_boolean_decision(told, all=False)
    if not told:
        return
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment) and trainer.local_rank:
        # Lightning kills the process that it started this one from if this one ends with an error.
        raise SystemExit(0)
    stop_if_requested()
    raise Stopped("another process was told to stop")
