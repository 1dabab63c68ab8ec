"""The sections on where in the responses tokens are kept, and on which tokens are."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from tokenclean.report.content import Section
from tokenclean.report.counted import Counted
from tokenclean.report.plots import draw_shares
from tokenclean.report.ratio import COLUMNS, INTERVAL, Share, wilson
from tokenclean.report.tallies import BY_LENGTH, BY_POSITION, BY_TURN, BY_TYPE, GROUPS

#: Tokens listed on the page and in the file, and how often one must occur to be listed by its
#: share.
LISTED, IN_FILE, SELDOM = 15, 100, 20
_TITLES: Final = {
    BY_POSITION: "Position in the response",
    BY_LENGTH: "Length of the response",
    BY_TURN: "Assistant turn",
    BY_TYPE: "Kind of token",
}


def where_section(counted: Counted) -> Section:
    """Kept share by position, length, turn and kind of token."""
    tally, write = counted.tally, counted.writer
    section = Section("where", "Where in the responses")
    if not tally.whole.tokens:
        section.text.append("No token was ranked.")
        return section
    if tally.keeps_all:
        section.text.append("Every token is kept, wherever it stands.")
        return section
    panels = {}
    numbers: list[list[Any]] = []
    for key, bins in GROUPS.items():
        if key == BY_TYPE and counted.vocabulary is None:
            continue
        found = {name: tally.groups[key].share(i) for i, name in enumerate(bins)}
        panels[_TITLES[key]] = found
        rows = [[name, s.samples, *s.cells()] for name, s in found.items() if s.tokens]
        numbers += [[_TITLES[key], *row] for row in rows]
        section.tables.append(
            write.table(
                key, f"Kept share by {_TITLES[key].lower()}", [key, "samples", *COLUMNS], rows,
                [INTERVAL, *_notes(key)],
            )
        )  # fmt: skip
    if counted.vocabulary is None:
        section.text.append(f"Kinds of tokens are left out: {counted.unreadable}.")
    draw_shares(write.path("where"), panels, tally.whole.value)
    section.drawings.append(
        write.drawing(
            "where",
            "Kept share by place and kind",
            "Points are kept shares, lines their 95 % intervals over samples; the dashed line is "
            f"the arm's kept share, {tally.whole.value:.3f}. A response is one assistant turn; "
            "positions and lengths are in tokens, in bins that double.",
            "Panels of kept shares: "
            + "; ".join(f"{title}: {_extremes(found)}" for title, found in panels.items())
            + ".",
            ["panel", "group", "samples", *COLUMNS],
            numbers,
        )
    )
    return section


def _extremes(found: dict[str, Share]) -> str:
    known = {name: share for name, share in found.items() if share.tokens}
    low, high = (f(known, key=lambda name: known[name].value) for f in (min, max))
    return f"from {known[low].value:.2f} ({low}) to {known[high].value:.2f} ({high})"


def _notes(key: str) -> list[str]:
    return {
        BY_POSITION: ["A token's place in its assistant turn, from 1 on."],
        BY_LENGTH: ["Tokens of the assistant turn that a token belongs to, its end included."],
        BY_TURN: ["Assistant turns of a conversation, counted from its beginning."],
        BY_TYPE: [
            "Every token is of the first kind that applies: special (the end of the sequence among "
            "them); code, inside ``` fences of the response; whitespace, blanks alone; word start, "
            "letters that begin a word; continuation, other tokens with letters; digit, numbers "
            "without letters; punctuation, the rest."
        ],
    }[key]


def strings_section(counted: Counted) -> Section:
    """The most kept and the most dropped token strings."""
    section = Section("tokens", "Which tokens")
    vocabulary, tally = counted.vocabulary, counted.tally
    if vocabulary is None:
        section.text.append(f"Tokens cannot be read: {counted.unreadable}.")
        return section
    ids = np.flatnonzero(tally.ids)
    counts, kept = tally.ids[ids], tally.ids_kept[ids]
    dropped = counts - kept
    low, high = wilson(kept, counts)
    whole = tally.whole.value
    if tally.keeps_all:
        section.text.append(f"{len(ids):,} different tokens, every one of them kept everywhere.")
        return section
    often = counts >= SELDOM
    section.text += [
        f"{len(ids):,} different tokens; the arm keeps {_percent(whole)} of all. Of the "
        f"{int(often.sum()):,} that occur at least {SELDOM} times, "
        f"{int((often & (kept == 0)).sum()):,} are never kept and "
        f"{int((often & (dropped == 0)).sum()):,} always.",
        "A token is one entry of the vocabulary, in its form within a text: ␣ is a blank, ↵ a line "
        "break, ⇥ a tab, ␍ a carriage return; other signs that do not show are written as "
        "⟨U+...⟩, bytes that are no whole character as \\x and two digits.",
    ]
    far = (
        f"Of tokens that occur at least {SELDOM} times, ordered by how far the nearer end of "
        "Wilson's 95 % interval of their kept share lies from the arm's: a rare token must differ "
        "more than a frequent one."
    )
    lists = [
        ("most-kept", "Most kept tokens, by count", kept, kept > 0, []),
        ("most-dropped", "Most dropped tokens, by count", dropped, dropped > 0, []),
        (
            "kept-above",
            "Kept most above the arm's share",
            low - whole,
            often & (low > whole),
            [far],
        ),
        (
            "kept-below",
            "Kept most below the arm's share",
            whole - high,
            often & (high < whole),
            [far],
        ),
    ]
    for name, title, order, chosen, notes in lists:
        places = np.flatnonzero(chosen)
        # of equals, the smaller id
        best = places[np.argsort(-order[places], kind="stable")][:IN_FILE]
        if not len(best):
            continue  # of an arm that keeps all alike, or few tokens
        rows = [
            [
                vocabulary.shown(int(ids[i])),
                int(ids[i]),
                int(counts[i]),
                int(kept[i]),
                float(kept[i] / counts[i]),
                float(low[i]),
                float(high[i]),
            ]
            for i in best
        ]
        header = ["token", "id", "occurs", "kept", "kept share", "Wilson low", "Wilson high"]
        if len(rows) > LISTED:
            notes = [*notes, f"The first {LISTED}; the file has {len(rows)}."]
        section.tables.append(
            counted.writer.table(name, title, header, rows[:LISTED], notes, (header, rows))
        )
    return section


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
