"""What a pass costs before it is run, from the model's shape alone: FLOPs, bytes, does it fit.

FLOPs are *useful* ones: two per weight, token and multiplication that the result needs. Padding,
recomputation (checkpointing, the attention kernel's own) and frozen adapters, which could be merged
into the weights, do not count, so that achieved FLOP/s can be compared between implementations.

Legend for shapes: T tokens, N targets, H hidden, I MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tokenclean.data.batches import plan_epoch
from tokenclean.loss import CHUNK_ROWS
from tokenclean.machine import free_memory
from tokenclean.models import LoraSettings

#: Share of the measured matmul rate that a pass reaches when its products are large enough to fill
#: the device; a model of a few million parameters stays far below it.
EFFICIENCY = {"score": 0.6, "train": 0.5, "evaluate": 0.6}
#: Share of the free memory that is planned with: allocators fragment, and others use it too.
USABLE = 0.9
#: Trained float32 weights, their gradients and AdamW's two moments.
TRAINED_BYTES = 16
#: NF4 with double quantisation: 4 bits and 0.127 bits of scales (arXiv 2305.14314, section 3).
NF4_BYTES = 4.127 / 8
#: Modules that read one and the same tensor, which is then kept once.
_SHARED_INPUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp"),
}


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need to know of a causal LM.

    Attributes:
        linears: (name, inputs, outputs) of every linear module except the output head.
        linear_weights: weights that each token is multiplied by, the head left out; of a mixture of
            experts, those of the experts that one token visits.
        parameters: all parameters, a tied head counted once.
        layered: those of the decoder layers, which FSDP2 splits; 0 if there is no list of layers.
        hidden: H.
        intermediate: width of the MLP, I.
        layers: L.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        norms: normalisations of width H, the final one included.
        vocab: V.
    """

    linears: tuple[tuple[str, int, int], ...]
    linear_weights: int
    parameters: int
    layered: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: int
    vocab: int

    @classmethod
    def of_config(cls, config: Any, trust_remote_code: bool = False) -> ModelShape:
        """The shape behind a transformers config; the model is built without memory for weights.

        Args:
            config: of any causal LM that `AutoModelForCausalLM` knows.
            trust_remote_code: see `BaseConfig`.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        head = model.get_output_embeddings()
        decoder = getattr(model.base_model, "layers", None)
        linears, weights, norms = [], 0, 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) or module is head:
                continue
            for key, parameter in module.named_parameters(recurse=False):
                shape = tuple(parameter.shape)
                if len(shape) == 2:
                    weights += parameter.numel()
                    if key == "weight":
                        # A Conv1D (GPT-2) stores its weight the other way round.
                        turned = isinstance(module, nn.Linear)
                        linears.append((name, *(reversed(shape) if turned else shape)))
                elif len(shape) == 3:
                    # All experts of a layer in one tensor, (experts, outputs, inputs).
                    active = getattr(text, "num_experts_per_tok", None) or shape[0]
                    weights += parameter.numel() * active // shape[0]
                elif key == "weight" and shape == (text.hidden_size,):
                    norms += 1
        heads = text.num_attention_heads
        return cls(
            linears=tuple(linears),
            linear_weights=weights,
            parameters=sum(p.numel() for p in model.parameters()),
            layered=sum(p.numel() for p in decoder.parameters()) if decoder is not None else 0,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            norms=norms,
            vocab=text.vocab_size,
        )

    def adapted(self, lora: LoraSettings) -> list[tuple[str, int, int]]:
        """The linear modules that get an adapter: a target's name ends theirs, as in peft."""
        return [
            linear
            for linear in self.linears
            if any(linear[0] == t or linear[0].endswith(f".{t}") for t in lora.target_modules)
        ]

    def trained(self, lora: LoraSettings | None) -> int:
        """Parameters that are trained: r * (in + out) per adapted module, or all."""
        if lora is None:
            return self.parameters
        return sum(lora.r * (inputs + outputs) for _, inputs, outputs in self.adapted(lora))


