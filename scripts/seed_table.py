"""Mean and standard deviation over seeds of the arms of several runs.

    python scripts/seed_table.py outputs/seed0 outputs/seed1 outputs/seed2

Families of the planted pool are averaged by regime, which was fixed by the base's accuracy alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tokenclean.data.planted import REGIMES


def by_regime(accuracy: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy of the families of each regime, and over all questions."""
    shares = {k: v["correct"] / v["questions"] for k, v in accuracy.items()}
    groups: dict[str, list[float]] = {}
    for family, regime in REGIMES.items():
        if family in shares:
            groups.setdefault(regime, []).append(shares[family])
    return {k: statistics.fmean(v) for k, v in groups.items()} | {"all": shares["all"]}


def measures(result: dict[str, Any]) -> dict[str, float | None]:
    """The columns of one arm in one run."""
    accuracy = {f"accuracy, {k}": 100 * v for k, v in by_regime(result["accuracy"]).items()}
    mask = result["mask"].get("all", {})
    names = ("auroc", "auroc_corrupted", "precision", "recall", "corrupted_kept")
    return {**accuracy, **{name.replace("_", " "): mask.get(name) for name in names}}


def spread(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    digits = 1 if max(map(abs, known)) > 1.5 else 3
    sd = statistics.stdev(known) if len(known) > 1 else float("nan")
    return f"{statistics.fmean(known):.{digits}f} ± {sd:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of `tokenclean clean`")
    runs = [json.loads((run / "results.json").read_text()) for run in parser.parse_args().runs]
    arms: dict[str, list[dict[str, float | None]]] = {}
    for results in runs:
        for result in results:
            arms.setdefault(result["name"], []).append(measures(result))
    columns = list(next(iter(arms.values()))[0])
    print("| arm | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for arm, rows in arms.items():
        cells = [spread([row[column] for row in rows]) for column in columns]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print(f"\nmean ± standard deviation over {len(runs)} run(s)")


if __name__ == "__main__":
    main()
