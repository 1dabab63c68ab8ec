"""The tokenised pool: written once as Arrow, memory-mapped ever after.

One row per sample: ``id``, ``source``, ``input_ids`` list<int32>, ``response_mask`` list<bool>,
optionally ``truth`` list<int8> (planted pools), ``order`` double (an ordering column), and, where
the data came as tokens, ``labels`` list<int32> and ``weight`` list<float32>: what `fit` trains on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from tokenclean.arrow import ROWS_PER_SHARD, ArrowTable, ListColumn, TableWriter, list_array
from tokenclean.data.exports import reading_of
from tokenclean.data.formats import BadLine, Reader, Sample, TokenSample, is_datasets_folder
from tokenclean.data.pretokenised import Tokens, shown
from tokenclean.data.spans import SpannedText, encode_spans
from tokenclean.data.spans import refusal as refusal_of_spans
from tokenclean.data.template import (
    TokenisedSample,
    Tokeniser,
    fingerprint_tokenizer,
    vocabulary_hash,
)
from tokenclean.publish import MANIFEST, complete_folder, write_json

log = logging.getLogger(__name__)

KIND = "token pool"
OnBadLine = Literal["stop", "skip"]
#: How many bad lines are listed before the rest is only counted.
BAD_LINES_SHOWN = 100
#: Sources that a pool may have: each has a line in the manifest.
SOURCES = 10_000
#: How many of them a table shows.
_SOURCES_SHOWN = 100
#: What is tokenised at a time, whichever is less.
_TOKENISE_ROWS, _TOKENISE_CHARACTERS = 512, 4 << 20


@dataclass
class SourceStatistics:
    """Counts of one source; token counts of ``prompt``, ``completion`` and ``overall`` length are
    before truncation (Table 4 of arXiv 2502.01968 states their means), the rest after it."""

    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    truncated: int = 0
    response_tokens_cut: int = 0
    without_response: int = 0
    prompt_length: int = 0
    completion_length: int = 0
    overall_length: int = 0

    def add(self, sample: TokenisedSample) -> None:
        self.samples += 1
        self.tokens += len(sample.input_ids)
        responses = int(sample.response_mask.sum())
        self.response_tokens += responses
        self.truncated += sample.full_length > len(sample.input_ids)
        self.response_tokens_cut += sample.response_tokens - responses
        self.prompt_length += sample.full_length - sample.response_tokens
        self.completion_length += sample.response_tokens
        self.overall_length += sample.full_length


def extents(column: ListColumn, none: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the targets of each row end, and how many there are.

    Args:
        column: response masks, or labels.
        none: the value of a position that is no target. The first position never is one: nothing
            precedes it, so nothing can predict it.

    Returns:
        Position of each row's last target (0 without one) and number of its targets, both int64.
    """
    lengths, counts = np.zeros((2, len(column)), dtype=np.int64)
    for first, sizes, values in column.blocks():
        stops = np.cumsum(sizes)
        starts = stops - sizes
        targets = values != none
        targets[starts[sizes > 0]] = False
        places = np.flatnonzero(targets)
        # Of the block's targets, the row's are those from `after[i - 1]` up to `after[i]`.
        after = np.searchsorted(places, stops)
        rows = slice(first, first + len(sizes))
        counts[rows] = np.diff(after, prepend=0)
        some = counts[rows] > 0
        lengths[rows][some] = places[after[some] - 1] - starts[some]
    return lengths, counts


