"""XTF as its released code works (arXiv 2602.14536), limits per response included."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.xtf import (
    Xtf,
    below_fence,
    codes,
    novelty,
    worst_of,
)


@dataclass
class XtfCode(Xtf):
    """As `XtfPaper`, with the thresholds of the released code; at most a fifth or so is dropped.

    Args:
        reasoning: ``none``. The released code takes the first layer's attention and averages over
            the *key* axis (``keys``): every softmax row sums to 1, so that is 1/T for all T tokens
            of a sample, and what falls below a fence is rounding noise. ``received`` and
            ``standardised`` are the readings of `XtfPaper`, from the layer ``attributes.layer``.
        fence: a token fails if its importance is below Q1 - fence * (Q3 - Q1) of its response.
        novelty: use knowledge novelty.
        min_novelty: a token fails below it if it is also above the response's quantile ``likely``
            of p_base.
        likely: that quantile.
        relevance: use task relevance: cosine of the last hidden state of the token by itself with
            the mean over the expert words (``attributes.experts``).
        classes: clusters of relevance over the pool, by multi-Otsu; the lowest fails.
        limit: importance and relevance each drop at most this share of a response, worst first.
    """

    fence: float = 1.5
    likely: float = 0.9
    limit: float = 0.05

    relevance_column = "base.relevance_hidden"

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit <= 1.0 or not 0.0 <= self.likely <= 1.0:
            raise ValueError("selection.options: limit and likely are shares in [0, 1]")
        if self.classes < 2:
            raise ValueError(f"selection.options: classes = {self.classes}; at least 2 are needed")
        super().__post_init__()

    def decide(self, block: TokenBlock) -> np.ndarray:
        bounds = block.bounds()
        unimportant = known = off_topic = np.zeros(block.size, dtype=bool)
        if self._importance is not None:
            value = self._importance.of(block)
            unimportant = worst_of(
                below_fence(value, bounds, self.fence), value, bounds, self.limit
            )
        if self.novelty:
            new = novelty(block)
            known = (new < self.min_novelty) & _above_quantile(1.0 - new, bounds, self.likely)
        if self._clusters is not None:
            value = block["base.relevance_hidden"]
            off_topic = worst_of(self._clusters.of(value) == 0, value, bounds, self.limit)
        return codes(unimportant, known, off_topic)


def _above_quantile(values: np.ndarray, bounds: np.ndarray, quantile: float) -> np.ndarray:
    """Values above a quantile of their response, bool (n,)."""
    above = np.zeros(len(values), dtype=bool)
    for start, stop in pairwise(bounds):
        if stop > start:
            own = values[start:stop]
            above[start:stop] = own > np.quantile(own, quantile)
    return above
