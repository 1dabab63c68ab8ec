"""The base model: how to name it, its tokenizer, and what is refused before any weight is read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from tokenclean.data.template import vocabulary_hash

log = logging.getLogger(__name__)

#: what a config.json states of the depth and of the widths of a model
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"),
    *("head_dim", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
)
#: the longest config.json that is read
_CONFIG_CHARACTERS = 1 << 24

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Speed:
    """Techniques that save work and change results by rounding at most; each can be switched off.

    Args:
        gather_last_layer: finish the last decoder layer only where a token is predicted.
        lean_lora: add LoRA updates in place and without casts, instead of peft's own forward pass.
        merge: add frozen adapters to a copy of the weights, where memory allows: for scoring, and
            in float32 for training on top of them.
        varlen_attention: one variable-length attention call for a packed row, where the GPU has it.
    """

    gather_last_layer: bool = True
    lean_lora: bool = True
    merge: bool = True
    varlen_attention: bool = True


@dataclass
class BaseConfig:
    """The base model and how to load it.

    Args:
        name: local path or hub name of a causal LM of transformers.
        tokenizer: path or name of its tokenizer, if that lives elsewhere.
        revision: branch, tag or commit on the hub.
        dtype: of the weights in memory. ``auto``: float32 on a CPU; on a GPU bfloat16 under LoRA
            and float32 when all weights are trained (mixed precision does the rest).
        trust_remote_code: run Python code that comes with the model.
        load_in_4bit: NF4 weights through bitsandbytes (``pip install tokenclean[4bit]``); GPU and
            LoRA only.
        layout: ``packed`` rows without padding, ``padded`` batches, or ``auto``: packed wherever a
            probe shows that the model computes the same with it.
        speed: see `Speed`.
    """

    name: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: DTypeName = "auto"
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    layout: Literal["auto", "packed", "padded"] = "auto"
    speed: Speed = field(default_factory=Speed)


def load_tokenizer(base: BaseConfig) -> Any:
    """The tokenizer of a base model.

    Raises:
        ValueError: naming the path if there is none to be had.
    """
    name = base.tokenizer or base.name
    option = "model.base.tokenizer" if base.tokenizer else "model.base.name"
    _check_local(name, option)
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=None if base.tokenizer else base.revision,
            trust_remote_code=base.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: no tokenizer could be loaded from {name}: {error}") from error


def load_config(base: BaseConfig) -> Any:
    """The model's own configuration, without its weights.

    Raises:
        ValueError: if there is none, or what lies beside it is no model to be read: an adapter,
            weights that are pickles alone, or smaller than the configuration says; or if it asks
            for code from the hub.
    """
    _check_local(base.name, "model.base.name")
    _check_weights(Path(base.name))
    _check_sizes(Path(base.name))
    try:
        config = AutoConfig.from_pretrained(
            base.name, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.base.name: {base.name} could not be loaded: {error}") from error
    attention = getattr(config, "_attn_implementation", None)
    if not base.trust_remote_code and "/" in str(attention):
        raise ValueError(
            f"model.base.name: the configuration of {base.name} asks for attention code from the "
            f"hub, {attention}, which is not run; take attn_implementation out of its config.json"
        )
    return config


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are pickles, which run code, or an adapter's."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.base.name: {folder} holds an adapter; give it as model.adapters, and its base "
            "as model.base.name"
        )
    if any(folder.glob("*.safetensors")):
        return
    endings = ("bin", "pt", "pth", "ckpt", "pkl")
    if pickled := sorted(file.name for end in endings for file in folder.glob(f"*.{end}")):
        raise ValueError(
            f"model.base.name: {folder} holds no safetensors but {pickled[0]}, and pickles are "
            "never loaded, since that can run code; convert it (AutoModelForCausalLM."
            "from_pretrained, then save_pretrained, where you trust it)"
        )


def _check_sizes(folder: Path) -> None:
    """Refuse a configuration of a larger model than the weights beside it, before one is built.

    Only the headers of the weights are read. Without weights there is nothing to compare.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    layers, widest = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    widest = max(widest, *weights.get_slice(name).get_shape(), 0)
                    numbers = [int(n) for n in name.split(".") if n.isdigit() and len(n) < 9]
                    layers = max(layers, 1 + (numbers[0] if numbers else -1))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model.base.name: {file} cannot be read: {error}") from error
    if not widest:
        return
    try:
        with path.open(encoding="utf-8") as text:
            config: Any = json.loads(text.read(_CONFIG_CHARACTERS))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model.base.name: {path} cannot be read: {error}") from error
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        for name, value in part.items() if isinstance(part, dict) else ():
            most = layers if name in _DEPTHS else widest if name in _WIDTHS else None
            if most is not None and isinstance(value, int | float) and not value <= most:
                raise ValueError(
                    f"model.base.name: {path} states {name} {value}, and the weights beside it "
                    f"have {most} at most; it is not the configuration of these weights"
                )


def _check_local(name: str, option: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"{option}: {name} does not exist")


def check_base(base: BaseConfig, tokenizer: Any, max_length: int) -> None:
    """Refuse what cannot work before any weight is read.

    Raises:
        ValueError: if ``max_length`` exceeds the model's context, the tokenizer has ids that the
            model has no embedding for or other ids than the model's own, or 4-bit loading is asked
            for where it cannot be had.
    """
    config = load_config(base).get_text_config()
    _check_vocabulary(base, config, tokenizer)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(
            f"data.max_length: {max_length} exceeds the context of {base.name}, {context}; "
            f"pass --data.max_length {context} or less"
        )
    # Only ids that a text can come to contain matter; a pad token beyond them is never used.
    largest = max(
        (i for t, i in tokenizer.get_vocab().items() if t != tokenizer.pad_token), default=0
    )
    if largest >= config.vocab_size:
        raise ValueError(
            f"model.base.tokenizer: token id {largest} has no embedding in {base.name}, whose "
            f"vocabulary has {config.vocab_size} entries"
        )
    if base.load_in_4bit:
        if not torch.cuda.is_available():
            raise ValueError("model.base.load_in_4bit: needs a GPU")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "model.base.load_in_4bit: needs bitsandbytes; pip install 'tokenclean[4bit]'"
            ) from error


def _check_vocabulary(base: BaseConfig, config: Any, tokenizer: Any) -> None:
    """A model run on another model's tokens must mean the same by every id."""
    if base.tokenizer is not None:
        try:
            own = load_tokenizer(replace(base, tokenizer=None))
        except ValueError:
            log.warning("%s has no tokenizer of its own to compare ids with", base.name)
        else:
            ours, theirs = vocabulary_hash(tokenizer), vocabulary_hash(own)
            if ours != theirs:
                raise ValueError(
                    f"model.base.tokenizer: {base.tokenizer} (vocabulary {ours}) gives other ids "
                    f"to tokens than {base.name} was trained with (vocabulary {theirs})"
                )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        log.warning(
            "%s ends its own texts with token id(s) %s; responses end with the tokenizer's %d",
            base.name,
            ends,
            tokenizer.eos_token_id,
        )
