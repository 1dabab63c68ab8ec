"""Rules, scopes and options against a brute-force selection written without NumPy."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tokenclean.selection import topk
from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.select import SelectionConfig, select
from tokenclean.selection.topk import Histogram, ordered_keys

KEEPS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
VALUES = [-np.inf, -2.5, -1e-300, -0.0, 0.0, 0.0, 0.5, 0.5, 3.0, np.inf]


@dataclass
class Row:
    """One pool row in plain Python."""

    score: list[float]
    eos: list[bool]
    truth: list[int]
    seen: bool


def random_rows(seed: int, rows: int = 12, longest: int = 9) -> list[Row]:
    """Tie-heavy rows; some have one token, and every row ends in EOS, some hold two."""
    rng = random.Random(seed)
    result = []
    for _ in range(rows):
        n = rng.randrange(1, longest)
        eos = [i == n - 1 or rng.random() < 0.1 for i in range(n)]
        scores = [rng.choice(VALUES) for _ in range(n)]
        truth = [rng.choice([-1, 0, 1]) for _ in range(n)]
        result.append(Row(scores, eos, truth, rng.random() < 0.3))
    return result


def as_losses(score: np.ndarray) -> dict[str, np.ndarray]:
    """Losses whose difference is the score, infinities and signs of zero included."""
    return {"base.nll": score, "reference.nll": np.zeros_like(score)}


def blocks_of(rows: list[Row], cuts: list[int]) -> Callable[[], Iterable[TokenBlock]]:
    """The rows as blocks, cut before the given rows."""

    def blocks() -> Iterable[TokenBlock]:
        edges = [0, *cuts, len(rows)]
        for start, stop in pairwise(edges):
            part = rows[start:stop]
            yield TokenBlock(
                rows=np.arange(start, stop),
                counts=np.array([len(r.score) for r in part], dtype=np.int64),
                seen=np.array([r.seen for r in part], dtype=bool),
                columns={
                    **as_losses(np.array([s for r in part for s in r.score], dtype=np.float64)),
                    "pool.truth": np.array([t for r in part for t in r.truth], dtype=np.int8),
                },
                is_eos=np.array([e for r in part for e in r.eos], dtype=bool),
            )

    return blocks


def expected(rows: list[Row], config: SelectionConfig) -> list[list[bool]]:
    """What `token_cleaning` must keep: stable sorts over (row, position)."""
    keep = [[False] * len(row.score) for row in rows]
    places = [
        (r, i)
        for r, row in enumerate(rows)
        if not (config.exclude_seen and row.seen)
        for i in range(len(row.score))
    ]
    if config.scope == "global":
        scopes = [places]
    else:
        scopes = [[p for p in places if p[0] == r] for r in range(len(rows))]
    for scope in scopes:
        budget = int(len(scope) * config.keep)
        forced: list[tuple[int, int]] = []
        if config.always_keep_eos:
            forced = [p for p in scope if rows[p[0]].eos[p[1]]]
        others = [p for p in scope if p not in forced]
        # sorted() is stable and -0.0 == 0.0, so equal scores stay in pool order.
        others = sorted(others, key=lambda p: -rows[p[0]].score[p[1]])
        for r, i in [*forced, *others[: max(budget - len(forced), 0)]]:
            keep[r][i] = True
    return keep


def flat(nested: list[list[bool]]) -> list[bool]:
    return [value for row in nested for value in row]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("scope", ["global", "sample"])
def test_selection_equals_brute_force(scope: Any, keep: float) -> None:
    for seed in range(6):
        rows = random_rows(seed)
        for eos, unseen in ((False, False), (True, False), (False, True), (True, True)):
            config = SelectionConfig("token_cleaning", scope, keep, eos, unseen)
            want = flat(expected(rows, config))
            for cuts in ([], [5], [1, 2, 2, 7, 11]):
                got = select(blocks_of(rows, cuts), config)
                assert got.keep.tolist() == want, (seed, config, cuts)
                assert got.kept == sum(want)


@pytest.mark.parametrize("keep", [*KEEPS, 0.29, 1e-9, 0.999])
def test_the_number_kept_is_exact(keep: float) -> None:
    for n in (1, 3, 7, 10, 29, 100):
        row = Row([0.0] * n, [False] * n, [1] * n, False)
        for scope in ("global", "sample"):
            config = SelectionConfig("token_cleaning", scope, keep)  # type: ignore[arg-type]
            got = select(blocks_of([row], []), config)
            assert got.ranked == n
            assert got.kept == int(n * keep)
            # All tied: the earliest are kept.
            assert got.keep.tolist() == [i < int(n * keep) for i in range(n)]


def test_scopes_differ_by_hand() -> None:
    rows = [
        Row([9.0, 8.0, 7.0, 6.0], [False] * 4, [1] * 4, False),
        Row([1.0, 2.0], [False] * 2, [1] * 2, False),
        Row([5.0], [False], [1], False),
    ]
    whole = select(blocks_of(rows, [1]), SelectionConfig("token_cleaning", "global", 0.5))
    assert whole.keep.tolist() == [True, True, True, False, False, False, False]
    assert (whole.ranked, whole.kept, whole.cut) == (7, 3, 7.0)
    each = select(blocks_of(rows, [1]), SelectionConfig("token_cleaning", "sample", 0.5))
    # int(1 * 0.5) = 0: the one-token row keeps nothing.
    assert each.keep.tolist() == [True, True, False, False, False, True, False]
    assert (each.kept, each.cut) == (3, None)


def test_eos_goes_first_by_hand() -> None:
    row = Row([5.0, 4.0, 3.0, -9.0], [False, False, False, True], [1] * 4, False)
    config = SelectionConfig("token_cleaning", keep=0.5, always_keep_eos=True)
    got = select(blocks_of([row], []), config)
    assert got.keep.tolist() == [True, False, False, True]
    assert got.cut == 5.0  # the EOS was kept by decree, not by its score


def test_more_eos_than_budget_are_all_kept() -> None:
    rows = [Row([1.0, np.inf], [True, False], [1, 1], False) for _ in range(4)]
    config = SelectionConfig("token_cleaning", keep=0.2, always_keep_eos=True)
    got = select(blocks_of(rows, [2]), config)
    assert got.keep.tolist() == [True, False] * 4
    assert got.cut is None


def test_excluded_rows_neither_rank_nor_train() -> None:
    rows = [
        Row([9.0, 9.0], [False] * 2, [1] * 2, True),
        Row([1.0, 2.0, 3.0, 4.0], [False] * 4, [1] * 4, False),
    ]
    kept = {}
    for unseen in (False, True):
        config = SelectionConfig("token_cleaning", keep=0.5, exclude_seen=unseen)
        kept[unseen] = select(blocks_of(rows, []), config)
    assert kept[False].keep.tolist() == [True, True, False, False, False, True]
    assert kept[True].keep.tolist() == [False, False, False, False, True, True]
    assert (kept[True].ranked, kept[True].kept, kept[True].cut) == (4, 2, 3.0)


@pytest.mark.parametrize("unseen", [False, True])
def test_full_and_oracle_ignore_the_budget(unseen: bool) -> None:
    rows = random_rows(3)
    allowed = [[not (unseen and r.seen)] * len(r.score) for r in rows]
    full = select(blocks_of(rows, [4]), SelectionConfig("full", keep=0.1, exclude_seen=unseen))
    assert full.keep.tolist() == flat(allowed)
    oracle = select(blocks_of(rows, [4]), SelectionConfig("oracle", keep=0.1, exclude_seen=unseen))
    informative = [t == 1 for r in rows for t in r.truth]
    assert oracle.keep.tolist() == [
        a and b for a, b in zip(flat(allowed), informative, strict=True)
    ]
    assert oracle.cut is None


@pytest.mark.parametrize("scope", ["global", "sample"])
def test_random_is_seeded_and_blind_to_scores_and_cuts(scope: Any) -> None:
    rows = random_rows(1, rows=40)
    config = SelectionConfig("random", scope, 0.5)
    one = select(blocks_of(rows, []), config, seed=7).keep
    sizes = [len(r.score) for r in rows]
    if scope == "global":
        assert one.sum() == sum(sizes) // 2
    else:
        starts = np.cumsum([0, *sizes[:-1]])
        assert [int(one[a : a + n].sum()) for a, n in zip(starts, sizes, strict=True)] == [
            n // 2 for n in sizes
        ]
    assert (select(blocks_of(rows, [3, 20]), config, seed=7).keep == one).all()
    assert (select(blocks_of(rows, []), config, seed=8).keep != one).any()
    constant = [Row([0.0] * len(r.score), r.eos, r.truth, r.seen) for r in rows]
    assert (select(blocks_of(constant, []), config, seed=7).keep == one).all()
    # Not simply the first tokens.
    assert one.tolist() != sorted(one.tolist(), reverse=True)


def test_random_keeps_every_place_about_equally_often() -> None:
    row = Row([0.0] * 10, [False] * 10, [1] * 10, False)
    config = SelectionConfig("random", keep=0.5)
    times = np.sum([select(blocks_of([row], []), config, seed=s).keep for s in range(400)], axis=0)
    # Binomial(400, 1/2): 10 is one standard deviation.
    assert (abs(times - 200) < 50).all()


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_share_near_the_cut_equals_brute_force(noise: float) -> None:
    for seed in range(8):
        rows = random_rows(seed)
        for row in rows:
            row.score = [random.Random(f"{seed} {s}").uniform(-1, 1) for s in row.score]
        for eos, unseen in ((False, False), (True, False), (False, True), (True, True)):
            config = SelectionConfig("token_cleaning", "global", 0.4, eos, unseen)
            got = select(blocks_of(rows, [3, 8]), config, noise=noise)
            ranked = [
                (score, eos and is_eos)
                for row in rows
                if not (unseen and row.seen)
                for score, is_eos in zip(row.score, row.eos, strict=True)
            ]
            assert got.ranked == len(ranked)
            if got.cut is None:  # so many EOS that nothing is kept by its score
                assert got.near_cut is None
                continue
            # An EOS that goes first is kept wherever its score lies.
            near = [s for s, forced in ranked if not forced and abs(s - got.cut) <= noise]
            assert got.near_cut == len(near) / len(ranked)
            assert select(blocks_of(rows, []), config).near_cut is None


@pytest.mark.parametrize("rule, scope", [("token_cleaning", "sample"), ("random", "global")])
def test_without_a_cut_by_score_nothing_is_near_it(rule: Any, scope: Any) -> None:
    config = SelectionConfig(rule, scope, 0.5)
    assert select(blocks_of(random_rows(0), []), config, noise=9.0).near_cut is None


@pytest.mark.parametrize("rule", ["token_cleaning", "random", "full", "oracle"])
def test_the_mask_goes_where_it_is_wanted(rule: Any) -> None:
    rows = random_rows(4)
    room = np.zeros(sum(len(r.score) for r in rows), dtype=bool)
    config = SelectionConfig(rule, keep=0.5)
    want = select(blocks_of(rows, [2]), config).keep
    got = select(blocks_of(rows, [2]), config, out=room)
    assert got.keep is room and got.keep.tolist() == want.tolist()
    assert got.kept == want.sum() > 0


def test_memory_does_not_grow_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_FEW", 0)  # the same passes for any number of tokens
    size = 5000
    config = SelectionConfig("token_cleaning", keep=0.6)
    peaks = {}
    for number in (2, 60):

        def blocks(number: int = number) -> Iterable[TokenBlock]:
            for i in range(number):
                score = np.random.default_rng(i).normal(size=size)
                one, no = np.ones(1, dtype=np.int64), np.zeros(1, dtype=bool)
                yield TokenBlock(one * i, one * size, no, as_losses(score))

        room = np.zeros(number * size, dtype=bool)
        tracemalloc.start()
        select(blocks, config, noise=0.1, out=room)
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Thirty times the tokens: 2.4 MB of scores, when two histograms and their sums take 1.6 MB.
    assert peaks[60] < 1.05 * peaks[2]


def test_a_known_histogram_changes_nothing_and_is_only_used_where_it_fits() -> None:
    rows = random_rows(2)
    known, wrong = Histogram(), Histogram()
    known.add(ordered_keys(np.array([s for r in rows for s in r.score])))
    wrong.add(ordered_keys(np.array([s - 1e3 for r in rows for s in r.score])))
    for scope in ("global", "sample"):
        for eos, unseen in ((False, False), (True, False), (False, True)):
            config = SelectionConfig("token_cleaning", scope, 0.4, eos, unseen)  # type: ignore[arg-type]
            want = select(blocks_of(rows, [5]), config)
            if scope == "global" and not (eos or unseen):
                got = select(blocks_of(rows, [5]), config, histogram=known)
                with pytest.raises(ValueError, match="not that of these scores"):
                    select(blocks_of(rows, [5]), config, histogram=wrong)
            else:
                got = select(blocks_of(rows, [5]), config, histogram=wrong)
            assert (got.keep == want.keep).all()
            assert (got.ranked, got.kept, got.cut) == (want.ranked, want.kept, want.cut)


def test_a_histogram_of_fewer_tokens_is_refused() -> None:
    rows = [Row([3.0, 2.0, -1.0], [False] * 3, [1] * 3, False)]
    fewer = Histogram()
    fewer.add(ordered_keys(np.array([3.0, 2.0])))
    config = SelectionConfig("token_cleaning", keep=0.5)
    with pytest.raises(ValueError, match="not that of these scores"):
        select(blocks_of(rows, []), config, histogram=fewer)


def test_rows_without_a_response_token_are_passed_over() -> None:
    rows = [Row([], [], [], False), Row([2.0, 1.0], [False] * 2, [1] * 2, False),
            Row([], [], [], False)]  # fmt: skip
    for scope in ("global", "sample"):
        config = SelectionConfig("token_cleaning", scope, 0.5)  # type: ignore[arg-type]
        assert select(blocks_of(rows, []), config).keep.tolist() == [True, False]


def test_nan_stops_the_selection() -> None:
    row = Row([0.0, float("nan"), 1.0], [False] * 3, [1] * 3, False)
    for scope in ("global", "sample"):
        with pytest.raises(ValueError, match="NaN"):
            config = SelectionConfig("token_cleaning", scope, 0.5)  # type: ignore[arg-type]
            select(blocks_of([row], []), config)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0000001, 60.0, float("nan")])
def test_keep_outside_its_range_names_the_option(keep: float) -> None:
    with pytest.raises(ValueError, match=r"^selection\.keep: .*\(0, 1\]"):
        SelectionConfig(keep=keep)


def test_unknown_rule_and_scope_name_the_option() -> None:
    with pytest.raises(ValueError, match=r"^selection\.rule: 'best' is not one of contradiction"):
        SelectionConfig(rule="best")
    with pytest.raises(ValueError, match=r"^selection\.scope: 'row' is not one of global, sample"):
        SelectionConfig(scope="row")  # type: ignore[arg-type]


def test_rules_say_what_they_lack() -> None:
    row = Row([0.0, 1.0], [False] * 2, [1] * 2, False)

    def bare() -> Iterable[TokenBlock]:
        for block in blocks_of([row], [])():
            yield TokenBlock(block.rows, block.counts, block.seen)

    for scope in ("global", "sample"):
        with pytest.raises(ValueError, match="needs a base score table"):
            select(bare, SelectionConfig("token_cleaning", scope))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a pool with planted truth"):
        select(bare, SelectionConfig("oracle"))
    with pytest.raises(ValueError, match="end-of-sequence"):
        select(bare, SelectionConfig("random", always_keep_eos=True))
    assert select(bare, SelectionConfig("random", keep=0.5)).kept == 1
    assert select(bare, SelectionConfig("full")).kept == 2


def test_an_empty_pool_keeps_nothing() -> None:
    for rule in ("token_cleaning", "random", "full", "oracle"):
        got = select(blocks_of([], []), SelectionConfig(rule))  # type: ignore[arg-type]
        assert (got.keep.tolist(), got.ranked, got.kept, got.cut) == ([], 0, 0, None)
