"""A uniformly random share of the tokens: the control for every ranking rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenclean.selection.rule import Rule, TokenBlock


@dataclass
class Random(Rule):
    """Rank at random: one draw per token in pool order, or per sample where samples are ranked."""

    _generator: np.random.Generator = field(init=False, repr=False)
    _whole_samples: bool = field(init=False, repr=False)

    def restart(self, seed: int, whole_samples: bool) -> None:
        self._generator = np.random.default_rng(seed)
        self._whole_samples = whole_samples

    def priority(self, block: TokenBlock) -> np.ndarray:
        if self._whole_samples:
            # a mean over draws of its tokens would favour short samples
            return np.repeat(self._generator.random(len(block.rows)), block.counts)
        return self._generator.random(block.size)
