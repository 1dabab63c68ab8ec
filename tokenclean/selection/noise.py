"""How much of a pool is informative: an interval, or the statement that there is no signal.

The score alone cannot tell. Whatever a reference learns of a pool's format raises the score of
noise as well, and what the base knows already scores zero however good it is. So the estimate rests
on a comparison in which both cancel: a response after its *own* prompt against the same response
after the prompts of other samples, under the same reference. A sentence that has nothing to do with
its prompt is as likely after any of them: among K others its own prompt takes each of the K + 1
ranks with the same probability, exactly, for any model. A sentence that answers its prompt ranks it
high. With q = RANK / (K + 1), the chance of a rank up to RANK by luck, and n tokens,

    lower = sum(agreed * (high - q)) / ((1 - q) n)
    upper = 1 - (1 - q) * noise,    noise = 2 * P(rank in the worse half)

The lower end counts tokens of sentences that rank their own prompt ``high``, takes off what luck
brought there, and leaves out what the reference contradicts (not ``agreed``): a wrong value in a
right sentence ranks its prompt high, too. The upper end drops only the noise that was not lucky.
Both are widened by `WIDTH` standard errors over samples: tokens of a sample depend on each other,
so samples, not tokens, are what is counted.

What it does not see: noise that follows from the prompt (a mistake made every time), and answers
that their own beginning explains as well as the prompt does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np
from scipy.optimize import isotonic_regression

from tokenclean.selection.rule import scores

#: Other prompts per response, and the ranks of its own that count as high.
PARTNERS: Final = 7
RANK: Final = 2
#: Nats by which the reference may prefer another token before it counts as contradicting one.
MAX_GAP: Final = 1.0
#: Standard errors over samples: 95 % on either side.
WIDTH: Final = 1.645
#: Standard errors above zero at which there is a signal: one in 700 by chance.
SIGNIFICANT: Final = 3.0
#: Fewer samples carry no estimate.
MIN_SAMPLES: Final = 30
#: Bins of the base's loss, in nats: within one, losses can change by about the same.
LOSS_EDGES: Final = np.array([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])


@dataclass
class Contrast:
    """Losses in nats of the responses of n samples, the first of each, under base and reference.

    Legend: N response tokens, P prompt tokens, K other prompts. Tokens lie end to end, sample by
    sample.

    Attributes:
        sample: number of each token's sample, ascending, int64, (N,).
        sentence: number of each token's sentence in the whole, ascending, int64, (N,).
        base, reference: after their own prompt, (N,).
        base_others, reference_others: after other samples' prompts, (K, N).
        gap: log-probability of the reference's most likely token less that of this one, (N,).
        control_sample: number of each prompt token's sample, (P,).
        control_base, control_reference: losses of prompt tokens, which no model learnt from, (P,).
    """

    sample: np.ndarray
    sentence: np.ndarray
    base: np.ndarray
    reference: np.ndarray
    base_others: np.ndarray
    reference_others: np.ndarray
    gap: np.ndarray
    control_sample: np.ndarray
    control_base: np.ndarray
    control_reference: np.ndarray

    def among(self, samples: np.ndarray) -> Contrast:
        """Some of the samples.

        Args:
            samples: their numbers.
        """
        at = np.isin(self.sample, samples)
        control = np.isin(self.control_sample, samples)
        return Contrast(
            self.sample[at],
            self.sentence[at],
            self.base[at],
            self.reference[at],
            self.base_others[:, at],
            self.reference_others[:, at],
            self.gap[at],
            self.control_sample[control],
            self.control_base[control],
            self.control_reference[control],
        )

    @staticmethod
    def joined(parts: Iterable[Contrast]) -> Contrast:
        """Several end to end; their samples and sentences are numbered on."""
        found = list(parts)
        samples = np.cumsum([0, *(1 + int(p.sample.max(initial=-1)) for p in found)])
        sentences = np.cumsum([0, *(1 + int(p.sentence.max(initial=-1)) for p in found)])
        shifts = {"sample": samples, "control_sample": samples, "sentence": sentences}
        return Contrast(
            **{
                f.name: np.concatenate(
                    [getattr(p, f.name) + s for p, s in zip(found, shift, strict=False)]
                    if (shift := shifts.get(f.name)) is not None
                    else [getattr(p, f.name) for p in found],
                    axis=-1,
                )
                for f in fields(Contrast)
            }
        )


@dataclass
class Estimate:
    """What is known of the informative share of response tokens.

    Attributes:
        samples, sentences, tokens: that it rests on.
        lower, upper: ends of the interval; nothing is known, 0 and 1, with too few samples.
        signal: whether the reference ties responses to their prompts, and does so better than the
            base: both `tie` and `gain` are above `SIGNIFICANT`.
        tie: share of other prompts that a response's own one beats under the reference, less one
            half, which is what it is of noise: mean over samples, in standard errors.
        gain: the same less that under the base, in standard errors.
        positive: P(score > 0), of tokens.
        sign_symmetry: see `sign_symmetry`. With the next, for comparison: neither moves the
            interval.
        control_tail: see `control_tail`.
    """

    samples: int
    sentences: int
    tokens: int
    lower: float
    upper: float
    signal: bool
    tie: float
    gain: float
    positive: float
    sign_symmetry: float
    control_tail: float

    @property
    def keep(self) -> float:
        """The share to keep: the upper end; everything where there is no signal."""
        return self.upper if self.signal else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": self.keep}


def estimate(found: Contrast) -> Estimate:
    """The informative share of a pool, from a contrast over some of its samples.

    The reference must not have been trained on these samples, nor on those whose prompts served.
    """
    score = scores(found.base, found.reference)
    numbers, of_token = np.unique(found.sample, return_inverse=True)
    size = len(numbers)
    lower, upper, tie, gain = 0.0, 1.0, 0.0, 0.0
    if size >= MIN_SAMPLES:
        lower, upper = interval(found)
        reference = _beaten(of_token, found.reference, found.reference_others)
        base = _beaten(of_token, found.base, found.base_others)
        tie = _standard_errors(reference / len(found.reference_others) - 0.5)
        gain = _standard_errors((reference - base) / len(found.reference_others))
    return Estimate(
        samples=size,
        sentences=len(np.unique(found.sentence)),
        tokens=len(score),
        lower=lower,
        upper=upper,
        signal=min(tie, gain) > SIGNIFICANT and upper > 0.0,
        tie=tie,
        gain=gain,
        positive=float((score > 0).mean()) if len(score) else 0.0,
        sign_symmetry=sign_symmetry(score),
        control_tail=control_tail(found),
    )


def interval(found: Contrast) -> tuple[float, float]:
    """Lower and upper end of the informative share; see the head of this file."""
    _, of_token = np.unique(found.sentence, return_inverse=True)
    _, first = np.unique(found.sentence, return_index=True)
    others = len(found.reference_others)
    beaten = _beaten(of_token, found.reference, found.reference_others)
    high = beaten > others - RANK
    worse = np.where(beaten * 2 == others, 0.5, beaten * 2 < others)
    luck = RANK / (others + 1)
    _, sample = np.unique(found.sample[first], return_inverse=True)

    def of_samples(values: np.ndarray) -> np.ndarray:
        """Sums over each sample's sentences."""
        return np.bincount(sample, values)

    size = np.bincount(of_token).astype(np.float64)
    agreed = np.bincount(of_token, found.gap <= MAX_GAP)
    tokens = of_samples(size)
    low, low_error = _ratio(of_samples(agreed * (high - luck) / (1.0 - luck)), tokens)
    noise, noise_error = _ratio(of_samples(2.0 * size * worse), tokens)
    lower = low - WIDTH * low_error
    upper = 1.0 - (1.0 - luck) * (noise - WIDTH * noise_error)
    lower = min(max(lower, 0.0), 1.0)
    return lower, min(max(upper, lower), 1.0)


