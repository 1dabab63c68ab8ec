"""Rows that come as tokens: ours, read back from an export, or another pipeline's.

A row has ``input_ids`` and at least one of

* ``labels``: -100, or the token's own id where it is to be learnt (not shifted);
* ``response_mask``: what is to be scored and cleaned, whether it is learnt or not;
* ``assistant_masks``: the response where neither of the others says so, and what is learnt.

Without ``response_mask`` the labelled tokens are the response. ``attention_mask`` may mark padding
at the end, which is cut; ``weight`` gives each label a loss weight (a weight of 0 is no label);
``truth`` is a planted pool's, token by token. A column of null is as good as none. Where a row is a
conversation, too, and no export's, the conversation is taken: nobody says whose tokens these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Value of a label that carries no loss.
NO_LOSS = -100
#: Characters of a foreign value that a message shows.
SHOWN = 80
#: Columns of which one must stand beside ``input_ids``.
TARGETS = ("labels", "response_mask", "assistant_masks")


class BadRow(Exception):
    """Carries the reason from wherever a row is found wanting, and what could not be parsed."""

    def __init__(self, reason: str, content: str | None = None):
        super().__init__(reason)
        self.content = content


def shown(value: Any) -> str:
    """A foreign value as Python writes it, cut to `SHOWN` characters, for a message."""
    if isinstance(value, str | bytes):
        value = value[:SHOWN]  # a value of megabytes is not spelled out to be cut
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, nested too deep
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@dataclass(frozen=True)
class Tokens:
    """T tokens of one sample.

    Attributes:
        input_ids: int32, shape (T,).
        response_mask: bool, shape (T,); what scoring and cleaning look at.
        labels: int32, shape (T,); the token's id where it is to be learnt, else -100. Every label
            lies in the response.
        weight: of the labels, float32, shape (T,); 1 elsewhere.
        truth: int8, shape (T,), or None.
    """

    input_ids: np.ndarray
    response_mask: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    truth: np.ndarray | None = None


def are_tokens(row: Mapping[str, Any], known: bool = True) -> bool:
    """Whether a row comes as tokens.

    Args:
        known: a column of null does not count.
    """

    def has(name: str) -> bool:
        return row.get(name) is not None if known else name in row

    return has("input_ids") and any(map(has, TARGETS))


def read_tokens(row: Mapping[str, Any], vocabulary: int | None) -> Tokens:
    """The tokens of a row.

    Args:
        row: lists of numbers, or arrays.
        vocabulary: every id lies below it; None: nobody knows.

    Raises:
        BadRow: naming the column and the place in it.
    """
    input_ids = _integers(row, "input_ids")
    size = len(input_ids)
    length = size
    if (attention := _flags(row, "attention_mask", size)) is not None:
        length = int(attention.sum())
        if not attention[:length].all():
            raise BadRow(
                f"`attention_mask` is 0 at token {int(np.argmin(attention))} and 1 after it; only "
                "padding at the end can be cut"
            )
    if length == 0:
        raise BadRow("`input_ids` is empty")
    kept = slice(0, length)
    input_ids = input_ids[kept]
    if vocabulary is not None:
        outside = (input_ids < 0) | (input_ids >= vocabulary)
        if outside.any():
            at = int(np.argmax(outside))
            raise BadRow(
                f"token {at} is {input_ids[at]}, which is no id of the tokenizer's {vocabulary}"
            )
    labelled, response = _targets(row, input_ids, size)
    weight = _weights(row, labelled, size)
    labelled &= weight != 0.0
    truth = None
    if row.get("truth") is not None:
        truth = _aligned(row, "truth", size)[kept]
        if (odd := (truth < -1) | (truth > 1)).any():
            raise BadRow(f"`truth` is {truth[odd][0]}, not -1, 0 or 1")
        truth = np.where(response, truth, 0).astype(np.int8)
    return Tokens(
        input_ids=input_ids.astype(np.int32),
        response_mask=response,
        labels=np.where(labelled, input_ids, NO_LOSS).astype(np.int32),
        weight=np.where(labelled, weight, np.float32(1.0)),
        truth=truth,
    )


def _targets(
    row: Mapping[str, Any], input_ids: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are to be learnt, and which are the response: bool, like ``input_ids``."""
    kept = slice(0, len(input_ids))
    labelled = None
    if row.get("labels") is not None:
        labels = _aligned(row, "labels", size)[kept]
        labelled = labels != NO_LOSS
        if (wrong := labelled & (labels != input_ids)).any():
            at = int(np.argmax(wrong))
            raise BadRow(
                f"label {at} is {labels[at]}: neither the token's id, {input_ids[at]}, nor "
                f"{NO_LOSS} (labels are not shifted)"
            )
    response = _flags(row, "response_mask", size)
    assistant = _flags(row, "assistant_masks", size)
    if labelled is None and response is None and assistant is None:
        raise BadRow(f"none of {', '.join(f'`{name}`' for name in TARGETS)} beside `input_ids`")
    for name, mask in (("response_mask", response), ("assistant_masks", assistant)):
        # the first token's label means nothing, so it contradicts nothing
        if labelled is not None and mask is not None and (labelled & ~mask[kept])[1:].any():
            at = 1 + int(np.argmax((labelled & ~mask[kept])[1:]))
            raise BadRow(f"token {at} has a label, but `{name}` leaves it out")
    if labelled is None:
        learnt = assistant if assistant is not None else response
        assert learnt is not None
        labelled = learnt[kept].copy()
    response = labelled.copy() if response is None else response[kept].copy()
    if (outside := (labelled & ~response)[1:]).any():
        raise BadRow(
            f"`assistant_masks` has token {1 + int(np.argmax(outside))}, but `response_mask` "
            "leaves it out"
        )
    # nothing precedes the first token, so nothing can predict it
    labelled[:1] = response[:1] = False
    return labelled, response


