"""Sections on the whole run: its arms side by side, and what their models reached."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenclean.cleaning.results import RESULTS, ArmResult
from tokenclean.data.cleaned import kept_share
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.content import Section
from tokenclean.report.counted import ALL
from tokenclean.report.plots import draw_arms
from tokenclean.report.rounds import run_results
from tokenclean.report.steps import is_ranked, ranked_blocks
from tokenclean.report.tallies import SourceCounts
from tokenclean.report.writing import Writer, with_errors, without

#: Panels of a figure of arms: all, and the first sources.
_PANELS: Final = 12
_NOISE: Final = "noise.json"


def arms_section(run: FinishedRun, write: Writer) -> Section:
    """What each arm kept, and what its model reached; every pool is read once."""
    results = run_results(run)
    rows: list[list[Any]] = []
    for name, arm in run.arms.items():
        manifest = arm.manifest
        selection = manifest["selection"]
        named = ((run.config.get("loop") or {}).get("arms") or {}).get(name) or {}
        counts = count_samples(arm)
        result = results.get(name, ArmResult(name))
        accuracy = result.accuracy.get(ALL)
        rows.append(
            [
                name,
                selection["rule"],
                manifest.get("schedule") or named.get("schedule"),
                named.get("weighting"),
                selection["scope"] if (ranked := is_ranked(arm)) else None,
                selection["keep"] if ranked else None,
                manifest["rows"],
                manifest["response_tokens"],
                manifest["ranked_tokens"],
                kept_share(manifest),
                manifest.get("cut"),
                counts.ends_kept / counts.ends if counts.ends else None,
                counts.emptied,
                *(
                    (None, None)
                    if accuracy is None
                    else (100 * accuracy.share, 100 * accuracy.standard_error)
                ),
                result.validation_nll.get(ALL),
            ]
        )
    header = [
        "arm", "rule", "schedule", "weighting", "scope", "keep share asked for", "samples",
        "response tokens", "ranked tokens", "kept share", "cut (nats)", "kept share of ends",
        "samples left with nothing", "accuracy (%)", "accuracy ±", "validation loss (nats)",
    ]  # fmt: skip
    notes = [
        "Rules that decide token by token look at neither scope nor keep share. Arms that cut in "
        "rounds or halves have no one cut. Kept shares are of the ranked tokens; the ends are the "
        "tokens that end a response."
    ]
    if any(row[7] != row[8] for row in rows):
        notes.append(
            "Ranked are fewer than the response tokens where rows were left out: those of D_0, "
            "which trained a warm-up model uncleaned, or those that the reference was trained on."
        )
    if any(row[3] not in (None, "none") for row in rows):
        notes.append("A weighting weighs the kept tokens anew in training; no pool holds that.")
    # accuracy and its error in one cell; columns that say nothing are left out
    page = [[*row[:-3], *with_errors(row[-3:-1], 1), row[-1]] for row in rows]
    columns = [name for name in header if name != "accuracy ±"]
    dull = ["schedule", "weighting", "scope", "keep share asked for", "cut (nats)", *columns[-2:]]
    shown = without(columns, page, [*dull, "kept share of ends"], None)
    table = write.table("arms", "Arms", *shown, notes, (header, rows))
    return Section("arms", "The arms", [], [table])


def count_samples(arm: CleanedArm) -> SourceCounts:
    """Samples left with nothing, and ends kept, of an arm; reads its pool once."""
    eos_id = int(arm.manifest["eos_id"])
    found = SourceCounts()
    for ranked in ranked_blocks(arm):
        size = len(ranked.block.ids)
        any_ranked, any_kept = (
            np.bincount(rows, minlength=size) > 0 for rows in (ranked.row, ranked.row[ranked.kept])
        )
        end = ranked.block.input_ids[ranked.at] == eos_id
        found += SourceCounts(
            samples=int(any_ranked.sum()),
            emptied=int((any_ranked & ~any_kept).sum()),
            ends=int(end.sum()),
            ends_kept=int((end & ranked.kept).sum()),
        )
    return found


def results_section(run: FinishedRun, write: Writer) -> Section:
    """Accuracy, validation loss and mask quality of every arm, and benchmarks if there are any."""
    section = Section("results", "What the models reached")
    results = run_results(run)
    _accuracy(results, section, write)
    _validation(results, section, write)
    if any(r.mask for r in results.values()):
        rows = [
            [name, m.tokens, m.auroc, m.auroc_corrupted, m.precision, m.recall, m.corrupted_kept]
            for name, r in results.items() if (m := r.mask.get(ALL)) is not None
        ]  # fmt: skip
        header = [
            "arm", "tokens judged", "AUROC", "AUROC against corrupted", "precision", "recall",
            "kept share of corrupted",
        ]  # fmt: skip
        notes = []
        if len({row[1] for row in rows}) > 1:
            notes.append(
                "Each mask is judged on the rows that its arm cleaned, which are not the same for "
                "all arms: without D_0 where there is one. So the same mask, keeping everything, "
                "can have two precisions."
            )
        section.tables.append(
            write.table("masks", "Masks against the planted truth", header, rows, notes)
        )
    for number, path in enumerate(_benchmarks(run.root), start=1):
        _benchmark(path, number, run, section, write)
    if not section.tables:
        section.text.append(
            "Nothing was measured: the run has no test set and no validation set, and no output of "
            "`tokenclean evaluate` lies in its folder."
        )
    return section


def _accuracy(results: dict[str, ArmResult], section: Section, write: Writer) -> None:
    found = {name: r.accuracy for name, r in results.items() if r.accuracy}
    if not found:
        return
    sources = sorted({s for accuracy in found.values() for s in accuracy} - {ALL})
    rows: list[list[Any]] = []
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for name, accuracy in found.items():
        row: list[Any] = [name]
        for source in [ALL, *sources]:
            cell = accuracy.get(source)
            if cell is None:
                row += [None, None]
                continue
            value, error = 100 * cell.share, 100 * cell.standard_error
            row += [value, error]
            panels.setdefault(source, {})[name] = (value, error)
        rows.append(row)
    header = ["arm", *(h for s in [ALL, *sources] for h in (f"{s} (%)", f"{s} ±"))]
    notes = ["±: standard error, as of independent questions."]
    section.tables.append(
        write.table(
            "accuracy", "Test accuracy in percent", ["arm", ALL, *sources],
            [[row[0], *with_errors(row[1:], 1)] for row in rows], notes, (header, rows),
        )
    )  # fmt: skip
    ordered = [source for source in [ALL, *sources] if source in panels][:_PANELS]
    draw_arms(write.path("accuracy"), {s: panels[s] for s in ordered}, "test accuracy (%)")
    best = max(panels.get(ALL, {"-": (0.0, 0.0)}).items(), key=lambda item: item[1][0])
    section.drawings.append(
        write.drawing(
            "accuracy",
            "Test accuracy of the arms",
            "Points with standard errors over questions; a panel for all questions and one per "
            "source." + (" The first sources only." if len(sources) + 1 > _PANELS else ""),
            f"Accuracy of {len(found)} models; the highest over all: {best[0]}, "
            f"{best[1][0]:.1f} %.",
            header,
            rows,
        )
    )


def _validation(results: dict[str, ArmResult], section: Section, write: Writer) -> None:
    found = {name: r.validation_nll for name, r in results.items() if r.validation_nll}
    if found:
        sources = sorted({s for losses in found.values() for s in losses} - {ALL})
        rows = [[name, *(v.get(s) for s in [ALL, *sources])] for name, v in found.items()]
        section.tables.append(
            write.table(
                "validation", "Validation loss (nats per response token)",
                ["arm", ALL, *sources], rows,
            )
        )  # fmt: skip


def _benchmarks(folder: Path) -> Iterator[Path]:
    """Results of `tokenclean evaluate` that lie in a run's folder."""
    for path in sorted([*folder.glob(f"*/{RESULTS}"), *folder.glob(f"*/*/{RESULTS}")]):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and {"columns", "models"} <= set(found):
            yield path


