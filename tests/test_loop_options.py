"""Options of the loop: rounds measured, other references, an earlier warm-up, whole samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_level_tokenizer, conversation, tiny_llama, write_jsonl
from test_loop import planted_file, run

from tokenclean.publish import MANIFEST
from tokenclean.scoring.table import ScoreTable

FIXED: dict[str, Any] = {"fixed": {"schedule": "fixed_model"}}


def test_measuring_rounds_changes_nothing(tmp_path: Path, model_folder: Path) -> None:
    data = planted_file(tmp_path)
    arms = {"self_evolving": {"schedule": "self_evolving"}}
    test = ["--data.test_path", str(data)]
    plain = run(tmp_path / "plain", model_folder, data, *test, arms=arms)
    measured = run(
        tmp_path / "measured",
        model_folder,
        data,
        *test,
        "--loop.evaluate_rounds",
        "true",
        arms=arms,
    )
    arm = measured / "arms" / "self_evolving"
    for step in (measured / "warmup", *(arm / f"round_{t}" for t in range(1, 5)), arm):
        answers = json.loads((step / "answers.json").read_text())
        result = json.loads((step / "result.json").read_text())["accuracy"]
        assert {s: len(found) for s, found in answers.items()} == {"a": 22, "b": 21}
        assert result["all"]["correct"] == sum(sum(f.values()) for f in answers.values())
    # the arm's model is that of the last round
    last = json.loads((arm / "round_4" / "answers.json").read_text())
    assert last == json.loads((arm / "answers.json").read_text())
    for path in ("cleaned/data.parquet", "round_4/adapter/adapter_model.safetensors"):
        one, other = (folder / "arms" / "self_evolving" / path for folder in (plain, measured))
        assert one.read_bytes() == other.read_bytes(), path


def test_another_model_can_be_the_reference(tmp_path: Path, model_folder: Path) -> None:
    data = planted_file(tmp_path)
    torch.manual_seed(7)
    other = tmp_path / "other"
    tiny_llama(vocab_size=400).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    folder = run(tmp_path, model_folder, data, "--loop.reference", str(other), arms=FIXED)
    assert not (folder / "warmup").exists()
    base, reference = (ScoreTable(folder / "scores" / n) for n in ("base", "reference"))
    assert reference.manifest["base"] == str(other)
    assert base.manifest["model"] != reference.manifest["model"]
    row = pq.read_table(folder / "arms" / "fixed" / "cleaned" / "data.parquet").to_pylist()[3]
    scores = [s for s in row["score"] if s is not None]
    assert scores == pytest.approx(list(base.of_row(3).astype(float) - reference.of_row(3)))
    # the same scores, taken as a run's adapter would be, come from the base plus adapter
    adapter = run(tmp_path / "first", model_folder, data, arms=FIXED) / "warmup"
    again = run(
        tmp_path / "second", model_folder, data, "--loop.reference", str(adapter), arms=FIXED
    )
    files = [
        folder / "arms" / "fixed" / "cleaned" / "data.parquet"
        for folder in (tmp_path / "first" / "run", again)
    ]
    assert pq.read_table(files[0]).equals(pq.read_table(files[1]))


def test_a_warm_up_is_taken_over_for_the_same_samples_alone(
    tmp_path: Path, model_folder: Path
) -> None:
    data = planted_file(tmp_path)
    arms = {"self_evolving": {"schedule": "self_evolving"}}
    first = run(tmp_path / "first", model_folder, data, arms=arms)
    words = ["--loop.warmup", str(first / "warmup")]
    second = run(tmp_path / "second", model_folder, data, *words, arms=arms)
    one, other = (
        (folder / "arms" / "self_evolving" / "cleaned" / "data.parquet").read_bytes()
        for folder in (first, second)
    )
    assert one == other
    assert not [r for r in json.loads((second / "costs.json").read_text())["rows"]
                if (r["arm"], r["stage"]) == ("shared", "train")]  # fmt: skip
    # the same ids, other text
    rows = [
        conversation(f"Say {i}!", f"It is {i}. And so on.", id=f"s{i}", source="a")
        for i in range(43)
    ]
    others = write_jsonl(tmp_path / "others.jsonl", rows)
    with pytest.raises(ValueError, match=r"loop\.warmup: .* was trained on other samples"):
        run(tmp_path / "third", model_folder, others, *words, arms=arms)
    assert not (tmp_path / "third" / "run" / "base").exists()  # before anything is computed
    with pytest.raises(ValueError, match=r"loop\.warmup: no arm uses it"):
        full = {"full": {"schedule": "fixed_model", "rule": "full"}}
        run(tmp_path / "fourth", model_folder, data, *words, arms=full)
    with pytest.raises(ValueError, match="not the `warmup` folder of a run"):
        words = ["--loop.warmup", str(first / "arms")]
        run(tmp_path / "fifth", model_folder, data, *words, arms=arms)


def test_whole_samples_by_length_perplexity_and_rating(tmp_path: Path, model_folder: Path) -> None:
    # response tokens with EOS: 6 + digits; ratings fall with the number
    rows = [
        {**conversation("Say.", "It is" + " x" * i, id=f"s{i}", source="a"), "rating": -i}
        for i in range(1, 13)
    ]
    data = write_jsonl(tmp_path / "rated.jsonl", rows)
    names = ("length", "quality", "perplexity")
    arms = {n: {"schedule": "fixed_model", "rule": n, "scope": "whole_sample"} for n in names}
    words = ["--data.order", "rating", "--data.subsets", "2", "--selection.keep", "0.5"]
    folder = run(tmp_path, model_folder, data, *words, arms=arms)
    kept = {}
    for name in names:
        place = folder / "arms" / name / "cleaned"
        table = pq.read_table(place / "data.parquet").to_pylist()
        counts = {r["id"]: sum(r["response_mask"]) for r in table}
        kept[name] = [r["id"] for r in table if any(x != -100 for x in r["labels"])]
        tokens = sum(counts[i] for i in kept[name])
        budget = sum(counts.values()) // 2
        assert json.loads((place / MANIFEST).read_text())["kept_tokens"] == tokens <= budget
        # nothing that fitted was left out
        left = [counts[i] for i in counts if i not in kept[name]]
        assert tokens + max(left) > budget
    order = [f"s{i}" for i in range(1, 13)]
    assert kept["quality"] == order[: len(kept["quality"])]
    assert kept["length"] == order[-len(kept["length"]) :]
    assert not (folder / "warmup").exists()
    base = ScoreTable(folder / "scores" / "base")
    means = {id: float(base.of_row(k).mean()) for k, id in enumerate(base.values("id"))}
    assert sorted(kept["perplexity"]) == sorted(
        sorted(means, key=means.__getitem__)[: len(kept["perplexity"])]
    )
    with pytest.raises(ValueError, match=r"data\.order"):
        run(tmp_path / "unrated", model_folder, data, arms={"quality": arms["quality"]})
