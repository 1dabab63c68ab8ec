"""How much is informative: by hand, by simulation with a known truth, and where others go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from tokenclean.selection.noise import (
    MIN_SAMPLES,
    PARTNERS,
    RANK,
    WIDTH,
    Contrast,
    TailRatio,
    control_tail,
    estimate,
    interval,
    sign_symmetry,
)
from tokenclean.selection.rule import KEPT, TokenBlock
from tokenclean.selection.select import SelectionConfig, select


def ranked(ranks: list[int], tokens: int = 2, gap: list[float] | None = None) -> Contrast:
    """One sentence per sample, whose own prompt takes the given rank (1: best) of the reference."""
    n = len(ranks)
    others = np.arange(PARTNERS, dtype=float)[:, None] + np.zeros(n * tokens)
    own = np.repeat([rank - 1.5 for rank in ranks], tokens)
    sample = np.repeat(np.arange(n), tokens)
    return Contrast(
        sample=sample,
        sentence=sample.copy(),
        base=np.full(n * tokens, 3.0),
        reference=own,
        base_others=np.full((PARTNERS, n * tokens), 3.0),
        reference_others=others,
        gap=np.array((gap or [0.0] * tokens) * n),
        control_sample=np.zeros(0, dtype=int),
        control_base=np.zeros(0),
        control_reference=np.zeros(0),
    )


def test_the_constants_are_those_of_the_hand_computed_cases() -> None:
    assert (PARTNERS, RANK, WIDTH) == (7, 2, 1.645)


def test_prompts_own_sentences_are_all_informative() -> None:
    assert interval(ranked([1, 2, 1, 2, 2])) == pytest.approx((1.0, 1.0))


def test_what_the_reference_contradicts_leaves_the_lower_end_only() -> None:
    # one of four tokens of every sentence; exactly 1 nat does not count
    found = ranked([1] * 10, tokens=4, gap=[0.0, 1.0, 1.001, 0.5])
    assert interval(found) == pytest.approx((0.75, 1.0))


def test_even_ranks_are_noise() -> None:
    """Five sentences at each of eight ranks: high in 1/4, worse in 1/2, which is luck's share."""
    found = ranked([*range(1, 9)] * 5)
    # noise: 2 * 1/2 = 1, off by sqrt(sum of (4 or 0 - 2)^2) / 80 = sqrt(160) / 80
    error = np.sqrt(160) / 80
    assert interval(found) == pytest.approx((0.0, 1 - 0.75 * (1 - 1.645 * error)))


def test_half_of_the_sentences_are_noise() -> None:
    """24 ranked first, 24 evenly: high 24 + 6 of 48, worse 12 of 48; sentences of one token."""
    found = ranked([1] * 24 + [*range(1, 9)] * 3, tokens=1)
    low = (30 / 48 - 0.25) / 0.75
    # per sample: (1 - 1/4) / (3/4) = 1 for 30 of them, (-1/4) / (3/4) = -1/3 for 18
    low_error = np.sqrt(30 * (1 - low) ** 2 + 18 * (1 / 3 + low) ** 2) / 48
    noise = 2 * 12 / 48
    noise_error = np.sqrt(12 * (2 - noise) ** 2 + 36 * noise**2) / 48
    assert interval(found) == pytest.approx(
        (low - 1.645 * low_error, 1 - 0.75 * (noise - 1.645 * noise_error))
    )
    assert low == pytest.approx(0.5)


def test_equal_losses_are_half_a_rank() -> None:
    """A response that no prompt changes is in the middle: neither high nor better than half."""
    found = ranked([1] * 40)
    found.reference_others[:] = found.reference
    assert interval(found) == pytest.approx((0.0, 0.25))
    assert not estimate(found).signal


def test_long_sentences_count_by_their_tokens() -> None:
    """Ten sentences of 3 tokens rank first, ten of 1 last: 30 of 40 tokens."""
    parts = ranked([1] * 10, tokens=3), ranked([8] * 10, tokens=1)
    low, up = interval(Contrast.joined(parts))
    # (30 * 1 - 10 * 1/3) / 40 and 1 - 3/4 * 2 * 10/40, before the errors
    assert low < (30 - 10 / 3) / 40 < up
    assert low < 1 - 0.75 * 0.5 < up


