"""Benchmark parts without a model to speak of: selection, score tables, growth with the pool."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from scripts import bench_published as published
from scripts.bench_measure import (
    OURS,
    THEIRS,
    Line,
    Same,
    Side,
    can_measure_memory,
    interleave,
    memory_lines,
    peak_memory,
)
from scripts.bench_models import published_rows
from scripts.bench_workload import (
    BUDGET,
    KEEP,
    MAX_LENGTH,
    Options,
    draw_lengths,
    make_llama,
    write_pool,
)
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.batches import plan_batches
from tokenclean.data.datamodule import PlannedBatches
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, Network
from tokenclean.scoring.module import ScoringModule
from tokenclean.scoring.table import ScoreTable, write_scores
from tokenclean.scoring.writer import ScoreWriter
from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.select import Selected, SelectionConfig, select

MODELS = ("base", "reference")
CLEANING = SelectionConfig(keep=KEEP)


# -- selection in memory ----------------------------------------------------------------------


def token_scores(tokens: int, seed: int) -> list[np.ndarray]:
    """Scores of so many response tokens, per sample; half of them are of a few hundred values."""
    rng = np.random.default_rng(seed)
    _, _, lengths = draw_lengths(tokens // 100 + 10, rng)
    stops = np.minimum(np.cumsum(lengths), tokens)
    scores = rng.standard_normal(tokens)
    scores = np.where(rng.random(tokens) < 0.5, scores.round(2), scores)
    return [part for part in np.split(scores, np.unique(stops)[:-1]) if len(part)]


def token_blocks(scores: list[np.ndarray]) -> list[TokenBlock]:
    """Scores as selection takes them, some hundred samples to a block."""
    blocks, size = [], 400
    for first in range(0, len(scores), size):
        part = scores[first : first + size]
        blocks.append(
            TokenBlock(
                rows=np.arange(first, first + len(part)),
                counts=np.array([len(row) for row in part]),
                seen=np.zeros(len(part), dtype=bool),
                columns={
                    "base.nll": (score := np.concatenate(part)),
                    "reference.nll": np.zeros_like(score),
                },
            )
        )
    return blocks


def same_selection(results: Mapping[str, Any]) -> Same:
    """Our mask against the published side's labels."""
    flat = np.fromiter(itertools.chain.from_iterable(results[THEIRS]), dtype=np.int8)
    return {"selection identical": bool(np.array_equal(results[OURS].keep, flat == 1))}


def selection(options: Options) -> Iterator[Line]:
    """The top 60 % of all tokens: in memory, then from tables on disk to labels on disk."""
    working: dict[int, int] = {}
    for tokens in options.tokens:
        yield from _selection_in_memory(tokens, options, working)
    if working:
        small, large = min(working), max(working)
        yield Line(
            "selection",
            f"{large:,} / {small:,} tokens in memory",
            "working memory beside the mask, ours",
            [working[large] / working[small]],
            aim="1",
            facts={"bytes": working},
        )
    yield from _selection_on_disk(options)


def _selection_in_memory(tokens: int, options: Options, working: dict[int, int]) -> Iterator[Line]:
    scores = token_scores(tokens, options.seed)
    blocks, lists = token_blocks(scores), [row.tolist() for row in scores]
    case = f"{tokens:,} tokens in memory"
    runs: dict[str, Callable[[], Any]] = {
        OURS: lambda: select(lambda: blocks, CLEANING),
        THEIRS: lambda: published.select(lists, KEEP),
    }
    sides: dict[str, Side] = {
        OURS: lambda _: runs[OURS],
        THEIRS: lambda _: runs[THEIRS],
    }
    measured = interleave(sides, options.repeats, "cpu", f"selection, {case}", same_selection)
    aim = ">= 20" if tokens >= 4_000_000 else ""
    yield measured.line("selection", case, THEIRS, OURS, same=measured.same, aim=aim)
    yield from memory_lines("selection", case, runs, "cpu")
    if can_measure_memory("cpu"):
        mask = np.ones(tokens, dtype=bool)
        found = peak_memory(lambda: select(lambda: blocks, CLEANING, out=mask), "cpu")
        working[tokens] = found["peak"]


