"""Cleaned samples to read: what each arm keeps, token by token (the paper's Appendix F)."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tokenclean.data.cleaned import CleanedPool, is_kept
from tokenclean.data.pieces import token_texts
from tokenclean.data.planted import CORRUPTED, UNINFORMATIVE
from tokenclean.models import BaseConfig
from tokenclean.models.loading import load_tokenizer
from tokenclean.publish import MANIFEST
from tokenclean.study.cells import Cell, Table, arms_of, by_variant, file_name
from tokenclean.study.rounds import cleaned_pool
from tokenclean.trust import check_remote_code

#: Samples shown per source.
PER_SOURCE: Final = 2


@dataclass(frozen=True)
class Piece:
    """A token's text and what became of it.

    Attributes:
        text: as it reads after the tokens before it.
        kind: ``prompt``, ``kept`` or ``dropped``.
        truth: planted label; None where there is none.
    """

    text: str
    kind: str
    truth: int | None


@dataclass(frozen=True)
class Example:
    """One sample as one arm cleaned it."""

    id: str
    source: str
    pieces: list[Piece]

    @property
    def counts(self) -> tuple[int, int]:
        """Kept and all response tokens."""
        kinds = [piece.kind for piece in self.pieces]
        return kinds.count("kept"), len(kinds) - kinds.count("prompt")

    def runs(self) -> Iterator[Piece]:
        """Neighbours of one kind and truth put together."""
        for (kind, truth), part in groupby(self.pieces, key=lambda p: (p.kind, p.truth)):
            yield Piece("".join(p.text for p in part), kind, truth)


def choose(pool: CleanedPool, uncleaned: Collection[str], per_source: int) -> list[str]:
    """Ids of samples to show: few per source, in the order of a hash of the ids.

    Where a truth is known, the first sample of a source has corrupted tokens and the others have
    none, if there are such samples.

    Args:
        pool: any arm's.
        uncleaned: ids to leave out: some arm did not clean them, as those of D_0.
        per_source: how many.
    """
    sources, ids = pool.values("source"), pool.values("id")
    truth = pool.lists("truth") if "truth" in pool.columns else None
    order = sorted(
        (row for row in range(len(pool)) if ids[row] not in uncleaned),
        key=lambda row: hashlib.sha256(ids[row].encode()).digest(),
    )
    chosen: list[str] = []
    for source in sorted(set(sources)):
        rows = [row for row in order if sources[row] == source]
        if truth is not None:
            bad = [row for row in rows if (truth[row] == CORRUPTED).any()]
            good = [row for row in rows if row not in set(bad)]
            rows = [*bad[:1], *good, *bad[1:]]
        chosen += [ids[row] for row in rows[:per_source]]
    return chosen


def read_example(pool: CleanedPool, row: int, tokenizer: Any) -> Example:
    """One row of a cleaned pool, decoded."""
    ids = pool.lists("input_ids")[row].tolist()
    response = pool.lists("response_mask")[row]
    kept = is_kept(pool.lists("labels")[row], pool.lists("weight")[row])
    truth = pool.lists("truth")[row] if "truth" in pool.columns else None
    pieces = [
        Piece(
            text,
            "prompt" if not response[i] else "kept" if kept[i] else "dropped",
            int(truth[i]) if truth is not None and response[i] else None,
        )
        for i, text in enumerate(token_texts(tokenizer, ids))
    ]
    return Example(pool.texts("id")[row], pool.texts("source")[row], pieces)


def examples_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """Samples of the lowest seed of each setting as Markdown and HTML, the arms side by side."""
    tables = []
    for variant, group in by_variant(cells).items():
        examples = read_examples(group[0])
        name = file_name("examples", variant)
        arms = list(dict.fromkeys(arm for sample in examples for arm in sample))
        rows: list[list[Any]] = []
        for sample in examples:
            first = next(iter(sample.values()))
            counts = [sample[arm].counts if arm in sample else None for arm in arms]
            kept = [None if count is None else count[0] for count in counts]
            rows.append([first.source, first.id, first.counts[1], *kept])
        notes = ["No arm of these runs cleaned anything."]
        if examples:
            title = f"Cleaned samples, {variant}, seed {group[0].seed}"
            (folder / f"{name}.md").write_text(markdown_page(title, examples), encoding="utf-8")
            (folder / f"{name}.html").write_text(html_page(title, examples), encoding="utf-8")
            notes = [
                f"The samples to read: [{name}.html]({name}.html), [{name}.md]({name}.md). They "
                "are chosen by a hash of their ids, the first of a family with corrupted tokens."
            ]
        columns = ["source", "sample", "response tokens", *(f"{arm} keeps" for arm in arms)]
        setting = "" if variant == "main" else f", {variant}"
        tables.append(Table(name, f"Samples shown{setting}", columns, rows, notes))
    return tables


def read_examples(cell: Cell) -> list[dict[str, Example]]:
    """For each chosen sample: arm -> the sample, for every arm that ranks by score.

    Raises:
        ValueError: if the run's configuration or its tokenizer cannot be found.
    """
    with ExitStack() as stack:
        pools = {}
        for arm in arms_of([cell]):
            folder = cell.place(arm) / "cleaned"
            if (folder / MANIFEST).is_file():
                pool = stack.enter_context(cleaned_pool(folder))
                if pool.manifest["selection"]["rule"] not in ("full", "random", "oracle"):
                    pools[arm] = pool
        if not pools:
            return []
        uncleaned = {
            id
            for pool in pools.values()
            for id, number in zip(pool.values("id"), pool.values("round"), strict=True)
            if number == 0
        }
        tokenizer = tokenizer_of(cell)
        rows = {
            arm: {id: row for row, id in enumerate(pool.values("id"))}
            for arm, pool in pools.items()
        }
        return [
            {
                arm: read_example(pool, rows[arm][id], tokenizer)
                for arm, pool in pools.items()
                if id in rows[arm]
            }
            for id in choose(next(iter(pools.values())), uncleaned, PER_SOURCE)
        ]


def tokenizer_of(cell: Cell) -> Any:
    """The tokenizer of a run's base.

    Raises:
        ValueError: if the run's configuration does not name the base.
    """
    base = (cell.config().get("model") or {}).get("base") or {}
    if "name" not in base:
        raise ValueError(
            f"{cell.folder}: its config.yaml does not name model.base, so its tokens cannot be "
            "decoded; leave reports that read them (`examples`, `rules`) out"
        )
    check_remote_code(base.get("trust_remote_code"), f"{cell.folder}: trust_remote_code")
    known = ("name", "tokenizer", "revision", "trust_remote_code")
    return load_tokenizer(BaseConfig(**{key: base[key] for key in known if key in base}))


# -- pages ----------------------------------------------------------------------------------------


def markdown_page(title: str, examples: Sequence[dict[str, Example]]) -> str:
    """Dropped tokens struck out, corrupted ones in double brackets, prompts quoted."""
    lines = [
        f"# {_escaped(title)}",
        "",
        "Kept tokens stand as they are, <del>dropped</del> ones are struck out, ⟦corrupted⟧ ones "
        "in brackets.",
        "",
    ]
    for sample in examples:
        first = next(iter(sample.values()))
        lines += [f"## {_escaped(first.source)}: {_escaped(first.id)}", ""]
        for arm, example in sample.items():
            kept, total = example.counts
            text = "".join(_markdown(piece) for piece in example.runs())
            lines += [f"**{_escaped(arm)}** ({kept} of {total} kept)", "", f"> {text}", ""]
    return "\n".join(lines)


def _markdown(piece: Piece) -> str:
    lead, body, tail = re.fullmatch(r"(\s*)(.*?)(\s*)", piece.text, flags=re.S).groups()  # type: ignore[union-attr]
    text = _escaped(body)
    if body and piece.kind == "dropped":
        # not ~~: between a word and a full stop it would not count as a mark
        text = f"<del>{text}</del>"
    if body and piece.truth == CORRUPTED:
        text = f"⟦{text}⟧"
    return _breaks(lead) + text.replace("\n", "<br>") + _breaks(tail)


def _breaks(blank: str) -> str:
    return blank.replace("\n", "<br>")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", html.escape(text, quote=False))


STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222; }
.sample { display: flex; flex-wrap: wrap; gap: 1em; margin-bottom: 1.5em; }
.arm { flex: 1 1 20em; max-width: 46em; border: 1px solid #ccc; border-radius: 4px; padding: .6em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; } h3 { font-size: 1em; margin: 0 0 .4em; }
.prompt { color: #777; }
.kept { background: #bfe3ff; }
.dropped { background: #ffe3bf; text-decoration: line-through; }
.corrupted { border-bottom: 3px solid #b3003c; }
.uninformative { border-bottom: 2px dotted #666; }
"""


