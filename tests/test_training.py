"""`CleanedSFTModule` through a real `Trainer.fit`: oracles, invariances, resuming, publishing."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import byte_level_tokenizer, conversation, llama_nll_float64, tiny_llama, write_jsonl
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import AutoModelForCausalLM

from tokenclean.data.batches import Layout, plan_epoch
from tokenclean.data.cleaned import CleanedPool, cleaned_schema, write_cleaned_pool
from tokenclean.data.datamodule import GlobalBatch, TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings, Network, Speed, load_tokenizer
from tokenclean.training.module import CleanedSFTModule, paper_optimizer

ROWS = 48
LORA = LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
#: token budgets that cut 48 samples into one micro-batch, several, and 48
BUDGETS = [10**6, 300, 1]


def still(params: Iterable[Any]) -> Optimizer:
    """Leaves the weights where they are, so that gradients of all steps are comparable."""
    return SGD(params, lr=0.0)


@pytest.fixture
def data(model_folder: Path, tmp_path: Path) -> TuluDataModule:
    rows = [
        conversation(
            f"What is {i} plus {i % 7}?",
            "The sum is " + " ".join([str(i + i % 7)] * (1 + i % 5)) + ".",
            id=f"row-{i}",
            source="sums",
        )
        for i in range(ROWS)
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    data = TuluDataModule(str(path), max_length=96, cache_dir=str(tmp_path / "cache"))
    data.use_tokenizer(load_tokenizer(BaseConfig(str(model_folder))))
    data.prepare_data()
    data.setup()
    return data


Keep = Callable[[int, np.ndarray], np.ndarray]


def some(row: int, response: np.ndarray) -> np.ndarray:
    """About 60 % of the response tokens; every sixth sample is emptied."""
    if row % 6 == 0:
        return np.zeros(len(response), dtype=bool)
    return np.random.default_rng(row).random(len(response)) < 0.6


def everything(row: int, response: np.ndarray) -> np.ndarray:
    return np.ones(len(response), dtype=bool)


def cleaned(
    pool: TokenPool, keep: Keep, folder: Path, **given: Callable[[int, int], list[Any]]
) -> CleanedPool:
    """A cleaned pool that keeps what ``keep(row, response positions)`` says.

    ``given`` makes a column from row and length.
    """
    schema = cleaned_schema(with_truth=False)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in range(len(pool)):
        ids, mask = pool.input_ids[row], pool.response_mask[row]
        response = np.flatnonzero(mask)
        kept = response[keep(row, response)]
        labels = np.full(len(ids), -100)
        labels[kept] = ids[kept]
        none: list[None] = [None] * len(ids)
        values = {
            "id": pool.ids[row],
            "source": pool.sources[row],
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "response_mask": mask.tolist(),
            "base_nll": none,
            "reference_nll": none,
            "score": none,
            "priority": none,
            "reason": [0] * len(ids),
            "weight": [1.0] * len(ids),
            "round": 1,
        }
        values |= {name: make(row, len(ids)) for name, make in given.items()}
        for name, value in values.items():
            columns[name].append(value)
    write_cleaned_pool(folder / "cleaned", [pa.record_batch(columns, schema=schema)], schema, {})
    return CleanedPool(folder / "cleaned", folder / "unpacked")


class Watch(Callback):
    """Loss, gradients, weights and what was logged after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.gradients.append({n: p.grad.clone() for n, p in trained.items()})
        self.weights.append({n: p.detach().clone() for n, p in trained.items()})
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.logged.append({**metrics, **module.last_step})
        self.losses.append(self.logged[-1]["train/loss"])


def trainer_for(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "max_epochs": 1,
            **options,
        }
    )


def adapted(model_folder: Path, lora: LoraSettings = LORA, seed: int = 0) -> Network:
    """A network with one adapter whose B is not zero."""
    network = Network.load(BaseConfig(str(model_folder)))
    network.add_adapter(lora)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return network


