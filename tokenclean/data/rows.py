"""Rows of a pool or of a cleaned pool, as the samples that scoring and training take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from tokenclean.arrow import ROWS_PER_SHARD, ArrowTable, ListColumn
from tokenclean.data.batches import Sample
from tokenclean.data.pool import TokenPool, extents
from tokenclean.data.pretokenised import NO_LOSS as NO_LOSS

#: Which tokens of a pool are targets. ``prompt``: all that are no response, from the second on;
#: nothing learns from them, so they serve as a control for scores.
Targets = Literal["response", "prompt"]
#: among what `TokenRows.carrying` takes: not a column, but which tokens belong to the prompt
PROMPT = "prompt"


class TokenRows(Dataset[Sample]):
    """Map-style data set of samples read from memory-mapped Arrow.

    Args:
        table: a token pool (every response token is a target of weight 1) or a cleaned pool (the
            tokens whose label is not -100, with their weight).
        rows: which rows, in which order; all by default.
        targets: which tokens of a token pool are targets; see `Targets`.
        labels: take the labels of a token pool that has its own, with their weight, instead.

    Attributes:
        of: ``targets``.
        lengths: input tokens that each row needs, int64: up to its last target, 0 without one.
        counts: targets of each row, int64.
        negative: those among them whose weight is negative, int64.
        responses: response tokens of each row, kept or not, int64.
        cut: rows are computed up to their last target.
    """

    def __init__(
        self,
        table: ArrowTable,
        rows: np.ndarray | None = None,
        targets: Targets = "response",
        labels: bool = False,
    ):
        self.table, self.of = table, targets
        self.rows = np.arange(len(table)) if rows is None else np.asarray(rows, dtype=np.int64)
        self._input_ids = table.lists("input_ids")
        self._labels: ListColumn | None = None
        self._weights: ListColumn | None = None
        self._mask = table.lists("response_mask")
        if not isinstance(table, TokenPool) or (labels and table.has_labels):
            self._labels, self._weights = table.lists("labels"), table.lists("weight")
        lengths, responses = extents(self._mask)
        counts = responses
        if self._labels is not None:
            lengths, counts = extents(self._labels, NO_LOSS)
        if targets == "prompt":
            if self._labels is not None:
                raise ValueError(
                    f"data.targets: prompt tokens of {table.folder} cannot be chosen, since it is "
                    "a cleaned pool; give the raw data"
                )
            lengths, counts = extents(self._mask, True)
        self.lengths, self.counts = lengths[self.rows], counts[self.rows]
        self.negative = np.zeros_like(self.counts)
        if self._labels is not None and self._weights is not None:
            self.negative = _negative(self._labels, self._weights)[self.rows]
        self.responses = responses[self.rows]
        self.cut = True
        self._carried: dict[str, ListColumn] = {}
        self._with_prompt = False
        self._unlearns = True

    def __len__(self) -> int:
        return len(self.rows)

    def to_the_end(self) -> TokenRows:
        """The same rows, computed to their last token instead of their last target."""
        whole = copy.copy(self)
        whole.lengths = np.where(self.counts > 0, self._input_ids.counts()[self.rows], 0)
        whole.cut = False
        return whole

    def learnt(self) -> TokenRows:
        """The same rows without the targets that are to be unlearnt, those of negative weight."""
        some = copy.copy(self)
        some.counts, some.negative = self.counts - self.negative, np.zeros_like(self.negative)
        some.lengths = np.where(some.counts > 0, self.lengths, 0)
        some._unlearns = False
        return some

    def carrying(self, names: Sequence[str]) -> TokenRows:
        """The same rows, whose samples bring more along.

        Args:
            names: columns of the cleaned pool (``reference_nll``, ``base_nll``) for
                `Sample.extra`; `PROMPT` for `Sample.prompt`, which also computes samples to their
                end, so that the last target has a row of its own.

        Raises:
            ValueError: if a target has no number there.
        """
        more = self.to_the_end() if PROMPT in names else copy.copy(self)
        more._with_prompt = PROMPT in names
        more._carried = {}
        for name in names:
            if name != PROMPT:
                more._check_known(name)
                more._carried[name] = self.table.lists(name)
        return more

    def _check_known(self, name: str) -> None:
        """Refuse a column that is null at a target."""
        option = "--" + name.removesuffix("_nll")
        remedy = f"train on a cleaned pool that `select` made with {option}, or `clean` for its arm"
        if name not in self.table.columns:
            raise ValueError(
                f"model.weighting: it needs {name} of every trained token, and {self.table.folder} "
                f"is no cleaned pool; {remedy}"
            )
        wanted = np.zeros(len(self.table), dtype=bool)
        wanted[self.rows] = True
        assert self._labels is not None
        pairs = zip(self._labels.blocks(), self.table.lists(name).blocks(), strict=True)
        for (first, sizes, labels), (_, _, values) in pairs:
            missing = np.isnan(values) & (labels != NO_LOSS)
            row = np.repeat(np.arange(first, first + len(sizes)), sizes)[missing]
            row = row[wanted[row]]
            if len(row):
                raise ValueError(
                    f"model.weighting: it needs {name} of every trained token, and sample "
                    f"{self.table.texts('id')[int(row[0])]!r} of {self.table.folder} has none; "
                    f"{remedy}"
                )

    def targets_of(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets of the rows ``self.rows[first:stop]`` of a token pool, end to end.

        Returns:
            Position of each in its sample, int64, and its token id, int32.
        """
        chosen = self.rows[first:stop]
        lengths, mask = self._mask.take(chosen)
        starts = np.cumsum(lengths) - lengths
        targets = mask == (self.of == "response")
        targets[starts[lengths > 0]] = False
        at = np.flatnonzero(targets)
        positions = at - np.repeat(starts, self.counts[first:stop])
        return positions, self._input_ids.take(chosen)[1][at]

    def target_ids(self) -> np.ndarray:
        """Token ids that occur among the targets of a token pool: ascending, int64."""
        found = np.zeros(0, dtype=np.int64)
        for first in range(0, len(self.rows), ROWS_PER_SHARD):
            ids = self.targets_of(first, min(first + ROWS_PER_SHARD, len(self.rows)))[1]
            found = np.union1d(found, ids)
        return found.astype(np.int64)

    def ids_with_targets(self) -> list[str]:
        """Ids of the samples that teach something: what a model trained on these rows has seen."""
        ids: list[str] = self.table.texts("id").take(self.rows[self.counts > 0]).to_pylist()
        return ids

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        input_ids = self._input_ids[row]
        if self._labels is None:
            positions = (self._mask[row][1:] == (self.of == "response")).nonzero()[0] + 1
            weights = np.ones(len(positions), dtype=np.float32)
        else:
            assert self._weights is not None
            # As everywhere: nothing precedes the first token, so nothing can predict it.
            positions = (self._labels[row][1:] != NO_LOSS).nonzero()[0] + 1
            weights = self._weights[row][positions]
            if not self._unlearns:
                positions, weights = positions[weights > 0.0], weights[weights > 0.0]
        length = int(positions[-1]) if self.cut and len(positions) else len(input_ids)
        extra = {name: column[row][positions] for name, column in self._carried.items()}
        prompt = ~self._mask[row] if self._with_prompt else None
        return Sample(row, input_ids, positions, weights, length, extra, prompt)


def _negative(labels: ListColumn, weights: ListColumn) -> np.ndarray:
    """How many targets of each row have a negative weight, int64."""
    counts = np.zeros(len(labels), dtype=np.int64)
    for (first, sizes, ids), (_, _, values) in zip(labels.blocks(), weights.blocks(), strict=True):
        targets = ids != NO_LOSS
        targets[(np.cumsum(sizes) - sizes)[sizes > 0]] = False  # nothing predicts these
        found = np.cumsum(targets & (values < 0.0))
        counts[first : first + len(sizes)] = np.diff(
            np.append(0, found)[np.append(0, np.cumsum(sizes))]
        )
    return counts
