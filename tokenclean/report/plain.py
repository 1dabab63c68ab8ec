"""Text for readers: numbers of a column alike, unseen characters by name, tables as Markdown."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from tokenclean.report.content import Section, Table

#: Joiners of letters are unseen too, but letters of many scripts depend on them.
_JOINERS = ("\u200c", "\u200d")
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: What stands where there is no number.
NONE = "–"


def is_unseen(character: str) -> bool:
    """Whether a character shows nothing of itself: controls, marks of direction, half pairs."""
    return unicodedata.category(character) in _UNSEEN and character not in _JOINERS


def visible(text: str) -> str:
    """The text with unseen characters, line breaks among them, as ``⟨U+202E⟩``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟨U+{ord(c):04X}⟩" if is_unseen(c) else c for c in text)


def share(kept: int, total: int) -> str:
    """``60.0 %``, or a dash where there is nothing."""
    return f"{kept / total:.1%}".replace("%", " %") if total else NONE


def number(n: int, noun: str) -> str:
    """``1 sample``, ``2,000 samples``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def decimal(units: int | None, digits: int, of: int = 5) -> str:
    """Whole units of ten to the minus ``of`` with so many digits, halves away from zero.

    The page's script does the same, so that a number reads alike wherever it stands.
    """
    if units is None:
        return NONE
    step = 10 ** (of - digits)
    rounded = (2 * abs(units) + step) // (2 * step)
    whole, rest = divmod(rounded, 10**digits)
    return f"{'−' if units < 0 and rounded else ''}{whole}.{rest:0{digits}d}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown_column(values: Sequence[Any]) -> list[str]:
    """The cells of a column as text, fractions with as many digits as the column asks for."""
    sizes = sorted(abs(v) for v in values if isinstance(v, float) and math.isfinite(v) and v)
    top = sizes[-1] if sizes else 1.0
    digits = next((d for d, least in enumerate((1e4, 1e3, 100)) if top >= least), 3)
    if sizes and digits == 3:
        # two digits that count in most cells
        digits = min(max(digits, 1 - math.floor(math.log10(sizes[len(sizes) // 2]))), 5)
    return [shown(value, digits) for value in values]


def shown(value: Any, digits: int = 3) -> str:
    """One cell as text; a fraction that would read as nothing keeps two digits that count."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        text = f"{value:,.{digits}f}"
        if value != 0 and math.isfinite(value) and float(text.replace(",", "")) == 0:
            text = f"{value:.2g}"
        return text.replace("-", "−")
    return visible(str(value))


def columns(table: Table) -> list[tuple[str, bool, list[str]]]:
    """Of each column: its name, whether it holds nothing but numbers, and its cells as text."""
    found = []
    for i, name in enumerate(table.header):
        values = [row[i] for row in table.rows]
        numeric = all(v is None or is_number(v) for v in values)
        found.append((visible(name), numeric, shown_column(values)))
    return found


def markdown(sections: Sequence[Section], level: int = 2) -> str:
    """Sections without their figures, for logs."""
    parts = []
    for section in sections:
        parts.append(f"{'#' * level} {visible(section.title)}")
        parts += [visible(text) for text in section.text]
        for table in section.tables:
            parts.append(_table(table))
            parts += [visible(note) for note in table.notes]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    found = columns(table)
    lines = [
        f"**{visible(table.title)}**",
        "",
        "| " + " | ".join(_cell(name) for name, _, _ in found) + " |",
        "|" + "|".join("---:" if numeric else "---" for _, numeric, _ in found) + "|",
    ]
    for cells in zip(*(texts for *_, texts in found), strict=True):
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
