"""What the tables of a study are made of: finished runs, means over seeds, tables on disk.

Everything here only reads run folders of ``tokenclean clean``. A value that a run does not have is
None (or, inside `MaskQuality`, NaN) and is never averaged over in silence: a mean states how many
seeds it lacks.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenclean.cleaning.results import ANSWERS, RESULT, RESULTS, ArmResult
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL, Answers
from tokenclean.runs import CONFIG
from tokenclean.trust import read_yaml


@dataclass(frozen=True)
class Cell:
    """One run of a study's grid.

    Attributes:
        variant: name of its setting, e.g. ``keep_0.3``; ``main`` if there is only one.
        seed: of the run.
        folder: a finished run of ``tokenclean clean``.
        value: where the variant stands on the axis that the study varies, if it varies a number.
    """

    variant: str
    seed: int
    folder: Path
    value: float | None = None

    def results(self) -> dict[str, ArmResult]:
        """Arm -> what was measured of it; the untrained base is among them.

        Raises:
            ValueError: if the run is not finished.
        """
        path = self.folder / RESULTS
        if not path.is_file():
            raise ValueError(
                f"{self.folder}: no {RESULTS} there; is it a run of `tokenclean clean`, and "
                "finished? Running it again goes on where it stopped"
            )
        return {r["name"]: ArmResult.from_json(r) for r in _read(path)}

    def place(self, arm: str) -> Path:
        """The folder of an arm, or of the base."""
        return self.folder / "base" if arm == "base" else self.folder / "arms" / arm

    def config(self) -> dict[str, Any]:
        """The run's resolved configuration; empty if it is not there."""
        return _read(self.folder / CONFIG) or {}


def _read(path: Path) -> Any:
    """What a JSON or YAML file holds, for reading only; None if it is not there."""
    return _read_once(path, path.stat().st_mtime_ns) if path.is_file() else None


@cache
def _read_once(path: Path, changed: int) -> Any:
    # Every table asks for the same few files, and YAML is slow to read.
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else read_yaml(path)


def result_of(folder: Path) -> ArmResult | None:
    """What was measured of one model, if it was."""
    value = _read(folder / RESULT)
    return None if value is None else ArmResult.from_json(value)


def answers_of(folder: Path) -> Answers | None:
    """A model's answers, question by question, if the run wrote them."""
    found: Answers | None = _read(folder / ANSWERS)
    return found


