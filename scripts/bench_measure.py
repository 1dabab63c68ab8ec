"""Measuring for the benchmark: interleaved times, peak memory, what machine it was."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenclean.machine import settled

#: the two sides of most comparisons
OURS, THEIRS = "ours", "published"
#: Prepares repeat i (-1: the warm-up) and returns what is to be timed.
Side = Callable[[int], Callable[[], Any]]
#: Names of things that must agree, with how far they do: a difference, or whether they are equal.
Same = dict[str, float | bool]


@dataclass
class Timed:
    """A result and what it took, by the clock and by the processor's; both in seconds.

    A side may return one to leave out set-up that it cannot split off.
    """

    seconds: float
    processor: float
    result: Any


@dataclass
class Line:
    """One line of the table.

    Attributes:
        part: which part of the benchmark.
        case: on what.
        ratio: of what to what.
        values: one per repeat; empty if it was not run.
        processor: median ratio of processor times. Far from that of the clock's, something else was
            running, or a side waited for memory or disk.
        same: how far the sides' numbers agree.
        aim: what the project wants to reach.
        note: why it was not run, where it is not that it did not fit into memory.
        facts: more, for the JSON.
    """

    part: str
    case: str
    ratio: str
    values: list[float]
    same: Same = field(default_factory=dict)
    aim: str = ""
    note: str = ""
    processor: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """What `interleave` found.

    Attributes:
        seconds: of each side, one per repeat; of a side that did not fit into memory, none.
        processor: the same by the processor's clock.
        same: the worst agreement over all repeats.
    """

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]
    same: Same = field(default_factory=dict)

    def line(
        self, part: str, case: str, over: str, under: str, ratio: str = "", **more: Any
    ) -> Line:
        """Times of one side over those of another, repeat by repeat; ``more`` goes to `Line`."""
        values = _ratios(self.seconds[over], self.seconds[under])
        processor = _ratios(self.processor[over], self.processor[under])
        found = Line(part, case, ratio or f"time, {over} / {under}", values, **more)
        found.processor = statistics.median(processor) if processor else None
        found.facts |= {"seconds": self.seconds, "processor seconds": self.processor}
        return found


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)] if over and under else []


def interleave(
    sides: Mapping[str, Side],
    repeats: int,
    device: str,
    label: str,
    check: Callable[[dict[str, Any]], Same] | None = None,
    warm_up: bool = True,
) -> Measured:
    """Run all sides in turn, again and again.

    Args:
        sides: by name.
        repeats: how often.
        device: waited for before the clock is read.
        label: for the progress lines.
        check: compares what the sides returned in one repeat.
        warm_up: run each once before, without a clock.
    """
    measured = Measured({name: [] for name in sides}, {name: [] for name in sides})
    running = dict(sides)
    for repeat in range(-1 if warm_up else 0, repeats):
        results: dict[str, Any] = {}
        for name, side in list(running.items()):
            try:
                timed = _timed(side(repeat), device)
            except torch.OutOfMemoryError:
                say(f"{label}: {name} does not fit into memory")
                measured.seconds[name], measured.processor[name] = [], []
                del running[name]
                continue
            results[name] = timed.result
            if repeat >= 0:
                measured.seconds[name].append(timed.seconds)
                measured.processor[name].append(timed.processor)
        if repeat < 0:
            continue
        for what, value in (check(results) if check and running == dict(sides) else {}).items():
            before = measured.same.get(what, value)
            if isinstance(value, bool):
                measured.same[what] = bool(before and value)
            else:
                measured.same[what] = float(np.maximum(before, value))  # a NaN stays
        times = ", ".join(f"{name} {measured.seconds[name][-1]:.3g} s" for name in running)
        say(f"{label}, repeat {repeat + 1} of {repeats}: {times}")
    return measured


def _timed(run: Callable[[], Any], device: str) -> Timed:
    gc.collect()
    started, processor = settled(device), time.process_time()
    result = run()
    seconds, processor = settled(device) - started, time.process_time() - processor
    return result if isinstance(result, Timed) else Timed(seconds, processor, result)


# -- the table -------------------------------------------------------------------------------


_HEADINGS = (
    "part",
    "case",
    "ratio",
    "median",
    "min .. max",
    "processor time",
    "aim",
    "same numbers",
)


def markdown(lines: Sequence[Line]) -> str:
    rows = [[*_HEADINGS], ["---"] * 3 + ["---:"] * 4 + ["---"]]
    for line in lines:
        median, span = "not run", line.note or "no memory"
        if line.values:
            values = spread(line.values)
            median, span = f"{values['median']:.3g}", f"{values['min']:.3g} .. {values['max']:.3g}"
        processor = "" if line.processor is None else f"{line.processor:.3g}"
        same = ", ".join(f"{k} {_short(v)}" for k, v in line.same.items())
        rows.append([line.part, line.case, line.ratio, median, span, processor, line.aim, same])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1e}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- memory -----------------------------------------------------------------------------------


def peak_memory(run: Callable[[], Any], device: str) -> dict[str, int]:
    """Peak memory of a piece of work above what there was before it, in bytes.

    On a GPU what its allocator handed out. On a CPU the work runs in a forked child, whose peak the
    kernel records, and the allocator is told to give back what is freed. So it is what is in use at
    once, whatever ran before; left to itself, the allocator holds on to half as much again.

    Returns:
        ``peak``, and on a CPU also ``anonymous``, looked at every 2 ms: without the pages of mapped
        files, which the kernel takes back when it needs them.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"peak": torch.cuda.max_memory_allocated() - before}
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_peak_here(run)).encode())
        finally:
            os._exit(0)  # nothing of the parent's may be cleaned up twice
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("the process whose memory was measured came to nothing")
    found: dict[str, int] = json.loads(answer)
    return found


def can_measure_memory(device: str) -> bool:
    """A CPU's peak is read from Linux's /proc."""
    return device == "cuda" or Path("/proc/self/clear_refs").exists()


_M_MMAP_THRESHOLD = -3


def _peak_here(run: Callable[[], Any]) -> dict[str, int]:
    torch.set_num_threads(1)  # the parent's other threads do not live here
    libc = ctypes.CDLL(None)
    # Each tensor from 128 KB on is given back when it is freed: the peak is then that of what is
    # alive, whatever earlier work taught the allocator to keep.
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, anonymous = _status("VmRSS"), _status("RssAnon")
    highest, done = anonymous, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return {"peak": _status("VmHWM") - before, "anonymous": highest - anonymous}


def _status(entry: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024


def memory_lines(
    part: str, case: str, runs: Mapping[str, Callable[[], Any]], device: str, aim: str = ""
) -> Iterator[Line]:
    """Peak memory of the first side over that of each other."""
    found: dict[str, dict[str, int]] = {}
    note = "" if can_measure_memory(device) else "needs Linux"
    for side, run in runs.items() if not note else ():
        with contextlib.suppress(torch.OutOfMemoryError):
            found[side] = peak_memory(run, device)
            say(f"{part}, {case}, peak of {side}: {found[side]['peak'] / 1e6:.0f} MB")
    first, *others = runs
    for other in others:
        what = f"peak memory, {first} / {other}"
        both = first in found and other in found
        ratio = [found[first]["peak"] / max(found[other]["peak"], 1)] if both else []
        yield Line(part, case, what, ratio, aim=aim, note=note, facts={"bytes": found})


# -- the machine ------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft", "lightning")},
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
