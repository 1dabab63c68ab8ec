"""Percentiles of a stream of numbers in constant memory."""

from __future__ import annotations

import numpy as np


class Sketch:
    """How many values lie below a value, exact but for values that agree to 1 in 2,000.

    Counts over the leading 20 bits of float32: its sign, its exponent, 11 bits of its mantissa.
    """

    _SHIFT = 12

    def __init__(self) -> None:
        self.counts = np.zeros(1 << (32 - self._SHIFT), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values, shape (n,); NaN is left out."""
        keys, counts = np.unique(self._keys(values[~np.isnan(values)]), return_counts=True)
        self.counts[keys] += counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def shares_below(self, values: np.ndarray) -> np.ndarray:
        """Share of what was counted that is below each value, half of its equals included.

        Returns:
            float64, like ``values``; NaN where the value is, or where nothing was counted.
        """
        counts = self.counts.cumsum()
        keys = self._keys(np.nan_to_num(values))
        if not counts[-1]:
            return np.full(len(values), np.nan)
        shares = (counts[keys] - self.counts[keys] / 2) / counts[-1]
        return np.where(np.isnan(values), np.nan, shares)

    def _keys(self, values: np.ndarray) -> np.ndarray:
        # 0.0 is added to make -0.0 and 0.0 one; negative floats sort the other way round
        bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)
        keys: np.ndarray = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
        return keys >> self._SHIFT