def _weights(row: Mapping[str, Any], labelled: np.ndarray, size: int) -> np.ndarray:
    """Loss weight of each token, float32; without meaning where there is no label."""
    values = row.get("weight")
    if values is None:
        return np.ones(len(labelled), dtype=np.float32)
    if not isinstance(values, list | np.ndarray) or len(values) != size:
        raise BadRow(f"`weight` is no list of {size} numbers, one per token")
    if isinstance(values, list):
        if not set(map(type, values)) <= {int, float, type(None)}:
            raise BadRow("`weight` holds something that is no number")
        values = [np.nan if value is None else value for value in values]
    try:
        with np.errstate(over="ignore"):  # too large for float32 is infinite
            weight = np.array(values, dtype=np.float32)[: len(labelled)]
    except OverflowError:
        raise BadRow("`weight` holds too large a number") from None
    if (wrong := labelled & ~np.isfinite(weight)).any():
        at = int(np.argmax(wrong))
        raise BadRow(
            f"the weight of token {at}, which has a label, is {weight[at]} as a float32 "
            f"(given: {shown(values[at])})"
        )
    return weight


def _integers(row: Mapping[str, Any], name: str) -> np.ndarray:
    """A list of whole numbers: int64."""
    values = row.get(name)
    if isinstance(values, np.ndarray) and values.dtype.kind in "iub":
        return values.astype(np.int64)
    if not isinstance(values, list):
        raise BadRow(f"`{name}` is {'null' if values is None else type(values).__name__}")
    if not set(map(type, values)) <= {int, bool}:
        odd = next(j for j, value in enumerate(values) if type(value) not in (int, bool))
        raise BadRow(f"`{name}` holds {shown(values[odd])} at token {odd}, no whole number")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise BadRow(f"`{name}` holds a number of more than 64 bits") from None


def _aligned(row: Mapping[str, Any], name: str, size: int) -> np.ndarray:
    values = _integers(row, name)
    if len(values) != size:
        raise BadRow(f"`{name}` has {len(values)} entries for {size} tokens")
    return values


def _flags(row: Mapping[str, Any], name: str, size: int) -> np.ndarray | None:
    """A mask of 0 and 1: bool; None if the row has none."""
    if row.get(name) is None:
        return None
    values = _aligned(row, name, size)
    if (odd := (values & ~1) != 0).any():
        raise BadRow(f"`{name}` holds {values[odd][0]}, neither 0 nor 1")
    return values.astype(bool)
