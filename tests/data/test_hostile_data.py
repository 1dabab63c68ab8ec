"""Files made to hang, to fill the memory, or to slip something in: a clear error, nothing else."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import byte_level_tokenizer, conversation, write_jsonl

from tokenclean import cli
from tokenclean.data import exports, files, pool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.files import array_rows, line_rows
from tokenclean.data.formats import BadLine, Message, Reader, Sample, TokenSample
from tokenclean.data.pool import BadData, TokenPool, build_pool, statistics_table
from tokenclean.data.pretokenised import BadRow, shown
from tokenclean.data.spans import encode_spans, read_spans
from tokenclean.data.template import Tokeniser
from tokenclean.scoring.logprobs import check_file, read_ids

GOOD = conversation("q", "r")


def read(path: Path, **options: Any) -> list[Sample | TokenSample | BadLine]:
    return list(Reader([str(path)], **options))


def reasons(path: Path, **options: Any) -> list[str]:
    """The reason of every bad line; samples are left out."""
    return [item.reason for item in read(path, **options) if isinstance(item, BadLine)]


def built(path: Path, folder: Path, **options: Any) -> TokenPool:
    build_pool(Reader([str(path)]), Tokeniser(byte_level_tokenizer()), folder, **options)
    return TokenPool(folder / "train")


# -- lines ----------------------------------------------------------------------------------------


def test_a_row_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROW_BYTES", 500)
    monkeypatch.setattr(files, "_CHUNK", 64)
    long = json.dumps(conversation("q", "r" * 3000))
    lines = write_jsonl(tmp_path / "a.jsonl", [GOOD, long, GOOD])
    array = tmp_path / "b.json"
    array.write_text(f"[{json.dumps(GOOD)}, {long}, {json.dumps(GOOD)}]")
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"prompt": ["q"] * 2, "completion": ["r", "r" * 3000]}), table)
    good, bad, last = read(lines)
    assert isinstance(good, Sample) and isinstance(last, Sample) and last.id == "a-3"
    assert isinstance(bad, BadLine) and bad.line == 2
    assert bad.reason == (
        f"the line has {len(long) + 1:,} bytes, more than the 500 bytes that a row may have; "
        "split it or leave it out"
    )
    assert bad.content == long[:501] + "..."
    for path in (array, table):
        first, bad = read(path)[:2]
        assert isinstance(first, Sample) and isinstance(bad, BadLine)
        assert bad.line == 2 and "more than the 500 bytes that a row may have" in bad.reason


@pytest.mark.parametrize("rows_of", [line_rows, array_rows])
def test_memory_is_flat(rows_of: Callable[[Any], Any], tmp_path: Path) -> None:
    row = json.dumps(conversation("q", "r" * 400))
    path = tmp_path / "f"
    many = (",\n" if rows_of is array_rows else "\n").join([row] * 10_000)
    path.write_text(f"[{many}]" if rows_of is array_rows else many + "\n")
    assert path.stat().st_size > 4_000_000
    with path.open("rb") as stream:
        tracemalloc.start()
        assert sum(isinstance(found, dict) for _, found in rows_of(stream)) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000


#: line -> what its reason begins with
LINES: dict[str, tuple[bytes, str]] = {
    "no UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    "UTF-16": ('{"prompt": "q"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "NUL": (b'{"prompt": "a\x00b"}', "not JSON: Invalid control character at at character 13"),
    "nothing but NUL": (b"\x00" * 1000, "not JSON: Expecting value at character 0"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "r"}', "`prompt` is not valid Unicode"),
    "deep": (b'{"more": ' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 deep"),
    "very deep": (b'{"more": ' + b"[" * 100_000, "not JSON: nested too deep"),
    "deep objects": (b'{"a":' * 100_000, "not JSON: nested too deep"),
    "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON: a number of too many digits"),
    "a number for text": (b'{"prompt": 1e999, "completion": "r"}', "`prompt` is float, not text"),
    "twice": (b'{"prompt": "q", "prompt": "p", "completion": "r"}', "the key 'prompt' occurs"),
    "twice, inside": (
        b'{"prompt": "q", "completion": "r", "more": [{"a": 1, "a": 1}]}',
        "the key 'a' occurs twice",
    ),
    "a mark inside": (b'{"prompt": "q",\xef\xbb\xbf "completion": "r"}', "not JSON: "),
    "id of a list": (b'{"prompt": "q", "completion": "r", "id": ["a"]}', "the id is ['a'], nei"),
    "id of truth": (b'{"prompt": "q", "completion": "r", "id": true}', "the id is True, neither"),
    "id of NaN": (b'{"prompt": "q", "completion": "r", "id": NaN}', "the id is nan, neither"),
    "id of a megabyte": (
        b'{"prompt": "q", "completion": "r", "id": "' + b"i" * 1_000_000 + b'"}',
        "the id has 1,000,000 characters, more than 1,024",
    ),
    "source of a megabyte": (
        b'{"prompt": "q", "completion": "r", "source": "' + b"i" * 1_000_000 + b'"}',
        "the source has 1,000,000 characters",
    ),
    "role of a megabyte": (
        b'{"messages": [{"role": "' + b"u" * 1_000_000 + b'", "content": "q"}]}',
        "no `prompt`",
    ),
}


def test_every_line_has_its_reason_and_ends_in_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    row = b'\xef\xbb\xbf{"prompt": "q", "completion": "r"}\r\n'
    path.write_bytes(row + b"\n".join(line for line, _ in LINES.values()) + b"\n" + row[3:])
    first, *bad, last = read(path)
    assert isinstance(first, Sample) and isinstance(last, Sample)
    assert last.messages[1].content == "r"
    for number, (item, (name, (_, reason))) in enumerate(zip(bad, LINES.items(), strict=True), 2):
        assert isinstance(item, BadLine), name
        assert item.line == number, name
        assert item.reason.startswith(reason), f"{name}: {item.reason}"
        assert len(item.reason) < 300, name
    with pytest.raises(BadData) as stop:
        built(path, tmp_path / "stopped")
    assert len(str(stop.value)) < 6000 and f"{path}:2: not UTF-8 at byte 12" in str(stop.value)
    assert len(built(path, tmp_path / "pool", on_bad_line="skip")) == 2
    lines = (tmp_path / "pool" / "quarantine.jsonl").read_bytes().decode("utf-8").split("\n")
    kept = [json.loads(line) for line in lines[:-1]]
    assert [k["line"] for k in kept] == list(range(2, len(LINES) + 2))
    for found in kept:
        found["content"].encode("utf-8")
    assert kept[2]["content"] == '{"prompt": "a\x00b"}'  # whatever is text is kept to the letter


def test_an_array_says_where_it_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what came before it was read; what is no row though it is JSON breaks nothing."""
    monkeypatch.setattr(files, "_CHUNK", 7)  # every edge lies somewhere inside
    path = tmp_path / "f.json"
    row = json.dumps(GOOD)
    deep = "[" * 70 + "]" * 70
    for text, found in (
        (f"\ufeff [{row},\n12345,{row}]\r\n ", ["", "expected an object, found int", ""]),
        (f"[{row}, {deep}, {row}]", ["", "nested more than 64 deep", ""]),
        ("[]", []),
        (f"[{row},\n{row}\n{row}]", ["", "", "not JSON from line 3 on: Expecting ',' or ']'"]),
        (f"[{row}] x", ["", "not JSON from line 1 on: Extra data"]),
        (f"[{row},\n\n", ["", "not JSON from line 3 on: Expecting value"]),
        (f"[{row},]", ["", "not JSON from line 1 on: Expecting value"]),
        (f"[{row}", ["", "not JSON from line 1 on: Expecting ',' or ']'"]),
        (f"[{row}, {'[' * 100_000}", ["", "not JSON from line 1 on: nested too deep"]),
    ):
        path.write_text(text, encoding="utf-8")
        items = read(path)
        assert [i.line for i in items if isinstance(i, BadLine)] == [
            n for n, reason in enumerate(found, start=1) if reason
        ], text[-50:]
        for item, reason in zip(items, found, strict=True):
            assert (item.reason if isinstance(item, BadLine) else "").startswith(reason), text[-50:]
    head = f"[{row}, ".encode()
    path.write_bytes(head + b'{"prompt": "\xff')
    assert reasons(path) == [f"not UTF-8 at byte {len(head) + 12}; what follows is not read"]


