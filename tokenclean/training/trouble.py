"""When a step cannot be taken: memory runs out, or numbers are not finite.

Memory: the step is begun again with at most half as many tokens at a time, which changes nothing
but rounding. Numbers: the sample they come from is looked for and named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenclean.data.batches import Batch
from tokenclean.data.datamodule import GlobalBatch

log = logging.getLogger(__name__)


def smaller_budget(batch: GlobalBatch, failed: Batch, steps: Any, when: str) -> int:
    """How many tokens at a time to try next, half of the most so far.

    Args:
        batch: the step's.
        failed: of its micro-batches the one that did not fit.
        steps: the data set it is an item of.
        when: what happened, and when.

    Raises:
        ValueError: if it is one sample alone that does not fit.
    """
    if len(failed.rows) == 1:
        raise ValueError(
            f"{when}: sample {steps.id_of(failed.rows[0])!r} does not fit by itself, with "
            f"{failed.tokens} tokens; set data.max_length lower, or model.gradient_checkpointing "
            "to true"
        )
    budget = max(micro.tokens for micro in batch.micro if len(micro.rows) > 1) // 2
    log.warning("%s: at most %d tokens at a time from here on", when, budget)
    return budget


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def not_finite(
    computed: list[tuple[Batch, Tensor]],
    step: int,
    gradient: Callable[[int], tuple[list[int], int]] | None,
    id_of: Callable[[int], str],
) -> str:
    """What to say of a step whose loss or gradient is not finite; all processes must ask.

    Args:
        computed: this process's micro-batches, and weight times loss of their targets.
        step: its number.
        gradient: see `Alone`; None if samples cannot be tried one by one.
        id_of: a sample's id from its pool row.
    """
    rows, number = _rows_not_finite(computed)
    what = "loss"
    if not _anywhere(rows) and gradient is not None:
        rows, number = gradient(step)
        what = "gradient"
    found = [id_of(row) for row in rows[:1]]
    counts = (len(rows), number)
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (found, counts))
        found = [id for ids, _ in gathered for id in ids]
        counts = (sum(c[0] for _, c in gathered), sum(c[1] for _, c in gathered))
    remedy = "lower the learning rate, or set model.gradient_clip"
    if not found:
        return f"the gradient is not finite at step {step}, that of no sample alone: {remedy}"
    return (
        f"the {what} of sample {found[0]!r} is not finite at step {step} ({counts[0]} of "
        f"{counts[1]} samples there): look at the sample, {remedy}"
    )


def _rows_not_finite(computed: list[tuple[Batch, Tensor]]) -> tuple[list[int], int]:
    rows, number = [], 0
    for batch, losses in computed:
        wrong = [row for row, part in batch.split(losses) if not bool(part.isfinite().all())]
        rows += [row for row in wrong if row >= 0]
        number += len(batch.rows)
    return rows, number


def _anywhere(rows: list[int]) -> bool:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return bool(rows)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, bool(rows))
    return any(gathered)


def samples_without_gradient(
    batch: GlobalBatch, loss: Callable[[Batch], Tensor], trained: list[Tensor]
) -> tuple[list[int], int]:
    """Pool rows whose own gradient is not finite, and how many were tried.

    Args:
        batch: of micro-batches of one sample.
        loss: of one of them.
    """
    rows = []
    for micro in batch.micro:
        # Not `backward`, which would exchange gradients with other processes.
        gradients = torch.autograd.grad(loss(micro), trained, allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
            rows.append(micro.rows[0])
    return rows, len(batch.micro)
