"""Self-evolving cleaning round by round: cuts, masks, accuracy, and who gains (Tables 2 and 5).

The paper calls it a Matthew effect: families in which the first reference is good get better from
round to round, the others do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tokenclean.cleaning.results import ArmResult
from tokenclean.data.cleaned import CleanedPool, is_kept
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL, Accuracy, MaskQuality, mask_quality
from tokenclean.publish import MANIFEST
from tokenclean.report.figures import Line, draw_lines
from tokenclean.study.cells import (
    Cell,
    Spread,
    Table,
    accuracy,
    arms_of,
    by_variant,
    file_name,
    groups_of,
    result_of,
    seeds_note,
    spread,
)
from tokenclean.study.theory import BOUND_COLUMNS, WARNINGS, Bound, bound_cells


@contextmanager
def cleaned_pool(folder: Path) -> Iterator[CleanedPool]:
    """A cleaned pool to read, unpacked where it leaves nothing behind."""
    with TemporaryDirectory() as cache:
        yield CleanedPool(folder, Path(cache))


def round_folders(cell: Cell, arm: str) -> dict[int, Path]:
    """Round -> its folder, for the rounds that were cleaned; empty for fixed-model arms."""
    found = {
        int(p.name.removeprefix("round_")): p
        for p in cell.place(arm).glob("round_*")
        if (p / "cleaned" / MANIFEST).is_file()
    }
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Round:
    """One round of one run; its model is the one trained on its kept tokens.

    Attributes:
        cut: score of the last kept token; None where the rule has no single cut.
        score: source -> mean score of its response tokens, in nats; empty without scores.
        kept: source -> kept share.
        mask: source -> agreement with the truth; empty without truth.
        result: what was measured of the round's model, if it was evaluated.
    """

    cut: float | None
    score: dict[str, float]
    kept: dict[str, float]
    mask: dict[str, MaskQuality]
    result: ArmResult | None


def read_round(folder: Path, result: ArmResult | None) -> Round:
    """Read one round's cleaned pool."""
    with cleaned_pool(folder / "cleaned") as pool:
        response, labels = pool.lists("response_mask"), pool.lists("labels")
        weights = pool.lists("weight")
        scores = pool.lists("score")
        kept: dict[str, list[np.ndarray]] = {}
        score: dict[str, list[np.ndarray]] = {}
        for row, source in enumerate(pool.values("source")):
            at = response[row]
            for key in (source, ALL):
                kept.setdefault(key, []).append(is_kept(labels[row], weights[row])[at])
                score.setdefault(key, []).append(np.asarray(scores[row][at], dtype=np.float64))
        means = {k: float(np.concatenate(v).mean()) for k, v in score.items()}
        return Round(
            pool.manifest.get("cut"),
            {k: v for k, v in means.items() if not math.isnan(v)},
            {k: float(np.concatenate(v).mean()) for k, v in kept.items()},
            mask_quality(pool) if "truth" in pool.columns else {},
            result,
        )


def warmup_result(cell: Cell) -> ArmResult | None:
    """What was measured of the warm-up model, of its own or as an arm."""
    arms = (cell.config().get("loop") or {}).get("arms") or {}
    names = [name for name, arm in arms.items() if arm.get("schedule") == "warmup"]
    places = [cell.folder / "warmup", *(cell.place(name) for name in [*names, "warmup"])]
    return next((r for place in places if (r := result_of(place)) is not None), None)


def read_rounds(cell: Cell, arm: str) -> dict[int, Round]:
    """Rounds 1 ... T; the last one's model is the arm's own."""
    folders = round_folders(cell, arm)
    rounds = {}
    for number, folder in folders.items():
        result = result_of(folder)
        if result is None and number == max(folders):
            result = result_of(cell.place(arm))
        rounds[number] = read_round(folder, result)
    return rounds