@pytest.mark.parametrize("value", ["1e999", "-Infinity", "9" * 400, "NaN"])
def test_an_order_is_a_finite_number(value: str, tmp_path: Path) -> None:
    row = json.dumps(conversation("q", "r", rating=0)).replace('"rating": 0', f'"rating": {value}')
    (reason,) = reasons(write_jsonl(tmp_path / "f.jsonl", [row]), order_column="rating")
    assert reason.startswith("ordering column `rating` is ") and reason.endswith(", not a number")
    assert len(reason) < 200


def test_foreign_values_are_cut_before_they_are_spelled_out() -> None:
    assert shown("a" * 10_000_000) == "'" + "a" * 76 + "..."
    assert len(shown(list(range(100_000)))) == 80
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "<list>"
    assert shown(10**5000) == "<int>"
    assert shown("it's") == '"it\'s"'


# -- names and sources ----------------------------------------------------------------------------


def test_ids_may_say_anything_and_lead_nowhere(tmp_path: Path) -> None:
    ids = ["../../etc/passwd", "a\nb", "\x00", "/", "", "\u202e", "a" * 1024, "<b>", "{x}", " "]
    path = write_jsonl(tmp_path / "f.jsonl", [{**GOOD, "id": i, "source": i or "s"} for i in ids])
    found = built(path, tmp_path / "made" / "pool")
    assert list(found.ids) == ids
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["f.jsonl", "made", "pool", "train", "manifest.json", "part-00000.arrow"]
    )
    table = statistics_table(found)
    assert table.count("\n") == len(ids) + 2 and "| 'a\\nb' | 1 |" in table
    rows = [{**GOOD, "id": "b\n" * 500}] * 2
    with pytest.raises(BadData, match=r"1 id\(s\) occur more than once") as stop:
        built(write_jsonl(tmp_path / "g.jsonl", rows), tmp_path / "other")
    assert len(str(stop.value)) < 400


