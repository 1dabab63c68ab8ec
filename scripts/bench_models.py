"""Benchmark parts that run a model: scoring, training, and the memory that both take."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from scripts import bench_peer as peer
from scripts import bench_published as published
from scripts.bench_measure import (
    OURS,
    THEIRS,
    Line,
    Measured,
    Same,
    Side,
    Timed,
    interleave,
    memory_lines,
    say,
)
from scripts.bench_workload import (
    BUDGET,
    KEEP,
    MAX_LENGTH,
    Options,
    add_trained_adapter,
    draw_lengths,
    make_llama,
    twin,
    write_pool,
)
from tokenclean.arrow import ArrowTable
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.batches import collate, plan_batches, share_of_rank
from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import NO_LOSS, TokenRows
from tokenclean.estimate import ModelShape, Work, forward_flops, training_flops
from tokenclean.machine import matmul_rate
from tokenclean.models import LoraSettings, Network
from tokenclean.selection.select import SelectionConfig

UNCHECKPOINTED, PEER, MATMUL = "published without checkpointing", "TRL", "matmul"
#: devices that the padding and balance of a global batch are computed for, as in the paper
DEVICES = 8


class Pair:
    """A model, its adapter and its data, as each side holds them; the weights are shared.

    Attributes:
        network: our side; the adapter is on top of it, ready to be trained.
        base: the published side's base.
        pool: what is scored.
        rows: its rows as our side sees them.
        kept: the same rows of a cleaned pool, for training. The 60 % are drawn at random, so nearly
            every sample keeps nearly its whole length: the hardest case for our side.
    """

    def __init__(self, options: Options, vocabulary: int | None, folder: Path):
        self.options, self.folder, self.device = options, folder, options.device
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        model = make_llama(options.shape, vocabulary, options.seed, dtype).to(self.device)
        self.shape = ModelShape.of_config(model.config)
        self.base = twin(model)
        self.network = Network(model)
        add_trained_adapter(self.network, options.seed)
        self.network.to(self.device)
        self.network.check_on_device()
        self.network.save_last_adapter(folder / "adapter")
        size = max(options.samples * max(options.repeats, 2), options.batch * options.few_repeats)
        # A few rows more, since some lose their response to the limit.
        self.pool = write_pool(
            folder / "pool", size + size // 20 + 20, options.seed, self.shape.vocab, options.shrink
        )
        self.rows = TokenRows(self.pool)
        unscored = ScoredRows(self.pool, np.arange(len(self.pool)), None, None, round=1)
        rule = SelectionConfig(rule="random", keep=KEEP)
        clean(unscored, rule, options.seed, folder / "cleaned")
        self.kept = TokenRows(CleanedPool(folder / "cleaned", folder / "cache"))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        return f"{self.options.shape}, V = {self.shape.vocab:,}"

    def aim(self, small: str, large: str) -> str:
        """What to reach with a vocabulary of 6,400 and of 32,000; stated for one shape alone."""
        wishes = {6400: small, 32_000: large}
        return wishes.get(self.shape.vocab, "") if self.options.shape == "small" else ""

    def chosen(self, repeat: int, size: int) -> np.ndarray:
        """Rows of one repeat, each its own; a few for the warm-up on a CPU."""
        if repeat < 0:
            return np.arange(size if self.on_gpu else min(size, published.ROWS))
        return np.arange(repeat * size, (repeat + 1) * size)

    @cached_property
    def merged(self) -> Any:
        """The published side's reference: a model of its own with the adapter merged in."""
        own = copy.deepcopy(self.base)
        model = PeftModel.from_pretrained(own, str(self.folder / "adapter"))
        return model.merge_and_unload().eval()

    def adapted(self) -> Any:
        """The published side's model in training, and TRL's."""
        base, folder = twin(self.base), str(self.folder / "adapter")
        return PeftModel.from_pretrained(base, folder, is_trainable=True).train()

    def at_matmul_rate(self, flops: Callable[[int], float]) -> Side:
        """How long so much useful work would take at the rate of a large matrix product."""
        dtype = torch.bfloat16 if self.on_gpu else torch.float32

        def prepare(repeat: int) -> Callable[[], Timed]:
            seconds = flops(repeat) / matmul_rate(self.device, dtype, seconds=0.5)
            return lambda: Timed(seconds, seconds, None)

        return prepare

    def matmul_line(self, part: str, measured: Measured, aim: str) -> Line:
        ratio = "useful FLOP/s, ours / a large matmul"
        aim = aim if self.on_gpu else ""
        line = measured.line(part, self.name, MATMUL, OURS, ratio, aim=aim)
        line.processor = None  # the product's rate is by the clock
        return line