class TokenPool(ArrowTable):
    """A tokenised pool on disk."""

    states: ClassVar[dict[str, type]] = {
        "fingerprint": str,
        "tokenizer": str,
        "vocabulary": str,
        "eos_id": int,
        "statistics": dict,
    }

    def __init__(self, folder: Path):
        super().__init__(folder, KIND)
        self.input_ids = self.lists("input_ids")
        self.response_mask = self.lists("response_mask")
        self.truth = self.lists("truth") if "truth" in self.columns else None
        self.ids = self.texts("id")
        self.sources = self.texts("source")

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def eos_id(self) -> int:
        return int(self.manifest["eos_id"])

    @property
    def has_truth(self) -> bool:
        return self.truth is not None

    @property
    def has_labels(self) -> bool:
        """Whether the data came as tokens, which say themselves what is to be learnt."""
        return "labels" in self.columns

    def response_positions(self, row: int) -> np.ndarray:
        """Positions of the row's response tokens, int64."""
        return np.flatnonzero(self.response_mask[row])

    def response_counts(self) -> np.ndarray:
        """Response tokens of every row, int64."""
        return extents(self.response_mask)[1]

    def order(self) -> np.ndarray:
        """The ordering column, float64."""
        return np.asarray(self.values("order"), dtype=np.float64)


class BadData(ValueError):
    """The data holds lines that cannot be used; the message lists them."""


def open_pool(folder: Path, expected: str | None = None) -> TokenPool:
    """Open a pool and, where the caller knows it, check that it is the right one.

    Raises:
        ValueError: with both fingerprints, if they differ.
    """
    pool = TokenPool(folder)
    if expected is not None and pool.fingerprint != expected:
        raise ValueError(
            f"{folder} was made from other data, tokenizer, template or max_length: its "
            f"fingerprint is {pool.fingerprint}, expected {expected}"
        )
    return pool


def data_fingerprint(reader: Reader) -> str:
    """Hash of the data's content: file bytes for local paths, `datasets`' own for hub names."""
    digest = hashlib.sha256()
    files = reader.files()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        # The file's name is part of made ids and of sources.
        digest.update(file.stem.encode())
    for name in reader.paths:
        digest.update(reading_of(Path(name)).encode())
        if not Path(name).exists():
            import datasets

            try:
                builder = datasets.load_dataset_builder(name)
            except Exception as error:
                raise ValueError(
                    f"data.path: {name} is no local path and could not be loaded from the hub: "
                    f"{error}"
                ) from error
            digest.update(f"{name}@{builder.hash}@{reader.split}".encode())
        elif is_datasets_folder(Path(name)):
            digest.update(Path(name).stem.encode())  # the folder's, not that of its shards
    options = (reader.split, reader.order_column, reader.id_column, reader.source_column)
    digest.update(repr(options).encode())
    return digest.hexdigest()[:16]


def build_pool(
    reader: Reader,
    tokeniser: Tokeniser,
    folder: Path,
    on_bad_line: OnBadLine = "stop",
    holdout: float = 0.0,
    seed: int = 0,
) -> None:
    """Tokenise a stream of samples into ``folder/train`` and, if asked, ``folder/validation``.

    Rows are streamed: memory holds one shard, whatever the size of the pool. With
    ``on_bad_line="skip"`` bad lines go to ``quarantine.jsonl`` in the folder.

    Args:
        holdout: share of samples held out as validation, chosen by a hash of (seed, id).

    Raises:
        BadData: listing file, line and reason of every bad line.
        ValueError: for duplicate ids, or if no response token is left.
    """
    base = f"{data_fingerprint(reader)}-{tokeniser.fingerprint()}"
    reader.vocabulary = _vocabulary(tokeniser.tokenizer)
    reader.refuse = lambda sample: refusal(sample, tokeniser)
    with complete_folder(folder) as partial:
        stream = _Stream(reader, tokeniser, partial, on_bad_line)
        splits = {"train": _Split(partial / "train"), "validation": _Split(partial / "validation")}
        for sample, tokens in stream:
            held = holdout > 0.0 and _unit_hash(f"{seed}:{sample.id}") < holdout
            splits["validation" if held else "train"].add(sample, tokens)
        for name, split in splits.items():
            if name == "train" or holdout > 0.0:
                split.finish(
                    {
                        "kind": KIND,
                        "fingerprint": f"{base}-{name}-{holdout}-{seed}" if holdout else base,
                        "tokenizer": fingerprint_tokenizer(tokeniser.tokenizer),
                        "vocabulary": vocabulary_hash(tokeniser.tokenizer),
                        "template": tokeniser.template,
                        "max_length": tokeniser.max_length,
                        "eos_id": tokeniser.eos_id,
                        "shapes": reader.shapes,
                        "rejected": stream.rejected,
                    }
                )


