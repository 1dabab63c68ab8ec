"""Do questions of the evaluation sets occur in a pool?

    python scripts/contamination.py --pool outputs/planted/pool.jsonl \
        --tests outputs/planted/test.jsonl
    python scripts/contamination.py --pool jlpang888/DS2_50k --tests my_benchmarks/

A question counts if the pool holds 13 of its words in a row, or all of them where it has fewer.
One line per test file; `--list` prints every find. Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenclean.data.contamination import WORDS, contamination
from tokenclean.data.formats import BadLine, Reader, TokenSample

#: Where benchmarks keep the text that a model is asked about, the question itself first.
COLUMNS = ("question", "query", "ctx", "sentence", "prompt", "input", "text")


def pool_texts(reader: Reader) -> Iterator[str]:
    """Every turn of the pool.

    Raises:
        ValueError: for a sample that is no conversation.
    """
    for sample in reader:
        if isinstance(sample, TokenSample):
            raise ValueError(f"--pool: sample {sample.id!r} comes as tokens; give the texts")
        if not isinstance(sample, BadLine):
            yield from (message.content for message in sample.messages)


def test_texts(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Line number and question of every row.

    Raises:
        ValueError: for a row that is no JSON object or has none of the columns.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON ({error})") from None
            yield str(number), _question(row, columns, f"{file}:{number}")


def _question(row: Any, columns: tuple[str, ...], place: str) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            turns = [m.get("content") for m in row["messages"] if m.get("role") == "user"]
            if turns:
                return str(turns[-1])
        for column in columns:
            if isinstance(row.get(column), str):
                return str(row[column])
    raise ValueError(f"{place}: none of the columns {', '.join(columns)}; name it with --column")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pool", nargs="+", required=True, help="files, folders or hub names")
    parser.add_argument("--tests", nargs="+", required=True, type=Path, help="JSONL files, folders")
    parser.add_argument("--column", help="column of the tests that holds the question")
    parser.add_argument("--words", type=int, default=WORDS, help="length of a run of words")
    parser.add_argument("--whole", action="store_true", help="only questions that are a whole turn")
    parser.add_argument("--list", action="store_true", help="print every find")
    args = parser.parse_args(argv)
    files = [
        f
        for path in args.tests
        for f in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
    columns = (args.column,) if args.column else COLUMNS
    try:
        if missing := [str(f) for f in files if not f.is_file()]:
            raise ValueError(f"--tests: {', '.join(missing)} does not exist")
        reader = Reader(args.pool)
        reader.check()
        tests = [(f"{f}:{n}", text) for f in files for n, text in test_texts(f, columns)]
        result = contamination(pool_texts(reader), tests, None if args.whole else args.words)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print("| tests | questions | found in the pool |\n|---|---:|---:|")
    for file in files:
        total = sum(name.rpartition(":")[0] == str(file) for name, _ in tests)
        found = sum(name.rpartition(":")[0] == str(file) for name in result.found)
        print(f"| {file} | {total} | {found} |")
    print(
        f"\n{len(result.found)} of {result.texts} questions ({result.share:.2%}) are in the pool; "
    )
    print(f"{result.too_short} more are too short to say.")
    if args.list:
        print("\n".join(f"{name}: {words}" for name, words in result.found.items()))
    if result.found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
