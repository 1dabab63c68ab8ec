"""Rank samples by a rating that the data brings along."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock


@dataclass
class Quality(Rule):
    """The best rated samples go first; the rating is the column that ``data.order`` names."""

    needs = ("pool.quality",)
    of_samples = True

    def priority(self, block: TokenBlock) -> np.ndarray:
        return block["pool.quality"]
