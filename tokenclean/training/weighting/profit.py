"""ProFit: learn only what the model does not find unlikely (arXiv 2601.09195)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenclean.training.weights import Tokens, Weighting


@dataclass(frozen=True)
class Profit(Weighting):
    """w = 1 where p > ``threshold``, else 0.

    Divided by the number of tokens, masked ones included, as the released code does; ``mean_over:
    weights`` is the mean over the tokens that are left.

    Args:
        threshold: probability; the paper's 0.1 is a loss of 2.3 nats.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(
                f"model.weighting_options: threshold = {self.threshold} is not in [0, 1)"
            )

    def weights(self, tokens: Tokens) -> Tensor:
        return (tokens.probability > self.threshold).to(tokens.nll.dtype)
