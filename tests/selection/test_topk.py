"""Exact top-k against a stable sort, on scores made of ties and odd numbers."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from tokenclean.selection import topk
from tokenclean.selection.topk import (
    FIRST,
    Histogram,
    kth_largest,
    ordered_keys,
    score_of,
    top_mask,
)

#: Signed zeros, infinities, subnormals, neighbours in float64, and numbers that share 16-, 32- and
#: 48-bit prefixes.
ODD = [
    -np.inf,
    -1.5,
    -1.0,
    float(np.nextafter(-1.0, -2.0)),
    -5e-324,
    -0.0,
    0.0,
    5e-324,
    1.0,
    float(np.nextafter(1.0, 2.0)),
    1.0 + 2.0**-30,
    1.0 + 2.0**-10,
    1e300,
    np.inf,
]


def brute_force(scores: list[float], k: int) -> list[bool]:
    """Sort by score, of equal scores the earlier first, and keep k. Python floats only."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = set(order[:k])
    return [i in chosen for i in range(len(scores))]


def masks_of(keys: np.ndarray, k: int, cuts: list[int]) -> list[bool]:
    cut, above, _ = kth_largest(lambda: np.split(keys, cuts), k)
    masks, ties = [], k - above
    for block in np.split(keys, cuts):
        mask, ties = top_mask(block, cut, ties)
        masks += mask.tolist()
    return masks


def test_keys_order_as_the_numbers_do() -> None:
    keys = ordered_keys(np.array(ODD))
    for a, key_a in zip(ODD, keys.tolist(), strict=True):
        for b, key_b in zip(ODD, keys.tolist(), strict=True):
            assert (a < b) == (key_a < key_b), (a, b)
            assert (a == b) == (key_a == key_b), (a, b)


def test_scores_come_back_from_their_keys() -> None:
    for score in [*ODD, -1e300, 3.0e-310]:
        back = score_of(int(ordered_keys(np.array([score]))[0]))
        # Bit for bit, but for the sign of zero.
        assert struct.pack(">d", back) == struct.pack(">d", score + 0.0)


def test_float32_scores_are_ordered_as_float64() -> None:
    scores = np.array([0.25, -3.0, 0.5], dtype=np.float32)
    assert ordered_keys(scores).argsort().tolist() == [1, 0, 2]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ordered_keys(np.array([0.0, np.nan]))


@pytest.mark.parametrize("few", [0, 1, 5, 1 << 18])
@pytest.mark.parametrize("seed", range(60))
def test_masks_equal_a_stable_sort_however_blocks_are_cut(
    seed: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_FEW", few)  # when the last bin is sorted, not counted again
    rng = random.Random(seed)
    n = rng.randrange(1, 60)
    # Few distinct values: almost every cut falls inside a group of ties.
    values = rng.sample(ODD, rng.randrange(1, len(ODD)))
    scores = [rng.choice(values) for _ in range(n)]
    keys = ordered_keys(np.array(scores))
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        cuts = sorted(rng.randrange(n + 1) for _ in range(rng.randrange(5)))
        assert masks_of(keys, k, cuts) == brute_force(scores, k), (scores, k, cuts)


@pytest.mark.parametrize("few", [0, 20, 1 << 18])
def test_masks_equal_a_stable_sort_on_many_distinct_numbers(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_FEW", few)
    generator = np.random.default_rng(5)
    scores = generator.normal(size=3000) * 10.0 ** generator.integers(-12, 12, size=3000)
    keys = ordered_keys(scores)
    for k in (1, 299, 1800, 2999):
        assert masks_of(keys, k, [7, 7, 1500]) == brute_force(scores.tolist(), k)


def test_kth_largest_by_hand() -> None:
    keys = np.array([5, 9, 5, 1, 2**63 + 3], dtype=np.uint64)

    def blocks() -> list[np.ndarray]:
        return [keys[:2], keys[2:2], keys[2:]]

    # Descending: 2**63 + 3, 9, 5, 5, 1; (value, how many lie above it).
    expected = [(2**63 + 3, 0), (9, 1), (5, 2), (5, 2), (1, 4)]
    assert [kth_largest(blocks, k)[:2] for k in range(1, 6)] == expected


def test_nothing_is_kept_of_nothing_asked() -> None:
    keys = np.array([FIRST, 1, 0], dtype=np.uint64)
    cut, above, _ = kth_largest(lambda: [keys], 0)
    assert top_mask(keys, cut, 0 - above)[0].tolist() == [False, False, False]


def test_a_histogram_counts_leading_bits_and_adds_up() -> None:
    # 1.0 = 0x3FF0..., 1.5 = 0x3FF8..., -2.0 = 0xC000...; the keys flip the sign bit of the
    # positive numbers and every bit of the negative one.
    shards = [np.array([1.0, 1.5]), np.array([-2.0, 1.0 + 2.0**-40])]
    parts = []
    for shard in shards:
        parts.append(Histogram())
        parts[-1].add(ordered_keys(shard))
    whole = parts[0] + parts[1]
    assert {int(i): int(whole.counts[i]) for i in np.flatnonzero(whole.counts)} == {
        0xBFF0: 2,
        0xBFF8: 1,
        0x3FFF: 1,
    }
    assert (whole.total(), whole.firsts()) == (4, 0)
    assert parts[0].total() == parts[1].total() == 2


@pytest.mark.parametrize("few", [0, 1 << 18])
def test_a_known_histogram_saves_a_pass_and_changes_nothing(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_FEW", few)
    scores = np.random.default_rng(2).normal(size=999).round(2)
    parts = np.split(ordered_keys(scores), [100, 100, 640])
    passes = [0]

    def blocks() -> list[np.ndarray]:
        passes[0] += 1
        return parts

    histogram = Histogram()
    for part in parts[::-1]:
        histogram.add(part)
    for k in (1, 400, 999):
        passes[0] = 0
        want = kth_largest(blocks, k)
        # One per 16 bits; or one, and another to collect the bin that holds the k-th.
        without, passes[0] = passes[0], 0
        assert without == (4 if few == 0 else 2)
        assert kth_largest(blocks, k, histogram) == want
        assert passes[0] == without - 1


@pytest.mark.parametrize("few", [0, 1 << 18])
def test_a_histogram_of_other_scores_is_refused(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_FEW", few)
    keys, other = ordered_keys(np.array([1.0, 2.0, 3.0])), Histogram()
    other.add(ordered_keys(np.array([1.0, 2.0, 300.0])))
    with pytest.raises(ValueError, match="not that of these scores"):
        kth_largest(lambda: [keys], 1, other)
