"""The section on self-evolving arms: cuts, masks and families from round to round."""

from __future__ import annotations

import math
from typing import Any

from tokenclean.evaluation.planted import Accuracy
from tokenclean.report.content import Section
from tokenclean.report.counted import ALL, Counted
from tokenclean.report.figures import draw_matrix
from tokenclean.report.plots import Panel, Series, draw_series
from tokenclean.report.ratio import Z
from tokenclean.report.rounds import (
    Panel as Fixed,
)
from tokenclean.report.rounds import (
    agreement,
    is_change,
    read_panel,
    round_results,
)
from tokenclean.report.writing import with_errors, without

#: Sources that have a line of their own in the figure: the largest ones.
_LINES = 12


def rounds_section(counted: Counted) -> Section:
    """Round by round; see the module's first line."""
    section = Section("rounds", "Round by round")
    panel = read_panel(counted.arm)
    if panel is None:
        section.text.append(
            "The rounds' masks cannot be compared: this run scored no panel of the same samples in "
            "every round (runs of an older version, or loop.panel: 0)."
        )
    else:
        section.text.append(
            f"The panel: {panel.samples:,} samples with {panel.tokens:,} response tokens that "
            "every round's reference scored and the rule masked. No reference was trained on them."
        )
        missing = [s.title for s in counted.steps if s.number not in panel.kept]
        if missing:
            section.text.append(f"Without a panel: {', '.join(missing)}.")
    _steps(counted, panel, section)
    if panel is not None:
        _matrix(counted, panel, section)
    _families(counted, section)
    _accuracies(counted, section)
    return section


def _steps(counted: Counted, panel: Fixed | None, section: Section) -> None:
    write = counted.writer
    rows: list[list[Any]] = []
    for step in counted.steps:
        means = counted.tally.means.of_step(step.number)
        row: list[Any] = [
            step.number, step.cut, means.kept_share, means.mean("base"), means.mean("reference"),
            means.mean("score"),
        ]  # fmt: skip
        cells: list[float | None] = [None] * 5
        if panel is not None and step.number in panel.kept:
            now = panel.kept[step.number]
            for i, other in ((0, step.number - 1), (2, 1)):
                if other in panel.kept and other != step.number:
                    found = agreement(panel.kept[other], now)
                    cells[i], cells[i + 1] = found.equal, found.kappa
            cells[4] = panel.above(step)
        rows.append([*row, *cells])
    header = [
        "round", "cut (nats)", "kept share", "mean base loss (nats)",
        "mean reference loss (nats)", "mean score (nats)", "equal to the round before",
        "kappa with the round before", "equal to round 1", "kappa with round 1",
        "panel above the round's cut",
    ]  # fmt: skip
    notes = [
        "Equal: share of the panel's tokens on which two rounds' masks decide alike; kappa takes "
        "away what chance would give. Panel above the round's cut: share of the panel's tokens "
        "whose score reaches the cut that the round drew through its own rows."
    ]
    told = without(header, rows, header[1:], None)
    said = [] if panel is None else notes
    section.tables.append(write.table("rounds", "Rounds", *told, said, (header, rows)))

    def line(label: str, column: int) -> Series:
        known = [row for row in rows if row[column] is not None and not math.isnan(row[column])]
        return Series(label, [row[0] for row in known], [row[column] for row in known])

    panels = [
        Panel("Cut", "round", "cut (nats)", [line("cut", 1)], whole=True),
        Panel(
            "Mean losses and score", "round", "nats",
            [line("base loss", 3), line("reference loss", 4), line("score", 5)], whole=True,
        ),
        Panel(
            "Agreement of the masks on the panel", "round", "share of equal decisions",
            [line("with the round before", 6), line("with round 1", 8)], whole=True,
        ),
        Panel(
            "Panel above the round's own cut", "round", "share of tokens",
            [line("panel above the cut", 10), line("kept share of the round", 2)], whole=True,
        ),
    ]  # fmt: skip
    panels = [p for p in panels if p.series[0].x]
    for shown in panels:
        shown.series = [series for series in shown.series if series.x]
    if panels:
        draw_series(write.path("rounds"), panels, 2)
        section.drawings.append(
            write.drawing(
                "rounds",
                "Round by round",
                "The score is base loss minus reference loss; means are over the ranked tokens of "
                "each round's own rows.",
                "Lines over the rounds; the table above has their numbers.",
                header,
                rows,
            )
        )


def _matrix(counted: Counted, panel: Fixed, section: Section) -> None:
    numbers = sorted(panel.kept)
    if len(numbers) < 2:
        return
    found = {(a, b): agreement(panel.kept[a], panel.kept[b]) for a in numbers for b in numbers}
    names = [f"round {t}" for t in numbers]
    write = counted.writer
    for name, title in (("equal", "Share of equal decisions"), ("kappa", "Cohen's kappa")):
        rows = [[f"round {a}", *(getattr(found[a, b], name) for b in numbers)] for a in numbers]
        section.tables.append(
            write.table(f"panel-{name}", f"{title} of two rounds on the panel", ["", *names], rows)
        )
    values = [[None if math.isnan(k := found[a, b].kappa) else k for b in numbers] for a in numbers]
    least = min((k for row in values for k in row if k is not None), default=0.0)
    lowest = math.floor(10 * min(least, 0.9)) / 10
    draw_matrix(write.path("panel-kappa"), names, values, "Cohen's kappa", 9, lowest)
    section.drawings.append(
        write.drawing(
            "panel-kappa",
            "Agreement of the rounds' masks on the panel",
            "Cohen's kappa of the masks of two rounds: 1 for equal masks, 0 for chance. The "
            f"colours begin at {lowest:g}.",
            "Matrix of kappa between rounds; the table above has the same numbers.",
            ["", *names],
            [[name, *row] for name, row in zip(names, values, strict=True)],
        )
    )


def _families(counted: Counted, section: Section) -> None:
    """Who gains and who loses, by score and kept share (the paper's Matthew effect)."""
    means, write = counted.tally.means, counted.writer
    numbers = [step.number for step in counted.steps]
    rows: list[list[Any]] = []
    for source in means.sources():
        found = {t: m for t in numbers if (m := means.found.get((t, source))) is not None}
        scores = [found[t].mean("score") if t in found else None for t in numbers]
        shares = [found[t].kept_share if t in found else None for t in numbers]
        first, last = min(found), max(found)
        one, other = means.share(first, source), means.share(last, source)
        change = other.value - one.value
        error = math.hypot(one.error, other.error)
        verdict = "not resolved"
        if first == last or math.isnan(error):
            verdict = "not known"
        elif abs(change) > Z * error:
            verdict = "gains" if change > 0 else "loses"
        ends = found[first].mean("score"), found[last].mean("score")
        score = None if None in ends else ends[1] - ends[0]  # type: ignore[operator]
        rows.append([source, *scores, score, *shares, change, Z * error, verdict])
    header = [
        "source",
        *(f"mean score, round {t} (nats)" for t in numbers),
        "change of the score (nats)",
        *(f"kept share, round {t}" for t in numbers),
        "change of the share",
        "± (95 %)",
        "verdict",
    ]
    if counted.tally.keeps_all:
        section.text.append("Every round keeps every token, so no source gains or loses any.")
    else:
        section.text.append(_who(rows))
        n = len(numbers)
        # the ends of what changed; the rounds between them are drawn
        few = [0, n + 1, *sorted({n + 2, 2 * n + 1}), *range(2 * n + 2, len(header))]
        told = [header[i] for i in few], [[row[i] for i in few] for row in rows]
        notes = [
            "gains or loses: the kept share of the source changed by more than its 95 % interval, "
            "which is over samples; rounds clean different rows. What one source gains, others "
            "lose where the keep share is fixed. The rounds between are in the figure and the file."
        ]
        title = "Who gains and who loses from the first to the last round"
        told = without(*told, ["change of the score (nats)"], None)
        section.tables.append(write.table("families", title, *told, notes, (header, rows)))
    size = {
        s: sum(m.tokens for (_, source), m in means.found.items() if source == s)
        for s in means.sources()
    }
    largest = sorted(sorted(size), key=lambda s: -size[s])[:_LINES]

    def lines(value: Any) -> list[Series]:
        series = []
        for source in sorted(largest):
            points = [
                (t, v)
                for t in numbers
                if (m := means.found.get((t, source))) is not None and (v := value(m)) is not None
            ]
            if points:
                series.append(Series(source, [t for t, _ in points], [v for _, v in points]))
        return series

    kept = [] if counted.tally.keeps_all else lines(lambda m: m.kept_share)
    panels = [
        Panel("Kept share", "round", "kept share", kept, whole=True),
        Panel("Mean score", "round", "score (nats)", lines(lambda m: m.mean("score")), whole=True),
    ]
    panels = [p for p in panels if p.series]
    if not panels:
        return
    draw_series(write.path("families"), panels, 2, means.sources())
    rest = len(size) - len(largest)
    section.drawings.append(
        write.drawing(
            "families",
            "Sources round by round",
            f"{' and '.join(p.title for p in panels)} of each source in the rows of each round."
            + (f" The {_LINES} largest sources; {rest} more are in the file." if rest else ""),
            "; ".join(f"{row[0]} {row[-1]}" for row in rows) + ".",
            header,
            rows,
        )
    )


