"""Every call into transformers and peft: load, adapt, stack, run, publish."""

from tokenclean.models.adapters import (
    TRAINED_IDS,
    LoraSettings,
    adapter_folders,
    adapter_tensors,
    check_adapter_folder,
    trained_ids,
)
from tokenclean.models.attention import AttentionReader, check_layer, default_layer
from tokenclean.models.loading import BaseConfig, Speed, check_base, load_config, load_tokenizer
from tokenclean.models.network import Network
from tokenclean.models.passes import in_float32

__all__ = [
    "TRAINED_IDS",
    "AttentionReader",
    "BaseConfig",
    "LoraSettings",
    "Network",
    "Speed",
    "adapter_folders",
    "adapter_tensors",
    "check_adapter_folder",
    "check_base",
    "check_layer",
    "default_layer",
    "in_float32",
    "load_config",
    "load_tokenizer",
    "trained_ids",
]
