"""The paper's bound (arXiv 2502.01968, Section 5) filled in with measured noise, and what happened.

For 0-1 loss over M i.i.d. response tokens, Theorem 5.1 bounds the error of a model trained on
labels that are wrong at rate eta, with probability at least 1 - delta, by

    eta + sqrt(2 log(4 / delta) / M)

Training on all tokens uses Y~ = 1 everywhere: eta = P(Y~ != Y) is the noise share of the pool.
Cleaning uses the mask Y^: eta^ = P(Y^ != Y) counts wrong keeps *and* wrong drops, and only
r^ M tokens are left, r^ = P(Y^ = 1). Corollary 5.2: cleaning has the smaller bound, with
probability at least 1 - 2 delta, if

    eta - eta^ >= sqrt(2 log(4 / delta) / M) * (1 / sqrt(r^) - 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL, MaskQuality
from tokenclean.study.cells import (
    Cell,
    Table,
    arms_of,
    by_variant,
    file_name,
    groups_of,
    seeds_note,
    spread,
)
from tokenclean.study.compare import difference

DELTA: Final = 0.05


@dataclass(frozen=True)
class Bound:
    """What the bound needs to know of a mask, and what follows.

    Attributes:
        tokens: M, the response tokens that were ranked.
        noise: eta, the share of them that is not informative.
        wrong: eta^, the share of them that is noise and kept or informative and dropped.
        kept: r^, the share of them that is kept.
        delta: the bound fails with this probability at most.
    """

    tokens: int
    noise: float
    wrong: float
    kept: float
    delta: float = DELTA

    @classmethod
    def of(cls, mask: MaskQuality | None) -> Bound | None:
        """Of a measured mask; None if there is none or if it keeps no token."""
        if mask is None or not mask.kept:
            return None
        hits = 0 if not mask.informative else round(mask.recall * mask.informative)
        wrong = (mask.kept - hits) + (mask.informative - hits)
        return cls(
            mask.tokens,
            1 - mask.informative / mask.tokens,
            wrong / mask.tokens,
            mask.kept / mask.tokens,
        )

    @property
    def quantity(self) -> float:
        """The second term with every token: sqrt(2 log(4 / delta) / M)."""
        return math.sqrt(2 * math.log(4 / self.delta) / self.tokens)

    @property
    def quantity_kept(self) -> float:
        """The second term with the kept tokens alone."""
        return self.quantity / math.sqrt(self.kept)

    @property
    def required(self) -> float:
        """The advantage eta - eta^ from which on Corollary 5.2 favours cleaning."""
        return self.quantity_kept - self.quantity

    @property
    def advantage(self) -> float:
        return self.noise - self.wrong

    @property
    def cleans(self) -> bool:
        """Whether anything is dropped."""
        return self.kept < 1

    @property
    def favours(self) -> bool:
        return self.advantage >= self.required

    @property
    def least_wrong(self) -> float:
        """The smallest eta^ that a perfect ranking reaches at this kept share.

        A share 1 - eta is informative. Keeping less drops 1 - eta - r^ of it, keeping more keeps
        r^ - (1 - eta) of the noise: eta^ >= |1 - eta - r^| either way.
        """
        return abs(1 - self.noise - self.kept)

    @property
    def can_favour(self) -> bool:
        """Whether some ranking could satisfy the corollary at this kept share.

        With many tokens it takes eta > (1 - r^) / 2: at r^ = 0.6 more than 20 % noise.
        """
        return self.noise - self.least_wrong >= self.required


def verdict(bounds: Sequence[Bound | None]) -> str | None:
    """What the corollary says over the seeds: yes, no, cannot, or for how many of them yes."""
    known = [bound for bound in bounds if bound is not None]
    if not known or not all(bound.cleans for bound in known):
        return None
    if not any(bound.can_favour for bound in known):
        return "cannot"
    yes = sum(bound.favours for bound in known)
    return "yes" if yes == len(known) else f"{yes} of {len(known)}" if yes else "no"


#: Column -> what it shows of a bound, and digits.
_MEASURES: Final[dict[str, tuple[Callable[[Bound], float], int]]] = {
    "M (tokens)": (lambda b: float(b.tokens), 0),
    "eta": (lambda b: b.noise, 3),
    "eta^": (lambda b: b.wrong, 3),
    "r^": (lambda b: b.kept, 3),
    "second term, all": (lambda b: b.quantity, 3),
    "second term, kept": (lambda b: b.quantity_kept, 3),
    "bound, all": (lambda b: b.noise + b.quantity, 3),
    "bound, cleaned": (lambda b: b.wrong + b.quantity_kept, 3),
    "eta - eta^": (lambda b: b.advantage, 3),
    "required": (lambda b: b.required, 3),
}
BOUND_COLUMNS: Final = (*_MEASURES, "corollary favours cleaning")


def bound_cells(bounds: Sequence[Bound | None]) -> list[object]:
    """`BOUND_COLUMNS` of one mask over the seeds; None where a seed's mask keeps nothing."""
    cells: list[object] = [
        spread((None if b is None else measure(b) for b in bounds), digits)
        for measure, digits in _MEASURES.values()
    ]
    return [*cells, verdict(bounds)]


