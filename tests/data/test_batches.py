"""Batches by hand, and plans that lose nothing, double nothing and keep their budget."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tokenclean.data.batches import (
    Batch,
    Sample,
    collate,
    plan_batches,
    plan_epoch,
    share_of_rank,
)


def sample(row: int, ids: list[int], positions: list[int], weights: list[float]) -> Sample:
    return Sample(
        row=row,
        input_ids=np.array(ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int64),
        weights=np.array(weights, dtype=np.float32),
    )


def three() -> list[Sample]:
    return [
        sample(4, [10, 11, 12, 13], [1, 2], [0.5, 0.25]),  # the last token is never needed
        sample(7, [20, 21], [], []),  # nothing to predict
        sample(2, [30, 31, 32, 33, 34], [3, 4], [1.0, -2.0]),
    ]


def test_packed_by_hand() -> None:
    batch = collate(three(), "packed", pad_id=99)
    # Longest first; each cut before its last target.
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.segments == [4, 2]
    # Target 33 at position 3 is predicted by position 2, and so on.
    assert batch.predicting.tolist() == [2, 3, 4, 5]
    assert batch.targets.tolist() == [33, 34, 11, 12]
    assert batch.weights.tolist() == [1.0, -2.0, 0.5, 0.25]
    assert batch.rows == [2, 4]
    assert batch.counts == [2, 2]
    assert batch.tokens == 6
    dtypes = {t.dtype for t in (batch.input_ids, batch.position_ids, batch.predicting)}
    assert dtypes | {batch.targets.dtype} == {torch.int64}
    assert batch.weights.dtype == torch.float32


def test_padded_by_hand() -> None:
    batch = collate(three(), "padded", pad_id=99)
    assert batch.input_ids.tolist() == [[30, 31, 32, 33], [10, 11, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.segments is None
    assert batch.predicting.tolist() == [2, 3, 4, 5]
    assert batch.targets.tolist() == [33, 34, 11, 12]
    assert batch.tokens == 8


def test_padded_rows_start_at_the_width() -> None:
    samples = [sample(r, [r * 10 + i for i in range(4)], [2], [1.0]) for r in (1, 2, 3)]
    batch = collate([*samples, sample(9, [5, 6, 7, 8], [1, 3], [1.0, 1.0])], "padded")
    assert batch.input_ids.tolist() == [[5, 6, 7], [10, 11, 0], [20, 21, 0], [30, 31, 0]]
    assert batch.predicting.tolist() == [0, 2, 4, 7, 10]
    assert batch.targets.tolist() == [6, 8, 12, 22, 32]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_predict_from_what_came_before_in_the_same_sample(layout: Any) -> None:
    rng = random.Random(0)
    samples = []
    for row in range(30):
        n = rng.randrange(2, 12)
        # Ids name row and position, so what stands where can be told from the ids alone.
        positions = sorted(rng.sample(range(1, n), rng.randrange(0, n)))
        weights = [rng.random() for _ in positions]
        samples.append(sample(row, [row * 100 + i for i in range(n)], positions, weights))
    batch = collate(samples, layout)
    before = batch.input_ids.flatten()[batch.predicting]
    assert (before + 1 == batch.targets).all()
    places = batch.position_ids.flatten()[batch.predicting]
    assert (places == before % 100).all()
    # Every target of every sample once, with its own weight.
    found = {
        row: (targets.tolist(), weights.tolist())
        for (row, targets), (_, weights) in zip(
            batch.split(batch.targets), batch.split(batch.weights), strict=True
        )
    }
    assert found == {
        s.row: ([s.row * 100 + int(p) for p in s.positions], s.weights.tolist())
        for s in samples
        if len(s.positions)
    }


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_of_nothing(layout: Any) -> None:
    for samples in ([], [three()[1]]):
        batch: Batch = collate(samples, layout)
        assert batch.tokens == 0
        assert batch.rows == batch.counts == []
        assert batch.predicting.shape == batch.targets.shape == batch.weights.shape == (0,)
        assert batch.targets.dtype == torch.int64


def test_collate_leaves_samples_as_they_were() -> None:
    samples = three()
    collate(samples)
    assert [s.row for s in samples] == [4, 7, 2]
    assert samples[0].input_ids.tolist() == [10, 11, 12, 13]


def test_moving_a_batch_keeps_what_is_no_tensor() -> None:
    batch = collate(three())
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.weights.device.type == "meta"
    assert moved.predicting.device.type == moved.targets.device.type == "meta"
    assert moved.position_ids.device.type == "meta"
    assert (moved.rows, moved.counts, moved.segments) == (batch.rows, batch.counts, batch.segments)
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("seed", range(10))
def test_plans_cover_every_row_once_within_budget(seed: int, layout: Any) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 2, 3, 7, 20, 50]) for _ in range(rng.randrange(1, 80))]
    budget = rng.choice([1, 10, 21, 64])
    plan = plan_batches(np.array(lengths), budget, layout)
    rows = [int(r) for batch in plan for r in batch]
    assert sorted(rows) == [r for r, n in enumerate(lengths) if n > 0]
    # Longest first, equal lengths in their own order.
    assert rows == sorted(rows, key=lambda r: (-lengths[r], r))

    def cost(members: list[int]) -> int:
        chosen = [lengths[r] for r in members]
        return sum(chosen) if layout == "packed" else len(chosen) * max(chosen)

    for number, batch in enumerate(plan):
        members = batch.tolist()
        assert len(members) == 1 or cost(members) <= budget
        if number + 1 < len(plan):
            # Greedy: one more row would not have fitted.
            assert cost([*members, int(plan[number + 1][0])]) > budget


def test_plans_by_hand() -> None:
    lengths = np.array([3, 9, 0, 4, 3, 2])
    packed = [b.tolist() for b in plan_batches(lengths, 8, "packed")]
    assert packed == [[1], [3, 0], [4, 5]]
    padded = [b.tolist() for b in plan_batches(lengths, 8, "padded")]
    assert padded == [[1], [3, 0], [4, 5]]
    assert [b.tolist() for b in plan_batches(lengths, 9, "packed")] == [[1], [3, 0], [4, 5]]
    assert [b.tolist() for b in plan_batches(lengths, 10, "packed")] == [[1], [3, 0, 4], [5]]
    assert [b.tolist() for b in plan_batches(lengths, 10, "padded")] == [[1], [3, 0], [4, 5]]
    assert plan_batches(np.zeros(3, dtype=np.int64), 8) == []
    assert plan_batches(np.zeros(0, dtype=np.int64), 8) == []


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (12, 4), (3, 4), (1, 1)])
def test_an_epoch_takes_every_row_once(rows: int, size: int) -> None:
    batches = plan_epoch(rows, size, seed=3, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size


def test_epochs_are_seeded_and_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(r) for b in plan_epoch(50, 8, seed, epoch) for r in b]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1, 2)}) == 6
    assert order(0, 0) != list(range(50))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 5, 48])
def test_ranks_share_without_loss_and_evenly(rows: int, world: int) -> None:
    lengths = np.random.default_rng(rows).integers(0, 2000, size=rows)
    shares = [share_of_rank(lengths, rank, world).tolist() for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(rows))
    assert all(share == sorted(share) for share in shares)
    loads = [int(lengths[share].sum()) for share in shares]
    # No process has more than the lightest and one sample.
    assert max(loads) - min(loads) <= int(lengths.max(initial=0))
    if rows == 48:
        assert max(loads) <= 1.02 * sum(loads) / world


def test_shares_by_hand() -> None:
    # Longest first, to the lighter: 9 to 0, 8 and 7 to 1, 6 to 0; at 15 each 5 to 0, then 4 to 1.
    lengths = np.array([5, 9, 7, 4, 8, 6])
    assert share_of_rank(lengths, 0, 2).tolist() == [0, 1, 5]
    assert share_of_rank(lengths, 1, 2).tolist() == [2, 3, 4]
    # A long one alone outweighs all the others.
    assert share_of_rank(np.array([3, 20, 3, 3, 3]), 0, 2).tolist() == [1]
