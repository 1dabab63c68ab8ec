"""From a forward pass to online weights, over one micro-batch or over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenclean.data.batches import Batch
from tokenclean.loss import token_nll, token_statistics
from tokenclean.models import AttentionReader, Network
from tokenclean.training.weights import PROMPT_ATTENTION, TOP_ENTROPY, TOP_MASS, Tokens, Weighting


def weighted_pass(network: Network, batch: Batch, weighting: Weighting) -> tuple[Tensor, Tokens]:
    """One forward pass: losses, and what a weighting wants to know of the tokens.

    Args:
        batch: of at least one sample, carrying what ``weighting.carry`` names.

    Returns:
        Losses with their gradient, (N,), as `Network.forward` gives them; the tokens without, in
        the order of the batch.
    """
    reader = None
    if weighting.reads_prompt:
        assert batch.prompt is not None
        layer = weighting.attention_layer(network.hf.config)
        reader = AttentionReader(layer, "to_prompt", batch.prompt.flatten())
    hidden = network.hidden(batch, () if reader is None else reader)
    found = {need: batch.extra[column] for need, column in weighting.stored.items()}
    if weighting.top:
        nll, _, _, entropy, mass = token_statistics(
            hidden, network.head, batch.targets, top=weighting.top
        )
        assert entropy is not None and mass is not None
        found |= {TOP_ENTROPY: entropy, TOP_MASS: mass}
    else:
        nll = token_nll(hidden, network.head, batch.targets)
    if reader is not None:
        assert reader.values is not None
        # The token's own row, not the one before, which predicts it.
        found[PROMPT_ATTENTION] = reader.values[batch.predicting + 1]
    rows = _repeated(batch.rows, batch.counts).to(nll.device)
    half = hidden.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(
        hidden.device.type
    )
    columns = {k: v.double() for k, v in found.items()}
    return nll, Tokens(rows, nll.detach().double(), columns, 0.2 if half else 1e-3)


def _repeated(values: list[int], counts: list[int]) -> Tensor:
    """``values[i]``, ``counts[i]`` times, for every i: int64."""
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))


def weigh_globally(weighting: Weighting, mine: list[Tokens], trainer: Any) -> list[Tensor]:
    """Weights from the tokens of all processes together.

    Every process must call it, with or without tokens of its own; at least one must have some.

    Args:
        mine: this process's micro-batches.

    Returns:
        The weights of each of them, float64, (N,).
    """
    device = trainer.strategy.root_device
    empty = torch.zeros(0, 2 + len(weighting.columns), dtype=torch.float64, device=device)
    everyone = packed = torch.cat([empty, *(tokens.packed() for tokens in mine)])
    start = 0
    if trainer.world_size > 1:
        everyone, start = _gathered(packed, trainer)
    weights = weighting.weigh(Tokens.unpacked(everyone, weighting.columns))
    own = weights[start : start + len(packed)]
    return list(own.split([len(tokens) for tokens in mine]))


def _gathered(mine: Tensor, trainer: Any) -> tuple[Tensor, int]:
    """Rows (n, c) of all processes end to end, and where this one's begin."""
    gather = trainer.strategy.all_gather
    counts = gather(torch.tensor([len(mine)], device=mine.device)).flatten().tolist()
    # Processes can only exchange tensors of equal shape.
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    parts = [part[:count] for part, count in zip(gather(padded), counts, strict=True)]
    return torch.cat(parts), sum(counts[: trainer.global_rank])
