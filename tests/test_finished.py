"""Finished runs read back: which cleaned pools they hold, and their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import byte_level_tokenizer

from tokenclean.data.cleaned import cleaned_schema, read_blocks, write_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.finished import FinishedRun


def columns(row: int, tokens: int, round: int = 1) -> dict[str, Any]:
    """A row of a cleaned pool: its first token is prompt, the last one dropped."""
    ids = [10 * row + i for i in range(tokens)]
    kept = [False, *[True] * (tokens - 2), False]
    scores = [None, *[0.5 * i for i in range(1, tokens)]]
    return {
        "id": f"s{row}",
        "source": "ab"[row % 2],
        "input_ids": ids,
        "labels": [i if k else -100 for i, k in zip(ids, kept, strict=True)],
        "response_mask": [False, *[True] * (tokens - 1)],
        "base_nll": [None, *[1.0] * (tokens - 1)],
        "reference_nll": [None, *[1.0 - 0.5 * i for i in range(1, tokens)]],
        "score": scores,
        "priority": [None] * tokens,
        "reason": [1, *[0] * (tokens - 2), 2],
        "weight": [1.0] * tokens,
        "round": round,
    }


def write(folder: Path, tokenizer: str = "t0", rows: tuple[int, ...] = (3, 4, 2)) -> Path:
    schema = cleaned_schema(with_truth=False)
    made = [columns(i, n) for i, n in enumerate(rows)]
    batch = pa.RecordBatch.from_pylist(made, schema=schema)
    write_cleaned_pool(folder, [batch], schema, {"tokenizer": tokenizer})
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_blocks_are_the_rows_in_order(tmp_path: Path, rows: int) -> None:
    """Rows of 3, 4 and 2 tokens, however they are cut into blocks."""
    blocks = list(read_blocks(write(tmp_path / "pool"), rows))
    assert [b.first for b in blocks] == list(range(0, 3, rows))
    assert [i for b in blocks for i in b.ids] == ["s0", "s1", "s2"]
    assert [s for b in blocks for s in b.sources] == ["a", "b", "a"]
    assert np.concatenate([b.counts for b in blocks]).tolist() == [3, 4, 2]

    def joined(name: str) -> list[Any]:
        found: list[Any] = np.concatenate([getattr(b, name) for b in blocks]).tolist()
        return found

    assert joined("input_ids") == [0, 1, 2, 10, 11, 12, 13, 20, 21]
    assert joined("response") == [False, True, True, False, True, True, True, False, True]
    assert joined("kept") == [False, True, False, False, True, True, False, False, False]
    assert joined("position") == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    scores = joined("score")
    assert np.isnan(scores[0]) and scores[1:3] == [0.5, 1.0]
    assert np.isnan(joined("priority")).all()
    for block in blocks:
        for number, count in enumerate(block.counts):
            at = block.tokens_of(number)
            assert at.stop - at.start == count and (block.row[at] == number).all()
        assert block.truth is None


def test_arms_come_in_the_runs_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("alpha", "zeta", "left_from_before"):
        write(run / "arms" / name / "cleaned")
    ran = [{"name": name} for name in ("base", "zeta", "alpha")]
    (run / "results.json").write_text(json.dumps(ran))
    for number in (2, 1, 10):
        write(run / "arms" / "zeta" / f"round_{number}" / "cleaned")
    (run / "arms" / "zeta" / "round_11").mkdir()  # not cleaned yet
    write(run / "arms" / "zeta" / "round_old" / "cleaned")  # somebody's copy
    found = FinishedRun(run)
    assert list(found.arms) == ["zeta", "alpha", "left_from_before"]
    assert list(found.arms["zeta"].rounds) == [1, 2, 10]
    assert found.arms["zeta"].adapter is None
    (run / "arms" / "zeta" / "adapter").mkdir()
    (run / "arms" / "zeta" / "adapter" / "trained_ids.json").write_text(json.dumps(["s0"]))
    assert found.arms["zeta"].adapter == run / "arms" / "zeta" / "adapter"
    assert found.arm("alpha").name == "alpha"
    with pytest.raises(ValueError, match="has several; choose from 'zeta', 'alpha'"):
        found.arm(None)
    with pytest.raises(ValueError, match="no arm 'beta'; choose from 'zeta'"):
        found.arm("beta")


def test_a_pool_may_be_named_by_run_arm_or_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_config(run, {"model": {"base": {"name": "some/model"}}, "loop": {"arms": {"a": {}}}})
    cleaned = write(run / "arms" / "a" / "cleaned")
    for folder in (run, run / "arms" / "a", cleaned):
        found = FinishedRun(folder)
        assert found.arm(None).cleaned == cleaned and found.arm(None).name == "a"
        assert found.base is not None and found.base.name == "some/model"


def test_what_holds_no_cleaned_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        FinishedRun(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no cleaned pool"):
        FinishedRun(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="is a study; give one of its runs"):
        FinishedRun(tmp_path)


def test_the_tokenizer_is_the_one_that_made_the_pool(tmp_path: Path) -> None:
    """From a run of `select` it is found through the runs that scored."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    write_config(tmp_path / "base", {"model": {"base": {"name": str(tmp_path / "model")}}})
    write_config(tmp_path / "selected", {"base": str(tmp_path / "base" / "scores")})
    write(tmp_path / "selected" / "cleaned", fingerprint_tokenizer(tokenizer))
    assert len(FinishedRun(tmp_path / "selected").tokenizer) == len(tokenizer)
    bare = write(tmp_path / "bare", fingerprint_tokenizer(tokenizer))
    with pytest.raises(ValueError, match="--tokenizer"):
        _ = FinishedRun(bare).tokenizer
    assert FinishedRun(bare, str(tmp_path / "model")).tokenizer.eos_token == "</s>"
    other = write(tmp_path / "other", "another")
    with pytest.raises(ValueError, match=r"another tokenizer .* than the one that made the pools"):
        _ = FinishedRun(other, str(tmp_path / "model")).tokenizer


