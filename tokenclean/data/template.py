"""Conversations to tokens: the Tulu layout, with response tokens found by character offsets.

    <|system|>\\n{text}\\n      <|user|>\\n{text}\\n      <|assistant|>\\n{text}{eos}\\n

Every content is stripped, and so is the joined text (arXiv 2502.01968, appendix D.3). The text is
tokenised once, as a whole. Response tokens are the tokens that cover assistant content and its
EOS: never BOS, never a role tag, never the newline after EOS. Each response is decoded again and
compared with the text it came from.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tokenclean.data.formats import Message, Sample
from tokenclean.data.pretokenised import shown

TemplateName = Literal["tulu", "raw", "chat"]
#: What becomes of text that spells a special token: it stays text, or its row is a bad line.
SpecialText = Literal["text", "refuse"]
#: Characters of a text that an error quotes.
_QUOTED = 200
#: Part of every fingerprint: raise it when rendering or the response rule changes.
TEMPLATE_VERSION = 2


@dataclass
class Rendered:
    """A conversation as one text.

    Attributes:
        text: what is tokenised.
        responses: (start, end) characters of each assistant content with its EOS.
        contents: for each message, the (start, end) characters of its stripped content in
            ``text``, and how many characters were stripped from its left: what truth spans need.
    """

    text: str
    responses: list[tuple[int, int]]
    contents: list[tuple[int, int, int]]


@dataclass
class TokenisedSample:
    """T tokens of one sample, cut at ``max_length``.

    Attributes:
        input_ids: int32, shape (T,).
        response_mask: bool, shape (T,).
        truth: int8, shape (T,), or None; 1 informative, 0 uninformative, -1 corrupted; 0 on tokens
            that are no response tokens.
        full_length: tokens before truncation.
        response_tokens: before truncation.
        labels, weight: int32 and float32, shape (T,), of a sample that says itself what is to be
            learnt; else None.
    """

    input_ids: np.ndarray
    response_mask: np.ndarray
    truth: np.ndarray | None
    full_length: int
    response_tokens: int
    labels: np.ndarray | None = None
    weight: np.ndarray | None = None


def render_tulu(messages: Sequence[Message], eos: str) -> Rendered:
    """The Tulu text of a conversation and its response spans."""
    parts: list[str] = []
    responses: list[tuple[int, int]] = []
    contents: list[tuple[int, int, int]] = []
    length = 0
    for message in messages:
        header = f"<|{message.role}|>\n"
        content = message.content.strip()
        start = length + len(header)
        end = start + len(content)
        contents.append((start, end, _left_blank(message.content)))
        tail = eos + "\n" if message.role == "assistant" else "\n"
        if message.role == "assistant":
            responses.append((start, end + len(eos)))
        parts += [header, content, tail]
        length = end + len(tail)
    # Every text begins with a tag, so only the end can be stripped.
    return Rendered("".join(parts).rstrip(), responses, contents)


def render_raw(messages: Sequence[Message], eos: str) -> Rendered:
    """Contents joined as they are, EOS after each assistant turn: for completion-style data."""
    parts: list[str] = []
    responses: list[tuple[int, int]] = []
    contents: list[tuple[int, int, int]] = []
    length = 0
    for message in messages:
        tail = eos if message.role == "assistant" else ""
        end = length + len(message.content) + len(tail)
        contents.append((length, end - len(tail), 0))
        if message.role == "assistant":
            responses.append((length, end))
        parts += [message.content, tail]
        length = end
    return Rendered("".join(parts), responses, contents)


def _left_blank(text: str) -> int:
    return len(text) - len(text.lstrip()) if text.strip() else 0


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after any text by itself, e.g. BOS in front."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


class Tokeniser:
    """A tokenizer together with a template: samples in, verified tokens out.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed) with an EOS token.
        template: ``tulu``; ``raw`` (contents joined without tags); ``chat`` (the tokenizer's own
            chat template).
        max_length: tokens kept from the left, T.
        special_text: what `refusal` says of a text that spells a special token.

    Attributes:
        specials: texts of the tokenizer's special tokens.
        prefix, suffix: ids that the tokenizer puts around any text, see `surroundings`.

    Raises:
        ValueError: if the tokenizer lacks offsets, an EOS token, or a chat template asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: TemplateName = "tulu",
        max_length: int = 2048,
        special_text: SpecialText = "text",
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                "data.tokenizer: a fast tokenizer is needed, since response tokens are found by "
                "character offsets; save one with `tokenizer.json`"
            )
        if tokenizer.eos_token is None:
            raise ValueError("data.tokenizer: it has no EOS token, which ends every response")
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("data.template: chat needs a tokenizer with a chat template")
        if max_length < 2:
            raise ValueError(f"data.max_length: {max_length} leaves no room for a response")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.special_text = special_text
        self.eos: str = tokenizer.eos_token
        self.eos_id: int = tokenizer.eos_token_id
        self.specials = sorted(
            {str(t) for t in tokenizer.all_special_tokens}
            | {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        )
        self.prefix, self.suffix = surroundings(tokenizer)
        self._unknown: int | None = tokenizer.unk_token_id
        ids = tokenizer.convert_tokens_to_ids(self.specials)
        #: special token -> its id, where the vocabulary has it
        self._ids: dict[str, int] = {
            token: number
            for token, number in zip(self.specials, ids, strict=True)
            if number is not None and (number != self._unknown or token == tokenizer.unk_token)
        }
        self._is_special = np.zeros(1 + max(self._ids.values()), dtype=bool)
        self._is_special[list(self._ids.values())] = True

    @cached_property
    def _spelling(self) -> re.Pattern[str]:
        """A special token where the tokenizer finds one: of several, the longest."""
        longest = sorted(self._ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest)))

    @cached_property
    def _greedy(self) -> tuple[set[str], set[str]]:
        """Special tokens that take along the blanks before them, and those after them."""
        added = self.tokenizer.added_tokens_decoder.values()
        return {t.content for t in added if t.lstrip}, {t.content for t in added if t.rstrip}

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Content hash of the tokenizer by itself, see `fingerprint_tokenizer`."""
        return fingerprint_tokenizer(self.tokenizer)

    def fingerprint(self) -> str:
        """Content hash of everything that decides the tokens of a text."""
        layout = self.tokenizer.chat_template if self.template == "chat" else ""
        refusing = () if self.special_text == "text" else (self.special_text,)
        return fingerprint_tokenizer(
            self.tokenizer, self.template, self.max_length, layout, *refusing
        )

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Why a conversation is not wanted, or None: see ``special_text``."""
        if self.special_text == "refuse":
            for number, message in enumerate(messages):
                if (token := self.spelled(message.content)) is not None:
                    return f"messages[{number}] spells the special token {shown(token)}"
        return None

    def spelled(self, text: str) -> str | None:
        """A special token that a text spells, if it does."""
        return next((token for token in self.specials if token in text), None)

    def __call__(self, samples: Sequence[Sample]) -> list[TokenisedSample]:
        """Tokenise a batch of samples.

        Raises:
            ValueError: if a response does not decode to its own text; both are printed.
        """
        rendered = [self._render(s) for s in samples]
        plain = [i for i, s in enumerate(samples) if not self._spells_special(s.messages)]
        encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if plain:
            batch = self.tokenizer(
                [rendered[i].text for i in plain],
                add_special_tokens=self.template != "chat",
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, ids, offsets in zip(
                plain, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                found = np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)
                if not self._parsed_content(rendered[i], *found):
                    encoded[i] = found
        for i in set(range(len(samples))) - encoded.keys():
            encoded[i] = self._encode_literally(rendered[i])
        results = []
        for i, sample in enumerate(samples):
            ids, offsets = encoded[i]
            spans = _covering(offsets, rendered[i].responses, rendered[i].text)
            self._verify(sample, rendered[i], ids, offsets, spans)
            results.append(self._finish(sample, rendered[i], ids, offsets, spans))
        return results

    def _render(self, sample: Sample) -> Rendered:
        if self.template == "tulu":
            return render_tulu(sample.messages, self.eos)
        if self.template == "raw":
            return render_raw(sample.messages, self.eos)
        return self._render_chat(sample)

    def _render_chat(self, sample: Sample) -> Rendered:
        text = self._chat_text(sample, [m.content for m in sample.messages])
        # Rendered once more with marks for contents, to learn what the template puts between them:
        # searching for a short content would find it inside a role's name.
        marks = [f"\ue000{number}\ue001" for number in range(len(sample.messages))]
        frame = self._chat_text(sample, marks)
        between: list[str] = []
        cursor = 0
        for mark, message in zip(marks, sample.messages, strict=True):
            if (at := frame.find(mark, cursor)) < 0:
                raise ValueError(
                    f"data.template: the chat template drops or moves {message.role} turns of "
                    f"sample {shown(sample.id)}. Use the tulu template"
                )
            between.append(frame[cursor:at])
            cursor = at + len(mark)
        between.append(frame[cursor:])
        responses, contents, cursor = [], [], len(between[0])
        for message, after in zip(sample.messages, between[1:], strict=True):
            stripped = message.content.strip()
            # Some templates strip contents, some do not.
            if text.startswith(message.content + after, cursor):
                end, left = cursor + len(message.content), 0
            elif text.startswith(stripped + after, cursor):
                end, left = cursor + len(stripped), _left_blank(message.content)
            else:
                raise ValueError(
                    "data.template: the chat template changes the text of sample "
                    f"{shown(sample.id)}; looked for {stripped[:_QUOTED]!r} in "
                    f"{text[cursor : cursor + _QUOTED]!r}. Use the tulu template"
                )
            contents.append((cursor, end, left))
            if message.role == "assistant":
                closing = max(
                    (t for t in self.specials if text.startswith(t, end)), key=len, default=""
                )
                responses.append((cursor, end + len(closing)))
            cursor = end + len(after)
        return Rendered(text, responses, contents)

    def _chat_text(self, sample: Sample, contents: Sequence[str]) -> str:
        turns = [
            {"role": message.role, "content": content}
            for message, content in zip(sample.messages, contents, strict=True)
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # of whatever kind: a template is a program
            raise ValueError(
                f"data.template: the chat template does not take sample {shown(sample.id)}: "
                f"{str(error)[:_QUOTED]}. Use the tulu template"
            ) from error
        return text

    def _spells_special(self, messages: Sequence[Message]) -> bool:
        return any(self.spelled(m.content) is not None for m in messages)

    def _parsed_content(self, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> bool:
        """Whether the tokenizer took something of a content for a special token after all.

        Two contents may spell one together, or a normaliser may make one of what is none.
        """
        inside = ids < len(self._is_special)
        inside[inside] = self._is_special[ids[inside]]
        stops = [stop for _, stop, _ in rendered.contents]
        for token in np.flatnonzero(inside).tolist():
            start, end = offsets[token].tolist()
            text = rendered.text[start:end]
            if not text.strip() or (
                ids[token] == self._unknown and text.strip() != self.tokenizer.unk_token
            ):
                continue
            # Blanks that a token takes along make no special token of a content.
            start += len(text) - len(text.lstrip())
            end -= len(text) - len(text.rstrip())
            at = bisect_right(stops, start)
            while at < len(stops) and rendered.contents[at][0] == stops[at]:
                at += 1  # nothing lies in an empty content
            if at < len(stops) and rendered.contents[at][0] < end:
                return True
        return False

    def _encode_literally(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a text whose content spells special tokens: as plain text, the template's own
        special tokens put in by id."""
        around = ([], []) if self.template == "chat" else (self.prefix, self.suffix)
        ids: list[int] = list(around[0])
        offsets: list[tuple[int, int]] = [(0, 0)] * len(ids)
        cursor = 0
        end = len(rendered.text)
        for start, stop, special in [*self._own_specials(rendered), (end, end, None)]:
            if piece := rendered.text[cursor:start]:
                part = self.tokenizer(
                    piece,
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                    verbose=False,
                )
                ids += part["input_ids"]
                offsets += [(s + cursor, e + cursor) for s, e in part["offset_mapping"]]
            cursor = stop
            if special is not None:
                ids.append(special)
                offsets.append((start, stop))
        ids += around[1]
        offsets += [(0, 0)] * len(around[1])
        return np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def _own_specials(self, rendered: Rendered) -> Iterator[tuple[int, int, int]]:
        """Special tokens that the template put between contents: [start, stop) and id.

        Of the Tulu and raw layouts these are the responses' EOS; a chat template has more.
        """
        if self.template != "chat":
            for _, end in rendered.responses:
                yield end - len(self.eos), end, self.eos_id
            return
        text, cursor = rendered.text, 0
        before, after = self._greedy
        for first, last, _ in [*rendered.contents, (len(text), len(text), 0)]:
            for found in self._spelling.finditer(text, cursor, max(first, cursor)):
                token, (start, stop) = found.group(), found.span()
                while token in before and start > cursor and text[start - 1].isspace():
                    start -= 1
                while token in after and stop < len(text) and text[stop].isspace():
                    stop += 1
                yield start, stop, self._ids[token]
                cursor = stop
            cursor = max(last, cursor)

    def _verify(
        self,
        sample: Sample,
        rendered: Rendered,
        ids: np.ndarray,
        offsets: np.ndarray,
        spans: list[np.ndarray],
    ) -> None:
        unknown = self.tokenizer.unk_token_id
        for (start, end), tokens in zip(rendered.responses, spans, strict=True):
            want = rendered.text[start:end]
            got = self._decode(ids[tokens])
            if got == want:
                continue
            if unknown is not None and (ids[tokens] == unknown).any():
                # An unknown token cannot be decoded; compare what lies between.
                want = _blank_unknown(rendered.text, start, end, ids, offsets, tokens, unknown)
                got = got.replace(self.tokenizer.unk_token, "")
            # Some tokenizers normalise Unicode before they cut (NFC, NFKC), and SentencePiece ones
            # lose or add the blank at the very start of a decoded piece.
            if _normal(got) != _normal(want):
                raise ValueError(
                    f"sample {shown(sample.id)}: the response tokens do not decode to their own "
                    f"text\n  text:    {_around(want, got)}\n  decoded: {_around(got, want)}\n"
                    "The tokenizer changes text or cuts across the response's edge; use another "
                    "tokenizer or template"
                )

    def _decode(self, ids: np.ndarray) -> str:
        # The wrapper around this call takes three times as long as the call.
        backend = self.tokenizer.backend_tokenizer
        text: str = backend.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def _finish(
        self,
        sample: Sample,
        rendered: Rendered,
        ids: np.ndarray,
        offsets: np.ndarray,
        spans: list[np.ndarray],
    ) -> TokenisedSample:
        mask = np.zeros(len(ids), dtype=bool)
        for tokens in spans:
            mask[tokens] = True
        mask[:1] = False  # nothing precedes the first token, so nothing can predict it
        truth = None
        if sample.truth is not None:
            labels = np.ones(len(rendered.text), dtype=np.int8)
            for message, start, end, label in sample.truth:
                first, last, stripped = rendered.contents[message]
                low = min(first + max(start - stripped, 0), last)
                high = min(first + max(end - stripped, 0), last)
                labels[low:high] = np.minimum(labels[low:high], label)
            # A token takes the worst label among its characters: -1 < 0 < 1.
            corrupted, idle = (
                np.concatenate([[0], np.cumsum(labels == label)]) for label in (-1, 0)
            )
            # A blank whose offsets were trimmed away ends where they stand.
            starts, ends = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
            worst = np.where(idle[ends] > idle[starts], 0, 1)
            worst[corrupted[ends] > corrupted[starts]] = -1
            truth = np.where(mask, worst, 0).astype(np.int8)
        cut = slice(0, self.max_length)
        return TokenisedSample(
            input_ids=ids[cut],
            response_mask=mask[cut],
            truth=None if truth is None else truth[cut],
            full_length=len(ids),
            response_tokens=int(mask.sum()),
        )


def _covering(offsets: np.ndarray, spans: Sequence[tuple[int, int]], text: str) -> list[np.ndarray]:
    """For each span, indices of the tokens that share a character with it, and of all between them.

    Some byte-level tokenizers (GPT-NeoX's) trim blanks from offsets: a token that is nothing but
    blanks then covers no character, and has the one that it ends behind.

    Args:
        offsets: [start, end) characters of each token, ascending where they hold any; (T, 2).
    """
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    for token in np.flatnonzero((starts == ends) & (ends > 0)).tolist():
        end = int(ends[token])
        # not one that stands for no character, as SentencePiece's blank in front of a text
        if text[end - 1].isspace() and (token == 0 or ends[token - 1] < end):
            starts[token] = end - 1
    full = np.flatnonzero(ends > starts)
    starts, ends = starts[full], ends[full]
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    firsts = np.searchsorted(ends, edges[:, 0], side="right")
    stops = np.searchsorted(starts, edges[:, 1], side="left")
    nothing = np.zeros(0, dtype=np.int64)
    return [
        np.arange(full[first], full[stop - 1] + 1) if first < stop else nothing
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True)
    ]


def _blank_unknown(
    text: str,
    start: int,
    end: int,
    ids: np.ndarray,
    offsets: np.ndarray,
    tokens: np.ndarray,
    unknown: int,
) -> str:
    keep = np.ones(end - start, dtype=bool)
    for t in tokens[ids[tokens] == unknown]:
        keep[max(offsets[t, 0] - start, 0) : offsets[t, 1] - start] = False
    return "".join(c for c, kept in zip(text[start:end], keep, strict=True) if kept)


def _around(text: str, other: str) -> str:
    """A text as Python writes it, cut to where it begins to differ from another."""
    if len(text) <= _QUOTED:
        return repr(text)
    differs = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    first = next(differs, min(len(text), len(other)))
    start = max(0, min(first - _QUOTED // 2, len(text) - _QUOTED))
    cut = repr(text[start : start + _QUOTED])
    return f"{'...' if start else ''}{cut}{'...' if start + _QUOTED < len(text) else ''}"


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


def fingerprint_tokenizer(tokenizer: Any, *extra: object) -> str:
    """Hash of the tokenizer's content and special ids (not of its name or path)."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are left over from the latest call; they decide no token.
    content = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
    parts = [
        json.dumps(content, ensure_ascii=False),
        json.dumps({k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}),
        json.dumps([TEMPLATE_VERSION, *map(str, extra)]),
    ]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash of the token-to-id map: what base, reference and pool must share."""
    items = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(items.encode()).hexdigest()[:16]
