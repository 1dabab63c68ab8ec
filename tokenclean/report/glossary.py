"""The words of a report, explained once, for readers who meet it first."""

from __future__ import annotations

from typing import Final

WORDS: Final = [
    ("token", "A piece of text as the model reads it: a word, a part of one, a mark, a byte."),
    (
        "kept, dropped",
        "A kept token carries loss: training moves the model towards it. A dropped one stays in "
        "the text, where the model reads it, and carries no loss.",
    ),
    (
        "ranked",
        "Looked at by the rule. Prompts are not, nor is D_0, nor are rows that the reference was "
        "trained on where these are left out. Kept shares are of ranked tokens.",
    ),
    (
        "nats",
        "Unit of a loss: minus the natural logarithm of the probability that the model gave the "
        "token. 0.1 nats are 90 %, 0.7 nats 50 %, 4.6 nats 1 %.",
    ),
    ("base, theta_0", "The model before anything was trained, and its weights."),
    (
        "warm-up, D_0, theta_1",
        "D_0, a part of the pool, is trained on as it is, uncleaned: the warm-up. The model that "
        "this gives, theta_1, is the first reference.",
    ),
    ("reference", "The model that the base is held against; the loop chooses it."),
    (
        "score",
        "Base loss minus reference loss: positive where the reference expects the token more.",
    ),
    ("cut", "The smallest score that is kept."),
    (
        "round, half",
        "A self-evolving arm cleans the pool part by part, and trains a new reference on each; a "
        "cross-fitted one has two halves judged by models that did not see them.",
    ),
    ("panel", "Samples that every round scores, so that the rounds can be compared."),
    ("priority, ranked by", "What a rule goes by where that is not the score."),
    ("RHO", "The same score, cut inside each sample and not over the whole pool."),
    (
        "weighting",
        "In training, kept tokens count for more or less by what the model makes of "
        "them at that step.",
    ),
    (
        "to be unlearnt",
        "A dropped token with a negative weight: training moves the model away from it.",
    ),
    (
        "planted pool, truth",
        "A made pool whose every token is known to be informative, uninformative or corrupted (a "
        "wrong value).",
    ),
    ("precision, recall", "Informative share of the kept tokens; kept share of the informative."),
    ("percentile", "Share of the arm's ranked tokens with a smaller value."),
    ("fingerprint", "A short digest of a file or of weights: the same digest, the same content."),
]
