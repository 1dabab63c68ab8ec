"""The section on totals: samples and tokens, kept and dropped, per source, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenclean.arrow import MANIFEST
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.content import Section, Table
from tokenclean.report.counted import ALL, Counted
from tokenclean.report.ratio import COLUMNS, INTERVAL
from tokenclean.selection.xtf import NOVELTY, REASONING, REASONS, RELEVANCE

_NOT_KNOWN: Final = "not known"
_XTF: Final = {"reasoning": REASONING, "novelty": NOVELTY, "relevance": RELEVANCE}


def totals_section(counted: Counted) -> Section:
    """Samples and tokens, kept and dropped, per source, and why."""
    tally, write = counted.tally, counted.writer
    statistics, rejected = pool_statistics(counted.run, counted.arm)
    rows = []
    for source in [ALL, *sorted(tally.counts)]:
        counts = tally.total if source == ALL else tally.counts[source]
        share = tally.whole if source == ALL else tally.share_of(source)
        rows.append(
            [
                source,
                counts.samples,
                *share.cells(),
                counts.emptied,
                counts.ends,
                counts.ends_kept / counts.ends if counts.ends else None,
                counts.unlearnt,
                counts.weight / share.kept if share.kept else None,
                *_of_pool(statistics, source),
            ]
        )
    samples, tokens = tally.uncleaned
    text = []
    if samples:
        text.append(
            f"{samples:,} samples with {tokens:,} response tokens are those of D_0, which trained "
            "the warm-up model and are not cleaned: they are in no number below."
        )
    if tally.seen:
        text.append(
            f"{tally.seen:,} response tokens are of rows that the reference was trained on and "
            "that exclude_seen leaves out: they were not ranked and are in no kept share."
        )
    text.append(
        "Rejected lines of the data: "
        + (_NOT_KNOWN if rejected is None else f"{sum(rejected.values()):,}")
        + ("" if not rejected else f" ({', '.join(f'{k}: {v}' for k, v in rejected.items())})")
        + "."
    )
    notes = [
        INTERVAL,
        "Kept means a loss weight above 0; tokens to be unlearnt have a negative one. The end is "
        "the token that ends a response. Truncated: cut at the longest length allowed; without "
        "response: samples that were left out because no response token was there, or was left. "
        "These two are of the pool that was tokenised, D_0 included.",
    ]
    if not statistics:
        notes.append(
            "The tokenised pool is not to be found any more, so truncated samples and samples "
            "without a response are not known."
        )
    header = [
        "source", "samples", *COLUMNS, "samples left with nothing", "ends", "kept share of ends",
        "tokens to be unlearnt", "mean weight of kept", "truncated", "without response",
    ]  # fmt: skip
    tables = [write.table("sources", "Kept tokens by source", header, rows, notes)]
    tables += _reasons(counted)
    return Section("totals", "What was kept", text, tables)


def _of_pool(statistics: dict[str, Any], source: str) -> list[Any]:
    names = ("truncated", "without_response")
    if source == ALL and statistics:
        return [sum(int(s.get(n) or 0) for s in statistics.values()) for n in names]
    return [(statistics.get(source) or {}).get(name) for name in names]


def pool_statistics(
    run: FinishedRun, arm: CleanedArm
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Statistics per source of the token pool that an arm cleaned, and its rejected lines.

    Empty and None if that pool is not to be found.
    """
    fingerprint = str(arm.manifest.get("pool"))
    places: list[Path] = []
    if cache := (run.config.get("data") or {}).get("cache_dir"):
        places += sorted(Path(cache, "pools").glob(f"{fingerprint}-*/train"))
    tables = sorted((run.folder / "scores").glob("*"))
    given = [Path(p) for key in ("base", "reference") if (p := run.config.get(key))]
    for table in [*tables, *given, *(p / "scores" for p in given)]:
        if pool := _read(table / MANIFEST).get("pool_folder"):
            places.append(Path(pool))
    for place in places:
        manifest = _read(place / MANIFEST)
        if manifest.get("fingerprint") == fingerprint:
            return manifest.get("statistics") or {}, manifest.get("rejected")
    return {}, None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _reasons(counted: Counted) -> list[Table]:
    """Tokens by source and reason; for XTF also by attribute, alone or with others."""
    tally, write = counted.tally, counted.writer
    sources = sorted(tally.reasons)
    if not sources:
        return []
    total = sum(tally.reasons.values())
    assert isinstance(total, np.ndarray)
    codes = np.flatnonzero(total).tolist()
    named = counted.arm.manifest.get("reasons") or {}
    names = [named.get(str(code), f"reason {code}") for code in codes]
    rows = [
        [source, *(int(v) for v in (total if source == ALL else tally.reasons[source])[codes])]
        for source in [ALL, *sources]
    ]
    tables = [
        write.table(
            "reasons", "Response tokens by source and reason", ["source", *names], rows,
            ["Rows of D_0 are left out. Reasons exclude each other."],
        )
    ]  # fmt: skip
    if any(code in REASONS for code in codes):
        rows = []
        for source in [ALL, *sources]:
            counts = total if source == ALL else tally.reasons[source]
            cells = []
            for bit in _XTF.values():
                failed = [code for code in REASONS if (code - min(REASONS) + 1) & bit]
                alone = min(REASONS) - 1 + bit
                cells += [int(counts[failed].sum()), int(counts[alone])]
            rows.append([source, int(counts.sum()), *cells])
        header = [h for name in _XTF for h in (f"fail {name}", f"fail {name} alone")]
        tables.append(
            write.table(
                "attributes", "Response tokens that fail each of XTF's attributes",
                ["source", "tokens", *header], rows,
                ["A token that fails several attributes counts for each of them."],
            )
        )  # fmt: skip
    return tables
