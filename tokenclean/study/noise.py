"""Estimated informative shares (`selection.keep: auto`) against the planted truth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenclean.data.cleaned import KIND as CLEANED
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL
from tokenclean.publish import MANIFEST, read_manifest
from tokenclean.study.cells import Cell, Table, by_variant, seeds_note, spread

#: A truth that close to an end counts as inside: tables show two digits.
ROUNDING = 0.005


@dataclass(frozen=True)
class Interval:
    """One estimate beside what was planted.

    Attributes:
        truth: informative share of the ranked tokens.
        lower, upper: see `tokenclean.selection.noise`.
        signal: whether the estimate counts.
        others: sign symmetry, control tail and P(score > 0), for comparison.
    """

    truth: float
    lower: float
    upper: float
    signal: bool
    others: tuple[float, float, float]

    @property
    def inside(self) -> bool:
        return self.lower - ROUNDING <= self.truth <= self.upper + ROUNDING

    @property
    def width(self) -> float:
        return self.upper - self.lower


def intervals_of(cell: Cell) -> dict[str, dict[str, Interval]]:
    """Arm -> source (or all) -> its interval; arms without an estimate or a truth are left out."""
    found: dict[str, dict[str, Interval]] = {}
    for arm, result in cell.results().items():
        cleaned = cell.place(arm) / "cleaned"
        if not result.mask or not (cleaned / MANIFEST).is_file():
            continue
        estimate: dict[str, Any] | None = read_manifest(cleaned, CLEANED).get("share")
        if estimate is None:
            continue
        for source, mask in result.mask.items():
            values = estimate if source == ALL else estimate["sources"].get(source)
            if values is not None and mask.tokens:
                found.setdefault(arm, {})[source] = Interval(
                    mask.informative / mask.tokens,
                    values["lower"],
                    values["upper"],
                    values["signal"],
                    (values["sign_symmetry"], values["control_tail"], values["positive"]),
                )
    return found


def noise_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Intervals by setting, and how often the truth lies inside."""
    rows: list[list[Any]] = []
    whole: list[Interval] = []
    by_regime: dict[str, list[Interval]] = {}
    for variant, group in by_variant(cells).items():
        of_arm: dict[str, list[Interval]] = {}
        for cell in group:
            for arm, sources in intervals_of(cell).items():
                for source, interval in sources.items():
                    if source == ALL:
                        of_arm.setdefault(arm, []).append(interval)
                    elif source in REGIMES:
                        by_regime.setdefault(REGIMES[source], []).append(interval)
        for arm, found in of_arm.items():
            whole += found
            counted = [i for i in found if i.signal]
            rows.append(
                [
                    variant,
                    arm,
                    spread((i.truth for i in found), 2),
                    f"{len(counted)} of {len(found)}",
                    spread((i.lower for i in counted), 2),
                    spread((i.upper for i in counted), 2),
                    f"{sum(i.inside for i in counted)} of {len(counted)}" if counted else None,
                    spread((i.width for i in counted), 2),
                    *(spread((i.others[k] for i in found), 2) for k in range(3)),
                ]
            )
    if not rows:
        note = "No arm estimated its keep share on a planted pool; set selection.keep: auto."
        return [Table("noise", "Estimated informative share", ["setting"], [], [note])]
    notes = [
        seeds_note(cells),
        "The interval is that of `tokenclean.selection.noise`; truth is the informative share of "
        f"the ranked tokens, inside if it is no further than {ROUNDING} beyond an end. Where "
        "there is no signal, no interval is given and every token is kept. The last three columns "
        "are what else one might go by.",
    ]
    coverage = [
        _coverage("pools, all families together", whole),
        *(_coverage(f"single families, {r}", by_regime[r]) for r in by_regime),
    ]
    names = ["sign symmetry", "control tail", "P(score > 0)"]
    return [
        Table(
            "noise",
            "Estimated informative share of response tokens, by setting",
            ["setting", "arm", "truth", "signal", "lower", "upper", "inside", "width", *names],
            rows,
            notes,
        ),
        Table(
            "noise_coverage",
            "How often the truth lies inside, over all settings and seeds",
            ["of", "estimates", "with a signal", "inside", "inside (%)", "median width"],
            coverage,
            [
                "Regimes are what the base could do in a family before any training. Estimates "
                "without a signal give no interval and drop nothing: those of settings made to "
                "have none, and those of families where the base ties responses to their prompts "
                "as well as the reference does, which is what known families are.",
            ],
        ),
    ]


def _coverage(name: str, found: list[Interval]) -> list[Any]:
    counted = [i for i in found if i.signal]
    inside = sum(i.inside for i in counted)
    if not counted:
        return [name, len(found), 0, None, None, None]
    return [
        name,
        len(found),
        len(counted),
        inside,
        round(100 * inside / len(counted), 1),
        round(statistics.median(i.width for i in counted), 3),
    ]
