"""The figures of a report: kept shares, loss planes, histograms, series and curves.

Every function writes a PNG. Each draws in colours that colour-blind readers tell apart, with marks
or hatches besides, and puts the legend off the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from tokenclean.evaluation.planted import ALL
from tokenclean.report.figures import COLOURS, CUT, MARKERS, NO_CHANGE, save
from tokenclean.report.ratio import Share
from tokenclean.report.shapes import Bars

KEPT, DROPPED = COLOURS[0], COLOURS[4]
_CUT, _DARK = "#000000", "#7a5200"
_SMALL: Final = 8
_GREY = "#777777"
#: Of lines: eight that are told apart; black is for all sources together.
_LINES: Final = (*COLOURS[:6], "#882255", _GREY)


def _grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, no more in a row than ``columns``."""
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=150)
    figure.set_layout_engine("constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def _columns(panels: int) -> int:
    """Three in a row; of four, two."""
    return 2 if panels == 4 else min(panels, 3)


def short(text: str, length: int = 28) -> str:
    """A name for an axis: nothing that matplotlib or a reader would stumble over."""
    plain = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def draw_shares(path: Path, panels: dict[str, dict[str, Share]], whole: float) -> None:
    """Kept shares with their intervals, a panel per way of grouping, a line per group.

    Args:
        path: of the PNG.
        panels: title -> group -> share; groups without a token are left out.
        whole: kept share of all, drawn as a line in every panel.
    """
    panels = {t: {g: s for g, s in found.items() if s.tokens} for t, found in panels.items()}
    panels = {title: found for title, found in panels.items() if found}
    longest = max(map(len, panels.values()))
    figure, grid = _grid(len(panels), 2, 4.6, 0.9 + 0.27 * max(longest, 4))
    for axes, (title, groups) in zip(grid, panels.items(), strict=True):
        names = list(groups)
        for i, share in enumerate(groups.values()):
            ends = [e if e == e else share.value for e in (share.low, share.high)]
            errors = [[max(share.value - ends[0], 0.0)], [max(ends[1] - share.value, 0.0)]]
            axes.errorbar(
                share.value, i, xerr=errors, color=KEPT, marker="o", markersize=3.5, capsize=3,
                linewidth=1.4,
            )  # fmt: skip
            text = f"{share.tokens:,}"
            axes.annotate(
                text,
                (1.02, i),
                xycoords=("axes fraction", "data"),
                fontsize=_SMALL,
                va="center",
                annotation_clip=False,
            )
        axes.axvline(whole, color=_GREY, linewidth=1, linestyle="--")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [short(n) for n in names], fontsize=_SMALL)
        axes.tick_params(axis="x", labelsize=_SMALL)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("kept share of the tokens; right: tokens", fontsize=9)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    save(figure, path)


@dataclass
class Plane:
    """One panel of `draw_planes`: counts by base and reference loss, and the cuts' scores."""

    title: str
    counts: np.ndarray
    cut: float | None


def draw_planes(path: Path, planes: list[Plane], edges: np.ndarray) -> None:
    """Where tokens lie by base loss (x) and reference loss (y), colours by the logarithm.

    Args:
        path: of the PNG.
        planes: counts of shape (n, n) each; first axis the base's.
        edges: of the cells on both axes, in nats: shape (n + 1,).
    """
    columns = _columns(len(planes))
    figure, grid = _grid(len(planes), columns, 3.3 if columns > 1 else 4.4, 3.4)
    most = max(1, *(int(plane.counts.max()) for plane in planes))
    image: Any = None
    for axes, plane in zip(grid, planes, strict=True):
        shown = np.ma.masked_equal(plane.counts.T, 0)
        image = axes.pcolormesh(
            edges, edges, shown, norm=LogNorm(1, max(most, 2)), cmap="cividis_r", rasterized=True
        )
        axes.axline((0, 0), slope=1, **NO_CHANGE)
        if plane.cut is not None:
            axes.axline((0, -plane.cut), slope=1, **CUT)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(edges[0], edges[-1])
        axes.set_box_aspect(1)
        axes.set_title(plane.title, fontsize=10)
        axes.set_xlabel("base loss (nats)", fontsize=9)
        axes.set_ylabel("reference loss (nats)", fontsize=9)
        axes.tick_params(labelsize=_SMALL)
    bar = figure.colorbar(image, ax=grid, label="tokens per cell", shrink=0.85)
    bar.ax.tick_params(labelsize=_SMALL)
    keys = [Line2D([], [], **NO_CHANGE)]
    names = ["no change"]
    if any(plane.cut is not None for plane in planes):
        keys.append(Line2D([], [], **CUT))
        names.append("cut: kept below")
    _legend(figure, keys, names)
    save(figure, path)


