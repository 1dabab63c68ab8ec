"""Attention for packed rows, registered with transformers under the name `SEGMENTS`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "tokenclean_segments"


@dataclass
class Segments:
    """Where the samples of a packed row begin and end.

    Attributes:
        lengths: tokens of each sample.
        bounds: 0 and the running sum of ``lengths``, int32, shape (samples + 1,), on the device.
        varlen: use one variable-length attention call where the hardware has it.
    """

    lengths: list[int]
    bounds: Tensor
    varlen: bool = True


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sample.

    On a GPU in 16 bits one variable-length call; elsewhere one call per length, neighbours of equal
    length as one batch.

    Shapes: query (1, heads, T, D), key and value (1, kv heads, T, D); result (1, T, heads, D).
    Without ``segments`` it is transformers' own SDPA attention.
    """
    if segments is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    dtype = _product_dtype(query)
    if segments.varlen and query.is_cuda and dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, segments, dtype, kwargs.get("scaling")), None
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(segments.lengths)]
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


def _product_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    scale: float | None,
) -> Tensor:
    """Flash attention over the whole packed row; arguments and result as in `segment_attention`."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer

    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    longest = max(segments.lengths)
    output = varlen_attn(
        q,
        k,
        v,
        segments.bounds,
        segments.bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(SEGMENTS, segment_attention)
# Calls that carry no segments (generation, an evaluation harness) get SDPA's ordinary masks.
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
