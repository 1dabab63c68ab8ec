"""What a rule is: the base class of every file in `tokenclean.selection.rules`.

A rule names the per-token columns that it reads. It either ranks (gives every response token a
priority; scope and keep share turn priorities into a mask) or decides by itself, token by token,
with a reason. Tokens arrive in blocks of whole rows in pool order, so a pool of any size is worked
on in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from tokenclean.named import Value, make

PACKAGE = "tokenclean.selection.rules"

#: Where the columns that a rule can need come from.
TABLES = ("base", "reference", "pool")

#: Reason codes of a cleaned pool, one int8 per token; a rule may have further ones.
REASONS = {0: "kept", 1: "prompt", 2: "below the cut", 3: "row seen by the reference"}
KEPT, PROMPT, BELOW_CUT, SEEN = 0, 1, 2, 3


@dataclass
class TokenBlock:
    """Whole rows in pool order; all token arrays run over the rows' response tokens.

    ``block["base.nll"]`` is a column that the rule needs.

    Attributes:
        rows: pool row numbers, int64, shape (R,).
        counts: response tokens of each row, int64, shape (R,), summing to n.
        seen: bool, shape (R,): the reference was trained on the row.
        columns: name -> values, shape (n,) each. ``base.*`` and ``reference.*`` are columns of the
            score tables, float32: ``nll`` and those of `tokenclean.scoring.table.Column`.
            ``pool.truth``: int8, 1 informative, 0 uninformative, -1 corrupted. ``pool.quality``:
            float64, the rating of the token's sample.
        is_eos: bool, shape (n,), or None where no end-of-sequence target goes first.
    """

    rows: np.ndarray
    counts: np.ndarray
    seen: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_eos: np.ndarray | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """A column.

        Raises:
            ValueError: naming what is missing.
        """
        if name not in self.columns:
            raise ValueError(f"the rule needs {describe_need(name)}")
        return self.columns[name]

    @property
    def size(self) -> int:
        """Response tokens in the block."""
        return int(self.counts.sum())

    def bounds(self) -> np.ndarray:
        """Where each row's tokens begin, and the end: int64, shape (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)


Blocks = Callable[[], Iterable[TokenBlock]]


class Rule:
    """Which response tokens keep their loss. Subclasses are dataclasses: fields are options.

    Class attributes:
        needs: columns that it reads, ``table.column``; see `TokenBlock`.
        ranked: it gives priorities; else it decides token by token, whatever the keep share.
        of_samples: what it ranks by is a property of whole samples.
        by_score: its priority is the score, base nll - reference nll.
        reasons: code -> text of its own reasons, codes 4 and up.
    """

    needs: tuple[str, ...] = ()
    ranked: ClassVar[bool] = True
    of_samples: ClassVar[bool] = False
    by_score: ClassVar[bool] = False
    reasons: ClassVar[dict[int, str]] = {}

    def fit(self, blocks: Blocks) -> None:
        """Look at the whole pool once, before anything else: thresholds and the like.

        Of several processes that select together, each looks at the whole pool: sums of floats
        would depend on how it is cut.
        """

    def restart(self, seed: int, whole_samples: bool) -> None:
        """A pass over the pool begins; the same numbers must come out every time."""

    def skip(self, rows: int, tokens: int) -> None:
        """So many rows and tokens come first, in other processes; called after `restart`.

        A rule that draws in pool order leaves out the draws of theirs.
        """

    def priority(self, block: TokenBlock) -> np.ndarray | None:
        """What each token is ranked by, higher is kept first: float64, shape (n,).

        Rules that decide by a threshold on one quantity may give it too; it is stored with the
        mask. None: there is no such quantity.
        """
        return None

    def decide(self, block: TokenBlock) -> np.ndarray:
        """Why each token is dropped, or `KEPT`: reason codes, int8, shape (n,)."""
        raise NotImplementedError

    def weights(self, block: TokenBlock, kept: np.ndarray) -> np.ndarray:
        """Loss weight of each token, 0 for none: float32, shape (n,).

        Args:
            kept: the mask, bool, shape (n,). A weight of a kept token must be positive; a dropped
                token may carry a negative one.
        """
        return kept.astype(np.float32)


def scores(base: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """base nll - reference nll, Eq. (3) of arXiv 2502.01968, in float64; shape (n,) all."""
    return np.subtract(base, reference, dtype=np.float64)


def score(block: TokenBlock) -> np.ndarray:
    """`scores` of a block: float64, shape (n,)."""
    return scores(block["base.nll"], block["reference.nll"])


def make_rule(name: str, options: Mapping[str, Value] | None = None) -> Rule:
    """The rule of a file in `tokenclean.selection.rules`, or of any module by its dotted name.

    Raises:
        ValueError: for an unknown rule or option.
    """
    return make(Rule, PACKAGE, name, options, "selection.rule")


def columns_needed(needs: Iterable[str], table: str) -> list[str] | None:
    """Columns besides ``nll`` that are needed of a table; None if the table is not needed."""
    found = {n.partition(".")[2] for n in needs if n.partition(".")[0] == table}
    return sorted(found - {"nll"}) if found else None


def describe_need(name: str) -> str:
    """A column, for an error message."""
    table, _, column = name.partition(".")
    if name == "pool.truth":
        return "a pool with planted truth; this one has none"
    if name == "pool.quality":
        return "a rating of every sample; name its column with data.order"
    text = f"a {table} score table"
    return text if column == "nll" else f"{text} with the column `{column}`"
