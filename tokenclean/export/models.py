"""A trained model of a run, as an adapter or merged into its base."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tokenclean import __version__
from tokenclean.arrow import write_json
from tokenclean.data.exports import CARD, VERSION
from tokenclean.export import loading
from tokenclean.export.card import model_card
from tokenclean.export.content import Choices
from tokenclean.export.markdown import shown
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.models import TRAINED_IDS, BaseConfig, Network, load_tokenizer
from tokenclean.runs import CONFIG

log = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Trained:
    """What a run has trained.

    Attributes:
        folder: holds an adapter, or a whole model after full fine-tuning.
        base: the base model, as the run names it.
        config: the run's configuration.
        run, arm: where its data were cleaned, if that is known.
        among_others: its run has more arms.
        full: all weights were trained.
    """

    folder: Path
    base: BaseConfig
    config: dict[str, Any]
    run: FinishedRun | None
    arm: CleanedArm | None
    among_others: bool = False

    @property
    def full(self) -> bool:
        return not (self.folder / ADAPTER_FILES[0]).is_file()

    @property
    def name(self) -> str:
        """Of the arm; ``fit`` for a run of that verb."""
        return "fit" if self.arm is None else self.arm.name

    def digest(self) -> str:
        """Hash of its weights as they lie on disk."""
        found = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:16]

    def details(self) -> dict[str, Any]:
        """Of its training, for a card."""
        model = self.config.get("model") or {}
        lora, data = model.get("lora"), self.config.get("data") or {}
        how = "all weights"
        if not self.full:
            # As published: the ranks of all rounds together.
            stored = json.loads((self.folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
            how = f"LoRA, r = {stored['r']}, alpha = {stored['lora_alpha']}"
            if lora and lora.get("r") != stored["r"]:
                how += f" (several of r = {lora.get('r')} joined)"
        learning_rate = ((model.get("optimizer") or {}).get("init_args") or {}).get("lr")
        return {
            "weights trained": how,
            "learning rate": learning_rate,
            "learning-rate schedule": model.get("schedule"),
            "samples per step": data.get("batch_size"),
            "epochs": (self.config.get("trainer") or {}).get("max_epochs"),
            "seed": self.config.get("seed_everything"),
            "layout": data.get("template"),
        }


def find_trained(folder: Path, arm: str | None, to: str) -> Trained:
    """The trained model of a run of `clean` or `fit`, or of an arm.

    Args:
        folder: of the run, or of an arm.
        arm: which one, where a run has several.
        to: ``adapter`` or ``merged``.

    Raises:
        ValueError: if there is none, several and ``arm`` does not say which, or no adapter where
            one is asked for.
    """
    place = next((p for p in (folder / "adapter", folder / "model") if _is_result(p)), None)
    if place is not None and not (folder / "cleaned").is_dir() and (folder / CONFIG).is_file():
        if arm is not None:
            raise ValueError(f"--arm: {folder} is a run of `fit`, which has no arms; leave it out")
        found = _of_fit(folder, place)
    else:
        found = _of_arm(folder, arm)
    if to == "adapter" and found.full:
        raise ValueError(
            f"--to adapter: {found.folder} is a whole model, since all weights were trained; pass "
            "--to merged"
        )
    return found


def _of_fit(folder: Path, place: Path) -> Trained:
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    named = config["model"]["base"]
    known = ("name", "tokenizer", "revision", "trust_remote_code", "dtype")
    base = BaseConfig(**{key: named[key] for key in known if key in named})
    return Trained(place, base, config, *_cleaned_by(config))


def _of_arm(folder: Path, arm: str | None) -> Trained:
    run = FinishedRun(folder)
    found = run.arm(arm)
    if found.adapter is None:
        raise ValueError(
            f"{found.folder} holds no trained model: nothing was trained on its tokens; give a run "
            "of `fit` or `clean`"
        )
    if run.base is None:
        raise ValueError(f"{folder} does not say which base its models stand on: no {CONFIG}")
    return Trained(found.adapter, run.base, run.config, run, found, len(run.arms) > 1)


def _is_result(folder: Path) -> bool:
    return (folder / TRAINED_IDS).is_file()


def _cleaned_by(config: dict[str, Any]) -> tuple[FinishedRun | None, CleanedArm | None]:
    """Where the data of a run of `fit` were cleaned, if it can still be seen."""
    path = (config.get("data") or {}).get("path")
    if not isinstance(path, str) or not Path(path).is_dir():
        return None, None
    cleaned = Path(path)
    # `select` and the arms of `clean` leave their pool in a folder of this name
    folder = cleaned.parent if cleaned.name == "cleaned" else cleaned
    try:
        run = FinishedRun(folder)
        return run, run.arm(None)
    except ValueError:
        return None, None


def _write_adapter(folder: Path, trained: Trained) -> None:
    """The adapter as PEFT loads it; its configuration names the base as the run does."""
    for name in ADAPTER_FILES:
        shutil.copyfile(trained.folder / name, folder / name)
    path = folder / ADAPTER_FILES[0]
    config = json.loads(path.read_text(encoding="utf-8"))
    named = {"base_model_name_or_path": trained.base.name, "revision": trained.base.revision}
    if any(config.get(key) != value for key, value in named.items()):
        path.write_text(json.dumps(config | named, indent=2, sort_keys=True) + "\n", "utf-8")


def _write_merged(folder: Path, trained: Trained, dtype: str) -> None:
    """Base and adapter as one ordinary model, with its tokenizer.

    Adapters are added in float32; another ``dtype`` is rounded to once, afterwards.
    """
    tokenizer = load_tokenizer(trained.base)
    source = trained.folder
    if not trained.full:
        # 4-bit weights cannot be added to: the base is read as it was before
        network = Network.load(replace(trained.base, dtype="float32", load_in_4bit=False))
        network.load_adapter(trained.folder)
        source = folder if dtype == "float32" else folder / "float32"
        network.save_merged(source, tokenizer)
    if source != folder:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / "float32", ignore_errors=True)


def write_model(folder: Path, trained: Trained, choices: Choices, content: str) -> None:
    """Write a trained model into an empty folder, with its card."""
    details = trained.details()
    if choices.to == "adapter":
        _write_adapter(folder, trained)
        page = loading.adapter("float32")
    else:
        dtype = choices.dtype or "float32"
        _write_merged(folder, trained, dtype)
        page = loading.merged(dtype)
        details["stored as"] = f"{dtype}, added up in float32"
    name, is_adapter = trained.base.name, choices.to == "adapter"
    card = model_card(trained.run, trained.arm, name, page, choices.license, details, is_adapter)
    (folder / "README.md").write_text(card, encoding="utf-8")
    manifest = trained.arm.manifest if trained.arm else {}
    note = {
        "kind": "export",
        "format": choices.to,
        "version": VERSION,
        "tokenclean": __version__,
        "content": content,
        "base": shown(name),
        "arm": trained.arm.name if trained.arm else None,
        **{key: manifest.get(key) for key in ("pool", "tokenizer", "vocabulary", "template")},
    }
    write_json(folder / CARD, note)
