"""What became of an arm, in plain figures: what it reached, which ends, samples and words it lost.

Facts to judge by, no judgement: the first lines of a report must not hide that a model got worse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.planted import CORRUPTED
from tokenclean.data.rows import NO_LOSS
from tokenclean.evaluation.planted import ALL
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.plain import number, share
from tokenclean.report.rounds import run_results
from tokenclean.report.tokens import Vocabulary, visible
from tokenclean.selection.rule import REASONS

#: Ranked tokens that an entry of the vocabulary needs to be spoken of.
OFTEN: Final = 20
#: Share of the dropped tokens that such entries must hold to be worth a line.
LEAST: Final = 0.01
#: Entries of the vocabulary named.
_NAMED: Final = 6
#: Reason codes are int8 and not negative.
_CODES: Final = 128
_INFORMATIVE: Final = 1
#: What every arm is held against, where the run measured it.
_AGAINST: Final = ("base", "full")


class Fate:
    """What became of the ranked response tokens of an arm, counted block by block.

    Args:
        eos_id: the end of the sequence; None where the pool does not say.

    Attributes:
        samples, emptied: rows with a ranked token, and those of them that keep none.
        ends, ends_kept: end-of-sequence tokens, and the kept ones.
        unlearnt: tokens of negative weight.
        reasons: dropped tokens by reason code, int64, shape (128,).
        truth, truth_kept: truth (1, 0, -1) -> tokens, kept ones; empty unless planted.
        ids, ids_kept: ranked and kept tokens by id, int64, shape (ids seen,).
    """

    def __init__(self, eos_id: int | None):
        self._eos = eos_id
        self.samples = self.emptied = self.ends = self.ends_kept = self.unlearnt = 0
        self.reasons = np.zeros(_CODES, np.int64)
        self.truth: dict[int, int] = {}
        self.truth_kept: dict[int, int] = {}
        self.ids = self.ids_kept = np.zeros(0, np.int64)

    def add(self, block: CleanedBlock, ranked: np.ndarray, kept: np.ndarray) -> None:
        """Count a block of n tokens: ``ranked`` and ``kept`` are bool, shape (n,)."""
        kept = kept & ranked
        self.unlearnt += int((ranked & (block.labels != NO_LOSS) & (block.weight < 0)).sum())
        rows = len(block.ids)
        any_ranked = np.bincount(block.row[ranked], minlength=rows) > 0
        any_kept = np.bincount(block.row[kept], minlength=rows) > 0
        self.samples += int(any_ranked.sum())
        self.emptied += int((any_ranked & ~any_kept).sum())
        if self._eos is not None:
            end = block.input_ids == self._eos
            self.ends += int((end & ranked).sum())
            self.ends_kept += int((end & kept).sum())
        self.reasons += np.bincount(block.reason[ranked & ~kept], minlength=_CODES)
        size = int(block.input_ids.max(initial=-1)) + 1
        self.ids = _sum(self.ids, np.bincount(block.input_ids[ranked], minlength=size))
        self.ids_kept = _sum(self.ids_kept, np.bincount(block.input_ids[kept], minlength=size))
        if block.truth is not None:
            for counts, among in ((self.truth, ranked), (self.truth_kept, kept)):
                values, found = np.unique(block.truth[among], return_counts=True)
                for value, n in zip(values.tolist(), found.tolist(), strict=True):
                    counts[value] = counts.get(value, 0) + n

    @property
    def dropped(self) -> int:
        return int(self.reasons.sum())


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of counts by id, shape (n,) and (m,): shape (max(n, m),)."""
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def verdict(run: FinishedRun, arm: CleanedArm, fate: Fate) -> list[tuple[str, str]]:
    """Questions and answers in plain text; those that do not arise are left out."""
    found = [
        ("Reached", _reached(run, arm.name)),
        ("Left", _left(fate)),
        ("Planted truth", _truth(fate)),
        ("Reasons", _reasons(arm.manifest, fate)),
        ("Never kept", _never_kept(run, fate)),
    ]
    return [(question, answer) for question, answer in found if answer]


