"""XTF as its released code works (arXiv 2602.14536), limits per response included."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tokenclean.selection.rule import Blocks, Rule, TokenBlock
from tokenclean.selection.xtf import (
    REASONS,
    Clusters,
    Reasoning,
    ReasoningImportance,
    below_fence,
    codes,
    needs,
    novelty,
    worst_of,
)


@dataclass
class XtfCode(Rule):
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

    reasoning: Reasoning = "none"
    fence: float = 1.5
    novelty: bool = True
    min_novelty: float = 0.05
    likely: float = 0.9
    relevance: bool = True
    classes: int = 5
    limit: float = 0.05
    _importance: ReasoningImportance | None = field(default=None, init=False, repr=False)
    _clusters: Clusters | None = field(default=None, init=False, repr=False)

    ranked = False
    reasons = REASONS

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit <= 1.0 or not 0.0 <= self.likely <= 1.0:
            raise ValueError("selection.options: limit and likely are shares in [0, 1]")
        if self.classes < 2:
            raise ValueError(f"selection.options: classes = {self.classes}; at least 2 are needed")
        self.needs = needs(self.reasoning, "base.relevance_hidden" if self.relevance else None)

    def fit(self, blocks: Blocks) -> None:
        if self.reasoning != "none":
            self._importance = ReasoningImportance(blocks, self.reasoning)
        if self.relevance:
            self._clusters = Clusters(
                blocks, lambda b: b["base.relevance_hidden"], self.classes, "relevance"
            )

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
