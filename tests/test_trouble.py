"""Steps that cannot be taken: too little memory, and numbers that are not finite."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_training import ROWS, Watch, adapted, cleaned, everything, fit, relative, some
from test_training import data as data
from torch.optim import SGD, Optimizer

from tokenclean.data.batches import Batch, plan_epoch
from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.models import Network


def fits(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let no pass with more than so many tokens through; notes the tokens of those that were."""
    hidden, seen = Network.hidden, list[int]()

    def limited(self: Network, batch: Batch, *readers: Any) -> torch.Tensor:
        if batch.tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        seen.append(batch.tokens)
        return hidden(self, batch, *readers)

    monkeypatch.setattr(Network, "hidden", limited)
    return seen


def test_too_little_memory_halves_the_micro_batches(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    table = cleaned(data.pool, some, tmp_path)
    data.batch_size, data.token_budget = 20, 600  # three steps; one or two micro-batches each
    learn = {"optimizer": partial(SGD, lr=0.1)}
    want = fit(adapted(model_folder), data, table, learn)
    seen = fits(150, monkeypatch)
    got = fit(adapted(model_folder), data, table, learn)
    assert max(seen) <= 150 and len(want.losses) == len(got.losses) == 3
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    for ours, theirs in zip(got.gradients, want.gradients, strict=True):
        assert relative(ours, theirs) < 1e-6
    assert relative(got.weights[-1], want.weights[-1]) < 1e-6
    # 600, 300, 150 tokens: said once each, and not tried again in later steps
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 2 and all("at step 0" in text for text in said)
    assert "(CUDA out of memory. Tried to allocate 2 GiB.)" in said[0]


def test_a_step_is_begun_again_from_nothing(
    model_folder: Path, data: TuluDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What micro-batches before the one that failed have added to the gradient does not count."""
    data.token_budget = 300
    want = fit(adapted(model_folder), data, data.pool)
    calls, hidden, network = list[int](), Network.hidden, adapted(model_folder)

    def third_fails(self: Network, batch: Batch, *readers: Any) -> torch.Tensor:
        calls.append(batch.tokens)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return hidden(self, batch, *readers)

    monkeypatch.setattr(Network, "hidden", third_fails)
    got = fit(network, data, data.pool)
    assert max(calls[3:]) <= max(calls[:3]) // 2
    assert relative(got.gradients[0], want.gradients[0]) < 1e-6


def test_a_sample_that_does_not_fit_is_named(
    model_folder: Path, data: TuluDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = data.pool.response_counts() * 0
    for row in range(ROWS):
        lengths[row] = np.flatnonzero(data.pool.response_mask[row]).max()
    longest, length = int(np.argmax(lengths)), int(lengths.max())
    fits(length - 1, monkeypatch)
    message = (
        rf"step 0: sample 'row-\d+' does not fit by itself, with {length} tokens; set "
        r"data\.max_length lower"
    )
    with pytest.raises(ValueError, match=message):
        fit(adapted(model_folder), data, data.pool)
    assert (lengths == length).sum() >= 1 and lengths[longest] == length


def test_weights_over_the_whole_batch_need_its_memory(
    model_folder: Path, data: TuluDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits(100, monkeypatch)
    with pytest.raises(ValueError, match=r"out of memory .*set\s+model\.weighting_scope to micro"):
        fit(adapted(model_folder), data, data.pool, {"weighting": "talr"})


class Full(SGD):
    def step(self, closure: Any = None) -> Any:
        raise torch.OutOfMemoryError("no room for moments")


def test_an_optimizer_that_does_not_fit(model_folder: Path, data: TuluDataModule) -> None:
    with pytest.raises(ValueError, match=r"optimizer's step \(no room for moments\).*lora\.r"):
        fit(adapted(model_folder), data, data.pool, {"optimizer": partial(Full, lr=1.0)})


# -- numbers --------------------------------------------------------------------------------------


def poisoned(data: TuluDataModule, folder: Path, row: int, weight: float) -> CleanedPool:
    """A cleaned pool, one sample of which has such a weight, though it was opened without."""

    def weights(at: int, length: int) -> list[float]:
        return [2.0 if at == row else 1.0] * length

    table = cleaned(data.pool, everything, folder, weight=weights)
    for i, batch in enumerate(table.batches()):
        column, place = batch.column("weight"), batch.schema.get_field_index("weight")
        values = column.values.to_numpy().copy()
        values[values == 2.0] = weight
        changed = pa.ListArray.from_arrays(column.offsets, pa.array(values))
        table.batches()[i] = batch.set_column(place, "weight", changed)
    return table


@pytest.mark.parametrize("step", [0, 2])
def test_the_sample_of_a_loss_that_is_not_finite_is_named(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, step: int
) -> None:
    data.batch_size, data.token_budget = 16, 300
    row = int(plan_epoch(ROWS, 16, data.seed, 0)[step][5])
    table = poisoned(data, tmp_path, row, float("inf"))
    watch = Watch()
    message = rf"the loss of sample 'row-{row}' is not finite at step {step} \(1 of 16 samples"
    with pytest.raises(FloatingPointError, match=message):
        fit(adapted(model_folder), data, table, callbacks=[watch])
    assert len(watch.losses) == step


def test_the_sample_of_a_gradient_that_is_not_finite_is_named(
    model_folder: Path, data: TuluDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is a number, its gradient is none."""
    hidden = Network.hidden

    def broken(self: Network, batch: Batch, *readers: Any) -> torch.Tensor:
        states = hidden(self, batch, *readers)
        if 7 in batch.rows:
            at = sum(batch.counts[: batch.rows.index(7)])
            states = states + (states[at, 0] * 0.0).clamp(min=0.0).sqrt()  # d sqrt(0) = inf
        return states

    monkeypatch.setattr(Network, "hidden", broken)
    with pytest.raises(FloatingPointError, match=r"the gradient of sample 'row-7' is not finite"):
        fit(adapted(model_folder), data, data.pool)


class Wild(SGD):
    """The step that follows finite gradients spoils the weights."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))


def test_weights_that_are_not_finite_are_no_result(
    model_folder: Path, data: TuluDataModule
) -> None:
    def optimizer(params: Any) -> Optimizer:
        return Wild(params, lr=1.0)

    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        fit(adapted(model_folder), data, data.pool, {"optimizer": optimizer})
