"""EAFT: weigh a token by how undecided the model is (arXiv 2601.02151)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenclean.training.weights import Tokens, Weighting


@dataclass(frozen=True)
class Eaft(Weighting):
    """w = H / ln 20, H the entropy of the 20 most likely tokens: from 0, where it is sure, to 1.

    Wherever it is sure, right or wrong, nothing is learnt. Divided by the number of tokens.

    Args:
        renormalised: H is that of the 20 probabilities scaled to sum to 1. Else -sum p ln p over
            the 20 as they are, which loses what they are short of 1.
    """

    renormalised: bool = True

    top: ClassVar[int] = 20

    def weights(self, tokens: Tokens) -> Tensor:
        entropy = tokens["top_entropy"]
        if not self.renormalised:
            # p = m q: -sum p ln p = m H(q) - m ln m
            mass = tokens["top_mass"]
            entropy = mass * entropy + torch.special.entr(mass)
        return entropy / math.log(self.top)
