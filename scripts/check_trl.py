"""Does TRL train on exactly the tokens that were kept? Asked of several versions of it.

    python scripts/check_trl.py                                    # 0.24.0, 1.6.0, 1.9.0, newest
    python scripts/check_trl.py --versions 1.9.0 --work DIR   # one, in a folder of yours

A small cleaned pool is exported with `tokenclean export --to trl`; each version gets an environment
of its own (about 1.5 GB and two minutes each; made once), in which `scripts/trl_probe.py` trains on
the JSONL and the Parquet under every setting and reads off the gradient which tokens carry loss.
Prints a table per version and ends with 1 if a recommended setting trains on other tokens than
ours. The other settings are there to see what goes wrong.

TOKENCLEAN_TORCH_INDEX is the index to take torch from, as for the other scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.trl_probe import NO_LOSS, Row
from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer, vocabulary_hash

ROOT: Final = Path(__file__).resolve().parent.parent
VERSIONS: Final = ("0.24.0", "1.6.0", "1.9.0", "newest")
#: What a version needs beside itself, where pip would choose something too new. With 0.24 goes a
#: `datasets` of its time: it reads no file that carries the metadata of a later one.
BESIDE: Final = {"0.24.0": ("transformers>=4.56,<4.58", "datasets==3.6.0")}
EOS: Final = 1
ROWS: Final = "rows.json"
COLUMNS: Final = {
    "setting": "setting",
    "ours": "ours",
    "in the loss": "trained",
    "missing": "missing",
    "extra": "extra",
    "context": "context",
}


def hand_rows() -> list[Row]:
    """Rows of many lengths, two beyond TRL's default of 1024 tokens; every token but EOS is unique.

    Kept are: about half, the end alone, nothing, everything, all but EOS, the first token and
    another one, EOS alone.
    """
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    fresh = EOS + 1
    for length, keep in (
        (1100, "half"), (1050, "end"), (40, "half"), (7, "nothing"), (33, "everything"),
        (12, "not eos"), (5, "first"), (90, "half"), (2, "everything"), (9, "eos"),
    ):  # fmt: skip
        ids = [*range(fresh, fresh + length - 1), EOS]
        fresh += length - 1
        place = np.arange(length)
        kept = {
            "half": rng.random(length) < 0.5,
            "end": place >= length - 10,
            "nothing": place < 0,
            "everything": place >= 0,
            "not eos": (place > 3) & (place < length - 1),
            "first": (place == 0) | (place == 3),
            "eos": place == length - 1,
        }[keep]
        rows.append(Row(ids, [i if k else NO_LOSS for i, k in zip(ids, kept, strict=True)]))
    return rows


def write_pool(folder: Path, rows: Sequence[Row]) -> None:
    """A cleaned pool of some rows, and in ``tokenizer/`` beside it a tokenizer for it."""
    entries = 1 + max(max(row.input_ids) for row in rows)
    words = {"<unk>": 0, "</s>": EOS, **{f"t{i}": i for i in range(EOS + 1, entries)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    labels = [np.array(row.labels) for row in rows]
    columns: dict[str, list[Any]] = {
        "id": [f"row-{i}" for i in range(len(rows))],
        "source": ["made"] * len(rows),
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "response_mask": [[True] * len(row.labels) for row in rows],
        **{
            name: [[0.5] * len(row.labels) for row in rows]
            for name in ("base_nll", "reference_nll", "score", "priority")
        },
        "reason": [np.where(one == NO_LOSS, 2, 0).tolist() for one in labels],
        "weight": [[1.0] * len(row.labels) for row in rows],
        "round": [1] * len(rows),
    }
    schema = cleaned_schema(with_truth=False)
    tokens = sum(map(len, labels))
    manifest = {
        "pool": "made by hand",
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "vocabulary": vocabulary_hash(tokenizer),
        "template": "raw",
        "max_length": max(map(len, labels)),
        "eos_id": EOS,
        "selection": {"rule": "token_cleaning", "scope": "global", "keep": 0.5},
        "reasons": {"0": "kept", "1": "prompt", "2": "below the cut"},
        "response_tokens": tokens,
        "ranked_tokens": tokens,
        "kept_tokens": sum(int((one != NO_LOSS).sum()) for one in labels),
    }
    write_cleaned_pool(folder, [pa.record_batch(columns, schema=schema)], schema, manifest)


def newest() -> str:
    """The number of the newest version of TRL that is published.

    Raises:
        RuntimeError: if pip cannot tell.
    """
    ask = [sys.executable, "-m", "pip", "index", "versions", "trl"]
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    found = re.match(r"trl \(([\w.]+)\)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(
            f"pip cannot tell the newest trl; name one with --versions: {done.stderr}"
        )
    return found[1]


def environment(version: str, work: Path) -> Path:
    """The Python of an environment with one version of TRL and our torch; made if need be."""
    place = work / f"trl-{version}"
    python, complete = place / "bin" / "python", place / "complete"
    if not complete.is_file():
        torch = next(
            line
            for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            if line.startswith("torch==")
        )
        print(f"installing TRL {version} into {place}", flush=True)
        venv.create(place, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        index = os.environ.get("TOKENCLEAN_TORCH_INDEX")
        subprocess.run([*install, *(["--index-url", index] if index else []), torch], check=True)
        # named again, so that no other torch takes its place
        subprocess.run([*install, torch, f"trl=={version}", *BESIDE.get(version, ())], check=True)
        complete.touch()
    return python


def versions_in(python: Path) -> str:
    """What an environment holds, in words."""
    show = (
        "from importlib.metadata import version; "
        "print(', '.join(f'{n} {version(n)}' for n in ('trl', 'transformers', 'datasets')))"
    )
    done = subprocess.run([str(python), "-c", show], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def table(found: Sequence[dict[str, Any]]) -> str:
    """Findings as Markdown, those that are the same for several files in one line."""
    lines = [
        f"| {' | '.join(COLUMNS)} | equal | files |",
        "|---|" + "---:|" * (len(COLUMNS) - 1) + "---|---|",
    ]
    alike: dict[str, list[str]] = {}
    for one in found:
        if one["error"]:
            values = [one["setting"], one["ours"], *["-"] * (len(COLUMNS) - 2)]
            verdict = f"refused: {one['error'][:90]}"
        else:
            values = [one[key] for key in COLUMNS.values()]
            values[-1] = "own" if one["context"] < 1e-3 else "others' too"
            verdict = "yes" if one["equal"] else "NO"
        if one["recommended"]:
            verdict = f"**{verdict}** (recommended)"
        line = f"| {' | '.join(str(v) for v in values)} | {verdict} |"
        alike.setdefault(line, []).append(one["data"])
    files = len({one["data"] for one in found})
    for line, names in sorted(alike.items(), key=lambda pair: _place(found, pair[0])):
        lines.append(f"{line} {'all' if len(names) == files else ', '.join(names)} |")
    return "\n".join(lines)


def _place(found: Sequence[dict[str, Any]], line: str) -> int:
    """Where a line's setting comes first."""
    return next(i for i, one in enumerate(found) if line.startswith(f"| {one['setting']} |"))


