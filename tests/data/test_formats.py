"""Every shape, every container, and a reason with file and line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import conversation, write_jsonl

from tokenclean.data.formats import BadLine, Message, Reader, Sample, TokenSample

HI = (Message("user", "Say hi."), Message("assistant", "Hi!"))

SHAPES: dict[str, tuple[str, dict[str, Any], tuple[Message, ...]]] = {
    "messages": ("messages", conversation("Say hi.", "Hi!"), HI),
    "messages with a system turn": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Say hi."},
                {"role": "assistant", "content": "Hi!"},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": ""},
            ]
        },
        (
            Message("system", "Be kind."),
            *HI,
            Message("user", "Again"),
            Message("assistant", ""),
        ),
    ),
    "prompt and completion": (
        "prompt/completion",
        {"prompt": " Say hi. ", "completion": "Hi!\n"},
        (Message("user", " Say hi. "), Message("assistant", "Hi!\n")),
    ),
    "ShareGPT": (
        "conversations",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Say hi."},
                {"from": "gpt", "value": "Hi!"},
                {"from": "user", "value": "Say hi."},
                {"from": "assistant", "value": "Hi!"},
            ]
        },
        (Message("system", "Be kind."), *HI, *HI),
    ),
    "ShareGPT with the other keys": (
        "conversations",
        {
            "conversations": [
                {"role": "human", "content": "Say hi."},
                {"role": "bing", "content": "Hi!"},
            ]
        },
        HI,
    ),
    "Alpaca": (
        "instruction/output",
        {"instruction": "Translate.", "input": "Salut !", "output": "Hi!"},
        (Message("user", "Translate.\n\nSalut !"), Message("assistant", "Hi!")),
    ),
    "Alpaca without input": (
        "instruction/output",
        {"instruction": "Say hi.", "output": "Hi!"},
        HI,
    ),
    "Alpaca with a blank input": (
        "instruction/output",
        {"instruction": "Say hi.", "input": " \n", "output": "Hi!"},
        HI,
    ),
    "Alpaca with a null input": (
        "instruction/output",
        {"instruction": "Say hi.", "input": None, "output": "Hi!"},
        HI,
    ),
    "Dolly": (
        "instruction/response",
        {"instruction": "Who?", "context": "Ann sings.", "response": "Ann.", "category": "closed"},
        (Message("user", "Who?\n\nAnn sings."), Message("assistant", "Ann.")),
    ),
    "Flan": ("inputs/targets", {"inputs": "Say hi.", "targets": "Hi!"}, HI),
    "a system column": (
        "prompt/completion",
        {"system": "Be kind.", "prompt": "Say hi.", "completion": "Hi!"},
        (Message("system", "Be kind."), *HI),
    ),
    "a null system column": (
        "inputs/targets",
        {"system": None, "inputs": "Say hi.", "targets": "Hi!"},
        HI,
    ),
}


def read(*paths: Path, **options: Any) -> list[Sample | BadLine]:
    found = list(Reader([str(p) for p in paths], **options))
    return [item for item in found if not isinstance(item, TokenSample)]


def samples(*paths: Path, **options: Any) -> list[Sample]:
    found = read(*paths, **options)
    assert all(isinstance(s, Sample) for s in found), found
    return [s for s in found if isinstance(s, Sample)]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    shape, row, messages = SHAPES[name]
    path = write_jsonl(tmp_path / "some.jsonl", [row, row])
    reader = Reader([str(path)])
    assert list(reader) == [
        Sample("some-1", "some", messages),
        Sample("some-2", "some", messages),
    ]
    assert reader.shapes == {str(path): shape}


def test_id_source_and_order_columns(tmp_path: Path) -> None:
    rows = [
        conversation("Say hi.", "Hi!", id="a", source="web", rating=2),
        conversation("Say hi.", "Hi!", id=7, dataset="dolly", rating=-1.5),
        conversation("Say hi.", "Hi!", id=None, source="", key="k", rating=0, origin="x"),
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    found = [(s.id, s.source, s.order) for s in samples(path, order_column="rating")]
    assert found == [("a", "web", 2.0), ("7", "dolly", -1.5), ("f-3", "f", 0.0)]
    other = samples(path, id_column="key", source_column="origin")
    assert [(s.id, s.source, s.order) for s in other] == [
        ("f-1", "f", None),
        ("f-2", "dolly", None),
        ("k", "x", None),
    ]


def test_made_ids_of_files_with_one_name_differ(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_jsonl(tmp_path / folder / "train.jsonl", [conversation("q", "r")] * 2))
    found = samples(*paths)
    assert len({s.id for s in found}) == 4
    assert {s.source for s in found} == {"train"}


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(folder / "rows.jsonl", rows)


def as_crlf(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.ndjson"
    path.write_bytes(b"\r\n".join(json.dumps(row).encode() for row in rows))
    return path


def as_raw_unicode(folder: Path, rows: list[dict[str, Any]]) -> Path:
    # U+2028 stands unescaped inside a string: it ends no line.
    path = folder / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert "\u2028" in text
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def as_array(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.json"
    path.write_text(" \n" + json.dumps(rows, indent=2), encoding="utf-8")
    return path


def as_lines_in_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(folder / "rows.json", rows)


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_datasets(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "rows")
    return folder / "rows"


def as_dataset_dict(folder: Path, rows: list[dict[str, Any]]) -> Path:
    splits = {
        "train": datasets.Dataset.from_list(rows),
        "test": datasets.Dataset.from_list(rows[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "rows")
    return folder / "rows"


def as_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "b.jsonl", rows[1:])
    as_parquet(folder / "rows", rows[:1]).rename(folder / "rows" / "a.parquet")
    (folder / "rows" / "README.md").write_text("not data")
    return folder / "rows"


@pytest.mark.parametrize(
    "write",
    [
        as_jsonl,
        as_crlf,
        as_raw_unicode,
        as_array,
        as_lines_in_json,
        as_parquet,
        as_datasets,
        as_dataset_dict,
        as_folder,
    ],
)
def test_containers(
    write: Callable[[Path, list[dict[str, Any]]], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    texts = [("One?", "1"), ("Two\u2028lines?", "2 é ☃ 𝄞"), ("Three?", "  3\n")]
    rows = [
        conversation(question, answer, id=f"id-{i}", source="s", truth=[[1, 0, 1, -1]])
        for i, (question, answer) in enumerate(texts)
    ]
    path = write(tmp_path, rows)
    Reader([str(path)]).check()
    assert samples(path) == [
        Sample(
            f"id-{i}",
            "s",
            (Message("user", question), Message("assistant", answer)),
            truth=((1, 0, 1, -1),),
        )
        for i, (question, answer) in enumerate(texts)
    ]


def test_made_ids_per_container(tmp_path: Path) -> None:
    rows = [conversation("q", "r"), conversation("q", "r")]
    assert [s.id for s in samples(as_array(tmp_path, rows))] == ["rows-1", "rows-2"]
    assert [s.id for s in samples(as_parquet(tmp_path, rows))] == ["rows-1", "rows-2"]
    folder = as_folder(tmp_path, rows)
    assert [(s.id, s.source) for s in samples(folder)] == [("a-1", "a"), ("b-1", "b")]


def test_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    z = write_jsonl(tmp_path / "z.jsonl", [{"prompt": "q", "completion": "z"}])
    a = write_jsonl(tmp_path / "a.jsonl", [{"inputs": "q", "targets": "a"}])
    reader = Reader([str(z), str(a)])
    assert [item.id for item in reader if isinstance(item, Sample)] == ["z-1", "a-1"]
    assert reader.shapes == {str(z): "prompt/completion", str(a): "inputs/targets"}
    assert reader.files() == [z, a]


def test_the_same_rows_twice_in_a_folder_are_refused(tmp_path: Path) -> None:
    """As JSONL and as Parquet, where each is often a copy of the other."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows: list[dict[str, Any]] = [conversation("q", f"r{i}") for i in range(3)]
    rows[0]["source"] = "s"  # null in the other rows of the table
    write_jsonl(folder / "a.jsonl", rows)
    write_jsonl(folder / "a.more.jsonl", rows[:1])  # another name, between the two
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    words = rf"^data\.path: {folder / 'a.jsonl'} and a\.parquet hold the same rows"
    with pytest.raises(ValueError, match=words):
        Reader([str(folder)]).check()
    with pytest.raises(ValueError, match=words):
        list(Reader([str(folder)]))
    assert len(samples(folder / "a.jsonl", folder / "a.parquet")) == 6  # if that is asked for
    for others in ([*rows[:2], conversation("q", "x")], rows[:2]):
        pq.write_table(pa.Table.from_pylist(others), folder / "a.parquet")
        Reader([str(folder)]).check()
        assert len(samples(folder)) == 3 + 1 + len(others)