def drawn(truth: float, seed: int, samples: int = 400, sentences: int = 3, **options: Any) -> Any:
    """Samples of sentences of four tokens, of which a share is tied to its prompt.

    Losses of a sentence share a level and, in noise, depend on the prompt at random. All scores
    are raised by ``shift``: what a reference learns of a format. Of the informative sentences one
    token in four is ``corrupted`` and contradicted.
    """
    draw = np.random.default_rng(seed)
    count = samples * sentences
    tied = draw.random(count) < truth
    level = draw.gamma(2.0, 2.0, count)
    effect = draw.normal(0, options.get("effect", 1.0), (PARTNERS + 1, count))
    effect[1:] += np.where(tied, 6.0, 0.0)
    weak = np.where(tied, 1.0, 0.0) * (np.arange(PARTNERS + 1)[:, None] > 0)
    base_effect = draw.normal(0, 1.0, (PARTNERS + 1, count)) + weak

    def tokens(of_sentence: np.ndarray) -> np.ndarray:
        return np.repeat(of_sentence, 4, axis=-1) + draw.normal(0, 0.3, of_sentence.size * 4 // len(
            np.atleast_2d(of_sentence)
        ))  # fmt: skip

    corrupted = np.zeros((count, 4), dtype=bool)
    corrupted[:, 3] = tied & (draw.random(count) < options.get("corrupted", 0.0))
    shift = options.get("shift", 0.0)
    base, reference = tokens(level + base_effect + shift), tokens(level + effect)
    found = Contrast(
        sample=np.repeat(np.arange(samples), sentences * 4),
        sentence=np.repeat(np.arange(count), 4),
        base=base[0],
        reference=reference[0],
        base_others=base[1:],
        reference_others=reference[1:],
        gap=np.where(corrupted.ravel(), 3.0, 0.2),
        control_sample=np.repeat(np.arange(samples), 4),
        control_base=base[0, : samples * 4],
        control_reference=base[0, : samples * 4] + draw.normal(0, 0.3, samples * 4),
    )
    return found, float((np.repeat(tied, 4) & ~corrupted.ravel()).mean())


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("corrupted", [0.0, 0.5])
def test_the_truth_is_inside(share: float, corrupted: float) -> None:
    inside = signals = 0
    for seed in range(30):
        contrast, truth = drawn(share, seed, shift=2.0, corrupted=corrupted)
        found = estimate(contrast)
        inside += found.lower - 1e-9 <= truth <= found.upper + 1e-9
        signals += found.signal
        assert found.keep == found.upper
        assert found.upper - found.lower < 0.45
    assert inside >= 27
    assert signals == 30


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_noise_alone_gives_no_signal(shift: float) -> None:
    """Whatever the reference has learnt of its format: all scores may lie above zero."""
    for seed in range(30):
        found = estimate(drawn(0.0, seed, shift=shift)[0])
        assert not found.signal
        assert found.keep == 1.0
        assert found.lower < 0.05


def test_other_estimates_say_half_where_nothing_is_informative() -> None:
    """Scores of noise with two spreads: a Gaussian mixture and Otsu's threshold split them."""
    contrast, truth = drawn(0.0, 0)
    draw = np.random.default_rng(1)
    wide = draw.random(len(contrast.base)) < 0.5
    score = np.where(wide, draw.normal(0, 3.0, len(wide)), draw.normal(0, 0.3, len(wide)))
    shares, spreads = np.array([0.5, 0.5]), np.array([0.1, 1.0])
    for _ in range(200):  # expectation and maximisation, both means 0
        density = shares / spreads * np.exp(-0.5 * (score[:, None] / spreads) ** 2)
        belongs = density / density.sum(axis=1, keepdims=True)
        shares = belongs.mean(axis=0)
        spreads = np.sqrt((belongs * score[:, None] ** 2).sum(axis=0) / belongs.sum(axis=0))
    assert truth == 0.0
    assert shares.max() == pytest.approx(0.5, abs=0.05)

    skewed = -draw.gamma(0.3, 1.0, len(wide))  # most near zero, a few far below
    assert (skewed > threshold_otsu(skewed)).mean() > 0.85

    for scores in (score, skewed):
        contrast.base = contrast.reference + scores
        assert not estimate(contrast).signal
    assert sign_symmetry(score) < 0.03
    assert sign_symmetry(skewed) == 0.0


def test_a_reference_worse_than_its_base_gives_no_signal() -> None:
    """As one does that was trained on responses shuffled over their prompts."""
    contrast, _ = drawn(0.6, 0)
    turned = Contrast(
        **{
            **vars(contrast),
            "base": contrast.reference,
            "base_others": contrast.reference_others,
            "reference": contrast.base,
            "reference_others": contrast.base_others,
        }
    )
    found = estimate(turned)
    assert found.tie > 3
    assert found.gain < 0
    assert not found.signal


def test_few_samples_say_nothing() -> None:
    found = estimate(ranked([1] * (MIN_SAMPLES - 1)))
    assert (found.lower, found.upper, found.signal, found.keep) == (0.0, 1.0, False, 1.0)
    assert estimate(ranked([1] * MIN_SAMPLES)).signal
    assert estimate(ranked([1]).among(np.zeros(0, dtype=int))).samples == 0


def test_halves_count_as_one_pool() -> None:
    contrast, _ = drawn(0.5, 3)
    first, second = contrast.among(np.arange(100)), contrast.among(np.arange(100, 400))
    both = estimate(Contrast.joined([first, second]))
    assert both.to_json() == estimate(contrast).to_json()