def html_page(title: str, examples: Sequence[dict[str, Example]]) -> str:
    """One page without any outside resource; all text of data and models is escaped."""
    sections = []
    for sample in examples:
        first = next(iter(sample.values()))
        boxes = "".join(_box(arm, example) for arm, example in sample.items())
        sections.append(
            f"<h2>{html.escape(first.source)}: {html.escape(first.id)}</h2>"
            f'<div class="sample">{boxes}</div>'
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>"
        '<p><span class="kept">kept</span> <span class="dropped">dropped</span> '
        '<span class="prompt">prompt</span>, by planted truth: '
        '<span class="corrupted">corrupted</span> '
        '<span class="uninformative">uninformative</span></p>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _box(arm: str, example: Example) -> str:
    kept, total = example.counts
    spans = "".join(
        f'<span class="{_classes(piece)}">{html.escape(piece.text)}</span>'
        for piece in example.runs()
    )
    return (
        f'<div class="arm"><h3>{html.escape(arm)} ({kept} of {total} kept)</h3>'
        f'<div class="text">{spans}</div></div>'
    )


def _classes(piece: Piece) -> str:
    marks = {CORRUPTED: " corrupted", UNINFORMATIVE: " uninformative"}
    return piece.kind + ("" if piece.truth is None else marks.get(piece.truth, ""))