def test_sources_are_collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**GOOD, "source": f"s{i % 150}", "id": str(i)} for i in range(301)]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    lines = statistics_table(built(path, tmp_path / "pool")).split("\n")
    assert len(lines) == 2 + 100 + 2
    assert lines[2].startswith("| s0 | 3 |")  # the largest first
    assert lines[-2].startswith("| 50 others | 100 |") and lines[-1].startswith("| all | 301 |")
    monkeypatch.setattr(pool, "SOURCES", 149)
    with pytest.raises(BadData, match=r"more than 149 sources, e\.g\. s149; data\.source_column"):
        built(path, tmp_path / "other")


# -- sizes ----------------------------------------------------------------------------------------


def test_long_texts_are_not_tokenised_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_TOKENISE_CHARACTERS", 1000)
    sizes: list[int] = []

    class Counting(Tokeniser):
        def __call__(self, samples: Any) -> Any:
            sizes.append(len(samples))
            return super().__call__(samples)

    rows = [conversation("q", "r" * (400 if i < 6 else 1)) for i in range(12)]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    build_pool(Reader([str(path)]), Counting(byte_level_tokenizer()), tmp_path / "pool")
    assert sizes == [3, 3, 6]


def test_turns_and_spans_by_the_thousand_take_no_time_in_their_square() -> None:
    """Of the square, 20,000 turns would take minutes."""
    tokeniser = Tokeniser(byte_level_tokenizer(), max_length=10**9)
    turns = [Message(("user", "assistant")[i % 2], "hi") for i in range(20_000)]  # type: ignore[arg-type]
    (found,) = tokeniser([Sample("a", "s", tuple(turns))])
    eos = found.input_ids == tokeniser.eos_id
    assert int(eos.sum()) == 10_000 and found.response_mask[eos].all()
    assert not found.response_mask[np.flatnonzero(eos)[:-1] + 1].any()
    size = 20_000
    row = {
        "text": "ab " * size,
        "responses": [[3 * i, 3 * i + 2] for i in range(size)],
        "spans": [{"start": 3 * i, "end": 3 * i + 1, "kept": True} for i in range(size)],
    }
    made = encode_spans(read_spans(row, None), tokeniser)
    text = tokeniser.tokenizer.decode(made.input_ids[made.response_mask].tolist())
    assert text.replace(" ", "") == "ab" * size


def test_spans_that_overlap_contradict_each_other() -> None:
    row: dict[str, Any] = {"text": "abcdef", "responses": [[0, 6]]}
    spans = [(3, 5), (0, 4)]
    row["spans"] = [{"start": a, "end": b, "kept": True} for a, b in spans]
    with pytest.raises(BadRow, match=r"`spans`: \[3, 5\] begins before another one ends"):
        read_spans(row, None)


