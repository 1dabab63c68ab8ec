"""Where the tables and figures of a report go: names without collisions, CSV beside each."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenclean.report.content import Drawing, Table

#: What the names of tables and figures of the whole run begin with.
RUN: Final = "run"
#: A cell that begins so is a formula to a spreadsheet program, wherever it came from.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
_NATS: Final = " (nats)"


def stem(name: str, all_names: Collection[str]) -> str:
    """A file-name stem for an arm, unlike those of all other arms, whatever the letters' case."""

    def plain(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]", "_", text).strip(".") or "_"

    short = plain(name)[:60]
    others = [plain(other)[:60].lower() for other in all_names if other != name]
    if short.lower() in (RUN, *others):
        return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return short


@dataclass(frozen=True)
class Writer:
    """Makes the tables and figures of one arm, or of the run.

    Attributes:
        folder: of the report.
        prefix: what their names begin with.
    """

    folder: Path
    prefix: str

    def table(
        self,
        name: str,
        title: str,
        header: list[str],
        rows: list[list[Any]],
        notes: list[str] | None = None,
        file: tuple[list[str], list[list[Any]]] | None = None,
    ) -> Table:
        """A table, written to ``tables/<prefix>-<name>.csv``; NaN becomes None.

        Where several columns are in nats, the table says so once; its file, in each heading.

        Args:
            file: heading and rows of the CSV, where it holds more than the page shows.
        """
        rows = [[_known(cell) for cell in row] for row in rows]
        write_csv(self.folder / "tables" / f"{self.prefix}-{name}.csv", *(file or (header, rows)))
        notes = list(notes or [])
        if sum(column.endswith(_NATS) for column in header) > 1:
            header = [column.removesuffix(_NATS) for column in header]
            notes.append("Losses, scores and cuts are in nats.")
        return Table(f"{self.prefix}-{name}", title, header, rows, notes)

    def path(self, name: str) -> Path:
        """Where a figure goes."""
        place = self.folder / "figures"
        place.mkdir(parents=True, exist_ok=True)
        return place / f"{self.prefix}-{name}.png"

    def drawing(
        self,
        name: str,
        title: str,
        caption: str,
        alt: str,
        header: list[str],
        rows: list[list[Any]],
    ) -> Drawing:
        """A figure that was drawn at `path`, with its numbers beside it."""
        write_csv(self.path(name).with_suffix(".csv"), header, rows)
        return Drawing(f"{self.prefix}-{name}", title, caption, alt)


def without(
    header: list[str], rows: list[list[Any]], dull: Collection[str], value: Any
) -> tuple[list[str], list[list[Any]]]:
    """A table without those of some columns that hold nothing but one value, or nothing.

    Args:
        dull: names of the columns that may go.
        value: the one that says nothing; None always does.
    """
    kept = [
        i
        for i, name in enumerate(header)
        if name not in dull or any(_known(row[i]) not in (None, value) for row in rows)
    ]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def with_errors(cells: list[Any], digits: int) -> list[str | None]:
    """Values and their errors, one after the other, as a text for each pair; None for none."""
    found: list[str | None] = []
    for value, error in zip(cells[::2], cells[1::2], strict=True):
        sign = "" if error is None or math.isnan(error) else f" ± {error:.{digits}f}"
        text = None if value is None else f"{value:.{digits}f}{sign}"
        found.append(text and text.replace("-", "−"))
    return found


def percent(share: float) -> str:
    """A small share in percent, two digits that count, never with an exponent."""
    if not share:
        return "0 %"
    digits = max(0, 1 - math.floor(math.log10(abs(100 * share))))
    return f"{100 * share:.{digits}f} %"


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Rows as CSV, None empty; texts that a spreadsheet would run get an apostrophe in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_harmless(cell) for cell in header])
        writer.writerows([[_harmless(cell) for cell in row] for row in rows])


def _known(cell: Any) -> Any:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _harmless(cell: Any) -> Any:
    cell = _known(cell)
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell
