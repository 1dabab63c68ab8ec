"""Generated cases against everything that reads what others wrote: nothing may change silently.

    python scripts/fuzz.py                       # 100,000 cases, about a quarter of an hour
    python scripts/fuzz.py --cases 5000 --only formats --seed 7

Each stream makes cases with hypothesis and compares the outcome with what went in, or with a slow
oracle. Prints, per stream, how many cases there were, how many rows or files were accepted and
rejected, and the time; a failing case is shrunk and printed, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as with_cases

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts import fuzz_exports, fuzz_formats, fuzz_selection, fuzz_tables, fuzz_templates
from scripts.fuzz_cases import Stream

STREAMS: dict[str, Stream] = {
    **fuzz_formats.STREAMS,
    **fuzz_templates.STREAMS,
    **fuzz_selection.STREAMS,
    **fuzz_tables.STREAMS,
    **fuzz_exports.STREAMS,
}


def run(stream: Stream, cases: int, seed: int) -> Counter[str]:
    """Check so many cases of a stream; the same seed makes the same cases.

    Returns:
        ``cases``, ``accepted`` and ``rejected``.

    Raises:
        Exception: of the smallest case that fails, if one does; its notes hold the case.
    """
    tally: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @with_cases(stream.strategy)
    def check(case: Any) -> None:
        tally["cases"] += 1
        stream.check(case, tally)

    check()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, help="of all streams together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(STREAMS), help="one stream, with all cases")
    args = parser.parse_args()
    logging.getLogger("tokenclean").setLevel(logging.ERROR)  # quarantine is nothing to tell of
    chosen = {args.only: STREAMS[args.only]} if args.only else STREAMS
    shares = sum(stream.share for stream in chosen.values())
    failures = 0
    print("| stream | cases | accepted | rejected | failures | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, stream in chosen.items():
        start, failed, tally = time.perf_counter(), False, Counter[str]()
        try:
            tally = run(stream, -(-args.cases * stream.share // shares), args.seed)
        except Exception:
            failed = True
            traceback.print_exc()
        failures += failed
        counts = " | ".join(f"{tally[key]:,}" for key in ("cases", "accepted", "rejected"))
        print(
            f"| {name} | {counts} | {int(failed)} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
