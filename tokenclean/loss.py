"""Per-token negative log-likelihood, the one kernel under scoring and training.

Legend for shapes: N chosen tokens, H hidden size, V vocabulary.

The caller hands over only the hidden rows that predict chosen tokens (row ``j - 1`` predicts token
``j``; `tokenclean.data.batches` does that shift, once). Logits exist for one chunk of rows at a
time, always in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rows per chunk: large enough for an efficient matrix product, small enough to bound memory
#: (1,024 rows of a 128k vocabulary are 0.5 GB in float32).
CHUNK_ROWS = 1024


@dataclass
class Head:
    """What turns hidden rows into logits: ``softcap(scale * (h @ weight.T + bias))``.

    Attributes:
        weight: output embedding, shape (V, H); frozen or trained.
        bias: shape (V,), or None as in most causal models.
        scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        softcap: ``c * tanh(z / c)`` on the scaled logits (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def token_nll(hidden: Tensor, head: Head, targets: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Negative log-likelihood of each target token, ``-log p(target | context)`` in nats.

    The loss of Eq. (1) in arXiv 2502.01968 and both terms of the score, Eq. (3).

    Args:
        hidden: final hidden states of the predicting rows, shape (N, H), any float dtype.
        head: the model's output head.
        targets: token ids, int64, shape (N,).
        chunk_rows: rows whose logits exist at once.

    Returns:
        float32, shape (N,). Differentiable in ``hidden`` and in the head's weight and bias.
    """
    nll: Tensor = _ChunkedNLL.apply(
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, chunk_rows
    )
    return nll


def greedy_tokens(hidden: Tensor, head: Head, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """The most likely token of every row: int64, shape (N,), for ``hidden`` of shape (N, H)."""
    with torch.no_grad():
        parts = [
            _logits(
                hidden[i : i + chunk_rows], head.weight, head.bias, head.scale, head.softcap
            ).argmax(-1)
            for i in range(0, len(hidden), chunk_rows)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.int64)


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Float32 logits of one chunk (float64 for a float64 head).

    16-bit operands are multiplied exactly and summed in float32: rounding the logits to 16 bits
    would cost as much as the differences that the score is made of.
    """
    dtype = _matmul_dtype(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if dtype in (torch.float32, torch.float64):
            logits = hidden @ weight.T
        elif hidden.is_cuda:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ weight.float().T
        if bias is not None:
            logits += bias.to(logits.dtype)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    return logits


class _ChunkedNLL(torch.autograd.Function):
    """Cross-entropy whose logits live for one chunk.

    Each row's loss depends on that row alone, so with a frozen head the gradient with respect to
    the hidden rows is formed during the forward pass and scaled by the incoming gradient later:
    one matrix product fewer than recomputing. A trained head recomputes its chunk in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk_rows: int,
    ) -> Tensor:
        result_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        nll = torch.empty(len(targets), dtype=result_dtype, device=hidden.device)
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_now = ctx.needs_input_grad[0] and not head_trained
        grad_hidden = torch.empty_like(hidden) if grad_now else None
        for i in range(0, len(targets), chunk_rows):
            rows = slice(i, i + chunk_rows)
            logits = _logits(hidden[rows], weight, bias, scale, softcap)
            nll[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
            if grad_hidden is not None:
                slope = _logit_slope(logits, targets[rows], scale, softcap)
                grad_hidden[rows] = _times(slope, weight).to(hidden.dtype)
        ctx.options = (scale, softcap, chunk_rows, head_trained)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        elif head_trained:
            ctx.save_for_backward(hidden, weight, bias, targets)
            # backward runs outside autocast: remember the product's dtype
            ctx.matmul_dtype = _matmul_dtype(weight)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scale, softcap, chunk_rows, head_trained = ctx.options
        if not head_trained:
            (grad_hidden,) = ctx.saved_tensors
            return (grad_hidden * grad[:, None].to(grad_hidden.dtype), *([None] * 6))
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if bias is not None else None
        cast = weight.to(ctx.matmul_dtype)
        for i in range(0, len(targets), chunk_rows):
            rows = slice(i, i + chunk_rows)
            logits = _logits(hidden[rows].to(cast.dtype), cast, bias, scale, softcap)
            slope = _logit_slope(logits, targets[rows], scale, softcap) * grad[rows, None]
            grad_hidden[rows] = _times(slope, cast).to(hidden.dtype)
            grad_weight += slope.T @ hidden[rows].to(slope.dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *([None] * 4),
        )


def _logit_slope(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """d nll / d (h @ W.T + b): softmax minus one-hot, through softcap and scale."""
    slope = logits.softmax(-1)
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    if softcap is not None:
        slope = slope * (1.0 - (logits / softcap) ** 2)
    return slope * scale if scale != 1.0 else slope


def _times(slope: Tensor, weight: Tensor) -> Tensor:
    """slope @ weight in the weight's own precision (16-bit products are summed in float32)."""
    with torch.autocast(slope.device.type, enabled=False):
        return slope.to(weight.dtype) @ weight
