"""Log-probabilities that were computed elsewhere, as a score table.

A file of rows ``id``, ``logprobs`` and, if wanted, ``token_ids``: JSONL, JSON or Parquet, in any
order. ``logprobs`` holds the natural logarithm of each token's probability, one number per response
token or, as inference servers give them for a prompt, one per input token: with something in the
first token's place, which nothing predicts (null, usually), or without it. Which of the three a row
is, its length says; ``token_ids``, of the same length, are then compared with the pool's.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenclean.data.exports import read_json
from tokenclean.data.files import COMPRESSED, SUFFIXES, file_rows
from tokenclean.data.pool import BAD_LINES_SHOWN, BadData, TokenPool, hash_id
from tokenclean.data.pretokenised import BadRow, shown
from tokenclean.data.rows import TokenRows
from tokenclean.scoring.table import write_scores

log = logging.getLogger(__name__)

#: What rounding may add to a probability of 1; whatever is larger is no log-probability.
LARGEST = 1e-3
#: How many missing ids an error names.
_NAMED = 10
#: Largest file of ids that is read, in bytes: tens of millions of them.
_IDS_BYTES = 1 << 30


def check_file(file: Path, option: str = "--logprobs") -> None:
    """Refuse a file that cannot be read, before anything expensive.

    Raises:
        ValueError: naming the option.
    """
    if not file.is_file():
        exists = "is no file" if file.exists() else "does not exist"
        raise ValueError(f"{option}: {file} {exists}")
    if file.suffix in COMPRESSED:
        raise ValueError(f"{option}: {file} is compressed; unpack it first")
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{option}: {file} has an unknown suffix; use one of {', '.join(SUFFIXES)}"
        )


def import_logprobs(
    file: Path,
    rows: TokenRows,
    folder: Path,
    name: str | None = None,
    trained_on: Path | None = None,
) -> None:
    """Write a score table from a file of log-probabilities; nothing is written if a row is wrong.

    Args:
        file: see the module; what it holds of other rows of the pool is left alone.
        rows: the pool's rows that are wanted, in ascending order, with their response tokens.
        folder: where the table goes.
        name: of the model, for the table's manifest; the file's stem by default.
        trained_on: file of the ids that the model was trained on: a JSON list, or one per line.

    Raises:
        BadData: listing file, line and reason of every wrong row, or the samples without one.
    """
    pool = rows.table
    assert isinstance(pool, TokenPool)
    ids = [] if trained_on is None else read_ids(trained_on)
    nll = read_logprobs(file, rows, folder.parent)
    digest = hashlib.sha256(rows.rows.tobytes())
    digest.update(nll.data)
    model = f"{name or file.stem}-{digest.hexdigest()[:16]}"
    if trained_on is None:
        log.warning(
            "what %s was trained on is not known: as a reference it counts as one that has seen "
            "no sample, so selection.exclude_seen leaves none out. --logprobs_trained_on names "
            "the ids",
            model,
        )
    elif not pool.ids.among(ids).any():
        log.warning("--logprobs_trained_on: no id of %s is in the pool", trained_on)
    manifest: dict[str, Any] = {
        "pool": pool.fingerprint,
        "pool_folder": str(pool.folder),
        "tokenizer": pool.manifest["tokenizer"],
        "vocabulary": pool.manifest["vocabulary"],
        "model": model,
        "imported": True,
        "trained_on": ids,
    }
    write_scores(folder, rows, {"nll": nll}, manifest)


def read_ids(file: Path) -> list[str]:
    """Ids from a JSON list (as ``trained_ids.json`` of a run is one) or lines; sorted, each once.

    Raises:
        ValueError: if it is neither.
    """
    option = "--logprobs_trained_on"
    if not file.is_file():
        raise ValueError(f"{option}: {file} is no file")
    with file.open("rb") as stream:
        if stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            found = read_json(file, _IDS_BYTES, option)
            if odd := [i for i in found if isinstance(i, bool) or not isinstance(i, str | int)]:
                raise ValueError(f"{option}: {file} holds {shown(odd[0])}, which is no id")
            return sorted({str(i) for i in found})
        stream.seek(0)
        raw = stream.read(_IDS_BYTES + 1)
    if len(raw) > _IDS_BYTES:
        raise ValueError(f"{option}: {file} has more than the {_IDS_BYTES:,} bytes it may have")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {file} is not UTF-8 at byte {error.start}") from None
    return sorted({line.strip() for line in text.split("\n")} - {""})


def read_logprobs(file: Path, rows: TokenRows, scratch: Path) -> np.ndarray:
    """Losses from a file of log-probabilities, checked row by row.

    Args:
        scratch: folder on whose disk the losses are collected, in a file without a name: the rows
            come in any order, and memory stays flat, except that a JSON file of one array is read
            whole.

    Returns:
        Of all targets of ``rows``, end to end: float32, nats, shape (n,).

    Raises:
        BadData: see `import_logprobs`.
    """
    pool = rows.table
    assert isinstance(pool, TokenPool)
    hashes = np.fromiter(map(hash_id, pool.ids), np.uint64, len(pool))
    order = np.argsort(hashes)
    hashes = hashes[order]
    starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
    place_of = np.full(len(pool), -1, dtype=np.int64)
    place_of[rows.rows] = np.arange(len(rows))
    line_of = np.zeros(len(pool), dtype=np.int64)
    nll = _scratch(scratch, int(starts[-1]))
    bad: list[str] = []
    wrong = others = 0
    for line, row in file_rows(file, "--logprobs"):
        try:
            at = _row_of(row, pool, hashes, order)
            if line_of[at]:
                raise BadRow(f"id {shown(pool.ids[at])} was in line {line_of[at]} already")
            line_of[at] = line
            if (place := int(place_of[at])) < 0:
                others += 1
                continue
            nll[starts[place] : starts[place + 1]] = _losses(row, pool, at)
        except BadRow as error:
            wrong += 1
            if len(bad) < BAD_LINES_SHOWN:
                bad.append(f"  {file}:{line}: {error}")
    if wrong:
        more = f"\n  ... and {wrong - len(bad)} more" if wrong > len(bad) else ""
        raise BadData(f"--logprobs: {wrong} wrong row(s):\n" + "\n".join(bad) + more)
    missing = rows.rows[line_of[rows.rows] == 0]
    if len(missing):
        some = ", ".join(map(shown, pool.ids.take(missing[:_NAMED]).to_pylist()))
        raise BadData(
            f"--logprobs: {file} lacks {len(missing)} of the {len(rows)} samples of the pool"
            f" ({some}{', ...' if len(missing) > _NAMED else ''}); score them too, or choose the "
            "parts that it has with --data.subset"
        )
    if others:
        log.info("%s: %d sample(s) outside data.subset were left alone", file, others)
    return nll


def _row_of(row: Any, pool: TokenPool, hashes: np.ndarray, order: np.ndarray) -> int:
    """Pool row that a row of the file belongs to."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, found {type(row).__name__}")
    if row.get("id") is None:
        raise BadRow("no `id`")
    name = str(row["id"])
    try:
        wanted = hash_id(name)
    except UnicodeEncodeError:
        raise BadRow("the id is not valid Unicode") from None
    place = int(np.searchsorted(hashes, np.uint64(wanted)))
    if place == len(hashes) or hashes[place] != wanted or pool.ids[int(order[place])] != name:
        raise BadRow(f"id {shown(name)} is not in the pool")
    return int(order[place])


