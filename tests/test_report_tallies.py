"""What a report counts: shares and their intervals, kinds of tokens, curves, areas, agreement."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, character_tokenizer, sentencepiece_tokenizer

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.report.curve import Ranking
from tokenclean.report.ratio import Shares, wilson
from tokenclean.report.rounds import agreement
from tokenclean.report.shapes import Bars
from tokenclean.report.steps import Ranked
from tokenclean.report.tallies import BY_LENGTH, BY_POSITION, BY_TURN, Tally, size_bin, size_bins
from tokenclean.report.tokens import TYPES, Vocabulary, fenced_spans, visible
from tokenclean.report.truth import curves, operating


def make_block(rows: list[dict[str, Any]], **columns: np.ndarray) -> CleanedBlock:
    """Rows of ``ids``, ``response`` (0 or 1) and what else differs from the defaults."""
    lengths = np.array([len(row["ids"]) for row in rows])
    ids = np.concatenate([np.array(row["ids"], dtype=np.int32) for row in rows])
    response = np.concatenate([np.array(row["response"], dtype=bool) for row in rows])
    kept = columns.pop("kept", response)
    n = len(ids)
    made: dict[str, Any] = {
        "first": 0,
        "ids": [f"s{i}" for i in range(len(rows))],
        "sources": [row.get("source", "a") for row in rows],
        "rounds": np.array([row.get("round", 1) for row in rows], dtype=np.int32),
        "counts": lengths,
        "input_ids": ids,
        "labels": np.where(kept, ids, -100).astype(np.int32),
        "response": response,
        "base": np.full(n, np.nan, dtype=np.float32),
        "reference": np.full(n, np.nan, dtype=np.float32),
        "score": np.full(n, np.nan),
        "priority": np.full(n, np.nan),
        "reason": np.where(response, np.where(kept, 0, 2), 1).astype(np.int8),
        "weight": np.ones(n, dtype=np.float32),
        "truth": None,
    }
    return CleanedBlock(**(made | columns))


# -- shares ---------------------------------------------------------------------------------------


def test_the_error_of_a_share_is_that_of_the_ratio_estimator() -> None:
    # samples of 4, 6 and 2 tokens keep 2, 6 and 0: p = 8/12, residuals -2/3, 2 and -4/3,
    # var = 3/2 * (4/9 + 36/9 + 16/9) / 144
    rows = np.repeat([0, 1, 2], [4, 6, 2])
    kept = np.array([1, 1, 0, 0] + [1] * 6 + [0, 0], dtype=bool)
    shares = Shares(1)
    shares.add(rows, np.zeros(12, dtype=np.int64), kept)
    found = shares.share(0)
    error = math.sqrt(1.5 * (56 / 9) / 144)
    assert (found.samples, found.tokens, found.kept) == (3, 12, 8)
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.low == pytest.approx(2 / 3 - 1.959963984540054 * error)
    assert found.high == 1.0  # cut off


def test_the_interval_agrees_with_a_bootstrap_of_whole_samples() -> None:
    draw = np.random.default_rng(3)
    sizes = draw.integers(1, 40, 400)
    chance = draw.beta(2, 2, 400)  # tokens of a sample go together
    hits = draw.binomial(sizes, chance)
    rows = np.repeat(np.arange(400), sizes)
    kept = np.concatenate([np.arange(n) < k for n, k in zip(sizes, hits, strict=True)])
    shares = Shares()
    shares.add(rows, np.zeros(len(rows), dtype=np.int64), kept)
    again = draw.integers(0, 400, (4000, 400))
    bootstrap = float((hits[again].sum(1) / sizes[again].sum(1)).std())
    found = shares.share(0)
    assert found.error == pytest.approx(bootstrap, rel=0.05)
    p = found.value
    assert found.error > 2 * math.sqrt(p * (1 - p) / len(rows))  # what independent tokens give


def test_shares_add_up_over_calls_and_groups() -> None:
    draw = np.random.default_rng(0)
    rows, groups = draw.integers(0, 20, 300), draw.integers(0, 5, 300) * 3
    kept = draw.random(300) < 0.5
    rows.sort()
    whole, parts = Shares(), Shares()
    whole.add(rows, groups, kept)
    for of in (rows < 7, rows >= 7):
        parts.add(rows[of] - rows[of].min(), groups[of], kept[of])
    for group in (0, 3, 12):
        assert whole.share(group) == parts.share(group)
        assert whole.share(group).tokens == int((groups == group).sum())
    assert whole.share(1).tokens == 0 and math.isnan(whole.share(1).value)


def test_there_is_no_interval_where_nothing_varies() -> None:
    shares = Shares()
    shares.add(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1]), np.array([True, True, True, False]))
    assert shares.share(0).cells() == [2, 2, 1.0, None, None]
    assert shares.share(1).cells() == [2, 1, 0.5, None, None]  # of one sample


def test_wilson_bounds() -> None:
    low, high = wilson(np.array([8, 0]), np.array([10, 10]))
    # textbook values for 8 of 10 and 0 of 10
    assert low == pytest.approx([0.4902, 0.0], abs=5e-5)
    assert high == pytest.approx([0.9433, 0.2775], abs=5e-5)


def test_wilson_bounds_end_where_shares_do() -> None:
    tokens = np.arange(1, 3000)
    none, all_kept = wilson(np.zeros_like(tokens), tokens), wilson(tokens, tokens)
    assert (none[0] == 0.0).all() and (all_kept[1] == 1.0).all()
    assert (none[1] < 1.0).all() and (all_kept[0] > 0.0).all()


# -- kinds of tokens ------------------------------------------------------------------------------


def kinds_of(tokenizer: Any, text: str) -> list[tuple[str, str]]:
    """Each token's text with its kind, the text being one response."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    block = make_block([{"ids": ids, "response": [1] * len(ids)}])
    vocabulary = Vocabulary(tokenizer)
    return [
        (vocabulary.text(id), TYPES[kind])
        for id, kind in zip(ids, vocabulary.types(block), strict=True)
    ]


