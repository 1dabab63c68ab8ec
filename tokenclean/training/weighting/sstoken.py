"""ssToken: the model's own progress and its attention to the prompt (arXiv 2510.18250)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenclean.models import default_layer
from tokenclean.training.weights import (
    MeanOver,
    Scope,
    Tokens,
    Weighting,
    check_share,
    top_share,
)


@dataclass(frozen=True)
class Sstoken(Weighting):
    """w = 1 for each sample's tokens with the largest progress x minmax(nll_base - nll) + (1 -
    progress) x attention to the prompt, else 0.

    Attention is what one deep layer, averaged over its heads, gives the sample's tokens that are no
    response tokens, from the token's own row; the first token, on which attention rests for want of
    anything else, counts among them. Minmax runs over the sample's trained tokens. The mean over
    the tokens that are left (``mean_over: weights``). Equal values: the earlier token goes first.
    Packed batches only.

    Args:
        keep: share of each sample's trained tokens, int(n * keep) of them.
        progress: weight of the first term, in [0, 1].
        layer: whose attention; negative ones count from the end; null: three quarters up.
        noise: nats; where nll_base - nll spans no more than that in a sample, minmax is 0. Before
            the first step the two are the same model, and what they differ by is rounding. null:
            1e-3 in float32, 0.2 where 16-bit numbers are multiplied.
    """

    keep: float = 0.6
    progress: float = 0.5
    layer: int | None = None
    noise: float | None = None
    mean_over: MeanOver = "weights"

    scope: ClassVar[Scope] = "sample"
    needs: ClassVar[tuple[str, ...]] = ("base.nll",)
    reads_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self.keep)
        if not 0.0 <= self.progress <= 1.0:
            raise ValueError(
                f"model.weighting_options: progress = {self.progress} is not in [0, 1]"
            )
        if self.noise is not None and not self.noise >= 0.0:
            raise ValueError(f"model.weighting_options: noise = {self.noise} is negative")

    def attention_layer(self, config: Any) -> int:
        return default_layer(config) if self.layer is None else self.layer

    def weights(self, tokens: Tokens) -> Tensor:
        parts = []
        noise = tokens.rounding if self.noise is None else self.noise
        for sample in tokens.samples():
            gain = (tokens["base.nll"] - tokens.nll)[sample]
            low, span = gain.min(), gain.max() - gain.min()
            minmax = torch.zeros_like(gain) if span <= noise else (gain - low) / span
            attention = tokens["prompt_attention"][sample]
            value = self.progress * minmax + (1.0 - self.progress) * attention
            parts.append(top_share(value, self.keep))
        return torch.cat(parts)