def _who(rows: list[list[Any]]) -> str:
    """The verdicts in a sentence."""
    by: dict[str, list[str]] = {}
    for row in rows:
        by.setdefault(row[-1], []).append(row[0])
    if len(by.get("not resolved", [])) == len(rows):
        return (
            "Who gains and who loses: no source's kept share changed by more than its 95 % "
            "interval from the first round to the last."
        )
    parts = [f"{v}: {', '.join(by[v])}" for v in ("gains", "loses") if v in by]
    parts += [
        f"{v}: {len(by[v])} of {len(rows)} sources"
        for v in ("not resolved", "not known")
        if v in by
    ]
    return f"Kept share from the first round to the last: {'; '.join(parts)}."


def _broken(label: str, found: dict[int, Accuracy]) -> Series:
    """A line over rounds, in percent, that is not drawn across rounds that are not known."""
    x: list[float] = []
    y: list[float] = []
    error: list[float] = []
    for t, accuracy in found.items():
        if x and t - x[-1] > 1:
            x, y, error = [*x, math.nan], [*y, math.nan], [*error, math.nan]
        x, y = [*x, t], [*y, 100 * accuracy.share]
        error = [*error, 100 * accuracy.standard_error]
    return Series(label, x, y, error)


def _accuracies(counted: Counted, section: Section) -> None:
    """Accuracy along the rounds, where models were evaluated."""
    results = {t: r for t, r in round_results(counted.run, counted.arm).items() if r.accuracy}
    if not any(t > 0 for t in results):
        section.text.append("No test questions were asked of the rounds' models.")
        return
    lacking = [s.title for s in counted.steps if s.number not in results]
    if lacking:
        section.text.append(
            f"Not evaluated: the models after {', '.join(lacking)} (loop.evaluate_rounds: true "
            "evaluates each)."
        )
    names = {-1: "base", 0: "warm-up"} | {t: f"round {t}" for t in results if t > 0}
    sources = sorted({s for r in results.values() for s in r.accuracy} - {ALL})
    rows: list[list[Any]] = []
    series = []
    for source in [ALL, *sources]:
        found = {t: r.accuracy[source] for t, r in results.items() if source in r.accuracy}
        cells: list[float | None] = []
        for t in results:
            a = found.get(t)
            cells += [None, None] if a is None else [100 * a.share, 100 * a.standard_error]
        along = [t for t in found if t >= 0]
        change, verdict = None, "not known"
        if len(along) > 1:
            one, other = found[along[0]], found[along[-1]]
            change = 100 * (other.share - one.share)
            verdict = "not resolved"
            if is_change(one, other):
                verdict = "gains" if change > 0 else "loses"
        rows.append([source, *cells, change, verdict])
        series.append(_broken(source, found))
    header = [
        "source", *(h for t in results for h in (f"{names[t]} (%)", f"{names[t]} ±")), "change",
        "verdict",
    ]  # fmt: skip
    page = [
        [
            row[0],
            *with_errors(row[1:-2], 1),
            None if row[-2] is None else f"{row[-2]:+.1f}".replace("-", "−"),
            row[-1],
        ]
        for row in rows
    ]
    told = ["source", *(names[t] for t in results), "change", "verdict"], page
    notes = [
        "±: standard error, as of independent questions; the change is from the first to "
        "the last model of the arm's own rounds, the warm-up being the first where it was "
        "evaluated; gains or loses: by more than two standard errors."
    ]
    write = counted.writer
    title = "Test accuracy by round, in percent"
    section.tables.append(write.table("accuracy", title, *told, notes, (header, rows)))
    shown = series[: _LINES + 1]
    ticks = {float(t): names[t].removeprefix("round ") for t in results}
    if len(results) > 1:
        axes = Panel("Accuracy", "model after round", "test accuracy (%)", shown, ticks=ticks)
        draw_series(write.path("accuracy"), [axes], 1, counted.tally.means.sources())
        section.drawings.append(
            write.drawing(
                "accuracy", "Accuracy by round",
                "Bars are standard errors over questions; no line is drawn across rounds that were "
                "not evaluated.",
                "; ".join(f"{row[0]} {row[-1]}" for row in rows) + ".",
                header, rows,
            )
        )  # fmt: skip
