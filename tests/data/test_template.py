"""The Tulu text to the letter, and response tokens that can be read off it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    sentencepiece_tokenizer,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from tokenclean.data.formats import Message, Sample
from tokenclean.data.template import (
    TokenisedSample,
    Tokeniser,
    fingerprint_tokenizer,
    render_tulu,
    vocabulary_hash,
)

Turns = list[tuple[str, str]]


def neox_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with blanks trimmed from the offsets, as GPT-NeoX and Pythia have it."""
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level with BOS": byte_level_tokenizer,
    "byte-level without BOS": lambda: byte_level_tokenizer(bos=False),
    "byte-level with trimmed offsets": neox_tokenizer,
    "SentencePiece": sentencepiece_tokenizer,
}


def sample(turns: Turns, truth: Any = None) -> Sample:
    return Sample("x", "s", tuple(Message(r, c) for r, c in turns), truth)  # type: ignore[arg-type]


def one(tokenizer: Any, turns: Turns, truth: Any = None, **options: Any) -> TokenisedSample:
    (result,) = Tokeniser(tokenizer, **options)([sample(turns, truth)])
    return result


def marked(turns: Turns, **options: Any) -> tuple[str, str]:
    """The text of all tokens, and a line under it with `^` below every response token."""
    tokenizer = character_tokenizer()
    result = one(tokenizer, turns, **options)
    text = "".join(tokenizer.convert_ids_to_tokens(result.input_ids.tolist()))
    return text, "".join("^" if m else "." for m in result.response_mask)