def test_an_arm_may_be_named_from_within_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_config(run, {"model": {"base": {"name": "some/model"}}, "loop": {"arms": {"a": {}}}})
    write(run / "arms" / "a" / "cleaned")
    for where, named in [
        ("arms", "a"),
        ("arms/a", "."),
        ("arms/a", "cleaned"),
        ("arms/a", "../.."),
    ]:
        monkeypatch.chdir(run / where)
        found = FinishedRun(Path(named))
        assert list(found.arms) == ["a"] and found.root == run
        assert found.base is not None and found.base.name == "some/model"


def test_what_a_run_stores_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are meant from where the run was made, a folder above it."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "models" / "tiny")
    run = tmp_path / "outputs" / "run"
    write_config(run, {"model": {"base": {"name": "models/tiny"}}})
    write(run / "cleaned", fingerprint_tokenizer(tokenizer))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(FinishedRun(run).tokenizer) == len(tokenizer)


def test_arms_that_are_missing_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arms = {"a": {"schedule": "fixed_model"}, "b": {"schedule": "fixed_model"}}
    write_config(run, {"loop": {"arms": {**arms, "w": {"schedule": "warmup"}}}})
    write(run / "arms" / "a" / "cleaned")
    assert FinishedRun(run).unfinished == ["b"]
    assert FinishedRun(run / "arms" / "a").unfinished == []


def test_a_runs_own_word_makes_no_code_run(tmp_path: Path) -> None:
    """A tokenizer that comes with code, and a configuration that says to trust it."""
    model, mark = tmp_path / "model", tmp_path / "ran"
    byte_level_tokenizer().save_pretrained(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "odd.Odd"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "odd.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Odd(PreTrainedTokenizerFast):\n    pass\n"
    )
    write_config(
        tmp_path / "run",
        {"model": {"base": {"name": str(model), "trust_remote_code": True}}},
    )
    write(tmp_path / "run" / "cleaned", fingerprint_tokenizer(byte_level_tokenizer()))
    run = FinishedRun(tmp_path / "run")
    assert run.base is not None and not run.base.trust_remote_code
    try:
        _ = run.tokenizer
    except ValueError as error:
        assert "--trust_remote_code" in str(error)
    assert not mark.exists()
    trusted = FinishedRun(tmp_path / "run", trust_remote_code=True)
    assert trusted.base is not None and trusted.base.trust_remote_code
