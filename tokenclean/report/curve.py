"""What another keep share would have kept: no scoring anew, the stored ranking is cut elsewhere.

Cuts are exact, ties included (`tokenclean.selection.topk`), and the numbers at the arm's own keep
share are those of its mask. Keys go to a file without a name beside the report, 9 bytes per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tokenclean.report.steps import Ranked
from tokenclean.selection.topk import (
    FIRST,
    Histogram,
    kth_largest,
    ordered_keys,
    score_of,
    top_mask,
)

#: Keep shares of a curve, besides the arm's own.
GRID: Final = tuple(round(0.05 * i, 2) for i in range(1, 21))


@dataclass(frozen=True)
class Point:
    """What a keep share keeps.

    Attributes:
        keep: the share asked for.
        cut: smallest value kept, in the unit of what the rule goes by; None where there is no one
            cut (inside samples) or nothing is kept.
        kept: tokens.
        emptied: samples that keep no token.
        ends_kept: end-of-sequence tokens that are kept.
    """

    keep: float
    cut: float | None
    kept: int
    emptied: int
    ends_kept: int


@dataclass(frozen=True)
class Curve:
    """The points of one step.

    Attributes:
        tokens, samples, ends: what was ranked.
        points: by rising keep share.
    """

    tokens: int
    samples: int
    ends: int
    points: list[Point]


def add_up(curves: list[Curve]) -> Curve:
    """Several steps together, each cut by itself; a cut only if there is one step."""
    points = [
        Point(
            same[0].keep,
            same[0].cut if len(same) == 1 else None,
            sum(p.kept for p in same),
            sum(p.emptied for p in same),
            sum(p.ends_kept for p in same),
        )
        for same in zip(*(c.points for c in curves), strict=True)
    ]
    return Curve(
        sum(c.tokens for c in curves),
        sum(c.samples for c in curves),
        sum(c.ends for c in curves),
        points,
    )


class Ranking:
    """The values of one step, kept until all of them are known.

    Args:
        folder: on whose disk they are put aside; nothing of them stays.
        scope: ``global``, ``sample`` or ``whole_sample``, as of the selection.
        ends_first: end-of-sequence tokens are ranked before all others.
    """

    def __init__(self, folder: Path, scope: str, ends_first: bool = False):
        self._scope, self._ends_first = scope, ends_first
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._histogram = Histogram()
        #: tokens of each row that has any, by chunk
        self._counts: list[np.ndarray] = []
        self._means: list[np.ndarray] = []
        self._ends = 0

    def add(self, rows: np.ndarray, values: np.ndarray, ends: np.ndarray) -> None:
        """Add whole samples.

        Args:
            rows: sample of each token, ascending, int64, shape (m,).
            values: what the rule goes by, higher is kept first: float64, shape (m,).
            ends: whether a token ends the sequence, bool, shape (m,).

        Raises:
            ValueError: if a value is NaN.
        """
        if not len(rows):
            return
        keys = ordered_keys(values)
        if self._ends_first:
            keys[ends] = FIRST
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        counts = np.diff(np.append(starts, len(rows)))
        self._file.write(keys.tobytes())
        self._file.write(ends.tobytes())
        self._counts.append(counts)
        if self._scope == "whole_sample":
            self._means.append(np.add.reduceat(values, starts) / counts)
        elif self._scope == "global":
            self._histogram.add(keys)
        self._ends += int(ends.sum())

    def curve(self, shares: list[float]) -> Curve:
        """What each keep share keeps."""
        tallies = [_Tally(share) for share in sorted(shares)]
        if self._scope == "sample":
            self._cut_samples(tallies)
        elif self._scope == "whole_sample":
            self._cut_whole_samples(tallies)
        else:
            self._cut(tallies)
        counts = self._counts
        points = [Point(t.keep, t.cut, t.kept, t.emptied, t.ends) for t in tallies]
        return Curve(sum(int(c.sum()) for c in counts), sum(map(len, counts)), self._ends, points)

    def close(self) -> None:
        self._file.close()

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Counts per row, keys and ends, as they were added."""
        self._file.seek(0)
        for counts in self._counts:
            size = int(counts.sum())
            keys = np.frombuffer(self._file.read(8 * size), dtype=np.uint64)
            yield counts, keys, np.frombuffer(self._file.read(size), dtype=np.bool_)

    def _keys(self) -> Iterator[np.ndarray]:
        for _, keys, _ in self._chunks():
            yield keys

    def _cut(self, tallies: list[_Tally]) -> None:
        total = self._histogram.total()
        for tally in tallies:
            # as `tokenclean.selection.select` does
            budget = max(int(total * tally.keep), self._histogram.firsts())
            key, above, _ = kth_largest(self._keys, budget, self._histogram)
            tally.key, tally.ties = key, budget - above
            tally.cut = None if key == FIRST else score_of(key)
        for counts, keys, ends in self._chunks():
            for tally in tallies:
                mask, tally.ties = top_mask(keys, tally.key, tally.ties)
                tally.add(mask, counts, ends)

    def _cut_samples(self, tallies: list[_Tally]) -> None:
        for counts, keys, ends in self._chunks():
            row = np.repeat(np.arange(len(counts)), counts)
            # by row, then the best first, then by place
            order = np.lexsort((~keys, row))
            starts = np.cumsum(counts) - counts
            rank = np.empty(len(keys), dtype=np.int64)
            rank[order] = np.arange(len(keys)) - starts[row]
            firsts = np.bincount(row[keys == np.uint64(FIRST)], minlength=len(counts))
            for tally in tallies:
                budget = np.maximum((counts * tally.keep).astype(np.int64), firsts)
                tally.add(rank < budget[row], counts, ends)

    def _cut_whole_samples(self, tallies: list[_Tally]) -> None:
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *self._counts])
        means = np.concatenate([np.zeros(0), *self._means])
        order = np.argsort(-means, kind="stable")
        sizes = np.cumsum(counts[order])
        chosen = []
        for tally in tallies:
            fits = order[sizes <= int(counts.sum() * tally.keep)]
            tally.cut = float(means[fits[-1]]) if len(fits) else None
            mask = np.zeros(len(counts), dtype=bool)
            mask[fits] = True
            chosen.append(mask)
        start = 0
        for counts, _, ends in self._chunks():
            rows = slice(start, start := start + len(counts))
            for tally, mask in zip(tallies, chosen, strict=True):
                tally.add(np.repeat(mask[rows], counts), counts, ends)


