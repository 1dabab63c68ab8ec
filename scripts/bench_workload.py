"""What the benchmark runs on: samples as long as the paper's, models of a known shape.

Nothing is downloaded: weights and token ids are random, from a seed. Only lengths matter to speed
and memory, so lengths are what is made to look like the real pool.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokenclean.arrow import ROWS_PER_SHARD, TableWriter, list_array
from tokenclean.data.datamodule import CPU_BUDGET, GPU_BUDGET
from tokenclean.data.pool import KIND, TokenPool
from tokenclean.models import LoraSettings, Network
from tokenclean.publish import MANIFEST, complete_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
EOS = 1
#: tokens per forward pass on our side
BUDGET = GPU_BUDGET if torch.cuda.is_available() else CPU_BUDGET
#: share of the response tokens that is kept
KEEP = 0.6
#: tokens kept of each sample in the paper
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Source:
    """Samples of one source in a pool of 50,000, and their mean lengths in tokens."""

    name: str
    samples: int
    prompt: float
    completion: float


#: Mean lengths as published for these sets (OASST1: all turns). The counts were chosen so that the
#: pool has what is known of the paper's: 24.1 M tokens, 67 % of them response tokens, and 89 % of
#: these from WizardLM. With the distribution below it has 23.8 M, 67 % and 90 %.
SOURCES = (
    Source("wizardlm", 33_400, 122, 430),
    Source("flan_v2", 9_700, 356, 31),
    Source("oasst1", 2_900, 35, 340),
    Source("dolly", 2_500, 118, 91),
    Source("alpaca", 1_500, 28, 65),
)
#: standard deviation over mean, of prompts and of completions
VARIATION = 0.8

#: Shapes by name, as arguments of `LlamaConfig`. The first two are for a CPU; the vocabulary of
#: ``small`` is an option of the benchmark.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
    },
}
#: What mean lengths and 2048 are divided by, to go with the smaller shapes.
SHRINK = {"small": 4, "tiny": 16}


@dataclass
class Options:
    """What is run, and how large.

    Args:
        parts: see `PARTS`.
        vocabulary: vocabularies of the CPU shapes; other shapes have their own.
        repeats: of the parts that take seconds; training and run, which take minutes, are repeated
            half as often, memory not at all.
        device: cpu or cuda.
        shape: see `SHAPES`.
        samples: scored per repeat, each repeat its own.
        batch: samples per optimiser step.
        tokens: sizes of the in-memory selections.
        table_rows: samples of the tables on disk.
        pool_rows: samples of the scaling part's smallest pools, scored and selected from.
        run_samples: size of the planted pool.
        threads: torch's.
        seed: of weights, samples and scores.
        out: where the JSON goes.
    """

    parts: list[str]
    vocabulary: list[int]
    repeats: int
    device: str
    shape: str
    samples: int
    batch: int
    tokens: list[int]
    table_rows: int
    pool_rows: tuple[int, int]
    run_samples: int
    threads: int
    seed: int
    out: Path

    @property
    def few_repeats(self) -> int:
        return math.ceil(self.repeats / 2)

    @property
    def vocabularies(self) -> list[int | None]:
        return [None] if "vocab_size" in SHAPES[self.shape] else list(self.vocabulary)

    @property
    def shrink(self) -> int:
        return SHRINK.get(self.shape, 1)


# -- samples ----------------------------------------------------------------------------------


def draw_lengths(
    samples: int, rng: np.random.Generator, shrink: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of samples in random file order, log-normal per source, cut at 2048 / ``shrink``.

    Returns:
        Index into `SOURCES`, prompt tokens and response tokens of each sample; int64, (samples,).
        Prompts have at least one token; a response may be cut away altogether.
    """
    counts = np.array([source.samples for source in SOURCES], dtype=np.float64)
    chosen = rng.choice(len(SOURCES), size=samples, p=counts / counts.sum())
    sigma = np.sqrt(np.log(1.0 + VARIATION**2))
    means = np.array([(s.prompt, s.completion) for s in SOURCES])[chosen] / shrink
    drawn = rng.lognormal(np.log(means) - sigma**2 / 2, sigma)
    lengths = np.maximum(1, np.rint(drawn)).astype(np.int64)
    limit = MAX_LENGTH // shrink
    prompts = np.minimum(lengths[:, 0], limit)
    return chosen, prompts, np.minimum(lengths[:, 1], limit - prompts)


def write_pool(
    folder: Path, samples: int, seed: int, vocabulary: int = 1024, shrink: int = 1
) -> TokenPool:
    """A token pool of random ids on disk, as tokenising real samples would have left it.

    Rows whose response was cut away are left out, as they are from any pool.
    """
    rng = np.random.default_rng(seed)
    # By the thousand, so that pools of a few hundred begin with the same samples.
    drawn = draw_lengths(-(-samples // 1000) * 1000, rng, shrink)
    sources, prompts, responses = (values[:samples] for values in drawn)
    rows = np.flatnonzero(responses > 0)
    with complete_folder(folder) as partial:
        writer = TableWriter(partial)
        for first in range(0, len(rows), ROWS_PER_SHARD):
            block = rows[first : first + ROWS_PER_SHARD]
            ids, masks = [], []
            for row in block:
                length = prompts[row] + responses[row]
                tokens = rng.integers(3, vocabulary, size=length)
                if length < MAX_LENGTH // shrink:
                    tokens[-1] = EOS
                ids.append(tokens.astype(np.int32))
                masks.append(np.arange(length) >= prompts[row])
            columns = {
                "id": [f"sample-{row}" for row in block],
                "source": [SOURCES[sources[row]].name for row in block],
                "input_ids": list_array(ids, pa.int32()),
                "response_mask": list_array(masks, pa.bool_()),
            }
            writer.write(pa.record_batch(columns))
        writer.close()
        write_json(
            partial / MANIFEST,
            {
                "kind": KIND,
                "fingerprint": f"random-{samples}-{seed}-{vocabulary}-{shrink}",
                "tokenizer": "random",
                "vocabulary": "random",
                "template": "random",
                "max_length": MAX_LENGTH // shrink,
                "eos_id": EOS,
                "statistics": {},
                "rows": len(rows),
            },
        )
    return TokenPool(folder)


# -- models -----------------------------------------------------------------------------------


def make_llama(
    shape: str, vocabulary: int | None, seed: int, dtype: torch.dtype, layers: int | None = None
) -> Any:
    """A `LlamaForCausalLM` with random weights.

    ``vocabulary`` and ``layers`` go before the shape's own.
    """
    options: dict[str, Any] = {"max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": False}
    options |= SHAPES[shape]
    if vocabulary is not None:
        options["vocab_size"] = vocabulary
    if layers is not None:
        options["num_hidden_layers"] = layers
    config = LlamaConfig(**options, bos_token_id=0, eos_token_id=EOS, pad_token_id=2)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """A second model over the same weights: two ways to run them, one copy in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def add_trained_adapter(network: Network, seed: int) -> None:
    """A LoRA of the paper's size without dropout, with B away from zero.

    A fresh LoRA has B = 0, under which base and reference are one and every gradient of A is zero.
    """
    torch.manual_seed(seed)
    network.add_adapter(LoraSettings(dropout=0.0))
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
