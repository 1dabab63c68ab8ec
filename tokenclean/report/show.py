"""`tokenclean show RUN`: samples in the terminal, with what was kept and dropped of them.

Colours are by Okabe and Ito, and dropped tokens are struck through besides. Where there are no
colours (a file, a pipe, a log, ``--text``) marks take their place: ``{=prompt=}``,
``[-dropped-]``, ``[~unlearnt~]``, and kept tokens stand as they are. Nothing of the data can steer
the terminal or pass for a mark: what cannot be seen is written as an escape (``\\x1b``,
``\\u202e``), and a backslash goes before what would read as a mark or an escape.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import math
import sys
import unicodedata
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby, islice
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenclean.data.cleaned import CleanedBlock, read_blocks
from tokenclean.data.pieces import token_texts
from tokenclean.data.rows import NO_LOSS
from tokenclean.finished import CleanedArm, FinishedRun

#: Samples shown if none are asked for.
DEFAULT: Final = 3
#: Kind of token -> its style; black on sky blue and on orange are read on any terminal.
STYLES: Final = {
    "prompt": "dim",
    "kept": "#000000 on #56B4E9",
    "dropped": "strike #000000 on #E69F00",
    "unlearnt": "strike bold underline #000000 on #D55E00",
}
#: Kind of token -> what stands around it without colours.
MARKS: Final = {
    "prompt": ("{=", "=}"),
    "kept": ("", ""),
    "dropped": ("[-", "-]"),
    "unlearnt": ("[~", "~]"),
}
NEWLINE: Final = "↵"
#: Categories of characters that cannot be seen or that steer the terminal: control and format
#: characters (direction marks among them), surrogates, private and unassigned ones, separators.
_UNSEEN: Final = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
#: Ids that are compared letter by letter where one is not found, and named.
_CANDIDATES, _NEAREST = 50, 3


def show(argv: list[str]) -> None:
    """Print samples of a finished run."""
    options = _parse(argv)
    run = FinishedRun(options.run, options.tokenizer, options.trust_remote_code)
    arms = [run.arm(name) for name in dict.fromkeys(options.arm or [None])]
    tokenizer = run.tokenizer
    ids = list(dict.fromkeys(options.id)) if options.id else choose(arms[0], options)
    found = [find(arm, ids) for arm in arms]
    for id in ids:
        if not any(id in samples for samples in found):
            near = ", ".join(repr(other) for other in nearest(arms[0], id))
            raise ValueError(f"--id: {arms[0].cleaned} has no sample {id!r}; nearest: {near}")
    console = console_for(options)
    coloured = console.color_system is not None
    try:
        unlearnt = any("unlearnt" in kinds_of(s) for samples in found for s in samples.values())
        console.print(legend(coloured, unlearnt))
        for id in ids:
            for arm, samples in zip(arms, found, strict=True):
                name = f"{arm.name}: " if len(run.arms) > 1 else ""
                console.print()
                if id not in samples:
                    console.print(Text(f"{name}{escaped(id)} is not in its pool", style="bold"))
                    continue
                sample = samples[id]
                texts = token_texts(tokenizer, sample.input_ids.tolist())
                console.print(Text(name + heading(sample), style="bold"))
                console.print(tokens(texts, kinds_of(sample), coloured))
                if options.losses:
                    console.print(losses(sample, texts, arm.manifest.get("reasons") or {}))
    except SystemExit:
        # rich ends so when who reads, such as `head`, has seen enough; that is no failure
        return


def _parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser(
        prog="tokenclean show",
        description="Print samples of a run with their prompt, kept and dropped tokens. Colours "
        "are left out, and marks written instead, where the output is no terminal; FORCE_COLOR=1 "
        "keeps them (for less -R).",
    )
    parser.add_argument(
        "run", type=Path, help="folder of a run of `clean` or `select`, an arm, a cleaned pool"
    )
    parser.add_argument("--arm", action="append", help="of a run; repeated: one below the other")
    parser.add_argument("--tokenizer", help="of the pool, where the run does not name it")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the tokenizer"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", action="append", help="this sample (may be repeated)")
    which.add_argument("--first", type=int, metavar="N", help=f"the first N (default: {DEFAULT})")
    which.add_argument("--random", type=int, metavar="N", help="N drawn by a hash of their ids")
    parser.add_argument("--source", help="only samples of this source")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: 0)")
    parser.add_argument("--losses", action="store_true", help="a line for every response token")
    parser.add_argument("--text", action="store_true", help="marks instead of colours")
    parser.add_argument("--width", type=int, help="columns (default: the terminal's)")
    options = parser.parse_args(argv)
    for name, least in (("first", 1), ("random", 1), ("width", 20)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: give {least} or more")
    if options.id and options.source:
        raise ValueError("--source goes with --first and --random; --id names its samples itself")
    return options


def console_for(options: Namespace) -> Console:
    """Where to print to; without colours a line of text is left whole unless a width is given."""
    if hasattr(sys.stdout, "reconfigure"):
        # an output that is not Unicode shows escapes instead of ending in an error
        sys.stdout.reconfigure(errors="backslashreplace")
    plain = Console(
        force_terminal=False, color_system=None, highlight=False, width=options.width or 1 << 20
    )
    if options.text:
        return plain
    console = Console(highlight=False, width=options.width)
    return plain if console.color_system is None or console.no_color else console


# -- which samples --------------------------------------------------------------------------------


def choose(arm: CleanedArm, options: Namespace) -> list[str]:
    """Ids of the first samples, or of some drawn by a hash of their ids, of one source or all.

    Raises:
        ValueError: if the source does not occur.
    """
    sources: set[str] = set()
    ids = _ids(arm, options.source, sources)
    if options.random is not None:
        chosen = heapq.nsmallest(options.random, ids, key=lambda id: _hash(id, options.seed))
    else:
        chosen = list(islice(ids, options.first or DEFAULT))
    if not chosen:
        if not sources:
            raise ValueError(f"{arm.cleaned} has no samples")
        shown = ", ".join(map(repr, sorted(sources)[:20])) + (", ..." if len(sources) > 20 else "")
        raise ValueError(f"--source: {options.source!r} does not occur; there are {shown}")
    return chosen


def _ids(arm: CleanedArm, source: str | None, sources: set[str]) -> Iterator[str]:
    """Ids of one source, or all; the sources that were met are added to a set."""
    for block in read_blocks(arm.cleaned):
        sources.update(block.sources)
        for id, of in zip(block.ids, block.sources, strict=True):
            if source in (None, of):
                yield id


def find(arm: CleanedArm, ids: Sequence[str]) -> dict[str, CleanedBlock]:
    """Id -> its row as a block of one, where there is one; reading ends with the last of them."""
    wanted, found = set(ids), dict[str, CleanedBlock]()
    for block in read_blocks(arm.cleaned):
        for row, id in enumerate(block.ids):
            if id in wanted:
                found[id] = _cut(block, row)
        if len(found) == len(wanted):
            break
    return found


def _cut(block: CleanedBlock, row: int) -> CleanedBlock:
    """A row by itself, copied, so that its block can go."""
    tokens, one = block.tokens_of(row), slice(row, row + 1)
    by_row = ("ids", "sources", "rounds", "counts")
    values = {field.name: getattr(block, field.name) for field in fields(block)}
    values["first"] += row
    for name, value in values.items():
        if name != "first" and value is not None:
            values[name] = value[one if name in by_row else tokens].copy()
    return CleanedBlock(**values)


def _hash(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()


def nearest(arm: CleanedArm, id: str) -> list[str]:
    """Ids like one, first by the pairs of letters they share, then letter by letter."""

    pairs = _pairs(id)

    def unlike(other: str) -> float:
        theirs = _pairs(other)
        return -2 * len(pairs & theirs) / max(len(pairs) + len(theirs), 1)

    ids = (other for block in read_blocks(arm.cleaned) for other in block.ids)
    close = heapq.nsmallest(_CANDIDATES, ids, key=unlike)
    return difflib.get_close_matches(id, close, n=_NEAREST, cutoff=0.0)


def _pairs(id: str) -> set[str]:
    return {id[i : i + 2] for i in range(len(id) - 1)}


# -- how they look --------------------------------------------------------------------------------


def legend(coloured: bool, unlearnt: bool) -> Text:
    """What the colours or marks mean; those of tokens to be unlearnt only where there are any."""
    text = Text()
    for kind in STYLES:
        if kind != "unlearnt" or unlearnt:
            text.append_text(_marked(kind, kind, coloured)).append("  ")
    return text.append(f"{NEWLINE} line break")


def kinds_of(sample: CleanedBlock) -> list[str]:
    """What became of each token, T of `STYLES`' keys."""
    kinds = np.full(len(sample.labels), "dropped", dtype=object)
    kinds[(sample.labels != NO_LOSS) & (sample.weight < 0)] = "unlearnt"
    kinds[sample.kept] = "kept"
    kinds[~sample.response] = "prompt"
    found: list[str] = kinds.tolist()
    return found


