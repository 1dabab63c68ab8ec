"""An arm's cleaned pool, step by step: what was ranked together, by what, and where it was cut.

A fixed-model arm has one step, a self-evolving arm one per round, a cross-fitted arm one per half.
Rows of D_0, which trained the warm-up model uncleaned, belong to none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from tokenclean.data.cleaned import CleanedBlock, is_cleaned_pool, read_blocks
from tokenclean.data.rows import NO_LOSS
from tokenclean.finished import CleanedArm
from tokenclean.selection.rule import BELOW_CUT, REASONS, SEEN, Rule, make_rule

#: Step of rows that no rule looked at.
UNCLEANED: Final = 0


@dataclass(frozen=True)
class Step:
    """What was ranked together.

    Attributes:
        number: from 1: the round, or the half.
        title: for people.
        facts: of its manifest: ``cut`` (nats), ``near_cut`` (a share), ``noise`` (nats), ``base``,
            ``reference``, ``share`` (of ``keep: auto``); None, or missing, where there is none.
    """

    number: int
    title: str
    facts: dict[str, Any]

    @property
    def cut(self) -> float | None:
        """Smallest kept score, in nats; None where a rule has no such cut."""
        found = self.facts.get("cut")
        return None if found is None else float(found)

    @property
    def noise(self) -> float | None:
        """What a score may be off by, in nats; None where it is not known."""
        found = self.facts.get("noise")
        return None if found is None else float(found)


def steps_of(arm: CleanedArm) -> list[Step]:
    """The steps of an arm in order."""
    manifest = arm.manifest
    if "rounds" in manifest:  # the first is D_0
        facts = manifest["rounds"][1:]
        return [Step(t, f"round {t}", found) for t, found in enumerate(facts, start=1)]
    if "halves" in manifest and _halves(arm):
        return [Step(h, f"half {h}", f) for h, f in enumerate(manifest["halves"], start=1)]
    return [Step(1, "whole pool", manifest)]


def _halves(arm: CleanedArm) -> bool:
    """The halves of a cross-fitted arm are there by themselves; the joined pool mixes them."""
    places = [arm.folder / f"half_{h}" / "cleaned" for h in (1, 2)]
    return "halves" in arm.manifest and all(is_cleaned_pool(place) for place in places)


@dataclass
class Ranked:
    """Some rows of a cleaned pool, and which of their tokens the rule looked at; m such tokens.

    Attributes:
        block: the rows, R of them.
        steps: number of each row's step, `UNCLEANED` for none: int64, shape (R,).
    """

    block: CleanedBlock
    steps: np.ndarray

    @cached_property
    def at(self) -> np.ndarray:
        """Where in the block the ranked response tokens are: int64, shape (m,)."""
        block = self.block
        ranked = block.response & (block.reason != SEEN) & (self.steps[block.row] != UNCLEANED)
        return np.flatnonzero(ranked)

    @cached_property
    def row(self) -> np.ndarray:
        """Row of each ranked token within the block: int64, shape (m,)."""
        return self.block.row[self.at]

    @cached_property
    def step(self) -> np.ndarray:
        """Step of each ranked token: int64, shape (m,)."""
        return self.steps[self.row]

    @cached_property
    def kept(self) -> np.ndarray:
        """Ranked tokens that are to be learnt: bool, shape (m,)."""
        return self.block.kept[self.at]

    @cached_property
    def unlearnt(self) -> np.ndarray:
        """Ranked tokens that are to be unlearnt, those with a negative weight: bool, (m,)."""
        found: np.ndarray = (self.block.labels[self.at] != NO_LOSS) & (
            self.block.weight[self.at] < 0
        )
        return found

    def values(self, by: str | None) -> np.ndarray:
        """A column of the ranked tokens, ``score`` or ``priority``: float64, shape (m,).

        None gives NaN.
        """
        if by is None:
            return np.full(len(self.at), np.nan)
        column: np.ndarray = getattr(self.block, by)
        return column[self.at]


def ranked_blocks(arm: CleanedArm) -> Iterator[Ranked]:
    """An arm's pool, some rows at a time; memory holds one block.

    Raises:
        ValueError: if the folder holds no cleaned pool.
    """
    if _halves(arm):
        for half in (1, 2):
            for block in read_blocks(arm.folder / f"half_{half}" / "cleaned"):
                yield Ranked(block, np.where(block.rounds > 0, half, UNCLEANED).astype(np.int64))
        return
    many = "rounds" in arm.manifest
    for block in read_blocks(arm.cleaned):
        steps = block.rounds if many else np.minimum(block.rounds, 1)
        yield Ranked(block, steps.astype(np.int64))


def rule_of(arm: CleanedArm) -> Rule | None:
    """The arm's rule; None if it is a rule of someone's own that cannot be imported here."""
    selection = arm.manifest["selection"]
    try:
        return make_rule(selection["rule"], selection.get("options") or {})
    except ValueError:
        return None


def is_ranked(arm: CleanedArm) -> bool:
    """The rule ranks, so that a keep share decides; else it decides token by token."""
    if (rule := rule_of(arm)) is not None:
        return rule.ranked
    return not set(arm.manifest.get("reasons", {})) - {str(code) for code in REASONS}


def reason_names(arm: CleanedArm) -> dict[int, str]:
    """What the reason codes of an arm's pool mean: its manifest's words, but for rules without cut.

    Rules that decide token by token and give no reason of their own store that of a cut.
    """
    found = {int(code): str(text) for code, text in (arm.manifest.get("reasons") or {}).items()}
    if BELOW_CUT in found and not is_ranked(arm):
        found[BELOW_CUT] = "dropped by the rule"
    return found


def has_reference(arm: CleanedArm) -> bool:
    """Whether a reference model scored any of the arm's tokens."""
    manifest = arm.manifest
    facts = [manifest, *(manifest.get("rounds") or []), *(manifest.get("halves") or [])]
    return any(found.get("reference") for found in facts)


def goes_by(arm: CleanedArm) -> str | None:
    """The column that the rule goes by: ``priority``, or ``score``, or None if it stores none.

    Pools written before there was a column ``priority`` give their score for every rule that has
    one.
    """
    for ranked in ranked_blocks(arm):
        if len(ranked.at):
            for name in ("priority", "score"):
                if not np.isnan(ranked.values(name)).all():
                    return name
            return None
    return None
