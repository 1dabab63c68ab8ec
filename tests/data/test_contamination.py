"""Test questions in a pool: by hand, and of the planted pool itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import conversation, write_jsonl

from scripts import contamination as script
from tokenclean.data.contamination import contamination
from tokenclean.data.planted import PlantedSettings, evaluation_rows, pool_rows

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_a_run_of_words_counts_whatever_its_case_and_punctuation() -> None:
    pool = ["Before. ONE two, three four five -- six seven eight nine ten eleven twelve thirteen!"]
    found = contamination(pool, [("a", LONG), ("b", LONG.replace("seven", "7"))])
    assert found.texts == 2 and list(found.found) == ["a"]
    assert found.found["a"] == LONG.removesuffix(" fourteen")
    assert found.share == 0.5


def test_short_questions_must_be_there_as_a_whole() -> None:
    tests = [("whole", "Who is Ann?"), ("part", "Who is Ann Lee?"), ("mute", "Who?")]
    found = contamination(["I wonder who is Ann.", "Lee"], tests)
    assert (found.texts, found.too_short, list(found.found)) == (2, 1, ["whole"])


def test_a_run_does_not_reach_over_two_texts() -> None:
    assert not contamination(["who is", "ann"], [("a", "who is ann")]).found
    with pytest.raises(ValueError, match="words: 2"):
        contamination([], [], words=2)


def test_whole_texts() -> None:
    pool = ["Please: who is Ann?", "Who is Bob?"]
    tests = [("ann", "Who is Ann?"), ("bob", "who is bob")]
    assert list(contamination(pool, tests).found) == ["ann", "bob"]
    assert list(contamination(pool, tests, words=None).found) == ["bob"]


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_test_questions_are_not_in_the_pool(seed: int) -> None:
    """No question is one of the pool's, though its fact may be asked for there in other words."""
    settings = PlantedSettings(samples=2000, test_per_family=30, seed=seed)
    pool = [m["content"] for row in pool_rows(settings) for m in row["messages"]]
    tests = [(r["id"], r["messages"][-2]["content"]) for r in evaluation_rows(settings)]
    found = contamination(pool, tests, words=None)
    assert found.texts == len(tests) == 240
    assert not found.found
    # the check can fail: a test question put into the pool is found
    assert list(contamination([*pool, tests[7][1]], tests, words=None).found) == [
        name for name, text in tests if text == tests[7][1]
    ]


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [conversation("Who is Ann Lee?", "A friend.", id="1")])
    (tmp_path / "tests").mkdir()
    rows = [{"question": "Who is Ann Lee?"}, {"question": "Who is Bob?"}]
    write_jsonl(tmp_path / "tests" / "a.jsonl", rows)
    words = ["--pool", str(tmp_path / "pool.jsonl"), "--tests", str(tmp_path / "tests"), "--list"]
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "| 2 | 1 |" in out and "a.jsonl:1: who is ann lee" in out
    write_jsonl(tmp_path / "tests" / "a.jsonl", rows[1:])
    script.main(words)
    assert "| 1 | 0 |" in capsys.readouterr().out
    (tmp_path / "tests" / "a.jsonl").write_text(json.dumps({"frage": "x"}))
    with pytest.raises(SystemExit, match=r"a\.jsonl:1: none of the columns"):
        script.main(words)
