"""Selection applied to a pool: score tables in, cleaned pool out."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
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
from tokenclean.named import options_of
from tokenclean.publish import writing_to
from tokenclean.scoring.probe import Probe, share
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.exchange import here
from tokenclean.selection.noise import MIN_SAMPLES, SIGNIFICANT
from tokenclean.selection.rule import (
    BELOW_CUT,
    KEPT,
    PROMPT,
    REASONS,
    SEEN,
    Rule,
    TokenBlock,
    columns_needed,
    describe_need,
    scores,
)
from tokenclean.selection.select import Selected, SelectionConfig, select
from tokenclean.selection.topk import Histogram

log = logging.getLogger(__name__)


@dataclasses.dataclass
class ScoredRows:
    """Rows of a pool with the tables that score them.

    Args:
        pool: the token pool.
        rows: which of its rows, ascending.
        base: losses under the base model, with the other columns that the rule needs; None for
            rules that need no such table.
        reference: the same under the reference model.
        round: number of the round, stored with every row.
        probes: of base and reference, where the keep share is to be estimated.
    """

    pool: TokenPool
    rows: np.ndarray
    base: ScoreTable | None
    reference: ScoreTable | None
    round: int
    probes: tuple[Probe, Probe] | None = None

    def __post_init__(self) -> None:
        for table in (self.base, self.reference):
            if table is not None:
                table.check_pool(self.pool)
                if table.manifest.get("targets") == "prompt":
                    raise ValueError(
                        f"{table.folder} holds the losses of prompt tokens (data.targets: prompt); "
                        "a rule reads those of response tokens"
                    )
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
        if self.reference is not None and len(trained_on := self.reference.trained_on()):
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

    @cached_property
    def parts(self) -> list[slice]:
        """The rows, cut into blocks of about `BLOCK_VALUES` tokens: slices of ``rows``."""
        # In place: of ten million rows, every further array is 80 MB.
        places = self.pool.input_ids.counts()[self.rows]
        np.cumsum(places, out=places)
        places //= BLOCK_VALUES
        edges = np.flatnonzero(places[1:] != places[:-1]) + 1
        bounds = pairwise([0, *edges.tolist(), len(self.rows)])
        return [slice(first, last) for first, last in bounds if first < last]

    def blocks(self, config: SelectionConfig) -> Iterator[TokenBlock]:
        """The rows' response tokens, block by block, with what the rule needs to know of them.

        Selection asks for them once per pass: they are read from the memory maps each time, which
        takes a few nanoseconds per token and no memory.
        """
        for part in self.parts:
            yield self.block(part, config)

    def block(self, part: slice, config: SelectionConfig) -> TokenBlock:
        """One of `blocks`."""
        columns = {name: self._column(name, part) for name in config.needs if self._has(name)}
        is_eos = None
        if config.always_keep_eos:
            is_eos = self._at_responses(self.pool.input_ids, part) == self.pool.eos_id
        return TokenBlock(self.rows[part], self.counts[part], self.seen[part], columns, is_eos)

    def _has(self, name: str) -> bool:
        table, _, column = name.partition(".")
        if table == "pool":
            return column != "truth" or self.pool.truth is not None
        return self._table(table) is not None

    def _table(self, name: str) -> ScoreTable | None:
        if name not in ("base", "reference"):
            raise ValueError(f"there is no table {name!r}; a rule reads base, reference and pool")
        return self.base if name == "base" else self.reference

    def _column(self, name: str, part: slice) -> np.ndarray:
        """A column that a rule needs, of the response tokens of a block of rows."""
        where, _, column = name.partition(".")
        table = None if where == "pool" else self._table(where)
        if table is not None:
            return self._checked(table, column, part)
        if name == "pool.truth":
            assert self.pool.truth is not None
            return self._at_responses(self.pool.truth, part)
        if name == "pool.quality":
            return np.repeat(self.quality[part].astype(np.float64), self.counts[part])
        if name == "pool.position":
            lengths, mask = self.pool.response_mask.take(self.rows[part])
            at = np.flatnonzero(mask)
            return at - np.repeat(np.cumsum(lengths) - lengths, self.counts[part])
        raise ValueError(f"a rule asks for {name!r}, which no table of this project holds")

    def _at_responses(self, column: ListColumn, part: slice) -> np.ndarray:
        rows = self.rows[part]
        return column.take(rows)[1][self.pool.response_mask.take(rows)[1]]

    def nll(self, table: ScoreTable, part: slice) -> np.ndarray:
        """Losses of the response tokens of a block of rows, float32.

        Raises:
            ValueError: if the table lacks a row, or has not one loss for each response token.
        """
        return self._checked(table, "nll", part)

    def _checked(self, table: ScoreTable, column: str, part: slice) -> np.ndarray:
        rows, counts = self.rows[part], self.counts[part]
        found, values = table.of_rows(rows, column)
        wrong = np.flatnonzero(found != counts)
        if len(wrong):
            raise ValueError(
                f"{table.folder}: sample {self.pool.ids[int(rows[wrong[0]])]!r} has "
                f"{found[wrong[0]]} scores for {counts[wrong[0]]} response tokens"
            )
        return values

    def check(self, config: SelectionConfig) -> None:
        """Refuse a rule that needs what is not there, before anything is read.

        Raises:
            ValueError: naming the option and what to do.
        """
        needs = config.needs
        for name in ("base", "reference"):
            columns, table = columns_needed(needs, name), self._table(name)
            if columns is None:
                continue
            if table is None:
                both = " and ".join(
                    f"--{n}" for n in ("base", "reference") if columns_needed(needs, n) is not None
                )
                raise ValueError(
                    f"rule: {config.rule} needs {describe_need(f'{name}.nll')}; give {both}"
                )
            for column in columns:
                table.check_column(column)
        if "pool.truth" in needs and not self.pool.has_truth:
            raise ValueError(f"rule: {config.rule} needs {describe_need('pool.truth')}")
        if "pool.quality" in needs:
            _ = self.quality


def clean(scored: ScoredRows, config: SelectionConfig, seed: int, folder: Path) -> Selected:
    """Select tokens and write the cleaned pool.

    Where `torch.distributed` is initialised all its processes call this together: each selects from
    a part of the rows and keeps the mask of that part, and process 0, which writes, asks for them
    in turn.

    Args:
        scored: rows and their tables.
        config: rule, scope, keep share.
        seed: of the random rule.
        folder: where the cleaned pool goes.

    Returns:
        What was selected, with the mask of this process's part.

    Raises:
        ValueError: if the rule needs a table, a column or a truth that is not there, or another
            process has met an error.
        NotWritten: if the disk has no room for the mask, a byte per token, or the cleaned pool.
    """
    exchange = here()
    with exchange.together():
        scored.check(config)
        config, estimated = with_share(scored, config)
        mine = scored.parts[exchange.part(len(scored.parts))]
        selected = select(
            lambda: (scored.block(part, config) for part in mine),
            config,
            seed,
            histogram=scored.histogram(),
            noise=scored.noise,
            out=mask_beside(folder, sum(int(scored.counts[part].sum()) for part in mine)),
            exchange=exchange,
            pool=lambda: scored.blocks(config),
        )
        pieces = exchange.to_first(selected.keep)
        if exchange.rank == 0:
            _write(scored, selected, pieces, config, seed, folder, estimated)
        for _ in pieces:  # the others send theirs
            pass
    return selected


def _write(
    scored: ScoredRows,
    selected: Selected,
    pieces: Iterator[np.ndarray],
    config: SelectionConfig,
    seed: int,
    folder: Path,
    estimated: dict[str, Any] | None,
) -> None:
    schema = cleaned_schema(scored.pool.has_truth)
    #: source -> reason code -> tokens; filled in while the rows are written
    reasons: dict[str, dict[str, int]] = {}
    write_cleaned_pool(
        folder,
        _cleaned_batches(scored, selected.rule, pieces, config, seed, schema, reasons),
        schema,
        {
            **cleaned_manifest(scored, config, seed),
            "tokens_by_reason": reasons,
            "response_tokens": selected.tokens,
            "ranked_tokens": selected.ranked,
            "kept_tokens": selected.kept,
            "cut": selected.cut,
            "near_cut": selected.near_cut,
            "noise": scored.noise,
            "share": estimated,
        },
    )


def with_share(
    scored: ScoredRows, config: SelectionConfig
) -> tuple[SelectionConfig, dict[str, Any] | None]:
    """The settings with a number for ``keep: auto``, and what that number rests on.

    Raises:
        ValueError: if there are no probes to estimate it from.
    """
    if not config.estimates_keep:
        return config, None
    if scored.probes is None:
        raise ValueError(
            "selection.keep: auto needs a probe of both models; score both with --probe true, or "
            "give a number"
        )
    found = share([scored.probes], scored.pool)
    if not found.whole.signal:
        log.warning(
            "selection.keep: auto: no signal, so every token is kept. In %d samples (at least %d "
            "are asked) the reference ties responses to their prompts by %.1f standard errors, and "
            "better than the base by %.1f (more than %.0f of both are asked)",
            *(found.whole.samples, MIN_SAMPLES, found.whole.tie, found.whole.gain, SIGNIFICANT),
        )
    else:
        log.info(
            "selection.keep: auto: %.3f to %.3f of the response tokens are informative; keeping "
            "%.3f",
            *(found.whole.lower, found.whole.upper, found.keep),
        )
    return dataclasses.replace(config, keep=found.keep), found.to_json()


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
        "scores": [None if table is None else table.manifest.get("content") for table in tables],
        "selection": dataclasses.asdict(config),
        "rule_options": options_of(config.make()),
        "attributes": tables[0].manifest.get("attributes") if tables[0] is not None else None,
        "seed": seed,
        "rows_seen_by_reference": int(scored.seen.sum()),
        "reasons": {str(code): text for code, text in _reasons(config).items()},
    }


def _reasons(config: SelectionConfig) -> dict[int, str]:
    """Names of the reason codes that a rule's pool may hold."""
    rule = config.make()
    # Rules that decide by themselves have no cut, and most give no reason of their own.
    own = {} if rule.ranked else {BELOW_CUT: "dropped by the rule"}
    return REASONS | own | rule.reasons


