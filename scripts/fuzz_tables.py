"""Tables whose manifest or files were damaged: refused by name, or read as they were written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from scripts.fuzz_cases import Stream, byte_level
from scripts.fuzz_formats import PLACE
from tokenclean.data import pool as pools
from tokenclean.data.cleaned import cleaned_schema, read_blocks, write_cleaned_pool
from tokenclean.data.formats import Reader
from tokenclean.data.pool import TokenPool, build_pool
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import Tokeniser
from tokenclean.publish import MANIFEST, verify
from tokenclean.scoring import table as tables
from tokenclean.scoring.logprobs import read_logprobs
from tokenclean.scoring.table import ScoreTable, write_scores

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Damage:
    """What is done to one file of a folder.

    Attributes:
        how: what, see `_damaged`.
        file: number of the file, modulo how many there are; where ``how`` is of manifests, not
            used.
        at: where in the file or among the manifest's keys, in [0, 1).
        value: what is put there.
    """

    how: str
    file: int
    at: float
    value: Any


def _read_pool(folder: Path) -> Any:
    pool = TokenPool(folder)
    assert isinstance(pool.fingerprint, str) and isinstance(pool.eos_id, int)
    arrays = [pool.input_ids[i].tolist() for i in range(len(pool))]
    masks = [pool.response_mask[i].tolist() for i in range(len(pool))]
    return [list(pool.ids), list(pool.sources), arrays, masks, pool.response_counts().tolist()]


def _read_scores(folder: Path) -> Any:
    table = ScoreTable(folder)
    return [table.rows.tolist(), [table.nll[i].tobytes() for i in range(len(table))]]


def _read_cleaned(folder: Path) -> Any:
    return [
        [b.ids, b.input_ids.tolist(), b.labels.tolist(), b.weight.tobytes(), b.score.tobytes()]
        for b in read_blocks(folder)
    ]


READ: dict[str, Read] = {"pool": _read_pool, "scores": _read_scores, "cleaned": _read_cleaned}


@cache
def originals() -> dict[str, tuple[dict[str, bytes], Any]]:
    """Of each kind of table, its files and what is read from them."""
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        place = Path(name)
        rows = [{"prompt": f"ask {i}", "completion": f"the sky {i}\n" * i} for i in range(1, 6)]
        (place / "f.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with (
            mock.patch.object(pools, "ROWS_PER_SHARD", 2),
            mock.patch.object(tables, "ROWS_PER_SHARD", 2),
        ):
            tokeniser = Tokeniser(byte_level())
            with contextlib.redirect_stdout(io.StringIO()):  # no progress bars
                build_pool(Reader([str(place / "f.jsonl")]), tokeniser, place / "built")
            pool = TokenPool(place / "built" / "train")
            targets = TokenRows(pool)
            nll = np.linspace(0, 5, int(targets.counts.sum()), dtype=np.float32)
            facts = {"pool": pool.fingerprint, "trained_on": [], "columns": []}
            write_scores(place / "scores", targets, {"nll": nll}, facts)
        schema = cleaned_schema(with_truth=False)
        lists = {f.name: [[1, 2], [3]] for f in schema if pa.types.is_list(f.type)}
        lists["response_mask"] = [[False, True], [True]]  # type: ignore[list-item]
        columns = {**lists, "id": ["a", "b"], "source": ["s", "s"], "round": [1, 1]}
        batch = pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
        write_cleaned_pool(place / "cleaned", [batch], schema, {"tokenizer": "t", "reasons": {}})
        found = {}
        for kind, folder in (
            ("pool", place / "built" / "train"),
            ("scores", place / "scores"),
            ("cleaned", place / "cleaned"),
        ):
            files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
            found[kind] = files, READ[kind](folder)
        return found


def _damaged(files: dict[str, bytes], damage: Damage) -> dict[str, bytes]:
    files = dict(files)
    names = sorted(files)
    name = names[damage.file % len(names)]
    raw = files[name]
    place = int(damage.at * len(raw))
    if damage.how == "flip" and raw:
        changed = bytearray(raw)
        changed[place] ^= 1 << damage.file % 8
        files[name] = bytes(changed)
    elif damage.how == "cut":
        files[name] = raw[:place]
    elif damage.how == "more":
        files[name] = raw + b"\0" * (1 + damage.file)
    elif damage.how == "overwrite":
        files[name] = raw[:place] + b"\xff" * min(8, len(raw) - place) + raw[place + 8 :]
    elif damage.how == "remove":
        del files[name]
    elif damage.how == "swap":
        other = names[(damage.file + 1) % len(names)]
        files[name], files[other] = files[other], files[name]
    elif damage.how == "empty":
        files[name] = b""
    return files


def _misstated(manifest: Any, damage: Damage) -> Any:
    """A manifest with one entry gone, of another type, or moved, at any depth."""
    manifest = copy.deepcopy(manifest)
    holder, keys = manifest, sorted(manifest)
    key = keys[int(damage.at * len(keys))]
    if damage.file % 3 == 0 and isinstance(holder[key], dict) and holder[key]:
        holder = holder[key]
        keys = sorted(holder)
        key = keys[damage.file // 3 % len(keys)]
    if damage.how == "key gone":
        del holder[key]
    else:
        holder[key] = damage.value
    return manifest


OF_FILES = ("flip", "flip", "cut", "more", "overwrite", "remove", "swap", "empty")
OF_MANIFESTS = ("key gone", "key changed", "key changed")
JUNK: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2**80,
    1.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": {}},
    "../../x",
    [[]] * 3,
)
_place = st.floats(0, 1, exclude_max=True)
_damages = st.builds(
    Damage,
    st.sampled_from((*OF_FILES, *OF_MANIFESTS)),
    st.integers(0, 30),
    _place,
    st.sampled_from(JUNK),
)
cases = st.tuples(st.sampled_from(sorted(READ)), st.lists(_damages, min_size=1, max_size=2))


def check(case: tuple[str, list[Damage]], tally: Counter[str]) -> None:
    kind, damages = case
    files, content = originals()[kind]
    # Of a folder without a list of its files nobody can say that they are whole, so that what is
    # damaged is either the manifest or the files.
    if damages[0].how in OF_MANIFESTS:
        manifest = json.loads(files[MANIFEST])
        for damage in damages:
            if damage.how in OF_MANIFESTS and manifest:
                manifest = _misstated(manifest, damage)
        files = {**files, MANIFEST: json.dumps(manifest).encode()}
    else:
        for damage in damages:
            if damage.how in OF_FILES and files:
                files = _damaged(files, damage)
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        folder = Path(name) / "table"
        folder.mkdir()
        for file, raw in files.items():
            (folder / file).write_bytes(raw)
        try:
            verify(folder)
            found = READ[kind](folder)
        except ValueError as error:
            assert str(folder) in str(error), f"names no file: {error}"
            assert len(str(error)) < 1000
            tally["rejected"] += 1
            return
    assert found == content, "read as something else than was written"
    tally["accepted"] += 1


@cache
def _rows() -> TokenRows:
    """The targets of a small pool, which stays in memory though its files go."""
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        folder = Path(name)
        for file, raw in originals()["pool"][0].items():
            (folder / file).write_bytes(raw)
        return TokenRows(TokenPool(folder))


#: How a row of log-probabilities may be laid out, and what may be wrong with it, mostly nothing.
LAYOUTS = ("response", "all", "all but the first")
WRONGS = (
    *[""] * 50,
    *("short", "long", "null", "text", "NaN", "-Infinity", "positive", "huge"),
    *("other id", "no id", "twice", "gone", "wrong token", "no list"),
)
logprobs = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(WRONGS), st.booleans()),
        min_size=5,
        max_size=5,
    ),
    st.permutations(range(5)),
)


def _told(row: int, layout: str, wrong: str, named: bool) -> dict[str, Any]:
    """A row of log-probabilities: of token t of a sample, -(t + 0.25)."""
    pool = _rows().table
    assert isinstance(pool, TokenPool)
    ids = pool.input_ids[row]
    places = {
        "response": pool.response_positions(row),
        "all": np.arange(len(ids)),
        "all but the first": np.arange(1, len(ids)),
    }[layout]
    values: list[Any] = [-(t + 0.25) for t in places.tolist()]
    if layout == "all":
        values[0] = None
    tokens = ids[places].tolist()
    found: dict[str, Any] = {"id": pool.ids[row], "logprobs": values}
    if named or wrong == "wrong token":
        found["token_ids"] = tokens
    change = {"null": None, "text": "x", "NaN": float("nan"), "-Infinity": -float("inf")}
    change |= {"positive": 3.0, "huge": 10**400}
    if wrong in change:
        values[-1] = change[wrong]
    elif wrong == "short":
        del values[1:]
    elif wrong == "long":
        values += [-1.0] * 500
    elif wrong == "other id":
        found["id"] = "nobody"
    elif wrong == "no id":
        del found["id"]
    elif wrong == "wrong token":
        tokens[-1] += 1
    elif wrong == "no list":
        found["logprobs"] = {"a": 1}
    return found


def check_logprobs(case: Any, tally: Counter[str]) -> None:
    """Losses of the pool's targets from a file in any order, or every wrong row by its line."""
    told, order = case
    rows = _rows()
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    missing = False
    for row in order:
        layout, wrong, named = told[row]
        if wrong == "gone":
            missing = True
            continue
        lines.append(_told(row, layout, wrong, named))
        if wrong == "twice":
            lines.append(lines[-1])
        if wrong:
            bad.append(len(lines))
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        path = Path(name) / "f.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
        try:
            nll = read_logprobs(path, rows, Path(name))
        except ValueError as error:
            assert bad or missing, error
            for line in bad:
                assert f"{path}:{line}: " in str(error), (line, error)
            assert str(path) in str(error) or not lines
            tally["rejected"] += 1
            return
        assert not bad and not missing
        pool = rows.table
        assert isinstance(pool, TokenPool)
        places = [pool.response_positions(row) for row in range(5)]
        assert nll.tolist() == [t + 0.25 for place in places for t in place.tolist()]
    tally["accepted"] += 1


STREAMS = {
    "tables": Stream(cases, check, 20),
    "log-probabilities": Stream(logprobs, check_logprobs, 5),
}
