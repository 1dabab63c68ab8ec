"""Exports read back by each format's own rules, from a cleaned pool made by hand."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import byte_level_tokenizer, character_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from tokenclean import cli
from tokenclean.data.cleaned import cleaned_schema, read_blocks, write_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer, vocabulary_hash
from tokenclean.export.card import is_hub_name, sources
from tokenclean.export.content import Counts, Labelled, Tally
from tokenclean.export.formats import smallest_dtype, write_olmo
from tokenclean.export.markdown import cell
from tokenclean.export.verb import export

NAN = float("nan")


@dataclass
class Row:
    """A sample, token by token.

    Attributes:
        marks: a letter for each token: ``.`` prompt, ``k`` kept, ``d`` dropped, ``u`` to be
            unlearnt, ``h`` kept with the weight 0.5, ``z`` with the weight 0.
    """

    id: str
    ids: list[int]
    marks: str
    source: str = "tales"
    round: int = 1
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.marks)
        # 0.5, 1.0, ... for response tokens
        steps = [0.0 if m == "." else 1.0 for m in self.marks]
        self.scores = (np.cumsum(steps) * 0.5).tolist() if self.round else [NAN] * len(steps)

    @property
    def labels(self) -> list[int]:
        """What a trainer that knows no weights may learn."""
        return [i if m in "kh" else -100 for i, m in zip(self.ids, self.marks, strict=True)]


def spelled(tokenizer: Any, *parts: tuple[str, str]) -> tuple[list[int], str]:
    """Ids and marks of a text in parts, each with the mark of its tokens."""
    ids: list[int] = []
    marks = ""
    for text, mark in parts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        marks += mark * len(found)
    return ids, marks


CHARACTERS = character_tokenizer()
#: `$` is the EOS, one character is one token.
TEXTS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("<|user|>\nHi\n<|assistant|>\n", "."), ("Yes", "k"), (" no", "d"), ("$", "k")
    ),
    "turns": (
        ("<|user|>\n1\n<|assistant|>\n", "."), ("a", "k"), ("b$", "d"),
        ("\n<|user|>\n2\n<|assistant|>\n", "."), ("c", "d"), ("d$", "k"),
    ),
    "cut": (("<|user|>\nQ\n<|assistant|>\n", "."), ("l", "d"), ("on", "k")),
    "emptied": (("<|user|>\nE\n<|assistant|>\n", "."), ("zzz$", "d")),
    "warmup": (("<|user|>\nW\n<|assistant|>\n", "."), ("all$", "k")),
}  # fmt: skip
SOURCES = {"plain": "tales", "turns": "odd | <b>\nname", "cut": "tales"}


def hand_rows() -> list[Row]:
    return [
        Row(
            name,
            *spelled(CHARACTERS, *parts),
            source=SOURCES.get(name, "rest"),
            round=0 if name == "warmup" else 1,
        )
        for name, parts in TEXTS.items()
    ]


#: Those that teach something: all but `emptied`.
TAUGHT = [row for row in hand_rows() if row.id != "emptied"]


def write_pool(folder: Path, rows: Sequence[Row], tokenizer: Any, **manifest: Any) -> Path:
    """A cleaned pool as `select` would leave it, in two batches."""
    schema = cleaned_schema(with_truth=False)
    weights = {"u": -1.0, "h": 0.5, "z": 0.0}

    def columns(row: Row) -> dict[str, Any]:
        known = [
            None if np.isnan(s) or m == "." else s
            for s, m in zip(row.scores, row.marks, strict=True)
        ]
        return {
            "id": row.id,
            "source": row.source,
            "input_ids": row.ids,
            "labels": [i if m in "kuhz" else -100 for i, m in zip(row.ids, row.marks, strict=True)],
            "response_mask": [m != "." for m in row.marks],
            "base_nll": [None if s is None else s + 1.0 for s in known],
            "reference_nll": [None if s is None else 1.0 for s in known],
            "score": known,
            "priority": None if not manifest.get("ranked_by") else known,
            "reason": [{".": 1, "k": 0, "h": 0}.get(m, 4) for m in row.marks],
            "weight": [weights.get(m, 1.0) for m in row.marks],
            "round": row.round,
        }

    half = len(rows) // 2
    batches = [
        pa.RecordBatch.from_pylist([columns(r) for r in part], schema=schema)
        for part in (rows[:half], rows[half:])
        if part
    ]
    ranked = [m for r in rows if r.round for m in r.marks if m != "."]
    known = {
        "pool": "0123-4567",
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "vocabulary": vocabulary_hash(tokenizer),
        "template": "tulu",
        "max_length": 128,
        "eos_id": tokenizer.eos_token_id,
        "base": "base-print",
        "reference": "reference-print",
        "selection": {"rule": "token_cleaning", "scope": "global", "keep": 0.5},
        "rule_options": {"depth": 3},
        "reasons": {"0": "kept", "1": "prompt", "4": "judged <idle>"},
        "ranked_tokens": len(ranked),
        "kept_tokens": sum(m in "kh" for m in ranked),
        "cut": 0.125,
    }
    write_cleaned_pool(folder, batches, schema, {**known, **manifest})
    return folder


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("characters")
    CHARACTERS.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "run" / "cleaned", hand_rows(), CHARACTERS).parent


def exported(run: Path, to: str, *more: str) -> Path:
    export([str(run), "--to", to, *more])
    return run / "export" / to


def lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def labelled_rows(folder: Path, to: str) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of an export, by the rules of its format."""
    if to == "llamafactory":
        found = datasets.load_from_disk(str(folder))["train"].to_list()
    elif to == "olmo":
        found = list(documents(folder))
    else:
        found = lines(folder / "train.jsonl")
    return [(row["input_ids"], row["labels"]) for row in found]


