"""Which samples a report shows, and how they are stored in its page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import byte_level_tokenizer, character_tokenizer

from tokenclean.data.cleaned import cleaned_schema, read_blocks, write_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.finished import CleanedArm
from tokenclean.report.embedded import Texts, embed, json_size, script_json
from tokenclean.report.percentiles import Sketch
from tokenclean.report.samples import Draw, cut_of
from tokenclean.report.shown import MAX_TOKENS, Row

REASONS = {"0": "kept", "1": "prompt", "2": "below the cut", "3": "row seen by the reference"}


def sample(
    id: str,
    source: str,
    prompt: str,
    response: str,
    kept: str,
    base: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of `write_pool`; ``kept`` has a digit per response token, the weight of its loss."""
    return {
        "id": id,
        "source": source,
        "prompt": prompt,
        "response": response,
        "kept": kept,
        "base": base,
        "reference": reference,
        "round": 1,
        "truth": None,
        "priority": None,
        **more,
    }


def write_pool(
    folder: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, **manifest: Any
) -> CleanedArm:
    """A cleaned pool as an arm called like its folder; the end-of-sequence token is not added."""
    with_truth = any(row["truth"] is not None for row in rows)
    schema = cleaned_schema(with_truth)
    columns: dict[str, list[Any]] = {field.name: [] for field in schema}
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        before, n = len(prompt), len(response)
        weights = row.get("weights") or [float(digit) for digit in row["kept"]]
        assert len(weights) == n, f"{row['id']}: {n} response tokens"
        ids = [*prompt, *response]
        base, reference = row["base"], row["reference"]
        score = None if base is None or reference is None else np.subtract(base, reference).tolist()
        found = {
            "id": row["id"],
            "source": row["source"],
            "input_ids": ids,
            "labels": [
                *[-100] * before,
                *(i if w else -100 for i, w in zip(response, weights, strict=True)),
            ],
            "response_mask": [*[False] * before, *[True] * n],
            "base_nll": [*[None] * before, *(base or [None] * n)],
            "reference_nll": [*[None] * before, *(reference or [None] * n)],
            "score": [*[None] * before, *(score or [None] * n)],
            "priority": [*[None] * before, *(row["priority"] or [None] * n)],
            "reason": [
                *[1] * before,
                *(row.get("reasons") or [0 if w > 0 else 2 for w in weights]),
            ],
            "weight": [*[1.0] * before, *(w or 1.0 for w in weights)],
            "round": row["round"],
        }
        if with_truth:
            found["truth"] = [*[0] * before, *(row["truth"] or [1] * n)]
        for name, value in found.items():
            columns[name].append(value)
    batch = pa.record_batch(columns, schema=schema)
    facts = {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "reasons": REASONS,
        "selection": {"rule": "token_cleaning", "scope": "global", "keep": 0.6},
        **manifest,
    }
    write_cleaned_pool(folder / "cleaned", [batch], schema, facts)
    return CleanedArm(folder.name, folder, folder / "cleaned")


def draw(arm: CleanedArm, limit: int = 100, rows: int = 1024) -> Draw:
    drawn = Draw(arm, limit)
    for block in read_blocks(arm.cleaned, rows):
        drawn.add(block)
    return drawn


def places(drawn: Draw, name: str) -> list[tuple[str, int]]:
    return [(doubt.row.id, doubt.position) for doubt in drawn.doubts.lists[name].best()]


def test_percentiles_count_what_is_below_and_half_of_the_equal() -> None:
    sketch = Sketch()
    sketch.add(np.array([4.0, -1.0, np.nan, 2.0]))
    sketch.add(np.array([2.0, -3.0, 0.0, -0.0, np.inf]))
    # below 2: -3, -1, 0, -0, and half of its two: 5 of 8
    asked = np.array([-3.0, -1.0, 0.0, 2.0, 4.0, 1e9, -1e9, np.nan, 3.0])
    expected = [0.5 / 8, 1.5 / 8, 3 / 8, 5 / 8, 6.5 / 8, 7 / 8, 0.0, np.nan, 6 / 8]
    np.testing.assert_array_equal(sketch.shares_below(asked), expected)


