"""Dropped tokens that may be wrong drops: lists to read, by what is known of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.planted import UNINFORMATIVE
from tokenclean.report.shown import Maker, Row

#: Tokens of each list.
DOUBTS: Final = 12
#: Kinds of token kept while the pool is read, of which a list shows the best `DOUBTS`.
_CANDIDATES: Final = 4 * DOUBTS
#: Kept neighbours on either side that make a dropped token a hole in a kept stretch.
_BESIDE: Final = 2
#: Nats: a token that both models give 9 chances in 10 teaches nothing, so its drop is no loss.
KNOWN: Final = 0.1
_KNOWN_NOTE: Final = f"Tokens whose losses are all below {KNOWN} nats are left out."


@dataclass(frozen=True)
class Doubt:
    """A dropped token worth a look.

    Attributes:
        row: its sample.
        position: in the sample.
        value: what its list is ordered by, largest first.
        cut: of the score, where it was ranked; NaN where there is none.
    """

    row: Row
    position: int
    value: float
    cut: float = np.nan


@dataclass
class Doubts:
    """A list of dropped tokens that may be wrong drops, the likeliest first.

    Attributes:
        title: what they have in common.
        short: the same in few words.
        note: why that may be wrong, and why it may not.
        found: token id -> the best of the tokens with that id.
    """

    title: str
    short: str
    note: str
    found: dict[int, Doubt] = field(default_factory=dict)

    def best(self) -> list[Doubt]:
        """At most `DOUBTS`, no two of one sample or one token id."""
        of_rows: dict[int, Doubt] = {}
        for doubt in sorted(self.found.values(), key=_order):
            of_rows.setdefault(doubt.row.number, doubt)
        return list(islice(of_rows.values(), DOUBTS))


def _order(doubt: Doubt) -> tuple[float, int, int]:
    return -doubt.value, doubt.row.number, doubt.position


class DoubtLists:
    """All lists, filled block by block.

    Attributes:
        lists: key -> list, those that are surest first; some may stay empty.
    """

    def __init__(self) -> None:
        self.lists = {
            "truth": Doubts(
                "Informative by planted truth, and dropped",
                "informative by planted truth",
                "Wrong drops for certain, since this pool's noise is known; highest loss first.",
            ),
            "holes": Doubts(
                "Single tokens dropped out of a kept stretch",
                "dropped between kept tokens",
                "The two tokens before and after are kept, so the drop is no noisy sentence. "
                "Highest loss first: the model did not expect it, and still it is not learnt. "
                f"{_KNOWN_NOTE}",
            ),
            "near": Doubts(
                "Just below the cut",
                "just below the cut",
                "The next to be kept, had a little more been kept; nearest to the cut first. Some "
                f"are as good as what was kept. {_KNOWN_NOTE}",
            ),
            "surprising": Doubts(
                "Dropped with the highest loss",
                "of the highest loss",
                "What the model expected least. Much of it is noise that no model can learn; a "
                "fact among it is a loss.",
            ),
        }

    def add(
        self,
        block: CleanedBlock,
        maker: Maker,
        dropped: np.ndarray,
        kept: np.ndarray,
        cut: np.ndarray,
    ) -> None:
        """Look at a block of n tokens.

        Args:
            maker: of its rows; tokens that these would not show are passed over.
            dropped, kept: of the response tokens, bool, shape (n,).
            cut: of the score, float64, shape (n,); NaN where there is none.
        """
        dropped = dropped & maker.shown
        loss = _loss(block)
        scored = dropped & ~np.isnan(loss)
        if block.truth is not None:
            wrong = dropped & (block.truth > UNINFORMATIVE)
            self._offer("truth", maker, block, wrong, loss, cut)
        beside = np.ones(len(kept), dtype=bool)
        for shift in (s for n in range(1, _BESIDE + 1) for s in (n, -n)):
            near = np.roll(kept, shift)
            near[: max(shift, 0)] = False
            near[len(near) + min(shift, 0) :] = False
            beside &= near & (np.roll(block.row, shift) == block.row)
        new = scored & (np.fmax(block.base, block.reference) >= KNOWN)
        self._offer("holes", maker, block, new & beside, loss, cut)
        self._offer("near", maker, block, new & (block.score <= cut), block.score - cut, cut)
        self._offer("surprising", maker, block, scored, loss, cut)

    def _offer(
        self,
        name: str,
        maker: Maker,
        block: CleanedBlock,
        among: np.ndarray,
        values: np.ndarray,
        cut: np.ndarray,
    ) -> None:
        at = np.flatnonzero(among)
        value = np.nan_to_num(values[at].astype(np.float64), nan=-np.inf)
        at = at[np.argsort(-value, kind="stable")]
        value = -np.sort(-value)
        _, firsts = np.unique(block.input_ids[at], return_index=True)
        found = self.lists[name].found
        for i in np.sort(firsts)[:_CANDIDATES].tolist():
            token, worth = int(block.input_ids[at[i]]), float(value[i])
            if token in found and found[token].value >= worth:
                continue
            place = int(at[i])
            found[token] = Doubt(
                maker.row(int(block.row[place])),
                int(block.position[place]),
                worth,
                float(cut[place]),
            )
        for token in sorted(found, key=lambda t: _order(found[t]))[_CANDIDATES:]:
            del found[token]


def _loss(block: CleanedBlock) -> np.ndarray:
    """The base's loss; the reference's where the rule did not ask the base."""
    return np.where(np.isnan(block.base), block.reference, block.base)
