"""XTF as the paper describes it (arXiv 2602.14536): base model only, three attributes."""

from __future__ import annotations

from dataclasses import dataclass, field

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
)


@dataclass
class XtfPaper(Rule):
    """Drop what fails in reasoning importance, knowledge novelty or task relevance; no keep share.

    Args:
        reasoning: attention a token receives from later tokens: ``received`` as it is, or
            ``standardised`` per position, without which its place in the text decides; ``none``
            leaves the attribute out. The paper names neither layer nor axis; the layer is
            ``attributes.layer``, a deep one by default.
        fence: a token fails if its importance is below Q1 - fence * (Q3 - Q1) of its response.
        novelty: use knowledge novelty, 1 - p_base.
        min_novelty: it fails below this; 0.05 is p_base > 0.95.
        relevance: use task relevance, the nearness of its input embedding to the mean of the
            expert words (``attributes.experts``).
        classes: clusters of relevance over the pool, by multi-Otsu. The one with the second
            smallest mean fails; the lowest is mostly blanks and is spared.
    """

    reasoning: Reasoning = "standardised"
    fence: float = 1.0
    novelty: bool = True
    min_novelty: float = 0.05
    relevance: bool = True
    classes: int = 5
    _importance: ReasoningImportance | None = field(default=None, init=False, repr=False)
    _clusters: Clusters | None = field(default=None, init=False, repr=False)

    ranked = False
    reasons = REASONS

    def __post_init__(self) -> None:
        if self.reasoning == "keys":
            raise ValueError(
                "selection.options: reasoning = 'keys' belongs to xtf_code; the paper's is "
                "'received' or 'standardised'"
            )
        if self.classes < 3:
            raise ValueError(
                f"selection.options: classes = {self.classes}; the second lowest of at least 3 "
                "clusters is dropped"
            )
        self.needs = needs(self.reasoning, "base.relevance" if self.relevance else None)

    def fit(self, blocks: Blocks) -> None:
        if self.reasoning != "none":
            self._importance = ReasoningImportance(blocks, self.reasoning)
        if self.relevance:
            self._clusters = Clusters(
                blocks, lambda b: b["base.relevance"], self.classes, "relevance"
            )

    def decide(self, block: TokenBlock) -> np.ndarray:
        none = np.zeros(block.size, dtype=bool)
        unimportant = off_topic = none
        if self._importance is not None:
            unimportant = below_fence(self._importance.of(block), block.bounds(), self.fence)
        known = novelty(block) < self.min_novelty if self.novelty else none
        if self._clusters is not None:
            off_topic = self._clusters.of(block["base.relevance"]) == 1
        return codes(unimportant, known, off_topic)
