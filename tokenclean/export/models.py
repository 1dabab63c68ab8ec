"""A trained model of a run, as an adapter or merged into its base."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenclean import __version__
from tokenclean.data.exports import CARD, VERSION
from tokenclean.export import loading
from tokenclean.export.card import is_hub_name, model_card, named
from tokenclean.export.content import Choices
from tokenclean.export.markdown import shown
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.models import TRAINED_IDS, BaseConfig, Network, load_tokenizer
from tokenclean.publish import write_json
from tokenclean.runs import CONFIG
from tokenclean.trust import read_yaml

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

    @property
    def known(self) -> bool:
        """Whether others can look its base up."""
        return is_hub_name(self.base_name, self.folder)

    @property
    def base_name(self) -> str:
        """As the run stores it; ``base`` has it as it is found from here."""
        return str(self.config["model"]["base"]["name"])

    @property
    def remote(self) -> bool:
        """Whether its base brings Python code of its own, as the run says or whoever exports."""
        return bool(
            self.base.trust_remote_code or self.config["model"]["base"].get("trust_remote_code")
        )

    def digest(self, to: str) -> str:
        """Hash of its weights and settings as they lie on disk, and of what it is merged into.

        Args:
            to: ``adapter`` or ``merged``.
        """
        bases = [self.base.name, self.base.tokenizer] if to == "merged" else []
        folders = [self.folder, *(Path(name) for name in bases if name)]
        found = hashlib.sha256()
        for folder in folders:  # a base on a hub is no folder; the run's configuration names it
            for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
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


def find_trained(
    folder: Path, arm: str | None, to: str, trust_remote_code: bool = False
) -> Trained:
    """The trained model of a run of `clean` or `fit`, or of an arm.

    Args:
        folder: of the run, or of an arm.
        arm: which one, where a run has several.
        to: ``adapter`` or ``merged``.
        trust_remote_code: run the Python code that comes with its base, whatever the run says.

    Raises:
        ValueError: if there is none, several and ``arm`` does not say which, or no adapter where
            one is asked for.
    """
    place = next((p for p in (folder / "adapter", folder / "model") if _is_result(p)), None)
    if place is not None and not (folder / "cleaned").is_dir() and (folder / CONFIG).is_file():
        if arm is not None:
            raise ValueError(f"--arm: {folder} is a run of `fit`, which has no arms; leave it out")
        found = _of_fit(folder, place, trust_remote_code)
    else:
        found = _of_arm(folder, arm, trust_remote_code)
    if to == "adapter" and found.full:
        raise ValueError(
            f"--to adapter: {found.folder} is a whole model, since all weights were trained; pass "
            "--to merged"
        )
    return found


def _of_fit(folder: Path, place: Path, trusted: bool) -> Trained:
    config = read_yaml(folder / CONFIG)
    named = config["model"]["base"]
    known = ("name", "tokenizer", "revision", "dtype")
    base = BaseConfig(**{key: named[key] for key in known if key in named})
    base.trust_remote_code = trusted
    return Trained(place, base, config, *_cleaned_by(config))


def _of_arm(folder: Path, arm: str | None, trusted: bool) -> Trained:
    run = FinishedRun(folder, trust_remote_code=trusted)
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
    named = {"base_model_name_or_path": trained.base_name, "revision": trained.base.revision}
    if any(config.get(key) != value for key, value in named.items()):
        path.write_text(json.dumps(config | named, indent=2, sort_keys=True) + "\n", "utf-8")


def _write_merged(folder: Path, trained: Trained, dtype: str) -> None:
    """Base and adapter as one ordinary model, with its tokenizer.

    Adapters are added in float32, to the base as it was before any 4-bit quantisation; another
    ``dtype`` is rounded to once, afterwards.
    """
    tokenizer = load_tokenizer(trained.base)
    source = trained.folder
    if not trained.full:
        network = Network.load(replace(trained.base, dtype="float32"))
        network.load_adapter(trained.folder)
        source = folder if dtype == "float32" else folder / "float32"
        network.save_merged(source, tokenizer)
    if source != folder:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            trust_remote_code=trained.base.trust_remote_code,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / "float32", ignore_errors=True)


def check_published(trained: Trained, to: str) -> None:
    """Refuse to publish an adapter of a base that nobody else has.

    Raises:
        ValueError: naming the base, whose path the adapter's configuration holds.
    """
    if to == "adapter" and not trained.known:
        raise ValueError(
            f"--push_to_hub: the adapter stands on {trained.base_name}, a folder of this machine "
            "that nobody else can load; push --to merged instead"
        )


def write_model(folder: Path, trained: Trained, choices: Choices, content: str) -> None:
    """Write a trained model into an empty folder, with its card."""
    details, base = trained.details(), trained.base
    if choices.to == "adapter":
        _write_adapter(folder, trained)
        other = trained.config["model"]["base"].get("tokenizer")
        if other is not None and not is_hub_name(other, trained.folder):
            other = "TOKENIZER"
        place = named(trained.base_name, trained.folder)
        page = loading.adapter("float32", place, base.revision, other, trained.remote)
    else:
        dtype = choices.dtype or "float32"
        _write_merged(folder, trained, dtype)
        page = loading.merged(dtype, trained.remote)
        details["stored as"] = dtype if trained.full else f"{dtype}, added up in float32"
    name, is_adapter = trained.base_name, choices.to == "adapter"
    card = model_card(
        trained.run, trained.arm, name, trained.known, page, choices.license, details, is_adapter
    )
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