def mask_beside(folder: Path, size: int) -> np.ndarray:
    """Room for a keep mask, bool (size,), in a file rather than in memory; zeros at first.

    The file has no name and goes away with the array, or with the process.

    Args:
        folder: the cleaned pool to be; the file lies on the same disk.

    Raises:
        NotWritten: naming the folder, if there is no room.
    """
    with writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if size == 0:
            return np.zeros(0, dtype=bool)
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            # Writing through a map to a disk that is full kills the process instead.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
            return np.memmap(file, np.bool_, "r+", shape=(size,))


def _cleaned_batches(
    scored: ScoredRows,
    rule: Rule,
    pieces: Iterator[np.ndarray],
    config: SelectionConfig,
    seed: int,
    schema: pa.Schema,
    tally: dict[str, dict[str, int]],
) -> Iterator[pa.RecordBatch]:
    """Blocks of rows of the cleaned pool; every array runs over the tokens of a whole block.

    Args:
        rule: as it was fitted.
        pieces: of the keep mask of all rows, in order.
        tally: gets the number of response tokens by source and reason.
    """
    pool, held = scored.pool, np.zeros(0, dtype=bool)
    rule.restart(seed, whole_samples=config.scope == "whole_sample")
    for part in scored.parts:
        rows, counts = scored.rows[part], scored.counts[part]
        lengths, input_ids = pool.input_ids.take(rows)
        response = pool.response_mask.take(rows)[1]
        answers = np.flatnonzero(response)
        while len(held) < len(answers):
            held = np.concatenate([held, next(pieces)])
        keep, held = np.split(held, [len(answers)])
        block = scored.block(part, config)
        seen = np.repeat(config.exclude_seen & scored.seen[part], counts)

        why = np.full(len(answers), BELOW_CUT, dtype=np.int8) if rule.ranked else rule.decide(block)
        why = np.where(keep, KEPT, np.where(seen, SEEN, why)).astype(np.int8)
        reason = np.full(len(input_ids), PROMPT, dtype=np.int8)
        reason[answers] = why
        weights = rule.weights(block, keep)
        weighted = (weights != 0.0) & ~seen
        labels = np.full(len(input_ids), NO_LOSS, dtype=np.int32)
        with_loss = answers[weighted]
        labels[with_loss] = input_ids[with_loss]
        weight = np.ones(len(input_ids), dtype=np.float32)
        weight[with_loss] = weights[weighted]
        sources = pool.sources.take(rows)
        _count(tally, sources.to_numpy(zero_copy_only=False), counts, why)

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
            None
            if table is None
            else block.columns[f"{name}.nll"]
            if f"{name}.nll" in block.columns
            else scored.nll(table, part)
            for name, table in (("base", scored.base), ("reference", scored.reference))
        )
        score = None if base is None or reference is None else scores(base, reference)
        priority = None if rule.by_score else rule.priority(block)
        columns = {
            "input_ids": input_ids,
            "labels": labels,
            "response_mask": response,
            "base_nll": known(base, pa.float32()),
            "reference_nll": known(reference, pa.float32()),
            "score": known(score, pa.float64()),
            "priority": known(priority, pa.float64()),
            "reason": reason,
            "weight": weight,
        }
        if pool.truth is not None:
            columns["truth"] = pool.truth.take(rows)[1]
        yield pa.record_batch(
            {
                "id": pool.ids.take(rows),
                "source": sources,
                "round": np.full(len(rows), scored.round, dtype=np.int32),
                **{name: lists_of(lengths, values) for name, values in columns.items()},
            },
            schema=schema,
        )
    for source in sorted(tally):  # however the blocks were cut
        tally[source] = dict(sorted(tally.pop(source).items(), key=lambda item: int(item[0])))