@dataclass
class _Tally:
    """A `Point` in the making; ``key`` and ``ties`` are where it cuts."""

    keep: float
    cut: float | None = None
    key: int = FIRST
    ties: int = 0
    kept: int = 0
    emptied: int = 0
    ends: int = 0

    def add(self, mask: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
        self.kept += int(np.count_nonzero(mask))
        self.ends += int(np.count_nonzero(mask & ends))
        left = np.logical_or.reduceat(mask, np.cumsum(counts) - counts)
        self.emptied += int(np.count_nonzero(~left))


class Rankings:
    """`Ranking` for every step of an arm.

    Args:
        folder, scope, ends_first: see `Ranking`.
        by: column that is ranked.
        eos_id: the end of the sequence.
    """

    def __init__(self, folder: Path, scope: str, ends_first: bool, by: str, eos_id: int):
        self._make = (folder, scope, ends_first)
        self._by, self._eos_id = by, eos_id
        self.steps: dict[int, Ranking] = {}

    def add(self, ranked: Ranked) -> None:
        """Add some rows.

        Raises:
            ValueError: if a value is NaN.
        """
        values = ranked.values(self._by)
        ends = ranked.block.input_ids[ranked.at] == self._eos_id
        for step in np.unique(ranked.step).tolist():
            of = ranked.step == step
            ranking = self.steps.setdefault(step, Ranking(*self._make))
            ranking.add(ranked.row[of], values[of], ends[of])

    def curves(self, shares: dict[int, list[float]]) -> dict[int, Curve]:
        """The curve of every step at its keep shares; the values are gone then."""
        found = {}
        for step, ranking in sorted(self.steps.items()):
            found[step] = ranking.curve(shares[step])
            ranking.close()
        return found
