"""The verbs `study` and `results`."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from tokenclean import commands
from tokenclean.cleaning.results import ArmResult, results_markdown
from tokenclean.costs import COSTS, SHARED, Cost, quantity, seconds_text
from tokenclean.parsing import Parser, allow
from tokenclean.publish import write_json, write_text
from tokenclean.runs import SUMMARY, check_run, locked, open_run, run_folder, write_summary
from tokenclean.study.config import Quick, Reference, StudyConfig, Variant
from tokenclean.study.driver import (
    STUDY,
    Planned,
    plan_study,
    quick_study,
    run_study,
    write_data,
)
from tokenclean.study.tables import REPORTS, Cell, report
from tokenclean.trust import safe_name, words

log = logging.getLogger(__name__)

allow(StudyConfig, Variant, Reference, Quick)

RESULTS = "results.md"


def study(argv: list[str]) -> None:
    """Arms x seeds x settings: many runs of `clean`, one table."""
    parser = Parser(
        prog="tokenclean study",
        description="Arms x seeds x settings: many runs of `clean`, their tables and figures.",
        usage="%(prog)s -c configs/study/NAME.yaml [--option value ...]",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file")
    parser.add_argument("--quick", action="store_true", help="the study's own small version")
    parser.add_argument(
        "--estimate", action="store_true", help="print what it would cost instead of running it"
    )
    parser.add_argument("--name", type=str | None, help="folder's name; default: that of the file")
    parser.add_argument("--outputs", type=str, default="outputs", help="where run folders are")
    parser.add_class_arguments(StudyConfig, "study")
    config = parser.parse_args(argv)
    plain = yaml.safe_load(parser.dump(config, skip_validation=True))
    plain.pop("estimate")
    asked: StudyConfig = parser.instantiate_classes(config).study
    settings = quick_study(asked) if config.quick else asked
    _check_reports(settings.reports)
    files = [Path(str(file)).stem for file in config.get("config") or []]
    for part, option in ((config.name, "--name"), ("-".join(files) or None, "--config")):
        if part is not None:
            safe_name(part, option)
    name = config.name or "-".join(files) + ("_quick" if config.quick else "") or None
    folder = run_folder(config.outputs, name, "study", plain)
    if settings.of is not None:
        if config.estimate:
            print(f"Nothing to run: it reads the runs of {settings.of}.")
        else:
            _read_other(settings, folder, plain)
        return
    if config.estimate:
        # Somewhere else: the folder may hold a study of other settings.
        with tempfile.TemporaryDirectory() as place:
            write_data(settings, Path(place))
            print(_estimate(plan_study(settings, Path(place)), settings))
        return
    check_run(folder, plain)
    cells = plan_study(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):  # not opened yet: one that costs too much leaves no run behind
        write_data(settings, folder)
        if not all(cell.finished for cell in cells):
            print(_estimate(cells, settings), flush=True)
    with open_run(folder, plain):
        _store(settings, cells, folder, {})
        failed = run_study(cells, commands.fit, commands.clean)
        _store(settings, cells, folder, failed)
        done = [cell for cell in cells if cell.finished]
        if settings.evaluate is not None and done:
            _evaluate(settings, done, folder)
        finished = [Cell(c.variant, c.seed, c.folder, c.value) for c in done]
        print(_write_results(folder, finished, settings.reports, settings.against))
    write_summary(
        folder,
        {
            "runs": len(cells),
            "failed": len(failed),
            "seeds": len(settings.seeds),
            "variants": len(settings.variants),
            **_spent(done),
            "results": str(folder / RESULTS),
        },
    )
    if failed:
        raise ValueError(
            "\n".join(["some runs failed:", *(f"{k}: {v}" for k, v in failed.items())])
        )


def results(argv: list[str]) -> None:
    """Print the tables of finished runs and studies again."""
    parser = Parser(
        prog="tokenclean results",
        description="Print the tables of finished runs of `clean` and `evaluate` and of studies.",
    )
    parser.add_argument("runs", nargs="+", type=str, help="run folders")
    parser.add_argument(
        "--reports", type=list[str] | None, help=f"of studies: {', '.join(REPORTS)}"
    )
    parser.add_argument("--against", type=str | None, help="of studies: the arm to compare with")
    config = parser.parse_args(argv)
    _check_reports(config.reports or [])
    for name in config.runs:
        folder = Path(name)
        if (folder / STUDY).is_file():
            stored = json.loads((folder / STUDY).read_text(encoding="utf-8"))
            cells = _cells_of(folder, stored)
            reports = config.reports or stored["reports"]
            against = config.against or stored["against"]
            # What the study itself asked for stays where it is.
            own = (reports, against) == (stored["reports"], stored["against"])
            print(_write_results(folder if own else folder / "more", cells, reports, against))
        elif (folder / "results.json").is_file() and (folder / "base" / "result.json").is_file():
            stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            print(results_markdown([ArmResult.from_json(value) for value in stored]))
        elif (folder / RESULTS).is_file():
            print((folder / RESULTS).read_text(encoding="utf-8"))
        else:
            raise ValueError(
                f"{folder}: no results there; give the folder of a finished run of `clean` or "
                "`evaluate`, or of a study"
            )


def _check_reports(names: list[str]) -> None:
    if unknown := [name for name in names if name not in REPORTS]:
        raise ValueError(f"reports: {', '.join(unknown)} is not one of {', '.join(REPORTS)}")


def _read_other(settings: StudyConfig, folder: Path, plain: dict[str, Any]) -> None:
    """Reports on another study's runs."""
    assert settings.of is not None
    other = Path(settings.of)
    if not (other / STUDY).is_file():
        raise ValueError(f"study.of: {other} holds no study; run that one first")
    stored = json.loads((other / STUDY).read_text(encoding="utf-8"))
    cells = _cells_of(other, stored)
    stored["cells"] = [
        {**cell, "folder": str((other / cell["folder"]).resolve())} for cell in stored["cells"]
    ]
    stored |= {"against": settings.against, "reports": settings.reports, "of": settings.of}
    with open_run(folder, plain):
        write_json(folder / STUDY, stored)
        print(_write_results(folder, cells, settings.reports, settings.against))
    write_summary(folder, {"runs": len(cells), "of": settings.of, "results": str(folder / RESULTS)})


