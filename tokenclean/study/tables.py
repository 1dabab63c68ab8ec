"""The tables of a study, by name, and what compares arms: accuracy, masks, settings.

A report takes the cells of a grid, reads their run folders and nothing else, and gives tables; see
`REPORTS`. Whatever a run left out is said in a note, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenclean.cleaning.results import ANSWERS, ArmResult
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL, MaskQuality
from tokenclean.publish import write_json
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
    headlines_of,
    regimes_of,
    seeds_note,
    sources_of,
    spread,
)
from tokenclean.study.compare import difference, missing_answers, questions_note
from tokenclean.study.examples import examples_tables
from tokenclean.study.noise import noise_tables
from tokenclean.study.rounds import rounds_tables
from tokenclean.study.rules import rules_tables
from tokenclean.study.scores import scores_tables
from tokenclean.study.theory import theory_tables

TABLES, FIGURES, TABLES_JSON = "tables", "figures", "tables.json"

#: (cells, arm that the others are compared with, folder of the report) -> tables
Report = Callable[[Sequence[Cell], str, Path], list[Table]]


def report(names: Sequence[str], cells: Sequence[Cell], against: str, folder: Path) -> str:
    """Make reports of finished runs and write them.

    Args:
        names: some of `REPORTS`.
        cells: the runs, one per variant and seed.
        against: the arm that others are compared with.
        folder: gets ``tables/*.csv``, ``tables.json`` and ``figures/*.png`` with their numbers.

    Returns:
        All tables in Markdown; figures are linked relative to ``folder``.

    Raises:
        ValueError: for an unknown report, no cell, two runs of one variant and seed, a run that
            is not finished, or an arm to compare with that no run has.
    """
    unknown = [name for name in names if name not in REPORTS]
    if unknown:
        raise ValueError(f"reports: {', '.join(unknown)}: none of {', '.join(REPORTS)}")
    if not cells:
        raise ValueError("reports: no run to read; a study needs at least one seed and one variant")
    keys = [(cell.variant, cell.seed) for cell in cells]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"reports: two runs of variant {twice[0]} and seed {twice[1]}; drop one")
    if against not in (arms := arms_of(cells)):
        raise ValueError(
            f"against: no run has an arm {against!r} to compare with; there are {', '.join(arms)}"
        )
    (folder / TABLES).mkdir(parents=True, exist_ok=True)
    tables = [table for name in names for table in REPORTS[name](cells, against, folder)]
    for table in tables:
        table.write_csv(folder / TABLES / f"{table.name}.csv")
    write_json(folder / TABLES_JSON, {"against": against, "tables": [t.to_json() for t in tables]})
    return "\n".join(table.markdown() for table in tables)


def _of(variant: str) -> str:
    return "" if variant == "main" else f", {variant}"


def _notes(cells: Sequence[Cell], arms: Sequence[str]) -> list[str]:
    """What both tables of differences have to say."""
    notes = [
        questions_note(cells),
        "A difference is resolved if it exceeds twice its standard error over questions and twice "
        "its standard error over seeds (sd of the per-seed differences / sqrt(seeds)), which is "
        "itself rough with two or three seeds.",
    ]
    if lacking := missing_answers(cells, arms):
        notes.append(
            f"No {ANSWERS} in {len(lacking)} folders, {lacking[0]} among them: no error over "
            "questions there, so nothing is called resolved. Run again to have them written."
        )
    return notes


# -- accuracy -------------------------------------------------------------------------------------


def accuracy_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Test accuracy of every arm (the paper's Table 1), and its distance from one arm."""
    tables = []
    for variant, group in by_variant(cells).items():
        groups = groups_of(sources_of(group))
        arms, runs = arms_of(group), [cell.results() for cell in group]
        rows: list[list[object]] = []
        for arm in arms:
            found = [run.get(arm) for run in runs]
            rows.append(
                [
                    arm,
                    *(spread(accuracy(r, g) for r in found) for g in groups.values()),
                    spread((None if r is None else r.kept_share for r in found), 3),
                    spread((None if r is None else r.validation_nll.get(ALL) for r in found), 3),
                ]
            )
        notes = [seeds_note(group)]
        if regimes := regimes_of(sources_of(group)):
            listed = "; ".join(f"{r}: {', '.join(f)}" for r, f in regimes.items())
            notes.append(
                "Families are averaged by what the base could do before any training; " + listed
            )
        if not any(result.accuracy for run in runs for result in run.values()):
            notes.append("No accuracy was measured: the runs have no data.test_path.")
        tables.append(
            Table(
                file_name("accuracy", variant),
                f"Test accuracy in percent{_of(variant)}",
                ["arm", *groups, "kept share", "validation loss (nats per token)"],
                rows,
                notes,
            )
        )
        tables.append(_differences(variant, group, against))
    return tables


def _differences(variant: str, cells: Sequence[Cell], against: str) -> Table:
    """One row per arm and group of sources: the difference and both of its errors."""
    rows: list[list[object]] = []
    arms = [arm for arm in arms_of(cells) if arm != against]
    for arm in arms:
        for name, group in headlines_of(sources_of(cells)).items():
            if (found := difference(cells, arm, against, group)) is not None:
                errors = (_number(found.question_error), _number(found.seeds.se))
                rows.append([arm, name, found.seeds, *errors, found.resolved])
    notes = _notes(cells, [*arms, against])
    lacking = [f"{c.variant}, seed {c.seed}" for c in cells if against not in c.results()]
    if lacking:
        notes.append(f"No arm {against} in: {'; '.join(lacking)}; nothing is compared there.")
    return Table(
        file_name("accuracy_difference", variant),
        f"Accuracy minus that of `{against}`, in percentage points{_of(variant)}",
        ["arm", "over", "difference", "se over questions", "se over seeds", "resolved"],
        rows,
        notes,
    )


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 2)


# -- masks ----------------------------------------------------------------------------------------

#: Column -> what it shows of a mask. Noise is what is not informative, corrupted tokens included.
MASK: dict[str, Callable[[MaskQuality], float]] = {
    "AUROC": lambda m: m.auroc,
    "AUROC against corrupted": lambda m: m.auroc_corrupted,
    "precision": lambda m: m.precision,
    "recall": lambda m: m.recall,
    "noise before": lambda m: 1 - m.informative / m.tokens if m.tokens else math.nan,
    "noise after": lambda m: 1 - m.precision,
    "corrupted kept": lambda m: m.corrupted_kept,
}


def mask_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """How well scores and masks agree with the planted truth, per arm and family."""
    tables = []
    for variant, group in by_variant(cells).items():
        runs = [cell.results() for cell in group]
        arms = [a for a in arms_of(group) if any(r[a].mask for r in runs if a in r)]
        groups = groups_of(sources_of(group))
        sources = [ALL, *(s for s, g in groups.items() if g == (s,) and s != ALL)]
        rows = [
            [arm, source, REGIMES.get(source), *_mask_row([r.get(arm) for r in runs], source)]
            for arm in arms
            for source in sources
        ]
        notes = [
            seeds_note(group),
            "AUROC of the score, informative tokens against all others (0.5: no better than "
            "chance; below: worse) or against corrupted ones alone. Precision is the informative "
            "share of the kept tokens, recall the kept share of the informative ones; noise is "
            "the share that is not informative, before and after cleaning. The rows of D_0, "
            "which are not cleaned, are left out.",
        ]
        if not arms:
            notes.append("No mask was compared with a truth: the pools carry none.")
        tables.append(
            Table(
                file_name("mask", variant),
                f"Masks against the planted truth{_of(variant)}",
                ["arm", "family", "regime", *MASK],
                rows,
                notes,
            )
        )
    return tables


def _mask_row(results: Sequence[ArmResult | None], source: str) -> list[Spread | None]:
    masks = [None if r is None else r.mask.get(source) for r in results]
    return [
        spread((None if m is None else measure(m) for m in masks), 3) for measure in MASK.values()
    ]


# -- settings -------------------------------------------------------------------------------------

#: What the axis of a sweep is called, with its unit.
AXES = {"keep": "kept share of the response tokens"}


def variant_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Settings against arms; a curve where the settings stand on an axis."""
    variants, arms = by_variant(cells), arms_of(cells)
    shown = headlines_of(sources_of(cells))
    results = {v: [cell.results() for cell in group] for v, group in variants.items()}
    means = {
        (over, variant, arm): spread(accuracy(r.get(arm), group) for r in runs)
        for over, group in shown.items()
        for variant, runs in results.items()
        for arm in arms
    }
    notes = [seeds_note(cells)]
    labels = {v: _setting(v, group, cells) for v, group in variants.items()}
    tables = []
    for over in shown:
        tables.append(
            Table(
                file_name("variants", over),
                f"Test accuracy in percent, {over}",
                ["setting", *arms],
                [[labels[v], *(means[over, v, arm] for arm in arms)] for v in variants],
                list(notes),
            )
        )
    others = [arm for arm in arms if arm != against]
    for over, group in shown.items():
        found = {
            v: [difference(c, arm, against, group) for arm in others] for v, c in variants.items()
        }
        tables.append(
            Table(
                file_name("variants_difference", over),
                f"Accuracy minus that of `{against}` with the same setting, percentage points, "
                f"{over}",
                ["setting", *others],
                [[labels[v], *(d and d.marked for d in row)] for v, row in found.items()],
                ["A star marks a resolved difference.", *_notes(cells, arms)],
            )
        )
    tables.append(
        Table(
            "variants_loss",
            "Validation loss, nats per response token",
            ["setting", *arms],
            [
                [
                    labels[v],
                    *(
                        spread(
                            (r[arm].validation_nll.get(ALL) if arm in r else None for r in runs), 3
                        )
                        for arm in arms
                    ),
                ]
                for v, runs in results.items()
            ],
            list(notes),
        )
    )
    if (curve := _curve(variants, arms, means, list(shown), folder)) is not None:
        tables[0].figures.append(curve)
        tables[0].notes.append("Figure: bars are the standard deviation over seeds.")
    return tables


def _setting(variant: str, group: Sequence[Cell], cells: Sequence[Cell]) -> str:
    """A setting's name, with its seeds where it lacks some that others have."""
    seeds = sorted({cell.seed for cell in group})
    if len(seeds) == len({cell.seed for cell in cells}):
        return variant
    return f"{variant} (only seed {', '.join(map(str, seeds))})"


def _curve(
    variants: dict[str, list[Cell]],
    arms: list[str],
    means: dict[tuple[str, str, str], Spread | None],
    panels: list[str],
    folder: Path,
) -> str | None:
    """Accuracy against the variants' values, a panel per group of sources."""
    values = sorted(
        (group[0].value, v) for v, group in variants.items() if group[0].value is not None
    )
    if len(values) < 2:
        return None
    lines: dict[str, list[Line]] = {}
    for over in panels:
        # the base last: the palette goes to what was trained
        for arm in sorted(arms, key=lambda arm: arm == "base"):
            points = [(x, m) for x, v in values if (m := means[over, v, arm]) is not None]
            if points:
                line = Line(
                    arm,
                    [x for x, _ in points],
                    [m.mean for _, m in points],
                    [m.sd for _, m in points],
                )
                lines.setdefault(over, []).append(line)
    if not lines:
        return None
    stems = {v.rsplit("_", 1)[0] for _, v in values if "_" in v}
    stem = stems.pop() if len(stems) == 1 else "value of the setting"
    path = folder / FIGURES / "variants.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_lines(path, lines, AXES.get(stem, stem), "test accuracy (%)")
    return f"{FIGURES}/{path.name}"


#: Name -> report.
REPORTS: dict[str, Report] = {
    "accuracy": accuracy_tables,
    "mask": mask_tables,
    "variants": variant_tables,
    "rounds": rounds_tables,
    "rules": rules_tables,
    "scores": scores_tables,
    "examples": examples_tables,
    "noise": noise_tables,
    "theory": theory_tables,
}