@dataclass
class BarPanel:
    """One panel of `draw_bars`.

    Attributes:
        title: of the panel.
        bars: its counts.
        cut: drawn as a line, if there is one.
        noise: half the width of the band around the cut, if it is to be drawn.
        logarithmic: scale of the counts.
    """

    title: str
    bars: Bars
    cut: float | None = None
    noise: float | None = None
    logarithmic: bool = True


def draw_bars(path: Path, panels: list[BarPanel], x_label: str) -> None:
    """Histograms of kept and of dropped tokens over each other, the dropped ones outlined.

    Args:
        path: of the PNG.
        panels: row by row.
        x_label: name and unit.
    """
    size = (3.4, 2.7) if len(panels) > 1 else (5.6, 3.4)
    figure, grid = _grid(len(panels), _columns(len(panels)), *size)
    for axes, panel in zip(grid, panels, strict=True):
        edges, bars = panel.bars.edges, panel.bars
        axes.stairs(bars.kept, edges, fill=True, color=KEPT, alpha=0.75, linewidth=0)
        axes.stairs(bars.dropped, edges, fill=True, color=DROPPED, alpha=0.45, linewidth=0)
        axes.stairs(bars.dropped, edges, color=_DARK, linewidth=1.3)
        if panel.cut is not None:
            if panel.noise:
                # outlined, so that a narrow one is seen
                ends = panel.cut - panel.noise, panel.cut + panel.noise
                axes.axvspan(*ends, color=_GREY, alpha=0.35, lw=1.5)
            axes.axvline(panel.cut, color=_CUT, linewidth=1, linestyle="--")
        if panel.logarithmic:
            axes.set_yscale("symlog", linthresh=1)
        most = max(1, int(bars.kept.max()), int(bars.dropped.max()))
        axes.set_ylim(0, most * (2.0 if panel.logarithmic else 1.1))
        axes.set_xlim(bars.low, bars.high)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(x_label, fontsize=9)
        axes.set_ylabel("tokens per bin", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=_SMALL)
    keys: list[Any] = [Patch(color=KEPT), Patch(facecolor=DROPPED, edgecolor=_DARK)]
    names = ["kept", "dropped"]
    if any(panel.cut is not None for panel in panels):
        keys.append(Line2D([], [], color=_CUT, linewidth=1, linestyle="--"))
        names.append("cut")
    if any(panel.cut is not None and panel.noise for panel in panels):
        keys.append(Patch(color=_GREY, alpha=0.35))
        names.append("within the noise of the cut")
    _legend(figure, keys, names)
    save(figure, path)


@dataclass
class Series:
    """One line: y over x, with error bars where there are any (None, or NaN, draws none)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass
class Panel:
    """Lines over one pair of axes.

    Attributes:
        title: of the panel.
        x_label, y_label: names and units.
        series: a label looks the same in every panel.
        points: label -> (x, y): single marks.
        at: x of a vertical line, with its name.
        x_limits, y_limits: None lets the data decide.
        whole: x stands for whole numbers.
        plain: without a marker on every point.
        fine: y is logarithmic from this value on, linear below.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    points: dict[str, tuple[float, float]] = field(default_factory=dict)
    at: dict[str, float] = field(default_factory=dict)
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    ticks: dict[float, str] | None = None
    whole: bool = False
    plain: bool = False
    fine: float | None = None