def pairs(options: Options, part: str) -> Iterator[Pair]:
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(options, vocabulary, Path(folder))
            say(f"{part}: {pair.name}")
            yield pair


def published_rows(table: ArrowTable, chosen: np.ndarray) -> list[published.Row]:
    """Rows of a pool or a cleaned pool as the published side holds them."""
    ids = table.lists("input_ids")
    rows = []
    for row in map(int, chosen):
        if isinstance(table, TokenPool):
            labels = np.where(table.response_mask[row], ids[row], NO_LOSS)
        else:
            labels = table.lists("labels")[row]
        rows.append(published.Row(ids[row].tolist(), labels.tolist()))
    return rows


# -- scoring ----------------------------------------------------------------------------------


def our_scores(pair: Pair, chosen: np.ndarray) -> list[dict[int, np.ndarray]]:
    """Losses of every response token under base and reference, by pool row."""
    network, half = pair.network, torch.float16 if pair.on_gpu else None
    tables: list[dict[int, np.ndarray]] = []
    for depth in (0, 1):
        losses: dict[int, np.ndarray] = {}
        with (
            torch.no_grad(),
            network.at_depth(depth),
            network.merged(half),
            torch.autocast(pair.device, torch.float16, enabled=pair.on_gpu),
        ):
            for members in plan_batches(pair.rows.lengths[chosen], BUDGET, network.layout):
                samples = [pair.rows[int(row)] for row in chosen[members]]
                batch = collate(samples, network.layout).to(pair.device)
                for row, values in batch.split(network(batch).cpu()):
                    losses[row] = values.numpy()
        tables.append(losses)
    return tables


def their_scores(pair: Pair, rows: list[published.Row]) -> list[list[list[float]]]:
    """The same, as padded lists."""
    limit = MAX_LENGTH // pair.options.shrink
    return [published.score(m, rows, limit, pair.device) for m in (pair.base, pair.merged)]


def scoring(options: Options) -> Iterator[Line]:
    """Base and reference pass over the same samples."""
    for pair in pairs(options, "scoring"):
        yield from _scoring(pair, options)
    yield Line("scoring", "-", "time, TRL / ours", [], note="TRL does not score pools")


def _scoring(pair: Pair, options: Options) -> Iterator[Line]:
    def ours(repeat: int) -> Callable[[], Any]:
        chosen = pair.chosen(repeat, options.samples)
        return lambda: (chosen, our_scores(pair, chosen))

    def theirs(repeat: int) -> Callable[[], Any]:
        rows = published_rows(pair.pool, pair.chosen(repeat, options.samples))
        return lambda: their_scores(pair, rows)

    def flops(repeat: int) -> float:
        chosen = pair.chosen(repeat, options.samples)
        work = Work.of(pair.rows.lengths[chosen], pair.rows.counts[chosen])
        return 2.0 * forward_flops(pair.shape, work)

    def check(results: dict[str, Any]) -> Same:
        chosen, tables = results[OURS]
        gaps: Same = {}
        for name, one, other in zip(("base", "reference"), tables, results[THEIRS], strict=True):
            flat = np.concatenate([one[int(row)] for row in chosen])
            there = [
                np.array(losses)[pair.pool.response_positions(int(row))]
                for row, losses in zip(chosen, other, strict=True)
            ]
            gaps[f"nll difference, {name}"] = float(np.abs(flat - np.concatenate(there)).max())
        return gaps

    sides = {OURS: ours, THEIRS: theirs, MATMUL: pair.at_matmul_rate(flops)}
    label = f"scoring {pair.name}"
    measured = interleave(sides, options.repeats, options.device, label, check)
    aim = pair.aim(">= 1.9", ">= 2.3")
    yield measured.line("scoring", pair.name, THEIRS, OURS, same=measured.same, aim=aim)
    yield pair.matmul_line("scoring", measured, ">= 0.6")


# -- training ---------------------------------------------------------------------------------


def our_step(pair: Pair, chosen: np.ndarray, optimizer: Any) -> None:
    """One optimiser step over one global batch, as `CleanedSFTModule` takes it."""
    network = pair.network
    samples = [pair.kept[int(row)] for row in chosen]
    share = np.float32(1.0 / pair.kept.counts[chosen].sum())
    for sample in samples:
        sample.weights = sample.weights * share
    for members in plan_batches(pair.kept.lengths[chosen], BUDGET, network.layout):
        batch = collate([samples[i] for i in members], network.layout).to(pair.device)
        with torch.autocast(pair.device, torch.bfloat16, enabled=pair.on_gpu):
            loss = (network(batch) * batch.weights).sum()
        loss.backward()
    optimizer.step()


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def training_sides(pair: Pair) -> dict[str, Side]:
    """Every side takes its step from the same weights and returns its gradients."""
    size, model, network = pair.options.batch, pair.adapted(), pair.network
    network.train()
    start = [p.detach().clone() for p in trained(network)]
    assert all(map(torch.equal, start, trained(model))), "the parameters' order differs"

    def fresh(side: Any) -> torch.optim.Optimizer:
        side.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip(trained(side), start, strict=True):
                parameter.copy_(value)
        return torch.optim.AdamW(trained(side), lr=1e-4, weight_decay=0.0)

    def ours(repeat: int) -> Callable[[], Any]:
        chosen, optimizer = pair.chosen(repeat, size), fresh(network)

        def run() -> list[Any]:
            our_step(pair, chosen, optimizer)
            return [p.grad for p in trained(network)]

        return run

    def theirs(repeat: int, checkpointing: bool = True) -> Callable[[], Any]:
        rows = published_rows(pair.kept.table, pair.chosen(repeat, size))
        published.checkpointing(model, checkpointing)
        optimizer = fresh(model)

        def run() -> list[Any]:
            published.train_step(model, optimizer, rows, pair.device)
            return [p.grad for p in trained(model)]

        return run

    def peers(repeat: int) -> Callable[[], Any]:
        rows = published_rows(pair.kept.table, pair.chosen(repeat, size))
        return peer.step(pair.adapted(), rows, pair.device, pair.folder / "peer")

    sides: dict[str, Side] = {
        OURS: ours,
        THEIRS: theirs,
        UNCHECKPOINTED: lambda repeat: theirs(repeat, checkpointing=False),
    }
    return sides | ({PEER: peers} if peer.version() else {})