def _beaten(of_token: np.ndarray, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Other prompts after which each sentence or sample is less likely; of equals, half of one.

    Args:
        of_token: number of each token's sentence or sample, (N,).
        own, others: losses, (N,) and (K, N).
    """
    loss = np.bincount(of_token, own)
    beaten = np.zeros(len(loss))
    for prompt in others:
        other = np.bincount(of_token, prompt)
        beaten += np.where(other == loss, 0.5, other > loss)
    return beaten


def sign_symmetry(score: np.ndarray) -> float:
    """Share of tokens with a score above zero less that with one below, at least 0.

    A lower bound of the informative share if the scores of noise lie evenly about zero, which they
    do not where the reference has learnt the format of the noise.
    """
    if not len(score):
        return 0.0
    return max(0.0, float((score > 0).mean() - (score < 0).mean()))


def control_tail(found: Contrast, error: float = 0.05) -> float:
    """A lower bound of the informative share from prompt tokens, which no model learnt from.

    Within a bin of the base's loss, noise scores no lower than prompt tokens do; with F the share
    of tokens whose score is at most c,

        share of noise <= min over c of (F_response(c) + e) / (F_control(c) - e)

    over cuts with F_control(c) > e. e is the Dvoretzky-Kiefer-Wolfowitz bound at ``error`` over all
    bins and both sides. Tokens of a sample depend on each other: the size that enters it is the
    number of samples with a token in the bin. Bins are weighted by their response tokens.

    Returns:
        Between 0 and 1; 0 if nothing can be said.
    """
    if not len(found.base):
        return 0.0
    response, control = (
        np.searchsorted(LOSS_EDGES, values, side="right")
        for values in (found.base, found.control_base)
    )
    score = scores(found.base, found.reference)
    of_control = scores(found.control_base, found.control_reference)
    informative = 0.0
    for number in range(len(LOSS_EDGES) + 1):
        here, there = response == number, control == number
        if not here.any() or not there.any():
            continue
        values, controls = np.sort(score[here]), np.sort(of_control[there])
        share = error / (2 * (len(LOSS_EDGES) + 1))
        e = _dkw(len(np.unique(found.sample[here])), share)
        e_control = _dkw(len(np.unique(found.control_sample[there])), share)
        below = np.searchsorted(values, controls, side="right") / len(values)
        of_cut = np.searchsorted(controls, controls, side="right") / len(controls)
        usable = of_cut > e_control
        if usable.any():
            noise = float(((below[usable] + e) / (of_cut[usable] - e_control)).min())
            informative += max(0.0, 1.0 - noise) * len(values)
    return informative / len(score)


def _dkw(size: int, error: float) -> float:
    """By how much an empirical distribution of ``size`` draws may be off, but for ``error``."""
    return math.sqrt(math.log(2.0 / error) / (2.0 * size))


def _standard_errors(values: np.ndarray) -> float:
    """The mean in its standard errors; 0 if it is 0."""
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (spread / math.sqrt(len(values)))


def _ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Sum of one over sum of the other, and its standard error over the entries."""
    total = float(whole.sum())
    ratio = float(part.sum()) / total
    return ratio, math.sqrt(float(((part - ratio * whole) ** 2).sum())) / total


#: Bins of |score|, in nats; what is smaller is in the first.
_SIZES: Final = np.geomspace(1e-4, 1e2, 121)


@dataclass
class TailRatio:
    """How much likelier a score is than its negative: a weight that needs no keep share.

    w(z) = max(0, 1 - f(-z) / f(z)) for scores z > 0, f their density among tokens whose base loss
    is alike (`LOSS_EDGES`): the local share of tokens beyond what symmetry explains. It is taken
    bin by bin since a score cannot exceed the base's loss: among tokens that the base knows, large
    ones are all negative. f(-z) / f(z) is made to fall with z. Everything comes from one histogram,
    so any pool is fitted in constant memory.

    Attributes:
        counts: tokens by bin of base loss, sign of score and bin of |score|, int64.
        weight: by bin of base loss and bin of score, for scores above 0. From `fit`.
    """

    counts: np.ndarray = field(
        default_factory=lambda: np.zeros((len(LOSS_EDGES) + 1, 2, len(_SIZES) + 1), np.int64)
    )
    weight: np.ndarray = field(
        default_factory=lambda: np.zeros((len(LOSS_EDGES) + 1, len(_SIZES) + 1), np.float32)
    )

    def add(self, base: np.ndarray, score: np.ndarray) -> None:
        """Count tokens: their base losses and scores in nats, shape (n,) both."""
        of_loss, of_size = self._bins(base, score)
        moved = score != 0  # neither side
        sign = (score > 0).astype(np.int64)
        np.add.at(self.counts, (of_loss[moved], sign[moved], of_size[moved]), 1)

    def fit(self) -> None:
        """Weights from what was counted."""
        self.weight[:] = 0.0
        for number, (negative, positive) in enumerate(self.counts):
            seen = negative + positive
            filled = np.flatnonzero(seen)
            if not len(filled):
                continue
            share = isotonic_regression(
                negative[filled] / seen[filled], weights=seen[filled], increasing=False
            ).x
            ratio = share / np.maximum(1.0 - share, 1e-12)
            self.weight[number, filled] = np.maximum(0.0, 1.0 - ratio)

    def weights(self, base: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Of tokens that were counted: float32, shape (n,), in [0, 1]; 0 for scores up to 0."""
        return np.where(score > 0, self.weight[self._bins(base, score)], np.float32(0.0))

    @staticmethod
    def _bins(base: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.searchsorted(LOSS_EDGES, base, side="right"),
            np.searchsorted(_SIZES, np.abs(score), side="right"),
        )
