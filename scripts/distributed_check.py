"""Do several processes get what one gets? Real gloo groups of 1, 2 and 4 processes on the CPU.

    python scripts/distributed_check.py                  # a minute
    python scripts/distributed_check.py --tokens 20000000

Prints a table of differences per part; any difference ends it with an error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenclean.selection.exchange import here
from tokenclean.selection.rule import Blocks, TokenBlock
from tokenclean.selection.select import SelectionConfig, select

COUNTS = (1, 2, 4)
BLOCKS, SEED = 23, 5
LIMIT_S = 600


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module in so many fresh processes that form a gloo group.

    Raises:
        SystemExit: if one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_begin, args=(f"{folder}/store", rank, count, work, *arguments))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(LIMIT_S)
        for process in started:
            process.kill()
            if process.exitcode != 0:
                raise SystemExit(f"{work.__name__} with {count} processes: one of them failed")


def _begin(store: str, rank: int, count: int, work: Callable[..., None], *arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    work(*arguments)
    dist.destroy_process_group()


# -- selection --------------------------------------------------------------------------------


def selection_cases() -> dict[str, SelectionConfig]:
    """Every rule in every scope that it has."""
    ranking = ("token_cleaning", "forgetting", "perplexity", "pmi", "random")
    found = {f"{r}, {s}": SelectionConfig(r, s, 0.6) for r in ranking for s in ("global", "sample")}  # type: ignore[arg-type]
    for rule in (*ranking, "length", "quality"):
        found[f"{rule}, whole_sample"] = SelectionConfig(rule, "whole_sample", 0.6)
    for rule in ("soft", "xtf_paper", "xtf_code", "stm", "contradiction", "oracle", "full"):
        found[rule] = SelectionConfig(rule)
    first = SelectionConfig("token_cleaning", always_keep_eos=True, exclude_seen=True)
    return found | {"token_cleaning, eos first, unseen rows": first}


def blocks_of(tokens: int, part: slice) -> Blocks:
    """Some of the blocks of a pool of about so many tokens, of uneven sizes, full of ties."""

    def blocks() -> Iterator[TokenBlock]:
        for number in range(BLOCKS)[part]:
            rng = np.random.default_rng([SEED, number])
            rows = tokens // BLOCKS // 100 * (1 + number % 3) // 2
            counts = rng.integers(1, 200, rows)
            n = int(counts.sum())
            base = rng.integers(0, 4000, n) / 512
            columns = {
                "base.nll": base,
                "reference.nll": np.maximum(base + rng.integers(-512, 512, n) / 512, 0.0),
                "base.alone": rng.integers(0, 4000, n) / 512,
                "reference.gap": rng.integers(0, 8, n) / 4,
                "base.attention": rng.random(n),
                "base.relevance": rng.beta(2, 5, n),
                "base.relevance_hidden": rng.beta(2, 5, n),
            }
            found: dict[str, np.ndarray] = {
                name: values.astype(np.float32) for name, values in columns.items()
            }
            found["pool.truth"] = rng.integers(-1, 2, n).astype(np.int8)
            found["pool.quality"] = np.repeat(rng.integers(1, 6, rows) / 5, counts)
            found["pool.position"] = rng.integers(0, 300, n)
            eos, seen = rng.random(n) < 0.01, rng.random(rows) < 0.1
            first = number * tokens  # only that they ascend
            yield TokenBlock(np.arange(first, first + rows), counts, seen, found, eos)

    return blocks


def select_part(tokens: int, folder: Path) -> None:
    """What one process selects in every case, and the counts of all; saved in the folder."""
    exchange = here()
    for number, config in enumerate(selection_cases().values()):
        found = select(
            blocks_of(tokens, exchange.part(BLOCKS)),
            config,
            SEED,
            exchange=exchange,
            pool=blocks_of(tokens, slice(None)),
        )
        place = folder / f"{exchange.processes}-{number}-{exchange.rank}.npz"
        np.savez(place, mask=found.keep, counts=[found.kept, found.ranked])


def selection(tokens: int = 400_000) -> int:
    """Print how masks of 2 and 4 processes differ from that of one.

    Args:
        tokens: about how many the pool has.

    Returns:
        Number of tokens, over all cases, that are kept in one and dropped in the other.
    """
    names, different = list(selection_cases()), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in COUNTS:
            in_processes(count, select_part, tokens, folder)

        def mask(count: int, case: int) -> tuple[np.ndarray, list[int]]:
            parts = [np.load(folder / f"{count}-{case}-{rank}.npz") for rank in range(count)]
            counts = parts[0]["counts"].tolist()
            assert all(part["counts"].tolist() == counts for part in parts)
            return np.concatenate([part["mask"] for part in parts]), counts

        heads = " | ".join(f"differ with {count} processes" for count in COUNTS[1:])
        print(f"| selection | tokens | ranked | kept | {heads} |\n" + "|---" * 6 + "|")
        for case, label in enumerate(names):
            one, (kept, ranked) = mask(1, case)
            assert kept == np.count_nonzero(one)
            cells = []
            for count in COUNTS[1:]:
                other, counts = mask(count, case)
                assert counts == [kept, ranked]
                cells.append(int(np.count_nonzero(one != other)))
            different += sum(cells)
            print(f"| {label} | {len(one):,} | {ranked:,} | {kept:,} | {cells[0]} | {cells[1]} |")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400_000, help="of the pool selected from")
    options = parser.parse_args()
    if selection(options.tokens):
        raise SystemExit("the masks depend on the number of processes")


if __name__ == "__main__":
    main()
