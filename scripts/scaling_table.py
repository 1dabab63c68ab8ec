"""What ever larger pools and models cost: the table of SCALING.md, from its formulas.

    python scripts/scaling_table.py

Nothing is run. FLOPs and memory are `tokenclean.estimate`'s; what was measured stands below with
the way to measure it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import LlamaConfig

from tokenclean.arrow import ROWS_PER_SHARD, SHARDS_PER_FILE
from tokenclean.data.datamodule import GPU_BUDGET
from tokenclean.estimate import (
    EFFICIENCY,
    ModelShape,
    Setting,
    Work,
    adapter_bytes,
    forward_flops,
    parameter_bytes,
    peak_bytes,
    training_flops,
)
from tokenclean.models import LoraSettings
from tokenclean.scoring.shards import BATCHES, LEAST, MOST
from tokenclean.trainer import PATIENCE

#: H100: dense bfloat16 products, FLOP/s.
PEAK = 989e12
#: bytes/s into one device: over NVLink (half of 900 GB/s), over a 400 Gb/s network of its own
NVLINK, NETWORK = 450e9, 50e9

# The paper's pool (arXiv 2502.01968): 50 k samples, 24.1 M tokens.
TOKENS_PER_ROW = 482
#: mean number of tokens that a token attends to; sum of n (n + 1) / 2 over the sum of n
CONTEXT = 361
RESPONSES, KEEP, SUBSETS = 0.67, 0.6, 5

# Measured by scripts/scaling_rates.py: one process, one core; SCALING.md says on what.
TOKENISE_NS, MERGE_NS, TABLE_NS, SELECT_NS, CLEANED_NS = 4_000, 30, 95, 41, 390
POOL_BYTES, TABLE_BYTES, SHARD_BYTES, CLEANED_BYTES = 4.2, 12.1, 4.05, 12.4
#: bytes in memory, per row, of a process that scores: `TokenRows` 42.4 (rows, lengths, counts,
#: negative, responses), its place in a batch 8.3, Arrow's view of the pool 7.7
ROW_BYTES = 58
#: bytes/s of SHA-256 on that core; bytes of JSON text per token (a guess)
HASHED, TEXT_BYTES = 0.3e9, 4.5
#: regions that Linux lets a process map (vm.max_map_count), and what Python and torch take of them
MAPS, MAPS_TAKEN = 65_530, 663
#: row groups that Arrow's reader takes by default, and tokens in one of a cleaned pool
ROW_GROUPS, GROUP_TOKENS = 1_000_000, 1 << 17


@dataclass(frozen=True)
class Case:
    """A pool, a model and the machines.

    Attributes:
        tokens: of the pool.
        model: its name.
        config: its public shape.
        devices: that work side by side.
    """

    tokens: int
    model: str
    config: LlamaConfig
    devices: int

    @property
    def rows(self) -> int:
        return round(self.tokens / TOKENS_PER_ROW)

    @property
    def responses(self) -> int:
        return round(self.tokens * RESPONSES)

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of_config(self.config)

    def work(self, share: float = 1.0, kept: float = 1.0) -> Work:
        """A share of the pool, of whose response tokens so many are targets."""
        tokens, targets = self.tokens * share, self.responses * share * kept
        return Work(
            round(self.rows * share), round(tokens), round(tokens * CONTEXT), round(targets)
        )


def llama(hidden: int, width: int, layers: int, heads: int, tied: bool = False) -> LlamaConfig:
    """A Llama 3: vocabulary of 128,256, 8 key and value heads, heads of width 128."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


CASES = (
    Case(24_100_000, "Llama 3.2 3B", llama(3072, 8192, 28, 24, tied=True), 8),
    Case(10**9, "Llama 3.1 8B", llama(4096, 14336, 32, 32), 8),
    Case(10**12, "Llama 3 70B", llama(8192, 28672, 80, 64), 1024),
)


def scoring_hours(case: Case, share: float = 1.0) -> float:
    """Device-hours of a pass over a share of the pool."""
    return forward_flops(case.shape, case.work(share)) / (EFFICIENCY["score"] * PEAK) / 3600


def training_hours(case: Case, share: float, kept: float) -> float:
    """Device-hours of an epoch of LoRA over a share of the pool."""
    flops = training_flops(case.shape, case.work(share, kept), LoraSettings())
    return flops / (EFFICIENCY["train"] * PEAK) / 3600


def run_hours(case: Case) -> float:
    """Device-hours of self-evolving cleaning: base scores, warm-up on D_0, then the rounds."""
    rest = 1 - 1 / SUBSETS
    return (
        scoring_hours(case)
        + scoring_hours(case, rest)
        + training_hours(case, 1 / SUBSETS, 1.0)
        + training_hours(case, rest, KEEP)
    )


def shard_batches(case: Case) -> int:
    """Batches of a shard; see `tokenclean.scoring.shards`."""
    batches = -(-case.tokens // GPU_BUDGET)
    return max(1, min(BATCHES, batches // LEAST), -(-batches // MOST))


def shard_seconds(case: Case) -> float:
    """What a process computes before it can stop."""
    batches = -(-case.tokens // GPU_BUDGET)
    return scoring_hours(case) * 3600 * shard_batches(case) / batches


def disk(case: Case) -> dict[str, float]:
    """Bytes of what a run of two score tables leaves or needs for a while."""
    return {
        "pool": POOL_BYTES * case.tokens,
        "a score table": TABLE_BYTES * case.responses,
        "shards and their merged values, for a while": (SHARD_BYTES + 4) * case.responses,
        "cleaned pool": CLEANED_BYTES * case.tokens,
    }


def alone_hours(case: Case) -> dict[str, float]:
    """Hours of what one process does while the others wait."""
    tables = case.responses * (2 - 1 / SUBSETS)
    return {
        "tokenise": case.tokens * TOKENISE_NS / 3.6e12,
        "merge shards, write two tables": tables * (MERGE_NS + TABLE_NS) / 3.6e12,
        "write the cleaned pool": case.tokens * CLEANED_NS / 3.6e12,
    }


def _weights(case: Case) -> int:
    return parameter_bytes(case.shape, torch.bfloat16)


def waiting_hours(case: Case) -> float:
    """Device-hours of those that wait for what one process does alone."""
    return sum(alone_hours(case).values()) * (case.devices - 1)


def _peaks(case: Case, split: int = 1) -> tuple[int, int]:
    """Peak of scoring with the bare base, and of training LoRA with recomputation.

    Args:
        case: whose model.
        split: devices that share the decoder layers.
    """
    half = torch.bfloat16
    scoring = Setting(None, training=False, weights=half, compute=half, split=split)
    training = replace(scoring, lora=LoraSettings(), training=True)
    return (
        peak_bytes(case.shape, scoring, GPU_BUDGET),
        peak_bytes(case.shape, training, GPU_BUDGET, checkpointing=True),
    )


def rows_of_table() -> list[tuple[str, list[str]]]:
    """Name of each line, and its cells, one per case."""
    shapes = {case.model: case.shape for case in CASES}
    lora = LoraSettings()
    lines: list[tuple[str, list[str]]] = []

    def line(name: str, *cells: str) -> None:
        lines.append((name, list(cells)))

    line("rows", *(_count(c.rows) for c in CASES))
    line("response tokens", *(_count(c.responses) for c in CASES))
    line("parameters", *(_count(shapes[c.model].parameters) for c in CASES))
    line("devices, P", *(f"{c.devices:,}" for c in CASES))
    line("**compute**")
    line(
        "scoring, FLOP per token",
        *(_count(forward_flops(shapes[c.model], c.work()) / c.tokens) for c in CASES),
    )
    line("one scoring pass, device-hours", *(_number(scoring_hours(c)) for c in CASES))
    line(
        "one epoch of LoRA on what is kept, device-hours",
        *(_number(training_hours(c, 1.0, KEEP)) for c in CASES),
    )
    line("self-evolving run, device-hours", *(_number(run_hours(c)) for c in CASES))
    line("... on P devices, hours", *(_number(run_hours(c) / c.devices) for c in CASES))
    line("**one process, the others waiting**")
    for name in alone_hours(CASES[0]):
        line(f"{name}, hours", *(_number(alone_hours(c)[name]) for c in CASES))
    line("devices that wait for it, device-hours", *(_number(waiting_hours(c)) for c in CASES))
    line(
        "select, hours of one process (processes share it)",
        *(_number(c.responses * SELECT_NS / 3.6e12) for c in CASES),
    )
    line("**memory of a device**")
    line("weights in bfloat16", *(_bytes(_weights(c)) for c in CASES))
    line("scoring, peak", *(_bytes(_peaks(c)[0]) for c in CASES))
    line("training LoRA (r = 64) with recomputation, peak", *(_bytes(_peaks(c)[1]) for c in CASES))
    line("scoring, layers split over 8, peak", *(_bytes(_peaks(c, 8)[0]) for c in CASES))
    line("that training, layers split over 8, peak", *(_bytes(_peaks(c, 8)[1]) for c in CASES))
    line("devices of 80 GB that must share the weights", *(str(sharing(c)) for c in CASES))
    line("**disk**")
    for name in disk(CASES[0]):
        line(name, *(_bytes(disk(c)[name]) for c in CASES))
    line(
        "data hashed at every start, by all processes together",
        *(_bytes(TEXT_BYTES * c.tokens * c.devices) for c in CASES),
    )
    line("... by each, hours", *(_number(TEXT_BYTES * c.tokens / HASHED / 3600) for c in CASES))
    line("**network**")
    line(
        "histograms of one selection, received per process",
        *(_bytes(4 * 2**19 * 2 * (c.devices - 1) / c.devices) for c in CASES),
    )
    line(
        "LoRA gradients per step, sent per process (DDP)",
        *(
            _bytes(2 * (c.devices - 1) / c.devices * adapter_bytes(shapes[c.model], lora))
            for c in CASES
        ),
    )
    line(
        "weights gathered per pass under FSDP2, received per device",
        *(_bytes((c.devices - 1) / c.devices * _weights(c)) for c in CASES),
    )
    line("**memory of a host, per process**")
    line("rows of the pool, while scoring", *(_bytes(ROW_BYTES * c.rows) for c in CASES))
    line("weights on their way to the device", *(_bytes(_weights(c)) for c in CASES))
    line("**files**")
    line(
        "files of a table, each mapped once",
        *(_count(-(-c.rows // (ROWS_PER_SHARD * SHARDS_PER_FILE))) for c in CASES),
    )
    line("batches of a shard", *(f"{shard_batches(c):,}" for c in CASES))
    line("seconds of a shard", *(_number(shard_seconds(c)) for c in CASES))
    line("row groups of the cleaned pool", *(_count(c.tokens / GROUP_TOKENS) for c in CASES))
    return lines


def sharing(case: Case) -> int:
    """Devices, by powers of two, over which weights must be spread so that a pass fits 72 GB."""
    devices = 1
    while max(_peaks(case, devices)) > 0.9 * 80e9:
        devices *= 2
    return devices


def limits() -> list[tuple[str, float]]:
    """What breaks, and from how many tokens of a pool on; smallest first."""
    rows = (MAPS - MAPS_TAKEN) * ROWS_PER_SHARD * SHARDS_PER_FILE
    late = "the others wait two days, and give up, while one process"
    patience = PATIENCE.total_seconds()
    return [
        (f"`clean`: {late} tokenises", patience / TOKENISE_NS * 1e9),
        ("`data.parquet` has more row groups than Arrow reads", ROW_GROUPS * GROUP_TOKENS),
        (
            "`select` maps more files than the kernel lets it (three tables)",
            rows / 3 * TOKENS_PER_ROW,
        ),
        (
            "the rows of eight processes fill a host of 1 TB",
            1e12 / 8 / ROW_BYTES * TOKENS_PER_ROW,
        ),
        ("`score` and `fit` map more files than that (one table)", rows * TOKENS_PER_ROW),
        (
            f"`score`, `clean`: {late} merges and writes a table",
            patience / (MERGE_NS + TABLE_NS) / RESPONSES * 1e9,
        ),
        (
            f"`clean`, `select`: {late} of 8 writes its own part of the cleaned pool",
            8 * patience / CLEANED_NS * 1e9,
        ),
    ]


def table() -> str:
    """The table of SCALING.md, in Markdown."""
    heads = (f"{_count(c.tokens)} tokens, {c.model}" for c in CASES)
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(CASES)]
    for name, cells in rows_of_table():
        lines.append(f"| {name} | {' | '.join(cells or [''] * len(CASES))} |")
    return "\n".join(lines)


def limits_table() -> str:
    """Where hard limits lie, in Markdown."""
    lines = ["| what happens | from so many tokens on |", "|---|---:|"]
    lines += [f"| {name} | {_count(tokens)} |" for name, tokens in limits()]
    return "\n".join(lines)


def _number(value: float) -> str:
    """Two digits, or three from a hundred on."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def _count(value: float) -> str:
    for size, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{_count(value)}B" if value >= 1000 else f"{value:.3g} B"


def main() -> None:
    print(f"{table()}\n\n{limits_table()}")


if __name__ == "__main__":
    main()
