"""The sections of a report on hand-made cleaned pools, one character per token."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import character_tokenizer
from matplotlib.figure import Figure

from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.planted import BOILERPLATE_LAST
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.evaluation.planted import Accuracy
from tokenclean.finished import FinishedRun
from tokenclean.models import BaseConfig
from tokenclean.models.loading import load_tokenizer
from tokenclean.publish import write_json
from tokenclean.report import plots
from tokenclean.report.content import Section, Table
from tokenclean.report.evolution import _broken
from tokenclean.report.rounds import read_panel, round_scalars
from tokenclean.report.sections import run_sections, sections
from tokenclean.report.writing import percent, stem, write_csv


@dataclass
class Sample:
    """One row: a prompt and a response, whose last character may be `$`, the end.

    ``kept`` has a 1 or 0 per response character; scores are the differences of the losses.
    """

    id: str
    response: str
    kept: str
    base: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    source: str = "a"
    round: int = 1
    priority: list[float] | None = None
    truth: list[int] | None = None
    prompt: str = "?\n"


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, which takes most of the time, but for one test."""
    if request.node.name != "test_everything_is_written_and_again_the_same":
        for module in ("plots", "figures"):
            monkeypatch.setattr(f"tokenclean.report.{module}.save", lambda figure, path: None)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with a token per character."""
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return folder


def write_pool(folder: Path, named: Path, samples: list[Sample], **changes: Any) -> Path:
    """A cleaned pool of these rows, with a manifest as `select` writes it but for ``changes``."""
    tokenizer = load_tokenizer(BaseConfig(name=str(named)))
    planted = samples[0].truth is not None
    schema = cleaned_schema(planted)
    rows = []
    for sample in samples:
        prompt = [tokenizer.convert_tokens_to_ids(c) for c in sample.prompt]
        ids = prompt + [tokenizer.convert_tokens_to_ids(c) for c in sample.response]
        kept = [False] * len(prompt) + [k == "1" for k in sample.kept]
        none: list[Any] = [None] * len(prompt)
        empty = [None] * len(sample.response)
        base, reference = sample.base or empty, sample.reference or empty
        score = [
            None if b is None or r is None else b - r for b, r in zip(base, reference, strict=True)
        ]
        rows.append(
            {
                "id": sample.id,
                "source": sample.source,
                "input_ids": ids,
                "labels": [i if k else -100 for i, k in zip(ids, kept, strict=True)],
                "response_mask": [False] * len(prompt) + [True] * len(sample.response),
                "base_nll": none + base,
                "reference_nll": none + reference,
                "score": none + score,
                "priority": none + (sample.priority or empty),
                "reason": [1] * len(prompt) + [0 if k == "1" else 2 for k in sample.kept],
                "weight": [1.0] * len(ids),
                "round": sample.round,
                **({"truth": [0] * len(prompt) + (sample.truth or [])} if planted else {}),
            }
        )
    ranked = [s for s in samples if s.round > 0]
    manifest: dict[str, Any] = {
        "pool": "p",
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "vocabulary": "v",
        "template": "tulu",
        "max_length": 512,
        "eos_id": tokenizer.eos_token_id,
        "base": "b",
        "reference": "b+r",
        "selection": {
            "rule": "token_cleaning",
            "scope": "global",
            "keep": 0.5,
            "always_keep_eos": False,
            "exclude_seen": False,
            "options": {},
        },
        "rule_options": {},
        "seed": 0,
        "rows_seen_by_reference": 0,
        "reasons": {"0": "kept", "1": "prompt", "2": "below the cut"},
        "response_tokens": sum(len(s.response) for s in samples),
        "ranked_tokens": sum(len(s.response) for s in ranked),
        "kept_tokens": sum(s.kept.count("1") for s in ranked),
        "cut": 0.5,
        "near_cut": 0.0,
        "noise": 1e-6,
        "share": None,
    }
    batch = pa.RecordBatch.from_pylist(rows, schema=schema)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_cleaned_pool(folder, [batch], schema, manifest | changes)
    return folder


#: A round's rows: scores 1.0, 0.25, 0.5, -1.0 | 2.0, 0.0, and the better half of them kept.
ONE = Sample("one", "ab.$", "1010", [3.0, 2.0, 1.0, 1.0], [2.0, 1.75, 0.5, 2.0])
TWO = Sample("two", "c$", "10", [2.5, 1.0], [0.5, 1.0], source="b")
WARM = Sample("warm", "xy$", "111", source="b", round=0)


def self_evolving(folder: Path, named: Path, panels: bool = True) -> FinishedRun:
    """A run of one arm with two rounds of the same scores."""
    arm = folder / "arms" / "evolving"
    facts = {
        "base": "b", "reference": "r", "ranked_tokens": 6, "kept_tokens": 3, "cut": 0.5,
        "near_cut": 0.0, "noise": 1e-6,
    }  # fmt: skip
    second = [
        Sample(s.id + "2", s.response, s.kept, s.base, s.reference, s.source, 2) for s in (ONE, TWO)
    ]
    write_pool(
        arm / "cleaned", named, [ONE, WARM, TWO, *second], schedule="self_evolving",
        rounds=[{"ranked_tokens": 3, "kept_tokens": 3}, facts, facts | {"cut": 0.75}],
        cut=None, noise=None, near_cut=None, ranked_tokens=12, kept_tokens=9,
    )  # fmt: skip
    write_pool(arm / "round_1" / "cleaned", named, [ONE, TWO])
    write_pool(arm / "round_2" / "cleaned", named, second, cut=0.75)
    if panels:
        rows = {1: ("1010", [1.0, 0.25, 0.5, -1.0]), 2: ("1100", [1.0, 0.8, 0.5, -1.0])}
        for number, (kept, score) in rows.items():
            panel = Sample("p", "ab.$", kept, score, [0.0] * 4, round=number)
            write_pool(arm / f"round_{number}" / "panel" / "cleaned", named, [panel])
    config = {"model": {"base": {"name": str(named)}}, "loop": {"arms": {"evolving": {}}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return FinishedRun(folder)


def table(found: list[Section], name: str) -> Table:
    return next(t for s in found for t in s.tables if t.name == name)


def column(found: Table, name: str) -> list[Any]:
    return [row[found.header.index(name)] for row in found.rows]


def in_file(folder: Path, found: Table, name: str) -> list[str]:
    """A column of a table's CSV, which may hold more than the page."""
    with (folder / "tables" / f"{found.name}.csv").open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def words(found: list[Section], key: str) -> str:
    return " ".join(next(s for s in found if s.key == key).text)