@dataclass(frozen=True)
class Work:
    """How much goes through the model.

    Attributes:
        samples: rows that are computed (those with a target).
        tokens: their tokens, up to each row's last target; padding left out.
        pairs: (token, token it attends to), sum of n (n + 1) / 2 over rows of n tokens.
        targets: tokens to predict.
    """

    samples: int = 0
    tokens: int = 0
    pairs: int = 0
    targets: int = 0

    @classmethod
    def of(cls, lengths: np.ndarray, counts: np.ndarray) -> Work:
        """Of rows with so many input tokens and targets each, both of shape (R,)."""
        n = np.asarray(lengths, dtype=np.int64)
        pairs = int((n * (n + 1) // 2).sum())
        return cls(int((n > 0).sum()), int(n.sum()), pairs, int(np.sum(counts)))

    @classmethod
    def of_steps(
        cls,
        lengths: np.ndarray,
        counts: np.ndarray,
        batch_size: int,
        seed: int,
        steps: int,
        per_epoch: int,
    ) -> Work:
        """Of the first ``steps`` optimiser steps, ``per_epoch`` to an epoch; see `plan_epoch`."""
        total = cls()
        for epoch in range(-(-steps // per_epoch)):
            first = min(per_epoch, steps - epoch * per_epoch)
            chosen = np.concatenate(plan_epoch(len(lengths), batch_size, seed, epoch)[:first])
            total += cls.of(lengths[chosen], counts[chosen])
        return total

    def __add__(self, other: Work) -> Work:
        return Work(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.targets + other.targets,
        )

    def __mul__(self, times: int) -> Work:
        return Work(
            self.samples * times, self.tokens * times, self.pairs * times, self.targets * times
        )


# -- FLOPs ------------------------------------------------------------------------------------


def _parts(shape: ModelShape, work: Work) -> tuple[int, int, int]:
    """FLOPs of one forward pass: linear modules, attention, output head.

    Attention is two products (Q K^T and P V) over the pairs that the causal mask leaves, in every
    layer and with every query head. With a sliding window fewer pairs count: then an upper bound.
    """
    linear = 2 * shape.linear_weights * work.tokens
    attention = 4 * shape.layers * shape.heads * shape.head_dim * work.pairs
    head = 2 * shape.hidden * shape.vocab * work.targets
    return linear, attention, head


def forward_flops(shape: ModelShape, work: Work) -> int:
    """FLOPs of a scoring pass: the head at targets only."""
    return sum(_parts(shape, work))


def lora_flops(shape: ModelShape, tokens: int, lora: LoraSettings) -> int:
    """FLOPs of one forward pass through an adapter's A and B: 2 r (in + out) per module."""
    return 2 * shape.trained(lora) * tokens


def training_flops(
    shape: ModelShape, work: Work, lora: LoraSettings | None, checkpointing: bool = False
) -> int:
    """FLOPs of forward and backward.

    A frozen weight is used twice (output, gradient of its input), a trained one three times (and
    its own gradient). Attention has no weights: its two products have two gradients each, so it
    counts three times, frozen or not. Not taken off: the gradient of the embeddings, which nobody
    needs under LoRA (query, key and value of the first layer, 0.3 % at 1B).

    Args:
        shape: of the model.
        work: what goes through it.
        lora: the adapter in training, or None where all weights are trained.
        checkpointing: add the second forward pass that is then executed; not useful work.
    """
    linear, attention, head = _parts(shape, work)
    adapter = 0 if lora is None else lora_flops(shape, work.tokens, lora)
    weights = 2 if lora is not None else 3
    again = linear + attention + adapter if checkpointing else 0
    return weights * (linear + head) + 3 * (attention + adapter) + again


# -- bytes ------------------------------------------------------------------------------------


def parameter_bytes(shape: ModelShape, dtype: torch.dtype, four_bit: bool = False) -> int:
    """Bytes of the weights; 4-bit bases keep embeddings, head and norms in ``dtype``."""
    quantised = sum(i * o for _, i, o in shape.linears) if four_bit else 0
    return int((shape.parameters - quantised) * dtype.itemsize + quantised * NF4_BYTES)


def adapter_bytes(shape: ModelShape, lora: LoraSettings) -> int:
    """Bytes of one adapter, in memory and on disk: float32."""
    return 4 * shape.trained(lora)


def activation_bytes(
    shape: ModelShape,
    tokens: int,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> int:
    """What autograd keeps of one micro-batch between forward and backward, in bytes.

    Per token, c being ``dtype``'s size in bytes, of each layer: the inputs of its norms (float32,
    4 H each); queries, keys, values and the attention's output, c (2 heads + 2 kv heads) head_dim;
    gate, SiLU(gate) and up, 3 c I. For dA the input of every adapted module, once where several
    read the same tensor; with dropout each has its own, and a mask of one byte per element (on a
    CPU the mask takes c bytes, which is not counted). For dB the product A x, c r per module. Full
    fine-tuning keeps every linear module's input, and each norm's output before its scale (4 H).
    After the last layer: the hidden states that predict targets and their gradient, 2 c H, as if
    every token were a target.

    Checkpointing keeps each layer's input alone, c H, and the above for one layer at a time.

    Args:
        shape: of the model; the formula is a Llama block's.
        tokens: in the micro-batch, T.
        lora: the adapter in training, or None where all weights are trained.
        dtype: that products are computed in.
        checkpointing: whether activations are recomputed.
    """
    c, h = dtype.itemsize, shape.hidden
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * c + 4 * shape.heads
    kept = shape.layers * (attention + 3 * shape.intermediate * c) + shape.norms * 4 * h
    modules = shape.linears if lora is None else shape.adapted(lora)
    # In full fine-tuning under autocast every module casts its input for itself.
    share = not lora.dropout if lora is not None else c == 4
    inputs: dict[tuple[str, str], int] = {}
    for name, width, _ in modules:
        parent, _, leaf = name.rpartition(".")
        inputs[parent, _SHARED_INPUT.get(leaf, leaf) if share else leaf] = width
    kept += c * sum(inputs.values())
    if lora is None:
        kept += shape.norms * 4 * h
    else:
        kept += c * lora.r * len(modules) + (sum(inputs.values()) if lora.dropout else 0)
    if checkpointing:
        kept = shape.layers * c * h + kept // shape.layers
    return tokens * (kept + 2 * c * h)


def working_bytes(shape: ModelShape, tokens: int, dtype: torch.dtype, training: bool) -> int:
    """What lives for a moment only: the inside of one MLP and norm, and one chunk of logits.

    Per token 3 c I + 3 c H and one float32 copy of H; per row of the chunk one float32 row of V,
    and in training its gradient in ``dtype`` if that is a 16-bit one.
    """
    c = dtype.itemsize
    inside = tokens * (3 * c * (shape.intermediate + shape.hidden) + 4 * shape.hidden)
    return inside + min(tokens, CHUNK_ROWS) * shape.vocab * (4 + (c % 4 if training else 0))


@dataclass(frozen=True)
class Setting:
    """How a pass is run, as far as memory is concerned.

    Attributes:
        lora: the adapter in training; None trains all weights (or, in scoring, has no meaning).
        training: whether there is a backward pass.
        weights: dtype of the weights.
        compute: dtype of products (under ``bf16-mixed`` bfloat16).
        four_bit: see `BaseConfig`.
        stack: frozen adapters of ``lora``'s size beneath.
        split: processes that hold a part of every decoder layer each (FSDP2); 1 holds all whole.
    """

    lora: LoraSettings | None = None
    training: bool = True
    weights: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    four_bit: bool = False
    stack: int = 0
    split: int = 1


def standing_bytes(shape: ModelShape, setting: Setting) -> int:
    """Weights, adapters, gradients and optimiser: what is there whatever the micro-batch's size.

    Split, a process holds its part of what is in the decoder layers, where adapters are, and all of
    the rest.
    """
    split = setting.split
    layered = _layered_bytes(shape, setting)
    whole = parameter_bytes(shape, setting.weights, setting.four_bit) - layered
    if setting.lora is None:
        adapters = 0
    else:
        trained = TRAINED_BYTES * shape.trained(setting.lora) if setting.training else 0
        adapters = trained + setting.stack * adapter_bytes(shape, setting.lora)
    if setting.lora is not None or not setting.training:
        return whole + -(-(layered + adapters) // split)
    # The trained weights are the model's own; autocast holds on to their 16-bit copies.
    each = TRAINED_BYTES + setting.compute.itemsize % 4
    return each * (shape.parameters - shape.layered) + -(-each * shape.layered // split)


def _layered_bytes(shape: ModelShape, setting: Setting) -> int:
    """Bytes of the decoder layers' weights, before they are split."""
    outside = (shape.parameters - shape.layered) * setting.weights.itemsize
    return parameter_bytes(shape, setting.weights, setting.four_bit) - outside


def peak_bytes(
    shape: ModelShape, setting: Setting, tokens: int, checkpointing: bool = False
) -> int:
    """Expected peak of a pass whose largest micro-batch has so many tokens.

    Of weights that are split two layers are whole at a time: one computes, the next one arrives.
    """
    moving = working_bytes(shape, tokens, setting.compute, setting.training)
    if setting.split > 1:
        moving += 2 * _layered_bytes(shape, setting) // shape.layers
    if setting.weights != setting.compute:
        # The head is cast once per micro-batch.
        moving += setting.compute.itemsize * shape.vocab * shape.hidden
    if setting.training:
        moving += activation_bytes(shape, tokens, setting.lora, setting.compute, checkpointing)
    return standing_bytes(shape, setting) + moving


def largest_budget(
    shape: ModelShape, setting: Setting, room: int, checkpointing: bool = False
) -> int:
    """The largest micro-batch, in tokens, whose peak stays within ``room`` bytes, or 0."""
    low, high = 0, 1
    while peak_bytes(shape, setting, high, checkpointing) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak_bytes(shape, setting, middle, checkpointing) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def needs_checkpointing(
    shape: ModelShape,
    budget: int,
    lora: LoraSettings | None,
    device: torch.device | str,
    *,
    weights: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
    four_bit: bool = False,
    stack: int = 0,
    resident: bool = True,
    free: int | None = None,
) -> bool:
    """Whether activations of a micro-batch must be recomputed to fit into the memory at hand.

    Args:
        shape: of the model.
        budget: tokens per micro-batch.
        lora: the adapter to train, or None for all weights.
        device: where it will be trained.
        weights: dtype of the weights.
        compute: dtype of products.
        four_bit: see `BaseConfig`.
        stack: frozen adapters beneath.
        resident: the weights are on ``device`` already, so that free memory is counted without
            them; a model that still waits on the CPU for its GPU is not.
        free: bytes at hand; by default `free_memory` is asked.
    """
    setting = Setting(lora, True, weights, compute, four_bit, stack)
    room = int(USABLE * (free_memory(device) if free is None else free))
    if resident:
        room += parameter_bytes(shape, weights, four_bit)
    return peak_bytes(shape, setting, budget) > room