def test_percentiles_of_many_values_are_those_of_sorting_them() -> None:
    values = np.random.default_rng(0).normal(size=20_000) ** 3
    sketch = Sketch()
    for part in np.split(values, 10):
        sketch.add(part)
    asked = values[:500]
    exact = (np.sort(values).searchsorted(asked) + 0.5) / len(values)
    np.testing.assert_allclose(sketch.shares_below(asked), exact, atol=2e-3)


def test_percentiles_of_nothing_are_no_numbers() -> None:
    assert np.isnan(Sketch().shares_below(np.array([1.0]))).all()


def test_cuts_are_those_of_the_rounds_or_the_pools() -> None:
    assert cut_of({"cut": 0.5}, 1) == 0.5
    assert cut_of({"cut": 0.5}, 7) == 0.5
    assert cut_of({"cut": None}, 1) is None
    evolving = {"cut": None, "rounds": [{"cut": None}, {"cut": -0.25}]}
    assert [cut_of(evolving, n) for n in (0, 1, 2)] == [None, -0.25, None]


def test_tokens_are_counted_by_source_without_those_that_nobody_ranked(tmp_path: Path) -> None:
    rows = [
        sample("first", "a", "?", "abcd", "1111", round=0),
        sample("one", "a", "?", "abcd", "1100"),
        sample("two", "b", "?", "ab", "01"),
        sample("seen", "b", "?", "ab", "00", reasons=[3, 3]),
        sample("three", "b", "?", "ab", "00", round=2),
    ]
    facts = {"rounds": [{"cut": None}, {"cut": 0.0}, {"cut": 0.0}]}
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer(), **facts))
    assert {s: (c.ranked, c.kept) for s, c in drawn.sources.items()} == {"a": (4, 2), "b": (4, 1)}
    assert {r: (c.ranked, c.kept) for r, c in drawn.rounds.items()} == {
        0: (0, 0),
        1: (6, 3),
        2: (2, 0),
    }
    assert drawn.samples == 5


def test_a_pool_of_select_has_no_uncleaned_rows(tmp_path: Path) -> None:
    rows = [sample("one", "a", "?", "ab", "10", round=0)]
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer(), cut=0.0))
    assert drawn.sources["a"].ranked == 2


def test_the_draw_goes_by_the_hash_of_the_ids(tmp_path: Path) -> None:
    rows = [sample(f"s{i}", "a", "?", "ab", "10") for i in range(50)]
    arm = write_pool(tmp_path / "arm", rows, character_tokenizer())
    by_hash = sorted((r["id"] for r in rows), key=lambda i: hashlib.sha256(i.encode()).digest())
    for size in (1, 7, 1024):
        assert [row.id for row in draw(arm, 5, size).ordered()] == by_hash[:5]


def test_every_source_and_kept_share_is_drawn(tmp_path: Path) -> None:
    rows = []
    for source in "abc":
        for i in range(40):
            rows.append(sample(f"{source}{i}", source, "?", "abcdefgh", "11110000"))
        rows.append(sample(f"{source}-all", source, "?", "abcdefgh", "11111111"))
        rows.append(sample(f"{source}-none", source, "?", "abcdefgh", "00000000"))
        rows.append(sample(f"{source}-few", source, "?", "abcdefgh", "10000000"))
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()), 15)
    shown = drawn.ordered()
    assert len(shown) == 15
    shares = {(row.source, row.kept) for row in shown}
    assert shares == {(source, kept) for source in "abc" for kept in (8, 4, 1, 0)}


def test_as_many_sources_as_samples_are_drawn_in_bounded_memory(tmp_path: Path) -> None:
    rows = [sample(f"s{i}", f"source {i}", "?", "ab", "10") for i in range(1500)]
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()), 20)
    assert len(drawn.ordered()) == 20
    assert len(drawn.sources) == 401
    assert sum(len(heap) for heap in drawn._strata.values()) <= 2 * 401


