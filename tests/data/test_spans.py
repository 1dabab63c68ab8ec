"""Texts with spans: which tokens a tokenizer makes of them, and what their edges do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, write_jsonl
from tokenizers import AddedToken, pre_tokenizers, processors

from tokenclean.data.formats import Message, Reader, Sample
from tokenclean.data.pool import build_pool
from tokenclean.data.pretokenised import NO_LOSS, Tokens
from tokenclean.data.spans import encode_spans, read_spans
from tokenclean.data.template import Tokeniser, fingerprint_tokenizer


def role_tokenizer() -> Any:
    """The tags of roles are special tokens, in Phi-3's way."""
    tokenizer = byte_level_tokenizer()
    tags = ["<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    return tokenizer


def closing_tokenizer() -> Any:
    """Puts an EOS behind every text."""
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def odd_tokenizer() -> Any:
    """Has a special token that plays no role."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", special=True)])
    assert "<x>" not in tokenizer.all_special_tokens
    return tokenizer


def encode(row: dict[str, Any], tokenizer: Any, card: Any = None) -> Tokens:
    return encode_spans(read_spans(row, card), Tokeniser(tokenizer))


def whole_response(text: str, *responses: str, **columns: Any) -> dict[str, Any]:
    """A row of a text whose responses, in its order, are all kept."""
    found, cursor = [], 0
    for response in responses:
        start = text.index(response, cursor)
        cursor = start + len(response)
        found.append([start, cursor])
    spans = [{"start": a, "end": b, "kept": True} for a, b in found]
    return {"text": text, "responses": found, "spans": spans, **columns}


# -- special tokens in the text -------------------------------------------------------------------


@pytest.mark.parametrize("exact", [None, False, True])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("the sky", "is blue"),
        ("the sky", "is <|user|> blue"),  # content that spells a tag, in a line and as one
        ("the\n<|tag|>\nsky <|user|>", "is\n<|user|>\nblue"),
        ("the sky", "is <pad> blue"),
        ("the sky", "is\n<|user|>\nblue"),
        ("<|user|> sky", "is blue"),
    ],
)
def test_tags_that_are_special_tokens_stay_those(
    question: str, answer: str, exact: bool | None
) -> None:
    """As where the conversation itself is tokenised: literally only if its content spells any."""
    tokenizer = role_tokenizer()
    turns = Message("user", question), Message("assistant", answer)
    sample = Sample("a", "s", turns)
    want = Tokeniser(tokenizer)([sample])[0]
    plain = "<" not in question + answer
    tag = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert (tag in want.input_ids.tolist()) == plain
    text = f"<|user|>\n{question}\n<|assistant|>\n{answer}</s>"
    row = whole_response(text, f"{answer}</s>")
    if exact is not None:
        row["exact"] = exact and plain
    for card in (None, {"template": "tulu", "tokenizer": fingerprint_tokenizer(tokenizer)}):
        found = encode(row, tokenizer, card)
        assert found.input_ids.tolist() == want.input_ids.tolist()
        assert found.response_mask.tolist() == want.response_mask.tolist()
        assert (
            found.labels.tolist() == np.where(want.response_mask, want.input_ids, NO_LOSS).tolist()
        )


def test_an_exact_text_of_this_tokenizer_is_tokenised_as_it_is() -> None:
    """Whatever it spells: the exporter has looked. Of another tokenizer nobody has."""
    tokenizer = role_tokenizer()
    text = "ask <|user|> then\nthe sky</s>"
    row = whole_response(text, "the sky</s>")
    tag = tokenizer.convert_tokens_to_ids("<|user|>")
    card = {"template": "raw", "tokenizer": fingerprint_tokenizer(tokenizer)}
    as_it_is = tokenizer(text)["input_ids"]
    assert tag in as_it_is
    found = encode({**row, "exact": True}, tokenizer, card)
    assert found.input_ids.tolist() == as_it_is
    for other, facts in (
        ({**row, "exact": False}, card),
        ({**row, "exact": True}, {**card, "tokenizer": "another"}),
        ({**row, "exact": True}, {}),
        (row, card),
    ):
        assert tag not in encode(other, tokenizer, facts).input_ids.tolist()
    # raw texts have no tags to spare
    tagged = whole_response("<|user|>\nthe sky</s>", "the sky</s>")
    assert tag not in encode(tagged, tokenizer, {"template": "raw"}).input_ids.tolist()
    assert encode(tagged, tokenizer, {"template": "tulu"}).input_ids[1] == tag


def test_special_tokens_without_a_role_are_content_too() -> None:
    tokenizer = odd_tokenizer()
    found = encode(whole_response("q\nthe <x> sky</s>", "the <x> sky</s>"), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<x>") not in found.input_ids.tolist()
    assert tokenizer.decode(found.input_ids.tolist()) == "<s>q\nthe <x> sky</s>"


def test_what_the_tokenizer_puts_around_a_literal_text() -> None:
    """BOS before, EOS behind, neither of them a response; the responses' own EOS by id."""
    text = "<|user|>\nthe <pad>\n<|assistant|>\nsky</s>\n<|user|>\nthe\n<|assistant|>\nsky</s>"
    found = encode(whole_response(text, "sky</s>", "sky</s>"), closing_tokenizer())
    ids = found.input_ids.tolist()
    assert ids[0] == 0 and ids[-2:] == [1, 1] and ids.count(1) == 3 and 2 not in ids
    assert found.response_mask[-2:].tolist() == [True, False]
    assert found.labels[-1] == NO_LOSS


def test_texts_that_their_own_tokenizer_cuts_otherwise_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level_tokenizer()
    row = whole_response("q\nthe sky</s>", "the sky</s>")
    rows = [{**row, "exact": exact} for exact in (True, False, False)]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    for made, count in ((fingerprint_tokenizer(tokenizer), 2), ("another", 0)):
        card = {"kind": "export", "format": "spans", "data": ["samples.jsonl"], "tokenizer": made}
        (tmp_path / "tokenclean.json").write_text(json.dumps(card))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tokenclean"):
            build_pool(Reader([str(tmp_path)]), Tokeniser(tokenizer), tmp_path / made)
        assert ("2 text(s) with spans are not `exact`" in caplog.text) == (count == 2)


# -- edges ----------------------------------------------------------------------------------------


def test_on_an_edge_the_larger_weight_wins_whatever_the_order() -> None:
    """` the` is one token, and a span's edge goes through it."""
    tokenizer = byte_level_tokenizer(bos=False)
    assert tokenizer.tokenize("q the") == ["q", "Ġthe"]
    for weights in ((1.0, 0.5), (0.5, 1.0), (-1.0, 1.0), (1.0, -1.0)):
        spans = [
            {"start": start, "end": end, "kept": weight > 0, "weight": weight}
            for (start, end), weight in zip(((1, 3), (3, 5)), weights, strict=True)
        ]
        row = {"text": "q the", "responses": [[1, 5]], "spans": spans}
        assert encode(row, tokenizer).weight.tolist() == [1.0, 1.0]
        assert encode(row, tokenizer).labels.tolist() == [
            NO_LOSS,
            tokenizer.convert_tokens_to_ids("Ġthe"),
        ]


def test_a_blank_that_offsets_leave_out_still_has_its_character() -> None:
    """Tokenizers of GPT-NeoX's kind trim blanks from offsets: one by itself covers nothing."""
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "q\nz  z"
    tokens = tokenizer.tokenize(text)
    assert tokens[2:4] == ["z", "Ġ"]
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[3] == (4, 4)  # nothing
    spans = [
        {"start": 2, "end": 3, "kept": False},
        {"start": 3, "end": 4, "kept": True},
        {"start": 4, "end": 6, "kept": False},
    ]
    found = encode({"text": text, "responses": [[2, 6]], "spans": spans}, tokenizer)
    assert np.flatnonzero(found.labels != NO_LOSS).tolist() == [3]
    assert found.response_mask[2:].all() and not found.response_mask[:2].any()