def documents(folder: Path) -> Iterator[dict[str, list[int]]]:
    dtype = json.loads((folder / "tokenclean.json").read_text())["dtype"]
    for part in sorted(folder.glob("token_ids_part_*.npy")):
        tokens = np.memmap(part, mode="r", dtype=dtype)
        mask = np.memmap(str(part).replace("token_ids", "labels_mask"), mode="r", dtype=np.bool_)
        assert len(tokens) == len(mask)
        assert set(mask.view(np.uint8).tolist()) <= {0, 1}
        with gzip.open(str(part).replace(".npy", ".csv.gz"), "rt") as file:
            for line in file:
                start, end = map(int, line.split(","))
                ids = tokens[start:end].tolist()
                labels = np.where(mask[start:end], tokens[start:end].astype(int), -100).tolist()
                yield {"input_ids": ids, "labels": labels}
        assert end == len(tokens)


LABELS = ("trl", "axolotl", "llamafactory", "olmo")


@pytest.mark.parametrize("to", LABELS)
def test_labels_are_those_of_the_kept_tokens(to: str, pool: Path) -> None:
    assert labelled_rows(exported(pool, to), to) == [(r.ids, r.labels) for r in TAUGHT]


@pytest.mark.parametrize("to", LABELS)
def test_samples_with_nothing_kept_can_be_kept(to: str, pool: Path) -> None:
    folder = exported(pool, to, "--keep_empty")
    assert labelled_rows(folder, to) == [(r.ids, r.labels) for r in hand_rows()]
    assert "left out" not in (folder / "README.md").read_text()


def test_trl_says_it_twice_in_both_files(pool: Path) -> None:
    folder = exported(pool, "trl")
    want = [
        {
            "input_ids": row.ids,
            "labels": row.labels,
            "assistant_masks": [int(m == "k") for m in row.marks],
        }
        for row in TAUGHT
    ]
    assert lines(folder / "train.jsonl") == want
    parquet = pq.read_table(folder / "train.parquet")
    assert parquet.to_pylist() == want
    assert parquet.schema.metadata is None
    assert {str(f.type) for f in parquet.schema} == {"list<element: int64>"}


@pytest.mark.parametrize("to", LABELS)
def test_a_first_token_is_no_target(to: str, tmp_path: Path) -> None:
    rows = [Row("both", [5, 6, 7], "kdk"), Row("first", [8, 9], "kd")]
    folder = exported(write_pool(tmp_path / "cleaned", rows, CHARACTERS).parent, to)
    assert labelled_rows(folder, to) == [([5, 6, 7], [-100, -100, 7])]
    note = json.loads((folder / "tokenclean.json").read_text())
    assert (note["rows"], note["rows_left_out"], note["kept_tokens"]) == (1, 1, 1)


def test_axolotl_has_exactly_its_columns(pool: Path) -> None:
    rows = lines(exported(pool, "axolotl") / "train.jsonl")
    assert {tuple(row) for row in rows} == {("input_ids", "attention_mask", "labels")}
    assert [row["attention_mask"] for row in rows] == [[1] * len(r.ids) for r in TAUGHT]


def test_llamafactory_folder_has_types_that_every_datasets_knows(pool: Path) -> None:
    folder = exported(pool, "llamafactory")
    rows = datasets.load_from_disk(str(folder))["train"]
    assert rows[1]["attention_mask"] == [1] * len(TAUGHT[1].ids)
    info = json.loads((folder / "train" / "dataset_info.json").read_text())
    # `List`, which datasets 4 and 5 write, is unknown to datasets 3
    assert {f["_type"] for f in info["features"].values()} == {"Sequence"}
    # what `datasets` caches goes by this, so other rows need another one
    state = json.loads((folder / "train" / "state.json").read_text())
    assert state["_fingerprint"] == json.loads((folder / "tokenclean.json").read_text())["content"]


def test_olmo_arrays_have_no_header(pool: Path) -> None:
    folder = exported(pool, "olmo")
    ids = [i for row in TAUGHT for i in row.ids]
    assert (folder / "token_ids_part_0000.npy").read_bytes() == b"".join(
        i.to_bytes(2, "little") for i in ids
    )
    card = (folder / "README.md").read_text()
    # `turns` has an EOS inside, `cut` none at its end
    assert "1 documents have an EOS before their end" in card
    assert "1 do not end with one" in card


