"""Samples that come as tokens: what they say is what is trained on, scored and counted."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    conversation,
    sentencepiece_tokenizer,
    write_jsonl,
)

from tokenclean import cli
from tokenclean.commands import fit_costs
from tokenclean.data.cleaned import DATA, cleaned_schema, write_cleaned_pool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.formats import BadLine, Reader
from tokenclean.data.pool import BadData, TokenPool, build_pool, open_pool
from tokenclean.data.pretokenised import BadRow, read_tokens
from tokenclean.data.rows import TokenRows
from tokenclean.data.spans import encode_spans, read_spans
from tokenclean.data.template import Tokeniser, fingerprint_tokenizer
from tokenclean.publish import MANIFEST
from tokenclean.scoring.table import ScoreTable

NO = -100


def read(row: dict[str, Any], vocabulary: int | None = 100) -> dict[str, list[Any]]:
    tokens = read_tokens(row, vocabulary)
    assert tokens.input_ids.dtype == tokens.labels.dtype == np.int32
    assert tokens.response_mask.dtype == bool and tokens.weight.dtype == np.float32
    return {
        "ids": tokens.input_ids.tolist(),
        "response": np.flatnonzero(tokens.response_mask).tolist(),
        "labels": tokens.labels.tolist(),
        "weight": tokens.weight.tolist(),
    }


# -- one row --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "response", "learnt"),
    [
        ({"labels": [NO, NO, 13, NO, 15]}, [2, 4], [2, 4]),
        ({"labels": [NO] * 5}, [], []),
        ({"labels": [11, 12, 13, 14, 15]}, [1, 2, 3, 4], [1, 2, 3, 4]),  # never the first
        ({"response_mask": [0, 0, 1, 1, 1]}, [2, 3, 4], [2, 3, 4]),
        ({"response_mask": [True, False, True, False, True]}, [2, 4], [2, 4]),
        ({"assistant_masks": [0, 0, 0, 1, 0]}, [3], [3]),
        ({"labels": [NO, NO, 13, NO, NO], "response_mask": [0, 0, 1, 1, 1]}, [2, 3, 4], [2]),
        ({"labels": [11, NO, 13, NO, NO], "response_mask": [0, 0, 1, 0, 0]}, [2], [2]),
        ({"labels": [NO, NO, 13, NO, NO], "assistant_masks": [0, 0, 1, 0, 0]}, [2], [2]),
        (
            {"response_mask": [0, 1, 1, 1, 1], "assistant_masks": [0, 0, 0, 1, 1]},
            [1, 2, 3, 4],
            [3, 4],
        ),
        ({"labels": None, "response_mask": [0, 0, 1, 0, 0], "attention_mask": None}, [2], [2]),
        ({"labels": [NO, NO, 13, NO, NO], "weight": [0, 0, 0.0, 0, 0]}, [2], []),
    ],
)
def test_what_is_response_and_what_is_learnt(
    columns: dict[str, Any], response: list[int], learnt: list[int]
) -> None:
    found = read({"input_ids": [11, 12, 13, 14, 15], **columns})
    assert found["response"] == response
    assert found["labels"] == [i + 11 if i in learnt else NO for i in range(5)]


def test_weights_belong_to_labels() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, NO, 4], "weight": [7.0, -1, None, 0.1]}
    assert read(row)["weight"] == [1.0, -1.0, 1.0, np.float32(0.1)]


def test_padding_at_the_end_is_cut() -> None:
    row = {
        "input_ids": [1, 2, 3, 999, 999],
        "attention_mask": [1, 1, 1, 0, 0],
        "labels": [NO, NO, 3, NO, 999],
        "weight": [1, 1, 2.5, 0, 0],
        "response_mask": [0, 0, 1, 1, 1],
    }
    assert read(row) == {
        "ids": [1, 2, 3],
        "response": [2],
        "labels": [NO, NO, 3],
        "weight": [1.0, 1.0, 2.5],
    }


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"labels": [NO, 3, 1]}, "label 1 is 3: neither the token's id, 2, nor -100 (labels are"),
        ({"labels": [-1, 2, 3]}, "label 0 is -1: neither"),
        ({"labels": [NO, 2]}, "`labels` has 2 entries for 3 tokens"),
        ({"labels": [NO, 2.0, 3]}, "`labels` holds 2.0 at token 1, no whole number"),
        ({"labels": [NO, None, 3]}, "`labels` holds None at token 1, no whole number"),
        ({"labels": "x"}, "`labels` is str"),
        ({"labels": None}, "none of `labels`, `response_mask`, `assistant_masks` beside"),
        ({"response_mask": [0, 2, 1]}, "`response_mask` holds 2, neither 0 nor 1"),
        ({"response_mask": [0, 1]}, "`response_mask` has 2 entries for 3 tokens"),
        (
            {"labels": [NO, 2, 3], "response_mask": [0, 0, 1]},
            "token 1 has a label, but `response_mask` leaves it out",
        ),
        (
            {"labels": [NO, 2, 3], "assistant_masks": [0, 1, 0]},
            "token 2 has a label, but `assistant_masks` leaves it out",
        ),
        (
            {"assistant_masks": [0, 1, 0], "response_mask": [0, 0, 1]},
            "`assistant_masks` has token 1, but `response_mask` leaves it out",
        ),
        (
            {"labels": [NO, 2, 3], "attention_mask": [0, 1, 1]},
            "`attention_mask` is 0 at token 0 and 1 after it; only padding at the end can be cut",
        ),
        ({"labels": [NO, 2, 3], "attention_mask": [1, 0, 1]}, "`attention_mask` is 0 at token 1"),
        ({"labels": [NO, 2, 3], "attention_mask": [0, 0, 0]}, "`input_ids` is empty"),
        ({"input_ids": [], "labels": []}, "`input_ids` is empty"),
        ({"input_ids": None, "labels": []}, "`input_ids` is null"),
        ({"input_ids": [1, 100, 3], "labels": [NO] * 3}, "token 1 is 100, which is no id of the"),
        ({"input_ids": [1, 2, -3], "labels": [NO] * 3}, "token 2 is -3, which is no id"),
        ({"input_ids": [1, "2", 3], "labels": [NO] * 3}, "`input_ids` holds '2' at token 1"),
        ({"input_ids": [1, 2**70, 3], "labels": [NO] * 3}, "`input_ids` holds a number of more"),
        ({"labels": [NO, 2, 3], "weight": [1, 1]}, "`weight` is no list of 3 numbers"),
        (
            {"labels": [NO, 2, 3], "weight": [1, None, 1]},
            "the weight of token 1, which has a label",
        ),
        ({"labels": [NO, 2, 3], "weight": [1, float("inf"), 1]}, "the weight of token 1"),
        ({"labels": [NO, 2, 3], "weight": [1, 1e300, 1]}, "the weight of token 1, which"),
        ({"labels": [NO, 2, 3], "weight": [1, 10**400, 1]}, "`weight` holds too large a number"),
        ({"labels": [NO, "x" * 99, 3]}, "`labels` holds '" + "x" * 76 + "... at token 1"),
        ({"labels": [NO, 2, 3], "weight": [1, "1", 1]}, "`weight` holds something that is no"),
        ({"labels": [NO, 2, 3], "truth": [0, 1]}, "`truth` has 2 entries for 3 tokens"),
        ({"labels": [NO, 2, 3], "truth": [0, 1, 5]}, "`truth` is 5, not -1, 0 or 1"),
    ],
)
def test_rows_that_contradict_themselves(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match="^" + re.escape(reason)):
        read_tokens({"input_ids": [1, 2, 3], **columns}, 100)


# -- pools ----------------------------------------------------------------------------------------


def ids_of(text: str) -> list[int]:
    ids: list[int] = character_tokenizer()(text)["input_ids"]
    return ids


def tokens_row(prompt: str, response: str, kept: str = "", **columns: Any) -> dict[str, Any]:
    """A row of characters; ``kept`` marks the response's labels with `x` (default: all)."""
    ids = ids_of(prompt + response)
    marks = " " * len(prompt) + (kept or "x" * len(response))
    labels = [i if mark == "x" else NO for i, mark in zip(ids, marks, strict=True)]
    mask = [0] * len(prompt) + [1] * len(response)
    return {"input_ids": ids, "labels": labels, "response_mask": mask, **columns}


