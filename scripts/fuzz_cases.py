"""What the streams of `scripts/fuzz.py` share: odd texts, odd tokenizers, and how cases count."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

#: Pieces of text that have broken something somewhere.
PIECES = (
    *("a", "Zz", "the sky", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x1f", "\x7f", "0", "12 + 3"),
    *("</s>", "<s>", "<pad>", "</", "s>", "<|user|>", "<|assistant|>\n", "<|x|>", "<|", "|>"),
    *("\u2028", "\u0085", "\u00a0", "\u3000", "\ufeff", "\u200d", "\u202e", "\ue0000\ue001"),
    *("é", "e\u0301", "ﬁ", "Å", "ß", "İ", "日本", "한", "𝔘", "👩‍👩‍👧", "🏳️‍🌈", "\u0300"),
    *('"', "\\", "\\u0041", "{", "}", "[", "]", "{{ 7 * 7 }}", "<unk>", "▁", "Ġ", "##a", "[UNK]"),
)

#: Special tokens and halves of them, which contents that touch may make whole.
SPELLING = ("</s>", "</", "s>", "<pad>", "<|x|>", "<|", "x|>", "<|user|>", "Zz", "")

_random = random.Random(0)
#: Up to four pieces each, the shortest first, which is the way that a case shrinks. Drawn once:
#: one draw of a case per text instead of ten is what the time goes by.
TEXTS = sorted(
    {"".join(_random.choices(PIECES, k=_random.randrange(5))) for _ in range(6000)},
    key=lambda text: (len(text), text),
)

texts = st.one_of(
    st.sampled_from(SPELLING),
    st.sampled_from(TEXTS),
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
#: What ids and sources can be.
names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.integers(-(10**20), 10**20),
    st.sampled_from(["../../etc/passwd", "a\nb", "0", "NaN", "id-1", " "]),
)


@dataclass
class Stream:
    """One kind of cases.

    Attributes:
        strategy: makes a case.
        check: raises AssertionError, or anything else, where a case fails; counts what was
            ``accepted`` and ``rejected``.
        share: of all cases, in parts of the sum of all shares.
    """

    strategy: st.SearchStrategy[Any]
    check: Callable[[Any, Counter[str]], None]
    share: int


def byte_level(bos: bool = True, regex: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """BPE over bytes, trained on a Tulu text; without ``regex`` its merges cross all edges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "<|user|>\nthe sky\n<|assistant|>\nthe sky  is\n\nblue 12 + 3\n"
    tokenizer.train_from_iterator([text] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        **options,
    )


def _around() -> PreTrainedTokenizerFast:
    found = byte_level()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return found


def _trimmed() -> PreTrainedTokenizerFast:
    found = byte_level(bos=False)
    found.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return found


def _added() -> PreTrainedTokenizerFast:
    """Added tokens, special and not, that take blanks along."""
    found = byte_level()
    found.add_tokens(
        [
            AddedToken("<|x|>", special=True, lstrip=True, rstrip=True),
            AddedToken("sky", special=False),
            AddedToken("Zz", special=True),
        ]
    )
    return found


def _tags() -> PreTrainedTokenizerFast:
    """The tags of roles are special tokens, in Phi-3's way."""
    found = byte_level()
    tags = ["<|system|>", "<|user|>", "<|assistant|>"]
    found.add_special_tokens({"additional_special_tokens": tags})
    return found


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
)


def _chat() -> PreTrainedTokenizerFast:
    """Tags are special tokens and every turn ends with an EOS, in ChatML's way."""
    found = _tags()
    found.chat_template = CHAT
    return found


def _chat_stripping() -> PreTrainedTokenizerFast:
    found = _tags()
    found.chat_template = CHAT.replace("m['content']", "m['content'] | trim")
    return found


def _sentencepiece(prepend: bool = True) -> PreTrainedTokenizerFast:
    """Bytes behind unknown characters, and a blank in front of each text, in Llama 2's way."""
    letters = sorted(set("theskyisblue0123+▁aZz"))
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("s", "k"), ("sk", "y"), ("▁", "▁")]
    known += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prepend else replaced
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _wordpiece() -> PreTrainedTokenizerFast:
    """Lower case, no accents, no blanks: it loses most of what a text says."""
    known = ["[UNK]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789<>|/+", "##a", "the", "sky"]
    known += [f"##{letter}" for letter in "bcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def _normalising(normalizer: Any) -> PreTrainedTokenizerFast:
    found = byte_level()
    found.backend_tokenizer.normalizer = normalizer
    return found


def _characters() -> PreTrainedTokenizerFast:
    """One token per character, `$` for EOS, most characters unknown."""
    letters = [chr(c) for c in range(32, 127) if chr(c) != "$"] + ["\n"]
    vocabulary = {"$": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", unk_token="<unk>")


#: Those that give every text back to the letter.
EXACT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes with BOS": byte_level,
    "bytes without BOS": lambda: byte_level(bos=False),
    "bytes, BOS and EOS": _around,
    "bytes, trimmed offsets": _trimmed,
    "bytes, tokens across edges": lambda: byte_level(regex=False),
    "bytes, added tokens": _added,
    "bytes, tags as tokens": _tags,
    "chat": _chat,
    "chat that strips": _chat_stripping,
}
#: Those that do not.
LOSSY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "SentencePiece": _sentencepiece,
    "SentencePiece without a blank": lambda: _sentencepiece(prepend=False),
    "WordPiece": _wordpiece,
    "NFKC": lambda: _normalising(normalizers.NFKC()),
    "NFD, lower case": lambda: _normalising(
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    ),
    "without accents": lambda: _normalising(normalizers.StripAccents()),
    "characters": _characters,
}
