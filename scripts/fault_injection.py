"""Kill runs at every publish point and at random moments; the same command again must end the same.

    python scripts/fault_injection.py                  # every point of every verb, 100 random kills
    python scripts/fault_injection.py --every 10 --random 10 --verbs score clean

Each verb first runs undisturbed. Then, in a fresh folder each time, it is killed (SIGKILL) before
its n-th call that gives or takes a name (`CALLS`), or after a random time, and run again until it
ends by itself. What it leaves must have the same bytes, logs, times and costs aside; what was
published before the kill must be the same file, not one made again; nothing partial may be left.
Runs are forked from one process that has imported everything, on a pool and a model made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: What gives and takes names. A kill between two of them leaves what a kill before the second does,
#: but for the contents of files that have no final name yet; flushing changes nothing that a killed
#: process leaves, only what a power cut would.
CALLS = ("rename", "replace", "link", "symlink", "unlink", "rmdir")
#: Files that say when and how long: never the same twice.
NOTES = {"log.txt", "costs.md", "costs.json", "summary.json"}
#: Restarts after which a run is taken to make no progress.
MOST_RESTARTS = 5

_MODEL = ["--model.base.name", "../inputs/model"]
_DATA = [
    *("--data.path", "../inputs/pool.jsonl", "--data.max_length", "128"),
    *("--data.token_budget", "96", "--data.cache_dir", "cache", "--outputs", "."),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]
_TRAINING = [
    *("--model.lora.r", "2", "--model.lora.alpha", "4", "--model.lora.dropout", "0.05"),
    *("--data.batch_size", "8", "--data.subsets", "2"),
]
_ARMS = {
    "fixed": {"schedule": "fixed_model", "rule": "token_cleaning"},
    "evolving": {"schedule": "self_evolving", "rule": "token_cleaning"},
}


def _commands() -> dict[str, list[str]]:
    """Verb -> its arguments, to be run in a folder beside ``inputs``."""
    loop = ["--loop.arms", json.dumps(_ARMS), "--loop.panel", "6", "--data.subsets", "3"]
    tested = ["--data.test_path", "../inputs/test.jsonl"]
    fit = ["fit", *_MODEL, *_DATA, *_TRAINING, "--trainer.max_epochs", "2", "--name", "fit"]
    return {
        "score": ["score", *_MODEL, *_DATA, "--name", "score"],
        "select": [
            *("select", "--base", "../inputs/base", "--reference", "../inputs/reference"),
            *("--pool", "../inputs/tokens"),
            *("--selection.rule", "token_cleaning", "--outputs", ".", "--name", "select"),
        ],
        "fit": [*fit[:-2], "--model.save_merged", "true", *fit[-2:]],
        "clean": ["clean", *_MODEL, *_DATA, *_TRAINING, *tested, *loop, "--name", "clean"],
        "evaluate": [
            *("evaluate", "-c", str(ROOT / "configs" / "evaluate" / "planted.yaml")),
            *("--run", "../inputs/whole", "--limit", "2", "--outputs", "."),
            *("--planted_test", "../inputs/test.jsonl", "--name", "evaluate"),
        ],
        "study": ["study", "-c", "../inputs/study.yaml", "--outputs", ".", "--name", "study"],
    }


# -- children -------------------------------------------------------------------------------------


def run(
    arguments: list[str],
    place: Path,
    kill_at: int | None = None,
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
) -> tuple[int, int]:
    """Run a verb in a folder, in a child of this process.

    Args:
        arguments: the verb and its options.
        place: the folder.
        kill_at: number of the call of `CALLS` before which it is killed, counted from 1.
        kill_after: seconds after which it gets a signal.
        number: which.

    Returns:
        How it ended (minus the signal, if by one), and how many of `CALLS` it made.
    """
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _child(arguments, place, kill_at)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), 0
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = place / "calls"
    return code, int(counted.read_text()) if counted.is_file() else 0


def _child(arguments: list[str], place: Path, kill_at: int | None) -> None:
    """Never returns."""
    os.chdir(place)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    made = 0
    named = os.open("named.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **options)
            if name in ("rename", "replace"):
                os.write(named, f"{os.path.relpath(os.fspath(args[1]))}\n".encode())
            return result

        return counted

    for name in CALLS:
        setattr(os, name, counting(name, getattr(os, name)))
    code = 1
    try:
        from tokenclean import cli

        cli.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    Path("calls").write_text(str(made))
    os._exit(code)


# -- what is left ---------------------------------------------------------------------------------

_OURS = {"calls", "output.txt", "named.txt"}


def contents(place: Path) -> dict[str, str]:
    """Every file of a finished run, but notes of times: name -> hash of its contents."""
    return {
        str(path.relative_to(place)): hashlib.sha256(_timeless(path)).hexdigest()
        for path in _files(place)
    }


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """What two runs hold that is not the same; of the cache, which is no result, what both have."""
    return sorted(
        name
        for name in {*one, *other}
        if one.get(name) != other.get(name)
        and not (name.startswith("cache/") and (name not in one or name not in other))
    )


def _files(place: Path) -> Iterator[Path]:
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place).parts
        if path.is_file() and path.name not in NOTES | _OURS and "tensorboard" not in inside:
            yield path


def _timeless(path: Path) -> bytes:
    """A file's bytes, but for how long things took."""
    if path.suffix == ".ckpt":  # a zip file of many parts, compared by what it leads to
        return b""
    text = path.read_bytes()
    if path.suffix == ".json":
        with suppress(ValueError):
            return json.dumps(_without_times(json.loads(text)), sort_keys=True).encode()
    return text


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_times(v)
            for k, v in value.items()
            if "seconds" not in k and k not in ("date", "time", "files")
        }
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _published(place: Path) -> dict[str, tuple[int, int]]:
    """Files under final names in folders that are complete: name -> inode and time."""
    found = {}
    for path in _files(place):
        if ".partial-" in str(path) or path.name in (".lock", "config.yaml", "results.md"):
            continue
        if (path.parent / "manifest.json").is_file() or path.name.startswith("shard-"):
            facts = path.stat()
            found[str(path.relative_to(place))] = (facts.st_ino, facts.st_mtime_ns)
    return found


