"""Questions of a planted test file as tasks of lm-evaluation-harness.

Prompts have the layout the models are trained on. The answer is what the row's truth spans leave
over of the response. Multiple choice gives the response's words up to the answer and asks which
of four values of the family comes next; generation gives the question alone and is right if the
first value of the family that the reply names, other than those in the question, is the answer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

CHOICES = 4


def find_file(data_dir: str | None, planted_test: str | None) -> Path:
    """The planted test file behind the options.

    Raises:
        ValueError: if there is none.
    """
    if planted_test is not None:
        return Path(planted_test)
    if data_dir is not None:
        for name in ("test.jsonl", "planted/test.jsonl"):
            if (Path(data_dir) / name).is_file():
                return Path(data_dir) / name
    raise ValueError(
        "no planted test file: give --data_dir (a folder that "
        "`python -m tokenclean.data.planted --out FOLDER` wrote) or --planted_test"
    )


def split_answer(row: dict[str, Any]) -> tuple[str, str]:
    """A response up to its answer, and the answer with the blank before it.

    Raises:
        ValueError: if the spans do not leave exactly one piece.
    """
    last = len(row["messages"]) - 1
    text = row["messages"][last]["content"]
    free = [True] * len(text)
    for message, start, end, _ in row["truth"]:
        if message == last:
            free[start:end] = [False] * (end - start)
    start = free.index(True) if any(free) else 0
    end = len(text) - free[::-1].index(True) if any(free) else 0
    if end <= start or not all(free[start:end]) or not text[start:end].strip():
        raise ValueError(f"{row['id']}: its truth spans do not leave one answer")
    return text[:start], text[start:end]


def read_family(path: Path, family: str) -> list[dict[str, Any]]:
    """Questions of one family, each with prompt, frame, answer and choices.

    Raises:
        ValueError: if the file has no question of the family, or too few values to choose from.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if line.strip() and (row := json.loads(line))["source"] == family]
    if not rows:
        raise ValueError(f"{path} has no question of the family {family}")
    cut = [split_answer(row) for row in rows]
    values = sorted({answer.strip() for _, answer in cut})
    if len(values) < CHOICES:
        raise ValueError(f"{path}: {family} has {len(values)} values, {CHOICES} are needed")
    docs = []
    for row, (frame, answer) in zip(rows, cut, strict=True):
        right = answer.strip()
        lead = answer[: len(answer) - len(answer.lstrip())]
        draw = Random(row["id"])
        choices = [right, *draw.sample([v for v in values if v != right], CHOICES - 1)]
        draw.shuffle(choices)
        asked = "".join(f"<|{m['role']}|>\n{m['content'].strip()}\n" for m in row["messages"][:-1])
        docs.append(
            {
                "id": row["id"],
                "question": row["messages"][-2]["content"],
                "prompt": f"{asked}<|assistant|>\n",
                "frame": frame,
                "answer": right,
                "choices": [lead + choice for choice in choices],
                "gold": choices.index(right),
                "values": values,
            }
        )
    return docs


def load(
    family: str, data_dir: str | None = None, planted_test: str | None = None, **_: Any
) -> Any:
    """The data set of one family."""
    from datasets import Dataset, DatasetDict

    docs = read_family(find_file(data_dir, planted_test), family)
    return DatasetDict({"test": Dataset.from_list(docs)})


def named_first(text: str, values: list[str]) -> str | None:
    """The value whose words stand first in a text; the longest of several that start there."""
    found = [
        (match.start(), -len(value), value)
        for value in values
        if (match := re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text))
    ]
    return min(found)[2] if found else None


def process_reply(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the reply's first value is the answer."""
    asked = [v for v in doc["values"] if named_first(doc["question"], [v]) is None]
    allowed = sorted({*asked, doc["answer"]})
    return {"exact_match": float(named_first(results[0], allowed) == doc["answer"])}
