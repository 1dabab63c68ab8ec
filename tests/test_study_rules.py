"""The report `rules`, on run folders written by hand; every expected number is worked out here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tokenclean.cleaning.results import ArmResult
from tokenclean.costs import Cost
from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.kinds import KIND_ROWS, KINDS, noise_kind, token_kinds
from tokenclean.data.pieces import token_texts
from tokenclean.data.planted import (
    BOILERPLATE_FIRST,
    BOILERPLATE_LAST,
    REGIMES,
    PlantedSettings,
    pool_rows,
    world,
)
from tokenclean.evaluation.planted import Accuracy, MaskQuality
from tokenclean.models import BaseConfig, load_tokenizer
from tokenclean.publish import write_json
from tokenclean.study.cells import Cell
from tokenclean.study.masks import kappa
from tokenclean.study.rules import describe, normalisation, reads
from tokenclean.study.tables import report

POLITE = {*BOILERPLATE_FIRST, *BOILERPLATE_LAST}
BASE = Path(__file__).parent.parent / "tokenclean" / "data" / "planted_base"


# -- kinds of tokens -------------------------------------------------------------------------------


def kinds(texts: list[str], truth: list[int], family: str, ends: bool = True) -> list[str]:
    return [KINDS[i] for i in token_kinds(texts, np.array(truth), family, ends)]


def test_kinds_by_hand() -> None:
    texts = ["Thank", " you", " for", " asking", ".", " Far", "oss", " sells", " pale", " salt"]
    texts += [".", " See", " page", " 4", " of", " volume", " 3", "3", ".", "</s>"]
    truth = [0] * 5 + [1] * 6 + [0] * 8 + [1]
    assert kinds(texts, truth, "export") == (
        ["boilerplate"] * 5
        + ["frame", "frame", "frame", "value", "value", "frame"]
        + ["ledger"] * 8
        + ["end"]
    )
    # a wrong value; a response that is cut off before its end
    texts, truth = ["The", " capital", " of", " X", " is", " Y"], [1, 1, 1, 1, 1, -1]
    assert kinds(texts, truth, "capital", ends=False) == ["frame"] * 5 + ["corrupted"]


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        (BOILERPLATE_FIRST[1], "boilerplate"),
        (BOILERPLATE_LAST[2], "boilerplate"),
        ("Shelf mark 12-c-34.", "ledger"),
        ("A moth slept under the bell.", "tale"),
        ("The road from Klum to Bretok was red.", "tale"),
        ("Klumdia sells pale salt.", "fact"),
        ("The word grinu means red.", "fact"),
    ],
)
def test_sentences_are_told_apart(sentence: str, kind: str) -> None:
    assert noise_kind(sentence) == kind


@pytest.mark.parametrize("stray", ["tale", "fact", "ledger"])
def test_kinds_of_the_generators_own_responses(stray: Any) -> None:
    """Every off-topic sentence is of one kind: what is not polite must be found to be that."""
    tokenizer = load_tokenizer(BaseConfig(name=str(BASE)))
    settings = PlantedSettings(
        samples=80, irrelevant=0.7, irrelevant_kinds=(stray,), irrelevant_sentences=2, multi_turn=0
    )
    answers = 0
    for row in pool_rows(settings):
        text = row["messages"][-1]["content"]
        label = np.ones(len(text), dtype=int)
        for _, start, stop, value in row["truth"]:
            label[start:stop] = value
        texts = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
        assert "".join(texts) == text
        starts = np.cumsum([0, *(len(t) for t in texts[:-1])])
        first = [s + len(t) - len(t.lstrip()) for s, t in zip(starts, texts, strict=True)]
        found = kinds(texts, [int(label[i]) for i in first], row["source"], ends=False)
        pieces: dict[str, str] = {}
        for kind, word in zip(found, texts, strict=True):
            pieces[kind] = pieces.get(kind, "") + word
        planted = {"irrelevant": stray}
        noise = {planted.get(n, n) for n in row["noise"]}
        assert set(pieces) == {"frame", *noise, *([] if "corrupted" in noise else ["value"])}
        assert pieces.get("boilerplate", " Thank you for asking.").strip() in POLITE
        if "value" in pieces:
            answers += 1
            assert pieces["value"].strip() in world().families[row["source"]].facts.values()
    assert answers > 30


# -- agreement -------------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    one = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    other = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], dtype=bool)
    # agree on 7 of 10; by chance on .4 * .5 + .6 * .5 = .5
    assert kappa(one, other) == pytest.approx((0.7 - 0.5) / 0.5)
    assert kappa(one, one) == 1.0
    # opposite: agree nowhere; by chance on .4 * .6 + .6 * .4 = .48
    assert kappa(one, ~one) == pytest.approx(-0.48 / 0.52)
    assert kappa(one, np.ones(10, dtype=bool)) == 0.0
    assert math.isnan(kappa(np.ones(3, dtype=bool), np.ones(3, dtype=bool)))
    assert math.isnan(kappa(one[:0], one[:0]))


# -- what an arm is --------------------------------------------------------------------------------


def test_arms_in_words() -> None:
    rho = {"schedule": "fixed_model", "rule": "token_cleaning", "scope": "sample"}
    assert describe(rho) == "token_cleaning per sample"
    assert reads(rho) == (
        "base.nll, reference.nll",
        "a pass of the base; the reference and its pass",
    )
    crossed = {
        "schedule": "cross_fitted",
        "rule": "contradiction",
        "scope": "global",
        "options": {"max_gap": 2.0},
    }
    assert describe(crossed) == "contradiction (max_gap: 2.0), cross_fitted"
    assert reads(crossed) == ("reference.gap", "two references and their passes")
    assert reads({"schedule": "fixed_model", "rule": "random"}) == ("nothing", "none")
    online = {"schedule": "fixed_model", "rule": "full", "weighting": "rho1_online"}
    assert describe(online) == "full, weights rho1_online"
    assert reads(online) == ("reference.nll", "the reference and its pass")
    assert normalisation(online) == "weighted sum / sum of weights"
    assert normalisation({**online, "weighting": "dft"}) == "weighted sum / trained tokens"
    assert normalisation(rho) == "mean over kept tokens"
    forgetting = normalisation({"schedule": "fixed_model", "rule": "forgetting"})
    assert forgetting == "mean over positives - lambda x mean over negatives"


# -- the report ------------------------------------------------------------------------------------

#: Two samples of three response tokens: "Faross sells salt" is no answer of the generator, so all
#: that is informative is frame; truth and base losses are what matters here.
TRUTH = {"a": [1, 0, -1], "b": [1, 1, 0]}
BASE_NLL = {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}
REFERENCE_NLL = {"a": [0.5, 2.5, 3.0], "b": [1.0, 1.0, 6.5]}
SOURCES = {"a": "capital", "b": "glossary", "seen": "capital"}


def write_pool(
    folder: Path,
    kept: dict[str, list[int]],
    scored: bool = False,
    weights: dict[str, list[float]] | None = None,
    reasons: dict[str, list[int]] | None = None,
    order: tuple[str, ...] = ("a", "b"),
) -> None:
    """A cleaned pool of two prompt tokens and three response tokens per sample."""
    schema = cleaned_schema(True)
    tokenizer = load_tokenizer(BaseConfig(name=str(BASE)))
    ids = tokenizer("<|user|> Hm Faross sells salt", add_special_tokens=False)["input_ids"][-5:]

    def at(values: list[Any] | None) -> list[Any]:
        return [None, None, *(values or [None] * 3)]

    rows = []
    for id in order:
        mask = kept.get(id, [1, 1, 1])
        weight = (weights or {}).get(id, [1.0, 1.0, 1.0])
        base, reference = BASE_NLL.get(id), REFERENCE_NLL.get(id)
        score = None
        if base and reference:
            score = [b - r for b, r in zip(base, reference, strict=True)]
        rows.append(
            {
                "id": id,
                "source": SOURCES[id],
                "input_ids": ids,
                "labels": [-100, -100, *np.where(mask, ids[2:], -100).tolist()],
                "response_mask": [False, False, True, True, True],
                "base_nll": at(base if scored else None),
                "reference_nll": at(reference if scored else None),
                "score": at(score if scored else None),
                "priority": at(None),
                "reason": [1, 1, *(reasons or {}).get(id, [0 if k else 2 for k in mask])],
                "weight": [1.0, 1.0, *weight],
                "round": 0 if id == "seen" else 1,
                "truth": [0, 0, *TRUTH.get(id, [1, 1, 1])],
            }
        )
    batch = pa.RecordBatch.from_pylist(rows, schema=schema)
    write_cleaned_pool(folder / "cleaned", [batch], schema, {"eos_id": 1, "selection": {}})


ARMS: dict[str, dict[str, Any]] = {
    "full": {"schedule": "fixed_model", "rule": "full"},
    "random": {"schedule": "fixed_model", "rule": "random", "scope": "global"},
    "token_cleaning": {"schedule": "fixed_model", "rule": "token_cleaning"},
    "self_evolving": {"schedule": "self_evolving", "rule": "token_cleaning"},
    "forgetting": {"schedule": "fixed_model", "rule": "forgetting", "keep": 0.7},
    "xtf_paper": {"schedule": "fixed_model", "rule": "xtf_paper"},
    "rho1_online": {"schedule": "fixed_model", "rule": "full", "weighting": "rho1_online"},
}
SHARES = {"full": 1.0, "random": 0.5, "rho1_online": 1.0, "xtf_paper": 1 / 3}


def write_run(folder: Path, seed: int) -> Cell:
    """Every arm answers one question more than the arm before it, out of twenty."""
    folder.mkdir(parents=True)
    results = []
    for number, arm in enumerate(["base", *ARMS]):
        place = folder / ("base" if arm == "base" else f"arms/{arm}")
        place.mkdir(parents=True)
        right = [i < number + seed for i in range(20)]
        tokens = MaskQuality(6, 3, 3, 1, 0.75, math.nan, 2 / 3, 2 / 3, 0.0)
        result = ArmResult(
            arm,
            None if arm == "base" else SHARES.get(arm, 0.6),
            {s: Accuracy(sum(right), 20) for s in ("capital", "all")},
            {},
            {"all": tokens} if arm == "token_cleaning" else {},
        )
        results.append(result.to_json())
        write_json(place / "answers.json", {"capital": {f"q{i}": x for i, x in enumerate(right)}})
    write_json(folder / "results.json", results)
    config = {"loop": {"arms": ARMS}, "model": {"base": {"name": str(BASE)}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def pool(arm: str, *kept: list[int], **options: Any) -> None:
        write_pool(folder / "arms" / arm, dict(zip("ab", kept, strict=True)), **options)

    pool("full", [1, 1, 1], [1, 1, 1])
    pool("rho1_online", [1, 1, 1], [1, 1, 1])
    pool("random", [1, 0, 1], [0, 1, 0])
    pool("token_cleaning", [1, 0, 0], [1, 1, 0], scored=True)
    pool("self_evolving", [1, 0, 0], [0, 1, 0], order=("seen", "b"))
    signs = {"a": [1.0, -1.0, -1.0], "b": [1.0, 1.0, -1.0]}
    pool("forgetting", [1, 1, 1], [1, 1, 1], weights=signs)
    # 5 reasoning, 6 novelty, 8 relevance, 10 = 4 + novelty + relevance
    pool("xtf_paper", [1, 0, 0], [0, 0, 1], reasons={"a": [0, 6, 10], "b": [5, 8, 0]})
    rows = [
        Cost("shared", "train", 0, 7.0, 6.0, peak_memory=3_000_000),
        Cost("shared", "score", None, 2.0 + seed, 1.0),
        Cost("random", "select", None, 1.0),
        Cost("random", "train", None, 4.0, 3.0, peak_memory=5_000_000),
        Cost("random", "evaluate", None, 50.0, 40.0, peak_memory=9_000_000),
    ]
    write_json(folder / "costs.json", {"wall_seconds": 1.0, "rows": [asdict(r) for r in rows]})
    return Cell("main", seed, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("rules")
    cells = [write_run(place / f"seed_{seed}", seed) for seed in (0, 1)]
    return place / "study", report(["rules"], cells, "random", place / "study")


def rows_of(folder: Path, name: str) -> dict[Any, dict[str, Any]]:
    tables = json.loads((folder / "tables.json").read_text())["tables"]
    found = next(t for t in tables if t["name"] == name)
    return {row[0]: dict(zip(found["columns"], row, strict=True)) for row in found["rows"]}


def test_one_row_per_arm(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules")
    assert list(rows) == ["base", *ARMS]
    row = rows["token_cleaning"]
    # three and four of twenty; random has two and three
    assert row["all"]["values"] == [15.0, 20.0] == row["known"]["values"]
    assert row["- `random`"]["values"] == [5.0, 5.0]
    assert rows["random"]["- `random`"] is None
    assert (row["kept share"]["mean"], row["AUROC"]["mean"]) == (0.6, 0.75)
    assert row["precision"]["mean"] == pytest.approx(2 / 3) and row["corrupted kept"]["mean"] == 0
    assert rows["xtf_paper"]["AUROC"] is None and rows["base"]["kept share"] is None


def test_the_control_has_the_nearest_share(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_difference")
    assert {arm: row["control"] for arm, row in rows.items()} == {
        "token_cleaning": "random",
        "self_evolving": "random",
        "forgetting": "random",
        "xtf_paper": "random",
        # 0.6 of every batch, though its pool keeps everything
        "rho1_online": "random",
    }
    assert rows["rho1_online"]["trained share"] == 0.6
    # seven and eight of twenty against two and three
    assert rows["rho1_online"]["all"]["values"] == [25.0, 25.0]


def test_marginals_by_hand(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_marginals")
    columns = ["base loss, kept", "base loss, dropped", "score, kept", "score, dropped"]

    def means(arm: str) -> list[float]:
        return [rows[arm][c] and rows[arm][c]["mean"] for c in columns]

    # scores: a 0.5, -0.5, 0; b 3, 4, -0.5
    assert means("token_cleaning") == pytest.approx([10 / 3, 11 / 3, 7.5 / 3, -1 / 3])
    # its own pool has no losses: those of token_cleaning serve
    assert means("random") == pytest.approx([3.0, 4.0, 1.5, 2 / 3], abs=1e-6)
    # what has a label and a negative weight is dropped
    assert means("forgetting") == pytest.approx(means("token_cleaning"))
    assert means("full")[1::2] == [None, None]
    # of two rows, one is of round 0 and one is shared: b, of which the middle token is kept
    assert means("self_evolving") == pytest.approx([5.0, 5.0, 4.0, 1.25])


def test_agreement_by_hand(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_kappa")
    # full and the online weights keep everything
    assert list(rows) == ["random", "token_cleaning", "self_evolving", "forgetting", "xtf_paper"]
    assert rows["token_cleaning"]["forgetting"]["mean"] == 1.0
    # token_cleaning 100 110, random 101 010: agree on 4 of 6; by chance on 1/2
    assert rows["token_cleaning"]["random"]["mean"] == pytest.approx((4 / 6 - 1 / 2) / (1 / 2))
    # over sample b alone: 110 against 010: agree on 2 of 3; by chance on 2/3 1/3 + 1/3 2/3 = 4/9
    assert rows["token_cleaning"]["self_evolving"]["mean"] == pytest.approx(
        (2 / 3 - 4 / 9) / (5 / 9)
    )
    assert "![rules_kappa](figures/rules_kappa.png)" in made[1]
    assert (made[0] / "figures" / "rules_kappa.png").read_bytes()[:4] == b"\x89PNG"


def test_costs_by_hand(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_costs")
    row = rows["random"]
    # selection and training; the evaluation is not the rule's
    assert row["seconds"]["mean"] == 5.0 and row["model seconds"]["mean"] == 3.0
    assert row["peak memory (MB)"]["mean"] == 5.0
    assert rows["shared: the warm-up"]["seconds"]["mean"] == 7.0
    assert rows["shared: all shared passes"]["seconds"]["values"] == [2.0, 3.0]
    assert "shared: references of the halves" not in rows


def test_xtfs_reasons_by_hand(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_reasons_xtf_paper")
    assert list(rows) == ["all", "capital", "glossary"]
    row = rows["all"]
    counts = {c: v["mean"] for c, v in row.items() if isinstance(v, dict)}
    assert counts["ranked"] == 6
    assert counts["reasoning importance"] == counts["knowledge novelty"] == 1
    assert counts["task relevance"] == counts["knowledge novelty + task relevance"] == 1
    assert counts["reasoning importance + knowledge novelty"] == 0
    assert counts["novelty in all (%)"] == pytest.approx(100 * 2 / 6)
    assert rows["capital"]["relevance in all (%)"]["mean"] == pytest.approx(100 / 3)
    # what the tokens are: a fact, corrupted, frames
    rows = rows_of(made[0], "rules_attributes_xtf_paper")
    assert list(rows) == list(KIND_ROWS)
    wrong = rows["corrupted, known"]
    assert (wrong["tokens"]["mean"], wrong["kept share"]["mean"]) == (1, 0)
    assert (wrong["reasoning"]["mean"], wrong["novelty"]["mean"]) == (0, 1)
    assert wrong["relevance"]["mean"] == 1
    frame = rows["frame, blank"]
    assert (frame["tokens"]["mean"], frame["reasoning"]["mean"]) == (2, 0.5)
    assert rows["fact"]["novelty"]["mean"] == 0.5 and rows["value, known"]["kept share"] is None


def test_what_is_kept_of_each_kind(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0], "rules_kinds")
    assert sum(rows["tokens"][kind]["mean"] for kind in KIND_ROWS) == 6
    assert set(KIND_ROWS) >= {f"value, {regime}" for regime in REGIMES.values()}
    # full and the online weights keep everything
    kept = ["random", "token_cleaning", "self_evolving", "forgetting", "xtf_paper"]
    assert list(rows) == ["tokens", *kept]
    assert rows["token_cleaning"]["frame, blank"]["mean"] == 1.0
    assert rows["token_cleaning"]["corrupted, known"]["mean"] == 0.0
    assert rows["random"]["frame, blank"]["mean"] == 0.5


def test_what_cannot_be_compared_has_a_reason(made: tuple[Path, str]) -> None:
    assert "1/T for every token" in made[1] and "### Not compared" in made[1]
    assert "2 seeds (0, 1)" in made[1]
