"""The keep masks of one run: where they agree, and what kinds of tokens they keep and drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tokenclean.data.cleaned import CleanedPool, is_kept
from tokenclean.data.kinds import KIND_ROWS, pool_kinds
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL
from tokenclean.publish import MANIFEST
from tokenclean.report.rounds import agreement
from tokenclean.selection.xtf import NOVELTY, REASONING, REASONS, RELEVANCE
from tokenclean.study.cells import Cell, arms_of
from tokenclean.study.examples import tokenizer_of
from tokenclean.study.rounds import cleaned_pool

#: XTF's attributes and the bit of each in a reason code, which is 4 plus the bits.
ATTRIBUTES: Final = {"reasoning": REASONING, "novelty": NOVELTY, "relevance": RELEVANCE}


@dataclass
class Mask:
    """The ranked response tokens of one arm's cleaned pool, in pool order; n of R rows.

    Attributes:
        ids: of the rows; those of round 0, which are not cleaned, are left out.
        sources: of the rows.
        counts: tokens of each row, int64, shape (R,).
        kept: whether a token is learnt: it has a label and a positive weight. Bool, shape (n,).
        reason: int8, shape (n,).
        base, score: nats, NaN where the pool holds none; float64, shape (n,).
    """

    ids: list[str]
    sources: list[str]
    counts: np.ndarray
    kept: np.ndarray
    reason: np.ndarray
    base: np.ndarray
    score: np.ndarray

    @classmethod
    def of(cls, pool: CleanedPool) -> Mask:
        """Read a cleaned pool."""
        rows = np.flatnonzero(np.array(pool.values("round")) != 0)
        lengths, response = pool.lists("response_mask").take(rows)
        response = response.astype(bool)
        row = np.repeat(np.arange(len(rows)), lengths)

        def column(name: str) -> np.ndarray:
            return pool.lists(name).take(rows)[1][response]

        ids, sources = pool.values("id"), pool.values("source")
        return cls(
            ids=[ids[r] for r in rows],
            sources=[sources[r] for r in rows],
            counts=np.bincount(row[response], minlength=len(rows)),
            kept=is_kept(column("labels"), column("weight")),
            reason=column("reason"),
            base=column("base_nll").astype(np.float64),
            score=column("score").astype(np.float64),
        )

    @property
    def decides(self) -> bool:
        """It drops something and keeps something."""
        return bool(self.kept.any() and not self.kept.all())

    @property
    def is_xtf(self) -> bool:
        return bool(np.isin(self.reason, list(REASONS)).any())

    def fails(self, attribute: str) -> np.ndarray:
        """What XTF dropped for an attribute, alone or together with others: bool, shape (n,)."""
        failed = (self.reason - 4) & ATTRIBUTES[attribute]
        return np.isin(self.reason, list(REASONS)) & (failed > 0)

    def among(self, ids: Sequence[str]) -> np.ndarray:
        """Which tokens belong to one of these rows: bool, shape (n,)."""
        wanted = set(ids)
        return np.repeat(np.array([id in wanted for id in self.ids], dtype=bool), self.counts)

    def shared(self, other: Mask) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that both ranked: a bool mask for each, selecting the same tokens."""
        if self.ids == other.ids:
            return np.ones(len(self.kept), dtype=bool), np.ones(len(other.kept), dtype=bool)
        return self.among(other.ids), other.among(self.ids)


def kappa(one: np.ndarray, other: np.ndarray) -> float:
    """Cohen's kappa of two keep masks: (p_o - p_e) / (1 - p_e).

    Args:
        one, other: bool, shape (n,).

    Returns:
        1 for equal masks, 0 for the agreement that chance gives two masks of these shares; NaN
        where chance alone makes them agree everywhere.
    """
    return agreement(one, other).kappa if len(one) else math.nan


