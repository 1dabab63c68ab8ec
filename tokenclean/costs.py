"""What a run took, stage by stage: seconds, tokens, FLOPs, memory and bytes on disk.

`--estimate` fills the same rows beforehand, so that a plan and a finished run read alike.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.estimate import ModelShape, Work, forward_flops, training_flops
from tokenclean.models import LoraSettings
from tokenclean.publish import write_json, write_text

log = logging.getLogger(__name__)

#: in a run folder, for programs and for people
COSTS, COSTS_TABLE = "costs.json", "costs.md"
#: what all arms share
SHARED = "shared"
Stage = Literal["tokenise", "score", "select", "train", "evaluate"]


@dataclass
class Cost:
    """One stage of one arm, over all calls that it took.

    Attributes:
        arm: who it is charged to; ``shared`` for what several arms use.
        stage: what was done.
        round: of the loop; 0 is the warm-up, None where there are no rounds.
        seconds: wall clock.
        model_seconds: those inside forward, backward and optimiser.
        samples: rows that went through the model (or the selection), epochs counted.
        tokens: computed by the model, padding included.
        targets: tokens whose loss was asked for.
        flops: useful ones; see `tokenclean.estimate`.
        peak_memory: bytes; on CUDA those that tensors took, on a CPU those of the whole process.
        disk: bytes of what the stage left.
    """

    arm: str
    stage: Stage
    round: int | None = None
    seconds: float = 0.0
    model_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    flops: int = 0
    peak_memory: int = 0
    disk: int = 0

    def add(self, other: Cost) -> None:
        """Take another call's share in: everything adds up but the peak."""
        self.seconds += other.seconds
        self.model_seconds += other.model_seconds
        self.samples += other.samples
        self.tokens += other.tokens
        self.targets += other.targets
        self.flops += other.flops
        self.peak_memory = max(self.peak_memory, other.peak_memory)
        self.disk += other.disk


class Ledger:
    """The costs of one run, kept in its folder and added to by every call that does something.

    A call that was cut off adds its seconds and the tokens it computed; samples, targets and FLOPs
    are written when a stage is finished, once. So FLOP/s come out low where work was done twice.

    Args:
        folder: the run folder.
        device: whose memory is watched.
        begun: `time.perf_counter()` when this call began, imports included.
        rank: of this process; only the first one writes.
        world: processes; each is taken to compute as many tokens as this one.

    Attributes:
        rows: in the order in which they were begun.
        wall_seconds: of all calls that did something, start-up and loading included.
    """

    def __init__(
        self, folder: Path, device: torch.device, begun: float, rank: int = 0, world: int = 1
    ):
        self.folder, self.device, self.rank, self.world = folder, device, rank, world
        self.rows: list[Cost] = []
        self.wall_seconds = self._before = 0.0
        self._begun, self._worked = begun, False
        stored = folder / COSTS
        if stored.is_file():
            value = json.loads(stored.read_text(encoding="utf-8"))
            self.rows = [Cost(**row) for row in value["rows"]]
            self.wall_seconds = self._before = value["wall_seconds"]

    @contextmanager
    def measure(
        self,
        arm: str,
        stage: Stage,
        round: int | None = None,
        network: Callable[[], Any] = lambda: None,
        alone: bool = False,
    ) -> Iterator[Cost]:
        """Time a block and charge it; the block fills in samples, tokens, targets, FLOPs and disk.

        Args:
            arm: see `Cost`.
            stage: see `Cost`.
            round: see `Cost`.
            network: gives the model, whose ``seconds`` in compute and ``tokens`` computed are read
                before and after. Where it counts tokens, they replace what the block stated.
            alone: the first process does it while the others wait.
        """
        cost = Cost(arm, stage, round)
        seconds, tokens = _counters(network())
        reset_peak(self.device)
        started = time.perf_counter()
        try:
            yield cost
        finally:
            cost.seconds = time.perf_counter() - started
            after = _counters(network())
            cost.model_seconds = after[0] - seconds
            cost.tokens = (after[1] - tokens) * (1 if alone else self.world) or cost.tokens
            cost.peak_memory = peak_memory(self.device)
            self.add(cost)
            self.store()

    def add(self, cost: Cost) -> None:
        """Add a call's share to its row."""
        key = (cost.arm, cost.stage, cost.round)
        row = next((r for r in self.rows if (r.arm, r.stage, r.round) == key), None)
        if row is None:
            self.rows.append(cost)
        else:
            row.add(cost)
        self._worked = True

    def store(self) -> None:
        """Write the ledger. A call that found everything done changes nothing."""
        if self._worked:
            self.wall_seconds = self._before + time.perf_counter() - self._begun
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                value = {"wall_seconds": self.wall_seconds, "rows": [asdict(r) for r in self.rows]}
                write_json(self.folder / COSTS, value)
                text = self.markdown()
                write_text(self.folder / COSTS_TABLE, text)

    def summary(self) -> dict[str, Any]:
        """Totals for a run's summary; the share outside the model only where it was measured."""
        seconds: dict[str, float] = {}
        for row in self.rows:
            seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
        inside = sum(row.model_seconds for row in self.rows)
        facts = {f"{stage}_seconds": round(value, 2) for stage, value in seconds.items()}
        facts["wall_seconds"] = round(self.wall_seconds, 2)
        if inside:
            facts["outside_model_share"] = round(1.0 - inside / self.wall_seconds, 4)
        return facts

    def markdown(self) -> str:
        """The table of all stages, with what lies between them."""
        between = self.wall_seconds - sum(row.seconds for row in self.rows)
        inside = sum(row.model_seconds for row in self.rows)
        text = (
            f"{cost_table(self.rows)}\n\n"
            f"{seconds_text(self.wall_seconds)} in all, {seconds_text(between)} of them between "
            "the stages (imports, loading and saving models)"
        )
        if inside:
            text += f"; {1.0 - inside / self.wall_seconds:.1%} of the time outside the model"
        return text + ".\n"


