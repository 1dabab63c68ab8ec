"""Message trees to conversations, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenclean.data.formats import Reader, Sample
from tokenclean.data.oasst import conversations, read_trees

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "convert_oasst1.py"


def message(id: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "message_id": id,
        "text": f"text {id}",
        "role": role,
        "lang": "en",
        "replies": list(replies),
        **more,
    }


#      p ── a1 ── q1 ── b1
#       │     └── q2          (nobody answered q2)
#       └── a2 (best)
#       └── a3 (deleted)
TREE = message(
    "p",
    "prompter",
    message(
        "a1",
        "assistant",
        message("q1", "prompter", message("b1", "assistant", rank=0)),
        message("q2", "prompter"),
        rank=1,
    ),
    message("a2", "assistant", rank=0),
    message("a3", "assistant", rank=2, deleted=True),
)


def ids(rows: Any) -> list[str]:
    return sorted(row["id"] for row in rows)


def test_every_answered_path_is_one_conversation() -> None:
    rows = list(conversations([TREE]))
    assert ids(rows) == ["a2", "b1"]
    longest = next(row for row in rows if row["id"] == "b1")
    assert [(m["role"], m["content"]) for m in longest["messages"]] == [
        ("user", "text p"),
        ("assistant", "text a1"),
        ("user", "text q1"),
        ("assistant", "text b1"),
    ]


def test_a_prompt_without_a_reply_ends_at_the_reply_before() -> None:
    tree = message("p", "prompter", message("a", "assistant", message("q", "prompter")))
    assert ids(conversations([tree])) == ["a"]


def test_best_only_takes_the_best_ranked_reply_at_each_fork() -> None:
    assert ids(conversations([TREE], best_only=True)) == ["a2"]


def test_language() -> None:
    german = {**TREE, "lang": "de"}
    assert ids(conversations([german], language="en")) == []
    assert ids(conversations([german, TREE], language="de")) == ["a2", "b1"]


def flat(root: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {k: v for k, v in root.items() if k != "replies"}
    row = {"rank": None, "deleted": False, **row, "parent_id": parent}
    return [row, *(r for child in root["replies"] for r in flat(child, root["message_id"]))]


@pytest.mark.parametrize("form", ["trees.jsonl", "messages.jsonl", "messages.parquet"])
def test_all_forms_of_the_release_read_alike(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    if form == "trees.jsonl":
        path.write_text(json.dumps({"message_tree_id": "p", "prompt": TREE}) + "\n")
    elif form == "messages.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in flat(TREE)))
    else:
        pq.write_table(pa.Table.from_pylist(flat(TREE)), path)
    assert ids(conversations(read_trees(path))) == ["a2", "b1"]


def test_another_file_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"instruction": "x"}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl:1"):
        list(read_trees(path))


def test_the_script_writes_what_the_reader_reads(tmp_path: Path) -> None:
    source, target = tmp_path / "trees.jsonl", tmp_path / "oasst1.jsonl"
    source.write_text(json.dumps({"prompt": TREE}) + "\n")
    command = [sys.executable, str(SCRIPT), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 conversations" in done.stdout
    samples = list(Reader([str(target)]))
    assert all(isinstance(s, Sample) and s.source == "oasst1" for s in samples)
    assert len(samples) == 2
