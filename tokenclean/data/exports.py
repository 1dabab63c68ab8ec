"""What `tokenclean export` writes, as a source of rows: which files of a folder hold them."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from tokenclean.data.pretokenised import SHOWN, shown

log = logging.getLogger(__name__)

#: Beside the files of an export.
CARD = "tokenclean.json"
#: Version of the layout that is understood.
VERSION = 1
#: Formats without a tokenizer's ids.
TEXT_FORMATS = ("spans",)
#: Formats that are models.
MODELS = ("adapter", "merged")
#: What token ids of the OLMo-core format may be stored as.
DTYPES = ("uint16", "uint32")
#: Largest description that is read, in bytes.
CARD_BYTES = 16 << 20


def export_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The export that a folder is, or that a file belongs to: its folder and its description.

    Raises:
        ValueError: if it holds no samples, was written by a later version, or makes no sense.
    """
    folder = next((p for p in (path, path.parent) if (p / CARD).is_file()), None)
    if folder is None:
        return None
    card = read_json(folder / CARD, CARD_BYTES)
    if not isinstance(card, dict) or card.get("kind") != "export":
        return None
    if card.get("format") in MODELS:
        raise ValueError(
            f"data.path: {folder} holds a model; name it with model.base.name or model.adapters"
        )
    if card.get("version", VERSION) != VERSION:
        raise ValueError(
            f"data.path: {folder} was written in version {shown(card['version'])} of its layout, "
            f"and this one reads version {VERSION}; install a newer tokenclean"
        )
    if not isinstance(card.get("eos", ""), str | None):
        raise ValueError(f"data.path: {folder / CARD}: eos is {shown(card['eos'])}, not text")
    return folder, card


def read_json(file: Path, most: int, option: str = "data.path") -> Any:
    """The value of a JSON file of at most so many bytes.

    Raises:
        ValueError: naming option and file, if it is larger or no JSON.
    """
    with file.open("rb") as stream:
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{option}: {file} has more than the {most:,} bytes that it may have")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option}: {file} is not JSON: {str(error)[:SHOWN]}") from error


def exported_files(path: Path) -> list[Path] | None:
    """The data of an export's folder, in order, and nothing that repeats it.

    Returns:
        Files or folders; None if the path is no export's folder.

    Raises:
        ValueError: if one is not there, or lies elsewhere.
    """
    found = export_of(path) if path.is_dir() else None
    if found is None or found[0] != path:
        return None
    names = found[1].get("data") or []
    if not names:
        raise ValueError(f"data.path: {path / CARD} names no data; export the run again")
    if not isinstance(names, list) or not all(map(_is_inside, names)):
        raise ValueError(
            f"data.path: {path / CARD}: data is {shown(names)}, no list of files in its folder"
        )
    files = [path / name for name in names]
    for file in files:
        # a folder is what `datasets` saved
        if not file.is_file() and not (file / "state.json").is_file():
            raise ValueError(f"data.path: {file}, which {path / CARD} names, does not exist")
    return files


def _is_inside(name: Any) -> bool:
    """Whether a name leads to something in the folder that it is relative to.

    Links are followed: the hub's cache keeps every file behind one.
    """
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def reading_of(path: Path) -> str:
    """What an export's description says about how its bytes are to be read; empty if it is none."""
    found = export_of(path) if path.exists() else None
    if found is None:
        return ""
    keys = ("eos", "add_special_tokens", "dtype", "template", "tokenizer")
    return repr([found[1].get(key) for key in keys])


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
                f"data.path: {path} was tokenised by another tokenizer (fingerprint "
                f"{made if isinstance(made, str) and len(made) < SHOWN else shown(made)}) than "
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
        ValueError: if there is none, or the files do not go together or cannot be read.
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
    if found[1]["dtype"] not in DTYPES:
        raise ValueError(
            f"data.path: {found[0] / CARD}: dtype is {shown(found[1]['dtype'])}, not one of "
            f"{', '.join(DTYPES)}"
        )
    dtype = np.dtype(found[1]["dtype"]).newbyteorder("<")
    if path.stat().st_size != mask_file.stat().st_size * dtype.itemsize:
        raise ValueError(
            f"data.path: {path} holds {path.stat().st_size / dtype.itemsize:g} tokens of "
            f"{found[1]['dtype']}, {mask_file} {mask_file.stat().st_size} labels"
        )
    if path.stat().st_size == 0:
        return
    tokens, mask = np.memmap(path, dtype, "r"), np.memmap(mask_file, np.uint8, "r")
    for number, document in enumerate(_documents(bounds, len(tokens)), start=1):
        yield (
            number,
            {
                "input_ids": np.asarray(tokens[document]),
                "assistant_masks": np.asarray(mask[document]),
            },
        )


def _documents(bounds: Path, size: int) -> Iterator[slice]:
    """Where the documents of an array of so many tokens lie, one behind the other."""
    number = last = 0
    try:
        with gzip.open(bounds, "rt", encoding="ascii") as lines:
            # Line by line and in order: a small file may unpack to any number of bytes.
            while line := lines.readline(SHOWN + 1):
                number += 1
                start, _, end = line.strip().partition(",")
                where = f"data.path: {bounds}:{number}: {shown(line.strip())}"
                if not (start.isdigit() and end.isdigit() and len(line) <= SHOWN):
                    raise ValueError(f"{where} is not `start,end`")
                document = slice(int(start), int(end))
                if not document.start < document.stop <= size:
                    raise ValueError(f"{where} lies outside {size} tokens")
                if document.start < last:
                    raise ValueError(f"{where} begins before the last document ends")
                last = document.stop
                yield document
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.path: {bounds} is no whole gzip file of text ({error}); copy it again"
        ) from error
