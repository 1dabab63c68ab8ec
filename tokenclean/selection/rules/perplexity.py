"""Rank by the base's loss, lowest first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock


@dataclass
class Perplexity(Rule):
    """What the base finds likely goes first; over whole samples, the usual perplexity filter."""

    needs = ("base.nll",)

    def priority(self, block: TokenBlock) -> np.ndarray:
        return -block["base.nll"].astype(np.float64)
