"""What each token reads as, against decoding every beginning of the sample."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import byte_level_tokenizer, character_tokenizer, sentencepiece_tokenizer

from tokenclean.data.pieces import TokenTexts, decode, token_texts

TOKENIZERS = [byte_level_tokenizer(), sentencepiece_tokenizer(), character_tokenizer()]
#: Longer than the window that a piece looks back on; cut characters at any place in it.
LONG = "The sky is blue, naïve 日本 ☃! " * 12


def growth(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds, by the definition: a piece waits until its character is whole."""
    texts, before = [], ""
    for stop in range(1, len(ids) + 1):
        now = decode(tokenizer, ids[:stop])
        if now.endswith("\ufffd") and stop < len(ids):
            texts.append("")
        else:
            texts.append(now.removeprefix(before))
            before = now
    return texts


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("text", ["The sky is blue.", "naïve 日本 ☃!", "a  b\n c", LONG])
def test_pieces_make_up_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = token_texts(tokenizer, ids)
    assert texts == growth(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == whole
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_remembered_texts_are_the_same(tokenizer: Any) -> None:
    """Whatever came before: a remembered piece is not taken where the text depends on more."""
    read = TokenTexts(tokenizer)
    for text in ["The sky is blue.", "naïve 日本 ☃!", "sky", " sky", LONG, "日", "naïve 日本 ☃!"]:
        for ids in (tokenizer(text)["input_ids"], tokenizer(text)["input_ids"][1:]):
            assert read(ids) == token_texts(tokenizer, ids)


def test_no_tokens_read_as_nothing() -> None:
    assert token_texts(TOKENIZERS[0], []) == [] == TokenTexts(TOKENIZERS[0])([])


def test_a_sample_cut_inside_a_character_ends_in_a_broken_one() -> None:
    """The snowman is three bytes and so three tokens here; with two of them it stays broken."""
    tokenizer = byte_level_tokenizer(bos=False)
    ids = tokenizer("a☃")["input_ids"]
    assert len(ids) == 4
    assert token_texts(tokenizer, ids) == ["a", "", "", "☃"]
    assert token_texts(tokenizer, ids[:3]) == ["a", "\ufffd", ""]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(bos=False), character_tokenizer()])
def test_the_sign_for_broken_characters_may_stand_in_the_data(tokenizer: Any) -> None:
    """Its text stays with its own tokens: none of it goes to the letters after it."""
    ids = tokenizer("bad \ufffdok")["input_ids"]
    if decode(tokenizer, ids) != "bad \ufffdok":
        return  # no such sign in this vocabulary
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "bad \ufffdok"
    assert "".join(texts[-2:]) == "ok" or texts[-1] == "ok"
