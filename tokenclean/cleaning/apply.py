"""Selection applied to a pool: score tables in, cleaned pool out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean.arrow import list_array
from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import NO_LOSS
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.rules import (
    BELOW_CUT,
    KEPT,
    PROMPT,
    REASONS,
    SEEN,
    Selected,
    SelectionConfig,
    TokenBlock,
    select,
)

#: Rows gathered at a time: bounds memory, whatever the size of the pool.
_BLOCK_ROWS = 1024


@dataclasses.dataclass
class ScoredRows:
    """Rows of a pool with the tables that score them.

    Args:
        pool: the token pool.
        rows: which of its rows, ascending.
        base: losses under the base model; None for rules that need no scores.
        reference: losses under the reference model.
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
        seen = self.reference.trained_on() if self.reference is not None else set()
        self.seen = np.array([self.pool.ids[r] in seen for r in self.rows], dtype=bool)

    def nll(self, table: ScoreTable, row: int) -> np.ndarray:
        """Losses of one pool row.

        Raises:
            ValueError: if their number is not the row's number of response tokens.
        """
        values = table.of_row(row)
        expected = int(self.pool.response_mask[row].sum())
        if len(values) != expected:
            raise ValueError(
                f"{table.folder}: sample {self.pool.ids[row]!r} has {len(values)} scores for "
                f"{expected} response tokens"
            )
        return values

    def score(self, row: int) -> np.ndarray | None:
        """float64(base nll) - float64(reference nll), Eq. (3), of one pool row."""
        if self.base is None or self.reference is None:
            return None
        base = self.nll(self.base, row).astype(np.float64)
        return base - self.nll(self.reference, row).astype(np.float64)

    def blocks(self) -> Iterator[TokenBlock]:
        truths = self.pool.truth
        for first in range(0, len(self.rows), _BLOCK_ROWS):
            chosen = self.rows[first : first + _BLOCK_ROWS]
            positions = [self.pool.response_positions(int(r)) for r in chosen]
            pairs = list(zip(map(int, chosen), positions, strict=True))
            scores = [self.score(r) for r, _ in pairs]
            known = [s for s in scores if s is not None]
            yield TokenBlock(
                rows=chosen,
                counts=np.array([len(p) for p in positions], dtype=np.int64),
                score=np.concatenate(known) if known else None,
                is_eos=np.concatenate(
                    [self.pool.input_ids[r][p] == self.pool.eos_id for r, p in pairs]
                ),
                truth=np.concatenate([truths[r][p] for r, p in pairs]) if truths else None,
                seen=self.seen[first : first + _BLOCK_ROWS],
            )


def clean(scored: ScoredRows, config: SelectionConfig, seed: int, folder: Path) -> Selected:
    """Select tokens and write the cleaned pool.

    Args:
        scored: rows and their tables.
        config: rule, scope, keep share.
        seed: of the random rule.
        folder: where the cleaned pool goes.

    Raises:
        ValueError: if the rule lacks scores or truth.
    """
    if config.needs_scores and (scored.base is None or scored.reference is None):
        raise ValueError(
            f"rule: {config.rule} needs a base and a reference score table (--base and --reference)"
        )
    if config.needs_truth and not scored.pool.has_truth:
        raise ValueError(f"rule: {config.rule} needs a pool with planted truth; this one has none")
    selected = select(scored.blocks, config, seed)
    schema = cleaned_schema(scored.pool.has_truth)
    write_cleaned_pool(
        folder,
        _cleaned_batches(scored, selected.keep, config.exclude_seen, schema),
        schema,
        {**cleaned_manifest(scored, config, seed), **_outcome(selected)},
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


def _outcome(selected: Selected) -> dict[str, Any]:
    return {
        "response_tokens": len(selected.keep),
        "ranked_tokens": selected.ranked,
        "kept_tokens": selected.kept,
        "cut": selected.cut,
    }


def _cleaned_batches(
    scored: ScoredRows, keep: np.ndarray, exclude_seen: bool, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    start = 0
    for first in range(0, len(scored.rows), _BLOCK_ROWS):
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for index in range(first, min(first + _BLOCK_ROWS, len(scored.rows))):
            row = int(scored.rows[index])
            positions = scored.pool.response_positions(row)
            kept = keep[start : start + len(positions)]
            start += len(positions)
            left_out = SEEN if exclude_seen and scored.seen[index] else BELOW_CUT
            for name, value in _cleaned_row(scored, row, positions, kept, left_out).items():
                columns[name].append(value)
        yield pa.record_batch(
            {name: _array(values, schema.field(name).type) for name, values in columns.items()},
            schema=schema,
        )


def _cleaned_row(
    scored: ScoredRows, row: int, positions: np.ndarray, kept: np.ndarray, left_out: int
) -> dict[str, Any]:
    pool = scored.pool
    input_ids = pool.input_ids[row]
    labels = np.full(len(input_ids), NO_LOSS, dtype=np.int32)
    labels[positions[kept]] = input_ids[positions[kept]]
    reason = np.full(len(input_ids), PROMPT, dtype=np.int8)
    reason[positions] = np.where(kept, KEPT, left_out)

    def aligned(values: np.ndarray | None, dtype: type) -> np.ma.MaskedArray:
        full = np.ma.masked_all(len(input_ids), dtype=dtype)
        if values is not None:
            full[positions] = values
        return full

    base = scored.nll(scored.base, row) if scored.base is not None else None
    reference = scored.nll(scored.reference, row) if scored.reference is not None else None
    result: dict[str, Any] = {
        "id": pool.ids[row],
        "source": pool.sources[row],
        "input_ids": input_ids,
        "labels": labels,
        "response_mask": pool.response_mask[row],
        "base_nll": aligned(base, np.float32),
        "reference_nll": aligned(reference, np.float32),
        "score": aligned(scored.score(row), np.float64),
        "reason": reason,
        "weight": np.ones(len(input_ids), dtype=np.float32),
        "round": scored.round,
    }
    if pool.truth is not None:
        result["truth"] = pool.truth[row]
    return result


def _array(values: list[Any], dtype: pa.DataType) -> pa.Array:
    if not pa.types.is_list(dtype):
        return pa.array(values, type=dtype)
    if values and isinstance(values[0], np.ma.MaskedArray):
        flat = np.ma.concatenate(values)
        offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
        # Arrow's own mask: True where there is no value.
        leaves = pa.array(
            flat.filled(0), type=dtype.value_type, mask=np.ma.getmaskarray(flat).copy()
        )
        return pa.ListArray.from_arrays(pa.array(offsets), leaves)
    return list_array(values, dtype.value_type)
