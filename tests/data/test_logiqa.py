"""LogiQA's published text, eight lines per question, as JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import convert_logiqa

TEXT = """
c
All men are mortal.Ann is a man.
Then?
A.Ann rests.
B.Nothing
C.Ann is mortal.She is.
D.None

a
Rain.
Wet?
A.yes
B.no
C.maybe
D.never
"""


def test_questions_come_out_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "Test.txt", tmp_path / "logiqa" / "test.jsonl"
    for text in (TEXT, TEXT.lstrip("\n")):  # with and without the first empty line
        source.write_text(text)
        convert_logiqa.main([str(source), str(target)])
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert rows == [
            {
                "label": "c",
                "context": "All men are mortal. Ann is a man.",
                "question": "Then?",
                "options": ["Ann rests.", "Nothing", "Ann is mortal. She is.", "None"],
            },
            {
                "label": "a",
                "context": "Rain.",
                "question": "Wet?",
                "options": ["yes", "no", "maybe", "never"],
            },
        ]
    assert "2 questions written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nc\n", "\ne\n", "question 1: 'e' is not one of the letters"),
        ("B.no\n", "", "question 2: eight lines are needed"),
        ("D.never", "never", r"question 2: option 'never' does not begin with d\."),
    ],
)
def test_what_is_no_question_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    source, target = tmp_path / "Test.txt", tmp_path / "test.jsonl"
    assert old in TEXT
    source.write_text(TEXT.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        convert_logiqa.main([str(source), str(target)])
    assert not target.exists()