def _counters(network: Any) -> tuple[float, int]:
    return getattr(network, "seconds", 0.0), getattr(network, "tokens", 0)


def tokenise(data: TuluDataModule, ledger: Ledger, arm: str = SHARED) -> None:
    """Prepare and open the data; charged only if a pool was made, not if it was there."""
    before = _pools(data)
    reset_peak(ledger.device)
    started = time.perf_counter()
    data.prepare_data()
    data.setup()
    seconds = time.perf_counter() - started
    if made := _pools(data) - before:
        samples = len(data.table)
        peak, disk = peak_memory(ledger.device), directory_bytes(made)
        ledger.add(Cost(arm, "tokenise", None, seconds, 0.0, samples, peak_memory=peak, disk=disk))


def _pools(data: TuluDataModule) -> set[Path]:
    return set((data.cache_dir / "pools").glob("*"))


def charge_scoring(cost: Cost, shape: ModelShape, *passes: TokenRows) -> None:
    """Fill in what forward passes over these rows took."""
    for rows in passes:
        work = Work.of(rows.lengths, rows.counts)
        cost.add(_of(cost, work, forward_flops(shape, work)))


def charge_training(
    cost: Cost,
    shape: ModelShape,
    data: TuluDataModule,
    rows: TokenRows,
    trainer: Any,
    lora: LoraSettings | None,
) -> None:
    """Fill in what a finished training took, its validation passes included.

    Args:
        cost: the row to fill in.
        shape: of the model.
        data: for its batch size, seed and validation pool.
        rows: what was trained on.
        trainer: after ``fit``; its progress counts steps of earlier, resumed calls too.
        lora: the adapter trained, or None for all weights.
    """
    steps = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    per_epoch = int(trainer.num_training_batches)
    work = Work.of_steps(rows.lengths, rows.counts, data.batch_size, data.seed, steps, per_epoch)
    cost.add(_of(cost, work, training_flops(shape, work, lora)))
    if data.validation is not None:
        passes = [data.validated_rows()] * validation_passes(trainer, steps // per_epoch)
        charge_scoring(cost, shape, *passes)


def _of(cost: Cost, work: Work, flops: int) -> Cost:
    return Cost(
        *(cost.arm, cost.stage, cost.round),
        samples=work.samples,
        tokens=work.tokens,
        targets=work.targets,
        flops=flops,
    )


def validation_passes(trainer: Any, epochs: int) -> int:
    """Passes over the validation pool in so many finished epochs."""
    every = trainer.check_val_every_n_epoch or 1
    return epochs // every if trainer.limit_val_batches else 0


# -- the machine ------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, where the system lets a process do that (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak` (on macOS since the process began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        return _status("VmHWM:")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resident_memory() -> int:
    """Bytes that this process holds now: what a run on the CPU starts from."""
    with suppress(OSError, StopIteration):
        return _status("VmRSS:")
    return peak_memory(torch.device("cpu"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def directory_bytes(folders: Iterable[Path]) -> int:
    """Bytes of all files in some folders and beneath; links are not followed."""
    files = (path for folder in folders for path in folder.rglob("*"))
    return sum(p.stat().st_size for p in files if p.is_file() and not p.is_symlink())


def check_room(folder: Path, costs: list[Cost]) -> None:
    """Compare what a run is going to write with what the disk has left.

    Args:
        folder: of the run; what an earlier call wrote there counts as written.
        costs: what the run is estimated to cost.

    Raises:
        ValueError: if the disk has less.
    """
    need = sum(cost.disk for cost in costs) - directory_bytes([folder])
    free = shutil.disk_usage(folder).free
    sizes = quantity(max(need, 0), "B"), quantity(free, "B")
    log.info("%s: about %s to write, %s free", folder, *sizes)
    if need > free:
        raise ValueError(
            f"--outputs: {folder} is going to take about {sizes[0]} more, and its disk has "
            f"{sizes[1]} left; make room, or choose another place"
        )


# -- the table --------------------------------------------------------------------------------

_COLUMNS = (
    *("arm", "stage", "round", "samples", "tokens", "targets", "FLOP", "time", "in model"),
    *("FLOP/s", "peak memory", "disk"),
)


def cost_table(rows: list[Cost]) -> str:
    """Costs as a markdown table with their total; decimal prefixes (1 MB = 10^6 bytes)."""
    total = Cost("all", "score")
    for row in rows:
        total.add(row)
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|---|{'---:|' * (len(_COLUMNS) - 2)}",
        *(_line(row, row.stage, row.flops) for row in rows),
        # a stage whose model was not timed says nothing about speed
        _line(total, "", sum(row.flops for row in rows if row.model_seconds)),
    ]
    return "\n".join(lines)


def _line(row: Cost, stage: str, timed_flops: int) -> str:
    rate = timed_flops / row.model_seconds if row.model_seconds else 0.0
    cells = [
        *(row.arm, stage, "-" if row.round is None else str(row.round)),
        *(quantity(n) for n in (row.samples, row.tokens, row.targets, row.flops)),
        *(seconds_text(row.seconds), seconds_text(row.model_seconds) if row.model_seconds else "-"),
        *(quantity(rate), quantity(row.peak_memory, "B"), quantity(row.disk, "B")),
    ]
    return f"| {' | '.join(cells)} |"


def quantity(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1234567 -> ``1.23 M``; 0 -> ``-``."""
    if not value:
        return "-"
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = 0
    while round(value, 2) >= 1000 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 100 or (not power and value == int(value)) else 1 + (value < 10)
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def seconds_text(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
