"""The numbers and figures of a report: what belongs to one arm, and what to the whole run.

An arm's pool is read twice: once to count, once on grids that the counts have given. Tallies are of
fixed size; only planted pools, which are small, are held in memory token by token.
"""

from __future__ import annotations

from pathlib import Path

from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.content import Section
from tokenclean.report.counted import Counted
from tokenclean.report.evolution import rounds_section
from tokenclean.report.judged import truth_section
from tokenclean.report.keeping import curve_section, rankings_for
from tokenclean.report.losses import losses_section, shapes_for
from tokenclean.report.outcomes import arms_section, noise_section, results_section
from tokenclean.report.places import strings_section, where_section
from tokenclean.report.ruled import rule_section
from tokenclean.report.steps import goes_by, ranked_blocks, steps_of
from tokenclean.report.tallies import Tally
from tokenclean.report.tokens import Vocabulary
from tokenclean.report.totals import totals_section
from tokenclean.report.truth import Truths
from tokenclean.report.writing import RUN, Writer, stem


def sections(run: FinishedRun, arm: CleanedArm, folder: Path) -> list[Section]:
    """The sections of one arm; their tables and figures are written.

    Args:
        run: that the arm belongs to.
        arm: of the run.
        folder: of the report; gets ``tables/*.csv``, ``figures/*.png`` and ``figures/*.csv``, whose
            names begin with the arm's.

    Raises:
        ValueError: if the rounds' panels do not fit each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, unreadable = _vocabulary(run)
    by = goes_by(arm)
    tally = Tally(int(arm.manifest["eos_id"]), by, vocabulary)
    for ranked in ranked_blocks(arm):
        tally.add(ranked)
    counted = Counted(
        run, arm, steps_of(arm), by, tally, vocabulary, unreadable,
        Writer(folder, stem(arm.name, run.arms)),
    )  # fmt: skip
    found = [rule_section(counted), totals_section(counted), where_section(counted)]
    if not tally.whole.tokens:
        found[0].text.append(
            "No row of this pool was cleaned: it is D_0, which the warm-up model was trained on "
            "as it is."
        )
        return found

    shapes, rankings = shapes_for(counted), rankings_for(counted, folder)
    truths = Truths(by, vocabulary, tally.eos_id) if tally.truth else None
    for ranked in ranked_blocks(arm):
        shapes.add(ranked)
        if rankings is not None:
            rankings.add(ranked)
        if truths is not None:
            truths.add(ranked)
    found += [
        losses_section(counted, shapes),
        strings_section(counted),
        curve_section(counted, rankings),
    ]
    if "rounds" in arm.manifest:
        found.append(rounds_section(counted))
    if truths is not None:
        found.append(truth_section(counted, truths))
    return found


def run_sections(run: FinishedRun, folder: Path) -> list[Section]:
    """The sections of the whole run; written like `sections`, with names of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    write = Writer(folder, RUN)
    found = [arms_section(run, write), results_section(run, write)]
    noise = noise_section(run, write)
    return found if noise is None else [*found, noise]


def _vocabulary(run: FinishedRun) -> tuple[Vocabulary | None, str]:
    """The run's vocabulary, or why it is not to be had."""
    try:
        return Vocabulary(run.tokenizer), ""
    except ValueError as error:
        return None, str(error)