def test_every_character_is_of_one_kind() -> None:
    found = kinds_of(character_tokenizer(), "Hi 42,\nok")
    assert found == [
        ("H", "word start"),
        ("i", "continuation"),
        (" ", "whitespace"),
        ("4", "digit"),
        ("2", "digit"),
        (",", "punctuation"),
        ("\n", "whitespace"),
        ("o", "word start"),
        ("k", "continuation"),
        ("$", "special"),
    ]


def test_a_word_does_not_go_on_into_the_next_sample() -> None:
    tokenizer = character_tokenizer()
    rows = [{"ids": tokenizer.encode("ab"), "response": [1, 1]} for _ in range(2)]
    kinds = Vocabulary(tokenizer).types(make_block(rows))
    assert [TYPES[k] for k in kinds] == ["word start", "continuation"] * 2


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_kinds_do_not_depend_on_the_family_of_the_tokenizer(make: Any) -> None:
    found = kinds_of(make(), "the sky (is) 12.\n")
    # of the first letter of every word, and of signs
    starts = [text.strip() for text, kind in found if kind == "word start"]
    assert [text[0] for text in starts] == ["t", "s", "i"]
    assert [t.strip() for t, kind in found if kind == "digit" and t.strip()] == ["1", "2"]
    assert {t for t, kind in found if kind == "special"} == {"</s>"}
    assert {t.strip() for t, kind in found if kind == "punctuation"} <= {"(", ")", ".", ""}
    assert "\n" in [t for t, kind in found if kind == "whitespace"]
    assert "code" not in {kind for _, kind in found}
    letters = "".join(t.strip() for t, k in found if k in ("word start", "continuation"))
    assert letters == "theskyis"


def test_bytes_of_a_character_count_as_letters() -> None:
    kinds = [kind for _, kind in kinds_of(byte_level_tokenizer(), "é")]
    assert kinds == ["word start", "continuation", "special"]


def test_code_is_what_stands_inside_fences() -> None:
    text = "a `b`\n```py\nx = 1\n```\nc"
    found = kinds_of(character_tokenizer(), text)
    code = "".join(t for t, kind in found if kind == "code")
    # the break before the first fence is outside, as is the one that ends the last
    assert code == "```py\nx = 1\n```"
    assert found[-1] == ("$", "special")


def test_fences_of_a_prompt_open_nothing_in_a_response() -> None:
    tokenizer = character_tokenizer()
    prompt, response = (tokenizer.encode(t) for t in ("```\n", "x = 1"))
    ids = prompt + response
    block = make_block([{"ids": ids, "response": [0] * len(prompt) + [1] * len(response)}])
    kinds = [TYPES[k] for k in Vocabulary(tokenizer).types(block)]
    assert "code" not in kinds


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```\na\n```\nb", ["```\na\n```"]),
        ("~~~\n```\n~~~", ["~~~\n```\n~~~"]),
        ("````\n```\n````\nx", ["````\n```\n````"]),
        ("  ```py\na", ["  ```py\na"]),  # never closed
        ("```a``` b", []),  # code within a line
        ("``\na\n``", []),
        ("```\na\n``` no\nb\n```", ["```\na\n``` no\nb\n```"]),
        ("```\na\n```\nb\n```\nc\n```", ["```\na\n```", "```\nc\n```"]),
    ],
)
def test_fenced_spans(text: str, code: list[str]) -> None:
    assert [text[low:high] for low, high in fenced_spans(text)] == code


def test_what_steers_a_display_is_written_out() -> None:
    assert visible(" a\n\t\r") == "␣a↵⇥␍"
    assert visible("\u202ea\x1b\u00a0") == "⟨U+202E⟩a⟨U+001B⟩⟨U+00A0⟩"


def test_bytes_that_are_no_character_are_told_apart() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode(" é", add_special_tokens=False)
    assert "\ufffd" in {vocabulary.text(i) for i in ids}
    assert "".join(vocabulary.shown(i) for i in ids) == "␣\\xc3\\xa9"  # its two bytes in UTF-8
    fallback = sentencepiece_tokenizer()
    found = [i for t, i in fallback.get_vocab().items() if t in ("<0xE2>", "<0x82>")]
    assert {Vocabulary(fallback).shown(i) for i in found} == {"\\xe2", "\\x82"}


# -- tallies --------------------------------------------------------------------------------------


def test_bins_double() -> None:
    sizes = np.array([1, 2, 3, 4, 5, 8, 9, 16, 17, 16384, 16385, 10**6])
    names = size_bins()
    assert [names[i] for i in size_bin(sizes)] == [
        *("1", "2", "3 to 4", "3 to 4", "5 to 8", "5 to 8", "9 to 16", "9 to 16", "17 to 32"),
        *("8193 to 16384", "over 16384", "over 16384"),
    ]


def test_a_tally_keeps_apart_what_was_not_ranked() -> None:
    # ids: 9 ends a response
    rows: list[dict[str, Any]] = [
        {"ids": [1, 2, 9], "response": [0, 1, 1], "round": 0},  # D_0
        {"ids": [1, 2, 9, 3, 4, 5, 9], "response": [0, 1, 1, 0, 1, 1, 1]},  # two turns
        {"ids": [6, 9], "response": [1, 1], "source": "b"},  # left with nothing
        {"ids": [7, 8], "response": [1, 1]},  # the reference has seen it
        {"ids": [7, 7, 9], "response": [1, 1, 1], "source": "b"},  # a token unlearnt
    ]
    kept = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1], dtype=bool)
    block = make_block(rows, kept=kept)
    block.reason[12:14] = 3
    block.weight[14:17] = [-1.0, 0.5, 0.25]
    block.labels[14] = 7
    tally = Tally(eos_id=9)
    tally.add(Ranked(block, block.rounds.astype(np.int64)))

    assert tally.uncleaned == (1, 2) and tally.seen == 2
    assert (tally.whole.samples, tally.whole.tokens, tally.whole.kept) == (3, 10, 5)
    a, b = tally.counts["a"], tally.counts["b"]
    assert (a.samples, a.emptied, a.ends, a.ends_kept, a.unlearnt) == (1, 0, 2, 1, 0)
    assert (b.samples, b.emptied, b.ends, b.ends_kept, b.unlearnt) == (2, 1, 2, 1, 1)
    assert b.weight == 0.75 and a.weight == 3.0
    assert tally.share_of("b").cells()[:2] == [5, 2]
    assert {s: dict(enumerate(c[:4].tolist())) for s, c in tally.reasons.items()} == {
        "a": {0: 3, 1: 0, 2: 2, 3: 2},
        "b": {0: 3, 1: 0, 2: 2, 3: 0},
    }
    # turns of 2 and 3, of 2, and of 3 tokens
    position, length, turn = (tally.groups[key] for key in (BY_POSITION, BY_LENGTH, BY_TURN))
    assert [position.share(i).tokens for i in range(3)] == [4, 4, 2]
    assert [length.share(i).tokens for i in range(3)] == [0, 4, 6]
    assert [turn.share(i).tokens for i in range(2)] == [7, 3]
    assert [turn.share(i).kept for i in range(2)] == [3, 2]
    assert tally.ids[[2, 9, 5, 7]].tolist() == [1, 4, 1, 2]
    assert tally.ids_kept[[2, 9, 5, 7]].tolist() == [1, 2, 1, 1]