def _rests(place: Path) -> list[str]:
    """What no finished run may leave behind."""
    return [
        str(path.relative_to(place))
        for path in place.rglob("*")
        if ".partial" in path.name or path.name == ".lock" or path.name.endswith(".shards")
    ]


@dataclass
class Tally:
    """What came of the kills of one verb.

    Attributes:
        points: calls of `CALLS` in an undisturbed run.
        at_points, at_random: kills.
        stopped: SIGTERM and SIGUSR1 at random moments, after which it ended with 143.
        missed: random ones that came after the end.
        different: trials that left something else.
        again: files made again although they had been published.
        rests: trials that left something unfinished.
        wrong: descriptions of the above.
        found: published files that restarts found and kept.
    """

    points: int = 0
    at_points: int = 0
    at_random: int = 0
    stopped: int = 0
    missed: int = 0
    different: int = 0
    again: int = 0
    rests: int = 0
    found: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def trial(
    arguments: list[str],
    place: Path,
    expected: dict[str, str],
    tally: Tally,
    kill_at: int | None = None,
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
) -> None:
    """Kill or stop one run, run it again, compare."""
    shutil.rmtree(place, ignore_errors=True)
    what = f"{arguments[0]}, signal {number}, " + (
        f"at call {kill_at}" if kill_at else f"after {kill_after:.2f} s"
    )
    code, _ = run(arguments, place, kill_at, kill_after, number)
    if code == 0:
        tally.missed += 1
        return
    # Before its handlers are there, a process ends by the signal itself.
    if code not in ((-number, 143) if number != signal.SIGKILL else (-number,)):
        tally.wrong.append(f"{what}: ended with {code} by itself\n{_tail(place)}")
        return
    if kill_at:
        tally.at_points += 1
    elif number == signal.SIGKILL:
        tally.at_random += 1
    else:
        tally.stopped += 1
    before = _published(place)
    tally.found += len(before)
    (place / "named.txt").unlink(missing_ok=True)
    for _ in range(MOST_RESTARTS):
        code, _ = run(arguments, place)
        if code == 0:
            break
    if code != 0:
        tally.different += 1
        tally.wrong.append(f"{what}: never finished, last {code}\n{_tail(place)}")
        return
    after = contents(place)
    if keys := differences(after, expected):
        tally.different += 1
        tally.wrong.append(f"{what}: not the same: {', '.join(keys[:8])}")
    now = _published(place)
    made_again = [k for k, facts in before.items() if k in now and now[k] != facts]
    named = (place / "named.txt").read_text().split("\n") if (place / "named.txt").exists() else []
    made_again += [k for k in before if "shard-" in k and k in named]
    if made_again:
        tally.again += len(made_again)
        tally.wrong.append(f"{what}: made again: {', '.join(made_again[:8])}")
    if rests := _rests(place):
        tally.rests += 1
        tally.wrong.append(f"{what}: left {', '.join(rests[:8])}")


