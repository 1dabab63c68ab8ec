"""Drawing: colours that colour-blind readers tell apart, markers besides, legends off the data."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

#: Okabe and Ito's palette without its yellow, which is faint on white, and with a grey.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"
)  # fmt: skip
#: Of the classes of a scatter plot; the third is rare and must be seen on top of the others.
CLASSES = ("#0072B2", "#D55E00", "#000000")
CLASS_MARKS = ("o", "x", "D")
#: The line on which two losses are equal, seen on top of a cut that lies along it.
NO_CHANGE: dict[str, Any] = {"color": "#D55E00", "linewidth": 1.3, "linestyle": ":", "zorder": 3}
CUT: dict[str, Any] = {"color": "#000000", "linewidth": 1.3, "zorder": 2.5}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")


@dataclass
class Line:
    """One curve: y with error bars over x. Errors may be NaN, which draws none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]


def draw_lines(
    path: Path,
    panels: dict[str, list[Line]],
    x_label: str,
    y_label: str,
    ticks: dict[float, str] | None = None,
) -> None:
    """Curves in panels side by side, sharing both axes, with one legend on the right.

    Args:
        path: of the PNG; the numbers go beside it as CSV.
        panels: title -> curves; the same label looks the same in every panel.
        x_label: name and unit.
        y_label: name and unit.
        ticks: names of places on the x axis, if it is no axis of numbers.
    """
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    figure = Figure(figsize=(1.6 + 3.2 * len(panels), 3.6), dpi=150)
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    figure.set_layout_engine("constrained")
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for line in lines:
            i = labels.index(line.label)
            handles[line.label] = axes.errorbar(
                line.x,
                line.y,
                yerr=line.error,
                label=line.label,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if i < len(COLOURS) else "--",
                markersize=5,
                linewidth=1.3,
                capsize=2.5,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        if ticks is not None:
            axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    grid[0].set_ylabel(y_label)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    save(figure, path)
    rows = [
        [title, line.label, *point]
        for title, lines in panels.items()
        for line in lines
        for point in zip(line.x, line.y, line.error, strict=True)
    ]
    write_numbers(path, ["panel", "line", x_label, y_label, "error bar: sd over seeds"], rows)


@dataclass
class Cloud:
    """One panel of points, class by class.

    Attributes:
        title: of the panel.
        points: class -> (x, y), in the order of drawing.
        cut: the line y = x - cut is drawn, if there is one.
    """

    title: str
    points: dict[str, tuple[Sequence[float], Sequence[float]]]
    cut: float | None = None


def draw_clouds(
    path: Path,
    clouds: list[Cloud],
    x_label: str,
    y_label: str,
    top: float | None = None,
    columns: int = 4,
) -> None:
    """Scatter plots side by side with one scale for all axes, so that panels can be compared.

    Args:
        path: of the PNG.
        clouds: a panel each.
        x_label, y_label: names and units.
        top: upper end of the axes; by default that of the largest value.
        columns: panels in a row, at most.
    """
    labels = list(dict.fromkeys(label for cloud in clouds for label in cloud.points))
    if top is None:
        top = max(
            (max(v) for c in clouds for xy in c.points.values() for v in xy if len(v)), default=1.0
        )
    limits = (-0.02 * top, 1.02 * top)
    columns = min(len(clouds), columns)
    rows = -(-len(clouds) // columns)
    figure = Figure(figsize=(2.6 + 2.9 * columns, 0.5 + 2.9 * rows), dpi=150)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, cloud in zip(grid.flat, clouds, strict=False):
        _cloud(axes, cloud, labels, limits)
    for axes in grid.flat[len(clouds) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    keys: list[Any] = [
        Line2D([], [], color=CLASSES[i], marker=CLASS_MARKS[i], linestyle="", markersize=5)
        for i in range(len(labels))
    ]
    names = list(labels)
    if any(cloud.cut is not None for cloud in clouds):
        keys.append(Line2D([], [], **CUT))
        names.append("cut: kept below")
    keys.append(Line2D([], [], **NO_CHANGE))
    names.append("no change")
    figure.legend(keys, names, loc="outside right center", frameon=False, fontsize=9)
    save(figure, path)


def _cloud(axes: Axes, cloud: Cloud, labels: list[str], limits: tuple[float, float]) -> None:
    for label, (x, y) in cloud.points.items():
        i = labels.index(label)
        size, alpha = (12, 0.45) if i < 2 else (16, 0.9)
        # crosses are lines alone, the others have none around them
        width = 0.9 if CLASS_MARKS[i] == "x" else 0.0
        axes.scatter(
            x, y, s=size, color=CLASSES[i], marker=CLASS_MARKS[i], alpha=alpha, linewidths=width
        )
    axes.axline((0, 0), slope=1, **NO_CHANGE)
    if cloud.cut is not None:
        axes.axline((0, -cloud.cut), slope=1, **CUT)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_box_aspect(1)
    axes.set_title(cloud.title, fontsize=10)


def draw_matrix(
    path: Path,
    labels: list[str],
    values: list[list[float | None]],
    title: str,
    font: float = 6,
    lowest: float | None = None,
) -> None:
    """A square of numbers between -1 and 1 as a heat map, with the numbers in it.

    Args:
        path: of the PNG; the numbers go beside it as CSV.
        labels: of rows and columns.
        values: row by row; None leaves a square white.
        title: what the numbers are.
        font: size of the numbers in points.
        lowest: where the colours begin, for numbers that use a part of the scale up to 1; by
            default they are those of the whole scale, its middle white.
    """
    size = 1.8 + 0.42 * len(labels)
    # of few rows, the labels take most of the width
    figure = Figure(figsize=(size + (0.8 if len(labels) > 8 else 1.8), size), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    numbers = np.array(values, dtype=np.float64)
    # violet to orange: told apart by all readers, and by their darkness where printed grey
    colours, least = ("PuOr", -1.0) if lowest is None else ("cividis_r", lowest)
    image = axes.imshow(numbers, cmap=colours, vmin=least, vmax=1)
    # numbers are white where the colour is dark: at both ends, or at the upper one
    dark = 0.6 if lowest is None else (1 + lowest) / 2
    for (row, column), value in np.ndenumerate(numbers):
        if not np.isnan(value):
            colour = "white" if (abs(value) if lowest is None else value) > dark else "black"
            text = f"{value:z.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.colorbar(image, ax=axes, label=title, shrink=0.7)
    save(figure, path)
    rows = [[label, *row] for label, row in zip(labels, values, strict=True)]
    write_numbers(path, ["", *labels], rows)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_numbers(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """The numbers of a figure, beside it."""
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