def test_the_reach_around_a_value_holds_about_so_many_tokens() -> None:
    # 10,000 tokens evenly between 1 and 2: 100 of them lie within 0.005 of any value there
    score = 1.0 + (np.arange(10_000) + 0.5) / 10_000
    ids = np.ones(len(score), dtype=np.int32)
    tally = Tally(eos_id=0, by="score")
    block = make_block([{"ids": ids, "response": ids}], score=score)
    tally.add(Ranked(block, np.ones(1, dtype=np.int64)))
    assert tally.reach("by", 1.53, 100) == pytest.approx(0.005, rel=0.02)
    assert tally.reach("by", 1.53, 4000) == pytest.approx(0.2, rel=0.1)  # more than one bin's
    assert tally.reach("by", 1.53, 50_000) == 0.0  # more than there are
    assert tally.keeps_all


def test_quantiles_leave_no_more_than_asked_beyond() -> None:
    draw = np.random.default_rng(0)
    score = draw.normal(0, 3, 5000)
    ids = np.ones(5000, dtype=np.int32)
    block = make_block([{"ids": ids, "response": ids}], score=score)
    tally = Tally(eos_id=0, by="score")
    tally.add(Ranked(block, np.ones(1, dtype=np.int64)))
    low, high = tally.quantile("by", 0.01), tally.quantile("by", 0.99)
    assert low is not None and high is not None
    assert 0 < (score < low).sum() <= 50 and 0 < (score > high).sum() <= 50
    assert abs(low / np.quantile(score, 0.01) - 1) < 0.15
    assert tally.quantile("loss", 0.5) is None


def test_bars_count_every_token_once() -> None:
    bars = Bars.empty(-1.0, 1.0, 4)
    values = np.array([-2.0, -1.0, -0.6, 0.0, 0.4, 1.0, 3.0])
    bars.add(values, np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool))
    assert bars.kept.tolist() == [1, 0, 1, 1] and bars.dropped.tolist() == [1, 0, 1, 0]
    assert bars.beyond == (1, 1) and bars.total == 7


# -- other keep shares ----------------------------------------------------------------------------


def brute_force(
    scope: str, rows: np.ndarray, values: np.ndarray, ends: np.ndarray, keep: float, first: bool
) -> tuple[int, int, int]:
    """Kept tokens, emptied samples and kept ends, by sorting in Python."""
    n = len(rows)
    of_row = {r: [i for i in range(n) if rows[i] == r] for r in dict.fromkeys(rows.tolist())}

    def best(tokens: list[int]) -> set[int]:
        order = sorted(tokens, key=lambda i: (not (first and ends[i]), -values[i], i))
        budget = int(len(tokens) * keep)
        if first:
            budget = max(budget, sum(bool(ends[i]) for i in tokens))
        return set(order[:budget])

    kept: set[int] = set()
    if scope == "global":
        kept = best(list(range(n)))
    elif scope == "sample":
        kept = set().union(*(best(tokens) for tokens in of_row.values()))
    else:
        left = int(n * keep)
        means = {r: sum(values[i] for i in t) / len(t) for r, t in of_row.items()}
        for row in sorted(of_row, key=lambda r: (-means[r], r)):
            left -= len(of_row[row])
            if left < 0:
                break
            kept |= set(of_row[row])
    emptied = sum(not kept & set(tokens) for tokens in of_row.values())
    return len(kept), emptied, sum(bool(ends[i]) for i in kept)


