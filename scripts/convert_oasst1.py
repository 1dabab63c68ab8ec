"""Turn an OASST1 release into JSONL of Tulu conversations.

    python scripts/convert_oasst1.py 2023-04-12_oasst_ready.trees.jsonl oasst1.jsonl --language en

The paper's other four sources need no conversion: their columns are understood as they are
(configs/data/).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenclean.data.oasst import conversations, read_trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("release", type=Path, help="trees or messages, JSONL or Parquet")
    parser.add_argument("output", type=Path, help="JSONL to write")
    parser.add_argument("--language", help="only trees whose first prompt is in it, e.g. en")
    parser.add_argument("--best-only", action="store_true", help="one conversation per tree")
    args = parser.parse_args()
    if not args.release.is_file():
        raise SystemExit(f"{args.release} does not exist")
    count = 0
    try:
        with args.output.open("w", encoding="utf-8") as file:
            for row in conversations(read_trees(args.release), args.language, args.best_only):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except ValueError as error:
        args.output.unlink()
        raise SystemExit(f"error: {error}") from None
    print(f"{count} conversations written to {args.output}")


if __name__ == "__main__":
    main()