def gradient_error(one: list[Any], other: list[Any]) -> float:
    """Norm of the difference over the norm of the other, all parameters together."""
    gap = sum(float((a - b).double().square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(gap / sum(float(b.double().square().sum()) for b in other))


def training(options: Options) -> Iterator[Line]:
    """One optimiser step over a global batch, LoRA r 64 without dropout."""
    for pair in pairs(options, "training"):
        yield from _training(pair, options)
    yield from balance(options)


def _training(pair: Pair, options: Options) -> Iterator[Line]:
    def flops(repeat: int) -> float:
        chosen = pair.chosen(repeat, options.batch)
        work = Work.of(pair.kept.lengths[chosen], pair.kept.counts[chosen])
        return training_flops(pair.shape, work, LoraSettings())

    def check(results: dict[str, Any]) -> Same:
        return {
            side: gradient_error(results[side], results[THEIRS])
            for side in (OURS, PEER)
            if side in results
        }

    sides = training_sides(pair) | {MATMUL: pair.at_matmul_rate(flops)}
    label = f"training {pair.name}"
    measured = interleave(sides, options.few_repeats, options.device, label, check)
    error: dict[str, Same] = {side: {"gradient error": v} for side, v in measured.same.items()}
    aim = pair.aim(">= 2.5", ">= 3.2")
    same = error.get(OURS, {})
    yield measured.line("training", pair.name, THEIRS, OURS, same=same, aim=aim)
    yield measured.line("training", pair.name, UNCHECKPOINTED, OURS)
    yield measured.line("training", pair.name, THEIRS, UNCHECKPOINTED)
    if PEER in sides:
        ran = {PEER: peer.facts(options.batch, options.device)}
        same = error.get(PEER, {})
        yield measured.line("training", pair.name, PEER, OURS, same=same, facts=ran)
    else:
        yield Line("training", pair.name, f"time, {PEER} / ours", [], note=peer.MISSING)
    yield pair.matmul_line("training", measured, ">= 0.5")


def balance(options: Options) -> Iterator[Line]:
    """What padding and waiting for the slowest of eight devices cost; arithmetic on lengths alone.

    Per global batch: the tokens that all devices compute, and eight times those of the busiest one,
    over the tokens that need to be computed.
    """
    rng = np.random.default_rng(options.seed)
    _, prompts, responses = draw_lengths(50 * DEVICES * published.ROWS, rng)
    padding, theirs, ours = [], [], []
    for batch in (prompts + responses).reshape(-1, DEVICES, published.ROWS):
        needed = batch.ravel() - 1  # nothing is predicted from the last token
        longest = batch.max(axis=1) * published.ROWS
        padding.append(float(longest.sum() / needed.sum()))
        theirs.append(float(longest.max() * DEVICES / needed.sum()))
        shares = (share_of_rank(needed, rank, DEVICES) for rank in range(DEVICES))
        busiest = max(needed[share].sum() for share in shares)
        ours.append(float(busiest * DEVICES / needed.sum()))
    case = f"{DEVICES} devices, {DEVICES * published.ROWS} samples, 2,048 tokens at most"
    yield Line("training", case, "tokens computed / needed, published", padding)
    what = "tokens of the busiest device / of a fair share"
    yield Line("training", case, f"{what}, published", theirs)
    yield Line("training", case, f"{what}, ours", ours, aim="<= 1.02")


# -- memory -----------------------------------------------------------------------------------


def memory(options: Options) -> Iterator[Line]:
    """Peak memory above the model, each side alone.

    Twice as many samples as are scored per repeat, so that our side fills a batch and the published
    side meets a long sample.
    """
    for pair in pairs(options, "memory"):
        yield from _memory(pair, options)


def _memory(pair: Pair, options: Options) -> Iterator[Line]:
    chosen = pair.chosen(0, 2 * options.samples)
    rows = published_rows(pair.pool, chosen)
    _ = pair.merged  # a model: made now, so that it is not counted
    runs = {
        OURS: lambda: our_scores(pair, chosen),
        THEIRS: lambda: their_scores(pair, rows),
    }
    aim = pair.aim("<= 0.45", "<= 0.30")
    yield from memory_lines("memory", f"scoring, {pair.name}", runs, options.device, aim)
    sides = training_sides(pair)

    def step(side: str) -> Callable[[], Any]:
        # Prepared right before it runs: the published two share a model.
        return lambda: sides[side](0)()

    steps = {side: step(side) for side in (OURS, THEIRS, UNCHECKPOINTED)}
    yield from memory_lines("memory", f"training step, {pair.name}", steps, options.device)
