"""What a report is made of: sections of text, tables and figures, before they become a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Numbers under a heading.

    Attributes:
        name: stem of its CSV, unique in the report.
        title: what it shows, with units.
        header: names of the columns.
        rows: numbers and texts; None where there is no number.
        notes: what a reader must know to read it.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Drawing:
    """A figure on disk: ``figures/<name>.png``, its numbers in ``figures/<name>.csv``.

    Attributes:
        name: stem of the files, unique in the report.
        title: what it shows.
        caption: how to read it.
        alt: what a reader who cannot see it is told.
    """

    name: str
    title: str
    caption: str
    alt: str


@dataclass
class Section:
    """A part of a report.

    Attributes:
        key: name in links, unique within an arm.
        title: its heading.
        text: paragraphs before tables and figures, plain text.
        tables, drawings: in the order in which they are shown.
    """

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
