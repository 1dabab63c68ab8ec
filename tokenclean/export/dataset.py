"""A cleaned pool in one of the layouts, with its card and a note for whoever reads it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenclean import __version__
from tokenclean.data.exports import CARD, VERSION
from tokenclean.export import loading
from tokenclean.export.card import Loading, base_name, data_card, named
from tokenclean.export.content import Choices, Tally, labelled, tally, watched
from tokenclean.export.formats import (
    smallest_dtype,
    write_axolotl,
    write_jsonl,
    write_llamafactory,
    write_olmo,
    write_trl,
)
from tokenclean.export.spans import SpanWriter
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.publish import write_json
from tokenclean.selection.rule import REASONS

#: Layouts of labels alone, and those that hold everything.
LABELS = ("trl", "axolotl", "llamafactory", "olmo")
EVERYTHING = ("jsonl", "spans")


def count(run: FinishedRun, arm: CleanedArm, choices: Choices) -> Tally:
    """What an export of an arm would hold.

    Raises:
        ValueError: if the layout cannot hold what the pool says, nothing is kept, or a tokenizer is
            needed that the run does not name.
    """
    _tokenizer(run, choices)
    everything = choices.to in EVERYTHING or choices.keep_empty
    counted = tally(arm.cleaned, int(arm.manifest["eos_id"]), everything)
    _check_weights(choices, counted)
    if counted.rows == 0:
        raise ValueError(f"{arm.cleaned} keeps no token of any sample; there is nothing to export")
    if choices.to == "olmo":
        smallest_dtype(counted.largest_id + 1, choices.dtype)
    return counted


def write_dataset(
    folder: Path,
    run: FinishedRun,
    arm: CleanedArm,
    choices: Choices,
    counted: Tally,
    content: str,
) -> None:
    """Write an arm's cleaned pool into an empty folder.

    Args:
        folder: exists.
        run, arm: what to export.
        choices: the layout, and how.
        counted: see `count`.
        content: fingerprint of what goes in.
    """
    tokenizer = _tokenizer(run, choices)
    note = _note(choices, arm, counted, content)
    write = _write_labels if choices.to in LABELS else _write_everything
    page, more = write(folder, run, choices, counted, tokenizer, note, arm)
    notes = _notes(choices, counted) + more
    name = _tokenizer_name(run, choices)
    card = data_card(run, arm, counted, page, choices.license, name, notes)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / CARD, note)


def _write_labels(
    folder: Path,
    run: FinishedRun,
    choices: Choices,
    counted: Tally,
    tokenizer: Any,
    note: dict[str, Any],
    arm: CleanedArm,
) -> tuple[Loading, list[str]]:
    """A layout of ids and labels; ``note`` learns which files there are."""
    parts, longest = labelled(arm.cleaned, choices.keep_empty), counted.longest
    notes = []
    if choices.to == "trl":
        files = write_trl(folder, parts)
        page = loading.trl(longest, named(base_name(run), run.folder))
    elif choices.to == "axolotl":
        files, page = write_axolotl(folder, parts), loading.axolotl(longest)
    elif choices.to == "llamafactory":
        files = write_llamafactory(folder, parts, note["content"])
        page = loading.llamafactory(longest)
    else:
        known = len(tokenizer) if tokenizer is not None else 0
        dtype = smallest_dtype(max(known, counted.largest_id + 1), choices.dtype)
        files = write_olmo(folder, parts, dtype)
        page = loading.olmo(longest, dtype, int(note["eos_id"]), files)
        note["dtype"] = dtype
        notes = _bounds_notes(counted)
        if tokenizer is None:
            notes.append(
                f"The run does not name its tokenizer, so {dtype} follows the largest token id "
                f"there is, {counted.largest_id:,}."
            )
    note |= {"data": files.data, "others": files.others}
    return page, notes


def _write_everything(
    folder: Path,
    run: FinishedRun,
    choices: Choices,
    counted: Tally,
    tokenizer: Any,
    note: dict[str, Any],
    arm: CleanedArm,
) -> tuple[Loading, list[str]]:
    """A layout of all samples and all that is known of their tokens."""
    reasons = arm.manifest.get("reasons") or {}

    def reason(code: int) -> str:
        return str(reasons.get(str(code)) or REASONS.get(code) or code)

    blocks = watched(arm.cleaned, "writing")
    if choices.to == "jsonl":
        files = write_jsonl(folder, blocks, reason, counted.priority)
        page, notes = loading.jsonl(), []
    else:
        writer = SpanWriter(
            tokenizer, str(note["template"]), reason, counted.weighted, choices.per_token
        )
        files = writer.write(folder, blocks)
        name = _tokenizer_name(run, choices)
        known = named(name, run.folder, "tokenizer")
        page = loading.spans(writer.add_special_tokens, known)
        note |= {
            "add_special_tokens": writer.add_special_tokens,
            "eos": tokenizer.decode([note["eos_id"]]),
            "exact_rows": writer.exact,
        }
        notes = _span_notes(writer, counted)
    note |= {"data": files.data, "others": files.others}
    return page, notes


def _note(choices: Choices, arm: CleanedArm, counted: Tally, content: str) -> dict[str, Any]:
    """What `CARD` says of an export of data; its files follow."""
    manifest = arm.manifest
    return {
        "kind": "export",
        "format": choices.to,
        "version": VERSION,
        "tokenclean": __version__,
        "content": content,
        **{key: manifest.get(key) for key in ("tokenizer", "vocabulary", "template", "eos_id")},
        "max_length": manifest.get("max_length"),
        "longest": counted.longest,
        "pool": manifest.get("pool"),
        "arm": arm.name,
        "rule": (manifest.get("selection") or {}).get("rule"),
        "rows": counted.rows,
        "rows_left_out": counted.total.samples - counted.rows,
        "tokens": counted.tokens,
        "response_tokens": counted.response_tokens,
        "kept_tokens": counted.total.kept,
        "weights_dropped": counted.weighted and choices.to in LABELS,
        "data": [],
        "others": [],
        "dtype": None,
    }


def _check_weights(choices: Choices, counted: Tally) -> None:
    """Refuse to turn weights into plain labels unasked."""
    if choices.to not in LABELS or choices.drop_weights or not counted.weighted:
        return
    raise ValueError(
        f"--to {choices.to}: its labels have no weights, and this pool has tokens that are no "
        f"plain labels ({counted.fractional:,} of another positive weight than 1, "
        f"{counted.unlearnt:,} to be unlearnt, {counted.weightless:,} of weight 0); --to jsonl "
        "keeps them; or pass --drop_weights to let every token with a positive weight count as 1 "
        "and give the others no loss"
    )


def _notes(choices: Choices, counted: Tally) -> list[str]:
    """What a reader must know, whatever the format."""
    notes = []
    left_out = counted.total.samples - counted.rows
    if left_out:
        notes.append(
            f"{left_out:,} samples of which no token is kept are left out: they would teach "
            "nothing (`--keep_empty` keeps them)."
        )
    if counted.weighted and choices.to in LABELS:
        notes.append(
            f"**Weights are dropped.** {counted.fractional:,} tokens had a positive weight other "
            f"than 1 and count as 1 here; {counted.unlearnt:,} were to be unlearnt and "
            f"{counted.weightless:,} had the weight 0, and these carry no loss here. What the rule "
            "meant is in an export `--to jsonl`."
        )
    elif counted.weighted:
        note = (
            f"This pool is weighted: {counted.fractional:,} tokens have a positive weight other "
            f"than 1, {counted.unlearnt:,} a negative one, {counted.weightless:,} the weight 0."
        )
        if counted.unlearnt:
            note += " A trainer that goes by labels alone would learn what is to be unlearnt."
        notes.append(note)
    return notes


def _bounds_notes(counted: Tally) -> list[str]:
    """How OLMo-core finds documents, and where that goes wrong."""
    if not counted.eos_inside and not counted.eos_missing:
        return ["Every document ends with an EOS and has none before, as OLMo-core expects."]
    return [
        "**Document bounds.** Of arrays on a local disk, OLMo-core takes every EOS for the end of "
        f"a document. {counted.eos_inside:,} documents have an EOS before their end (several "
        f"turns) and would be cut there, and {counted.eos_missing:,} do not end with one (truncated"
        ", or ending with a user's turn) and would run into the next. The `csv.gz` files hold the "
        "true bounds; OLMo-core reads them where `iter_document_indices` is called with "
        "`use_array_if_local=False`, and for paths that are URLs."
    ]


def _span_notes(writer: SpanWriter, counted: Tally) -> list[str]:
    """How exactly text stands for tokens."""
    exact = (
        f"{writer.exact:,} of {counted.rows:,} texts give exactly the pool's tokens when the "
        "pool's tokenizer reads them again (`exact`)."
    )
    if writer.exact < counted.rows:
        exact += (
            " The others hold content that spells a special token, are cut within a character, or "
            "were normalised by the tokenizer."
        )
    if not writer.shared:
        return [exact]
    return [
        exact,
        f"{writer.shared:,} tokens end within a character and went with the token that completes "
        "it, against their own decision.",
    ]


def _tokenizer(run: FinishedRun, choices: Choices) -> Any:
    """The pool's tokenizer where the format needs one; what it can do without may be unknown."""
    if choices.to == "spans" or choices.tokenizer is not None:
        return run.tokenizer
    if choices.to == "olmo":
        try:
            return run.tokenizer
        except ValueError:
            return None
    return None


def _tokenizer_name(run: FinishedRun, choices: Choices) -> str | None:
    if choices.tokenizer is not None:
        return str(choices.tokenizer)
    return (run.base.tokenizer or run.base.name) if run.base else None