def _losses(row: Mapping[str, Any], pool: TokenPool, at: int) -> np.ndarray:
    """Losses of the sample's response tokens: float32."""
    values = row.get("logprobs")
    if not isinstance(values, list):
        raise BadRow("no list `logprobs`")
    input_ids, positions = pool.input_ids[at], pool.response_positions(at)
    # What each number of the row belongs to: positions in the sample.
    shapes = {
        len(input_ids): np.arange(len(input_ids)),
        len(input_ids) - 1: np.arange(1, len(input_ids)),
        len(positions): positions,
    }
    if len(values) not in shapes:
        raise BadRow(
            f"{len(values)} log-probabilities for {len(positions)} response tokens of "
            f"{len(input_ids)} input tokens; one for each of these or of those is needed, of the "
            "tokens as the pool has them (data.max_length, data.template)"
        )
    places = shapes[len(values)]
    if (given := row.get("token_ids")) is not None:
        ours = input_ids[places].tolist()
        if not isinstance(given, list) or len(given) != len(values):
            raise BadRow("`token_ids` is no list of the length of `logprobs`")
        if given != ours:
            j = next(j for j, (a, b) in enumerate(zip(given, ours, strict=True)) if a != b)
            raise BadRow(f"token {j} is {shown(given[j])}, but {ours[j]} in the pool")
    chosen = np.searchsorted(places, positions)
    wanted = [values[j] for j in chosen]
    if not set(map(type, wanted)) <= {int, float}:
        odd = next(j for j in chosen if type(values[j]) not in (int, float))
        raise BadRow(f"log-probability {odd} is {shown(values[odd])}, not a number")
    try:
        numbers = np.array(wanted, dtype=np.float64)
    except OverflowError:
        raise BadRow("a log-probability is too large a number") from None
    if (wrong := ~np.isfinite(numbers)).any():
        odd = numbers[np.argmax(wrong)]
        remedy = "score the sample again"
        if odd == -np.inf:  # rounded to a probability of 0
            remedy = "write a finite number in its place, e.g. -100"
        raise BadRow(f"log-probability {chosen[np.argmax(wrong)]} is {odd}; {remedy}")
    if (wrong := numbers > LARGEST).any():
        raise BadRow(
            f"log-probability {chosen[np.argmax(wrong)]} is {numbers[np.argmax(wrong)]:g}, above "
            "0; perhaps these are losses: change their sign"
        )
    return (0.0 - numbers).astype(np.float32)  # never -0.0


def _scratch(folder: Path, size: int) -> np.ndarray:
    """Room for float32 numbers, shape (size,), in a file that goes away with it."""
    if size == 0:
        return np.zeros(0, dtype=np.float32)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    return np.memmap(file, dtype=np.float32, mode="w+", shape=(size,))