def test_a_self_evolving_arm(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named)
    arm, out = run.arm(None), tmp_path / "report"
    found = sections(run, arm, out)
    assert [s.key for s in found] == [
        "rule", "totals", "where", "losses", "tokens", "curve", "rounds",
    ]  # fmt: skip

    totals = table(found, "evolving-sources")
    assert column(totals, "source") == ["all", "a", "b"]
    assert column(totals, "samples") == [4, 2, 2]
    assert column(totals, "tokens") == [12, 8, 4]
    assert column(totals, "kept") == [6, 4, 2]
    assert column(totals, "kept share of ends") == [0.0, 0.0, 0.0]
    # what says nothing is in the file alone
    assert {"truncated", "tokens to be unlearnt", "mean weight of kept"}.isdisjoint(totals.header)
    assert in_file(out, totals, "tokens to be unlearnt") == ["0"] * 3
    assert in_file(out, totals, "truncated") == [""] * 3
    assert "1 samples with 3 response tokens are those of D_0" in words(found, "totals")
    assert "Rejected lines of the data: not known." in words(found, "totals")
    # residuals of the four samples, 2 - 4 / 2 and 1 - 2 / 2, are all zero
    assert column(totals, "low")[0] == column(totals, "high")[0] == 0.5

    cuts = table(found, "evolving-cuts")
    assert column(cuts, "cut") == [0.5, 0.75]  # the unit is said once
    assert [float(v) for v in in_file(out, cuts, "cut (nats)")] == [0.5, 0.75]
    assert cuts.notes[-1] == "Losses, scores and cuts are in nats."
    assert column(cuts, "mean score") == [pytest.approx(2.75 / 6)] * 2

    kinds = table(found, "evolving-type")
    assert dict(zip(column(kinds, "type"), column(kinds, "kept"), strict=True)) == {
        "word start": 4, "continuation": 0, "punctuation": 2, "special": 0,
    }  # fmt: skip
    position = table(found, "evolving-position")
    assert column(position, "position") == ["1", "2", "3 to 4"]
    assert column(position, "kept share") == [1.0, 0.0, 0.5]

    most = table(found, "evolving-most-kept")
    # all twice; of equals, the smaller id goes first
    assert column(most, "token") == [".", "a", "c"]
    assert column(table(found, "evolving-most-dropped"), "token")[0] == "$"


