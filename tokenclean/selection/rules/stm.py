"""STM: drop what the base finds too surprising (arXiv 2501.14315)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tokenclean.selection.rule import KEPT, Rule, TokenBlock

UNLIKELY = 4


@dataclass
class Stm(Rule):
    """Keep a token if its perplexity under the base, exp(nll), is small enough; no keep share.

    Args:
        max_perplexity: the largest one that is kept. The released code's 2.5 is 0.92 nats, a
            probability of 0.4.
    """

    max_perplexity: float = 2.5

    needs = ("base.nll",)
    ranked = False
    reasons: ClassVar[dict[int, str]] = {UNLIKELY: "unlikely under the base"}

    def __post_init__(self) -> None:
        if not self.max_perplexity >= 1.0:
            raise ValueError(
                f"selection.options: max_perplexity = {self.max_perplexity} keeps nothing: a "
                "perplexity is at least 1"
            )

    def priority(self, block: TokenBlock) -> np.ndarray:
        return -block["base.nll"].astype(np.float64)

    def decide(self, block: TokenBlock) -> np.ndarray:
        likely = np.exp(block["base.nll"].astype(np.float64)) <= self.max_perplexity
        return np.where(likely, KEPT, UNLIKELY).astype(np.int8)
