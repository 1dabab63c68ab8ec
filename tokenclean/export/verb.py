"""`tokenclean export RUN --to FORMAT`: a cleaned pool or a model for another trainer or tool."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenclean import __version__
from tokenclean.data.cleaned import DATA
from tokenclean.data.exports import CARD, MODELS, VERSION
from tokenclean.export.content import Choices
from tokenclean.export.dataset import EVERYTHING, LABELS, count, write_dataset
from tokenclean.export.hub import check_push, push
from tokenclean.finished import FinishedRun
from tokenclean.publish import complete_folder, write_json
from tokenclean.runs import CONFIG
from tokenclean.trust import read_yaml

log = logging.getLogger(__name__)

DTYPES = {"olmo": ("uint16", "uint32"), "merged": ("float32", "bfloat16", "float16")}


def export(argv: list[str]) -> None:
    """Write an export beside the run, or where `--out` says, and print its one line."""
    options = _parser().parse_args(argv)
    _check(options)
    folder = _export_model(options) if options.to in MODELS else _export_data(options)
    if options.push_to_hub is not None:
        kind: Any = "model" if options.to in MODELS else "dataset"
        print(f"{folder}: pushed to {push(folder, options.push_to_hub, kind, options.private)}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tokenclean export",
        description="A run's cleaned pool or trained model, in the layout of another trainer.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, of an arm, or of a cleaned pool")
    parser.add_argument(
        "--to",
        required=True,
        choices=[*LABELS, *EVERYTHING, *MODELS],
        help="a trainer's layout; jsonl: every number and weight; spans: text and character "
        "ranges; adapter, merged: the trained model",
    )
    parser.add_argument("--arm", help="which one, where a run has several")
    parser.add_argument("--out", type=Path, help="folder to write; default: RUN/export/[ARM/]TO")
    parser.add_argument("--tokenizer", help="the pool's, where the run does not name it")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the run's model"
    )
    parser.add_argument("--license", help="SPDX name for the card; by default it states none")
    parser.add_argument(
        "--dtype",
        help="olmo: uint16 or uint32 (default: by vocabulary); merged: float32 (default), "
        "bfloat16 or float16",
    )
    parser.add_argument(
        "--keep_empty", action="store_true", help="also export samples of which nothing is kept"
    )
    parser.add_argument(
        "--drop_weights",
        action="store_true",
        help="let a layout without weights take a weighted pool: every kept token counts as 1, "
        "those to be unlearnt carry no loss",
    )
    parser.add_argument(
        "--per_token", action="store_true", help="spans: also a range and a score for every token"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write anew what is exported there"
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it afterwards")
    parser.add_argument("--private", action="store_true", help="of a repository made for it")
    return parser


def _check(options: Namespace) -> None:
    """Refuse options that contradict each other."""
    to = options.to
    allowed = DTYPES.get(to, ())
    if options.dtype is not None and options.dtype not in allowed:
        what = f"{to} takes {' or '.join(allowed)}" if allowed else f"{to} has no choice of it"
        raise ValueError(f"--dtype: {what}, not {options.dtype}")
    for name in ("keep_empty", "drop_weights"):
        if getattr(options, name) and to not in LABELS:
            raise ValueError(f"--{name}: it is for {', '.join(LABELS)}, not for {to}; leave it out")
    if options.per_token and to != "spans":
        raise ValueError(f"--per_token: it is for spans, not for {to}; leave it out")
    if options.tokenizer is not None and to in MODELS:
        raise ValueError(f"--tokenizer: it is for data, not for {to}, whose base brings its own")
    if options.private and options.push_to_hub is None:
        raise ValueError("--private: it is for --push_to_hub OWNER/NAME; leave it out or add that")
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    if options.license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", options.license):
        log.warning(
            "--license: %r is no SPDX name, such as apache-2.0; the card says it as it is",
            options.license,
        )


def _choices(options: Namespace) -> Choices:
    names = Choices.__dataclass_fields__
    return Choices(**{name: getattr(options, name) for name in names})


def _export_data(options: Namespace) -> Path:
    try:
        run = FinishedRun(options.run, options.tokenizer, options.trust_remote_code)
    except ValueError as error:
        if (trained_on := _trained_on(options.run)) is None:
            raise
        raise ValueError(
            f"{options.run} is a run of `fit`, which cleans nothing; export the run that made the "
            f"pool that it was trained on, {trained_on}"
        ) from error
    arm = run.arm(options.arm)
    with (arm.cleaned / DATA).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    choices = _choices(options)
    content = _content(choices, arm.name, digest, arm.manifest, run.config)
    folder = _folder(options, arm.name if len(run.arms) > 1 else None)
    if not _finished(folder, content, options.overwrite):
        counted = count(run, arm, choices)
        with complete_folder(folder, sealed=False) as partial:
            write_dataset(partial, run, arm, choices, counted, content)
            _list_files(partial)
        left_out = counted.total.samples - counted.rows
        done = f"rows={counted.rows}, rows_left_out={left_out}, tokens={counted.tokens}, "
        done += f"kept_tokens={counted.total.kept}"
        print(f"{folder}: format={options.to}, {done}, bytes={_bytes(folder)}")
    return folder


def _trained_on(folder: Path) -> str | None:
    """What a run of `fit` was trained on, as it says; None if the folder is no such run."""
    config = folder / CONFIG
    if not config.is_file() or not any((folder / name).is_dir() for name in ("adapter", "model")):
        return None
    stored = read_yaml(config) or {}
    path = (stored.get("data") or {}).get("path")
    return ", ".join(map(str, path)) if isinstance(path, list) else path and str(path)


def _export_model(options: Namespace) -> Path:
    from tokenclean.export.models import check_published, find_trained, write_model

    trained = find_trained(options.run, options.arm, options.to, options.trust_remote_code)
    if options.push_to_hub is not None:
        check_published(trained, options.to)
    manifest = trained.arm.manifest if trained.arm else {}
    choices = _choices(options)
    content = _content(choices, trained.name, trained.digest(options.to), manifest, trained.config)
    folder = _folder(options, trained.name if trained.among_others else None)
    if not _finished(folder, content, options.overwrite):
        with complete_folder(folder, sealed=False) as partial:
            write_model(partial, trained, choices, content)
            _list_files(partial)
        print(f"{folder}: format={options.to}, base={trained.base_name}, bytes={_bytes(folder)}")
    return folder


def _content(
    choices: Choices, arm: str, digest: str, manifest: dict[str, Any], config: dict[str, Any]
) -> str:
    """Fingerprint of what goes into an export: equal ones are equal on disk."""
    parts = [VERSION, __version__, arm, digest, asdict(choices), manifest, config]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folder(options: Namespace, arm: str | None) -> Path:
    if options.out is not None:
        return Path(options.out)
    place = Path(options.run) / "export"
    return (place if arm is None else place / arm) / str(options.to)


def _finished(folder: Path, content: str, overwrite: bool) -> bool:
    """Whether this very export lies there already.

    Raises:
        ValueError: if something else does that may not be replaced, or it is no longer whole.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"--out: {folder} is a file; name a folder that is not there")
    there = _sizes(folder)
    if not there and not (folder / CARD).exists():
        return False
    before = _described(folder)
    if before is None:
        raise ValueError(
            f"--out: {folder} holds something that is no export, so it is left alone; name a "
            "folder that is not there"
        )
    listed: dict[str, int] = before["files"]
    if overwrite:
        if others := sorted(there.keys() - listed.keys()):
            raise ValueError(
                f"--overwrite: {folder} also holds what no export wrote there "
                f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), so it is left "
                "alone; move that elsewhere, or pass another --out"
            )
        return False
    if before.get("content") != content:
        raise ValueError(
            f"{folder} holds another export ({before.get('format')}, content "
            f"{before.get('content')}, now {content}); pass --overwrite, or another --out"
        )
    for name, size in listed.items():
        if there.get(name) != size:
            what = "is gone" if name not in there else f"has {there[name]:,} bytes, not {size:,}"
            raise ValueError(
                f"{folder} was exported before, but its {name} {what}; pass --overwrite"
            )
    print(f"{folder}: exported before; {folder / CARD}")
    return True


def _described(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself, its list of files included; None if it is no export."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(card, dict) or card.get("kind") != "export":
        return None
    return card if isinstance(card.get("files"), dict) else None


def _list_files(folder: Path) -> None:
    """Let a written export say which files are its own: these may be replaced and published."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    write_json(folder / CARD, card | {"files": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder and below it, without its `CARD`."""
    files = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_size
        for path in files
        if path != folder / CARD
    }


def _bytes(folder: Path) -> int:
    return sum(_sizes(folder).values()) + (folder / CARD).stat().st_size
