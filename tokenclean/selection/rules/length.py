"""Rank samples by their response tokens, longest first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock


@dataclass
class Length(Rule):
    """The longest responses go first: a baseline that is hard to beat among sample filters."""

    of_samples = True

    def priority(self, block: TokenBlock) -> np.ndarray:
        return np.repeat(block.counts.astype(np.float64), block.counts)
