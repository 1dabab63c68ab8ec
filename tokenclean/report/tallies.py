"""What a report counts in one pass over a cleaned pool, in tallies of fixed size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tokenclean.report.ratio import Share, Shares
from tokenclean.report.steps import UNCLEANED, Ranked
from tokenclean.report.tokens import TYPES, Vocabulary, turn_bounds
from tokenclean.selection.rule import SEEN
from tokenclean.selection.topk import Histogram, ordered_keys, score_of

#: Bins of position and length are 1, 2, 3 to 4, 5 to 8, ... tokens; the last is open.
_DOUBLINGS: Final = 15
#: Assistant turns that have a row of their own; the last holds all later ones.
_TURNS: Final = 8
#: Reason codes are int8 and not negative.
_CODES: Final = 128

#: Smaller ones are no numbers that a loss or a score has.
_TINY: Final = 1e-300

BY_POSITION, BY_LENGTH, BY_TURN, BY_TYPE = "position", "length", "turn", "type"


def size_bins() -> list[str]:
    """Names of the bins of `size_bin`."""
    edges = [(1, 1), *((2**i + 1, 2 ** (i + 1)) for i in range(_DOUBLINGS - 1))]
    names = [str(b) if a == b else f"{a} to {b}" for a, b in edges]
    names[1] = "2"
    return [*names, f"over {edges[-1][1]}"]


def size_bin(sizes: np.ndarray) -> np.ndarray:
    """Bin of each size, from 1 on: 1, 2, 3 to 4, 5 to 8, ...; int64, shape (n,)."""
    bins = np.ceil(np.log2(sizes)).astype(np.int64)
    return np.minimum(bins, _DOUBLINGS)


GROUPS: Final = {
    BY_POSITION: size_bins(),
    BY_LENGTH: size_bins(),
    BY_TURN: [*map(str, range(1, _TURNS)), f"{_TURNS} and later"],
    BY_TYPE: list(TYPES),
}


@dataclass
class SourceCounts:
    """Counts of one source, or of one source in one step.

    Attributes:
        samples: rows with a ranked token.
        emptied: of those, rows that keep none.
        ends, ends_kept: end-of-sequence tokens among the ranked ones, and kept ones of them.
        unlearnt: tokens with a negative weight.
        weight: sum of the kept tokens' weights.
    """

    samples: int = 0
    emptied: int = 0
    ends: int = 0
    ends_kept: int = 0
    unlearnt: int = 0
    weight: float = 0.0

    def __add__(self, other: SourceCounts) -> SourceCounts:
        return SourceCounts(
            self.samples + other.samples,
            self.emptied + other.emptied,
            self.ends + other.ends,
            self.ends_kept + other.ends_kept,
            self.unlearnt + other.unlearnt,
            self.weight + other.weight,
        )


@dataclass
class Means:
    """Ranked and kept tokens and sums of their losses; NaN losses count as none.

    Attributes:
        tokens, kept: counts.
        base, reference, score: (sum in nats, number of tokens that have one).
    """

    tokens: int = 0
    kept: int = 0
    base: tuple[float, int] = (0.0, 0)
    reference: tuple[float, int] = (0.0, 0)
    score: tuple[float, int] = (0.0, 0)

    def mean(self, name: str) -> float | None:
        """Mean of ``base``, ``reference`` or ``score`` in nats; None where there is none."""
        total, count = getattr(self, name)
        return total / count if count else None

    @property
    def kept_share(self) -> float | None:
        return self.kept / self.tokens if self.tokens else None

    def __add__(self, other: Means) -> Means:
        def both(name: str) -> tuple[float, int]:
            (a, n), (b, m) = getattr(self, name), getattr(other, name)
            return a + b, n + m

        return Means(
            self.tokens + other.tokens,
            self.kept + other.kept,
            both("base"),
            both("reference"),
            both("score"),
        )


class SourceNames:
    """Numbers of sources, in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, sources: list[str]) -> np.ndarray:
        """Number of each row's source: int64, shape (R,)."""
        return np.array([self.numbers.setdefault(s, len(self.numbers)) for s in sources], np.int64)


