"""Self-evolving cleaning, round by round: cuts, agreement of masks, and who gains.

Rounds clean different rows, so their masks are compared on a panel: the same rows, scored by every
round's reference and masked by the arm's rule (``round_<t>/panel/cleaned``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenclean.cleaning.results import RESULT, RESULTS, ArmResult
from tokenclean.data.cleaned import is_cleaned_pool, read_blocks
from tokenclean.evaluation.planted import ALL, Accuracy
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.steps import Ranked, Step, ranked_blocks, steps_of
from tokenclean.report.tallies import StepMeans


@dataclass(frozen=True)
class Agreement:
    """How far two keep masks of the same tokens agree.

    Attributes:
        equal: share of equal decisions.
        kappa: Cohen's, (p_o - p_e) / (1 - p_e): 0 for the agreement that chance gives masks of
            these shares; NaN where chance alone makes them agree everywhere.
    """

    equal: float
    kappa: float


def agreement(one: np.ndarray, other: np.ndarray) -> Agreement:
    """Of two masks: bool, shape (n,) each, n at least 1."""
    equal = float((one == other).mean())
    a, b = float(one.mean()), float(other.mean())
    chance = a * b + (1 - a) * (1 - b)
    return Agreement(equal, math.nan if chance == 1.0 else (equal - chance) / (1 - chance))


@dataclass(frozen=True)
class Panel:
    """The rounds' masks and scores of the same response tokens, n of R samples.

    Attributes:
        samples: R.
        kept: round -> mask, bool, shape (n,).
        score: round -> nats, float64, shape (n,); NaN where there is none.
    """

    samples: int
    kept: dict[int, np.ndarray]
    score: dict[int, np.ndarray]

    @property
    def tokens(self) -> int:
        return len(next(iter(self.kept.values())))

    def above(self, step: Step) -> float | None:
        """Share of tokens whose score reaches the round's own cut; None where it has no cut."""
        score = self.score.get(step.number)
        if step.cut is None or score is None or np.isnan(score).all():
            return None
        return float((score >= step.cut).mean())


def read_panel(arm: CleanedArm) -> Panel | None:
    """An arm's panel; None if no round has one.

    Raises:
        ValueError: if the rounds' panels are not of the same tokens.
    """
    kept: dict[int, np.ndarray] = {}
    score: dict[int, np.ndarray] = {}
    first: tuple[Path, list[str], np.ndarray] | None = None
    for number, step in arm.rounds.items():
        place = step / "panel" / "cleaned"
        if not is_cleaned_pool(place):
            continue
        parts = [Ranked(b, np.ones(len(b.ids), dtype=np.int64)) for b in read_blocks(place)]
        ids = [id for part in parts for id in part.block.ids]
        tokens = np.concatenate([part.block.input_ids[part.at] for part in parts])
        if first is None:
            first = place, ids, tokens
        elif first[1] != ids or not np.array_equal(first[2], tokens):
            raise ValueError(
                f"{place} is not of the same tokens as {first[0]}; remove both rounds' panels, and "
                "run the same `clean` command again to have them made anew"
            )
        kept[number] = np.concatenate([part.kept for part in parts])
        score[number] = np.concatenate([part.values("score") for part in parts])
    if first is None or not len(first[2]):
        return None
    return Panel(len(first[1]), kept, score)


def round_scalars(run: FinishedRun, arm: CleanedArm) -> dict[int, dict[str, float]]:
    """What changes from round to round: round -> name -> value; without what is not known.

    Arms that are not self-evolving have one round. Names: ``cut``, ``near_cut``, ``kept_share``,
    ``mean_base_nll``, ``mean_reference_nll``, ``mean_score`` (nats), ``agreement`` and ``kappa``
    (with the round before, on the panel), ``panel_above_cut``, ``accuracy`` (of the model trained
    on the round).
    """
    means = StepMeans()
    for ranked in ranked_blocks(arm):
        means.add(ranked)
    panel = read_panel(arm)
    accuracies = round_results(run, arm)
    found: dict[int, dict[str, float]] = {}
    for step in [Step(1, "whole pool", arm.manifest)] if not _in_rounds(arm) else steps_of(arm):
        mean = means.of_step(step.number) if _in_rounds(arm) else means.of_all()
        result = accuracies.get(step.number)
        accuracy = None if result is None else result.accuracy.get(ALL)
        values: dict[str, float | None] = {
            "cut": step.cut,
            "near_cut": step.facts.get("near_cut"),
            "kept_share": mean.kept_share,
            "mean_base_nll": mean.mean("base"),
            "mean_reference_nll": mean.mean("reference"),
            "mean_score": mean.mean("score"),
            "accuracy": None if accuracy is None else accuracy.share,
        }
        if panel is not None:
            values["panel_above_cut"] = panel.above(step)
            before, now = (panel.kept.get(t) for t in (step.number - 1, step.number))
            if before is not None and now is not None:
                both = agreement(before, now)
                values |= {"agreement": both.equal, "kappa": both.kappa}
        found[step.number] = {
            name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)
        }
    return found


def _in_rounds(arm: CleanedArm) -> bool:
    return "rounds" in arm.manifest


def round_results(run: FinishedRun, arm: CleanedArm) -> dict[int, ArmResult]:
    """What was measured of the models along the rounds: -1 the base, 0 the warm-up, 1 ... T.

    The last round's model is the arm's own.
    """
    last = max(arm.rounds, default=1)
    arms = (run.config.get("loop") or {}).get("arms") or {}
    warm = [name for name, found in arms.items() if (found or {}).get("schedule") == "warmup"]
    places: dict[int, Iterable[Path]] = {
        0: [run.root / "warmup", *(run.root / "arms" / name for name in [*warm, "warmup"])],
        **{t: [folder] for t, folder in arm.rounds.items()},
    }
    places[last] = [*places.get(last, []), arm.folder]
    found: dict[int, ArmResult] = {}
    if base := run_results(run).get("base"):
        found[-1] = base
    for number, folders in places.items():
        for folder in folders:
            if (folder / RESULT).is_file():
                text = (folder / RESULT).read_text(encoding="utf-8")
                found[number] = ArmResult.from_json(json.loads(text))
                break
    return dict(sorted(found.items()))


def run_results(run: FinishedRun) -> dict[str, ArmResult]:
    """Arm -> what a run of `clean` measured of it, the base among them; empty if nothing."""
    path = run.root / RESULTS
    if not path.is_file():
        return {}
    return {r["name"]: ArmResult.from_json(r) for r in json.loads(path.read_text(encoding="utf-8"))}


def is_change(one: Accuracy, other: Accuracy) -> bool:
    """Two accuracies differ by more than two standard errors, as of independent questions."""
    error = math.hypot(one.standard_error, other.standard_error)
    return abs(other.share - one.share) > 2 * error
