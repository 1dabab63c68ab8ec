"""Which response tokens of a pool keep their loss: a rule, a scope and a keep share -> a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from tokenclean.named import Value
from tokenclean.selection.exchange import Exchange
from tokenclean.selection.masks import (
    Part,
    decided,
    global_masks,
    ranked_keys,
    sample_masks,
    whole_sample_masks,
)
from tokenclean.selection.rule import TABLES, Blocks, Rule, make_rule
from tokenclean.selection.topk import FIRST, Histogram, kth_largest, score_of

Scope = Literal["global", "sample", "whole_sample"]
#: A share in (0, 1], or what the pool itself says; see `tokenclean.selection.noise`.
Keep = float | Literal["auto"]


@dataclass
class SelectionConfig:
    """How much to keep and which tokens.

    Args:
        rule: a file of `tokenclean.selection.rules`, by its name: ``token_cleaning`` (rank by the
            score, arXiv 2502.01968, Eq. 3), ``random``, ``contradiction``, ``xtf_paper``,
            ``perplexity``, ``full``, ...; or a module of your own, as my_package.my_rule. Rules
            that do not rank look at neither ``keep`` nor ``scope``.
        scope: rank over the whole pool (``global``, Eq. 4), within each sample (``sample``, the way
            the paper's RHO arm works), or whole samples by the mean over their tokens
            (``whole_sample``): the best ones whose tokens together are no more than int(n * keep).
        keep: share of response tokens kept, in (0, 1]; kept = int(n * keep) of the scope's n.
            ``auto`` keeps the upper end of the estimated informative share, or everything where the
            reference gives no signal (`tokenclean.selection.noise`); for rules that rank by the
            score over the whole pool.
        always_keep_eos: rank every end-of-sequence target first. The number kept stays
            int(n * keep) unless there are more such targets than that.
        exclude_seen: neither rank nor train on rows that the reference was trained on.
        options: the rule's own settings; they are the fields of its class.
    """

    rule: str = "token_cleaning"
    scope: Scope = "global"
    keep: Keep = 0.6
    always_keep_eos: bool = False
    exclude_seen: bool = False
    options: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = self.make()
        #: columns that the rule reads, ``table.column``; asked for with every block
        self.needs = rule.needs
        unknown = [n for n in rule.needs if n.partition(".")[0] not in TABLES]
        if unknown:
            raise ValueError(
                f"selection.rule: {self.rule} needs {', '.join(unknown)}; there are columns of "
                f"{', '.join(TABLES)} alone"
            )
        if self.scope not in get_args(Scope):
            raise ValueError(
                f"selection.scope: {self.scope!r} is not one of {', '.join(get_args(Scope))}"
            )
        if self.keep == "auto":
            if self.estimates_keep and not (rule.by_score and self.scope == "global"):
                raise ValueError(
                    "selection.keep: auto goes with rules that rank by the score (token_cleaning, "
                    "forgetting) "
                    f"at scope global, not with {self.rule} at scope {self.scope}; give a number"
                )
        elif not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"selection.keep: {self.keep} is not a share in (0, 1]; the paper keeps 0.6"
            )
        if rule.of_samples and self.scope != "whole_sample":
            raise ValueError(
                f"selection.scope: {self.rule} is a property of samples, not of their tokens; set "
                "whole_sample"
            )
        if self.always_keep_eos and self.scope == "whole_sample":
            raise ValueError(
                "selection.always_keep_eos: whole samples keep or lose theirs; leave it out"
            )

    def make(self) -> Rule:
        """A new instance of the rule."""
        return make_rule(self.rule, self.options)

    @property
    def estimates_keep(self) -> bool:
        """The keep share is asked for, and is not known yet."""
        return self.keep == "auto" and self.make().ranked

    @property
    def share(self) -> float:
        """The keep share as a number.

        Raises:
            ValueError: while it is still ``auto``.
        """
        if self.keep == "auto":
            raise ValueError(
                "selection.keep: auto must be estimated before tokens are ranked; give a number"
            )
        return self.keep

    @property
    def ranks_plainly(self) -> bool:
        """Every token of the pool is ranked by its score and nothing else."""
        return (
            self.make().by_score
            and self.scope == "global"
            and not self.always_keep_eos
            and not self.exclude_seen
        )


@dataclass
class Selected:
    """The mask, and what a reader wants to know about it.

    Attributes:
        keep: bool, one entry per response token in pool order; of this process's part.
        tokens: response tokens altogether; like what follows, of all processes.
        ranked: response tokens that were ranked (all, less those of excluded rows).
        kept: number of kept tokens.
        cut: smallest score kept by rank, at global scope of a rule that ranks by score; else None.
        near_cut: share of the ranked tokens whose score is within the noise of the cut: those that
            another run of the same scoring could have put on its other side. None where there is
            no cut or the noise is not known.
        rule: the rule as it was fitted to the pool.
    """

    keep: np.ndarray
    tokens: int
    ranked: int
    kept: int
    cut: float | None
    near_cut: float | None = None
    rule: Rule = field(default_factory=lambda: make_rule("full"))


def select(
    blocks: Blocks,
    config: SelectionConfig,
    seed: int = 0,
    *,
    histogram: Histogram | None = None,
    noise: float | None = None,
    out: np.ndarray | None = None,
    exchange: Exchange | None = None,
    pool: Blocks | None = None,
) -> Selected:
    """Apply a rule to a pool.

    Several processes select together if each passes its part of the blocks and an exchange with
    the others: the mask is the one that a single process makes.

    Args:
        blocks: called once per pass over the pool, or this process's part; the same blocks every
            time.
        config: rule, scope and keep share.
        seed: of rules that draw at random.
        histogram: of the keys of all scores, where it is known and ``config.ranks_plainly``: saves
            a pass, and changes nothing else.
        noise: what a score may be off by, in nats, for ``near_cut``.
        out: where the mask goes, bool, one entry per response token of ``blocks``; by default a new
            array.
        exchange: with the other processes.
        pool: the blocks of all processes in order, for rules that are fitted to the whole pool.

    Raises:
        ValueError: if the rule needs columns that the blocks lack, a priority is NaN, the
            histogram is not that of the scores, the rule cannot be split over processes, or another
            process has met an error.
    """
    exchange = exchange or Exchange()
    with exchange.together():
        rule = config.make()
        _fit(rule, config.rule, blocks, pool, exchange)
        part = Part(blocks, rule, config, seed, exchange, _before(rule, config, blocks, exchange))
        return _select(part, histogram if config.ranks_plainly else None, noise, out)


def _fit(rule: Rule, name: str, blocks: Blocks, pool: Blocks | None, exchange: Exchange) -> None:
    if pool is None and exchange.processes > 1 and type(rule).fit is not Rule.fit:
        raise ValueError(
            f"selection.rule: {name} is fitted to the whole pool, and this process has a part of "
            "it; give `select` the pool, or use one process"
        )
    rule.fit(blocks if pool is None else pool)


def _before(
    rule: Rule, config: SelectionConfig, blocks: Blocks, exchange: Exchange
) -> tuple[int, int]:
    """Rows and tokens of earlier processes, where the rule asks for them."""
    if exchange.processes == 1:
        return 0, 0
    if type(rule).skip is Rule.skip:
        if type(rule).restart is not Rule.restart:
            raise ValueError(
                f"selection.rule: {config.rule} begins every pass anew, but has no method `skip` "
                "that leaves out what other processes rank; give it one, or use one process"
            )
        return 0, 0
    rows = tokens = 0
    for block in blocks():
        rows, tokens = rows + len(block.rows), tokens + block.size
    return exchange.before(rows), exchange.before(tokens)


def _select(
    part: Part, histogram: Histogram | None, noise: float | None, out: np.ndarray | None
) -> Selected:
    rule, config, exchange = part.rule, part.config, part.exchange
    cut: float | None = None
    if not rule.ranked:
        masks = decided(part)
    elif config.scope == "sample":
        masks = sample_masks(part)
    elif config.scope == "whole_sample":
        masks = whole_sample_masks(part)
    else:
        if histogram is None:
            own = Histogram()
            for _, _, keys in ranked_keys(part):
                own.add(keys)
            histogram = own.summed(exchange)
        # End-of-sequence targets that go first may be more than the share.
        budget = max(int(histogram.total() * config.share), histogram.firsts())
        key, above, earlier = kth_largest(
            lambda: (keys for _, _, keys in ranked_keys(part)), budget, histogram, exchange
        )
        if rule.by_score and key != FIRST:
            cut = score_of(key)
        masks = global_masks(part, key, budget - above - earlier)

    parts: list[np.ndarray] = []
    size = ranked = kept = near = 0
    for block, mask in masks:
        if out is None:
            parts.append(mask)
        else:
            out[size : size + len(mask)] = mask
        size += len(mask)
        kept += int(np.count_nonzero(mask))
        ranked += int(block.counts[part.rankable(block)].sum())
        if cut is not None and noise is not None:
            near += part.near(block, cut, noise)
    ours = np.array([size, ranked, kept, near], dtype=np.int64)
    size, ranked, kept, near = exchange.sum(ours).tolist()
    if histogram is not None and histogram.total() != ranked:
        raise ValueError("the histogram is not that of these scores; make it again")
    return Selected(
        keep=np.concatenate([np.zeros(0, dtype=bool), *parts]) if out is None else out,
        tokens=size,
        ranked=ranked,
        kept=kept,
        cut=cut,
        near_cut=None if cut is None or noise is None else near / ranked,
        rule=rule,
    )