class StepMeans:
    """`Means` by step and source, and kept shares with their intervals."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], Means] = {}
        self._sources = SourceNames()
        self._shares: dict[int, Shares] = {}

    def add(self, ranked: Ranked) -> None:
        block, at = ranked.block, ranked.at
        if not len(at):
            return
        names = SourceNames()
        of_row = names(block.sources)
        steps = int(ranked.steps.max()) + 1
        numbers = self._sources(block.sources)[ranked.row]
        for step in np.unique(ranked.step).tolist():
            of = ranked.step == step
            shares = self._shares.setdefault(step, Shares())
            shares.add(ranked.row[of], numbers[of], ranked.kept[of])
        keys = of_row[ranked.row] * steps + ranked.step
        size = len(names.numbers) * steps
        tokens, kept = (np.bincount(keys[w], minlength=size) for w in (slice(None), ranked.kept))
        columns = [self._sums(keys, v[at], size) for v in (block.base, block.reference)]
        columns.append(self._sums(keys, block.score[at], size))
        for source, number in names.numbers.items():
            for step in range(steps):
                i = number * steps + step
                if tokens[i]:
                    sums = [(float(total[i]), int(count[i])) for total, count in columns]
                    now = Means(int(tokens[i]), int(kept[i]), *sums)
                    before = self.found.get((step, source), Means())
                    self.found[step, source] = before + now

    @staticmethod
    def _sums(keys: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        known = ~np.isnan(values)
        return (
            np.bincount(keys[known], weights=values[known], minlength=size),
            np.bincount(keys[known], minlength=size),
        )

    def share(self, step: int, source: str) -> Share:
        """Kept share of a source in a step."""
        shares = self._shares[step]
        shares.grow(len(self._sources.numbers))
        return shares.share(self._sources.numbers[source])

    def of_step(self, step: int) -> Means:
        """Over all sources."""
        return sum((m for (t, _), m in self.found.items() if t == step), Means())

    def of_all(self) -> Means:
        """Over all sources and steps."""
        return sum(self.found.values(), Means())

    def sources(self) -> list[str]:
        return sorted({source for _, source in self.found})


@dataclass
class Tally:
    """Everything that one pass counts.

    Args:
        eos_id: the end of the sequence.
        by: column that the rule goes by, see `tokenclean.report.steps.goes_by`.
        vocabulary: of the pool; None leaves the kinds of tokens out.

    Attributes:
        uncleaned: samples and response tokens of D_0.
        seen: response tokens of rows that the reference had seen and that were left out for it.
        counts: by source.
        by_source: kept shares by number in ``sources``.
        groups: kept shares by `GROUPS`.
        reasons: source -> tokens by reason code, int64, shape (128,).
        ids, ids_kept: ranked and kept tokens by id: int64, shape (vocabulary seen,).
        means: losses by step and source.
        ranges: ``loss`` (both models') and ``by`` -> how they are distributed.
        truth: some row has planted truth.
    """

    eos_id: int
    by: str | None = None
    vocabulary: Vocabulary | None = None
    uncleaned: tuple[int, int] = (0, 0)
    seen: int = 0
    counts: dict[str, SourceCounts] = field(default_factory=dict)
    sources: SourceNames = field(default_factory=SourceNames)
    by_source: Shares = field(default_factory=Shares)
    groups: dict[str, Shares] = field(
        default_factory=lambda: {name: Shares(len(bins)) for name, bins in GROUPS.items()}
    )
    reasons: dict[str, np.ndarray] = field(default_factory=dict)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ids_kept: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    means: StepMeans = field(default_factory=StepMeans)
    ranges: dict[str, Histogram] = field(
        default_factory=lambda: {"loss": Histogram(), "by": Histogram()}
    )
    truth: bool = False

    def add(self, ranked: Ranked) -> None:
        """Count some rows; all of a row's tokens come in one call."""
        block, at, kept = ranked.block, ranked.at, ranked.kept
        apart = ranked.steps == UNCLEANED
        of_step_0 = block.response & apart[block.row]
        samples, tokens = self.uncleaned
        self.uncleaned = samples + int(apart.sum()), tokens + int(of_step_0.sum())
        cleaned = block.response & ~apart[block.row]
        self.seen += int(np.count_nonzero(cleaned & (block.reason == SEEN)))
        self.truth |= block.truth is not None

        self._count_sources(ranked, cleaned)
        of_row = self.sources(block.sources)
        self.by_source.grow(len(self.sources.numbers))
        self.by_source.add(ranked.row, of_row[ranked.row], kept)
        self._group(ranked)
        self._count_ids(block.input_ids[at], kept)
        self.means.add(ranked)
        for values in (block.base[at], block.reference[at]):
            self._range("loss", values)
        self._range("by", ranked.values(self.by))

    def _range(self, name: str, values: np.ndarray) -> None:
        values = values[~np.isnan(values)].astype(np.float64)
        self.ranges[name].add(ordered_keys(values))

    def _count_sources(self, ranked: Ranked, cleaned: np.ndarray) -> None:
        block, at, row, kept = ranked.block, ranked.at, ranked.row, ranked.kept
        size = len(block.ids)
        ranked_of = np.bincount(row, minlength=size)
        kept_of = np.bincount(row[kept], minlength=size)
        end = block.input_ids[at] == self.eos_id
        ends = np.bincount(row[end], minlength=size)
        ends_kept = np.bincount(row[end & kept], minlength=size)
        unlearnt = np.bincount(row[ranked.unlearnt], minlength=size)
        weights = block.weight[at][kept].astype(np.float64)
        weight = np.bincount(row[kept], weights=weights, minlength=size)
        reasons = np.bincount(
            block.row[cleaned] * _CODES + block.reason[cleaned], minlength=size * _CODES
        ).reshape(size, _CODES)
        sources = np.array(block.sources, dtype=object)
        for source in dict.fromkeys(block.sources):
            of = sources == source
            now = SourceCounts(
                int(np.count_nonzero(ranked_of[of])),
                int(np.count_nonzero((ranked_of > 0) & (kept_of == 0) & of)),
                int(ends[of].sum()),
                int(ends_kept[of].sum()),
                int(unlearnt[of].sum()),
                float(weight[of].sum()),
            )
            self.counts[source] = self.counts.get(source, SourceCounts()) + now
            codes = reasons[of].sum(axis=0)
            self.reasons[source] = self.reasons.get(source, np.zeros(_CODES, np.int64)) + codes

    def _group(self, ranked: Ranked) -> None:
        block, at = ranked.block, ranked.at
        starts, stops = turn_bounds(block)
        turn = np.zeros(len(block.input_ids), dtype=np.int64)
        turn[starts] = 1
        turn = np.cumsum(turn)[at] - 1  # number of each ranked token's turn in the block
        first = np.searchsorted(block.row[starts], np.arange(len(block.ids)))
        within = {
            BY_POSITION: size_bin(at - starts[turn] + 1),
            BY_LENGTH: size_bin((stops - starts)[turn]),
            BY_TURN: np.minimum(turn - first[ranked.row], _TURNS - 1),
        }
        if self.vocabulary is not None:
            within[BY_TYPE] = self.vocabulary.types(block)[at].astype(np.int64)
        for name, groups in within.items():
            self.groups[name].add(ranked.row, groups, ranked.kept)

    def _count_ids(self, ids: np.ndarray, kept: np.ndarray) -> None:
        size = max(int(ids.max(initial=-1)) + 1, len(self.ids))
        for name, chosen in (("ids", ids), ("ids_kept", ids[kept])):
            counts = np.bincount(chosen, minlength=size)
            before = getattr(self, name)
            counts[: len(before)] += before
            setattr(self, name, counts)

    # -- what it says ---------------------------------------------------------------------------

    @property
    def whole(self) -> Share:
        """Kept share of all ranked tokens."""
        return self.by_source.whole()

    @property
    def keeps_all(self) -> bool:
        """Every ranked token is kept, and there is one."""
        return 0 < self.whole.tokens == self.whole.kept

    @property
    def total(self) -> SourceCounts:
        """Over all sources."""
        return sum(self.counts.values(), SourceCounts())

    def share_of(self, source: str) -> Share:
        """Kept share of a source."""
        return self.by_source.share(self.sources.numbers[source])

    def quantile(self, name: str, share: float) -> float | None:
        """A value of ``ranges`` below which so many lie, to a sixteenth of itself; None if none.

        Rounded away from the middle, so that at least so many lie on the right side of it.
        """
        histogram = self.ranges[name]
        total = histogram.total()
        if not total:
            return None
        below = np.cumsum(histogram.counts)
        if share > 0.5:
            place = int(np.searchsorted(below, share * total))
            key = ((place + 1) << 48) - 1  # upper edge of the bin
        else:
            place = int(np.searchsorted(below, share * total, side="right"))
            key = place << 48
        value = score_of(key)
        if not np.isfinite(value):
            value = score_of(place << 48)
        return value if abs(value) > _TINY else 0.0

    def reach(self, name: str, centre: float, tokens: float) -> float:
        """How far around a value about so many tokens lie, by how dense they are near it.

        Args:
            name: of ``ranges``, which must not be empty.
            tokens: on both sides together.
        """
        counts = self.ranges[name].counts
        place = int(ordered_keys(np.array([centre]))[0] >> np.uint64(48))
        low = high = place
        found = int(counts[place])
        while found < tokens and (low > 0 or high < len(counts) - 1):
            low, high = max(low - 1, 0), min(high + 1, len(counts) - 1)
            found += int(counts[low]) * (low < place) + int(counts[high]) * (high > place)
        edges = [score_of(low << 48), score_of(((high + 1) << 48) - 1)]
        width = edges[1] - edges[0]
        return width * tokens / (2 * found) if found and np.isfinite(width) else 0.0
