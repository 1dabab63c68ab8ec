"""The pool on disk: nothing lost, everything counted, and a fingerprint of what decided it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    conversation,
    sentencepiece_tokenizer,
    write_jsonl,
)

from tokenclean.data import pool as pool_module
from tokenclean.data.formats import Reader
from tokenclean.data.pool import (
    BadData,
    TokenPool,
    build_pool,
    data_fingerprint,
    open_pool,
    statistics_table,
)
from tokenclean.data.template import Tokeniser
from tokenclean.publish import MANIFEST


def build(
    path: Path, out: Path, *, tokeniser: Tokeniser | None = None, **options: Any
) -> TokenPool:
    """A pool of the file, of characters unless told otherwise."""
    order = options.pop("order_column", None)
    tokeniser = tokeniser or Tokeniser(character_tokenizer())
    build_pool(Reader([str(path)], order_column=order), tokeniser, out, **options)
    return open_pool(out / "train")


def text_of(ids: np.ndarray) -> str:
    return "".join(character_tokenizer().convert_ids_to_tokens(ids.tolist()))


def test_rows_come_back_in_order_across_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "ROWS_PER_SHARD", 5)
    monkeypatch.setattr(pool_module, "_TOKENISE_ROWS", 3)
    rows = [
        conversation("q" * (i % 4), "r" * i, id=f"id-{i}", source=f"s{i % 2}", rating=-i)
        for i in range(13)
    ]
    pool = build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out", order_column="rating")
    assert [batch.num_rows for batch in pool.batches()] == [5, 5, 3]
    assert len(pool) == 13
    assert list(pool.ids) == [f"id-{i}" for i in range(13)]
    assert list(pool.sources) == [f"s{i % 2}" for i in range(13)]
    assert pool.order().tolist() == [float(-i) for i in range(13)]
    assert not pool.has_truth
    for i in range(13):
        prompt = f"<|user|>\n{'q' * (i % 4)}\n<|assistant|>\n"
        assert text_of(pool.input_ids[i]) == prompt + "r" * i + "$"
        positions = list(range(len(prompt), len(prompt) + i + 1))
        assert pool.response_positions(i).tolist() == positions
    assert pool.response_counts().tolist() == [i + 1 for i in range(13)]
    assert pool.eos_id == 0
    schema = pool.batches()[0].schema
    assert schema.field("id").type == pa.string()
    assert schema.field("input_ids").type == pa.list_(pa.int32())
    assert schema.field("response_mask").type == pa.list_(pa.bool_())


def test_the_pool_is_mapped_and_not_read(tmp_path: Path) -> None:
    rows = [conversation("q" * 100, "r" * 100) for _ in range(200)]
    build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out")
    before = pa.total_allocated_bytes()
    pool = open_pool(tmp_path / "out" / "train")
    assert pool.input_ids[150].base is not None
    assert not pool.input_ids[150].flags.writeable
    # 200 rows of some 220 int32 would be 176 kB.
    assert pa.total_allocated_bytes() - before < 10_000


def test_truth_travels_with_the_tokens(tmp_path: Path) -> None:
    rows = [
        conversation("q", "abc", truth=[[1, 0, 1, -1]]),
        conversation("q", "de", truth=[[1, 1, 2, 0]]),
    ]
    pool = build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out")
    assert pool.has_truth
    assert pool.truth is not None
    truth = [pool.truth[i][pool.response_mask[i]].tolist() for i in range(2)]
    assert truth == [[-1, 1, 1, 1], [1, 0, 1]]
    assert pool.batches()[0].schema.field("truth").type == pa.list_(pa.int8())


@pytest.mark.parametrize("first", [True, False])
def test_truth_for_some_rows_only_is_refused(first: bool, tmp_path: Path) -> None:
    rows = [conversation("q", "r", truth=[]), conversation("q", "r")]
    path = write_jsonl(tmp_path / "f.jsonl", rows if first else rows[::-1])
    with pytest.raises(BadData, match="either every sample of a pool carries `truth` or none"):
        build(path, tmp_path / "out")


def bad_file(folder: Path) -> Path:
    return write_jsonl(
        folder / "bad.jsonl",
        [
            conversation("q", "first"),
            "{",
            conversation("q", "second"),
            "",
            {"messages": []},
            conversation("q", "third"),
            {"messages": [{"role": "user", "content": None}]},
        ],
    )


def test_stop_lists_every_bad_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = bad_file(tmp_path)
    with pytest.raises(BadData) as caught:
        build(path, tmp_path / "out")
    head, *lines, advice = str(caught.value).splitlines()
    assert head == "4 bad line(s) in the data:"
    assert [line.split(": ", 1)[0] for line in lines] == [f"  {path}:{n}" for n in (2, 4, 5, 7)]
    for line, reason in zip(
        lines, ("not JSON", "empty line", "`messages` is empty", "content is null"), strict=True
    ):
        assert reason in line
    assert "--data.on_bad_line skip" in advice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"]


def test_stop_lists_bad_lines_of_every_file_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "BAD_LINES_SHOWN", 3)
    paths = [write_jsonl(tmp_path / name, ["{", "{"]) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(BadData) as caught:
        build_pool(
            Reader([str(p) for p in paths]), Tokeniser(character_tokenizer()), tmp_path / "out"
        )
    text = str(caught.value)
    assert text.startswith("4 bad line(s)")
    assert [f"{p}:{n}:" in text for p in paths for n in (1, 2)] == [True, True, True, False]
    assert "... and 1 more" in text


def test_skip_puts_bad_lines_into_quarantine(tmp_path: Path) -> None:
    path = bad_file(tmp_path)
    pool = build(path, tmp_path / "out", on_bad_line="skip")
    # Ids name the line in the file, whatever was skipped before it.
    assert list(pool.ids) == ["bad-1", "bad-3", "bad-6"]
    assert pool.manifest["rejected"] == {str(path): 4}
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [(f["file"], f["line"]) for f in found] == [(str(path), n) for n in (2, 4, 5, 7)]
    assert found[2]["reason"] == "`messages` is empty"
    # The rows themselves are there too, so that nothing is lost.
    rejected = [x for n, x in enumerate(path.read_text().splitlines(), 1) if n in (2, 4, 5, 7)]
    assert found[0]["content"] == rejected[0]
    assert json.loads(found[2]["content"]) == json.loads(rejected[2])
    assert "rejected lines" in statistics_table(pool)


def test_clean_data_have_no_quarantine(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r")])
    pool = build(path, tmp_path / "out", on_bad_line="skip")
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    assert pool.manifest["rejected"] == {}
    assert "rejected" not in statistics_table(pool)


def test_doubled_ids_are_refused_by_name(tmp_path: Path) -> None:
    rows = [conversation("q", "r", id=i) for i in ("a", "b", "c", "b", "a", "b")]
    with pytest.raises(BadData, match=r"2 id\(s\) occur more than once, e\.g\. a, b;"):
        build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_given_id_that_equals_a_made_one_is_refused(tmp_path: Path) -> None:
    rows = [conversation("q", "r", id="f-2"), conversation("q", "r")]
    with pytest.raises(BadData, match="f-2"):
        build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out")


def statistics_rows() -> list[dict[str, Any]]:
    """Two sources; the prompt of one character is 25 tokens, tags included."""
    assert len("<|user|>\nq\n<|assistant|>\n") == 25
    return [
        conversation("q", "abc", source="one"),  # 25 + 4
        conversation("q", "abcdefgh", source="one"),  # 25 + 9, of which 30 stay
        {"messages": [{"role": "user", "content": "q"}], "source": "one"},  # no response
        conversation("q" * 40, "abc", source="two"),  # the response is cut off altogether
        conversation("q", "", source="two"),  # 25 + 1
    ]


def test_statistics_per_source_by_hand(tmp_path: Path) -> None:
    pool = build(
        write_jsonl(tmp_path / "f.jsonl", statistics_rows()),
        tmp_path / "out",
        tokeniser=Tokeniser(character_tokenizer(), max_length=30),
    )
    assert list(pool.ids) == ["f-1", "f-2", "f-5"]
    assert pool.manifest["statistics"] == {
        "one": {
            "samples": 2,
            "tokens": 29 + 30,
            "response_tokens": 4 + 5,
            "truncated": 1,
            "response_tokens_cut": 4,
            "without_response": 1,
            "prompt_length": 25 + 25,
            "completion_length": 4 + 9,
            "overall_length": 29 + 34,
        },
        "two": {
            "samples": 1,
            "tokens": 26,
            "response_tokens": 1,
            "truncated": 1,
            "response_tokens_cut": 4,
            "without_response": 1,
            "prompt_length": 25,
            "completion_length": 1,
            "overall_length": 26,
        },
    }
    table = statistics_table(pool).splitlines()
    assert table[0].startswith("| source | samples | tokens | response tokens | truncated |")
    assert table[2:] == [
        "| one | 2 | 59 | 9 | 1 | 1 | 25.0 | 6.5 | 31.5 |",
        "| two | 1 | 26 | 1 | 1 | 1 | 25.0 | 1.0 | 26.0 |",
        "| all | 3 | 85 | 10 | 2 | 2 | 25.0 | 4.7 | 29.7 |",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"messages": [{"role": "user", "content": "q"}]}],
        [conversation("q" * 40, "r")],
    ],
)
def test_a_pool_without_response_tokens_is_refused(rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = f"data.path gave {len(rows)} sample" if rows else "no sample at all"
    with pytest.raises(BadData, match=rf"no response token .* {re.escape(said)}"):
        build(path, tmp_path / "out", tokeniser=Tokeniser(character_tokenizer(), max_length=30))
    assert not (tmp_path / "out").exists()


def copy_elsewhere(path: Path) -> Path:
    other = path.parent / "elsewhere" / path.name
    other.parent.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copy)(path, other)
    return other


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(folder / "f.jsonl", rows)


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "f")
    return folder / "f"


def folder_of_files(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "f").mkdir(parents=True)
    jsonl(folder / "f", rows)
    return folder / "f"


@pytest.mark.parametrize("write", [jsonl, saved, folder_of_files])
def test_the_data_fingerprint_follows_content_and_not_place(
    write: Callable[[Path, list[dict[str, Any]]], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [conversation("q", "r"), conversation("q", "s")]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path = write(tmp_path / "one", rows)
    plain = data_fingerprint(Reader([str(path)]))
    assert data_fingerprint(Reader([str(copy_elsewhere(path))])) == plain
    changed = write(tmp_path / "two", [rows[0], conversation("q", "t")])
    assert data_fingerprint(Reader([str(changed)])) != plain
    assert data_fingerprint(Reader([str(path), str(changed)])) != plain
    for option in ("split", "order_column", "id_column", "source_column"):
        reader = Reader([str(path)], **{option: "other"})  # type: ignore[arg-type]
        assert data_fingerprint(reader) != plain, option
    # Made ids and sources carry the name.
    renamed = path.rename(path.with_name(path.name.replace("f", "g")))
    assert (data_fingerprint(Reader([str(renamed)])) == plain) is (write is folder_of_files)


def test_the_pool_fingerprint_follows_whatever_decides_the_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", f"r{i}", id=i) for i in range(40)])
    tokenisers = {
        "plain": Tokeniser(byte_level_tokenizer()),
        "again": Tokeniser(byte_level_tokenizer()),
        "no bos": Tokeniser(byte_level_tokenizer(bos=False)),
        "other tokenizer": Tokeniser(sentencepiece_tokenizer()),
        "template": Tokeniser(byte_level_tokenizer(), "raw"),
        "max_length": Tokeniser(byte_level_tokenizer(), max_length=512),
    }
    found = {
        name: build(path, tmp_path / name, tokeniser=tokeniser).fingerprint
        for name, tokeniser in tokenisers.items()
    }
    assert found.pop("again") == found["plain"]
    copied = build(copy_elsewhere(path), tmp_path / "copied", tokeniser=tokenisers["plain"])
    assert copied.fingerprint == found["plain"]
    for name, share, seed in (("held", 0.3, 0), ("other share", 0.4, 0), ("other seed", 0.3, 1)):
        options: dict[str, Any] = {"holdout": share, "seed": seed}
        pool = build(path, tmp_path / name, tokeniser=tokenisers["plain"], **options)
        found[name] = pool.fingerprint
        found[name + " validation"] = open_pool(tmp_path / name / "validation").fingerprint
    assert len(set(found.values())) == len(found)


def test_opening_another_pool_shows_both_fingerprints(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r")])
    pool = build(path, tmp_path / "out")
    assert list(open_pool(pool.folder, pool.fingerprint).ids) == list(pool.ids)
    with pytest.raises(ValueError, match=rf"{pool.fingerprint}, expected abc"):
        open_pool(pool.folder, "abc")


def test_the_manifest_says_what_made_the_pool(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r")])
    pool = build(path, tmp_path / "out", tokeniser=Tokeniser(character_tokenizer(), max_length=99))
    assert pool.manifest["template"] == "tulu"
    assert pool.manifest["max_length"] == 99
    assert pool.manifest["shapes"] == {str(path): "messages"}
    assert pool.manifest["rows"] == 1
    assert (pool.folder / MANIFEST).is_file()


def test_holdout_is_disjoint_seeded_and_about_its_share(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r", id=i) for i in range(400)])
    held = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train = build(path, tmp_path / name, holdout=0.25, seed=seed)
        validation = open_pool(tmp_path / name / "validation")
        assert sorted([*train.ids, *validation.ids]) == sorted(str(i) for i in range(400))
        assert not set(train.ids) & set(validation.ids)
        # Binomial(400, 1/4): 8.7 is one standard deviation.
        assert 60 < len(validation) < 140
        held[name] = list(validation.ids)
    assert held["a"] == held["b"]
    assert held["a"] != held["c"]


def test_held_out_rows_stay_held_out_when_data_grow(tmp_path: Path) -> None:
    rows = [conversation("q", "r", id=i) for i in range(100)]
    build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "a", holdout=0.3)
    build(write_jsonl(tmp_path / "g.jsonl", rows[50:]), tmp_path / "b", holdout=0.3)
    whole = set(open_pool(tmp_path / "a" / "validation").ids)
    half = set(open_pool(tmp_path / "b" / "validation").ids)
    assert half == {i for i in whole if int(i) >= 50}


def test_a_held_out_part_without_rows_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r")])
    with pytest.raises(BadData, match=r"validation pool.*data\.validation_share"):
        build(path, tmp_path / "out", holdout=1e-9)


def test_text_that_does_not_decode_leaves_no_pool(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r"), conversation("q", "R")])
    with pytest.raises(ValueError, match="sample 'f-2'"):
        build(path, tmp_path / "out", tokeniser=Tokeniser(tokenizer))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.jsonl"]