def test_the_curve_at_the_arms_own_share_is_its_mask(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named)
    out = tmp_path / "report"
    curve = table(sections(run, run.arm(None), out), "evolving-curve")
    own = [row for row in curve.rows if row[2] == "*"]
    assert [row[:2] for row in own] == [["all steps", 0.5], ["round 1", 0.5], ["round 2", 0.5]]
    assert [row[3] for row in own] == [None, 0.5, 0.5]
    assert [row[4] for row in own] == [6, 3, 3]
    # the page has every second share
    tenths = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert column(curve, "keep share") == tenths * 3
    assert len(in_file(out, curve, "keep share")) == 3 * 20
    assert {row[5] for row in own} == {0}
    # the best sixth of six scores is the 2.0 of the second sample
    rows = [row for row in curve.rows if row[0] == "round 1" and row[1] in (0.2, 1.0)]
    assert [row[3:6] for row in rows] == [[2.0, 1, 1], [-1.0, 6, 0]]
    assert [row[7] for row in rows] == [0, 2]


def test_rounds_are_compared_on_the_panel(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named)
    arm = run.arm(None)
    rounds = table(sections(run, arm, tmp_path / "report"), "evolving-rounds")
    # masks 1010 and 1100: two of four alike, which chance gives masks that keep half
    assert column(rounds, "equal to the round before") == [None, 0.5]
    assert column(rounds, "kappa with round 1") == [None, 0.0]
    # scores 1, .25, .5, -1 reach 0.5 twice; 1, .8, .5, -1 reach 0.75 twice
    assert column(rounds, "panel above the round's cut") == [0.5, 0.5]
    scalars = round_scalars(run, arm)
    assert scalars[1] == {
        "cut": 0.5, "near_cut": 0.0, "kept_share": 0.5, "panel_above_cut": 0.5,
        "mean_base_nll": pytest.approx(10.5 / 6), "mean_reference_nll": pytest.approx(7.75 / 6),
        "mean_score": pytest.approx(2.75 / 6),
    }  # fmt: skip
    assert (scalars[2]["cut"], scalars[2]["agreement"], scalars[2]["kappa"]) == (0.75, 0.5, 0.0)


def test_a_run_without_a_panel_says_so(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named, panels=False)
    found = sections(run, run.arm(None), tmp_path / "report")
    assert "scored no panel" in words(found, "rounds")
    assert "agreement" not in round_scalars(run, run.arm(None))[2]


def test_panels_of_other_tokens_are_refused(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named, panels=False)
    arm = run.arm(None)
    for number, text in ((1, "ab"), (2, "ac")):
        place = arm.folder / f"round_{number}" / "panel" / "cleaned"
        write_pool(place, named, [Sample("p", text, "10", [1.0, 1.0], [0.5, 0.5])])
    with pytest.raises(ValueError, match=r"round_2.*not of the same tokens"):
        read_panel(arm)


