"""Drop what a reference contradicts. Ours; best with cross-fitted references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tokenclean.selection.rule import KEPT, Rule, TokenBlock

CONTRADICTED = 4


@dataclass
class Contradiction(Rule):
    """Drop a token where the reference finds another one much more likely; no keep share.

    A high loss alone drops nothing: where the reference does not know, its best guess is unlikely
    too.

    Args:
        max_gap: in nats: a token is kept while the reference's most likely token is at most
            exp(max_gap) times as likely as it.
    """

    max_gap: float = 1.0

    needs = ("reference.gap",)
    ranked = False
    reasons: ClassVar[dict[int, str]] = {CONTRADICTED: "contradicted by the reference"}

    def __post_init__(self) -> None:
        if not self.max_gap >= 0.0:
            raise ValueError(
                f"selection.options: max_gap = {self.max_gap} is not a gap in nats; 0 keeps only "
                "what the reference finds most likely, the default is 1"
            )

    def priority(self, block: TokenBlock) -> np.ndarray:
        return -block["reference.gap"].astype(np.float64)

    def decide(self, block: TokenBlock) -> np.ndarray:
        gap = block["reference.gap"]
        if np.isnan(gap).any():
            raise ValueError("gaps contain NaN: the pass that produced them must be repeated")
        return np.where(gap <= self.max_gap, KEPT, CONTRADICTED).astype(np.int8)
