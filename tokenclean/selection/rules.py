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

RuleName = Literal[
    "token_cleaning", "contradiction", "random", "perplexity", "length", "quality", "full", "oracle"
]
Scope = Literal["global", "sample", "whole_sample"]

#: Reason codes of a cleaned pool, one int8 per token.
REASONS = {
    0: "kept",
    1: "prompt",
    2: "below the cut",
    3: "row seen by the reference",
    4: "contradicted by the reference",
}
KEPT, PROMPT, BELOW_CUT, SEEN, CONTRADICTED = 0, 1, 2, 3, 4


@dataclass
class SelectionConfig:
    """How much to keep and which tokens.

    Args:
        rule: ``token_cleaning`` ranks by score, base nll - reference nll (arXiv 2502.01968,
            Eq. 3); ``contradiction`` drops the tokens where the reference expected another one,
            see ``max_gap``; ``random`` ranks at random; ``perplexity`` ranks by the base's loss,
            lowest first; ``length`` (response tokens, longest first) and ``quality`` (the column
            that ``data.order`` names, highest first) rank whole samples; ``full`` keeps every
            response token; ``oracle`` keeps exactly the tokens whose planted truth is informative.
            ``contradiction``, ``full`` and ``oracle`` look at neither ``keep`` nor ``scope``.
        scope: rank over the whole pool (``global``, Eq. 4), within each sample (``sample``, the way
            the paper's RHO arm works), or whole samples by the mean over their tokens
            (``whole_sample``): the best ones whose tokens together are no more than int(n * keep).
        keep: share of response tokens kept, in (0, 1]; kept = int(n * keep) of the scope's n.
        always_keep_eos: rank every end-of-sequence target first. The number kept stays
            int(n * keep) unless there are more such targets than that.
        exclude_seen: neither rank nor train on rows that the reference was trained on.
        max_gap: of ``contradiction``, in nats: a token is kept while the reference's most likely
            token is at most exp(max_gap) times as likely as it. A high loss alone drops nothing:
            where the reference does not know, its best guess is unlikely too.
    """

    rule: RuleName = "token_cleaning"
    scope: Scope = "global"
    keep: float = 0.6
    always_keep_eos: bool = False
    exclude_seen: bool = False
    max_gap: float = 1.0

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
        if self.rule in ("length", "quality") and self.scope != "whole_sample":
            raise ValueError(
                f"selection.scope: {self.rule} is a property of samples, not of their tokens; set "
                "whole_sample"
            )
        if self.always_keep_eos and self.scope == "whole_sample":
            raise ValueError(
                "selection.always_keep_eos: whole samples keep or lose theirs; leave it out"
            )
        if not self.max_gap >= 0.0:
            raise ValueError(
                f"selection.max_gap: {self.max_gap} is not a gap in nats; 0 keeps only what the "
                "reference finds most likely, the default is 1"
            )

    @property
    def needs_scores(self) -> bool:
        """Losses under base and reference."""
        return self.rule == "token_cleaning"

    @property
    def needs_base(self) -> bool:
        """Losses under the base."""
        return self.needs_scores or self.rule == "perplexity"

    @property
    def needs_gap(self) -> bool:
        """The reference's gap alone; no base."""
        return self.rule == "contradiction"

    @property
    def needs_reference(self) -> bool:
        return self.needs_scores or self.needs_gap

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
        score: what the rule ranks by, higher first: float64, shape (n,), or None for rules that
            need none.
        is_eos: bool, shape (n,), or None where no end-of-sequence target goes first.
        truth: int8, shape (n,): 1 informative, 0 uninformative, -1 corrupted; None for rules that
            need none.
        seen: bool, shape (R,): the reference was trained on the row.
        gap: float32, shape (n,): log p(most likely token) - log p(token) under the reference, at
            least 0; None for rules that need none.
    """

    rows: np.ndarray
    counts: np.ndarray
    score: np.ndarray | None
    is_eos: np.ndarray | None
    truth: np.ndarray | None
    seen: np.ndarray
    gap: np.ndarray | None = None


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
        ValueError: if the rule needs scores, gaps or truth that the blocks lack, one is NaN, or the
            histogram is not that of the scores.
    """
    cut: float | None = None
    if not config.ranks_plainly:
        histogram = None
    if config.rule in ("full", "oracle", "contradiction"):
        masks = _unranked(blocks, config)
    elif config.scope == "sample":
        masks = _sample_masks(blocks, config, seed)
    elif config.scope == "whole_sample":
        masks = _whole_sample_masks(blocks, config, seed)
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


def _score(block: TokenBlock, rule: RuleName) -> np.ndarray:
    if block.score is None:
        tables = "a base" if rule == "perplexity" else "a base and a reference"
        raise ValueError(f"rule: {rule} needs {tables} score table")
    return block.score


def _truth(block: TokenBlock) -> np.ndarray:
    if block.truth is None:
        raise ValueError("rule: oracle needs a pool with planted truth; this one has none")
    return block.truth


def _gap(block: TokenBlock) -> np.ndarray:
    if block.gap is None:
        raise ValueError("rule: contradiction needs a reference score table with the column `gap`")
    if np.isnan(block.gap).any():
        raise ValueError("gaps contain NaN: the pass that produced them must be repeated")
    return block.gap


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
        near = np.abs(_score(block, config.rule) - cut) <= noise
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
        elif config.rule == "contradiction":
            agreed = _gap(block) <= config.max_gap
            mask &= agreed | _is_eos(block) if config.always_keep_eos else agreed
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
            keys = ordered_keys(_score(block, config.rule))
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


def _whole_sample_masks(blocks: Blocks, config: SelectionConfig, seed: int) -> Masks:
    """Best samples first, as long as their tokens fit the budget; some bytes per row in memory."""
    means, sizes = [], []
    for block, values in _values(blocks, config, seed):
        rankable = _rankable(block, config) & (block.counts > 0)
        sums = np.add.reduceat(np.append(values, 0.0), np.cumsum(block.counts) - block.counts)
        means.append(np.where(rankable, sums / np.maximum(block.counts, 1), -np.inf))
        sizes.append(np.where(rankable, block.counts, 0))
    mean, size = np.concatenate([[], *means]), np.concatenate([np.zeros(0, np.int64), *sizes])
    order = np.argsort(-mean, kind="stable")  # of equals, the earlier row
    fits = np.cumsum(size[order]) <= int(size.sum() * config.keep)
    chosen = np.zeros(len(size), dtype=bool)
    chosen[order[fits]] = True
    chosen &= size > 0
    start = 0
    for block in blocks():
        rows = chosen[start : (start := start + len(block.rows))]
        yield block, np.repeat(rows, block.counts)


def _values(
    blocks: Blocks, config: SelectionConfig, seed: int
) -> Iterator[tuple[TokenBlock, np.ndarray]]:
    """Each block with what its tokens are worth, float64, shape (n,).

    Raises:
        ValueError: if a value is NaN.
    """
    generator = np.random.default_rng(seed)
    for block in blocks():
        if config.rule == "random":
            # one draw per sample: a mean over its tokens would favour short ones
            values = np.repeat(generator.random(len(block.rows)), block.counts)
        else:
            values = _score(block, config.rule)
        if np.isnan(values).any():
            raise ValueError("scores contain NaN: the pass that produced them must be repeated")
        yield block, values
