"""The section on the rule: which one, with which settings, and where it cut."""

from __future__ import annotations

import json
from typing import Any, Final

from tokenclean.finished import CleanedArm
from tokenclean.named import options_of
from tokenclean.report.content import Section, Table
from tokenclean.report.counted import ALL, Counted
from tokenclean.report.steps import has_reference, is_ranked, rule_of
from tokenclean.report.writing import without

_NOT_KNOWN: Final = "not known"
#: Values of a long list that are shown.
LISTED: Final = 8


def rule_section(counted: Counted) -> Section:
    """Which rule, with which settings, cut where."""
    arm, tally, write = counted.arm, counted.tally, counted.writer
    manifest = arm.manifest
    selection = manifest["selection"]
    asked = selection.get("options") or {}
    whole = tally.whole
    base = counted.run.base
    ranked = is_ranked(arm)
    scope = {"global": "the whole pool", "sample": "each sample", "whole_sample": "whole samples"}
    settings: list[list[Any]] = [
        ["rule", selection["rule"]],
        ["what it does", _first_sentence(arm)],
        ["options", _options(arm)],
        ["options asked for", _listed(asked) or "none: defaults"],
        ["goes by", _goes_by(counted)],
        [
            "scope",
            f"{selection['scope']}: ranks within {scope.get(selection['scope'], '?')}"
            if ranked
            else "none: decides token by token",
        ],
        ["keep share asked for", _asked(counted) if ranked else "none: the rule decides"],
        ["keep share got", f"{whole.value:.6f}" if whole.tokens else _NOT_KNOWN],
        ["schedule", manifest.get("schedule") or _schedule(counted)],
        [
            "always keeps the end of the sequence",
            _yes(selection.get("always_keep_eos")) if ranked else None,
        ],
        ["rows that the reference was trained on", _seen(arm)],
        ["base model", _NOT_KNOWN if base is None else base.name],
        ["base of the scores", manifest.get("score_base")],
        ["attributes", _attributes(arm)],
        ["template", manifest.get("template")],
        ["longest sample (tokens)", manifest.get("max_length")],
        ["seed", manifest.get("seed")],
        ["fingerprint of the pool", manifest.get("pool")],
        ["fingerprint of the tokenizer", manifest.get("tokenizer")],
    ]
    tables = [
        write.table(
            "rule", "The rule and its settings", ["setting", "value"],
            [row for row in settings if row[1] is not None],
        ),
        _cuts(counted),
    ]  # fmt: skip
    if any(step.facts.get("share") for step in counted.steps) or manifest.get("share"):
        tables.append(_estimates(counted))
    return Section("rule", "Which rule kept them, and where it cut", [], tables)


def _options(arm: CleanedArm) -> str:
    """A rule's options with the defaults that they had."""
    stored = arm.manifest.get("rule_options")
    if stored is not None:
        return _listed(stored) or "none"
    rule = rule_of(arm)
    if rule is not None and not options_of(rule):
        return "none"
    asked = _listed(arm.manifest["selection"].get("options") or {}) or "none asked for"
    now = "" if rule is None else f" (now: {_listed(options_of(rule))})"
    return f"{asked}; the pool does not say the others{now}"


def _cuts(counted: Counted) -> Table:
    rows: list[list[Any]] = []
    for step in counted.steps:
        means = counted.tally.means.of_step(step.number)
        rows.append(
            [
                step.title,
                means.tokens,
                means.kept,
                means.kept_share,
                step.cut,
                step.noise,
                None if (near := step.facts.get("near_cut")) is None else 100 * near,
                means.mean("base"),
                means.mean("reference"),
                means.mean("score"),
                step.facts.get("base"),
                _stack(step.facts.get("reference")),
            ]
        )
    notes = [
        "The cut is the smallest score that was kept by rank. The noise is how far a score may be "
        "off (99 of 100 times no further) if the same models score again in other batches; near "
        "the cut are the ranked tokens within that distance of it, which could fall on its other "
        "side."
    ]
    if all(row[4] is None for row in rows):
        notes = [
            "There is no one cut: the rule ranks inside samples, or by a number of its own, or not."
        ]
    header = [
        "step", "ranked tokens", "kept tokens", "kept share", "cut (nats)", "noise (nats)",
        "near the cut (%)", "mean base loss (nats)", "mean reference loss (nats)",
        "mean score (nats)", "base (fingerprint)", "reference (fingerprint)",
    ]  # fmt: skip
    # noises are small and unlike, so all of one notation; of no use where there is no cut
    noises = [f"{r[5]:.1e}".replace("-", "−") if r[4] is not None and r[5] else None for r in rows]
    page = [[*row[:5], noise, *row[6:]] for row, noise in zip(rows, noises, strict=True)]
    shown = without(header, page, header[4:], None)
    return counted.writer.table("cuts", "Where it cut", *shown, notes, (header, rows))


