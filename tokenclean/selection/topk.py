"""Exact top-k over scores that arrive in blocks, in constant memory.

Scores become unsigned integers in the same order; four passes of 16 bits each build one histogram
of 65,536 counters and walk down to the k-th largest key. Histograms add up over blocks, so the
result does not depend on how the scores are cut into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_SIGN = np.uint64(1 << 63)

Blocks = Callable[[], Iterable[np.ndarray]]


def ordered_keys(score: np.ndarray) -> np.ndarray:
    """uint64 keys whose order is the order of the float64 scores; -0.0 equals +0.0.

    Raises:
        ValueError: for NaN, which has no place in an order.
    """
    if np.isnan(score).any():
        raise ValueError("scores contain NaN: the pass that produced them must be repeated")
    # Adding +0.0 turns -0.0 into +0.0 and leaves every other number alone.
    bits = (score.astype(np.float64) + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def kth_largest(blocks: Blocks, k: int) -> tuple[int, int]:
    """The k-th largest key (1 <= k <= total) and the number of keys above it.

    Args:
        blocks: called once per pass; yields uint64 arrays of keys.
        k: rank, counted from 1.
    """
    prefix, above = 0, 0
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = np.zeros(_DIGITS, dtype=np.int64)
        for keys in blocks():
            if shift < 64 - _DIGIT_BITS:
                keys = keys[(keys >> np.uint64(shift + _DIGIT_BITS)) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)) & np.uint64(_DIGITS - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=_DIGITS)
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, k - above))
        above += int(from_top[place]) - int(histogram[_DIGITS - 1 - place])
        prefix = (prefix << _DIGIT_BITS) | (_DIGITS - 1 - place)
    return prefix, above


def top_k_masks(blocks: Blocks, k: int) -> Iterator[np.ndarray]:
    """Keep mask of each block: the k largest keys, of equal keys the earlier ones."""
    if k <= 0:
        yield from (np.zeros(len(keys), dtype=bool) for keys in blocks())
        return
    cut, above = kth_largest(blocks, k)
    ties_left = k - above
    for keys in blocks():
        keep = keys > np.uint64(cut)
        ties = np.flatnonzero(keys == np.uint64(cut))[:ties_left]
        keep[ties] = True
        ties_left -= len(ties)
        yield keep