def test_sign_symmetry_by_hand() -> None:
    assert sign_symmetry(np.array([1.0, 2.0, 0.5, -1.0, 0.0])) == pytest.approx(0.4)
    assert sign_symmetry(np.array([-1.0, -2.0, 0.5])) == 0.0
    assert sign_symmetry(np.zeros(0)) == 0.0


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("copies", [1, 3])
def test_control_tail_by_hand(shift: float, copies: int) -> None:
    """Half of the responses' scores are as prompts' are, half one nat higher, of 2,000 samples.

    F_response = 1/2 and F_control = 1 at the prompts' score. Neither a shared shift nor tokens
    that repeat their sample's others change the bound.
    """
    n = 2000
    sample = np.repeat(np.arange(n), copies)
    empty = ranked([1])
    found = Contrast(
        **{
            **vars(empty),
            "sample": sample,
            "base": np.full(n * copies, 0.5),
            "reference": 0.5 - shift - (sample % 2),
            "control_sample": sample,
            "control_base": np.full(n * copies, 0.5),
            "control_reference": np.full(n * copies, 0.5 - shift),
        }
    )
    e = np.sqrt(np.log(2 * 16 / 0.05) / (2 * n))  # eight bins, two sides
    assert control_tail(found) == pytest.approx(1 - (0.5 + e) / (1 - e))


def test_control_tail_of_noise_is_zero() -> None:
    found, _ = drawn(0.0, 0)
    prompts, _ = drawn(0.0, 1)
    found.control_sample = prompts.sample
    found.control_base, found.control_reference = prompts.base, prompts.reference
    assert control_tail(found) == 0.0


# -- soft weights ---------------------------------------------------------------------------------


def fitted(base: np.ndarray, score: np.ndarray) -> np.ndarray:
    ratio = TailRatio()
    for part in np.array_split(np.arange(len(base)), 3):
        ratio.add(base[part], score[part])
    ratio.fit()
    return ratio.weights(base, score)


def test_soft_weights_by_hand() -> None:
    """Near zero as many below as above; further out 3 to 1; far out none below."""
    score = np.array([0.1, -0.1] * 400 + [1.0] * 300 + [-1.0] * 100 + [10.0] * 100)
    weight = fitted(np.full(len(score), 0.5), score)
    assert weight[:800].tolist() == [0.0] * 800
    assert weight[800:1100] == pytest.approx(np.full(300, 2 / 3))
    assert weight[1100:1200].tolist() == [0.0] * 100
    assert weight[1200:].tolist() == [1.0] * 100


def test_tokens_are_compared_with_those_of_like_loss() -> None:
    """What the base knows can only score far below zero: that counts among such tokens alone."""
    known = np.full(400, -3.0)
    score = np.array([1.0] * 300 + [-1.0] * 100)
    weight = fitted(
        np.concatenate([np.full(400, 0.02), np.full(400, 5.0)]), np.concatenate([known, score])
    )
    assert not weight[:400].any()
    assert weight[400:700] == pytest.approx(np.full(300, 2 / 3))


def test_no_soft_weight_without_signal() -> None:
    half = np.random.default_rng(0).normal(size=20_000)
    base = np.random.default_rng(1).gamma(1.0, 1.0, 40_000)
    weight = fitted(base, np.concatenate([half, -half]))
    # symmetric but for which loss a token has
    assert weight.mean() < 0.03


def test_weights_rise_with_the_score() -> None:
    draw = np.random.default_rng(0)
    score = np.concatenate([draw.normal(0, 1, 5000), draw.normal(2, 1, 2000)])
    weight = fitted(np.full(7000, 1.0), score)[np.argsort(score)]
    assert (np.diff(weight) >= 0).all()
    assert weight[-1] > 0.95


def test_soft_drops_what_weighs_nothing() -> None:
    score = np.array([0.1, -0.1] * 400 + [1.0] * 300 + [-1.0] * 100)
    base = np.full(len(score), 0.5, dtype=np.float32)
    columns = {"base.nll": base, "reference.nll": (base - score).astype(np.float32)}
    block = TokenBlock(np.array([0]), np.array([len(score)]), np.array([False]), columns)
    got = select(lambda: [block], SelectionConfig("soft"))
    assert np.flatnonzero(got.keep).tolist() == list(range(800, 1100))
    weights = got.rule.weights(block, got.keep)
    assert weights[800:1100] == pytest.approx(np.full(300, 2 / 3))
    assert not weights[:800].any()
    assert (got.rule.decide(block) == KEPT).tolist() == got.keep.tolist()


# -- keep: auto -----------------------------------------------------------------------------------


def test_auto_is_for_rules_that_rank_the_pool_by_the_score() -> None:
    with pytest.raises(ValueError, match=r"selection.keep: auto goes with .* not with random"):
        SelectionConfig("random", keep="auto")
    with pytest.raises(ValueError, match=r"selection.keep: auto goes with .* at scope sample"):
        SelectionConfig(scope="sample", keep="auto")
    assert not SelectionConfig("full", keep="auto").estimates_keep
    assert SelectionConfig(keep="auto").estimates_keep
    with pytest.raises(ValueError, match="must be estimated"):
        _ = SelectionConfig(keep="auto").share
