"""Conversations of odd text through odd tokenizers: what is a response token, and what is not.

With a tokenizer that gives texts back, all tokens must decode to the rendered text, the response
tokens to the responses, and no special token may stand where a content merely spells one. With one
that changes texts, a response decodes to its own text but for what it changes, or it is refused.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from hypothesis import strategies as st

from scripts.fuzz_cases import EXACT, LOSSY, Stream, texts
from tokenclean.data.formats import Message, Sample
from tokenclean.data.template import TemplateName, Tokeniser, render_raw, render_tulu

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """Conversations that are tokenised together."""

    tokenizer: str
    template: TemplateName
    batch: tuple[Turns, ...]


def _setups() -> list[tuple[str, TemplateName]]:
    templates: tuple[TemplateName, ...] = ("tulu", "raw")
    found = [(name, template) for name in (*EXACT, *LOSSY) for template in templates]
    chats: list[tuple[str, TemplateName]] = [("chat", "chat"), ("chat that strips", "chat")]
    return found + chats * 3


_turn = st.tuples(st.sampled_from(["user", "assistant", "system"]), texts)
#: Contents that spell a special token together where a layout puts nothing between them.
_halves = st.builds(
    lambda first, half, second, turn: ((first, half[0]), (second, half[1]), turn),
    st.sampled_from(["user", "system"]),
    st.sampled_from([("</", "s>"), ("a<pa", "d>"), ("<|", "x|>"), ("<", "s>b"), ("", "</s>")]),
    st.sampled_from(["user", "system", "assistant"]),
    _turn,
)
_turns = st.lists(_turn, min_size=1, max_size=3).map(tuple)
_batches = st.lists(st.one_of(_turns, _turns, _turns, _halves), min_size=1, max_size=2)
cases = st.builds(
    lambda setup, batch: Case(setup[0], setup[1], tuple(batch)),
    st.sampled_from(_setups()),
    _batches,
)


@cache
def tokeniser(name: str, template: TemplateName) -> Tokeniser:
    return Tokeniser((EXACT | LOSSY)[name](), template)


def check(case: Case, tally: Counter[str]) -> None:
    made = tokeniser(case.tokenizer, case.template)
    samples = [
        Sample(str(n), "s", tuple(Message(role, text) for role, text in turns))  # type: ignore[arg-type]
        for n, turns in enumerate(case.batch)
    ]
    for turns, sample in zip(case.batch, samples, strict=True):
        try:
            (found,) = made([sample])
        except ValueError as error:
            assert len(str(error)) < 2000
            assert case.tokenizer in LOSSY or "across" in case.tokenizer, error
            tally["rejected"] += 1
            continue
        tally["accepted"] += 1
        if case.tokenizer in EXACT:
            _check_exact(made, case, turns, found.input_ids, found.response_mask)
        else:
            _check_lossy(made, case, turns, found.input_ids, found.response_mask)
    try:
        together = made(samples)
    except ValueError:
        return
    for sample, found in zip(samples, together, strict=True):
        (alone,) = made([sample])
        assert alone.input_ids.tolist() == found.input_ids.tolist()
        assert alone.response_mask.tolist() == found.response_mask.tolist()


def _content(case: Case, text: str) -> str:
    strips = {"tulu": True, "raw": False, "chat": case.tokenizer == "chat that strips"}
    return text.strip() if strips[case.template] else text


def _text(made: Tokeniser, case: Case, turns: Turns) -> str:
    """The rendered text, written out once more for the chat templates."""
    messages = [Message(role, text) for role, text in turns]  # type: ignore[arg-type]
    if case.template == "chat":
        # Jinja's trim is Python's strip
        return "".join(f"<|{role}|>\n{_content(case, text)}</s>\n" for role, text in turns)
    render = render_tulu if case.template == "tulu" else render_raw
    return render(messages, made.eos).text


def _decode(made: Tokeniser, ids: list[int]) -> str:
    text: str = made.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    return text


def _begins(case: Case, turns: Turns) -> bool:
    """Whether the text begins with a response."""
    before = turns[: next((n for n, (r, _) in enumerate(turns) if r == "assistant"), 0)]
    told = any(role == "assistant" for role, _ in turns)
    return case.template == "raw" and told and not any(text for _, text in before)


def _check_exact(
    made: Tokeniser, case: Case, turns: Turns, ids: np.ndarray, mask: np.ndarray
) -> None:
    around = ([], []) if case.template == "chat" else (made.prefix, made.suffix)
    inner = ids.tolist()[len(around[0]) : len(ids) - len(around[1])]
    text = _text(made, case, turns)
    assert _decode(made, inner) == text
    responses = [_content(case, t) + "</s>" for role, t in turns if role == "assistant"]
    told = mask.copy()
    if not around[0] and _begins(case, turns):
        told[:1] = True  # it is one, which nothing can predict
    assert _decode(made, ids[told].tolist()) == "".join(responses)
    # Special tokens are the template's own: an EOS per response, and tags in the chat's way.
    special = Counter(i for i in inner if i in made._ids.values() and i != made._unknown)
    own: Any = Counter({made.eos_id: len(turns if case.template == "chat" else responses)})
    for tag, count in Counter(f"<|{role}|>" for role, _ in turns).items():
        number = made._ids.get(tag)
        if number is not None and (case.template == "chat" or number in special):
            own[number] = count if case.template != "raw" else 0
    assert +special == +own, f"special tokens {special} for {own} in {text!r}"


def _loosely(text: str) -> str:
    """What is left of a text by all that these tokenizers do to one."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text)).casefold()
    kept = (c for c in plain if not unicodedata.combining(c) and not c.isspace())
    return unicodedata.normalize("NFKD", "".join(kept))


def _check_lossy(
    made: Tokeniser, case: Case, turns: Turns, ids: np.ndarray, mask: np.ndarray
) -> None:
    if made._unknown is not None and (ids == made._unknown).any():
        return  # nobody knows what an unknown token stands for
    responses = [_content(case, t) + made.eos for role, t in turns if role == "assistant"]
    told = mask.copy()
    if not made.prefix and _begins(case, turns):
        told[:1] = True
    runs = groupby(range(len(ids)), key=lambda j: bool(told[j]))
    found = "".join(_decode(made, ids[list(run)].tolist()) for is_told, run in runs if is_told)
    assert _loosely(found) == _loosely("".join(responses)), f"{found!r} for {responses}"


STREAMS = {"templates": Stream(cases, check, 22)}
