"""Selection of whole samples: by hand, for any cut into blocks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tokenclean.selection.rule import TokenBlock
from tokenclean.selection.select import SelectionConfig, select

#: response tokens' scores of six samples; means 2, -, 1, 2, -3, 0.5
ROWS = [[1.0, 3.0], [], [1.0, 1.0, 1.0], [2.0], [-3.0, -3.0], [0.0, 1.0]]


def blocks_of(cuts: list[int], seen: int | None = None) -> Callable[[], Iterable[TokenBlock]]:
    def blocks() -> Iterable[TokenBlock]:
        for start, stop in pairwise([0, *cuts, len(ROWS)]):
            part = ROWS[start:stop]
            yield TokenBlock(
                rows=np.arange(start, stop),
                counts=np.array([len(row) for row in part], dtype=np.int64),
                seen=np.arange(start, stop) == seen,
                columns={
                    "base.nll": np.array([value for row in part for value in row]),
                    "reference.nll": np.zeros(sum(map(len, part))),
                },
            )

    return blocks


def kept_rows(mask: np.ndarray) -> list[int]:
    stops = np.cumsum([len(row) for row in ROWS])
    parts = np.split(mask, stops[:-1])
    assert all(part.all() or not part.any() for part in parts), "a sample was cut"
    return [i for i, part in enumerate(parts) if len(part) and part.all()]


@pytest.mark.parametrize("cuts", [[], [1], [2, 4], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        # by mean: 0 (2 tokens), 3 (1), 2 (3), 5 (2), 4 (2); ten tokens in all
        (0.2, [0]),
        (0.3, [0, 3]),
        (0.5, [0, 3]),  # the next one has three tokens and only two are left
        (0.6, [0, 2, 3]),
        (1.0, [0, 2, 3, 4, 5]),
        (0.1, []),  # the best sample has two tokens
    ],
)
def test_the_best_samples_that_fit(cuts: list[int], keep: float, rows: list[int]) -> None:
    config = SelectionConfig(rule="token_cleaning", scope="whole_sample", keep=keep)
    selected = select(blocks_of(cuts), config)
    assert kept_rows(selected.keep) == rows
    assert selected.ranked == 10
    assert selected.kept == sum(len(ROWS[row]) for row in rows)
    assert selected.cut is None and selected.near_cut is None


def test_a_row_that_was_seen_takes_no_part() -> None:
    config = SelectionConfig(
        rule="token_cleaning", scope="whole_sample", keep=0.5, exclude_seen=True
    )
    selected = select(blocks_of([3], seen=0), config)
    assert selected.ranked == 8
    assert kept_rows(selected.keep) == [2, 3]  # four of the eight tokens left


def test_random_samples_depend_on_the_seed_alone() -> None:
    config = SelectionConfig(rule="random", scope="whole_sample", keep=0.7)
    masks = {
        seed: [tuple(select(blocks_of(cuts), config, seed).keep) for cuts in ([], [2], [1, 4])]
        for seed in range(8)
    }
    assert all(len(set(found)) == 1 for found in masks.values())
    assert len({found[0] for found in masks.values()}) > 1
    assert all(kept_rows(np.array(found[0])) for found in masks.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "length"}, "set whole_sample"),
        ({"rule": "quality", "scope": "sample"}, "set whole_sample"),
        ({"scope": "whole_sample", "always_keep_eos": True}, "always_keep_eos"),
        ({"scope": "samples"}, "whole_sample"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**options)


def test_nan_is_refused() -> None:
    (block,) = blocks_of([])()
    block["base.nll"][4] = np.nan
    config = SelectionConfig(rule="perplexity", scope="whole_sample")
    with pytest.raises(ValueError, match="NaN"):
        select(lambda: [block], config)
