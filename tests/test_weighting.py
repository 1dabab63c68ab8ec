"""Online token weights and signed weights, against written-out losses in float64."""

from __future__ import annotations

import copy
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from test_training import (
    BUDGETS,
    LORA,
    ROWS,
    Watch,
    adapted,
    cleaned,
    everything,
    fit,
    relative,
    some,
    trainer_for,
)
from test_training import data as data  # the fixture
from torch import Tensor
from torch.optim import AdamW

from tokenclean.data.batches import Layout, Sample, collate, plan_epoch
from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig
from tokenclean.named import names_in
from tokenclean.training.module import CleanedSFTModule
from tokenclean.training.weights import PACKAGE, Tokens, Weighting, make_weighting, top_share
from tokenclean.trust import trusting


def tokens(nll: list[float], rows: list[int] | None = None, **columns: list[float]) -> Tokens:
    """Tokens of one sample, unless told otherwise; ``base_nll`` stands for ``base.nll``."""
    wide = partial(torch.tensor, dtype=torch.float64)
    return Tokens(
        torch.tensor(rows or [0] * len(nll)),
        wide(nll),
        {name.replace("_nll", ".nll"): wide(values) for name, values in columns.items()},
    )


def weigh(name: str, given: Tokens, **options: Any) -> list[float]:
    found: list[float] = make_weighting(name, options).weigh(given).tolist()
    return found


# -- by hand ------------------------------------------------------------------------------------

LN2 = math.log(2.0)


def test_probabilities() -> None:
    halves = tokens([0.0, LN2, 2 * LN2, 4 * LN2])  # p = 1, 1/2, 1/4, 1/16
    assert weigh("dft", halves) == pytest.approx([1.0, 0.5, 0.25, 0.0625])
    assert weigh("beyond_ll", halves, alpha=2) == pytest.approx([1, 0.25, 0.0625, 1 / 256])
    assert weigh("profit", halves) == [1.0, 1.0, 1.0, 0.0]
    assert weigh("profit", halves, threshold=0.3) == [1.0, 1.0, 0.0, 0.0]
    assert weigh("profit", tokens([0.0]), threshold=0.999) == [1.0]


def test_entropy_of_the_top_twenty() -> None:
    # all twenty equal; one alone; two halves that make up 0.8 of all
    given = tokens([1.0] * 3, top_entropy=[math.log(20), 0.0, LN2], top_mass=[1.0, 1.0, 0.8])
    assert weigh("eaft", given) == pytest.approx([1.0, 0.0, LN2 / math.log(20)])
    # -2 * 0.4 ln 0.4
    plain = [1.0, 0.0, -0.8 * math.log(0.4) / math.log(20)]
    assert weigh("eaft", given, renormalised=False) == pytest.approx(plain)


def test_median_sets_the_temperature() -> None:
    # median 2: exp(-1/2), exp(-1), exp(-3/2), scaled to mean 1
    raw = np.exp([-0.5, -1.0, -1.5])
    assert weigh("talr", tokens([1.0, 2.0, 3.0])) == pytest.approx((raw / raw.mean()).tolist())
    # an even number: median 2.5
    raw = np.exp(np.array([-1.0, -2.0, -3.0, -7.0]) / 2.5)
    got = weigh("talr", tokens([7.0, 1.0, 2.0, 3.0], [3, 1, 2, 2]))
    assert got == pytest.approx((raw / raw.mean())[[3, 0, 1, 2]].tolist())
    # half of the losses 0: those share the weight, nothing is divided by 0
    assert weigh("talr", tokens([0.0, 0.0, 0.0, 5.0])) == pytest.approx([4 / 3] * 3 + [0.0])