def draw_series(
    path: Path, panels: list[Panel], columns: int = 2, order: Sequence[str] = ()
) -> None:
    """Lines in panels that have axes of their own, and one legend for all.

    Args:
        path: of the PNG.
        panels: row by row.
        columns: panels in a row, at most.
        order: labels in the order of their colours, where several figures have the same ones. The
            line of all sources is black everywhere.
    """
    figure, grid = _grid(len(panels), columns, 4.1 if len(panels) > 1 else 6.0, 3.2)
    labels = list(dict.fromkeys(s.label for p in panels for s in p.series))
    known = list(dict.fromkeys([*order, *labels]))
    places = {label: i for i, label in enumerate(label for label in known if label != ALL)}
    marks = list(dict.fromkeys(label for p in panels for label in p.points))
    lines = list(dict.fromkeys(label for p in panels for label in p.at))
    keys: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=True):
        for series in panel.series:
            whole = series.label == ALL
            i = 0 if whole else places[series.label]
            style: dict[str, Any] = {
                "color": _CUT if whole else _LINES[i % len(_LINES)],
                "linestyle": "-" if i < len(_LINES) else "--",
                "linewidth": 2.2 if whole else 1.4,
                "marker": None if panel.plain else MARKERS[i % len(MARKERS)],
                "markersize": 4.5,
            }
            if panel.plain:
                style["linestyle"] = ("-", "--", "-.", ":")[i % 4]
            axes.plot(series.x, series.y, **style)
            if series.error is not None:
                axes.errorbar(
                    series.x, series.y, yerr=series.error, fmt="none", capsize=2.5,
                    ecolor=style["color"], elinewidth=1,
                )  # fmt: skip
            keys.setdefault(series.label, Line2D([], [], **style))
        for label, (x, y) in panel.points.items():
            i = len(labels) + marks.index(label)
            style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 9, "linestyle": ""}
            style |= {"markerfacecolor": "none", "markeredgecolor": _CUT, "markeredgewidth": 1.5}
            axes.plot([x], [y], **style)
            keys.setdefault(label, Line2D([], [], **style))
        for label, x in panel.at.items():
            style = {"color": _GREY, "linewidth": 1.2}
            style["linestyle"] = ("--", ":")[lines.index(label) % 2]
            axes.axvline(x, **style)
            keys.setdefault(label, Line2D([], [], **style))
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label, fontsize=9)
        axes.set_ylabel(panel.y_label, fontsize=9)
        axes.tick_params(labelsize=_SMALL)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        if panel.x_limits is not None:
            axes.set_xlim(*panel.x_limits)
        if panel.fine is not None:
            axes.set_yscale("symlog", linthresh=panel.fine)
        if panel.y_limits is not None:
            axes.set_ylim(*panel.y_limits)
        if panel.ticks is not None:
            axes.set_xticks(list(panel.ticks), list(panel.ticks.values()), fontsize=_SMALL)
        elif panel.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, list(keys.values()), list(keys))
    save(figure, path)


def draw_arms(path: Path, panels: dict[str, dict[str, tuple[float, float]]], x_label: str) -> None:
    """A value with its standard error for every arm, a panel per measure or source.

    Args:
        path: of the PNG.
        panels: title -> arm -> (value, standard error or NaN); an arm may lack a panel.
        x_label: name and unit.
    """
    arms = list(dict.fromkeys(arm for found in panels.values() for arm in found))
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    height = 0.9 + 0.24 * max(len(arms), 4)
    figure = Figure(figsize=(1.6 + 2.3 * columns, height * rows), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        for i, arm in enumerate(arms):
            if arm in found:
                value, error = found[arm]
                axes.errorbar(
                    value, i, xerr=error, color=COLOURS[0], marker="o", markersize=4.5, capsize=2.5
                )
        axes.set_title(short(title), fontsize=10)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.tick_params(labelsize=_SMALL, labelbottom=True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    grid[0][0].set_yticks(range(len(arms)), [short(a) for a in arms], fontsize=_SMALL)
    grid[0][0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(x_label, fontsize=9)
    save(figure, path)


def _legend(figure: Figure, keys: list[Any], names: list[str]) -> None:
    """Below the figure, in as many columns as fit."""
    names = [short(name, 60) for name in names]
    width = 0.6 + 0.075 * max(map(len, names), default=1)  # of an entry, in inches
    figure.legend(
        keys, names, loc="outside lower center", frameon=False, fontsize=9,
        ncols=max(1, min(len(names), int(figure.get_figwidth() / width))),
    )  # fmt: skip