def heading(sample: CleanedBlock) -> str:
    """Id, source, round, how much was kept, and mean losses of the response."""
    kinds, number = kinds_of(sample), int(sample.rounds[0])
    total = len(kinds) - kinds.count("prompt")
    parts = [
        escaped(sample.ids[0]),
        f"source {escaped(sample.sources[0])}",
        f"round {number}" + ("" if number else " (not cleaned)"),
        f"{kinds.count('kept'):,} of {total:,} response tokens kept",
    ]
    if "unlearnt" in kinds:
        parts.append(f"{kinds.count('unlearnt'):,} to be unlearnt")
    means = []
    for name in ("base", "reference", "score"):
        values = getattr(sample, name)[sample.response]
        if (known := np.isfinite(values)).any():
            means.append(f"{name} {values[known].mean(dtype=np.float64):.3f}")
    if means:
        parts.append(f"mean {', '.join(means)} nats")
    return " | ".join(parts)


def tokens(texts: Sequence[str], kinds: Sequence[str], coloured: bool) -> Text:
    """A sample's text, neighbours of one kind together."""
    text = Text()
    for kind, pairs in groupby(zip(kinds, texts, strict=True), key=lambda pair: pair[0]):
        text.append_text(_marked("".join(t for _, t in pairs), kind, coloured))
    return text


