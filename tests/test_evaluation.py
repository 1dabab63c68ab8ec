"""Accuracy of answers and quality of masks, on cases that can be counted by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import tiny_llama
from torch import Tensor

from tokenclean.arrow import TableWriter, list_array
from tokenclean.data.batches import Batch, collate
from tokenclean.data.cleaned import CleanedPool, cleaned_schema, write_cleaned_pool
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.evaluation.planted import (
    Accuracy,
    MaskQuality,
    accuracy,
    check_answers,
    mask_quality,
    mean_nll,
)
from tokenclean.models import Network
from tokenclean.publish import MANIFEST, write_json

EOS = 1


def write_pool(folder: Path, rows: list[dict[str, Any]], with_truth: bool = True) -> TokenPool:
    folder.mkdir(parents=True)
    columns = {
        "id": pa.array([f"row-{i}" for i in range(len(rows))]),
        "source": pa.array([r["source"] for r in rows]),
        "input_ids": list_array([np.asarray(r["ids"], np.int32) for r in rows], pa.int32()),
        "response_mask": list_array([np.asarray(r["mask"], bool) for r in rows], pa.bool_()),
    }
    if with_truth:
        truths = [np.asarray(r["truth"], np.int8) for r in rows]
        columns["truth"] = list_array(truths, pa.int8())
    with TableWriter(folder) as writer:
        writer.write(pa.record_batch(columns))
    write_json(
        folder / MANIFEST,
        {
            **dict.fromkeys(("fingerprint", "tokenizer", "vocabulary"), "x"),
            "kind": "token pool",
            "rows": len(rows),
            "eos_id": EOS,
            "statistics": {},
        },
    )
    return TokenPool(folder)


class CountingNetwork(Network):
    """A rigged model: after token t comes t + 1, with a loss of t nats."""

    def greedy(self, batch: Batch) -> Tensor:
        return batch.input_ids.flatten()[batch.predicting] + 1

    def forward(self, batch: Batch) -> Tensor:
        return batch.input_ids.flatten()[batch.predicting].float()


def rigged() -> Network:
    network = Network(tiny_llama(64))
    network.__class__ = CountingNetwork
    return network


POOL = [
    # prompt 5 6 | response 7 8 EOS: both answer tokens follow; the EOS (after 8) does not count
    {"source": "add", "ids": [5, 6, 7, 8, EOS], "mask": [0, 0, 1, 1, 1], "truth": [0, 0, 1, 1, 1]},
    # 30 after 6 is wrong but is no answer token; 31 is right
    {"source": "add", "ids": [5, 6, 30, 31], "mask": [0, 0, 1, 1], "truth": [0, 0, 0, 1]},
    # one of two answer tokens wrong: the answer is wrong
    {"source": "sort", "ids": [9, 10, 12], "mask": [0, 1, 1], "truth": [0, 1, 1]},
    # no answer token: not a question
    {"source": "sort", "ids": [9, 10, 11], "mask": [0, 1, 1], "truth": [0, 0, -1]},
    # an EOS alone is not an answer
    {"source": "chat", "ids": [9, 11, EOS], "mask": [0, 1, 1], "truth": [0, 0, 1]},
    # a 1 in the prompt does not count
    {"source": "sort", "ids": [9, 20, 21], "mask": [0, 0, 1], "truth": [0, 1, 1]},
]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_answer_accuracy_by_hand(tmp_path: Path, layout: Any, size: int) -> None:
    network = rigged()
    pool = write_pool(tmp_path / "pool", POOL)
    rows = TokenRows(pool)
    batches = [
        collate([rows[j] for j in range(i, min(i + size, 6))], layout) for i in range(0, 6, size)
    ]
    answers = check_answers(network, pool, batches)
    result = accuracy(answers)
    assert result == {"add": Accuracy(2, 2), "all": Accuracy(3, 4), "sort": Accuracy(1, 2)}
    assert result["all"].share == 0.75
    assert result["all"].standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_accuracy_of_nothing() -> None:
    assert Accuracy().share == 0.0 and Accuracy().standard_error == 0.0


def test_accuracy_needs_truth(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", POOL, with_truth=False)
    with pytest.raises(ValueError, match=r"data\.test_path: .* no `truth`"):
        check_answers(Network(tiny_llama(64)), pool, [])


def test_mean_nll_is_a_token_mean(tmp_path: Path) -> None:
    network = rigged()
    pool = write_pool(tmp_path / "pool", POOL)
    rows = TokenRows(pool)
    batches = [collate([rows[i] for i in part]) for part in ([0, 2, 4], [1, 3, 5])]
    result = mean_nll(network, pool, batches)
    # the rigged loss of a token is the token before it
    assert result["add"] == pytest.approx((6 + 7 + 8 + 6 + 30) / 5)
    assert result["sort"] == pytest.approx((9 + 10 + 9 + 10 + 20) / 5)
    assert result["chat"] == pytest.approx((9 + 11) / 2)
    assert result["all"] == pytest.approx((57 + 58 + 20) / 12)


def test_answer_accuracy_of_a_real_model(tmp_path: Path) -> None:
    model = tiny_llama(64)
    generator = np.random.default_rng(0)
    rows, right = [], 0
    for number in range(30):
        ids = generator.integers(2, 64, 6)
        if number % 2:  # half of the answers are what the model says
            for place in (4, 5):
                with torch.no_grad():
                    logits = model(torch.as_tensor(ids[None, :place])).logits
                ids[place] = int(logits[0, -1].argmax())
        with torch.no_grad():
            said = model(torch.as_tensor(ids[None])).logits[0].argmax(-1).numpy()
        right += bool((said[3:5] == ids[4:6]).all())
        truth = [0, 0, 0, 0, 1, 1]
        rows.append({"source": "s", "ids": ids, "mask": [0, 0, 0, 1, 1, 1], "truth": truth})
    pool = write_pool(tmp_path / "pool", rows)
    samples = TokenRows(pool)
    batch = collate([samples[i] for i in range(30)])
    assert 15 <= right < 30
    assert accuracy(check_answers(Network(model), pool, [batch]))["all"] == Accuracy(right, 30)


# -- masks ----------------------------------------------------------------------------------------


def write_cleaned(folder: Path, rows: list[dict[str, Any]]) -> CleanedPool:
    """A cleaned pool's table; columns that the judge does not read hold anything."""
    schema = cleaned_schema(with_truth=True)
    batch = pa.record_batch(
        {
            "id": [f"row-{i}" for i in range(len(rows))],
            "source": [r["source"] for r in rows],
            "input_ids": [list(range(10, 10 + len(r["truth"]))) for r in rows],
            "labels": [
                [10 + i if kept else -100 for i, kept in enumerate(r["kept"])] for r in rows
            ],
            "response_mask": [[bool(m) for m in r["mask"]] for r in rows],
            "base_nll": [[None] * len(r["truth"]) for r in rows],
            "reference_nll": [[None] * len(r["truth"]) for r in rows],
            "score": [r["score"] for r in rows],
            "priority": [r.get("priority", [None] * len(r["truth"])) for r in rows],
            "reason": [[0] * len(r["truth"]) for r in rows],
            "weight": [[1.0] * len(r["truth"]) for r in rows],
            "round": [r["round"] for r in rows],
            "truth": [r["truth"] for r in rows],
        },
        schema=schema,
    )
    write_cleaned_pool(folder / "cleaned", [batch], schema, {})
    return CleanedPool(folder / "cleaned", folder / "cache")


