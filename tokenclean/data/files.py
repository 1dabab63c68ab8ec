"""Rows of one file, whatever is in it: bounded memory, and a line and a reason for what is no row.

Nothing is believed that a file says about itself: a line, an element of an array or a row of a
table may have `ROW_BYTES`, values may be nested `DEPTH` deep, a key may occur once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean.data.exports import is_token_array, token_array_rows
from tokenclean.data.pretokenised import BadRow, shown

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
#: Endings that compressed files have; none is read.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")
#: The longest row that is read, in bytes; a million tokens of text have about 4 MB.
ROW_BYTES = 16 << 20
#: How deep the values of a row may be nested; conversations take 3.
DEPTH = 64
#: What quarantine keeps of a row that was too long to be read.
HEAD = 1000
_CHUNK = 1 << 16
#: Rows of a Parquet file at a time: a small file may unpack to rows of any size.
_BATCH_ROWS = 32


def file_rows(path: Path, option: str = "data.path") -> Iterator[tuple[int, Any]]:
    """Rows of a file with their lines, counted from 1; what cannot be parsed is a `BadRow`.

    Args:
        path: with one of `SUFFIXES`, or an exported array of tokens.
        option: that names the file, for errors.

    Raises:
        ValueError: if a Parquet file cannot be read.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, option)
    elif is_token_array(path):
        yield from token_array_rows(path)
    else:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            is_array = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")[:1] == b"["
            yield from (
                array_rows(file) if path.suffix == ".json" and is_array else line_rows(file)
            )


class JsonReader:
    """Values of JSON, each key once and no deeper than `DEPTH`."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._doubled: str | None = None

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at a character, and where it ends.

        Returns:
            A `BadRow` in the place of a value that is JSON and yet none to believe.

        Raises:
            ValueError, RecursionError: if it is no JSON.
        """
        self._doubled = None
        value, end = self._decoder.raw_decode(text, start)
        if self._doubled is not None:
            value = BadRow(f"the key {shown(self._doubled)} occurs twice", text[start:end])
        elif text.count("[", start, end) + text.count("{", start, end) > DEPTH and is_deep(value):
            value = BadRow(f"nested more than {DEPTH} deep", text[start:end])
        return value, end

    def row(self, text: str) -> Any:
        """The only value of a text, or a `BadRow`."""
        try:
            value, end = self.value(text, len(text) - len(text.lstrip(" \t\r\n")))
        except (ValueError, RecursionError) as error:
            return BadRow(f"not JSON: {_said(error)}", text)
        if rest := text[end:].strip(" \t\r\n"):
            return BadRow(f"not JSON: Extra data at character {end}: {shown(rest)}", text)
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs) and self._doubled is None:
            names: set[str] = set()
            self._doubled = next(n for n, _ in pairs if n in names or names.add(n))  # type: ignore[func-returns-value]
        return found


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `DEPTH` deep."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return False
    return True


def as_text(row: Any) -> str:
    """A row as JSON, for quarantine."""
    try:
        return json.dumps(row, default=str)
    except (TypeError, ValueError, RecursionError):
        return shown(row)


def line_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Rows of JSON lines."""
    reader = JsonReader()
    line = 0
    # Split on b"\n" alone: str.splitlines would also break inside strings, at U+2028 for one.
    while raw := stream.readline(ROW_BYTES + 1):
        line += 1
        if len(raw) > ROW_BYTES:
            head, size = raw[:HEAD], len(raw)
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(1 << 20)
                size += len(raw)
            row: Any = _too_long(f"the line has {size:,} bytes", head)
        elif not raw.strip():
            row = BadRow("empty line")
        else:
            try:
                row = reader.row(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                row = BadRow(f"not UTF-8 at byte {error.start}", _replaced(raw))
            if isinstance(row, BadRow) and row.content is not None:
                row.content = row.content.rstrip("\r\n")
        yield line, row


def array_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array, read element by element.

    What is no JSON has no end that could be found: it is the last row.
    """
    text, line = _Text(stream), 0
    assert text.next() == "["
    text.at += 1
    if text.next() == "]":
        text.at += 1
    else:
        while True:
            line += 1
            try:
                row = text.value()
            except BadRow as bad:
                yield line, bad
                return
            yield line, row
            if (mark := text.next()) == ",":
                text.at += 1
            elif mark == "]":
                text.at += 1
                break
            else:
                yield line + 1, text.broken("Expecting ',' or ']'")
                return
    if text.next():
        yield line + 1, text.broken("Extra data")


