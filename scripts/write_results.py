"""RESULTS.md from the studies' folders: commands, sizes, times, versions and every table.

    python scripts/write_results.py            # outputs/*/study.json -> RESULTS.md
    python scripts/write_results.py --quick    # outputs/*_quick -> outputs/RESULTS_quick.md

It reads what `tokenclean study` left, computes nothing, and leaves out of the studies with many
settings what their masks do family by family (it is in outputs/<study>/tables).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenclean.costs import quantity, seconds_text

#: in the order of the paper's tables; others follow by name
ORDER = ("main", "rounds", "scores", "examples", "theory", "ours", "rules", "noise", "keep")
PACKAGES = ("torch", "lightning", "transformers", "peft")


def sections(text: str, many: bool) -> str:
    """A study's tables, one heading level down, figures named instead of shown."""
    text = re.sub(r"!\[[^]]*\]\(([^)]*)\)", r"Figure: `\1`", text)
    parts = re.split(r"(?m)^(?=#)", text)
    if many:
        parts = [_only_all(p) if p.lstrip("# ").startswith("Masks") else p for p in parts]
    return re.sub(r"(?m)^#+ ", "#### ", "".join(parts)).strip()


def _only_all(part: str) -> str:
    lines = part.splitlines(keepends=True)
    head = [i for i, line in enumerate(lines) if line.startswith("|")][:2]
    return "".join(
        line
        for i, line in enumerate(lines)
        if not line.startswith("|") or i in head or "| all |" in line
    )


def study_text(folder: Path) -> str:
    """One study: what was run, at which size, what it took, and its tables."""
    stored = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text("utf-8")) if summary_file.is_file() else {}
    cells = stored["cells"]
    done = [c for c in cells if (folder / c["folder"] / "summary.json").is_file()]
    variants = list(dict.fromkeys(c["variant"] for c in cells))
    seeds = sorted({c["seed"] for c in done})
    name = folder.name.removesuffix("_quick")
    lines = [f"## {name}", ""]
    quick = " --quick" if folder.name.endswith("_quick") else ""
    if stored.get("of"):
        lines.append(f"Read from the runs of `{stored['of']}`.")
    lines.append(f"`tokenclean study -c configs/study/{name}.yaml{quick}`")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    size = re.search(r"^  planted:\n    samples: (\d+)", config, re.MULTILINE)
    facts = [f"{len(done)} of {len(cells)} runs", f"seeds {', '.join(map(str, seeds))}"]
    if size and not quick:
        facts.append(f"{size[1]} planted samples unless said otherwise")
    if len(variants) > 1:
        facts.append(f"settings {', '.join(variants)}")
    if "run_seconds" in summary:
        seconds = seconds_text(summary["run_seconds"])
        facts.append(f"{quantity(summary['tokens'])} tokens computed in {seconds}")
    lines += ["", f"{'; '.join(facts)}.", ""]
    for cell in cells:
        if cell.get("failed"):
            lines.append(f"* {cell['variant']}, seed {cell['seed']} failed: {cell['failed']}")
    tables = folder / "results.md"
    text = tables.read_text(encoding="utf-8") if tables.is_file() else "No table yet."
    for benchmarks in sorted(folder.glob("evaluation/*/results.md")):
        text += f"\n\n# Benchmarks, {benchmarks.parent.name}\n\n{benchmarks.read_text('utf-8')}"
    return "\n".join(lines) + "\n" + sections(text, len(variants) > 1) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--to", type=Path, help="default: RESULTS.md or outputs/RESULTS_quick.md")
    args = parser.parse_args(argv)
    folders = [f.parent for f in args.outputs.glob("*/study.json")]
    folders = [f for f in folders if not f.is_symlink() and f.name.endswith("_quick") == args.quick]
    if not folders:
        raise SystemExit(f"error: {args.outputs} holds no study; run scripts/reproduce.sh")

    def place(folder: Path) -> tuple[int, str]:
        name = folder.name.removesuffix("_quick")
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)

    versions: dict[str, Any] = {name: metadata.version(name) for name in PACKAGES}
    header = [
        "# Results",
        "",
        "Written by `scripts/write_results.py` from what `bash scripts/reproduce.sh"
        f"{' --quick' if args.quick else ''}` left, {datetime.date.today()}; tokenclean "
        f"{metadata.version('tokenclean')}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". What the tables say is summed up in the README; a study that is "
        "missing here was not run.",
        "",
    ]
    text = "\n".join(header) + "\n" + "\n".join(map(study_text, sorted(folders, key=place)))
    out = args.to or (args.outputs / "RESULTS_quick.md" if args.quick else Path("RESULTS.md"))
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(folders)} studies")


if __name__ == "__main__":
    main()
