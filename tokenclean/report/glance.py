"""A report's first lines: what was cleaned, by which rule and models, and what it did, in words."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.plain import number, share
from tokenclean.report.samples import MAX_SOURCES, OTHERS, Count, Draw, cut_of
from tokenclean.report.verdict import verdict
from tokenclean.selection.rule import PACKAGE, make_rule

#: How the reference of each schedule came about.
REFERENCES: Final = {
    "fixed_model": "the base after the warm-up on D_0",
    "self_evolving": "the model after the round before (before round 1: the warm-up on D_0)",
    "cross_fitted": "two models, each the base trained on the half of the pool that it did not "
    "judge",
}
#: Name of the scalar of a round that says how alike its mask and the one before are.
AGREEMENT: Final = "agreement"


def facts(
    run: FinishedRun, arm: CleanedArm, draw: Draw, scalars: Mapping[int, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """What a stranger asks first of an arm: question -> answer, as plain text.

    Args:
        run, arm: what is reported.
        draw: of the arm, its whole pool added.
        scalars: round -> name -> value, of self-evolving arms.
    """
    return [
        ("Cleaned", _cleaned(arm, draw)),
        ("Rule", _rule(run, arm)),
        ("Models", _models(run, arm)),
        ("Kept", _kept(draw)),
        *verdict(run, arm, draw.fate),
        ("Cut", _cut(arm)),
        ("Lost most", _lost_most(draw.sources)),
        *changed_most(arm, draw, scalars),
    ]


def _cleaned(arm: CleanedArm, draw: Draw) -> str:
    manifest = arm.manifest
    response = int(manifest.get("response_tokens") or 0)
    text = (
        f"{number(draw.samples, 'sample')} of {_how_many(draw.sources)} with "
        f"{number(response, 'response token')}"
    )
    rest = response - sum(c.ranked for c in draw.sources.values())
    if draw.has_uncleaned:
        text += (
            f"; {rest:,} of these tokens are in D_0, on which the first reference was trained, "
            "and were not cleaned"
        )
    elif rest > 0:
        text += f"; {rest:,} of these tokens were not ranked, as the reference had seen them"
    return text + "."


def _how_many(sources: Mapping[str, Count]) -> str:
    if OTHERS in sources:
        return f"more than {MAX_SOURCES} sources"
    return number(len(sources), "source")


def _rule(run: FinishedRun, arm: CleanedArm) -> str:
    selection = arm.manifest.get("selection") or {}
    rule = str(selection.get("rule", "not known"))
    options = selection.get("options") or {}
    parts = [rule]
    if about := _about(rule):
        parts[0] += f": {about}"
    if options:
        parts.append("Options: " + ", ".join(f"{k} = {v}" for k, v in options.items()) + ".")
    if not _ranks(rule, options):
        parts.append("It decides token by token; no keep share is asked.")
    else:
        where = {
            "global": "over the whole pool at once",
            "sample": "inside each sample",
            "whole_sample": "of whole samples",
        }.get(str(selection.get("scope")), f"scope {selection.get('scope')}")
        if arm.manifest.get("schedule") == "self_evolving":
            where += ", round by round"
        parts.append(f"Scope: {selection.get('scope')}, {where}. Asked to keep:")
        parts[-1] += f" {selection.get('keep')}."
    if selection.get("always_keep_eos"):
        parts.append("End-of-sequence tokens are always kept.")
    named = ((run.config.get("loop") or {}).get("arms") or {}).get(arm.name) or {}
    if weighting := named.get("weighting"):
        parts.append(f"In training, {weighting} weighs the kept tokens anew at every step.")
    return " ".join(parts)


def _ranks(rule: str, options: Mapping[str, Any]) -> bool:
    """Whether a rule goes by scope and keep share; assumed of one that cannot be found here."""
    try:
        return make_rule(rule, options).ranked
    except ValueError:
        return True


def _goes_by_score(selection: Mapping[str, Any]) -> bool:
    try:
        rule = make_rule(str(selection.get("rule")), selection.get("options") or {})
    except ValueError:
        return False
    return rule.ranked and rule.by_score


def _about(rule: str) -> str:
    """The first line of what a rule of this package says of itself."""
    try:
        module = importlib.import_module(f"{PACKAGE}.{rule}")
    except ImportError:
        return ""
    return (module.__doc__ or "").strip().split("\n")[0]


def _models(run: FinishedRun, arm: CleanedArm) -> str:
    manifest = arm.manifest
    base = run.base.name if run.base else "not named by this run"
    text = f"Base: {base}."
    rounds = [*manifest.get("rounds", []), *manifest.get("halves", []), manifest]
    asked = [key for key in ("base", "reference") if any(r.get(key) for r in rounds)]
    if "reference" in asked:
        given = (run.config.get("loop") or {}).get("reference")
        schedule = manifest.get("schedule") or ("fixed_model" if "loop" in run.config else None)
        words = str(given or REFERENCES.get(str(schedule), "")) or str(
            run.config.get("reference") or manifest.get("reference") or "not known"
        )
        text += f" Reference: {words}."
    if asked == ["base"]:
        text += " The rule asks the base alone."
    elif not asked:
        text += " The rule asks no model."
    elif asked == ["reference"]:
        text += " The rule asks the reference alone."
    return text


def _kept(draw: Draw) -> str:
    ranked = sum(c.ranked for c in draw.sources.values())
    kept = sum(c.kept for c in draw.sources.values())
    text = (
        f"{kept:,} of {number(ranked, 'ranked response token')} ({share(kept, ranked)}); "
        f"{ranked - kept:,} dropped."
    )
    if draw.fate.unlearnt:
        text += f" {draw.fate.unlearnt:,} of these have a negative weight: they are unlearnt."
    return text


def _cut(arm: CleanedArm) -> str:
    manifest = arm.manifest
    rounds, halves = manifest.get("rounds"), manifest.get("halves")
    what = "score (base loss − reference loss, nats)"
    if rounds:
        found = {i: cut for i in range(1, len(rounds)) if (cut := cut_of(manifest, i)) is not None}
        if found:
            return f"{what} from: " + "; ".join(
                f"{_cut_text(c)} in round {i}" for i, c in found.items()
            )
    elif halves and all(half.get("cut") is not None for half in halves):
        return f"{what} from: " + ", ".join(_cut_text(h["cut"]) for h in halves) + ", one per half."
    elif manifest.get("cut") is not None:
        near = manifest.get("near_cut")
        text = f"{what} from {_cut_text(manifest['cut'])} upwards is kept."
        if near is not None and manifest.get("ranked_tokens"):
            tokens = round(near * manifest["ranked_tokens"])
            text += f" {number(tokens, 'token')} nearer to it than numerical noise."
        return text
    selection = manifest.get("selection") or {}
    if _goes_by_score(selection):
        if selection.get("scope") == "sample":
            return f"No one cut: every sample has its own, of the {what}."
        if selection.get("scope") == "whole_sample":
            return f"No one cut: whole samples are ranked by their mean {what}."
    return f"No one cut of the score: {selection.get('rule')} does not rank the pool by it."


def _cut_text(cut: float) -> str:
    return f"{cut:.5f}".replace("-", "−")


def _lost_most(sources: Mapping[str, Count]) -> str:
    lost = {name: c for name, c in sources.items() if c.dropped and name != OTHERS}
    if not lost:
        return "No source lost a token."
    most = max(lost, key=lambda name: (lost[name].dropped, name))
    worst = max(lost, key=lambda name: (lost[name].dropped / lost[name].ranked, name))
    count = lost[most]
    text = (
        f"{most} lost most tokens: {count.dropped:,} of {count.ranked:,} "
        f"({share(count.dropped, count.ranked)})"
    )
    if worst == most:
        return text + ", and the largest share of its own."
    count = lost[worst]
    return (
        f"{text}; {worst} the largest share of its own: {share(count.dropped, count.ranked)} "
        f"({count.dropped:,})."
    )


def changed_most(
    arm: CleanedArm, draw: Draw, scalars: Mapping[int, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """The round whose mask of the panel differs most from the one before."""
    if arm.manifest.get("schedule") != "self_evolving":
        return []
    alike = {
        n: v[AGREEMENT]
        for n, v in scalars.items()
        if AGREEMENT in v and v[AGREEMENT] == v[AGREEMENT]
    }
    if alike:
        at = min(alike, key=lambda n: (alike[n], n))
        said = (
            f"Round {at}: {1 - alike[at]:.1%} of the panel (samples scored in every round) "
            "were decided otherwise than in the round before."
        )
        return [("Changed most", said.replace("%", " %"))]
    found = {n: cut for n in sorted(draw.rounds) if (cut := cut_of(arm.manifest, n)) is not None}
    moves = {n: abs(found[n] - found[n - 1]) for n in found if n - 1 in found}
    if not moves:
        return [("Changed most", "Not known: there is no round to compare with another.")]
    at = max(moves, key=lambda n: (moves[n], -n))
    return [
        (
            "Changed most",
            f"Round {at} by its cut, {_cut_text(found[at - 1])} to {_cut_text(found[at])}. Which "
            "decisions changed is not known: this run has no panel of samples scored in every "
            "round.",
        )
    ]
