"""Reading samples: files, folders and hub names in any of the usual chat shapes, or as tokens.

Every source of rows ends as a stream of `Sample` or `TokenSample`; every row that cannot be one is
a `BadLine` with its file, line and reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tokenclean.data.exports import (
    export_of,
    exported_files,
    is_token_array,
    token_array_parts,
)
from tokenclean.data.files import COMPRESSED, SUFFIXES, as_text, batch_rows, file_rows
from tokenclean.data.pretokenised import TARGETS, BadRow, Tokens, are_tokens, read_tokens, shown
from tokenclean.data.spans import COLUMNS as SPAN_COLUMNS
from tokenclean.data.spans import SpannedText, read_spans

Role = Literal["system", "user", "assistant"]
#: Longest id and source, in characters: both are shown in tables and messages.
NAME_LENGTH = 1024

#: Shapes that are no conversations.
TOKENS, SPANS = "tokens", "text/spans"
#: Columns that identify a shape, in order of precedence: (shape, required columns).
SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),  # ShareGPT, WizardLM's 143k release
    ("prompt/completion", ("prompt", "completion")),
    ("instruction/output", ("instruction", "output")),  # Alpaca, WizardLM's 70k release
    ("instruction/response", ("instruction", "response")),  # Dolly, with `context`
    ("inputs/targets", ("inputs", "targets")),  # Flan v2, P3
)

_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: given by the data, else made from file name and line.
        source: name of the collection it comes from.
        messages: its turns, at least one.
        truth: planted pools only: (message index, start, end, label) spans of characters in the
            raw content; label 0 uninformative, -1 corrupted. None: no truth is known.
        order: the value of the ordering column, if one was asked for.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    truth: tuple[tuple[int, int, int, int], ...] | None = None
    order: float | None = None


@dataclass(frozen=True)
class TokenSample:
    """One sample that came as tokens, or as a text with spans.

    Attributes:
        id, source, order: as in `Sample`.
        content: its tokens, or the text that they are made from.
    """

    id: str
    source: str
    content: Tokens | SpannedText
    order: float | None = None


@dataclass(frozen=True)
class BadLine:
    """A row that is not a sample.

    Attributes:
        file: path or hub name.
        line: counted from 1 (rows, in Parquet and folders).
        reason: what is wrong with it.
        content: the row itself, as text, so that nothing is lost in quarantine.
    """

    file: str
    line: int
    reason: str
    content: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class Reader:
    """Stream of samples from one or more paths or hub names.

    Args:
        paths: files (JSONL, JSON, Parquet), `datasets` folders, folders of such files, hub names.
        split: split of a hub data set or a `datasets` folder of several splits.
        order_column: numeric column kept for ordering the splits.
        id_column: column with the sample's id.
        source_column: column with the sample's source; ``dataset`` is understood too.
        vocabulary: the ids of rows that come as tokens lie below it; None: that is not checked.
        refuse: says why a sample is not wanted, or None; such rows are bad lines.
    """

    paths: list[str]
    split: str = "train"
    order_column: str | None = None
    id_column: str = "id"
    source_column: str = "source"
    vocabulary: int | None = None
    refuse: Callable[[Sample | TokenSample], str | None] | None = None

    def __post_init__(self) -> None:
        #: file -> shape found in it, in the order read
        self.shapes: dict[str, str] = {}
        #: file -> description of the export that it belongs to
        self._cards: dict[str, dict[str, Any] | None] = {}

    def files(self) -> list[Path]:
        """Local files behind the paths, for content fingerprints; empty for hub names."""
        found: list[Path] = []
        for name in map(Path, self.paths):
            # Of an export only what is read: its card may say more tomorrow.
            for path in exported_files(name) or [name]:
                if path.is_dir():
                    found += sorted(p for p in path.rglob("*") if p.is_file())
                elif path.is_file():
                    found.append(path)
                    if is_token_array(path):
                        found += filter(Path.is_file, token_array_parts(path))
        return found

    def check(self) -> None:
        """Refuse paths that cannot be read, before anything expensive.

        Raises:
            ValueError: naming the path.
        """
        check_names(self.paths)
        for name in self.paths:
            _check_path(name)

    def __iter__(self) -> Iterator[Sample | TokenSample | BadLine]:
        stems: dict[str, int] = {}
        for name in self.paths:
            for file, rows in _row_streams(name, self.split):
                stem = Path(file).stem
                stems[stem] = stems.get(stem, 0) + 1
                # Files of one name in two folders must not make the same ids.
                prefix = stem if stems[stem] == 1 else f"{stem}({stems[stem]})"
                for line, row in rows:
                    try:
                        sample = self._sample(row, file, stem, f"{prefix}-{line}")
                        if self.refuse is not None and (reason := self.refuse(sample)):
                            raise BadRow(reason)
                        yield sample
                    except BadRow as bad:
                        content = row.content if isinstance(row, BadRow) else as_text(row)
                        yield BadLine(file, line, str(bad), content or "")

    def _sample(self, row: Any, file: str, stem: str, made_id: str) -> Sample | TokenSample:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, Mapping):
            raise BadRow(f"expected an object, found {type(row).__name__}")
        shape = self.shapes.get(file) or _detect(row, self._card(file) is not None)
        content: Tokens | SpannedText | None = None
        messages: tuple[Message, ...] = ()
        if shape == TOKENS:
            content = read_tokens(row, self.vocabulary)
        elif shape == SPANS:
            content = read_spans(row, self._card(file))
        else:
            messages = _messages(row, shape)
        self.shapes[file] = shape
        given = row.get(self.id_column)
        name = made_id if given is None else _name(given, "the id")
        given = row.get(self.source_column) or row.get("dataset")
        source = _name(given, "the source") if given else stem
        if content is not None:
            return TokenSample(name, source, content, self._order(row))
        truth = _truth(row.get("truth"), messages)
        return Sample(name, source, messages, truth, self._order(row))

    def _card(self, file: str) -> dict[str, Any] | None:
        """Description of the export that a file belongs to, if it does."""
        if file not in self._cards:
            found = export_of(Path(file))
            self._cards[file] = found[1] if found else None
        return self._cards[file]

    def _order(self, row: Mapping[str, Any]) -> float | None:
        if self.order_column is None:
            return None
        value = row.get(self.order_column)
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                number = float(value)
                if math.isfinite(number):
                    return number
        except OverflowError:
            pass
        raise BadRow(f"ordering column `{self.order_column}` is {shown(value)}, not a number")


def check_names(paths: Iterable[str]) -> None:
    """Refuse what no file can be called.

    Raises:
        ValueError: naming the path.
    """
    for name in paths:
        try:
            name.encode("utf-8")  # ids are made from it
            Path(name).is_file()
        except (OSError, UnicodeEncodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its name is no Unicode"
            raise ValueError(f"data.path: {shown(name)} cannot be read: {reason}") from error


def _check_path(name: str) -> None:
    path = Path(name)
    if exported_files(path) is not None:
        return
    known = path.suffix in SUFFIXES or is_token_array(path)
    if path.is_file():
        if path.suffix in COMPRESSED:
            raise ValueError(f"data.path: {name} is compressed; unpack it first")
        if not known:
            raise ValueError(
                f"data.path: {name} has an unknown suffix; use one of {', '.join(SUFFIXES)}"
            )
    elif path.is_dir():
        if not is_datasets_folder(path) and not _data_files(path):
            raise ValueError(
                f"data.path: {name} is neither a folder saved by `datasets` nor a folder "
                f"of {', '.join(SUFFIXES)} files"
            )
    elif path.exists():
        raise ValueError(f"data.path: {name} is a pipe or a device; write what it gives to a file")
    elif path.is_symlink():
        raise ValueError(f"data.path: {name} is a link that leads nowhere")
    elif known or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"data.path: {name} does not exist")


def is_datasets_folder(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _data_files(path: Path) -> list[Path]:
    """Files of samples of a folder.

    Raises:
        ValueError: if two of them hold the same samples, or one cannot be read.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    for file in files:
        if not file.is_file():
            raise ValueError(f"data.path: {file} is no file; move it elsewhere, or name the others")
    for file in sorted(path.iterdir()):
        if file.suffix in COMPRESSED and Path(file.stem).suffix in SUFFIXES:
            raise ValueError(f"data.path: {file} is compressed; unpack it first")
    for one, other in pairwise(sorted(files, key=lambda p: (p.stem, p.suffix))):
        if one.stem == other.stem and _same_rows(one, other):
            raise ValueError(
                f"data.path: {one} and {other.name} hold the same rows, which would count twice; "
                "name one of the two files instead of their folder"
            )
    return files


