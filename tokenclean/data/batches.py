"""From rows to batches: which rows go together, and the tensors they become.

A batch holds response targets only: the input ends before the last target (nothing after it can
matter to a causal model), and the hidden rows that predict targets are listed by index. Two layouts
carry the same rows: *packed*, all samples end to end in one row with no padding, and *padded*, one
row per sample, padded on the right.

Legend for shapes: B rows, T tokens per row, N targets in the batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Layout = Literal["packed", "padded"]


@dataclass
class Sample:
    """One row of the pool as training or scoring sees it.

    Attributes:
        row: pool row.
        input_ids: int32, shape (T,).
        positions: tokens to predict, ascending, at least 1 each; int64, shape (n,).
        weights: float32, shape (n,); the loss weight of each.
        length: leading tokens to compute: up to the last target, after which nothing matters to a
            causal model, unless told otherwise.
        extra: further numbers of each target by name, float32, shape (n,) each.
        prompt: which tokens are no response tokens, bool, shape (T,); only where asked for.
    """

    row: int
    input_ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    length: int = 0
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    prompt: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.length and len(self.positions):
            self.length = int(self.positions[-1])


@dataclass
class Batch:
    """Tensors of one micro-batch.

    Attributes:
        input_ids: int64, (1, T) packed or (B, T) padded.
        position_ids: int64, like ``input_ids``; starts at 0 in every sample.
        segments: lengths of the packed samples, or None when padded.
        bounds: where packed samples begin, and the end: int32, (samples + 1,).
        predicting: index of the hidden row (in the flattened B * T) that predicts each target,
            int64, (N,).
        targets: token ids, int64, (N,).
        weights: float32, (N,).
        rows: pool row of each sample.
        counts: targets of each sample, in the same order; they sum to N.
        extra: further numbers of each target by name, float32, (N,) each.
        prompt: which tokens are no response tokens, bool, like ``input_ids``; None unless the
            samples say so.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: list[int] | None
    bounds: Tensor
    predicting: Tensor
    targets: Tensor
    weights: Tensor
    rows: list[int]
    counts: list[int]
    extra: dict[str, Tensor] = field(default_factory=dict)
    prompt: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        def move(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=non_blocking)

        names = ("input_ids", "position_ids", "bounds", "predicting", "targets", "weights")
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        moved["extra"] = {name: move(values) for name, values in self.extra.items()}
        moved["prompt"] = None if self.prompt is None else move(self.prompt)
        return replace(self, **moved)

    def split(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Cut a per-target tensor (N,) into (pool row, its values)."""
        yield from zip(self.rows, values.split(self.counts), strict=True)


def collate(samples: Sequence[Sample], layout: Layout = "packed", pad_id: int = 0) -> Batch:
    """Put samples into one batch. Samples without a target are left out: they cost nothing.

    The shift lives here: the hidden row that predicts position ``j`` is ``j - 1``.
    """
    samples = [s for s in samples if len(s.positions)]
    # Longest first, so that samples of equal length are neighbours (attention batches them).
    samples = sorted(samples, key=lambda s: -s.length)
    lengths = [s.length for s in samples]
    width = max(lengths, default=0)
    if layout == "packed":
        starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
        shape = (1, sum(lengths))
    else:
        starts = np.arange(len(samples), dtype=np.int64) * width
        shape = (len(samples), width)
    input_ids = np.full(shape[0] * shape[1], pad_id, dtype=np.int64)
    position_ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for sample, start, length in zip(samples, starts, lengths, strict=True):
        input_ids[start : start + length] = sample.input_ids[:length]
        position_ids[start : start + length] = np.arange(length)
    none = np.zeros(0, dtype=np.int64)
    prompt = None
    if samples and samples[0].prompt is not None:
        prompt = np.zeros(shape[0] * shape[1], dtype=np.bool_)
        for sample, start, length in zip(samples, starts, lengths, strict=True):
            assert sample.prompt is not None
            prompt[start : start + length] = sample.prompt[:length]
    extra = samples[0].extra if samples else {}
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(shape)),
        position_ids=torch.from_numpy(position_ids.reshape(shape)),
        segments=lengths if layout == "packed" else None,
        bounds=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        predicting=torch.from_numpy(
            np.concatenate(
                [none, *(a + s.positions - 1 for a, s in zip(starts, samples, strict=True))]
            )
        ),
        targets=torch.from_numpy(
            np.concatenate([none, *(s.input_ids[s.positions] for s in samples)]).astype(np.int64)
        ),
        weights=torch.from_numpy(
            np.concatenate([none, *(s.weights for s in samples)]).astype(np.float32)
        ),
        rows=[s.row for s in samples],
        counts=[len(s.positions) for s in samples],
        extra={
            name: torch.from_numpy(np.concatenate([s.extra[name] for s in samples]))
            for name in extra
        },
        prompt=None if prompt is None else torch.from_numpy(prompt.reshape(shape)),
    )


def plan_batches(lengths: np.ndarray, budget: int, layout: Layout = "packed") -> list[np.ndarray]:
    """Rows grouped into batches of at most ``budget`` tokens (a longer row goes alone).

    A pure function of its arguments: rows sorted by length, longest first (equal lengths in their
    own order), cut greedily. Rows of length 0 have nothing to predict and are left out.

    Args:
        lengths: input tokens of each row, shape (R,).
        budget: tokens per batch, padding included.
        layout: ``padded`` counts rows times the longest row.

    Returns:
        Index arrays into ``lengths``.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches: list[np.ndarray] = []
    start = used = 0
    for i, row in enumerate(order):
        length = int(lengths[row])
        cost = int(lengths[order[start]]) * (i - start + 1) if layout == "padded" else used + length
        if i > start and cost > budget:
            batches.append(order[start:i])
            start, cost = i, length
        used = cost
    if len(order) > start:
        batches.append(order[start:])
    return batches


def plan_epoch(rows: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Global batches of ``size`` rows in a seeded order that is fixed for the run.

    The last batch keeps the remainder.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [order[i : i + size] for i in range(0, rows, size)]


def share_of_rank(lengths: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Which members of a global batch one process computes.

    Longest first, each goes to the process that has the fewest tokens so far (the lowest rank of
    equals): within a per cent or two of an even split, where dealing them out in turn leaves a
    tenth.

    Args:
        lengths: input tokens of the members, shape (R,).

    Returns:
        Indices into ``lengths``, ascending. Every member belongs to exactly one rank.
    """
    order = np.argsort(-lengths, kind="stable")
    loads = [(0, process) for process in range(world)]
    mine = []
    for member in order:
        load, process = heapq.heappop(loads)
        if process == rank:
            mine.append(member)
        heapq.heappush(loads, (load + int(lengths[member]), process))
    return np.sort(np.array(mine, dtype=np.int64))
