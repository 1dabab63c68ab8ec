"""Selection applied to a pool: score tables in, cleaned pool out."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean.arrow import BLOCK_VALUES, ListColumn, lists_of
from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import NO_LOSS
from tokenclean.scoring.table import ScoreTable, scores
from tokenclean.selection.rules import (
    BELOW_CUT,
    CONTRADICTED,
    KEPT,
    PROMPT,
    REASONS,
    SEEN,
    Selected,
    SelectionConfig,
    TokenBlock,
    select,
)
from tokenclean.selection.topk import Histogram


@dataclasses.dataclass
class ScoredRows:
    """Rows of a pool with the tables that score them.

    Args:
        pool: the token pool.
        rows: which of its rows, ascending.
        base: losses under the base model; None for rules that need no scores.
        reference: losses under the reference model; with gaps for rules that need them.
        round: number of the round, stored with every row.
    """

    pool: TokenPool
    rows: np.ndarray
    base: ScoreTable | None
    reference: ScoreTable | None
    round: int

    def __post_init__(self) -> None:
        for table in (self.base, self.reference):
            if table is not None:
                table.check_pool(self.pool)
        if self.base is not None and self.reference is not None:
            one, other = self.base.manifest["model"], self.reference.manifest["model"]
            if one == other:
                raise ValueError(
                    f"{self.base.folder} and {self.reference.folder} were both scored by the model "
                    f"{one}: every score would be zero. Score one of them with the other model"
                )
            if one.startswith(f"{other}+"):
                raise ValueError(
                    f"--base and --reference look swapped: {self.base.folder} was scored by "
                    f"{self.reference.folder}'s model with adapters on top"
                )
        self.counts = self.pool.response_counts()[self.rows]
        self.seen = np.zeros(len(self.rows), dtype=bool)
        if self.reference is not None and (trained_on := self.reference.trained_on()):
            self.seen = self.pool.ids.among(trained_on)[self.rows]

    @cached_property
    def quality(self) -> np.ndarray:
        """What ``data.order`` names, of each row: float64, shape (rows,).

        Raises:
            ValueError: if the pool was made without it.
        """
        if "order" not in self.pool.columns:
            raise ValueError(
                "rule: quality needs a rating of every sample; name its column with data.order"
            )
        return self.pool.order()[self.rows]

    @property
    def noise(self) -> float | None:
        """What a score may be off by, in nats, if both tables state it: the sum of theirs."""
        total = 0.0
        for table in (self.base, self.reference):
            noise = None if table is None else (table.manifest.get("noise") or {}).get("p99")
            if noise is None:
                return None
            total += noise
        return total

    def histogram(self) -> Histogram | None:
        """Of the scores' keys, if the reference table was written with it and fits these rows."""
        if self.base is None or self.reference is None:
            return None
        if not np.array_equal(self.rows, self.reference.rows):
            return None
        return self.reference.histogram(self.base)

    def parts(self) -> Iterator[slice]:
        """The rows, cut into blocks of about `BLOCK_VALUES` tokens: slices of ``rows``."""
        stops = np.cumsum(self.pool.input_ids.counts()[self.rows])
        edges = np.flatnonzero(np.diff(stops // BLOCK_VALUES)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(self.rows)]):
            if first < last:
                yield slice(first, last)

    def blocks(self, config: SelectionConfig) -> Iterator[TokenBlock]:
        """The rows' response tokens, block by block, with what the rule needs to know of them.

        Selection asks for them once per pass: they are read from the memory maps each time, which
        takes a few nanoseconds per token and no memory.
        """
        for part in self.parts():
            is_eos = truth = score = gap = None
            if config.needs_scores and self.base is not None and self.reference is not None:
                score = scores(self.nll(self.base, part), self.nll(self.reference, part))
            elif config.rule == "perplexity" and self.base is not None:
                score = -self.nll(self.base, part).astype(np.float64)
            elif config.rule in ("length", "quality"):
                counts = self.counts[part]
                of_rows = counts if config.rule == "length" else self.quality[part]
                score = np.repeat(of_rows.astype(np.float64), counts)
            if config.needs_gap and self.reference is not None:
                gap = self._checked(self.reference, self.reference.gaps_of_rows, part)
            if config.always_keep_eos:
                is_eos = self._at_responses(self.pool.input_ids, part) == self.pool.eos_id
            if config.needs_truth and self.pool.truth is not None:
                truth = self._at_responses(self.pool.truth, part)
            yield TokenBlock(
                self.rows[part], self.counts[part], score, is_eos, truth, self.seen[part], gap
            )

    def _at_responses(self, column: ListColumn, part: slice) -> np.ndarray:
        rows = self.rows[part]
        return column.take(rows)[1][self.pool.response_mask.take(rows)[1]]

    def nll(self, table: ScoreTable, part: slice) -> np.ndarray:
        """Losses of the response tokens of a block of rows, float32.

        Raises:
            ValueError: if the table lacks a row, or has not one loss for each response token.
        """
        return self._checked(table, table.of_rows, part)

    def _checked(
        self,
        table: ScoreTable,
        read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        part: slice,
    ) -> np.ndarray:
        rows, counts = self.rows[part], self.counts[part]
        found, values = read(rows)
        wrong = np.flatnonzero(found != counts)
        if len(wrong):
            raise ValueError(
                f"{table.folder}: sample {self.pool.ids[int(rows[wrong[0]])]!r} has "
                f"{found[wrong[0]]} scores for {counts[wrong[0]]} response tokens"
            )
        return values


def clean(scored: ScoredRows, config: SelectionConfig, seed: int, folder: Path) -> Selected:
    """Select tokens and write the cleaned pool.

    Args:
        scored: rows and their tables.
        config: rule, scope, keep share.
        seed: of the random rule.
        folder: where the cleaned pool goes.

    Raises:
        ValueError: if the rule lacks scores, gaps or truth.
    """
    if config.needs_scores and (scored.base is None or scored.reference is None):
        raise ValueError(
            f"rule: {config.rule} needs a base and a reference score table (--base and --reference)"
        )
    if config.needs_base and scored.base is None:
        raise ValueError(f"rule: {config.rule} needs a base score table (--base)")
    if config.needs_gap and scored.reference is None:
        raise ValueError(f"rule: {config.rule} needs a reference score table (--reference)")
    if config.needs_truth and not scored.pool.has_truth:
        raise ValueError(f"rule: {config.rule} needs a pool with planted truth; this one has none")
    folder.parent.mkdir(parents=True, exist_ok=True)
    selected = select(
        lambda: scored.blocks(config),
        config,
        seed,
        histogram=scored.histogram(),
        noise=scored.noise,
        out=_mask_file(folder.parent, int(scored.counts.sum())),
    )
    schema = cleaned_schema(scored.pool.has_truth)
    write_cleaned_pool(
        folder,
        _cleaned_batches(scored, selected.keep, config, schema),
        schema,
        {
            **cleaned_manifest(scored, config, seed),
            "response_tokens": len(selected.keep),
            "ranked_tokens": selected.ranked,
            "kept_tokens": selected.kept,
            "cut": selected.cut,
            "near_cut": selected.near_cut,
            "noise": scored.noise,
        },
    )
    return selected


def cleaned_manifest(scored: ScoredRows, config: SelectionConfig, seed: int) -> dict[str, Any]:
    """Where a cleaned pool comes from."""
    pool, tables = scored.pool, (scored.base, scored.reference)
    return {
        "pool": pool.fingerprint,
        **{
            name: pool.manifest[name]
            for name in ("tokenizer", "vocabulary", "template", "max_length", "eos_id")
        },
        "base": tables[0].manifest["model"] if tables[0] is not None else None,
        "reference": tables[1].manifest["model"] if tables[1] is not None else None,
        "selection": dataclasses.asdict(config),
        "seed": seed,
        "rows_seen_by_reference": int(scored.seen.sum()),
        "reasons": {str(code): text for code, text in REASONS.items()},
    }


def _mask_file(folder: Path, size: int) -> np.ndarray:
    """Room for a keep mask, bool (size,), in a file rather than in memory."""
    if size == 0:
        return np.zeros(0, dtype=bool)
    # A file without a name goes away with its map, so nothing is left to close.
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    return np.memmap(file, dtype=np.bool_, mode="w+", shape=(size,))


def _cleaned_batches(
    scored: ScoredRows, keep: np.ndarray, config: SelectionConfig, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Blocks of rows of the cleaned pool; every array runs over the tokens of a whole block."""
    pool, stop = scored.pool, 0
    dropped = CONTRADICTED if config.needs_gap else BELOW_CUT
    for part in scored.parts():
        rows, counts = scored.rows[part], scored.counts[part]
        lengths, input_ids = pool.input_ids.take(rows)
        response = pool.response_mask.take(rows)[1]
        answers = np.flatnonzero(response)
        kept = answers[keep[stop : (stop := stop + len(answers))]]

        labels = np.full(len(input_ids), NO_LOSS, dtype=np.int32)
        labels[kept] = input_ids[kept]
        reason = np.full(len(input_ids), PROMPT, dtype=np.int8)
        left_out = np.where(config.exclude_seen & scored.seen[part], SEEN, dropped)
        reason[answers] = np.repeat(left_out, counts)
        reason[kept] = KEPT

        def known(
            values: np.ndarray | None,
            dtype: pa.DataType,
            response: np.ndarray = response,
        ) -> pa.Array:
            """Values at response tokens, null elsewhere; all null without values."""
            if values is None:
                return pa.nulls(len(response), dtype)
            full = np.zeros(len(response), dtype=values.dtype)
            full[response] = values
            return pa.array(full, mask=~response)

        base, reference = (
            None if table is None else scored.nll(table, part)
            for table in (scored.base, scored.reference)
        )
        score = None if base is None or reference is None else scores(base, reference)
        columns = {
            "input_ids": input_ids,
            "labels": labels,
            "response_mask": response,
            "base_nll": known(base, pa.float32()),
            "reference_nll": known(reference, pa.float32()),
            "score": known(score, pa.float64()),
            "reason": reason,
            "weight": np.ones(len(input_ids), dtype=np.float32),
        }
        if pool.truth is not None:
            columns["truth"] = pool.truth.take(rows)[1]
        yield pa.record_batch(
            {
                "id": pool.ids.take(rows),
                "source": pool.sources.take(rows),
                "round": np.full(len(rows), scored.round, dtype=np.int32),
                **{name: lists_of(lengths, values) for name, values in columns.items()},
            },
            schema=schema,
        )
