"""The data module: parts without loss, global batches whose weights add up, loaders that resume."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    conversation,
    sentencepiece_tokenizer,
    write_jsonl,
)
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.datamodule import GlobalBatch, TuluDataModule
from tokenclean.data.pool import BadData
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.models import BaseConfig, Network, load_tokenizer


def ready(path: Path | str, tmp_path: Path, **options: Any) -> TuluDataModule:
    """A data module over characters, set up."""
    module = TuluDataModule(str(path), cache_dir=str(tmp_path / "cache"), **options)
    module.use_tokenizer(character_tokenizer())
    module.prepare_data()
    module.setup()
    return module


def steps(module: TuluDataModule, rows: TokenRows | None = None) -> list[GlobalBatch]:
    return list(module.training_loader(rows or TokenRows(module.table)))


def rows_in(batches: list[GlobalBatch]) -> list[int]:
    return [row for batch in batches for micro in batch.micro for row in micro.rows]


# -- subsets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsets", [1, 2, 3, 5, 7, 40])
def test_parts_hold_every_row_once_and_are_equally_large(
    subsets: int, pool_file: Path, tmp_path: Path
) -> None:
    module = ready(pool_file, tmp_path, subsets=subsets)
    parts = module.subset_rows()
    assert len(parts) == subsets
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    again = ready(pool_file, tmp_path, subsets=subsets).subset_rows()
    assert [p.tolist() for p in again] == [p.tolist() for p in parts]


def test_shuffled_parts_follow_the_seed(pool_file: Path, tmp_path: Path) -> None:
    parts = {seed: ready(pool_file, tmp_path, seed=seed).subset_rows()[0] for seed in (0, 1)}
    assert parts[0].tolist() != parts[1].tolist()
    assert parts[0].tolist() != list(range(8))


def test_an_ordering_column_puts_the_best_rows_first(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, order="rating", subsets=5)
    parts = module.subset_rows()
    # Row i is rated i % 10: eight rows per part are two ratings of four rows each.
    for k, part in enumerate(parts):
        ratings = {9 - 2 * k, 8 - 2 * k}
        assert part.tolist() == [i for i in range(40) if i % 10 in ratings]
    # Of equal ratings the earlier row goes first: 13 rows are 9, 8, 7 and the first row rated 6.
    first = ready(pool_file, tmp_path, order="rating", subsets=3).subset_rows()[0]
    assert len(first) == 14
    wanted = sorted(range(40), key=lambda i: (-(i % 10), i))[:14]
    assert first.tolist() == sorted(wanted)


def test_a_chosen_part_is_what_the_loaders_give(pool_file: Path, tmp_path: Path) -> None:
    plain = ready(pool_file, tmp_path)
    parts = plain.subset_rows()
    assert plain.chosen_rows() is None
    one = ready(pool_file, tmp_path, subset=2)
    two = ready(pool_file, tmp_path, subset=[3, 0, 3])
    assert rows_in(list(one.train_dataloader())) != []
    assert sorted(rows_in(list(one.train_dataloader()))) == parts[2].tolist()
    chosen = sorted([*parts[0].tolist(), *parts[3].tolist()])
    assert sorted(row for batch in two.predict_dataloader() for row in batch.rows) == chosen


def test_more_parts_than_rows_are_refused(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, subsets=41)
    with pytest.raises(ValueError, match=r"^data\.subsets: 41 parts of a pool of 40"):
        module.subset_rows()


# -- scoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_scoring_sees_every_target_once_on_any_number_of_processes(
    budget: int, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ready(pool_file, tmp_path, token_budget=budget)
    found = {}
    for world in (1, 3):
        batches = []
        for rank in range(world):
            monkeypatch.setattr(module, "_place", lambda r=rank, w=world: (r, w))
            batches += list(module.predict_dataloader())
        for batch in batches:
            assert batch.tokens <= budget or len(batch.rows) == 1
            assert (batch.weights == 1).all()
        found[world] = {
            row: targets.tolist()
            for batch in batches
            for row, targets in batch.split(batch.targets)
        }
        assert sum(len(batch.rows) for batch in batches) == 40
    pool = module.pool
    assert found[1] == found[3]
    assert found[1] == {i: pool.input_ids[i][pool.response_mask[i]].tolist() for i in range(40)}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_process_scores_as_many_batches_as_the_others(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three one-row batches over up to seven processes: nobody is left without a batch."""
    rows = [conversation("q" * i, "r") for i in (1, 9, 17)]
    module = ready(write_jsonl(tmp_path / "f.jsonl", rows), tmp_path, token_budget=1)
    counts, seen = [], []
    for rank in range(world):
        monkeypatch.setattr(module, "_place", lambda r=rank: (r, world))
        batches = list(module.scoring_loader(TokenRows(module.pool)))
        counts.append(len(batches))
        seen += [row for batch in batches for row in batch.rows]
    assert len(set(counts)) == 1
    assert sorted(seen) == [0, 1, 2]


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("reduction", ["tokens", "published"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_weights_of_a_step_add_up_to_one_over_all_processes(
    world: int,
    reduction: Any,
    layout: Any,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ready(pool_file, tmp_path, batch_size=16, token_budget=120, reduction=reduction)
    module.layout = layout
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(module, "_place", lambda r=rank: (r, world))
        ranks.append(steps(module))
    assert [len(r) for r in ranks] == [3] * world
    seen: list[int] = []
    for shares in zip(*ranks, strict=True):
        micros = [micro for share in shares for micro in share.micro]
        total = sum(float(micro.weights.double().sum()) for micro in micros)
        assert total == pytest.approx(1.0, abs=1e-6)
        targets = sum(len(micro.targets) for micro in micros)
        assert {share.kept for share in shares} == {targets}
        assert {share.responses for share in shares} == {targets}
        assert all(m.tokens <= 120 or len(m.rows) == 1 for m in micros)
        seen += [row for micro in micros for row in micro.rows]
    # Every row once, 16 + 16 + 8.
    assert sorted(seen) == list(range(40))


def test_equation_one_weighs_every_token_alike(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, batch_size=16, token_budget=120)
    for step in steps(module):
        weights = torch.cat([micro.weights for micro in step.micro])
        assert torch.equal(weights, torch.full_like(weights, 1.0 / len(weights)))


def test_the_published_reduction_by_hand(tmp_path: Path) -> None:
    # Row i has i + 1 targets, EOS included; eight rows are a group of six and a group of two.
    path = write_jsonl(tmp_path / "f.jsonl", [conversation("q", "r" * i) for i in range(8)])
    module = ready(path, tmp_path, batch_size=8, reduction="published", seed=4)
    (step,) = steps(module)
    order = np.random.default_rng([4, 0]).permutation(8).tolist()
    first, second = order[:6], order[6:]
    expected = {}
    for group in (first, second):
        for row in group:
            # Mean over the group's targets, then mean over the two groups.
            expected[row] = 1.0 / 2.0 / sum(r + 1 for r in group)
    for micro in step.micro:
        for row, weights in micro.split(micro.weights):
            assert len(weights) == row + 1
            assert weights.tolist() == pytest.approx([expected[row]] * (row + 1), rel=1e-6)


def write_kept_rows(module: TuluDataModule, kept: list[int], folder: Path) -> Path:
    """A cleaned pool that keeps all response tokens of some rows and none of the others."""
    pool, schema = module.pool, cleaned_schema(with_truth=False)
    rows = []
    for i in range(len(pool)):
        ids, mask = pool.input_ids[i], pool.response_mask[i]
        none: list[None] = [None] * len(ids)
        rows.append(
            {
                "id": pool.ids[i],
                "source": pool.sources[i],
                "input_ids": ids.tolist(),
                "labels": np.where(mask & (i in kept), ids, -100).tolist(),
                "response_mask": mask.tolist(),
                "base_nll": none,
                "reference_nll": none,
                "score": none,
                "reason": np.where(mask, 0 if i in kept else 2, 1).tolist(),
                "weight": [1.0] * len(ids),
                "round": 0,
            }
        )
    manifest = {"tokenizer": fingerprint_tokenizer(module.tokeniser.tokenizer)}
    batch = pa.RecordBatch.from_pylist(rows, schema=schema)
    write_cleaned_pool(folder, [batch], schema, manifest)
    return folder


@pytest.mark.parametrize("reduction", ["tokens", "published"])
def test_emptied_rows_keep_their_slot_and_cost_nothing(
    reduction: Any, pool_file: Path, tmp_path: Path
) -> None:
    raw = ready(pool_file, tmp_path)
    options: dict[str, Any] = {"batch_size": 4, "reduction": reduction}
    kept = [1, 8, 9, 30]
    folder = write_kept_rows(raw, kept, tmp_path / "cleaned")
    module = ready(folder, tmp_path, **options)
    plan = np.random.default_rng([0, 0]).permutation(40).reshape(10, 4)
    found = steps(module)
    # Ten steps of four slots, as without cleaning, though most of them have nothing to train on.
    assert len(found) == 10
    counts = raw.pool.response_counts()
    for members, step in zip(plan.tolist(), found, strict=True):
        assert sorted(rows_in([step])) == sorted(set(members) & set(kept))
        assert step.kept == sum(counts[r] for r in members if r in kept)
        assert step.responses == sum(counts[r] for r in members)
        total = sum(float(micro.weights.double().sum()) for micro in step.micro)
        assert total == pytest.approx(1.0 if set(members) & set(kept) else 0.0, abs=1e-6)
        if not set(members) & set(kept):
            assert step.micro == []


def test_published_groups_without_targets_do_not_count(pool_file: Path, tmp_path: Path) -> None:
    raw = ready(pool_file, tmp_path)
    order = np.random.default_rng([0, 0]).permutation(40).tolist()
    # Of the first 18 rows in training order: groups of six with two, none and one kept row.
    kept = [order[0], order[5], order[12]]
    folder = write_kept_rows(raw, kept, tmp_path / "cleaned")
    step = steps(ready(folder, tmp_path, batch_size=18, reduction="published"))[0]
    counts = raw.pool.response_counts()
    expected = {
        kept[0]: 0.5 / (counts[kept[0]] + counts[kept[1]]),
        kept[1]: 0.5 / (counts[kept[0]] + counts[kept[1]]),
        kept[2]: 0.5 / counts[kept[2]],
    }
    (micro,) = step.micro
    assert sorted(micro.rows) == sorted(kept)
    for row, weights in micro.split(micro.weights):
        assert weights.tolist() == pytest.approx([expected[row]] * int(counts[row]), rel=1e-6)


def test_a_cleaned_pool_has_no_parts_and_nothing_to_score(pool_file: Path, tmp_path: Path) -> None:
    folder = write_kept_rows(ready(pool_file, tmp_path), [3], tmp_path / "cleaned")
    module = ready(folder, tmp_path)
    with pytest.raises(ValueError, match=r"^data\.path: .* is a cleaned pool; give the raw data"):
        module.predict_dataloader()
    assert rows_in(list(module.train_dataloader())) == [3]
    module.use_tokenizer(byte_level_tokenizer())
    with pytest.raises(ValueError, match="tokenised by another tokenizer"):
        module.setup()


def test_nothing_to_train_on_is_refused(pool_file: Path, tmp_path: Path) -> None:
    folder = write_kept_rows(ready(pool_file, tmp_path), [], tmp_path / "cleaned")
    with pytest.raises(ValueError, match=r"^data\.path: no token carries loss"):
        ready(folder, tmp_path).train_dataloader()


def targets_of(batches: list[GlobalBatch]) -> list[list[int]]:
    return [torch.cat([m.targets for m in batch.micro]).tolist() for batch in batches]


def test_an_interrupted_epoch_resumes_where_it_stopped(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, batch_size=6)
    whole = targets_of(steps(module))
    assert len(whole) == 7
    for done in range(8):
        loader: Any = module.train_dataloader()
        first = targets_of(list(islice(loader, done)))
        # islice stops before asking again, as a trainer does when it is stopped.
        state = loader.state_dict()
        resumed: Any = module.train_dataloader()
        resumed.load_state_dict(state)
        rest = targets_of(list(resumed))
        assert first + rest == (whole if done < 7 else whole + whole), done
        # The next epoch is whole again.
        assert len(list(resumed)) == 7


def test_an_epoch_interrupted_twice_resumes_where_it_stopped(
    pool_file: Path, tmp_path: Path
) -> None:
    module = ready(pool_file, tmp_path, batch_size=6)
    found, state = [], {"done": 0}
    for steps_done in (2, 3, 2):
        loader: Any = module.train_dataloader()
        loader.load_state_dict(state)
        found += targets_of(list(islice(loader, steps_done)))
        state = loader.state_dict()
    assert found == targets_of(steps(module))


class Recorder(LightningModule):
    """Trains a single number and notes the targets of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: GlobalBatch) -> torch.Tensor:
        self.seen += targets_of([batch])
        return self.number * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize("stop", [3, 7, 11])
def test_a_trainer_resumes_where_its_checkpoint_was_made(
    stop: int, pool_file: Path, tmp_path: Path
) -> None:
    def fit(recorder: Recorder, checkpoint: Path | None = None) -> None:
        every = ModelCheckpoint(
            tmp_path / "kept", filename="{step}", every_n_train_steps=stop, save_top_k=-1
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=3,
            limit_val_batches=0,
            logger=False,
            callbacks=every,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = ready(pool_file, tmp_path, batch_size=6)
        trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint)

    whole, rest = Recorder(), Recorder()
    fit(whole)
    # Seven steps an epoch, in another order each time.
    assert len(whole.seen) == 21
    assert whole.seen[:7] != whole.seen[7:14]
    fit(rest, tmp_path / "kept" / f"step={stop}.ckpt")
    assert rest.seen == whole.seen[stop:]


def test_epochs_differ_and_repeat(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, batch_size=40)
    loader: Any = module.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(rows_in(list(loader)))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] == orders[2]
    loader = ready(pool_file, tmp_path, batch_size=6).train_dataloader()
    firsts = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        firsts.append(sorted(rows_in([next(iter(loader))])))
    assert firsts[0] != firsts[1]


def test_a_step_moves_whole(pool_file: Path, tmp_path: Path) -> None:
    step = steps(ready(pool_file, tmp_path, token_budget=60))[0]
    moved = step.to("meta")
    assert {m.input_ids.device.type for m in moved.micro} == {"meta"}
    assert (moved.kept, moved.responses) == (step.kept, step.responses)


# -- pools --------------------------------------------------------------------------------------


def test_pools_are_made_once_and_reported_once(
    pool_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="tokenclean"):
        module = ready(pool_file, tmp_path)
        module.prepare_data()
    assert caplog.text.count("shapes found") == 1
    assert f"{{'{pool_file}': 'messages'}}" in caplog.text
    assert "| even | 20 |" in caplog.text
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")}
    assert len(made) == 1
    ready(pool_file, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")} == made
    # Another tokenizer, template or length, or other data, is another pool beside it.
    ready(pool_file, tmp_path, template="raw")
    ready(pool_file, tmp_path, max_length=64)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3
    lines = pool_file.read_text(encoding="utf-8").splitlines()
    write_jsonl(pool_file, lines[:-1])
    assert len(ready(pool_file, tmp_path).pool) == 39
    other = TuluDataModule(str(pool_file), cache_dir=str(tmp_path / "cache"))
    other.use_tokenizer(sentencepiece_tokenizer())
    other.prepare_data()
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 5


def test_held_out_rows_are_in_no_part(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path, validation_share=0.3)
    assert module.validation is not None
    train, held = set(module.pool.ids), set(module.validation.ids)
    assert not train & held
    assert train | held == {f"row-{i}" for i in range(40)}
    assert 2 < len(held) < 25
    assert sum(len(part) for part in module.subset_rows()) == len(train)
    rows = sorted(r for batch in module.val_dataloader() for r in batch.rows)
    assert rows == list(range(len(held)))


def test_validation_and_test_files_have_pools_of_their_own(pool_file: Path, tmp_path: Path) -> None:
    extra = write_jsonl(tmp_path / "extra.jsonl", [conversation("q", "r", id="v")])
    # The extra files need no ordering column.
    module = ready(
        pool_file, tmp_path, validation_path=str(extra), test_path=str(extra), order="rating"
    )
    assert module.validation is not None
    assert module.test is not None
    assert list(module.validation.ids) == list(module.test.ids) == ["v"]
    assert len(module.pool) == 40
    assert ready(pool_file, tmp_path).val_dataloader() == []


def test_bad_lines_stop_or_are_skipped(pool_file: Path, tmp_path: Path) -> None:
    lines = pool_file.read_text(encoding="utf-8").splitlines()
    path = write_jsonl(tmp_path / "bad.jsonl", [*lines[:3], "{", *lines[3:]])
    with pytest.raises(BadData, match=r"bad\.jsonl:4: not JSON"):
        ready(path, tmp_path)
    assert len(ready(path, tmp_path, on_bad_line="skip").pool) == 40
    # A pool made by skipping must not serve a run that asked to stop.
    with pytest.raises(BadData):
        ready(path, tmp_path)


def test_a_missing_ordering_column_is_reported_per_line(pool_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"pool\.jsonl:1: ordering column `stars` is None"):
        ready(pool_file, tmp_path, order="stars")


def test_several_paths_make_one_pool(pool_file: Path, tmp_path: Path) -> None:
    extra = write_jsonl(tmp_path / "extra.jsonl", [{"prompt": "q", "completion": "r"}])
    module = TuluDataModule([str(extra), str(pool_file)], cache_dir=str(tmp_path / "cache"))
    module.use_tokenizer(character_tokenizer())
    module.prepare_data()
    module.setup()
    assert list(module.pool.ids) == ["extra-1", *(f"row-{i}" for i in range(40))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": []}, "data.path: no path given"),
        ({"path": "missing.jsonl"}, "data.path: missing.jsonl does not exist"),
        ({"subsets": 0}, "data.subsets: 0 parts"),
        ({"subset": 5}, "data.subset: 5 is not one of the 5 parts"),
        ({"subset": [0, -1]}, "data.subset: -1 is not one of the 5 parts"),
        ({"subset": []}, "data.subset: an empty list"),
        ({"validation_share": 1.0}, "data.validation_share: 1.0 is not in [0, 1)"),
        ({"validation_share": -0.1}, "data.validation_share: -0.1 is not in [0, 1)"),
        (
            {"validation_share": 0.1, "validation_path": "x.jsonl"},
            "data.validation_share: give it or data.validation_path",
        ),
        ({"batch_size": 0}, "data.batch_size: 0"),
        ({"token_budget": 0}, "data.token_budget: 0"),
        ({"validation_path": "no.jsonl"}, "data.validation_path: no.jsonl does not exist"),
        ({"test_path": "no.jsonl"}, "data.test_path: no.jsonl does not exist"),
    ],
)
def test_wrong_options_are_refused_by_name(
    options: dict[str, Any], message: str, pool_file: Path
) -> None:
    with pytest.raises(ValueError, match=r"^data\.") as caught:
        TuluDataModule(**{"path": str(pool_file), **options})
    assert message in str(caught.value)


def test_the_tokenizer_comes_first(pool_file: Path) -> None:
    with pytest.raises(RuntimeError, match="use_tokenizer"):
        TuluDataModule(str(pool_file)).prepare_data()


def test_padding_uses_the_tokenizers_id(pool_file: Path, tmp_path: Path) -> None:
    module = ready(pool_file, tmp_path)
    module.use_tokenizer(byte_level_tokenizer())
    assert module.pad_id == 2
    module.prepare_data()
    module.setup()
    module.layout = "padded"
    (batch,) = module.predict_dataloader()
    assert (batch.input_ids[-1, -1]).item() == 2


def test_cutting_after_the_last_target_changes_only_what_is_computed(
    model_folder: Path, tmp_path: Path
) -> None:
    # a second user turn follows the last answer: it predicts nothing
    turns = ("user", "assistant", "user")
    rows = [
        {"messages": [{"role": r, "content": f"{r} says {i} " * (i + 1)} for r in turns]}
        for i in range(9)
    ]
    network = Network.load(BaseConfig(str(model_folder)))
    losses, tokens = [], []
    for cut in (True, False):
        data = TuluDataModule(
            str(write_jsonl(tmp_path / "pool.jsonl", rows)),
            max_length=96,
            cache_dir=str(tmp_path / "cache"),
            cut_after_last_target=cut,
        )
        data.use_tokenizer(load_tokenizer(BaseConfig(str(model_folder))))
        data.prepare_data()
        data.setup()
        pool = TokenRows(data.pool)
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            batches = list(data.scoring_loader(pool))
            for batch in batches:
                found |= dict(batch.split(network(batch)))
        losses.append(found)
        tokens.append(sum(batch.tokens for batch in batches))
        (step, *_) = data.training_loader(pool)
        assert sum(micro.tokens for micro in step.micro) == tokens[-1]  # all nine in one step
    assert tokens[1] == sum(len(data.pool.input_ids[i]) for i in range(9))
    last = [int(data.pool.response_positions(i)[-1]) for i in range(9)]
    assert tokens[0] == sum(last) < tokens[1]
    for row in range(9):
        torch.testing.assert_close(losses[0][row], losses[1][row], rtol=0, atol=5e-6)
