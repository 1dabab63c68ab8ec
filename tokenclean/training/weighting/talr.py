"""TALR: a token-adaptive learning rate (arXiv 2509.20758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenclean.training.weights import Scope, Tokens, Weighting


@dataclass(frozen=True)
class Talr(Weighting):
    """w proportional to p^(1 / tau) = exp(-nll / tau), tau the median token loss of the batch.

    Scaled to mean 1 over the batch (our choice: the paper's normaliser is not known to us), so both
    values of ``mean_over`` mean the same. The median of an even number of losses is the mean of the
    two in the middle.
    """

    scope: ClassVar[Scope] = "batch"

    def weights(self, tokens: Tokens) -> Tensor:
        ordered, n = tokens.nll.sort().values, len(tokens)
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        # Where half of the losses are 0 the limit: those tokens share all the weight.
        weights = (-tokens.nll / median.clamp_min(torch.finfo(median.dtype).tiny)).exp()
        return weights / weights.mean()
