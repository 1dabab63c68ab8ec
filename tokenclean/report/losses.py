"""The section on losses and scores: base against reference, and what the rule goes by."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tokenclean.report.content import Section
from tokenclean.report.counted import Counted
from tokenclean.report.figures import Cloud, draw_clouds
from tokenclean.report.plots import BarPanel, Plane, draw_bars, draw_planes
from tokenclean.report.shapes import BEYOND, POINTS, Bars, Shapes
from tokenclean.report.writing import percent

#: About so many tokens are in the histogram around the cut, at most such a share of the step's;
#: it reaches so many times the noise at least.
_NEAR_TOKENS, _NEAR_SHARE, _NEAR_NOISES = 1000, 0.1, 5
_UNITS: Final = {"score": "score (nats)", "priority": "priority (the rule's own number)"}


def shapes_for(counted: Counted) -> Shapes:
    """Grids that fit what the first pass has found."""
    tally = counted.tally
    scored = tally.means.of_all()
    limit = None
    if scored.base[1] and scored.reference[1]:
        # of both models' losses together, so half as many of either may lie beyond
        limit = max(tally.quantile("loss", 1 - BEYOND / 2) or 0.0, 1e-3)
    low, high = tally.quantile("by", BEYOND / 2), tally.quantile("by", 1 - BEYOND / 2)
    span = (0.0, 1.0) if low is None or high is None else (low, high)
    if span[1] <= span[0]:
        span = (span[0] - 0.5, span[0] + 0.5)
    return Shapes(counted.steps, limit, counted.by, span, _reaches(counted))


def _reaches(counted: Counted) -> dict[int, float]:
    """How far around its cut each step's histogram goes: so far that bars are made of tokens.

    The noise alone is too narrow a measure: in single precision, hardly a token is that near.
    """
    found = {}
    if counted.by == "score":
        total = counted.tally.whole.tokens
        for step in counted.steps:
            tokens = counted.tally.means.of_step(step.number).tokens
            if step.cut is not None and step.noise and tokens:
                wanted = min(_NEAR_TOKENS, _NEAR_SHARE * tokens)
                # the tally is of all steps together
                reach = counted.tally.reach("by", step.cut, wanted * total / tokens)
                found[step.number] = max(reach, _NEAR_NOISES * step.noise)
    return found


def losses_section(counted: Counted, shapes: Shapes) -> Section:
    """Base loss against reference loss, and the score with its cut."""
    section = Section("losses", "Losses and scores")
    if shapes.limit is None:
        means = counted.tally.means.of_all()
        known = [name for name in ("base", "reference") if means.mean(name) is not None]
        section.text.append(
            f"The pool holds {f'the losses of the {known[0]} alone' if known else 'no losses'}, "
            "so there is no score, and no plane of base loss against reference loss."
        )
    else:
        _plane(counted, shapes, section)
    if counted.by is not None:
        _histograms(counted, shapes, section)
    return section


def _plane(counted: Counted, shapes: Shapes, section: Section) -> None:
    write, steps = counted.writer, counted.steps
    found = shapes.steps
    beyond = sum(s.beyond for s in found.values())
    inside = sum(int(s.plane.sum()) for s in found.values())
    cut = (
        "Below the solid line the score is above the cut: kept. "
        if any(step.cut is not None for step in steps)
        else "The rule has no cut in this plane, so no line is drawn. "
    )
    clipped = f"Beyond the axes lie {beyond:,} of {beyond + inside:,} tokens, which are not drawn."
    planes = [Plane(s.title, found[s.number].plane, s.cut) for s in steps]
    draw_planes(write.path("plane"), planes, shapes.edges)
    rows = []
    edges = shapes.edges
    for plane in planes:
        for i, j in np.argwhere(plane.counts).tolist():
            cell = [edges[i], edges[i + 1], edges[j], edges[j + 1]]
            rows.append([plane.title, *map(float, cell), int(plane.counts[i, j])])
    section.drawings.append(
        write.drawing(
            "plane",
            "Base loss against reference loss",
            "Ranked tokens by both models' losses, coloured by the logarithm of their number; on "
            f"the dotted line nothing changed. {cut}{clipped}",
            "Density of tokens over base loss and reference loss. "
            + "; ".join(_mean_losses(counted, step.number, step.title) for step in steps)
            + ".",
            ["panel", "base from", "base to", "reference from", "reference to", "tokens"],
            rows,
        )
    )
    clouds = []
    points: list[list[Any]] = []
    limit = shapes.limit or 1.0
    for step in steps:
        base, reference, kept = found[step.number].points
        by_class = {
            name: (base[kept == value], reference[kept == value])
            for value, name in ((1, "kept"), (0, "dropped"))
        }
        clouds.append(Cloud(step.title, by_class, step.cut))
        points += [
            [step.title, float(b), float(r), int(k)]
            for b, r, k in zip(base, reference, kept, strict=True)
        ]
    labels = "base loss (nats)", "reference loss (nats)"
    draw_clouds(write.path("points"), clouds, *labels, limit, columns=2)
    section.drawings.append(
        write.drawing(
            "points",
            "Single tokens in the same plane",
            f"At most {POINTS:,} ranked tokens per panel, drawn with a fixed seed, on the same "
            f"axes: circles are kept, crosses dropped. {cut}Points "
            "beyond the axes are not seen; the CSV has them.",
            "Scatter plot of kept and dropped tokens over base loss and reference loss.",
            ["panel", *labels, "kept"],
            points,
        )
    )


def _mean_losses(counted: Counted, number: int, title: str) -> str:
    means = counted.tally.means.of_step(number)
    base, reference = means.mean("base"), means.mean("reference")
    if base is None or reference is None:
        return f"{title}: no losses"
    return f"{title}: mean base loss {base:.2f}, mean reference loss {reference:.2f} nats"


def _histograms(counted: Counted, shapes: Shapes, section: Section) -> None:
    write, steps = counted.writer, counted.steps
    assert counted.by is not None
    unit = _UNITS[counted.by]
    panels, near = [], []
    rows: list[list[Any]] = []
    beyond = total = 0
    for step in steps:
        found = shapes.steps[step.number]
        cut = step.cut if counted.by == "score" else None
        assert found.values is not None
        panels.append(BarPanel(step.title, found.values, cut))
        beyond += sum(found.values.beyond)
        total += found.values.total
        rows += _bar_rows(step.title, found.values)
        if found.near is not None:
            share = step.facts.get("near_cut")
            title = step.title if share is None else f"{step.title}: {percent(share)} in the band"
            near.append(BarPanel(title, found.near, cut, step.noise, logarithmic=False))
    draw_bars(write.path("scores"), panels, unit)
    what = "scores" if counted.by == "score" else "the rule's priorities"
    header = ["panel", "from", "to", "kept", "dropped"]
    section.drawings.append(
        write.drawing(
            "scores",
            "What the rule goes by",
            f"Histograms of {what} of kept tokens and, over them, of dropped ones; the counts are "
            f"on a scale that is logarithmic from one token on. Beyond the axes lie "
            f"{beyond:,} of {total:,} tokens.",
            f"Histograms of {what} of kept and dropped tokens"
            + "".join(f"; {p.title}: cut at {p.cut:.6g}" for p in panels if p.cut is not None)
            + ".",
            header,
            rows,
        )
    )
    if near:
        draw_bars(write.path("near-cut"), near, unit)
        section.drawings.append(
            write.drawing(
                "near-cut",
                "Around the cut",
                "The same close to the cut, about "
                f"{_NEAR_TOKENS:,} tokens of each step or {percent(_NEAR_SHARE)} of them. The band "
                "is the numerical noise: tokens in it could fall on the other side of the cut if "
                "the same models scored again in other batches. Counts are not on a logarithmic "
                "scale.",
                "Histograms of scores around the cut with the band of numerical noise: "
                + "; ".join(panel.title for panel in near)
                + ".",
                header,
                [row for panel in near for row in _bar_rows(panel.title, panel.bars)],
            )
        )
    elif counted.by == "priority":
        section.text.append(
            "The rule goes by a number of its own, not by the score, so its histogram is of that "
            "number and carries no band of noise."
        )


def _bar_rows(title: str, bars: Bars) -> list[list[Any]]:
    edges = bars.edges
    return [
        [title, float(edges[i]), float(edges[i + 1]), int(bars.kept[i]), int(bars.dropped[i])]
        for i in range(len(bars.kept))
    ]
