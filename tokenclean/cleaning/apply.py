"""Selection applied to a pool: score tables in, cleaned pool out."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

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
            if one.startswith(f"{other}+"):
                raise ValueError(
                    f"--base and --reference look swapped: {self.base.folder} was scored by "
                    f"{self.reference.folder}'s model with adapters on top"
                )
        self.counts = self.pool.response_counts()[self.rows]
        self._gathered: dict[str, np.ndarray] | None = None
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
        """The rows' response tokens, block by block; selection asks for them once per pass."""
        if self._gathered is None:
            self._gathered = self._gather()
        tokens = self._gathered
        stops = np.cumsum(self.counts)
        for first in range(0, len(self.rows), _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, len(self.rows))
            at = slice(int(stops[first] - self.counts[first]), int(stops[last - 1]))
            yield TokenBlock(
                rows=self.rows[first:last],
                counts=self.counts[first:last],
                score=tokens["score"][at] if "score" in tokens else None,
                is_eos=tokens["is_eos"][at],
                truth=tokens["truth"][at] if "truth" in tokens else None,
                seen=self.seen[first:last],
            )

    def _gather(self) -> dict[str, np.ndarray]:
        """Score, EOS flag and truth of every response token, in files rather than in memory."""
        kinds: dict[str, type] = {"is_eos": np.bool_}
        if self.base is not None and self.reference is not None:
            kinds["score"] = np.float64
        if self.pool.truth is not None:
            kinds["truth"] = np.int8
        size = int(self.counts.sum())
        tokens: dict[str, np.ndarray] = {
            # An unnamed file goes away with its map, so nothing is left to close.
            name: np.memmap(
                tempfile.TemporaryFile(),  # noqa: SIM115
                dtype=kind,
                mode="w+",
                shape=(size,),
            )
            for name, kind in kinds.items()
        }
        stop = 0
        for row in map(int, self.rows):
            positions = self.pool.response_positions(row)
            at = slice(stop, stop := stop + len(positions))
            tokens["is_eos"][at] = self.pool.input_ids[row][positions] == self.pool.eos_id
            if "score" in tokens:
                tokens["score"][at] = self.score(row)
            if self.pool.truth is not None:
                tokens["truth"][at] = self.pool.truth[row][positions]
        return tokens


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
    """Blocks of rows of the cleaned pool; every array runs over the tokens of a whole block."""
    pool, start = scored.pool, 0
    for first in range(0, len(scored.rows), _BLOCK_ROWS):
        rows = [int(r) for r in scored.rows[first : first + _BLOCK_ROWS]]
        tokens = [pool.input_ids[r] for r in rows]
        masks = [pool.response_mask[r] for r in rows]
        input_ids, response = np.concatenate(tokens), np.concatenate(masks)
        counts = np.array([int(m.sum()) for m in masks])
        kept = keep[start : start + int(counts.sum())]
        start += len(kept)

        labels = np.full(len(input_ids), NO_LOSS, dtype=np.int32)
        labels[response] = np.where(kept, input_ids[response], NO_LOSS)
        left_out = np.where(exclude_seen & scored.seen[first : first + len(rows)], SEEN, BELOW_CUT)
        reason = np.full(len(input_ids), PROMPT, dtype=np.int8)
        reason[response] = np.where(kept, KEPT, np.repeat(left_out, counts))

        lengths = [len(t) for t in tokens]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

        def aligned(values: np.ndarray | pa.Array, offsets: pa.Array = offsets) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, values)

        def scores(
            parts: list[np.ndarray | None], dtype: pa.DataType, response: np.ndarray = response
        ) -> pa.Array:
            """Values at response tokens, null elsewhere; all null without a table."""
            known = [part for part in parts if part is not None]
            full = np.zeros(len(response), dtype=dtype.to_pandas_dtype())
            if known:
                full[response] = np.concatenate(known)
            return pa.array(full, type=dtype, mask=~response | (not known))

        base, reference = (
            [None if table is None else scored.nll(table, r) for r in rows]
            for table in (scored.base, scored.reference)
        )
        columns = {
            "id": [pool.ids[r] for r in rows],
            "source": [pool.sources[r] for r in rows],
            "input_ids": aligned(input_ids),
            "labels": aligned(labels),
            "response_mask": aligned(response),
            "base_nll": aligned(scores(base, pa.float32())),
            "reference_nll": aligned(scores(reference, pa.float32())),
            "score": aligned(scores([scored.score(r) for r in rows], pa.float64())),
            "reason": aligned(reason),
            "weight": aligned(np.ones(len(input_ids), dtype=np.float32)),
            "round": np.full(len(rows), scored.round, dtype=np.int32),
        }
        if pool.truth is not None:
            columns["truth"] = aligned(np.concatenate([pool.truth[r] for r in rows]))
        yield pa.record_batch(columns, schema=schema)
