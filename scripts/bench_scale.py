"""Selection from a pool larger than memory: ten million samples, a thousand million scores.

    python scripts/bench_scale.py --folder outputs/scale         # 6 GB of disk, 20 minutes
    python scripts/bench_scale.py --samples 100000 --scores 10000000

The pool is a real one, written and opened through the package. Its losses are generated: those of a
token are a pure function of the seed and the token's number, so no table lies on disk, and a second
pass with plain NumPy can check the mask. Every line is measured in a process of its own. Memory is
what is resident above what was when the measurement began, told apart into anonymous pages and
those of mapped files (which the system takes back when it needs them).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean.arrow import ROWS_PER_SHARD, TableWriter, lists_of, read_texts, write_texts
from tokenclean.cleaning.apply import ScoredRows, mask_beside
from tokenclean.data.batches import plan_batches, plan_epoch
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import KIND, TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.scoring.table import TRAINED_ON
from tokenclean.selection.select import SelectionConfig, select

KEEP, PROMPT, SEED = 0.6, 4, 7
MB = 1 << 20
#: Scores looked at at a time by the check, which knows nothing of rows.
CHUNK = 1 << 22

Facts = dict[str, Any]


# -- the pool and its losses ------------------------------------------------------------------


def response_sizes(samples: int, scores: int) -> np.ndarray:
    """Response tokens of each row, int64: pairs of a short and a long one around the mean."""
    mean = scores // samples
    shift = np.random.default_rng(SEED).integers(0, mean, samples // 2)
    sizes = np.full(samples, mean, dtype=np.int64)
    sizes[: 2 * len(shift) : 2] -= shift
    sizes[1 : 2 * len(shift) : 2] += shift
    sizes[0] += scores - mean * samples
    return sizes


def write_pool(folder: Path, samples: int, scores: int) -> None:
    """A token pool of so many samples with so many response tokens altogether."""
    sizes = response_sizes(samples, scores)
    with complete_folder(folder) as partial:
        writer = TableWriter(partial)
        for first in range(0, samples, ROWS_PER_SHARD):
            lengths = sizes[first : first + ROWS_PER_SHARD] + PROMPT
            stops = np.cumsum(lengths)
            ids = np.arange(stops[-1], dtype=np.int32) % 32_000
            response = np.ones(len(ids), dtype=bool)
            for place in range(PROMPT):
                response[stops - lengths + place] = False
            rows = np.arange(first, first + len(lengths))
            columns = {
                "id": pa.array([f"sample-{row:08d}" for row in rows]),
                "source": pa.array([f"source-{row % 5}" for row in rows]),
                "input_ids": lists_of(lengths, ids),
                "response_mask": lists_of(lengths, response),
            }
            writer.write(pa.record_batch(columns))
        writer.close()
        stated = dict.fromkeys(("fingerprint", "tokenizer", "vocabulary"), "generated")
        more = {"kind": KIND, "eos_id": 1, "statistics": {}, "rows": samples}
        write_json(partial / MANIFEST, stated | more)


_DRAWS = (np.arange(1 << 16) + 0.5) / (1 << 16)
#: Quantiles of an exponential loss, and a difference; on grids, so that many scores are equal.
_LOSS = np.round(-np.log1p(-_DRAWS) * 1.5, 3).astype(np.float32)
_CHANGE = np.round(np.tan((_DRAWS - 0.5) * 2.8) / 4, 2).astype(np.float32)


def losses(start: int, stop: int, reference: bool) -> np.ndarray:
    """Losses of the response tokens from ``start`` up to ``stop`` under one of the models.

    Returns:
        float32, shape (stop - start,). The reference's follow the base's.
    """
    generator = np.random.Philox(key=SEED)
    generator.advance(start // 8)  # a step gives 256 bits, a token takes 32
    words = generator.random_raw((stop - start // 8 * 8 + 1) // 2 + 1).view(np.uint16)
    halves = words.reshape(-1, 2)[start % 8 :][: stop - start]
    found = _LOSS[halves[:, 0]]
    if reference:
        found = np.maximum(np.float32(0.8) * found + _CHANGE[halves[:, 1]], np.float32(0.0))
    return found


class Generated:
    """Stands where a score table would; its rows are a pool's first ones."""

    def __init__(self, reference: bool, counts: np.ndarray):
        self.reference, self.folder = reference, Path("generated")
        self.manifest: Facts = {"model": "reference" if reference else "base"}
        self.rows, self._counts = np.arange(len(counts)), counts
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def check_pool(self, pool: TokenPool) -> None:
        pass

    def trained_on(self) -> pa.ChunkedArray:
        return pa.chunked_array([], pa.string())

    def of_rows(self, rows: np.ndarray, column: str) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self._starts[rows[0]], self._starts[rows[-1] + 1]
        return self._counts[rows], losses(int(start), int(stop), self.reference)

    def histogram(self, base: Generated) -> None:
        return None


