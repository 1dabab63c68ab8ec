"""LoRA adapters: settings, folders on disk, and a stack of them joined into one."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

#: beside an adapter (or a fully fine-tuned model): ids of the samples it was trained on
TRAINED_IDS = "trained_ids.json"
#: what a disk says that takes no more
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: of an adapter, in PEFT's format
WEIGHTS = "adapter_model.safetensors"
#: a module's name, whole or its end
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")


@dataclass
class LoraSettings:
    """LoRA as in the paper (arXiv 2502.01968, D.3).

    Args:
        r: rank.
        alpha: scaling factor; updates are scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: names of the linear modules that get an adapter.
    """

    r: int = 64
    alpha: int = 16
    dropout: float = 0.1
    target_modules: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r: {self.r} is not a rank; use null for full fine-tuning")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout: {self.dropout} is not in [0, 1)")


def trained_ids(folder: Path) -> list[str]:
    """Ids of the samples an adapter (with all it stands on) was trained on; [] if unknown.

    Raises:
        ValueError: if what is written there is no list of strings.
    """
    path = folder / TRAINED_IDS
    if not path.is_file():
        return []
    ids: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError(
            f"{path} is no list of ids; mend it, or delete it if nobody knows what was trained on"
        )
    return ids


def adapter_folders(given: str | list[str] | None) -> list[str]:
    """The adapter folders behind what a user named: folders, or runs and arms that hold one.

    Raises:
        ValueError: for what is no plain LoRA adapter; see `check_adapter_folder`.
    """
    names = [given] if isinstance(given, str) else list(given or [])
    folders = []
    for name in names:
        inside = Path(name) / "adapter"
        folder = inside if (inside / "adapter_config.json").is_file() else Path(name)
        check_adapter_folder(folder)
        folders.append(str(folder))
    return folders


def check_adapter_folder(folder: Path) -> None:
    """Refuse what is not a plain LoRA adapter, before any weight is read.

    Raises:
        ValueError: naming what it is instead; only B A updates of linear modules add up exactly.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"model.adapters: {folder} holds no PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = folder / "adapter_model.bin"
        what = "no weights"
        if pickled.is_file():
            what = f"{pickled.name}, a pickle, which is never loaded"
        raise ValueError(
            f"model.adapters: {folder} holds {what}; {WEIGHTS} is needed, which save_pretrained of "
            "peft writes"
        )
    config: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"model.adapters: {path} is no configuration of an adapter")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"model.adapters: {folder} holds {config.get('peft_type')}, not LORA")
    unlike = {
        *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias"),
        *("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"),
        *("alora_invocation_tokens", "trainable_token_indices", "target_parameters"),
        *("arrow_config", "velora_config", "kasa_config", "monteclora_config"),
        "megatron_config",  # imports a module by name
    }
    found = sorted(option for option in unlike if config.get(option))
    if config.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise ValueError(
            f"model.adapters: {folder} is not plain LoRA ({', '.join(found)}); merge it into its "
            "base and give the result as model.base.name"
        )
    _check_names(path, config)


def _check_names(path: Path, config: dict[str, Any]) -> None:
    """Refuse module names that peft would take as regular expressions, which may run for ever."""
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        if option == "layers_pattern" and isinstance(value, str):
            value = [value]  # peft puts it into an expression in either form
        names = value if isinstance(value, list) else [] if value is None else [None]
        if option == "target_modules" and value == "all-linear":
            continue
        if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
            raise ValueError(
                f"model.adapters: {option} of {path} must be a list of plain module names, such as "
                f"q_proj, not {str(value)[:60]!r}; save the adapter again with such a list"
            )


