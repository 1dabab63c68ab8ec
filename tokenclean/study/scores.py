"""Base loss against reference loss, token by token (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedPool, is_kept
from tokenclean.data.planted import CORRUPTED, UNINFORMATIVE
from tokenclean.publish import MANIFEST
from tokenclean.report.figures import Cloud, draw_clouds, write_numbers
from tokenclean.study.cells import Cell, Table, arms_of, by_variant, file_name
from tokenclean.study.rounds import cleaned_pool, round_folders

#: Tokens drawn per panel: more hide each other.
SHOWN: Final = 4000
#: What a token is, in the order of drawing; the rare ones come last, on top.
TRUTH: Final = {1: "informative", UNINFORMATIVE: "uninformative", CORRUPTED: "corrupted"}


@dataclass
class Scored:
    """Response tokens of one round that were scored: arrays of one length n.

    Attributes:
        base, reference: losses in nats.
        label: class of each token, an index into ``classes``.
        kept: whether it carries loss.
        classes: planted truth, or kept and dropped where there is none.
        cut: score of the last kept token, if the round has one cut.
    """

    base: np.ndarray
    reference: np.ndarray
    label: np.ndarray
    kept: np.ndarray
    classes: list[str]
    cut: float | None

    def among(self, chosen: np.ndarray) -> Scored:
        """Some of the tokens, by a mask or by indices."""
        return replace(
            self,
            base=self.base[chosen],
            reference=self.reference[chosen],
            label=self.label[chosen],
            kept=self.kept[chosen],
        )


def read_scored(pool: CleanedPool) -> Scored | None:
    """The scored response tokens of a cleaned pool in pool order; None if nothing was scored."""
    rows = np.arange(len(pool))
    response = pool.lists("response_mask").take(rows)[1].astype(bool)

    def column(name: str) -> np.ndarray:
        return np.asarray(pool.lists(name).take(rows)[1], dtype=np.float64)[response]

    base, reference = column("base_nll"), column("reference_nll")
    kept = is_kept(column("labels"), column("weight"))
    if "truth" in pool.columns:
        classes, truth = list(TRUTH.values()), column("truth")
        label = np.select([truth == value for value in TRUTH], range(len(TRUTH)))
    else:
        classes, label = ["dropped", "kept"], kept.astype(int)
    known = ~(np.isnan(base) | np.isnan(reference))
    if not known.any():
        return None
    cut = pool.manifest.get("cut")
    return Scored(base, reference, label, kept, classes, cut).among(known)


def scores_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """A figure and a table per arm that scores; of the lowest seed, since tokens are no means."""
    tables = []
    for variant, group in by_variant(cells).items():
        cell = group[0]
        for arm in arms_of([cell]):
            steps = {f"round {t}": p for t, p in round_folders(cell, arm).items()}
            steps = steps or {"whole pool": cell.place(arm)}
            found: dict[str, Scored] = {}
            for title, step in steps.items():
                if not (step / "cleaned" / MANIFEST).is_file():
                    continue
                with cleaned_pool(step / "cleaned") as pool:
                    if (scored := read_scored(pool)) is not None:
                        found[title] = scored
            if found:
                tables.append(_table(file_name("scores", arm, variant), cell, arm, found, folder))
    if not tables:
        tables.append(
            Table("scores", "Scores", ["arm"], [], ["No arm of these runs scored anything."])
        )
    return tables


def _table(name: str, cell: Cell, arm: str, found: dict[str, Scored], folder: Path) -> Table:
    draw = np.random.default_rng(0)
    clouds, points = [], []
    rows: list[list[Any]] = []
    for title, scored in found.items():
        shown = scored
        if len(scored.base) > SHOWN:
            shown = scored.among(np.sort(draw.choice(len(scored.base), SHOWN, replace=False)))
        by_class = {
            label: (shown.base[shown.label == i], shown.reference[shown.label == i])
            for i, label in enumerate(scored.classes)
        }
        clouds.append(Cloud(title, by_class, scored.cut))
        for base, reference, i, kept in zip(
            shown.base, shown.reference, shown.label, shown.kept, strict=True
        ):
            points.append([title, base, reference, scored.classes[i], int(kept)])
        for i, label in enumerate(scored.classes):
            if (at := scored.label == i).any():
                base, reference = scored.base[at].mean(), scored.reference[at].mean()
                rows.append(
                    [
                        title,
                        label,
                        int(at.sum()),
                        float(base),
                        float(reference),
                        float(base - reference),
                        float(scored.kept[at].mean()),
                        scored.cut,
                    ]
                )
    path = folder / "figures" / f"{name}.png"
    draw_clouds(path, clouds, "base loss (nats)", "reference loss (nats)")
    header = ["panel", "base loss (nats)", "reference loss (nats)", "class", "kept"]
    write_numbers(path, header, points)
    setting = "" if cell.variant == "main" else f", {cell.variant}"
    return Table(
        name,
        f"Losses under base and reference: `{arm}`{setting}, seed {cell.seed}",
        [
            "round",
            "tokens are",
            "tokens",
            "mean base loss (nats)",
            "mean reference loss (nats)",
            "mean score (nats)",
            "kept share",
            "cut (nats)",
        ],
        rows,
        [
            "The score is base loss minus reference loss; tokens below the solid line have a "
            "score above the cut and are kept. The table counts all scored tokens, the figure "
            f"shows at most {SHOWN:,} per panel, drawn with a fixed seed.",
        ],
        [f"figures/{path.name}"],
    )