def test_olmo_parts_hold_whole_documents(tmp_path: Path) -> None:
    counts = [3, 3, 9, 2]
    ids = np.arange(65530, 65530 + 17, dtype=np.int32)
    labels = np.where(np.arange(17) % 3 == 0, ids, -100).astype(np.int32)
    files = write_olmo(tmp_path, [Labelled(np.array(counts), ids, labels)], "uint32", 4 * 6)
    # six tokens fit: two documents, one that is too large by itself, one more
    assert files.data == [f"token_ids_part_000{n}.npy" for n in range(3)]
    assert [(tmp_path / name).stat().st_size // 4 for name in files.data] == [6, 9, 2]
    packed = [(tmp_path / f"token_ids_part_000{n}.csv.gz").read_bytes() for n in range(3)]
    assert [gzip.decompress(b) for b in packed] == [b"0,3\n3,6\n", b"0,9\n", b"0,2\n"]
    found = np.concatenate([np.fromfile(tmp_path / name, "<u4") for name in files.data])
    assert found.tolist() == list(range(65530, 65547))
    mask = [np.fromfile(tmp_path / f"labels_mask_part_000{n}.npy", np.uint8) for n in range(3)]
    assert np.concatenate(mask).tolist() == [1, 0, 0] * 5 + [1, 0]


def test_olmo_dtype_follows_the_vocabulary() -> None:
    assert smallest_dtype(65536, None) == "uint16"
    assert smallest_dtype(65537, None) == "uint32"
    assert smallest_dtype(100, "uint32") == "uint32"
    with pytest.raises(ValueError, match="ids up to 65,536 do not fit in uint16; pass uint32"):
        smallest_dtype(65537, "uint16")


def test_olmo_dtype_has_room_for_every_entry_of_the_tokenizer(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 65537)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = write_pool(tmp_path / "run" / "cleaned", [Row("one", [5, 1], ".k")], tokenizer).parent
    folder = exported(run, "olmo", "--tokenizer", str(tmp_path / "tokenizer"))
    assert json.loads((folder / "tokenclean.json").read_text())["dtype"] == "uint32"
    assert (folder / "token_ids_part_0000.npy").read_bytes() == bytes([5, 0, 0, 0, 1, 0, 0, 0])
    folder = exported(run, "olmo", "--overwrite")
    assert json.loads((folder / "tokenclean.json").read_text())["dtype"] == "uint16"
    assert "uint16 follows the largest token id there is, 5" in (folder / "README.md").read_text()


def test_counts_go_over_all_blocks(tmp_path: Path) -> None:
    folder = write_pool(tmp_path / "cleaned", hand_rows(), CHARACTERS)
    counted = Tally()
    for block in read_blocks(folder, rows=1):
        counted.add(block, CHARACTERS.eos_token_id, keep_empty=False)
    # `turns`, the second of five
    assert counted.longest == len(
        "<|user|>\n1\n<|assistant|>\nab$\n<|user|>\n2\n<|assistant|>\ncd$"
    )
    assert counted.largest_id == max(i for row in TAUGHT for i in row.ids)
    assert (counted.rows, counted.total.samples, counted.total.emptied) == (4, 5, 1)


def test_jsonl_has_every_number(pool: Path) -> None:
    rows = lines(exported(pool, "jsonl") / "samples.jsonl")
    assert [row["id"] for row in rows] == list(TEXTS)
    cut = rows[2]
    assert cut["input_ids"] == hand_rows()[2].ids
    prompt = len("<|user|>\nQ\n<|assistant|>\n")
    assert cut["labels"] == [-100] * (prompt + 1) + cut["input_ids"][-2:]
    assert cut["response_mask"] == [0] * prompt + [1, 1, 1]
    assert cut["score"] == [None] * prompt + [0.5, 1.0, 1.5]
    assert cut["base_nll"] == [None] * prompt + [1.5, 2.0, 2.5]
    assert cut["reference_nll"] == [None] * prompt + [1.0, 1.0, 1.0]
    assert cut["reason"] == ["prompt"] * prompt + ["judged <idle>", "kept", "kept"]
    assert cut["weight"] == [1.0] * (prompt + 3)
    assert "priority" not in cut and "truth" not in cut
    assert (rows[4]["round"], set(rows[4]["score"])) == (0, {None})
    assert "NaN" not in (pool / "export" / "jsonl" / "samples.jsonl").read_text()


def test_jsonl_has_what_the_rule_goes_by_if_that_is_not_the_score(tmp_path: Path) -> None:
    run = write_pool(tmp_path / "cleaned", hand_rows(), CHARACTERS, ranked_by="else").parent
    assert lines(exported(run, "jsonl") / "samples.jsonl")[2]["priority"][-3:] == [0.5, 1.0, 1.5]


# -- spans ----------------------------------------------------------------------------------------


def test_spans_are_character_ranges_of_the_text(pool: Path, characters: str) -> None:
    rows = lines(exported(pool, "spans", "--tokenizer", characters) / "samples.jsonl")
    texts = ["".join(text for text, _ in parts) for parts in TEXTS.values()]
    assert [row["text"] for row in rows] == texts
    assert all(row["exact"] for row in rows)
    turns = rows[1]
    first, second = texts[1].index("ab$"), texts[1].index("cd$")
    assert turns["responses"] == [[first, first + 3], [second, second + 3]]
    assert [
        (turns["text"][s["start"] : s["end"]], s["kept"], s["turn"], s["turn_start"], s["turn_end"])
        for s in turns["spans"]
    ] == [
        ("a", True, 0, 0, 1),
        ("b$", False, 0, 1, 3),
        ("c", False, 1, 0, 1),
        ("d$", True, 1, 1, 3),
    ]
    # scores 0.5, 1.0, ... over both responses
    assert [s["score"] for s in turns["spans"]] == [0.5, 1.25, 2.0, 2.75]
    assert [s["tokens"] for s in turns["spans"]] == [1, 2, 1, 2]
    assert [s["reason"] for s in turns["spans"]] == [
        "kept", "judged <idle>", "judged <idle>", "kept"
    ]  # fmt: skip
    assert rows[4]["spans"][0]["score"] is None
    assert "tokens" not in turns and "weight" not in turns["spans"][0]


def test_spans_of_single_tokens(pool: Path, characters: str) -> None:
    folder = exported(pool, "spans", "--tokenizer", characters, "--per_token")
    cut = lines(folder / "samples.jsonl")[2]
    start = cut["text"].index("lon")
    assert cut["tokens"] == {
        "start": [start, start + 1, start + 2],
        "end": [start + 1, start + 2, start + 3],
        "kept": [False, True, True],
        "score": [0.5, 1.0, 1.5],
        "reason": ["judged <idle>", "kept", "kept"],
    }


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_texts_read_again_give_the_same_tokens_and_kept_text(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "<|user|>\nWhat is the sky?\n<|assistant|>\nThe sky is blue, quick fox 5.</s>"
    ids = tokenizer(text)["input_ids"]
    prompt = len(tokenizer(text[: text.index("The")])["input_ids"])
    response = len(ids) - prompt
    marks = "." * prompt + ("kkd" * response)[:response]
    rows = [Row("one", ids, marks)]
    run = write_pool(tmp_path / "run" / "cleaned", rows, tokenizer).parent
    row = lines(
        exported(run, "spans", "--tokenizer", str(tmp_path / "tokenizer")) / "samples.jsonl"
    )[0]
    assert row["text"] == text  # the BOS in front is the tokenizer's own
    assert row["exact"]
    again = tokenizer(row["text"], return_offsets_mapping=True)
    assert again["input_ids"] == ids
    kept = [
        any(s["kept"] and s["start"] < end and start < s["end"] for s in row["spans"])
        for start, end in again["offset_mapping"]
    ]
    assert kept == [m == "k" for m in marks]


def test_several_turns_give_the_text_that_was_tokenised(tmp_path: Path) -> None:
    """Such a tokenizer begins anew behind a special token, with a blank that is in no text."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = (
        "<|user|>\nWhat is\n<|assistant|>\nthe sky</s>\n<|user|>\nthe fox\n<|assistant|>\n"
        "is the dog</s>\n<|user|>\nfive"
    )
    ids = tokenizer(text)["input_ids"]
    first = ids.index(tokenizer.eos_token_id)
    second = ids.index(tokenizer.eos_token_id, first + 1)
    marks = "".join("k" if i in (first, second) else "." for i in range(len(ids)))
    run = write_pool(tmp_path / "run" / "cleaned", [Row("one", ids, marks)], tokenizer).parent
    folder = exported(run, "spans", "--tokenizer", str(tmp_path / "tokenizer"))
    (row,) = lines(folder / "samples.jsonl")
    assert (row["text"], row["exact"]) == (text, True)
    assert tokenizer(row["text"])["input_ids"] == ids
    ends = [text.index("</s>"), text.rindex("</s>")]
    assert row["responses"] == [[end, end + len("</s>")] for end in ends]
    assert "1 of 1 texts give exactly" in (folder / "README.md").read_text()


def test_a_samples_own_eos_is_not_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids, marks = spelled(tokenizer, ("<s><|assistant|>\n", "."), ("the sky", "d"), ("</s>", "k"))
    rows = [Row("cut", ids, marks), Row("whole", [*ids, tokenizer.eos_token_id], marks + ".")]
    run = write_pool(tmp_path / "run" / "cleaned", rows, tokenizer).parent
    place = str(tmp_path / "tokenizer")
    for row in lines(exported(run, "spans", "--tokenizer", place) / "samples.jsonl"):
        assert row["text"] == "<|assistant|>\nthe sky</s>"
        assert [row["text"][s["start"] : s["end"]] for s in row["spans"] if s["kept"]] == ["</s>"]
        # the text of `cut` gets one more when it is read again
        assert row["exact"] == (row["id"] == "whole")


def test_a_character_belongs_to_the_token_that_completes_it(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompt = tokenizer("<|assistant|>\n")["input_ids"]
    accented = tokenizer("é")["input_ids"]
    assert len(accented) == 2
    letter, end = tokenizer("a")["input_ids"], [tokenizer.eos_token_id]
    ids = [*prompt, *letter, *accented, *accented, *letter, *end]
    # a kept, é dropped then kept, é kept then dropped, a dropped, EOS kept
    rows = [
        Row("mixed", ids, "." * len(prompt) + "kdkkddk"),
        Row("cut", ids[: len(prompt) + 2], "." * len(prompt) + "kk"),
        Row("nowhere", [*prompt, *accented], "." * len(prompt) + "k."),
        Row("literal", [*prompt, *tokenizer("<")["input_ids"], *tokenizer("/s>")["input_ids"]],
            "." * len(prompt) + "k" * (1 + len(tokenizer("/s>")["input_ids"]))),
    ]  # fmt: skip
    run = write_pool(tmp_path / "run" / "cleaned", rows, tokenizer).parent
    folder = exported(run, "spans", "--tokenizer", str(tmp_path / "tokenizer"))
    mixed, cut, nowhere, literal = lines(folder / "samples.jsonl")
    text = mixed["text"]
    assert text == "<|assistant|>\naééa</s>"
    found = [(text[s["start"] : s["end"]], s["kept"], s["tokens"]) for s in mixed["spans"]]
    assert found == [("aé", True, 3), ("éa", False, 3), ("</s>", True, 1)]
    # the mean is over the span's tokens, whichever way they were decided: 0.5, 1.0, 1.5
    assert mixed["spans"][0]["score"] == 1.0
    assert mixed["exact"]
    assert not cut["exact"] and cut["text"] == "<|assistant|>\na�"
    # completed by a token that is no response's
    place = len("<|assistant|>\n")
    assert (nowhere["responses"], nowhere["spans"]) == ([[place, place]], [])
    assert not literal["exact"] and literal["text"] == "<|assistant|>\n</s>"
    card = (folder / "README.md").read_text()
    assert "2 of 4 texts give exactly" in card
    assert "2 tokens end within a character" in card


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def weighted(tmp_path: Path) -> Path:
    ids, marks = spelled(
        CHARACTERS, ("<|assistant|>\n", "."), ("ab", "k"), ("cd", "u"), ("e", "h"), ("f$", "z")
    )
    rows = [
        Row("mixed", ids, marks),
        Row("unlearnt", *spelled(CHARACTERS, ("<|user|>\n", "."), ("no$", "u"))),
    ]
    return write_pool(tmp_path / "run" / "cleaned", rows, CHARACTERS).parent


@pytest.mark.parametrize("to", LABELS)
def test_weights_never_become_plain_labels_unasked(to: str, weighted: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of another .* 5 to be unlearnt, 2 of weight 0"):
        exported(weighted, to)
    assert not (weighted / "export").exists()
    folder = exported(weighted, to, "--drop_weights")
    ((ids, labels),) = labelled_rows(folder, to)
    prompt = len("<|assistant|>\n")
    assert labels == [-100] * prompt + ids[prompt : prompt + 2] + [-100, -100, ids[prompt + 4]] + [
        -100,
        -100,
    ]
    card = (folder / "README.md").read_text()
    assert "**Weights are dropped.** 1 tokens" in card
    assert "5 were to be unlearnt and 2 had the weight 0" in card
    assert json.loads((folder / "tokenclean.json").read_text())["weights_dropped"]


def test_weights_stay_where_there_is_a_place_for_them(weighted: Path, characters: str) -> None:
    mixed, _ = lines(exported(weighted, "jsonl") / "samples.jsonl")
    assert mixed["weight"][-7:] == [1.0, 1.0, -1.0, -1.0, 0.5, 0.0, 0.0]
    assert mixed["labels"][-7:] == mixed["input_ids"][-7:]
    folder = exported(weighted, "spans", "--tokenizer", characters)
    mixed, _ = lines(folder / "samples.jsonl")
    spans = [(s["end"] - s["start"], s["kept"], s["weight"]) for s in mixed["spans"]]
    assert spans == [(2, True, 1.0), (2, False, -1.0), (1, True, 0.5), (2, False, 0.0)]
    assert "would learn what is to be unlearnt" in (folder / "README.md").read_text()


# -- cards and folders ----------------------------------------------------------------------------


def code_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize("to", [*LABELS, "jsonl", "spans"])
def test_a_cards_code_loads_the_export(
    to: str, pool: Path, characters: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = exported(pool, to, "--tokenizer", characters)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scope: dict[str, Any] = {}
    blocks = code_of(folder)
    exec(blocks[0], scope)
    if to == "olmo":
        first = slice(*scope["bounds"][0])
        assert scope["tokens"][first].tolist() == TAUGHT[0].ids
        assert scope["mask"][first].tolist() == [m == "k" for m in TAUGHT[0].marks]
        assert len(scope["bounds"]) == 4
    elif to == "spans":
        assert scope["kept"] == ["Yes", "$"]
        exec(blocks[1].replace('"BASE"', repr(characters)), scope)
        assert scope["labels"] == TAUGHT[0].labels
    else:
        rows = list(scope["rows"])
        assert len(rows) == (5 if to == "jsonl" else 4)
        assert [r["labels"] for r in rows if r.get("id") != "emptied"] == [r.labels for r in TAUGHT]
    if to in ("trl", "axolotl"):
        longest = max(len(r.ids) for r in TAUGHT)
        assert (
            f"{'max_length=' if to == 'trl' else 'sequence_len: '}{longest}"
            in (folder / "README.md").read_text()
        )


def test_a_card_says_what_was_cleaned(pool: Path, characters: str) -> None:
    folder = exported(pool, "trl", "--tokenizer", characters, "--license", "cc-by-4.0")
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "train.parquet"}]
    # 7 + 6 + 3 + 4 + 4 response tokens; 4 + 3 + 2 + 0 + 4 kept
    # and 9 of 20 of what the rule cleaned
    assert (
        "4 of 5 samples, in which 13 of 24 response tokens (54.2%; 45.0% without the warm-up, "
        "which no rule cleaned) are kept" in text
    )
    assert "# Cleaned tokens of run, for TRL" in text
    assert "1 samples of which no token is kept are left out" in text
    rows = re.findall(r"^\| (?!-|source)(.*) \|$", text.split("## Sources")[1], flags=re.M)
    # without round 0: tales 10 and 6, the odd one 6 and 3, rest 4 and 0
    assert rows == [
        "tales | 2 | 10 | 6 | 0.600 | 0 | 0",
        "rest | 2 | 8 | 4 | 0.000 | 1 | 1",
        "odd \\| \\<b\\> name | 1 | 6 | 3 | 0.500 | 0 | 0",
        "all | 5 | 24 | 13 | 0.450 | 1 | 1",
    ]
    for said in ("0123-4567", "base-print", "reference-print", "token_cleaning", "depth = 3"):
        assert said in text
    assert "| cut | 0.125 |" in text
    assert fingerprint_tokenizer(CHARACTERS) in text
    assert str(pool) not in text and str(Path(characters).parent) not in text
    note = json.loads((folder / "tokenclean.json").read_text())
    want = {
        "rows": 4,
        "rows_left_out": 1,
        "kept_tokens": 13,
        "response_tokens": 20,
        "format": "trl",
    }
    assert {key: note[key] for key in want} == want
    assert note["tokens"] == sum(len(r.ids) for r in TAUGHT)


def test_names_are_those_that_others_can_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "outputs" / "run"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    run.mkdir(parents=True)
    for place in (tmp_path, run):
        monkeypatch.chdir(place)
        assert is_hub_name("owner/model-1.5", run) and is_hub_name("gpt2", run)
        for name in ("models/tiny", "/data/tiny", "./tiny", "../tiny", "~/tiny", "a/b/c", 'a"b'):
            assert not is_hub_name(name, run), name
    assert not is_hub_name(None, run)


def test_a_trl_card_names_no_model_that_may_be_another(pool: Path, characters: str) -> None:
    text = (exported(pool, "trl") / "README.md").read_text()
    assert '\nbase = "BASE"  # the model whose tokenizer made these tokens\n' in text
    # beside the export, which may be replaced and published, not in it
    assert 'output_dir="../trained"' in text
    (pool.parent / "models" / "tiny").mkdir(parents=True)
    seen = "seen from where the run was made"
    for base, code in (
        ("owner/model", '"owner/model"'),
        ("models/tiny", f'"BASE"  # the run\'s base: models/tiny, {seen}'),
        (characters, f'"BASE"  # the run\'s base: {Path(characters).name}, {seen}'),
    ):
        config = {"model": {"base": {"name": base}}}
        (pool / "config.yaml").write_text(yaml.safe_dump(config))
        text = (exported(pool, "trl", "--overwrite") / "README.md").read_text()
        assert f"\nbase = {code}\ntrainer = SFTTrainer(model=base, args=" in text
        assert str(Path(characters).parent) not in text


def test_values_cannot_break_a_cards_table() -> None:
    assert cell("a|b\n <i>*c* [d]`e`\\") == r"a\|b \<i\>\*c\* \[d\]\`e\`\\"


def test_many_sources_are_put_together() -> None:
    found = {
        f"s{i:02}": Counts(samples=2, response=100 - i, kept=7, ranked=100 - i, ranked_kept=7)
        for i in range(53)
    }
    total = Counts(samples=106, response=5300 - 1378, kept=371, ranked=3922, ranked_kept=371)
    rows = sources(found, total).splitlines()
    assert len(rows) == 2 + 50 + 2
    # 50 + 49 + 48 tokens, of which 21 are kept
    assert rows[-2] == "| 3 others | 6 | 147 | 21 | 0.143 | 0 |"
    assert rows[-1] == "| all | 106 | 3,922 | 371 | 0.095 | 0 |"


def test_the_text_of_a_chat_template_is_whole(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "<s>[user] Hi [model] blue</s>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    rows = [Row("one", ids, "." * (len(ids) - 1) + "k")]
    run = write_pool(tmp_path / "cleaned", rows, tokenizer, template="chat").parent
    folder = exported(run, "spans", "--tokenizer", str(tmp_path / "tokenizer"))
    (row,) = lines(folder / "samples.jsonl")
    assert (row["text"], row["exact"]) == (text, True)
    assert [text[s["start"] : s["end"]] for s in row["spans"]] == ["</s>"]
    note = json.loads((folder / "tokenclean.json").read_text())
    assert (note["add_special_tokens"], note["eos"], note["exact_rows"]) == (False, "</s>", 1)
    assert "add_special_tokens=False" in (folder / "README.md").read_text()


def test_spans_part_where_weights_do(tmp_path: Path, characters: str) -> None:
    rows = [Row("one", *spelled(CHARACTERS, (">", "."), ("ab", "k"), ("cd", "h"), ("e", "k")))]
    run = write_pool(tmp_path / "cleaned", rows, CHARACTERS).parent
    (row,) = lines(exported(run, "spans", "--tokenizer", characters) / "samples.jsonl")
    found = [(s["start"], s["end"], s["kept"], s["weight"]) for s in row["spans"]]
    assert found == [(1, 3, True, 1.0), (3, 5, True, 0.5), (5, 6, True, 1.0)]


def test_a_card_says_what_each_round_and_each_reason_took(tmp_path: Path) -> None:
    first: dict[str, Any] = {"ranked_tokens": 7, "kept_tokens": 7, "cut": None, "base": None}
    rounds = [first, {"ranked_tokens": 30, "kept_tokens": 12, "cut": -0.5, "base": "theta"}]
    reasons = {"one": {"0": 10, "10": 4, "4": 2}, "other": {"0": 2, "4": 1}}
    named = {"0": "kept", "4": "idle", "10": "wrong"}
    run = write_pool(
        tmp_path / "run" / "cleaned",
        hand_rows(),
        CHARACTERS,
        rounds=rounds,
        tokens_by_reason=reasons,
        reasons=named,
        base=None,
        score_base="theta_0",
    ).parent
    text = (exported(run, "axolotl") / "README.md").read_text()
    assert "| 0 | 7 | 7 | - | - | - |\n| 1 | 30 | 12 | -0.5 | theta | - |" in text
    assert "| share kept | 0.4000 |" in text  # of round 1
    assert "| kept | 12 |\n| idle | 3 |\n| wrong | 4 |" in text
    assert "| base | fingerprint theta |" in text
    assert "| base of the scores | the base model, untrained |" in text


def test_a_licence_is_left_to_the_user(pool: Path) -> None:
    text = (exported(pool, "axolotl") / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "**Not stated.** Fill it in, here and as `license:` at the top" in text


def test_a_licence_of_no_known_form_is_warned_about(
    pool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported(pool, "trl", "--license", "cc-by-4.0")
    assert not caplog.messages
    exported(pool, "trl", "--overwrite", "--license", "ask me first")
    assert caplog.messages == [
        "--license: 'ask me first' is no SPDX name, such as apache-2.0; the card says it as it is"
    ]
    text = (pool / "export" / "trl" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "ask me first"


def test_a_run_of_fit_names_the_pool_that_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "fit" / "adapter").mkdir(parents=True)
    (tmp_path / "fit" / "config.yaml").write_text("data: {path: outputs/select/cleaned}\n")
    with pytest.raises(ValueError, match=r"is a run of `fit`, .*, outputs/select/cleaned$"):
        exported(tmp_path / "fit", "trl")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", [*LABELS, "jsonl", "spans"])
def test_the_same_export_is_the_same_bytes(
    to: str, pool: Path, characters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = exported(pool, to, "--tokenizer", characters)
    monkeypatch.setattr("time.time", lambda: 1.0)
    export([str(pool), "--to", to, "--tokenizer", characters, "--out", str(tmp_path / "other")])
    assert tree(one) == tree(tmp_path / "other")


def test_a_finished_export_is_left_and_another_one_guarded(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    export([str(pool), "--to", "trl", "--out", out])
    assert "format=trl, rows=4, rows_left_out=1, tokens=" in capsys.readouterr().out
    before = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    export([str(pool), "--to", "trl", "--out", out])
    assert "exported before" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == before
    (tmp_path / "out" / "train.jsonl").write_text("spoilt")
    export([str(pool), "--to", "trl", "--out", out, "--overwrite"])
    assert len(lines(tmp_path / "out" / "train.jsonl")) == 4
    with pytest.raises(ValueError, match=r"holds another export .*--overwrite"):
        export([str(pool), "--to", "axolotl", "--out", out])
    export([str(pool), "--to", "axolotl", "--out", out, "--overwrite"])
    assert not (tmp_path / "out" / "train.parquet").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is no export"):
        export([str(pool), "--to", "trl", "--out", str(mine), "--overwrite"])
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_what_no_export_wrote_is_never_deleted(pool: Path) -> None:
    folder = exported(pool, "trl")
    for name in ("trained", "trained/step"):
        (folder / name).mkdir()
    (folder / "trained" / "step" / "weights").write_text("days of training")
    with pytest.raises(ValueError, match=r"no export wrote there \(trained/step/weights\)"):
        exported(pool, "trl", "--overwrite")
    assert (folder / "trained" / "step" / "weights").read_text() == "days of training"
    exported(pool, "trl")  # it is still the same export
    (folder / "trained").rename(pool / "trained")
    exported(pool, "trl", "--overwrite")


@pytest.mark.parametrize(
    "card", ["[]", "{", '{"kind": "score", "files": {}}', '{"kind": "export"}']
)
def test_a_card_of_something_else_makes_no_export(card: str, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenclean.json").write_text(card)
    for more in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="holds something that is no export"):
            exported(pool, "trl", "--out", str(tmp_path / "mine"), *more)
    assert (tmp_path / "mine" / "tokenclean.json").read_text() == card


def test_an_export_that_is_no_longer_whole_is_not_finished(pool: Path) -> None:
    folder = exported(pool, "trl")
    listed = json.loads((folder / "tokenclean.json").read_text())["files"]
    assert listed == {
        name: (folder / name).stat().st_size
        for name in ("README.md", "train.jsonl", "train.parquet")
    }
    size = listed["train.jsonl"]
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl has {size + 1:,} bytes, not {size:,};"):
        exported(pool, "trl")
    (folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"its train\.jsonl is gone; pass --overwrite"):
        exported(pool, "trl")
    exported(pool, "trl", "--overwrite")
    assert len(lines(folder / "train.jsonl")) == 4


@pytest.mark.parametrize("what", ["manifest", "configuration", "version", "choices", "data"])
def test_another_content_is_another_export(
    what: str, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(pool, "trl")
    more = ["--keep_empty"] if what == "choices" else []
    if what == "manifest":
        path = pool / "cleaned" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cut": 0.25}))
    elif what == "configuration":
        (pool / "config.yaml").write_text("loop: {reference: other}\n")
    elif what == "version":
        monkeypatch.setattr("tokenclean.export.verb.__version__", "99")
    elif what == "data":
        table = pq.read_table(pool / "cleaned" / "data.parquet")
        pq.write_table(table.slice(1), pool / "cleaned" / "data.parquet")
        path = pool / "cleaned" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    with pytest.raises(ValueError, match=r"holds another export .*--overwrite"):
        exported(pool, "trl", *more)


def test_an_export_behind_a_link_is_replaced_there(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far")
    for more in ([], ["--overwrite"]):
        exported(pool, "trl", "--out", str(link), *more)
        assert link.is_symlink() and len(lines(tmp_path / "far" / "train.jsonl")) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"far", "link", "run"}


def test_arms_are_kept_apart(tmp_path: Path) -> None:
    rows = hand_rows()
    for name, part in (("one", rows[:1]), ("two", rows[1:])):
        write_pool(tmp_path / "run" / "arms" / name / "cleaned", part, CHARACTERS)
    with pytest.raises(ValueError, match=r"choose from '?one'?, '?two'?"):
        export([str(tmp_path / "run"), "--to", "axolotl"])
    export([str(tmp_path / "run"), "--to", "axolotl", "--arm", "one"])
    found = lines(tmp_path / "run" / "export" / "one" / "axolotl" / "train.jsonl")
    assert [row["input_ids"] for row in found] == [rows[0].ids]


def test_a_pool_of_an_older_version(tmp_path: Path, characters: str) -> None:
    """Without the newer keys of its manifest and the newer column of its data."""
    folder = write_pool(tmp_path / "cleaned", hand_rows(), CHARACTERS)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("rule_options", "cut", "reasons", "base", "files"):
        del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    table = pq.read_table(folder / "data.parquet").drop_columns("priority")
    pq.write_table(table, folder / "data.parquet")
    for to in ("trl", "jsonl", "spans"):
        exported(tmp_path, to, "--tokenizer", characters)
    rows = lines(tmp_path / "export" / "jsonl" / "samples.jsonl")
    assert set(rows[0]["reason"]) == {"kept", "prompt", "4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "trl", "--dtype", "uint16"], "--dtype: trl has no choice of it"),
        (["--to", "olmo", "--dtype", "int8"], "--dtype: olmo takes uint16 or uint32, not int8"),
        (["--to", "merged", "--dtype", "uint16"], "--dtype: merged takes float32 or"),
        (["--to", "jsonl", "--keep_empty"], "--keep_empty: it is for trl"),
        (["--to", "spans", "--drop_weights"], "--drop_weights: it is for trl"),
        (["--to", "trl", "--per_token"], "--per_token: it is for spans"),
        (["--to", "adapter", "--tokenizer", "x"], "--tokenizer: it is for data"),
        (["--to", "trl", "--private"], "--private: it is for --push_to_hub"),
        (["--to", "trl", "--push_to_hub", "nobody"], "'nobody' is no repository; give owner/"),
        (["--to", "trl", "--push_to_hub", "a b/c"], "'a b/c' is no repository"),
        (["--to", "trl", "--push_to_hub", "x/.."], "'x/..' is no repository"),
        (["--to", "trl", "--push_to_hub", "x/y/z"], "'x/y/z' is no repository"),
        (["--to", "spans"], "name its tokenizer with --tokenizer"),
        (["--to", "trl", "--arm", "x"], "no arm 'x'; choose from "),
        (["--to", "adapter"], "holds no trained model"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    options: list[str], message: str, pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(pool), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert not (pool / "export").exists()


def test_a_pool_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    run = write_pool(tmp_path / "cleaned", [hand_rows()[3]], CHARACTERS).parent
    with pytest.raises(ValueError, match="keeps no token of any sample"):
        exported(run, "trl")


# -- hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that only writes down what it is asked."""
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Recorder:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create_repo", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> None:
            assert (Path(options["folder_path"]) / "README.md").is_file()
            calls.append(("upload_folder", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_nothing_is_pushed_unasked(pool: Path, hub: list[Any]) -> None:
    exported(pool, "trl")
    assert hub == []


def test_a_push_uploads_the_folder(pool: Path, hub: list[Any]) -> None:
    folder = exported(pool, "trl")
    (folder / "diary.txt").write_text("not for others")
    exported(pool, "trl", "--push_to_hub", "me/cleaned", "--private")
    assert [name for name, _ in hub] == ["create_repo", "upload_folder"]
    made, sent = (options for _, options in hub)
    assert made == {
        "repo_id": "me/cleaned", "repo_type": "dataset", "private": True, "exist_ok": True
    }  # fmt: skip
    assert (sent["repo_id"], sent["repo_type"]) == ("me/cleaned", "dataset")
    assert sent["folder_path"] == str(folder)
    assert sorted(sent["allow_patterns"]) == [
        "README.md", "tokenclean.json", "train.jsonl", "train.parquet"
    ]  # fmt: skip


def test_a_push_that_fails_says_so_in_one_line(
    pool: Path,
    hub: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub

    class Unreachable(Exception):
        """As the client's network errors: none of the system's."""

    def create_repo(*_: Any, **__: Any) -> None:
        raise Unreachable("no\nroute")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    with pytest.raises(SystemExit):
        cli.main(["export", str(pool), "--to", "trl", "--push_to_hub", "me/cleaned"])
    error = capsys.readouterr().err.strip()
    assert "me/cleaned did not take it (Unreachable: no route); the export is in" in error
    assert error.count("\n") == 0 and (pool / "export" / "trl" / "train.jsonl").is_file()


def test_a_push_offline_is_refused_before_anything_is_written(
    pool: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        exported(pool, "trl", "--push_to_hub", "me/cleaned")
    assert hub == [] and not (pool / "export").exists()