class _Text:
    """A stream's text from a place on, decoded piece by piece."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._json = stream, JsonReader()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = stream.tell()
        self._line = 1
        self._ended = False
        self._undecoded: BadRow | None = None
        self.text, self.at = "", 0

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self._ended:
                return ""
            self._more()

    def value(self) -> Any:
        """The value that begins at the next character.

        Raises:
            BadRow: if it is no JSON, or too long.
        """
        self.next()
        while True:
            room = len(self.text) - self.at
            try:
                value, end = self._json.value(self.text, self.at)
            except RecursionError:
                raise self.broken("nested too deep") from None
            except ValueError as error:
                if self._ended:
                    raise self.broken(_said(error), getattr(error, "pos", self.at)) from None
                if room > ROW_BYTES:
                    head = self.text[self.at : self.at + HEAD].encode()
                    raise _too_long("from here on something is no JSON, or it", head) from None
            else:
                # A number at the end of what is read may go on.
                ahead = self.text[end : end + 32]
                if self._ended or len(ahead) == 32 or ahead.strip("0123456789.eE+-"):
                    self.at = end
                    return value
            self._more()

    def broken(self, reason: str, at: int | None = None) -> BadRow:
        """What is said of a text that is no JSON at a character, by default the next one."""
        if self._undecoded is not None:
            return self._undecoded
        line = self._line + self.text.count("\n", 0, self.at if at is None else at)
        return BadRow(
            f"not JSON from line {line} on: {reason}; what follows is not read",
            self.text[self.at : self.at + HEAD],
        )

    def _more(self) -> None:
        # As much as is waiting, so that a long value is tried a few times and no more.
        raw = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        waiting = self._decoder.getstate()[0]
        try:
            piece = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            piece = (waiting + raw)[: error.start].decode("utf-8")
            at = self._bytes - len(waiting) + error.start
            self._undecoded = BadRow(
                f"not UTF-8 at byte {at}; what follows is not read",
                _replaced((waiting + raw)[error.start :][:HEAD]),
            )
        self._bytes += len(raw)
        self._line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + piece, 0
        self._ended = not raw or self._undecoded is not None


def _said(error: Exception) -> str:
    """What a parser says, without the advice that is for programmers."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "a number of too many digits" if isinstance(error, ValueError) else "nested too deep"


def _replaced(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _too_long(what: str, head: bytes) -> BadRow:
    return BadRow(
        f"{what}, more than the {ROW_BYTES:,} bytes that a row may have; split it or leave it out",
        _replaced(head) + "...",
    )


def _parquet_rows(path: Path, option: str) -> Iterator[tuple[int, Any]]:
    line = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            stated = file.metadata
            if len(set(names := file.schema_arrow.names)) != len(names):
                raise ValueError("two of its columns have one name")
            groups = map(stated.row_group, range(stated.num_row_groups))
            size = sum(max(group.total_byte_size, 0) for group in groups)
            mean = size // max(stated.num_rows, 1) + 1
            rows = max(1, min(_BATCH_ROWS, ROW_BYTES // mean))
            for batch in file.iter_batches(batch_size=rows):
                for row in batch_rows(batch):
                    line += 1
                    yield line, row
            if line != stated.num_rows:
                raise ValueError(f"it states {stated.num_rows:,} rows and holds {line:,}")
    except Exception as error:  # of whatever kind: the bytes are foreign
        raise ValueError(
            f"{option}: {path} is not a readable Parquet file: {_cut(error)}"
        ) from error


def batch_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """Rows of a table; one that Python cannot hold, or that is too long, is a `BadRow`."""
    if batch.nbytes <= ROW_BYTES:
        try:
            rows = batch.to_pylist()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, ImportError):
            pass
        else:
            yield from rows
            return
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        if row.nbytes > ROW_BYTES:
            yield _too_long(f"the row has {row.nbytes:,} bytes", b"")
            continue
        try:
            yield row.to_pylist()[0]
        except UnicodeDecodeError:
            yield BadRow("not UTF-8")
        except Exception as error:
            yield BadRow(f"a value of it cannot be read: {_cut(error)}")


def _cut(error: BaseException) -> str:
    """An error of a library in one line of moderate length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