CLEANED = [
    {
        "source": "a",
        "round": 1,
        "mask": [0, 1, 1, 1, 1],
        "truth": [1, 1, 1, 0, -1],
        "score": [None, 3.0, 1.0, 1.0, 2.0],
        "kept": [0, 1, 0, 0, 1],
    },
    {
        "source": "b",
        "round": 2,
        "mask": [0, 1, 1],
        "truth": [0, 1, 0],
        "score": [None, 0.5, -7.0],
        "kept": [0, 1, 0],
    },
    # the warm-up's own row is not judged
    {
        "source": "a",
        "round": 0,
        "mask": [0, 1],
        "truth": [0, -1],
        "score": [None, None],
        "kept": [0, 1],
    },
]


def test_mask_quality_by_hand(tmp_path: Path) -> None:
    result = mask_quality(write_cleaned(tmp_path, CLEANED))
    assert sorted(result) == ["a", "all", "b"]
    # a: informative scores 3, 1; others 1, 2. Pairs won: 3>1, 3>2, tie 1=1 (half), 1<2: 2.5 of 4.
    # informative against corrupted (2): 3>2 won, 1<2 lost.
    assert result["a"] == MaskQuality(
        tokens=4,
        kept=2,
        informative=2,
        corrupted=1,
        auroc=2.5 / 4,
        auroc_corrupted=0.5,
        precision=0.5,
        recall=0.5,
        corrupted_kept=1.0,
    )
    b = result["b"]
    assert (b.tokens, b.kept, b.informative, b.corrupted) == (2, 1, 1, 0)
    assert (b.auroc, b.precision, b.recall) == (1.0, 1.0, 1.0)
    assert math.isnan(b.auroc_corrupted) and math.isnan(b.corrupted_kept)
    # all: informative 3, 1, 0.5; others 1, 2, -7. Won: 3 of 3, 1.5 of 3 (tie, lost, won), 1 of 3.
    assert result["all"].auroc == pytest.approx(5.5 / 9)
    assert result["all"].precision == pytest.approx(2 / 3)
    assert result["all"].recall == pytest.approx(2 / 3)


def test_missing_scores_give_no_auroc(tmp_path: Path) -> None:
    rows = [{**row, "score": [None] * len(row["truth"])} for row in CLEANED]  # type: ignore[arg-type]
    result = mask_quality(write_cleaned(tmp_path, rows))
    assert all(math.isnan(q.auroc) and math.isnan(q.auroc_corrupted) for q in result.values())
    assert result["a"].precision == 0.5  # the mask is judged all the same


def test_a_single_class_gives_no_auroc(tmp_path: Path) -> None:
    rows = [{**CLEANED[0], "truth": [1, 1, 1, 1, 1]}]
    result = mask_quality(write_cleaned(tmp_path, rows))["all"]
    assert math.isnan(result.auroc) and result.precision == 1.0 and result.recall == 0.5


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e6])
def test_auroc_equals_counted_pairs(tmp_path: Path, shift: float) -> None:
    # Far from [0, 1] and closely spaced: a sigmoid or float32 would tie what is distinct.
    generator = np.random.default_rng(0)
    score = shift + generator.integers(0, 40, 150) * 1e-3
    truth = generator.integers(-1, 2, 150)
    good, bad, corrupted = score[truth == 1], score[truth != 1], score[truth == -1]

    def counted(positive: np.ndarray, negative: np.ndarray) -> float:
        wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
        return float(wins / (len(positive) * len(negative)))

    row = {"source": "s", "round": 1, "mask": [1] * 150, "kept": [1] * 150}
    rows = [{**row, "truth": truth.tolist(), "score": score.tolist()}]
    result = mask_quality(write_cleaned(tmp_path, rows))["s"]
    assert result.auroc == pytest.approx(counted(good, bad), abs=1e-6)
    assert result.auroc_corrupted == pytest.approx(counted(good, corrupted), abs=1e-6)