@dataclass
class Masks:
    """What the masks of one run say.

    Attributes:
        kappa: (arm, arm) -> see `kappa`, over the tokens that both ranked; arms that keep
            everything are left out.
        marginals: arm -> means in nats: base loss of kept tokens, of dropped ones, score of kept
            ones, of dropped ones. All arms by the same losses: see `measure`.
        kinds: arm -> row of `KIND_ROWS` -> tokens, kept ones; of XTF arms also how many failed in
            each of `ATTRIBUTES`. Empty for pools that are not planted.
        codes: XTF arm -> source -> reason code -> tokens; ``all`` is a source.
        ranked: XTF arm -> source -> ranked tokens.
        yardstick: the arms whose losses and scores the marginals are taken from.
    """

    kappa: dict[tuple[str, str], float] = field(default_factory=dict)
    marginals: dict[str, list[float]] = field(default_factory=dict)
    kinds: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    codes: dict[str, dict[str, dict[int, int]]] = field(default_factory=dict)
    ranked: dict[str, dict[str, int]] = field(default_factory=dict)
    yardstick: tuple[str | None, str | None] = (None, None)


def measure(cell: Cell) -> Masks:
    """Read every cleaned pool of a run.

    The marginals of all arms are of the same losses, so that they can be compared: the base's, and
    scores by the warm-up model, as the first fixed-model arm that has them holds them.
    """
    masks: dict[str, Mask] = {}
    kinds: dict[str, np.ndarray] = {}
    for arm in arms_of([cell]):
        folder = cell.place(arm) / "cleaned"
        if not (folder / MANIFEST).is_file():
            continue
        with cleaned_pool(folder) as pool:
            masks[arm] = Mask.of(pool)
            if not kinds and "truth" in pool.columns and set(masks[arm].sources) <= set(REGIMES):
                kinds = pool_kinds(pool, tokenizer_of(cell))
    found = Masks()
    deciding = [arm for arm, mask in masks.items() if mask.decides]
    for one in deciding:
        for other in deciding:
            here, there = masks[one].shared(masks[other])
            found.kappa[one, other] = kappa(masks[one].kept[here], masks[other].kept[there])
    _marginals(cell, masks, found)
    for arm, mask in masks.items():
        if mask.is_xtf:
            _count_codes(arm, mask, found)
        if kinds:
            rows = np.concatenate([kinds[id] for id in mask.ids])
            counted = [np.ones_like(mask.kept), mask.kept]
            counted += [mask.fails(attribute) for attribute in ATTRIBUTES] if mask.is_xtf else []
            tallies = [np.bincount(rows[what], minlength=len(KIND_ROWS)) for what in counted]
            found.kinds[arm] = {
                row: [int(tally[i]) for tally in tallies] for i, row in enumerate(KIND_ROWS)
            }
    return found


def _marginals(cell: Cell, masks: dict[str, Mask], found: Masks) -> None:
    arms = (cell.config().get("loop") or {}).get("arms") or {}
    fixed = [
        a for a in masks if (arms.get(a) or {}).get("schedule", "fixed_model") == "fixed_model"
    ]
    by_base = next((a for a in fixed if not np.isnan(masks[a].base).any()), None)
    by_score = next((a for a in fixed if not np.isnan(masks[a].score).any()), None)
    found.yardstick = (by_base, by_score)
    for arm, mask in masks.items():
        means = []
        for name, values in ((by_base, "base"), (by_score, "score")):
            if name is None:
                means += [math.nan, math.nan]
                continue
            here, there = mask.shared(masks[name])
            kept, value = mask.kept[here], getattr(masks[name], values)[there]
            means += [_mean(value[kept]), _mean(value[~kept])]
        found.marginals[arm] = means


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _count_codes(arm: str, mask: Mask, found: Masks) -> None:
    source = np.repeat(np.array(mask.sources), mask.counts)
    found.codes[arm], found.ranked[arm] = {}, {}
    for name in [ALL, *sorted(set(mask.sources))]:
        reason = mask.reason if name == ALL else mask.reason[source == name]
        found.codes[arm][name] = {code: int((reason == code).sum()) for code in REASONS}
        found.ranked[arm][name] = len(reason)