def refusal(sample: Sample | TokenSample, tokeniser: Tokeniser) -> str | None:
    """Why a sample is not wanted, or None: see ``special_text`` of `Tokeniser`."""
    if isinstance(sample, Sample):
        return tokeniser.refusal(sample.messages)
    if isinstance(sample.content, SpannedText):
        return refusal_of_spans(sample.content, tokeniser)
    return None  # tokens are no text


def _size(sample: Sample | TokenSample) -> int:
    """Characters of a sample that are to be tokenised."""
    if isinstance(sample, Sample):
        return sum(len(message.content) for message in sample.messages)
    return len(sample.content.text) if isinstance(sample.content, SpannedText) else 0


def _vocabulary(tokenizer: Any) -> int:
    """Ids of texts lie below it; a pad token of its own may lie beyond every embedding."""
    pad = {tokenizer.pad_token} - {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    return 1 + max((i for t, i in tokenizer.get_vocab().items() if t not in pad), default=-1)


class _Stream:
    """Samples with their tokens; bad lines are collected on the way."""

    def __init__(self, reader: Reader, tokeniser: Tokeniser, folder: Path, on_bad_line: OnBadLine):
        self.reader, self.tokeniser = reader, tokeniser
        self.folder, self.on_bad_line = folder, on_bad_line
        self.rejected: dict[str, int] = {}
        self._bad: list[BadLine] = []
        self._hashes = array("Q")  # 8 bytes a row
        self._inexact = 0

    def __iter__(self) -> Iterator[tuple[Sample | TokenSample, TokenisedSample]]:
        waiting: list[Sample | TokenSample] = []
        characters = 0
        with Progress(transient=True) as progress:
            task = progress.add_task("tokenising", total=None)
            for item in self.reader:
                if isinstance(item, BadLine):
                    self._note(item)
                    continue
                self._hashes.append(hash_id(item.id))
                if self._bad and self.on_bad_line == "stop":
                    continue  # the run ends anyway: only look for more bad lines
                waiting.append(item)
                characters += _size(item)
                if len(waiting) == _TOKENISE_ROWS or characters >= _TOKENISE_CHARACTERS:
                    yield from self._tokenised(waiting)
                    progress.advance(task, len(waiting))
                    waiting, characters = [], 0
            if not (self._bad and self.on_bad_line == "stop"):
                yield from self._tokenised(waiting)
        self._finish()

    def _tokenised(
        self, samples: list[Sample | TokenSample]
    ) -> Iterator[tuple[Sample | TokenSample, TokenisedSample]]:
        made = iter(self.tokeniser([s for s in samples if isinstance(s, Sample)]))
        for sample in samples:
            if isinstance(sample, Sample):
                yield sample, next(made)
                continue
            tokens = sample.content
            if not isinstance(tokens, Tokens):
                ours = tokens.came_from(self.tokeniser.tokenizer_fingerprint)
                self._inexact += ours and tokens.exact is False
                tokens = encode_spans(tokens, self.tokeniser)
            yield sample, _cut(tokens, self.tokeniser.max_length)

    def _note(self, bad: BadLine) -> None:
        self.rejected[bad.file] = self.rejected.get(bad.file, 0) + 1
        if len(self._bad) < BAD_LINES_SHOWN:
            self._bad.append(bad)
        if self.on_bad_line == "skip":
            with (self.folder / "quarantine.jsonl").open("a", encoding="utf-8") as file:
                file.write(_json_line(asdict(bad)))

    def _finish(self) -> None:
        total = sum(self.rejected.values())
        if total and self.on_bad_line == "stop":
            shown = "\n".join(f"  {bad}" for bad in self._bad)
            more = f"\n  ... and {total - len(self._bad)} more" if total > len(self._bad) else ""
            raise BadData(
                f"{total} bad line(s) in the data:\n{shown}{more}\n"
                "Mend them, or pass --data.on_bad_line skip to put them into quarantine"
            )
        if total:
            log.warning("%d bad line(s) went to quarantine: %s", total, self.rejected)
        if self._inexact:
            log.warning(
                "%d text(s) with spans are not `exact`: this tokenizer, which made the exported "
                "pool, may cut them into other tokens than it had; --to jsonl exports the tokens",
                self._inexact,
            )
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.uint64))
        doubled = set(hashes[:-1][hashes[:-1] == hashes[1:]].tolist())
        if doubled:
            names = sorted(
                {
                    s.id
                    for s in self.reader
                    if not isinstance(s, BadLine) and hash_id(s.id) in doubled
                }
            )
            some = ", ".join(map(_cut_id, names[:5]))
            raise BadData(
                f"{len(names)} id(s) occur more than once, e.g. {some}; "
                "ids must be unique. Name another column with --data.id_column, or one that the "
                "data lack to have ids made from file and line"
            )


