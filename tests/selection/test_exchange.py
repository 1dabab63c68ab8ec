"""Several gloo processes select together: the masks of one process, and errors that all hear of."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch.distributed as dist

from tokenclean.selection import exchange as exchanges
from tokenclean.selection import topk
from tokenclean.selection.exchange import Exchange, here
from tokenclean.selection.rule import Rule, TokenBlock
from tokenclean.selection.select import Scope, Selected, SelectionConfig, select
from tokenclean.selection.topk import Histogram, kth_largest, ordered_keys

ROWS = 60
#: Block i holds the rows from edge i on; the third is empty, the last has one row.
EDGES = [0, 7, 19, 19, 24, 31, 48, 59, 60]
BLOCKS = len(EDGES) - 1
#: Which blocks each process has: evenly, all at the end, all at the start, some at neither.
SPLITS: dict[int, list[list[int]]] = {
    2: [[0, 4, BLOCKS], [0, 0, BLOCKS], [0, BLOCKS, BLOCKS]],
    4: [[0, 2, 4, 6, BLOCKS], [0, 0, 0, 0, BLOCKS], [0, 2, 3, 3, BLOCKS]],
}
VALUES = [-np.inf, -2.5, -1e-300, -0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 3.0, np.inf]

_rng = np.random.default_rng(11)
#: one sample in ten has no response token
COUNTS = _rng.integers(1, 30, ROWS) * (_rng.random(ROWS) < 0.9)
STARTS = np.concatenate([[0], np.cumsum(COUNTS)])
N = int(STARTS[-1])
SEEN = _rng.random(ROWS) < 0.3
EOS = _rng.random(N) < 0.1
COLUMNS: dict[str, np.ndarray] = {
    "base.nll": _rng.choice(VALUES, N),
    "reference.nll": np.zeros(N),
    "base.alone": np.zeros(N),
    "reference.gap": _rng.choice([0.0, 1.0, 2.0], N),
    "base.attention": _rng.random(N).astype(np.float32),
    "base.relevance": _rng.choice(np.linspace(0, 1, 40), N).astype(np.float32),
    "base.relevance_hidden": _rng.random(N).astype(np.float32),
    "base.attention_keys": _rng.random(N).astype(np.float32),
    "pool.position": _rng.integers(0, 99, N),
    "pool.truth": _rng.choice([-1, 0, 1], N).astype(np.int8),
    "pool.quality": np.repeat(_rng.choice([1.0, 2.0, 3.0], ROWS), COUNTS),
}
#: What the rules that are fitted need: numbers that can be added up.
FINITE = COLUMNS | {
    "base.nll": _rng.exponential(1.0, N).astype(np.float32),
    "reference.nll": _rng.exponential(0.9, N).astype(np.float32),
}


def blocks_of(
    columns: dict[str, np.ndarray], first: int = 0, last: int = BLOCKS
) -> Callable[[], Iterable[TokenBlock]]:
    def blocks() -> Iterator[TokenBlock]:
        for start, stop in pairwise(EDGES[first : last + 1]):
            part = slice(STARTS[start], STARTS[stop])
            yield TokenBlock(
                rows=np.arange(start, stop),
                counts=COUNTS[start:stop],
                seen=SEEN[start:stop],
                columns={name: values[part] for name, values in columns.items()},
                is_eos=EOS[part],
            )

    return blocks


@dataclass
class Case:
    config: SelectionConfig
    columns: dict[str, np.ndarray]
    few: int = 1 << 18
    known: bool = False


def cases() -> list[Case]:
    found = []
    for rule, scope in product(("token_cleaning", "perplexity", "random"), get_args(Scope)):
        # a mean of infinities of both signs is none
        columns = FINITE if scope == "whole_sample" else COLUMNS
        for keep, unseen in product((0.29, 0.6), (False, True)):
            eos = unseen and scope != "whole_sample"
            found.append(Case(SelectionConfig(rule, scope, keep, eos, unseen), columns))
    for rule, keep in product(("length", "quality"), (0.29, 0.6)):
        found.append(Case(SelectionConfig(rule, "whole_sample", keep), FINITE))
    for few, keep in product((0, 40), (1e-9, 0.01, 0.29, 0.95, 1.0)):
        found.append(Case(SelectionConfig(keep=keep), COLUMNS, few))
        found.append(Case(SelectionConfig(keep=keep), FINITE, few, known=True))
    for rule in ("forgetting", "pmi"):
        found.append(Case(SelectionConfig(rule), FINITE))
    found.append(Case(SelectionConfig("xtf_paper", options={"classes": 3}), FINITE))
    for rule in ("soft", "stm", "contradiction", "oracle", "full"):
        found.append(Case(SelectionConfig(rule), FINITE))
    for reading in ("keys", "standardised"):
        options: dict[str, Any] = {"reasoning": reading, "classes": 2}
        found.append(Case(SelectionConfig("xtf_code", options=options), FINITE))
    return found


def scores_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(columns["base.nll"] - columns["reference.nll"], dtype=np.float64)


def run(case: Case, exchange: Exchange, first: int, last: int) -> Selected:
    """What one process selects, which has the blocks from ``first`` up to ``last``."""
    histogram = None
    if case.known:
        histogram = Histogram()
        histogram.add(ordered_keys(scores_of(case.columns)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_FEW", case.few)
        return select(
            blocks_of(case.columns, first, last),
            case.config,
            3,
            histogram=histogram,
            noise=0.25,
            exchange=exchange,
            pool=blocks_of(case.columns),
        )


def in_processes(count: int, folder: Path, work: Callable[[Exchange], Any]) -> list[Any]:
    """What every one of several forked processes returns; they form a gloo group."""
    context = multiprocessing.get_context("fork")
    folder.mkdir(exist_ok=True)

    def begin(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        (folder / str(rank)).write_bytes(pickle.dumps(work(here())))
        dist.barrier()
        dist.destroy_process_group()

    started = [context.Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
        assert process.exitcode == 0
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_masks_are_those_of_one_process(count: int, tmp_path: Path) -> None:
    chosen = cases()

    def work(exchange: Exchange) -> list[Any]:
        found = []
        for split, case in product(SPLITS[count], chosen):
            got = run(case, exchange, *split[exchange.rank : exchange.rank + 2])
            found.append((got.keep, got.ranked, got.kept, got.cut, got.near_cut))
        return found

    of_process = in_processes(count, tmp_path / "run", work)
    alone = [run(case, Exchange(), 0, BLOCKS) for case in chosen]
    for i, (split, case) in enumerate(product(SPLITS[count], chosen)):
        want = alone[i % len(chosen)]
        parts = [found[i] for found in of_process]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), want.keep), (
            case.config,
            split,
        )
        for part in parts:
            assert part[1:] == (want.ranked, want.kept, want.cut, want.near_cut), (
                case.config,
                split,
            )
        config = case.config
        if config.make().ranked and config.scope == "global":
            ranked = ~np.repeat(SEEN, COUNTS) if config.exclude_seen else np.ones(N, dtype=bool)
            forced = int((EOS & ranked).sum()) if config.always_keep_eos else 0
            assert want.kept == max(int(int(ranked.sum()) * config.share), forced)


def test_ties_go_to_the_earliest_process(tmp_path: Path) -> None:
    """Nine scores by hand: 7, 1, 5 | nothing | 5, 5, 9 | 5, 0, 5; of the fives come the first."""
    parts = [[7.0, 1.0, 5.0], [], [5.0, 5.0, 9.0], [5.0, 0.0, 5.0]]

    def work(exchange: Exchange) -> list[Any]:
        found = []
        for few, k in product((0, 1 << 18), (0, 2, 4, 6, 9)):
            topk._FEW = few  # of this process alone
            keys = ordered_keys(np.array(parts[exchange.rank]))
            found.append(tuple(kth_largest(partial(list, [keys]), k, None, exchange)))
        return found

    five = int(ordered_keys(np.array([5.0]))[0])
    seven = int(ordered_keys(np.array([7.0]))[0])
    zero = int(ordered_keys(np.array([0.0]))[0])
    for rank, found in enumerate(in_processes(4, tmp_path / "run", work)):
        earlier = [0, 1, 1, 3][rank]
        want = [
            (topk.FIRST, 0, 0),
            (seven, 1, 0 if rank == 0 else 1),
            (five, 2, earlier),
            (five, 2, earlier),
            (zero, 8, 0),
        ]
        assert found == want * 2


def test_masks_come_to_the_first_process_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 101 | nothing | 0 | 11010, in pieces of two tokens at most."""
    monkeypatch.setattr(exchanges, "PIECE", 2)
    masks = ["101", "", "0", "11010"]

    def work(exchange: Exchange) -> list[list[str]]:
        found = []
        for order in (masks, masks[::-1], ["", "", "", ""]):
            mask = np.array([letter == "1" for letter in order[exchange.rank]], dtype=bool)
            pieces = exchange.to_first(mask)
            found.append(["".join(str(int(token)) for token in piece) for piece in pieces])
        return found

    first, *others = in_processes(4, tmp_path / "run", work)
    assert first == [["10", "1", "0", "11", "01", "0"], ["11", "01", "0", "0", "10", "1"], []]
    assert others == [[[], [], []]] * 3
    assert [p.tolist() for p in Exchange().to_first(np.array([True, False, True]))] == [
        [True, False],
        [True],
    ]