# -- tables on disk ---------------------------------------------------------------------------


def random_losses(pool: TokenPool, seed: int) -> list[np.ndarray]:
    """A float32 loss for every response token of every row."""
    counts = pool.response_counts()
    drawn = np.random.default_rng(seed).exponential(1.5, int(counts.sum())).astype(np.float32)
    return np.split(drawn, np.cumsum(counts)[:-1])


def padded(pool: TokenPool, losses: list[np.ndarray]) -> list[list[float]]:
    """The same as the published scripts keep them: every position of every row up to 2048."""
    table = []
    for row, values in enumerate(losses):
        line = np.zeros(MAX_LENGTH)
        line[pool.response_positions(row)] = values
        table.append(line.tolist())
    return table


def write_score_table(folder: Path, pool: TokenPool, losses: list[np.ndarray], model: str) -> None:
    """A score table with these losses, through the package's own writer."""
    manifest = {"pool": pool.fingerprint, "model": model, "trained_on": []}
    write_scores(folder, TokenRows(pool), {"nll": np.concatenate(losses)}, manifest)


def select_on_disk(folder: Path) -> Selected:
    """`tokenclean select` without the command line: pool and two score tables to a cleaned pool."""
    pool = TokenPool(folder / "pool")
    base, reference = (ScoreTable(folder / model) for model in MODELS)
    scored = ScoredRows(pool, np.arange(len(pool)), base, reference, round=1)
    return clean(scored, CLEANING, 0, folder / "cleaned")


def _selection_on_disk(options: Options) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = write_pool(folder / "pool", options.table_rows, options.seed)
        for k, model in enumerate(MODELS):
            losses = random_losses(pool, options.seed + k)
            write_score_table(folder / model, pool, losses, model)
            published.write_pickle(folder / f"{model}.pickle", padded(pool, losses))
        rows = published_rows(pool, np.arange(len(pool)))

        def theirs() -> list[list[int]]:
            tables = [published.read_pickle(folder / f"{model}.pickle") for model in MODELS]
            kept = published.select(published.differences(tables[0], tables[1], rows), KEEP)
            labels = [row.labels for row in published.cleaned(rows, kept)]
            published.write_pickle(folder / "labels.pickle", labels)
            return kept

        sides: dict[str, Side] = {
            OURS: lambda _: lambda: select_on_disk(folder),
            THEIRS: lambda _: theirs,
        }
        label = "selection on disk"
        measured = interleave(sides, options.repeats, "cpu", label, same_selection)
        tokens = int(pool.response_counts().sum())
        case = f"{tokens:,} tokens, tables on disk to labels on disk"
        yield measured.line("selection", case, THEIRS, OURS, same=measured.same)