def test_extreme_scores_are_shown_before_the_draw(tmp_path: Path) -> None:
    rows = [
        sample(f"s{i}", "a", "?", "ab", "11", [2.0, 2.0], [2.0, 2.0 - i / 64])
        for i in range(-40, 60)
    ]
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()), 12)
    first = [row.id for row in drawn.ordered()]
    assert first[:6] == ["s59", "s58", "s57", "s56", "s55", "s54"]
    assert first[6:] == ["s-40", "s-39", "s-38", "s-37", "s-36", "s-35"]
    assert (drawn.ordered()[0].highest, drawn.ordered()[0].lowest) == (59 / 64, 0.0)


def test_dropped_tokens_that_look_wrong(tmp_path: Path) -> None:
    rows = [
        # d is a hole in a kept stretch; g is none, for h at its right is dropped
        sample(
            "hole",
            "a",
            "?",
            "abcdefgh",
            "11101100",
            [1.0, 1, 1, 3, 1, 1, 5, 4],
            [0.5, 0.5, 0.5, 3, 0.5, 0.5, 5, 4.25],
            truth=[1, 1, 1, 1, 1, 1, 0, -1],
        ),
        # the last of one sample and the first of the next are no neighbours
        sample("edge", "a", "", "kkokk", "11011", [1.0, 1, 2, 1, 1], [0.5, 0.5, 1.875, 0.5, 0.5]),
        sample("next", "a", "", "mkk", "011", [7.0, 1, 1], [7.5, 0.5, 0.5], truth=[0, 1, 1]),
    ]
    arm = write_pool(tmp_path / "arm", rows, character_tokenizer(), cut=0.25)
    drawn = draw(arm)
    assert places(drawn, "truth") == [("hole", 4), ("edge", 2)]
    assert places(drawn, "holes") == [("hole", 4), ("edge", 2)]
    assert places(drawn, "surprising") == [("next", 0), ("hole", 7), ("edge", 2)]
    # distance to the cut 0.25: edge's o 0.125, hole's d and g 0.25, next's m 0.75
    assert places(drawn, "near") == [("edge", 2), ("hole", 4), ("next", 0)]
    assert [d.value for d in drawn.doubts.lists["near"].best()] == [-0.125, -0.25, -0.75]


def test_one_doubt_of_a_token_and_of_a_sample(tmp_path: Path) -> None:
    rows = [
        sample(f"s{i}", "a", "?", "xy", "00", [float(i), i / 2], [1.0, 1.0]) for i in range(1, 30)
    ]
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()))
    # x is worst in s29; y too, but s29 is there already, and only the best y counts
    assert places(drawn, "surprising") == [("s29", 1)]


def test_without_losses_there_are_no_doubts_but_by_truth(tmp_path: Path) -> None:
    rows = [sample("s", "a", "?", "abcde", "11011", truth=[1, 1, 1, 0, 0])]
    drawn = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()))
    assert places(drawn, "truth") == [("s", 3)]
    assert all(not drawn.doubts.lists[name].found for name in ("holes", "near", "surprising"))


def test_of_a_long_sample_the_first_response_is_shown(tmp_path: Path) -> None:
    row = sample("long", "a", "p" * 5000, "ab", "10", [1.0, 1.0], [1.0, 2.0])
    [shown] = draw(write_pool(tmp_path / "arm", [row], character_tokenizer())).ordered()
    assert (shown.first, shown.length, len(shown.input_ids)) == (4936, 5002, 66)
    assert shown.response.tolist() == [False] * 64 + [True] * 2
    assert shown.score.tolist() == [0.0, -1.0]
    row = sample("empty", "a", "p" * 5000, "", "")
    [shown] = draw(write_pool(tmp_path / "other", [row], character_tokenizer())).ordered()
    assert (shown.first, len(shown.input_ids), shown.total) == (0, MAX_TOKENS, 0)