WARNINGS: Final = (
    f"eta: noise share of all tokens. eta^: wrong keeps and wrong drops of the mask, which is not "
    f"1 - precision. r^: kept share. Terms with delta = {DELTA}; corrupted tokens are noise. "
    "Tokens are averaged (the paper's Appendix C), not samples (its Section 5.1).",
    "`cannot`: no ranking, however good, satisfies the corollary at this kept share, since even a "
    "perfect one has eta^ = |1 - eta - r^|. At r^ = 0.6 that is so below 20 % noise; in general "
    "up to eta = (1 - r^) / 2.",
    "The corollary compares upper bounds on a 0-1 error of i.i.d. tokens, not models: the tokens "
    "of a response are not independent, and at a million tokens the required advantage "
    "is about 1e-3, so the first term decides alone.",
)


def theory_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Theorem 5.1 and Corollary 5.2 per arm and family, against the measured accuracy."""
    tables = []
    for variant, group in by_variant(cells).items():
        runs = [cell.results() for cell in group]
        rows: list[list[object]] = []
        for arm in arms_of(group):
            masks = [run[arm].mask for run in runs if arm in run]
            sources = groups_of(s for mask in masks for s in mask)
            for source in [ALL, *(s for s, g in sources.items() if g == (s,) and s != ALL)]:
                bounds = [Bound.of(mask.get(source)) for mask in masks]
                if any(b is not None and b.cleans for b in bounds):
                    rows.append(_row(group, arm, source, bounds, against))
        notes = [
            seeds_note(group),
            *WARNINGS,
            "Arms that drop nothing are left out; the rows of D_0, which are not cleaned, do not "
            f"count. `as predicted` asks whether the accuracy against `{against}` moved the way "
            "the corollary points, where the difference is resolved.",
        ]
        if not rows:
            notes.append("No mask was compared with a truth: the pools carry none.")
        tables.append(
            Table(
                file_name("theory", variant),
                "Theorem 5.1 and Corollary 5.2, measured"
                + ("" if variant == "main" else f", {variant}"),
                [
                    "arm",
                    "family",
                    "regime",
                    *BOUND_COLUMNS,
                    f"accuracy - {against} (points)",
                    "resolved",
                    "as predicted",
                ],
                rows,
                notes,
            )
        )
    return tables


def _row(
    cells: Sequence[Cell], arm: str, source: str, bounds: list[Bound | None], against: str
) -> list[object]:
    predicted = verdict(bounds)
    measured = difference(cells, arm, against, (source,))
    happened: list[object] = [None, None, None]
    if measured is not None:
        came = measured.resolved
        true = "-"
        if came == "yes" and predicted in ("yes", "no", "cannot"):
            true = "yes" if (measured.seeds.mean > 0) == (predicted == "yes") else "no"
        happened = [measured.seeds, came, true]
    return [arm, source, REGIMES.get(source), *bound_cells(bounds), *happened]