def build(path: Path, out: Path, **options: Any) -> TokenPool:
    tokeniser = Tokeniser(character_tokenizer(), max_length=options.pop("max_length", 2048))
    reader = {k: options.pop(k) for k in ("order_column",) if k in options}
    build_pool(Reader([str(path)], **reader), tokeniser, out, **options)
    return open_pool(out / "train")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "folder"])
def test_a_pool_of_tokens(suffix: str, tmp_path: Path) -> None:
    rows = [
        tokens_row("ab", "cdef", "x x ", id="one", source="s", rating=2, truth=[0, 0, 1, 0, -1, 1]),
        tokens_row("ab", "cd", "  ", id="two", source="t", rating=1, truth=[0, 1, 1, 1]),
        tokens_row("ab", "", id="none", source="t", rating=0, truth=[0, 0]),
    ]
    path = tmp_path / f"f.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    pool = build(path, tmp_path / "out", order_column="rating")
    assert list(pool.ids) == ["one", "two"] and list(pool.sources) == ["s", "t"]
    assert pool.has_labels and pool.has_truth and pool.order().tolist() == [2.0, 1.0]
    assert pool.truth is not None
    assert pool.truth[0].tolist() == [0, 0, 1, 0, -1, 1]
    assert pool.truth[1].tolist() == [0, 0, 1, 1]  # 0 outside of the response
    labels = pool.lists("labels")
    assert labels[0].tolist() == [NO, NO, ids_of("c")[0], NO, ids_of("e")[0], NO]
    assert labels[1].tolist() == [NO] * 4
    assert pool.lists("weight")[0].tolist() == [1.0] * 6
    assert pool.manifest["statistics"]["t"]["without_response"] == 1
    # scoring and cleaning look at responses, training at labels
    scored, trained = TokenRows(pool), TokenRows(pool, labels=True)
    assert scored.counts.tolist() == [4, 2] and trained.counts.tolist() == [2, 0]
    assert scored.lengths.tolist() == [5, 3] and trained.lengths.tolist() == [4, 0]
    assert trained.responses.tolist() == [4, 2]
    assert trained[0].positions.tolist() == [2, 4] and scored[0].positions.tolist() == [2, 3, 4, 5]
    assert trained.ids_with_targets() == ["one"]


def test_made_ids_and_sources_and_truncation(tmp_path: Path) -> None:
    rows = [tokens_row("ab", "cdef"), tokens_row("abcd", "ef"), tokens_row("a", "b")]
    pool = build(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "out", max_length=4)
    assert list(pool.ids) == ["f-1", "f-3"] and set(pool.sources) == {"f"}
    assert pool.input_ids[0].tolist() == ids_of("abcd")
    assert pool.lists("labels")[0].tolist() == [NO, NO, *ids_of("cd")]
    found = pool.manifest["statistics"]["f"]
    assert found["truncated"] == 2 and found["response_tokens_cut"] == 2 + 2
    assert found["without_response"] == 1 and found["completion_length"] == 4 + 1