def _marked(text: str, kind: str, coloured: bool) -> Text:
    if coloured:
        return Text(escaped(text), style=STYLES[kind])
    opening, closing = MARKS[kind]
    return Text(f"{opening}{escaped(text, marks=True)}{closing}" if text else "")


def escaped(text: str, marks: bool = False) -> str:
    """Text that can be printed, and from which the original can be told.

    A line break stays one, after `NEWLINE`; other characters that cannot be seen, and that one
    where the data have it, are escapes as in Python.

    Args:
        text: of the data.
        marks: it stands among marks, so that it must not read as one.
    """
    printable = [_escape(character) for character in text]
    for i, character in enumerate(text):
        # what follows at the end of a piece is not known
        after = printable[i + 1][0] if i + 1 < len(text) else ""
        if (character == "\\" and after in ("\\trxuU[{-=~" if marks else "\\trxuU")) or (
            marks
            and (
                (character in "[{" and after in "-=~")
                or (character in "-=~" and after and after in "]}")
            )
        ):
            printable[i] = "\\" + character
    return "".join(printable)


def _escape(character: str) -> str:
    if character == "\n":
        return NEWLINE + "\n"
    if character != NEWLINE and unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    if character in "\t\r":
        return {"\t": "\\t", "\r": "\\r"}[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def losses(sample: CleanedBlock, texts: Sequence[str], reasons: dict[str, str]) -> Table:
    """A line for every response token, in nats; columns that say nothing are left out."""
    numbers = {
        name: getattr(sample, name) for name in ("base", "reference", "score", "priority", "weight")
    }
    if np.isnan(sample.priority).all():
        del numbers["priority"]
    if (sample.weight == 1).all():
        del numbers["weight"]
    table = Table("place", "token", "id", *numbers, "reason", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "left" if column.header in ("token", "reason") else "right"
        column.no_wrap = column.header != "token"
    for place in np.flatnonzero(sample.response).tolist():
        # in quotes, so that blanks are seen; a line break does not break the line
        text = escaped(texts[place]).replace(NEWLINE + "\n", NEWLINE)
        values = [float(column[place]) for column in numbers.values()]
        code = str(int(sample.reason[place]))
        table.add_row(
            str(place),
            Text(f'"{text}"'),
            str(int(sample.input_ids[place])),
            *("-" if math.isnan(value) else f"{value:.4f}" for value in values),
            Text(escaped(reasons.get(code, f"code {code}"))),
        )
    return table