# -- errors -----------------------------------------------------------------------------------


@dataclass
class Drawing(Rule):
    """Draws like `random`, and cannot leave anything out."""

    def restart(self, seed: int, whole_samples: bool) -> None:
        self.generator = np.random.default_rng(seed)

    def priority(self, block: TokenBlock) -> np.ndarray:
        return self.generator.random(block.size)


def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    """And leaves them in step: the same processes go on with another selection."""
    damaged = FINITE | {"base.nll": FINITE["base.nll"].copy()}
    damaged["base.nll"][STARTS[EDGES[4]]] = np.nan  # the first token of process 1's part
    other = Histogram()
    other.add(ordered_keys(np.full(N, 0.25)))
    config, drawing = SelectionConfig(keep=0.5), SelectionConfig("random", keep=0.5)
    drawing.make = Drawing  # type: ignore[method-assign]

    def work(exchange: Exchange) -> tuple[dict[str, str], np.ndarray]:
        mine = exchange.part(BLOCKS)
        part = blocks_of(FINITE, mine.start, mine.stop)
        broken = blocks_of(damaged, mine.start, mine.stop)
        attempts: dict[str, Callable[[Exchange], Any]] = {
            "nan": lambda e: select(broken, config, exchange=e),
            "histogram": lambda e: select(part, config, histogram=other, exchange=e),
            "fit": lambda e: select(part, SelectionConfig("soft"), exchange=e),
            "draw": lambda e: select(part, drawing, exchange=e),
            "outside": _fails_in_process_1,
        }
        messages = {}
        for name, attempt in attempts.items():
            try:
                attempt(Exchange(exchange.rank, exchange.processes, exchange.group))
            except ValueError as error:
                messages[name] = str(error)
        return messages, select(part, config, exchange=exchange).keep

    found = in_processes(2, tmp_path / "run", work)
    for rank, (messages, _) in enumerate(found):
        first = "" if rank == 1 else "process 1: "
        assert messages["nan"].startswith(f"{first}scores contain NaN")
        assert messages["outside"] == f"{first}the disk is full"
        assert "not that of these scores" in messages["histogram"]
        assert "fitted to the whole pool" in messages["fit"]
        assert "no method `skip`" in messages["draw"]
    want = select(blocks_of(FINITE), config).keep
    assert np.array_equal(np.concatenate([keep for _, keep in found]), want)


