"""XTF as the paper describes it (arXiv 2602.14536): base model only, three attributes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.xtf import (
    Reasoning,
    Xtf,
    below_fence,
    codes,
    novelty,
)


@dataclass
class XtfPaper(Xtf):
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

    relevance_column = "base.relevance"

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
        super().__post_init__()

    def decide(self, block: TokenBlock) -> np.ndarray:
        none = np.zeros(block.size, dtype=bool)
        unimportant = off_topic = none
        if self._importance is not None:
            unimportant = below_fence(self._importance.of(block), block.bounds(), self.fence)
        known = novelty(block) < self.min_novelty if self.novelty else none
        if self._clusters is not None:
            off_topic = self._clusters.of(block["base.relevance"]) == 1
        return codes(unimportant, known, off_topic)
