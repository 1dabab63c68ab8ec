"""Rho-1: train on what a reference does better, chosen at every step (arXiv 2404.07965)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenclean.training.weights import (
    MeanOver,
    Scope,
    Tokens,
    Weighting,
    check_share,
    top_share,
)


@dataclass(frozen=True)
class Rho1Online(Weighting):
    """w = 1 for the tokens of the batch with the largest nll - nll_reference, else 0.

    The mean over the tokens that are left (``mean_over: weights``). Equal differences: the earlier
    token in the pool goes first.

    Args:
        keep: share of the batch's tokens, int(n * keep) of them.
    """

    keep: float = 0.6
    mean_over: MeanOver = "weights"

    scope: ClassVar[Scope] = "batch"
    needs: ClassVar[tuple[str, ...]] = ("reference.nll",)

    def __post_init__(self) -> None:
        check_share(self.keep)

    def weights(self, tokens: Tokens) -> Tensor:
        return top_share(tokens.nll - tokens["reference.nll"], self.keep)
