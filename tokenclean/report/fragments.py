"""Parts of the report's page as HTML; whatever comes from data is escaped here, nowhere else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Final
from urllib.parse import quote

from tokenclean.report.content import Drawing, Section, Table
from tokenclean.report.plain import columns, is_unseen, visible

#: Rows of a table that the page shows; the CSV has all.
MAX_ROWS: Final = 250
#: A table of more rows than `FOLD` shows `FIRST` of them, and the rest when asked.
FOLD: Final = 12
FIRST: Final = 10


def text(value: str) -> str:
    """Data as HTML: escaped, unseen characters by name, no effect on the text around it."""
    if value.isascii() and value.isprintable():
        return escape(value)
    marked = "".join(
        f'<span class="mark">U+{ord(c):04X}</span>' if is_unseen(c) else escape(c) for c in value
    )
    return f"<bdi>{marked}</bdi>"


def attribute(value: str) -> str:
    """Data between the quotes of an attribute."""
    return escape(visible(value), quote=True)


def slug(name: str, taken: set[str]) -> str:
    """A name that can stand in links, unlike those taken; it is taken then.

    It has no hyphen, which joins it to the names of what lies within.
    """
    plain = re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_.") or "x"
    found, n = plain, 2
    while found in taken:
        found, n = f"{plain}_{n}", n + 1
    taken.add(found)
    return found


def tables(contents: Sequence[Table], place: str) -> str:
    """Tables beside each other as far as there is room; notes that several share stand before."""
    said = Counter(note for content in contents for note in set(content.notes))
    shared = [
        note for note in dict.fromkeys(n for c in contents for n in c.notes) if said[note] > 1
    ]
    head = "".join(f'<p class="note">{text(note)}</p>' for note in shared)
    boxes = "".join(
        f"<div>{table(content, f'{place}-t{i}', shared)}</div>"
        for i, content in enumerate(contents)
    )
    return f'{head}<div class="tables">{boxes}</div>' if contents else ""


def table(content: Table, place: str, said: Collection[str] = ()) -> str:
    """A table in a box that scrolls by itself.

    Args:
        place: an id of the page, for the caption.
        said: notes that stand elsewhere.
    """
    found = columns(content)
    few = [(name, numeric, cells[:MAX_ROWS]) for name, numeric, cells in found]
    kinds = ["number" if numeric else _kind_of(cells) for _, numeric, cells in few]
    head = "".join(
        f'<th scope="col" class="{kind}">{text(name)}</th>'
        for (name, *_), kind in zip(few, kinds, strict=True)
    )
    lines = []
    for cells in zip(*(cells for *_, cells in few), strict=True):
        first, *rest = (
            f' class="{kind}">{text(cell)}' for kind, cell in zip(kinds, cells, strict=True)
        )
        lines.append(
            f'<tr><th scope="row"{first}</th>'
            + "".join(f"<td{cell}</td>" for cell in rest)
            + "</tr>"
        )
    notes = [note for note in content.notes if note not in said]
    if len(content.rows) > MAX_ROWS:
        notes.append(f"The first {MAX_ROWS:,} of {len(content.rows):,} rows.")
    numbers = f"Numbers: {file_link(f'tables/{content.name}.csv', f'{content.name}.csv')}."
    words = " ".join([*(text(note) for note in notes), numbers])
    # settings are looked up, not read down
    folded = len(lines) > FOLD and list(content.header) != ["setting", "value"]
    at_once = FIRST if folded else len(lines)
    bodies = f"<tbody>{''.join(lines[:at_once])}</tbody>"
    more = ""
    if folded:
        bodies += f'<tbody class="rest">{"".join(lines[at_once:])}</tbody>'
        more = f"<details><summary>{len(lines) - at_once:,} more rows</summary></details>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{place}">'
        f'<table><caption id="{place}">{text(content.title)}</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>{more}"
        f'<p class="note">{words}</p>'
    )


def file_link(path: str, says: str) -> str:
    """A link to a file beside the page; it opens beside it, so that the place here is kept."""
    return f'<a href="{quote(path)}" target="_blank" rel="noopener">{text(says)}</a>'


def _kind_of(cells: Sequence[str]) -> str:
    """How a column of texts is set: on one line, in words, or broken wherever it must be."""
    if max(map(len, cells), default=0) <= 24:
        return "short"
    return "long" if any(len(word) > 32 for cell in cells for word in cell.split()) else "words"


def figure(drawing: Drawing, image: tuple[str, int, int] | None) -> str:
    """A figure with its caption.

    Args:
        image: its data URI, width and height in pixels of the page; None where it was left out.
    """
    file = f"figures/{drawing.name}"
    links = f"{file_link(f'{file}.png', f'{drawing.name}.png')}, " + file_link(
        f"{file}.csv", "its numbers"
    )
    caption = (
        f"<figcaption><b>{text(drawing.title)}.</b> {text(drawing.caption)} "
        f"Files: {links}.</figcaption>"
    )
    if image is None:
        return (
            f'<figure><p class="missing">Left out of the page to keep it small: {links}. '
            f"{text(drawing.alt)}</p>{caption}</figure>"
        )
    uri, width, height = image
    # wide ones scroll on a narrow screen: squeezed to its width they could not be read
    kind = ' class="wide"' if width > 560 else ""
    return (
        f'<figure><div class="sheet" role="region" tabindex="0" '
        f'aria-label="{attribute(drawing.title)}"><img{kind} src="{uri}" width="{width}" '
        f'height="{height}" alt="{attribute(drawing.alt)}"></div>{caption}</figure>'
    )


def section(content: Section, place: str, inner: Iterable[str]) -> str:
    """A section with its heading and paragraphs, before ``inner``."""
    said = "".join(f"<p>{text(paragraph)}</p>" for paragraph in content.text)
    return (
        f'<section id="{place}" aria-labelledby="{place}-title">'
        f'<h3 id="{place}-title">{text(content.title)}</h3>{said}{"".join(inner)}</section>'
    )


def facts(found: Sequence[tuple[str, str]]) -> str:
    """Questions and answers; the answers are HTML already."""
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{text(q)}</dt><dd>{a}</dd>" for q, a in found)
        + "</dl>"
    )
