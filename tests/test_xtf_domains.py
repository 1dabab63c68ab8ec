"""The made-up domains say where they leave their topic, and XTF runs on them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import conversation, write_jsonl

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.xtf_domains import DOMAINS, STRAY, auroc, main, off_domain_table, rows
from tokenclean.scoring.attributes import AttributeSettings


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_leaves_the_topic_is_marked_to_the_character(domain: str) -> None:
    drawn = rows(domain, 80, seed=0)
    assert drawn == rows(domain, 80, seed=0) != rows(domain, 80, seed=1)
    assert rows(domain, 20, seed=0) == drawn[:20]
    patterns = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(s)) for s in STRAY]
    anywhere = re.compile("|".join(patterns))
    marked = 0
    for row in drawn:
        text = row["messages"][1]["content"]
        spans = [(start, stop) for _, start, stop, label in row["truth"] if label == 0]
        assert spans == [found.span() for found in anywhere.finditer(text)]
        marked += bool(spans)
    assert 20 < marked < 60


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_stray_sentence_holds_an_expert_word(domain: str) -> None:
    experts = {word.lower() for word in AttributeSettings(domain).words}
    for sentence in STRAY:
        words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", sentence).lower())
        assert not experts & set(words), sentence


def test_the_word_problems_are_right() -> None:
    for row in rows("maths", 60, seed=3):
        text = row["messages"][1]["content"]
        for term, result in re.findall(r"<<([\d*+/()-]+)=(\d+)>>", text):
            assert eval(term) == int(result)
        answer = re.findall(r"#### (\d+)$", text)
        assert len(answer) == 1
        assert answer[0] in text.rpartition("####")[0]


def test_the_functions_do_what_is_said() -> None:
    checked = set()
    for row in rows("code", 80, seed=3):
        text = row["messages"][1]["content"]
        scope: dict[str, object] = {}
        exec(re.findall(r"```python\n(.*?)```", text, flags=re.S)[0], scope)
        example = re.findall(r"For example, (.*) returns (.*)\.$", text, flags=re.M)
        if example and "txt" not in example[0][0]:
            assert eval(example[0][0], scope) == eval(example[0][1])
            checked.add(row["messages"][0]["content"].split(maxsplit=5)[-1])
    assert len(checked) > 4


def test_tables_by_hand(tmp_path: Path) -> None:
    # 5 reasoning, 8 relevance, 10 novelty and relevance; the prompt's token counts nowhere
    table = pa.table(
        {
            "truth": [[0, 1, 1, 0], [0, 1, 1]],
            "reason": [[1, 0, 5, 8], [10, 8, 0]],
            "response_mask": [[False, True, True, True], [True, True, True]],
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    lines, numbers = off_domain_table(tmp_path)
    inside, off = numbers["in the domain"], numbers["off the domain"]
    assert (inside["tokens"], off["tokens"]) == (4, 2)
    assert (inside["reasoning"], inside["relevance"], inside["dropped"]) == (25, 25, 50)
    assert (off["novelty"], off["relevance"], off["relevance alone"]) == (50, 100, 50)
    assert lines[-1] == "| off the domain | 2 | 0.0 % | 50.0 % | 100.0 % | 50.0 % | 100.0 % |"
    # pairs: 3 > 1, 3 > 2, 2 > 1 and a tie
    values, positive = np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])
    assert auroc(values, positive) == 3.5 / 4


def test_it_runs(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(model_folder), "--out", str(tmp_path / "out"), "--samples", "8"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    options = ["--", "--data.cache_dir", str(tmp_path / "cache"), *quiet]
    main([*words, *options])
    text = (tmp_path / "out" / "domains.md").read_text()
    assert re.findall("^## (.*)", text, flags=re.M) == [
        f"{domain}: {rule}" for domain in DOMAINS for rule in ("xtf_paper", "xtf_code")
    ]
    assert text.count("AUROC of task relevance") == 3 and text in capsys.readouterr().out
    own = write_jsonl(tmp_path / "own.jsonl", [conversation(f"Say {i}.", "Yes.") for i in range(9)])
    words[3] = str(tmp_path / "more")
    main([*words, "--pool", str(own), "--experts", "maths", *options])
    assert "off the domain" not in (tmp_path / "more" / "domains.md").read_text()
    with pytest.raises(SystemExit):
        main([*words, "--pool", str(own)])
