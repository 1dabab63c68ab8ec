"""Do high scores help? Gradients of parts of the score against that of held-out data.

The response tokens of a pool are cut into ten parts of equal size by their score. At the base with
a fresh LoRA (B = 0, so only the gradient of B is not zero), the gradient of the mean loss of each
part is compared with the gradient g of the mean loss of the validation pool: a small step along a
part's gradient lowers the validation loss by (learning rate) * <g_part, g>.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tokenclean.cleaning.loop import CleaningLoop
from tokenclean.data.batches import Batch
from tokenclean.data.cleaned import CleanedPool
from tokenclean.data.rows import TokenRows
from tokenclean.models import Network

#: Parts of the score.
DECILES: Final = 10
#: Samples of either pool that are looked at, drawn by the run's seed.
SAMPLES: Final = 1000
#: Blocks of samples that the standard error is taken over.
BLOCKS: Final = 10


def alignment(loop: CleaningLoop, cleaned: CleanedPool) -> list[dict[str, Any]]:
    """Inner product and cosine of each part's gradient with the validation pool's.

    Args:
        loop: of the run; its pool is set up here if need be.
        cleaned: an arm's cleaned pool, with scores.

    Returns:
        One row per part, the lowest scores first: ``part`` (1 to 10), ``from`` and ``to`` (scores),
        ``tokens``, ``inner``, its standard ``error`` over `BLOCKS` blocks of samples, ``cosine``,
        and ``helps``: inner is more than two errors above 0.

    Raises:
        ValueError: without LoRA, a validation pool, or enough scored samples.
    """
    if loop.template.lora is None:
        raise ValueError("--alignment: gradients are those of LoRA; the run has model.lora null")
    loop.data.prepare_data()
    loop.data.setup()
    validation = loop.data.validation
    if validation is None:
        raise ValueError("--alignment: it needs held-out data; the run has no data.validation_path")
    draw = np.random.default_rng(loop.seed)
    rows, scores = _scored(loop, cleaned, draw)
    network = loop.fresh_adapter()
    some = _some(np.arange(len(validation)), draw)
    held_out = TokenRows(validation, some, labels=True).learnt()
    target = _gradient_of(network, loop.data.scoring_loader(held_out))

    edges = np.quantile(np.concatenate([scores[int(r)] for r in rows]), np.linspace(0, 1, 11))
    inner = np.zeros((BLOCKS, DECILES))
    tokens = np.zeros((BLOCKS, DECILES))
    total = torch.zeros(DECILES, len(target), device=target.device)
    for number, block in enumerate(np.array_split(draw.permutation(rows), BLOCKS)):
        sums = torch.zeros_like(total)
        for batch in loop.data.scoring_loader(TokenRows(loop.pool, np.sort(block))):
            of_token = np.concatenate([scores[row] for row in batch.rows])
            part = np.searchsorted(edges[1:-1], of_token, side="right")
            tokens[number] += np.bincount(part, minlength=DECILES)
            sums += _gradients(network, batch, part)
        total += sums
        inner[number] = (sums @ target).cpu().double().numpy()
    return _table(inner, tokens, total, target, edges)


def _table(
    inner: np.ndarray, tokens: np.ndarray, total: Tensor, target: Tensor, edges: np.ndarray
) -> list[dict[str, Any]]:
    size = tokens.sum(axis=0)
    mean = inner.sum(axis=0) / np.maximum(size, 1)
    # of a ratio of sums over blocks
    spread = ((inner - mean * tokens) ** 2).sum(axis=0) * BLOCKS / (BLOCKS - 1)
    error = np.sqrt(spread) / np.maximum(size, 1)
    norms = (total.norm(dim=1) * target.norm()).cpu().double().numpy()
    cosine = inner.sum(axis=0) / np.maximum(norms, 1e-30)
    return [
        {
            "part": k + 1,
            "from": float(edges[k]),
            "to": float(edges[k + 1]),
            "tokens": int(size[k]),
            "inner": float(mean[k]),
            "error": float(error[k]),
            "cosine": float(cosine[k]),
            "helps": bool(mean[k] > 2 * error[k]),
        }
        for k in range(DECILES)
    ]


def _scored(
    loop: CleaningLoop, cleaned: CleanedPool, draw: np.random.Generator
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Some of the scored rows of the pool, and the scores of their response tokens."""
    columns = cleaned.lists("score"), cleaned.lists("response_mask")
    rounds = np.asarray(cleaned.values("round"))
    places = _some(np.flatnonzero(rounds > 0), draw)
    found: dict[int, np.ndarray] = {}
    row_of_id = {id: row for row, id in enumerate(loop.pool.ids)}
    ids = cleaned.texts("id")
    for place in places:
        score, mask = (np.asarray(c[int(place)]) for c in columns)
        values = score[mask.astype(bool)].astype(np.float64)
        if len(values) and not np.isnan(values).any():
            found[row_of_id[ids[int(place)]]] = values
    if len(found) < BLOCKS:
        raise ValueError(f"--alignment: only {len(found)} samples of the run have scores")
    return np.array(sorted(found)), found


def _some(rows: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.sort(draw.permutation(rows)[:SAMPLES])


def _parameters(network: Network) -> list[Tensor]:
    return [p for name, p in network.named_parameters() if p.requires_grad and "lora_B" in name]


def _gradient_of(network: Network, batches: Any) -> Tensor:
    """Gradient of the mean loss, flat."""
    total, count = torch.zeros(0), 0
    for batch in batches:
        found = _gradients(network, batch, np.zeros(len(batch.targets), dtype=np.int64))[0]
        total = found + total if len(total) else found
        count += len(batch.targets)
    return total / max(count, 1)


def _gradients(network: Network, batch: Batch, part: np.ndarray) -> Tensor:
    """Gradient of each part's summed loss: float32, shape (DECILES, parameters)."""
    parameters = _parameters(network)
    size = sum(p.numel() for p in parameters)
    result = torch.zeros(DECILES, size, device=network.device)
    with network.clock(batch.tokens), torch.enable_grad():
        losses = network(batch.to(network.device))
        for k in np.unique(part):
            chosen = torch.from_numpy(np.flatnonzero(part == k)).to(losses.device)
            found = torch.autograd.grad(losses[chosen].sum(), parameters, retain_graph=True)
            result[int(k)] = torch.cat([g.flatten().float() for g in found])
    return result
