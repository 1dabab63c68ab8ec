"""tokenclean against the published way, in one process, interleaved.

    python scripts/bench.py                              # everything, half an hour on one CPU core
    python scripts/bench.py --parts selection tables     # a few minutes
    python scripts/bench.py --device cuda --shape llama-3.2-3b --parts scoring training memory

Prints a table of ratios (median and range over the repeats) with how far the two sides' numbers
agree, and writes all of it, with times in seconds, as JSON. Downloads nothing.

`bench_workload.py` says what is run on, `bench_published.py` is the published way written again,
`bench_peer.py` is TRL, the peer in training. `bench_models.py`, `bench_attributes.py`,
`bench_weights.py`, `bench_tables.py`, `bench_run.py` hold the parts, `bench_measure.py` takes times
and memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.bench_attributes import attributes
from scripts.bench_measure import Line, machine, markdown, say, spread
from scripts.bench_models import memory, scoring, training
from scripts.bench_run import run
from scripts.bench_tables import scaling, selection, tables
from scripts.bench_weights import weighting
from scripts.bench_workload import ROOT, SHAPES, Options

PARTS: dict[str, Callable[[Options], Iterator[Line]]] = {
    "scoring": scoring,
    "attributes": attributes,
    "training": training,
    "weighting": weighting,
    "selection": selection,
    "tables": tables,
    "scaling": scaling,
    "run": run,
    "memory": memory,
}


def parse(argv: Sequence[str] | None) -> Options:
    text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=text[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocabulary", nargs="+", type=int, help="default: 6400 32000")
    parser.add_argument("--repeats", type=int, help="default: 5; half as often in training and run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: small; llama-3.2-1b on a GPU")
    parser.add_argument(
        "--samples", type=int, help="samples scored per repeat; default: 48, on a GPU 480"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: outputs/bench/<device>.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    on_gpu, quick = given.device == "cuda", given.quick
    return Options(
        parts=given.parts,
        vocabulary=given.vocabulary or ([512] if quick else [6400, 32_000]),
        repeats=given.repeats or (1 if quick else 5),
        device=given.device,
        shape=given.shape or ("tiny" if quick else "llama-3.2-1b" if on_gpu else "small"),
        samples=given.samples or (12 if quick else 480 if on_gpu else 48),
        batch=12 if quick else 48,
        tokens=[2_000, 8_000] if quick else [1_000_000, 4_000_000, 10_000_000],
        table_rows=64 if quick else 12_800,
        pool_rows=(16, 32) if quick else (1_100, 4_000),
        run_samples=40 if quick else 1_200,
        threads=given.threads,
        seed=given.seed,
        out=given.out or ROOT / "outputs" / "bench" / f"{given.device}.json",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print the table, write the JSON."""
    options = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    lines = []
    for part in options.parts:
        lines += list(PARTS[part](options))
    print(markdown(lines))
    report = {
        "command": ["scripts/bench.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(options.device),
        "options": {**asdict(options), "out": str(options.out)},
        "lines": [asdict(x) | {"spread": spread(x.values) if x.values else None} for x in lines],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"written to {options.out}")


def quieten() -> None:
    """Both sides say a great deal about what they do, and transformers about what is deprecated."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    quieten()
    main()