def test_bad_rows_are_listed_with_their_lines(tmp_path: Path) -> None:
    rows = [
        tokens_row("ab", "cd", id="a"),
        {"input_ids": [2, 3], "labels": [3, NO], "id": "b"},
        {"input_ids": [2, 500], "labels": [NO, 500], "id": "c"},
        {"messages": [], "id": "d"},
        tokens_row("ab", "cd", id="e"),
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(BadData) as error:
        build(path, tmp_path / "out")
    lines = str(error.value).splitlines()
    assert [line.partition("f.jsonl:")[2].partition(",")[0] for line in lines[1:-1]] == [
        "2: label 0 is 3: neither the token's id",
        "3: token 1 is 500",
        "4: `input_ids` is null",
    ]
    pool = build(path, tmp_path / "out", on_bad_line="skip")
    assert list(pool.ids) == ["a", "e"]
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 3
    write_jsonl(path, [rows[0], rows[0]])
    with pytest.raises(BadData, match=r"1 id\(s\) occur more than once, e\.g\. a;"):
        build(path, tmp_path / "twice")


def test_ids_alone_are_no_sample(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"input_ids": [2, 3]}])
    with pytest.raises(BadData, match=r"input_ids\+labels\|response_mask\|assistant_masks"):
        build(path, tmp_path / "out")


def test_tokens_and_conversations_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [tokens_row("ab", "cd")])
    write_jsonl(tmp_path / "in" / "b.jsonl", [conversation("q", "r")])
    with pytest.raises(BadData, match=r"'b-1': either every sample of a pool comes as tokens or"):
        build(tmp_path / "in", tmp_path / "out")


def test_a_conversation_goes_before_tokens_of_nobody_knows_whom(tmp_path: Path) -> None:
    talk, tokens = conversation("ab", "cd"), tokens_row("ab", "cd", "x ")
    text = {"text": "abcd", "responses": [[2, 4]], "spans": []}
    nothing = {"input_ids": None, "labels": None, "text": None}
    for row, shape in (
        ({**talk, **nothing}, "messages"),
        ({**talk, **tokens}, "messages"),
        ({**talk, **text}, "messages"),
        ({"prompt": "ab", "completion": "cd", **tokens}, "prompt/completion"),
        ({**tokens, "messages": None, "text": None}, "tokens"),
        ({**tokens, "prompt": "ab"}, "tokens"),
        ({**text, "messages": None, "input_ids": None, "labels": None}, "text/spans"),
    ):
        path = write_jsonl(tmp_path / "f.jsonl", [row])
        reader = Reader([str(path)])
        (sample,) = reader
        assert reader.shapes == {str(path): shape}
        assert hasattr(sample, "messages") == (shape in ("messages", "prompt/completion"))
    # an export says whose they are
    path = write_jsonl(tmp_path / "f.jsonl", [{**talk, **tokens}])
    card(tmp_path, character_tokenizer(), format="jsonl", data=["f.jsonl"])
    reader = Reader([str(tmp_path)])
    list(reader)
    assert reader.shapes == {str(path): "tokens"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None, "input_ids": None, "labels": None}, "`messages` is null"),
        ({"input_ids": None, "labels": [1]}, "`input_ids` is null"),
        ({"input_ids": [1], "labels": None}, "none of `labels`"),
        ({"text": None, "responses": [], "spans": []}, "`text` is null"),
        ({"input_ids": [1]}, "columns ['input_ids'] match no known shape"),
        ({"x" * 10**6: 1}, "columns ['" + "x" * 75 + "... match no known shape"),
    ],
)
def test_nulls_are_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (bad,) = Reader([str(write_jsonl(tmp_path / "f.jsonl", [row]))])
    assert isinstance(bad, BadLine) and bad.reason.startswith(reason)


