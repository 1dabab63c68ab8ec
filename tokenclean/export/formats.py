"""Ids and labels in the layouts of other trainers. Each writer streams and writes the same bytes
for the same rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean.arrow import lists_of
from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.exports import token_array_parts
from tokenclean.data.rows import NO_LOSS
from tokenclean.export.content import Labelled
from tokenclean.publish import write_json

#: Bytes of token ids in one file of the `olmo` format.
PART_BYTES = 1 << 30


@dataclass
class Files:
    """What a writer has written, relative to the export's folder.

    Attributes:
        data: what holds the rows.
        others: the same rows in another form.
    """

    data: list[str]
    others: list[str] = field(default_factory=list)


def write_trl(folder: Path, parts: Iterable[Labelled]) -> Files:
    """`input_ids`, `labels` and `assistant_masks` (1 where there is a label), as JSONL and Parquet.

    Labels say it all; the mask says it again to versions of TRL that take one and not the other.
    The Parquet file carries no metadata of `datasets`, whose versions read each other's badly.
    """
    names = ("input_ids", "labels", "assistant_masks")
    schema = pa.schema([(name, pa.list_(pa.int64())) for name in names])

    def both() -> Iterator[dict[str, Any]]:
        for part in parts:
            arrays = (part.input_ids, part.labels, part.labels != NO_LOSS)
            values = [pa.array(a.astype(np.int64)) for a in arrays]
            parquet.write_batch(
                pa.record_batch([lists_of(part.counts, v) for v in values], schema=schema)
            )
            for ids, labels in part.rows():
                masks = (labels != NO_LOSS).astype(np.int8)
                columns = (ids, labels, masks)
                yield {name: c.tolist() for name, c in zip(names, columns, strict=True)}

    with pq.ParquetWriter(folder / "train.parquet", schema) as parquet:
        write_lines(folder / "train.jsonl", both())
    return Files(["train.jsonl"], ["train.parquet"])


def write_axolotl(folder: Path, parts: Iterable[Labelled]) -> Files:
    """Exactly the columns by which Axolotl knows rows that are tokenised."""
    rows = (
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}
        for part in parts
        for ids, labels in part.rows()
    )
    write_lines(folder / "train.jsonl", rows)
    return Files(["train.jsonl"])


def write_llamafactory(folder: Path, parts: Iterable[Labelled], content: str) -> Files:
    """A `DatasetDict` with the split `train`, as `save_to_disk` leaves it.

    Written here rather than by `datasets`: version 5 names its lists in a way that versions before
    4 cannot read, and stamps files with a random fingerprint. The older name is read by all.

    Args:
        content: takes the place of that fingerprint.
    """
    types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int64"}
    features = {
        name: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "Sequence"}
        for name, dtype in types.items()
    }
    schema = pa.schema(
        [(name, pa.list_(pa.type_for_alias(dtype))) for name, dtype in types.items()],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    name = "data-00000-of-00001.arrow"
    (folder / "train").mkdir()
    with (
        pa.OSFile(str(folder / "train" / name), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for part in parts:
            mask = np.ones(len(part.input_ids), dtype=np.int8)
            arrays = (part.input_ids, mask, part.labels.astype(np.int64))
            columns = [lists_of(part.counts, pa.array(a)) for a in arrays]
            stream.write_batch(pa.record_batch(columns, schema=schema))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}],
        "_fingerprint": content,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(folder / "train" / "dataset_info.json", info)
    write_json(folder / "train" / "state.json", state)
    write_json(folder / "dataset_dict.json", {"splits": ["train"]})
    return Files(["train"])


def write_olmo(
    folder: Path, parts: Iterable[Labelled], dtype: str, part_bytes: int = PART_BYTES
) -> Files:
    """Token ids and label masks as arrays without a header, and where documents start and end.

    OLMo-core shifts the labels itself: a mask is true at the token to be learnt. A document lies in
    one file.

    Args:
        dtype: ``uint16`` or ``uint32``; stored little-endian.
        part_bytes: of token ids, after which a new file begins.
    """
    kind, written = np.dtype(dtype).newbyteorder("<"), 0
    names: list[str] = []
    others: list[str] = []
    with ExitStack() as stack:
        tokens: Any = None
        for part in parts:
            for ids, labels in part.rows():
                if tokens is None or (
                    written and (written + len(ids)) * kind.itemsize > part_bytes
                ):
                    stack.close()
                    names.append(f"token_ids_part_{len(names):04d}.npy")
                    paths = (folder / names[-1], *token_array_parts(folder / names[-1]))
                    others += [path.name for path in paths[1:]]
                    tokens, mask, raw = (stack.enter_context(p.open("wb")) for p in paths)
                    # without a name and a time in it, equal bounds are equal bytes
                    bounds = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
                    written = 0
                tokens.write(ids.astype(kind).tobytes())
                mask.write((labels != NO_LOSS).tobytes())
                bounds.write(f"{written},{written + len(ids)}\n".encode())
                written += len(ids)
    return Files(names, others)


def smallest_dtype(entries: int, asked: str | None) -> str:
    """The dtype of token ids of a vocabulary, as OLMo-core chooses it, but never uint8.

    Raises:
        ValueError: if the one asked for is too small.
    """
    if asked == "uint16" and entries > 1 << 16:
        raise ValueError(
            f"--dtype: token ids up to {entries - 1:,} do not fit in uint16; pass uint32"
        )
    return asked or ("uint16" if entries <= 1 << 16 else "uint32")


def write_jsonl(
    folder: Path, blocks: Iterable[CleanedBlock], reasons: Callable[[int], str], priority: bool
) -> Files:
    """The cleaned pool itself, a sample a line, every number and every weight.

    Args:
        reasons: code -> its name.
        priority: the rule goes by something else than the score, which is then a column, too.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for block in blocks:
            floats = {
                "weight": block.weight,
                "score": block.score,
                "base_nll": block.base,
                "reference_nll": block.reference,
            }
            if priority:
                floats["priority"] = block.priority
            for row in range(len(block.ids)):
                at = block.tokens_of(row)
                yield {
                    "id": block.ids[row],
                    "source": block.sources[row],
                    "round": int(block.rounds[row]),
                    "input_ids": block.input_ids[at].tolist(),
                    "labels": block.labels[at].tolist(),
                    "response_mask": block.response[at].astype(np.int8).tolist(),
                    **{name: numbers(values[at]) for name, values in floats.items()},
                    "reason": [reasons(code) for code in block.reason[at].tolist()],
                    **({} if block.truth is None else {"truth": block.truth[at].tolist()}),
                }

    write_lines(folder / "samples.jsonl", rows())
    return Files(["samples.jsonl"])


def numbers(values: np.ndarray) -> list[float | None]:
    """Floats for JSON: null where there is no finite number."""
    known = np.isfinite(values)
    if known.all():
        return values.tolist()
    return [v if k else None for v, k in zip(values.tolist(), known.tolist(), strict=True)]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, a row a line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