def check_fits(folder: Path, keys: Collection[str]) -> None:
    """Refuse an adapter whose tensors are not those that the model takes from it.

    Args:
        folder: of the adapter.
        keys: names of the tensors that the model now has of it.

    Raises:
        ValueError: naming one that is missing or has no module.
    """
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            there = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: it cannot be read: {error}") from error
    unexpected, missing = sorted(there - set(keys)), sorted(set(keys) - there)
    if unexpected or missing:
        found = [f"no module takes {name}" for name in unexpected[:1]]
        found += [f"it lacks {name}" for name in missing[:1]]
        raise ValueError(
            f"model.adapters: {folder} does not fit model.base ({'; '.join(found)}); give the base "
            "that it was trained on"
        )


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    try:
        return load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: it cannot be read: {error}") from error


def write_adapter(folder: Path, config: LoraConfig, state: dict[str, Tensor]) -> None:
    """Write an adapter in PEFT's format; equal adapters become equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    with disk_errors(weights):
        save_file(state, str(weights), metadata={"format": "pt"})
    share(weights)
    inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference
    # peft writes the module names in hash order
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(written.get("target_modules"), list):
        written["target_modules"].sort()
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(config), encoding="utf-8")


def _card(config: LoraConfig) -> str:
    """What the adapter is, without a time or a place, in place of peft's template."""
    base = Path(config.base_model_name_or_path or "its base").name
    return (
        "---\nlicense:\nlibrary_name: peft\ntags:\n- tokenclean\n---\n\n"
        f"# Adapter of {base}\n\nLoRA, r = {config.r}, alpha = {config.lora_alpha}, written by "
        "tokenclean. `adapter_config.json` names the base; `PeftModel.from_pretrained(model, "
        "folder)` loads it. `tokenclean export RUN --to adapter` writes it with a card that says "
        "what it was trained on.\n"
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise on a full disk into the operating system's error.

    Raises:
        OSError: naming the path, whatever could not be written.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        text = str(error)
        number = next(
            (n for n in _REFUSALS if os.strerror(n) in text or f"os error {n})" in text), 0
        )
        if not number and ("PytorchStreamWriter" in text or "inline_container" in text):
            number = errno.ENOSPC  # torch does not say why
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def share(weights: Path) -> None:
    """Give a weights file the permissions of the file beside it: safetensors writes it for its
    owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    weights.chmod(0o666 & ~mask)


def join_adapters(
    configs: list[LoraConfig], states: list[dict[str, Tensor]]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A stack of adapters as one.

    Ranks are concatenated: B = [B_1 ... B_m], A = [A_1; ...; A_m], r and alpha both summed, so that
    alpha / r, and with it every delta, is unchanged. An adapter of another alpha / r joins at the
    first one's.
    """
    scale = configs[0].lora_alpha / configs[0].r
    joined: dict[str, Tensor] = {}
    for key in sorted({k for state in states for k in state}):
        parts = _parts(key, states, [c.r for c in configs])
        if ".lora_B." in key:
            ratios = [c.lora_alpha / c.r / scale for c in configs]
            parts = [p if q == 1.0 else p * q for p, q in zip(parts, ratios, strict=True)]
            joined[key] = torch.cat(parts, dim=1)
        else:
            joined[key] = torch.cat(parts, dim=0)
    rank = sum(c.r for c in configs)
    config = replace(configs[0], r=rank, lora_alpha=_whole(scale * rank))  # type: ignore[arg-type]
    targets: list[Any] = [c.target_modules for c in configs]
    if all(isinstance(names, set) for names in targets):
        # peft keeps the names as a set, whatever its annotation says
        config.target_modules = set().union(*targets)  # type: ignore[assignment]
    return config, joined


def _parts(key: str, states: list[dict[str, Tensor]], ranks: list[int]) -> list[Tensor]:
    """One tensor of every adapter; zeros from an adapter that leaves this module alone."""
    there = next(state[key] for state in states if key in state)
    parts = []
    for state, rank in zip(states, ranks, strict=True):
        shape = (len(there), rank) if ".lora_B." in key else (rank, there.shape[1])
        parts.append(state.get(key, there.new_zeros(shape)))
    return parts


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 else value
