"""The card of an export: what was cleaned, by what, what is in the folder, how to load it.

Cards say nothing of the machine or of the time, so that the same run gives the same card.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenclean import __version__
from tokenclean.data.cleaned import kept_share
from tokenclean.export.content import Counts, Tally
from tokenclean.export.markdown import cell, facts, front_matter, shown, table
from tokenclean.finished import ONLY, CleanedArm, FinishedRun
from tokenclean.selection.rule import Rule, make_rule

log = logging.getLogger(__name__)

#: What the manifest's `score_base` means.
SCORE_BASES = {
    "theta_0": "the base model, untrained",
    "previous": "the model as the round before left it",
}
#: Sources that the table of a card names; the rest is put together.
SOURCES = 50
ABOUT = (
    "Token cleaning (arXiv 2502.01968) decides for every response token of a pool for supervised "
    "fine-tuning whether a model is to learn it; the others stay in the context and carry no loss."
)


@dataclass(frozen=True)
class Loading:
    """How one format is read.

    Attributes:
        title: what reads it.
        text: Markdown, with code that runs in the export's folder.
        files: files that a data set viewer should open, if it cannot tell.
    """

    title: str
    text: str
    files: str | None = None


def data_card(
    run: FinishedRun,
    arm: CleanedArm,
    counted: Tally,
    loading: Loading,
    license: str | None,
    tokenizer: str | None,
    notes: Sequence[str],
) -> str:
    """The card of an export of data.

    Args:
        run, arm: what is exported.
        counted: what is in it.
        loading: how to read it.
        license: an SPDX name, if one was given.
        tokenizer: name of the tokenizer, if it is known.
        notes: what a reader must know of this export.
    """
    total, manifest = counted.total, arm.manifest
    head: dict[str, Any] = {"tags": ["tokenclean", "token-cleaning"]}
    if loading.files is not None:
        files = [{"split": "train", "path": loading.files}]
        head["configs"] = [{"config_name": "default", "data_files": files}]
    share = f"{total.kept / total.response:.1%}" if total.response else ""
    if total.warmup and total.share is not None:
        share += f"; {total.share:.1%} without the warm-up, which no rule cleaned"
    name = run.root.name if arm.name == ONLY else arm.name
    parts = [
        front_matter(head, license) + f"\n# Cleaned tokens of {cell(name)}, for {loading.title}",
        f"{counted.rows:,} of {total.samples:,} samples, in which {total.kept:,} of "
        f"{total.response:,} response tokens{f' ({share})' if share else ''} are kept. {ABOUT} "
        "Written by tokenclean "
        f"{__version__}.",
        "## How to load it",
        loading.text,
        *(["## To know", "\n".join(f"* {note}" for note in notes)] if notes else []),
        "## What was cleaned",
        facts(
            {
                "token pool": manifest.get("pool"),
                "samples": f"{total.samples:,}",
                "response tokens": f"{total.response:,}",
                "tokenizer": f"{shown(tokenizer)}, fingerprint {manifest.get('tokenizer')}",
                "vocabulary": manifest.get("vocabulary"),
                "layout": manifest.get("template"),
                "longest sample allowed": f"{manifest.get('max_length')} tokens",
            }
        ),
        "## How",
        how(run, arm),
        "## Sources",
        sources(counted.sources, total),
        _licence(license, "the pool's samples"),
    ]
    return "\n\n".join(parts) + "\n"


def how(run: FinishedRun, arm: CleanedArm) -> str:
    """Rule, options, cut, models, rounds and reasons of an arm, as far as its manifest knows."""
    manifest = arm.manifest
    selection = manifest.get("selection") or {}
    loop = run.config.get("loop") or {}
    settings = (loop.get("arms") or {}).get(arm.name) or {}
    options = manifest.get("rule_options") or settings.get("options") or selection.get("options")
    rule = _rule(selection.get("rule"))
    asked = settings.get("keep") or selection.get("keep")
    scored = loop.get("reference") or run.config.get("reference")
    stood_on = manifest.get("score_base")
    steps = manifest.get("rounds") or manifest.get("halves") or []
    base = manifest.get("base") or next((s["base"] for s in steps if s.get("base")), None)
    pairs = {
        "rule": selection.get("rule"),
        "what it does": " ".join((rule.__doc__ or "").split("\n\n")[0].split()) if rule else None,
        "options": ", ".join(f"{k} = {v}" for k, v in (options or {}).items()) or None,
        "scope": selection.get("scope"),
        "share to keep": "none: the rule decides" if rule and not rule.ranked else asked,
        "share kept": f"{kept_share(manifest):.4f}",
        "cut": _number(manifest.get("cut")),
        "tokens as near the cut as the scores' noise": _share(manifest.get("near_cut")),
        "always keeps EOS": selection.get("always_keep_eos") or None,
        "rows seen by the reference left out": selection.get("exclude_seen") or None,
        "schedule": manifest.get("schedule") or settings.get("schedule"),
        "base": _model(shown(base_name(run)) if run.base else None, base),
        "base of the scores": SCORE_BASES.get(str(stood_on), stood_on),
        "reference": _model(shown(scored) if scored else None, manifest.get("reference")),
        "online weighting of its training (not in the data)": settings.get("weighting"),
    }
    parts = [facts(pairs)]
    if manifest.get("rounds"):
        parts += ["Rounds; round 0 is the warm-up, of which every token is kept:", _steps(steps, 0)]
    elif steps:
        parts += ["Parts of the pool, each judged by a reference that has not seen it:"]
        parts += [_steps(steps, 1)]
    if reasons := _reasons(manifest):
        parts += ["What became of the response tokens:", reasons]
    return "\n\n".join(parts)


def _rule(name: Any) -> Rule | None:
    """The rule of that name; None if it cannot be made here, as one of somebody's own."""
    try:
        return make_rule(str(name))
    except ValueError:
        return None