@pytest.mark.parametrize(
    ("scope", "first"),
    [("global", False), ("global", True), ("sample", False), ("sample", True),
     ("whole_sample", False)],
)  # fmt: skip
def test_a_curve_is_what_sorting_gives_ties_included(
    tmp_path: Path, scope: str, first: bool
) -> None:
    draw = np.random.default_rng(1)
    rows = np.repeat(np.arange(12), draw.integers(1, 9, 12))
    values = draw.integers(-3, 4, len(rows)) / 2.0  # many ties, and zeros of both signs
    values[::5] *= -1.0
    ends = np.append(np.diff(rows) > 0, True)
    ranking = Ranking(tmp_path, scope, first)
    for of in (rows < 5, (rows >= 5) & (rows < 9), rows >= 9):
        ranking.add(rows[of] - rows[of].min(), values[of], ends[of])
    shares = [0.05, 0.3, 0.45, 0.6, 0.9, 1.0]
    curve = ranking.curve(shares)
    ranking.close()
    found = [(p.kept, p.emptied, p.ends_kept) for p in curve.points]
    assert found == [brute_force(scope, rows, values, ends, keep, first) for keep in shares]
    assert (curve.tokens, curve.samples, curve.ends) == (len(rows), 12, 12)
    assert not list(tmp_path.iterdir())
    if scope == "global" and not first:
        best = np.sort(values)[::-1]
        cuts = [None if k == 0 else best[k - 1] for k, _, _ in found]
        assert [p.cut for p in curve.points] == cuts


# -- truth and agreement --------------------------------------------------------------------------


def test_areas_under_curves_with_ties_by_hand() -> None:
    found = curves(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
    assert found is not None
    # pairs won: 1 + 1 + 1/2 + 1 of 4; precision 1 at recall 1/2, 2/3 at recall 1
    assert found.auroc == pytest.approx(3.5 / 4)
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.true_positive.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert found.false_positive.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert found.precision.tolist() == [1.0, 1.0, pytest.approx(2 / 3), 0.5]


def test_areas_agree_with_counting_pairs() -> None:
    draw = np.random.default_rng(5)
    positive = draw.random(200) < 0.3
    values = np.round(draw.normal(positive * 0.7, 1.0), 1)
    found = curves(values, positive)
    assert found is not None
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in itertools.product(values[positive], values[~positive])
    ]
    assert found.auroc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    average = before = 0.0
    for cut in sorted(set(values.tolist()), reverse=True):
        above = values >= cut
        recall = (above & positive).sum() / positive.sum()
        average += (recall - before) * (above & positive).sum() / above.sum()
        before = recall
    assert found.average_precision == pytest.approx(average, abs=1e-12)


def test_no_curve_without_both_classes_or_with_nan() -> None:
    assert curves(np.array([1.0, 2.0]), np.array([True, True])) is None
    assert curves(np.array([1.0, math.nan]), np.array([True, False])) is None


def test_the_mask_is_a_point_of_the_curve() -> None:
    kept = np.array([1, 1, 0, 1, 0], dtype=bool)
    place = operating(kept, np.array([1, 0, 1, 1, 0], dtype=bool))
    assert (place.recall, place.false_positive, place.precision) == (2 / 3, 1 / 2, 2 / 3)
    assert math.isnan(operating(np.zeros(2, bool), np.array([True, False])).precision)


def test_agreement_by_hand() -> None:
    one = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=bool)
    other = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    found = agreement(one, other)
    # p_o = 0.8, p_e = 0.3 * 0.3 + 0.7 * 0.7 = 0.58
    assert found.equal == 0.8 and found.kappa == pytest.approx(0.22 / 0.42)
    assert math.isnan(agreement(one | True, other | True).kappa)