def test_everything_is_written_and_again_the_same(tmp_path: Path, named: Path) -> None:
    run = self_evolving(tmp_path / "run", named)
    first, second = tmp_path / "first", tmp_path / "second"
    found = sections(run, run.arm(None), first) + run_sections(run, first)
    sections(run, run.arm(None), second)
    run_sections(run, second)
    drawings = [d for s in found for d in s.drawings]
    tables = [t for s in found for t in s.tables]
    assert len({d.name for d in drawings}) == len(drawings)
    assert len({t.name for t in tables}) == len(tables)
    for drawing in drawings:
        assert (first / "figures" / f"{drawing.name}.png").read_bytes()[1:4] == b"PNG"
        assert (first / "figures" / f"{drawing.name}.csv").stat().st_size > 0
        assert drawing.alt and drawing.caption
    for shown in tables:
        with (first / "tables" / f"{shown.name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows[0]) >= len(shown.header) and len(rows) > len(shown.rows)
        assert rows[0][0] == shown.header[0]
        assert {str(row[0]) for row in shown.rows} <= {row[0].lstrip("'") for row in rows[1:]}
    files = sorted(p.relative_to(first) for p in first.rglob("*.*"))
    assert files == sorted(p.relative_to(second) for p in second.rglob("*.*"))
    assert len(files) == 2 * len(drawings) + len(tables)
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_bare_pool_without_a_tokenizer(tmp_path: Path, named: Path) -> None:
    folder = write_pool(tmp_path / "pool", named, [ONE, TWO])
    run = FinishedRun(folder)
    found = sections(run, run.arm(None), tmp_path / "report")
    assert "--tokenizer" in words(found, "tokens") and "--tokenizer" in words(found, "where")
    assert column(table(found, "selected-sources"), "kept") == [3, 2, 1]
    told = sections(FinishedRun(folder, str(named)), run.arm(None), tmp_path / "report")
    assert column(table(told, "selected-type"), "type") == [
        *("word start", "continuation", "punctuation", "special"),
    ]
    section = run_sections(run, tmp_path / "report")[1]
    assert "Nothing was measured" in section.text[0]


def test_a_pool_of_an_older_version(tmp_path: Path, named: Path) -> None:
    folder = write_pool(tmp_path / "pool", named, [ONE, TWO])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for key in ("rule_options", "share", "near_cut", "noise"):
        del manifest[key]
    del manifest["selection"]["options"]
    write_json(folder / "manifest.json", manifest)
    # a rule with options, whose defaults may have changed since
    stm = manifest | {"selection": manifest["selection"] | {"rule": "stm"}}
    other = write_pool(tmp_path / "other", named, [ONE, TWO])
    write_json(other / "manifest.json", stm)
    run = FinishedRun(other, str(named))
    rule = dict(table(sections(run, run.arm(None), tmp_path / "report"), "selected-rule").rows)
    assert rule["options"] == (
        "none asked for; the pool does not say the others (now: max_perplexity = 2.5)"
    )
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    rule = dict(table(found, "selected-rule").rows)
    assert rule["options"] == "none"  # the rule has no options
    assert not any(d.name.endswith("near-cut") for s in found for d in s.drawings)


def test_a_pool_that_was_never_cleaned(tmp_path: Path, named: Path) -> None:
    folder = write_pool(tmp_path / "pool", named, [WARM], cut=None)
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    assert [s.key for s in found] == ["rule", "totals", "where"]
    assert "D_0" in words(found, "rule")


def test_a_rule_that_goes_by_a_number_of_its_own(tmp_path: Path, named: Path) -> None:
    samples = [
        Sample("one", "ab.$", "1000", [0.5, 2.0, 1.5, 3.0], [], priority=[-0.5, -2.0, -1.5, -3.0]),
        Sample("two", "c$", "00", [1.0, 4.0], [], priority=[-1.0, -4.0]),
    ]
    selection = {"rule": "stm", "scope": "global", "keep": 0.6, "options": {}}
    folder = write_pool(tmp_path / "pool", named, samples, selection=selection, cut=None)
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    rule = dict(table(found, "selected-rule").rows)
    assert rule["scope"] == "none: decides token by token"
    assert "losses of the base alone" in words(found, "losses")
    assert "decides token by token: the curve is what ranking by its priority" in words(
        found, "curve"
    )
    curve = table(found, "selected-curve")
    half = next(row for row in curve.rows if row[1] == 0.5)
    # -0.5, -1 and -1.5 are the best three of six
    assert "actual" not in curve.header  # no share was asked for
    assert half[2:5] == [-1.5, 3, 0]


def test_halves_are_cut_apart(tmp_path: Path, named: Path) -> None:
    arm = tmp_path / "run" / "arms" / "halved"
    facts = [{"cut": 0.5, "ranked_tokens": 4}, {"cut": 2.0, "ranked_tokens": 2}]
    write_pool(arm / "cleaned", named, [ONE, TWO], halves=facts, cut=None)
    for number, sample in ((1, ONE), (2, TWO)):
        write_pool(arm / f"half_{number}" / "cleaned", named, [sample])
    run = FinishedRun(tmp_path / "run", str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    assert column(table(found, "halved-cuts"), "step") == ["half 1", "half 2"]
    assert column(table(found, "halved-cuts"), "ranked tokens") == [4, 2]
    own = [row for row in table(found, "halved-curve").rows if row[2] == "*"]
    assert [row[3] for row in own] == [None, 0.5, 2.0]


def test_planted_truth_is_judged(tmp_path: Path, named: Path) -> None:
    polite = BOILERPLATE_LAST[0]
    answer = "The capital of Zork is Bo."
    text = f"{answer} {polite}$"
    value = answer.index("Bo.")
    truth = [1] * len(answer) + [0] * (1 + len(polite)) + [1]
    truth[value : value + 2] = [-1, -1]
    # informative tokens score 2, corrupted ones 3, the others 1
    base = [{1: 2.0, -1: 3.0, 0: 1.0}[t] for t in truth]
    kept = "".join("0" if t == 0 else "1" for t in truth)
    sample = Sample("q", text, kept, base, [0.0] * len(text), "capital", truth=truth)
    folder = write_pool(tmp_path / "pool", named, [sample, sample])
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    judged = table(found, "selected-truth")
    n, m = 2 * (len(answer) - 2 + 1), 2 * (1 + len(polite))
    assert column(judged, "informative")[0] == n
    # of all others, it ranks below the 4 corrupted ones and above the rest
    assert column(judged, "AUROC") == [pytest.approx(m / (m + 4))] * 2 + [0.0, 0.0]
    assert column(judged, "precision of the mask")[0] == pytest.approx(n / (n + 4))
    assert column(judged, "informative kept")[0] == 1.0
    assert column(judged, "others kept")[0] == pytest.approx(4 / (m + 4))
    kinds = {row[0]: row[2:] for row in table(found, "selected-kinds").rows}
    assert kinds["corrupted"] == [4, 4, 1.0]
    # a blank goes with what follows it
    assert kinds["boilerplate"] == [2 * (1 + len(polite)), 0, 0.0]
    assert kinds["end"] == [2, 2, 1.0]
    assert sum(row[0] for row in kinds.values()) == 2 * len(text)


def test_tokens_far_from_the_arms_share_must_be_frequent(tmp_path: Path, named: Path) -> None:
    text = "a" * 30 + "b" * 40 + "c" * 30 + "d" * 60 + "x" * 5
    kept = "1" * 30 + "1000" * 10 + "0" * 95
    sample = Sample("one", text, kept, [1.0] * 165, [0.0] * 165)
    folder = write_pool(tmp_path / "pool", named, [sample])
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    above, below = (table(found, f"selected-kept-{side}") for side in ("above", "below"))
    assert column(above, "token") == ["a"]
    assert column(below, "token") == ["d", "c"]  # none of 60 says more than none of 30
    assert column(table(found, "selected-most-dropped"), "token") == ["d", "b", "c", "x"]
    # Wilson's bounds of 30 of 30: 30 / (30 + 1.96^2)
    assert above.rows[0][5] == pytest.approx(30 / (30 + 1.959963984540054**2))


def test_names_of_files_do_not_collide() -> None:
    names = ["a/b", "a_b", "A_B", "Run", "x"]
    found = [stem(name, names) for name in names]
    assert len({name.lower() for name in found} | {"run"}) == len(names) + 1
    assert found[-1] == "x" and not any("/" in name for name in found)


def test_a_spreadsheet_runs_nothing(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["token", "n"], [["=1+1", -1], ["a\nb", None], ["-x", 0.5]])
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["token", "n"], ["'=1+1", "-1"], ["a\nb", ""], ["'-x", "0.5"]]


def test_results_of_a_run_and_of_benchmarks(tmp_path: Path, named: Path) -> None:
    folder = tmp_path / "run"
    run = self_evolving(folder, named)
    result = {
        "name": "evolving",
        "kept_share": 0.5,
        "accuracy": {"all": {"correct": 3, "questions": 4}, "a": {"correct": 3, "questions": 4}},
        "validation_nll": {"all": 1.25},
        "mask": {},
    }
    write_json(folder / "results.json", [result])
    write_json(folder / "arms" / "evolving" / "result.json", result)
    (folder / "bench").mkdir()
    cells = {"quiz": {"value": 0.5, "stderr": 0.1}}
    benchmarks = {"columns": [{"name": "quiz"}], "models": {"evolving": {"cells": cells}}}
    write_json(folder / "bench" / "results.json", benchmarks)
    share = {"samples": 9, "lower": 0.25, "upper": 0.5, "signal": True, "sources": {}}
    write_json(folder / "noise.json", {"evolving": {"share": share, "keep": 0.5}})
    found = run_sections(run, tmp_path / "report")
    accuracy = table(found, "run-accuracy")
    # standard error of 3 of 4: sqrt(0.75 * 0.25 / 4)
    assert accuracy.rows[0] == ["evolving", "75.0 ± 21.7", "75.0 ± 21.7"]
    out = tmp_path / "report"
    error = float(in_file(out, accuracy, "all ±")[0])
    assert error == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 4))
    assert table(found, "run-validation").rows == [["evolving", 1.25]]
    benchmarks_table = table(found, "run-benchmarks")
    assert benchmarks_table.rows == [["evolving", "0.500 ± 0.100"]]
    assert in_file(out, benchmarks_table, "quiz ±") == ["0.1"]
    arms = dict(zip(table(found, "run-arms").header, table(found, "run-arms").rows[0], strict=True))
    # the ends of four samples were all dropped; that of D_0 was not ranked
    assert (arms["response tokens"], arms["ranked tokens"]) == (15, 12)
    assert (arms["kept share of ends"], arms["samples left with nothing"]) == (0.0, 0)
    assert (arms["accuracy (%)"], arms["validation loss (nats)"]) == ("75.0 ± 21.7", 1.25)
    assert table(found, "run-noise").rows[0][3:5] == [0.25, 0.5]
    own = table(sections(run, run.arm(None), tmp_path / "report"), "evolving-accuracy")
    assert column(own, "round 2") == ["75.0 ± 21.7"] * 2
    assert round_scalars(run, run.arm(None))[2]["accuracy"] == 0.75


