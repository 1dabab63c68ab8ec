"""Judging against planted truth: answers of the model, tokens of the mask.

Everything is reported per source (on the planted pool: per task family) and over all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from tokenclean.arrow import ArrowTable
from tokenclean.data.batches import Batch
from tokenclean.data.cleaned import is_kept
from tokenclean.data.pool import TokenPool
from tokenclean.models import Network

ALL = "all"


@dataclass
class Accuracy:
    """Correct answers out of the questions of one source."""

    correct: int = 0
    questions: int = 0

    @property
    def share(self) -> float:
        return self.correct / max(self.questions, 1)

    @property
    def standard_error(self) -> float:
        """Of a share of independent questions."""
        return float(np.sqrt(self.share * (1.0 - self.share) / max(self.questions, 1)))


#: Which questions were answered right: source -> id of the sample -> right or not.
Answers = dict[str, dict[str, bool]]


@torch.no_grad()
def check_answers(network: Network, pool: TokenPool, batches: Iterable[Batch]) -> Answers:
    """Which test questions the model answers right.

    An answer is right if every token whose truth is 1, EOS aside, is the model's most likely token
    given the question and the words of the response before it (greedy decoding, teacher-forced).

    Raises:
        ValueError: if the pool carries no truth, so that no answer is marked in it.
    """
    if pool.truth is None:
        raise ValueError("data.test_path: its samples carry no `truth` spans that mark the answers")
    result: Answers = {}
    for batch in batches:
        with network.clock(batch.tokens):
            moved = batch.to(network.device)
            right = (network.greedy(moved) == moved.targets).cpu()
        for row, hits in batch.split(right):
            positions = pool.response_positions(row)
            answer = pool.truth[row][positions] == 1
            answer &= pool.input_ids[row][positions] != pool.eos_id
            if answer.any():
                right_or_not = result.setdefault(pool.sources[row], {})
                right_or_not[pool.ids[row]] = bool(hits.numpy()[answer].all())
    return {source: dict(sorted(found.items())) for source, found in sorted(result.items())}


def accuracy(answers: Answers) -> dict[str, Accuracy]:
    """Correct answers per source and over all."""
    result = {s: Accuracy(sum(found.values()), len(found)) for s, found in answers.items()}
    if result:
        tallies = result.values()
        result[ALL] = Accuracy(sum(a.correct for a in tallies), sum(a.questions for a in tallies))
    return dict(sorted(result.items()))


@torch.no_grad()
def mean_nll(network: Network, pool: TokenPool, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss per target in nats, per source and over all."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        with network.clock(batch.tokens):
            losses = network(batch.to(network.device)).double()
        for row, nll in batch.split(losses):
            for key in (pool.sources[row], ALL):
                tally = sums.setdefault(key, [0.0, 0.0])
                tally[0] += float(nll.sum())
                tally[1] += len(nll)
    return {key: total / count for key, (total, count) in sorted(sums.items())}


@dataclass
class MaskQuality:
    """How well a rule's ranking and its mask agree with the truth, over one source's tokens.

    What a rule goes by is its priority, for most rules the score.

    Attributes:
        tokens, kept, informative, corrupted: counts of response tokens.
        auroc: of the priority, informative against all others; NaN for rules that have none, or
            with one class.
        auroc_corrupted: of the priority, informative against corrupted tokens alone.
        precision: informative share of the kept tokens.
        recall: kept share of the informative tokens.
        corrupted_kept: kept share of the corrupted tokens.
    """

    tokens: int
    kept: int
    informative: int
    corrupted: int
    auroc: float
    auroc_corrupted: float
    precision: float
    recall: float
    corrupted_kept: float


def mask_quality(cleaned: ArrowTable) -> dict[str, MaskQuality]:
    """Compare a cleaned pool with its planted truth, per source; rows of round 0 are left out."""
    names = ("truth", "labels", "weight", "score", "priority", "response_mask")
    columns = {name: cleaned.lists(name) for name in names}
    by_source: dict[str, list[dict[str, np.ndarray]]] = {}
    rounds, sources = cleaned.values("round"), cleaned.values("source")
    for row, source in enumerate(sources):
        if rounds[row] == 0:
            continue
        at = columns["response_mask"][row]
        found = {name: column[row][at] for name, column in columns.items()}
        priority = np.asarray(found["priority"], dtype=np.float64)
        if np.isnan(priority).all():
            priority = np.asarray(found["score"], dtype=np.float64)
        entry = {
            "truth": found["truth"],
            "kept": is_kept(found["labels"], found["weight"]),
            "priority": priority,
        }
        for key in (source, ALL):
            by_source.setdefault(key, []).append(entry)
    return {
        source: _quality({k: np.concatenate([e[k] for e in entries]) for k in entries[0]})
        for source, entries in sorted(by_source.items())
    }


def _quality(tokens: dict[str, np.ndarray]) -> MaskQuality:
    informative, corrupted = tokens["truth"] == 1, tokens["truth"] == -1
    kept, priority = tokens["kept"], tokens["priority"]
    both = informative | corrupted
    return MaskQuality(
        tokens=len(kept),
        kept=int(kept.sum()),
        informative=int(informative.sum()),
        corrupted=int(corrupted.sum()),
        auroc=_auroc(priority, informative),
        auroc_corrupted=_auroc(priority[both], informative[both]),
        precision=_share(kept & informative, kept),
        recall=_share(kept & informative, informative),
        corrupted_kept=_share(kept & corrupted, corrupted),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    if np.isnan(score).any() or positive.all() or not positive.any():
        return float("nan")
    # torchmetrics squashes scores outside [0, 1] by a sigmoid, which can tie distinct ones: hand
    # it ranks (ties shared) in [0, 1], which have the same AUROC.
    _, ranks = np.unique(score, return_inverse=True)
    scaled = torch.from_numpy(ranks / max(int(ranks.max()), 1))
    value: Any = binary_auroc(scaled, torch.from_numpy(positive.astype(np.int64)))
    return float(value)
