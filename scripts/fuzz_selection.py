"""Pools of few tokens and many ties through `select`, against an oracle that sorts tuples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from scripts.fuzz_cases import Stream
from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.select import Scope, SelectionConfig, select
from tokenclean.selection.topk import Histogram, kth_largest, ordered_keys, score_of, top_mask

#: Few values, so that most are tied; all are sums of powers of two, so that means are exact.
VALUES = (0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 2.5, 2.5000002384185791, 1e-45, -1e-45, 1e38, -1e38)
INFINITE = (*VALUES, float("inf"), float("-inf"), float("nan"))
KEEPS = (0.001, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.999, 1.0)


@dataclass(frozen=True)
class Case:
    """Rows of (score, ends a sequence) tokens, and how they are asked for."""

    rows: tuple[tuple[tuple[float, bool], ...], ...]
    seen: tuple[bool, ...]
    scope: Scope
    keep: float
    eos: bool
    exclude: bool
    cuts: tuple[int, ...]


def _cases(scope: Scope) -> st.SearchStrategy[Case]:
    whole = scope == "whole_sample"
    values = st.sampled_from(VALUES[:7] if whole else INFINITE)
    token = st.tuples(values, st.booleans())
    rows = st.lists(st.lists(token, max_size=5).map(tuple), max_size=6).map(tuple)
    flags = st.lists(st.booleans(), min_size=6, max_size=6).map(tuple)
    cuts = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    eos = st.just(False) if whole else st.booleans()
    share = st.sampled_from(KEEPS)
    return st.builds(Case, rows, flags, st.just(scope), share, eos, st.booleans(), cuts)


cases = st.one_of(_cases("global"), _cases("sample"), _cases("whole_sample"))


def _blocks(case: Case, cuts: tuple[int, ...]) -> Callable[[], Iterator[TokenBlock]]:
    edges = sorted({0, len(case.rows), *(c for c in cuts if c < len(case.rows))})

    def made() -> Iterator[TokenBlock]:
        for low, high in pairwise(edges):
            rows = case.rows[low:high]
            tokens = [token for row in rows for token in row]
            score = np.array([value for value, _ in tokens], dtype=np.float32)
            yield TokenBlock(
                rows=np.arange(low, high),
                counts=np.array([len(row) for row in rows], dtype=np.int64),
                seen=np.array(case.seen[low:high], dtype=bool),
                columns={"base.nll": score, "reference.nll": np.zeros_like(score)},
                is_eos=np.array([eos for _, eos in tokens], dtype=bool),
            )

    return made


def _oracle(case: Case) -> list[bool]:
    """Which tokens are kept, by sorting (goes first, score, row, place)."""
    ranked = [
        [(not (case.eos and end), -float(np.float32(value)), r, j) for j, (value, end) in row]
        for r, row in enumerate(list(enumerate(row)) for row in case.rows)
    ]
    taking = [not (case.exclude and case.seen[r]) for r in range(len(case.rows))]
    groups = [row for row, takes in zip(ranked, taking, strict=True) if takes]
    kept: set[tuple[int, int]] = set()
    if case.scope == "whole_sample":
        room = int(sum(map(len, groups)) * case.keep)
        means = sorted((sum(t[1] for t in row) / len(row), row[0][2]) for row in groups if row)
        for _, number in means:
            room -= len(case.rows[number])
            if room < 0:
                break
            kept |= {(number, j) for j in range(len(case.rows[number]))}
    else:
        if case.scope == "global":
            groups = [[token for row in groups for token in row]]
        for group in groups:
            first = sum(not token[0] for token in group)
            size = max(int(len(group) * case.keep), first)
            # of equal scores, the earlier; -0.0 is 0.0
            best = sorted(group, key=lambda t: (t[0], t[1] if t[0] else 0.0, t[2], t[3]))
            kept |= {(r, j) for _, _, r, j in best[:size]}
    return [(r, j) in kept for r, row in enumerate(case.rows) for j in range(len(row))]


def check(case: Case, tally: Counter[str]) -> None:
    config = SelectionConfig(
        scope=case.scope, keep=case.keep, always_keep_eos=case.eos, exclude_seen=case.exclude
    )
    broken = any(value != value for row in case.rows for value, _ in row)
    masks = []
    for cuts in ((), case.cuts):
        try:
            found = select(_blocks(case, cuts), config)
        except ValueError as error:
            assert broken and "NaN" in str(error), error
            tally["rejected"] += 1
            return
        assert found.kept == found.keep.sum()
        masks.append(found.keep.tolist())
    assert not broken, "NaN was ranked"
    assert masks[0] == masks[1], "the cut into blocks matters"
    assert masks[0] == _oracle(case)
    tally["accepted"] += 1


Parts = list[list[float]]
numbers = st.one_of(
    st.floats(allow_nan=False), st.sampled_from(VALUES), st.sampled_from([0.0, -0.0])
)
_ranks = st.tuples(st.lists(st.lists(numbers, max_size=8), max_size=4), st.floats(0, 1))


def check_ranks(case: tuple[Parts, float], tally: Counter[str]) -> None:
    """The k-th largest of any float64 numbers, in blocks, with and without a histogram."""
    parts = [np.array(part, dtype=np.float64) for part in case[0]]
    everything = [value for part in case[0] for value in part]
    k = int(case[1] * len(everything))
    keys = [ordered_keys(part) for part in parts]
    histogram = Histogram()
    for block in keys:
        histogram.add(block)
    found = kth_largest(lambda: iter(keys), k)
    assert found == kth_largest(lambda: iter(keys), k, histogram)
    cut, above = found.key, found.above
    chosen, ties = [], k - above
    for block in keys:
        mask, ties = top_mask(block, cut, ties)
        chosen += mask.tolist()
    order = sorted(range(len(everything)), key=lambda i: (-everything[i], i))[:k]
    assert chosen == [i in set(order) for i in range(len(everything))]
    if k:
        assert score_of(cut) == sorted(everything, reverse=True)[k - 1]
    tally["accepted"] += 1


STREAMS = {"selection": Stream(cases, check, 16), "ranks": Stream(_ranks, check_ranks, 8)}
