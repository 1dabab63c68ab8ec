"""`tokenclean noise RUN`: how much of a pool is informative, arm by arm and source by source."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from tokenclean import commands
from tokenclean.cleaning.alignment import DECILES, alignment
from tokenclean.cleaning.loop import CleaningLoop
from tokenclean.costs import tokenise
from tokenclean.data.cleaned import KIND as CLEANED
from tokenclean.data.cleaned import CleanedPool, kept_share
from tokenclean.evaluation.planted import ALL
from tokenclean.publish import MANIFEST, read_manifest, write_json
from tokenclean.runs import CONFIG, log_to
from tokenclean.scoring.probe import share
from tokenclean.selection.noise import MIN_SAMPLES

log = logging.getLogger(__name__)

NOISE = "noise.json"
#: Column -> field of an estimate.
COLUMNS = {
    "samples": "samples",
    "tokens": "tokens",
    "sign symmetry": "sign_symmetry",
    "control tail": "control_tail",
    "P(score > 0)": "positive",
    "tie": "tie",
    "gain": "gain",
    "lower": "lower",
    "upper": "upper",
}
#: What too few samples leave open.
UNKNOWN = ("tie", "gain", "lower", "upper")
NOTE = (
    "lower, upper: interval of the informative share; tie, gain: how surely the reference ties "
    "responses to their prompts, and does so better than the base, in standard errors; without a "
    "signal there is no interval, and keep: auto drops nothing. Sign symmetry, control tail and "
    "P(score > 0) are for comparison. See tokenclean/selection/noise.py."
)


def noise(argv: list[str]) -> None:
    """Print the table of a run of `clean` or `select`, and write it to the run's folder."""
    parser = ArgumentParser(
        prog="tokenclean noise",
        description="How much of a run's pool is informative: an interval per arm and source.",
    )
    parser.add_argument("run", type=Path, help="folder of a run of `clean` or `select`")
    parser.add_argument(
        "--alignment",
        action="store_true",
        help="also compare the gradient of every decile of the score with that of the validation "
        "pool (runs of `clean`)",
    )
    options = parser.parse_args(argv)
    folder: Path = options.run
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no run: it has no {CONFIG}")
    found: dict[str, Any]
    if (folder / "arms").is_dir():
        found = _of_clean(folder, options.alignment)
    elif (folder / "cleaned" / MANIFEST).is_file():
        if options.alignment:
            raise ValueError("--alignment: it needs the models of a run of `clean`")
        manifest = read_manifest(folder / "cleaned", CLEANED)
        found = {"selected": {"share": _stored(manifest, folder), "keep": kept_share(manifest)}}
    else:
        raise ValueError(f"{folder} is no finished run of `clean` or `select`")
    write_json(folder / NOISE, found)
    print(markdown(found))


def _of_clean(folder: Path, with_alignment: bool) -> dict[str, Any]:
    loop = loop_of(folder)
    found: dict[str, Any] = {}
    with log_to(folder):
        tokenise(loop.data, loop.ledger)
        for name, arm in loop.loop.arms.items():
            cleaned = folder / "arms" / name / "cleaned"
            if not (cleaned / MANIFEST).is_file():
                continue
            if not arm.needs_reference:
                log.info("%s: left out: it asks no reference", name)
                continue
            manifest = read_manifest(cleaned, CLEANED)
            stored = manifest.get("share")
            if stored is None:
                if reason := loop.no_probes(arm):
                    log.warning("%s: left out: %s", name, reason)
                    continue
                stored = share(loop.probes(name), loop.pool).to_json()
            found[name] = {"share": stored, "keep": kept_share(manifest)}
            if with_alignment and not {"base.nll", "reference.nll"} <= set(
                arm.needs(loop.selection)
            ):
                log.warning("%s: no alignment: its rows have no scores", name)
            elif with_alignment:
                found[name]["alignment"] = alignment(
                    loop, CleanedPool(cleaned, loop.data.cache_dir)
                )
    if not found:
        raise ValueError(f"{folder}: no arm of it has a reference, so there is nothing to compare")
    return found


def loop_of(folder: Path) -> CleaningLoop:
    """The loop of a run of `clean`, as its stored configuration has it."""
    place = ["--outputs", str(folder.parent), "--name", folder.name]
    return commands.loop_of(["-c", str(folder / CONFIG), *place])


def _stored(manifest: dict[str, Any], folder: Path) -> Any:
    if manifest.get("share") is None:
        raise ValueError(
            f"{folder}: its keep share was given, not estimated; select with --selection.keep auto"
        )
    return manifest["share"]


def markdown(found: dict[str, Any]) -> str:
    """The tables of `noise.json`."""
    lines = [
        "| arm | source | " + " | ".join(COLUMNS) + " | signal | kept |",
        "|---|---|" + "---:|" * len(COLUMNS) + "---|---:|",
    ]
    for name, values in found.items():
        whole = values["share"]
        for source, estimate in {ALL: whole, **whole["sources"]}.items():
            few = estimate["samples"] < MIN_SAMPLES
            hidden = UNKNOWN if few else () if estimate["signal"] else ("lower", "upper")
            cells = ["-" if key in hidden else _shown(estimate[key]) for key in COLUMNS.values()]
            kept = _shown(values["keep"]) if source == ALL else "-"
            signal = "too few samples" if few else "yes" if estimate["signal"] else "no signal"
            lines.append(f"| {name} | {source} | {' | '.join(cells)} | {signal} | {kept} |")
    parts = ["\n".join(lines), NOTE]
    for name, values in found.items():
        if "alignment" in values:
            parts.append(_alignment(name, values["alignment"]))
    return "\n\n".join(parts)


def _alignment(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Gradient of {DECILES} parts of the score against that of the validation pool, arm {name}",
        "",
        "| part | scores | tokens | inner product | standard error | cosine | helps |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['part']} | {row['from']:.3g} to {row['to']:.3g} | {row['tokens']:,} | "
            f"{row['inner']:.3g} | {row['error']:.2g} | {row['cosine']:.3f} | "
            f"{'yes' if row['helps'] else 'no'} |"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