def _cut_id(text: str) -> str:
    """An id for a message: as it is, unless it is long or would break the line."""
    return text if len(text) <= 40 and text.isprintable() else shown(text)


def _cut(tokens: Tokens, max_length: int) -> TokenisedSample:
    """Tokens cut at ``max_length``, with what was cut."""
    cut = slice(0, max_length)
    return TokenisedSample(
        input_ids=tokens.input_ids[cut],
        response_mask=tokens.response_mask[cut],
        truth=None if tokens.truth is None else tokens.truth[cut],
        full_length=len(tokens.input_ids),
        response_tokens=int(tokens.response_mask.sum()),
        labels=tokens.labels[cut],
        weight=tokens.weight[cut],
    )


class _Split:
    """One output table being written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.statistics: dict[str, SourceStatistics] = {}
        self.rows = 0
        self._buffer: list[tuple[Sample | TokenSample, TokenisedSample]] = []
        self._writer = TableWriter(folder)
        self._schema: pa.Schema | None = None

    def add(self, sample: Sample | TokenSample, tokens: TokenisedSample) -> None:
        statistics = self.statistics.setdefault(sample.source, SourceStatistics())
        if len(self.statistics) > SOURCES:
            raise BadData(
                f"more than {SOURCES:,} sources, e.g. {_cut_id(sample.source)}; data.source_column "
                "must name the collection that a sample comes from"
            )
        if not tokens.response_mask.any():
            statistics.without_response += 1
            # Truncation can take a response away altogether: count that where it is looked for.
            statistics.truncated += tokens.response_tokens > 0
            statistics.response_tokens_cut += tokens.response_tokens
            return
        statistics.add(tokens)
        self.rows += 1
        self._buffer.append((sample, tokens))
        if len(self._buffer) == ROWS_PER_SHARD:
            self._flush()

    def _flush(self) -> None:
        if self._schema is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            first, tokens = self._buffer[0]
            columns = [
                ("id", pa.string()),
                ("source", pa.string()),
                ("input_ids", pa.list_(pa.int32())),
                ("response_mask", pa.list_(pa.bool_())),
            ]
            if tokens.labels is not None:
                columns += [("labels", pa.list_(pa.int32())), ("weight", pa.list_(pa.float32()))]
            if tokens.truth is not None:
                columns.append(("truth", pa.list_(pa.int8())))
            if first.order is not None:
                columns.append(("order", pa.float64()))
            self._schema = pa.schema(columns)
        has_truth, has_labels = ("truth" in self._schema.names, "labels" in self._schema.names)
        for sample, tokens in self._buffer:
            if (tokens.truth is not None) != has_truth:
                raise BadData(
                    f"sample {shown(sample.id)}: either every sample of a pool carries `truth` or "
                    "none"
                )
            if (tokens.labels is not None) != has_labels:
                raise BadData(
                    f"sample {shown(sample.id)}: either every sample of a pool comes as tokens or "
                    "none"
                )
        columns_data: dict[str, Any] = {
            "id": [s.id for s, _ in self._buffer],
            "source": [s.source for s, _ in self._buffer],
            "input_ids": list_array([t.input_ids for _, t in self._buffer], pa.int32()),
            "response_mask": list_array([t.response_mask for _, t in self._buffer], pa.bool_()),
        }
        if has_labels:
            labels = [t.labels for _, t in self._buffer if t.labels is not None]
            weights = [t.weight for _, t in self._buffer if t.weight is not None]
            columns_data["labels"] = list_array(labels, pa.int32())
            columns_data["weight"] = list_array(weights, pa.float32())
        if has_truth:
            truths = [t.truth for _, t in self._buffer if t.truth is not None]
            columns_data["truth"] = list_array(truths, pa.int8())
        if "order" in self._schema.names:
            columns_data["order"] = [s.order for s, _ in self._buffer]
        self._writer.write(pa.record_batch(columns_data, schema=self._schema))
        self._buffer = []

    def finish(self, manifest: dict[str, Any]) -> None:
        if self._buffer:
            self._flush()
        self._writer.close()
        if self.rows == 0:
            empty = {_cut_id(k): v.without_response for k, v in self.statistics.items()}
            if not empty:
                raise BadData(
                    f"no response token in the {self.folder.name} pool: no sample at all went into "
                    "it; check data.path and, for a held-out split, data.validation_share"
                )
            some = dict(list(empty.items())[:BAD_LINES_SHOWN])
            raise BadData(
                f"no response token in the {self.folder.name} pool: data.path gave "
                f"{sum(empty.values())} sample(s) without one (per source: {some}); check the "
                "roles, data.max_length and, for a held-out split, data.validation_share"
            )
        statistics = {k: asdict(v) for k, v in sorted(self.statistics.items())}
        write_json(
            self.folder / MANIFEST,
            {**manifest, "rows": self.rows, "statistics": statistics},
        )


def statistics_table(pool: TokenPool) -> str:
    """Markdown table per source, with the mean lengths of the paper's Table 4."""
    header = (
        "source",
        "samples",
        "tokens",
        "response tokens",
        "truncated",
        "without response",
        "prompt length",
        "completion length",
        "overall length",
    )
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    rows = dict(pool.manifest["statistics"])
    names = [f.name for f in fields(SourceStatistics)]
    total = {n: sum(int(r[n]) for r in rows.values()) for n in names}
    if len(rows) > _SOURCES_SHOWN:
        largest = sorted(rows, key=lambda source: (-int(rows[source]["samples"]), source))
        others = largest[_SOURCES_SHOWN:]
        sums = {n: sum(int(rows[source][n]) for source in others) for n in names}
        rows = {source: rows[source] for source in largest[:_SOURCES_SHOWN]}
        rows[f"{len(others)} others"] = sums
    rows["all"] = total
    for source, row in rows.items():
        samples = max(int(row["samples"]), 1)
        lengths = [
            f"{row[n] / samples:.1f}"
            for n in ("prompt_length", "completion_length", "overall_length")
        ]
        cells = [
            _cut_id(source).replace("|", "\\|"),
            *(str(row[n]) for n in names[:4]),
            str(row["without_response"]),
            *lengths,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rejected = pool.manifest["rejected"]
    if rejected:
        lines.append(f"\nrejected lines: {rejected}")
    return "\n".join(lines)


def hash_id(text: str) -> int:
    """Of 64 bits; the ids of a pool differ in it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _unit_hash(text: str) -> float:
    return hash_id(text) / 2.0**64


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"
