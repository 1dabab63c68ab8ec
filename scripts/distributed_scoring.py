"""Score tables and masks do not depend on how many processes scored, or were killed or stopped.

    python -m scripts.distributed_scoring [--folder FOLDER] [--samples 3000] [--processes 1 2 4]

Scores a planted pool with the embedded base under ``torchrun`` (gloo, CPU, one thread each), kills
runs with SIGKILL half-way and restarts them with another number of processes, stops one with
SIGTERM, and compares every score table with that of one process byte for byte, manifest included.
Processes hold the model whole (DDP) or in parts (FSDP2). Then selects against a reference from each
table and compares the cleaned pools. About 25 seconds per run, most of them start-up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data.planted import PlantedSettings, write_planted
from tokenclean.data.pool import TokenPool
from tokenclean.models import BaseConfig, LoraSettings, Network
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.select import SelectionConfig

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "tokenclean" / "data" / "planted_base"
#: tokens per batch: many batches, so that a kill finds a pass half-way
BUDGET = 128
_LIMIT = 600.0


class Passes:
    """Runs of ``tokenclean score`` over one pool.

    Args:
        folder: for everything that is written.
        samples: in the pool.
    """

    def __init__(self, folder: Path, samples: int):
        self.folder = folder
        write_planted(folder / "planted", PlantedSettings(samples=samples, validation=10))
        torch.manual_seed(0)
        network = Network.load(BaseConfig(str(BASE)))
        network.add_adapter(LoraSettings(r=4))
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        network.save_last_adapter(folder / "adapter")

    def start(
        self, name: str, processes: int, launcher: str = "torchrun", strategy: str = "ddp"
    ) -> Passes.Running:
        """Begin a run, or go on with one.

        Args:
            name: of the run; ``reference`` scores the base with the adapter.
            processes: how many.
            launcher: ``torchrun``, or ``lightning`` to have the Trainer start the others.
            strategy: of several processes; ``fsdp2`` splits the model.
        """
        # A table that another run has made would be taken from there.
        shutil.rmtree(self.folder / "cache" / "scores", ignore_errors=True)
        words = [sys.executable, "-m"]
        if processes > 1 and launcher == "torchrun":
            words += ["torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
            words += ["-m"]
        words += ["tokenclean", "score", "--model.base.name", str(BASE), "--name", name]
        words += ["--data.path", str(self.folder / "planted" / "pool.jsonl")]
        words += ["--data.max_length", "512", "--data.token_budget", str(BUDGET)]
        words += ["--data.cache_dir", str(self.folder / "cache")]
        words += ["--outputs", str(self.folder), "--trainer.accelerator", "cpu"]
        words += ["--trainer.enable_progress_bar", "false"]
        if processes > 1:
            words += ["--trainer.devices", str(processes), "--trainer.strategy", strategy]
        if name == "reference":
            words += ["--model.adapters", str(self.folder / "adapter")]
        return Passes.Running(words, self.folder / name)

    class Running:
        """One of them, in a process group of its own."""

        def __init__(self, words: list[str], folder: Path):
            self.folder = folder
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with folder.with_suffix(".log").open("ab") as said:
                self.process = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=environment,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )

        def shards(self) -> int:
            return len(list((self.folder / "scores.shards").glob("shard-*.arrows")))

        def wait_for(self, shards: int) -> None:
            """Until so many are published, or it has ended."""
            until = time.monotonic() + _LIMIT
            while self.process.poll() is None and self.shards() < shards:
                if time.monotonic() > until:
                    raise TimeoutError(f"{self.folder}: no {shards} shards")
                time.sleep(0.002)

        def kill(self) -> None:
            """SIGKILL to all its processes."""
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

        def end(self) -> int:
            """Its exit code, once it has ended."""
            return self.process.wait(_LIMIT)

        def others(self) -> int:
            """Processes of its group that are left."""
            found = 0
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = stat.read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                found += int(fields[2]) == self.process.pid and fields[0] != "Z"
            return found


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files."""
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, second)]
    return contents[0] == contents[1]


def check(folder: Path, samples: int, processes: Sequence[int]) -> bool:
    """Run all, print a table, and say whether everything was the same."""
    passes = Passes(folder, samples)
    print("| run | exit | shards before | seconds | score table | mask |", flush=True)
    print("|---|---:|---:|---:|---|---|", flush=True)
    good = True
    assert passes.start("reference", 1).end() == 0

    def finish(name: str, count: int, what: str, strategy: str = "ddp") -> None:
        nonlocal good
        running, started = passes.start(name, count, strategy=strategy), time.monotonic()
        before = running.shards()
        code = running.end()
        seconds = time.monotonic() - started
        table = code == 0 and same(folder / "one" / "scores", folder / name / "scores")
        mask = table and masked(name) == masked("one")
        good = good and table and mask
        words = ["same" if equal else "DIFFERENT" for equal in (table, mask)]
        print(f"| {what} | {code} | {before} | {seconds:.1f} | {' | '.join(words)} |", flush=True)

    def masked(name: str) -> bytes:
        base, reference = (ScoreTable(folder / run / "scores") for run in (name, "reference"))
        pool = TokenPool(Path(base.manifest["pool_folder"]))
        scored = ScoredRows(pool, base.rows, base, reference, round=1)
        target = folder / f"cleaned_{name}"
        clean(scored, SelectionConfig("token_cleaning", keep=0.6), 0, target)
        return b"".join(path.read_bytes() for path in sorted(target.glob("*.parquet")))

    finish("one", 1, "1 process")
    for count in processes:
        if count > 1:
            finish(f"of_{count}", count, f"{count} processes")
    finish("split", 2, "2 processes, fsdp2", "fsdp2")
    for first, then in ((1, max(processes)), (max(processes), 2), (2, 1)):
        name = f"killed_{first}_{then}"
        running = passes.start(name, first)
        running.wait_for(20)
        running.kill()
        finish(name, then, f"{first} killed at {running.shards()}, then {then}")
    running = passes.start("killed_split", 2, strategy="fsdp2")
    running.wait_for(20)
    running.kill()
    finish("killed_split", 1, f"2 of fsdp2 killed at {running.shards()}, then 1")
    running = passes.start("stopped", 2, "lightning")
    running.wait_for(10)
    running.process.send_signal(signal.SIGTERM)
    code, left = running.end(), running.others()
    ended = code == 143 and not left
    good = good and ended
    print(
        f"SIGTERM to the first of Lightning's two: exit {code}, {left} processes left", flush=True
    )
    finish("stopped", 1, f"2 stopped at {running.shards()}, then 1")
    return good


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.distributed_scoring", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        good = check(folder.resolve(), options.samples, options.processes)
    print("all the same" if good else "NOT all the same")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
