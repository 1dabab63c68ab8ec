"""Cleaned samples as text with character ranges, for whoever has another tokenizer.

A character belongs to the token that completes it. A token that ends within a character owns none;
it goes with the token that completes the character, whatever became of itself, so a span never cuts
a character.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.pieces import TokenTexts
from tokenclean.data.template import surroundings
from tokenclean.export.formats import Files, numbers, write_lines


class SpanWriter:
    """Writes `samples.jsonl` and counts how well texts give their tokens back.

    Args:
        tokenizer: the one that made the pool.
        template: of the pool; a chat template's text has everything in it, of others the tokenizer
            puts its own tokens (BOS) around the text, and the exported text is without them.
        reasons: code -> its name.
        weighted: say weights, too.
        per_token: also list every response token.

    Attributes:
        exact: samples whose text gives their own ids when it is tokenised again.
        add_special_tokens: how to tokenise it.
        shared: tokens that went with another's decision because they end within a character.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        reasons: Callable[[int], str],
        weighted: bool,
        per_token: bool,
    ):
        self.tokenizer, self.reasons = tokenizer, reasons
        self.weighted, self.per_token = weighted, per_token
        self.add_special_tokens = template != "chat"
        self.exact, self.shared = 0, 0
        self._texts = TokenTexts(tokenizer)
        around = surroundings(tokenizer) if self.add_special_tokens else ([], [])
        self._prefix, self._suffix = around
        self._added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)

    def write(self, folder: Path, blocks: Iterable[CleanedBlock]) -> Files:
        """Write every sample of some blocks."""
        write_lines(folder / "samples.jsonl", self._rows(blocks))
        return Files(["samples.jsonl"])

    def _rows(self, blocks: Iterable[CleanedBlock]) -> Iterator[dict[str, Any]]:
        for block in blocks:
            inner = [self._inner(block, row) for row in range(len(block.ids))]
            pieces = [self._texts(block.input_ids[at].tolist()) for at in inner]
            ids = [block.input_ids[block.tokens_of(row)].tolist() for row in range(len(block.ids))]
            exact = self._give_back(pieces, ids)
            for row in np.flatnonzero(~exact).tolist():
                at = inner[row]
                less = self._without_blanks(block.input_ids[at].tolist(), pieces[row])
                if less != pieces[row] and self._give_back([less], [ids[row]])[0]:
                    pieces[row], exact[row] = less, True
            self.exact += int(exact.sum())
            for row, at in enumerate(inner):
                yield {
                    "id": block.ids[row],
                    "source": block.sources[row],
                    "round": int(block.rounds[row]),
                    "exact": bool(exact[row]),
                    "text": "".join(pieces[row]),
                    **self._ranges(block, at, [len(p) for p in pieces[row]]),
                }

    def _give_back(self, pieces: list[list[str]], ids: list[list[int]]) -> np.ndarray:
        """Which texts, in pieces, give these ids when they are tokenised: bool, shape (R,)."""
        again = self.tokenizer(
            ["".join(parts) for parts in pieces],
            add_special_tokens=self.add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return np.array([a == b for a, b in zip(again, ids, strict=True)], dtype=bool)

    def _without_blanks(self, ids: list[int], pieces: list[str]) -> list[str]:
        """Pieces without the blank that tokenizers of SentencePiece's kind put behind each added
        token, which is no character of the text that they were given."""
        return [
            piece[1:] if last in self._added and piece.startswith(" ") else piece
            for last, piece in zip([None, *ids[:-1]], pieces, strict=True)
        ]

    def _inner(self, block: CleanedBlock, row: int) -> slice:
        """A row's tokens without what the tokenizer puts around a text by itself.

        A response's own EOS, at which a sample is cut, is not that, though it may look the same.
        """
        at = block.tokens_of(row)
        ids = block.input_ids[at].tolist()
        start, stop = at.start, at.stop
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            start += len(self._prefix)
        behind = len(self._suffix)
        if behind and ids[-behind:] == self._suffix and not block.response[at][-behind:].any():
            stop -= behind
        return slice(start, max(start, stop))

    def _ranges(self, block: CleanedBlock, at: slice, lengths: list[int]) -> dict[str, Any]:
        """Ranges of a row's responses, of its spans and, if asked for, of its tokens."""
        ends = np.cumsum(np.array(lengths, dtype=np.int64))
        starts = ends - np.array(lengths, dtype=np.int64)
        response = block.response[at]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], response.astype(np.int8), [0]])))
        turns = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        spans = [
            span
            for number, (first, stop) in enumerate(turns)
            for span in self._spans(block, at.start, number, starts, ends, first, stop)
        ]
        found: dict[str, Any] = {
            "responses": [[int(starts[first]), int(ends[stop - 1])] for first, stop in turns],
            "spans": spans,
        }
        if self.per_token:
            chosen = np.flatnonzero(response)
            of = at.start + chosen
            found["tokens"] = {
                "start": starts[chosen].tolist(),
                "end": ends[chosen].tolist(),
                "kept": block.kept[of].tolist(),
                "score": numbers(block.score[of]),
                "reason": [self.reasons(code) for code in block.reason[of].tolist()],
                **({"weight": block.weight[of].tolist()} if self.weighted else {}),
            }
        return found

    def _spans(
        self,
        block: CleanedBlock,
        offset: int,
        turn: int,
        starts: np.ndarray,
        ends: np.ndarray,
        first: int,
        stop: int,
    ) -> Iterator[dict[str, Any]]:
        """Runs of one decision and weight among the tokens ``first`` to ``stop`` of a row."""
        owners = _owners((ends > starts)[first:stop]) + first + offset
        tokens = np.arange(first, stop) + offset
        self.shared += int((block.kept[owners] != block.kept[tokens]).sum())
        weights = block.weight[owners] if self.weighted else np.ones(len(owners))
        columns = (block.kept[owners], block.reason[owners], weights)
        decided = list(zip(*(c.tolist() for c in columns), strict=True))
        bounds = [0, *(i for i, (a, b) in enumerate(pairwise(decided), 1) if a != b), len(decided)]
        for low, high in pairwise(bounds):
            start, end = int(starts[first + low]), int(ends[first + high - 1])
            if start == end:
                continue
            kept, code, weight = decided[low]
            score = block.score[tokens[low:high]]
            known = score[np.isfinite(score)]
            yield {
                "start": start,
                "end": end,
                "kept": kept,
                "turn": turn,
                "turn_start": start - int(starts[first]),
                "turn_end": end - int(starts[first]),
                "tokens": high - low,
                "score": float(known.mean()) if len(known) else None,
                "reason": self.reasons(code),
                **({"weight": weight} if self.weighted else {}),
            }


def _owners(full: np.ndarray) -> np.ndarray:
    """For each token, the next one that has characters, itself first; at the end, the last such.

    Args:
        full: which tokens have characters, bool, shape (n,).
    """
    places = np.flatnonzero(full)
    if not len(places):
        return np.arange(len(full))
    found: np.ndarray = places[
        np.minimum(np.searchsorted(places, np.arange(len(full))), len(places) - 1)
    ]
    return found
