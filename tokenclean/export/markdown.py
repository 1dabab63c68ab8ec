"""Markdown for cards: values that come from anywhere, in tables that stay tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def shown(name: str | None) -> str:
    """A model, tokenizer or file as a card may name it: without the folders of a machine."""
    if name is None:
        return "not known"
    return Path(name).name if Path(name).is_absolute() or name.startswith("~") else name


def cell(value: Any) -> str:
    """A value inside a Markdown table: on one line, without marks of its own."""
    text = " ".join(str(value).split())
    for mark in "\\`|<>*[]":
        text = text.replace(mark, "\\" + mark)
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is left-aligned, numbers are on the right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cell(v) for v in row)} |" for row in rows)])


def facts(pairs: dict[str, Any]) -> str:
    """A two-column table of what is known; None is left out."""
    rows = [f"| {key} | {cell(value)} |" for key, value in pairs.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def front_matter(entries: dict[str, Any], license: str | None) -> str:
    """The YAML head that a hub reads; it says a licence only if whoever exports does."""
    head = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True) if entries else ""
    said = yaml.safe_dump({"license": license}) if license else ""
    return f"---\n{said}{head}---\n"
