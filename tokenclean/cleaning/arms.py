"""Arms and schedules: what a run of the loop is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tokenclean.named import Value
from tokenclean.selection.rule import columns_needed
from tokenclean.selection.select import Keep, Scope, SelectionConfig
from tokenclean.training.weights import Weighting, make_weighting
from tokenclean.trust import safe_name

Schedule = Literal["warmup", "fixed_model", "cross_fitted", "self_evolving"]


@dataclass
class Arm:
    """One way to clean and train.

    Args:
        schedule: ``warmup`` stops after D_0 (the paper's DS2 row). ``fixed_model`` scores the whole
            pool once and trains the base on the result. ``cross_fitted`` does so with two
            references, the base trained on either half of the pool: each scores the half that it
            has not seen. ``self_evolving`` takes D_1 ... D_T in turn: the model after the last
            round is the reference, and training goes on from it.
        rule: see `SelectionConfig`.
        scope: see `SelectionConfig`.
        keep: share of response tokens kept, or ``auto``; null takes the run's ``selection.keep``,
            which an arm's own keep overrides. A run's ``auto`` is for the arms that can take it
            (see `SelectionConfig`): others that rank need a number of their own.
        options: of the rule; null takes the run's ``selection.options`` if the run's rule is the
            same, else the rule's defaults.
        weighting: online token weights of the arm's own training, see `CleanedSFTModule`; warm-up
            and references are trained without.
        weighting_options: of the weighting.
    """

    schedule: Schedule
    rule: str = "token_cleaning"
    scope: Scope = "global"
    keep: Keep | None = None
    options: dict[str, Value] | None = None
    weighting: str | None = None
    weighting_options: dict[str, Value] | None = None

    def __post_init__(self) -> None:
        try:
            self.selection(SelectionConfig())
            online = self.make_weighting()
        except ValueError as error:
            text = str(error).replace("selection.", "loop.arms: ", 1)
            raise ValueError(text.replace("model.", "loop.arms: ", 1)) from None
        if online is not None:
            self._check_weighting(online)
        if self.schedule == "cross_fitted" and not self.needs_reference:
            raise ValueError(
                f"loop.arms: rule {self.rule} asks no reference, so there is nothing to cross-fit; "
                "give it the schedule fixed_model"
            )

    def make_weighting(self) -> Weighting | None:
        """A new instance of the weighting."""
        if self.weighting is None:
            if self.weighting_options:
                raise ValueError("model.weighting_options: there is no weighting to take them")
            return None
        return make_weighting(self.weighting, self.weighting_options)

    def _check_weighting(self, online: Weighting) -> None:
        if self.schedule == "warmup":
            raise ValueError(
                "loop.arms: all arms share the warm-up, which is trained without weights; leave "
                f"{self.weighting} out, or give it the schedule fixed_model"
            )
        if self.rule == "forgetting":
            raise ValueError(
                "loop.arms: the rule forgetting has negative weights, which the weighting "
                f"{self.weighting} does not go with; leave one out"
            )
        if self.schedule == "self_evolving" and "reference.nll" in online.needs:
            raise ValueError(
                f"loop.arms: {self.weighting} weighs by how far the model is behind its reference, "
                "and a self-evolving round starts from its reference; give it another schedule"
            )

    def selection(self, run: SelectionConfig) -> SelectionConfig:
        """The run's selection settings with this arm's own put in."""
        keep = run.keep if self.keep is None else self.keep
        options = self.options
        if options is None:
            options = run.options if run.rule == self.rule else {}
        return replace(run, rule=self.rule, options=options, scope=self.scope, keep=keep)

    def describe(self, run: SelectionConfig) -> str:
        """One line for the log, with what applies to this arm and nothing else."""
        if self.schedule == "warmup":
            return "every response token of D_0"
        selection = self.selection(run)
        text = f"schedule {self.schedule}, rule {self.rule}"
        if selection.options:
            text += f" ({', '.join(f'{k} {v}' for k, v in selection.options.items())})"
        if selection.make().ranked:
            own = "" if self.keep is None else " (the arm's own)"
            text += f", scope {self.scope}, keep {selection.keep}{own}"
        if self.weighting is not None:
            text += f", weighting {self.weighting}"
        if self.weighting_options:
            text += f" ({', '.join(f'{k} {v}' for k, v in self.weighting_options.items())})"
        return text

    def needs(self, run: SelectionConfig) -> tuple[str, ...]:
        """Columns that the arm's rule and weighting read, ``table.column``; see `TokenBlock`."""
        if self.schedule == "warmup":
            return ()
        online = self.make_weighting()
        more = () if online is None else online.needs
        return tuple(dict.fromkeys((*self.selection(run).needs, *more)))

    @property
    def needs_reference(self) -> bool:
        """Whether it asks for losses under a reference, which no option changes."""
        return columns_needed(self.needs(SelectionConfig()), "reference") is not None

    def needs_warmup(self, reference: str | None) -> bool:
        """Whether the warm-up model must be trained.

        Args:
            reference: what scores for fixed-model arms in its place.
        """
        if self.schedule == "fixed_model":
            return self.needs_reference and reference is None
        return self.schedule != "cross_fitted"


@dataclass
class LoopConfig:
    """What the loop runs.

    Args:
        arms: name -> arm, run in this order.
        warmup_epochs: epochs on D_0; null takes the trainer's ``max_epochs`` (the paper: 1).
        half_epochs: epochs on either half of the pool, for cross-fitted arms; null takes the
            trainer's ``max_epochs``.
        warmup_learning_rate: of the warm-up; null takes the optimizer's own (the paper: the same).
        score_base: the base of round t's score: ``theta_0`` (the text and the released scripts of
            arXiv 2502.01968) or ``previous``, theta_{t-1}, as its Algorithm 1 prints.
        continue_adapter: go on training one adapter instead of a fresh one per round.
        reference: scores the pool for fixed-model arms instead of the warm-up model: a LoRA adapter
            of the base, a run that holds one, or another model with the base's vocabulary (folder
            or hub name).
        warmup: an earlier run's ``warmup`` folder, to take its model instead of training one; it
            must have been trained on this run's D_0.
        evaluate_rounds: also measure the warm-up model and the model after every round.
        panel: samples of the last part, which no round's reference was trained on, that every
            self-evolving round's reference scores and the rule masks, so that the rounds' masks can
            be compared on the same tokens; 0: none. A single round has nothing to be compared with.
    """

    arms: dict[str, Arm] = field(default_factory=dict)
    warmup_epochs: int | None = None
    half_epochs: int | None = None
    warmup_learning_rate: float | None = None
    score_base: Literal["theta_0", "previous"] = "theta_0"
    continue_adapter: bool = False
    reference: str | None = None
    warmup: str | None = None
    evaluate_rounds: bool = False
    panel: int = 200

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("loop.arms: no arm given; configs/clean/ has one file per arm")
        for name in self.arms:
            safe_name(name, "loop.arms")
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise ValueError(f"loop.arms: {name!r} cannot be a folder name")
        if "base" in self.arms:
            raise ValueError("loop.arms: `base` is always run; give the arm another name")
        if self.score_base == "previous" and self.continue_adapter:
            raise ValueError(
                "loop.score_base: previous needs one adapter per round; it does not go with "
                "loop.continue_adapter"
            )
        if self.panel < 0:
            raise ValueError(f"loop.panel: {self.panel} samples; give 0 for none")
        for name in ("warmup_epochs", "half_epochs"):
            epochs = getattr(self, name)
            if epochs is not None and epochs < 1:
                raise ValueError(f"loop.{name}: {epochs}; at least 1 is needed")

    def has_panel(self, rounds: int) -> bool:
        """Whether that many rounds are to be compared on a panel."""
        return self.panel > 0 and rounds > 1


def panel_rows(parts: list[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Rows of the last part that every round's reference scores: drawn by the seed, ascending."""
    chosen = np.random.default_rng(seed).permutation(len(parts[-1]))[:size]
    rows: np.ndarray = np.sort(parts[-1][chosen])
    return rows


def halves(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Two halves of the pool, with as much of every part in one as in the other."""
    return [np.sort(np.concatenate([part[i::2] for part in parts])) for i in (0, 1)]
