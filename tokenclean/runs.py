"""Run folders: one place per run, named by its configuration, never by the clock."""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tokenclean.interrupts import Stopped
from tokenclean.publish import refuse_links, sweep, write_json, write_text, writing_to
from tokenclean.trust import trusted

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
SUMMARY = "summary.json"
LOG = "log.txt"
#: what a run was begun with: models and data by their content, where its configuration has names
INPUTS = "inputs.json"
#: bytes looked at on either end of a file of weights
_ENDS = 1 << 20
#: held while a run is under way; says by whom
LOCK = ".lock"
#: Settings that say where a run lives or how it shows itself, not what it computes.
_PLACE_KEYS = ("config", "name", "outputs", "print_config")


def _plain_text(config: dict[str, Any]) -> str:
    plain = {k: v for k, v in config.items() if k not in _PLACE_KEYS}
    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)


def run_folder(outputs: str, name: str | None, stem: str, config: dict[str, Any]) -> Path:
    """Where a run lives: ``outputs/name``, by default its stem and a hash of its configuration."""
    digest = hashlib.sha256(_plain_text(config).encode()).hexdigest()[:8]
    return Path(outputs) / (name or f"{stem}-{digest}")


def process_rank() -> int:
    """This process's number among those of the run, from what torchrun, SLURM or Lightning set.

    `check_processes` sees to it that it is one of so many as the run is meant for.
    """
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def check_processes(expected: int) -> None:
    """Refuse processes that nothing connects: each would be a run of its own in the same folder.

    Args:
        expected: how many the run is meant for.

    Raises:
        ValueError: if there are others.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started not in (1, expected) or process_rank() >= expected:
        raise ValueError(
            f"this is process {process_rank()} of {max(started, process_rank() + 1)} or more that "
            f"were started, and the run is meant for {expected}: give --trainer.devices (per "
            "machine), --trainer.num_nodes and --trainer.strategy ddp; `select` is started by "
            "torchrun, and what takes one process by nothing (no RANK or SLURM_PROCID)"
        )


@contextmanager
def open_run(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Make or reopen the folder of a run, for this run alone while the block lasts.

    Its resolved configuration is stored there, its log kept, and what a killed run left unfinished
    swept away. Of several processes the first does all that.

    Args:
        folder: see `run_folder`.
        config: the resolved configuration, plain values only.

    Raises:
        ValueError: see `check_run` and `locked`.
        NotWritten: if the folder cannot be written to.
    """
    check_run(folder, config)
    if process_rank():
        yield
        return
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, LOG, SUMMARY):
        refuse_links(folder / name)
    with locked(folder) as dead:
        check_run(folder, config)  # of the run that had the lock before
        sweep(folder, everything=True)
        write_text(folder / CONFIG, _plain_text(config))
        with log_to(folder):
            if dead is not None:
                log.warning("%s ended without finishing; going on from there", dead)
            if trusted():
                log.info("trusted to run code: %s", ", ".join(trusted()))
            yield


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Hold a folder for this process alone. The lock of a process that died is no lock.

    Yields:
        The dead process whose lock is taken over, if there was one.

    Raises:
        ValueError: naming the process that holds it.
    """
    path = folder / LOCK
    while True:
        handle = _opened(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(path)
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"{folder} is in use by {holder}; wait for it, or pass another --name"
                ) from None
            log.warning("%s: this file system has no locks; start one run at a time", folder)
            yield None
            return
        # The last holder may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                break
        os.close(handle)
    try:
        dead = _holder(path) if os.fstat(handle).st_size else None
        note = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(sys.argv)[:500],
        }
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(note) + "\n").encode())
        yield dead
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _opened(path: Path) -> int:
    """A handle on the lock's file, which is nobody else's: no link is followed.

    Raises:
        ValueError: if something else has its name.
    """
    refuse_links(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; delete it")
    with writing_to(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return "process {process} on {host} (since {since}: {command})".format(**note)
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Note what a run is begun with, or refuse to go on with something else under the same names.

    Args:
        folder: of the run, which is open.
        inputs: option -> what its content is known by.

    Raises:
        ValueError: naming the options whose content has changed.
    """
    path = folder / INPUTS
    refuse_links(path)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]
        if changed:
            raise ValueError(
                f"{folder} was begun with something else under the same names: "
                f"{', '.join(changed)}; put back what was there, pass another --name, or delete "
                "the folder to start over"
            )
    write_json(path, inputs)


def content_of(name: str) -> str:
    """What the files of a model, an adapter or a run are known by; a hub name stands for itself.

    Large files count by their size and both ends, so that this takes no time.
    """
    folder, digest = Path(name), hashlib.sha256(b"")
    places = [folder, *(folder / inside for inside in ("adapter", "model", "cleaned", "scores"))]
    files = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
    for file in files:
        if file.suffix in (".safetensors", ".json", ".model", ".parquet") and file.is_file():
            with file.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                digest.update(f"{file.name} {size} ".encode() + stream.read(_ENDS))
                stream.seek(max(0, size - _ENDS))
                digest.update(stream.read())
    return digest.hexdigest()[:16] if files else name


def check_run(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that belongs to another run.

    Raises:
        ValueError: if the folder holds a run of another configuration; the difference is shown.
    """
    text = _plain_text(config)
    stored = folder / CONFIG
    # A run that was refused before it did anything leaves nothing to protect.
    begun = folder.is_dir() and {p.name for p in folder.iterdir()} - {CONFIG, LOG, LOCK, INPUTS}
    if stored.is_file() and begun:
        before = stored.read_text(encoding="utf-8")
        if before != text:
            difference = "\n".join(
                difflib.unified_diff(
                    before.splitlines(), text.splitlines(), "stored", "now", lineterm="", n=0
                )
            )
            raise ValueError(
                f"{folder} holds a run of another configuration; pass another --name, or delete "
                f"the folder to start over. The difference:\n{difference}"
            )


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Store a run's summary and print its one line."""
    write_json(folder / SUMMARY, summary)
    line = ", ".join(
        f"{k}={_short(v)}" for k, v in summary.items() if not isinstance(v, dict | list)
    )
    print(f"{folder}: {line}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Keep the project's log messages in ``log.txt`` while the block runs."""
    refuse_links(folder / LOG)
    logger = logging.getLogger("tokenclean")
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    # A full disk takes no lines either: what the run says of it counts, not a trace per line.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    try:
        yield
    except Stopped as stop:
        log.warning("stopped by %s; the same command goes on from here", stop)
        raise
    except Exception:
        # Into the file alone: on the screen the caller says it in one line.
        record = (logger.name, logging.ERROR, __file__, 0, "the run stopped", (), sys.exc_info())
        handler.emit(logger.makeRecord(*record))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
