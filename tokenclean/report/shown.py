"""Samples as an arm cleaned them: copies of what a report shows of a block's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock

#: Tokens shown of one sample: of a longer one the beginning of its first response.
MAX_TOKENS: Final = 2000
#: Tokens before that response.
_LEAD: Final = 64


@dataclass(frozen=True)
class Row:
    """One sample as an arm cleaned it, or the part of it that is shown: T tokens, n in responses.

    Attributes:
        number: of its row in the pool.
        id, source, round: of the row.
        kept, total: of the whole sample's response tokens, how many carry loss, and all.
        highest, lowest: score of its ranked tokens; NaN if it has none.
        first, length: position of the first token shown, and how many tokens the sample has.
        input_ids: int32, shape (T,).
        response: bool, shape (T,).
        base, reference, score, priority: shape (n,), NaN where there is none.
        reason: int8, shape (n,).
        weight: float32, shape (n,): of the loss, 0 for none.
        truth: int8, shape (n,), or None.
    """

    number: int
    id: str
    source: str
    round: int
    kept: int
    total: int
    highest: float
    lowest: float
    first: int
    length: int
    input_ids: np.ndarray
    response: np.ndarray
    base: np.ndarray
    reference: np.ndarray
    score: np.ndarray
    priority: np.ndarray
    reason: np.ndarray
    weight: np.ndarray
    truth: np.ndarray | None


class Maker:
    """Makes rows of one block, those that are wanted.

    Args:
        block: R rows of n tokens.
        keeps, totals: kept and all response tokens of each row, int64, shape (R,).
        highest, lowest: score of each row's ranked tokens, shape (R,); infinite for none.

    Attributes:
        shown: which tokens a row would show, bool, shape (n,).
    """

    def __init__(
        self,
        block: CleanedBlock,
        keeps: np.ndarray,
        totals: np.ndarray,
        highest: np.ndarray,
        lowest: np.ndarray,
    ):
        self._block, self._keeps, self._totals = block, keeps, totals
        self._highest, self._lowest = highest, lowest
        self._stops = np.cumsum(block.counts)
        # the first token shown of each row: few rows are so long that it is not the first
        start = np.zeros(len(block.ids), np.int64)
        for long in np.flatnonzero(block.counts > MAX_TOKENS):
            inside = np.flatnonzero(block.response[block.tokens_of(int(long))])
            start[long] = max(0, int(inside[0]) - _LEAD) if len(inside) else 0
        self._start = start
        first = start[block.row]
        self.shown = (block.position >= first) & (block.position < first + MAX_TOKENS)

    def row(self, i: int) -> Row:
        """Row ``i`` of the block."""
        block, first = self._block, int(self._start[i])
        begin = int(self._stops[i] - block.counts[i]) + first
        here = slice(begin, min(int(self._stops[i]), begin + MAX_TOKENS))
        inside = np.flatnonzero(block.response[here]) + here.start
        return Row(
            number=block.first + i,
            id=block.ids[i],
            source=block.sources[i],
            round=int(block.rounds[i]),
            kept=int(self._keeps[i]),
            total=int(self._totals[i]),
            highest=float(self._highest[i]) if np.isfinite(self._highest[i]) else np.nan,
            lowest=float(self._lowest[i]) if np.isfinite(self._lowest[i]) else np.nan,
            first=first,
            length=int(block.counts[i]),
            # copies: a view would keep the whole block in memory
            input_ids=block.input_ids[here].copy(),
            response=block.response[here].copy(),
            base=block.base[inside],
            reference=block.reference[inside],
            score=block.score[inside],
            priority=block.priority[inside],
            reason=block.reason[inside],
            weight=np.where(block.labels[inside] >= 0, block.weight[inside], np.float32(0)),
            truth=None if block.truth is None else block.truth[inside],
        )
