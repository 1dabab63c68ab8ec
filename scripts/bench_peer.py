"""TRL's SFTTrainer on the same masked tokens: the benchmark's outside comparison in training.

TRL is no dependency of the project; without it the rows are reported as not run. Scoring every
token of a pool is nothing that TRL does, so there it has no say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import is_flash_attn_2_available

from scripts.bench_measure import Timed
from scripts.bench_published import ROWS, Row
from tokenclean.machine import settled

MISSING = "peer not installed: pip install trl"


def version() -> str | None:
    """TRL's version, or None where it is not installed."""
    try:
        import trl
    except ImportError:
        return None
    return str(trl.__version__)


def options(batch_size: int, device: str) -> dict[str, Any]:
    """The `SFTConfig` that is run: what makes TRL fast without changing the gradient.

    Rows without padding need flash attention to pay off. Under SDPA they get a block mask from
    their position ids, which is as correct but costs the square of a micro-batch's tokens: padding,
    with rows sorted by length inside the global batch, was faster on a CPU.
    """
    padding_free = attention(device) == "flash_attention_2"
    return {
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": max(1, batch_size // ROWS),
        "padding_free": padding_free,
        "train_sampling_strategy": "random" if padding_free else "batch_rebalance",
        "max_length": None,  # padding_free asks for it; the rows are cut already
        "gradient_checkpointing": False,
        "loss_type": "nll",  # in chunks since 1.16, logits are never materialised
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }


def attention(device: str) -> str:
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


def facts(batch_size: int, device: str) -> dict[str, Any]:
    """What ran, for the report."""
    how = {"version": version(), "attention": attention(device)}
    return how | options(batch_size, device)


class _Clock(TrainerCallback):
    """Times the step and holds on to its gradients, which the trainer throws away."""

    def __init__(self, device: str):
        self.device, self.seconds, self.processor = device, 0.0, 0.0
        self.gradients: list[Any] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self.processor = -settled(self.device), -time.process_time()

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = [p.grad for p in model.parameters() if p.requires_grad]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += settled(self.device)
        self.processor += time.process_time()


def step(model: Any, rows: Sequence[Row], device: str, folder: Path) -> Callable[[], Timed]:
    """One optimiser step over one global batch.

    Timed from the first forward pass to the end of the optimiser's step: the trainer's set-up and
    its collating are left out.

    Args:
        model: PEFT model to train, with dropout 0.
        rows: the global batch.
        device: where to.
        folder: for what the trainer writes.

    Returns:
        What runs the step. Its result are the gradients of the trained parameters, in the model's
        order.
    """
    from trl import SFTConfig, SFTTrainer

    model.set_attn_implementation(attention(device))
    config = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **options(len(rows), device),
    )
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "length": [len(row.input_ids) for row in rows],
    }
    clock = _Clock(device)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=_no_tokenizer(),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> Timed:
        trainer.train()
        return Timed(clock.seconds, clock.processor, clock.gradients)

    return run


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer asks for one to know the pad token; the data are tokenised."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
