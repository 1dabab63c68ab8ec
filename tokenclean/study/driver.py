"""Runs a study: every cell is one call of `clean`, which its folder can be asked to repeat.

    outputs/<study>/
      config.yaml  log.txt  summary.json
      study.json                        the cells, with the command of each
      data/<variant>/seed_<s>/          planted pool, validation and test set
      references/<variant>/seed_<s>/    run of `fit`, where another reference is asked for
      runs/<variant>/seed_<s>/          run of `clean`
      evaluation/<variant>/             run of `evaluate`, if asked for
      results.md  tables/  figures/     see `tokenclean.study.tables`

A cell that is finished is not run again; one that was cut off goes on where it stopped, as `clean`
does. Runs share the base's score tables through the cache.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from tokenclean.data.planted import PlantedSettings, Row, pool_rows, write_jsonl, write_planted
from tokenclean.publish import write_json
from tokenclean.runs import SUMMARY
from tokenclean.study.config import Reference, StudyConfig, Variant
from tokenclean.trust import read_yaml

log = logging.getLogger(__name__)

STUDY = "study.json"
_FIT_KEYS = {"model", "data", "trainer", "seed_everything"}


@dataclass(frozen=True)
class Planned:
    """One run of the grid.

    Attributes:
        variant, seed: its place.
        folder: of the run.
        command: of `clean`, without the verb.
        fit: command of `fit` that trains its reference, without the verb, and where it ends up.
        value: see `Variant`.
    """

    variant: str
    seed: int
    folder: Path
    command: list[str]
    fit: tuple[list[str], Path] | None
    value: float | None

    @property
    def finished(self) -> bool:
        return (self.folder / SUMMARY).is_file()


def quick_study(study: StudyConfig) -> StudyConfig:
    """The study with what its ``quick`` part replaces."""
    quick = study.quick
    names = list(study.variants) if quick.variants is None else quick.variants
    if unknown := set(names) - set(study.variants):
        raise ValueError(f"study.quick.variants: {', '.join(sorted(unknown))} are not variants")
    return replace(
        study,
        seeds=quick.seeds,
        planted=None if study.planted is None else {**study.planted, **quick.planted},
        options={**study.options, **quick.options},
        variants={name: study.variants[name] for name in names},
        token_budget=quick.token_budget,
    )


def plan_study(study: StudyConfig, folder: Path) -> list[Planned]:
    """Every run of the study, seed by seed, so that an unfinished one has all variants."""
    return [
        _planned(study, name, variant, seed, folder)
        for seed in study.seeds
        for name, variant in study.variants.items()
    ]


def _planned(study: StudyConfig, name: str, variant: Variant, seed: int, folder: Path) -> Planned:
    cell = f"seed_{seed}"
    runs = folder / "runs"
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.seed": seed,
        "trainer.enable_progress_bar": False,
        **study.options,
    }
    if study.planted is not None:
        options |= _paths(folder / "data" / name / cell)
    options |= variant.options
    if variant.warmup_of is not None:
        options["loop.warmup"] = str(runs / variant.warmup_of / cell / "warmup")
    fit = None
    if variant.reference is not None:
        place = folder / "references" / name / cell
        fit = (_fit_command(study, variant.reference, seed, place), place)
        options["loop.reference"] = str(place)
    return Planned(
        name, seed, runs / name / cell, _command(study.configs, options, runs / name / cell), fit,
        variant.value,
    )  # fmt: skip


def _fit_command(study: StudyConfig, reference: Reference, seed: int, place: Path) -> list[str]:
    configs = reference.configs
    if configs is None:
        configs = [file for file in study.configs if set(_read_yaml(file)) <= _FIT_KEYS]
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.seed": seed,
        "trainer.enable_progress_bar": False,
        "trainer.enable_checkpointing": False,
    }
    # what all runs share, where `fit` has it too
    options |= {k: v for k, v in study.options.items() if k.split(".")[0] in _FIT_KEYS}
    if study.planted is not None:
        options |= _paths(place / "data")
    return _command(configs, {**options, **reference.options}, place)


def _paths(data: Path) -> dict[str, Any]:
    names = {"path": "pool", "validation_path": "validation", "test_path": "test"}
    return {f"data.{option}": str(data / f"{file}.jsonl") for option, file in names.items()}


def _command(configs: list[str], options: dict[str, Any], place: Path) -> list[str]:
    words = [word for file in configs for word in ("-c", file)]
    for key, value in options.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return [*words, "--outputs", str(place.parent), "--name", place.name]


def write_data(study: StudyConfig, folder: Path) -> None:
    """Write the planted pools of every run and of every reference, where they are not there yet."""
    if study.planted is None:
        return
    for seed in study.seeds:
        for name, variant in study.variants.items():
            asked = {**study.planted, **variant.planted}
            _write_planted(folder / "data" / name / f"seed_{seed}", asked, seed)
            if variant.reference is not None:
                place = folder / "references" / name / f"seed_{seed}" / "data"
                asked = {**asked, **variant.reference.planted}
                _write_planted(place, asked, seed, variant.reference.shuffled)


def planted_settings(asked: dict[str, Any], seed: int) -> PlantedSettings:
    """Settings of a planted pool from plain values; ``noise_scale`` multiplies all noise rates.

    A seed among the values is added to the run's own: another draw for every run.

    Raises:
        ValueError: for a setting that does not exist or a value it cannot have.
    """
    asked = dict(asked)
    scale = float(asked.pop("noise_scale", 1.0))
    known = {f.name for f in fields(PlantedSettings)}
    if unknown := set(asked) - known:
        raise ValueError(
            f"study.planted: {', '.join(sorted(unknown))} is not one of "
            f"{', '.join(sorted(known | {'noise_scale'}))}"
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
    values["seed"] = seed + int(values.get("seed", 0))
    return PlantedSettings(**values).scaled(scale)


def _write_planted(out: Path, asked: dict[str, Any], seed: int, shuffled: bool = False) -> None:
    settings = planted_settings(asked, seed)
    note = out / "settings.json"
    stated = {**asdict(settings), "shuffled": shuffled}
    if note.is_file() and json.loads(note.read_text("utf-8")) == json.loads(json.dumps(stated)):
        return
    note.unlink(missing_ok=True)  # it vouches for the files, which are about to change
    write_planted(out, settings)
    if shuffled:
        write_jsonl(shuffle_responses(list(pool_rows(settings)), seed), out / "pool.jsonl")
    write_json(note, stated)


def shuffle_responses(rows: list[Row], seed: int) -> list[Row]:
    """Every sample's last response exchanged for another sample's, with its truth.

    Responses are as they were, questions are as they were, and one says nothing about the other.
    What a response says by itself remains: the planted ones repeat their question's key.
    """
    order = list(range(len(rows)))
    Random(f"{seed}/shuffled").shuffle(order)
    shuffled = []
    for row, other in zip(rows, (rows[i] for i in order), strict=True):
        last, from_last = len(row["messages"]) - 1, len(other["messages"]) - 1
        truth = [t for t in row["truth"] if t[0] != last]
        truth += [(last, *t[1:]) for t in other["truth"] if t[0] == from_last]
        messages = [*row["messages"][:-1], other["messages"][-1]]
        changed: Row = {**row, "messages": messages, "truth": truth}
        shuffled.append(changed)
    return shuffled


def run_study(
    cells: list[Planned],
    fit: Callable[[list[str]], None],
    clean: Callable[[list[str]], None],
) -> dict[str, str]:
    """Run what is not finished, in order.

    Args:
        cells: from `plan_study`.
        fit, clean: the verbs.

    Returns:
        What stopped the runs that failed, by folder; the others were run all the same.
    """
    failed: dict[str, str] = {}
    open_cells = [cell for cell in cells if not cell.finished]
    if len(open_cells) < len(cells):
        log.info("%d of %d runs are there already", len(cells) - len(open_cells), len(cells))
    for cell, remaining in _with_remaining(open_cells):
        log.info(
            "run %d of %d: %s, seed %d%s",
            len(cells) - len(open_cells) + open_cells.index(cell) + 1,
            len(cells),
            cell.variant,
            cell.seed,
            remaining,
        )
        try:
            if cell.fit is not None and not (cell.fit[1] / SUMMARY).is_file():
                fit(cell.fit[0])
            clean(cell.command)
        except (ValueError, FloatingPointError) as error:
            log.error("%s failed: %s", cell.folder, error)
            failed[str(cell.folder)] = str(error)
    return failed


def _with_remaining(cells: list[Planned]) -> Iterator[tuple[Planned, str]]:
    started = time.monotonic()
    for number, cell in enumerate(cells):
        if number == 0:
            yield cell, ""
            continue
        spent = time.monotonic() - started
        left = spent / number * (len(cells) - number)
        yield cell, f" ({spent / 60:.0f} min so far, about {left / 60:.0f} to go)"


def _read_yaml(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"study.configs: {file} does not exist")
    return read_yaml(path) or {}