def test_excess_loss_ranks_the_batch() -> None:
    given = tokens([3.0, 1.0, 2.0, 0.5, 4.0], reference_nll=[1.0, 0.5, 0.0, 0.5, 2.0])
    # excess 2, 0.5, 2, 0, 2: int(5 * 0.5) = 2, and of the three equals the first two
    assert weigh("rho1_online", given, keep=0.5) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert weigh("rho1_online", given, keep=1.0) == [1.0] * 5
    assert weigh("rho1_online", given, keep=0.1) == [0.0] * 5
    # earlier in the pool, whatever the order in the batch
    turned = tokens([1.0] * 4, [7, 7, 2, 2], reference_nll=[0.0] * 4)
    assert weigh("rho1_online", turned, keep=0.5) == [0.0, 0.0, 1.0, 1.0]


def test_progress_and_attention() -> None:
    # gains 0, 1, 2 -> 0, 1/2, 1; halves with the attention: 0.45, 0.3, 0.5
    given = tokens([2.0, 1.0, 0.0], base_nll=[2.0] * 3, prompt_attention=[0.9, 0.1, 0.0])
    assert weigh("sstoken", given) == [0.0, 0.0, 1.0]  # int(3 * 0.6) = 1
    assert weigh("sstoken", given, keep=0.7) == [1.0, 0.0, 1.0]
    assert weigh("sstoken", given, keep=0.7, progress=1.0) == [0.0, 1.0, 1.0]
    assert weigh("sstoken", given, keep=0.4, progress=0.0) == [1.0, 0.0, 0.0]
    # before the first step the models are the same, up to rounding: attention decides
    same = tokens([1.0, 1.0, 1.0], base_nll=[1.0, 1.0002, 1.0], prompt_attention=[0.2, 0.1, 0.3])
    assert weigh("sstoken", same, keep=0.7) == [1.0, 0.0, 1.0]
    assert weigh("sstoken", same, keep=0.7, noise=0.0) == [0.0, 1.0, 1.0]
    # sample by sample
    two = tokens(
        [2.0, 1.0, 5.0, 5.0], [4, 4, 1, 1], base_nll=[2.0, 2.0, 7.0, 6.0],
        prompt_attention=[0.0] * 4,
    )  # fmt: skip
    assert weigh("sstoken", two, keep=0.5) == [0.0, 1.0, 1.0, 0.0]


def test_top_share_takes_the_earlier_of_equals() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    assert top_share(values, 0.4).tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


# -- through training ---------------------------------------------------------------------------


def drawn(seed: int) -> Callable[[int, int], list[float]]:
    """A column of made-up losses."""
    return lambda row, length: np.random.default_rng([seed, row]).gamma(4.0, 2.0, length).tolist()


def with_losses(pool: TokenPool, keep: Any, folder: Path, **given: Any) -> CleanedPool:
    return cleaned(pool, keep, folder, base_nll=drawn(1), reference_nll=drawn(2), **given)


class Facts:
    """What float64 knows of the trained tokens of some rows, in pool order."""

    def __init__(self, model: Any, table: CleanedPool, rows: Any, layer: int = 1):
        self.rows: list[int] = []
        losses, every, self.base, self.reference, self.attention = [], [], [], [], []
        self.weight: list[float] = []
        for row in sorted(int(r) for r in rows):
            ids = torch.as_tensor(table.lists("input_ids")[row].copy(), dtype=torch.int64)
            trained = np.flatnonzero(table.lists("labels")[row] != -100)
            output = model(input_ids=ids[None], output_attentions=True)
            logits = output.logits[0, trained - 1]
            assert logits.dtype == torch.float64
            losses.append(torch.nn.functional.cross_entropy(logits, ids[trained], reduction="none"))
            every.append(logits.detach().softmax(-1))
            prompt = ~torch.as_tensor(table.lists("response_mask")[row].copy())
            mean = output.attentions[layer][0].mean(0).detach()
            for position in trained.tolist():
                self.rows.append(row)
                self.attention.append(float(mean[position, prompt].sum()))
                self.base.append(float(table.lists("base_nll")[row][position]))
                self.reference.append(float(table.lists("reference_nll")[row][position]))
                self.weight.append(float(table.lists("weight")[row][position]))
        self.nll = torch.cat(losses)
        self.every = torch.cat(every)

    @property
    def known(self) -> list[float]:
        found: list[float] = self.nll.detach().tolist()
        return found