def _tail(place: Path) -> str:
    text = (place / "output.txt").read_text(errors="replace") if place.exists() else ""
    return "\n".join(text.splitlines()[-8:])


# -- inputs ---------------------------------------------------------------------------------------


def make_inputs(folder: Path, samples: int) -> None:
    """A two-layer model, a planted pool, tables and a run for the verbs that read them."""
    from tokenclean.data.planted import PlantedSettings, write_planted

    settings = PlantedSettings(samples=samples, validation=4, test_per_family=1, seed=3)
    write_planted(folder, settings)
    _write_model(folder / "model")
    commands = _commands()
    warmup = ["fit", "--data.subset", "0", *commands["fit"][1:-4], "--name", "fit"]
    base, reference = list(commands["score"]), list(commands["score"])
    reference[-2:-2] = ["--model.adapters", "../inputs/warmup"]
    whole = commands["clean"]
    made = {"warmup": warmup, "base": base, "reference": reference, "whole": whole}
    for name, arguments in made.items():
        place = folder.parent / f"inputs_{name}"  # beside it, for the commands' relative paths
        shutil.rmtree(place, ignore_errors=True)
        _must(run(arguments, place), place)
        (folder / name).symlink_to(Path("..") / place.name / arguments[-1])
    (pool,) = (folder.parent / "inputs_base" / "cache" / "pools").glob("*/train")
    (folder / "tokens").symlink_to(Path("..") / pool.relative_to(folder.parent))
    study = {
        "study": {
            "configs": ["../inputs/run.yaml"],
            "seeds": [0, 1],
            "reports": ["accuracy"],
            "against": "base",
        }
    }
    import yaml

    loop = {"arms": {"warmup": {"schedule": "warmup"}, "fixed": _ARMS["fixed"]}}
    plain = {
        "model": {"base": {"name": "../inputs/model"}, "lora": {"r": 2, "alpha": 4}},
        "data": {
            "path": "../inputs/pool.jsonl",
            "test_path": "../inputs/test.jsonl",
            "max_length": 128,
            "token_budget": 96,
            "batch_size": 8,
            "subsets": 2,
            "cache_dir": "cache",
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
        "loop": loop,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def _write_model(folder: Path) -> None:
    """The shipped planted base, cut to two small layers of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shipped = ROOT / "tokenclean" / "data" / "planted_base"
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    config = AutoConfig.from_pretrained(shipped)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _must(ended: tuple[int, int], place: Path) -> None:
    if ended[0] != 0:
        raise RuntimeError(f"{place}: ended with {ended[0]}\n{_tail(place)}")


# -- several processes ----------------------------------------------------------------------------


def launched(
    arguments: list[str], place: Path, processes: int, kill_after: float | None = None
) -> int:
    """Run a verb under torchrun; every process of it is killed after a time, if one is given."""
    place.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
        *("--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
        *("-m", "tokenclean", *arguments, "--trainer.strategy", "ddp"),
        *("--trainer.devices", str(processes)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (place / "output.txt").open("a") as output:
        child = subprocess.Popen(
            command, cwd=place, stdout=output, stderr=output, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(kill_after)
        except subprocess.TimeoutExpired:
            # torchrun puts its workers into sessions of their own.
            workers = _children(child.pid)
            for process in (child.pid, *workers):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code = child.wait()
            time.sleep(0.5)
    return code


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found += [int(entry.name), *_children(int(entry.name))]
    return found


def several_processes(work: Path, processes: int, kills: int, seed: int) -> Tally:
    """`clean` under torchrun, killed at random moments and run again with as many processes."""
    tally, draw = Tally(), random.Random(seed)
    arguments = _commands()["clean"]
    place = work / f"clean_{processes}_whole"
    shutil.rmtree(place, ignore_errors=True)
    started = time.monotonic()
    if launched(arguments, place, processes) != 0:
        raise RuntimeError(f"{place}: {_tail(place)}")
    duration = time.monotonic() - started
    expected = contents(place)
    for _ in range(kills):
        trial_place = work / f"clean_{processes}"
        shutil.rmtree(trial_place, ignore_errors=True)
        moment = draw.uniform(0.3, 1.0) * duration  # imports take the first third
        if launched(arguments, trial_place, processes, moment) == 0:
            tally.missed += 1
            continue
        tally.at_random += 1
        before = _published(trial_place)
        tally.found += len(before)
        code = launched(arguments, trial_place, processes)
        after = contents(trial_place)
        keys = differences(after, expected)
        if code != 0 or keys:
            tally.different += 1
            tally.wrong.append(
                f"{processes} processes killed after {moment:.1f} s: {code}, not the same: "
                f"{', '.join(keys[:8])}\n{_tail(trial_place)}"
            )
        now = _published(trial_place)
        made_again = [k for k, facts in before.items() if k in now and now[k] != facts]
        tally.again += len(made_again)
        tally.wrong += [f"made again: {name}" for name in made_again[:8]]
        tally.rests += bool(_rests(trial_place))
        tally.wrong += [f"left {rest}" for rest in _rests(trial_place)]
    tally.seconds = time.monotonic() - started
    return tally


# -- the whole ------------------------------------------------------------------------------------


def inject(
    verbs: list[str],
    work: Path,
    every: int,
    moments: int,
    seed: int,
    samples: int,
    stops: int = 0,
    start: int = 1,
) -> dict[str, Tally]:
    """Kill each verb at every ``every``-th point, and all at random ``moments``."""
    inputs = work / "inputs"
    if not (inputs / "study.yaml").is_file():
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        make_inputs(inputs, samples)
    commands, draw, tallies = _commands(), random.Random(seed), {}
    expected, durations = {}, {}
    for verb in verbs:
        tally = tallies[verb] = Tally()
        began = time.monotonic()
        for attempt in ("first", "second"):
            place = work / f"{verb}_{attempt}"
            shutil.rmtree(place, ignore_errors=True)
            started = time.monotonic()
            code, tally.points = run(commands[verb], place)
            durations[verb] = time.monotonic() - started
            _must((code, 0), place)
        expected[verb] = contents(work / f"{verb}_first")
        if keys := differences(contents(work / f"{verb}_second"), expected[verb]):
            tally.wrong.append(f"{verb}: two undisturbed runs differ: {', '.join(keys[:8])}")
            tally.different += 1
        for point in range(start, tally.points + 1, every):
            trial(commands[verb], work / verb, expected[verb], tally, kill_at=point)
            if point % 20 == 1:
                print(f"{verb}: call {point} of {tally.points}", flush=True)
        tally.seconds = time.monotonic() - began
    weights = [durations[verb] for verb in verbs]
    asked = [signal.SIGKILL] * moments + [signal.SIGTERM, signal.SIGUSR1] * (-(-stops // 2))
    for done, number in enumerate(asked[: moments + stops], start=1):
        verb = draw.choices(verbs, weights)[0]
        moment = draw.uniform(0.0, durations[verb])
        began = time.monotonic()
        trial(
            *(commands[verb], work / verb, expected[verb], tallies[verb]),
            kill_after=moment,
            number=number,
        )
        tallies[verb].seconds += time.monotonic() - began
        if done % 10 == 0:
            print(f"random moment {done} of {moments + stops}", flush=True)
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """The tallies as Markdown."""
    lines = [
        "| verb | points | killed at points | killed at random | stopped by SIGTERM or SIGUSR1 "
        "| published files found again | made again | different | left unfinished | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, tally in tallies.items():
        cells = (
            *(tally.points or "-", tally.at_points, tally.at_random, tally.stopped, tally.found),
            *(tally.again, tally.different, tally.rests, round(tally.seconds)),
        )
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verbs", nargs="+", default=list(_commands()), choices=list(_commands()))
    parser.add_argument("--every", type=int, default=1, help="kill at every so many-th point")
    parser.add_argument("--start", type=int, default=1, help="the first of these points")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--stops", type=int, default=20, help="SIGTERM and SIGUSR1 at random")
    parser.add_argument("--torchrun", type=int, default=0, help="kills of `clean` on 2 processes")
    parser.add_argument("--samples", type=int, default=24, help="of the pool")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--work", type=Path, default=Path("outputs/faults"), help="where it runs")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import tokenclean.commands
    import tokenclean.evaluation.verb
    import tokenclean.study.verb  # noqa: F401

    work = options.work.resolve()
    tallies = inject(
        *(options.verbs, work, options.every, options.random, options.seed, options.samples),
        stops=options.stops,
        start=options.start,
    )
    if options.torchrun:
        tallies["clean, 2 processes"] = several_processes(work, 2, options.torchrun, options.seed)
    print(f"\n{table(tallies)}")
    wrong = [text for tally in tallies.values() for text in tally.wrong]
    print("\n".join(wrong[:40]))
    (work / "faults.md").write_text(table(tallies) + "\n" + "\n".join(wrong) + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
