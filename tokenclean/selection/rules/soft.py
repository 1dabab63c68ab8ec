"""Weigh by the share of tokens beyond what symmetry explains; no keep share. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from tokenclean.selection.noise import TailRatio
from tokenclean.selection.rule import KEPT, Blocks, Rule, TokenBlock, score

SYMMETRIC = 4


@dataclass
class Soft(Rule):
    """Keep tokens whose score is likelier than its negative, and weigh them by how much.

    w = max(0, 1 - f(-z) / f(z)), z the score, f its density among tokens of like base loss; see
    `TailRatio`. Like every use of the score's sign it takes the format that a reference has learnt
    for information.
    """

    needs = ("base.nll", "reference.nll")
    ranked = False
    reasons: ClassVar[dict[int, str]] = {SYMMETRIC: "no likelier than its negative"}
    _ratio: TailRatio = field(default_factory=TailRatio, init=False, repr=False)

    def fit(self, blocks: Blocks) -> None:
        self._ratio = TailRatio()
        for block in blocks():
            self._ratio.add(block["base.nll"], _score(block))
        self._ratio.fit()

    def decide(self, block: TokenBlock) -> np.ndarray:
        return np.where(self._weight(block) > 0, KEPT, SYMMETRIC).astype(np.int8)

    def weights(self, block: TokenBlock, kept: np.ndarray) -> np.ndarray:
        weight = self._weight(block)
        # What is kept for another reason (always_keep_eos) counts in full.
        return np.where(kept, np.where(weight > 0, weight, 1.0), 0.0).astype(np.float32)

    def _weight(self, block: TokenBlock) -> np.ndarray:
        return self._ratio.weights(block["base.nll"], _score(block))


def _score(block: TokenBlock) -> np.ndarray:
    found = score(block)
    if np.isnan(found).any():
        raise ValueError("scores contain NaN: the pass that produced them must be repeated")
    return found
