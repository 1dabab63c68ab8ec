"""Kept shares with intervals that know that the tokens of a sample are not independent.

A share is a ratio over samples, p = sum_i y_i / sum_i x_i, with x_i tokens of sample i in a group
and y_i kept ones. Its variance is that of the ratio estimator, linearised, over the n samples that
have a token there (Cochran, Sampling Techniques, 6.3):

    var(p) = n / (n - 1) * sum_i (y_i - p x_i)^2 / (sum_i x_i)^2

Five sums per group are enough for it, so a pool of any size is tallied in constant memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

#: Of the normal distribution, two-sided 95 %.
Z: Final = 1.959963984540054
INTERVAL: Final = (
    "Intervals are 95 % intervals of the ratio estimator with its variance over samples, not over "
    "tokens, since the tokens of a sample are not independent. There is none where all tokens or "
    "none are kept, or where fewer than two samples have such tokens."
)


@dataclass(frozen=True)
class Share:
    """A kept share.

    Attributes:
        samples: that have a token in the group.
        tokens, kept: counts.
        error: standard error of the share; NaN where there is none, see `INTERVAL`.
    """

    samples: int
    tokens: int
    kept: int
    error: float = math.nan

    @property
    def value(self) -> float:
        """NaN where there is no token."""
        return self.kept / self.tokens if self.tokens else math.nan

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval, at least 0; NaN where there is none."""
        return max(self.value - Z * self.error, 0.0) if self.error >= 0 else math.nan

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval, at most 1; NaN where there is none."""
        return min(self.value + Z * self.error, 1.0) if self.error >= 0 else math.nan

    def cells(self) -> list[float | int | None]:
        """tokens, kept, share, low, high: for a table, None for NaN."""
        values = (self.value, self.low, self.high)
        return [self.tokens, self.kept, *(None if math.isnan(v) else v for v in values)]


#: Headings of `Share.cells`.
COLUMNS: Final = ["tokens", "kept", "kept share", "low", "high"]


class Shares:
    """Tokens and kept tokens per group, added up sample by sample.

    Args:
        groups: how many groups; more are made as they come.
    """

    def __init__(self, groups: int = 0):
        #: samples, x, y, x^2, x y, y^2: exact integers, shape (6, groups)
        self._sums = np.zeros((6, groups), dtype=np.int64)

    def __len__(self) -> int:
        return self._sums.shape[1]

    def add(self, rows: np.ndarray, groups: np.ndarray, kept: np.ndarray) -> None:
        """Count the tokens of whole samples.

        Args:
            rows: sample of each token, from 0; all of a sample's tokens come in one call. int64,
                shape (m,).
            groups: of each token, int64, shape (m,).
            kept: bool, shape (m,).
        """
        if not len(rows):
            return
        # only the groups that occur, so that many groups cost no more than many rows
        found, groups = np.unique(groups, return_inverse=True)
        self.grow(int(found[-1]) + 1)
        size, samples = len(found), int(rows.max()) + 1
        keys = rows * size + groups
        shape = (samples, size)
        x = np.bincount(keys, minlength=samples * size).reshape(shape)
        y = np.bincount(keys[kept], minlength=samples * size).reshape(shape)
        self._sums[:, found] += [v.sum(axis=0) for v in (x > 0, x, y, x * x, x * y, y * y)]

    def grow(self, groups: int) -> None:
        """Make room for at least so many groups."""
        if groups > len(self):
            more = np.zeros((6, groups - len(self)), dtype=np.int64)
            self._sums = np.concatenate([self._sums, more], axis=1)

    def share(self, group: int) -> Share:
        """Of one group."""
        return _share(self._sums[:, group])

    def whole(self) -> Share:
        """Of all groups together; no sample may have tokens in several."""
        return _share(self._sums.sum(axis=1))


def _share(sums: np.ndarray) -> Share:
    n, x, y, xx, xy, yy = (int(v) for v in sums)
    error = math.nan
    if n > 1 and 0 < y < x:
        # sum of (y_i - p x_i)^2, in integers until the last division: the terms cancel
        squares = (yy * x * x - 2 * y * x * xy + y * y * xx) / (x * x)
        error = math.sqrt(squares * n / (n - 1)) / x
    return Share(n, x, y, error)


def wilson(kept: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % bounds of shares, as if tokens were independent: float64, (n,) each, in [0, 1].

    Args:
        kept, tokens: counts, shape (n,); tokens at least 1.
    """
    share, size = kept / tokens, tokens.astype(np.float64)
    middle = (share + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * np.sqrt(share * (1 - share) / size + Z**2 / (4 * size**2))
    # exact where none or all are kept: there a bound is 0 or 1, and rounding would miss it
    low = np.where(kept == 0, 0.0, np.clip(middle - half, 0.0, share))
    high = np.where(kept == tokens, 1.0, np.clip(middle + half, share, 1.0))
    return low, high
