"""An arm with what was counted of it: what the sections of a report are written from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.steps import Step
from tokenclean.report.tallies import Tally
from tokenclean.report.tokens import Vocabulary
from tokenclean.report.writing import Writer

#: Row of a table that holds all sources together.
ALL: Final = "all"


@dataclass(frozen=True)
class Counted:
    """An arm with what was counted of it.

    Attributes:
        by: column that the rule goes by, or None.
        vocabulary: of the pool; None if its tokenizer is not known, for ``unreadable``.
    """

    run: FinishedRun
    arm: CleanedArm
    steps: list[Step]
    by: str | None
    tally: Tally
    vocabulary: Vocabulary | None
    unreadable: str
    writer: Writer
