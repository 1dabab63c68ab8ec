"""Do test questions occur in the training pool?

A test text is *contaminated* if the pool holds a run of 13 of its words in a row (the length that
arXiv 2005.14165, appendix C, settled on), or all of its words in a row where it has fewer. Words
are compared without case and punctuation. Texts of fewer than three words say nothing and are
counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

WORDS = 13
SHORTEST = 3
_WORD = re.compile(r"\w+")


@dataclass
class Contamination:
    """What was found.

    Attributes:
        texts: test texts compared.
        too_short: test texts of fewer than `SHORTEST` words, not among ``texts``.
        found: id of a contaminated text -> the words that the pool shares with it.
    """

    texts: int = 0
    too_short: int = 0
    found: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Contaminated share of the texts compared."""
        return len(self.found) / max(self.texts, 1)


def contamination(
    pool: Iterable[str], tests: Iterable[tuple[str, str]], words: int | None = WORDS
) -> Contamination:
    """Look for test texts in a pool.

    The tests' word runs are held in memory, the pool is read once.

    Args:
        pool: texts of the pool, in any cut: a run of words is looked for inside one text.
        tests: id and text of each test question; ids are unique.
        words: length of a run; None looks for test texts that are a whole text of the pool.

    Raises:
        ValueError: if ``words`` is below `SHORTEST`.
    """
    if words is not None and words < SHORTEST:
        raise ValueError(f"words: {words}; at least {SHORTEST} are needed to mean anything")
    result = Contamination()
    wanted: dict[int, dict[tuple[str, ...], list[str]]] = {}
    for name, text in tests:
        found = _WORD.findall(text.casefold())
        if len(found) < SHORTEST:
            result.too_short += 1
            continue
        result.texts += 1
        length = len(found) if words is None else min(words, len(found))
        for run in set(_runs(found, length)):
            wanted.setdefault(length, {}).setdefault(run, []).append(name)
    for text in pool:
        found = _WORD.findall(text.casefold())
        # A text of the pool is its own only run of that length.
        lengths = wanted if words is not None else wanted.keys() & {len(found)}
        for length in lengths:
            runs = wanted[length]
            for run in _runs(found, length):
                for name in runs.get(run, ()):
                    result.found.setdefault(name, " ".join(run))
    return result


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(length)), strict=False)
