"""Token Cleaning (arXiv 2502.01968, Eq. 3 and 4); per sample it is the paper's RHO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock, score


@dataclass
class TokenCleaning(Rule):
    """Rank by the score: base nll - reference nll, in float64. The paper keeps 0.6."""

    needs = ("base.nll", "reference.nll")
    by_score = True

    def priority(self, block: TokenBlock) -> np.ndarray:
        return score(block)
