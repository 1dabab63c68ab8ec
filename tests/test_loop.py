"""The loop driver, end to end, on a two-layer model: what is on the disk afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import conversation, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenclean import commands
from tokenclean.cleaning.arms import Arm, LoopConfig
from tokenclean.cleaning.loop import CleaningLoop
from tokenclean.data.batches import collate
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, Network, adapter_tensors, trained_ids
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.exchange import Exchange

ARMS = {
    "warmup": {"schedule": "warmup"},
    "full": {"schedule": "fixed_model", "rule": "full"},
    "random": {"schedule": "fixed_model", "rule": "random"},
    "rho": {"schedule": "fixed_model", "scope": "sample"},
    "fixed_model": {"schedule": "fixed_model"},
    "self_evolving": {"schedule": "self_evolving"},
    "restart_full": {"schedule": "self_evolving", "rule": "full"},
    "oracle": {"schedule": "fixed_model", "rule": "oracle"},
}


def run(folder: Path, model: Path, data: Path, *options: str, arms: dict[str, Any]) -> Path:
    """Run `clean` on 43 samples in 5 parts and return the run's folder."""
    commands.clean(
        [
            *("--model.base.name", str(model), "--data.path", str(data)),
            *("--model.lora", json.dumps({"r": 4, "alpha": 8, "dropout": 0.0})),
            *("--data.max_length", "128", "--data.batch_size", "4"),
            *("--data.cache_dir", str(folder / "cache"), "--outputs", str(folder)),
            *("--loop.arms", json.dumps(arms), "--trainer.max_epochs", "1", "--name", "run"),
            *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
            *options,
        ]
    )
    return folder / "run"


