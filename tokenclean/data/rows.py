"""Rows of a pool or of a cleaned pool, as the samples that scoring and training take."""

from __future__ import annotations

import copy

import numpy as np
from torch.utils.data import Dataset

from tokenclean.arrow import ArrowTable, ListColumn
from tokenclean.data.batches import Sample
from tokenclean.data.pool import TokenPool, extents

NO_LOSS = -100


class TokenRows(Dataset[Sample]):
    """Map-style data set of samples read from memory-mapped Arrow.

    Args:
        table: a token pool (every response token is a target of weight 1) or a cleaned pool (the
            tokens whose label is not -100, with their weight).
        rows: which rows, in which order; all by default.

    Attributes:
        lengths: input tokens that each row needs, int64: up to its last target, 0 without one.
        counts: targets of each row, int64.
        responses: response tokens of each row, kept or not, int64.
        cut: rows are computed up to their last target.
    """

    def __init__(self, table: ArrowTable, rows: np.ndarray | None = None):
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else np.asarray(rows, dtype=np.int64)
        self._input_ids = table.lists("input_ids")
        self._labels: ListColumn | None = None
        self._weights: ListColumn | None = None
        self._mask = table.lists("response_mask")
        if not isinstance(table, TokenPool):
            self._labels, self._weights = table.lists("labels"), table.lists("weight")
        lengths, responses = extents(self._mask)
        counts = responses
        if self._labels is not None:
            lengths, counts = extents(self._labels, NO_LOSS)
        self.lengths, self.counts = lengths[self.rows], counts[self.rows]
        self.responses = responses[self.rows]
        self.cut = True

    def __len__(self) -> int:
        return len(self.rows)

    def to_the_end(self) -> TokenRows:
        """The same rows, computed to their last token instead of their last target."""
        whole = copy.copy(self)
        whole.lengths = np.where(self.counts > 0, self._input_ids.counts()[self.rows], 0)
        whole.cut = False
        return whole

    def ids_with_targets(self) -> list[str]:
        """Ids of the samples that teach something: what a model trained on these rows has seen."""
        ids: list[str] = self.table.texts("id").take(self.rows[self.counts > 0]).to_pylist()
        return ids

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        input_ids = self._input_ids[row]
        if self._labels is None:
            positions = self._mask[row].nonzero()[0]
            weights = np.ones(len(positions), dtype=np.float32)
        else:
            assert self._weights is not None
            # As everywhere: nothing precedes the first token, so nothing can predict it.
            positions = (self._labels[row][1:] != NO_LOSS).nonzero()[0] + 1
            weights = self._weights[row][positions]
        length = int(positions[-1]) if self.cut and len(positions) else len(input_ids)
        return Sample(row, input_ids, positions, weights, length)
