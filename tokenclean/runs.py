"""Run folders: one place per run, named by its configuration, never by the clock."""

from __future__ import annotations

import difflib
import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tokenclean.arrow import write_json

CONFIG = "config.yaml"
SUMMARY = "summary.json"
#: Settings that say where a run lives or how it shows itself, not what it computes.
_PLACE_KEYS = ("config", "name", "outputs", "print_config")


def _plain_text(config: dict[str, Any]) -> str:
    plain = {k: v for k, v in config.items() if k not in _PLACE_KEYS}
    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)


def run_folder(outputs: str, name: str | None, stem: str, config: dict[str, Any]) -> Path:
    """Where a run lives: ``outputs/name``, by default its stem and a hash of its configuration."""
    digest = hashlib.sha256(_plain_text(config).encode()).hexdigest()[:8]
    return Path(outputs) / (name or f"{stem}-{digest}")


def open_run(folder: Path, config: dict[str, Any]) -> None:
    """Make or reopen the folder of a run and store its resolved configuration there.

    Args:
        folder: see `run_folder`.
        config: the resolved configuration, plain values only.

    Raises:
        ValueError: see `check_run`.
    """
    check_run(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(_plain_text(config), encoding="utf-8")


def check_run(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that belongs to another run.

    Raises:
        ValueError: if the folder holds a run of another configuration; the difference is shown.
    """
    text = _plain_text(config)
    stored = folder / CONFIG
    # A run that was refused before it did anything leaves nothing to protect.
    begun = folder.is_dir() and {p.name for p in folder.iterdir()} - {CONFIG, "log.txt"}
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


def stop_if_interrupted(trainer: Any) -> None:
    """Turn a signal that Lightning swallowed into an exception: half a run is no result.

    Raises:
        KeyboardInterrupt: if the trainer was told to stop.
    """
    if trainer.interrupted or trainer.received_sigterm:
        raise KeyboardInterrupt


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
    logger = logging.getLogger("tokenclean")
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except Exception:
        # Into the file alone: on the screen the caller says it in one line.
        record = (logger.name, logging.ERROR, __file__, 0, "the run stopped", (), sys.exc_info())
        handler.emit(logger.makeRecord(*record))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