def fit(
    network: Network,
    data: TuluDataModule,
    table: TokenPool | CleanedPool,
    options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> Watch:
    """Train ``network`` as it stands on a pool."""
    defaults: dict[str, Any] = {"lora": LORA, "optimizer": still, "schedule": "constant"}
    module = CleanedSFTModule(BaseConfig("in memory"), **{**defaults, **(options or {})})
    module.network = network
    module.continue_round()
    watch = Watch()
    loader = data.training_loader(TokenRows(table), module.carry)
    trainer_for(watch, **trainer_options).fit(module, loader)
    return watch


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Distance of two sets of tensors over the length of the second."""
    assert got.keys() == want.keys() and got
    gap = sum(float((got[n].double() - want[n].double()).square().sum()) for n in want)
    return math.sqrt(gap / sum(float(w.double().square().sum()) for w in want.values()))


def token_losses_float64(model: Any, pool: TokenPool, row: int) -> Tensor:
    """Loss of each token of a row after the first, from the whole logits of a float64 model."""
    ids = torch.as_tensor(pool.input_ids[row], dtype=torch.int64)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    assert logits.dtype == torch.float64
    return nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def kept_losses_float64(model: Any, pool: TokenPool, row: int, keep: Keep) -> Tensor:
    response = np.flatnonzero(pool.response_mask[row])
    return token_losses_float64(model, pool, row)[response[keep(row, response)] - 1]


# -- the loss -----------------------------------------------------------------------------------


def test_loss_and_gradient_equal_the_written_out_ones(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    oracle = copy.deepcopy(network.hf).double()
    table = cleaned(data.pool, some, tmp_path)
    data.batch_size, data.token_budget = 20, 300  # global batches of 20, 20 and 8
    watch = fit(network, data, table)
    members = plan_epoch(ROWS, 20, data.seed, 0)
    assert len(watch.losses) == len(members) == 3
    for step, rows in enumerate(members):
        oracle.zero_grad()
        kept = torch.cat([kept_losses_float64(oracle, data.pool, int(r), some) for r in rows])
        kept.mean().backward()
        assert watch.losses[step] == pytest.approx(float(kept.detach().mean()), rel=1e-6)
        want = {
            f"network.hf.{n}": p.grad for n, p in oracle.named_parameters() if p.grad is not None
        }
        assert len(want) == 2 * 3 * 2 and all(gradient.any() for gradient in want.values())
        assert relative(watch.gradients[step], want) < 1e-5


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("keep", [some, everything])
def test_micro_batches_and_padding_change_only_rounding(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, layout: Layout, keep: Keep
) -> None:
    network = adapted(model_folder)
    table = cleaned(data.pool, keep, tmp_path)
    data.token_budget = BUDGETS[0]
    want = fit(network, data, table)
    assert len(want.losses) == 1
    data.layout = layout
    counts = []
    for budget in BUDGETS:
        data.token_budget = budget
        counts.append(len(data.training_loader(TokenRows(table)).dataset[0, 0].micro))
        got = fit(network, data, table)
        assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-6)
        assert relative(got.gradients[0], want.gradients[0]) < 1e-5
    assert counts[0] == 1 and 4 <= counts[1] <= 20
    assert counts[2] == (ROWS if keep is everything else ROWS - 8)


def test_the_check_above_can_fail(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    """The mean of micro-batch means, which trainers commonly compute, is another loss."""
    network = adapted(model_folder)
    table = cleaned(data.pool, some, tmp_path)
    data.token_budget = 300
    batch: GlobalBatch = data.training_loader(TokenRows(table)).dataset[0, 0]
    with torch.no_grad():
        means = [float(network(micro).mean()) for micro in batch.micro]
    right = fit(network, data, table).losses[0]
    assert abs(float(np.mean(means)) / right - 1.0) > 1e-4


def test_keeping_everything_is_ordinary_fine_tuning(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    table = cleaned(data.pool, everything, tmp_path)
    pool = data.pool
    # the labels of ordinary SFT: the token itself in a response, -100 elsewhere
    labels = table.lists("labels")
    for row in range(ROWS):
        ordinary = np.where(pool.response_mask[row], pool.input_ids[row], -100)
        np.testing.assert_array_equal(labels[row], ordinary)
    data.batch_size, data.token_budget = 20, 300
    learn = {"optimizer": partial(AdamW, lr=1e-2)}
    from_cleaned = fit(adapted(model_folder), data, table, learn, max_epochs=2)
    from_pool = fit(adapted(model_folder), data, pool, learn, max_epochs=2)
    assert len(from_pool.losses) == 6 and from_cleaned.losses == from_pool.losses
    assert from_pool.losses[-1] < from_pool.losses[0]
    for name, value in from_pool.weights[-1].items():
        assert torch.equal(from_cleaned.weights[-1][name], value)


def test_keeping_everything_is_the_mean_cross_entropy(
    model_folder: Path, data: TuluDataModule
) -> None:
    watch = fit(adapted(model_folder), data, data.pool)
    oracle = copy.deepcopy(adapted(model_folder).hf).double()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(ROWS):
            # transformers' own loss, which shifts and skips -100 by itself
            ids = torch.as_tensor(data.pool.input_ids[row], dtype=torch.int64)[None]
            mask = torch.as_tensor(data.pool.response_mask[row])[None]
            number = int(mask.sum())
            labels = torch.where(mask, ids, -100)
            total += float(oracle(input_ids=ids, labels=labels).loss) * number
            count += number
    assert watch.losses == [pytest.approx(total / count, rel=1e-6)]


def test_published_reduction_is_a_mean_of_means(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    oracle = copy.deepcopy(network.hf).double()
    members = plan_epoch(ROWS, 20, data.seed, 0)[0]

    def keep(row: int, response: np.ndarray) -> np.ndarray:
        if row in members[6:12]:  # a whole device batch without a kept token
            return np.zeros(len(response), dtype=bool)
        return some(row, response)

    table = cleaned(data.pool, keep, tmp_path)
    data.batch_size, data.token_budget, data.reduction = 20, 300, "published"
    watch = fit(network, data, table)
    with torch.no_grad():
        means = [
            torch.cat([kept_losses_float64(oracle, data.pool, int(r), keep) for r in six]).mean()
            for six in (members[:6], members[12:18], members[18:])
        ]
    assert watch.losses[0] == pytest.approx(float(torch.stack(means).mean()), rel=1e-6)
    data.reduction = "tokens"
    assert abs(fit(network, data, table).losses[0] / watch.losses[0] - 1.0) > 1e-4


def test_token_weights_count(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    """Weights of a cleaned pool multiply the losses; the denominator stays the kept tokens."""
    network = adapted(model_folder)
    table = cleaned(data.pool, everything, tmp_path)
    plain = fit(network, data, table)
    rows = TokenRows(table)
    halves = [np.full_like(table.lists("weight")[row], -0.5) for row in range(ROWS)]
    rows._weights = halves  # type: ignore[assignment]
    module = CleanedSFTModule(BaseConfig(""), lora=LORA, optimizer=still, schedule="constant")
    module.network = network
    module.continue_round()
    watch = Watch()
    trainer_for(watch).fit(module, data.training_loader(rows))
    assert watch.losses[0] == pytest.approx(-0.5 * plain.losses[0], rel=1e-6)


def test_emptied_samples_cost_nothing(data: TuluDataModule, tmp_path: Path) -> None:
    table = cleaned(data.pool, some, tmp_path)
    rows = TokenRows(table)
    assert (rows.counts == 0).sum() >= 8
    batch: GlobalBatch = data.training_loader(rows).dataset[0, 0]
    computed = sorted(row for micro in batch.micro for row in micro.rows)
    assert computed == np.flatnonzero(rows.counts).tolist()
    # nothing after the last kept token is computed either
    labels = table.lists("labels")
    last = [int(np.flatnonzero(labels[row] != -100).max()) for row in computed]
    assert sum(micro.tokens for micro in batch.micro) == sum(last)
    assert batch.kept == rows.counts.sum() and batch.responses == data.pool.response_counts().sum()


def test_a_batch_without_a_kept_token_changes_nothing(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    emptied = set(plan_epoch(ROWS, 12, data.seed, 0)[2].tolist())

    def keep(row: int, response: np.ndarray) -> np.ndarray:
        return np.full(len(response), row not in emptied)

    data.batch_size = 12
    # weight decay and momentum would move the weights even with a gradient of zero
    options = {
        "optimizer": partial(AdamW, lr=1e-2, weight_decay=0.1),
        "schedule": "linear",
        "warmup_ratio": 0.0,
    }
    watch = fit(adapted(model_folder), data, cleaned(data.pool, keep, tmp_path), options)
    changed = [relative(b, a) > 0 for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert changed == [True, False, True]
    assert watch.losses[2] == 0.0 and watch.logged[2]["train/kept_share"] == 0.0
    assert all(torch.isfinite(v).all() for v in watch.weights[-1].values())
    # the schedule goes on
    rates = [logged["train/learning_rate"] for logged in watch.logged]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_nothing_to_train_on_is_refused(data: TuluDataModule, tmp_path: Path) -> None:
    table = cleaned(data.pool, lambda row, at: np.zeros(len(at), dtype=bool), tmp_path)
    with pytest.raises(ValueError, match=r"data\.path: no token carries loss"):
        data.training_loader(TokenRows(table))


def test_kept_tokens_are_counted(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    table = cleaned(data.pool, some, tmp_path)
    data.batch_size = 16
    watch = fit(adapted(model_folder), data, table, max_epochs=2)
    kept = int(TokenRows(table).counts.sum())
    assert watch.logged[2]["train/kept_tokens_seen"] == kept
    assert watch.logged[5]["train/kept_tokens_seen"] == 2 * kept
    first = plan_epoch(ROWS, 16, data.seed, 0)[0]
    responses = data.pool.response_counts()[first].sum()
    share = TokenRows(table).counts[first].sum() / responses
    assert watch.logged[0]["train/kept_share"] == pytest.approx(share)


# -- optimiser and schedule -----------------------------------------------------------------------


class Rates(SGD):
    """Notes the learning rate of every step taken."""

    def __init__(self, params: Any, lr: float, taken: list[float]):
        super().__init__(params, lr=lr)
        self.taken = taken

    def step(self, closure: Any = None) -> Any:
        self.taken.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


def test_linear_schedule_with_warm_up(model_folder: Path, data: TuluDataModule) -> None:
    taken: list[float] = []
    data.batch_size = 10  # 5 steps an epoch
    options = {
        "optimizer": partial(Rates, lr=0.7, taken=taken),
        "schedule": "linear",
        "warmup_ratio": 0.25,  # ceil(2.5) = 3 of 10 steps
    }
    watch = fit(adapted(model_folder), data, data.pool, options, max_epochs=2)
    want = [0.0, 0.7 / 3, 1.4 / 3, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert taken == pytest.approx(want)
    assert [w["train/learning_rate"] for w in watch.logged] == pytest.approx(want)


def test_the_loop_can_set_another_learning_rate(model_folder: Path, data: TuluDataModule) -> None:
    taken: list[float] = []
    module = CleanedSFTModule(
        BaseConfig(""), lora=LORA, optimizer=partial(Rates, lr=0.7, taken=taken), warmup_ratio=0.0
    )
    module.network, module.learning_rate = adapted(model_folder), 0.3
    module.continue_round()
    data.batch_size = 16
    trainer_for().fit(module, data.training_loader(TokenRows(data.pool)))
    assert taken == pytest.approx([0.3, 0.2, 0.1])


def test_the_papers_optimiser() -> None:
    optimizer = paper_optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.0)


def test_gradient_clip(model_folder: Path, data: TuluDataModule) -> None:
    free = fit(adapted(model_folder), data, data.pool)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in free.gradients[0].values()))
    assert free.logged[0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    cut = fit(adapted(model_folder), data, data.pool, {"gradient_clip": norm / 4})
    assert cut.logged[0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    scaled = {n: g / 4 for n, g in free.gradients[0].items()}
    assert relative(cut.gradients[0], scaled) < 1e-5
    loose = fit(adapted(model_folder), data, data.pool, {"gradient_clip": norm * 4})
    assert relative(loose.gradients[0], free.gradients[0]) == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run(
    model_folder: Path, data: TuluDataModule
) -> None:
    network = adapted(model_folder)
    with torch.no_grad():
        network.hf.get_output_embeddings().weight[0] = float("nan")
    before = {n: p.clone() for n, p in network.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"sample 'row-\d+' is not finite at step 0 \(48"):
        fit(network, data, data.pool, {"optimizer": partial(SGD, lr=1.0)})
    for name, value in network.named_parameters():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "16-mixed"])
def test_precisions_that_spoil_training_are_refused(
    model_folder: Path, data: TuluDataModule, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(precision="32-true" if precision == "16-mixed" else precision)
    if precision == "16-mixed":  # on a CPU Lightning itself turns it into bf16-mixed
        monkeypatch.setattr(Trainer, "precision", property(lambda self: "16-mixed"))
    module = CleanedSFTModule(BaseConfig(str(model_folder)), lora=LORA)
    with pytest.raises(ValueError, match=rf"trainer\.precision: {precision}"):
        trainer.fit(module, data.training_loader(TokenRows(data.pool)))
    assert module.network is None


def test_a_schedule_without_an_end_is_refused(model_folder: Path, data: TuluDataModule) -> None:
    module = CleanedSFTModule(BaseConfig(str(model_folder)), lora=LORA)
    with pytest.raises(ValueError, match=r"trainer\.max_epochs: the schedule needs an end"):
        trainer_for(max_epochs=-1).fit(module, data.training_loader(TokenRows(data.pool)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 1.0}, r"model\.warmup_ratio: 1.0 is not in \[0, 1\)"),
        ({"gradient_clip": 0.0}, r"model\.gradient_clip: 0.0 is not positive"),
        ({"adapters": ["nowhere"]}, r"model\.adapters: nowhere holds no PEFT adapter"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanedSFTModule(BaseConfig("not loaded"), **options)
    with pytest.raises(ValueError, match=r"model\.save_merged: 4-bit"):
        CleanedSFTModule(BaseConfig("not loaded", load_in_4bit=True), save_merged=True)
    with pytest.raises(ValueError, match=r"4-bit weights cannot be trained in full"):
        CleanedSFTModule(BaseConfig("not loaded", load_in_4bit=True), lora=None)


# -- checkpoints ----------------------------------------------------------------------------------


def learner(model_folder: Path, lora: LoraSettings | None) -> CleanedSFTModule:
    seed_everything(7, verbose=False)
    return CleanedSFTModule(
        BaseConfig(str(model_folder)),
        lora=lora,
        optimizer=partial(AdamW, lr=1e-2),
        warmup_ratio=0.2,
        gradient_clip=1.0,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumed_run_equals_an_uninterrupted_one(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, dropout: float, stop: int
) -> None:
    data.batch_size, data.token_budget = 10, 300  # 5 steps an epoch, two epochs
    table = cleaned(data.pool, some, tmp_path)
    lora = replace(LORA, dropout=dropout)
    keeper = ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole, rest = Watch(), Watch()
    first = learner(model_folder, lora)
    trainer_for(keeper, whole, max_epochs=2).fit(first, data.training_loader(TokenRows(table)))
    again = learner(model_folder, lora)
    trainer_for(rest, max_epochs=2).fit(
        again,
        data.training_loader(TokenRows(table)),
        ckpt_path=tmp_path / "checkpoints" / f"step={stop}.ckpt",
    )
    assert len(whole.losses) == 10 and rest.losses == whole.losses[stop:]
    for name, value in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], value), name
    assert (again.kept_seen, again.response_seen) == (first.kept_seen, first.response_seen)
    assert rest.logged[-1]["train/learning_rate"] == whole.logged[-1]["train/learning_rate"]


def test_checkpoint_holds_trained_weights_only(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    network.save_last_adapter(tmp_path / "below")
    module = CleanedSFTModule(
        BaseConfig(str(model_folder)), adapters=[str(tmp_path / "below")], lora=LORA
    )
    keeper = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=1)
    trainer_for(keeper, max_steps=1).fit(module, data.training_loader(TokenRows(data.pool)))
    saved = torch.load(tmp_path / "end.ckpt", weights_only=False)
    names = set(saved["state_dict"])
    assert names == {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 3 * 2 and all(".round_1." in n for n in names)


# -- full fine-tuning -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning(data: TuluDataModule, tmp_path: Path, tied: bool) -> None:
    tokenizer = byte_level_tokenizer()
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder).double()
    data.batch_size, data.token_budget = ROWS, 300
    module = CleanedSFTModule(
        BaseConfig(str(folder)), lora=None, optimizer=partial(SGD, lr=0.5), schedule="constant"
    )
    watch = Watch()
    trainer_for(watch).fit(module, data.training_loader(TokenRows(data.pool)))
    losses = [kept_losses_float64(oracle, data.pool, row, everything) for row in range(ROWS)]
    torch.cat(losses).mean().backward()
    want = {f"network.hf.{n}": p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    assert len(want) == len(watch.gradients[0])
    assert relative(watch.gradients[0], want) < 1e-5
    assert module.network is not None
    module.network.freeze()
    module.network.save_merged(tmp_path / "out", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in oracle.named_parameters():
        stepped = parameter.detach() - 0.5 * want[f"network.hf.{name}"]
        got = loaded.get_parameter(name).double()
        torch.testing.assert_close(got, stepped, rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_resumes(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    data.batch_size = 16
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, rest = Watch(), Watch()
    loader = partial(data.training_loader, TokenRows(data.pool))
    trainer_for(keeper, whole).fit(learner(model_folder, None), loader())
    trainer_for(rest).fit(learner(model_folder, None), loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert all(torch.equal(rest.weights[-1][n], v) for n, v in whole.weights[-1].items())


# -- validation -----------------------------------------------------------------------------------


def test_validation_loss_is_the_token_mean(model_folder: Path, data: TuluDataModule) -> None:
    network = adapted(model_folder)
    oracle = copy.deepcopy(network.hf).double()
    module = CleanedSFTModule(BaseConfig(""), lora=LORA, optimizer=still, schedule="constant")
    module.network = network
    module.continue_round()
    data.token_budget = 300
    trainer = trainer_for()
    held_out = TokenRows(data.pool, np.arange(0, ROWS, 3))
    trainer.fit(module, data.training_loader(TokenRows(data.pool)), data.scoring_loader(held_out))
    with torch.no_grad():
        losses = [
            kept_losses_float64(oracle, data.pool, int(row), everything) for row in held_out.rows
        ]
    want = float(torch.cat(losses).mean())
    assert float(trainer.callback_metrics["validation/loss"]) == pytest.approx(want, rel=1e-5)
    means = float(np.mean([float(part.mean()) for part in losses]))
    assert abs(means / want - 1.0) > 1e-4  # the mean of means is another number
    assert network.hf.training  # validation hands training mode back


def test_a_fresh_adapter_starts_at_the_base(model_folder: Path, data: TuluDataModule) -> None:
    module = CleanedSFTModule(BaseConfig(str(model_folder)), optimizer=still, schedule="constant")
    watch = Watch()
    trainer_for(watch).fit(module, data.training_loader(TokenRows(data.pool)))
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    losses = [
        llama_nll_float64(base, data.pool.input_ids[row].tolist())[
            data.pool.response_positions(row) - 1
        ]
        for row in range(ROWS)
    ]
    assert watch.losses[0] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
    assert module.network is not None and module.network.stack == ["round_0"]
    # paper defaults: rank 64 on the seven linear modules of both layers
    assert len(watch.weights[0]) == 2 * 7 * 2
    assert {v.shape[0] for n, v in watch.weights[0].items() if "lora_A" in n} == {64}


# -- two processes --------------------------------------------------------------------------------

_TRAIN = """
import sys
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning import Trainer, seed_everything
from safetensors.torch import save_file
from torch.optim import AdamW
from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings, load_tokenizer
from tokenclean.training.module import CleanedSFTModule

model, path, validation, cache, cleaned, out, devices = sys.argv[1:8]


class Data(TuluDataModule):
    def train_dataloader(self):
        return self.training_loader(TokenRows(CleanedPool(Path(cleaned), Path(cache))))


data = Data(
    path, max_length=96, batch_size=10, token_budget=200, cache_dir=cache,
    validation_path=validation,
)
data.use_tokenizer(load_tokenizer(BaseConfig(model)))
seed_everything(7, verbose=False)
module = CleanedSFTModule(
    BaseConfig(model), optimizer=partial(AdamW, lr=1e-2, eps=1e-3), gradient_clip=1.0,
    lora=LoraSettings(r=4, dropout=0.0),
)
trainer = Trainer(
    accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto",
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, max_epochs=2, log_every_n_steps=1,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    state = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    metrics = {k: v.detach().clone() for k, v in trainer.callback_metrics.items()}
    metrics |= {k: torch.tensor(v) for k, v in module.last_step.items()}
    save_file({**state, **metrics}, out)
"""


@pytest.mark.slow
def test_two_processes_train_the_same_weights(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    emptied = plan_epoch(ROWS, 10, data.seed, 0)[1].tolist()
    lonely = plan_epoch(ROWS, 10, data.seed, 0)[3].tolist()

    def keep(row: int, response: np.ndarray) -> np.ndarray:
        if row in emptied or row in lonely[1:]:  # no sample for either, or for one of the two
            return np.zeros(len(response), dtype=bool)
        return some(row + 1, response) if row != lonely[0] else everything(row, response)

    cleaned(data.pool, keep, tmp_path)
    # the processes' shares of the validation pool differ by one batch
    held_out = [conversation(f"Add {i}?", f"It is {i}. " * (1 + i % 4)) for i in range(15)]
    validation = write_jsonl(tmp_path / "validation.jsonl", held_out)
    script = tmp_path / "train.py"
    script.write_text(_TRAIN, encoding="utf-8")
    results = []
    for devices in ("1", "2"):
        out = tmp_path / f"{devices}.safetensors"
        paths = [model_folder, data.paths[0], validation, tmp_path / "cache", tmp_path / "cleaned"]
        arguments = [*map(str, paths), str(out), devices]
        subprocess.run([sys.executable, str(script), *arguments], check=True, timeout=300)
        results.append(load_file(out))
    one, two = results
    trained = {k: v for k, v in one.items() if k.startswith("network.")}
    assert len(trained) == 28
    assert relative({k: two[k] for k in trained}, trained) < 1e-5
    for name in ("train/loss", "train/gradient_norm", "validation/loss"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4)


# -- memory, and the approximate backward pass ---------------------------------------------------


def test_checkpointing_follows_the_memory_at_hand(
    model_folder: Path, data: TuluDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = adapted(model_folder)
    data.batch_size = ROWS
    plain = fit(network, data, data.pool)
    assert not network.hf.is_gradient_checkpointing
    monkeypatch.setattr("tokenclean.estimate.free_memory", lambda device: 1)
    saving = fit(network, data, data.pool)
    assert network.hf.is_gradient_checkpointing
    assert relative(saving.gradients[0], plain.gradients[0]) < 1e-6
    # asked for or not, what the option says goes before the estimate
    fit(network, data, data.pool, {"gradient_checkpointing": False})
    assert not network.hf.is_gradient_checkpointing
    monkeypatch.undo()
    fit(network, data, data.pool, {"gradient_checkpointing": True})
    assert network.hf.is_gradient_checkpointing


def test_kept_backward_is_the_approximate_gradient(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    table = cleaned(data.pool, some, tmp_path)
    data.batch_size = ROWS
    exact = fit(adapted(model_folder), data, table)
    kept = fit(adapted(model_folder), data, table, {"backward": "kept_tokens"})
    again = fit(
        adapted(model_folder), data, table,
        {"backward": "kept_tokens", "gradient_checkpointing": True},
    )  # fmt: skip
    assert kept.losses == pytest.approx(exact.losses, rel=1e-6)
    assert 0.005 < relative(kept.gradients[0], exact.gradients[0]) < 1.0
    assert relative(again.gradients[0], kept.gradients[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, "model.backward: kept_tokens needs LoRA"),
        ({"base": BaseConfig("x", speed=Speed(lean_lora=False))}, "lean_lora"),
        ({"base": BaseConfig("x", load_in_4bit=True)}, "does not go with 4-bit"),
    ],
)
def test_kept_backward_needs_the_lean_forward(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanedSFTModule(**{"base": BaseConfig("x"), "backward": "kept_tokens", **options})


class Scalars(Logger):
    """A logger that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    name, version = "scalars", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3])])
def test_scalars_of_a_step_reach_the_logger(
    model_folder: Path, data: TuluDataModule, every: int, steps: list[int]
) -> None:
    data.batch_size = 10  # five steps
    logger = Scalars()
    watch = fit(adapted(model_folder), data, data.pool, logger=logger, log_every_n_steps=every)
    ours = [(step, m) for step, m in logger.seen if "train/loss" in m]
    assert [step for step, _ in ours] == steps
    assert [m["train/loss"] for _, m in ours] == [watch.losses[step] for step in steps]