# -- measuring --------------------------------------------------------------------------------


def resident() -> dict[str, int]:
    """Resident bytes of this process: anonymous, and of files (shared memory among them)."""
    found = dict.fromkeys(("anonymous", "files"), 0)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            found["anonymous" if name == "RssAnon" else "files"] += int(value.split()[0]) << 10
    return found


def _give_back() -> None:
    """Return freed memory to the system, or what is used next would be taken from it unseen."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def measured(facts: Facts) -> Iterator[None]:
    """Time, and memory above the beginning's: the most at a time, and what is left at the end."""
    _give_back()
    before, peak, stop = resident(), resident(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for name, value in resident().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        facts["seconds"] = time.perf_counter() - start
        stop.set()
        watcher.join()
    _give_back()
    for name, value in resident().items():
        facts[f"peak_{name}"] = max(peak[name], value) - before[name]
        facts[f"left_{name}"] = value - before[name]


def _open(folder: Path) -> Facts:
    facts: Facts = {}
    with measured(facts):
        pool = TokenPool(folder)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    facts["maps"] = sum("part-" in line for line in maps)
    facts["handles"] = len(list(Path("/proc/self/fd").iterdir()))
    facts["rows"] = len(pool)
    return facts


def _object(folder: Path, make: Callable[[TokenPool], Any]) -> Facts:
    """What one call costs, its result held."""
    pool = TokenPool(folder)
    facts: Facts = {"rows": len(pool)}
    with measured(facts):
        held = make(pool)
    facts["items"] = len(held)
    return facts


def _among(folder: Path) -> Facts:
    """Every tenth row is found by its id, as `ScoreTable.trained_on` gives them."""
    pool, path = TokenPool(folder), folder.parent / TRAINED_ON
    write_texts(path, [pool.ids[row] for row in range(0, len(pool), 10)])
    facts: Facts = {"rows": len(pool)}
    with measured(facts):
        found = pool.ids.among(read_texts(path))
    assert np.array_equal(np.flatnonzero(found), np.arange(0, len(pool), 10))
    return facts


def _subsets(pool: TokenPool) -> list[np.ndarray]:
    data: Any = SimpleNamespace(pool=pool, subsets=6, order="shuffle", seed=SEED)
    return TuluDataModule.subset_rows(data)


def _batches(folder: Path) -> Facts:
    lengths = TokenPool(folder).response_counts() + PROMPT
    facts: Facts = {"rows": len(lengths)}
    with measured(facts):
        held = plan_batches(lengths, 16_384)
    facts["items"] = len(held)
    return facts


def _epoch(folder: Path) -> Facts:
    facts: Facts = {"rows": len(TokenPool(folder))}
    with measured(facts):
        held = plan_epoch(facts["rows"], 48, SEED, 0)
    facts["items"] = len(held)
    return facts


def _scored(pool: TokenPool, rows: np.ndarray) -> ScoredRows:
    counts = pool.response_counts()
    base: Any = Generated(reference=False, counts=counts)
    reference: Any = Generated(reference=True, counts=counts)
    return ScoredRows(pool, rows, base, reference, round=1)


def _rows_to_select(folder: Path) -> Facts:
    pool = TokenPool(folder)
    facts: Facts = {"rows": len(pool)}
    with measured(facts):
        scored = ScoredRows(pool, np.arange(len(pool)), None, None, round=1)
        facts["items"] = len(scored.parts)
    return facts


def _select(folder: Path, scores: int) -> Facts:
    """Selection from the first rows with so many scores, into a mask file; then the check."""
    pool = TokenPool(folder)
    stops = np.cumsum(pool.response_counts())
    rows = np.arange(int(np.searchsorted(stops, scores)) + 1)
    scored, config = _scored(pool, rows), SelectionConfig(keep=KEEP)
    n = int(scored.counts.sum())
    facts: Facts = {"rows": len(rows), "scores": n, "parts": len(scored.parts)}
    with measured(facts):
        mask = mask_beside(folder.parent / "selected", n)
        found = select(lambda: scored.blocks(config), config, out=mask)
    assert found.cut is not None
    start = time.perf_counter()
    facts |= check(mask, n, found.cut, int(n * KEEP))
    return facts | {"kept": found.kept, "cut": found.cut, "check": time.perf_counter() - start}


def check(mask: np.ndarray, n: int, cut: float, wanted: int) -> Facts:
    """Compare a mask with every score again: above the cut all, below it none, the first ties.

    Raises:
        AssertionError: if the mask is not that of the ``wanted`` largest scores.
    """
    above = equal = kept = 0
    wrong = 0
    last_kept_tie, first_dropped_tie = -1, n
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        score = losses(start, stop, False).astype(np.float64)
        score -= losses(start, stop, True)
        own = np.asarray(mask[start:stop])
        ties = score == cut
        above += int(np.count_nonzero(score > cut))
        equal += int(np.count_nonzero(ties))
        kept += int(np.count_nonzero(own))
        wrong += int(np.count_nonzero((own != (score > cut)) & ~ties))
        if len(places := np.flatnonzero(ties & own)):
            last_kept_tie = start + int(places[-1])
        if len(places := np.flatnonzero(ties & ~own)):
            first_dropped_tie = min(first_dropped_tie, start + int(places[0]))
    assert wrong == 0, f"{wrong} scores are on the wrong side of the cut"
    assert above < wanted <= above + equal, "the cut is not the score of rank int(n * keep)"
    assert kept == wanted, f"{kept} are kept, not {wanted}"
    assert last_kept_tie < first_dropped_tie, "a later one of equal scores is kept"
    return {"above": above, "equal": equal}


OBJECTS: dict[str, Callable[[Path], Facts]] = {
    "open the TokenPool": _open,
    "ids.among, a tenth of the ids": _among,
    "subset_rows, 6 parts": lambda folder: _object(folder, _subsets),
    "TokenRows": lambda folder: _object(folder, TokenRows),
    "plan_batches, 16,384 tokens": _batches,
    "plan_epoch, 48 rows": _epoch,
    "ScoredRows with its parts": _rows_to_select,
}


def _measure(folder: Path, name: str, results: Any) -> None:
    found = _select(folder, int(name)) if name.isdigit() else OBJECTS[name](folder)
    results.put(found)


def alone(folder: Path, name: str) -> Facts:
    """Measure in a process of its own, which begins with the imports done."""
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    process = context.Process(target=_measure, args=(folder, name, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: ended with {process.exitcode}")
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--scores", type=int, default=1_000_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    options = parser.parse_args()
    pool = options.folder / "pool"
    options.folder.mkdir(parents=True)
    results: dict[str, Facts] = {}
    try:
        start = time.perf_counter()
        write_pool(pool, options.samples, options.scores)
        size = sum(part.stat().st_size for part in pool.iterdir())
        seconds = time.perf_counter() - start
        print(f"pool: {options.samples:,} samples, {size / 1e9:.1f} GB, {seconds:.0f} s\n")
        print("| of the whole pool | s | peak anonymous MB | left MB | left bytes/row | items |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        for name in OBJECTS:
            found = results[name] = alone(pool, name)
            left = found["left_anonymous"]
            print(
                f"| {name} | {found['seconds']:.1f} | {found['peak_anonymous'] / MB:,.0f} | "
                f"{left / MB:,.0f} | {left / found['rows']:.1f} | {found.get('items', '')} |",
                flush=True,
            )
        opened = results["open the TokenPool"]
        print(f"\nopen pool: {opened['maps']:,} maps, {opened['handles']:,} file handles\n")
        print("| scores | rows | s | ns per score | peak anonymous MB | peak of files MB |", end="")
        print(" kept | above the cut | equal to it | check, s |\n|" + "---:|" * 10, flush=True)
        for scores in (options.scores // 100, options.scores // 10, options.scores):
            found = results[f"select {scores}"] = alone(pool, str(scores))
            print(
                f"| {found['scores']:,} | {found['rows']:,} | {found['seconds']:.1f} | "
                f"{found['seconds'] / found['scores'] * 1e9:.0f} | "
                f"{found['peak_anonymous'] / MB:.1f} | {found['peak_files'] / MB:,.0f} | "
                f"{found['kept']:,} | {found['above']:,} | {found['equal']:,} | "
                f"{found['check']:.0f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(options.folder)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