# -- paths ----------------------------------------------------------------------------------------


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "f.zst").touch()
    for name, words in {
        "d.jsonl": "is neither a folder saved by `datasets` nor a folder",
        "pipe.jsonl": "is a pipe or a device",
        "/dev/zero": "is a pipe or a device",
        "loop.jsonl": "leads nowhere",
        "gone.jsonl": "leads nowhere",
        "f.jsonl.gz": "is compressed; unpack it first",
        "f.zst": "is compressed; unpack it first",
        "none.jsonl": "does not exist",
        "n" * 5000 + ".jsonl": "cannot be read: File name too long",
        "\udcff.jsonl": "cannot be read: its name is no Unicode",
        "a\0b.jsonl": "does not exist",
    }.items():
        path = str(tmp_path / name)
        for make in (lambda p: Reader([p]).check(), lambda p: TuluDataModule(p)):
            with pytest.raises(ValueError, match=r"^data\.path: ") as stop:
                make(path)
            assert words in str(stop.value) and len(str(stop.value)) < 400


def test_a_folder_hides_nothing(tmp_path: Path) -> None:
    """What has a sample file's name and cannot be read is named, not left out."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [GOOD])
    Reader([str(folder)]).check()
    for make, words in (
        (lambda p: p.mkdir(), "is no file"),
        (os.mkfifo, "is no file"),
        (lambda p: p.symlink_to(p), "is no file"),
    ):
        odd = folder / "b.jsonl"
        make(odd)
        with pytest.raises(ValueError, match=rf"data\.path: {odd} {words}"):
            Reader([str(folder)]).check()
        odd.rmdir() if odd.is_dir() else odd.unlink()
    (folder / "c.jsonl.zst").touch()
    with pytest.raises(ValueError, match=r"c\.jsonl\.zst is compressed"):
        Reader([str(folder)]).check()


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    for name in ("f.jsonl", "f.json"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == []
        with pytest.raises(BadData, match=r"no sample at all went into it; check data\.path"):
            built(tmp_path / name, tmp_path / "pool")
    (tmp_path / "f.parquet").touch()
    with pytest.raises(ValueError, match=r"f\.parquet is not a readable Parquet file"):
        read(tmp_path / "f.parquet")


# -- Parquet --------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol has it, zigzag."""
    number, found = number << 1, b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def with_rows(raw: bytes, rows: int, claimed: int) -> bytes:
    """A Parquet file whose footer claims another number of rows."""
    size = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - size : -8].replace(varint(rows), varint(claimed))
    assert footer != raw[-8 - size : -8]
    return raw[: -8 - size] + footer + len(footer).to_bytes(4, "little") + raw[-4:]


def test_parquet_files_that_say_what_is_not_so(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"prompt": ["q"] * 6001, "completion": ["r"] * 6001}), path)
    raw = path.read_bytes()
    assert len(read(path)) == 6001
    for broken in (
        with_rows(raw, 6001, 1 << 40),
        with_rows(raw, 6001, 6002),
        raw[: len(raw) // 2],
        raw[:-1],
        raw[:4] + b"\xff" * 40 + raw[44:],
        raw[:-8] + (1 << 31).to_bytes(4, "little") + raw[-4:],
        b"PAR1" + b"\0" * 100 + b"PAR1",
        b"PAR1",
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"^data\.path: {path} is not a readable Parquet"):
            read(path)


def test_parquet_columns_of_every_kind(tmp_path: Path) -> None:
    """What is not asked for may be anything; what is asked for has a reason in its row."""
    path = tmp_path / "f.parquet"
    nested: Any = "deep"
    kind: pa.DataType = pa.string()
    for _ in range(30):
        nested, kind = {"a": [nested]}, pa.struct([("a", pa.list_(kind))])
    pq.write_table(
        pa.table(
            {
                "prompt": ["q", "q"],
                "completion": ["r", None],
                "when": pa.array([2**62, -(2**62)], pa.timestamp("us")),
                "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
                "nested": pa.array([nested, None], kind),
                "bytes": [b"\xff", None],
            }
        ),
        path,
    )
    found = reasons(path)
    assert len(found) == 2 and all("a value of it cannot be read" in r for r in found)
    table = pq.read_table(path).drop_columns(["when"])
    pq.write_table(table, path)
    assert reasons(path) == ["`completion` is null"]
    wrong = pa.array([b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["q", "q"], "completion": wrong}), path)
    bad, good = read(path)
    assert isinstance(bad, BadLine) and bad.reason == "not UTF-8" and bad.line == 1
    assert isinstance(good, Sample) and good.messages[1].content == "fine"
    pq.write_table(pa.table([["q"], ["r"], ["p"]], ["prompt", "completion", "prompt"]), path)
    with pytest.raises(ValueError, match=r"f\.parquet is not .* two of its columns have one name"):
        read(path)
    pq.write_table(pa.table({"prompt": [b"q"], "completion": [b"r"]}), path)
    assert reasons(path) == ["`prompt` is bytes, not text"]


