"""What an export holds, counted in one pass over a cleaned pool; and the labels it hands over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from tokenclean.data.cleaned import DATA, CleanedBlock, read_blocks
from tokenclean.data.rows import NO_LOSS


@dataclass(frozen=True)
class Choices:
    """What was asked for.

    Attributes:
        to: the layout.
        tokenizer: the pool's, if it was named.
        license: an SPDX name for the card, if one was given.
        dtype: of token ids (`olmo`) or of weights (`merged`), if one was given.
        keep_empty: also rows of which nothing is kept.
        drop_weights: weights may be lost.
        per_token: ranges and scores of single tokens.
    """

    to: str
    tokenizer: str | None = None
    license: str | None = None
    dtype: str | None = None
    keep_empty: bool = False
    drop_weights: bool = False
    per_token: bool = False


@dataclass
class Counts:
    """Samples and tokens of a source.

    Attributes:
        samples: all of them.
        emptied: those with response tokens of which none is kept.
        warmup: those of round 0, which no rule cleaned.
        response, kept: tokens, of all samples.
        ranked, ranked_kept: the same without round 0: what a kept share is a share of.
    """

    samples: int = 0
    emptied: int = 0
    warmup: int = 0
    response: int = 0
    kept: int = 0
    ranked: int = 0
    ranked_kept: int = 0

    @property
    def share(self) -> float | None:
        """Kept share of what a rule cleaned; None if that is nothing."""
        return self.ranked_kept / self.ranked if self.ranked else None

    def add(self, other: Counts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass
class Tally:
    """What goes into an export.

    Attributes:
        sources: name -> its counts, in the order in which they come.
        total: of all sources.
        rows, tokens, response_tokens: exported ones; ``kept_tokens`` are the same whatever is left
            out.
        longest: tokens of the longest exported row.
        largest_id: largest token id among them.
        unlearnt: tokens with a label and a negative weight.
        fractional: tokens with a label and a positive weight other than 1.
        weightless: tokens with a label and the weight 0.
        priority: the rule goes by something else than the score.
        eos_inside: exported rows with an EOS before their last token.
        eos_missing: exported rows that do not end with one.
    """

    sources: dict[str, Counts] = field(default_factory=dict)
    total: Counts = field(default_factory=Counts)
    rows: int = 0
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    largest_id: int = 0
    unlearnt: int = 0
    fractional: int = 0
    weightless: int = 0
    priority: bool = False
    eos_inside: int = 0
    eos_missing: int = 0

    @property
    def weighted(self) -> bool:
        """Whether labels alone do not say what the pool says."""
        return self.unlearnt + self.fractional + self.weightless > 0

    def add(self, block: CleanedBlock, eos_id: int, keep_empty: bool) -> None:
        """Count a block; ``keep_empty``: rows with nothing kept are exported, too."""
        size = len(block.ids)
        kept, response = _by_row(learnable(block), block), _by_row(block.response, block)
        cleaned = block.rounds > 0
        names, source = np.unique(np.asarray(block.sources, dtype=object), return_inverse=True)
        columns = {
            "samples": np.ones(size, dtype=np.int64),
            "emptied": (response > 0) & (kept == 0),
            "warmup": ~cleaned,
            "response": response,
            "kept": kept,
            "ranked": np.where(cleaned, response, 0),
            "ranked_kept": np.where(cleaned, kept, 0),
        }
        sums = {k: np.bincount(source, v, len(names)).astype(np.int64) for k, v in columns.items()}
        for i, name in enumerate(names):
            found = Counts(**{key: int(values[i]) for key, values in sums.items()})
            self.sources.setdefault(name, Counts()).add(found)
            self.total.add(found)
        weight = block.weight[block.labels != NO_LOSS]
        self.unlearnt += int((weight < 0).sum())
        self.weightless += int((weight == 0).sum())
        self.fractional += int(((weight > 0) & (weight != 1)).sum())

        self.priority = self.priority or bool(np.isfinite(block.priority).any())

        chosen = (kept > 0) | keep_empty
        self.rows += int(chosen.sum())
        self.tokens += int(block.counts[chosen].sum())
        self.response_tokens += int(response[chosen].sum())
        self.longest = max(self.longest, int(block.counts[chosen].max(initial=0)))
        ids = block.input_ids[chosen[block.row]]
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        eos = block.input_ids == eos_id
        last = np.zeros(len(eos), dtype=bool)
        last[(np.cumsum(block.counts) - 1)[block.counts > 0]] = True
        inside, at_end = _by_row(eos & ~last, block) > 0, _by_row(eos & last, block) > 0
        self.eos_inside += int((inside & chosen).sum())
        self.eos_missing += int((~at_end & chosen).sum())


def learnable(block: CleanedBlock) -> np.ndarray:
    """Kept tokens that something predicts: bool, shape (n,).

    Nothing precedes the first token of a row; a packed batch would make it the target of the row
    before.
    """
    found: np.ndarray = block.kept & (block.position > 0)
    return found


def _by_row(values: np.ndarray, block: CleanedBlock) -> np.ndarray:
    """True values of each row, int64, shape (R,)."""
    return np.bincount(block.row[values], minlength=len(block.ids)).astype(np.int64)


def tally(cleaned: Path, eos_id: int, keep_empty: bool) -> Tally:
    """Count a cleaned pool."""
    found = Tally()
    for block in watched(cleaned, "counting"):
        found.add(block, eos_id, keep_empty)
    return found


def watched(cleaned: Path, doing: str) -> Iterator[CleanedBlock]:
    """The blocks of a cleaned pool, with a bar on a terminal's standard error."""
    rows = pq.ParquetFile(cleaned / DATA).metadata.num_rows
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing, total=rows)
        for block in read_blocks(cleaned):
            yield block
            progress.advance(task, len(block.ids))


@dataclass
class Labelled:
    """Rows as trainers take them: R rows of n tokens, arrays end to end.

    Attributes:
        counts: tokens of each row, int64, shape (R,).
        input_ids: int32, shape (n,).
        labels: the token's id where it is to be learnt, else -100; int32, shape (n,); not shifted.
    """

    counts: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and labels, row by row."""
        stops = np.cumsum(self.counts)
        for start, stop in zip(stops - self.counts, stops, strict=True):
            yield self.input_ids[start:stop], self.labels[start:stop]


def labelled(cleaned: Path, keep_empty: bool) -> Iterator[Labelled]:
    """A cleaned pool as ids and labels, block by block.

    Nothing but what is `learnable` carries a label, and no weight is kept.

    Args:
        cleaned: folder of the pool.
        keep_empty: keep rows without a label, which teach nothing.
    """
    for block in watched(cleaned, "writing"):
        learnt = learnable(block)
        labels = np.where(learnt, block.labels, NO_LOSS).astype(np.int32)
        chosen = (_by_row(learnt, block) > 0) | keep_empty
        tokens = chosen[block.row]
        yield Labelled(block.counts[chosen], block.input_ids[tokens], labels[tokens])
