"""Exact top-k over scores that arrive in blocks, in constant memory.

Scores become unsigned integers in the same order. A histogram of their leading 16 bits says in
which of 65,536 bins the k-th largest lies; the bin's members are then told apart by sorting, or,
where they are too many, by a histogram of their next 16 bits. Histograms add up over blocks, shards
and processes, so the result does not depend on how the scores are cut into any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from tokenclean.selection.exchange import Exchange

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_TOP_SHIFT = 64 - _DIGIT_BITS
#: A bin with at most so many keys is collected (2 MB) instead of counted once more.
_FEW = 1 << 18
_SIGN = np.int64(-(1 << 63))

#: Above the key of every score: for what is kept whatever the others are.
FIRST = (1 << 64) - 1

Blocks = Callable[[], Iterable[np.ndarray]]


def ordered_keys(score: np.ndarray) -> np.ndarray:
    """uint64 keys whose order is the order of the float64 scores; -0.0 equals +0.0.

    Raises:
        ValueError: for NaN, which has no place in an order.
    """
    if np.isnan(score).any():
        raise ValueError("scores contain NaN: the pass that produced them must be repeated")
    # Adding +0.0 turns -0.0 into +0.0 and leaves every other number alone.
    bits = np.add(score, 0.0, dtype=np.float64).view(np.int64)
    # Negative numbers have every bit flipped, the others their sign bit alone.
    flips = bits >> 63
    flips |= _SIGN
    bits ^= flips
    return bits.view(np.uint64)


def score_of(key: int) -> float:
    """The score whose key this is: the inverse of `ordered_keys`."""
    bits = key ^ (1 << 63) if key >> 63 else key ^ FIRST
    return float(np.array(bits, dtype=np.uint64).view(np.float64))


class Histogram:
    """How many keys lie in each bin of their leading 16 bits.

    Attributes:
        counts: int64, shape (65536,).
    """

    def __init__(self, counts: np.ndarray | None = None):
        self.counts = np.zeros(_DIGITS, dtype=np.int64) if counts is None else counts

    def add(self, keys: np.ndarray, shift: int = _TOP_SHIFT) -> None:
        """Count keys, uint64; by the 16 bits above another ``shift`` than the leading ones'."""
        digits = (keys >> np.uint64(shift)).view(np.int64)
        if shift < _TOP_SHIFT:
            digits &= _DIGITS - 1
        self.counts += np.bincount(digits, minlength=_DIGITS)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)

    def summed(self, exchange: Exchange) -> Histogram:
        """Of the keys of all processes."""
        return Histogram(exchange.sum(self.counts))

    def size_of(self, digit: int) -> int:
        """Keys in one bin."""
        return int(self.counts[digit])

    def total(self) -> int:
        return int(self.counts.sum())

    def firsts(self) -> int:
        """Keys that are `FIRST`: only NaN's would share their bin, and they are refused."""
        return int(self.counts[-1])

    def find(self, k: int) -> tuple[int, int, int]:
        """Bin of the k-th largest key, number of keys in bins above it, number of keys in it."""
        from_top = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(from_top, k))
        size = int(self.counts[_DIGITS - 1 - place])
        return _DIGITS - 1 - place, int(from_top[place]) - size, size


class Cut(NamedTuple):
    """Where the k largest keys end.

    Attributes:
        key: the k-th largest key.
        above: number of keys above it.
        earlier: number of keys equal to it in the processes before this one.
    """

    key: int
    above: int
    earlier: int


def kth_largest(
    blocks: Blocks,
    k: int,
    histogram: Histogram | None = None,
    exchange: Exchange | None = None,
) -> Cut:
    """The k-th largest key of all processes; `FIRST`, with none above it, for k = 0.

    Args:
        blocks: called once per pass; yields uint64 arrays of keys, of this process's part.
        k: rank, counted from 1, at most the number of keys.
        histogram: of all keys of all processes, where it is known: saves the first pass.
        exchange: with the processes that hold the other keys.

    Raises:
        ValueError: if the histogram is not that of the keys.
    """
    if k <= 0:
        return Cut(FIRST, 0, 0)
    exchange = exchange or Exchange()
    if histogram is None:
        own = Histogram()
        for keys in blocks():
            own.add(keys)
        histogram = own.summed(exchange)
    prefix, above, size = histogram.find(k)
    equal = 0
    for shift in range(_TOP_SHIFT, 0, -_DIGIT_BITS):
        members = (keys[(keys >> np.uint64(shift)) == np.uint64(prefix)] for keys in blocks())
        if size <= _FEW:
            ours = np.concatenate([np.zeros(0, dtype=np.uint64), *members])
            few = np.sort(exchange.gather(ours))
            _check(len(few) == size)
            key = few[size - (k - above)]
            equal = int(np.count_nonzero(ours == key))
            above += size - int(np.searchsorted(few, key, side="right"))
            return Cut(int(key), above, exchange.before(equal))
        own = Histogram()
        for keys in members:
            own.add(keys, shift - _DIGIT_BITS)
        histogram = own.summed(exchange)
        _check(histogram.total() == size)
        digit, higher, size = histogram.find(k - above)
        prefix, above, equal = (prefix << _DIGIT_BITS) | digit, above + higher, own.size_of(digit)
    return Cut(prefix, above, exchange.before(equal))


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError("the histogram is not that of these scores; make it again")


def top_mask(keys: np.ndarray, cut: int, ties: int) -> tuple[np.ndarray, int]:
    """Which keys of a block are among the k largest; of equal keys, the earlier ones are.

    Args:
        keys: uint64, shape (n,).
        cut: the k-th largest key of all blocks.
        ties: how many keys equal to it are still wanted: k less the number above it, less what
            earlier blocks took; none if that is negative.

    Returns:
        bool mask, shape (n,), and the ties that are left for later blocks.
    """
    keep = keys > np.uint64(cut)
    equal = np.flatnonzero(keys == np.uint64(cut))[: max(ties, 0)]
    keep[equal] = True
    return keep, ties - len(equal)
