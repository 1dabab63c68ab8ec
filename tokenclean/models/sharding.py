"""FSDP2 under a network: each process holds a part of every decoder layer and all of the rest.

Embeddings, last norm and head stay whole: losses are computed from the head's weight outside of its
module. What is trained of them is averaged by hand. Every pass gathers layers from all processes,
so each process must make as many as the others, in scoring as in training; `no_samples` fills up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tokenclean.data.batches import Batch, Layout, Sample, collate

#: pool row of a sample that is none
_NOBODY = -1


def shard(hf: Any, device: torch.device) -> None:
    """Split the decoder layers of a transformers model over all processes.

    Raises:
        ValueError: if it is not built of a list of layers, or its weights are quantised.
    """
    base = hf.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"trainer.strategy: the layers of {type(hf).__name__} are not known well enough to "
            "shard them; take ddp, which keeps the whole model on every device"
        )
    if getattr(hf, "is_quantized", False):
        raise ValueError(
            "trainer.strategy: 4-bit weights cannot be sharded; take ddp, which keeps the whole "
            "model on every device"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    within = {id(p) for p in layers.parameters()}
    whole = {p for p in base.parameters() if id(p) not in within}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # A root without weights of its own: it lets the layers run ahead of one another.
    fully_shard(base, mesh=mesh, ignored_params=whole)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


@torch.no_grad()
def gather(module: nn.Module) -> None:
    """Put whole weights, on the CPU, into the first process's module; all processes must call it.

    Nothing is computed with the module any more after that.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                if dist.get_rank() == 0:
                    kept = nn.Parameter(whole.cpu(), requires_grad=parameter.requires_grad)
                    part.register_parameter(name, kept)


def whole_and_sharded(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that every process has all of, and those that it has a part of."""
    given = list(parameters)
    sharded: list[Tensor] = [p for p in given if isinstance(p, DTensor)]
    return [p for p in given if not isinstance(p, DTensor)], sharded


def average_whole(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of what is not sharded over the processes, as FSDP does the rest."""
    for parameter in whole_and_sharded(parameters)[0]:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def clip_gradient(parameters: Sequence[Tensor], limit: float) -> float:
    """As `torch.nn.utils.clip_grad_norm_`, over whole and sharded tensors together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    whole, sharded = whole_and_sharded(gradients)
    square = torch.zeros((), dtype=torch.float64, device=local(gradients[0]).device)
    for gradient in sharded:
        square += local(gradient).double().square().sum()
    dist.all_reduce(square)
    for gradient in whole:
        square += gradient.double().square().sum()
    norm = math.sqrt(float(square)) if torch.isfinite(square) else math.nan
    scale = min(limit / (norm + 1e-6), 1.0)
    if math.isfinite(limit) and scale < 1.0:
        for gradient in gradients:
            local(gradient).mul_(scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_number(batches: list[Batch], layout: Layout, device: torch.device) -> list[Batch]:
    """As many batches as the process with the most has; those added have one token of weight 0."""
    most = torch.tensor([len(batches)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    missing = int(most) - len(batches)
    return [*batches, *[no_samples(layout).to(device) for _ in range(missing)]]


def no_samples(layout: Layout) -> Batch:
    """A pass that says nothing: one token that predicts another, with weight 0."""
    ids = np.zeros(2, dtype=np.int32)
    weight = np.zeros(1, dtype=np.float32)
    return collate([Sample(_NOBODY, ids, np.ones(1, dtype=np.int64), weight)], layout)


def is_filler(batch: Batch) -> bool:
    """Whether `same_number` added it."""
    return batch.rows == [_NOBODY]
