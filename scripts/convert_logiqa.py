"""LogiQA's text files -> the JSONL that `tokenclean evaluate --data_dir` reads.

    python scripts/convert_logiqa.py Test.txt DIR/logiqa/test.jsonl

The published files (github.com/lgw863/LogiQA-dataset) hold eight lines per question: an empty one,
the right letter, the context, the question, four options that begin with their letter. Texts are
spaced as the evaluation harness's own loader does it: a blank after every full stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

LETTERS = "abcd"


def questions(file: Path) -> Iterator[dict[str, object]]:
    """One row per question: context, question, options, label.

    Raises:
        ValueError: naming the line that is not what it should be.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    # editors drop the first empty line or add one at the end
    lines = ["", *lines] if lines and lines[0] else lines
    while lines and not lines[-1]:
        lines.pop()
    for start in range(0, len(lines), 8):
        block, place = lines[start : start + 8], f"{file}: question {start // 8 + 1}"
        if len(block) < 8 or block[0]:
            raise ValueError(f"{place}: eight lines are needed, the first of them empty")
        _, label, context, question, *options = block
        if label not in LETTERS or len(label) != 1:
            raise ValueError(f"{place}: {label!r} is not one of the letters a to d")
        for letter, option in zip(LETTERS, options, strict=True):
            if not option.lower().startswith(f"{letter}."):
                raise ValueError(f"{place}: option {option[:40]!r} does not begin with {letter}.")
        yield {
            "label": label,
            "context": _spaced(context),
            "question": _spaced(question),
            "options": [_spaced(option[2:]) for option in options],
        }


def _spaced(text: str) -> str:
    return text.replace(".", ". ").strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("jsonl", type=Path)
    args = parser.parse_args(argv)
    if not args.text.is_file():
        raise SystemExit(f"error: {args.text} does not exist")
    try:
        rows = list(questions(args.text))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    args.jsonl.parent.mkdir(parents=True, exist_ok=True)
    with args.jsonl.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} questions written to {args.jsonl}")


if __name__ == "__main__":
    main()
