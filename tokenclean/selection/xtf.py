"""What both readings of XTF (arXiv 2602.14536) share: attributes, fences, clusters, reasons.

A token is noise if it fails in any of three attributes: *reasoning importance* (attention that it
receives), *knowledge novelty* (1 - p under the base), *task relevance* (nearness to the expert
words of a domain). The attributes are never added up, and the reason says which ones failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from skimage.filters import threshold_multiotsu

from tokenclean.selection.rule import KEPT, Blocks, Rule, TokenBlock

Reasoning = Literal["none", "keys", "received", "standardised"]

REASONING, NOVELTY, RELEVANCE = 1, 2, 4
_NAMES = {
    REASONING: "reasoning importance",
    NOVELTY: "knowledge novelty",
    RELEVANCE: "task relevance",
}
_FIRST_CODE = 4
#: Reason code of every combination of failures: 4 plus the bits.
REASONS = {
    _FIRST_CODE + bits: "XTF: " + " + ".join(n for bit, n in _NAMES.items() if bits & bit)
    for bits in range(1, 8)
}
#: Bins of the histogram that multi-Otsu clusters: five classes take 0.2 s, where 256 take 4.
BINS = 128


def codes(reasoning: np.ndarray, novelty: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Reason codes of the union of three failures, bool (n,) each: int8, shape (n,)."""
    bits = REASONING * reasoning + NOVELTY * novelty + RELEVANCE * relevance
    return np.where(bits > 0, _FIRST_CODE + bits, KEPT).astype(np.int8)


def novelty(block: TokenBlock) -> np.ndarray:
    """Knowledge novelty, KN = 1 - p_base = -expm1(-nll): float64, shape (n,)."""
    return -np.expm1(-block["base.nll"].astype(np.float64))


def below_fence(values: np.ndarray, bounds: np.ndarray, width: float) -> np.ndarray:
    """Tukey's lower fence in every response: values below Q1 - width * (Q3 - Q1).

    Args:
        values: float, shape (n,). NaN (no later query) neither counts nor fails.
        bounds: where each response begins, and the end: int64, shape (R + 1,).
        width: of the fence, in interquartile ranges.

    Returns:
        bool, shape (n,). Quartiles are interpolated linearly.
    """
    below = np.zeros(len(values), dtype=bool)
    for start, stop in pairwise(bounds):
        own = values[start:stop]
        known = own[~np.isnan(own)]
        if len(known):
            low, high = np.quantile(known, [0.25, 0.75])
            below[start:stop] = own < low - width * (high - low)
    return below


def worst_of(fails: np.ndarray, value: np.ndarray, bounds: np.ndarray, share: float) -> np.ndarray:
    """Of the tokens that fail, at most int(n * share) of every response of n: the smallest values.

    Args:
        fails: bool, shape (n,).
        value: what decides, smaller is worse; of equals, the earlier token goes.
        bounds: as in `below_fence`.
        share: at most this share of a response.
    """
    kept = np.zeros(len(fails), dtype=bool)
    for start, stop in pairwise(bounds):
        failed = start + np.flatnonzero(fails[start:stop])
        limit = int((stop - start) * share)
        worst = failed[np.argsort(value[failed], kind="stable")[:limit]]
        kept[worst] = True
    return kept


class Clusters:
    """Multi-Otsu classes of one column over the whole pool, from a histogram of `BINS` bins.

    Args:
        blocks: the pool.
        values: what to cluster of a block, shape (n,).
        classes: how many.
        name: of the attribute, for errors.

    Raises:
        ValueError: if the pool holds fewer distinct values than classes.
    """

    def __init__(
        self,
        blocks: Blocks,
        values: Callable[[TokenBlock], np.ndarray],
        classes: int,
        name: str,
    ):
        low, high = np.inf, -np.inf
        for block in blocks():
            if block.size:
                found = values(block)
                low, high = min(low, float(found.min())), max(high, float(found.max()))
        counts = np.zeros(BINS)
        edges = np.linspace(low, high, BINS + 1) if high > low else np.zeros(BINS + 1)
        if high > low:
            for block in blocks():
                counts += np.histogram(values(block), edges)[0]
        distinct = int(np.count_nonzero(counts))
        if distinct < classes:
            raise ValueError(
                f"selection.options: {name} takes {distinct} distinct values over this pool, too "
                f"few for {classes} clusters; take other expert words or fewer classes, or switch "
                f"it off with {name}: false"
            )
        centres = (edges[:-1] + edges[1:]) / 2
        # Its thresholds are the middles of bins that belong to the lower class whole.
        found = threshold_multiotsu(classes=classes, hist=(counts, centres))
        self.cuts = np.asarray(found) + (edges[1] - edges[0]) / 2

    def of(self, values: np.ndarray) -> np.ndarray:
        """Class of each value, 0 the lowest: int64, shape (n,)."""
        return np.searchsorted(self.cuts, values, side="right")


