"""Benchmark part: what token attributes cost over a pass that computes losses alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scripts.bench_measure import Line, Same, Side, interleave, memory_lines, say
from scripts.bench_workload import BUDGET, Options, make_llama, write_pool
from tokenclean.data.batches import collate, plan_batches
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.loss import token_nll
from tokenclean.models import Network
from tokenclean.scoring.attributes import AttributeSettings, TokenAttributes
from tokenclean.scoring.table import Column

#: depths of the model that are measured
LAYERS = (2, 4, 8)
COLUMNS: list[Column] = ["attention", "relevance"]
PLAIN, WITH = "losses alone", "with attention and relevance"


class _Words:
    """A tokenizer's stand-in: any word is three tokens."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, text: str, **options: Any) -> Any:
        ids = np.random.default_rng(len(text)).integers(3, self.vocabulary, 3)
        return SimpleNamespace(input_ids=ids.tolist())

    def decode(self, ids: list[int]) -> str:
        return "word"

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocabulary)}


def one_pass(
    network: Network, pool: TokenPool, chosen: np.ndarray, columns: list[Column]
) -> list[np.ndarray]:
    """Losses and columns of every response token, as `ScoringModule` computes them.

    The relevance of the whole vocabulary is computed anew, as it is once per pass.
    """
    rows = TokenRows(pool, chosen)
    device, on_gpu = network.device, network.device.type == "cuda"
    words = _Words(network.hf.config.vocab_size)
    settings = AttributeSettings("maths")
    attributes = TokenAttributes(columns, settings, network, rows, lambda: words)
    parts: list[torch.Tensor] = []
    with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=on_gpu):
        for members in plan_batches(rows.lengths, BUDGET, network.layout):
            batch = collate([rows[int(i)] for i in members], network.layout).to(device)
            states = network.hidden(batch, attributes.readers)
            found = attributes.of(batch)
            nll = token_nll(states, network.head, batch.targets)
            parts.append(torch.stack([nll, *(found[c] for c in columns)]).cpu())
    return list(torch.cat(parts, dim=1).numpy())


def attributes(options: Options) -> Iterator[Line]:
    """One pass over the same samples, with and without, for models of several depths."""
    for vocabulary in options.vocabularies:
        for layers in LAYERS:
            with tempfile.TemporaryDirectory() as folder:
                yield from _attributes(options, vocabulary, layers, Path(folder))


def _attributes(
    options: Options, vocabulary: int | None, layers: int, folder: Path
) -> Iterator[Line]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = make_llama(options.shape, vocabulary, options.seed, dtype, layers)
    network = Network(model.to(options.device))
    network.check_on_device()
    size = options.samples * max(options.repeats, 2)
    entries = model.config.vocab_size
    pool = write_pool(folder / "pool", size + size // 20, options.seed, entries, options.shrink)
    case = f"{options.shape}, {layers} layers, V = {entries:,}"
    say(f"attributes: {case}")

    def side(columns: list[Column]) -> Side:
        def prepare(repeat: int) -> Callable[[], Any]:
            first = max(repeat, 0) * options.samples
            chosen = np.arange(first, first + options.samples)
            return lambda: one_pass(network, pool, chosen, columns)

        return prepare

    def check(results: dict[str, Any]) -> Same:
        return {"nll identical": bool((results[PLAIN][0] == results[WITH][0]).all())}

    sides = {WITH: side(COLUMNS), PLAIN: side([])}
    label = f"attributes {case}"
    measured = interleave(sides, options.repeats, options.device, label, check)
    yield measured.line("attributes", case, WITH, PLAIN, same=measured.same, aim="<= 1.5")
    # Twice as many samples, so that batches are full.
    chosen = np.arange(2 * options.samples)
    runs = {
        WITH: lambda: one_pass(network, pool, chosen, COLUMNS),
        PLAIN: lambda: one_pass(network, pool, chosen, []),
    }
    yield from memory_lines("attributes", case, runs, options.device)