def _estimates(counted: Counted) -> Table:
    """What `keep: auto` found."""
    rows: list[list[Any]] = []
    found = [(s.title, s.facts["share"]) for s in counted.steps if s.facts.get("share")]
    if not found:
        found = [("whole pool", counted.arm.manifest["share"])]
    for title, share in found:
        for source, estimate in {ALL: share, **(share.get("sources") or {})}.items():
            signal = bool(estimate.get("signal"))
            ends = [estimate.get(end) if signal else None for end in ("lower", "upper")]
            rows.append(
                [title, source, estimate.get("samples"), *ends, _yes(signal), estimate.get("keep")]
            )
    return counted.writer.table(
        "estimated-share",
        "Informative share as estimated for keep: auto",
        ["step", "source", "samples", "lower end", "upper end", "signal", "share kept"],
        rows,
        [
            "The upper end is what keep: auto keeps. Without a signal there is no interval and "
            "nothing is dropped. See tokenclean/selection/noise.py.",
        ],
    )


def _first_sentence(arm: CleanedArm) -> str:
    rule = rule_of(arm)
    if rule is None:
        return "a rule of its own, which cannot be imported here"
    text = " ".join((type(rule).__doc__ or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


def _goes_by(counted: Counted) -> str:
    if counted.by is None:
        return "nothing that the pool stores"
    if counted.by == "score":
        return "score: base loss minus reference loss, in nats"
    return "priority: the rule's own number, higher is better (column `priority` of the pool)"


def _asked(counted: Counted) -> str:
    keep = counted.arm.manifest["selection"]["keep"]
    estimated = any(step.facts.get("share") for step in counted.steps)
    return "auto" if keep == "auto" else f"{keep}{' (auto)' if estimated else ''}"


def _schedule(counted: Counted) -> str:
    arms = (counted.run.config.get("loop") or {}).get("arms") or {}
    named = (arms.get(counted.arm.name) or {}).get("schedule")
    return str(named) if named else "once, over the whole pool"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    """A setting; of a long list, how long it is and how it begins."""
    if isinstance(value, list) and len(value) > LISTED:
        return f"{len(value)}: {', '.join(map(str, value[:LISTED]))}, ..."
    return value if isinstance(value, str) else json.dumps(value)


def _seen(arm: CleanedArm) -> str | None:
    """How many rows the reference was trained on, and what became of them."""
    rows = arm.manifest.get("rows_seen_by_reference")
    if rows is None or not has_reference(arm):
        return None
    if not rows:
        return "none of those that were ranked"
    left_out = arm.manifest["selection"].get("exclude_seen")
    return f"{rows:,}, {'left out (exclude_seen)' if left_out else 'ranked like the others'}"


def _attributes(arm: CleanedArm) -> str | None:
    """What XTF's attributes rest on, if the arm's rule reads them; its table is shared."""
    rule = rule_of(arm)
    reads = rule is not None and any("attention" in n or "relevance" in n for n in rule.needs)
    return (_listed(arm.manifest.get("attributes") or {}) or None) if reads else None


def _stack(model: str | None) -> str | None:
    """A model's fingerprint; of a stack of adapters, their number and the last one's."""
    base, *adapters = (model or "").split("+")
    if len(adapters) < 2:
        return model
    return f"{base} + {len(adapters)} adapters, the last one {adapters[-1]}"


def _yes(value: Any) -> str:
    return "yes" if value else "no"