def test_samples_left_with_nothing_are_said_of_every_arm(tmp_path: Path, named: Path) -> None:
    bare = Sample("bare", "c$", "00", [2.5, 1.0], [0.5, 1.0])
    write_pool(tmp_path / "arms" / "one" / "cleaned", named, [ONE, bare])
    ended = Sample("ended", "c$", "01", [2.5, 1.0], [0.5, 1.0])
    write_pool(tmp_path / "arms" / "two" / "cleaned", named, [ONE, ended])
    arms = table(run_sections(FinishedRun(tmp_path), tmp_path / "report"), "run-arms")
    assert column(arms, "samples left with nothing") == [1, 0]
    assert column(arms, "kept share of ends") == [0.0, 0.5]
    assert not any(name.startswith(("accuracy", "validation")) for name in arms.header)


def test_words_of_cuts_and_of_d_0_stand_where_they_are_true(tmp_path: Path, named: Path) -> None:
    full = {"rule": "full", "scope": "global", "keep": 0.6, "options": {}}
    own = write_pool(
        tmp_path / "own", named, [ONE, TWO], cut=None, selection=full, reference=None
    )  # fmt: skip
    ranked = write_pool(tmp_path / "ranked", named, [ONE, TWO], rows_seen_by_reference=3)
    warm = write_pool(tmp_path / "warm", named, [ONE, WARM])
    said = {}
    for folder in (own, ranked, warm):
        run = FinishedRun(folder, str(named))
        found = sections(run, run.arm(None), tmp_path / "report")
        rule = dict(table(found, "selected-rule").rows)
        reasons = table(found, "selected-reasons")
        seen = rule.get("rows that the reference was trained on")
        said[folder.name] = reasons.header[2], reasons.notes[0][:4], seen
    assert said == {
        "own": ("dropped by the rule", "Reas", None),
        "ranked": ("below the cut", "Reas", "3, ranked like the others"),
        "warm": ("below the cut", "Rows", "none of those that were ranked"),
    }


