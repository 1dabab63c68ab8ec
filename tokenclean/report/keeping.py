"""The section on other keep shares: what they would have kept, without scoring anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenclean.report.content import Section
from tokenclean.report.counted import Counted
from tokenclean.report.curve import GRID, Curve, Rankings, add_up
from tokenclean.report.plots import Panel, Series, draw_series
from tokenclean.report.steps import is_ranked, rule_of
from tokenclean.report.writing import percent, without

_ALL_STEPS: Final = "all steps"
#: Share of samples left with nothing from which on the figure is logarithmic.
_FINE: Final = 1e-3


def rankings_for(counted: Counted, folder: Path) -> Rankings | None:
    """Where the values of the second pass are put aside; None if there are none to rank."""
    tally = counted.tally
    if counted.by is None or tally.ranges["by"].total() < tally.whole.tokens:
        return None
    selection = counted.arm.manifest["selection"]
    ranked = _ranks_by_it(counted)
    return Rankings(
        folder,
        selection["scope"] if ranked else "global",
        bool(selection.get("always_keep_eos")) and ranked,
        counted.by,
        counted.tally.eos_id,
    )


def _ranks_by_it(counted: Counted) -> bool:
    """The rule ranks, and by the column that the pool stores."""
    rule = rule_of(counted.arm)
    stored = counted.by == "priority" or rule is None or rule.by_score
    return is_ranked(counted.arm) and stored


def curve_section(counted: Counted, rankings: Rankings | None) -> Section:
    """Cut, emptied samples and kept ends at other keep shares."""
    section = Section("curve", "Other keep shares")
    if rankings is None or not rankings.steps:
        section.text.append(
            "The pool does not store for every token what it could be ranked by, so another keep "
            "share cannot be worked out from it."
        )
        return section
    ranked = _ranks_by_it(counted)
    own = {step.number: _own_share(counted, step.number) for step in counted.steps}
    shares = {
        number: sorted({*GRID, own[number]} if ranked else set(GRID)) for number in rankings.steps
    }
    curves = rankings.curves(shares)
    section.text.append(
        "Tokens are ranked again by what the pool stores, and cut at other keep shares; nothing is "
        "scored anew."
        + (
            f" The rule {_instead(counted)}: the curve is what ranking by "
            f"{'its priority' if counted.by == 'priority' else 'the score'} over the whole pool "
            "would keep, not what the rule keeps."
            if not ranked
            else ""
        )
        + (
            " Later rounds of a real run with another share would have other references, so only "
            "round 1 is exactly what it would have been."
            if len(curves) > 1 and "rounds" in counted.arm.manifest
            else ""
        )
    )
    titles = {step.number: step.title for step in counted.steps}
    named = {titles[number]: curve for number, curve in curves.items()}
    if len(named) > 1:
        common = set.intersection(*(set(s) for s in shares.values()))
        together = add_up(
            [replace(c, points=[p for p in c.points if p.keep in common]) for c in curves.values()]
        )
        named = {_ALL_STEPS: together, **named}
    by_title = {titles[number]: share for number, share in own.items()}
    _draw_curve(counted, section, named, by_title, ranked)
    return section


def _instead(counted: Counted) -> str:
    """What a rule does that does not rank by what the pool stores."""
    if is_ranked(counted.arm):
        return "ranks by a number that this pool, of an older version, does not store"
    return "decides token by token"


def _own_share(counted: Counted, number: int) -> float:
    """The keep share that a step was cut at; that which it kept where none was asked."""
    step = next(s for s in counted.steps if s.number == number)
    estimated = (step.facts.get("share") or {}).get("keep")
    asked = counted.arm.manifest["selection"]["keep"]
    if _ranks_by_it(counted) and (estimated is not None or asked != "auto"):
        return float(asked if estimated is None else estimated)
    return counted.tally.means.of_step(number).kept_share or 0.0


def _draw_curve(
    counted: Counted,
    section: Section,
    named: dict[str, Curve],
    own: dict[str, float],
    ranked: bool,
) -> None:
    write = counted.writer
    rows: list[list[Any]] = [
        [
            title,
            point.keep,
            "*"
            if ranked and {own[t] for t in own if title in (t, _ALL_STEPS)} == {point.keep}
            else "",
            point.cut,
            point.kept,
            point.emptied,
            point.emptied / max(curve.samples, 1),
            point.ends_kept,
            point.ends_kept / curve.ends if curve.ends else None,
        ]
        for title, curve in named.items()
        for point in curve.points
    ]
    shown = [row for row in rows if row[2] or round(10 * row[1], 6).is_integer()]
    header = [
        "step", "keep share", "actual", "cut", "kept tokens", "samples left with nothing",
        "share of samples", "ends kept", "share of ends",
    ]  # fmt: skip
    notes = ["* is the arm's own keep share."] if ranked else []
    if len(shown) < len(rows):
        notes.append("The file has shares in steps of 0.05.")
    told = without(header, shown, ["actual"], "")
    title = "What other keep shares would keep"
    section.tables.append(write.table("curve", title, *told, notes, (header, rows)))
    steps = {title: curve for title, curve in named.items() if title != _ALL_STEPS}
    marks = sorted({f"{share:.3f}": share for share in own.values()}.items())
    if len(marks) <= 2:
        at = {f"actual share, {name}": share for name, share in marks}
    else:
        at = {}
        section.text.append("The steps were cut at different shares; the table marks each.")

    def lines(y: Any) -> list[Series]:
        return [
            Series(
                title,
                [p.keep for p in curve.points if y(p, curve) is not None],
                [y(p, curve) for p in curve.points if y(p, curve) is not None],
            )
            for title, curve in steps.items()
        ]

    cut = "cut (nats)" if counted.by == "score" else "cut (the rule's own number)"
    panels = [
        Panel("Cut", "keep share", cut, lines(lambda p, c: p.cut)),
        Panel(
            "Samples left with nothing", "keep share", "share of samples",
            lines(lambda p, c: p.emptied / max(c.samples, 1)), y_limits=(0.0, 1.3), fine=_FINE,
        ),
        Panel(
            "Ends of responses kept", "keep share", "share of ends",
            lines(lambda p, c: p.ends_kept / c.ends if c.ends else None), y_limits=(-0.03, 1.03),
        ),
    ]  # fmt: skip
    panels = [panel for panel in panels if any(series.x for series in panel.series)]
    for panel in panels:
        panel.at, panel.x_limits = at, (0.0, 1.02)
    draw_series(write.path("curve"), panels, 2)
    section.drawings.append(
        write.drawing(
            "curve",
            "Cut, emptied samples and kept ends by keep share",
            "Each line is one step, ranked by itself; vertical lines are the arm's own shares. "
            f"Samples left with nothing: logarithmic from {percent(_FINE)} on, linear below.",
            "Lines over the keep share from 0.05 to 1; the table above has their numbers.",
            header,
            rows,
        )
    )
