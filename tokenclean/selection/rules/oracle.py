"""Exactly the informative tokens of a planted pool: what a perfect rule would do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import BELOW_CUT, KEPT, Rule, TokenBlock


@dataclass
class Oracle(Rule):
    """Keep the tokens whose planted truth is informative."""

    needs = ("pool.truth",)
    ranked = False

    def decide(self, block: TokenBlock) -> np.ndarray:
        return np.where(block["pool.truth"] == 1, KEPT, BELOW_CUT).astype(np.int8)