def _same_rows(one: Path, other: Path) -> bool:
    """Whether two files hold the same rows; looks no further than the first that differ."""
    pairs = zip_longest(file_rows(one), file_rows(other))
    return all(a and b and _bare(a[1]) == _bare(b[1]) for a, b in pairs)


def _bare(value: Any) -> Any:
    """Without what is null: a table has every column in every row."""
    if isinstance(value, Mapping):
        return {k: _bare(v) for k, v in value.items() if v is not None}
    return [_bare(v) for v in value] if isinstance(value, list) else value


def _row_streams(name: str, split: str) -> Iterator[tuple[str, Iterable[tuple[int, Any]]]]:
    path = Path(name)
    if path.is_file():
        yield str(path), file_rows(path)
    elif path.is_dir() and not is_datasets_folder(path):
        for file in exported_files(path) or _data_files(path):
            yield str(file), file_rows(file) if file.is_file() else _datasets_rows(str(file), split)
    else:
        yield name, _datasets_rows(name, split)


def _datasets_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # of whatever kind: the bytes are foreign
            raise ValueError(
                f"data.path: {name} is not a folder that `datasets` can read: {shown(str(error))}"
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(
                    f"data.split: {name} has no split {split!r}, only {', '.join(loaded)}"
                )
            loaded = loaded[split]
    else:
        try:
            loaded = datasets.load_dataset(name, split=split)
        except Exception as error:
            raise ValueError(
                f"data.path: {name} is no local path and could not be loaded from the hub: {error}"
            ) from error
    line = 0
    for found in loaded.with_format("arrow").iter(1024):
        for batch in pa.table(found).to_batches():
            try:
                batch.validate(full=True)  # the file is mapped into memory and may say anything
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"data.path: {name} is damaged after row {line}: {shown(str(error))}"
                ) from error
            for row in batch_rows(batch):
                line += 1
                yield line, row


