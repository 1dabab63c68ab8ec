"""Kinds of tokens by what they read as, looked up by id: one decode per entry of the vocabulary.

Every token is of exactly one kind, the first that applies:

special       its id is one of the tokenizer's special tokens, the end of the sequence among them
code          its first character other than a blank stands in a fenced block of the response: from
              a line that begins with three or more backticks or tildes to the line that closes it,
              both included, or to the end of the response
whitespace    blanks alone, or nothing
word start    it holds a letter, and the letter before which it begins is no further letter of a
              word: it has a blank or a mark before its first letter, or the token before it does
              not end in a letter or a digit
continuation  every other token with a letter
digit         a digit or another number, and no letter
punctuation   what is left

A token's text is what it adds behind a letter, so that the blank that belongs to a word stands in
it for tokenizers of either family (byte-level, or words that begin with U+2581). Bytes that are no
whole character count as letters. Marks that combine with letters (Unicode M) do, too.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.pieces import decode

TYPES: Final = (
    "word start", "continuation", "digit", "punctuation", "whitespace", "code", "special"
)  # fmt: skip
_START, _CONTINUATION, _DIGIT, _PUNCTUATION, _WHITESPACE, _CODE, _SPECIAL = range(len(TYPES))
_FENCE: Final = re.compile(r"^[^\S\n]*(`{3,}|~{3,})([^\n]*)$", flags=re.M)
#: What a decoder gives for bytes that are no whole character.
_BROKEN: Final = "\ufffd"
#: A byte as vocabularies with a fallback to bytes write it.
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The texts of tokens and what follows from them, each found out when first asked for.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = frozenset(int(i) for i in tokenizer.all_special_ids)
        self._anchor = [int(i) for i in tokenizer.encode("a", add_special_tokens=False)][-1:]
        self._before = decode(tokenizer, self._anchor)
        self._texts: dict[int, str] = {}
        # by id: the kind as far as its text says it, -1 where nobody asked; whether its first
        # letter may go on with a word; whether it ends within one; whether it may be of a fence
        self._kinds = np.full(0, -1, dtype=np.int8)
        self._joins = np.zeros(0, dtype=bool)
        self._ends = np.zeros(0, dtype=bool)
        self._fences = np.zeros(0, dtype=bool)

    def text(self, id: int) -> str:
        """What a token reads as behind a letter."""
        if id not in self._texts:
            both = decode(self._tokenizer, [*self._anchor, id])
            follows = both.startswith(self._before)
            self._texts[id] = (
                both[len(self._before) :] if follows else decode(self._tokenizer, [id])
            )
        return self._texts[id]

    def shown(self, id: int) -> str:
        """`visible` text of a token; bytes that are no whole character as ``\\xe2``."""
        text = self.text(id)
        if _BROKEN not in text:
            return visible(text)
        piece = str(self._tokenizer.convert_ids_to_tokens(id))
        if found := _BYTE.fullmatch(piece):
            raw = bytes([int(found[1], 16)])
        elif all(c in _PIECE_BYTES for c in piece):
            raw = bytes(_PIECE_BYTES[c] for c in piece)
        else:
            return visible(text)
        return visible(raw.decode("utf-8", errors="backslashreplace"))

    def types(self, block: CleanedBlock) -> np.ndarray:
        """Index into `TYPES` of each token of a block: int8, shape (n,).

        Tokens outside the response are never code.
        """
        ids = block.input_ids
        self._learn(ids)
        kinds: np.ndarray = self._kinds[ids]
        within = np.zeros(len(ids), dtype=bool)  # the token before ends within a word
        within[1:] = self._ends[ids[:-1]]
        within[block.position == 0] = False
        kinds[(kinds == _START) & self._joins[ids] & within] = _CONTINUATION
        for turn in self._fenced(block):
            inside = self._inside(ids[turn])
            part = kinds[turn]
            part[inside & (part != _SPECIAL)] = _CODE
            kinds[turn] = part
        return kinds

    def _learn(self, ids: np.ndarray) -> None:
        """Look at ids that were not seen before."""
        size = int(ids.max(initial=-1)) + 1
        if (more := size - len(self._kinds)) > 0:
            self._kinds = np.concatenate([self._kinds, np.full(more, -1, dtype=np.int8)])
            none = np.zeros(more, dtype=bool)
            self._joins = np.concatenate([self._joins, none])
            self._ends = np.concatenate([self._ends, none])
            self._fences = np.concatenate([self._fences, none])
        unknown = np.zeros(len(self._kinds), dtype=bool)
        unknown[ids] = True
        unknown &= self._kinds < 0
        for id in np.flatnonzero(unknown).tolist():
            text = self.text(id)
            self._kinds[id] = _SPECIAL if id in self._special else _kind(text)
            if id not in self._special:
                self._joins[id] = _is_letter(text[:1])
                self._ends[id] = _is_letter(text[-1:]) or text[-1:].isnumeric()
                self._fences[id] = "`" in text or "~" in text

    def _fenced(self, block: CleanedBlock) -> list[slice]:
        """Turns that have three marks of a fence or the tokens for them."""
        marks = self._fences[block.input_ids] & block.response
        if not marks.any():
            return []
        starts, stops = turn_bounds(block)
        # a single token may be a whole fence
        counts = np.concatenate([[0], np.cumsum(marks)])
        found = np.flatnonzero(counts[stops] > counts[starts])
        return [slice(int(starts[i]), int(stops[i])) for i in found]

    def _inside(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens of one turn stand in a fenced block: bool, shape (t,)."""
        texts = ["" if i in self._special else self.text(i) for i in ids.tolist()]
        spans = fenced_spans("".join(texts))
        inside = np.zeros(len(texts), dtype=bool)
        if not spans:
            return inside
        first = start = 0
        for i, text in enumerate(texts):
            first = start + len(text) - len(text.lstrip()) if text.strip() else start
            inside[i] = any(low <= first < high for low, high in spans)
            start += len(text)
        return inside


