"""The rates behind SCALING.md, measured here: what one process does alone.

    python scripts/scaling_rates.py [--rows 8000]
    python scripts/scaling_rates.py --shards 65536

A generated pool of rows as long as the paper's; a minute on one core. The second call looks at a
folder of many shards instead, of one row each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean.arrow import ROWS_PER_SHARD, TableWriter, lists_of
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.batches import plan_batches
from tokenclean.data.datamodule import GPU_BUDGET, PlannedBatches
from tokenclean.data.formats import Reader
from tokenclean.data.planted import PlantedSettings, write_planted
from tokenclean.data.pool import KIND, TokenPool, build_pool
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import Tokeniser
from tokenclean.models import BaseConfig, load_tokenizer
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.scoring.shards import BATCHES, Scored, Shards
from tokenclean.scoring.table import ScoreTable, write_scores
from tokenclean.selection.select import SelectionConfig, select

BASE = Path(__file__).parent.parent / "tokenclean" / "data" / "planted_base"
#: turns of planted samples in a row: some 430 tokens
TURNS = 12


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tokenising(folder: Path, rows: int) -> tuple[float, int]:
    """Seconds to tokenise so many rows, and their tokens."""
    write_planted(folder / "planted", PlantedSettings(samples=rows * TURNS, validation=10))
    with (folder / "planted" / "pool.jsonl").open() as source, (folder / "x.jsonl").open("w") as to:
        lines = [json.loads(line)["messages"] for line in source]
        for row in range(len(lines) // TURNS):
            turns = [m for line in lines[row * TURNS : (row + 1) * TURNS] for m in line]
            to.write(json.dumps({"id": str(row), "messages": turns}) + "\n")
    tokeniser = Tokeniser(load_tokenizer(BaseConfig(str(BASE))), "tulu", 2048)
    reader = Reader([str(folder / "x.jsonl")])
    took = seconds(lambda: build_pool(reader, tokeniser, folder / "tokenised"))
    return took, int(TokenPool(folder / "tokenised" / "train").input_ids.counts().sum())


def write_pool(folder: Path, rows: int) -> TokenPool:
    """A pool of rows of 482 tokens on average, two thirds of them response tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(2.0, 241, rows).astype(int), 8, 2048)
    with complete_folder(folder) as partial, TableWriter(partial) as writer:
        for first in range(0, rows, ROWS_PER_SHARD):
            counts = lengths[first : first + ROWS_PER_SHARD]
            names = [f"sample-{first + i:08d}" for i in range(len(counts))]
            columns = {
                "id": pa.array(names),
                "source": pa.array(["generated"] * len(counts)),
                "input_ids": lists_of(
                    counts, np.minimum(rng.zipf(1.3, int(counts.sum())), 128_255).astype(np.int32)
                ),
                "response_mask": lists_of(
                    counts, np.concatenate([np.arange(n) >= max(n // 3, 1) for n in counts])
                ),
            }
            writer.write(pa.record_batch(columns))
        stated = dict.fromkeys(("fingerprint", "tokenizer", "vocabulary", "template"), "generated")
        more = {"kind": KIND, "rows": rows, "eos_id": 1, "max_length": 2048, "statistics": {}}
        write_json(partial / MANIFEST, stated | more)
    return TokenPool(folder)


def merging(folder: Path, rows: TokenRows) -> float:
    """Seconds to merge the shards of a pass."""
    planned = PlannedBatches(rows, plan_batches(rows.lengths, GPU_BUDGET), "packed", 0)
    shards = Shards(folder / "table", planned, dict.fromkeys(("pool_folder", "base"), ""))
    shards.missing()
    for number in range(shards.count):
        chosen = np.concatenate(shards.batches(number))
        counts = rows.counts[chosen]
        values = np.ones((1, int(counts.sum())), dtype=np.float32)
        shards.publish(number, Scored(rows.rows[chosen], counts, values))
    return seconds(shards.merged)


def many_shards(folder: Path, count: int) -> Iterator[tuple[str, float, str]]:
    """As `measured`, of a folder of so many shards (`MOST` at most)."""
    rows = TokenRows(write_pool(folder / "pool", count))
    empty = [np.zeros(0, dtype=np.int64)] * (BATCHES - 1)
    plan = [batch for row in range(count) for batch in (np.array([row]), *empty)]
    planned = PlannedBatches(rows, plan, "packed", 0)
    shards = Shards(folder / "table", planned, dict.fromkeys(("pool_folder", "base"), ""))
    shards.missing()

    def publish() -> None:
        for number in range(shards.count):
            counts = rows.counts[number : number + 1]
            values = np.ones((1, int(counts.sum())), dtype=np.float32)
            shards.publish(number, Scored(rows.rows[number : number + 1], counts, values))

    yield "shards", shards.count, ""
    yield "publish them", seconds(publish), "s"
    yield "list them", seconds(lambda: list(shards.folder.iterdir())), "s"
    yield "read them all, as a start does", seconds(shards.missing), "s"
    yield "merge them", seconds(shards.merged), "s"
    yield "delete them", seconds(shards.remove), "s"


def measured(folder: Path, count: int) -> Iterator[tuple[str, float, str]]:
    """What was measured, the number, its unit."""
    took, tokens = tokenising(folder, max(count // 8, 1))
    yield "tokenise", took / tokens * 1e9, "ns per token"
    pool = write_pool(folder / "pool", count)
    rows = TokenRows(pool)
    tokens, n = int(pool.input_ids.counts().sum()), int(rows.counts.sum())
    yield "pool", size(folder / "pool") / tokens, "bytes per token"
    yield "merge shards", merging(folder, rows) / n * 1e9, "ns per response token"
    rng = np.random.default_rng(1)
    nll = rng.exponential(1.5, n).astype(np.float32)
    tables: list[ScoreTable] = []
    for name in ("base", "reference"):
        stated: dict[str, Any] = {
            "pool": "generated",
            "model": name,
            "trained_on": [],
            "noise": {"p99": 1e-6},
        }
        against = tables[0] if tables else None
        place, columns = folder / name, {"nll": nll}
        start = time.perf_counter()
        write_scores(place, rows, columns, stated, against)
        took = time.perf_counter() - start
        yield f"write the {name}'s table", took / n * 1e9, "ns per response token"
        yield f"the {name}'s table", size(place) / n, "bytes per response token"
        tables.append(ScoreTable(place))
        nll = np.maximum(0.8 * nll + 0.2 * rng.standard_normal(n), 0.0).astype(np.float32)
    config = SelectionConfig()
    scored = ScoredRows(pool, rows.rows, tables[0], tables[1], round=1)
    alone = seconds(lambda: select(lambda: scored.blocks(config), config, noise=1e-6))
    yield "select", alone / n * 1e9, "ns per response token"
    both = seconds(lambda: clean(scored, config, 0, folder / "cleaned"))
    yield "select and write the cleaned pool", both / tokens * 1e9, "ns per token"
    yield "cleaned pool", size(folder / "cleaned") / tokens, "bytes per token"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--shards", type=int, default=0)
    options = parser.parse_args()
    print("| what | found | |\n|---|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = many_shards(place, options.shards) if options.shards else None
        for name, value, unit in found or measured(place, options.rows):
            print(f"| {name} | {float(f'{value:.3g}'):,g} | {unit} |", flush=True)


if __name__ == "__main__":
    main()
