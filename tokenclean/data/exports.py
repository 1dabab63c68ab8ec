"""What `tokenclean export` writes, as a source of rows: which files of a folder hold them."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

#: Beside the files of an export.
CARD = "tokenclean.json"
#: Version of the layout that is understood.
VERSION = 1
#: Formats without a tokenizer's ids.
TEXT_FORMATS = ("spans",)
_MODELS = ("adapter", "merged")


def export_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The export that a folder is, or that a file belongs to: its folder and its description.

    Raises:
        ValueError: if it holds no samples, or was written by a later version.
    """
    folder = next((p for p in (path, path.parent) if (p / CARD).is_file()), None)
    if folder is None:
        return None
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data.path: {folder / CARD} is not JSON: {error}") from error
    if not isinstance(card, dict) or card.get("kind") != "export":
        return None
    if card.get("format") in _MODELS:
        raise ValueError(
            f"data.path: {folder} holds a model; name it with model.base.name or model.adapters"
        )
    if card.get("version", VERSION) != VERSION:
        raise ValueError(
            f"data.path: {folder} was written in version {card['version']} of its layout, and "
            f"this one reads version {VERSION}; install a newer tokenclean"
        )
    return folder, card


def exported_files(path: Path) -> list[Path] | None:
    """The data of an export's folder, in order, and nothing that repeats it.

    Returns:
        Files or folders; None if the path is no export's folder.

    Raises:
        ValueError: if one is not there.
    """
    found = export_of(path) if path.is_dir() else None
    if found is None or found[0] != path:
        return None
    files = [path / str(name) for name in found[1].get("data") or []]
    if not files:
        raise ValueError(f"data.path: {path / CARD} names no data; export the run again")
    for file in files:
        if not file.exists():
            raise ValueError(f"data.path: {file}, which {path / CARD} names, does not exist")
    return files


def reading_of(path: Path) -> str:
    """What an export's description says about how its bytes are to be read; empty if it is none."""
    found = export_of(path) if path.exists() else None
    if found is None:
        return ""
    return repr([found[1].get(key) for key in ("eos", "add_special_tokens", "dtype")])


def check_tokenizer(paths: list[str], fingerprint: str) -> None:
    """Refuse exports whose tokens another tokenizer made; texts with spans go with any.

    Args:
        paths: as in ``data.path``.
        fingerprint: of the base model's tokenizer.

    Raises:
        ValueError: with both fingerprints.
    """
    for path in map(Path, paths):
        found = export_of(path) if path.exists() else None
        if found is not None and found[1].get("weights_dropped"):
            log.warning("%s was exported without the loss weights that its pool had", path)
        if found is None or found[1].get("format") in TEXT_FORMATS:
            continue
        if (made := found[1].get("tokenizer")) != fingerprint:
            raise ValueError(
                f"data.path: {path} was tokenised by another tokenizer (fingerprint {made}) than "
                f"model.base has ({fingerprint}); export it with --to spans, which goes with any"
            )


def is_token_array(path: Path) -> bool:
    """Whether a file holds the tokens of an export for OLMo-core."""
    return path.suffix == ".npy"


def token_array_parts(path: Path) -> tuple[Path, Path]:
    """Files of label masks and document bounds that belong to an array of tokens."""
    mask = path.with_name(path.name.replace("token_ids", "labels_mask"))
    return mask, path.with_name(path.stem + ".csv.gz")


def token_array_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Documents of an array of tokens, as rows with their numbers, counted from 1.

    The arrays have no header: what they hold, the export's description says.

    Raises:
        ValueError: if there is none, or the files do not go together.
    """
    found = export_of(path)
    if found is None or not found[1].get("dtype"):
        raise ValueError(
            f"data.path: {path} has no header, and no {CARD} beside it says what it holds"
        )
    mask_file, bounds = token_array_parts(path)
    for file in (mask_file, bounds):
        if not file.is_file():
            raise ValueError(f"data.path: {file}, which belongs to {path}, does not exist")
    dtype = np.dtype(found[1]["dtype"]).newbyteorder("<")
    if path.stat().st_size != mask_file.stat().st_size * dtype.itemsize:
        raise ValueError(
            f"data.path: {path} holds {path.stat().st_size / dtype.itemsize:g} tokens of "
            f"{found[1]['dtype']}, {mask_file} {mask_file.stat().st_size} labels"
        )
    if path.stat().st_size == 0:
        return
    tokens, mask = np.memmap(path, dtype, "r"), np.memmap(mask_file, np.uint8, "r")
    with gzip.open(bounds, "rt", encoding="ascii") as lines:
        for number, line in enumerate(lines, start=1):
            start, _, end = line.strip().partition(",")
            try:
                document = slice(int(start), int(end))
            except ValueError:
                raise ValueError(
                    f"data.path: {bounds}:{number}: {line.strip()!r} is not `start,end`"
                ) from None
            if not 0 <= document.start < document.stop <= len(tokens):
                raise ValueError(
                    f"data.path: {bounds}:{number}: {line.strip()} lies outside {len(tokens)} "
                    "tokens"
                )
            yield (
                number,
                {
                    "input_ids": np.asarray(tokens[document]),
                    "assistant_masks": np.asarray(mask[document]),
                },
            )
