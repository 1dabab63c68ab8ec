"""Samples as the page's own browser reads them: JSON within a budget of bytes.

What a sample reads as is the same in every arm and stands there once; an arm adds what it made of
it. Losses, scores and the like are whole numbers of 1/100,000: nats for losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from tokenclean.data.pieces import token_texts
from tokenclean.report.samples import Draw
from tokenclean.report.shown import Row

#: Units of stored losses, scores and weights.
UNITS: Final = 100_000
#: Units of percentiles: tenths of a percent.
TENTHS: Final = 1000


class Texts:
    """What samples read as, decoded once per sample whatever arms show it.

    Args:
        tokenizer: of the pool.

    Attributes:
        entries: of the JSON, in the order in which they were first asked for.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.entries: list[dict[str, Any]] = []
        self._places: dict[bytes, int] = {}
        self._read: dict[bytes, list[str]] = {}

    def of(self, row: Row) -> list[str]:
        """The text that each token shown of a row adds: T of them."""
        key = row.input_ids.tobytes()
        if key not in self._read:
            self._read[key] = token_texts(self._tokenizer, row.input_ids.tolist())
        return self._read[key]

    def entry(self, row: Row) -> dict[str, Any]:
        """A row's text as JSON."""
        edges = np.diff(np.concatenate([[0], row.response.astype(np.int8), [0]]))
        entry: dict[str, Any] = {
            "id": row.id,
            "source": row.source,
            "texts": self.of(row),
            "tokens": row.input_ids.tolist(),
            # begin and end of each response
            "spans": np.flatnonzero(edges).tolist(),
            "first": row.first,
            "length": row.length,
        }
        if row.truth is not None:
            entry["truth"] = row.truth.tolist()
        return entry

    def known(self, row: Row) -> bool:
        """Whether a row's text is among the entries."""
        return _key(row) in self._places

    def place(self, row: Row) -> int:
        """Number of a row's entry; it is made if there is none."""
        key = _key(row)
        if key not in self._places:
            self._places[key] = len(self.entries)
            self.entries.append(self.entry(row))
        return self._places[key]


def _key(row: Row) -> bytes:
    """Rows of one key have one entry."""
    truth = b"" if row.truth is None else row.truth.tobytes()
    parts = (row.id.encode("utf-8", "replace"), row.input_ids.tobytes(), row.response.tobytes())
    return b"\0".join((*parts, truth))


def embed(draws: Mapping[str, Draw], texts: Texts, budget: int) -> dict[str, list[dict[str, Any]]]:
    """The samples of all arms, most worth showing first, while the budget lasts.

    Args:
        draws: arm -> what was drawn of it.
        texts: receives what the samples read as.
        budget: bytes of the JSON of all arms and texts.

    Returns:
        Arm -> its samples as JSON, in pool order.
    """
    wanted = {name: draw.ordered() for name, draw in draws.items()}
    shown: dict[str, list[dict[str, Any]]] = {name: [] for name in draws}
    left = budget
    for turn in range(max((len(rows) for rows in wanted.values()), default=0)):
        for name, rows in wanted.items():
            if turn >= len(rows):
                continue
            row = rows[turn]
            made = _row(row, draws[name])
            cost = json_size(made) + (0 if texts.known(row) else json_size(texts.entry(row)))
            # a long sample is passed over, shorter ones after it may fit
            if cost <= left:
                left -= cost
                made["text"] = texts.place(row)
                shown[name].append(made)
    return {name: sorted(rows, key=lambda r: r["number"]) for name, rows in shown.items()}


def _row(row: Row, draw: Draw) -> dict[str, Any]:
    made: dict[str, Any] = {
        "text": 0,
        "number": row.number,
        "round": row.round,
        "kept": row.kept,
        "total": row.total,
        "reason": row.reason.tolist(),
    }
    if draw.has_uncleaned and row.round == 0:
        made["uncleaned"] = True
    columns = {
        "highest": np.array([row.highest]),
        "lowest": np.array([row.lowest]),
        "base": row.base,
        "reference": row.reference,
        "score": row.score,
        "priority": row.priority,
    }
    for name, values in columns.items():
        if not np.isnan(values).all():
            made[name] = whole(values, UNITS)
    ranks = {"score": draw.scores, "priority": draw.priorities}
    for name, sketch in ranks.items():
        if name in made and "uncleaned" not in made:
            made[f"{name}_rank"] = whole(sketch.shares_below(columns[name]), TENTHS)
    # by far the most tokens weigh 1 if kept, and nothing else
    if not np.array_equal(row.weight, (row.reason == 0).astype(np.float32)):
        made["weight"] = whole(row.weight, UNITS)
    return made


def whole(values: np.ndarray, units: int) -> list[int | None]:
    """Numbers in whole units; None for what is no number."""
    finite = np.isfinite(values)
    scaled = np.rint(np.where(finite, values, 0).astype(np.float64) * units).astype(np.int64)
    return [n if ok else None for n, ok in zip(scaled.tolist(), finite.tolist(), strict=True)]


def script_json(value: Any) -> str:
    """JSON that may stand in a page's script element: nothing in it ends the element or a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # half a pair of surrogates cannot be written; the escape of it can
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    for character in "<>&\u2028\u2029\x7f":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_size(value: Any) -> int:
    """Bytes of a value in the page."""
    return len(script_json(value).encode("utf-8"))


def sources_of(rows: Sequence[Mapping[str, Any]], texts: Texts) -> dict[str, int]:
    """How many of the samples shown each source has, sources in alphabetical order."""
    counts: dict[str, int] = {}
    for row in rows:
        source = texts.entries[row["text"]]["source"]
        counts[source] = counts.get(source, 0) + 1
    return dict(sorted(counts.items()))