def test_an_unknown_split_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = as_dataset_dict(tmp_path, [conversation("q", "r")] * 2)
    assert len(samples(folder, split="test")) == 1
    with pytest.raises(ValueError, match=r"data\.split: .* no split 'dev', only train, test"):
        read(folder, split="dev")


TURN = {"role": "user", "content": "q"}
#: line -> what its reason must say; the first line of the file is good and has `messages`.
BAD_LINES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{'messages': 1}", "not JSON: "),
    "cut off": ('{"messages": [{"role": "us', "not JSON: "),
    "two values": ("{} {}", "not JSON: Extra data"),
    "too deep": ("[" * 200_000, "not JSON: "),
    "a number too long": ('{"id": ' + "1" * 5000 + "}", "not JSON: "),
    "empty": ("", "empty line"),
    "blank": (" \t", "empty line"),
    "a list": ([1, 2], "expected an object, found list"),
    "null": ("null", "expected an object, found NoneType"),
    "no messages": ({"text": "q"}, "no `messages`"),
    "another shape": ({"prompt": "q", "completion": "r"}, "no `messages`"),
    "null messages": ({"messages": None}, "`messages` is null"),
    "text for messages": ({"messages": "hi"}, "`messages` is str, not a list of turns"),
    "no turn": ({"messages": []}, "`messages` is empty"),
    "a turn of text": ({"messages": ["hi"]}, "messages[0] is str, not an object"),
    "unknown role": (
        {"messages": [TURN, {"role": "tool", "content": "r"}]},
        "messages[1]: unknown role 'tool'",
    ),
    "ShareGPT's role": (
        {"messages": [{"role": "human", "content": "q"}]},
        "messages[0]: unknown role 'human'",
    ),
    "no role": ({"messages": [{"content": "q"}]}, "messages[0]: unknown role None"),
    "a list for a role": (
        {"messages": [{"role": ["user"], "content": "q"}]},
        "messages[0]: unknown role ['user']",
    ),
    "null content": (
        {"messages": [TURN, {"role": "assistant", "content": None}]},
        "messages[1]: content is null or missing",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0]: content is null or missing"),
    "a number for content": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0]: content is int, not text",
    ),
    "lone surrogate": (
        {"messages": [{"role": "user", "content": "ab\ud83dc"}]},
        "messages[0] is not valid Unicode at character 2",
    ),
    "lone surrogate in the id": (
        {**conversation("q", "r"), "id": "\udc00"},
        "the id is not valid Unicode at character 0",
    ),
    "lone surrogate in the source": (
        {**conversation("q", "r"), "source": "s\udc00"},
        "the source is not valid Unicode at character 1",
    ),
    "truth of text": ({**conversation("q", "r"), "truth": "all"}, "`truth` is str, not a list"),
    "truth without label": (
        {**conversation("q", "r"), "truth": [[1, 0, 1]]},
        "`truth` span [1, 0, 1] is not [message, start, end, label]",
    ),
    "truth past the text": (
        {**conversation("q", "r"), "truth": [[1, 0, 2, 0]]},
        "`truth` span [1, 0, 2, 0] lies outside its message",
    ),
    "truth of no message": (
        {**conversation("q", "r"), "truth": [[2, 0, 1, 0]]},
        "`truth` span [2, 0, 1, 0] lies outside its message",
    ),
    "unknown truth": (
        {**conversation("q", "r"), "truth": [[1, 0, 1, 1]]},
        "has an unknown label",
    ),
}