# -- folders of `datasets`, exports, log-probabilities --------------------------------------------


def test_a_damaged_folder_of_datasets(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    rows = {"prompt": ["q" * 50] * 50, "completion": ["r" * 50] * 50}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    assert len(read(folder)) == 50
    (data,) = folder.glob("*.arrow")
    raw = data.read_bytes()
    # offsets that lead far out of the file: what is mapped into memory must not be followed
    offsets = np.arange(51, dtype="<i4") * 50
    at = raw.index(offsets.tobytes())
    data.write_bytes(raw[: at + 100] + b"\xff\xff\xff\x7f" + raw[at + 104 :])
    with pytest.raises(ValueError, match=rf"data\.path: {folder} is damaged after row 0: "):
        read(folder)
    data.write_bytes(raw[:100])
    with pytest.raises(ValueError, match=rf"data\.path: {folder} is not a folder that `datasets`"):
        read(folder)
    data.write_bytes(raw)
    for state in ("{", "[]", '{"_data_files": [{"filename": "../../../etc/passwd"}]}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(ValueError, match=rf"data\.path: {folder} is not a folder that"):
            read(folder)


def olmo(folder: Path, bounds: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "token_ids_part_0000.npy").write_bytes(np.arange(10, dtype="<u2").tobytes())
    (folder / "labels_mask_part_0000.npy").write_bytes(b"\1" * 10)
    (folder / "token_ids_part_0000.csv.gz").write_bytes(gzip.compress(bounds))
    card = {"kind": "export", "data": ["token_ids_part_0000.npy"], "dtype": "uint16"}
    (folder / exports.CARD).write_text(json.dumps(card))
    return folder


def test_a_few_packed_bytes_are_no_endless_list(tmp_path: Path) -> None:
    assert len(read(olmo(tmp_path / "e", b"0,4\n4,10\n"))) == 2
    for bounds, words in (
        (b"0" * 50_000_000, r":1: .* is not `start,end`"),
        (b"0,4\n" * 1_000_000, r":2: '0,4' begins before the last document ends"),
        (b"0,4\n3,5\n", r":2: '3,5' begins before the last document ends"),
    ):
        folder = olmo(tmp_path / "e", bounds)
        with pytest.raises(ValueError, match=r"\.csv\.gz" + words) as stop:
            read(folder)
        assert len(str(stop.value)) < 400


def test_descriptions_of_exports_are_of_moderate_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = olmo(tmp_path / "e", b"0,4\n")
    card = folder / exports.CARD
    for text, words in (
        ("[" * 100_000, "is not JSON"),
        ('{"a": "\udcff"}', "is not JSON"),
        (json.dumps({"kind": "export", "version": "9" * 10**6}), "was written in version"),
        (json.dumps({"kind": "export", "eos": [0] * 10**6}), "eos is"),
        (json.dumps({"kind": "export", "data": ["../f"] * 10**5}), "no list of files"),
    ):
        card.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=r"^data\.path: ") as stop:
            Reader([str(folder)]).check()
        assert words in str(stop.value) and len(str(stop.value)) < 500
    monkeypatch.setattr(exports, "CARD_BYTES", 100)
    with pytest.raises(ValueError, match=r"has more than the 100 bytes that it may have"):
        Reader([str(folder)]).check()


def test_files_of_ids_and_log_probabilities(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    (tmp_path / "f.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"^--logprobs: .*p\.jsonl is no file"):
        check_file(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"^--logprobs: .* is compressed; unpack it first"):
        check_file(tmp_path / "f.jsonl.gz")
    ids = tmp_path / "ids"
    for raw, words in (
        (b"[" * 100_000, "is not JSON"),
        (b'["a", {}]', "holds {}, which is no id"),
        (b'["a", null]', "holds None, which is no id"),
        (b"a\n\xff", "is not UTF-8 at byte 2"),
        (b'["\xff"]', "is not JSON"),
    ):
        ids.write_bytes(raw)
        with pytest.raises(ValueError, match=r"^--logprobs_trained_on: ") as stop:
            read_ids(ids)
        assert words in str(stop.value) and len(str(stop.value)) < 300
    with pytest.raises(ValueError, match=r"^--logprobs_trained_on: .* is no file"):
        read_ids(tmp_path / "p.jsonl")


# -- text that spells a special token -------------------------------------------------------------

SPELLED = [
    conversation("ask </s> this", "the sky"),
    conversation("ask", "the <pad> sky"),
    conversation("ask", "the sky"),
]


def test_spelled_special_tokens_are_text_or_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", SPELLED)
    data = TuluDataModule(str(path), cache_dir=str(tmp_path / "cache"), subsets=1)
    data.use_tokenizer(byte_level_tokenizer())
    data.prepare_data()
    data.setup()
    decode = data.tokeniser.tokenizer.decode
    ids = [data.pool.input_ids[i].tolist() for i in range(3)]
    assert [i.count(data.tokeniser.eos_id) for i in ids] == [1, 1, 1]
    assert decode(ids[0]) == "<s><|user|>\nask </s> this\n<|assistant|>\nthe sky</s>"
    for skip in (False, True):
        strict = TuluDataModule(
            str(path),
            cache_dir=str(tmp_path / "cache"),
            special_text="refuse",
            on_bad_line="skip" if skip else "stop",
            subsets=1,
        )
        strict.use_tokenizer(byte_level_tokenizer())
        if not skip:
            with pytest.raises(BadData) as stop:
                strict.prepare_data()
            assert f"{path}:1: messages[0] spells the special token '</s>'" in str(stop.value)
            assert f"{path}:2: messages[1] spells the special token '<pad>'" in str(stop.value)
            continue
        strict.prepare_data()
        strict.setup()
        assert list(strict.pool.ids) == ["f-3"]
        assert strict.pool.fingerprint != data.pool.fingerprint  # it is another pool


def test_texts_with_spans_are_refused_too(tmp_path: Path) -> None:
    def row(question: str) -> dict[str, Any]:
        text = f"<|user|>\n{question}\n<|assistant|>\nsky</s>"
        at = [text.index("sky"), len(text)]
        return {
            "text": text,
            "responses": [at],
            "spans": [{"start": at[0], "end": at[1], "kept": True}],
        }

    path = write_jsonl(tmp_path / "f.jsonl", [row("ask"), row("a <pad> b")])
    tokeniser = Tokeniser(byte_level_tokenizer(), special_text="refuse")
    with pytest.raises(BadData, match=r"f\.jsonl:2: `text` spells a special token"):
        build_pool(Reader([str(path)]), tokeniser, tmp_path / "pool")


def test_two_contents_that_spell_one_together() -> None:
    """In the raw layout contents touch: neither spells a special token, and both do."""
    tokeniser = Tokeniser(byte_level_tokenizer(), template="raw")
    turns = (Message("user", "a </"), Message("user", "s> b"), Message("assistant", "c"))
    (found,) = tokeniser([Sample("a", "s", turns)])
    assert found.input_ids.tolist().count(tokeniser.eos_id) == 1
    assert tokeniser.tokenizer.decode(found.input_ids.tolist()) == "<s>a </s> bc</s>"


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.write_bytes(b'{"prompt": "\xff"}\n'), "not UTF-8 at byte 12"),
        (lambda p: p.write_bytes(b"[" * 100_000), "not JSON: nested too deep"),
        (lambda p: p.write_bytes(b"\x00" * 1000), "not JSON: Expecting value"),
        (os.mkfifo, "is a pipe or a device"),
        (lambda p: p.symlink_to(p), "leads nowhere"),
    ],
)
def test_the_command_line_says_it_in_words(
    make: Callable[[Path], Any],
    words: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "f.jsonl"
    make(path)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                *("score", "--name", "s", "--data.path", str(path)),
                *("--data.cache_dir", str(tmp_path / "cache")),
                *("--model.base.name", str(model_folder)),
                *("--out", str(tmp_path / "out"), "--estimate"),
            ]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and str(path) in error and "Traceback" not in error
    assert len(error) < 2000