class PositionMeans:
    """Mean and standard deviation of a column by position, to compare tokens of different places.

    A column mean of attention follows the token's position far more than its content. Positions are
    binned by half octaves: 0, 1, 2, 3-4, 5-6, 7-10, ...

    Args:
        blocks: the pool, with ``pool.position``.
        column: name of the column; NaN is left out.
    """

    def __init__(self, blocks: Blocks, column: str):
        self.column = column
        sums = np.zeros((3, 64))
        for block in blocks():
            values = block[column].astype(np.float64)
            known = ~np.isnan(values)
            bins = self._bins(block)[known]
            for power in range(3):
                sums[power] += np.bincount(bins, values[known] ** power, minlength=64)
        count = np.maximum(sums[0], 1.0)
        self.mean = sums[1] / count
        self.sd = np.sqrt(np.maximum(sums[2] / count - self.mean**2, 0.0))

    def standardised(self, block: TokenBlock) -> np.ndarray:
        """(value - mean) / sd of the token's position bin: float64 (n,); 0 where all are equal."""
        bins = self._bins(block)
        gap = block[self.column].astype(np.float64) - self.mean[bins]
        sd = self.sd[bins]
        # rounding alone must not be blown up
        flat = sd <= 1e-9 * np.abs(self.mean[bins])
        return np.where(flat & ~np.isnan(gap), 0.0, gap / np.where(flat, 1.0, sd))

    @staticmethod
    def _bins(block: TokenBlock) -> np.ndarray:
        bins: np.ndarray = (2 * np.log2(1.0 + block["pool.position"])).astype(np.int64)
        return bins


class ReasoningImportance:
    """Reasoning importance in the reading that an option asks for.

    Args:
        blocks: the pool.
        reading: ``keys``, ``received``, or ``standardised``: received, per position.
    """

    def __init__(self, blocks: Blocks, reading: Reasoning):
        self.column = attention_column(reading)
        self._means = PositionMeans(blocks, self.column) if reading == "standardised" else None

    def of(self, block: TokenBlock) -> np.ndarray:
        """float64, shape (n,); NaN where no later query exists."""
        if self._means is not None:
            return self._means.standardised(block)
        return block[self.column].astype(np.float64)


@dataclass
class Xtf(Rule):
    """What both readings of XTF share: their options, and what is fitted to the pool.

    Args:
        reasoning: which reading of reasoning importance, see `ReasoningImportance`; ``none`` leaves
            it out.
        fence: of it, in interquartile ranges.
        novelty: use knowledge novelty.
        min_novelty: what counts as known.
        relevance: use task relevance.
        classes: clusters of it.
    """

    reasoning: Reasoning = "none"
    fence: float = 1.0
    novelty: bool = True
    min_novelty: float = 0.05
    relevance: bool = True
    classes: int = 5
    _importance: ReasoningImportance | None = field(default=None, init=False, repr=False)
    _clusters: Clusters | None = field(default=None, init=False, repr=False)

    ranked = False
    reasons = REASONS
    #: the column that task relevance is read from
    relevance_column: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.needs = needs(self.reasoning, self.relevance_column if self.relevance else None)

    def fit(self, blocks: Blocks) -> None:
        if self.reasoning != "none":
            self._importance = ReasoningImportance(blocks, self.reasoning)
        if self.relevance:
            column = self.relevance_column
            self._clusters = Clusters(blocks, lambda b: b[column], self.classes, "relevance")


def attention_column(reading: Reasoning) -> str:
    """The column of the base's score table that a reading needs."""
    return "base.attention_keys" if reading == "keys" else "base.attention"


def needs(reading: Reasoning, relevance_column: str | None) -> tuple[str, ...]:
    """Columns of an XTF rule with these parts."""
    found = ["base.nll"]
    if reading != "none":
        found.append(attention_column(reading))
    if reading == "standardised":
        found.append("pool.position")
    if relevance_column is not None:
        found.append(relevance_column)
    return tuple(found)
