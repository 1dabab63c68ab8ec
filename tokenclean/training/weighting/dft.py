"""DFT: weigh a token by its probability (arXiv 2508.05629)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenclean.training.weights import Tokens, Weighting


@dataclass(frozen=True)
class Dft(Weighting):
    """w = p: its gradient is that of -p, so what the model finds unlikely hardly moves it.

    Divided by the number of tokens, as in the released code.
    """

    def weights(self, tokens: Tokens) -> Tensor:
        return tokens.probability
