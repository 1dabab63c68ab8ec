"""Score tables shared between runs: one model over one pool is scored once, whoever asks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tokenclean.publish import MANIFEST, complete_folder, read_manifest, verify, write_json
from tokenclean.scoring.table import KIND

log = logging.getLogger(__name__)

#: What a manifest says about where things lie, not about what the numbers are.
_PLACES = ("pool_folder", "base", "adapters")


class ScoreCache:
    """Finished score tables by content.

    The key covers everything that the numbers come from: pool (data, tokenizer, template, maximal
    length), rows, model weights, what the model was trained on, dtype, precision, batch plan,
    attention backend, device, switches and versions.

    Tables are shared by hard links, so they take their space once and a run folder stays whole when
    the cache is deleted (and the other way round).

    Args:
        folder: holds one folder per key.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, manifest: dict[str, Any], rows: np.ndarray) -> bool:
        """Whether the cache holds a table of these rows; arguments as in `take`.

        Every byte of it is compared with what was written: a file that somebody changed under one
        of its names is changed under all.
        """
        entry = self._entry(manifest, rows)
        if not (entry / MANIFEST).is_file():
            return False
        try:
            read_manifest(entry, KIND)
            verify(entry)
        except ValueError as error:
            log.warning("the model is run, since its scores in the cache are no use: %s", error)
            return False
        return True

    def take(self, manifest: dict[str, Any], rows: np.ndarray, table: Path) -> None:
        """Make ``table`` from the cache.

        Args:
            manifest: see `score_manifest`.
            rows: pool rows that are wanted, int64.
            table: the folder to make.
        """
        entry = self._entry(manifest, rows)
        places = {k: manifest[k] for k in _PLACES}
        _link(entry, table, places)
        log.info("model %s is not run: its scores are in %s", manifest["model"], entry)

    def put(self, manifest: dict[str, Any], rows: np.ndarray, table: Path) -> None:
        """Keep a finished table under the manifest it was started with."""
        if not self.has(manifest, rows):
            _link(table, self._entry(manifest, rows))

    def _entry(self, manifest: dict[str, Any], rows: np.ndarray) -> Path:
        return self.folder / content_key(manifest, rows)[:24]


def content_key(manifest: dict[str, Any], rows: np.ndarray) -> str:
    """Hash of what the numbers of a table come from: what lies where does not matter.

    Args:
        manifest: see `score_manifest`.
        rows: pool rows, int64.
    """
    content = {k: v for k, v in manifest.items() if k not in _PLACES}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _link(source: Path, target: Path, changes: dict[str, Any] | None = None) -> None:
    """Give a finished folder a second name, file by file; copies where links cannot be made.

    Args:
        changes: to the manifest, which then becomes a file of its own.
    """
    with complete_folder(target) as partial:
        for file in sorted(source.iterdir()):
            try:
                os.link(file, partial / file.name)
            except OSError:
                shutil.copy2(file, partial / file.name)
        if changes:
            stored = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
            write_json(partial / MANIFEST, {**stored, **changes})