def best(values: list[float], keep: float) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: int(len(values) * keep)]
    return [float(i in order) for i in range(len(values))]


def of_rho1(f: Facts, keep: float) -> list[float]:
    return best([a - b for a, b in zip(f.known, f.reference, strict=True)], keep)


def of_sstoken(f: Facts, keep: float) -> list[float]:
    result: list[float] = []
    for row in dict.fromkeys(f.rows):
        at = [i for i, r in enumerate(f.rows) if r == row]
        gain = [f.base[i] - f.known[i] for i in at]
        low, high = min(gain), max(gain)
        scaled = [(g - low) / (high - low) if high > low else 0.0 for g in gain]
        values = [0.5 * s + 0.5 * f.attention[i] for s, i in zip(scaled, at, strict=True)]
        result += best(values, keep)
    return result


def of_talr(f: Facts) -> list[float]:
    tau = float(np.median(f.known))
    raw = [math.exp(-loss) ** (1 / tau) for loss in f.known]
    return [w / float(np.mean(raw)) for w in raw]


def of_eaft(f: Facts, renormalised: bool) -> list[float]:
    result = []
    for probabilities in f.every:
        top = sorted(probabilities.tolist(), reverse=True)[:20]
        total = sum(top) if renormalised else 1.0
        result.append(-sum(p / total * math.log(p / total) for p in top) / math.log(20))
    return result


def weighted(weights: list[float], f: Facts, over: str = "tokens") -> Tensor:
    """sum w v nll / N, or / sum w v."""
    all_weights = [w * v for w, v in zip(weights, f.weight, strict=True)]
    total = sum(w * loss for w, loss in zip(all_weights, f.nll, strict=True))
    assert isinstance(total, Tensor)
    return total / (len(f.nll) if over == "tokens" else sum(all_weights))


#: weighting, options, the loss whose gradient it must have (up to a constant in the loss itself)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Facts], Tensor]]] = {
    "dft": ("dft", {}, lambda f: (-(-f.nll).exp()).mean()),
    "beyond": ("beyond_ll", {"alpha": 0.7}, lambda f: ((1 - (-0.7 * f.nll).exp()) / 0.7).mean()),
    "profit": (
        "profit",
        {"threshold": 0.002},
        lambda f: weighted([float(x < -math.log(0.002)) for x in f.known], f),
    ),
    "profit_of_the_left": (
        "profit",
        {"threshold": 0.002, "mean_over": "weights"},
        lambda f: f.nll[f.nll < -math.log(0.002)].mean(),
    ),
    "dft_over_weights": (
        "dft",
        {"mean_over": "weights"},
        lambda f: weighted([math.exp(-x) for x in f.known], f, "weights"),
    ),
    "eaft": ("eaft", {}, lambda f: weighted(of_eaft(f, True), f)),
    "eaft_plain": ("eaft", {"renormalised": False}, lambda f: weighted(of_eaft(f, False), f)),
    "talr": ("talr", {}, lambda f: weighted(of_talr(f), f)),
    "rho1": ("rho1_online", {"keep": 0.4}, lambda f: weighted(of_rho1(f, 0.4), f, "weights")),
    "rho1_over_tokens": (
        "rho1_online",
        {"keep": 0.4, "mean_over": "tokens"},
        lambda f: weighted(of_rho1(f, 0.4), f),
    ),
    "sstoken": ("sstoken", {}, lambda f: weighted(of_sstoken(f, 0.6), f, "weights")),
}


def oracle_of(network: Any) -> Any:
    model = copy.deepcopy(network.hf).double()
    model.set_attn_implementation("eager")
    return model