def _fails_in_process_1(exchange: Exchange) -> None:
    with exchange.together():
        if exchange.rank == 1:
            raise ValueError("the disk is full")
        exchange.sum(np.zeros(3, dtype=np.int64))


def test_a_process_that_dies_is_missed(tmp_path: Path) -> None:
    def work(exchange: Exchange) -> str:
        if exchange.rank == 1:
            (tmp_path / "run" / "1").write_bytes(pickle.dumps(""))
            os._exit(0)
        with pytest.raises(ConnectionError) as caught, exchange.together():
            exchange.sum(np.zeros(3, dtype=np.int64))
        (tmp_path / "run" / "0").write_bytes(pickle.dumps(str(caught.value)))
        os._exit(0)  # nobody is left to take leave of

    assert in_processes(2, tmp_path / "run", work)[0].startswith("another process is gone")


def test_one_process_needs_no_group() -> None:
    exchange = here()
    assert (exchange.rank, exchange.processes) == (0, 1)
    values = np.array([2, 3])
    assert exchange.sum(values).tolist() == exchange.gather(values).tolist() == [2, 3]
    assert exchange.part(5) == slice(0, 5)
    with pytest.raises(ValueError, match="as it is"), exchange.together():
        raise ValueError("as it is")


def test_parts_are_contiguous_and_complete() -> None:
    for count, processes in product((0, 1, 3, 10), (1, 2, 4, 7)):
        parts = [Exchange(rank, processes).part(count) for rank in range(processes)]
        covered = [i for part in parts for i in range(count)[part]]
        assert covered == list(range(count))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
