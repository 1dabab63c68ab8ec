"""Texts with spans of characters to learn, for a tokenizer of one's own.

A row has ``text``, ``responses`` ([start, end) characters of each response, its EOS included) and
``spans`` ({start, end, kept} and, if wanted, weight, which tile the responses), or ``tokens``,
lists of the same, in their stead. The text is tokenised as a whole. A token that shares a character
with a response is a response token; it is learnt if it shares one with a span that is kept: on an
edge that another tokenizer does not cut at, too much is learnt rather than too little. The
exporter's own tokenizer gives its own tokens back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenclean.data.pretokenised import NO_LABEL, BadRow, Tokens

#: Columns of such a row.
COLUMNS = ("text", "responses", "spans")


@dataclass(frozen=True)
class SpannedText:
    """A text and what of it is to be learnt.

    Attributes:
        text: what is tokenised.
        responses: (start, end) characters of each response.
        spans: (start, end, weight) characters that carry loss.
        eos: text of the EOS that ends responses in ``text``; None: the tokenizer's own.
        add_special_tokens: whether the tokenizer puts around it what it puts around any text.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int, float], ...]
    eos: str | None = None
    add_special_tokens: bool = True


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
            raise BadRow(f"`responses`: {found!r} is not [start, end]")
        start, end = _extent(found[0], found[1], len(text), "responses", 0)
        if start < last:
            raise BadRow(f"`responses`: [{start}, {end}] begins before the last one ends")
        last = end
        if start < end:  # else tokens that decode to nothing, which no text gives back
            responses.append((start, end))
    for found in _spans(row):
        if not isinstance(found, Mapping) or type(found.get("kept")) is not bool:
            raise BadRow(f"`spans`: {found!r} is not an object with start, end and kept")
        start, end = _extent(found.get("start"), found.get("end"), len(text), "spans")
        if not any(a <= start and end <= b for a, b in responses):
            raise BadRow(f"`spans`: [{start}, {end}] lies in no response")
        weight = found.get("weight")
        if weight is None:
            weight = float(found["kept"])
        if type(weight) not in (int, float) or not np.isfinite(weight):
            raise BadRow(f"`spans`: the weight of [{start}, {end}] is {weight!r}")
        if found["kept"] or weight < 0:  # what is to be unlearnt is not kept, and carries loss
            spans.append((start, end, float(weight)))
    card = card or {}
    eos, special = card.get("eos"), card.get("add_special_tokens", True)
    return SpannedText(text, tuple(responses), tuple(spans), eos, bool(special))


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
        raise BadRow(f"`{name}`: {start!r} to {end!r} are no characters of a text of {size}")
    return start, end


def encode_spans(sample: SpannedText, tokenizer: Any) -> Tokens:
    """Tokens of a text, with what its spans say of them.

    Args:
        tokenizer: a fast one of transformers, with an EOS token.
    """
    sample, ends = _with_eos(sample, tokenizer.eos_token)
    ids, offsets = _encode(sample, ends, tokenizer)
    # A blank whose offsets were trimmed away ends where they stand.
    starts, stops = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]

    def touching(start: int, end: int) -> np.ndarray:
        found: np.ndarray = (starts < end) & (stops > start)
        return found

    response = np.zeros(len(ids), dtype=bool)
    for start, end in sample.responses:
        response |= touching(start, end)
    response[:1] = False
    weight = np.zeros(len(ids), dtype=np.float32)
    # On an edge the span that is learnt most has the last word.
    for start, end, value in sorted(sample.spans, key=lambda span: span[2]):
        weight[touching(start, end) & response] = value
    labels = np.where(weight != 0.0, ids, NO_LABEL).astype(np.int32)
    weight[labels == NO_LABEL] = 1.0
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
        shift = 0
        for end, by in edges:
            if place >= end:
                shift = by
            elif place > end - len(theirs):
                return end - len(theirs) + shift + (len(eos) if is_end else 0)
        return place + shift

    def both(start: int, end: int) -> tuple[int, int]:
        return shifted(start, False), shifted(end, True)

    return (
        SpannedText(
            "".join(parts),
            tuple(both(*found) for found in sample.responses),
            tuple((*both(start, end), weight) for start, end, weight in sample.spans),
            eos,
            sample.add_special_tokens,
        ),
        ends,
    )


def _encode(sample: SpannedText, ends: list[int], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32, (T,), and [start, end) characters, int64, (T, 2), of a text's tokens.

    A text that spells special tokens elsewhere than at the end of a response is taken literally,
    with the EOS put in by id, as it is where conversations are tokenised.
    """
    eos, text = str(tokenizer.eos_token), sample.text
    pieces, cursor = [], 0
    for end in ends:
        pieces.append((cursor, text[cursor:end]))
        cursor = end + len(eos)
    pieces.append((cursor, text[cursor:]))
    spelled = [str(token) for token in tokenizer.all_special_tokens]
    spelled += [str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    literal = sample.add_special_tokens and any(
        token in piece for token in spelled for _, piece in pieces
    )
    settings = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    if not literal:
        whole = tokenizer(text, add_special_tokens=sample.add_special_tokens, **settings)
        return (
            np.asarray(whole["input_ids"], np.int32),
            np.asarray(whole["offset_mapping"], np.int64).reshape(-1, 2),
        )
    around = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(around)) if around[i : i + len(bare)] == bare)
    ids: list[int] = list(around[:at])
    offsets: list[tuple[int, int]] = [(0, 0)] * at
    for number, (start, piece) in enumerate(pieces):
        if piece:
            part = tokenizer(piece, add_special_tokens=False, split_special_tokens=True, **settings)
            ids += part["input_ids"]
            offsets += [(a + start, b + start) for a, b in part["offset_mapping"]]
        if number < len(ends):
            ids.append(int(tokenizer.eos_token_id))
            offsets.append((ends[number], ends[number] + len(eos)))
    closing = around[at + len(bare) :]
    ids += closing
    offsets += [(0, 0)] * len(closing)
    return np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)