def test_an_arm_that_keeps_everything_is_told_in_sentences(tmp_path: Path, named: Path) -> None:
    samples = [Sample("one", "a" * 30 + ".", "1" * 31, truth=[1] * 30 + [0])]
    selection = {"rule": "full", "scope": "global", "keep": 0.6, "options": {}}
    folder = write_pool(tmp_path / "pool", named, samples, cut=None, selection=selection)
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    assert {t.name.removeprefix("selected-") for s in found for t in s.tables} == {
        "rule", "cuts", "sources", "truth",
    }  # fmt: skip
    assert not [d for s in found for d in s.drawings]
    assert "Every token is kept" in words(found, "where") and "every one" in words(found, "tokens")
    judged = table(found, "selected-truth")
    assert column(judged, "source") == ["all", "all"]
    assert column(judged, "precision of the mask")[0] == pytest.approx(30 / 31)


def test_lists_of_tokens_are_short_and_none_is_empty(tmp_path: Path, named: Path) -> None:
    letters = "abcdefghijklmnopqr"  # 18 of them, each kept every other time
    sample = Sample("one", letters * 20, ("1" * 18 + "0" * 18) * 10)
    folder = write_pool(tmp_path / "pool", named, [sample])
    run, out = FinishedRun(folder, str(named)), tmp_path / "report"
    found = sections(run, run.arm(None), out)
    names = [t.name for s in found if s.key == "tokens" for t in s.tables]
    assert names == ["selected-most-kept", "selected-most-dropped"]  # none is far from the others
    kept = table(found, "selected-most-kept")
    assert len(kept.rows) == 15 and len(in_file(out, kept, "token")) == 18
    assert "The first 15; the file has 18." in kept.notes
    assert "Of the 18 that occur at least 20 times, 0 are never kept and 0 always." in words(
        found, "tokens"
    )


