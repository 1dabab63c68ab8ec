"""Differences between two arms, with both sources of spread: questions and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenclean.cleaning.results import ANSWERS
from tokenclean.evaluation.planted import ALL, Answers
from tokenclean.study.cells import Cell, Spread, accuracy, answers_of, spread


@dataclass(frozen=True)
class Difference:
    """Accuracy of an arm minus that of another, in percentage points.

    Attributes:
        seeds: one difference per seed.
        question_error: paired standard error of the mean difference over questions; None where a
            run has no answers question by question.
    """

    seeds: Spread
    question_error: float | None

    @property
    def resolved(self) -> str:
        """``yes`` if the difference exceeds twice the standard errors of both spreads."""
        if self.question_error is None:
            return "no answers"
        if len(self.seeds.values) < 2:
            return "one seed"
        bar = 2 * max(self.question_error, self.seeds.se)
        if math.isnan(bar):  # of a single question
            return "no"
        return "yes" if abs(self.seeds.mean) > bar else "no"

    @property
    def marked(self) -> Spread:
        """The difference with a star if it is resolved."""
        return replace(self.seeds, mark=" *" if self.resolved == "yes" else "")


def difference(
    cells: Sequence[Cell], arm: str, against: str, group: tuple[str, ...]
) -> Difference | None:
    """Compare two arms on the mean accuracy of a group's sources.

    Args:
        cells: one variant's, one per seed; those that lack an arm count as missing.
        arm: whose accuracy is compared.
        against: with whose.
        group: sources, averaged with equal weight; see `groups_of`.

    Raises:
        ValueError: if the two arms of a run answered different questions.
    """
    values: list[float | None] = []
    paired: list[list[dict[str, float]] | None] = []
    for cell in cells:
        results = cell.results()
        one, other = (accuracy(results.get(name), group) for name in (arm, against))
        values.append(None if one is None or other is None else one - other)
        if values[-1] is not None:
            paired.append(_paired(cell, arm, against, group))
    seeds = spread(values)
    if seeds is None:
        return None
    known = [p for p in paired if p is not None]
    error = None
    if len(known) == len(paired):
        error = _one_test(known) if _same_test(cells) else _own_tests(known)
    return Difference(seeds, error)


def _paired(
    cell: Cell, arm: str, against: str, group: tuple[str, ...]
) -> list[dict[str, float]] | None:
    """For each source of a group: question -> 100, 0 or -100; None without answers."""
    one, other = (answers_of(cell.place(name)) for name in (arm, against))
    if one is None or other is None:
        return None
    pairs = []
    for source in group:
        ours, theirs = _questions(one, source), _questions(other, source)
        if ours.keys() != theirs.keys() or not ours:
            raise ValueError(
                f"{cell.place(arm) / ANSWERS} and {cell.place(against) / ANSWERS} do not answer "
                f"the same questions of {source}; delete the run and repeat it"
            )
        pairs.append({q: 100.0 * (right - theirs[q]) for q, right in ours.items()})
    return pairs


def _questions(answers: Answers, source: str) -> dict[str, bool]:
    if source != ALL:
        return answers.get(source, {})
    return {
        f"{s}/{q}": right for s, part in answers.items() if s != ALL for q, right in part.items()
    }


def _same_test(cells: Sequence[Cell]) -> bool:
    """Whether all seeds answered the same test questions, maybe from files of their own."""
    paths = {str((cell.config().get("data") or {}).get("test_path") or "") for cell in cells}
    if len(paths) == 1 or "" in paths:
        return "" not in paths
    if not all(Path(path).is_file() for path in paths):
        return False
    return len({Path(path).read_bytes() for path in paths}) == 1


def _error(sources: list[list[float]]) -> float:
    """Standard error of a mean over sources of means over questions: sqrt(sum_f v_f / n_f) / F."""
    if any(len(values) < 2 for values in sources):
        return math.nan
    return math.sqrt(sum(statistics.variance(v) / len(v) for v in sources)) / len(sources)


def _own_tests(seeds: list[list[dict[str, float]]]) -> float:
    """Every seed draws its own questions: independent, sqrt(sum_s se_s^2) / S."""
    errors = [_error([list(source.values()) for source in seed]) for seed in seeds]
    return math.sqrt(sum(e**2 for e in errors)) / len(errors)


def _one_test(seeds: list[list[dict[str, float]]]) -> float:
    """All seeds answer the same questions: each question's mean difference is one observation."""
    if any(a.keys() != b.keys() for seed in seeds for a, b in zip(seed, seeds[0], strict=True)):
        return _own_tests(seeds)
    return _error(
        [
            [statistics.fmean(seed[f][question] for seed in seeds) for question in source]
            for f, source in enumerate(seeds[0])
        ]
    )


def questions_note(cells: Sequence[Cell]) -> str:
    """What the error over questions assumes."""
    if len(cells) > 1 and _same_test(cells):
        return (
            "The paired standard error over questions averages each question's difference over "
            "the seeds first, since all seeds answer the same questions."
        )
    return (
        "The paired standard error over questions takes the questions of different seeds as "
        "independent, since each seed has its own: sqrt(sum of se²) / seeds."
    )


def missing_answers(cells: Sequence[Cell], arms: Sequence[str]) -> list[Path]:
    """Evaluated arms without answers question by question."""
    return [
        cell.place(arm)
        for cell in cells
        for arm, result in cell.results().items()
        if arm in arms and result.accuracy and answers_of(cell.place(arm)) is None
    ]
