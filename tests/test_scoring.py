"""`ScoringModule` and `ScoreWriter` through a real `Trainer.predict`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, llama_nll_float64, tiny_llama
from lightning import Trainer
from transformers import AutoModelForCausalLM

from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.cleaned import DATA
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings, Network, load_tokenizer
from tokenclean.publish import MANIFEST
from tokenclean.scoring.module import ScoringModule, score_manifest, score_pool
from tokenclean.scoring.table import ScoreTable
from tokenclean.scoring.writer import ScoreWriter
from tokenclean.selection.select import SelectionConfig

TRAINER = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def data_for(model: Path, path: Path, cache: Path, **options: Any) -> TuluDataModule:
    data = TuluDataModule(
        str(path), **{"max_length": 96, "token_budget": 200, "cache_dir": str(cache), **options}
    )
    data.use_tokenizer(load_tokenizer(BaseConfig(str(model))))
    data.prepare_data()
    data.setup()
    return data


def trainer_for(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **options,
        }
    )


def score(
    module: ScoringModule,
    data: TuluDataModule,
    folder: Path,
    against: ScoreTable | None = None,
    **options: Any,
) -> ScoreTable:
    rows, trainer = TokenRows(data.pool, data.chosen_rows()), trainer_for(**options)
    module.load(torch.device("cpu"))
    score_pool(module, trainer, data, rows, folder, data.token_budget, against=against)
    return ScoreTable(folder)


def check_against_oracle(table: ScoreTable, pool: TokenPool, model: Any, deltas: Any = None) -> int:
    """Every stored loss against the written-out float64 model; the number of losses."""
    count = 0
    positions, tokens = table.lists("positions"), table.lists("token_ids")
    for index, row in enumerate(table.rows):
        ids = pool.input_ids[int(row)]
        response = np.flatnonzero(pool.response_mask[int(row)])
        assert positions[index].tolist() == response.tolist()
        assert tokens[index].tolist() == ids[response].tolist()
        want = llama_nll_float64(model, ids.tolist(), deltas)[response - 1]
        assert table.nll[index].dtype == np.float32
        np.testing.assert_allclose(table.nll[index], want.numpy(), rtol=0, atol=2e-5)
        np.testing.assert_array_equal(table.of_row(int(row)), table.nll[index])
        count += len(response)
    return count


def test_every_sample_once_in_pool_order(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    assert len(data.predict_dataloader()) > 5  # several batches, in another order than the pool
    table = score(ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "scores")
    assert table.rows.tolist() == list(range(40))
    assert table.values("id") == list(data.pool.ids) == [f"row-{i}" for i in range(40)]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert check_against_oracle(table, data.pool, model) == table.manifest["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "pool.jsonl", "scores"]
    table.check_pool(data.pool)
    table.manifest["pool"] = "another"
    with pytest.raises(ValueError, match=f"another, expected {data.pool.fingerprint}"):
        table.check_pool(data.pool)


def test_a_subset_with_an_adapter(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    network = Network.load(BaseConfig(str(model_folder)))
    network.add_adapter(LoraSettings(r=4, alpha=8, target_modules=["q_proj", "down_proj"]))
    added = {}
    for name, module in network.hf.named_modules():
        if hasattr(module, "lora_B"):
            a, b = module.lora_A["round_0"].weight, module.lora_B["round_0"].weight
            torch.nn.init.normal_(b, std=0.3)
            added[name] = 2.0 * (b.detach().double() @ a.detach().double())
    network.save_last_adapter(tmp_path / "adapter")
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=3, subset=[2, 0])
    module = ScoringModule(BaseConfig(str(model_folder)), [str(tmp_path / "adapter")])
    table = score(module, data, tmp_path / "scores")
    parts = data.subset_rows()
    assert table.rows.tolist() == sorted([*parts[0], *parts[2]])
    check_against_oracle(
        table, data.pool, AutoModelForCausalLM.from_pretrained(model_folder), added
    )
    outside = int(parts[1][0])
    with pytest.raises(ValueError, match=f"no scores for pool row {outside}"):
        table.of_row(outside)


def test_many_rows_come_in_the_order_asked_for(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=4, subset=1)
    table = score(ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "scores")
    asked = table.rows[[3, 0, 7]]
    counts, values = table.of_rows(asked)
    assert counts.tolist() == [int(data.pool.response_mask[int(r)].sum()) for r in asked]
    want = np.concatenate([table.nll[3], table.nll[0], table.nll[7]])
    np.testing.assert_array_equal(values, want)
    for outside in set(range(40)) - set(table.rows.tolist()):
        with pytest.raises(ValueError, match=f"no scores for pool row {outside}"):
            table.of_rows(np.append(asked, outside))


def test_the_histogram_against_a_base_table_is_that_of_the_scores(
    model_folder: Path, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    base = score(ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "base")
    tiny_llama(len(byte_level_tokenizer()), seed=3).save_pretrained(tmp_path / "other")
    byte_level_tokenizer().save_pretrained(tmp_path / "other")
    data.subsets, data.subset = 3, [2, 0]  # fewer rows than the base table holds
    module = ScoringModule(BaseConfig(str(tmp_path / "other")))
    reference = score(module, data, tmp_path / "reference", against=base)
    rows = reference.rows
    want: dict[int, int] = {}
    for index, row in enumerate(rows):
        for a, b in zip(base.nll[int(row)].tolist(), reference.nll[index].tolist(), strict=True):
            leading = int.from_bytes(struct.pack(">d", a - b)[:2], "big")
            key = 0xFFFF - leading if a < b else leading | 0x8000
            want[key] = want.get(key, 0) + 1
    found = reference.histogram(base)
    assert found is not None
    assert {int(i): int(found.counts[i]) for i in np.flatnonzero(found.counts)} == want
    # It is for that base table alone.
    assert reference.histogram(reference) is None
    assert base.histogram(reference) is None

    config = SelectionConfig("token_cleaning", keep=0.6)
    for name in ("with", "without"):
        scored = ScoredRows(data.pool, rows, base, ScoreTable(tmp_path / "reference"), round=1)
        assert (scored.histogram() is None) == (name == "without")
        clean(scored, config, 0, tmp_path / name)
        monkeypatch.setattr(ScoreTable, "histogram", lambda table, base: None)
    files = [(tmp_path / name / DATA).read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


def test_a_base_table_without_a_row_is_refused_before_anything_is_scored(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=2, subset=1)
    base = score(ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "base")
    with pytest.raises(ValueError, match="no scores for pool row"):
        ScoreWriter(data.planned(TokenRows(data.pool)), tmp_path / "scores", {}, base)


def test_the_plan_decides_the_bits(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    base = BaseConfig(str(model_folder))
    one = score(ScoringModule(base), data, tmp_path / "one")
    two = score(ScoringModule(base), data, tmp_path / "two")
    data.token_budget = 90
    other = score(ScoringModule(base), data, tmp_path / "other")
    for row in range(40):
        np.testing.assert_array_equal(one.nll[row], two.nll[row])
        np.testing.assert_allclose(one.nll[row], other.nll[row], rtol=0, atol=2e-5)
    assert one.manifest["content"] == two.manifest["content"]
    files = [sorted((tmp_path / name).glob("part-*")) for name in ("one", "two")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_loss_that_is_not_finite_names_the_sample(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    network = Network.load(BaseConfig(str(model_folder)))
    # A token that row 17 alone contains ...
    holders: dict[int, set[int]] = {}
    for row in range(len(data.pool)):
        for token in data.pool.input_ids[row][:-1]:
            holders.setdefault(int(token), set()).add(row)
    token, rows = next((t, r) for t, r in holders.items() if len(r) == 1)
    # ... and whose embedding is poisoned.
    with torch.no_grad():
        network.hf.get_input_embeddings().weight[token] = float("nan")
    module = ScoringModule(BaseConfig(str(model_folder)))
    module.network = network
    name = f"row-{next(iter(rows))}"
    with pytest.raises(FloatingPointError, match=f"sample '{name}' is not finite .*32-true"):
        score(module, data, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def predict(model: Path, writer: ScoreWriter) -> None:
    module = ScoringModule(BaseConfig(str(model)))
    module.writer = writer
    trainer_for(writer).predict(module, return_predictions=False)


def test_a_sample_that_is_left_out_is_noticed(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    planned = data.planned(TokenRows(data.pool))
    planned.plan[-1] = planned.plan[-1][:-1]
    with pytest.raises(RuntimeError, match="1 of 40 samples were not scored exactly once"):
        predict(model_folder, ScoreWriter(planned, tmp_path / "scores", {}))
    assert not (tmp_path / "scores" / MANIFEST).exists()


@pytest.mark.parametrize("budget", [200, 10**6])  # in two batches, in one
def test_a_sample_that_is_scored_twice_is_noticed(
    model_folder: Path, pool_file: Path, tmp_path: Path, budget: int
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", token_budget=budget)
    planned = data.planned(TokenRows(data.pool))
    planned.plan[-1] = np.append(planned.plan[-1], 7)
    with pytest.raises(RuntimeError, match="1 of 40 samples were not scored exactly once"):
        predict(model_folder, ScoreWriter(planned, tmp_path / "scores", {}))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_true_sixteen_bit_is_refused(
    model_folder: Path, pool_file: Path, tmp_path: Path, precision: str
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    module = ScoringModule(BaseConfig(str(model_folder)))
    with pytest.raises(ValueError, match=rf"trainer\.precision: {precision} rounds rotary"):
        score(module, data, tmp_path / "scores", precision=precision)


def test_bfloat16_autocast_keeps_float32_losses(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    module = ScoringModule(BaseConfig(str(model_folder)))
    table = score(module, data, tmp_path / "scores", precision="bf16-mixed")
    exact = score(
        ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "exact", precision="32-true"
    )
    got = np.concatenate([table.nll[row] for row in range(40)])
    want = np.concatenate([exact.nll[row] for row in range(40)])
    assert 1e-4 < np.abs(got - want).max() < 0.5
    assert table.manifest["content"] != exact.manifest["content"]
    # Losses stored in bfloat16 would have their lower 16 bits zero.
    assert (got.view(np.uint32) & 0xFFFF != 0).mean() > 0.9


def test_an_adapter_that_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.adapters: .*nowhere holds no PEFT adapter"):
        ScoringModule(BaseConfig("not loaded"), [str(tmp_path / "nowhere")])


def test_manifest_says_where_the_numbers_come_from(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    base = BaseConfig(str(model_folder))
    network = Network.load(base)
    adapters = []
    for name, ids in (("a", '["row-3", "row-1"]'), ("b", '["row-1", "row-2"]')):
        network.add_adapter(LoraSettings(r=2))
        network.save_last_adapter(tmp_path / name)
        (tmp_path / name / "trained_ids.json").write_text(ids, encoding="utf-8")
        adapters.append(str(tmp_path / name))
    manifest = score_manifest(data.pool, base, adapters, network, 200, TRAINER)
    assert manifest["trained_on"] == ["row-1", "row-2", "row-3"]
    assert manifest["pool"] == data.pool.fingerprint
    assert manifest["model"] == network.fingerprint() and manifest["model"].count("+") == 2
    assert (manifest["weights_dtype"], manifest["layout"]) == ("float32", "packed")
    assert manifest["token_budget"] == 200


def test_full_model_as_reference(pool_file: Path, model_folder: Path, tmp_path: Path) -> None:
    other = tiny_llama(len(byte_level_tokenizer()), seed=3)
    other.save_pretrained(tmp_path / "other")
    byte_level_tokenizer().save_pretrained(tmp_path / "other")
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=8, subset=1)
    table = score(ScoringModule(BaseConfig(str(tmp_path / "other"))), data, tmp_path / "scores")
    check_against_oracle(table, data.pool, other)