def by_variant(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Variant -> its cells by ascending seed; variants in the order in which they are given."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.variant, []).append(cell)
    return {name: sorted(group, key=lambda c: c.seed) for name, group in found.items()}


def arms_of(cells: Iterable[Cell]) -> list[str]:
    """Every arm of some cell, in the order of the runs."""
    return list(dict.fromkeys(arm for cell in cells for arm in cell.results()))


def regimes_of(sources: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Regime -> its families, on a planted pool; empty on any other."""
    names = set(sources) - {ALL}
    regimes: dict[str, tuple[str, ...]] = {}
    if names <= set(REGIMES):
        for family, regime in REGIMES.items():
            if family in names:
                regimes[regime] = (*regimes.get(regime, ()), family)
    return regimes


def groups_of(sources: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Column -> the sources that it averages.

    On a planted pool the regimes come first, each the mean of its families; then every source;
    then ``all``, which pools the questions (or tokens) of all sources.
    """
    names = sorted(set(sources) - {ALL})
    regimes = regimes_of(names)
    if regimes:
        names = [family for family in REGIMES if family in names]
    return {**regimes, **{name: (name,) for name in names}, ALL: (ALL,)}


def headlines_of(sources: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """``all`` and the regimes; on a pool without regimes, ``all`` and every source."""
    names = sorted(set(sources) - {ALL})
    return {ALL: (ALL,), **(regimes_of(names) or {name: (name,) for name in names})}


def sources_of(cells: Iterable[Cell]) -> list[str]:
    """Every source of the test sets and masks."""
    return sorted({s for c in cells for r in c.results().values() for s in (*r.accuracy, *r.mask)})


def accuracy(result: ArmResult | None, group: tuple[str, ...]) -> float | None:
    """Mean accuracy of a group's sources in percent; None if one of them was not measured."""
    if result is None or not set(group) <= set(result.accuracy):
        return None
    return 100 * statistics.fmean(result.accuracy[source].share for source in group)


@dataclass(frozen=True)
class Spread:
    """One quantity over the seeds.

    Attributes:
        values: one per seed that has it.
        digits: shown after the point.
        missing: seeds that lack it.
        mark: put behind it where it is shown.
    """

    values: tuple[float, ...]
    digits: int = 1
    missing: int = 0
    mark: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation over seeds (n - 1 below the sum); NaN of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def se(self) -> float:
        """Standard error of the mean: sd / sqrt(number of seeds)."""
        return self.sd / math.sqrt(len(self.values))

    def __str__(self) -> str:
        # z: a small negative number is not shown as -0.0
        text = f"{self.mean:z.{self.digits}f}"
        if len(self.values) > 1:
            text += f" ± {self.sd:.{self.digits}f}"
        if self.missing:
            text += f" ({len(self.values)} of {len(self.values) + self.missing} seeds)"
        return text + self.mark


def spread(values: Iterable[float | None], digits: int = 1, mark: str = "") -> Spread | None:
    """Gather one quantity over seeds; None where no seed has it. NaN counts as not there."""
    given = list(values)
    known = tuple(v for v in given if v is not None and not math.isnan(v))
    return Spread(known, digits, len(given) - len(known), mark) if known else None


@dataclass
class Table:
    """A table of a report.

    Attributes:
        name: of its file.
        title: one line above it.
        columns: their names, units in brackets.
        rows: cells are text, numbers, `Spread` or None.
        notes: how to read it, and what is missing.
        figures: drawn of it, relative to the report's folder.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        numeric = [
            any(isinstance(row[i], int | float | Spread) for row in self.rows)
            for i in range(len(self.columns))
        ]
        lines = [f"### {self.title}", ""]
        if self.rows:
            lines += [
                "| " + " | ".join(self.columns) + " |",
                "|" + "|".join("---:" if n else "---" for n in numeric) + "|",
                *("| " + " | ".join(_shown(cell) for cell in row) + " |" for row in self.rows),
                "",
            ]
        lines += [f"![{Path(figure).stem}]({figure})\n" for figure in self.figures]
        lines += [f"* {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def write_csv(self, path: Path) -> None:
        """Plain numbers: a column of means is followed by its ``sd``, ``seeds`` and ``mark``."""
        columns: list[list[Any]] = []
        for i, name in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            spreads = [cell if isinstance(cell, Spread) else None for cell in cells]
            values = [
                _plain(cell if s is None else s.mean)
                for cell, s in zip(cells, spreads, strict=True)
            ]
            columns.append([name, *values])
            if any(spreads):
                columns.append([f"{name}: sd", *(s and _plain(s.sd) for s in spreads)])
                columns.append([f"{name}: seeds", *(s and len(s.values) for s in spreads)])
            if any(s and s.mark for s in spreads):
                columns.append([f"{name}: mark", *(s and s.mark.strip() for s in spreads)])
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(zip(*columns, strict=True))

    def to_json(self) -> dict[str, Any]:
        def value(cell: Any) -> Any:
            if isinstance(cell, Spread):
                return {
                    "mean": cell.mean,
                    "sd": _plain(cell.sd),
                    "values": list(cell.values),
                    "missing": cell.missing,
                    "mark": cell.mark,
                }
            return _plain(cell)

        return {
            "name": self.name,
            "title": self.title,
            "columns": self.columns,
            "rows": [[value(cell) for cell in row] for row in self.rows],
            "notes": self.notes,
            "figures": self.figures,
        }


def _plain(cell: Any) -> Any:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _shown(cell: Any) -> str:
    cell = _plain(cell)
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def file_name(*parts: str) -> str:
    """A file name of words that may hold anything; ``main``, the only variant, is left out."""
    return re.sub(r"[^\w.-]+", "_", "_".join(p for p in parts if p not in ("", "main")))


def seeds_note(cells: Sequence[Cell]) -> str:
    """How many seeds a table rests on."""
    seeds = sorted({cell.seed for cell in cells})
    if len(seeds) == 1:
        return (
            f"One seed ({seeds[0]}): no spread over seeds is known, so nothing counts as resolved."
        )
    listed = ", ".join(map(str, seeds))
    return f"{len(seeds)} seeds ({listed}): mean ± standard deviation over seeds."