# Texts and their response tokens, written out. `$` is EOS; one character is one token.
LITERAL: dict[str, tuple[Turns, list[tuple[str, str]]]] = {
    "single turn": (
        [("user", "  hi\n"), ("assistant", "\n yes ")],
        [("<|user|>\nhi\n<|assistant|>\n", "."), ("yes$", "^")],
    ),
    "multi-turn": (
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de")],
        [
            ("<|user|>\na\n<|assistant|>\n", "."),
            ("b$", "^"),
            ("\n<|user|>\nc\n<|assistant|>\n", "."),
            ("de$", "^"),
        ],
    ),
    "system turn": (
        [("system", "S"), ("user", "a"), ("assistant", "b")],
        [("<|system|>\nS\n<|user|>\na\n<|assistant|>\n", "."), ("b$", "^")],
    ),
    "opens with an assistant turn": (
        [("assistant", "hey"), ("user", "a"), ("assistant", "b")],
        [
            ("<|assistant|>\n", "."),
            ("hey$", "^"),
            ("\n<|user|>\na\n<|assistant|>\n", "."),
            ("b$", "^"),
        ],
    ),
    "two assistant turns in a row": (
        [("user", "a"), ("assistant", "b"), ("assistant", "c")],
        [
            ("<|user|>\na\n<|assistant|>\n", "."),
            ("b$", "^"),
            ("\n<|assistant|>\n", "."),
            ("c$", "^"),
        ],
    ),
    "empty assistant content": (
        [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", " \n")],
        [
            ("<|user|>\na\n<|assistant|>\n", "."),
            ("$", "^"),
            ("\n<|user|>\nb\n<|assistant|>\n", "."),
            ("$", "^"),
        ],
    ),
    "ends with a user turn": (
        [("user", "a"), ("assistant", "b"), ("user", "c ")],
        [("<|user|>\na\n<|assistant|>\n", "."), ("b$", "^"), ("\n<|user|>\nc", ".")],
    ),
    "no assistant turn": ([("user", "a")], [("<|user|>\na", ".")]),
    "empty user turn at the end": (
        [("assistant", "a"), ("user", "")],
        [("<|assistant|>\n", "."), ("a$", "^"), ("\n<|user|>", ".")],
    ),
    "blank lines inside contents stay": (
        [("user", "a\n\nb"), ("assistant", "c\n\n d")],
        [("<|user|>\na\n\nb\n<|assistant|>\n", "."), ("c\n\n d$", "^")],
    ),
    "answers that occur in the tags": (
        [("user", "user"), ("assistant", "assistant")],
        [("<|user|>\nuser\n<|assistant|>\n", "."), ("assistant$", "^")],
    ),
}


@pytest.mark.parametrize("name", LITERAL)
def test_text_and_response_tokens_to_the_letter(name: str) -> None:
    turns, pieces = LITERAL[name]
    text = "".join(piece for piece, _ in pieces)
    assert render_tulu(sample(turns).messages, "$").text == text
    assert marked(turns) == (text, "".join(mark * len(piece) for piece, mark in pieces))


CONVERSATIONS: list[Turns] = [
    [("user", "What is the colour of the sky?"), ("assistant", "The sky is blue.")],
    [
        ("system", "Be brief."),
        ("user", "é ☃"),
        ("assistant", "two  blanks,\n\n   three, \t tab"),
        ("user", "b"),
        ("assistant", "𝄞 naïve ☃"),
    ],
    [("assistant", "first"), ("assistant", ""), ("user", "x")],
    [("user", "q"), ("assistant", "a" * 300)],
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_tokenizers_own_and_responses_decode(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    results = Tokeniser(tokenizer)([sample(turns) for turns in CONVERSATIONS])
    for turns, result in zip(CONVERSATIONS, results, strict=True):
        text = "".join(
            f"<|{role}|>\n{content.strip()}" + ("</s>\n" if role == "assistant" else "\n")
            for role, content in turns
        ).strip()
        assert result.input_ids.tolist() == tokenizer(text)["input_ids"]
        assert result.input_ids.dtype == np.int32
        # Runs of response tokens are the answers, in order, each with its EOS.
        edges = np.flatnonzero(np.diff(result.response_mask, prepend=False, append=False))
        runs = [
            str(tokenizer.decode(result.input_ids[a:b])).strip(" ")
            for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
        answers = [content.strip() + "</s>" for role, content in turns if role == "assistant"]
        assert runs == answers
        assert result.response_tokens == result.response_mask.sum()
        assert result.full_length == len(result.input_ids)


def test_bos_is_the_tokenizers_business_and_never_a_target() -> None:
    turns: Turns = [("assistant", "b")]
    with_bos = one(byte_level_tokenizer(), turns)
    without = one(byte_level_tokenizer(bos=False), turns)
    assert with_bos.input_ids[0] == 0
    assert with_bos.input_ids[1:].tolist() == without.input_ids.tolist()
    assert with_bos.response_mask.tolist() == [False, *without.response_mask.tolist()]


def test_an_eos_that_the_tokenizer_adds_is_no_target() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    result = one(tokenizer, [("user", "a"), ("assistant", "b")])
    assert result.input_ids[-2:].tolist() == [1, 1]
    assert result.response_mask[-3:].tolist() == [True, True, False]


SPELLED: list[Turns] = [
    [("user", "Write </s> and <s>."), ("assistant", "</s> <s> and </s>")],
    [("user", "tag <s>"), ("assistant", "x"), ("user", "y"), ("assistant", "<s>")],
    [("system", "<pad>"), ("assistant", ""), ("assistant", "z")],
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_spelled_in_content_are_plain_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokeniser = Tokeniser(tokenizer)
    plain = CONVERSATIONS[0]
    results = tokeniser([sample(turns) for turns in [plain, *SPELLED, plain]])
    bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for turns, result in zip(SPELLED, results[1:4], strict=True):
        ids = result.input_ids.tolist()
        answers = [content for role, content in turns if role == "assistant"]
        # The special ids are those of the layout, not one more.
        assert ids.count(tokenizer.eos_token_id) == len(answers)
        assert ids.count(tokenizer.bos_token_id) == int(bos)
        assert ids.count(tokenizer.pad_token_id or -1) == 0
        decoded = str(tokenizer.decode(result.input_ids[result.response_mask]))
        expected = "".join(answer + "</s>" for answer in answers)
        assert decoded.replace(" ", "") == expected.replace(" ", "")
        assert result.response_mask[np.array(ids) == tokenizer.eos_token_id].all()
    # Rows beside them are exactly the plain tokenisation, also afterwards.
    text = "<|user|>\nWhat is the colour of the sky?\n<|assistant|>\nThe sky is blue.</s>"
    for result in (results[0], results[4]):
        assert result.input_ids.tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_literal_tokens_equal_plain_ones_where_nothing_is_spelled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokeniser = Tokeniser(TOKENIZERS[name]())
    samples = [sample(turns) for turns in CONVERSATIONS]
    plain = tokeniser(samples)
    monkeypatch.setattr(tokeniser, "_spells_special", lambda messages: True)
    for a, b in zip(plain, tokeniser(samples), strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.response_mask.tolist() == b.response_mask.tolist()


def test_a_tokenizer_that_changes_text_is_refused_with_both_texts() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert one(tokenizer, [("user", "HI"), ("assistant", "yes")]).response_tokens == 4
    with pytest.raises(ValueError, match=r"sample 'x'.* do not decode") as caught:
        one(tokenizer, [("user", "hi"), ("assistant", "Yes")])
    assert "text:    'Yes</s>'" in str(caught.value)
    assert "decoded: 'yes</s>'" in str(caught.value)


def test_a_tokenizer_that_drops_characters_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("-", "")
    with pytest.raises(ValueError, match="do not decode"):
        one(tokenizer, [("user", "hi"), ("assistant", "1-2")])


def test_a_token_across_the_responses_edge_is_refused() -> None:
    # `:b` is one token: as a target it would teach a part of the prompt.
    characters = {c: i for i, c in enumerate("$:abcq")}
    model = models.BPE({**characters, ":b": 6}, [(":", "b")])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$")
    assert one(fast, [("user", "q:"), ("assistant", "ab")], template="raw").response_tokens == 3
    with pytest.raises(ValueError, match=r"'b\$'\n.*':b\$'"):
        one(fast, [("user", "q:"), ("assistant", "b")], template="raw")


def test_unknown_characters_do_not_stop_a_word_level_tokenizer() -> None:
    tokenizer = character_tokenizer()
    result = one(tokenizer, [("user", "é"), ("assistant", "né")])
    unknown = tokenizer.unk_token_id
    assert result.input_ids[result.response_mask].tolist() == [
        tokenizer.convert_tokens_to_ids("n"),
        unknown,
        tokenizer.eos_token_id,
    ]


def test_unicode_normalisation_is_no_change_of_text() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    result = one(tokenizer, [("user", "q"), ("assistant", "cafe\u0301 x")])
    assert tokenizer.decode(result.input_ids[result.response_mask]) == "caf\u00e9 x</s>"


def test_truncation_cuts_on_the_right_and_is_countable() -> None:
    turns: Turns = [("user", "a"), ("assistant", "bcd")]
    whole = "<|user|>\na\n<|assistant|>\nbcd$"
    full = len(whole)
    for length in (full + 1, full, full - 1, full - 4, 2):
        result = one(character_tokenizer(), turns, max_length=length)
        text = "".join(character_tokenizer().convert_ids_to_tokens(result.input_ids.tolist()))
        assert text == whole[:length]
        assert result.response_mask.sum() == max(0, 4 - max(0, full - length))
        assert (result.full_length, result.response_tokens) == (full, 4)
    assert text.endswith("$") is False


def truth_line(turns: Turns, truth: Any, **options: Any) -> str:
    """Labels of the response tokens: `+` informative, `0` uninformative, `-` corrupted."""
    result = one(character_tokenizer(), turns, truth, **options)
    assert result.truth is not None
    assert result.truth.dtype == np.int8
    assert (result.truth[~result.response_mask] == 0).all()
    return "".join({1: "+", 0: "0", -1: "-"}[v] for v in result.truth[result.response_mask])


def test_truth_spans_become_token_labels() -> None:
    turns: Turns = [("user", "q"), ("assistant", "abcdef")]
    assert truth_line(turns, ()) == "++++++" + "+"
    assert truth_line(turns, ((1, 1, 3, 0), (1, 4, 6, -1))) == "+00+--" + "+"
    # Where spans overlap, the worst label counts, in whichever order they come.
    assert truth_line(turns, ((1, 0, 4, -1), (1, 2, 6, 0))) == "----00" + "+"
    assert truth_line(turns, ((1, 2, 6, 0), (1, 0, 4, -1))) == "----00" + "+"
    # Empty spans and spans in prompts label nothing.
    assert truth_line(turns, ((1, 2, 2, -1), (0, 0, 1, -1))) == "++++++" + "+"


def test_truth_spans_count_from_the_raw_content() -> None:
    turns: Turns = [("user", " q "), ("assistant", "  abcd \n"), ("assistant", "\nxy")]
    assert truth_line(turns, ((1, 3, 5, -1),)) == "+--+" + "+" + "++" + "+"
    assert truth_line(turns, ((2, 1, 2, 0),)) == "++++" + "+" + "0+" + "+"
    # A span over stripped blanks covers neither the tag before the content nor the EOS after it.
    assert truth_line(turns, ((1, 0, 8, -1), (2, 0, 3, 0))) == "----" + "+" + "00" + "+"
    assert truth_line(turns, ((1, 0, 2, -1), (1, 6, 8, -1))) == "++++" + "+" + "++" + "+"


def test_truth_is_cut_with_the_tokens() -> None:
    turns: Turns = [("user", "q"), ("assistant", "abcd")]
    length = len("<|user|>\nq\n<|assistant|>\nab")
    assert truth_line(turns, ((1, 1, 4, -1),), max_length=length) == "+-"


def test_a_token_of_several_characters_takes_its_worst_label() -> None:
    tokenizer = byte_level_tokenizer()
    assert tokenizer.tokenize("the sky") == ["the", "Ġsky"]
    turns: Turns = [("user", "q"), ("assistant", "the sky☃")]

    def labels(*spans: tuple[int, int, int, int]) -> list[int]:
        result = one(tokenizer, turns, spans)
        assert result.truth is not None
        return result.truth[result.response_mask].tolist()

    snow = len(tokenizer.tokenize("☃"))
    assert snow == 3  # three bytes of one character
    assert labels() == [1, 1, *[1] * snow, 1]
    assert labels((1, 2, 3, -1)) == [-1, 1, *[1] * snow, 1]
    assert labels((1, 4, 5, 0), (1, 5, 6, -1)) == [1, -1, *[1] * snow, 1]
    assert labels((1, 7, 8, 0)) == [1, 1, *[0] * snow, 1]


def test_trimmed_blanks_have_labels_too() -> None:
    tokenizer = neox_tokenizer()
    pieces = ["Ġ", "Ġ", "Ġsky"]
    assert tokenizer.tokenize("a   sky")[1:] == pieces
    result = one(tokenizer, [("user", "q"), ("assistant", "a   sky")], ((1, 1, 3, -1),))
    assert result.truth is not None
    assert result.truth[result.response_mask].tolist() == [1, -1, -1, 1, 1]


def test_no_truth_without_spans() -> None:
    assert one(character_tokenizer(), [("user", "q"), ("assistant", "r")]).truth is None


def test_raw_template_joins_contents_as_they_are() -> None:
    turns: Turns = [
        ("user", "2 + 3 ="),
        ("assistant", " 5 "),
        ("user", "\n4 ="),
        ("assistant", "4"),
    ]
    assert marked(turns, template="raw") == (
        "2 + 3 = 5 $\n4 =4$",
        ".......^^^^....^^",
    )
    # Nothing is stripped, so spans need no shift.
    assert truth_line(turns, ((1, 1, 2, -1),), template="raw") == "+-++" + "++"
    # The first token has nothing before it to be predicted from.
    assert marked([("assistant", "abc")], template="raw") == ("abc$", ".^^^")


CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"


def test_chat_template_finds_contents_and_not_their_likes() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = CHAT
    # `a` and `use` also occur in the names of the roles; the first answer is empty.
    turns: Turns = [
        ("user", "use"),
        ("assistant", " "),
        ("user", "user"),
        ("assistant", " a "),
    ]
    result = one(tokenizer, turns, ((3, 1, 2, -1),), template="chat")
    text = "<s>user\nuse</s>\n<s>assistant\n</s>\n<s>user\nuser</s>\n<s>assistant\na</s>\n"
    assert result.input_ids.tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.decode(result.input_ids[result.response_mask]) == "</s>a</s>"
    # The empty answer's EOS is its own, not the one of the question before it.
    eos = np.flatnonzero(result.input_ids == tokenizer.eos_token_id)
    assert result.response_mask[eos].tolist() == [False, True, False, True]
    assert result.truth is not None
    assert result.truth[result.response_mask].tolist() == [1, -1, 1]


def test_a_chat_template_that_rewrites_contents_is_refused() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = CHAT.replace("trim", "upper")
    with pytest.raises(ValueError, match=r"^data\.template: the chat template changes the text"):
        one(tokenizer, [("user", "q"), ("assistant", "r")], template="chat")


def test_a_chat_template_that_drops_turns_is_refused() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = CHAT.replace("in messages", "in messages[:1]")
    with pytest.raises(
        ValueError, match=r"^data\.template: the chat template drops or moves assistant"
    ):
        one(tokenizer, [("user", "q"), ("assistant", "")], template="chat")


def test_a_chat_template_that_fails_names_the_sample() -> None:
    """Many refuse turns that do not alternate; what a template raises is no error of ours."""
    tokenizer = byte_level_tokenizer(bos=False)
    for broken in ("{{ raise_exception('turns must alternate') }}", "{{ 1 / 0 }}", "{{ x.y.z }}"):
        tokenizer.chat_template = CHAT + broken
        with pytest.raises(
            ValueError, match=r"^data\.template: the chat template does not take sample 'x': "
        ):
            one(tokenizer, [("user", "q"), ("assistant", "r")], template="chat")


@pytest.mark.parametrize("asked", ["q", "</s>"])
def test_a_blank_that_begins_a_response_belongs_to_it(asked: str) -> None:
    """Though a tokenizer of GPT-NeoX's kind says that it covers no character."""
    tokenizer = neox_tokenizer()
    result = one(tokenizer, [("user", asked), ("assistant", " \x00!  .")], template="raw")
    assert tokenizer.decode(result.input_ids[result.response_mask]) == " \x00!  .</s>"


def test_contents_of_a_chat_spell_special_tokens_as_text() -> None:
    """The template's own special tokens are put in by id; contents have none."""
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = CHAT
    turns: Turns = [("user", "a </s> b <s>"), ("assistant", "<s>the </s> sky")]
    result = one(tokenizer, turns, template="chat")

    def plain(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return found

    bos, eos, end = 0, 1, plain("\n")
    question, answer = plain("user\na </s> b <s>"), plain("assistant\n<s>the </s> sky")
    assert result.input_ids.tolist() == [bos, *question, eos, *end, bos, *answer, eos, *end]
    assert tokenizer.decode(result.input_ids[result.response_mask]) == "<s>the </s> sky</s>"


def test_special_tokens_that_take_blanks_along() -> None:
    """A row that spells one has the template's own where all other rows have it."""
    tokenizer = byte_level_tokenizer(bos=False)
    tags = [AddedToken(f"<|{r}|>", special=True, rstrip=True) for r in ("user", "assistant")]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    )
    plain = one(tokenizer, [("user", "ask"), ("assistant", "the sky")], template="chat")
    text = "<|user|>\nask</s>\n<|assistant|>\nthe sky</s>\n"
    assert plain.input_ids.tolist() == tokenizer(text)["input_ids"]
    found = one(tokenizer, [("user", "<pad>"), ("assistant", "the sky")], template="chat")
    place = plain.input_ids.tolist().index(tokenizer.eos_token_id)
    other = found.input_ids.tolist().index(tokenizer.eos_token_id)
    assert found.input_ids[other:].tolist() == plain.input_ids[place:].tolist()
    assert 2 not in found.input_ids.tolist()


def test_unfit_tokenizers_and_options_are_refused_by_name() -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match=r"^data\.template: chat needs"):
        Tokeniser(tokenizer, "chat")
    with pytest.raises(ValueError, match=r"^data\.max_length: 1 "):
        Tokeniser(tokenizer, max_length=1)
    word_level = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"^data\.tokenizer: it has no EOS"):
        Tokeniser(PreTrainedTokenizerFast(tokenizer_object=word_level))


def test_fingerprints_follow_content_only() -> None:
    tokenizer = byte_level_tokenizer()
    plain = Tokeniser(tokenizer).fingerprint()
    assert Tokeniser(byte_level_tokenizer()).fingerprint() == plain
    assert Tokeniser(tokenizer, "raw").fingerprint() != plain
    assert Tokeniser(tokenizer, max_length=512).fingerprint() != plain
    assert Tokeniser(byte_level_tokenizer(bos=False)).fingerprint() != plain
    other_eos = byte_level_tokenizer()
    other_eos.eos_token = "<pad>"
    assert Tokeniser(other_eos).fingerprint() != plain
    # What a call leaves behind in the tokenizer is not content.
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert Tokeniser(tokenizer).fingerprint() == plain
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(byte_level_tokenizer())


def test_the_chat_template_is_part_of_its_fingerprint() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    plain, chat = Tokeniser(tokenizer).fingerprint(), Tokeniser(tokenizer, "chat").fingerprint()
    tokenizer.chat_template = CHAT.replace("| trim", "")
    assert Tokeniser(tokenizer, "chat").fingerprint() != chat
    assert Tokeniser(tokenizer).fingerprint() == plain


def test_vocabulary_hash_follows_the_ids() -> None:
    assert vocabulary_hash(byte_level_tokenizer()) == vocabulary_hash(byte_level_tokenizer(False))
    assert vocabulary_hash(byte_level_tokenizer()) != vocabulary_hash(sentencepiece_tokenizer())


def test_a_batch_equals_its_samples_one_by_one() -> None:
    tokeniser = Tokeniser(sentencepiece_tokenizer())
    samples = [sample(turns) for turns in CONVERSATIONS + SPELLED]
    for each, whole in zip(samples, tokeniser(samples), strict=True):
        (alone,) = tokeniser([each])
        assert whole.input_ids.tolist() == alone.input_ids.tolist()
        assert whole.response_mask.tolist() == alone.response_mask.tolist()
    assert tokeniser([]) == []
