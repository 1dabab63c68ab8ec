"""Leaner passes through a transformers model: the same numbers with less work.

* A LoRA linear in one autograd step: updates are added in place, nothing is cast to float32, and
  the frozen weight keeps no activations.
* The last decoder layer computes its output projection, norm and MLP only at the rows that predict
  a target; its keys and values come from every row.
* `in_float32` runs 16-bit weights in float32, a layer at a time.
* Opt-in, approximate: the backward pass goes through the rows that predict kept tokens only.

All hook into modules that are already there, so names, weights and checkpoints stay transformers'
and peft's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class BackwardRows:
    """Hidden rows, of the flattened B * T, that gradients of the pass in progress flow through.

    Says nothing about values: whatever it holds, a forward pass computes the same.

    Attributes:
        chosen: their indices, int64, (N,), or None: all rows, the exact gradient.
        total: B * T.
    """

    chosen: Tensor | None = None
    total: int = 0

    def of(self, x: Tensor) -> Tensor | None:
        """Rows of ``x`` with a gradient; None for all.

        The last layer may hand over nothing but chosen rows already.
        """
        return self.chosen if x.shape[:-1].numel() == self.total else None


# -- precision --------------------------------------------------------------------------------


class _Float32(TorchFunctionMode):
    """Products and embeddings in float32, each weight widened for its own product alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _WIDENED:
            args = tuple(_widened(x) for x in args)
            named = {k: _widened(x) for k, x in named.items()}
        result = func(*args, **named)
        return result.float() if func is F.embedding and _is_half(result) else result


#: Functions that mix an activation with weights (`addmm`: GPT-2's linears).
_WIDENED = {
    *(F.linear, F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm),
    *(torch.addmm, torch.matmul, torch.bmm, torch.baddbmm),
}


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


def _widened(x: Any) -> Any:
    return x.float() if _is_half(x) else x


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 whatever the weights' dtype, without a float32 copy of the model."""
    with torch.autocast(device.type, enabled=False), _Float32():
        yield


# -- LoRA -------------------------------------------------------------------------------------


def lean_lora(model: nn.Module, rows: BackwardRows) -> None:
    """Give every plain LoRA linear of a model the lean forward pass (4-bit ones keep peft's)."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            # past nn.Module's own bookkeeping: these are neither parameters nor parts
            module.__dict__.update(forward=MethodType(_lora_forward, module), backward_rows=rows)


def peft_lora(model: nn.Module) -> None:
    """Undo `lean_lora`."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__dict__.pop("forward", None)


def _lora_forward(module: Any, x: Tensor) -> Tensor:
    """``x W.T + b + sum_i s_i drop_i(x) A_i.T B_i.T`` over the active adapters."""
    base = module.base_layer
    active = [] if module.disable_adapters else module.active_adapters
    scales, tensors = [], []
    for name in active:
        if name in module.lora_A:
            dropped = module.lora_dropout[name](x)
            scales.append(module.scaling[name])
            tensors += [
                None if dropped is x else dropped,
                module.lora_A[name].weight,
                module.lora_B[name].weight,
            ]
    if not scales:
        return base(x)
    rows = module.backward_rows.of(x)
    result: Tensor = _LoraProduct.apply(x, base.weight, base.bias, rows, tuple(scales), *tensors)
    return result


class _LoraProduct(torch.autograd.Function):
    """A frozen linear with LoRA updates; gradients for its input and the updates.

    ``tensors`` holds (dropped input or None, A, B) of each adapter in turn. With ``rows`` the other
    rows' gradients are taken for zero: approximate.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        scales: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.promote_types(x.dtype, weight.dtype)

        def flat(value: Tensor) -> Tensor:
            return value.reshape(-1, value.shape[-1]).to(dtype)

        def kept(value: Tensor) -> Tensor:
            return value if rows is None else value[rows]

        saved: list[Tensor | None] = [weight, rows]
        with torch.autocast(device, enabled=False):
            wide = flat(x)
            result = F.linear(wide, weight.to(dtype), None if bias is None else bias.to(dtype))
            for i, scale in enumerate(scales):
                dropped, a, b = tensors[3 * i : 3 * i + 3]
                assert a is not None and b is not None
                inputs = wide if dropped is None else flat(dropped)
                inner = inputs @ a.to(dtype).T
                result.addmm_(inner, b.to(dtype).T, alpha=scale)
                trained = any(ctx.needs_input_grad[5 + 3 * i + 1 : 5 + 3 * i + 3])
                saved += [a, b, kept(inputs) if trained else None, kept(inner) if trained else None]
        ctx.save_for_backward(*saved)
        ctx.scales, ctx.dtype, ctx.shape = scales, dtype, x.shape
        ctx.input_dtypes = (x.dtype, *(t.dtype for t in tensors[::3] if t is not None))
        ctx.dropped = [t is not None for t in tensors[::3]]
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows, *saved = ctx.saved_tensors
        dtype = ctx.dtype
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(dtype)
        if rows is not None:
            grad = grad[rows]

        def whole(value: Tensor) -> Tensor:
            if rows is not None:
                value = value.new_zeros(ctx.shape[:-1].numel(), value.shape[-1]).index_copy_(
                    0, rows, value
                )
            return value.view(ctx.shape).to(ctx.input_dtypes[0])

        grad_x = grad @ weight.to(dtype) if ctx.needs_input_grad[0] else None
        of_adapters: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            a, b, inputs, inner = saved[4 * i : 4 * i + 4]
            needs_dropped, needs_a, needs_b = ctx.needs_input_grad[5 + 3 * i : 8 + 3 * i]
            grad_inner = (grad @ b.to(dtype)) * scale
            grad_a = (grad_inner.T @ inputs).to(a.dtype) if needs_a else None
            grad_b = (grad.T @ inner).mul_(scale).to(b.dtype) if needs_b else None
            grad_dropped = None
            if ctx.dropped[i]:
                grad_dropped = whole(grad_inner @ a.to(dtype)) if needs_dropped else None
            elif grad_x is not None:
                grad_x.addmm_(grad_inner, a.to(dtype))
            of_adapters += [grad_dropped, grad_a, grad_b]
        return (None if grad_x is None else whole(grad_x), None, None, None, None, *of_adapters)


# -- the last layer ---------------------------------------------------------------------------

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def gather_last_layer(model: Any) -> bool:
    """Have the last decoder layer finish only the rows that predict a target.

    A call with ``predicting``, int64 (N,) indices into the flattened B * T, then returns last
    hidden states of shape (1, N, H); a call without it is an ordinary one. Only for pre-norm layers
    of the usual four parts; whether the numbers agree is for the caller to try.

    Returns:
        Whether the model has such a layer.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    layer: Any = layers[-1]
    if {name for name, _ in layer.named_children()} != _PARTS or not hasattr(
        layer.self_attn, "o_proj"
    ):
        return False

    def forward(
        self: Any, hidden_states: Tensor, predicting: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if predicting is None:
            result: Tensor = type(self).forward(self, hidden_states, **kwargs)
            return result

        def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, -2)[predicting][None], *args[1:])

        # Looked up anew each time: peft puts its own module there and takes it away again.
        hook = self.self_attn.o_proj.register_forward_pre_hook(gather)
        try:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states), **kwargs
            )
        finally:
            hook.remove()
        states: Tensor = hidden_states.flatten(0, 1)[predicting][None] + attended
        return states + self.mlp(self.post_attention_layernorm(states))

    layer.forward = MethodType(forward, layer)
    return True


def whole_last_layer(model: Any) -> None:
    """Undo `gather_last_layer`."""
    model.layers[-1].__dict__.pop("forward", None)