def _store(
    settings: StudyConfig, cells: list[Planned], folder: Path, failed: dict[str, str]
) -> None:
    """What `results` needs to know, and what anyone needs who wants one run again."""
    stored = [
        {
            "variant": cell.variant,
            "seed": cell.seed,
            "value": cell.value,
            "folder": str(cell.folder.relative_to(folder)),
            "command": ["tokenclean", "clean", *words(), *cell.command],
            "reference": None
            if cell.fit is None
            else ["tokenclean", "fit", *words(), *cell.fit[0]],
            "failed": failed.get(str(cell.folder)),
        }
        for cell in cells
    ]
    write_json(
        folder / STUDY,
        {"against": settings.against, "reports": settings.reports, "cells": stored},
    )


def _cells_of(folder: Path, stored: dict[str, Any]) -> list[Cell]:
    return [
        Cell(c["variant"], c["seed"], folder / c["folder"], c["value"])
        for c in stored["cells"]
        if (folder / c["folder"] / SUMMARY).is_file()
    ]


def _write_results(folder: Path, cells: list[Cell], reports: list[str], against: str) -> str:
    if not cells:
        return "no run is finished"
    folder.mkdir(exist_ok=True)
    text = report(reports, cells, against, folder)
    write_text(folder / RESULTS, text)
    return text


def _evaluate(settings: StudyConfig, done: list[Planned], folder: Path) -> None:
    from tokenclean.evaluation.verb import evaluate

    for variant in settings.variants:
        runs = [cell.folder for cell in done if cell.variant == variant]
        if len(runs) < len(settings.seeds):
            log.warning("%s: not evaluated before all of its runs are finished", variant)
            continue
        words = [word for run in runs for word in ("--run", str(run))]
        place = ["--outputs", str(folder / "evaluation"), "--name", variant]
        evaluate(["-c", str(settings.evaluate), *words, *place])


def _estimate(cells: list[Planned], settings: StudyConfig) -> str:
    """A line per variant, for all its seeds, from the first one's run.

    Raises:
        ValueError: if all of them together exceed the study's token budget.
    """
    lines = [
        "An estimate, for all seeds. Models that do not fill the device are slower.",
        "",
        "| variant | runs | tokens computed | FLOP | time | disk |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total, seeds = Cost("all", "train"), len(settings.seeds)
    for cell in cells[: len(settings.variants)]:
        costs = commands.clean_costs(cell.command)
        if settings.against not in (arms := {cost.arm for cost in costs} - {SHARED}):
            raise ValueError(
                f"study.against: {settings.against!r} is not an arm of {cell.variant}; choose from "
                f"{', '.join(sorted(arms))}"
            )
        if cell.fit is not None:
            costs += commands.fit_costs(cell.fit[0])
        one = Cost(cell.variant, "train")
        for cost in costs:
            for _ in range(seeds):
                one.add(cost)
        total.add(one)
        lines.append(_estimate_line(cell.variant, seeds, one))
    lines.append(_estimate_line("all", len(cells), total))
    text = "\n".join(lines) + "\n"
    if settings.token_budget is not None:
        text += f"\nBudget: {quantity(settings.token_budget)} tokens.\n"
        if total.tokens > settings.token_budget:
            raise ValueError(
                f"{text}\nstudy.token_budget: the runs would compute {quantity(total.tokens)} "
                "tokens, more than the budget; take fewer seeds or variants or raise it"
            )
    return text


def _estimate_line(name: str, runs: int, cost: Cost) -> str:
    cells = [name, runs, quantity(cost.tokens), quantity(cost.flops), seconds_text(cost.seconds)]
    return f"| {' | '.join(map(str, [*cells, quantity(cost.disk, 'B')]))} |"


def _spent(cells: list[Planned]) -> dict[str, float]:
    """What the runs took, as their ledgers say."""
    tokens = seconds = 0.0
    for cell in cells:
        if (cell.folder / COSTS).is_file():
            stored = json.loads((cell.folder / COSTS).read_text(encoding="utf-8"))
            seconds += stored["wall_seconds"]
            tokens += sum(row["tokens"] for row in stored["rows"])
    return {"tokens": tokens, "run_seconds": seconds}
