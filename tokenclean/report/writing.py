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
    ) -> Table:
        """A table, written to ``tables/<prefix>-<name>.csv``; NaN becomes None."""
        rows = [[_known(cell) for cell in row] for row in rows]
        table = Table(f"{self.prefix}-{name}", title, header, rows, notes or [])
        write_csv(self.folder / "tables" / f"{table.name}.csv", header, rows)
        return table

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


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Rows as CSV, None empty; texts that a spreadsheet would run get an apostrophe in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[_harmless(cell) for cell in row] for row in rows])


def _known(cell: Any) -> Any:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _harmless(cell: Any) -> Any:
    cell = _known(cell)
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell
