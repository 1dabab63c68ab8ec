"""What each token of a planted response is: more than its truth says, read off its text.

The pool says which tokens are noise, not which noise; and of the others not which state the answer.
Both follow from the sentences, since the generator's are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.pieces import token_texts
from tokenclean.data.planted import (
    BOILERPLATE_FIRST,
    BOILERPLATE_LAST,
    CORRUPTED,
    LEDGERS,
    REGIMES,
    TALES,
    world,
)

#: ``value`` is the answer itself, ``frame`` the rest of its sentence, ``end`` the end-of-sequence
#: token; these three are informative. ``corrupted`` is a wrong value. The others are sentences that
#: do not belong there; ``fact`` answers a question that nobody asked.
KINDS: Final = ("value", "frame", "end", "corrupted", "boilerplate", "tale", "fact", "ledger")

#: Kinds that a family's regime says more of, one row per regime; the others are one row each.
BY_REGIME: Final = ("value", "frame", "corrupted")
KIND_ROWS: Final = tuple(
    row
    for kind in KINDS
    for row in (
        [f"{kind}, {regime}" for regime in dict.fromkeys(REGIMES.values())]
        if kind in BY_REGIME
        else [kind]
    )
)

_SENTENCE: Final = re.compile(r"\S[^.]*\.?")


def pool_kinds(pool: CleanedPool, tokenizer: Any) -> dict[str, np.ndarray]:
    """Id of each sample of a planted pool -> its response tokens' rows in `KIND_ROWS`, int8 (n,).

    Args:
        pool: a cleaned pool with truth, whose sources are families.
        tokenizer: that of its base.
    """
    input_ids, truth = pool.lists("input_ids"), pool.lists("truth")
    response = pool.lists("response_mask")
    rows_of = {
        family: np.array(
            [KIND_ROWS.index(f"{k}, {regime}" if k in BY_REGIME else k) for k in KINDS], np.int8
        )
        for family, regime in REGIMES.items()
    }
    found = {}
    for row, (id, family) in enumerate(zip(pool.values("id"), pool.values("source"), strict=True)):
        at = np.flatnonzero(response[row])
        # turns: response tokens that follow each other
        parts = [
            token_kinds(
                token_texts(tokenizer, input_ids[row][turn].tolist()),
                truth[row][turn],
                family,
                ends=bool(input_ids[row][turn[-1]] == pool.manifest["eos_id"]),
            )
            for turn in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
            if len(turn)
        ]
        kinds = np.concatenate([np.zeros(0, np.int8), *parts])
        found[id] = rows_of[family][kinds]
    return found


def token_kinds(texts: Sequence[str], truth: np.ndarray, family: str, ends: bool) -> np.ndarray:
    """Kinds of the tokens of one response of a planted pool.

    Args:
        texts: what each token adds to the response's text, n of them.
        truth: planted labels, shape (n,).
        family: of the sample.
        ends: whether the last token is the end of the sequence.

    Returns:
        Indices into `KINDS`, int8, shape (n,).
    """
    words = texts[:-1] if ends else texts
    text = "".join(words)
    at = np.full(len(text) + 1, -1, dtype=np.int64)  # sentence of each character
    sentences = list(_SENTENCE.finditer(text))
    for number, sentence in enumerate(sentences):
        at[sentence.start() : sentence.end()] = number
    kinds = np.full(len(texts), KINDS.index("end"), dtype=np.int8)
    start = 0
    for i, word in enumerate(words):
        # a token belongs where its first character other than a blank stands
        first = start + len(word) - len(word.lstrip())
        start += len(word)
        kind = "frame"
        if truth[i] == CORRUPTED:
            kind = "corrupted"
        elif at[first] >= 0:
            sentence = sentences[at[first]]
            if truth[i] != 1:
                kind = noise_kind(sentence.group())
            elif (value := _value(sentence.group(), family)) is not None:
                low, high = (sentence.start() + place for place in value)
                kind = "value" if low <= first < high else "frame"
        elif truth[i] != 1:
            kind = "fact"
        kinds[i] = KINDS.index(kind)
    return kinds


@cache
def noise_kind(sentence: str) -> str:
    """Which kind of uninformative sentence this is."""
    if sentence in BOILERPLATE_FIRST or sentence in BOILERPLATE_LAST:
        return "boilerplate"
    for kind, templates in (("tale", TALES), ("ledger", LEDGERS)):
        if any(_pattern(template).fullmatch(sentence) for template in templates):
            return kind
    return "fact"


@cache
def _value(sentence: str, family: str) -> tuple[int, int] | None:
    """Where in an answer of the family its value stands; None if it is no such answer."""
    for frame in world().families[family].answers:
        if (found := _pattern(frame).fullmatch(sentence)) is not None:
            return found.span("value")
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{\w+\}", template)
    slots = re.findall(r"\{(\w+)\}", template)
    text = re.escape(pieces[0])
    for slot, piece in zip(slots, pieces[1:], strict=True):
        text += ("(?P<value>.+)" if slot == "value" else ".+") + re.escape(piece)
    return re.compile(text)