def test_samples_as_json(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    rows = [
        sample("one", "a", "?", "abc", "101", [1.0, 2.0, 0.5], [0.5, 2.25, 0.5], truth=[1, -1, 0]),
        sample("two", "b", "!", "ab", "11", weights=[0.5, -1.0], reasons=[0, 2], round=0),
    ]
    arm = write_pool(tmp_path / "arm", rows, tokenizer, rounds=[{"cut": None}, {"cut": 0.0}])
    texts = Texts(tokenizer)
    shown = embed({"arm": draw(arm)}, texts, 10_000)["arm"]
    one, two = shown
    assert texts.entries[one["text"]] == {
        "id": "one",
        "source": "a",
        "texts": ["?", "a", "b", "c"],
        # see the tokenizer: codes from 32 on become 2, 3, ..., `$` left out
        "tokens": [ord("?") - 31, ord("a") - 31, ord("b") - 31, ord("c") - 31],
        "spans": [1, 4],
        "first": 0,
        "length": 4,
        "truth": [1, -1, 0],
    }
    # scores 0.5, -0.25, 0: the share below and half of itself, in tenths of a percent
    assert {k: v for k, v in one.items() if k != "text"} == {
        "number": 0,
        "round": 1,
        "kept": 2,
        "total": 3,
        "reason": [0, 2, 0],
        "highest": [50_000],
        "lowest": [-25_000],
        "base": [100_000, 200_000, 50_000],
        "reference": [50_000, 225_000, 50_000],
        "score": [50_000, -25_000, 0],
        "score_rank": [833, 167, 500],
    }
    assert two["uncleaned"] is True
    assert two["weight"] == [50_000, -100_000]
    assert "score" not in two and "score_rank" not in two


def test_the_budget_holds_and_texts_are_stored_once(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    rows = [sample(f"s{i}", "a", "?", "some words here", "1" * 15) for i in range(60)]
    arms = {n: draw(write_pool(tmp_path / n, rows, tokenizer)) for n in ("one", "two")}
    texts = Texts(tokenizer)
    shown = embed(arms, texts, 6_000)
    assert 2_000 < json_size([texts.entries, *shown.values()]) <= 6_100
    numbers = [[row["number"] for row in rows] for rows in shown.values()]
    assert len(numbers[0]) == len(texts.entries) >= 10
    # the first arm pays for the texts, so the last of them may be all that is left
    assert set(numbers[1]) <= set(numbers[0]) and len(numbers[1]) >= len(numbers[0]) - 1
    everything = embed(arms, Texts(tokenizer), 10**7)
    assert len(everything["one"]) == 60


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!-- <script>",
        "]]>",
        "\u2028\u2029\x00\x1b\x7f\r\n",
        "\u202e\u200f",
        "\ud800 half a pair",
        "&lt; \"quotes' \\",
    ],
)
def test_json_in_a_script_ends_nothing(text: str) -> None:
    written = script_json({"text": text})
    assert not set(written) & set("<>&\u2028\u2029\x00\r\n\x7f")
    written.encode("utf-8")
    assert json.loads(written) == {"text": text}


def test_the_same_pool_gives_the_same_json(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    rows = []
    for i in range(30):
        n = len(tokenizer("brown fox 7", add_special_tokens=False)["input_ids"])
        base = [(i * k) % 7 + 0.25 for k in range(n)]
        rows.append(sample(f"s{i}", "ab"[i % 2], "dog", "brown fox 7", "1" * n, base, base))
    arm = write_pool(tmp_path / "arm", rows, tokenizer)

    def made(size: int) -> str:
        texts = Texts(tokenizer)
        shown = embed({"arm": draw(arm, 10, size)}, texts, 4_000)
        return script_json([shown, texts.entries])

    assert made(1024) == made(1024) == made(3)


def test_rows_are_copies_of_what_they_need(tmp_path: Path) -> None:
    rows = [sample(f"s{i}", "a", "?" * 100, "ab", "10") for i in range(20)]
    shown = draw(write_pool(tmp_path / "arm", rows, character_tokenizer()), 2).ordered()
    for row in shown:
        assert isinstance(row, Row)
        # a view would keep the whole block in memory
        assert row.input_ids.base is None and row.response.base is None
