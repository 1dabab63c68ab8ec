"""Per-token negative log-likelihood, the one kernel under scoring and training.

Legend for shapes: N chosen tokens, H hidden size, V vocabulary.

The caller hands over only the hidden rows that predict chosen tokens (row ``j - 1`` predicts token
``j``; `tokenclean.data.batches` does that shift, once). Logits exist for one chunk of rows at a
time, always in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Rows whose logits exist at once on an accelerator: large enough for an efficient matrix product,
#: small enough to bound memory (1,024 rows of a 128k vocabulary are 0.5 GB in float32).
CHUNK_ROWS = 1024
#: The same on a CPU, where half as many are as efficient.
CHUNK_ROWS_CPU = 512


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


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells of every target; float32, shape (N,) each.

    Attributes:
        nll: negative log-likelihood of the target, nats; the only one with a gradient.
        entropy: of the predicted distribution, nats.
        top_probability: of the most likely token.
        top_entropy: of the k most likely tokens alone, their probabilities scaled to sum to 1, in
            nats (so at most ln k); None unless asked for.
        top_mass: what those k probabilities sum to, unscaled; None unless asked for.
    """

    nll: Tensor
    entropy: Tensor
    top_probability: Tensor
    top_entropy: Tensor | None = None
    top_mass: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """log p(most likely token) - log p(target), nats, at least 0: float32, shape (N,)."""
        # Rounding may put the most likely token a hair below itself.
        return (self.nll + self.top_probability.log()).clamp_min(0.0)


def token_nll(hidden: Tensor, head: Head, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Negative log-likelihood of each target token, ``-log p(target | context)`` in nats.

    The loss of Eq. (1) in arXiv 2502.01968 and both terms of the score, Eq. (3). Weighted tokens
    are ``(token_nll(...) * weights).sum()``: the gradient of every row is scaled by its weight.

    Args:
        hidden: final hidden states of the predicting rows, shape (N, H), any float dtype.
        head: the model's output head.
        targets: token ids, int64, shape (N,).
        chunk_rows: rows whose logits exist at once; by default what suits the device.

    Returns:
        float32, shape (N,). Differentiable in ``hidden`` and in the head's weight and bias.
    """
    nll: Tensor = _ChunkedNLL.apply(
        hidden, head.weight, head.bias, targets, head, chunk_rows, None, 0
    )
    return nll


def token_statistics(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunk_rows: int | None = None,
    top: int = 0,
) -> TokenStatistics:
    """`token_nll` with entropy and top probability from the same logits.

    Takes the arguments of `token_nll` and has its gradient.

    Args:
        top: also entropy and mass of this many most likely tokens (of all V, if fewer); 0: not.
    """
    rows = 4 if top else 2
    extras = torch.empty(rows, len(targets), dtype=_result_dtype(head.weight), device=hidden.device)
    nll: Tensor = _ChunkedNLL.apply(
        hidden, head.weight, head.bias, targets, head, chunk_rows, extras, top
    )
    return TokenStatistics(nll, *extras)


def greedy_tokens(hidden: Tensor, head: Head, chunk_rows: int | None = None) -> Tensor:
    """The most likely token of every row: int64, shape (N,), for ``hidden`` of shape (N, H)."""
    with torch.no_grad():
        parts = [
            _logits(hidden[rows], head.weight, head).argmax(-1)
            for rows in _chunks(hidden, len(hidden), chunk_rows)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.int64)


def _chunks(hidden: Tensor, rows: int, chunk_rows: int | None) -> Iterator[slice]:
    size = chunk_rows or (CHUNK_ROWS_CPU if hidden.device.type == "cpu" else CHUNK_ROWS)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _result_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _logits(hidden: Tensor, weight: Tensor, head: Head, dtype: torch.dtype | None = None) -> Tensor:
    """Float32 logits of one chunk (float64 for a float64 head), a tensor of the caller's own.

    16-bit operands are multiplied exactly and summed in float32: rounding the logits to 16 bits
    would cost as much as the differences that the score is made of.
    """
    dtype = dtype or _matmul_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if dtype in (torch.float32, torch.float64):
            logits = hidden @ weight.T
        elif hidden.is_cuda:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ weight.float().T
        if head.bias is not None:
            logits += head.bias.to(logits.dtype)
        if head.scale != 1.0:
            logits *= head.scale
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


class _ChunkedNLL(torch.autograd.Function):
    """Cross-entropy whose logits live for one chunk, and are worked on in place.

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
        head: Head,
        chunk_rows: int | None,
        extras: Tensor | None,
        most_likely: int,
    ) -> Tensor:
        nll = torch.empty(len(targets), dtype=_result_dtype(weight), device=hidden.device)
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_now = ctx.needs_input_grad[0] and not head_trained
        grad_hidden = torch.empty_like(hidden) if grad_now else None
        # backward runs outside autocast: remember the product's dtype
        dtype = _matmul_dtype(hidden, weight)
        cast = weight.to(dtype)
        for rows in _chunks(hidden, len(targets), chunk_rows):
            logits = _logits(hidden[rows], cast, head, dtype)
            of_target = logits.gather(1, targets[rows, None]).squeeze(1)
            steepness = _softcap_slope(logits, head) if grad_hidden is not None else None
            top, total, mean = _softmax_(logits, with_mean=extras is not None)
            nll[rows] = total.log() + (top - of_target)
            if extras is not None and mean is not None:
                extras[0, rows] = total.log() + top - mean
                extras[1, rows] = 1.0 / total
                if most_likely:
                    extras[2, rows], extras[3, rows] = _of_the_top(logits, total, most_likely)
            if grad_hidden is not None:
                slope = _nll_slope(logits, total, targets[rows], steepness, head)
                grad_hidden[rows] = _times(slope, cast).to(hidden.dtype)
        ctx.head, ctx.chunk_rows, ctx.head_trained, ctx.dtype = (
            head,
            chunk_rows,
            head_trained,
            dtype,
        )
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        elif head_trained:
            ctx.save_for_backward(hidden, weight, bias, targets)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.head_trained:
            (grad_hidden,) = ctx.saved_tensors
            return (grad_hidden * grad[:, None].to(grad_hidden.dtype), *([None] * 7))
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if bias is not None else None
        cast = weight.to(ctx.dtype)
        for rows in _chunks(hidden, len(targets), ctx.chunk_rows):
            logits = _logits(hidden[rows], cast, ctx.head, ctx.dtype)
            steepness = _softcap_slope(logits, ctx.head)
            _, total, _ = _softmax_(logits)
            slope = _nll_slope(logits, total, targets[rows], steepness, ctx.head)
            slope *= grad[rows, None]
            grad_hidden[rows] = _times(slope, cast).to(hidden.dtype)
            grad_weight += slope.T @ hidden[rows].to(slope.dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *([None] * 5),
        )


