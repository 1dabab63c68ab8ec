"""The section on totals: samples and tokens, kept and dropped, per source, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.publish import MANIFEST
from tokenclean.report.content import Section, Table
from tokenclean.report.counted import ALL, Counted
from tokenclean.report.ratio import COLUMNS, INTERVAL
from tokenclean.report.steps import reason_names
from tokenclean.report.writing import without
from tokenclean.selection.rule import KEPT
from tokenclean.selection.xtf import NOVELTY, REASONING, REASONS, RELEVANCE

_UNLEARNT: Final = "tokens to be unlearnt"
_WEIGHT: Final = "mean weight of kept"
_POOL: Final = ("truncated", "without response")
_XTF: Final = {"reasoning": REASONING, "novelty": NOVELTY, "relevance": RELEVANCE}


def totals_section(counted: Counted) -> Section:
    """Samples and tokens, kept and dropped, per source, and why."""
    tally, write = counted.tally, counted.writer
    read = read_pool(counted.run, counted.arm)
    statistics = {} if read is None else read.statistics
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
    text.append(_lines_read(read))
    notes = [
        "Kept means a loss weight above 0; tokens to be unlearnt have a negative one. The end is "
        "the token that ends a response."
    ]
    if not statistics:
        notes.append(
            "The tokenised pool is not to be found any more, so truncated samples and samples "
            "without a response are not known."
        )
    header = [
        "source", "samples", *COLUMNS, "samples left with nothing", "ends", "kept share of ends",
        _UNLEARNT, _WEIGHT, *_POOL,
    ]  # fmt: skip
    shown = without(header, rows, [_UNLEARNT, *_POOL, "low", "high"], 0)
    shown = without(*shown, [_WEIGHT], 1.0)
    if "low" in shown[0]:
        notes.append(INTERVAL)
    if set(_POOL) & set(shown[0]):
        notes.append(
            "Truncated: cut at the longest length allowed; without response: samples that were "
            "left out because no response token was there, or was left. Both are of the pool that "
            f"was tokenised{', D_0 included' if samples else ''}."
        )
    if left := [name for name in header if name not in shown[0]]:
        notes.append(f"In the file alone, since they say nothing here: {', '.join(left)}.")
    tables = [write.table("sources", "Kept tokens by source", *shown, notes, (header, rows))]
    tables += _reasons(counted)
    return Section("totals", "What was kept", text, tables)


def _lines_read(read: ReadPool | None) -> str:
    """What became of every line of the data."""
    if read is None:
        return "Rejected lines of the data: not known."
    rejected = sum(read.rejected.values())
    parts = [
        f"{read.samples:,} samples of the pool",
        f"{read.without_response:,} that were left out for want of a response",
        f"{rejected:,} rejected"
        + (f" ({', '.join(f'{k}: {v:,}' for k, v in read.rejected.items())})" if rejected else ""),
    ]
    known = [read.samples, read.without_response, rejected]
    if read.held_out is not None:
        parts.append(f"{read.held_out:,} held out for validation")
        known.append(read.held_out)
    return f"Lines read: {sum(known):,} = {' + '.join(parts)}."


def _of_pool(statistics: dict[str, Any], source: str) -> list[Any]:
    names = ("truncated", "without_response")
    if source == ALL and statistics:
        return [_total(statistics, name) for name in names]
    return [(statistics.get(source) or {}).get(name) for name in names]


@dataclass(frozen=True)
class ReadPool:
    """What is known of the token pool that an arm cleaned.

    Attributes:
        statistics: source -> counts, see `tokenclean.data.pool.Statistics`.
        rejected: file -> bad lines.
        held_out: samples held out for validation, those without response among them; None if none
            were to be.
    """

    statistics: dict[str, Any]
    rejected: dict[str, int]
    held_out: int | None = None

    @property
    def samples(self) -> int:
        return _total(self.statistics, "samples")

    @property
    def without_response(self) -> int:
        return _total(self.statistics, "without_response")


def read_pool(run: FinishedRun, arm: CleanedArm) -> ReadPool | None:
    """The token pool that an arm cleaned; None if it is not to be found."""
    fingerprint = str(arm.manifest.get("pool"))
    places: list[Path] = []
    if cache := (run.config.get("data") or {}).get("cache_dir"):
        # a pool with a part held out names it in its fingerprint
        places += sorted(
            Path(run.place(cache), "pools").glob(f"{fingerprint.split('-train-')[0]}-*/train")
        )
    tables = sorted((run.root / "scores").glob("*"))
    given = [Path(run.place(p)) for key in ("base", "reference") if (p := run.config.get(key))]
    for table in [*tables, *given, *(p / "scores" for p in given)]:
        if pool := _read(table / MANIFEST).get("pool_folder"):
            places.append(Path(run.place(pool)))
    for place in places:
        manifest = _read(place / MANIFEST)
        if manifest.get("fingerprint") == fingerprint:
            held = _read(place.parent / "validation" / MANIFEST).get("statistics")
            names = ("samples", "without_response")
            return ReadPool(
                manifest.get("statistics") or {},
                manifest.get("rejected") or {},
                None if held is None else sum(_total(held, name) for name in names),
            )
    return None


def _total(statistics: dict[str, Any], name: str) -> int:
    return sum(int(of_source.get(name) or 0) for of_source in statistics.values())


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
    if codes == [KEPT]:
        return []  # the table before says it
    named = reason_names(counted.arm)
    names = [named.get(code, f"reason {code}") for code in codes]
    rows = [
        [source, *(int(v) for v in (total if source == ALL else tally.reasons[source])[codes])]
        for source in [ALL, *sources]
    ]
    tables = [
        write.table(
            "reasons", "Response tokens by source and reason", ["source", *names], rows,
            [f"{'Rows of D_0 are left out. ' if tally.uncleaned[0] else ''}Reasons exclude each "
             "other."],
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
