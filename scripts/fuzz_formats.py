"""Files of samples in every shape and container, whole and broken, through the real reader.

Each row is made together with what it must become: the turns of a sample, or a bad line. What is
accepted is tokenised with a tokenizer over bytes, and its response tokens decode to what went in.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from scripts.fuzz_cases import Stream, byte_level, names, texts
from tokenclean.data import files as reading
from tokenclean.data.formats import BadLine, Reader, Sample, TokenSample
from tokenclean.data.pool import TokenPool, build_pool
from tokenclean.data.pretokenised import NO_LOSS, BadRow, Tokens
from tokenclean.data.spans import SpannedText, encode_spans
from tokenclean.data.template import Tokeniser

Turns = tuple[tuple[str, str], ...]
#: where case files go: memory, where the system has such a place
PLACE = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Row:
    """A row, and what it must become.

    Attributes:
        value: what is written.
        turns: (role, content) of its turns; None: it is a bad line, or comes as tokens.
        tokens: (id, is response, is learnt) of its tokens, or None.
        spans: (text, responses) of a text with spans, or None.
        raw: the line itself, where it is not that of ``value``.
        sure: the verdict is known; else it may be either, and what is accepted is compared.
    """

    value: Any
    turns: Turns | None = None
    tokens: tuple[tuple[int, bool, bool], ...] | None = None
    spans: tuple[str, tuple[tuple[int, int], ...]] | None = None
    raw: bytes | None = None
    sure: bool = True

    @property
    def good(self) -> bool:
        return self.turns is not None or self.tokens is not None or self.spans is not None


def _keyed(role: str, content: str, role_key: str, text_key: str, roles: dict[str, str]) -> Any:
    return {role_key: roles.get(role, role), text_key: content}


def _list_of_turns(
    column: str, role_key: str, text_key: str, roles: dict[str, str]
) -> st.SearchStrategy[Row]:
    turn = st.tuples(st.sampled_from(["user", "assistant", "assistant", "system"]), texts)
    return st.lists(turn, min_size=1, max_size=4).map(
        lambda turns: Row(
            {column: [_keyed(r, c, role_key, text_key, roles) for r, c in turns]}, tuple(turns)
        )
    )


def _pair(question: str, answer: str, extra: str | None = None) -> st.SearchStrategy[Row]:
    def made(system: str | None, asked: str, more: str | None, told: str) -> Row:
        value = {question: asked, answer: told}
        full = asked
        if extra is not None:
            value[extra] = more  # type: ignore[assignment]
            full += f"\n\n{more}" if more is not None and more.strip() else ""
        turns: list[tuple[str, str]] = [("user", full), ("assistant", told)]
        if system is not None:
            value["system"] = system
            turns.insert(0, ("system", system))
        return Row(value, tuple(turns))

    maybe = st.none() | texts
    return st.builds(made, maybe, texts, maybe, texts)


def _tokens(kinds: list[tuple[int, bool, bool]]) -> Row:
    ids = [number for number, _, _ in kinds]
    # nothing precedes the first token; what is learnt belongs to the response
    told = [j > 0 and response for j, (_, response, _) in enumerate(kinds)]
    learnt = [a and b for a, (_, _, b) in zip(told, kinds, strict=True)]
    value = {
        "input_ids": ids,
        "labels": [i if k else NO_LOSS for i, k in zip(ids, learnt, strict=True)],
        "response_mask": [int(t) for t in told],
    }
    return Row(value, tokens=tuple(zip(ids, told, learnt, strict=True)))


def _spans(prompt: str, answer: str, rest: str) -> Row:
    text = f"{prompt}{answer}</s>{rest}"
    responses = ((len(prompt), len(prompt) + len(answer) + 4),)
    found = {"start": responses[0][0], "end": responses[0][1], "kept": True}
    value = {"text": text, "responses": [list(r) for r in responses], "spans": [found]}
    return Row(value, spans=(text, responses))


HUMAN = {"user": "human", "assistant": "gpt"}
SHAPES: dict[str, st.SearchStrategy[Row]] = {
    "messages": _list_of_turns("messages", "role", "content", {}),
    "ShareGPT": _list_of_turns("conversations", "from", "value", HUMAN),
    "ShareGPT with roles": _list_of_turns("conversations", "role", "content", HUMAN),
    "prompt and completion": _pair("prompt", "completion"),
    "Alpaca": _pair("instruction", "output", "input"),
    "Dolly": _pair("instruction", "response", "context"),
    "Flan": _pair("inputs", "targets"),
    "tokens": st.lists(
        st.tuples(st.integers(0, 255), st.booleans(), st.booleans()), min_size=1, max_size=8
    ).map(_tokens),
    "spans": st.builds(_spans, texts, texts, texts),
}
#: shape -> the column without which a row has not this shape
CENTRAL = {
    "messages": "messages",
    "ShareGPT": "conversations",
    "ShareGPT with roles": "conversations",
    "prompt and completion": "completion",
    "Alpaca": "output",
    "Dolly": "response",
    "Flan": "targets",
    "tokens": "input_ids",
    "spans": "text",
}

#: Values that no central column can have.
WRONG: tuple[Any, ...] = (
    None,
    5,
    True,
    1.5,
    float("nan"),
    {},
    {"a": 1},
    [None],
    [[]],
    [3.5],
    ["x", 2],
    10**30,
)


def _wrong(row: Row, shape: str, value: Any) -> Row:
    return Row({**row.value, CENTRAL[shape]: value})


def _broken(row: Row, how: str, at: float, shape: str) -> Row:
    """A line that is no sample, made from one that is; ``at``: where, in [0, 1)."""
    line = json.dumps(row.value, ensure_ascii=False).encode()
    place = int(at * len(line))
    raw = {
        "cut": line[: max(place, 1)],
        "no UTF-8": line[:place] + b"\xff" + line[place:],
        "half a character": line[:place] + b"\xf0\x9f" + line[place:],
        "NUL": line[:place] + b"\x00" + line[place:],
        "a key twice": line[:-1] + b', "' + CENTRAL[shape].encode() + b'": "x"}',
        "two values": line + b" {}",
        "deep": line[:-1] + b', "more": ' + b"[" * 300 + b"]" * 300 + b"}",
        "very deep": b"[" * 20_000,
        "digits": line[:-1] + b', "more": ' + b"9" * 4400 + b"}",
        "surrogate": line[:-1] + b', "id": "a\\ud800"}',
        "long id": line[:-1] + b', "id": "' + b"a" * 2000 + b'"}',
        "odd id": line[:-1] + b', "id": [1]}',
        "blank": b" \t",
        "a list": b"[1, 2]",
        "null": b"null",
        "text": b'"messages"',
        "infinite": b"1e999",
        "a mark inside": line[:1] + b"\xef\xbb\xbf" + line[1:],
    }[how]
    return Row(None, raw=raw)


BREAKS = (
    *("cut", "no UTF-8", "half a character", "NUL", "a key twice", "two values", "deep"),
    *("very deep", "digits", "surrogate", "long id", "odd id", "blank", "a list", "null", "text"),
    *("infinite", "a mark inside"),
)


def _flipped(row: Row, at: float, bit: int) -> Row:
    """A line with one bit changed: whatever JSON it now is, it is read as that."""
    line = bytearray(json.dumps(row.value).encode())
    line[int(at * len(line))] ^= 1 << bit
    if b"\n" in line:
        return row
    return replace(row, raw=bytes(line), sure=False)


@dataclass(frozen=True)
class File:
    """A case: rows of one shape in one container."""

    container: str
    shape: str
    rows: tuple[Row, ...]
    ending: bytes
    mark: bool


def _files(shape: str, container: str) -> st.SearchStrategy[File]:
    row = SHAPES[shape]
    given = st.fixed_dictionaries({}, optional={"id": names, "source": names})
    named = st.builds(lambda r, more: replace(r, value={**r.value, **more}), row, given)
    place = st.floats(0, 1, exclude_max=True)
    wrong = st.builds(_wrong, row, st.just(shape), st.sampled_from(WRONG))
    kinds = [named, named, wrong]
    if container == "jsonl":
        kinds.append(st.builds(_broken, row, st.sampled_from(BREAKS), place, st.just(shape)))
        kinds.append(st.builds(_flipped, row, place, st.integers(0, 7)))
    elif container == "parquet":
        kinds = [row, row, st.builds(_wrong, row, st.just(shape), st.none())]
    rows = st.lists(st.one_of(kinds), min_size=1, max_size=4).map(tuple)
    ending = st.sampled_from([b"\n", b"\r\n"])
    return st.builds(File, st.just(container), st.just(shape), rows, ending, st.booleans())


files = st.one_of(
    [
        _files(shape, container)
        for shape in SHAPES
        for container in ("jsonl", "jsonl", "jsonl", "json", "parquet")
    ]
)


def write(case: File, folder: Path) -> Path:
    path = folder / f"rows.{case.container}"
    if case.container == "parquet":
        columns = sorted({name for row in case.rows for name in row.value})
        pq.write_table(
            pa.table({n: pa.array([row.value.get(n) for row in case.rows]) for n in columns}), path
        )
        return path
    lines = [
        json.dumps(row.value, ensure_ascii=False).encode() if row.raw is None else row.raw
        for row in case.rows
    ]
    mark = b"\xef\xbb\xbf" if case.mark else b""
    if case.container == "json":
        path.write_bytes(mark + b" [" + (b"," + case.ending).join(lines) + b"]\n")
    else:
        path.write_bytes(mark + case.ending.join(lines) + case.ending)
    return path


@cache
def tokeniser() -> Tokeniser:
    return Tokeniser(byte_level())


def check_file(case: File, tally: Counter[str]) -> None:
    """One item per row, in order: the sample that went in, or a bad line of that number."""
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        path = write(case, Path(folder))
        reader = Reader([str(path)], vocabulary=256)
        found = list(reader)
        assert len(found) == len(case.rows), f"{len(found)} items of {len(case.rows)} rows"
    for line, (row, item) in enumerate(zip(case.rows, found, strict=True), start=1):
        if isinstance(item, BadLine):
            assert not (row.sure and row.good), f"line {line} is good: {item}"
            assert item.line == line and item.file == str(path)
            assert len(item.reason) < 600 and item.content is not None
            item.content.encode("utf-8")
            tally["rejected"] += 1
            continue
        assert row.good, f"line {line} was accepted"
        if row.sure:
            _compare(row, item, line)
        else:
            _compare_flipped(row, item)
        tally["accepted"] += 1


def _compare(row: Row, item: Sample | TokenSample, line: int) -> None:
    wanted = row.value.get("id")
    assert item.id == (f"rows-{line}" if wanted is None else str(wanted))
    assert item.source == str(row.value.get("source") or "rows")
    if isinstance(item, Sample):
        assert tuple((m.role, m.content) for m in item.messages) == row.turns
        (tokens,) = tokeniser()([item])
        _decodes(tokens.input_ids, tokens.response_mask, row.turns or ())
    elif isinstance(item.content, Tokens):
        found = item.content
        marks = zip(
            found.input_ids.tolist(),
            found.response_mask.tolist(),
            (found.labels != NO_LOSS).tolist(),
            strict=True,
        )
        assert tuple(marks) == row.tokens
        learnt = found.labels != NO_LOSS
        assert (found.labels[learnt] == found.input_ids[learnt]).all()
    else:
        assert isinstance(item.content, SpannedText)
        assert (item.content.text, item.content.responses) == row.spans
        made = encode_spans(item.content, tokeniser())
        text = tokeniser().tokenizer.decode(made.input_ids.tolist())
        assert text == f"<s>{item.content.text}"
        start, end = item.content.responses[0]
        response = tokeniser().tokenizer.decode(made.input_ids[made.response_mask].tolist())
        assert item.content.text[start:end] in response


def _decodes(input_ids: np.ndarray, mask: np.ndarray, turns: Turns) -> None:
    wanted = "".join(f"{text.strip()}</s>" for role, text in turns if role == "assistant")
    backend = tokeniser().tokenizer.backend_tokenizer
    found = backend.decode(input_ids[mask].tolist(), skip_special_tokens=False)
    assert found == wanted, f"{found!r} for {wanted!r}"


def _compare_flipped(row: Row, item: Sample | TokenSample) -> None:
    """A changed line that is still a sample says what the line says."""
    assert row.raw is not None
    value = json.loads(row.raw)
    if isinstance(item, TokenSample):
        if isinstance(item.content, Tokens):
            assert item.content.input_ids.tolist() == value["input_ids"]
        else:
            assert item.content.text == value["text"]
        return
    said = set(_strings(value))
    for message in item.messages:
        assert message.content in said or any(
            message.content == f"{a}\n\n{b}" for a in said for b in said
        )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]


def check_pool(case: File, tally: Counter[str]) -> None:
    """Every row ends in the pool, in quarantine, or is counted as one without a response."""
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        folder = Path(name)
        path = write(case, folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # no progress bars
                build_pool(Reader([str(path)]), tokeniser(), folder / "pool", "skip")
        except ValueError as error:
            known = ("no response token", "occur more than once", "either every sample")
            assert any(words in str(error) for words in known), error
            tally["rejected"] += len(case.rows)
            return
        pool = TokenPool(folder / "pool" / "train")
        statistics = pool.manifest["statistics"].values()
        without = sum(s["without_response"] for s in statistics)
        quarantine = folder / "pool" / "quarantine.jsonl"
        lines = quarantine.read_bytes().decode("utf-8").split("\n") if quarantine.exists() else [""]
        bad = [json.loads(line) for line in lines[:-1]]
        assert len(pool) + without + len(bad) == len(case.rows)
        assert {b["line"] for b in bad} <= set(range(1, len(case.rows) + 1))
        sure = [n for n, row in enumerate(case.rows, start=1) if row.sure and not row.good]
        assert set(sure) <= {b["line"] for b in bad}
        tally["accepted"] += len(pool) + without
        tally["rejected"] += len(bad)


Damage = tuple[str, float, int]
_damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([*b'[]{},:"\\ \n0-.eE\x00\x0c\xff\xe2\xf0', 1, 2, 4, 8]),
    ),
    max_size=2,
)


def damaged(raw: bytes, damages: list[Damage]) -> bytes:
    for how, at, byte in damages:
        place = int(at * len(raw))
        if how == "flip" and raw:
            raw = raw[:place] + bytes([raw[place] ^ byte]) + raw[place + 1 :]
        elif how == "cut":
            raw = raw[:place]
        elif how == "insert":
            raw = raw[:place] + bytes([byte]) + raw[place:]
        elif how == "remove":
            raw = raw[:place] + raw[place + 1 :]
    return raw


_numbers = st.integers(-(10**6), 10**20) | st.floats() | st.sampled_from([1, 12, 1e5, -0.0])
_values = st.recursive(
    st.none() | st.booleans() | _numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
arrays = st.tuples(
    st.lists(_values, max_size=4),
    st.sampled_from([None, 1]),
    st.sampled_from([1, 2, 3, 7, 64]),
    _damages,
)


def check_array(case: tuple[list[Any], int | None, int, list[Damage]], tally: Counter[str]) -> None:
    """Arrays read piece by piece hold what they hold when they are read whole."""
    values, indent, chunk, damages = case
    raw = damaged(json.dumps(values, ensure_ascii=False, indent=indent).encode(), damages)
    if not raw.lstrip(b" \t\r\n").startswith(b"["):
        tally["rejected"] += 1
        return
    with mock.patch.object(reading, "_CHUNK", chunk):
        rows = [row for _, row in reading.array_rows(io.BytesIO(raw))]
    try:
        whole = json.loads(raw.decode("utf-8"))
    except ValueError:
        assert isinstance(rows[-1], BadRow), rows
        tally["rejected"] += 1
        return
    assert len(rows) == len(whole)
    for row, value in zip(rows, whole, strict=True):
        if isinstance(row, BadRow):
            assert "occurs twice" in str(row), row
        else:
            assert json.dumps(row) == json.dumps(value)
    tally["accepted"] += 1


@cache
def _parquet() -> bytes:
    """Rows of two row groups in several encodings."""
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        path = Path(folder) / "f.parquet"
        rows = [{"messages": [{"role": "user", "content": f"ask {i}"}] * (i % 3)} for i in range(9)]
        table = pa.table(
            {
                "messages": [row["messages"] for row in rows],
                "id": [str(i) for i in range(9)],
                "rating": [i / 7 for i in range(9)],
            }
        )
        pq.write_table(table, path, row_group_size=5, use_dictionary=["id"])
        return path.read_bytes()


def check_parquet(damages: list[Damage], tally: Counter[str]) -> None:
    """Whatever is in a Parquet file: its rows, bad lines, or one error that names it."""
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        path = Path(folder) / "f.parquet"
        path.write_bytes(damaged(_parquet(), damages))
        try:
            found = list(Reader([str(path)]))
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            tally["rejected"] += 1
            return
    for line, item in enumerate(found, start=1):
        assert not isinstance(item, BadLine) or item.line == line
    tally["accepted"] += 1


STREAMS = {
    "formats": Stream(files, check_file, 25),
    "arrays": Stream(arrays, check_array, 8),
    "Parquet": Stream(_damages, check_parquet, 5),
    "pools": Stream(files, check_pool, 1),
}
