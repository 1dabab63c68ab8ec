"""How losses and scores are distributed: counts on grids whose range a first pass has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tokenclean.report.steps import Ranked, Step

#: Cells along an axis of the loss plane, and bins of a histogram.
CELLS: Final = 80
#: Share of the losses, and of the scores on either side, that may lie beyond the axes.
BEYOND: Final = 0.002
#: Points drawn per step.
POINTS: Final = 1500
#: Fewer bins around the cut: they hold few tokens.
NEAR_BINS: Final = 30


@dataclass
class Bars:
    """A histogram of kept and of dropped tokens.

    Attributes:
        low, high: its range.
        kept, dropped: int64, shape (bins,).
        beyond: tokens below and above the range.
    """

    low: float
    high: float
    kept: np.ndarray
    dropped: np.ndarray
    beyond: tuple[int, int] = (0, 0)

    @classmethod
    def empty(cls, low: float, high: float, bins: int = CELLS) -> Bars:
        zeros = np.zeros(bins, dtype=np.int64)
        return cls(low, high, zeros, zeros.copy())

    @property
    def edges(self) -> np.ndarray:
        """float64, shape (bins + 1,)."""
        return np.linspace(self.low, self.high, len(self.kept) + 1)

    def add(self, values: np.ndarray, kept: np.ndarray) -> None:
        """Count tokens: float64 and bool, shape (m,) each; NaN is not counted."""
        for mask, counts in ((kept, self.kept), (~kept, self.dropped)):
            counts += np.histogram(values[mask], len(counts), (self.low, self.high))[0]
        below, above = self.beyond
        self.beyond = (
            below + int(np.count_nonzero(values < self.low)),
            above + int(np.count_nonzero(values > self.high)),
        )

    @property
    def total(self) -> int:
        return int(self.kept.sum() + self.dropped.sum()) + sum(self.beyond)


@dataclass
class StepShapes:
    """One step's counts.

    Attributes:
        plane: tokens by base loss and reference loss: int64, shape (CELLS, CELLS).
        beyond: tokens outside the plane.
        values: of what the rule goes by, None if it stores nothing.
        near: of the same around the cut, None where the step has no reach.
        points: base, reference, kept (0 or 1) of tokens drawn at random: float64, (3, p).
    """

    plane: np.ndarray
    beyond: int = 0
    values: Bars | None = None
    near: Bars | None = None
    points: np.ndarray = field(default_factory=lambda: np.zeros((3, 0)))


class Shapes:
    """The counts of all steps of an arm.

    Args:
        steps: of the arm.
        limit: upper end of both axes of the plane, in nats; None if it has not both losses.
        by: column that the rule goes by, or None.
        span: range of that column.
        reaches: step -> how far around its cut there is a histogram of its own, in nats.
    """

    def __init__(
        self,
        steps: list[Step],
        limit: float | None,
        by: str | None,
        span: tuple[float, float],
        reaches: dict[int, float],
    ):
        self.limit, self._by = limit, by
        self._draw = np.random.default_rng(0)
        self._lots: dict[int, np.ndarray] = {}
        self.steps: dict[int, StepShapes] = {}
        for step in steps:
            found = StepShapes(np.zeros((CELLS, CELLS), dtype=np.int64))
            if by is not None:
                found.values = Bars.empty(*span)
                if step.cut is not None and (reach := reaches.get(step.number)):
                    found.near = Bars.empty(step.cut - reach, step.cut + reach, NEAR_BINS)
            self.steps[step.number] = found
            self._lots[step.number] = np.zeros(0)

    @property
    def edges(self) -> np.ndarray:
        """Of the plane's cells, in nats: float64, shape (CELLS + 1,)."""
        return np.linspace(0.0, self.limit or 1.0, CELLS + 1)

    def add(self, ranked: Ranked) -> None:
        """Count some rows."""
        block, at = ranked.block, ranked.at
        values = ranked.values(self._by)
        base, reference = (v[at].astype(np.float64) for v in (block.base, block.reference))
        lots = self._draw.random(len(at))
        for number, found in self.steps.items():
            of = ranked.step == number
            kept = ranked.kept[of]
            for bars in (found.values, found.near):
                if bars is not None:
                    bars.add(values[of], kept)
            if self.limit is not None:
                self._plane(number, found, base[of], reference[of], kept, lots[of])

    def _plane(
        self,
        number: int,
        found: StepShapes,
        base: np.ndarray,
        reference: np.ndarray,
        kept: np.ndarray,
        lots: np.ndarray,
    ) -> None:
        known = ~(np.isnan(base) | np.isnan(reference))
        base, reference, kept, lots = (v[known] for v in (base, reference, kept, lots))
        edges = self.edges
        counts = np.histogram2d(base, reference, [edges, edges])[0].astype(np.int64)
        found.plane += counts
        found.beyond += len(base) - int(counts.sum())
        # the points with the smallest lots of all blocks so far
        all_lots = np.concatenate([self._lots[number], lots])
        points = np.concatenate([found.points, np.stack([base, reference, kept])], axis=1)
        chosen = np.sort(np.argsort(all_lots, kind="stable")[:POINTS])
        found.points, self._lots[number] = points[:, chosen], all_lots[chosen]
