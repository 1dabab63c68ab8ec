"""Tables of studies, on run folders written by hand; every expected number is worked out here."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tokenclean.cleaning.results import ArmResult
from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.evaluation.planted import Accuracy, MaskQuality
from tokenclean.publish import write_json
from tokenclean.report.figures import Line, draw_lines
from tokenclean.study.cells import Spread, Table, groups_of, headlines_of, spread
from tokenclean.study.compare import difference
from tokenclean.study.examples import Example, Piece, html_page, markdown_page
from tokenclean.study.rounds import read_round, trend
from tokenclean.study.tables import REPORTS, Cell, report
from tokenclean.study.theory import Bound, verdict

Right = dict[str, list[int]]  # source -> 1 for a question answered right


def mask(tokens: int, kept: int, informative: int, hits: int, auroc: float = 0.5) -> MaskQuality:
    """A mask that keeps `hits` of the informative tokens."""
    return MaskQuality(
        tokens=tokens,
        kept=kept,
        informative=informative,
        corrupted=0,
        auroc=auroc,
        auroc_corrupted=math.nan,
        precision=hits / kept,
        recall=hits / informative,
        corrupted_kept=math.nan,
    )


def write_run(
    folder: Path,
    arms: dict[str, Right],
    masks: dict[str, dict[str, MaskQuality]] | None = None,
    answers: bool = True,
    config: dict[str, Any] | None = None,
    nll: float = 1.0,
) -> Path:
    """A finished run; the base is one of the arms."""
    results = []
    for name, right in arms.items():
        place = folder / "base" if name == "base" else folder / "arms" / name
        place.mkdir(parents=True)
        accuracy = {s: Accuracy(sum(v), len(v)) for s, v in right.items()}
        accuracy["all"] = Accuracy(
            sum(a.correct for a in accuracy.values()), sum(a.questions for a in accuracy.values())
        )
        result = ArmResult(name, None, accuracy, {"all": nll}, (masks or {}).get(name, {}))
        results.append(result.to_json())
        write_json(place / "result.json", results[-1])
        if answers:
            values = {s: {f"q{i}": bool(x) for i, x in enumerate(v)} for s, v in right.items()}
            write_json(place / "answers.json", values)
    write_json(folder / "results.json", results)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


#: Four questions of a known family and two of a blank one.
SEED_0 = {
    "base": {"capital": [1, 1, 1, 1], "glossary": [0, 0]},
    "full": {"capital": [1, 1, 0, 0], "glossary": [0, 1]},
    "rho": {"capital": [1, 1, 1, 0], "glossary": [0, 1]},
}
SEED_1 = {
    "base": {"capital": [1, 1, 1, 1], "glossary": [0, 0]},
    "full": {"capital": [1, 0, 0, 0], "glossary": [0, 0]},
    "rho": {"capital": [1, 1, 1, 0], "glossary": [1, 0]},
}


def two_seeds(tmp_path: Path, **options: Any) -> list[Cell]:
    return [
        Cell("main", seed, write_run(tmp_path / f"seed{seed}", arms, **options))
        for seed, arms in enumerate((SEED_0, SEED_1))
    ]


def stored(folder: Path, name: str) -> dict[str, Any]:
    """A table as the machine-readable file holds it."""
    tables = json.loads((folder / "tables.json").read_text())["tables"]
    found: dict[str, Any] = next(t for t in tables if t["name"] == name)
    return found


def rows_of(folder: Path, name: str, labels: int = 1) -> dict[Any, dict[str, Any]]:
    """Label, or the first two cells, of each row -> column -> cell."""
    found = stored(folder, name)
    return {
        row[0] if labels == 1 else tuple(row[:labels]): dict(
            zip(found["columns"], row, strict=True)
        )
        for row in found["rows"]
    }


# -- means, groups, tables -------------------------------------------------------------------------


def test_a_spread_by_hand() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None
    # mean 3; squares of -2, -1, 3 sum to 14; sd = sqrt(14 / 2); se = sd / sqrt(3)
    assert found.mean == 3 and found.sd == pytest.approx(math.sqrt(7))
    assert found.se == pytest.approx(math.sqrt(7 / 3))
    assert str(found) == "3.0 ± 2.6"


def test_missing_seeds_are_said() -> None:
    assert spread([None, math.nan]) is None
    assert str(spread([1.0, None, 2.0])) == "1.5 ± 0.7 (2 of 3 seeds)"
    one = spread([4.0])
    assert one is not None and math.isnan(one.sd) and str(one) == "4.0"
    assert str(spread([-0.01])) == "0.0"


def test_groups() -> None:
    planted = {"all", "glossary", "capital", "craft"}
    assert list(groups_of(planted).items()) == [
        ("known", ("capital", "craft")),
        ("blank", ("glossary",)),
        ("capital", ("capital",)),
        ("craft", ("craft",)),
        ("glossary", ("glossary",)),
        ("all", ("all",)),
    ]
    assert list(headlines_of(planted)) == ["all", "known", "blank"]
    # a real pool has sources and no regimes, even if a source is called like one
    assert list(groups_of(["weak", "flan", "all"])) == ["flan", "weak", "all"]
    assert list(headlines_of(["weak", "flan"])) == ["all", "flan", "weak"]


def test_a_table_on_paper_and_on_disk(tmp_path: Path) -> None:
    made = Table(
        "t",
        "A title",
        ["arm", "x", "y"],
        [["a|b", Spread((1.0, 3.0), mark=" *"), None], ["c", None, 0.25]],
        ["a note"],
    )
    assert made.markdown() == (
        "### A title\n\n| arm | x | y |\n|---|---:|---:|\n"
        "| a\\|b | 2.0 ± 1.4 * | - |\n| c | - | 0.25 |\n\n* a note\n"
    )
    made.write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["arm", "x", "x: sd", "x: seeds", "x: mark", "y"]
    assert rows[1][0] == "a|b" and float(rows[1][2]) == pytest.approx(math.sqrt(2))
    assert rows[1][3:] == ["2", "*", ""] and rows[2] == ["c", "", "", "", "", "0.25"]


# -- accuracy --------------------------------------------------------------------------------------


def test_accuracy_by_hand(tmp_path: Path) -> None:
    text = report(["accuracy"], two_seeds(tmp_path, nll=1.5), "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "accuracy")
    full = rows["full"]
    # capital: 2 and 1 of 4; glossary: 1 and 0 of 2; all: 3 and 1 of 6
    assert full["capital"]["values"] == [50.0, 25.0] == full["known"]["values"]
    assert full["blank"]["values"] == [50.0, 0.0]
    assert full["all"]["values"] == pytest.approx([50.0, 100 / 6])
    assert full["all"]["sd"] == pytest.approx((50 - 100 / 6) / math.sqrt(2))
    assert full["validation loss (nats per token)"]["mean"] == 1.5
    assert full["kept share"] is None
    assert "2 seeds (0, 1)" in text and "known: capital; blank: glossary" in text


def test_the_difference_has_both_errors(tmp_path: Path) -> None:
    cells = two_seeds(tmp_path)
    found = difference(cells, "rho", "full", ("all",))
    assert found is not None and found.question_error is not None
    # seed 0: differences 0 0 1 0 | 0 0: mean 1/6, variance (1 - 1/6) / 5 = 1/6
    # seed 1: differences 0 1 1 0 | 1 0: mean 1/2, variance (3 - 6/4) / 5 = 3/10
    assert found.seeds.values == pytest.approx((100 / 6, 50))
    expected = math.sqrt((1 / 6) / 6 + (3 / 10) / 6) / 2
    assert found.question_error == pytest.approx(100 * expected)
    # over seeds: sd = (1/2 - 1/6) / sqrt(2), se = sd / sqrt(2) = 1/6
    assert found.seeds.se == pytest.approx(100 / 6)


def test_a_regime_counts_its_families_alike(tmp_path: Path) -> None:
    arms: dict[str, Right] = {
        "full": {"capital": [0, 0], "craft": [0, 0, 0, 0]},
        "rho": {"capital": [1, 0], "craft": [1, 1, 1, 0]},
    }
    cell = Cell("main", 0, write_run(tmp_path / "run", arms))
    found = difference([cell], "rho", "full", ("capital", "craft"))
    assert found is not None and found.question_error is not None
    assert found.seeds.mean == pytest.approx(100 * (1 / 2 + 3 / 4) / 2)
    # variances 1/2 of 2 and 1/4 of 4 questions: sqrt(1/4 + 1/16) / 2
    assert found.question_error == pytest.approx(100 * math.sqrt(5 / 16) / 2)
    assert found.resolved == "one seed"


def test_one_test_file_for_all_seeds_is_no_larger_sample(tmp_path: Path) -> None:
    """The same answers of three seeds to the same questions tell no more than those of one."""
    config = {"data": {"test_path": "test.jsonl"}}
    same = [Cell("main", s, write_run(tmp_path / f"s{s}", SEED_0, config=config)) for s in range(3)]
    own = [
        Cell(
            "main", s, write_run(tmp_path / f"o{s}", SEED_0, config={"data": {"test_path": f"{s}"}})
        )
        for s in range(3)
    ]
    errors = []
    for cells in (same, own, same[:1]):
        found = difference(cells, "rho", "full", ("all",))
        assert found is not None and found.question_error is not None
        errors.append(found.question_error)
    assert errors[0] == pytest.approx(errors[2])
    assert errors[1] == pytest.approx(errors[2] / math.sqrt(3))


def test_resolved_needs_both(tmp_path: Path) -> None:
    many = {"full": {"capital": [0] * 50}, "rho": {"capital": [1] * 25 + [0] * 25}}
    other = {"full": {"capital": [0] * 50}, "rho": {"capital": [1] * 27 + [0] * 23}}
    cells = [
        Cell("main", s, write_run(tmp_path / f"s{s}", arms)) for s, arms in enumerate((many, other))
    ]
    found = difference(cells, "rho", "full", ("all",))
    assert found is not None and found.resolved == "yes" and found.marked.mark == " *"
    # seeds that disagree: +50 and 0
    third = {"full": {"capital": [0] * 50}, "rho": {"capital": [0] * 50}}
    cells[1] = Cell("main", 1, write_run(tmp_path / "s2", third))
    found = difference(cells, "rho", "full", ("all",))
    assert found is not None and found.resolved == "no"


def test_without_answers_nothing_is_resolved(tmp_path: Path) -> None:
    cells = two_seeds(tmp_path, answers=False)
    text = report(["accuracy"], cells, "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "accuracy_difference", 2)
    assert rows["rho", "all"]["se over questions"] is None
    assert rows["rho", "all"]["resolved"] == "no answers"
    assert rows["rho", "all"]["se over seeds"] == pytest.approx(16.67)
    assert "No answers.json in 6 folders" in text


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    cell = Cell("main", 0, write_run(tmp_path / "run", SEED_0))
    write_json(cell.place("rho") / "answers.json", {"capital": {"other": True}})
    with pytest.raises(ValueError, match=r"rho/answers.json and .* same questions of capital"):
        difference([cell], "rho", "full", ("capital",))


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    cells = two_seeds(tmp_path)
    with pytest.raises(ValueError, match="shares: none of accuracy, mask"):
        report(["shares"], cells, "full", tmp_path)
    with pytest.raises(ValueError, match="no run to read"):
        report(["mask"], [], "full", tmp_path)
    with pytest.raises(ValueError, match=r"no run has an arm 'fill'.*base, full, rho"):
        report(["mask"], cells, "fill", tmp_path)
    with pytest.raises(ValueError, match="two runs of variant main and seed 1"):
        report(["mask"], [*cells, cells[1]], "full", tmp_path)
    with pytest.raises(ValueError, match=r"empty: no results\.json"):
        report(["mask"], [Cell("main", 0, tmp_path / "empty")], "full", tmp_path)


# -- masks and settings ----------------------------------------------------------------------------


def test_masks_by_hand(tmp_path: Path) -> None:
    # 10 tokens of which 7 informative; 5 kept, 4 of them informative
    masks = {"rho": {"all": mask(10, 5, 7, 4, auroc=0.6), "capital": mask(10, 5, 7, 4)}}
    cells = two_seeds(tmp_path, masks=masks)
    report(["mask"], cells, "full", tmp_path / "study")
    row = rows_of(tmp_path / "study", "mask", 2)["rho", "all"]
    assert row["noise before"]["mean"] == pytest.approx(0.3)
    assert row["noise after"]["mean"] == pytest.approx(0.2)
    assert row["precision"]["mean"] == pytest.approx(0.8)
    assert row["recall"]["mean"] == pytest.approx(4 / 7)
    assert row["AUROC"]["mean"] == 0.6 and row["AUROC"]["sd"] == 0
    assert row["AUROC against corrupted"] is None and row["corrupted kept"] is None
    family = rows_of(tmp_path / "study", "mask", 2)["rho", "capital"]
    assert family["regime"] == "known"


def test_settings_and_their_curve(tmp_path: Path) -> None:
    cells = [
        Cell(f"keep_{v}", s, write_run(tmp_path / f"{v}-{s}", arms, nll=v), v)
        for v in (0.3, 0.6)
        for s, arms in enumerate((SEED_0, SEED_1))
    ]
    text = report(["variants"], cells, "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "variants_known")
    assert list(rows["keep_0.3"]) == ["setting", *SEED_0]
    assert rows["keep_0.3"]["rho"]["values"] == [75.0, 75.0]
    apart = rows_of(tmp_path / "study", "variants_difference_all")
    assert apart["keep_0.6"]["rho"]["values"] == pytest.approx([100 / 6, 50])
    loss = rows_of(tmp_path / "study", "variants_loss")
    assert loss["keep_0.6"]["base"]["mean"] == 0.6
    assert "![variants](figures/variants.png)" in text
    assert (tmp_path / "study" / "figures" / "variants.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "study" / "figures" / "variants.csv").open() as file:
        numbers = list(csv.reader(file))
    assert numbers[0][2:4] == ["kept share of the response tokens", "test accuracy (%)"]
    assert ["known", "rho", "0.6", "75.0", "0.0"] in numbers


def test_settings_without_an_axis_have_no_figure(tmp_path: Path) -> None:
    cells = [Cell(v, 0, write_run(tmp_path / v, SEED_0)) for v in ("one", "two")]
    text = report(["variants"], cells, "full", tmp_path / "study")
    assert "![" not in text and not (tmp_path / "study" / "figures").exists()
    # one seed: no spread, nothing resolved, and it is said
    assert "One seed (0)" in text and " ± " not in text.replace("mean ± sd", "")


def test_a_curve_of_one_seed_is_drawn(tmp_path: Path) -> None:
    draw_lines(tmp_path / "f.png", {"all": [Line("a", [0, 1], [2, 3], [math.nan] * 2)]}, "x", "y")
    assert (tmp_path / "f.png").is_file() and "all,a,0,2,nan" in (tmp_path / "f.csv").read_text()


# -- theory ----------------------------------------------------------------------------------------


def test_the_bound_by_hand() -> None:
    # 100 tokens, 60 informative; 50 kept, 40 of them informative: 10 wrong keeps, 20 wrong drops
    bound = Bound.of(mask(100, 50, 60, 40))
    assert bound is not None
    assert (bound.tokens, bound.kept) == (100, 0.5)
    assert bound.noise == pytest.approx(0.4) and bound.wrong == pytest.approx(0.3)
    # 2 log(4 / 0.05) / 100 = 2 * 4.382027 / 100
    assert bound.quantity == pytest.approx(math.sqrt(0.08764053), abs=1e-7)
    assert bound.quantity_kept == pytest.approx(math.sqrt(2 * 0.08764053), abs=1e-7)
    assert bound.required == pytest.approx(0.2960414 * (math.sqrt(2) - 1), abs=1e-6)  # 0.1226
    assert bound.advantage == pytest.approx(0.1) and not bound.favours
    # the same shares of 10,000 tokens: required 0.01226
    assert Bound(10_000, 0.4, 0.3, 0.5).favours


@pytest.mark.parametrize(
    ("noise", "keep", "least"),
    [(0.1, 0.6, 0.3), (0.2, 0.6, 0.2), (0.4, 0.6, 0.0), (0.5, 0.6, 0.1), (0.3, 1.0, 0.3)],
)
def test_the_least_wrong_share_is_that_of_a_perfect_ranking(
    noise: float, keep: float, least: float
) -> None:
    bound = Bound(10**9, noise, 0.5, keep)
    assert bound.least_wrong == pytest.approx(least)
    truth = np.arange(1000) >= 1000 * noise  # informative tokens
    best = np.sort(truth)[::-1]
    kept = np.arange(1000) < 1000 * keep
    assert (kept != best).mean() == pytest.approx(least)
    # at a kept share of 0.6, less than 20 % noise cannot be favoured
    assert bound.can_favour == (noise > (1 - keep) / 2 and keep < 1 and noise != 0.2)


def test_what_the_corollary_says_over_seeds() -> None:
    good, bad = Bound(10**6, 0.4, 0.1, 0.6), Bound(10**6, 0.4, 0.5, 0.6)
    hopeless, everything = Bound(10**6, 0.1, 0.3, 0.6), Bound(10**6, 0.4, 0.4, 1.0)
    assert verdict([good, good]) == "yes" and verdict([bad]) == "no"
    assert verdict([good, bad]) == "1 of 2" and verdict([hopeless]) == "cannot"
    assert verdict([everything]) is None and verdict([None]) is None


def test_theory_against_what_happened(tmp_path: Path) -> None:
    few, many = [1] + [0] * 39, [1] * 20 + [0] * 20
    arms = {"full": {"capital": few}, "rho": {"capital": many}, "all_kept": {"capital": few}}
    masks = {
        "rho": {s: mask(10_000, 6000, 6000, 5900) for s in ("all", "capital")},
        "all_kept": {s: mask(10_000, 10_000, 6000, 6000) for s in ("all", "capital")},
    }
    cells = [Cell("main", s, write_run(tmp_path / f"{s}", arms, masks)) for s in (0, 1)]
    text = report(["theory"], cells, "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "theory", 2)
    assert list(rows) == [("rho", "all"), ("rho", "capital")]
    row = rows["rho", "capital"]
    # 100 wrong keeps and 100 wrong drops of 10,000
    assert row["eta^"]["mean"] == pytest.approx(0.02) and row["r^"]["mean"] == 0.6
    assert row["corollary favours cleaning"] == "yes"
    assert row["accuracy - full (points)"]["mean"] == pytest.approx(47.5)
    assert (row["resolved"], row["as predicted"]) == ("yes", "yes")
    assert "below 20 % noise" in text and "wrong drops" in text


# -- rounds ----------------------------------------------------------------------------------------


def write_pool(folder: Path, rows: list[dict[str, Any]], truth: bool = True, **facts: Any) -> None:
    """A cleaned pool of rows with id, source, ids, mask, base, reference, kept, truth, round."""
    schema = cleaned_schema(truth)

    def response(row: dict[str, Any], values: list[float] | None) -> list[float | None]:
        known = [None] * len(row["ids"]) if values is None else values
        return [v if m else None for v, m in zip(known, row["mask"], strict=True)]

    columns = {
        "id": [r["id"] for r in rows],
        "source": [r["source"] for r in rows],
        "input_ids": [r["ids"] for r in rows],
        "labels": [
            [i if k else -100 for i, k in zip(r["ids"], r["kept"], strict=True)] for r in rows
        ],
        "response_mask": [[bool(m) for m in r["mask"]] for r in rows],
        "base_nll": [response(r, r["base"]) for r in rows],
        "reference_nll": [response(r, r["reference"]) for r in rows],
        "score": [
            response(
                r, r["base"] and [b - c for b, c in zip(r["base"], r["reference"], strict=True)]
            )
            for r in rows
        ],
        "priority": [[None] * len(r["ids"]) for r in rows],
        "reason": [[0] * len(r["ids"]) for r in rows],
        "weight": [[1.0] * len(r["ids"]) for r in rows],
        "round": [r["round"] for r in rows],
    }
    if truth:
        columns["truth"] = [r["truth"] for r in rows]
    facts = {"selection": {"rule": "token_cleaning"}, "cut": 1.5, **facts}
    batch = pa.record_batch(columns, schema=schema)
    write_cleaned_pool(folder / "cleaned", [batch], schema, facts)


def sample(id: str, source: str, number: int, kept: list[int], truth: list[int]) -> dict[str, Any]:
    """Two prompt tokens and three response tokens with scores 3, 1, 2."""
    return {
        "id": id,
        "source": source,
        "ids": [5, 6, 7, 8, 9],
        "mask": [0, 0, 1, 1, 1],
        "base": [0.0, 0.0, 4.0, 2.0, 3.0],
        "reference": [0.0, 0.0, 1.0, 1.0, 1.0],
        "kept": [0, 0, *kept],
        "truth": [0, 0, *truth],
        "round": number,
    }


def test_a_round_by_hand(tmp_path: Path) -> None:
    rows = [
        sample("a", "capital", 1, [1, 0, 1], [1, 1, -1]),
        sample("b", "glossary", 1, [1, 0, 0], [1, 0, 0]),
    ]
    write_pool(tmp_path, rows)
    found = read_round(tmp_path, None)
    assert found.cut == 1.5
    assert found.score == pytest.approx({"capital": 2, "glossary": 2, "all": 2})
    assert found.kept == pytest.approx({"capital": 2 / 3, "glossary": 1 / 3, "all": 1 / 2})
    # capital: informative scores 3 and 1 against 2: one pair of two
    assert found.mask["capital"].auroc == pytest.approx(0.5)
    assert found.mask["all"].precision == pytest.approx(2 / 3)
    write_pool(tmp_path / "real", rows, truth=False)
    assert read_round(tmp_path / "real", None).mask == {}


def self_evolving_run(folder: Path, evaluated: bool = True) -> Cell:
    """Two rounds; capital goes 4, 2, 0 of 4 and glossary 0, 2, 4 of 4."""
    final: Right = {"capital": [0] * 4, "glossary": [1] * 4}
    config = {
        "loop": {"arms": {"first": {"schedule": "warmup"}, "evolve": {}}},
        "model": {"base": {"name": "none"}},
    }
    arms: dict[str, Right] = {
        "base": {"capital": [1] * 4, "glossary": [0] * 4},
        "first": {"capital": [1] * 4, "glossary": [0] * 4},
        "full": final,
        "evolve": final,
    }
    write_run(folder, arms, config=config)
    for number in (1, 2):
        step = folder / "arms" / "evolve" / f"round_{number}"
        rows = [
            sample(f"{number}a", "capital", number, [1, 0, 1], [1, 1, -1]),
            sample(f"{number}b", "glossary", number, [1, 0, 0], [1, 0, 0]),
        ]
        write_pool(step, rows, cut=float(number))
        if evaluated and number == 1:
            accuracy = {s: Accuracy(2, 4) for s in ("capital", "glossary")}
            write_json(
                step / "result.json",
                ArmResult("evolve", accuracy={**accuracy, "all": Accuracy(4, 8)}).to_json(),
            )
    return Cell("main", 0, folder)


def test_round_tables(tmp_path: Path) -> None:
    cells = [self_evolving_run(tmp_path / "run")]
    text = report(["rounds"], cells, "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "rounds_evolve", 2)
    assert list(rows) == [(t, s) for t in (1, 2) for s in ("all", "capital", "glossary")]
    assert rows[2, "capital"]["cut (nats)"]["mean"] == 2
    assert rows[1, "capital"]["noise after"]["mean"] == 0.5
    assert rows[1, "capital"]["accuracy (%)"]["mean"] == 50
    assert rows[2, "capital"]["accuracy (%)"]["mean"] == 0  # the arm's own result
    families = rows_of(tmp_path / "study", "rounds_families_evolve")
    assert [
        families["capital"][c]["mean"] for c in ("base", "warm-up", "round 1", "round 2", "change")
    ] == [100, 100, 50, 0, -100]
    assert families["capital"]["group"] == "poor" and families["glossary"]["group"] == "rich"
    bound = rows_of(tmp_path / "study", "rounds_bound_evolve")[1]
    # 6 tokens, 3 informative; kept: 2 informative and 1 corrupted: 1 wrong keep, 1 wrong drop
    assert bound["M (tokens)"]["mean"] == 6 and bound["eta"]["mean"] == 0.5
    assert bound["eta^"]["mean"] == pytest.approx(1 / 3) and bound["r^"]["mean"] == 0.5
    assert "figures/rounds_evolve.png" in text and "Not evaluated" not in text


def test_rounds_that_were_not_evaluated_are_said(tmp_path: Path) -> None:
    cells = [self_evolving_run(tmp_path / "run", evaluated=False)]
    text = report(["rounds"], cells, "full", tmp_path / "study")
    assert "Not evaluated in every run: round 1" in text
    families = rows_of(tmp_path / "study", "rounds_families_evolve")
    assert families["capital"]["round 1"] is None and families["capital"]["group"] == "poor"


def path(*right: int, questions: int = 100) -> list[Accuracy]:
    return [Accuracy(n, questions) for n in right]


def test_who_gains() -> None:
    # 20 to 50 of 100: 0.30 against two standard errors of sqrt(.16 + .25) / 10 = 0.064
    assert trend([path(20, 50)])[0] == "rich"
    assert trend([path(50, 20)])[0] == "poor"
    # 20 to 28: 0.08 against 2 * sqrt(.16 + .2016) / 10 = 0.12
    assert trend([path(20, 28)])[0] == "unstable"
    # the seeds disagree, though their mean is a clear gain
    assert trend([path(0, 80), path(50, 49)])[0] == "unstable"
    # up, and back by more than twice its error on the way: 0.5 against 2 * sqrt(.09 + .24) / 10
    assert trend([path(20, 90, 40, 60)])[0] == "unstable"
    assert trend([path(20, 45, 43, 60)])[0] == "rich"
    change = trend([path(20, 50), path(10, 50)])[1]
    assert change is not None and change.values == pytest.approx((30, 40))


# -- figures of scores, examples -------------------------------------------------------------------


def test_scores_are_drawn_and_counted(tmp_path: Path) -> None:
    cells = [self_evolving_run(tmp_path / "run")]
    text = report(["scores"], cells, "full", tmp_path / "study")
    rows = rows_of(tmp_path / "study", "scores_evolve", 2)
    # informative tokens of a round: scores 3, 1 (capital) and 3 (glossary), two of three kept
    row = rows["round 1", "informative"]
    assert row["tokens"] == 3 and row["mean score (nats)"] == pytest.approx(7 / 3)
    assert row["kept share"] == pytest.approx(2 / 3) and row["cut (nats)"] == 1
    assert rows["round 1", "corrupted"]["mean base loss (nats)"] == 3
    with (tmp_path / "study" / "figures" / "scores_evolve.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 12 and {p["panel"] for p in points} == {"round 1", "round 2"}
    assert sum(p["class"] == "corrupted" and p["kept"] == "1" for p in points) == 2
    assert "figures/scores_evolve.png" in text


NASTY = "<script>alert('x')</script> *a* `b` | [c](d) & ~~e~~"
EXAMPLE = Example(
    "<id>",
    "capital",
    [
        Piece("Q? ", "prompt", None),
        Piece(NASTY, "kept", 1),
        Piece(" Rome", "dropped", -1),
        Piece(".", "kept", 0),
    ],
)


def test_the_page_escapes_everything() -> None:
    page = html_page("<title>", [{"rho": EXAMPLE, "<arm>": EXAMPLE}])

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.spans: list[tuple[str, str]] = []
            self.kind = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.add(tag)
            self.kind = dict(attrs).get("class", "") if tag == "span" else ""
            assert not {"src", "href"} & {name for name, _ in attrs}

        def handle_data(self, data: str) -> None:
            if self.kind:
                self.spans.append((self.kind, data))
                self.kind = ""

    reader = Reader()
    reader.feed(page)
    assert reader.tags <= {"html", "head", "meta", "title", "style", "body"} | {
        *("h1", "h2", "h3", "p", "div", "span")
    }
    assert ("kept", NASTY) in reader.spans and ("dropped corrupted", " Rome") in reader.spans
    assert ("kept uninformative", ".") in reader.spans and ("prompt", "Q? ") in reader.spans
    assert "http" not in page


def test_the_markdown_page_marks_and_escapes() -> None:
    page = markdown_page("t", [{"rho": EXAMPLE}])
    assert " ⟦<del>Rome</del>⟧\\." in page and "(2 of 3 kept)" in page
    assert "<script>" not in page and "\\*a\\*" in page and "\\`b\\`" in page and "\\|" in page


def test_examples_leave_out_what_no_arm_cleaned(tmp_path: Path, model_folder: Path) -> None:
    config = {"model": {"base": {"name": str(model_folder)}}, "loop": {}}
    arms = {name: {"capital": [1]} for name in ("full", "one", "two")}
    run = write_run(tmp_path / "run", arms, config=config)
    rows = [sample(f"s{i}", "capital", 1, [1, 0, 1], [1, 1, 1]) for i in range(4)]
    rows[0]["truth"][-1] = -1
    write_pool(run / "arms" / "one", rows)
    # s2 and s3 are D_0 of the other arm
    write_pool(run / "arms" / "two", [{**r, "round": int(i < 2)} for i, r in enumerate(rows)])
    write_pool(run / "arms" / "full", rows, selection={"rule": "full"})
    text = report(["examples"], [Cell("main", 0, run)], "full", tmp_path / "study")
    shown = stored(tmp_path / "study", "examples")
    assert shown["columns"] == ["source", "sample", "response tokens", "one keeps", "two keeps"]
    # the one with a corrupted token comes first
    assert shown["rows"] == [["capital", "s0", 3, 2, 2], ["capital", "s1", 3, 2, 2]]
    assert "(examples.html)" in text
    assert len(re.findall('class="arm"', (tmp_path / "study" / "examples.html").read_text())) == 4
    (run / "config.yaml").write_text("loop: {}\n")
    with pytest.raises(ValueError, match=r"config\.yaml does not name model\.base"):
        report(["examples"], [Cell("main", 0, run)], "full", tmp_path / "study")


def test_every_report_says_what_is_missing(tmp_path: Path) -> None:
    """Runs that measured nothing but losses, and cleaned nothing, still give every report."""
    run = tmp_path / "run"
    results = [ArmResult(n, validation_nll={"all": 2.0}).to_json() for n in ("base", "full", "a")]
    run.mkdir()
    write_json(run / "results.json", results)
    text = report(list(REPORTS), [Cell("main", 0, run)], "full", tmp_path / "study")
    for said in (
        "No accuracy was measured",
        "No mask was compared with a truth",
        "No arm of these runs is self-evolving",
        "No arm of these runs scored anything",
        "No arm of these runs cleaned anything",
    ):
        assert said in text
    assert "nan" not in text.lower().replace("finance", "")
