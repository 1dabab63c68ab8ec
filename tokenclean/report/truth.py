"""Judging a ranking and a mask by planted truth: curves, areas, and kinds of noise.

Areas are exact: tokens of equal value are one threshold. Planted pools are small, so a token's
value, truth, mask, source and kind are held in memory (13 bytes).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from tokenclean.data.kinds import KINDS, token_kinds
from tokenclean.data.planted import CORRUPTED, REGIMES
from tokenclean.report.steps import Ranked
from tokenclean.report.tokens import Vocabulary, turn_bounds

INFORMATIVE = 1
#: Of the tokens of one source or all: informative ones against these.
OTHERS, CORRUPT = "all others", "corrupted"


@dataclass(frozen=True)
class Curves:
    """ROC and precision-recall curve of a ranking; a point per distinct value, best first.

    Attributes:
        positives, negatives: tokens.
        true_positive, false_positive: rates above each value, from (0, 0) to (1, 1): float64, (p,).
        precision: above each value, float64, shape (p,); the first, of nothing, is that of the
            second.
        auroc: area under the ROC curve by trapezes: ties count half.
        average_precision: sum of precision times the recall that each value adds.
    """

    positives: int
    negatives: int
    true_positive: np.ndarray
    false_positive: np.ndarray
    precision: np.ndarray
    auroc: float
    average_precision: float


def curves(values: np.ndarray, positive: np.ndarray) -> Curves | None:
    """Curves of a ranking.

    Args:
        values: higher is more surely positive: float64, shape (n,).
        positive: bool, shape (n,).

    Returns:
        None if a value is NaN or a class is missing.
    """
    n, m = int(np.count_nonzero(positive)), int(np.count_nonzero(~positive))
    if not n or not m or np.isnan(values).any():
        return None
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    # the last token of each distinct value
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits = np.cumsum(positive[order])[last]
    above = last + 1
    true_positive = np.append(0.0, hits / n)
    false_positive = np.append(0.0, (above - hits) / m)
    precision = hits / above
    return Curves(
        n,
        m,
        true_positive,
        false_positive,
        np.append(precision[0], precision),
        float(np.trapezoid(true_positive, false_positive)),
        float((np.diff(true_positive) * precision).sum()),
    )


@dataclass(frozen=True)
class Operating:
    """Where a mask stands: recall is its true positive rate; NaN where it is not defined."""

    recall: float
    false_positive: float
    precision: float


def operating(kept: np.ndarray, positive: np.ndarray) -> Operating:
    """Of a mask: bool, shape (n,) both."""

    def share(part: np.ndarray, whole: np.ndarray) -> float:
        count = int(np.count_nonzero(whole))
        return int(np.count_nonzero(part & whole)) / count if count else math.nan

    return Operating(share(kept, positive), share(kept, ~positive), share(positive, kept))


class Truths:
    """The ranked tokens of a planted pool, put aside to be judged.

    Args:
        by: column that the rule goes by, or None.
        vocabulary: to read kinds of noise with; None leaves them out.
        eos_id: the end of the sequence.
    """

    def __init__(self, by: str | None, vocabulary: Vocabulary | None, eos_id: int):
        self._by, self._vocabulary, self._eos_id = by, vocabulary, eos_id
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)
        #: sources by number
        self.sources: dict[str, int] = {}
        #: kinds were read: the pool's sources are the planted families
        self.has_kinds = vocabulary is not None

    def add(self, ranked: Ranked) -> None:
        """Put some rows aside."""
        block, at = ranked.block, ranked.at
        assert block.truth is not None
        number = [self.sources.setdefault(s, len(self.sources)) for s in block.sources]
        parts = self._parts
        parts["value"].append(ranked.values(self._by))
        parts["truth"].append(block.truth[at])
        parts["kept"].append(ranked.kept)
        parts["source"].append(np.array(number, dtype=np.int32)[ranked.row])
        self.has_kinds &= set(block.sources) <= set(REGIMES)
        if self.has_kinds:
            parts["kind"].append(self._kinds(ranked)[at])

    def _kinds(self, ranked: Ranked) -> np.ndarray:
        """Index into `KINDS` of each token of a block, int8, shape (n,)."""
        block = ranked.block
        assert self._vocabulary is not None and block.truth is not None
        kinds = np.zeros(len(block.input_ids), dtype=np.int8)
        for start, stop in zip(*turn_bounds(block), strict=True):
            ids = block.input_ids[start:stop].tolist()
            kinds[start:stop] = token_kinds(
                [self._vocabulary.text(i) for i in ids],
                block.truth[start:stop],
                block.sources[int(block.row[start])],
                ends=ids[-1] == self._eos_id,
            )
        return kinds

    def __getitem__(self, name: str) -> np.ndarray:
        """``value``, ``truth``, ``kept``, ``source`` or ``kind`` of all tokens: shape (n,)."""
        if len(self._parts[name]) > 1:
            self._parts[name] = [np.concatenate(self._parts[name])]
        found: np.ndarray = self._parts[name][0]
        return found

    def against(self, others: str, source: str | None = None) -> np.ndarray:
        """Informative tokens and those that they are to be told from: bool, shape (n,).

        Args:
            others: `OTHERS` or `CORRUPT`.
            source: one source's; None for all.
        """
        truth = self["truth"]
        chosen = np.ones(len(truth), dtype=bool)
        if others == CORRUPT:
            chosen = (truth == INFORMATIVE) | (truth == CORRUPTED)
        if source is not None:
            chosen &= self["source"] == self.sources[source]
        return chosen

    def kind_table(self) -> list[list[object]]:
        """Rows of kind, truth, tokens, kept, kept share."""
        kinds, truth, kept = self["kind"], self["truth"], self["kept"]
        names = {1: "informative", 0: "uninformative", CORRUPTED: "corrupted"}
        rows: list[list[object]] = []
        for number, kind in enumerate(KINDS):
            for value, name in names.items():
                of = (kinds == number) & (truth == value)
                if count := int(np.count_nonzero(of)):
                    left = int(np.count_nonzero(kept & of))
                    rows.append([kind, name, count, left, left / count])
        return rows
