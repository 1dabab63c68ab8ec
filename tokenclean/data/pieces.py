"""What each token of a sample reads as: pieces of text that together are the decoded sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Tokens that a decoded piece looks back on: blanks and marks depend on the token before.
_BACK = 8
#: What a decoder gives for bytes that are no whole character yet.
_BROKEN = "\ufffd"


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included, nothing tidied up."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


class TokenTexts:
    """`token_texts` of many samples, mostly without a decoding for each token.

    Each token's own text is remembered. Where those of a sample join up to its decoded text, they
    are it: no character is cut, and no text depends on the token before.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        ids = [int(i) for i in ids]
        for token in set(ids) - self._alone.keys():
            self._alone[token] = decode(self.tokenizer, [token])
        texts = [self._alone[token] for token in ids]
        whole = "".join(texts)
        if _BROKEN not in whole and whole == decode(self.tokenizer, ids):
            return texts
        return token_texts(self.tokenizer, ids)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; joined, they are `decode` of all of them.

    A token that ends within a character adds nothing, the one that completes it adds it. Of one
    that stays broken, since the sample was cut inside it, the first one adds the sign for it.

    Args:
        tokenizer: of transformers.
        ids: of one sample, T of them.

    Returns:
        T texts.
    """
    ids = [int(i) for i in ids]
    whole = decode(tokenizer, ids)
    texts = _added(tokenizer, ids, _BACK, whole)
    if "".join(texts) != whole:
        # A decoder whose pieces depend on more than a few tokens before.
        texts = _added(tokenizer, ids, len(ids), whole)
    if "".join(texts) != whole:
        # Nothing to be had but the tokens by themselves, which need not join up.
        texts = [decode(tokenizer, [i]) for i in ids]
    return texts


def _added(tokenizer: Any, ids: list[int], back: int, whole: str) -> list[str]:
    """The growth of the whole text, token by token, seen from at most ``back`` tokens before."""
    texts: list[str] = []
    done = 0  # characters so far
    start = 0  # the window's first token; `said`: what the window has given so far
    said = ""
    for stop in range(1, len(ids) + 1):
        now = decode(tokenizer, ids[start:stop])
        more = now[len(said) :]
        # The sign for broken characters may also stand in the data.
        unfinished = now.endswith(_BROKEN) and not whole.startswith(more, done)
        if unfinished or not now.startswith(said):
            texts.append("")
            continue
        texts.append(more)
        done += len(more)
        if stop - start >= 2 * back:
            start = stop - back
            now = decode(tokenizer, ids[start:stop])
        said = now
    return texts