def rounds_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Per round and family: cut, mean score, mask, accuracy; the bound's terms; who gains."""
    tables = []
    for variant, group in by_variant(cells).items():
        for arm in arms_of(group):
            of_arm = [cell for cell in group if round_folders(cell, arm)]
            if of_arm:
                tables += _Rounds(variant, arm, of_arm).tables(folder)
    if not tables:
        note = "No arm of these runs is self-evolving."
        tables.append(Table("rounds", "Round by round", ["round"], [], [note]))
    return tables


class _Rounds:
    """The rounds of one arm over the seeds of one variant."""

    def __init__(self, variant: str, arm: str, cells: Sequence[Cell]):
        self.name = (arm, variant)
        self.title = f"`{arm}`" + ("" if variant == "main" else f", {variant}")
        self.cells = cells
        self.runs = [read_rounds(cell, arm) for cell in cells]
        self.bases = [cell.results().get("base") for cell in cells]
        self.warmups = [warmup_result(cell) for cell in cells]
        self.numbers = sorted({t for run in self.runs for t in run})
        groups = groups_of(s for run in self.runs for r in run.values() for s in r.kept)
        self.sources = [s for s, g in groups.items() if g == (s,)]

    def results(self, number: int) -> list[ArmResult | None]:
        """Per seed, the model after a round; 0 is the warm-up, -1 the untrained base."""
        if number < 1:
            return self.bases if number < 0 else self.warmups
        return [run[number].result if number in run else None for run in self.runs]

    def accuracy(self, number: int, source: str) -> Spread | None:
        return spread(accuracy(r, (source,)) for r in self.results(number))

    def tables(self, folder: Path) -> list[Table]:
        families = self._families()
        if (figure := self._figure(folder)) is not None:
            families.figures.append(figure)
            families.notes.append(
                "Figure: bars are the standard deviation over seeds; rounds that were not "
                "evaluated are skipped."
            )
        return [self._masks(), families, self._bounds()]

    def _masks(self) -> Table:
        rows: list[list[object]] = []
        for number in self.numbers:
            rounds = [run.get(number) for run in self.runs]
            for source in [ALL, *(s for s in self.sources if s != ALL)]:
                masks = [None if r is None else r.mask.get(source) for r in rounds]
                rows.append(
                    [
                        number,
                        source,
                        spread((None if r is None else r.cut for r in rounds), 3),
                        spread((None if r is None else r.score.get(source) for r in rounds), 3),
                        spread((None if r is None else r.kept.get(source) for r in rounds), 3),
                        spread((None if m is None else m.precision for m in masks), 3),
                        spread((None if m is None else 1 - m.precision for m in masks), 3),
                        spread((None if m is None else m.auroc for m in masks), 3),
                        self.accuracy(number, source),
                    ]
                )
        notes = [
            seeds_note(self.cells),
            "The cut is the score of the last kept token of the round (nats); accuracy is that of "
            "the model trained on the round's kept tokens, in percent.",
        ]
        if not any(r.mask for run in self.runs for r in run.values()):
            notes.append("No truth in these pools: no precision, noise or AUROC.")
        return Table(
            file_name("rounds", *self.name),
            f"Round by round: {self.title}",
            [
                "round",
                "family",
                "cut (nats)",
                "mean score (nats)",
                "kept share",
                "precision",
                "noise after",
                "AUROC",
                "accuracy (%)",
            ],
            rows,
            notes,
        )

    def _families(self) -> Table:
        """Accuracy of every family along the rounds, and what became of it."""
        steps = [-1, 0, *self.numbers]
        rows: list[list[object]] = []
        for source in self.sources:
            paths = [p for i in range(len(self.cells)) if (p := self._path(i, source))]
            group, change = trend(paths) if len(paths) == len(self.cells) else (None, None)
            rows.append(
                [
                    source,
                    REGIMES.get(source),
                    *(self.accuracy(number, source) for number in steps),
                    change,
                    group,
                ]
            )
        notes = [
            seeds_note(self.cells),
            "rich: the mean change from the warm-up to the last round is a gain of more than two "
            "standard errors over questions, in every seed a gain, and no round's step goes the "
            "other way by more than two of its own; poor: the same with losses; unstable: "
            "everything else. Standard errors as of independent questions, which pairing could "
            "only make smaller where answers agree.",
        ]
        lacking = [t for t in [0, *self.numbers] if any(r is None for r in self.results(t))]
        if lacking:
            words = ["the warm-up" if t == 0 else f"round {t}" for t in lacking]
            notes.append(
                f"Not evaluated in every run: {', '.join(words)}; `loop.evaluate_rounds: true` "
                "evaluates each."
            )
        return Table(
            file_name("rounds_families", *self.name),
            f"Accuracy in percent by round, and who gains: {self.title}",
            [
                "family",
                "regime",
                "base",
                "warm-up",
                *(f"round {t}" for t in self.numbers),
                "change",
                "group",
            ],
            rows,
            notes,
        )

    def _path(self, seed: int, source: str) -> list[Accuracy]:
        """Accuracies of one seed from the warm-up to the last round; empty if an end is missing."""
        results = [self.results(number)[seed] for number in [0, *self.numbers]]
        found = [None if r is None else r.accuracy.get(source) for r in results]
        if found[0] is None or found[-1] is None:
            return []
        return [a for a in found if a is not None]

    def _bounds(self) -> Table:
        rows: list[list[object]] = []
        for number in self.numbers:
            bounds = [
                Bound.of(r.mask.get(ALL)) if (r := run.get(number)) else None for run in self.runs
            ]
            if any(bounds):
                rows.append([number, *bound_cells(bounds)])
        notes = [seeds_note(self.cells), *WARNINGS]
        if not rows:
            notes = ["No truth in these pools: the bound needs the noise rate."]
        return Table(
            file_name("rounds_bound", *self.name),
            f"Terms of Theorem 5.1 by round: {self.title}",
            ["round", *BOUND_COLUMNS],
            rows,
            notes,
        )

    def _figure(self, folder: Path) -> str | None:
        """Accuracy per family against the round, a panel per regime."""
        steps = {-1: "base", 0: "warm-up", **{t: str(t) for t in self.numbers}}
        panels: dict[str, list[Line]] = {}
        for source in self.sources:
            points = [(t, a) for t in steps if (a := self.accuracy(t, source)) is not None]
            if sum(t >= 0 for t, _ in points) < 2 or source == ALL:
                continue
            line = Line(
                source,
                [float(t) for t, _ in points],
                [a.mean for _, a in points],
                [a.sd for _, a in points],
            )
            panels.setdefault(REGIMES.get(source, "sources"), []).append(line)
        if not panels:
            return None
        path = folder / "figures" / f"{file_name('rounds', *self.name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ticks = {float(t): text for t, text in steps.items()}
        draw_lines(path, panels, "round", "test accuracy (%)", ticks)
        return f"figures/{path.name}"