def _count(
    tally: dict[str, dict[str, int]], sources: np.ndarray, sizes: np.ndarray, reasons: np.ndarray
) -> None:
    """Add the tokens of a block, from its rows' sources, to the counts by source and reason."""
    names, of_row = np.unique(sources, return_inverse=True)
    at = np.repeat(of_row, sizes)
    for number, name in enumerate(names):
        counts = np.bincount(reasons[at == number])
        own = tally.setdefault(str(name), {})
        for code in np.flatnonzero(counts):
            own[str(code)] = own.get(str(code), 0) + int(counts[code])


def add_up(tallies: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The sum of several ``tokens_by_reason``."""
    total: dict[str, dict[str, int]] = {}
    for tally in tallies:
        for source, counts in tally.items():
            own = total.setdefault(source, {})
            for code, count in counts.items():
                own[code] = own.get(code, 0) + count
    return total


def reasons_table(manifest: dict[str, Any]) -> str:
    """Response tokens by source and reason, in Markdown; combinations of reasons stand apart.

    Args:
        manifest: of a cleaned pool.
    """
    tally = manifest["tokens_by_reason"]
    codes = sorted({int(code) for counts in tally.values() for code in counts})
    lines = [
        "| source | " + " | ".join(manifest["reasons"][str(code)] for code in codes) + " |",
        "|---|" + "---:|" * len(codes),
    ]
    for source, counts in sorted(tally.items()):
        cells = (f"{counts.get(str(code), 0):,}" for code in codes)
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return "\n".join(lines)
