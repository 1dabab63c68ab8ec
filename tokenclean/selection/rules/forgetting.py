"""Forgetting: learn the best-scored tokens, unlearn the others (arXiv 2508.04329)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock, score


@dataclass
class Forgetting(Rule):
    """Rank by the score; dropped tokens keep a label and carry the weight -1.

    The released code keeps 0.7. Training makes of the signs
    mean over positives - lambda * mean over negatives, with lambda rising linearly from 0
    to ``model.negative_weight``; see `tokenclean.training.module.CleanedSFTModule`.
    """

    needs = ("base.nll", "reference.nll")
    by_score = True

    def priority(self, block: TokenBlock) -> np.ndarray:
        return score(block)

    def weights(self, block: TokenBlock, kept: np.ndarray) -> np.ndarray:
        return np.where(kept, 1.0, -1.0).astype(np.float32)
