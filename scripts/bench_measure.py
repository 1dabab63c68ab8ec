"""Measuring for the benchmark: interleaved times, peak memory, what machine it was."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """The result of a side that takes its own time, leaving out set-up that it cannot split off."""

    seconds: float
    result: Any


@dataclass
class Measured:
    """What `interleave` found.

    Attributes:
        seconds: of each side, one per repeat; of a side that did not fit into memory, none.
        same: the worst agreement over all repeats.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    same: Same = field(default_factory=dict)

    def ratios(self, over: str, under: str) -> list[float]:
        """Seconds of one side over those of another, repeat by repeat."""
        above, below = self.seconds[over], self.seconds[under]
        return [a / b for a, b in zip(above, below, strict=True)] if above and below else []


def interleave(
    sides: Mapping[str, Side],
    repeats: int,
    device: str,
    label: str,
    check: Callable[[dict[str, Any]], Same] | None = None,
) -> Measured:
    """Run all sides in turn, again and again, after a warm-up of each.

    Args:
        sides: by name.
        repeats: how often.
        device: waited for before the clock is read.
        label: for the progress lines.
        check: compares what the sides returned in one repeat.
    """
    measured, running = Measured({name: [] for name in sides}), dict(sides)
    for repeat in range(-1, repeats):
        results: dict[str, Any] = {}
        for name, side in list(running.items()):
            try:
                seconds, results[name] = _timed(side(repeat), device)
            except torch.OutOfMemoryError:
                say(f"{label}: {name} does not fit into memory")
                measured.seconds[name] = []
                del running[name]
                continue
            if repeat >= 0:
                measured.seconds[name].append(seconds)
        if repeat < 0:
            continue
        for what, value in (check(results) if check and running == dict(sides) else {}).items():
            worse = min if isinstance(value, bool) else max
            measured.same[what] = worse(value, measured.same.get(what, value))
        times = ", ".join(f"{name} {measured.seconds[name][-1]:.3g} s" for name in running)
        say(f"{label}, repeat {repeat + 1} of {repeats}: {times}")
    return measured


def _timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    gc.collect()
    started = settled(device)
    result = run()
    seconds = settled(device) - started
    return (result.seconds, result.result) if isinstance(result, Timed) else (seconds, result)


# -- the table ----


@dataclass
class Line:
    """One line of the table.

    Attributes:
        part: which part of the benchmark.
        case: on what.
        ratio: of what to what.
        values: one per repeat; empty if it was not run.
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
    facts: dict[str, Any] = field(default_factory=dict)


def markdown(lines: Sequence[Line]) -> str:
    rows = [["part", "case", "ratio", "median", "min .. max", "aim", "same numbers"]]
    rows.append(["---", "---", "---", "---:", "---:", "---:", "---"])
    for line in lines:
        values = spread(line.values) if line.values else None
        rows.append(
            [
                line.part,
                line.case,
                line.ratio,
                f"{values['median']:.3g}" if values else "not run",
                f"{values['min']:.3g} .. {values['max']:.3g}"
                if values
                else line.note or "no memory",
                line.aim,
                ", ".join(f"{k} {_short(v)}" for k, v in line.same.items()),
            ]
        )
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

    On a GPU what its allocator handed out. On a CPU the work runs in a forked child, so that what
    earlier work left in the allocator cannot hide anything; the kernel records the child's peak.

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


def _peak_here(run: Callable[[], Any]) -> dict[str, int]:
    torch.set_num_threads(1)  # the parent's other threads do not live here
    ctypes.CDLL(None).malloc_trim(0)
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


def memory_line(
    part: str, case: str, runs: Mapping[str, Callable[[], Any]], device: str, aim: str = ""
) -> Line:
    """Peak memory of the first side over that of the second."""
    ours, theirs = runs
    what = f"peak memory, {ours} / {theirs}"
    if not can_measure_memory(device):
        return Line(part, case, what, [], note="needs Linux")
    try:
        found = {side: peak_memory(run, device) for side, run in runs.items()}
    except torch.OutOfMemoryError:
        return Line(part, case, what, [])
    say(f"{case}, peak: " + ", ".join(f"{k} {v['peak'] / 1e6:.0f} MB" for k, v in found.items()))
    ratio = found[ours]["peak"] / max(found[theirs]["peak"], 1)
    return Line(part, case, what, [ratio], aim=aim, facts={"bytes": found})


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
