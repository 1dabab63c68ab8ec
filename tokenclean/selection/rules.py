"""Rules: which response tokens of a pool keep their loss.

A rule gives every response token a priority (higher is kept first) or decides by itself; scope and
keep share turn priorities into a mask. Tokens arrive in blocks of whole rows in pool order, so a
pool of any size is ranked in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokenclean.selection.topk import ordered_keys, top_k_masks

RuleName = Literal["token_cleaning", "random", "full", "oracle"]
Scope = Literal["global", "sample"]

#: Reason codes of a cleaned pool, one int8 per token.
REASONS = {0: "kept", 1: "prompt", 2: "below the cut", 3: "row seen by the reference"}
KEPT, PROMPT, BELOW_CUT, SEEN = 0, 1, 2, 3


@dataclass
class SelectionConfig:
    """How much to keep and which tokens.

    Args:
        rule: ``token_cleaning`` ranks by score, base nll - reference nll (arXiv 2502.01968,
            Eq. 3); ``random`` ranks at random; ``full`` keeps every response token; ``oracle``
            keeps exactly the tokens whose planted truth is informative. The last two ignore
            ``keep`` and ``scope``.
        scope: rank over the whole pool (``global``, Eq. 4) or within each sample (``sample``,
            the way the paper's RHO arm works).
        keep: share of response tokens kept, in (0, 1]; kept = int(n * keep) of the scope's n.
        always_keep_eos: rank every end-of-sequence target first. The number kept stays
            int(n * keep) unless there are more such targets than that.
        exclude_seen: neither rank nor train on rows that the reference was trained on.
    """

    rule: RuleName = "token_cleaning"
    scope: Scope = "global"
    keep: float = 0.6
    always_keep_eos: bool = False
    exclude_seen: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise ValueError(
                f"selection.rule: {self.rule!r} is not one of {', '.join(get_args(RuleName))}"
            )
        if self.scope not in get_args(Scope):
            raise ValueError(
                f"selection.scope: {self.scope!r} is not one of {', '.join(get_args(Scope))}"
            )
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"selection.keep: {self.keep} is not a share in (0, 1]; the paper keeps 0.6"
            )

    @property
    def needs_scores(self) -> bool:
        return self.rule == "token_cleaning"

    @property
    def needs_truth(self) -> bool:
        return self.rule == "oracle"


@dataclass
class TokenBlock:
    """Whole rows in pool order; all token arrays run over the rows' response tokens.

    Attributes:
        rows: pool row numbers, int64, shape (R,).
        counts: response tokens of each row, int64, shape (R,), summing to n.
        score: float64, shape (n,), or None for rules that need none.
        is_eos: bool, shape (n,).
        truth: int8, shape (n,): 1 informative, 0 uninformative, -1 corrupted; None if unknown.
        seen: bool, shape (R,): the reference was trained on the row.
    """

    rows: np.ndarray
    counts: np.ndarray
    score: np.ndarray | None
    is_eos: np.ndarray
    truth: np.ndarray | None
    seen: np.ndarray


@dataclass
class Selected:
    """The mask, and what a reader wants to know about it.

    Attributes:
        keep: bool, one entry per response token in pool order.
        ranked: response tokens that were ranked (all, less those of excluded rows).
        kept: number of kept tokens.
        cut: smallest score kept by rank, at global scope of a rule that ranks by score; else None.
    """

    keep: np.ndarray
    ranked: int
    kept: int
    cut: float | None


def select(
    blocks: Callable[[], Iterable[TokenBlock]], config: SelectionConfig, seed: int = 0
) -> Selected:
    """Apply a rule to a pool.

    Args:
        blocks: called once per pass over the pool; the same blocks every time.
        config: rule, scope and keep share.
        seed: of the ``random`` rule.

    Raises:
        ValueError: if the rule needs scores or truth that the blocks lack, or scores are NaN.
    """
    ranked = sum(int(block.counts[_rankable(block, config)].sum()) for block in blocks())
    if config.rule == "full":
        masks: Iterable[np.ndarray] = (_token_wise(b, _rankable(b, config)) for b in blocks())
    elif config.rule == "oracle":
        masks = ((_truth(b) == 1) & _token_wise(b, _rankable(b, config)) for b in blocks())
    elif config.scope == "global":
        masks = _global_masks(blocks, config, seed, ranked)
    else:
        masks = _sample_masks(blocks, config, seed)
    keep = np.concatenate([np.zeros(0, dtype=bool), *masks])
    cut: float | None = None
    if config.rule == "token_cleaning" and config.scope == "global" and keep.any():
        start = 0
        for block in blocks():
            mask = keep[start : start + int(block.counts.sum())]
            start += len(mask)
            if config.always_keep_eos:
                mask = mask & ~block.is_eos
            if mask.any():
                least = float(_score(block)[mask].min())
                cut = least if cut is None else min(cut, least)
    return Selected(keep=keep, ranked=ranked, kept=int(keep.sum()), cut=cut)


def _score(block: TokenBlock) -> np.ndarray:
    if block.score is None:
        raise ValueError("rule: token_cleaning needs a base and a reference score table")
    return block.score


def _truth(block: TokenBlock) -> np.ndarray:
    if block.truth is None:
        raise ValueError("rule: oracle needs a pool with planted truth; this one has none")
    return block.truth


def _rankable(block: TokenBlock, config: SelectionConfig) -> np.ndarray:
    """Rows that take part, bool (R,)."""
    return ~block.seen if config.exclude_seen else np.ones(len(block.rows), dtype=bool)


def _token_wise(block: TokenBlock, row_values: np.ndarray) -> np.ndarray:
    return np.repeat(row_values, block.counts)


def _priorities(
    blocks: Callable[[], Iterable[TokenBlock]], config: SelectionConfig, seed: int
) -> Iterable[tuple[TokenBlock, np.ndarray]]:
    # A fresh generator per pass: the same numbers each time, one per token in pool order.
    generator = np.random.default_rng(seed)
    for block in blocks():
        if config.rule == "random":
            priority = generator.random(int(block.counts.sum()))
        else:
            priority = _score(block)
        keys = ordered_keys(priority)
        if config.always_keep_eos:
            keys[block.is_eos] = np.iinfo(np.uint64).max
        yield block, keys


def _global_masks(
    blocks: Callable[[], Iterable[TokenBlock]], config: SelectionConfig, seed: int, ranked: int
) -> Iterable[np.ndarray]:
    budget = int(ranked * config.keep)
    if config.always_keep_eos:
        forced = sum(int((b.is_eos & _token_wise(b, _rankable(b, config))).sum()) for b in blocks())
        budget = max(budget, forced)

    def keys() -> Iterable[np.ndarray]:
        for block, key in _priorities(blocks, config, seed):
            yield key[_token_wise(block, _rankable(block, config))]

    for block, mask in zip(blocks(), top_k_masks(keys, budget), strict=True):
        full = _token_wise(block, _rankable(block, config))
        full[full] = mask
        yield full


def _sample_masks(
    blocks: Callable[[], Iterable[TokenBlock]], config: SelectionConfig, seed: int
) -> Iterable[np.ndarray]:
    for block, keys in _priorities(blocks, config, seed):
        mask = np.zeros(len(keys), dtype=bool)
        stops = np.cumsum(block.counts)
        rankable = _rankable(block, config)
        for row, stop in enumerate(stops):
            start = stop - block.counts[row]
            if not rankable[row]:
                continue
            budget = int(int(block.counts[row]) * config.keep)
            if config.always_keep_eos:
                budget = max(budget, int(block.is_eos[start:stop].sum()))
            # Stable on the complement: descending keys, equal keys in order of position.
            order = np.argsort(~keys[start:stop], kind="stable")
            mask[start + order[:budget]] = True
        yield mask