def _benchmark(path: Path, number: int, run: FinishedRun, section: Section, write: Writer) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    columns = [column["name"] for column in found["columns"]]
    name = "benchmarks" if number == 1 else f"benchmarks-{number}"
    rows: list[list[Any]] = []
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for model, values in found["models"].items():
        row: list[Any] = [model]
        for column in columns:
            cell = (values.get("cells") or {}).get(column) or {}
            value, error = cell.get("value"), cell.get("stderr")
            row += [value, error]
            if value is not None:
                known = math.nan if error is None else float(error)
                panels.setdefault(column, {})[model] = (float(value), known)
        rows.append(row)
    header = ["model", *(h for c in columns for h in (c, f"{c} ±"))]
    place = path.parent.relative_to(run.root)
    notes = [f"From {place}; ±: standard error over questions. Shares, not percent."]
    shown = [[row[0], *with_errors(row[1:], 3)] for row in rows]
    section.tables.append(
        write.table(name, f"Benchmarks: {place}", ["model", *columns], shown, notes, (header, rows))
    )
    if panels:
        drawn = [column for column in columns if column in panels][:_PANELS]
        draw_arms(write.path(name), {c: panels[c] for c in drawn}, "value of the benchmark")
        section.drawings.append(
            write.drawing(
                name, f"Benchmarks: {place}", "Points with standard errors over questions.",
                f"Values of {len(rows)} models in {len(columns)} columns.", header, rows,
            )
        )  # fmt: skip


def noise_section(run: FinishedRun, write: Writer) -> Section | None:
    """What `tokenclean noise` found; None if it was not run."""
    path = run.root / _NOISE
    if not path.is_file():
        return None
    rows: list[list[Any]] = []
    for name, values in json.loads(path.read_text(encoding="utf-8")).items():
        whole = values["share"]
        for source, estimate in {ALL: whole, **(whole.get("sources") or {})}.items():
            signal = bool(estimate.get("signal"))
            ends = [estimate.get(end) if signal else None for end in ("lower", "upper")]
            kept = values.get("keep") if source == ALL else None
            said = "yes" if signal else "no signal"
            rows.append([name, source, estimate.get("samples"), *ends, said, kept])
    header = ["arm", "source", "samples", "lower end", "upper end", "signal", "kept share"]
    notes = ["Interval of the informative share of the response tokens, by `tokenclean noise`."]
    table = write.table("noise", "How much of the pool is informative", header, rows, notes)
    return Section("noise", "How much is informative", [], [table])
