"""A uniformly random share of the tokens: the control for every ranking rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    def skip(self, rows: int, tokens: int) -> None:
        # one number of the bit generator per draw
        drawn: Any = self._generator.bit_generator
        drawn.advance(rows if self._whole_samples else tokens)

    def priority(self, block: TokenBlock) -> np.ndarray:
        if self._whole_samples:
            # a mean over draws of its tokens would favour short samples
            return np.repeat(self._generator.random(len(block.rows)), block.counts)
        return self._generator.random(block.size)
