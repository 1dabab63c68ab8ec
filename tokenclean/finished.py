"""A finished run read back: which cleaned pools it holds, and with what to decode them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenclean.cleaning.results import RESULTS
from tokenclean.data.cleaned import KIND, is_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.models import TRAINED_IDS, BaseConfig
from tokenclean.models.loading import load_tokenizer
from tokenclean.publish import read_manifest
from tokenclean.runs import CONFIG
from tokenclean.trust import read_yaml

#: What the pool of a run of `select`, or a bare cleaned pool, is called where arms have names.
ONLY = "selected"


@dataclass(frozen=True)
class CleanedArm:
    """One cleaned pool of a run.

    Attributes:
        name: of the arm.
        folder: holds ``cleaned/`` and, where something was trained, ``adapter/``.
        cleaned: the cleaned pool.
        rounds: round -> its folder, ascending from 1; empty unless it is self-evolving.
    """

    name: str
    folder: Path
    cleaned: Path
    rounds: dict[int, Path] = field(default_factory=dict)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of the cleaned pool."""
        return read_manifest(self.cleaned, KIND)

    @property
    def adapter(self) -> Path | None:
        """The trained weights, if there are any; after full fine-tuning a whole model."""
        place = self.folder / "adapter"
        return place if (place / TRAINED_IDS).is_file() else None


class FinishedRun:
    """A run of `clean` or `select`, or a bare cleaned pool.

    Args:
        folder: of the run, of one of its arms, or of a cleaned pool.
        tokenizer: path or hub name of the pool's tokenizer, where the run does not say.
        trust_remote_code: run the Python code that comes with the run's model. What the run's own
            configuration says of it does not count: a run may come from anywhere.

    Attributes:
        arms: name -> arm, in the run's order.
        config: the run's resolved configuration; empty if there is none.
        root: the run that ``folder`` is or lies in.
        unfinished: arms that the run asks for and that have no cleaned pool yet.

    Raises:
        ValueError: if there is no cleaned pool in it.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None, trust_remote_code: bool = False):
        self.folder, self._given, self._trusted = Path(folder), tokenizer, trust_remote_code
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder; give that of a run of `clean` or `select`")
        # The cleaned pool and the arm that it belongs to may be named in the run's stead.
        arm = Path(os.path.abspath(self.folder))
        arm = arm.parent if arm.name == "cleaned" else arm
        of_run = arm.parent.name == "arms"
        self.root = arm.parent.parent if of_run else arm
        self.config = _read_yaml(self.root / CONFIG)
        self.arms: dict[str, CleanedArm] = {}
        if (self.folder / "arms").is_dir():
            found = sorted(p.name for p in (self.folder / "arms").iterdir())
            # The stored configuration is sorted; the results are in the order of the run.
            results = self.folder / RESULTS
            ran = json.loads(results.read_text("utf-8")) if results.is_file() else []
            named = [result["name"] for result in ran if result["name"] in found]
            for name in dict.fromkeys([*named, *found]):
                self._add(name, self.folder / "arms" / name)
        else:
            self._add(arm.name if of_run else ONLY, self.folder)
        asked = (self.config.get("loop") or {}).get("arms") or {}
        self.unfinished = [
            name
            for name, settings in asked.items()
            if not of_run and name not in self.arms and settings.get("schedule") != "warmup"
        ]
        if not self.arms:
            studied = (self.folder / "study.json").is_file()
            raise ValueError(
                f"{folder} is a study; give one of its runs, {folder}/runs/..."
                if studied
                else f"{folder} holds no cleaned pool; give the folder of a finished run of "
                "`clean` or `select`, of an arm, or of a cleaned pool"
            )

    def _add(self, name: str, folder: Path) -> None:
        cleaned = next((p for p in (folder / "cleaned", folder) if is_cleaned_pool(p)), None)
        if cleaned is None:
            return
        rounds = {
            int(found[1]): p
            for p in folder.glob("round_*")
            if (found := re.fullmatch(r"round_(\d+)", p.name)) and is_cleaned_pool(p / "cleaned")
        }
        self.arms[name] = CleanedArm(name, folder, cleaned, dict(sorted(rounds.items())))

    def arm(self, name: str | None) -> CleanedArm:
        """One arm by its name; None: the only one.

        Raises:
            ValueError: listing the arms.
        """
        listed = ", ".join(map(repr, self.arms))
        if name is None and len(self.arms) == 1:
            return next(iter(self.arms.values()))
        if name is None:
            raise ValueError(f"--arm: {self.folder} has several; choose from {listed}")
        if name not in self.arms:
            raise ValueError(f"--arm: {self.folder} has no arm {name!r}; choose from {listed}")
        return self.arms[name]

    @cached_property
    def base(self) -> BaseConfig | None:
        """The base model as the run names it; None if it does not."""
        for config in (self.config, *self._scored_by()):
            named = (config.get("model") or {}).get("base") or {}
            if "name" in named:
                known = ("name", "tokenizer", "revision", "dtype")
                base = BaseConfig(**{key: named[key] for key in known if key in named})
                base.trust_remote_code = self._trusted
                base.name = self.place(base.name)
                base.tokenizer = base.tokenizer and self.place(base.tokenizer)
                return base
        return None

    def place(self, path: str) -> str:
        """A path that the run stores; a relative one may be meant from a folder above the run."""
        if Path(path).exists():
            return path
        places = (folder / path for folder in self.root.parents)
        return next((str(place) for place in places if place.exists()), path)

    def _scored_by(self) -> list[dict[str, Any]]:
        """Configurations of the runs of `score` that a run of `select` took its tables from."""
        stored = (self.config.get(key) for key in ("base", "reference"))
        named = [Path(self.place(path)) for path in stored if path]
        return [_read_yaml(place / CONFIG) for path in named for place in (path, path.parent)]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the run's pools.

        Raises:
            ValueError: if the run does not name it, or it is not the one that made the pools.
        """
        if self._given is not None:
            base = BaseConfig(name=self._given, trust_remote_code=self._trusted)
        elif self.base is not None:
            base = self.base
        else:
            raise ValueError(
                f"{self.folder} does not say which model its tokens belong to; name its tokenizer "
                "with --tokenizer"
            )
        try:
            tokenizer = load_tokenizer(base)
        except ValueError as error:
            if self._trusted:
                raise
            raise ValueError(
                f"{error}\nName the tokenizer with --tokenizer; if it comes with code that you "
                "trust, pass --trust_remote_code"
            ) from error
        made = {str(arm.manifest["tokenizer"]) for arm in self.arms.values()}
        now = fingerprint_tokenizer(tokenizer)
        if made != {now}:
            raise ValueError(
                f"{base.tokenizer or base.name} has another tokenizer (fingerprint {now}) than the "
                f"one that made the pools of {self.folder} ({', '.join(sorted(made))}); name that "
                "one with --tokenizer"
            )
        return tokenizer


def _read_yaml(path: Path) -> dict[str, Any]:
    """A stored configuration; empty if it is not there."""
    if not path.is_file():
        return {}
    return read_yaml(path) or {}