def tables(options: Options) -> Iterator[Line]:
    """Loading every loss of a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = write_pool(folder / "pool", options.table_rows, options.seed)
        losses = random_losses(pool, options.seed)
        write_score_table(folder / "arrow", pool, losses, "base")
        published.write_pickle(folder / "pickle", padded(pool, losses))

        def ours() -> list[np.ndarray]:
            # Copied, or the file would not even be read.
            return [values.copy() for _, _, values in ScoreTable(folder / "arrow").nll.blocks()]

        def check(results: dict[str, Any]) -> Same:
            there = [
                np.array(line)[pool.response_positions(row)]
                for row, line in enumerate(results[THEIRS])
            ]
            same = np.array_equal(np.concatenate(results[OURS]), np.concatenate(there))
            return {"table identical": bool(same)}

        sides: dict[str, Side] = {
            OURS: lambda _: ours,
            THEIRS: lambda _: lambda: published.read_pickle(folder / "pickle"),
        }
        measured = interleave(sides, options.repeats, "cpu", "tables", check)
        case = f"{len(pool):,} samples, {sum(map(len, losses)):,} losses"
        ratio = "time to load, published / ours"
        aim = ">= 50" if options.table_rows > 10_000 else ""
        yield measured.line("tables", case, THEIRS, OURS, ratio, same=measured.same, aim=aim)
        # Ours holds positions and token ids as well.
        arrow = sum(part.stat().st_size for part in (folder / "arrow").iterdir())
        pickled = (folder / "pickle").stat().st_size
        facts = {"bytes": {OURS: arrow, THEIRS: pickled}}
        yield Line("tables", case, "bytes, published / ours", [pickled / arrow], facts=facts)


# -- growth -----------------------------------------------------------------------------------


def scaling(options: Options) -> Iterator[Line]:
    """Cost per token, and memory, of pools 1, 4 and 16 times as large."""
    scored, selected = options.pool_rows
    with tempfile.TemporaryDirectory() as name:
        network = Network(make_llama("tiny", 1024, options.seed, torch.float32))
        small = {f: Path(name) / f"scored_{f}" for f in (1, 4, 16)}
        for factor, folder in small.items():
            write_pool(folder / "pool", factor * scored, options.seed, 1024, shrink=4)
        yield from _growth(
            "scoring", small, lambda folder: score(network, folder, options.device), options
        )
        large = {f: Path(name) / f"selected_{f}" for f in (1, 4, 16)}
        for factor, folder in large.items():
            pool = write_pool(folder / "pool", factor * selected, options.seed)
            for k, model in enumerate(MODELS):
                write_score_table(folder / model, pool, random_losses(pool, k), model)
        yield from _growth("selection on disk", large, select_on_disk, options)


def score(network: Network, folder: Path, device: str) -> None:
    """`tokenclean score` without the command line: a whole pass of a Trainer over a pool."""
    pool = TokenPool(folder / "pool")
    rows = TokenRows(pool)
    manifest = {"pool": pool.fingerprint, "model": "tiny", "trained_on": []}
    plan = plan_batches(rows.lengths, BUDGET, network.layout)
    planned = PlannedBatches(rows, plan, network.layout, 0)
    writer = ScoreWriter(planned, folder / "scores", manifest)
    trainer = Trainer(
        accelerator=device,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[writer],
    )
    module = ScoringModule(BaseConfig(name="tiny"))
    module.network, module.writer = network, writer
    trainer.predict(module, return_predictions=False)


def _growth(
    what: str, folders: Mapping[int, Path], run: Callable[[Path], Any], options: Options
) -> Iterator[Line]:
    """Time per token and memory of ``run(folder)``, each relative to the smallest pool's."""

    def side(folder: Path) -> Side:
        return lambda _: lambda: run(folder)

    tokens = {
        factor: int(TokenPool(folder / "pool").input_ids.counts().sum())
        for factor, folder in folders.items()
    }
    sides = {f"{factor}x": side(folder) for factor, folder in folders.items()}
    measured = interleave(sides, options.repeats, options.device, f"scaling, {what}")
    memory: dict[int, dict[str, int]] = {}
    if can_measure_memory(options.device):
        for factor, folder in folders.items():
            memory[factor] = peak_memory(side(folder)(0), options.device)
    facts = {"tokens": tokens, "bytes": memory}
    for factor in list(folders)[1:]:
        case = f"{what}, {tokens[factor]:,} / {tokens[1]:,} tokens"
        line = measured.line("scaling", case, f"{factor}x", "1x", "time per token", facts=facts)
        share = tokens[1] / tokens[factor]
        line.values = [value * share for value in line.values]
        line.processor = (line.processor or 0.0) * share
        line.aim = "<= 1"
        yield line
        for kind in memory.get(1, {}):
            ratio = memory[factor][kind] / max(memory[1][kind], 1)
            yield Line("scaling", case, f"{kind} memory", [ratio], facts=facts)
