"""Texts with spans of characters to learn, for a tokenizer of one's own.

A row has ``text``, ``responses`` ([start, end) characters of each response, its EOS included) and
``spans`` ({start, end, kept} and, if wanted, weight, which tile the responses), or ``tokens``,
lists of the same, in their stead. The text is tokenised as a whole. A token that shares a character
with a response is a response token; it is learnt if it shares one with a span that is kept: on an
edge that another tokenizer does not cut at, too much is learnt rather than too little. The
exporter's own tokenizer gives its own tokens back where the row says ``exact``.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenclean.data.pretokenised import NO_LOSS, BadRow, Tokens, shown

if TYPE_CHECKING:
    from tokenclean.data.template import Tokeniser

#: Columns of such a row.
COLUMNS = ("text", "responses", "spans")
#: Of weights: what is larger is infinite as a float32.
LARGEST = float(np.finfo(np.float32).max)
#: A role's tag of the Tulu layout, which begins a line and is all of it.
_TAG = re.compile(r"(?<![^\n])<\|(?:system|user|assistant)\|>(?![^\n])")


@dataclass(frozen=True)
class SpannedText:
    """A text and what of it is to be learnt.

    Attributes:
        text: what is tokenised.
        responses: (start, end) characters of each response.
        spans: (start, end, weight) characters that carry loss.
        eos: text of the EOS that ends responses in ``text``; None: the tokenizer's own.
        add_special_tokens: whether the tokenizer puts around it what it puts around any text.
        template: that ``text`` was rendered with; None: nobody says.
        tokenizer: fingerprint of the tokenizer that it was cut out with, if that is known.
        exact: whether that one gives its tokens back where ``text`` is simply tokenised.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int, float], ...]
    eos: str | None = None
    add_special_tokens: bool = True
    template: str | None = None
    tokenizer: str | None = None
    exact: bool | None = None

    def came_from(self, fingerprint: str) -> bool:
        """Whether it was cut out with the tokenizer of this fingerprint."""
        return self.tokenizer == fingerprint


def read_spans(row: Mapping[str, Any], card: Mapping[str, Any] | None) -> SpannedText:
    """A row's text and spans.

    Args:
        card: description of the export that it comes from, if that is known.

    Raises:
        BadRow: naming the span.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise BadRow(f"`text` is {'null' if text is None else type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"`text` is not valid Unicode at character {error.start}") from None
    for name in ("responses", "spans"):
        if not isinstance(row.get(name), list):
            raise BadRow(f"`{name}` is not a list")
    responses, spans = [], []
    last = 0
    for found in row["responses"]:
        if not isinstance(found, list) or len(found) != 2:
            raise BadRow(f"`responses`: {shown(found)} is not [start, end]")
        start, end = _extent(found[0], found[1], len(text), "responses", 0)
        if start < last:
            raise BadRow(f"`responses`: [{start}, {end}] begins before the last one ends")
        last = end
        if start < end:  # else tokens that decode to nothing, which no text gives back
            responses.append((start, end))
    for found in _spans(row):
        if not isinstance(found, Mapping) or type(found.get("kept")) is not bool:
            raise BadRow(f"`spans`: {shown(found)} is not an object with start, end and kept")
        start, end = _extent(found.get("start"), found.get("end"), len(text), "spans")
        at = bisect_right(responses, start, key=lambda response: response[0]) - 1
        if at < 0 or end > responses[at][1]:
            raise BadRow(f"`spans`: [{start}, {end}] lies in no response")
        weight = found.get("weight")
        if weight is None:
            weight = float(found["kept"])
        if type(weight) not in (int, float) or not abs(weight) <= LARGEST:
            raise BadRow(f"`spans`: the weight of [{start}, {end}] is {shown(weight)}")
        if found["kept"] or weight < 0:  # what is to be unlearnt is not kept, and carries loss
            spans.append((start, end, float(weight)))
    for (_, last, _), (start, end, _) in pairwise(sorted(spans)):
        if start < last:
            raise BadRow(f"`spans`: [{start}, {end}] begins before another one ends")
    exact = row.get("exact")
    if not isinstance(exact, bool | None):
        raise BadRow(f"`exact` is {shown(exact)}, neither true nor false")
    card = card or {}
    return SpannedText(
        text,
        tuple(responses),
        tuple(spans),
        card.get("eos"),
        bool(card.get("add_special_tokens", True)),
        card.get("template"),
        card.get("tokenizer"),
        exact,
    )


def _spans(row: Mapping[str, Any]) -> Iterator[Any]:
    """The row's spans, or where it has them token by token, those that own a character."""
    tokens = row.get("tokens")
    if not isinstance(tokens, Mapping):
        yield from row["spans"]
        return
    names = [name for name in ("start", "end", "kept", "weight") if name in tokens]
    lists = [tokens[name] for name in names]
    if len({len(x) if isinstance(x, list) else -1 for x in lists}) != 1 or len(names) < 3:
        raise BadRow("`tokens` is not an object of start, end and kept, lists of one length")
    for values in zip(*lists, strict=True):
        found = dict(zip(names, values, strict=True))
        if found["start"] != found["end"]:
            yield found


def _extent(start: Any, end: Any, size: int, name: str, least: int = 1) -> tuple[int, int]:
    if (
        type(start) is not int
        or type(end) is not int
        or not 0 <= start <= end - least <= size - least
    ):
        raise BadRow(
            f"`{name}`: {shown(start)} to {shown(end)} are no characters of a text of {size}"
        )
    return start, end


