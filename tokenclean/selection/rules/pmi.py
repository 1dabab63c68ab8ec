"""T-SHIRT's token score: how much the prompt changes the loss (arXiv 2506.01317)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock


@dataclass
class Pmi(Rule):
    """Rank by |nll_base(t given its prompt) - nll_base(t alone)|, largest first.

    Alone means the response by itself; see the column ``alone``.
    """

    needs = ("base.nll", "base.alone")

    def priority(self, block: TokenBlock) -> np.ndarray:
        gap = np.subtract(block["base.nll"], block["base.alone"], dtype=np.float64)
        return np.abs(gap)
