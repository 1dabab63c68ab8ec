"""A share of the cases of `scripts/fuzz.py`, the same ones every time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st

from scripts import fuzz
from scripts.fuzz_cases import Stream

#: Cases of each stream: a few seconds together.
CASES = {
    "formats": 300,
    "arrays": 300,
    "Parquet": 200,
    "pools": 30,
    "templates": 300,
    "selection": 300,
    "ranks": 200,
    "tables": 300,
    "log-probabilities": 200,
    "exports": 150,
    "exports by datasets": 10,
}


def test_every_stream_has_its_share() -> None:
    assert CASES.keys() == fuzz.STREAMS.keys()


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_changes_silently(name: str) -> None:
    tally = fuzz.run(fuzz.STREAMS[name], CASES[name], seed=0)
    assert tally["cases"] >= CASES[name]
    assert tally["accepted"] > 0
    # what damages, breaks or loses something is among the cases
    assert (tally["rejected"] > 0) == (name not in ("ranks", "exports", "exports by datasets"))


def test_a_failing_case_is_shrunk_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(case: int, tally: Counter[str]) -> None:
        tally["accepted"] += 1
        assert case < 100

    stream = Stream(st.integers(0, 10_000), check, 1)
    monkeypatch.setattr(fuzz, "STREAMS", {"numbers": stream})
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--cases", "1000"])
    with pytest.raises(SystemExit) as stop:
        fuzz.main()
    printed: Any = capsys.readouterr()
    assert stop.value.code == 1
    assert "case=100" in printed.err.replace(" ", "").replace("\n", "")
    assert "| numbers |" in printed.out and "| 1 |" in printed.out
