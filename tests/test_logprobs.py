"""Log-probabilities from elsewhere: the same table as ours, or a list of what is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    conversation,
    tiny_llama,
    write_jsonl,
)

from tokenclean import cli
from tokenclean.data.cleaned import DATA
from tokenclean.data.formats import Reader
from tokenclean.data.pool import BadData, TokenPool, build_pool, open_pool
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import Tokeniser
from tokenclean.models import Network
from tokenclean.runs import CONFIG
from tokenclean.scoring.logprobs import check_file, import_logprobs, read_ids, read_logprobs
from tokenclean.scoring.table import ScoreTable


@pytest.fixture
def pool(tmp_path: Path) -> TokenPool:
    """Three rows of one character per token: responses `$`, `r$` and `rr$` after 23 characters."""
    rows = [conversation("q", "r" * i, id=f"id-{i}") for i in range(3)]
    build_pool(
        Reader([str(write_jsonl(tmp_path / "f.jsonl", rows))]),
        Tokeniser(character_tokenizer()),
        tmp_path / "pool",
    )
    return open_pool(tmp_path / "pool" / "train")


#: Log-probabilities of the response tokens of the rows of `pool`.
GOOD = {"id-0": [-1.0], "id-1": [-0.5, -2.0], "id-2": [0.0, -3.25, 0.0005]}
PROMPT = len("<|user|>\nq\n<|assistant|>\n")


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": name, "logprobs": values} for name, values in found.items()]


def read(pool: TokenPool, path: Path, rows: list[Any], chosen: list[int] | None = None) -> Any:
    file = write_jsonl(path / "given.jsonl", rows)
    wanted = TokenRows(pool, None if chosen is None else np.array(chosen))
    return read_logprobs(file, wanted, path)


@pytest.mark.parametrize("before", ["null", "number", "left out", "responses alone"])
def test_numbers_find_their_tokens(before: str, pool: TokenPool, tmp_path: Path) -> None:
    """In any order of rows, over responses or over all input tokens."""
    fronts: dict[str, list[Any]] = {
        "null": [None, *[-9.0] * (PROMPT - 1)],
        "number": [-7.0] * PROMPT,
        "left out": [-9.0] * (PROMPT - 1),
        "responses alone": [],
    }
    given = rows_of({name: fronts[before] + values for name, values in reversed(GOOD.items())})
    nll = read(pool, tmp_path, given)
    assert nll.dtype == np.float32
    assert nll.tolist() == [1.0, 0.5, 2.0, 0.0, 3.25, np.float32(-0.0005)]
    assert not np.signbit(nll[3])  # a probability of 1 is a loss of 0, not of -0


def test_a_part_of_the_pool_takes_its_part_of_the_file(pool: TokenPool, tmp_path: Path) -> None:
    assert read(pool, tmp_path, rows_of(GOOD), [0, 2]).tolist()[:2] == [1.0, 0.0]
    few = {name: GOOD[name] for name in ("id-2", "id-0")}
    assert len(read(pool, tmp_path, rows_of(few), [0, 2])) == 4
    with pytest.raises(BadData, match=r"lacks 1 of the 3 samples of the pool \('id-1'\)"):
        read(pool, tmp_path, rows_of(few))


def test_tokens_are_compared(pool: TokenPool, tmp_path: Path) -> None:
    ids = {f"id-{i}": pool.input_ids[i].tolist() for i in range(3)}
    short = [{**row, "token_ids": ids[row["id"]][PROMPT:]} for row in rows_of(GOOD)]
    assert len(read(pool, tmp_path, short)) == 6
    long = [
        {**row, "logprobs": [None, *[-1.0] * (PROMPT - 1), *row["logprobs"]]}
        for row in rows_of(GOOD)
    ]
    whole = [{**row, "token_ids": ids[row["id"]]} for row in long]
    assert len(read(pool, tmp_path, whole)) == 6
    whole[1]["token_ids"] = [*ids["id-1"][:-1], 5]
    last = len(ids["id-1"]) - 1
    with pytest.raises(BadData, match=rf"jsonl:2: token {last} is 5, but 0 in the pool"):
        read(pool, tmp_path, whole)
    with pytest.raises(BadData, match="`token_ids` is no list of the length of `logprobs`"):
        read(pool, tmp_path, [{**short[0], "token_ids": []}, *short[1:]])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([-1.0], "1 log-probabilities for 2 response tokens of 27 input tokens; "),
        ([-1.0] * 28, "28 log-probabilities for 2 response tokens of 27 input tokens; "),
        ([-1.0, 0.002], "log-probability 1 is 0.002, above 0; perhaps these are losses"),
        ([-1.0, float("nan")], "log-probability 1 is nan; score the sample again"),
        ([float("-inf"), -1.0], "log-probability 0 is -inf; write a finite number"),
        ([None, -1.0], "log-probability 0 is None, not a number"),
        ([True, -1.0], "log-probability 0 is True, not a number"),
        ([-1, "x"], "log-probability 1 is 'x', not a number"),
        ([-(10**400), -1], "a log-probability is too large a number"),
        ([None] * 27, "log-probability 25 is None, not a number"),
        ([-1.0, "x" * 10**6], "log-probability 1 is '" + "x" * 76 + "..., not a number"),
        ("x", "no list `logprobs`"),
        (None, "no list `logprobs`"),
    ],
)
def test_wrong_numbers_are_named(values: Any, reason: str, pool: TokenPool, tmp_path: Path) -> None:
    with pytest.raises(BadData) as error:
        read(pool, tmp_path, rows_of({**GOOD, "id-1": values}))
    lines = str(error.value).splitlines()
    assert lines[0] == "--logprobs: 1 wrong row(s):"
    assert lines[1].startswith(f"  {tmp_path / 'given.jsonl'}:2: {reason}") and len(lines) == 2


def test_ids_are_those_of_the_pool_each_once(pool: TokenPool, tmp_path: Path) -> None:
    good = rows_of(GOOD)
    with pytest.raises(BadData) as error:
        read(pool, tmp_path, [*good, {"id": "id-9", "logprobs": []}, good[1], {"logprobs": []}, 3])
    lines = str(error.value).splitlines()[1:]
    assert [line.partition("jsonl:")[2] for line in lines] == [
        "4: id 'id-9' is not in the pool",
        "5: id 'id-1' was in line 2 already",
        "6: no `id`",
        "7: expected an object, found int",
    ]


def test_a_table_says_where_it_comes_from(
    pool: TokenPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, rows = write_jsonl(tmp_path / "server.jsonl", rows_of(GOOD)), TokenRows(pool)
    with caplog.at_level(logging.WARNING, "tokenclean"):
        import_logprobs(file, rows, tmp_path / "a")
    assert "selection.exclude_seen leaves none out" in caplog.text
    caplog.clear()
    ids = tmp_path / "ids.txt"
    ids.write_text("id-1\n\nelsewhere\n")
    import_logprobs(file, rows, tmp_path / "b", "big-model", ids)
    assert not caplog.text
    one, other = ScoreTable(tmp_path / "a"), ScoreTable(tmp_path / "b")
    assert one.manifest["imported"] is True and len(one.trained_on()) == 0
    assert other.trained_on().to_pylist() == ["elsewhere", "id-1"]
    name, _, digest = one.manifest["model"].rpartition("-")
    assert name == "server" and other.manifest["model"] == f"big-model-{digest}"
    assert "noise" not in one.manifest
    assert one.values("id") == list(pool.ids)
    assert one.lists("positions")[2].tolist() == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert one.lists("token_ids")[1].tolist() == pool.input_ids[1][PROMPT:].tolist()
    one.check_pool(pool)
    # other numbers are another model, whatever its name
    worse = write_jsonl(tmp_path / "server.jsonl", rows_of({**GOOD, "id-0": [-1.5]}))
    import_logprobs(worse, rows, tmp_path / "c")
    assert ScoreTable(tmp_path / "c").manifest["model"] != one.manifest["model"]


def test_ids_that_a_model_has_seen(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    for text in ('["b", "a", "b"]', "b\na\n", "\ufeffa\r\nb"):
        file.write_text(text, encoding="utf-8", newline="")
        assert read_ids(file) == ["a", "b"]
    file.write_text("[1,")
    with pytest.raises(ValueError, match=r"--logprobs_trained_on: .* is not JSON"):
        read_ids(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--logprobs: .*none\.jsonl does not exist"):
        check_file(tmp_path / "none.jsonl")
    (tmp_path / "f.csv").touch()
    with pytest.raises(ValueError, match=r"^--logprobs: .*f\.csv has an unknown suffix"):
        check_file(tmp_path / "f.csv")


# -- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def tables(model_folder: Path, pool_file: Path, tmp_path: Path) -> Path:
    """Folder of the runs `base` and `reference`, scored by two models of random weights."""
    other = tmp_path / "other"
    tiny_llama(len(byte_level_tokenizer()), seed=1).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    for name, model in (("base", model_folder), ("reference", other)):
        score(tmp_path, pool_file, model, name)
    return tmp_path / "outputs"


def score(place: Path, data: Path, model: Path, name: str, *more: str) -> None:
    cli.main(
        [
            *("score", "--model.base.name", str(model), "--data.path", str(data)),
            *("--data.max_length", "96", "--data.cache_dir", str(place / "cache")),
            *("--outputs", str(place / "outputs"), "--name", name, *more),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    )


def mask_of(outputs: Path, reference: str, keep: str = "0.5") -> list[list[int]]:
    name = f"{reference}-{keep}"
    cli.main(
        [
            *("select", "--base", str(outputs / "base"), "--reference", str(outputs / reference)),
            *("--selection.rule", "token_cleaning", "--selection.keep", keep),
            *("--outputs", str(outputs), "--name", name),
        ]
    )
    table = pq.read_table(outputs / name / "cleaned" / DATA)
    labels: list[list[int]] = table.column("labels").to_pylist()
    return labels


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_mask_is_that_of_our_own_table(
    suffix: str,
    tables: Path,
    model_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ScoreTable(tables / "reference" / "scores")
    rows = [
        {"id": name, "logprobs": (-ours.nll[i].astype(np.float64)).tolist()}
        for i, name in enumerate(ours.values("id"))
    ]
    random.Random(0).shuffle(rows)
    file = tmp_path / f"given.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Network, "load", refuse)
    # the reference has seen four samples, and they are left out if that is asked for
    seen = write_jsonl(tmp_path / "seen.json", [["row-3", "row-5", "row-8", "row-13"]])
    more = ("--logprobs", str(file), "--logprobs_model", "m", "--logprobs_trained_on", str(seen))
    score(tmp_path, pool_file, model_folder, "given", *more)
    theirs = ScoreTable(tables / "given" / "scores")
    assert theirs.rows.tolist() == ours.rows.tolist()
    for i in range(40):
        assert theirs.nll[i].tobytes() == ours.nll[i].tobytes()
    for keep in ("0.3", "0.6"):
        assert mask_of(tables, "given", keep) == mask_of(tables, "reference", keep)
    summary = json.loads((tables / "given-0.3" / "summary.json").read_text())
    assert summary["rows_seen_by_reference"] == 4
    assert summary["noise"] is None
    stored = yaml.safe_load((tables / "given" / CONFIG).read_text())
    assert stored["logprobs_model"] == "m"
    assert "logprobs" not in yaml.safe_load((tables / "base" / CONFIG).read_text())


def test_another_content_is_another_run(
    model_folder: Path, pool_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what such a table lacks, nobody is told to make of it."""
    score(tmp_path, pool_file, model_folder, "base")
    outputs = tmp_path / "outputs"
    ours = ScoreTable(outputs / "base" / "scores")
    rows = [
        {"id": name, "logprobs": [-1.0] * len(ours.nll[i])}
        for i, name in enumerate(ours.values("id"))
    ]
    file, seen = tmp_path / "given.jsonl", tmp_path / "seen.txt"
    write_jsonl(file, rows)
    seen.write_text("row-3\n")
    more = ("--logprobs", str(file), "--logprobs_trained_on", str(seen))
    score(tmp_path, pool_file, model_folder, "given", *more)
    digests = [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in (file, seen)]
    stored = yaml.safe_load((outputs / "given" / CONFIG).read_text())
    assert stored["logprobs_content"] == "-".join(digests)
    capsys.readouterr()
    score(tmp_path, pool_file, model_folder, "given", *more)
    assert "finished before" in capsys.readouterr().out
    for path in (file, seen):
        before = path.read_text()
        path.write_text(before + " ")
        with pytest.raises(SystemExit):
            score(tmp_path, pool_file, model_folder, "given", *more)
        assert "holds a run of another configuration" in capsys.readouterr().err
        noted = ("--logprobs_content", "-".join(digests))
        with pytest.raises(SystemExit):
            score(tmp_path, pool_file, model_folder, "again", *more, *noted)
        assert "--logprobs_content: the files of --logprobs hold" in capsys.readouterr().err
        path.write_text(before)
    score(tmp_path, pool_file, model_folder, "again", *more, *noted)
    assert (outputs / "again" / "scores").is_dir()
    for rule, words in (
        (("--selection.keep", "auto"), "computed elsewhere, which have none; give a number"),
        (("--selection.rule", "xtf_paper"), "`: it was made from log-probabilities"),
    ):
        with pytest.raises(SystemExit):
            cli.main(
                [
                    *("select", "--base", str(outputs / "given"), "--outputs", str(outputs)),
                    *("--reference", str(outputs / "base"), "--name", "s", *rule),
                ]
            )
        message = capsys.readouterr().err
        assert words in message and "--probe" not in message and "--model.columns" not in message