def test_the_validation_loss_is_that_of_the_labels(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what is masked, weightless or to be unlearnt; and so an estimate counts."""
    tokenizer = byte_level_tokenizer()
    ids: list[int] = tokenizer("<|user|>\nthe sky\n<|assistant|>\nis blue")["input_ids"]
    size = len(ids)
    assert size > 8

    def row(name: str, places: dict[int, float]) -> dict[str, Any]:
        return {
            "id": name,
            "input_ids": ids,
            "labels": [i if at in places else NO for at, i in enumerate(ids)],
            "response_mask": [int(at > 2) for at in range(size)],
            "weight": [places.get(at, 1.0) for at in range(size)],
        }

    rows = [row("a", {3: 1.0, 5: 0.25, 6: -1.0, 7: 0.0}), row("b", {4: -1.0}), row("c", {4: 2.0})]
    held = str(write_jsonl(tmp_path / "held.jsonl", rows))
    data = str(write_jsonl(tmp_path / "data.jsonl", [row("d", {3: 1.0, 4: 0.5}), row("e", {3: 1})]))
    cache = str(tmp_path / "cache")
    module = TuluDataModule(data, validation_path=held, cache_dir=cache)
    module.use_tokenizer(tokenizer)
    module.prepare_data()
    module.setup("fit")
    batches = list(module.val_dataloader())
    assert sum(len(batch.targets) for batch in batches) == 3
    assert sorted(row for batch in batches for row in batch.rows) == [0, 2]
    sample = module.validated_rows()[0]
    assert sample.positions.tolist() == [3, 5] and sample.length == 5
    assert module.validated_rows().lengths.tolist()[1] == 0
    # two labels and one, and once through the three of the validation pool
    options = ["--model.base.name", str(model_folder), "--data.path", data]
    options += ["--data.validation_path", held, "--data.cache_dir", cache]
    options += ["--outputs", str(tmp_path / "out"), "--trainer.accelerator", "cpu"]
    monkeypatch.setattr("tokenclean.plan.matmul_rate", lambda *_: 1e9)
    costs = fit_costs([*options, "--trainer.max_epochs", "1"])
    (train,) = [cost for cost in costs if cost.stage == "train"]
    assert train.targets == 3 + 3
    assert train.samples == 2 + 2
    nothing = str(write_jsonl(tmp_path / "nothing.jsonl", rows[1:2]))
    module = TuluDataModule(data, validation_path=nothing, cache_dir=cache)
    module.use_tokenizer(tokenizer)
    module.prepare_data()
    with pytest.raises(
        ValueError, match=r"^data\.validation_path: no label of .*nothing\.jsonl has"
    ):
        module.setup("fit")


def test_a_pad_token_of_its_own_is_no_id_of_a_text(tmp_path: Path) -> None:
    """It may have no embedding; as the end of a text (pad = EOS) it is one."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    last = max(tokenizer.get_vocab().values())
    row = {"input_ids": [5, 6, last], "labels": [NO, 6, last]}
    path = write_jsonl(tmp_path / "f.jsonl", [row])
    with pytest.raises(BadData, match=f"token 2 is {last}, which is no id of the tokenizer's"):
        build_pool(Reader([str(path)]), Tokeniser(tokenizer), tmp_path / "out")
    tokenizer.eos_token = "[PAD]"
    build_pool(Reader([str(path)]), Tokeniser(tokenizer), tmp_path / "out")
    assert open_pool(tmp_path / "out" / "train").input_ids[0].tolist() == [5, 6, last]


# -- exports read back ----------------------------------------------------------------------------


def card(folder: Path, tokenizer: Any, **facts: Any) -> None:
    content = {"kind": "export", "version": 1, "tokenizer": fingerprint_tokenizer(tokenizer)}
    (folder / "tokenclean.json").write_text(json.dumps({**content, **facts}))
    (folder / "README.md").write_text("# A card\n")


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["response_mask"] = [int(x) for x in row["response_mask"]]
    write_jsonl(folder / "samples.jsonl", rows)
    card(folder, byte_level_tokenizer(), format="jsonl", data=["samples.jsonl"])


def as_trl(folder: Path, rows: list[dict[str, Any]]) -> None:
    found = [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "assistant_masks": [int(x != NO) for x in row["labels"]],
        }
        for row in rows
    ]
    write_jsonl(folder / "train.jsonl", found)
    pq.write_table(pa.Table.from_pylist(found), folder / "train.parquet")
    facts = {"data": ["train.jsonl"], "others": ["train.parquet"]}
    card(folder, byte_level_tokenizer(), format="trl", **facts)


def as_axolotl(folder: Path, rows: list[dict[str, Any]]) -> None:
    found = [
        {**{k: row[k] for k in ("input_ids", "labels")}, "attention_mask": [1] * len(row["labels"])}
        for row in rows
    ]
    write_jsonl(folder / "train.jsonl", found)
    card(folder, byte_level_tokenizer(), format="axolotl", data=["train.jsonl"])


def as_llamafactory(folder: Path, rows: list[dict[str, Any]]) -> None:
    found = [
        {**{k: row[k] for k in ("input_ids", "labels")}, "attention_mask": [1] * len(row["labels"])}
        for row in rows
    ]
    split = datasets.Dataset.from_list(found)
    datasets.DatasetDict({"train": split}).save_to_disk(str(folder))
    card(folder, byte_level_tokenizer(), format="llamafactory", data=["train"])


def as_olmo(folder: Path, rows: list[dict[str, Any]], dtype: str = "uint16") -> None:
    names = []
    for part, chosen in enumerate((rows[:25], rows[25:])):
        names.append(f"token_ids_part_{part:04d}.npy")
        ids = [i for row in chosen for i in row["input_ids"]]
        array = np.array(ids, dtype="<u2" if dtype == "uint16" else "<u4")
        (folder / names[-1]).write_bytes(array.tobytes())
        mask = [x != NO for row in chosen for x in row["labels"]]
        (folder / f"labels_mask_part_{part:04d}.npy").write_bytes(bytes(mask))
        stops = np.cumsum([len(row["input_ids"]) for row in chosen]).tolist()
        bounds = "".join(f"{a},{b}\n" for a, b in zip([0, *stops], stops, strict=False))
        with gzip.open(folder / f"token_ids_part_{part:04d}.csv.gz", "wt") as file:
            file.write(bounds)
    card(folder, byte_level_tokenizer(), format="olmo", data=names, dtype=dtype)


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The cleaned pool's own file, by itself."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")


