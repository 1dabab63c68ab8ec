"""Samples to read: which of an arm's samples a report shows, found in one pass over its pool.

A page cannot hold a pool. It shows samples of every source at every kept share, drawn by a hash of
their ids, those with the most extreme scores, and those with dropped tokens worth doubting.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.finished import CleanedArm
from tokenclean.report.doubts import DoubtLists
from tokenclean.report.percentiles import Sketch
from tokenclean.report.shown import Maker, Row
from tokenclean.report.verdict import Fate
from tokenclean.selection.rule import SEEN

#: Sources beyond so many are drawn together.
MAX_SOURCES: Final = 400
OTHERS: Final = "(other sources)"
#: Samples of either extreme of the score.
EXTREMES: Final = 6


@dataclass
class Count:
    """Ranked response tokens of a source or a round, and the kept ones among them."""

    ranked: int = 0
    kept: int = 0

    @property
    def dropped(self) -> int:
        return self.ranked - self.kept


class Draw:
    """What a report shows of one arm's samples; `add` every block of its pool, in order.

    Args:
        arm: whose pool it is.
        limit: samples to show, at most; four times as many are in memory, and at least one of
            every source and kept share.

    Attributes:
        samples: rows read.
        has_truth: the pool is planted.
        sources, rounds: ranked and kept tokens of each.
        scores, priorities: of the ranked tokens.
        fate: what became of the ranked tokens.
        doubts: lists of dropped tokens that may be wrong drops.
    """

    def __init__(self, arm: CleanedArm, limit: int):
        self.arm, self.limit = arm, limit
        manifest = arm.manifest
        #: D_0 trains the first reference and is not cleaned; other pools have no such rows
        self.has_uncleaned = "rounds" in manifest
        self.samples = 0
        self.has_truth = False
        self.sources: dict[str, Count] = {}
        self.rounds: dict[int, Count] = {}
        self.scores, self.priorities = Sketch(), Sketch()
        self._strata: dict[tuple[str, int], list[tuple[int, int, Row]]] = {}
        self._extremes: tuple[list[tuple[float, int, Row]], ...] = ([], [])
        self.fate = Fate(manifest.get("eos_id"))
        self.doubts = DoubtLists()

    def add(self, block: CleanedBlock) -> None:
        """Look at a block of rows."""
        rows, row = len(block.ids), block.row
        at = np.flatnonzero(block.response)
        kept = block.kept & block.response
        totals = np.bincount(row[at], minlength=rows)
        keeps = np.bincount(row[kept], minlength=rows)
        cleaned = block.rounds > 0 if self.has_uncleaned else np.ones(rows, dtype=bool)
        ranked = block.response & cleaned[row] & (block.reason != SEEN)
        self.scores.add(block.score[ranked])
        self.priorities.add(block.priority[ranked])
        self._count(block, ranked, kept)
        self.fate.add(block, ranked, kept)
        highest, lowest = np.full(rows, -np.inf), np.full(rows, np.inf)
        np.fmax.at(highest, row[ranked], block.score[ranked])
        np.fmin.at(lowest, row[ranked], block.score[ranked])
        maker = Maker(block, keeps, totals, highest, lowest)
        for i, (id, source) in enumerate(zip(block.ids, block.sources, strict=True)):
            self._offer(
                maker, block.first, i, id, source, int(totals[i]), int(keeps[i]), cleaned[i]
            )
        self._offer_extremes(maker, block.first, highest, lowest)
        found = {r: cut_of(self.arm.manifest, r) for r in set(block.rounds.tolist())}
        cuts = {r: np.nan if cut is None else cut for r, cut in found.items()}
        cut = np.array([cuts[r] for r in block.rounds.tolist()])[row]
        self.doubts.add(block, maker, ranked & ~kept, kept, cut)
        self.has_truth |= block.truth is not None
        self.samples += rows

    def _count(self, block: CleanedBlock, ranked: np.ndarray, kept: np.ndarray) -> None:
        rows = len(block.ids)
        all_ranked = np.bincount(block.row[ranked], minlength=rows).tolist()
        all_kept = np.bincount(block.row[ranked & kept], minlength=rows).tolist()
        places = zip(block.sources, block.rounds.tolist(), all_ranked, all_kept, strict=True)
        for source, number, n, k in places:
            for count in (
                self.sources.setdefault(self._named(source), Count()),
                self.rounds.setdefault(number, Count()),
            ):
                count.ranked += n
                count.kept += k

    def _named(self, source: str) -> str:
        return source if source in self.sources or len(self.sources) < MAX_SOURCES else OTHERS

    def _offer(
        self,
        maker: Maker,
        first: int,
        i: int,
        id: str,
        source: str,
        total: int,
        kept: int,
        clean: bool,
    ) -> None:
        """Draw a row by the hash of its id: among all of its source, and among its kept share's."""
        # no two arms agree in kept shares, but they all draw the same of a source
        strata = [0, 1 + _share_bin(kept, total)] if clean and total else [8]
        place = -int.from_bytes(hashlib.sha256(id.encode("utf-8", "replace")).digest()[:8], "big")
        row: Row | None = None
        for stratum in strata:
            key = (self._named(source), stratum)
            if key not in self._strata:
                self._strata[key] = []
                for drawn in self._strata.values():
                    while len(drawn) > self._quota:
                        heapq.heappop(drawn)
            drawn = self._strata[key]
            if len(drawn) < self._quota or place > drawn[0][0]:
                row = row or maker.row(i)
                heapq.heappush(drawn, (place, -(first + i), row))
                if len(drawn) > self._quota:
                    heapq.heappop(drawn)

    @property
    def has_extremes(self) -> bool:
        """Some ranked token has a score."""
        return any(self._extremes)

    @property
    def cuts_by_score(self) -> bool:
        """Tokens were dropped for a score below a cut."""
        manifest = self.arm.manifest
        cuts = [cut_of(manifest, n) for n in self.rounds]
        cuts += [half.get("cut") for half in manifest.get("halves", [])]
        return self.fate.dropped > 0 and any(cut is not None for cut in cuts)

    @property
    def _quota(self) -> int:
        """Rows per stratum: the more strata there are, the fewer; never grows."""
        return max(1, 4 * self.limit // max(4, len(self._strata)))

    def _offer_extremes(
        self, maker: Maker, first: int, highest: np.ndarray, lowest: np.ndarray
    ) -> None:
        for heap, values in zip(self._extremes, (highest, -lowest), strict=True):
            for i in np.argsort(-values, kind="stable")[:EXTREMES].tolist():
                entry = (float(values[i]), -(first + i))
                if np.isfinite(values[i]) and (len(heap) < EXTREMES or entry > heap[0][:2]):
                    heapq.heappush(heap, (*entry, maker.row(i)))
                    if len(heap) > EXTREMES:
                        heapq.heappop(heap)

    def ordered(self) -> list[Row]:
        """What to show, most worth showing first; at most ``limit``, no row twice."""
        chosen: dict[int, Row] = {}
        for row in self._wanted():
            if len(chosen) == self.limit:
                break
            chosen.setdefault(row.number, row)
        return list(chosen.values())

    def _wanted(self) -> Iterator[Row]:
        for doubts in self.doubts.lists.values():
            yield from (doubt.row for doubt in doubts.best())
        for heap in self._extremes:
            yield from (row for *_, row in sorted(heap, key=lambda e: e[:2], reverse=True))
        drawn = [
            [row for *_, row in sorted(heap, key=lambda e: e[:2], reverse=True)]
            for _, heap in sorted(self._strata.items(), key=lambda item: item[0])
        ]
        for turn in zip_longest(*drawn):
            yield from (row for row in turn if row is not None)


def _share_bin(kept: int, total: int) -> int:
    """0: nothing kept, 1 to 4: up to a quarter, ..., less than all, 5: everything."""
    return 0 if kept == 0 else 5 if kept == total else 1 + (4 * kept) // total


def cut_of(manifest: dict[str, Any], number: int) -> float | None:
    """The cut of the score in a round; None if it had none, as those of other rules."""
    rounds = manifest.get("rounds")
    if rounds is None:
        cut = manifest.get("cut")
    else:
        cut = rounds[number].get("cut") if 0 <= number < len(rounds) else None
    return None if cut is None else float(cut)