def main(argv: list[str] | None = None) -> int:
    """Check the versions; 0 if every recommended setting trains on our tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="of TRL, or newest")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "trl", help="folder of environments"
    )
    options = parser.parse_args(argv)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    wrong = []
    numbers = dict.fromkeys(newest() if v == "newest" else v for v in options.versions)
    with TemporaryDirectory() as folder:
        data = exports(Path(folder))
        for version in numbers:
            python = environment(version, work)
            print(f"\n## {versions_in(python)}\n", flush=True)
            found = probed(python, Path(folder), data)
            print(table(found), flush=True)
            wrong += [
                f"{version}: {one['data']}: {one['setting']}"
                for one in found
                if one["recommended"] and not one["equal"]
            ]
    print("\nours: tokens that carry loss in the cleaned pool, but for first tokens of rows.")
    print(f"Recommended settings that train on others: {len(wrong)}")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


def exports(folder: Path) -> list[Path]:
    """Write a pool, its rows and its exports into a folder; returns the exports' files."""
    from tokenclean.export.verb import export

    rows = hand_rows()
    (folder / ROWS).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    write_pool(folder / "cleaned", rows)
    # an export leaves out rows with nothing kept; TRL must get along with them, too
    for name, more in (("export", []), ("all_rows", ["--keep_empty"])):
        place = ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / name)]
        export([str(folder / "cleaned"), "--to", "trl", *place, *more])
    files = ("export/train.jsonl", "export/train.parquet", "all_rows/train.jsonl")
    return [folder / file for file in files]


def probed(python: Path, folder: Path, data: Sequence[Path]) -> list[dict[str, Any]]:
    """Run the probe in an environment.

    Raises:
        RuntimeError: with the end of what it printed, if it failed.
    """
    out = folder / "found.json"
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    probe = [str(python), str(ROOT / "scripts" / "trl_probe.py"), "--rows", str(folder / ROWS)]
    done = subprocess.run(
        [*probe, "--out", str(out), "--data", *map(str, data)],
        env={**os.environ, **quiet},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the probe failed under {python}:\n{done.stdout[-4000:]}")
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
