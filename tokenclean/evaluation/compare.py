"""Values, standard errors and paired differences from per-question records; tables of them.

A column is a weighted mean over its tasks, value = sum_t w_t mean_t, with w_t = n_t / n (average
over questions) or 1 / (number of tasks) (average over tasks). Its standard error is that of
independent questions inside fixed tasks, sqrt(sum_t w_t^2 s_t^2 / n_t), s_t the sample standard
deviation; for one task that is the harness's own. The difference of two models is the same
estimate over the differences question by question: both answered the same questions, so what
makes a question hard cancels.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tokenclean.evaluation.benchmarks import Column


@dataclass(frozen=True)
class Record:
    """What one question gave: a share in [0, 1], or NaN."""

    task: str
    doc_id: int
    doc_hash: str
    value: float


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; NaN where there is none."""

    value: float
    stderr: float


@dataclass
class Cell:
    """One model's result in one column.

    Attributes:
        reason: why there is none; then there are no records either.
        nan: questions whose value is NaN; one is enough to make the cell's value NaN.
        truncated: requests longer than the model's context, cut on the left.
        notes: what to know about the data.
    """

    column: str
    value: float = math.nan
    stderr: float = math.nan
    questions: int = 0
    nan: int = 0
    truncated: int = 0
    seconds: float = 0.0
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list, repr=False)

    def plain(self) -> dict[str, Any]:
        """For JSON: without records, NaN as null."""
        values = {k: v for k, v in asdict(self).items() if k != "records"}
        return {k: _null(v) if isinstance(v, float) else v for k, v in values.items()}


Row = Mapping[str, Cell]


def estimate(records: Iterable[Record], average: str) -> Estimate:
    """Value and standard error of a column; see the module's docstring."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for record in records:
        tasks[record.task].append(record.value)
    if not tasks:
        return Estimate(math.nan, math.nan)
    total = sum(map(len, tasks.values()))
    value = variance = 0.0
    for values in tasks.values():
        weight = len(values) / total if average == "questions" else 1 / len(tasks)
        value += weight * float(np.mean(values))
        spread = float(np.var(values, ddof=1)) if len(values) > 1 else math.nan
        variance += weight**2 * spread / len(values)
    return Estimate(value, math.sqrt(variance))


def difference(one: Cell, other: Cell, average: str) -> Estimate:
    """``one`` minus ``other``, paired by question.

    Raises:
        ValueError: if the two did not answer the same questions.
    """
    ours, theirs = _by_question(one), _by_question(other)
    unlike = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if key not in ours or key not in theirs or ours[key].doc_hash != theirs[key].doc_hash
    ]
    if unlike:
        task, number = unlike[0]
        raise ValueError(
            f"{one.column}: {len(unlike)} questions differ between the two models "
            f"(first: {task}, {number}); evaluate both on the same files with the same --limit"
        )
    paired = [
        Record(*key, "", record.value - theirs[key].value) for key, record in sorted(ours.items())
    ]
    return estimate(paired, average)


def _by_question(cell: Cell) -> dict[tuple[str, int], Record]:
    return {(record.task, record.doc_id): record for record in cell.records}


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean over columns; NaN as soon as one is."""
    if not estimates:
        return Estimate(math.nan, math.nan)
    count = len(estimates)
    variance = sum(e.stderr**2 for e in estimates) / count**2
    return Estimate(sum(e.value for e in estimates) / count, math.sqrt(variance))


def reference_of(model: str, against: str, models: Iterable[str]) -> str | None:
    """The model that ``model`` is compared with: of the same run if there is one of that name."""
    names = set(models)
    run = model.rpartition("/")[0]
    for name in (f"{run}/{against}" if run else against, against):
        if name in names:
            return name if name != model else None
    return None


