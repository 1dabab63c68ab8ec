"""What a study is made of: settings of the loop, seeds, and the tables wanted of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tokenclean.named import Plain
from tokenclean.trust import safe_name

#: Options that are the command line's own, or the study's.
_NOT_OF_RUNS = {
    *("trust_import", "config", "c", "name", "outputs"),
    *("estimate", "print_config", "help"),
}


@dataclass
class Reference:
    """Another reference model than the warm-up's, trained by `tokenclean fit` beforehand.

    Args:
        planted: settings of the planted pool that it is trained on, over the variant's own.
        shuffled: permute the responses of that pool over its samples: a reference that has learnt
            what responses say by themselves and nothing of how they answer questions.
        options: options of `fit`.
        configs: configuration files of `fit`; null takes those of the study's that `fit` reads.
    """

    planted: dict[str, Plain] = field(default_factory=dict)
    shuffled: bool = False
    options: dict[str, Plain] = field(default_factory=dict)
    configs: list[str] | None = None


@dataclass
class Variant:
    """One setting of the loop, run with every seed.

    Args:
        options: options of `clean`, e.g. ``selection.keep: 0.3``.
        planted: settings of the planted pool, over the study's.
        value: the setting's place on an axis, for figures.
        warmup_of: variant whose warm-up model is taken instead of training one; the two must agree
            in all that a warm-up depends on.
        reference: another reference model for its fixed-model arms.
    """

    options: dict[str, Plain] = field(default_factory=dict)
    planted: dict[str, Plain] = field(default_factory=dict)
    value: float | None = None
    warmup_of: str | None = None
    reference: Reference | None = None


@dataclass
class Quick:
    """A study in a minute, to see that it runs: what replaces the study's own settings.

    Args:
        seeds: instead of the study's.
        planted: settings of the planted pool, over the study's.
        options: options of `clean`, over the study's; a variant's own go before them.
        variants: which of the variants; null takes all.
        token_budget: instead of the study's.
    """

    seeds: list[int] = field(default_factory=lambda: [0])
    planted: dict[str, Plain] = field(default_factory=dict)
    options: dict[str, Plain] = field(default_factory=dict)
    variants: list[str] | None = None
    token_budget: float | None = None


@dataclass
class StudyConfig:
    """Arms x seeds x settings.

    Args:
        configs: configuration files of `clean`, in order: model, data, training, arms.
        reports: which tables and figures to make.
        seeds: each is the seed of the planted pool, of the split and order of the data, and of the
            adapters.
        options: options of `clean` for every run.
        planted: settings of the planted pool that is written for every run; null: the data that the
            configuration files name.
        variants: name -> setting; one, ``main``, by default.
        of: folder of another study whose runs are read instead of running any.
        against: the arm that the others are compared with.
        evaluate: configuration of `tokenclean evaluate`, run on every arm of every run.
        token_budget: tokens that all runs together may compute, by the estimate; more is refused.
        quick: what ``--quick`` changes.
    """

    configs: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=lambda: ["accuracy", "mask"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    options: dict[str, Plain] = field(default_factory=dict)
    planted: dict[str, Plain] | None = None
    variants: dict[str, Variant] = field(default_factory=dict)
    of: str | None = None
    against: str = "full"
    evaluate: str | None = None
    token_budget: float | None = None
    quick: Quick = field(default_factory=Quick)

    def __post_init__(self) -> None:
        if not self.of and not self.configs:
            raise ValueError("study.configs: no configuration file of `clean` given")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"study.seeds: {self.seeds} holds no seed, or one twice")
        if not self.variants:
            self.variants = {"main": Variant()}
        _check_options(self.options, "study.options")
        _check_options(self.quick.options, "study.quick.options")
        done: list[str] = []
        for name, variant in self.variants.items():
            safe_name(name, "study.variants")
            _check_options(variant.options, f"study.variants.{name}.options")
            if variant.reference is not None:
                place = f"study.variants.{name}.reference.options"
                _check_options(variant.reference.options, place)
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise ValueError(f"study.variants: {name!r} cannot be a folder name")
            if variant.warmup_of is not None and variant.warmup_of not in done:
                raise ValueError(
                    f"study.variants.{name}.warmup_of: {variant.warmup_of!r} is not a variant "
                    "before it"
                )
            if self.planted is None and (variant.planted or _on_planted(variant.reference)):
                raise ValueError(
                    f"study.variants.{name}: it changes the planted pool, and study.planted is null"
                )
            if variant.warmup_of is not None:
                other = self.variants[variant.warmup_of]
                if variant.planted != other.planted or _of_warmup(variant) != _of_warmup(other):
                    raise ValueError(
                        f"study.variants.{name}.warmup_of: it differs from {variant.warmup_of} in "
                        "more than how tokens are selected; leave warmup_of out"
                    )
            done.append(name)


def _check_options(options: dict[str, Plain], place: str) -> None:
    """Refuse what would be another word of a run's command line than an option of its own.

    Raises:
        ValueError: naming the option, if it says where a run is, what it reads or whom it trusts.
    """
    for name in options:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\+?", name) or name in _NOT_OF_RUNS:
            raise ValueError(f"{place}: {name!r} is no option that a study can give to its runs")


def _of_warmup(variant: Variant) -> dict[str, Any]:
    """The options that a warm-up may depend on."""
    later = ("selection.", "loop.arms", "loop.score_base", "loop.evaluate_rounds", "loop.half")
    return {k: v for k, v in variant.options.items() if not k.startswith(later)}


def _on_planted(reference: Reference | None) -> bool:
    return reference is not None and (bool(reference.planted) or reference.shuffled)
