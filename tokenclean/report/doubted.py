"""Doubted tokens as HTML: each in its context, with what is known of it, and its sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import numpy as np

from tokenclean.report.doubts import Doubt, Doubts
from tokenclean.report.embedded import UNITS, Texts, whole
from tokenclean.report.fragments import attribute, text
from tokenclean.report.plain import decimal
from tokenclean.report.shown import Row

#: Tokens before and after a doubted one.
CONTEXT: Final = 8
#: Doubts among a report's first lines.
FEW: Final = 3
#: What a decoder gives for bytes that are no whole character.
_BROKEN: Final = "\ufffd"
#: Digits of losses and of scores and cuts, here and in the page's script.
_LOSS, _SCORE = 4, 5


def first_doubts(lists: Sequence[Doubts], place: str, texts: Texts, shown: set[int]) -> str:
    """A few dropped tokens of the first list that has any worth reading, and why.

    Args:
        lists: those with a token in them, at least one.
        place: id of the arm.
        texts: what the samples read as.
        shown: numbers of the rows that the page has.
    """
    readable = {d.title: [x for x in d.best() if _says_something(x, texts)][:FEW] for d in lists}
    found = next((d for d in lists if readable[d.title]), lists[0])
    lines = []
    for doubt in readable[found.title] or found.best()[:FEW]:
        base, reference, score, cut = _numbers(doubt)
        known = [("base loss", base, _LOSS), ("reference loss", reference, _LOSS),
                 ("score", score, _SCORE), ("cut", cut, _SCORE)]  # fmt: skip
        said = ", ".join(f"{n} {decimal(v, d)}" for n, v, d in known if v is not None)
        lines.append(
            f"<li>{context(doubt.row, doubt.position - doubt.row.first, texts)}<br>"
            f"{_name(doubt, place, shown)}: {said}{'; ' if said else ''}{text(found.short)}</li>"
        )
    return (
        f'{text(found.title)} (framed; <a href="#{place}-doubts">more, and why</a>):'
        f"<ul>{''.join(lines)}</ul>"
    )


def _says_something(doubt: Doubt, texts: Texts) -> bool:
    """A reader can tell what the token is: a word, a part of one, a number."""
    piece = texts.of(doubt.row)[doubt.position - doubt.row.first]
    return _BROKEN not in piece and any(c.isalnum() for c in piece)


def doubts(found: Doubts, place: str, texts: Texts, shown: set[int], rounds: bool) -> str:
    """A list of doubted tokens in their context.

    Args:
        place: id of the arm.
        texts: what the samples read as.
        shown: numbers of the rows that the page has.
        rounds: the arm cleaned in rounds.
    """
    best = found.best()
    with_cut = any(not np.isnan(doubt.cut) for doubt in best)
    lines = []
    for doubt in best:
        row, at = doubt.row, doubt.position - doubt.row.first
        base, reference, score, cut = _numbers(doubt)
        values = [decimal(base, _LOSS), decimal(reference, _LOSS), decimal(score, _SCORE)]
        values += [decimal(cut, _SCORE)] if with_cut else []
        values += [str(row.round)] if rounds else []
        cells = "".join(f'<td class="number">{value}</td>' for value in values)
        kind = "short" if len(row.id) <= 24 else "words"
        lines.append(
            f'<tr><th scope="row" class="context-cell">{context(row, at, texts)}</th>{cells}'
            f'<td class="{kind}">{_name(doubt, place, shown)}</td>'
            f'<td class="words">{text(row.source)}</td></tr>'
        )
    names = ["base loss", "reference loss", "score"]
    names += ["cut"] if with_cut else []
    names += ["round"] if rounds else []
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{attribute(found.title)}">'
        f"<table><caption>{text(found.title)}</caption><thead><tr>"
        f'<th scope="col" class="words">token (framed), in its context</th>{head}'
        '<th scope="col" class="words">sample</th><th scope="col" class="words">source</th>'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note after">{text(found.note)} No two of one sample or of one token.</p>'
    )


def _numbers(doubt: Doubt) -> list[int | None]:
    """Losses, score and cut in the units of the page's samples."""
    row = doubt.row
    inside = int(row.response[: doubt.position - row.first].sum())
    found = (row.base[inside], row.reference[inside], row.score[inside], doubt.cut)
    return whole(np.array(found, dtype=np.float64), UNITS)


def _name(doubt: Doubt, place: str, shown: set[int]) -> str:
    """The sample's id, as a link to the token if the page has the sample."""
    name = text(doubt.row.id)
    if doubt.row.number not in shown:
        return name
    return f'<a href="{attribute(sample_link(place, doubt.row.id, doubt.position))}">{name}</a>'


def sample_link(place: str, id: str, position: int) -> str:
    """Where the page's script finds a token of a sample; in links tokens count from 1."""
    return f"#{place}/sample/{quote(id, safe='')}/{position + 1}"


def context(row: Row, at: int, texts: Texts) -> str:
    """A token and its neighbours, coloured as in the browser of samples."""
    pieces = texts.of(row)
    weight = iter(row.weight.tolist())
    kinds = [_kind(next(weight)) if inside else "prompt" for inside in row.response.tolist()]
    low, high = max(0, at - CONTEXT), min(len(pieces), at + CONTEXT + 1)
    spans = []
    for i in range(low, high):
        shown = text(clipped(pieces[i]).replace("\n", "↵"))
        shown = shown or '<span class="mark">byte</span>'
        # struck through, short ones could not be told apart
        kind, shown = (f"{kinds[i]} framed", f"<b>{shown}</b>") if i == at else (kinds[i], shown)
        spans.append(f'<span class="t {kind}">{shown}</span>')
    before, after = "… " if low else "", " …" if high < len(pieces) else ""
    return f'<span class="context">{before}{"".join(spans)}{after}</span>'


def clipped(piece: str, most: int = 40) -> str:
    """A token's text, cut short where it is a page of its own."""
    return piece if len(piece) <= most else f"{piece[: most - 1]}…"


def _kind(weight: float) -> str:
    return "kept" if weight > 0 else "unlearnt" if weight < 0 else "dropped"
