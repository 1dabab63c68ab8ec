"""The published way (UCSC-REAL/TokenCleaning), written again as the benchmark's baseline.

Same steps, same numbers, none of its code: batches of six in file order padded to the longest,
logits in float32 at every position, two cross-entropies over them, checkpointed activations, Python
lists of every token's loss, a sorted list of tuples, pickles, and a merged model on disk between
rounds. Nothing of tokenclean is imported.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_scheduler

#: rows per device and forward pass
ROWS = 6
NO_LOSS = -100


@dataclass
class Row:
    """One tokenised sample: its ids, and its ids again where they carry loss, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def _batches(rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
    return (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))


def _pad(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``attention_mask``, int64, (rows, longest row)."""
    width = max(len(row.input_ids) for row in rows)
    padded: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        rest = width - len(row.input_ids)
        padded["input_ids"].append(row.input_ids + [0] * rest)
        padded["labels"].append(row.labels + [NO_LOSS] * rest)
        padded["attention_mask"].append([1] * len(row.input_ids) + [0] * rest)
    return {name: torch.tensor(values, device=device) for name, values in padded.items()}


def _forward(model: Any, batch: dict[str, Tensor], device: str) -> tuple[Any, Tensor]:
    """The model's output and float32 logits of every position but the last.

    The labels go in, so the output holds a loss of the model's own, the first of the two. On a GPU
    under bf16, as published.
    """
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        output = model(**batch)
    return output, output.logits[:, :-1].float()


# -- scoring ----------------------------------------------------------------------------------


@torch.no_grad()
def score(model: Any, rows: Sequence[Row], max_length: int, device: str = "cpu") -> list[Any]:
    """Loss of every token of every row: lists padded to ``max_length``, 0.0 where no label is.

    Index j holds the loss of predicting token j.
    """
    losses: list[list[float]] = []
    for rows_of_batch in _batches(rows):
        batch = _pad(rows_of_batch, device)
        _, logits = _forward(model, batch, device)
        labels = batch["labels"][:, 1:]
        flat = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
        )
        for values in flat.view(labels.shape).tolist():
            losses.append([0.0, *values] + [0.0] * (max_length - 1 - len(values)))
    return losses


# -- selection --------------------------------------------------------------------------------


def select(scores: Sequence[Sequence[float]], keep: float) -> list[list[int]]:
    """1 for the top ``keep`` of all tokens, 0 for the others, per sample.

    Of equal scores the earlier token comes first: the sort is stable.
    """
    tokens = []
    for sample, values in enumerate(scores):
        for position, value in enumerate(values):
            tokens.append((value, sample, position))
    tokens.sort(key=lambda token: token[0], reverse=True)
    labels = [[0] * len(values) for values in scores]
    for _, sample, position in tokens[: int(len(tokens) * keep)]:
        labels[sample][position] = 1
    return labels


def differences(
    base: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], rows: Sequence[Row]
) -> list[list[float]]:
    """Scores of the response tokens of every row, from two padded tables."""
    return [
        [
            before - after
            for before, after, label in zip(one, other, row.labels, strict=False)
            if label != NO_LOSS
        ]
        for one, other, row in zip(base, reference, rows, strict=True)
    ]


def cleaned(rows: Sequence[Row], kept: Sequence[Sequence[int]]) -> list[Row]:
    """The rows with -100 at response tokens that were not kept."""
    result = []
    for row, marks in zip(rows, kept, strict=True):
        left = iter(marks)
        labels = [label if label != NO_LOSS and next(left) else NO_LOSS for label in row.labels]
        result.append(Row(row.input_ids, labels))
    return result


def write_pickle(path: Path, table: list[Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(table, file)


def read_pickle(path: Path) -> list[Any]:
    with path.open("rb") as file:
        table: list[Any] = pickle.load(file)
    return table


# -- training ---------------------------------------------------------------------------------


def checkpointing(model: Any, on: bool) -> None:
    """Recompute activations in the backward pass, as the published scripts do, or keep them."""
    if on:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


def train_step(model: Any, optimizer: Any, rows: Sequence[Row], device: str = "cpu") -> None:
    """One optimiser step over one global batch.

    The published mean of means would give another gradient than Eq. (1); for comparing numbers the
    losses are summed and divided by the kept tokens of the whole batch. The cost is the same.
    """
    kept = sum(label != NO_LOSS for row in rows for label in row.labels[1:])
    for rows_of_batch in _batches(rows):
        batch = _pad(rows_of_batch, device)
        # The output stays until the backward pass is done, and so does its own loss's graph.
        _output, logits = _forward(model, batch, device)
        labels = batch["labels"][:, 1:].reshape(-1)
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, reduction="none")
        (losses.sum() / kept).backward()
    optimizer.step()


# -- the whole loop ---------------------------------------------------------------------------


@dataclass
class Recipe:
    """How one round is trained."""

    r: int
    alpha: int
    learning_rate: float
    warmup_ratio: float
    gradient_clip: float
    batch_size: int
    epochs: int
    warmup_epochs: int
    keep: float
    modules: Sequence[str]


def self_evolving(
    parts: Sequence[Sequence[Row]],
    base: str,
    folder: Path,
    recipe: Recipe,
    max_length: int,
    device: str = "cpu",
) -> Path:
    """Warm-up on the first part, then score, sort and train part by part.

    Every stage reads its model from disk, and every round ends with a merged model there: 18 loads
    and 5 merged saves for five parts. Starting a process per stage is not part of it.

    Returns:
        Folder of the last merged model.
    """
    first = folder / "merged_0"
    model = _train_and_merge(parts[0], base, first, recipe, recipe.warmup_epochs, device)
    for number, rows in enumerate(parts[1:], start=1):
        tables = []
        for name, source in (("base", base), ("reference", str(model))):
            table = folder / f"{name}_{number}.pickle"
            write_pickle(table, score(_load(source, device), rows, max_length, device))
            tables.append(table)
        scores = differences(read_pickle(tables[0]), read_pickle(tables[1]), rows)
        chosen = cleaned(rows, select(scores, recipe.keep))
        target = folder / f"merged_{number}"
        model = _train_and_merge(chosen, str(model), target, recipe, recipe.epochs, device)
    return model


def _load(source: str, device: str) -> Any:
    gc.collect()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model.to(device).eval()


def _train_and_merge(
    rows: Sequence[Row], source: str, target: Path, recipe: Recipe, epochs: int, device: str
) -> Path:
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(recipe.modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(_load(source, device), config)
    model.train()
    checkpointing(model, True)
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    starts = range(0, len(rows), recipe.batch_size)
    steps = epochs * len(starts)
    warmup = round(recipe.warmup_ratio * steps)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    clipped = _Clipped(optimizer, trained, recipe.gradient_clip)
    for _ in range(epochs):
        for start in starts:
            train_step(model, clipped, rows[start : start + recipe.batch_size], device)
            schedule.step()
            optimizer.zero_grad()
    adapter = target.with_name(target.name + "_adapter")
    model.save_pretrained(str(adapter))
    del model
    merged = PeftModel.from_pretrained(_load(source, device), str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target))
    return target


@dataclass
class _Clipped:
    """An optimiser that clips the gradient's norm first."""

    optimizer: Any
    trained: list[Tensor]
    limit: float

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, self.limit)
        self.optimizer.step()
