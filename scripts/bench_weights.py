"""Benchmark part: what online token weights cost over a plain training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scripts.bench_measure import Line, Same, Side, interleave, memory_lines
from scripts.bench_models import Pair, gradient_error, our_step, pairs, trained
from scripts.bench_workload import BUDGET, Options
from tokenclean.data.batches import collate, plan_batches
from tokenclean.named import names_in
from tokenclean.training.online import weigh_globally, weighted_pass
from tokenclean.training.weights import PACKAGE, Weighting, make_weighting

PLAIN, MICRO, ONES = "plain", "talr over micro-batches", "weights of 1"
#: a model of random weights finds every token unlikely
OPTIONS: dict[str, dict[str, Any]] = {"profit": {"threshold": 1e-5}, "beyond_ll": {"alpha": 1.0}}


def weighted_step(
    pair: Pair, chosen: np.ndarray, optimizer: Any, weighting: Weighting, micro: bool = False
) -> None:
    """`our_step` with online weights, as `CleanedSFTModule` takes it; cached losses are zeros."""
    network, device = pair.network, pair.device
    rows = pair.kept.carrying([c for c in weighting.carry if c not in weighting.stored.values()])
    samples = [rows[int(row)] for row in chosen]
    share = np.float32(1.0 / rows.counts[chosen].sum())
    for sample in samples:
        sample.weights = sample.weights * share
        none = np.zeros(len(sample.positions), np.float32)
        sample.extra = dict.fromkeys(weighting.stored.values(), none)
    total = torch.zeros((), dtype=torch.float64, device=device)

    def backward(nll: Any, batch: Any, weights: Any) -> None:
        loss_weights = batch.weights * weights.to(batch.weights.dtype)
        total.add_(loss_weights.double().sum())
        (nll * loss_weights).sum().backward()

    waiting = []
    for members in plan_batches(rows.lengths[chosen], BUDGET, network.layout):
        batch = collate([samples[i] for i in members], network.layout).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=pair.on_gpu):
            nll, tokens = weighted_pass(network, batch, weighting)
        if weighting.scope == "batch" and not micro:
            waiting.append((nll, batch, tokens))
        else:
            backward(nll, batch, weighting.weigh(tokens))
    alone: Any = SimpleNamespace(
        world_size=1, strategy=SimpleNamespace(root_device=torch.device(device))
    )
    found = weigh_globally(weighting, [tokens for *_, tokens in waiting], alone) if waiting else []
    for (nll, batch, _), weights in zip(waiting, found, strict=True):
        backward(nll, batch, weights)
    if weighting.mean_over == "weights":
        for parameter in trained(network):
            if parameter.grad is not None:
                parameter.grad /= total
    optimizer.step()


def weighting(options: Options) -> Iterator[Line]:
    """One optimiser step over a global batch with each weighting, and without."""
    for pair in pairs(options, "weighting"):
        yield from _weighting(pair, options)


def _weighting(pair: Pair, options: Options) -> Iterator[Line]:
    network = pair.network
    network.train()
    start = [p.detach().clone() for p in trained(network)]

    def side(step: Callable[[np.ndarray, Any], None]) -> Side:
        def prepare(repeat: int) -> Callable[[], Any]:
            chosen = pair.chosen(repeat, options.batch)
            network.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, value in zip(trained(network), start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(trained(network), lr=1e-4, weight_decay=0.0)

            def run() -> list[Any]:
                step(chosen, optimizer)
                return [p.grad for p in trained(network)]

            return run

        return prepare

    def weighted(name: str, micro: bool = False, **given: Any) -> Side:
        made = make_weighting(name, given)
        return side(lambda chosen, optimizer: weighted_step(pair, chosen, optimizer, made, micro))

    sides = {PLAIN: side(lambda chosen, optimizer: our_step(pair, chosen, optimizer))}
    sides |= {n: weighted(n, **OPTIONS.get(n, {})) for n in names_in(PACKAGE)}
    sides[MICRO] = weighted("talr", micro=True)
    # nothing is below the threshold
    sides[ONES] = weighted("profit", threshold=0.0)

    def check(results: dict[str, Any]) -> Same:
        return {"gradient error, weights of 1": gradient_error(results[ONES], results[PLAIN])}

    label = f"weighting {pair.name}"
    measured = interleave(sides, options.few_repeats, options.device, label, check)
    for name in sides:
        if name not in (PLAIN, ONES):
            yield measured.line("weighting", pair.name, name, PLAIN, same=measured.same)
    case = f"{pair.name}, {options.batch} samples"
    for name in ("talr", MICRO, "eaft", "sstoken"):
        runs = {name: sides[name](0), PLAIN: sides[PLAIN](0)}
        yield from memory_lines("weighting", case, runs, options.device)
