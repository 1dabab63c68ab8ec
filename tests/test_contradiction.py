"""The rule `contradiction` and the column it reads, from logits to a run's cleaned pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_loop import planted_file, run
from test_scoring import data_for, trainer_for
from transformers import AutoModelForCausalLM

from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.cleaning.arms import Arm, halves
from tokenclean.commands import select as select_verb
from tokenclean.data.cleaned import DATA
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, trained_ids
from tokenclean.publish import MANIFEST
from tokenclean.scoring import table as table_module
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.module import ScoringModule, score_pool
from tokenclean.scoring.table import Column, ScoreTable
from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.select import SelectionConfig, select

# -- the rule -------------------------------------------------------------------------------------

#: Four rows of 3, 2, 1 and 2 response tokens; the last of each is the end of the sequence.
GAPS = [0.0, 0.5, 3.0, 1.0, 1.125, 0.25, 7.0, 40.0]
COUNTS = [3, 2, 1, 2]
SEEN = [False, True, False, False]


def blocks(cuts: list[int], gaps: list[float] = GAPS) -> Any:
    counts = np.array(COUNTS)
    starts = np.concatenate([[0], np.cumsum(counts)])
    eos = np.isin(np.arange(len(gaps)), starts[1:] - 1)

    def make() -> list[TokenBlock]:
        found = []
        for low, high in zip([0, *cuts], [*cuts, len(COUNTS)], strict=True):
            part = slice(starts[low], starts[high])
            found.append(
                TokenBlock(
                    rows=np.arange(low, high),
                    counts=counts[low:high],
                    seen=np.array(SEEN[low:high], dtype=bool),
                    columns={"reference.gap": np.array(gaps, dtype=np.float32)[part]},
                    is_eos=eos[part],
                )
            )
        return found

    return make


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 2, 3]])
@pytest.mark.parametrize(
    ("options", "want", "ranked"),
    [
        # at most e times as likely: a gap of exactly 1 stays
        ({}, [1, 1, 0, 1, 0, 1, 0, 0], 8),
        # the keep share and the scope have no say
        ({"keep": 0.1, "scope": "sample"}, [1, 1, 0, 1, 0, 1, 0, 0], 8),
        ({"options": {"max_gap": 0.0}}, [1, 0, 0, 0, 0, 0, 0, 0], 8),
        ({"options": {"max_gap": float("inf")}}, [1, 1, 1, 1, 1, 1, 1, 1], 8),
        ({"exclude_seen": True}, [1, 1, 0, 0, 0, 1, 0, 0], 6),
        ({"always_keep_eos": True}, [1, 1, 1, 1, 1, 1, 0, 1], 8),
        ({"always_keep_eos": True, "exclude_seen": True}, [1, 1, 1, 0, 0, 1, 0, 1], 6),
    ],
)
def test_by_hand(options: dict[str, Any], want: list[int], ranked: int, cuts: list[int]) -> None:
    got = select(blocks(cuts), SelectionConfig("contradiction", **options))
    assert got.keep.tolist() == [bool(k) for k in want]
    assert (got.ranked, got.kept, got.cut, got.near_cut) == (ranked, sum(want), None, None)


def test_what_it_refuses() -> None:
    config = SelectionConfig("contradiction")
    with pytest.raises(ValueError, match="contain NaN"):
        select(blocks([], [*GAPS[:-1], float("nan")]), config)
    bare = [TokenBlock(np.arange(1), np.array([1]), np.array([False]))]
    with pytest.raises(ValueError, match="needs a reference score table with the column `gap`"):
        select(lambda: bare, config)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"max_gap = .* is not a gap in nats"):
            SelectionConfig("contradiction", options={"max_gap": wrong})


# -- the column -----------------------------------------------------------------------------------


def score(
    model: Path,
    data: TuluDataModule,
    folder: Path,
    columns: list[Column] | None = None,
    cache: ScoreCache | None = None,
) -> ScoreTable:
    module = ScoringModule(BaseConfig(str(model)), columns=columns)
    module.load(torch.device("cpu"))
    rows = TokenRows(data.pool, data.chosen_rows())
    score_pool(module, trainer_for(), data, rows, folder, data.token_budget, cache)
    return ScoreTable(folder)


def test_the_gap_is_that_of_the_logits(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    """Against the whole logits of each sample alone, in float64."""
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    table = score(model_folder, data, tmp_path / "scores", ["gap"])
    model = AutoModelForCausalLM.from_pretrained(model_folder).double()
    tops = 0
    for row in table.rows:
        ids = torch.from_numpy(data.pool.input_ids[int(row)].astype(np.int64))
        positions = torch.from_numpy(np.flatnonzero(data.pool.response_mask[int(row)]))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, positions - 1]
        want = logits.max(-1).values - logits.gather(1, ids[positions][:, None])[:, 0]
        counts, values = table.of_rows(np.array([row]), "gap")
        assert values.dtype == np.float32 and counts.tolist() == [len(positions)]
        assert (values >= 0.0).all()
        np.testing.assert_allclose(values, want.numpy(), rtol=0, atol=2e-5)
        tops += int((want == 0.0).sum())
    assert tops > 0  # there are tokens that the model expected


def test_a_table_without_the_column_is_what_it_was(
    model_folder: Path, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same losses to the bit; no trace of the column, whatever lies in the cache."""
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    cache = ScoreCache(tmp_path / "shared")
    with_gap = score(model_folder, data, tmp_path / "with", ["gap"], cache)
    plain = score(model_folder, data, tmp_path / "plain", None, cache)
    assert plain.columns == ["id", "row", "positions", "token_ids", "nll"]
    assert with_gap.columns == [*plain.columns, "gap"]
    assert "columns" not in plain.manifest and with_gap.manifest["columns"] == ["gap"]
    rows = plain.rows
    assert plain.of_rows(rows)[1].tobytes() == with_gap.of_rows(rows)[1].tobytes()
    with pytest.raises(ValueError, match="has no column `gap`; score it again, under another"):
        plain.of_rows(rows, "gap")
    # shards of seven rows hold what one shard holds
    monkeypatch.setattr(table_module, "ROWS_PER_SHARD", 7)
    shards = score(model_folder, data, tmp_path / "shards", ["gap"])
    assert len(shards.batches()) == 6
    assert shards.of_rows(rows, "gap")[1].tobytes() == with_gap.of_rows(rows, "gap")[1].tobytes()
    assert shards.manifest["content"] == with_gap.manifest["content"]
    # and the cache hands out both, each to those who ask for it
    again = score(model_folder, data, tmp_path / "again", ["gap"], cache)
    assert again.columns == with_gap.columns
    assert score(model_folder, data, tmp_path / "bare", None, cache).columns == plain.columns
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_a_cleaned_pool_from_the_reference_alone(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    table = score(model_folder, data, tmp_path / "scores", ["gap"])
    table.manifest["trained_on"] = ["row-3"]
    scored = ScoredRows(data.pool, table.rows, None, table, round=1)
    config = SelectionConfig("contradiction", options={"max_gap": 2.0}, exclude_seen=True)
    selected = clean(scored, config, 0, tmp_path / "cleaned")
    reasons = set()
    for index, row in enumerate(pq.read_table(tmp_path / "cleaned" / DATA).to_pylist()):
        gaps = table.lists("gap")[index]
        at = np.flatnonzero(row["response_mask"])
        for place, gap in zip(at, gaps, strict=True):
            reason = 3 if row["id"] == "row-3" else 0 if gap <= 2.0 else 4
            assert row["reason"][place] == reason
            assert (row["labels"][place] == -100) == (reason != 0)
            reasons.add(reason)
        assert [row["reference_nll"][p] for p in at] == table.nll[index].tolist()
        assert set(row["base_nll"]) == set(row["score"]) == {None}
    assert reasons == {0, 3, 4}
    manifest = json.loads((tmp_path / "cleaned" / MANIFEST).read_text())
    assert manifest["reasons"]["4"] == "contradicted by the reference"
    assert manifest["selection"]["options"] == {"max_gap": 2.0}
    assert manifest["kept_tokens"] == selected.kept and manifest["base"] is None
    with pytest.raises(ValueError, match="needs a reference score table"):
        clean(ScoredRows(data.pool, table.rows, table, None, 1), config, 0, tmp_path / "none")


def test_select_takes_one_table(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    score(model_folder, data, tmp_path / "with", ["gap"])
    score(model_folder, data, tmp_path / "plain")
    rule = ["--selection.rule", "contradiction", "--outputs", str(tmp_path)]
    select_verb([*rule, "--reference", str(tmp_path / "with"), "--name", "selected"])
    summary = json.loads((tmp_path / "selected" / "summary.json").read_text())
    assert 0 < summary["kept"] < summary["ranked"] == summary["response_tokens"]
    with pytest.raises(ValueError, match=r"selection\.rule: contradiction .* give --reference"):
        select_verb([*rule, "--base", str(tmp_path / "with"), "--name", "a"])
    with pytest.raises(ValueError, match="plain has no column `gap`"):
        select_verb([*rule, "--reference", str(tmp_path / "plain"), "--name", "b"])


# -- the loop -------------------------------------------------------------------------------------

ARMS: dict[str, dict[str, Any]] = {
    "crossed": {"schedule": "cross_fitted", "rule": "contradiction"},
    "fixed": {"schedule": "fixed_model", "rule": "contradiction"},
    "evolving": {"schedule": "self_evolving", "rule": "contradiction"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """All three schedules, on a model that expects enough to be contradicted."""
    folder = tmp_path_factory.mktemp("contradiction")
    data = planted_file(folder)
    arms = {name: {**arm, "options": {"max_gap": 2.5}} for name, arm in ARMS.items()}
    return run(folder, model_folder, data, "--data.test_path", str(data), arms=arms)


def test_halves_share_every_part() -> None:
    first, second = halves([np.array([0, 3, 4]), np.array([1, 2]), np.array([5])])
    assert first.tolist() == [0, 1, 4, 5]
    assert second.tolist() == [2, 3]


def kept_ids(folder: Path) -> dict[str, list[bool]]:
    """Which response tokens of each sample a cleaned pool keeps."""
    rows = pq.read_table(folder / DATA).to_pylist()
    return {
        r["id"]: [x != -100 for x, m in zip(r["labels"], r["response_mask"], strict=True) if m]
        for r in rows
    }


def agreed(*tables: ScoreTable) -> dict[str, list[bool]]:
    found = {}
    for table in tables:
        gaps = table.lists("gap")
        for index, name in enumerate(table.values("id")):
            found[name] = [bool(g <= 2.5) for g in gaps[index]]
    return found


def test_each_half_is_judged_by_a_model_that_never_saw_it(finished: Path) -> None:
    tables = [ScoreTable(finished / "scores" / f"half_{n}") for n in (1, 2)]
    everyone = {f"s{i}" for i in range(43)}
    for number, table in enumerate(tables, start=1):
        own, others = set(table.values("id")), set(table.trained_on().to_pylist())
        assert own & others == set() and own | others == everyone
        assert abs(len(own) - len(others)) <= 5  # of five parts, one sample each
        reference = finished / "halves" / f"without_{number}"
        assert set(trained_ids(reference / "adapter")) == others
        assert all(all(kept) for kept in kept_ids(reference / "cleaned").values())
    arm = finished / "arms" / "crossed"
    assert kept_ids(arm / "cleaned") == agreed(*tables)
    manifest = json.loads((arm / "cleaned" / MANIFEST).read_text())
    assert [half["reference"] for half in manifest["halves"]] == [
        table.manifest["model"] for table in tables
    ]
    assert manifest["ranked_tokens"] == manifest["response_tokens"] > manifest["kept_tokens"] > 0
    result = json.loads((arm / "result.json").read_text())
    share = manifest["kept_tokens"] / manifest["ranked_tokens"]
    assert result["kept_share"] == pytest.approx(share)
    # one adapter on the base, trained on everybody with a kept token
    kept = {name for name, tokens in agreed(*tables).items() if any(tokens)}
    assert set(trained_ids(arm / "adapter")) == kept


def test_other_schedules_ask_the_warm_up_or_the_last_round(finished: Path) -> None:
    warmup = ScoreTable(finished / "scores" / "warmup")
    assert kept_ids(finished / "arms" / "fixed" / "cleaned") == agreed(warmup)
    for number in range(1, 5):
        step = finished / "arms" / "evolving" / f"round_{number}"
        assert kept_ids(step / "cleaned") == agreed(ScoreTable(step / "scores"))
    rounds = json.loads((finished / "arms" / "evolving" / "cleaned" / MANIFEST).read_text())
    assert len(rounds["rounds"]) == 5


def test_the_base_is_not_scored(finished: Path) -> None:
    assert not (finished / "scores" / "base").exists()
    costs = json.loads((finished / "costs.json").read_text())["rows"]
    shared = [r for r in costs if (r["arm"], r["round"]) == ("shared", None)]
    assert [r["samples"] for r in shared if r["stage"] == "score"] == [86]  # warm-up and halves
    assert [r["samples"] for r in shared if r["stage"] == "train"] == [43]  # both halves


@pytest.mark.parametrize("lora", [[], ["--model.lora", "null"]], ids=["lora", "full"])
def test_the_papers_rule_can_be_cross_fitted(
    model_folder: Path, tmp_path: Path, lora: list[str]
) -> None:
    data = planted_file(tmp_path)
    arms = {"crossed": {"schedule": "cross_fitted", "keep": 0.5}}
    folder = run(tmp_path, model_folder, data, *lora, arms=arms)
    for number in (1, 2):
        table = ScoreTable(folder / "scores" / f"half_{number}")
        assert "gap" not in table.columns
        manifest = json.loads(
            (folder / "arms" / "crossed" / f"half_{number}" / "cleaned" / MANIFEST).read_text()
        )
        assert manifest["kept_tokens"] == int(table.manifest["tokens"] * 0.5)
    assert not (folder / "warmup").exists()


def test_nothing_to_cross_fit() -> None:
    with pytest.raises(ValueError, match="rule random asks no reference"):
        Arm("cross_fitted", "random")
    assert not Arm("cross_fitted", "contradiction").needs_warmup(None)
    assert Arm("fixed_model", "contradiction").needs_warmup(None)
    assert not Arm("fixed_model", "contradiction").needs_warmup("a model")


def test_the_estimate_knows_the_stages(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = planted_file(tmp_path)
    run(tmp_path, model_folder, data, "--estimate", arms={"crossed": ARMS["crossed"]})
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    found = {"tokenise": 0, "train": 0, "score": 0, "select": 0, "evaluate": 0}
    for arm, stage, _, samples, *_ in cells[1:]:
        if arm in ("shared", "crossed") and stage in found:
            found[stage] += int(samples)
    # either half once and the whole pool once
    assert (found["train"], found["score"], found["select"]) == (86, 43, 86)