def encode_spans(sample: SpannedText, tokeniser: Tokeniser) -> Tokens:
    """Tokens of a text, with what its spans say of them.

    Args:
        tokeniser: whose tokenizer to use; the text has its template already.
    """
    sample, ends = _with_eos(sample, tokeniser.eos)
    ids, offsets = _encode(sample, ends, tokeniser)
    # A blank whose offsets were trimmed away ends where they stand.
    starts, stops = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]

    full = np.flatnonzero(stops > 0)  # not what the tokenizer puts around the text
    starts, stops = starts[full], stops[full]

    def touching(start: int, end: int) -> np.ndarray:
        first, stop = np.searchsorted(stops, start, "right"), np.searchsorted(starts, end, "left")
        return full[first:stop]

    response = np.zeros(len(ids), dtype=bool)
    for start, end in sample.responses:
        response[touching(start, end)] = True
    response[:1] = False
    weight = np.zeros(len(ids), dtype=np.float32)
    # On an edge the span that is learnt most has the last word.
    for start, end, value in sorted(sample.spans, key=lambda span: span[2]):
        weight[touching(start, end)] = value
    weight[~response] = 0.0
    labels = np.where(weight != 0.0, ids, NO_LOSS).astype(np.int32)
    weight[labels == NO_LOSS] = 1.0
    return Tokens(ids, response, labels, weight)


def _with_eos(sample: SpannedText, eos: str) -> tuple[SpannedText, list[int]]:
    """The sample with this EOS at the end of its responses, and where in the text each begins."""
    theirs = sample.eos or eos
    parts: list[str] = []
    ends: list[int] = []
    edges: list[tuple[int, int]] = []  # (where a replaced EOS ended, how far what follows moved)
    cursor = moved = 0
    for start, end in sample.responses:
        if end - start >= len(theirs) and sample.text.endswith(theirs, start, end):
            parts += [sample.text[cursor : end - len(theirs)], eos]
            ends.append(end - len(theirs) + moved)
            moved += len(eos) - len(theirs)
            cursor = end
            edges.append((end, moved))
    parts.append(sample.text[cursor:])
    if not moved and eos == theirs:
        return sample, ends

    def shifted(place: int, is_end: bool) -> int:
        """A place of the old text in the new one; one inside an EOS goes to its edge."""
        after = bisect_right(edges, place, key=lambda edge: edge[0])
        shift = edges[after - 1][1] if after else 0
        if after < len(edges) and place > edges[after][0] - len(theirs):
            return edges[after][0] - len(theirs) + shift + (len(eos) if is_end else 0)
        return place + shift

    def both(start: int, end: int) -> tuple[int, int]:
        return shifted(start, False), shifted(end, True)

    return (
        replace(
            sample,
            text="".join(parts),
            responses=tuple(both(*found) for found in sample.responses),
            spans=tuple((*both(start, end), weight) for start, end, weight in sample.spans),
            eos=eos,
        ),
        ends,
    )


def _encode(
    sample: SpannedText, ends: list[int], tokeniser: Tokeniser
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32, (T,), and [start, end) characters, int64, (T, 2), of a text's tokens.

    A text that spells special tokens elsewhere than in a role's tag or at the end of a response is
    taken literally, with the EOS put in by id, as it is where conversations are tokenised; unless
    its exporter, with this very tokenizer, found that it gives its tokens back as it is.
    """
    tokenizer = tokeniser.tokenizer
    settings = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    literal = sample.add_special_tokens and _spells_special(sample, ends, tokeniser)
    if literal and sample.exact and sample.came_from(tokeniser.tokenizer_fingerprint):
        literal = False
    if not literal:
        whole = tokenizer(sample.text, add_special_tokens=sample.add_special_tokens, **settings)
        return (
            np.asarray(whole["input_ids"], np.int32),
            np.asarray(whole["offset_mapping"], np.int64).reshape(-1, 2),
        )
    ids: list[int] = list(tokeniser.prefix)
    offsets: list[tuple[int, int]] = [(0, 0)] * len(ids)
    cursor = 0
    for end in [*ends, len(sample.text)]:
        if piece := sample.text[cursor:end]:
            part = tokenizer(piece, add_special_tokens=False, split_special_tokens=True, **settings)
            ids += part["input_ids"]
            offsets += [(a + cursor, b + cursor) for a, b in part["offset_mapping"]]
        cursor = end
        if end < len(sample.text):
            cursor += len(tokeniser.eos)
            ids.append(tokeniser.eos_id)
            offsets.append((end, cursor))
    ids += tokeniser.suffix
    offsets += [(0, 0)] * len(tokeniser.suffix)
    return np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)


def _inside(place: int, responses: tuple[tuple[int, int], ...]) -> bool:
    at = bisect_left(responses, place + 1, key=lambda response: response[0]) - 1
    return at >= 0 and place < responses[at][1]


def refusal(sample: SpannedText, tokeniser: Tokeniser) -> str | None:
    """Why a text is not wanted, or None: see ``special_text`` of `Tokeniser`."""
    if tokeniser.special_text == "refuse":
        sample, ends = _with_eos(sample, tokeniser.eos)
        if _spells_special(sample, ends, tokeniser):
            return "`text` spells a special token outside of its tags and ends"
    return None


def _spells_special(sample: SpannedText, ends: list[int], tokeniser: Tokeniser) -> bool:
    """Whether the content of a text does, that is all but the roles' tags and the responses' EOS.

    A tokenizer may have the tags as special tokens (Phi-3's way), and a conversation then has them,
    too.
    """
    cuts = [(end, end + len(tokeniser.eos)) for end in ends]
    if sample.template in (None, "tulu"):
        cuts += [
            (tag.start(), tag.end())
            for tag in _TAG.finditer(sample.text)
            if not _inside(tag.start(), sample.responses)
        ]
    cursor = 0
    for start, end in [*sorted(cuts), (len(sample.text), 0)]:
        piece = sample.text[cursor:start]
        if any(token in piece for token in tokeniser.specials):
            return True
        cursor = end
    return False
