"""Blocks of tokens -> their keep masks: one way for each scope, one for rules that do not rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenclean.selection.exchange import Exchange
from tokenclean.selection.rule import KEPT, Blocks, Rule, TokenBlock
from tokenclean.selection.topk import FIRST, ordered_keys, top_mask

if TYPE_CHECKING:
    from tokenclean.selection.select import SelectionConfig

Masks = Iterator[tuple[TokenBlock, np.ndarray]]


@dataclass
class Part:
    """What this process ranks, and how.

    Attributes:
        blocks: of its rows.
        rule: fitted to the whole pool.
        config: what is ranked within what, and how much of it is kept.
        seed: of rules that draw at random.
        exchange: with the other processes.
        before: rows and tokens of the earlier processes, where the rule asks for them.
    """

    blocks: Blocks
    rule: Rule
    config: SelectionConfig
    seed: int
    exchange: Exchange
    before: tuple[int, int] = (0, 0)

    def restart(self, whole_samples: bool) -> None:
        """A pass over the blocks begins."""
        self.rule.restart(self.seed, whole_samples)
        self.rule.skip(*self.before)

    def priority(self, block: TokenBlock) -> np.ndarray:
        """What the tokens are ranked by, float64, shape (n,).

        Raises:
            ValueError: if the rule has nothing to rank by.
        """
        values = self.rule.priority(block)
        if values is None:
            raise ValueError(
                f"selection.rule: {type(self.rule).__name__} ranks, but has no method `priority`; "
                "give it one, or set ranked = False and give it `decide`"
            )
        return values

    def rankable(self, block: TokenBlock) -> np.ndarray:
        """Rows that take part, bool, shape (R,)."""
        return ~block.seen if self.config.exclude_seen else np.ones(len(block.rows), dtype=bool)

    def near(self, block: TokenBlock, cut: float, noise: float) -> int:
        """Tokens ranked by their score that lie within the noise of the cut."""
        with np.errstate(invalid="ignore"):  # two equal infinities have no distance
            near = np.abs(self.priority(block) - cut) <= noise
        if self.config.exclude_seen:
            near &= np.repeat(self.rankable(block), block.counts)
        if self.config.always_keep_eos:
            near &= ~_is_eos(block)
        return int(np.count_nonzero(near))


def _is_eos(block: TokenBlock) -> np.ndarray:
    if block.is_eos is None:
        raise ValueError("always_keep_eos needs to know the end-of-sequence targets")
    return block.is_eos


def decided(part: Part) -> Masks:
    """What the rule decides by itself, token by token."""
    for block in part.blocks():
        mask = part.rule.decide(block) == KEPT
        if part.config.always_keep_eos:
            mask |= _is_eos(block)
        yield block, mask & np.repeat(part.rankable(block), block.counts)


def ranked_keys(part: Part) -> Iterator[tuple[TokenBlock, np.ndarray | slice, np.ndarray]]:
    """Each block, where in it the tokens to be ranked are, and their keys."""
    config = part.config
    part.restart(whole_samples=False)
    for block in part.blocks():
        keys = ordered_keys(part.priority(block))
        if config.always_keep_eos:
            keys[_is_eos(block)] = FIRST
        if config.exclude_seen:
            where = np.repeat(part.rankable(block), block.counts)
            yield block, where, keys[where]
        else:
            yield block, slice(None), keys


def global_masks(part: Part, cut: int, ties: int) -> Masks:
    """The tokens above the key at the cut, and so many of those equal to it, the first ones."""
    for block, where, keys in ranked_keys(part):
        mask = np.zeros(block.size, dtype=bool)
        mask[where], ties = top_mask(keys, cut, ties)
        yield block, mask


def sample_masks(part: Part) -> Masks:
    """The best tokens of each sample."""
    config = part.config
    for block, where, keys in ranked_keys(part):
        counts = block.counts[part.rankable(block)]
        stops = np.cumsum(counts)
        starts = stops - counts
        row = np.repeat(np.arange(len(counts)), counts)
        budget = (counts * config.share).astype(np.int64)
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
        mask = np.zeros(block.size, dtype=bool)
        mask[where] = top
        yield block, mask


def whole_sample_masks(part: Part) -> Masks:
    """Best samples first, as long as their tokens fit the budget.

    Every process orders the samples of all: some 60 bytes per row in memory.

    Raises:
        ValueError: if a token is worth NaN.
    """
    config, exchange = part.config, part.exchange
    means, sizes = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    part.restart(whole_samples=True)
    for block in part.blocks():
        values = part.priority(block)
        if np.isnan(values).any():
            raise ValueError("scores contain NaN: the pass that produced them must be repeated")
        rankable = part.rankable(block) & (block.counts > 0)
        sums = np.add.reduceat(np.append(values, 0.0), np.cumsum(block.counts) - block.counts)
        means.append(np.where(rankable, sums / np.maximum(block.counts, 1), -np.inf))
        sizes.append(np.where(rankable, block.counts, 0))
    start = exchange.before(sum(map(len, means)))
    mean = exchange.gather(np.concatenate(means))
    size = exchange.gather(np.concatenate(sizes))
    order = np.argsort(-mean, kind="stable")  # of equals, the earlier row
    fits = np.cumsum(size[order]) <= int(size.sum() * config.share)
    chosen = np.zeros(len(size), dtype=bool)
    chosen[order[fits]] = True
    chosen &= size > 0
    for block in part.blocks():
        rows = chosen[start : (start := start + len(block.rows))]
        yield block, np.repeat(rows, block.counts)
