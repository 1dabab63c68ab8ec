"""Every response token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import KEPT, Rule, TokenBlock


@dataclass
class Full(Rule):
    """Ordinary fine-tuning: nothing is dropped."""

    ranked = False

    def decide(self, block: TokenBlock) -> np.ndarray:
        return np.full(block.size, KEPT, dtype=np.int8)