def test_every_bad_line_is_reported_with_file_line_and_reason(tmp_path: Path) -> None:
    good = conversation("q", "r")
    path = write_jsonl(
        tmp_path / "bad.jsonl", [good, *(line for line, _ in BAD_LINES.values()), good]
    )
    first, *bad, last = read(path)
    assert isinstance(first, Sample)
    assert isinstance(last, Sample)
    assert last.id == f"bad-{len(BAD_LINES) + 2}"
    assert len(bad) == len(BAD_LINES)
    for line, (item, (name, (_, reason))) in enumerate(
        zip(bad, BAD_LINES.items(), strict=True), start=2
    ):
        assert isinstance(item, BadLine), name
        assert str(item).startswith(f"{path}:{line}: "), name
        assert reason in item.reason, name


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a\xff"}\n')
    assert [str(b) for b in read(path)] == [f"{path}:1: not UTF-8 at byte 13"]
    array = tmp_path / "bad.json"
    array.write_bytes(b'[{"prompt": "a\xff"}]\n')
    assert [str(b) for b in read(array)] == [
        f"{array}:1: not UTF-8 at byte 14; what follows is not read"
    ]


def test_an_array_that_breaks_off_says_where(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('[\n{"prompt": "q", "completion": "r"},\n{"prompt":\n', encoding="utf-8")
    good, bad = read(path)
    assert isinstance(good, Sample)
    assert isinstance(bad, BadLine)
    assert "not JSON from line 4 on" in bad.reason
    assert bad.line == 2
    path.write_text("[" * 200_000, encoding="utf-8")
    (bad,) = read(path)
    assert isinstance(bad, BadLine)
    assert "not JSON" in bad.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "completion": "r"}, "`prompt` is null"),
        ({"prompt": ["q"], "completion": "r"}, "`prompt` is list, not text"),
        ({"prompt": "q", "completion": 3.5}, "`completion` is float, not text"),
        ({"instruction": "q", "input": 3, "output": "r"}, "`input` is int, not text"),
        ({"instruction": "q", "context": {}, "response": "r"}, "`context` is dict, not text"),
        ({"prompt": "q", "completion": "r", "system": 1}, "`system` is int, not text"),
        ({"prompt": "q\udfff", "completion": "r"}, "`prompt` is not valid Unicode at character 1"),
        ({"conversations": [{"from": "tool", "value": "r"}]}, "unknown role 'tool'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "content is null or missing"),
        ({"text": "q"}, "columns ['text'] match no known shape (messages; conversations; "),
    ],
)
def test_bad_rows_of_the_other_shapes(row: Any, reason: str, tmp_path: Path) -> None:
    (bad,) = read(write_jsonl(tmp_path / "bad.jsonl", [row]))
    assert isinstance(bad, BadLine)
    assert bad.line == 1
    assert reason in bad.reason


def test_bad_rows_of_parquet_and_folders_are_counted_in_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "completion": "r"},
        {"prompt": "q", "completion": None},
    ]
    for path in (as_parquet(tmp_path, rows), as_datasets(tmp_path, rows)):
        _, bad = read(path)
        assert str(bad) == f"{path}:2: `completion` is null"


@pytest.mark.parametrize("value", [None, "5", True, float("nan"), [1]])
def test_an_ordering_value_must_be_a_number(value: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r", rating=value)])
    (bad,) = read(path, order_column="rating")
    assert isinstance(bad, BadLine)
    assert bad.reason == f"ordering column `rating` is {value!r}, not a number"
    assert isinstance(read(path)[0], Sample)


def test_paths_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    refused = {
        str(tmp_path / "notes.txt"): "unknown suffix",
        str(tmp_path / "empty"): "neither a folder saved by `datasets` nor a folder",
        str(tmp_path / "missing"): "does not exist",
        "missing.jsonl": "does not exist",
        "./missing": "does not exist",
    }
    for path, reason in refused.items():
        with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
            Reader([path]).check()
        assert path in str(caught.value)
        assert reason in str(caught.value)
    Reader(["owner/name"]).check()  # a hub name: nothing to look at yet