def _detect(row: Mapping[str, Any], exported: bool) -> str:
    """Shape of a file's first row; ``exported``: the file is an export's, and no conversation."""
    given = [name for name, value in row.items() if value is not None]
    if exported or not any(set(columns) <= set(given) for _, columns in SHAPES):
        if are_tokens(row):
            return TOKENS
        if set(SPAN_COLUMNS) <= set(given):
            return SPANS
    # Of what is null it is said in which column.
    for shape, columns in (*SHAPES, (SPANS, SPAN_COLUMNS)):
        if all(column in row for column in columns):
            return shape
    if are_tokens(row, known=False):
        return TOKENS
    known = "; ".join("+".join(columns) for _, columns in SHAPES)
    known += f"; input_ids+{'|'.join(TARGETS)}; {'+'.join(SPAN_COLUMNS)}"
    raise BadRow(f"columns {shown(sorted(row))} match no known shape ({known})")


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(f"no `{column}`")
    value = row[column]
    if value is None:
        raise BadRow(f"`{column}` is null")
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {type(value).__name__}, not text")
    return _encodable(value, f"`{column}`")


def _name(value: Any, what: str) -> str:
    """An id or a source."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise BadRow(f"{what} is {shown(value)}, neither text nor a number")
    text = str(value)
    if len(text) > NAME_LENGTH:
        raise BadRow(f"{what} has {len(text):,} characters, more than {NAME_LENGTH:,}")
    return _encodable(text, what)


def _encodable(text: str, where: str) -> str:
    """JSON may spell half of a surrogate pair, which no tokenizer and no file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} is not valid Unicode at character {error.start}") from None
    return text


def _messages(row: Mapping[str, Any], shape: str) -> tuple[Message, ...]:
    if shape in ("messages", "conversations"):
        return _turns(row, shape)
    if shape in ("prompt/completion", "inputs/targets"):
        prompt, completion = shape.split("/")
        turns = [Message("user", _text(row, prompt)), Message("assistant", _text(row, completion))]
    else:
        instruction, output = shape.split("/")
        context = "context" if output == "response" else "input"
        extra = _text(row, context) if row.get(context) is not None else ""
        question = _text(row, instruction) + (f"\n\n{extra}" if extra.strip() else "")
        turns = [Message("user", question), Message("assistant", _text(row, output))]
    if row.get("system") is not None:
        turns.insert(0, Message("system", _text(row, "system")))
    return tuple(turns)


def _turns(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    turns = row.get(column)
    if turns is None:
        raise BadRow(f"`{column}` is null" if column in row else f"no `{column}`")
    if not isinstance(turns, list):
        raise BadRow(f"`{column}` is {type(turns).__name__}, not a list of turns")
    if not turns:
        raise BadRow(f"`{column}` is empty")
    keys = ("role", "content") if column == "messages" else ("from", "value")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{column}[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where} is {type(turn).__name__}, not an object")
        # Some ShareGPT exports keep `role` and `content` inside `conversations`.
        role_key, text_key = ("role", "content") if "role" in turn else keys
        role, content = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or (mapped := _role(role, column)) is None:
            raise BadRow(f"{where}: unknown role {shown(role)}")
        if content is None:
            raise BadRow(f"{where}: content is null or missing")
        if not isinstance(content, str):
            raise BadRow(f"{where}: content is {type(content).__name__}, not text")
        messages.append(Message(mapped, _encodable(content, where)))
    return tuple(messages)


def _role(role: str, column: str) -> Role | None:
    if column == "messages":
        return role if role in ("system", "user", "assistant") else None  # type: ignore[return-value]
    return _SHAREGPT_ROLES.get(role)


def _truth(
    spans: Any, messages: tuple[Message, ...]
) -> tuple[tuple[int, int, int, int], ...] | None:
    if spans is None:
        return None
    if not isinstance(spans, list):
        raise BadRow(f"`truth` is {type(spans).__name__}, not a list of spans")
    for span in spans:
        if not (isinstance(span, list) and len(span) == 4 and all(type(x) is int for x in span)):
            raise BadRow(f"`truth` span {shown(span)} is not [message, start, end, label]")
        message, start, end, label = span
        if (
            not 0 <= message < len(messages)
            or not 0 <= start <= end <= len(messages[message].content)
            or label not in (0, -1)
        ):
            raise BadRow(
                f"`truth` span {shown(span)} lies outside its message or has an unknown label"
            )
    return tuple((m, s, e, label) for m, s, e, label in spans)