def _steps(steps: Sequence[dict[str, Any]], first: int) -> str:
    """Rounds or halves, numbered from ``first``."""
    rows = [
        [
            number,
            f"{step.get('ranked_tokens', 0):,}",
            f"{step.get('kept_tokens', 0):,}",
            _number(step.get("cut")) or "-",
            step.get("base") or "-",
            step.get("reference") or "-",
        ]
        for number, step in enumerate(steps, first)
    ]
    return table(["", "response tokens", "kept", "cut", "base", "reference"], rows)


def _reasons(manifest: dict[str, Any]) -> str | None:
    """Response tokens by what became of them, if the manifest counts them."""
    found: Counter[str] = Counter()
    for counts in (manifest.get("tokens_by_reason") or {}).values():
        found.update(counts)
    named = manifest.get("reasons") or {}
    order = sorted(found.items(), key=lambda item: int(item[0]))
    rows = [[named.get(code, code), f"{n:,}"] for code, n in order if n]
    return table(["", "tokens"], rows) if rows else None


def sources(found: dict[str, Counts], total: Counts) -> str:
    """Kept share per source; the smallest put together where there are many."""
    order = sorted(found, key=lambda name: (-found[name].response, name))
    rows = [(name, found[name]) for name in order[:SOURCES]]
    if others := order[SOURCES:]:
        rest = Counts()
        for name in others:
            rest.add(found[name])
        rows.append((f"{len(others):,} others", rest))
    header = ["source", "samples", "response tokens", "kept", "kept share", "nothing kept"]
    warmup = total.warmup > 0
    lines = []
    for name, c in [*rows, ("all", total)]:
        share = "-" if c.share is None else f"{c.share:.3f}"
        numbers = [f"{n:,}" for n in (c.samples, c.response, c.kept)]
        more = [f"{c.warmup:,}"] if warmup else []
        lines.append([name, *numbers, share, f"{c.emptied:,}", *more])
    text = table([*header, *(["not cleaned"] if warmup else [])], lines)
    if warmup:
        text += (
            "\n\nSamples not cleaned are those of the warm-up (round 0), kept whole; they do not "
            "count for the kept share."
        )
    return text


