"""Rules: which response tokens of a pool keep their loss.

A rule gives every response token a priority (higher is kept first) or decides by itself; scope and
keep share turn priorities into a mask. Tokens arrive in blocks of whole rows in pool order, so a
pool of any size is ranked in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokenclean.selection.topk import (
    FIRST,
    Histogram,
    kth_largest,
    ordered_keys,
    score_of,
    top_mask,
)

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

    @property
    def ranks_plainly(self) -> bool:
        """Every token of the pool is ranked by its score and nothing else."""
        return (
            self.rule == "token_cleaning"
            and self.scope == "global"
            and not self.always_keep_eos
            and not self.exclude_seen
        )


@dataclass
class TokenBlock:
    """Whole rows in pool order; all token arrays run over the rows' response tokens.

    Attributes:
        rows: pool row numbers, int64, shape (R,).
        counts: response tokens of each row, int64, shape (R,), summing to n.
        score: float64, shape (n,), or None for rules that need none.
        is_eos: bool, shape (n,), or None where no end-of-sequence target goes first.
        truth: int8, shape (n,): 1 informative, 0 uninformative, -1 corrupted; None for rules that
            need none.
        seen: bool, shape (R,): the reference was trained on the row.
    """

    rows: np.ndarray
    counts: np.ndarray
    score: np.ndarray | None
    is_eos: np.ndarray | None
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
        near_cut: share of the ranked tokens whose score is within the noise of the cut: those that
            another run of the same scoring could have put on its other side. None where there is
            no cut or the noise is not known.
    """

    keep: np.ndarray
    ranked: int
    kept: int
    cut: float | None
    near_cut: float | None = None


Blocks = Callable[[], Iterable[TokenBlock]]
Masks = Iterator[tuple[TokenBlock, np.ndarray]]


def select(
    blocks: Blocks,
    config: SelectionConfig,
    seed: int = 0,
    *,
    histogram: Histogram | None = None,
    noise: float | None = None,
    out: np.ndarray | None = None,
) -> Selected:
    """Apply a rule to a pool.

    Args:
        blocks: called once per pass over the pool; the same blocks every time.
        config: rule, scope and keep share.
        seed: of the ``random`` rule.
        histogram: of the keys of all scores, where it is known and ``config.ranks_plainly``: saves
            a pass, and changes nothing else.
        noise: what a score may be off by, in nats, for ``near_cut``.
        out: where the mask goes, bool, one entry per response token; by default a new array.

    Raises:
        ValueError: if the rule needs scores or truth that the blocks lack, scores are NaN, or the
            histogram is not that of the scores.
    """
    cut: float | None = None
    if not config.ranks_plainly:
        histogram = None
    if config.rule in ("full", "oracle"):
        masks = _unranked(blocks, config)
    elif config.scope == "sample":
        masks = _sample_masks(blocks, config, seed)
    else:
        if histogram is None:
            histogram = Histogram()
            for _, _, keys in _ranked(blocks, config, seed):
                histogram.add(keys)
        # End-of-sequence targets that go first may be more than the share.
        budget = max(int(histogram.total() * config.keep), histogram.firsts())
        key, above = kth_largest(
            lambda: (keys for _, _, keys in _ranked(blocks, config, seed)), budget, histogram
        )
        if config.rule == "token_cleaning" and key != FIRST:
            cut = score_of(key)
        masks = _global_masks(blocks, config, seed, key, budget - above)

    parts: list[np.ndarray] = []
    size = ranked = kept = near = 0
    for block, mask in masks:
        if out is None:
            parts.append(mask)
        else:
            out[size : size + len(mask)] = mask
        size += len(mask)
        kept += int(np.count_nonzero(mask))
        ranked += int(block.counts[_rankable(block, config)].sum())
        if cut is not None and noise is not None:
            near += _near(block, config, cut, noise)
    if histogram is not None and histogram.total() != ranked:
        raise ValueError("the histogram is not that of these scores; make it again")
    return Selected(
        keep=np.concatenate([np.zeros(0, dtype=bool), *parts]) if out is None else out,
        ranked=ranked,
        kept=kept,
        cut=cut,
        near_cut=None if cut is None or noise is None else near / ranked,
    )