def gradient_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        f"network.hf.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_written_out_loss(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, case: str
) -> None:
    """However the batch is cut and laid out; on top of an offline mask."""
    name, options, loss = CASES[case]
    network = adapted(model_folder)
    oracle = oracle_of(network)
    table = with_losses(data.pool, some, tmp_path)
    want = gradient_of(oracle, loss(Facts(oracle, table, range(ROWS))))
    assert len(want) == 2 * 3 * 2 and all(gradient.any() for gradient in want.values())
    # without the weights it is another one
    assert relative(gradient_of(oracle, Facts(oracle, table, range(ROWS)).nll.mean()), want) > 0.05
    settings = {"weighting": name, "weighting_options": options}
    whole: Layout = "packed" if name == "sstoken" else "padded"
    for budget, layout in ((BUDGETS[0], whole), (300, "packed")):
        data.token_budget, data.layout = budget, layout  # type: ignore[assignment]
        watch = fit(network, data, table, settings)
        assert relative(watch.gradients[0], want) < 1e-5, (budget, layout)


def test_loss_and_weights_are_logged(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    table = with_losses(data.pool, everything, tmp_path)
    data.token_budget = 300
    facts = Facts(oracle_of(network), table, range(ROWS))
    options = {"weighting": "rho1_online", "weighting_options": {"keep": 0.4}}
    watch = fit(network, data, table, options)
    share = int(len(facts.nll) * 0.4) / len(facts.nll)
    logged = watch.logged[0]
    assert logged["train/weight_mean"] == pytest.approx(share)
    assert logged["train/weight_zero_share"] == pytest.approx(1 - share)
    want = float(weighted(of_rho1(facts, 0.4), facts, "weights").detach())
    assert watch.losses[0] == pytest.approx(want, rel=1e-6)
    plain = fit(network, data, table)
    assert not any(key.startswith("train/weight") for key in plain.logged[0])


def test_weights_of_the_pool_multiply_the_online_ones(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    oracle = oracle_of(network)

    def weight(row: int, length: int) -> list[float]:
        return np.random.default_rng([5, row]).uniform(0.1, 1.0, length).tolist()

    table = with_losses(data.pool, some, tmp_path, weight=weight)
    data.token_budget = 300
    facts = Facts(oracle, table, range(ROWS))
    for over in ("tokens", "weights"):
        options = {"weighting": "dft", "weighting_options": {"mean_over": over}}
        want = gradient_of(oracle, weighted([math.exp(-x) for x in facts.known], facts, over))
        facts = Facts(oracle, table, range(ROWS))
        assert relative(fit(network, data, table, options).gradients[0], want) < 1e-5


def test_a_micro_batch_as_the_batch(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = adapted(model_folder)
    oracle = oracle_of(network)
    table = with_losses(data.pool, everything, tmp_path)
    data.token_budget = 300
    micro = data.training_loader(TokenRows(table)).dataset[0, 0].micro
    assert len(micro) > 3
    total: Any = 0.0
    for batch in micro:
        facts = Facts(oracle, table, batch.rows)
        total = total + weighted(of_talr(facts), facts) * len(facts.nll)
    count = int(TokenRows(table).counts.sum())
    want = gradient_of(oracle, total / count)
    options = {"weighting": "talr", "weighting_scope": "micro"}
    with caplog.at_level(logging.INFO, "tokenclean"):
        got = fit(network, data, table, options)
        over_all = fit(network, data, table, {"weighting": "talr"})
    assert relative(got.gradients[0], want) < 1e-5
    assert relative(over_all.gradients[0], want) > 1e-3
    assert "talr weighs tokens over each micro-batch" in caplog.text
    assert "talr weighs tokens over the global batch: activations of about" in caplog.text


def test_recomputed_activations_change_nothing(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    table = with_losses(data.pool, some, tmp_path)
    data.token_budget = 300
    for name in ("talr", "sstoken"):
        plain = fit(network, data, table, {"weighting": name, "gradient_checkpointing": False})
        again = fit(network, data, table, {"weighting": name, "gradient_checkpointing": True})
        assert relative(again.gradients[0], plain.gradients[0]) < 1e-6


def test_clipping_comes_last(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    network = adapted(model_folder)
    table = with_losses(data.pool, everything, tmp_path)
    data.token_budget = 300
    options = {"weighting": "rho1_online", "weighting_options": {"keep": 0.2}}
    free = fit(network, data, table, options)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in free.gradients[0].values()))
    cut = fit(network, data, table, {**options, "gradient_clip": norm / 4})
    assert cut.logged[0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    scaled = {name: gradient / 4 for name, gradient in free.gradients[0].items()}
    assert relative(cut.gradients[0], scaled) < 1e-5


def test_no_step_where_every_weight_is_zero(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    table = with_losses(data.pool, everything, tmp_path)
    data.batch_size = 24
    for over in ("tokens", "weights"):
        options = {
            "weighting": "profit",
            "weighting_options": {"threshold": 0.9999, "mean_over": over},
            "optimizer": partial(AdamW, lr=1e-2, weight_decay=0.1),
        }
        network = adapted(model_folder)
        before = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
        watch = fit(network, data, table, options)
        assert [m["train/weight_zero_share"] for m in watch.logged] == [1.0, 1.0]
        assert watch.losses == [0.0, 0.0]
        assert all(torch.equal(watch.weights[-1][f"network.{n}"], w) for n, w in before.items())


def test_learning_with_each(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    """Several steps, in which the model leaves its base."""
    table = with_losses(data.pool, some, tmp_path)
    data.batch_size, data.token_budget = 20, 300
    for name in names_in(PACKAGE):
        options = {
            "weighting": name,
            # a random model finds every token unlikely
            "weighting_options": {"profit": {"threshold": 0.002}, "beyond_ll": {"alpha": 1}}.get(
                name
            ),
            "optimizer": partial(AdamW, lr=1e-2),
        }
        watch = fit(adapted(model_folder), data, table, options)
        assert len(watch.losses) == 3 and all(map(math.isfinite, watch.losses))
        assert relative(watch.weights[-1], watch.weights[0]) > 1e-4, name


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "dtf"}, r"model\.weighting: 'dtf' is not one of beyond_ll, dft, eaft"),
        (
            {"weighting": "profit", "weighting_options": {"tau": 0.1}},
            r"model\.weighting: the options of profit have no tau; they are mean_over, threshold",
        ),
        (
            {"weighting": "dft", "weighting_options": {"mean_over": "samples"}},
            r"mean_over = 'samples' is not of type",
        ),
        (
            {"weighting": "rho1_online", "weighting_options": {"keep": 0.0}},
            r"model\.weighting_options: keep = 0.0 is not in \(0, 1\]",
        ),
        (
            {"weighting": "sstoken", "weighting_options": {"progress": 2}},
            r"model\.weighting_options: progress = 2.0 is not in \[0, 1\]",
        ),
        (
            {"weighting": "beyond_ll", "weighting_options": {"alpha": 0}},
            r"model\.weighting_options: alpha = 0.0 is not positive",
        ),
        (
            {"weighting": "profit", "weighting_options": {"threshold": 1}},
            r"model\.weighting_options: threshold = 1.0 is not in \[0, 1\)",
        ),
        ({"weighting_options": {"keep": 0.5}}, r"model\.weighting_options: there is no"),
        (
            {"weighting": "talr", "backward": "kept_tokens"},
            r"model\.weighting: talr looks at the whole batch.*model\.weighting_scope",
        ),
        ({"negative_weight": -0.25}, r"model\.negative_weight: -0.25 is negative"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanedSFTModule(BaseConfig("not loaded"), **options)


def test_missing_losses_are_named_before_training(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    module = CleanedSFTModule(BaseConfig("not loaded"), weighting="rho1_online")
    with pytest.raises(ValueError, match=r"reference_nll of every .* is no cleaned pool; .*--ref"):
        data.training_loader(TokenRows(data.pool), module.carry)

    def holes(row: int, length: int) -> list[float | None]:
        return [None if row == 7 and at > length - 3 else 1.0 for at in range(length)]

    table = cleaned(data.pool, everything, tmp_path, reference_nll=holes)
    with pytest.raises(ValueError, match=rf"model\.weighting: .* sample 'row-7' of {tmp_path}/"):
        data.training_loader(TokenRows(table), module.carry)
    # rows that are not trained on, and tokens that carry no loss, need none
    others = np.delete(np.arange(ROWS), 7)
    data.training_loader(TokenRows(table, others), module.carry)
    half = cleaned(
        data.pool, lambda row, at: np.arange(len(at)) < len(at) - 2, tmp_path / "half",
        reference_nll=holes,
    )  # fmt: skip
    data.training_loader(TokenRows(half), module.carry)


def test_attention_is_not_read_from_padded_batches(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    network.layout = data.layout = "padded"
    table = with_losses(data.pool, some, tmp_path)
    with pytest.raises(ValueError, match="attention cannot be read from"):
        fit(network, data, table, {"weighting": "sstoken"})


def test_a_weighting_of_ones_own(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "thirds.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from tokenclean.training.weights import Weighting\n"
        "@dataclass(frozen=True)\n"
        "class Thirds(Weighting):\n"
        "    times: int = 1\n"
        "    def weights(self, tokens):\n"
        "        return torch.full_like(tokens.nll, self.times / 3)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options: dict[str, Any] = {"weighting": "mine.thirds", "weighting_options": {"times": 2}}
    with pytest.raises(ValueError, match=r"model\.weighting: .*--trust_import mine\.thirds"):
        CleanedSFTModule(BaseConfig("not loaded"), **options)
    network = adapted(model_folder)
    with trusting(["--trust_import=mine"]):
        plain, scaled = fit(network, data, data.pool), fit(network, data, data.pool, options)
    assert scaled.losses[0] == pytest.approx(plain.losses[0] * 2 / 3, rel=1e-6)
    for module in ("mine.thirds", "mine"):
        sys.modules.pop(module)


def test_every_file_holds_a_frozen_weighting() -> None:
    names = names_in(PACKAGE)
    assert names == ["beyond_ll", "dft", "eaft", "profit", "rho1_online", "sstoken", "talr"]
    for name in names:
        made = make_weighting(name)
        assert isinstance(made, Weighting) and made == make_weighting(name)


# -- what samples bring along -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_extra_numbers_and_prompts_follow_their_tokens(layout: Layout) -> None:
    def sample(row: int, positions: list[int], length: int) -> Sample:
        at = np.array(positions)
        extra = {"base_nll": (100 * row + at).astype(np.float32)}
        prompt = np.arange(length) < positions[0]
        ids, ones = np.arange(length, dtype=np.int32), np.ones(len(at), np.float32)
        return Sample(row, ids, at, ones, length, extra, prompt)

    batch = collate([sample(1, [2, 3], 4), sample(2, [1, 3, 5], 6)], layout)
    assert batch.rows == [2, 1]
    assert batch.extra["base_nll"].tolist() == [201, 203, 205, 102, 103]
    assert batch.prompt is not None
    want = [1, 0, 0, 0, 0, 0, 1, 1, 0, 0] + ([0, 0] if layout == "padded" else [])
    assert batch.prompt.flatten().int().tolist() == want
    assert batch.prompt.shape == batch.input_ids.shape
    moved = batch.to("meta")
    assert moved.extra["base_nll"].is_meta and moved.prompt is not None and moved.prompt.is_meta
    plain = collate([Sample(0, np.arange(3), np.array([1]), np.ones(1, np.float32))], layout)
    assert plain.extra == {} and plain.prompt is None


def test_rows_carry_what_is_asked_for(data: TuluDataModule, tmp_path: Path) -> None:
    table = with_losses(data.pool, some, tmp_path)
    rows = TokenRows(table)
    carrying = rows.carrying(["base_nll", "prompt"])
    sample, plain = carrying[1], rows[1]
    assert plain.extra == {} and plain.prompt is None
    np.testing.assert_array_equal(sample.positions, plain.positions)
    losses = table.lists("base_nll")[1][sample.positions]
    np.testing.assert_array_equal(sample.extra["base_nll"], losses)
    assert sample.extra["base_nll"].dtype == np.float32
    assert sample.prompt is not None
    np.testing.assert_array_equal(sample.prompt, ~data.pool.response_mask[1])
    # attention is read at the target's own row, so that row is computed
    assert sample.length == len(sample.input_ids) > plain.length
    assert not rows.carrying(["base_nll"])[1].length > plain.length


# -- tokens to unlearn --------------------------------------------------------------------------


def signed(row: int, length: int) -> list[float]:
    """Every third token is to be unlearnt; rows 12 to 23 hold nothing else."""
    if 12 <= row < 24:
        return [-1.0] * length
    return [-1.0 if at % 3 == 0 else 1.0 for at in range(length)]


def test_unlearning_is_the_written_out_loss(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    network = adapted(model_folder)
    oracle = oracle_of(network)
    table = with_losses(data.pool, everything, tmp_path, weight=signed)
    data.batch_size = 12
    for budget, layout in ((10**6, "packed"), (200, "padded")):
        data.token_budget, data.layout = budget, layout  # type: ignore[assignment]
        watch = fit(network, data, table, {"negative_weight": 0.6}, max_epochs=2)
        assert len(watch.losses) == 8
        for step in (0, 1, 7):
            rows = plan_epoch(ROWS, 12, data.seed, step // 4)[step % 4]
            facts = Facts(oracle, table, rows)
            weight = torch.tensor(facts.weight)
            good, bad = facts.nll[weight > 0].mean(), facts.nll[weight < 0].mean()
            ramp = 0.6 * step / 7
            loss = good - ramp * bad
            assert watch.logged[step]["train/negative_weight"] == pytest.approx(ramp)
            assert watch.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
            assert relative(watch.gradients[step], gradient_of(oracle, loss)) < 1e-5
    positive = int((weight > 0).sum())
    assert watch.logged[7]["train/kept_share"] == pytest.approx(positive / len(weight))


def test_nothing_to_learn_beside_is_no_step(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    data.batch_size = 12
    lost = set(plan_epoch(ROWS, 12, data.seed, 0)[2].tolist())

    def weight(row: int, length: int) -> list[float]:
        return [-1.0 if row in lost else 1.0] * length

    table = with_losses(data.pool, everything, tmp_path, weight=weight)
    options = {"optimizer": partial(AdamW, lr=1e-2, weight_decay=0.1)}
    watch = fit(adapted(model_folder), data, table, options)
    changed = [relative(b, a) > 0 for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert changed == [True, False, True]
    assert [m["train/kept_share"] for m in watch.logged] == [1.0, 1.0, 0.0, 1.0]


def test_what_does_not_go_with_unlearning(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    table = with_losses(data.pool, everything, tmp_path, weight=signed)
    with pytest.raises(ValueError, match=r"model\.weighting: this cleaned pool has negative"):
        fit(adapted(model_folder), data, table, {"weighting": "dft"})
    data.reduction = "published"
    with pytest.raises(ValueError, match=r"data\.reduction: published does not go with"):
        data.training_loader(TokenRows(table))
    data.reduction = "tokens"
    negative = with_losses(
        data.pool, everything, tmp_path / "all", weight=lambda row, length: [-1.0] * length
    )
    with pytest.raises(ValueError, match=r"data\.path: no token carries loss"):
        data.training_loader(TokenRows(negative))


@pytest.mark.parametrize("what", ["unlearning", "rho1_online"])
def test_a_resumed_run_goes_on_where_it_was(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, what: str
) -> None:
    data.batch_size, data.token_budget = 16, 300  # three steps an epoch
    given = {"weight": signed} if what == "unlearning" else {}
    table = with_losses(data.pool, everything, tmp_path, **given)

    def learner() -> CleanedSFTModule:
        seed_everything(7, verbose=False)
        return CleanedSFTModule(
            BaseConfig(str(model_folder)),
            lora=LORA,
            optimizer=partial(AdamW, lr=1e-2),
            weighting=None if what == "unlearning" else what,
        )

    def loader(module: CleanedSFTModule) -> Any:
        return data.training_loader(TokenRows(table), module.carry)

    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, rest, first, again = Watch(), Watch(), learner(), learner()
    trainer_for(keeper, whole, max_epochs=2).fit(first, loader(first))
    path = tmp_path / "step=2.ckpt"
    trainer_for(rest, max_epochs=2).fit(again, loader(again), ckpt_path=path)
    assert len(whole.losses) == 6 and rest.losses == whole.losses[2:]
    if what == "unlearning":
        ramp = [m["train/negative_weight"] for m in whole.logged]
        assert ramp == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])


def test_mixed_precision(model_folder: Path, data: TuluDataModule, tmp_path: Path) -> None:
    network = adapted(model_folder)
    table = with_losses(data.pool, some, tmp_path)
    data.token_budget = 300
    for name in ("eaft", "talr"):
        exact = fit(network, data, table, {"weighting": name})
        mixed = fit(network, data, table, {"weighting": name}, precision="bf16-mixed")
        assert 1e-6 < relative(mixed.gradients[0], exact.gradients[0]) < 0.05


# -- two processes ------------------------------------------------------------------------------

_TRAIN = """
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning import Trainer, seed_everything
from safetensors.torch import save_file
from torch.optim import AdamW
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.models import BaseConfig, LoraSettings, load_tokenizer
from tokenclean.training.module import CleanedSFTModule

model, cleaned, cache, out, devices = sys.argv[1:6]
results = {}
for name, options in json.loads(sys.argv[6]).items():
    data = TuluDataModule(cleaned, batch_size=10, token_budget=200, cache_dir=cache)
    data.use_tokenizer(load_tokenizer(BaseConfig(model)))
    seed_everything(7, verbose=False)
    module = CleanedSFTModule(
        BaseConfig(model), optimizer=partial(AdamW, lr=1e-2, eps=1e-3), gradient_clip=1.0,
        lora=LoraSettings(r=4, dropout=0.0), weighting=name, weighting_options=options,
    )
    trainer = Trainer(
        accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, max_epochs=2,
    )
    trainer.fit(module, data)
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    last = {k: torch.tensor(v) for k, v in module.last_step.items()}
    results |= {f"{name}/{k}": v.contiguous() for k, v in {**trained, **last}.items()}
if trainer.is_global_zero:
    save_file(results, out)
"""


@pytest.mark.slow
def test_two_processes_weigh_as_one(
    model_folder: Path, data: TuluDataModule, tmp_path: Path
) -> None:
    emptied = plan_epoch(ROWS, 10, data.seed, 0)[1].tolist()
    lonely = plan_epoch(ROWS, 10, data.seed, 0)[3].tolist()

    def keep(row: int, response: np.ndarray) -> np.ndarray:
        if row in emptied or row in lonely[1:]:  # no sample for either, or for one of the two
            return np.zeros(len(response), dtype=bool)
        return some(row + 1, response) if row != lonely[0] else everything(row, response)

    with_losses(data.pool, keep, tmp_path)
    manifest = tmp_path / "cleaned" / "manifest.json"
    facts = {"tokenizer": data.pool.manifest["tokenizer"], "max_length": 96}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **facts}))
    script = tmp_path / "train.py"
    script.write_text(_TRAIN, encoding="utf-8")
    weightings = {"talr": {}, "rho1_online": {"keep": 0.4}, "sstoken": {}}
    found = []
    for devices in ("1", "2"):
        out = tmp_path / f"{devices}.safetensors"
        paths = [model_folder, tmp_path / "cleaned", tmp_path / "cache", out]
        arguments = [*map(str, paths), devices, json.dumps(weightings)]
        subprocess.run([sys.executable, str(script), *arguments], check=True, timeout=300)
        found.append(load_file(out))
    one, two = found
    for name in weightings:
        trained = {k: v for k, v in one.items() if k.startswith(f"{name}/network.")}
        assert len(trained) == 28
        assert relative({k: two[k] for k in trained}, trained) < 1e-5, name
        for value in ("loss", "gradient_norm", "weight_mean", "weight_zero_share"):
            key = f"{name}/train/{value}"
            assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-4), key