def fenced_spans(text: str) -> list[tuple[int, int]]:
    """Where fenced blocks begin and end, fences included; the last may be open to the end."""
    spans: list[tuple[int, int]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        mark, rest = fence.groups()
        if opened is None:
            if mark[0] == "~" or "`" not in rest:  # else it is code within a line
                opened = fence
        elif mark.startswith(opened.group(1)) and not rest.strip():
            spans.append((opened.start(), fence.end()))
            opened = None
    if opened is not None:
        spans.append((opened.start(), len(text)))
    return spans


def turn_bounds(block: CleanedBlock) -> tuple[np.ndarray, np.ndarray]:
    """Where assistant turns begin and end in a block, in order: int64, shape (turns,) each.

    A turn is a run of response tokens of one row.
    """
    response = block.response
    first = response.copy()
    first[1:] &= ~response[:-1] | (block.position[1:] == 0)
    last = response.copy()
    last[:-1] &= ~response[1:] | (block.position[1:] == 0)
    return np.flatnonzero(first), np.flatnonzero(last) + 1


def visible(text: str) -> str:
    """A token's text with its blanks to be seen, and nothing in it that steers a display."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(
        marks.get(c) or (c if c.isprintable() and not c.isspace() else f"⟨U+{ord(c):04X}⟩")
        for c in text
    )


def _piece_bytes() -> dict[str, int]:
    """Characters that byte-level vocabularies write bytes as: themselves, or from U+0100 on."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}


def _kind(text: str) -> int:
    """A kind by the text alone: of letters `_START`, whatever stood before."""
    if not text.strip():
        return _WHITESPACE
    if any(map(_is_letter, text)):
        return _START
    if any(unicodedata.category(c)[0] == "N" for c in text):
        return _DIGIT
    return _PUNCTUATION


def _is_letter(character: str) -> bool:
    if not character:
        return False
    return character == _BROKEN or unicodedata.category(character)[0] in "LM"


_PIECE_BYTES: Final = _piece_bytes()