def planted_file(folder: Path) -> Path:
    """43 samples whose second sentence is planted noise."""
    rows = []
    for i in range(43):
        answer = f"It is {i}. And so on."
        spans = [[1, answer.index("And"), len(answer), 0]]
        rows.append(conversation(f"Say {i}.", answer, id=f"s{i}", source="ab"[i % 2], truth=spans))
    return write_jsonl(folder / "planted.jsonl", rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    data = planted_file(folder)
    return run(folder, model_folder, data, "--data.test_path", str(data), arms=ARMS)


def cleaned(run_folder: Path, arm: str) -> list[dict[str, Any]]:
    table = pq.read_table(run_folder / "arms" / arm / "cleaned" / "data.parquet")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_every_sample_outside_d0_is_scored_once_by_a_reference_that_never_saw_it(
    finished: Path,
) -> None:
    d0 = set(trained_ids(finished / "warmup" / "adapter"))
    scored: list[str] = []
    for number in range(1, 5):
        table = ScoreTable(finished / "arms" / "self_evolving" / f"round_{number}" / "scores")
        ids = table.values("id")
        trained_on = set(table.trained_on().to_pylist())
        assert not set(ids) & trained_on
        # The reference is exactly the model after the round before.
        before = d0 | set(scored)
        assert trained_on == before
        scored += ids
    assert len(scored) == len(set(scored))
    assert set(scored) | d0 == {f"s{i}" for i in range(43)}
    assert len(d0) == 9  # 43 = 9 + 9 + 9 + 8 + 8


def test_the_base_is_scored_once_and_shared(finished: Path) -> None:
    base = ScoreTable(finished / "scores" / "base")
    assert base.values("id") == [f"s{i}" for i in range(43)]
    assert not list((finished / "arms").rglob("scores_base"))
    warmup = ScoreTable(finished / "scores" / "warmup")
    assert warmup.manifest["model"].startswith(base.manifest["model"] + "+")


def test_every_stage_has_a_cost(finished: Path) -> None:
    """The whole pool under base and warm-up is charged to nobody, a round to its arm."""
    value = json.loads((finished / "costs.json").read_text())
    rows = {(r["arm"], r["stage"], r["round"]): r for r in value["rows"]}
    scored = {key: r["samples"] for key, r in rows.items() if key[1] == "score"}
    assert scored == {
        ("shared", "score", None): 86,  # 43 samples under two models
        ("self_evolving", "score", 1): 9,
        ("self_evolving", "score", 2): 9,
        ("self_evolving", "score", 3): 8,
        ("self_evolving", "score", 4): 8,
        # the panel, all 8 of the last part: it measures, and is charged to nobody
        ("shared", "score", 1): 8,
        ("shared", "score", 2): 8,
        ("shared", "score", 3): 8,
        ("shared", "score", 4): 8,
    }
    trained = {key: r["samples"] for key, r in rows.items() if key[1] == "train" and r["samples"]}
    rounds = {1: 9, 2: 9, 3: 8, 4: 8}
    for arm in ("self_evolving", "restart_full"):
        ours = {t: trained.pop((arm, "train", t)) for t in rounds}
        # a sample whose every token was dropped is not computed
        assert ours == rounds if arm == "restart_full" else sum(ours.values()) <= 34
    assert trained.pop(("shared", "train", 0)) == 9
    assert {key[0] for key in trained} == {"full", "random", "rho", "fixed_model", "oracle"}
    evaluated = {key[0] for key in rows if key[1] == "evaluate"}
    assert evaluated == {"base", *ARMS}
    assert rows["shared", "tokenise", None]["samples"] == 43
    for key, row in rows.items():
        if key[1] in ("score", "train") and row["samples"]:
            assert row["flops"] > 0 and row["tokens"] >= row["targets"] > 0, key
            assert row["disk"] > 0 and row["peak_memory"] > 0, key
    seconds = sum(row["seconds"] for row in value["rows"])
    assert seconds <= value["wall_seconds"]
    table = finished / "scores" / "warmup"
    both = sum(p.stat().st_size for t in ("base", "warmup") for p in table.with_name(t).iterdir())
    assert rows["shared", "score", None]["disk"] == both
    assert "| self_evolving | train | 4 |" in (finished / "costs.md").read_text()


@pytest.mark.parametrize("arm", ["random", "fixed_model", "self_evolving"])
def test_the_number_kept_is_exact(finished: Path, arm: str) -> None:
    by_round: dict[int, list[dict[str, Any]]] = {}
    for row in cleaned(finished, arm):
        by_round.setdefault(row["round"], []).append(row)
    assert sorted(by_round) == ([0, 1, 2, 3, 4] if arm == "self_evolving" else [1])
    for number, rows in by_round.items():
        total = sum(sum(row["response_mask"]) for row in rows)
        kept = sum(label != -100 for row in rows for label in row["labels"])
        assert kept == (total if number == 0 else int(total * 0.6))


def test_rho_keeps_its_share_of_every_sample(finished: Path) -> None:
    for row in cleaned(finished, "rho"):
        kept = sum(label != -100 for label in row["labels"])
        assert kept == int(sum(row["response_mask"]) * 0.6)


def test_the_oracle_keeps_exactly_the_informative_tokens(finished: Path) -> None:
    for row in cleaned(finished, "oracle"):
        kept = [label != -100 for label in row["labels"]]
        wanted = [m and t == 1 for m, t in zip(row["response_mask"], row["truth"], strict=True)]
        assert kept == wanted
        assert 0 < sum(kept) < sum(row["response_mask"])


def test_scores_are_the_difference_of_the_two_tables(finished: Path) -> None:
    base = ScoreTable(finished / "scores" / "base")
    number = 2
    folder = finished / "arms" / "self_evolving" / f"round_{number}" / "scores"
    reference = ScoreTable(folder)
    rows = {row["id"]: row for row in cleaned(finished, "self_evolving")}
    for index, id in enumerate(reference.values("id")):
        row = rows[id]
        assert row["round"] == number
        got = [s for s, m in zip(row["score"], row["response_mask"], strict=True) if m]
        pool_row = int(id[1:])
        wanted = base.of_row(pool_row).astype(np.float64) - reference.nll[index].astype(np.float64)
        assert got == wanted.tolist()
        assert all(
            s is None for s, m in zip(row["score"], row["response_mask"], strict=True) if not m
        )


def test_every_arm_sees_every_sample_in_pool_order(finished: Path) -> None:
    for arm in ARMS:
        if arm != "warmup":
            assert [row["id"] for row in cleaned(finished, arm)] == [f"s{i}" for i in range(43)]


def test_the_published_adapter_is_the_stack_of_the_rounds(
    finished: Path, model_folder: Path
) -> None:
    arm = finished / "arms" / "self_evolving"
    steps = [finished / "warmup", *(arm / f"round_{t}" for t in range(1, 5))]
    published = adapter_tensors(arm / "adapter")
    config = json.loads((arm / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5 * 4, 5 * 8)
    key = next(k for k in published if "q_proj.lora_A" in k)
    parts = [adapter_tensors(step / "adapter") for step in steps]
    delta = sum(2.0 * p[key.replace("lora_A", "lora_B")].double() @ p[key].double() for p in parts)
    joined = 2.0 * published[key.replace("lora_A", "lora_B")].double() @ published[key].double()
    torch.testing.assert_close(joined, delta)
    # and peft itself loads it
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, arm / "adapter").eval()(input_ids=ids).logits
        network = Network.load(BaseConfig(name=str(model_folder)))
        for step in steps:
            network.load_adapter(step / "adapter")
        ours = network.hf(input_ids=ids).logits
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


def test_every_arm_has_an_adapter_that_peft_loads(finished: Path, model_folder: Path) -> None:
    for arm in ARMS:
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        PeftModel.from_pretrained(base, finished / "arms" / arm / "adapter")


def test_arms_learn_something_different(finished: Path) -> None:
    tensors = {
        arm: adapter_tensors(finished / "arms" / arm / "adapter")
        for arm in ("full", "random", "rho", "fixed_model", "oracle")
    }
    key = next(k for k in tensors["full"] if "lora_B" in k)
    values = [t[key] for t in tensors.values()]
    for i, one in enumerate(values):
        assert one.abs().max() > 0
        assert all(not torch.equal(one, other) for other in values[:i])


def test_the_results_table_names_every_arm_and_measure(finished: Path) -> None:
    text = (finished / "results.md").read_text()
    for word in (*ARMS, "base", "AUROC", "Precision", "Recall", "accuracy"):
        assert word in text
    results = {r["name"]: r for r in json.loads((finished / "results.json").read_text())}
    assert set(results) == {"base", *ARMS}
    # D_0 is not cleaned, so it does not count: int(n * 0.6) of each round, none of its tokens.
    assert 0.55 < results["self_evolving"]["kept_share"] <= 0.6
    assert results["restart_full"]["kept_share"] == 1.0
    assert results["oracle"]["mask"]["all"]["precision"] == 1.0
    assert results["oracle"]["mask"]["all"]["recall"] == 1.0
    assert results["full"]["mask"]["all"]["recall"] == 1.0
    assert set(results["base"]["accuracy"]) == {"a", "b", "all"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["samples"] == 43
    assert (finished / "config.yaml").is_file() and (finished / "log.txt").is_file()


def test_the_same_command_again_loads_no_model(
    finished: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run loaded a model")

    before = (finished / "results.json").read_text()
    monkeypatch.setattr(Network, "load", refuse)
    data = finished.parent / "planted.jsonl"
    run(finished.parent, model_folder, data, "--data.test_path", str(data), arms=ARMS)
    assert (finished / "results.json").read_text() == before


def test_another_configuration_in_the_same_folder_is_refused(
    finished: Path, model_folder: Path
) -> None:
    data = finished.parent / "planted.jsonl"
    options = ("--data.test_path", str(data), "--selection.keep", "0.4")
    with pytest.raises(ValueError, match=r"another configuration[\s\S]*keep: 0\.4"):
        run(finished.parent, model_folder, data, *options, arms=ARMS)


SHORT = {"self_evolving": {"schedule": "self_evolving"}}


def test_an_interrupted_run_goes_on_to_the_same_result(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenclean.cleaning import loop as loop_module

    whole = run(tmp_path / "a", model_folder, planted_file(tmp_path), arms=SHORT)
    real, calls = loop_module.clean, []

    def fails_in_round_3(scored: Any, *rest: Any) -> Any:
        calls.append(scored.round)
        if scored.round == 3:
            raise KeyboardInterrupt
        return real(scored, *rest)

    monkeypatch.setattr(loop_module, "clean", fails_in_round_3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", model_folder, tmp_path / "planted.jsonl", arms=SHORT)
    monkeypatch.setattr(loop_module, "clean", real)
    resumed = run(tmp_path / "b", model_folder, tmp_path / "planted.jsonl", arms=SHORT)
    assert calls == [0, 1, 1, 2, 2, 3]  # each round and its panel
    name = "arms/self_evolving/adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_previous_reference_as_base(tmp_path: Path, model_folder: Path) -> None:
    """Algorithm 1 as printed: round t's base is theta_{t-1}, so only round 1 uses theta_0."""
    data = planted_file(tmp_path)
    folder = run(tmp_path, model_folder, data, "--loop.score_base", "previous", arms=SHORT)
    arm = folder / "arms" / "self_evolving"
    assert not (arm / "round_1" / "scores_base").exists()
    for number in (2, 3, 4):
        base = ScoreTable(arm / f"round_{number}" / "scores_base")
        before = ScoreTable(arm / f"round_{number - 1}" / "scores")
        # the base of round t is the model that was the reference of round t - 1
        assert base.manifest["model"] == before.manifest["model"]


def test_one_continued_adapter(tmp_path: Path, model_folder: Path) -> None:
    data = planted_file(tmp_path)
    folder = run(tmp_path, model_folder, data, "--loop.continue_adapter", "true", arms=SHORT)
    arm = folder / "arms" / "self_evolving"
    shapes = {
        tuple(adapter_tensors(arm / f"round_{t}" / "adapter")[k].shape)
        for t in range(1, 5)
        for k in adapter_tensors(arm / "round_1" / "adapter")
        if "q_proj.lora_A" in k
    }
    assert shapes == {(4, 32)}
    published = adapter_tensors(arm / "adapter")
    one, two = (adapter_tensors(arm / f"round_{t}" / "adapter") for t in (1, 2))
    key = next(k for k in one if "lora_B" in k)
    assert not torch.equal(one[key], two[key])
    last = adapter_tensors(arm / "round_4" / "adapter")
    assert all(torch.equal(published[k], last[k]) for k in last)


def test_full_fine_tuning_in_the_loop(tmp_path: Path, model_folder: Path) -> None:
    data = planted_file(tmp_path)
    arms = {"fixed_model": {"schedule": "fixed_model"}, **SHORT}
    folder = run(tmp_path, model_folder, data, "--model.lora", "null", arms=arms)
    base = ScoreTable(folder / "scores" / "base").manifest["model"]
    last = folder / "arms" / "self_evolving" / "adapter"
    model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    assert Network(model).fingerprint() != base
    # theta_0 itself was not touched: a fresh load has the fingerprint that scored the base table
    assert Network.load(BaseConfig(name=str(model_folder))).fingerprint() == base


@pytest.mark.parametrize("lora", ["null", '{"r": 4, "alpha": 8, "dropout": 0.0}'])
def test_an_arm_does_not_depend_on_the_arms_before_it(
    lora: str, tmp_path: Path, model_folder: Path
) -> None:
    """Every arm starts from theta_0, whatever an earlier one left in memory."""
    data = planted_file(tmp_path)
    options = ("--model.lora", lora)
    full = {"full": {"schedule": "fixed_model", "rule": "full"}}
    # The same labels by another way, with a warm-up model in memory just before.
    everything = {"everything": {"schedule": "fixed_model", "keep": 1.0}}
    alone = run(tmp_path / "alone", model_folder, data, *options, arms=full)
    late = run(
        tmp_path / "late", model_folder, data, *options, arms={**SHORT, **full, **everything}
    )
    name = "model" if lora == "null" else "adapter_model"
    folders = [alone / "arms/full", late / "arms/full", late / "arms/everything"]
    first, *others = (load_file(str(f / "adapter" / f"{name}.safetensors")) for f in folders)
    for other in others:
        assert all(torch.equal(first[k], other[k]) for k in first)


def test_the_reference_is_base_plus_stack(finished: Path, model_folder: Path) -> None:
    """Scores of round 3 recomputed from the adapters on disk."""
    arm = finished / "arms" / "self_evolving"
    network = Network.load(BaseConfig(name=str(model_folder)))
    for step in (finished / "warmup", arm / "round_1", arm / "round_2"):
        network.load_adapter(step / "adapter")
    network.freeze()
    table = ScoreTable(arm / "round_3" / "scores")
    pool_folder = Path(table.manifest["pool_folder"])
    from tokenclean.data.pool import TokenPool

    rows = TokenRows(TokenPool(pool_folder), table.rows)
    for index in range(len(rows)):
        with torch.no_grad():
            nll = network(collate([rows[index]]))
        np.testing.assert_allclose(table.nll[index], nll.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "loop.arms"),
        ({"a/b": Arm(schedule="warmup")}, "separator of folders"),
        ({"base": Arm(schedule="warmup")}, "always run"),
    ],
)
def test_contradictions_are_refused(arms: dict[str, Arm], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(arms=arms)


def test_an_arms_keep_is_checked() -> None:
    with pytest.raises(ValueError, match=r"loop\.arms: keep: 0"):
        Arm(schedule="self_evolving", keep=0.0)


def test_oracle_without_truth_is_refused_before_a_model_loads(
    tmp_path: Path, model_folder: Path, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Network, "load", refuse)
    arms = {"oracle": {"schedule": "fixed_model", "rule": "oracle"}}
    with pytest.raises(ValueError, match="truth"):
        run(tmp_path, model_folder, pool_file, arms=arms)


def test_every_rounds_reference_masks_the_same_panel(
    tmp_path: Path, model_folder: Path, finished: Path
) -> None:
    """9, 9, 9, 8, 8 samples in D_0 ... D_4: a panel of 5 lies in D_4, which none of them saw."""
    folder = run(tmp_path, model_folder, planted_file(tmp_path), "--loop.panel", "5", arms=SHORT)
    arm = folder / "arms" / "self_evolving"
    last = {row["id"] for row in rows_of(arm / "round_4" / "cleaned")}
    panels = [rows_of(arm / f"round_{t}" / "panel" / "cleaned") for t in (1, 2, 3, 4)]
    ids = [row["id"] for row in panels[0]]
    assert len(ids) == 5 and set(ids) < last
    for number, panel in enumerate(panels, start=1):
        assert [row["id"] for row in panel] == ids
        assert {row["round"] for row in panel} == {number}
        tokens = sum(sum(row["response_mask"]) for row in panel)
        kept = sum(label != -100 for row in panel for label in row["labels"])
        assert kept == int(tokens * 0.6)
    # The last round's own scores of those rows are the panel's: the same model, the same base.
    own = {row["id"]: row for row in rows_of(arm / "round_4" / "cleaned")}
    for row in panels[3]:
        assert row["score"] == pytest.approx(own[row["id"]]["score"], abs=1e-5)
        assert row["score"] != pytest.approx(panels[0][ids.index(row["id"])]["score"], abs=1e-5)
    # It is measured, not trained on: the models are those of a run without it.
    without = run(
        *(tmp_path / "without", model_folder, planted_file(tmp_path), "--loop.panel", "0"),
        arms=SHORT,
    )
    assert not list(without.rglob("panel"))
    ours, theirs = (
        load_file(place / "arms" / "self_evolving" / "adapter" / "adapter_model.safetensors")
        for place in (folder, without)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a cleaned pool."""
    rows: list[dict[str, Any]] = pq.read_table(folder / "data.parquet").to_pylist()
    return rows


def test_a_run_that_was_trained_without_a_panel_gets_it_later(
    tmp_path: Path, model_folder: Path
) -> None:
    """As after a call that was cut off between the two: the panel's model is put together again."""
    folder = run(tmp_path, model_folder, planted_file(tmp_path), arms=SHORT)
    places = sorted((folder / "arms" / "self_evolving").glob("round_*/panel"))
    before = [rows_of(place / "cleaned") for place in places]
    assert len(places) == 4
    for place in places:
        shutil.rmtree(place)
    again = run(tmp_path, model_folder, planted_file(tmp_path), arms=SHORT)
    for place, rows in zip(places, before, strict=True):
        for one, other in zip(
            rows_of(again / place.relative_to(folder) / "cleaned"), rows, strict=True
        ):
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_panel_of_fewer_than_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop\.panel"):
        LoopConfig(arms={"full": Arm("fixed_model", "full")}, panel=-1)


def test_what_is_there_is_what_the_first_process_sees(tmp_path: Path) -> None:
    """Another process may look later, when the first one has written meanwhile."""

    class Second(Exchange):
        def sum(self, counts: np.ndarray) -> np.ndarray:
            return counts  # the first process's share is nothing: it has not seen the file

    loop = object.__new__(CleaningLoop)
    loop.exchange = Second(rank=1, processes=2)
    assert not loop._agreed(True)
    loop.exchange = Exchange()
    assert loop._agreed(True) and not loop._agreed(False)


def test_processes_of_the_loop_share_the_batches(
    tmp_path: Path, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop makes a Trainer per step, so the data module asks for its place by itself."""
    data = TuluDataModule(str(pool_file), cache_dir=str(tmp_path))
    assert data._place() == (0, 1)
    monkeypatch.setattr("tokenclean.data.datamodule.here", lambda: Exchange(rank=1, processes=4))
    assert data._place() == (1, 4)