@pytest.fixture
def cleaned(pool_file: Path, tmp_path: Path) -> Path:
    """Forty rows of which every third response token is kept, and row 7 loses everything."""
    build_pool(
        Reader([str(pool_file)]),
        Tokeniser(byte_level_tokenizer(), max_length=96),
        tmp_path / "pool",
    )
    pool = open_pool(tmp_path / "pool" / "train")
    rows = []
    for i in range(40):
        ids, response = pool.input_ids[i], pool.response_mask[i]
        places = np.flatnonzero(response)[i % 3 :: 3][: 0 if i == 7 else None]
        labels = np.full(len(ids), NO, dtype=np.int32)
        labels[places] = ids[places]
        weight = np.ones(len(ids), dtype=np.float32)
        weight[places] = np.resize(np.array([1.0, 0.25, -1.0], dtype=np.float32), len(places))
        nothing: Any = [None] * len(ids)
        columns = {"input_ids": ids, "labels": labels, "response_mask": response}
        columns |= dict.fromkeys(("base_nll", "reference_nll", "score", "priority"), nothing)
        columns |= {"reason": np.where(response, np.where(labels == NO, 2, 0), 1)}
        facts = {"id": pool.ids[i], "source": pool.sources[i], "round": 1}
        rows.append({**facts, **columns, "weight": weight})
    schema = cleaned_schema(with_truth=False)
    batch = pa.RecordBatch.from_pylist(rows, schema=schema)
    known = ("tokenizer", "vocabulary", "template", "max_length", "eos_id")
    manifest = {
        **{key: pool.manifest[key] for key in known},
        "pool": pool.fingerprint,
        "base": "b",
        "reference": "r",
        "seed": 0,
        "selection": {"rule": "forgetting", "keep": 0.7, "scope": "global"},
        "ranked_tokens": 400,
        "kept_tokens": 100,
        "response_tokens": 400,
        "reasons": {"0": "kept", "1": "prompt", "2": "below the cut"},
    }
    write_cleaned_pool(tmp_path / "cleaned", [batch], schema, manifest)
    return tmp_path / "cleaned"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / DATA).to_pylist()
    return rows


def opened(path: Path, tmp_path: Path, tokenizer: Any = None) -> TuluDataModule:
    module = TuluDataModule(str(path), max_length=96, cache_dir=str(tmp_path / "cache"))
    module.use_tokenizer(tokenizer or byte_level_tokenizer())
    module.prepare_data()
    module.setup("fit")
    return module


LABELS_ALONE = [as_trl, as_axolotl, as_llamafactory, as_olmo]


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, *LABELS_ALONE])
def test_an_export_trains_what_the_cleaned_pool_trains(
    write: Callable[..., None], cleaned: Path, tmp_path: Path
) -> None:
    """The same tokens in the same rows; weights and emptied rows where the format has them."""
    folder = tmp_path / "export"
    folder.mkdir()
    write(folder, rows_of(cleaned))
    theirs = opened(folder, tmp_path).trained_rows()
    ours = opened(cleaned, tmp_path).trained_rows()
    alone = write in LABELS_ALONE
    chosen = [i for i in range(40) if i != 7 or not alone]
    assert len(theirs) == len(chosen)
    for index, row in enumerate(chosen):
        one, other = ours[row], theirs[index]
        assert other.input_ids.tolist() == one.input_ids.tolist()
        assert other.positions.tolist() == one.positions.tolist()
        assert other.length == one.length
        want = np.ones(len(one.positions)) if alone else one.weights
        assert other.weights.tolist() == want.tolist()
    if not alone:
        assert theirs.negative.tolist() == ours.negative.tolist() and ours.negative.sum() > 30
        assert theirs.responses.tolist() == ours.responses.tolist()
        assert list(theirs.table.texts("id")) == [f"row-{i}" for i in range(40)]
        assert theirs.counts[7] == 0


@pytest.mark.parametrize("to", ["trl", "axolotl", "llamafactory", "olmo", "jsonl", "spans"])
def test_what_the_verb_writes_is_read_back(
    to: str, cleaned: Path, model_folder: Path, tmp_path: Path
) -> None:
    out, exact = tmp_path / "export", to in ("jsonl", "spans")
    more = ["--per_token"] if to == "spans" else [] if exact else ["--drop_weights"]
    where = ["--tokenizer", str(model_folder), "--out", str(out)]
    cli.main(["export", str(cleaned), "--to", to, *where, *more])
    theirs = opened(out, tmp_path).trained_rows()
    ours = opened(cleaned, tmp_path).trained_rows()
    chosen = [i for i in range(40) if exact or (ours[i].weights > 0).any()]
    assert len(theirs) == len(chosen) > 30
    for index, row in enumerate(chosen):
        one, other = ours[row], theirs[index]
        learnt = one.weights > (-9 if exact else 0)  # no label says that it is to be unlearnt
        assert other.input_ids.tolist() == one.input_ids.tolist()
        assert other.positions.tolist() == one.positions[learnt].tolist()
        want = one.weights[learnt] if exact else np.ones(learnt.sum())
        assert other.weights.tolist() == want.tolist()
    if exact:
        assert theirs.responses.tolist() == ours.responses.tolist()


