"""``--estimate``: what a verb is going to do, stage by stage, before any weight is read.

Token and FLOP counts follow from the tokenised pool and the run's own batch plans. Two things are
not known beforehand: which tokens a rule keeps (their number is; samples are taken at full length,
though what follows the last kept token is cut), and how well a device is used (`EFFICIENCY`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tokenclean.cleaning.arms import LoopConfig, halves, panel_rows
from tokenclean.costs import (
    SHARED,
    Cost,
    cost_table,
    quantity,
    resident_memory,
    validation_passes,
)
from tokenclean.data.batches import Layout, plan_batches, plan_epoch
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.estimate import (
    EFFICIENCY,
    USABLE,
    ModelShape,
    Setting,
    Work,
    adapter_bytes,
    forward_flops,
    largest_budget,
    parameter_bytes,
    peak_bytes,
    standing_bytes,
    training_flops,
)
from tokenclean.machine import free_memory, matmul_rate
from tokenclean.models import BaseConfig, LoraSettings
from tokenclean.models.loading import load_config
from tokenclean.scoring.module import splits_layers
from tokenclean.scoring.probe import SAMPLES
from tokenclean.selection.noise import PARTNERS
from tokenclean.selection.rule import columns_needed
from tokenclean.selection.select import SelectionConfig

#: Response tokens that `select` ranks and writes per second on one core.
SELECTED_PER_SECOND = 1e6
#: Bytes of a probe per response token: its losses, and those of about as many prompt tokens.
PROBE_BYTES = 4 * (PARTNERS + 3)
#: A score table's bytes: per response token (position, id, loss) and per row (id, row, offsets).
TABLE_BYTES, TABLE_ROW_BYTES = 12, 40
#: What every further column adds to both.
COLUMN_BYTES = 4
#: A cleaned pool's bytes after compression: per token, and per response token that has scores.
CLEANED_BYTES, SCORED_BYTES = 4, 20
_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Rows:
    """Rows of a pool, as far as their cost is concerned.

    Attributes:
        lengths: input tokens of each row, int64, shape (R,).
        counts: targets of each row, shape (R,).
    """

    lengths: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rows: TokenRows) -> Rows:
        return cls(rows.lengths, rows.counts)

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(self.lengths[chosen], self.counts[chosen])


class Planner:
    """Costs of passes of one run.

    Args:
        data: its data module, set up.
        base: its base model.
        lora: its LoRA settings, or None where all weights are trained.
        trainer: its Lightning Trainer.
        scoring_precision: precision that it scores in.
        checkpointing: ``auto``, or whether activations are recomputed.
        weighting_scope: what online weights take for the batch, see `CleanedSFTModule`.
        timed: measure the machine's speed, which takes a second; else times are 0.
    """

    def __init__(
        self,
        data: TuluDataModule,
        base: BaseConfig,
        lora: LoraSettings | None,
        trainer: Any,
        scoring_precision: str,
        checkpointing: bool | str = False,
        weighting_scope: str = "global",
        timed: bool = True,
    ):
        self.weighting_scope = weighting_scope
        self.data, self.trainer = data, trainer
        self.device: torch.device = trainer.strategy.root_device
        self.shape = ModelShape.of_config(load_config(base), base.trust_remote_code)
        self.layout: Layout = "padded" if base.layout == "padded" else "packed"
        self.lora = lora
        dtype = base.dtype
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" and lora is not None else "float32"
        weights: torch.dtype = getattr(torch, dtype)
        training = _PRECISIONS.get(str(trainer.precision), weights)
        scoring = _PRECISIONS.get(scoring_precision, weights)
        split = trainer.world_size if splits_layers(trainer) else 1
        self.training = Setting(lora, True, weights, training, base.load_in_4bit, split=split)
        self.scoring = Setting(lora, False, weights, scoring, base.load_in_4bit, split=split)
        # On a CPU the process itself counts, as it does in what a run reports afterwards.
        self.own = resident_memory() if self.device.type == "cpu" else 0
        self.room = int(USABLE * free_memory(self.device))
        dtypes = {training, scoring}
        self.rates = {
            d: matmul_rate(self.device, d, 1.0 / len(dtypes)) if timed else math.inf for d in dtypes
        }
        self.checkpointing = (
            peak_bytes(self.shape, self.training, data.token_budget) > self.room
            if checkpointing == "auto"
            else bool(checkpointing)
        )
        self.validation = None if data.validation is None else Rows.of(data.validated_rows())
        self.test = None if data.test is None else Rows.of(TokenRows(data.test))

    # -- stages -------------------------------------------------------------------------------

    def score(
        self,
        arm: str,
        rows: Rows,
        round: int | None = None,
        stack: int = 0,
        columns: Sequence[str] | None = None,
    ) -> Cost:
        """A scoring pass and its table, with ``stack`` adapters over the base.

        Args:
            columns: what the table holds besides losses, see `Column`.
        """
        extra, work = len(columns or ()), Work.of(rows.lengths, rows.counts)
        cost = Cost(arm, "score", round)
        cost.disk = (TABLE_BYTES + COLUMN_BYTES * extra) * work.targets
        cost.disk += (TABLE_ROW_BYTES + COLUMN_BYTES * extra) * len(rows.lengths)
        if "alone" in (columns or ()):  # the responses once more, by themselves
            work = work + Work.of(rows.counts, rows.counts)
        return self._passes(cost, work, replace(self.scoring, stack=stack), [rows])

    def probe(self, arm: str, rows: Rows, round: int | None = None, stack: int = 1) -> list[Cost]:
        """Probes of base and reference, see `tokenclean.scoring.probe`."""
        some = rows[np.arange(min(len(rows.lengths), SAMPLES))]
        once = Work.of(some.lengths, some.counts)
        return [
            self._passes(
                Cost(arm, "score", round, disk=PROBE_BYTES * once.targets),
                once * (PARTNERS + 1),
                replace(self.scoring, stack=depth),
                [some],
            )
            for depth in (0, stack)
        ]

    def evaluate(self, arm: str, stack: int = 0) -> list[Cost]:
        """Test and validation pass of a finished arm; none where there is nothing to measure."""
        pools = [rows for rows in (self.test, self.validation) if rows is not None]
        if not pools:
            return []
        work = sum((Work.of(rows.lengths, rows.counts) for rows in pools), Work())
        return [
            self._passes(Cost(arm, "evaluate"), work, replace(self.scoring, stack=stack), pools)
        ]

    def train(
        self,
        arm: str,
        rows: Rows,
        round: int | None = None,
        stack: int = 0,
        epochs: int | None = None,
        at_once: bool = False,
    ) -> Cost:
        """Training, over ``stack`` frozen adapters, with its validation passes.

        Args:
            at_once: a whole step's activations are in memory, see `CleanedSFTModule`.

        Raises:
            ValueError: if neither epochs nor steps are limited.
        """
        size, seed = self.data.batch_size, self.data.seed
        steps, per_epoch = planned_steps(self.trainer, -(-len(rows.lengths) // size), epochs)
        work = Work.of_steps(rows.lengths, rows.counts, size, seed, steps, per_epoch)
        groups = [rows[members] for members in plan_epoch(len(rows.lengths), size, seed, 0)]
        setting = replace(self.training, stack=stack)
        cost = self._passes(Cost(arm, "train", round), work, setting, groups)
        if at_once:
            steps_tokens = (sum(self._micro_batches(group.lengths)) for group in groups)
            most = -(-max(steps_tokens, default=0) // self.trainer.world_size)
            cost.peak_memory = self.own + peak_bytes(self.shape, setting, most, self.checkpointing)
        if self.validation is not None:
            once = Work.of(self.validation.lengths, self.validation.counts)
            passes = validation_passes(self.trainer, steps // per_epoch)
            validation = self._passes(
                Cost(arm, "evaluate"), once * passes, self.scoring, [self.validation]
            )
            cost.add(replace(validation, peak_memory=0))
        if self.lora is None:
            cost.disk = parameter_bytes(self.shape, self.training.weights)
        else:
            cost.disk = adapter_bytes(self.shape, self.lora)
        return cost

    def select(self, arm: str, rows: Rows, round: int | None = None, scored: bool = False) -> Cost:
        """Ranking and writing a cleaned pool."""
        targets = int(rows.counts.sum())
        cost = Cost(arm, "select", round, targets / SELECTED_PER_SECOND, targets=targets)
        cost.samples, cost.disk = len(rows.lengths), cleaned_bytes(rows, scored)
        return cost

    def _passes(self, cost: Cost, work: Work, setting: Setting, groups: list[Rows]) -> Cost:
        """Fill in what follows from the work; micro-batches are cut from each of the groups."""
        micro = [tokens for rows in groups for tokens in self._micro_batches(rows.lengths)]
        padding = sum(micro) / max(sum(int(rows.lengths.sum()) for rows in groups), 1)
        again = setting.training and self.checkpointing
        if setting.training:
            cost.flops = training_flops(self.shape, work, self.lora)
            executed = training_flops(self.shape, work, self.lora, again)
        else:
            cost.flops = executed = forward_flops(self.shape, work)
        efficiency = EFFICIENCY["train" if setting.training else "score"]
        rate = self.rates[setting.compute] * efficiency * self.trainer.world_size
        cost.samples, cost.targets = work.samples, work.targets
        cost.tokens = int(work.tokens * padding + 0.5)
        cost.seconds = cost.model_seconds = executed * padding / rate
        cost.peak_memory = self.own + peak_bytes(self.shape, setting, max(micro, default=0), again)
        return cost

    def _micro_batches(self, lengths: np.ndarray) -> list[int]:
        """Tokens computed in each micro-batch, padding included."""
        plan = plan_batches(lengths, self.data.token_budget, self.layout)
        if self.layout == "padded":
            return [int(lengths[rows].max()) * len(rows) for rows in plan]
        return [int(lengths[rows].sum()) for rows in plan]

    # -- the loop -----------------------------------------------------------------------------

    def clean(self, loop: LoopConfig, selection: SelectionConfig, merged: bool) -> list[Cost]:
        """Every stage of `CleaningLoop.run`, in its order, as if nothing were done yet.

        Args:
            loop: arms and schedules.
            selection: what the arms share.
            merged: whether every arm writes a merged model.
        """
        pool = self.data.pool
        rows, truth = Rows.of(TokenRows(pool)), _informative(pool)
        parts = self.data.subset_rows()
        costs = self.evaluate("base")
        arms = loop.arms.values()

        def columns(table: str, *schedules: str) -> list[str] | None:
            chosen = [a for a in arms if not schedules or a.schedule in schedules]
            needs = [need for arm in chosen for need in arm.needs(selection)]
            return columns_needed(needs, table)

        if (of_base := columns("base")) is not None:
            costs.append(self.score(SHARED, rows, columns=of_base))
        if any(arm.needs_warmup(loop.reference) for arm in arms):
            if loop.warmup is None:
                costs.append(self.select(SHARED, rows[parts[0]], 0))
                costs.append(self.train(SHARED, rows[parts[0]], 0, epochs=loop.warmup_epochs))
            if loop.evaluate_rounds:
                costs += self.evaluate(SHARED, 1)
        if any(arm.needs_reference and arm.schedule == "fixed_model" for arm in arms):
            found = columns("reference", "fixed_model")
            costs.append(self.score(SHARED, rows, stack=1, columns=found))
        if any(arm.schedule == "cross_fitted" for arm in arms):
            first, second = (rows[half] for half in halves(parts))
            for half, rest in ((first, second), (second, first)):
                costs.append(self.select(SHARED, rest))
                costs.append(self.train(SHARED, rest, epochs=loop.half_epochs))
                found = columns("reference", "cross_fitted")
                costs.append(self.score(SHARED, half, stack=1, columns=found))
        probed: set[str] = set()
        for name, arm in loop.arms.items():
            chosen = arm.selection(selection)
            online = arm.make_weighting()
            batch_scope = online is not None and online.scope == "batch"
            at_once = batch_scope and self.weighting_scope == "global"
            depth = 1
            if arm.schedule in ("fixed_model", "cross_fitted"):
                kept = _kept(rows, truth, chosen)
                if chosen.estimates_keep and arm.schedule not in probed:
                    probed.add(arm.schedule)
                    crossed = arm.schedule == "cross_fitted"
                    for part in halves(parts) if crossed else [np.arange(len(rows.lengths))]:
                        costs += self.probe(SHARED, rows[part])
                costs.append(self.select(name, rows, scored=arm.needs_reference))
                costs.append(self.train(name, kept, at_once=at_once))
            elif arm.schedule == "self_evolving":
                for number, part in enumerate(parts[1:], start=1):
                    needs = arm.needs(selection)
                    costs += self._round(name, needs, loop, number, rows[part], depth)
                    asks = columns_needed(needs, "reference") is not None
                    if asks and loop.has_panel(len(parts) - 1):
                        panel = rows[panel_rows(parts, loop.panel, self.data.seed)]
                        costs += self._round(SHARED, needs, loop, number, panel, depth)
                    if chosen.estimates_keep:
                        costs += self.probe(name, rows[part], number, depth)
                    informative = None if truth is None else truth[part]
                    kept = _kept(rows[part], informative, chosen)
                    one = self.lora is None or loop.continue_adapter
                    stack = 0 if one else depth
                    costs.append(self.train(name, kept, number, stack, at_once=at_once))
                    depth += not one
                    if loop.evaluate_rounds:
                        costs += self.evaluate(name, depth)
                # The rounds' pools and adapters joined into one each.
                scored = sum(cleaned_bytes(rows[p], arm.needs_reference) for p in parts[1:])
                joined = cleaned_bytes(rows[parts[0]], False) + scored
                costs.append(Cost(name, "select", disk=joined))
                if self.lora is not None:
                    size = depth * adapter_bytes(self.shape, self.lora)
                    costs.append(Cost(name, "train", disk=size))
            costs += (last := self.evaluate(name, depth))
            if merged and self.lora is not None:
                size = parameter_bytes(self.shape, self.training.weights)
                if last:
                    last[0].disk = size
                else:
                    costs.append(Cost(name, "evaluate", disk=size))
        return costs

    def _round(
        self,
        name: str,
        needs: tuple[str, ...],
        loop: LoopConfig,
        number: int,
        rows: Rows,
        depth: int,
    ) -> list[Cost]:
        of_base, of_reference = (columns_needed(needs, t) for t in ("base", "reference"))
        costs = [self.select(name, rows, number, of_reference is not None)]
        if of_reference is not None:
            scored = self.score(name, rows, number, depth, columns=of_reference)
            if of_base is not None and loop.score_base == "previous" and number > 1:
                scored.add(self.score(name, rows, number, depth - 1))
            costs.insert(0, scored)
        return costs

    # -- the answer ---------------------------------------------------------------------------

    def report(self, costs: list[Cost]) -> str:
        """The table, what fits into memory, and what the times rest on."""
        train = any(cost.stage == "train" for cost in costs)
        setting = self.training if train else self.scoring
        standing = standing_bytes(self.shape, setting)
        lines = [
            "An estimate; nothing was run.",
            "",
            cost_table(costs),
            "",
            f"Model: {quantity(self.shape.parameters)} parameters on {self.device}; "
            f"{quantity(standing, 'B')} stay in memory whatever the micro-batch, "
            f"{quantity(self.room, 'B')} can be used ({USABLE:.0%} of what is free).",
            self._budgets(setting),
            "Time: "
            + ", ".join(
                f"{quantity(rate, 'FLOP/s')} in {str(dtype).removeprefix('torch.')} products"
                for dtype, rate in self.rates.items()
            )
            + f" measured here, of which {EFFICIENCY['score']:.0%} are expected when scoring and "
            f"{EFFICIENCY['train']:.0%} when training. Models that do not fill the device are "
            "slower. Start-up and loading are not in it.",
        ]
        return "\n".join(lines) + "\n"

    def _budgets(self, setting: Setting) -> str:
        asked = self.data.token_budget
        plain = largest_budget(self.shape, setting, self.room)
        text = f"data.token_budget: {asked}; up to {plain} tokens fit"
        if not setting.training:
            return text + "."
        sparing = largest_budget(self.shape, setting, self.room, checkpointing=True)
        text += f", {sparing} with gradient checkpointing, "
        if asked <= plain:
            return text + "which is not needed."
        return text + ("which is needed." if asked <= sparing else "which is not enough.")


def cleaned_bytes(rows: Rows, scored: bool) -> int:
    """Bytes of a cleaned pool of these rows, about."""
    responses = int(rows.counts.sum()) if scored else 0
    return CLEANED_BYTES * int(rows.lengths.sum()) + SCORED_BYTES * responses


def planned_steps(trainer: Any, batches: int, epochs: int | None = None) -> tuple[int, int]:
    """Optimiser steps of a run, and of one epoch.

    Args:
        trainer: with its limits.
        batches: global batches in an epoch.
        epochs: instead of the trainer's ``max_epochs``.

    Raises:
        ValueError: if there is no limit.
    """
    limit = trainer.limit_train_batches
    per_epoch = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    epochs = trainer.max_epochs if epochs is None else epochs
    if epochs in (None, -1) and trainer.max_steps < 0:
        raise ValueError(
            "trainer.max_epochs: the schedule needs an end; give max_epochs or max_steps"
        )
    steps = math.inf if epochs in (None, -1) else epochs * per_epoch
    return int(min(steps, trainer.max_steps if trainer.max_steps >= 0 else math.inf)), per_epoch


def _informative(pool: TokenPool) -> np.ndarray | None:
    """Informative response tokens of every row, int64; None without planted truth."""
    if pool.truth is None:
        return None
    return np.array([(pool.truth[row] == 1).sum() for row in range(len(pool))], dtype=np.int64)


def _kept(rows: Rows, informative: np.ndarray | None, selection: SelectionConfig) -> Rows:
    """Rows with as many targets as the rule keeps; where they lie is not known."""
    counts = rows.counts
    share = 1.0 if selection.keep == "auto" else selection.keep  # at most
    if selection.rule == "oracle":
        if informative is None:
            raise ValueError("loop.arms: oracle needs a pool with planted truth")
        counts = informative
    elif selection.make().ranked:  # of the others it cannot be known
        if selection.scope == "sample":
            counts = (counts * share).astype(np.int64)
        else:
            # Spread over the rows; the sum is int(n * keep).
            running = (np.cumsum(counts) * share).astype(np.int64)
            counts = np.diff(running, prepend=0)
    return Rows(rows.lengths, counts)
