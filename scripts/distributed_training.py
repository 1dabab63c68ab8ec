"""Training on several processes against one: losses, last gradient, and weights.

    python scripts/distributed_training.py [--processes 1,2,4] [--steps 6]

One CPU thread each, no download: a tiny Llama with random weights on random tokens. Kept tokens are
spread unevenly; in the second step one sample alone has any, so all processes but one have none,
in the third there are none at all. Dropout is 0. Prints, for each way to train, the largest
relative difference to one process: DDP on 2 and 4, FSDP2 on 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import Callback, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from tokenclean.data.batches import plan_epoch
from tokenclean.data.cleaned import CleanedPool, cleaned_schema, write_cleaned_pool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings
from tokenclean.models.sharding import is_sharded, whole_and_sharded
from tokenclean.trainer import Trainer
from tokenclean.training.module import CleanedSFTModule

BATCH, VOCABULARY = 8, 64
#: row of a sample that `Spoilt` spoils
SPOILT = 11
#: what is trained, and how it is weighted
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, recomputed": {"gradient_checkpointing": True},
    "LoRA, dft": {"weighting": "dft"},
    "LoRA, rho1_online": {"weighting": "rho1_online"},
    "all weights": {"lora": None},
    "all weights, rho1_online": {"lora": None, "weighting": "rho1_online"},
}
#: name -> processes and the trainer's strategy
SETTINGS = {
    "1": (1, "auto"),
    "2": (2, "ddp"),
    "4": (4, "ddp"),
    "2 sharded": (2, "fsdp2"),
}


class Data(TuluDataModule):
    """A cleaned pool without a tokenizer."""

    def __init__(self, folder: Path):
        super().__init__(str(folder / "cleaned"), batch_size=BATCH, token_budget=60)
        self.table = CleanedPool(folder / "cleaned", folder / f"unpacked-{os.getpid()}")

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str | None = None) -> None:
        pass

    def trained_rows(self) -> TokenRows:
        return TokenRows(self.table)


class Module(CleanedSFTModule):
    """An adapter that is not zero to begin with, or else half of its gradient would be."""

    def start_round(self) -> None:
        super().start_round()
        generator = torch.Generator().manual_seed(3)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.1 * drawn)


class Told(Callback):
    """Tells one process to stop after the second step."""

    def __init__(self, mine: int, told: int):
        self.is_told = mine == told

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.is_told and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Spoilt(Callback):
    """Makes one sample's weights infinite."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        for micro in batch.micro:
            if SPOILT in micro.rows:
                at = micro.rows.index(SPOILT)
                first = sum(micro.counts[:at])
                micro.weights[first : first + micro.counts[at]] = torch.inf


class Watch(Callback):
    """Loss and norm of every step, and the last step's gradient."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.gradient: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.steps.append([module.last_step["train/loss"], module.last_step["train/gradient_norm"]])
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self.gradient[f"gradient {name}"] = _whole(parameter.grad).clone()


def _whole(tensor: Any) -> Tensor:
    sharded = whole_and_sharded([tensor])[1]
    return tensor.full_tensor() if sharded else tensor


def write_inputs(folder: Path, steps: int) -> None:
    """A tiny model and a cleaned pool."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = steps * BATCH
    plan = plan_epoch(rows, BATCH, 0, 0)
    emptied = {int(row) for row in (*plan[1][1:], *plan[2])}
    columns: dict[str, list[Any]] = {name: [] for name in cleaned_schema(False).names}
    for row in range(rows):
        length = int(rng.integers(8, 40))
        ids = rng.integers(0, VOCABULARY, length)
        response = np.arange(length) >= 4
        kept = response & (rng.random(length) < rng.random()) & (row not in emptied)
        if row == plan[1][0]:
            kept = response
        known = rng.normal(3.0, 1.0, length).astype(np.float32)
        values = {
            "id": f"row-{row}", "source": "drawn", "input_ids": ids.tolist(),
            "labels": np.where(kept, ids, -100).tolist(), "response_mask": response.tolist(),
            "base_nll": known.tolist(), "reference_nll": known.tolist(),
            "score": [0.0] * length, "priority": [None] * length, "reason": [0] * length,
            "weight": [1.0] * length, "round": 1,
        }  # fmt: skip
        for name, value in values.items():
            columns[name].append(value)
    schema = cleaned_schema(False)
    batch = pa.record_batch(columns, schema=schema)
    write_cleaned_pool(folder / "cleaned", [batch], schema, {})


def work(
    folder: Path,
    setting: str,
    ways: list[str],
    inputs: Path | None = None,
    checkpoints: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train in every way on what `write_inputs` wrote; the first process writes what it found.

    Args:
        folder: for what is found.
        setting, ways: of `SETTINGS` and `WAYS`.
        inputs: if not there as well.
        checkpoints: see `Trainer.fit_within`.
        callbacks: further ones.
    """
    inputs = inputs or folder
    torch.set_num_threads(1)
    processes, strategy = SETTINGS[setting]
    for way in ways:
        seed_everything(7, verbose=False)
        module = Module(
            BaseConfig(str(inputs / "model")),
            **{
                "lora": LoraSettings(r=4, alpha=8, dropout=0.0),
                "optimizer": partial(AdamW, lr=1e-3, eps=1e-4, fused=True),
                "warmup_ratio": 0.0, "gradient_clip": 1.0,
                **WAYS[way],
            },
        )  # fmt: skip
        watch = Watch()
        trainer = Trainer(
            accelerator="cpu", devices=processes, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, max_epochs=1, callbacks=[watch, *callbacks],
        )  # fmt: skip
        trainer.fit_within(checkpoints, module, Data(inputs))
        assert module.network is not None
        assert is_sharded(module.network) == ("sharded" in setting)
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        module.network.freeze()
        if trainer.is_global_zero:
            weights = {n: p.detach() for n, p in module.named_parameters() if n in trained}
            found = {"steps": torch.tensor(watch.steps, dtype=torch.float64)}
            found |= watch.gradient | {f"weight {n}": p for n, p in weights.items()}
            found = {name: value.contiguous() for name, value in found.items()}
            save_file(found, str(folder / f"{setting}-{way}.safetensors"))


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative difference of the losses and norms, the gradient, and the weights."""
    assert got.keys() == want.keys()
    losses, right = got["steps"], want["steps"]
    assert losses.shape == right.shape
    gap = (losses - right).abs() / right.abs().clamp(min=1e-12)
    found = {"losses": float(gap[:, 0].max()), "norms": float(gap[:, 1].max())}
    for kind in ("gradient", "weight"):
        names = [name for name in want if name.startswith(f"{kind} ")]
        assert names
        squares = [
            float(nn.functional.mse_loss(got[n].double(), want[n].double(), reduction="sum"))
            for n in names
        ]
        length = sum(float(want[n].double().square().sum()) for n in names)
        found[kind] = (sum(squares) / length) ** 0.5
    return found


def run(folder: Path, setting: str, ways: list[str]) -> None:
    """`work` in as many processes as the setting says."""
    program = [str(Path(__file__).resolve()), "--work", setting, "--folder", str(folder)]
    command = [sys.executable, *program, "--ways", "|".join(ways)]
    if SETTINGS[setting][0] > 1:
        launch = ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={SETTINGS[setting][0]}"]
        command[1:1] = launch
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=environment, timeout=600)


def table(settings: list[str], ways: list[str], steps: int = 6) -> list[dict[str, Any]]:
    """The differences of every setting and way to one process."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, steps)
        for setting in ["1", *(s for s in settings if s != "1")]:
            run(folder, setting, ways)
            for way in ways:
                want = load_file(str(folder / f"1-{way}.safetensors"))
                got = load_file(str(folder / f"{setting}-{way}.safetensors"))
                if setting != "1":
                    rows.append({"way": way, "processes": setting, **differences(got, want)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", default="1,2,4,2 sharded", help="of " + ", ".join(SETTINGS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ways", default="|".join(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    ways = given.ways.split("|")
    if given.work:
        work(given.folder, given.work, ways)
        return
    rows = table(given.processes.split(","), ways, given.steps)
    print("| trained | processes | losses | norms | gradient | weights |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        numbers = " | ".join(f"{row[k]:.1e}" for k in ("losses", "norms", "gradient", "weight"))
        print(f"| {row['way']} | {row['processes']} | {numbers} |")
    worst = max(max(row[k] for k in ("losses", "gradient", "weight")) for row in rows)
    print(f"\nlargest difference: {worst:.1e} (allowed: 1e-5)")
    raise SystemExit(worst > 1e-5)


if __name__ == "__main__":
    main()