def test_training_on_an_export_is_training_on_the_cleaned_pool(
    cleaned: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    as_jsonl(folder, rows_of(cleaned))
    for name, path in (("ours", cleaned), ("theirs", folder), ("file", folder / "samples.jsonl")):
        cli.main(
            [
                *("fit", "--model.base.name", str(model_folder), "--data.path", str(path)),
                *("--data.batch_size", "8", "--data.cache_dir", str(tmp_path / "cache")),
                *("--outputs", str(tmp_path / "runs"), "--name", name, "--data.max_length", "96"),
                *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            ]
        )
    found = {n: json.loads((tmp_path / "runs" / n / "summary.json").read_text()) for n in NAMES}
    for key in ("samples", "kept_tokens", "response_tokens", "steps", "train/loss"):
        assert len({found[n][key] for n in NAMES}) == 1, key
    weights = [
        (tmp_path / "runs" / n / "adapter" / "adapter_model.safetensors").read_bytes()
        for n in NAMES
    ]
    assert weights[0] == weights[1] == weights[2]


NAMES = ("ours", "theirs", "file")


def test_scores_of_tokens_are_those_of_the_text(
    cleaned: Path, pool_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    for name, path in (("text", pool_file), ("tokens", cleaned / DATA)):
        cli.main(
            [
                *("score", "--model.base.name", str(model_folder), "--data.path", str(path)),
                *("--data.max_length", "96", "--data.cache_dir", str(tmp_path / "cache")),
                *("--outputs", str(tmp_path), "--name", name, "--trainer.accelerator", "cpu"),
                *("--trainer.enable_progress_bar", "false"),
            ]
        )
    one, other = (ScoreTable(tmp_path / name / "scores") for name in ("text", "tokens"))
    assert one.manifest["pool"] != other.manifest["pool"]
    for i in range(40):
        assert one.lists("positions")[i].tolist() == other.lists("positions")[i].tolist()
        assert one.nll[i].tobytes() == other.nll[i].tobytes()


def test_cleaning_starts_from_all_response_tokens(
    cleaned: Path, model_folder: Path, tmp_path: Path
) -> None:
    arms = {
        "fixed_model": {"schedule": "fixed_model"},
        "full": {"schedule": "fixed_model", "rule": "full"},
    }
    cli.main(
        [
            *("clean", "--model.base.name", str(model_folder), "--data.path", str(cleaned / DATA)),
            *("--data.max_length", "96", "--data.cache_dir", str(tmp_path / "cache")),
            *("--outputs", str(tmp_path), "--name", "run", "--trainer.accelerator", "cpu"),
            *("--selection.keep", "0.5", "--loop.arms", json.dumps(arms)),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    total = sum(sum(row["response_mask"]) for row in rows_of(cleaned))
    made = tmp_path / "run" / "arms" / "fixed_model" / "cleaned"
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["ranked_tokens"] == total and manifest["kept_tokens"] == total // 2
    assert [r["id"] for r in rows_of(made)] == [f"row-{i}" for i in range(40)]


def test_another_tokenizers_tokens_are_refused(cleaned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    as_jsonl(folder, rows_of(cleaned))
    made = fingerprint_tokenizer(byte_level_tokenizer())
    now = fingerprint_tokenizer(character_tokenizer())
    for path in (folder, folder / "samples.jsonl"):
        with pytest.raises(ValueError, match=rf"{path} .*fingerprint {made}.*\({now}\).*spans"):
            opened(path, tmp_path, character_tokenizer())
    assert not (tmp_path / "cache").exists()
    text, extra = str(tmp_path / "pool.jsonl"), str(folder)
    for module in (
        TuluDataModule(text, validation_path=extra),
        TuluDataModule(text, test_path=extra),
    ):
        with pytest.raises(ValueError, match="was tokenised by another tokenizer"):
            module.use_tokenizer(character_tokenizer())
    # a cleaned pool's file, whose manifest says whose it is
    with pytest.raises(ValueError, match=rf"{cleaned} .*fingerprint {made}.*\({now}\)"):
        TuluDataModule(str(cleaned / DATA)).use_tokenizer(character_tokenizer())


def test_exports_that_are_no_data(
    cleaned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for facts, words in (
        ({"format": "adapter"}, "holds a model; name it with model.base.name or model.adapters"),
        ({"format": "jsonl", "version": 2}, "version 2 of its layout, and this one reads version"),
        ({"format": "jsonl", "data": ["gone.jsonl"]}, "gone.jsonl, which .* names, does not exist"),
        ({"format": "jsonl", "data": []}, "names no data"),
        ({"format": "jsonl", "data": ["../pool.jsonl"]}, r"data is \['../pool.jsonl'\], no"),
        ({"format": "jsonl", "data": [str(tmp_path / "pool.jsonl")]}, "no list of files in its"),
        ({"format": "jsonl", "data": "samples.jsonl"}, "data is 'samples.jsonl', no list of files"),
        ({"format": "jsonl", "data": 5}, "data is 5, no list of files in its folder"),
        ({"format": "jsonl", "data": [5]}, r"data is \[5\], no list of files in its folder"),
        ({"format": "jsonl", "data": ["."]}, "no list of files in its folder"),
        ({"format": "jsonl", "data": ["sub"]}, "sub, which .* names, does not exist"),
        ({"format": "spans", "eos": 5, "data": ["x"]}, r"tokenclean\.json: eos is 5, not text"),
    ):
        (folder := tmp_path / "wrong").mkdir(exist_ok=True)
        (folder / "sub").mkdir(exist_ok=True)
        card(folder, byte_level_tokenizer(), **facts)
        with pytest.raises(ValueError, match=words):
            TuluDataModule(str(folder))
    folder = tmp_path / "export"
    folder.mkdir()
    as_trl(folder, rows_of(cleaned))
    found = json.loads((folder / "tokenclean.json").read_text())
    (folder / "tokenclean.json").write_text(json.dumps({**found, "weights_dropped": True}))
    with caplog.at_level(logging.WARNING, "tokenclean"):
        opened(folder, tmp_path)
    assert "was exported without the loss weights that its pool had" in caplog.text


def test_what_is_said_about_an_export_makes_no_other_pool(cleaned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    as_trl(folder, rows_of(cleaned))
    one = opened(folder, tmp_path).pool.folder
    (folder / "README.md").write_text("# Another card\n")
    assert opened(folder, tmp_path).pool.folder == one
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"input_ids": [5, 6], "labels": [-100, 6], "assistant_masks": [0, 1]}\n')
    assert opened(folder, tmp_path).pool.folder != one


def test_arrays_that_do_not_go_together(cleaned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    as_olmo(folder, rows_of(cleaned), "uint32")
    assert opened(folder, tmp_path).pool.input_ids[38].tolist() == rows_of(cleaned)[39]["input_ids"]
    mask = folder / "labels_mask_part_0001.npy"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"tokens of uint32, {mask} {len(whole) - 1} labels"):
        opened(folder, tmp_path)
    mask.write_bytes(whole)
    bounds = folder / "token_ids_part_0001.csv.gz"
    for text, words in (
        (f"0,5\n5,{len(whole) + 1}\n", rf"csv\.gz:2: '5,{len(whole) + 1}' lies outside"),
        ("0,5\n5\n", r"csv\.gz:2: '5' is not `start,end`"),
        ("5,5\n", r"csv\.gz:1: '5,5' lies outside"),
    ):
        bounds.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(ValueError, match=words):
            opened(folder, tmp_path)
    for broken in (gzip.compress(b"0,5\n5,6\n")[:-9], b"0,5\n", gzip.compress(b"\xff,5\n")):
        bounds.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{bounds} is no whole gzip file of text"):
            opened(folder, tmp_path)
    description = folder / "tokenclean.json"
    before = description.read_text()
    for dtype in ("object", "float32", 2, ["uint16"]):
        description.write_text(json.dumps({**json.loads(before), "dtype": dtype}))
        with pytest.raises(ValueError, match=r"tokenclean\.json: dtype is .*, not one of uint16, "):
            opened(folder, tmp_path)
    description.write_text(before)
    bounds.unlink()
    with pytest.raises(ValueError, match=r"0001\.csv\.gz, which belongs to .* does not exist"):
        opened(folder, tmp_path)
    (folder / "tokenclean.json").unlink()
    with pytest.raises(ValueError, match=r"part_0000\.npy has no header, and no tokenclean\.json"):
        opened(folder / "token_ids_part_0000.npy", tmp_path)


# -- texts with spans -----------------------------------------------------------------------------


def spanned(text: str, kept: str, tokenizer: Any, **facts: Any) -> list[tuple[str, str]]:
    """Tokens and marks of a text whose characters ``kept`` marks one by one: `x` kept, `o` dropped,
    blank prompt. Marks of tokens: the same, `-` for a token to be unlearnt."""
    runs = [(m.start(), m.end()) for m in re.finditer("x+|o+|-+", kept)]
    row = {
        "text": text,
        "responses": [[m.start(), m.end()] for m in re.finditer("[xo-]+", kept)],
        "spans": [
            {
                "start": a,
                "end": b,
                "kept": kept[a] == "x",
                "weight": -1.0 if kept[a] == "-" else 1.0,
            }
            for a, b in runs
        ],
    }
    tokens = encode_spans(read_spans(row, facts or None), Tokeniser(tokenizer))
    marks = np.full(len(tokens.input_ids), " ")
    marks[tokens.response_mask] = "o"
    marks[tokens.labels != NO] = "x"
    marks[(tokens.labels != NO) & (tokens.weight < 0)] = "-"
    assert ((tokens.labels == NO) | (tokens.labels == tokens.input_ids)).all()
    names = tokenizer.convert_ids_to_tokens(tokens.input_ids.tolist())
    return list(zip(names, marks.tolist(), strict=True))


def test_spans_of_characters() -> None:
    found = spanned("abcdef$\nab$", "  xxoo-    ox"[:11], character_tokenizer())
    assert found == list(zip("abcdef$\nab$", "  xxoo-    ox"[:11], strict=True))
    # nothing precedes the first token
    assert spanned("ab", "xx", character_tokenizer()) == [("a", " "), ("b", "x")]


@pytest.mark.parametrize(
    "make", [byte_level_tokenizer, sentencepiece_tokenizer, character_tokenizer]
)
def test_the_exporters_tokenizer_gives_its_tokens_back(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    """Runs of kept and dropped tokens as characters, and back; content that spells an EOS, too."""
    tokenizer = make()
    eos = tokenizer.eos_token
    rows = [
        {
            "messages": [
                {"role": "user", "content": "What is the sky?"},
                {
                    "role": "assistant",
                    "content": f"the sky is {i} blue{' ' + eos if i == 2 else ''}",
                },
                {"role": "user", "content": "why"},
                {"role": "assistant", "content": "the fox over the dog"},
            ]
        }
        for i in range(4)
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    reader, tokeniser = Reader([str(path)]), Tokeniser(tokenizer)
    for number, sample in enumerate(reader):
        assert hasattr(sample, "messages")
        rendered = tokeniser._render(sample)  # type: ignore[arg-type]
        want = tokeniser([sample])[0]  # type: ignore[list-item]
        ids, offsets = (
            tokeniser._encode_literally(rendered)
            if number == 2
            else (want.input_ids, np.array(offsets_of(tokenizer, rendered.text)))
        )
        assert ids.tolist() == want.input_ids.tolist()
        places = np.flatnonzero(want.response_mask)
        kept = set(places[number::3].tolist())
        spans = [
            {"start": int(offsets[p][0]), "end": int(offsets[p][1]), "kept": int(p) in kept}
            for p in places
        ]
        row = {"text": rendered.text, "responses": [list(r) for r in rendered.responses]}
        got = encode_spans(read_spans({**row, "spans": spans}, None), Tokeniser(tokenizer))
        assert got.input_ids.tolist() == want.input_ids.tolist()
        assert got.response_mask.tolist() == want.response_mask.tolist()
        assert set(np.flatnonzero(got.labels != NO).tolist()) == kept


def offsets_of(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return found


def test_another_tokenizer_keeps_every_token_that_touches_a_kept_character() -> None:
    """Seen with larger tokens: ` sky` was cut in two where the spans were made."""
    text = "the sky is blue.$"
    found = spanned(text, "    oxoooooooxxxx", byte_level_tokenizer(bos=False), eos="$")
    assert "".join(token for token, _ in found).endswith("</s>")
    assert [mark for token, mark in found if token in ("Ġsky", "</s>")] == ["x", "x"]
    decoded = "".join(t.replace("Ġ", " ") for t, mark in found if mark == "x")
    assert " sky" in decoded and decoded.endswith(".</s>") and " is" not in decoded


def test_ends_of_other_lengths_move_what_follows() -> None:
    """`</s>` for `$`, twice: the second response stands three characters further."""
    tokenizer = byte_level_tokenizer(bos=False)
    found = spanned("q\nab$\nq\ncd$", "  xox   xxo", tokenizer, eos="$")
    assert [token for token, mark in found if mark != " "] == ["a", "b", "</s>", "c", "d", "</s>"]
    assert "".join(mark for _, mark in found if mark != " ") == "xoxxxo"


def test_a_characters_tokens_go_together() -> None:
    """Four bytes, four tokens, one character: the whole of it is kept, or none of it."""
    tokenizer = byte_level_tokenizer(bos=False)
    for kept, mark in (("  x", "x"), ("  o", "o"), ("  -", "-")):
        found = spanned("q\n🙂", kept, tokenizer)
        assert [m for _, m in found[2:]] == [mark] * 4


def test_tokens_with_their_own_weights_go_before_spans() -> None:
    row = {
        "text": "abcd",
        "responses": [[1, 4]],
        "spans": [{"start": 1, "end": 4, "kept": True, "weight": 0.5}],
        "tokens": {
            "start": [1, 2, 3, 3],
            "end": [2, 3, 3, 4],
            "kept": [True, True, False, False],
            "weight": [0.25, 0.75, 1.0, 1.0],
        },
    }
    tokens = encode_spans(read_spans(row, None), Tokeniser(character_tokenizer()))
    assert tokens.weight.tolist() == [1.0, 0.25, 0.75, 1.0]
    assert (tokens.labels != NO).tolist() == [False, True, True, False]
    assert tokens.response_mask.tolist() == [False, True, True, True]
    del row["tokens"]
    tokens = encode_spans(read_spans(row, None), Tokeniser(character_tokenizer()))
    assert tokens.weight.tolist() == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": None}, "`text` is null, not text"),
        ({"text": "\ud800bcd"}, "`text` is not valid Unicode at character 0"),
        ({"responses": None}, "`responses` is not a list"),
        ({"responses": [[1]]}, "`responses`: [1] is not [start, end]"),
        ({"responses": [[1, 5]]}, "`responses`: 1 to 5 are no characters of a text of 4"),
        ({"responses": [[1, 3], [2, 4]]}, "`responses`: [2, 4] begins before the last one ends"),
        ({"spans": [[1, 2]]}, "`spans`: [1, 2] is not an object with start, end and kept"),
        ({"spans": [{"start": 1, "end": 1, "kept": True}]}, "`spans`: 1 to 1 are no characters"),
        ({"spans": [{"start": 0, "end": 2, "kept": True}]}, "`spans`: [0, 2] lies in no response"),
        ({"spans": [{"start": 1, "end": 2, "kept": 1}]}, "`spans`: {'start': 1, 'end': 2, 'kept"),
        (
            {"spans": [{"start": 1, "end": 2, "kept": True, "weight": "x"}]},
            "`spans`: the weight of [1, 2] is 'x'",
        ),
        (
            {"spans": [{"start": 1, "end": 2, "kept": True, "weight": 1e300}]},
            "`spans`: the weight of [1, 2] is 1e+300",
        ),
        (
            {"spans": [{"start": 1, "end": 2, "kept": True, "weight": -(10**400)}]},
            "`spans`: the weight of [1, 2] is -1000",
        ),
        ({"spans": ["x" * 10**6]}, "`spans`: '" + "x" * 76 + "... is not an object with start"),
        ({"exact": 1}, "`exact` is 1, neither true nor false"),
        ({"tokens": {"start": [1], "end": [2, 3], "kept": [True]}}, "`tokens` is not an object"),
    ],
)
def test_spans_that_cannot_be(columns: dict[str, Any], reason: str) -> None:
    row = {"text": "abcd", "responses": [[1, 4]], "spans": []}
    with pytest.raises(BadRow, match="^" + re.escape(reason)):
        read_spans({**row, **columns}, None)


def test_a_pool_of_spans(tmp_path: Path) -> None:
    rows = [
        {
            "id": "a",
            "text": "abcd$",
            "responses": [[2, 5]],
            "spans": [{"start": 2, "end": 4, "kept": True}, {"start": 4, "end": 5, "kept": False}],
        }
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    # whatever made it, the text is tokenised anew
    facts = {"format": "spans", "data": ["samples.jsonl"]}
    card(tmp_path, byte_level_tokenizer(), **facts, eos="x")
    other = opened(tmp_path, tmp_path, character_tokenizer())
    card(tmp_path, byte_level_tokenizer(), **facts, eos="$")
    module = opened(tmp_path, tmp_path, character_tokenizer())
    assert module.pool.folder != other.pool.folder  # read in another way, it is another pool
    assert module.trained_rows()[0].positions.tolist() == [2, 3]
    assert module.pool.response_positions(0).tolist() == [2, 3, 4]
    assert module.pool.manifest["shapes"] == {str(tmp_path / "samples.jsonl"): "text/spans"}
