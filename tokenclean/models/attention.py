"""Attention for packed rows, registered with transformers under the name `SEGMENTS`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "tokenclean_segments"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sample; neighbours of equal length run as one batch.

    Shapes: query (1, heads, T, D), key and value (1, kv heads, T, D); result (1, T, heads, D).
    Without ``segments`` it is transformers' own SDPA attention.
    """
    if segments is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(segments)]
    # One split per tensor: its gradient is one concatenation, where slices would each be padded
    # with zeros to the whole row.
    sizes = [length * count for length, count in runs]
    split = (x[0].split(sizes, dim=1) for x in (query, key, value))
    parts = []
    for (length, count), *qkv in zip(runs, *split, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        output, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
        parts.append(output.flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register(SEGMENTS, segment_attention)
# Calls that carry no segments (generation, an evaluation harness) get SDPA's ordinary masks.
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