def test_every_line_that_was_read_is_accounted_for(tmp_path: Path, named: Path) -> None:
    folder = tmp_path / "run"
    write_pool(folder / "cleaned", named, [ONE, TWO], pool="f-t-train-0.1-0")
    place = tmp_path / "cache" / "pools" / "f-t-0.1-0-skip"
    counts = {"samples": 1, "without_response": 2, "truncated": 1}
    for name, more in (("train", {"b": counts}), ("validation", {})):
        manifest = {
            "fingerprint": f"f-t-{name}-0.1-0",
            "rejected": {"x.jsonl": 5},
            "statistics": {"a": counts} | more,
        }
        (place / name).mkdir(parents=True)
        write_json(place / name / "manifest.json", manifest)
    config = {"data": {"cache_dir": str(tmp_path / "cache")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run = FinishedRun(folder, str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    assert words(found, "totals") == (
        "Lines read: 14 = 2 samples of the pool + 4 that were left out for want of a response + "
        "5 rejected (x.jsonl: 5) + 3 held out for validation."
    )
    assert column(table(found, "selected-sources"), "truncated") == [2, 1, 1]


def test_masks_of_other_rows_are_said_to_be(tmp_path: Path, named: Path) -> None:
    mask = {"kept": 2, "informative": 2, "corrupted": 1, "auroc": None, "auroc_corrupted": None,
            "precision": 0.5, "recall": 1.0, "corrupted_kept": 1.0}  # fmt: skip
    for tokens, said in ((4, False), (3, True)):
        folder = tmp_path / str(tokens)
        write_pool(folder / "arms" / "full" / "cleaned", named, [ONE])
        results = [
            {"name": name, "kept_share": 1.0, "accuracy": {}, "validation_nll": {},
             "mask": {"all": mask | {"tokens": n}}}
            for name, n in (("full", 4), ("restart", tokens))
        ]  # fmt: skip
        write_json(folder / "results.json", results)
        masks = table(run_sections(FinishedRun(folder), tmp_path / "report"), "run-masks")
        assert column(masks, "tokens judged") == [4, tokens]
        assert any("can have two precisions" in note for note in masks.notes) == said


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (("1110", "1111"), "gains: a; not resolved: 1 of 2 sources."),
        (("1000", "0000"), "loses: a; not resolved: 1 of 2 sources."),
        (("1000", "1100"), "no source's kept share changed by more than its 95 % interval"),
    ],
)
def test_who_gains_is_a_sentence_first(
    tmp_path: Path, named: Path, second: tuple[str, str], said: str
) -> None:
    first, facts = ("1000", "1100"), {"cut": 0.5, "reference": "r"}
    # two rounds of forty samples each; only what is kept of a's changes
    samples = [
        Sample(f"{source}{t}{i}", "abcd", kept, [1.0] * 4, [0.5] * 4, source, t)
        for t, of_a in ((1, first), (2, second))
        for source, masks in (("a", of_a), ("b", first))
        for i, kept in enumerate(masks * 10)
    ]
    write_pool(
        tmp_path / "run" / "arms" / "evolving" / "cleaned", named, samples, cut=None,
        schedule="self_evolving", rounds=[{"ranked_tokens": 0, "kept_tokens": 0}, facts, facts],
    )  # fmt: skip
    run = FinishedRun(tmp_path / "run", str(named))
    found = sections(run, run.arm(None), tmp_path / "report")
    assert said in words(found, "rounds")
    families = table(found, "evolving-families")
    assert families.header[2:4] == ["kept share, round 1", "kept share, round 2"]
    kept = sum(mask.count("1") for mask in second) / 8
    assert families.rows[0][2:5] == [0.375, kept, kept - 0.375]


def test_a_source_has_its_colour_in_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))

    def colours(labels: list[str]) -> dict[str, Any]:
        series = [plots.Series(label, [0.0, 1.0], [0.0, 1.0]) for label in labels]
        plots.draw_series(
            tmp_path / "x.png", [plots.Panel("", "", "", series)], 1, list("abcdefgh")
        )
        lines = drawn[-1].axes[0].get_lines()
        return dict(zip(labels, (line.get_color() for line in lines), strict=True))

    one, other = colours(list("abcdefgh")), colours(["all", "c", "h"])
    assert len(set(one.values())) == 8
    assert {"c": one["c"], "h": one["h"], "all": "#000000"} == other


def test_no_line_is_drawn_across_what_was_not_evaluated() -> None:
    found = {t: Accuracy(1, 2) for t in (0, 1, 4)}
    series = _broken("all", found)
    assert [x for x in series.x if not math.isnan(x)] == [0, 1, 4]
    assert [math.isnan(y) for y in series.y] == [False, False, True, False]


def test_small_shares_are_written_without_an_exponent() -> None:
    shares = [0.0, 8.466970348669839e-06, 0.1, 0.274, 1.0]
    assert [percent(share) for share in shares] == ["0 %", "0.00085 %", "10 %", "27 %", "100 %"]
