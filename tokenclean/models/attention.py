"""Attention for packed rows, registered with transformers under the name `SEGMENTS`.

Passes never hold attention weights. An `AttentionReader` computes those of one layer beside the
pass, some rows at a time, and keeps one number per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "tokenclean_segments"
#: What a reader can find in a layer; see `AttentionReader`.
Reading = Literal["received", "keys", "to_prompt"]
#: Attention weights that a reader holds at a time, all heads together: 16 MB of float32.
CHUNK = 1 << 22


@dataclass
class AttentionReader:
    """One number per token from the attention weights of one layer, averaged over its heads.

    With A[i, j] what query i gives key j, both counted from 0 in a sample of T tokens:

    * ``received``: mean of A'[i, j] over the later queries i > j. A' leaves out key 0, the sink of
      attention, and its rows sum to 1 without it. NaN for the first and the last token.
    * ``keys``: mean of row i over the key axis, (sum_j A[i, j]) / T. Rows of a softmax sum to 1, so
      it is 1 / T up to rounding, whatever model and text: the axis that XTF's released code reads.
    * ``to_prompt``: sum of A[i, j] over the keys j <= i that are ``prompt`` tokens.

    Weights are float32 (float64 stays), from the layer's own queries and keys, at most `CHUNK` at a
    time. They carry no gradient.

    Attributes:
        layer: index of the layer; a negative one counts from the end.
        kind: which number.
        prompt: for ``to_prompt``, which tokens of the packed row are a prompt's: bool, (T,), on the
            device. It belongs to one batch: set it before each pass.
        values: after a pass, float32, (T,) over the packed row.
    """

    layer: int
    kind: Reading
    prompt: Tensor | None = None
    values: Tensor | None = None

    @torch.no_grad()
    def read(self, query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> None:
        """Fill ``values``; arguments as in `segment_attention`, without the first dimension.

        A checkpointed layer calls this again in the backward pass, with equal results.
        """
        assert self.kind != "to_prompt" or self.prompt is not None
        dtype = torch.promote_types(query.dtype, torch.float32)
        parts, start = [], 0
        for count, length in _groups(lengths, CHUNK // len(query)):
            here = slice(start, start := start + count * length)
            q, k = (
                x[:, here].to(dtype).unflatten(1, (count, length)).transpose(0, 1)
                for x in (query, key)
            )
            prompt = None if self.prompt is None else self.prompt[here].view(count, length)
            with torch.autocast(query.device.type, enabled=False):
                parts.append(self._of_samples(q, k, prompt, scale).flatten())
        self.values = torch.cat(parts).float()

    def _of_samples(
        self, query: Tensor, key: Tensor, prompt: Tensor | None, scale: float
    ) -> Tensor:
        """Of B samples of L tokens: query (B, heads, L, D), key (B, kv heads, L, D) -> (B, L)."""
        samples, heads, length, _ = query.shape
        received = self.kind == "received"
        first = int(received)  # leading keys that are left out
        result = query.new_zeros(samples, length)
        rows = max(1, CHUNK // (samples * heads * length))
        for start in range(first, length, rows):
            stop = min(start + rows, length)
            # Heads that share a key head lie end to end, so keys need no copies.
            q = query[:, :, start:stop].reshape(samples, key.shape[1], -1, query.shape[-1])
            scores = q @ key[:, :, first:stop].transpose(2, 3) * scale
            scores = scores.view(samples, heads, stop - start, stop - first)
            diagonal = start - first
            future = scores.new_ones(scores.shape[2:], dtype=torch.bool).triu_(diagonal + 1)
            weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
            if received:
                weights.diagonal(diagonal, -2, -1).zero_()  # a token is no later query of its own
                result[:, first:stop] += weights.sum(2).mean(1)
            elif self.kind == "keys":
                result[:, start:stop] = weights.sum(-1).mean(1) / length
            else:
                assert prompt is not None
                to_prompt = weights.mean(1) @ prompt[:, :stop, None].to(weights.dtype)
                result[:, start:stop] = to_prompt[..., 0]
        if received:
            later = torch.arange(length - 1, -1, -1, device=query.device)
            result = (result / later).masked_fill_(later == 0, torch.nan)
            result[:, 0] = torch.nan
        return result


def check_layer(layer: int, config: Any, option: str) -> None:
    """Refuse a layer that a model does not have.

    Raises:
        ValueError: naming the option.
    """
    layers = config.get_text_config().num_hidden_layers
    if not -layers <= layer < layers:
        raise ValueError(
            f"{option}: there is no layer {layer}; the model has {layers}, numbered 0 to "
            f"{layers - 1} (or -1 to {-layers} from the end)"
        )


def default_layer(config: Any) -> int:
    """A deep layer, three quarters up: early ones attend by position, the last to what follows."""
    return int(0.75 * config.get_text_config().num_hidden_layers)


@dataclass
class Segments:
    """Where the samples of a packed row begin and end.

    Attributes:
        lengths: tokens of each sample.
        bounds: 0 and the running sum of ``lengths``, int32, shape (samples + 1,), on the device.
        varlen: use one variable-length attention call where the hardware has it.
        readers: readers of the attention weights, by the index of their layer.
    """

    lengths: list[int]
    bounds: Tensor
    varlen: bool = True
    readers: dict[int, list[AttentionReader]] = field(default_factory=dict)


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
    for reader in segments.readers.get(getattr(module, "layer_idx", -1), []):
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        reader.read(query[0].detach(), key[0].detach(), segments.lengths, scale)
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


def _groups(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(how many, length) of neighbours of equal length, whose squares sum to ``most`` at most."""
    for length, run in groupby(lengths):
        left, size = sum(1 for _ in run), max(1, most // length**2)
        while left > 0:
            yield min(left, size), length
            left -= size


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