def _reached(run: FinishedRun, name: str) -> str:
    """Of the arm's model and those that it is held against: accuracy and validation loss."""
    results = run_results(run)
    if name not in results:
        return ""
    accuracy = {n: r.accuracy[ALL] for n, r in results.items() if ALL in r.accuracy}
    losses = {n: r.validation_nll[ALL] for n, r in results.items() if ALL in r.validation_nll}
    parts = []
    if name in accuracy:
        shares = {n: a.share for n, a in accuracy.items()}
        parts.append(
            f"Its model answers {_percent(shares[name])} of "
            f"{number(accuracy[name].questions, 'test question')} right"
            f"{_held_against(shares, name, _percent)}."
        )
    if name in losses:
        parts.append(
            f"Validation loss {losses[name]:.3f} nats per response token"
            f"{_held_against(losses, name, lambda loss: f'{loss:.3f}')}."
        )
    return " ".join(parts)


def _held_against(values: dict[str, float], name: str, says: Callable[[float], str]) -> str:
    others = [f"{n}: {says(values[n])}" for n in _AGAINST if n in values and n != name]
    return f" ({', '.join(others)})" if others else ""


def _left(fate: Fate) -> str:
    if not fate.dropped:
        return ""
    parts = []
    if fate.ends:
        parts.append(
            f"{fate.ends_kept:,} of {number(fate.ends, 'end')} of responses "
            f"({share(fate.ends_kept, fate.ends)})"
        )
    parts.append(
        f"{fate.emptied:,} of {number(fate.samples, 'sample')} "
        f"({share(fate.emptied, fate.samples)}) with no token that carries loss"
    )
    return " kept; ".join(parts) + "."


def _truth(fate: Fate) -> str:
    """How the mask does against a planted pool's truth."""
    if not fate.dropped or not fate.truth:
        return ""
    total, kept = sum(fate.truth.values()), sum(fate.truth_kept.values())
    informative, right = (counts.get(_INFORMATIVE, 0) for counts in (fate.truth, fate.truth_kept))
    corrupted, wrong = (counts.get(CORRUPTED, 0) for counts in (fate.truth, fate.truth_kept))
    text = (
        f"{share(right, kept)} of the kept tokens are informative (of all ranked: "
        f"{share(informative, total)}). Kept are {share(right, informative)} of the informative"
    )
    return text + (f" and {share(wrong, corrupted)} of the corrupted." if corrupted else ".")


def _reasons(manifest: dict[str, Any], fate: Fate) -> str:
    """Why tokens were dropped, where a rule has several reasons."""
    names = manifest.get("reasons") or {}
    codes = sorted(np.flatnonzero(fate.reasons).tolist(), key=lambda c: (-fate.reasons[c], c))
    own = [code for code in names if int(code) not in REASONS]
    if not codes or (len(codes) < 2 and len(own) < 2):
        return ""
    said = [
        f"{share(n, fate.dropped)} of the dropped for {names.get(str(code), f'reason {code}')} "
        f"({n:,})"
        for code, n in ((code, int(fate.reasons[code])) for code in codes)
    ]
    return "; ".join(said) + "."


def _never_kept(run: FinishedRun, fate: Fate) -> str:
    """Entries of the vocabulary that are common and never carry loss."""
    often = np.flatnonzero(fate.ids >= OFTEN)
    never = often[fate.ids_kept[often] == 0] if len(often) else often
    if not len(never) or len(never) == len(often):
        return ""
    tokens = int(fate.ids[never].sum())
    if tokens < LEAST * fate.dropped:
        return ""
    text = (
        f"{len(never):,} of the {len(often):,} vocabulary entries that occur at least {OFTEN} "
        f"times; they hold {share(tokens, fate.dropped)} of the dropped tokens"
    )
    try:
        vocabulary = Vocabulary(run.tokenizer)
    except ValueError:
        return text + "."
    most = sorted(never.tolist(), key=lambda id: (-int(fate.ids[id]), id))[:_NAMED]
    named = ", ".join(f"“{visible(vocabulary.text(id))}” ({fate.ids[id]:,})" for id in most)
    return f"{text}. Most frequent: {named}."


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")