def trend(paths: Sequence[Sequence[Accuracy]]) -> tuple[str, Spread | None]:
    """What becomes of a family from the warm-up to the last round.

    Args:
        paths: per seed, accuracies from the warm-up to the last round, those evaluated.

    Returns:
        ``rich``, ``poor`` or ``unstable``, and the change in percentage points. A change counts
        if it exceeds two standard errors, sqrt(sum_s (v_s + v'_s)) / S with v = p (1 - p) / n.
    """
    changes = [path[-1].share - path[0].share for path in paths]
    mean = statistics.fmean(changes)
    sign = math.copysign(1, mean)
    group = "unstable"
    if abs(mean) > 2 * _error([(p[0], p[-1]) for p in paths]) and all(
        sign * c > 0 for c in changes
    ):
        group = "rich" if sign > 0 else "poor"
    for step in range(min(map(len, paths)) - 1):
        pairs = [(path[step], path[step + 1]) for path in paths]
        back = statistics.fmean(sign * (a.share - b.share) for a, b in pairs)
        if back > 2 * _error(pairs):
            group = "unstable"
    return group, spread(100 * c for c in changes)


def _error(pairs: Sequence[tuple[Accuracy, Accuracy]]) -> float:
    """Standard error of a mean over seeds of differences of two shares."""
    return math.sqrt(sum(a.standard_error**2 + b.standard_error**2 for a, b in pairs)) / len(pairs)