def test_what_does_not_go_with_it_is_refused_first(
    model_folder: Path, pool_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "given.jsonl", rows_of(GOOD))
    given = ("--logprobs", str(file))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    for more, words in (
        (("--logprobs_model", "m"), "--logprobs_model: it goes with --logprobs"),
        (("--logprobs_content", "m"), "--logprobs_content: it goes with --logprobs"),
        ((*given, "--probe", "true"), "--probe: it does not go with --logprobs"),
        ((*given, "--estimate"), "--estimate: it does not go with --logprobs"),
        ((*given, "--model.columns", "[gap]"), "model.columns: it does not go"),
        ((*given, "--model.adapters", str(tmp_path)), "model.adapters: it does not go"),
        ((*given, "--data.targets", "prompt"), "data.targets: it does not go"),
        ((*given, "--logprobs_trained_on", "none"), "--logprobs_trained_on: none does not exist"),
        (("--logprobs", "none.jsonl"), "--logprobs: none.jsonl does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            score(tmp_path, pool_file, model_folder, "r", *more)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "outputs").exists() and not (tmp_path / "cache").exists()
    with pytest.raises(SystemExit):
        score(tmp_path, pool_file, model_folder, "r", *given)
    assert "--logprobs: 3 wrong row(s)" in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "r" / "scores").exists()
