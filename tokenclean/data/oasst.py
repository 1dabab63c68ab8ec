"""OASST1 message trees to Tulu conversations.

A tree holds one opening prompt and branching replies. A conversation is a path from the root to a
reply of the assistant that nobody answered; every such path is one sample, or, with
``best_only``, the single path that takes the best-ranked reply at each fork.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

_ROLES = {"prompter": "user", "assistant": "assistant"}


def read_trees(path: Path) -> Iterator[dict[str, Any]]:
    """Root messages, with their ``replies`` nested, of a release in any of its forms.

    Args:
        path: JSONL of trees (``prompt`` and nested ``replies``), or JSONL or Parquet of single
            messages (``message_id``, ``parent_id``, ``role``, ``text``).

    Raises:
        ValueError: naming the file, if a line fits neither form.
    """
    flat: list[dict[str, Any]] = []
    for line, row in enumerate(_rows(path), start=1):
        if "prompt" in row:
            yield row["prompt"]
        elif "message_id" in row and "parent_id" in row:
            flat.append(row)
        else:
            raise ValueError(f"{path}:{line}: neither a message tree nor a message of OASST1")
    replies: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for message in flat:
        replies[message["parent_id"]].append(message)
    for root in replies.pop(None, []):
        waiting = [root]
        while waiting:
            message = waiting.pop()
            message["replies"] = replies.get(message["message_id"], [])
            waiting += message["replies"]
        yield root


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    else:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON: {error}") from None


def conversations(
    trees: Iterable[dict[str, Any]], language: str | None = None, best_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows with ``id`` (of the last message), ``source`` and Tulu ``messages``.

    Args:
        trees: root messages; see `read_trees`.
        language: keep trees whose root is in this language, e.g. ``en``; all by default.
        best_only: one path per tree instead of all of them.
    """
    for root in trees:
        if language is not None and root.get("lang") != language:
            continue
        for path in _paths(root, best_only):
            yield {
                "id": str(path[-1]["message_id"]),
                "source": "oasst1",
                "messages": [{"role": _ROLES[m["role"]], "content": m["text"]} for m in path],
            }


def _paths(root: dict[str, Any], best_only: bool) -> Iterator[list[dict[str, Any]]]:
    if root.get("role") not in _ROLES or root.get("deleted"):
        return
    waiting: list[list[dict[str, Any]]] = [[root]]
    while waiting:
        path = waiting.pop(0)
        replies = [
            r
            for r in path[-1].get("replies") or []
            if r.get("role") in _ROLES and not r.get("deleted")
        ]
        # rank 0 is the best; an unranked reply comes last
        replies.sort(key=lambda r: r["rank"] if r.get("rank") is not None else len(replies))
        if best_only:
            replies = replies[:1]
        # A prompt without a reply teaches nothing: its path ends at the reply before it.
        answered = [r for r in replies if r["role"] == "assistant" or r.get("replies")]
        if path[-1]["role"] == "assistant" and not answered:
            yield path
        waiting += [[*path, r] for r in answered]