def _softmax_(logits: Tensor, with_mean: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn logits z, in place, into exp(z - max z).

    Returns:
        Per row: max z, the sum of what ``logits`` now holds, and, if asked for, the mean of z under
        the softmax; shape (rows,) each.
    """
    top = logits.amax(-1)
    logits -= top[:, None]
    if not with_mean:
        logits.exp_()
        return top, logits.sum(-1), None
    shifted = logits.clone()
    logits.exp_()
    total = logits.sum(-1)
    return top, total, (shifted.mul_(logits)).sum(-1) / total + top


def _of_the_top(exponentials: Tensor, total: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Entropy of each row's most likely tokens among themselves, and their probability."""
    largest = exponentials.topk(min(most, exponentials.shape[-1]), sorted=False).values
    mass = largest.sum(-1)
    largest /= mass[:, None]
    return torch.special.entr(largest).sum(-1), mass / total


def _softcap_slope(logits: Tensor, head: Head) -> Tensor | None:
    """Derivative of c tanh(z / c), from its value."""
    return None if head.softcap is None else 1.0 - (logits / head.softcap) ** 2


def _nll_slope(
    exponentials: Tensor, total: Tensor, targets: Tensor, steepness: Tensor | None, head: Head
) -> Tensor:
    """d nll / d (h @ W.T + b), in place: softmax minus one-hot, through softcap and scale."""
    slope = exponentials.div_(total[:, None])
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    if steepness is not None:
        slope *= steepness
    return slope.mul_(head.scale) if head.scale != 1.0 else slope


def _times(slope: Tensor, weight: Tensor) -> Tensor:
    """slope @ weight in the weight's own precision (16-bit products are summed in float32)."""
    with torch.autocast(slope.device.type, enabled=False):
        return slope.to(weight.dtype) @ weight