def _score(block: TokenBlock) -> np.ndarray:
    if block.score is None:
        raise ValueError("rule: token_cleaning needs a base and a reference score table")
    return block.score


def _truth(block: TokenBlock) -> np.ndarray:
    if block.truth is None:
        raise ValueError("rule: oracle needs a pool with planted truth; this one has none")
    return block.truth


def _is_eos(block: TokenBlock) -> np.ndarray:
    if block.is_eos is None:
        raise ValueError("always_keep_eos needs to know the end-of-sequence targets")
    return block.is_eos


def _rankable(block: TokenBlock, config: SelectionConfig) -> np.ndarray:
    """Rows that take part, bool (R,)."""
    return ~block.seen if config.exclude_seen else np.ones(len(block.rows), dtype=bool)


def _near(block: TokenBlock, config: SelectionConfig, cut: float, noise: float) -> int:
    """Tokens ranked by their score that lie within the noise of the cut."""
    with np.errstate(invalid="ignore"):  # two equal infinities have no distance
        near = np.abs(_score(block) - cut) <= noise
    if config.exclude_seen:
        near &= np.repeat(_rankable(block, config), block.counts)
    if config.always_keep_eos:
        near &= ~_is_eos(block)
    return int(np.count_nonzero(near))


def _unranked(blocks: Blocks, config: SelectionConfig) -> Masks:
    for block in blocks():
        mask = np.repeat(_rankable(block, config), block.counts)
        if config.rule == "oracle":
            mask &= _truth(block) == 1
        yield block, mask


def _ranked(
    blocks: Blocks, config: SelectionConfig, seed: int
) -> Iterator[tuple[TokenBlock, np.ndarray | slice, np.ndarray]]:
    """Each block, where in it the tokens to be ranked are, and their keys."""
    # A fresh generator per pass: the same numbers each time, one per token in pool order.
    generator = np.random.default_rng(seed)
    for block in blocks():
        if config.rule == "random":
            keys = ordered_keys(generator.random(int(block.counts.sum())))
        else:
            keys = ordered_keys(_score(block))
        if config.always_keep_eos:
            keys[_is_eos(block)] = FIRST
        if config.exclude_seen:
            part = np.repeat(_rankable(block, config), block.counts)
            yield block, part, keys[part]
        else:
            yield block, slice(None), keys


def _global_masks(blocks: Blocks, config: SelectionConfig, seed: int, cut: int, ties: int) -> Masks:
    for block, part, keys in _ranked(blocks, config, seed):
        mask = np.zeros(int(block.counts.sum()), dtype=bool)
        mask[part], ties = top_mask(keys, cut, ties)
        yield block, mask


def _sample_masks(blocks: Blocks, config: SelectionConfig, seed: int) -> Masks:
    for block, part, keys in _ranked(blocks, config, seed):
        counts = block.counts[_rankable(block, config)]
        stops = np.cumsum(counts)
        starts = stops - counts
        row = np.repeat(np.arange(len(counts)), counts)
        budget = (counts * config.keep).astype(np.int64)
        if config.always_keep_eos:
            budget = np.maximum(budget, np.bincount(row[keys == FIRST], minlength=len(counts)))
        cuts = np.full(len(counts), FIRST, dtype=np.uint64)
        for i in np.flatnonzero(budget):
            place = counts[i] - budget[i]
            cuts[i] = np.partition(keys[starts[i] : stops[i]], place)[place]
        above, equal = keys > cuts[row], keys == cuts[row]
        ties = budget - np.bincount(row[above], minlength=len(counts))
        # Of a row's tokens at its cut, the first ones.
        earlier = np.concatenate([[0], np.cumsum(equal)])
        top = above | (equal & (earlier[:-1] - earlier[starts[row]] < ties[row]))
        mask = np.zeros(int(block.counts.sum()), dtype=bool)
        mask[part] = top
        yield block, mask
