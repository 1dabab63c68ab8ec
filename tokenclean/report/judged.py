"""The section on planted pools: how well ranking and mask find what is informative."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tokenclean.report.content import Section
from tokenclean.report.counted import ALL, Counted
from tokenclean.report.plots import Panel, Series, draw_series
from tokenclean.report.truth import CORRUPT, INFORMATIVE, OTHERS, Curves, Truths, curves, operating
from tokenclean.report.writing import without

#: Points of a curve that are drawn and written.
_DRAWN: Final = 400


def truth_section(counted: Counted, truths: Truths) -> Section:
    """Curves, areas, the mask's place among them, and what became of each kind of noise."""
    section = Section("truth", "Against the planted truth")
    what = {
        "score": "the score",
        "priority": "the rule's own number (`priority`)",
    }.get(counted.by or "")
    known = "The pool is planted, so which tokens are informative is known."
    section.text.append(
        f"{known} The pool stores no ranking, so only the mask is judged."
        if counted.by is None
        else f"{known} The ranking is by {what}. AUROC is the chance that an informative token "
        "ranks above another one (0.5: no better than chance; below: worse); average precision is "
        "the area under the precision-recall curve. Tokens of equal value count as one threshold. "
        "All steps are ranked together."
    )
    _areas(counted, truths, section)
    _figure(counted, truths, section)
    if counted.tally.keeps_all:
        section.text.append("Every token is kept, of whatever kind and source.")
    elif truths.has_kinds:
        section.tables.append(
            counted.writer.table(
                "kinds",
                "Kept tokens by kind of content and noise",
                ["kind", "truth", "tokens", "kept", "kept share"],
                truths.kind_table(),
                [
                    "value: the answer itself; frame: the rest of its sentence; end: the end of "
                    "the response; corrupted: a wrong value; boilerplate, tale, fact and ledger: "
                    "sentences that do not belong there.",
                ],
            )
        )
    else:
        section.text.append(
            "Kinds of noise are not told apart: "
            + (
                counted.unreadable
                if counted.vocabulary is None
                else "the sources are not the families of the planted pool"
            )
            + "."
        )
    return section


def _areas(counted: Counted, truths: Truths, section: Section) -> None:
    rows: list[list[Any]] = []
    for others in (OTHERS, CORRUPT):
        # a mask that keeps all is the same for every source
        some = () if counted.tally.keeps_all and counted.by is None else sorted(truths.sources)
        for source in (None, *some):
            chosen = truths.against(others, source)
            positive = truths["truth"][chosen] == INFORMATIVE
            kept = truths["kept"][chosen]
            found = curves(truths["value"][chosen], positive)
            place = operating(kept, positive)
            rows.append(
                [
                    others,
                    ALL if source is None else source,
                    int(positive.sum()),
                    int((~positive).sum()),
                    *((None, None) if found is None else (found.auroc, found.average_precision)),
                    place.precision,
                    place.recall,
                    place.false_positive,
                ]
            )
    header = [
        "informative against", "source", "informative", "others", "AUROC", "average precision",
        "precision of the mask", "informative kept", "others kept",
    ]  # fmt: skip
    shown = without(header, rows, ["AUROC", "average precision"], None)
    notes = ["Precision: informative share of the kept tokens, among those compared."]
    title = "Ranking and mask against the truth"
    section.tables.append(counted.writer.table("truth", title, *shown, notes, (header, rows)))


def _figure(counted: Counted, truths: Truths, section: Section) -> None:
    write = counted.writer
    roc, recall = [], []
    marks: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    base: dict[str, float] = {}
    rows: list[list[Any]] = []
    said = []
    for others in (OTHERS, CORRUPT):
        chosen = truths.against(others)
        positive = truths["truth"][chosen] == INFORMATIVE
        found = curves(truths["value"][chosen], positive)
        if found is None:
            continue
        label = f"informative against {others}"
        place = operating(truths["kept"][chosen], positive)
        thin = _thin(found)
        x, y, p = (v[thin] for v in (found.false_positive, found.true_positive, found.precision))
        roc.append(Series(label, x.tolist(), y.tolist()))
        recall.append(Series(label, y.tolist(), p.tolist()))
        mark = f"the mask, against {others}"
        marks[0][mark] = (place.false_positive, place.recall)
        marks[1][mark] = (place.recall, place.precision)
        base[others] = found.positives / (found.positives + found.negatives)
        said.append(
            f"{label}: AUROC {found.auroc:.3f}, average precision {found.average_precision:.3f} "
            f"(a random ranking: {base[others]:.3f})"
        )
        rows += [[others, *map(float, point)] for point in zip(x, y, p, strict=True)]
        rows.append([f"{others}: the mask", place.false_positive, place.recall, place.precision])
    if not roc:
        return
    limits = (-0.02, 1.02)
    panels = [
        Panel(
            "ROC", "kept share of the others", "kept share of the informative", roc, marks[0],
            x_limits=limits, y_limits=limits, plain=True,
        ),
        Panel(
            "Precision and recall", "recall: kept share of the informative", "precision", recall,
            marks[1], x_limits=limits, y_limits=limits, plain=True,
        ),
    ]  # fmt: skip
    draw_series(write.path("truth"), panels, 2)
    section.drawings.append(
        write.drawing(
            "truth",
            "Ranking against the planted truth",
            "Every threshold of the ranking, and the mask as it is. " + "; ".join(said) + ".",
            "ROC and precision-recall curves. " + "; ".join(said) + ".",
            ["against", "others kept", "informative kept", "precision"],
            rows,
        )
    )


def _thin(found: Curves) -> np.ndarray:
    """Indices of at most `_DRAWN` points, spread over both rates, the ends among them."""
    along = found.true_positive + found.false_positive
    wanted = np.linspace(0.0, 2.0, _DRAWN)
    chosen = np.searchsorted(along, wanted).clip(max=len(along) - 1)
    unique: np.ndarray = np.unique(np.concatenate([[0], chosen]))
    return unique
