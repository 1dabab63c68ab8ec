"""Beyond Log Likelihood: between log likelihood and probability (arXiv 2510.00526)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenclean.training.weights import Tokens, Weighting, check_positive


@dataclass(frozen=True)
class BeyondLl(Weighting):
    """w = p^alpha: its gradient is that of (1 - p^alpha) / alpha.

    Divided by the number of tokens.

    Args:
        alpha: towards 0 the plain loss, 1 is the weighting `dft`. The paper finds large ones (it
            names 1 and 10) best for a model that already knows the task, the plain loss for one
            that does not.
    """

    alpha: float = 10.0

    def __post_init__(self) -> None:
        check_positive(alpha=self.alpha)

    def weights(self, tokens: Tokens) -> Tensor:
        return (-self.alpha * tokens.nll).exp()
