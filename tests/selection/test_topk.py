"""Exact top-k against a stable sort, on scores made of ties and odd numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from tokenclean.selection.topk import kth_largest, ordered_keys, top_k_masks

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
    def blocks() -> Iterator[np.ndarray]:
        yield from np.split(keys, cuts)

    return [bool(v) for mask in top_k_masks(blocks, k) for v in mask]


def test_keys_order_as_the_numbers_do() -> None:
    keys = ordered_keys(np.array(ODD))
    for a, key_a in zip(ODD, keys.tolist(), strict=True):
        for b, key_b in zip(ODD, keys.tolist(), strict=True):
            assert (a < b) == (key_a < key_b), (a, b)
            assert (a == b) == (key_a == key_b), (a, b)


def test_float32_scores_are_ordered_as_float64() -> None:
    scores = np.array([0.25, -3.0, 0.5], dtype=np.float32)
    assert ordered_keys(scores).argsort().tolist() == [1, 0, 2]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ordered_keys(np.array([0.0, np.nan]))


@pytest.mark.parametrize("seed", range(60))
def test_masks_equal_a_stable_sort_however_blocks_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randrange(1, 60)
    # Few distinct values: almost every cut falls inside a group of ties.
    values = rng.sample(ODD, rng.randrange(1, len(ODD)))
    scores = [rng.choice(values) for _ in range(n)]
    keys = ordered_keys(np.array(scores))
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        cuts = sorted(rng.randrange(n + 1) for _ in range(rng.randrange(5)))
        assert masks_of(keys, k, cuts) == brute_force(scores, k), (scores, k, cuts)


def test_masks_equal_a_stable_sort_on_many_distinct_numbers() -> None:
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
    assert [kth_largest(blocks, k) for k in range(1, 6)] == expected