def model_card(
    run: FinishedRun | None,
    arm: CleanedArm | None,
    base: str,
    known: bool,
    loading: Loading,
    license: str | None,
    details: dict[str, Any],
    is_adapter: bool,
) -> str:
    """The card of an exported model.

    Args:
        run, arm: where its data were cleaned, if that is known.
        base: the base model's name, as the run has it.
        known: others can look that name up.
        loading: how to load it.
        license: an SPDX name, if one was given.
        details: of its training.
        is_adapter: or a whole model.
    """
    head: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if known:
        head["base_model"] = base
    head |= {"pipeline_tag": "text-generation", "tags": ["tokenclean", "token-cleaning"]}
    title = "adapter" if is_adapter else "model"
    trained = "on the kept tokens of a pool cleaned token by token" if arm else "by tokenclean"
    parts = [
        front_matter(head, license) + f"\n# {shown(base)}, fine-tuned: {title}",
        f"{shown(base)}, fine-tuned {trained}. {ABOUT} Written by tokenclean {__version__}.",
        "## How to load it",
        loading.text,
        "## Training",
        facts(details),
    ]
    if run is not None and arm is not None:
        manifest = arm.manifest
        parts += [
            "## Data",
            facts(
                {
                    "token pool": manifest.get("pool"),
                    "samples": f"{manifest.get('rows', 0):,}",
                    "response tokens": f"{manifest.get('response_tokens', 0):,}",
                    "tokenizer fingerprint": manifest.get("tokenizer"),
                    "layout": manifest.get("template"),
                }
            ),
            how(run, arm),
        ]
    parts.append(_licence(license, "the base model and the training data"))
    return "\n\n".join(parts) + "\n"


def base_name(run: FinishedRun) -> str | None:
    """The base's name as the run stores it, wherever that is found from here."""
    named = ((run.config.get("model") or {}).get("base") or {}).get("name")
    if named:
        return str(named)
    return run.base.name if run.base else None


def named(name: str | None, run: Path, what: str = "base") -> str:
    """A model's name for a card's code: the name, or BASE with a comment if others have no such.

    A warning tells whoever exports to put a name there.

    Args:
        name, run: see `is_hub_name`.
        what: the run calls it.
    """
    if name is not None and is_hub_name(name, run):
        return json.dumps(name)
    if name is not None:
        log.warning("%s is a folder, which others do not have: the card's code says BASE", name)
    seen = f"the run's {what}: {shown(name)}, seen from where the run was made"
    return f'"BASE"  # {seen if name else "the model whose tokenizer made these tokens"}'


def is_hub_name(name: str | None, run: Path) -> bool:
    """Whether a model's name is one that others can look up.

    What reads like one may be a folder, too, seen from where the run was started: that is looked
    for in the folders that the run lies in, wherever the export is written from.

    Args:
        name: as the run has it, if it has one.
        run: folder of the run, or of a part of it.
    """
    if name is None or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return False
    place = run.resolve()
    return not any((folder / name).is_dir() for folder in (place, *place.parents))


def _licence(license: str | None, owners: str) -> str:
    said = (
        f"{license}, as given by whoever exported it."
        if license
        else "**Not stated.** Fill it in, here and as `license:` at the top (or export with "
        "`--license`)."
    )
    return f"## Licence\n\n{said} tokenclean does not know the licences of {owners}; they apply."


def _number(value: Any) -> str | None:
    return f"{value:.6g}" if isinstance(value, int | float) else None


def _share(value: Any) -> str | None:
    return f"{value:.2%}" if isinstance(value, int | float) else None


def _model(name: str | None, fingerprint: Any) -> str | None:
    known = [str(part) for part in (name, fingerprint and f"fingerprint {fingerprint}") if part]
    return ", ".join(known) or None