@dataclass
class Results:
    """The cells of every model, and the tables made of them.

    Attributes:
        columns: in the order of the table.
        rows: model -> column -> cell.
        against: model (or arm) that the others are compared with.
        limit: questions per task, if not all.
        seeds: arm -> the models that are this arm under several seeds.
    """

    columns: Sequence[Column]
    rows: Mapping[str, Row]
    against: str | None = None
    limit: int | None = None
    seeds: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def values(self, model: str) -> dict[str, Estimate]:
        """Column -> value and standard error as shares, with the mean over columns."""
        cells = self.rows[model]
        values = {c.name: Estimate(cells[c.name].value, cells[c.name].stderr) for c in self.columns}
        return values | {MEAN: self._mean(values)}

    def differences(self, model: str) -> dict[str, Estimate]:
        """Column -> paired difference to the model it is compared with; empty if to none."""
        other = reference_of(model, self.against, self.rows) if self.against else None
        if other is None:
            return {}
        nothing = Estimate(math.nan, math.nan)
        values = {}
        for column in self.columns:
            pair = self.rows[model][column.name], self.rows[other][column.name]
            missing = any(cell.reason for cell in pair)
            values[column.name] = nothing if missing else difference(*pair, column.average)
        return values | {MEAN: self._mean(values)}

    def over_seeds(self, arm: str) -> dict[str, Estimate]:
        """Column -> mean and standard deviation (n - 1) over seeds of an arm."""
        each = [self.values(model) for model in self.seeds[arm]]
        return {
            name: Estimate(
                float(np.mean([values[name].value for values in each])),
                float(np.std([values[name].value for values in each], ddof=1)),
            )
            for name in each[0]
        }

    def _mean(self, values: Mapping[str, Estimate]) -> Estimate:
        return mean([values[c.name] for c in self.columns if c.in_mean])

    # -- writing ----------------------------------------------------------------------------------

    def markdown(self) -> str:
        """Every table, with what is missing and what to know."""
        titles = self._titles()
        parts = ["Percent, value ± standard error over questions.\n"]
        if self.limit is not None:
            parts[0] = (
                f"The first {self.limit} questions of every task only: no benchmark results.\n\n"
                + parts[0]
            )
        parts.append(_table("model", titles, {m: self._texts(m) for m in self.rows}))
        compared = {m: d for m in self.rows if (d := self.differences(m))}
        if compared:
            parts.append(
                f"\nDifference to {self.against} in points, ± paired standard error over the same "
                "questions.\n"
            )
            texts = {
                m: {k: show(e, signed=True) for k, e in d.items()} for m, d in compared.items()
            }
            parts.append(_table("model", titles, texts))
        if self.seeds:
            count = max(map(len, self.seeds.values()))
            parts.append(f"\nMean ± standard deviation over {count} runs.\n")
            rows = {
                arm: {k: show(e) for k, e in self.over_seeds(arm).items()} for arm in self.seeds
            }
            parts.append(_table("arm", titles, rows))
        remarks = self._remarks()
        if remarks:
            parts.append("\n" + "\n".join(f"* {remark}" for remark in remarks))
        return "\n".join(parts) + "\n"

    def csv(self) -> str:
        """One line per model and column: value, standard error, difference, counts."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        numbers = ("value", "stderr", "difference", "difference_stderr")
        counts = ("questions", "nan", "truncated", "seconds", "missing")
        writer.writerow(["model", "column", *numbers, *counts])
        for model, cells in self.rows.items():
            values, differences = self.values(model), self.differences(model)
            for name in self._titles():
                both = values[name], differences.get(name, Estimate(math.nan, math.nan))
                line: list[Any] = [model, name]
                for e in both:
                    line += [_null(100 * e.value), _null(100 * e.stderr)]
                cell = cells.get(name)
                if cell is not None:
                    line += [cell.questions, cell.nan, cell.truncated]
                    line += [round(cell.seconds, 1), cell.reason]
                writer.writerow(["" if entry is None else entry for entry in line])
        return text.getvalue()

    def plain(self) -> dict[str, Any]:
        """Everything for JSON; shares, NaN as null."""
        return {
            "columns": [asdict(column) for column in self.columns],
            "limit": self.limit,
            "against": self.against,
            "models": {
                model: {
                    "cells": {name: cell.plain() for name, cell in cells.items()},
                    "mean": _plain(self.values(model)[MEAN]),
                    "differences": {k: _plain(e) for k, e in self.differences(model).items()},
                }
                for model, cells in self.rows.items()
            },
            "seeds": {
                arm: {
                    "models": list(self.seeds[arm]),
                    "columns": {
                        k: {"mean": _null(e.value), "sd": _null(e.stderr)}
                        for k, e in self.over_seeds(arm).items()
                    },
                }
                for arm in self.seeds
            },
        }

    def _titles(self) -> list[str]:
        """The mean stands after the last column that it counts."""
        names = [c.name for c in self.columns]
        last = max((i for i, c in enumerate(self.columns) if c.in_mean), default=-1)
        return [*names[: last + 1], MEAN, *names[last + 1 :]] if last >= 0 else names

    def _texts(self, model: str) -> dict[str, str]:
        texts = {k: show(e) for k, e in self.values(model).items()}
        for name, cell in self.rows[model].items():
            if cell.reason:
                texts[name] = "missing"
            elif cell.nan:
                texts[name] = f"NaN ({cell.nan} of {cell.questions})"
        return texts

    def _remarks(self) -> list[str]:
        """Reasons, notes and counts, each once with the models that it is true of."""
        said: dict[str, list[str]] = defaultdict(list)
        for model, cells in self.rows.items():
            for name, cell in cells.items():
                if cell.reason:
                    said[f"{name} is missing: {cell.reason}"].append(model)
                for note in cell.notes:
                    said[f"{name}: {note}"].append(model)
                if cell.truncated:
                    text = f"{name}: {cell.truncated} requests cut to the model's context"
                    said[text].append(model)
        everyone = list(self.rows)
        return [
            text if models == everyone else f"{text} ({', '.join(models)})"
            for text, models in said.items()
        ]


MEAN = "mean"


def show(e: Estimate, signed: bool = False) -> str:
    """A share in percent; "-" for NaN."""
    if math.isnan(e.value):
        return "-"
    value = f"{100 * e.value:+.1f}" if signed else f"{100 * e.value:.1f}"
    return value if math.isnan(e.stderr) else f"{value} ± {100 * e.stderr:.1f}"


def _table(corner: str, titles: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"| {corner} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for name, texts in rows.items():
        lines.append(f"| {name} | {' | '.join(texts.get(t, '-') for t in titles)} |")
    return "\n".join(lines)


def _plain(e: Estimate) -> dict[str, float | None]:
    return {"value": _null(e.value), "stderr": _null(e.stderr)}


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
