"""Probes: responses after their own prompt and after those of other samples, under one model.

What `selection.keep: auto` rests on; see `tokenclean.selection.noise`. A probe looks at the first
response of at most `SAMPLES` samples, drawn by a seed, and costs one pass over them and one more
per other prompt. A folder of ``losses.npz`` and ``manifest.json``; token arrays lie end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tokenclean.data.batches import Sample, collate, plan_batches
from tokenclean.data.pool import TokenPool
from tokenclean.loss import token_statistics
from tokenclean.models import Network
from tokenclean.publish import complete_folder, read_manifest, write_json
from tokenclean.selection.noise import MIN_SAMPLES, PARTNERS, Contrast, Estimate, estimate

KIND = "probe"
LOSSES = "losses.npz"
#: Enough for an error of two or three per cent; 2,000 responses of 1,000 tokens take 150 MB.
SAMPLES: Final = 2000
_ENDS: Final = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f")


def sentence_ends(tokenizer: Any) -> np.ndarray:
    """Which tokens of the vocabulary end a sentence or a line: bool, shape (V,)."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([text.rstrip(" ").endswith(_ENDS) for text in texts])


@dataclass
class Probe:
    """What a probe found.

    Legend: n samples, N response tokens, P prompt tokens, K other prompts.

    Attributes:
        manifest: pool, model, seed, and the ids that the model was trained on.
        rows: pool rows, int64, (n,).
        partners: pool rows whose prompts served, int64, (n, K).
        counts, controls: response tokens and prompt tokens of each, int64, (n,).
        ends: the token ends a sentence, bool, (N,).
        own: losses after their own prompt, float32, (N,).
        gap: log-probability of the most likely token less that of this one, float32, (N,).
        others: losses after the other prompts, float32, (K, N).
        control: losses of prompt tokens, float32, (P,).
    """

    manifest: dict[str, Any]
    rows: np.ndarray
    partners: np.ndarray
    counts: np.ndarray
    controls: np.ndarray
    ends: np.ndarray
    own: np.ndarray
    gap: np.ndarray
    others: np.ndarray
    control: np.ndarray

    @staticmethod
    def read(folder: Path) -> Probe:
        """From disk.

        Raises:
            ValueError: if it is no probe.
        """
        manifest = read_manifest(folder, KIND)
        with np.load(folder / LOSSES) as stored:
            return Probe(manifest, **{name: stored[name] for name in stored.files})


def write_probe(
    folder: Path,
    network: Network,
    pool: TokenPool,
    rows: np.ndarray,
    ends: np.ndarray,
    budget: int,
    trained_on: set[str],
    seed: int,
) -> Probe:
    """Run a probe. Two models are compared by probes of the same pool, rows and seed.

    Args:
        folder: where it goes.
        network: the model, at the depth that is meant.
        pool: the token pool.
        rows: among which to draw; other prompts come from among those drawn.
        ends: of `sentence_ends`.
        budget: tokens per batch.
        trained_on: ids of the samples that the model was trained on.
        seed: of the draw.

    With fewer than `MIN_SAMPLES` rows that have a prompt and a response the probe is empty.
    """
    draw = np.random.default_rng(seed)
    chosen, starts, stops = _drawn(pool, rows, draw)
    order = draw.permutation(len(chosen))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # Neighbours on a shuffled circle: nobody is their own partner, everybody serves equally often.
    partners = order[(place[:, None] + np.arange(1, PARTNERS + 1)) % max(len(order), 1)]
    ids = [pool.input_ids[int(row)] for row in chosen]
    prompts = [i[:start] for i, start in zip(ids, starts, strict=True)]
    responses = [i[start:stop] for i, start, stop in zip(ids, starts, stops, strict=True)]
    longest = int(pool.manifest["max_length"])

    own = [
        _sample(row, np.concatenate([prompt, response]), 1)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    others = []
    for k in range(PARTNERS):
        samples = []
        for row, response in enumerate(responses):
            prompt = prompts[partners[row, k]]
            # what would not fit loses its beginning
            prompt = prompt[max(0, len(prompt) + len(response) - longest) :]
            samples.append(_sample(row, np.concatenate([prompt, response]), len(prompt)))
        others.append(_joined(_losses(network, samples, budget)[0]))
    nll, gaps = _losses(network, own, budget)
    token_ids = _joined(responses).astype(np.int64)
    # The mark at the end belongs to the sentence before it.
    ended = ends[token_ids] | (token_ids == pool.eos_id)
    ended[:-1] &= token_ids[1:] != pool.eos_id
    found = {
        "rows": chosen,
        "partners": chosen[partners],
        "counts": stops - starts,
        "controls": starts - 1,
        "ends": ended,
        "own": _joined([v[start - 1 :] for v, start in zip(nll, starts, strict=True)]),
        "gap": _joined([v[start - 1 :] for v, start in zip(gaps, starts, strict=True)]),
        "others": np.stack(others),
        "control": _joined([v[: start - 1] for v, start in zip(nll, starts, strict=True)]),
    }
    with complete_folder(folder) as partial:
        np.savez(partial / LOSSES, **found)
        manifest = {
            "kind": KIND,
            "pool": pool.fingerprint,
            "model": network.fingerprint(),
            "trained_on": sorted(trained_on),
            "seed": seed,
            "precision": "16-mixed" if network.device.type == "cuda" else "32-true",
            "samples": len(chosen),
        }
        write_json(partial / "manifest.json", manifest)
    return Probe.read(folder)


def _drawn(
    pool: TokenPool, rows: np.ndarray, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, and where the first response of each begins and ends: int64, shape (n,) each."""
    found = []
    for row in draw.permutation(rows):
        mask = np.asarray(pool.response_mask[int(row)], dtype=bool)
        start = int(mask.argmax())
        if start and mask[start]:
            rest = ~mask[start:]
            found.append((row, start, start + (int(rest.argmax()) if rest.any() else len(rest))))
        if len(found) == SAMPLES:
            break
    if len(found) < MIN_SAMPLES:
        found = []
    chosen, starts, stops = np.array(sorted(found), dtype=np.int64).reshape(-1, 3).T
    return chosen, starts, stops


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *arrays])


def _sample(row: int, ids: np.ndarray, start: int) -> Sample:
    positions = np.arange(max(start, 1), len(ids))
    return Sample(row, ids, positions, np.ones(len(positions), dtype=np.float32))


@torch.no_grad()
def _losses(
    network: Network, samples: list[Sample], budget: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Losses and gaps of every sample's targets."""
    losses = [np.zeros(0, dtype=np.float32) for _ in samples]
    gaps = list(losses)
    lengths = np.array([s.length for s in samples])
    for members in plan_batches(lengths, budget, network.layout):
        batch = collate([samples[i] for i in members], network.layout)
        with network.clock(batch.tokens):
            moved = batch.to(network.device)
            # On a GPU as scoring does by default: bfloat16 products are too coarse.
            on_gpu = network.device.type == "cuda"
            with torch.autocast(network.device.type, torch.float16, enabled=on_gpu):
                states = network.hidden(moved)
                found = token_statistics(states, network.head, moved.targets)
            gap = found.gap
        for row, values in batch.split(found.nll.float().cpu()):
            losses[row] = values.numpy()
        for row, values in batch.split(gap.float().cpu()):
            gaps[row] = values.numpy()
    return losses, gaps


def contrast(base: Probe, reference: Probe, pool: TokenPool) -> tuple[Contrast, np.ndarray]:
    """Two models' probes side by side, without what the reference was trained on.

    Returns:
        The contrast, and the pool row of each of its samples.

    Raises:
        ValueError: if they are not of the same samples, or the reference has seen too many.
    """
    if {base.manifest["pool"], reference.manifest["pool"]} != {pool.fingerprint} or not (
        np.array_equal(base.rows, reference.rows)
        and np.array_equal(base.partners, reference.partners)
    ):
        raise ValueError(
            "selection.keep: auto needs probes of the same rows of one pool under base and "
            "reference; score both with the same data, --data.subset, --seed_everything and "
            "--probe true"
        )
    seen = pool.ids.among(set(reference.manifest["trained_on"]))
    fresh = ~(seen[reference.rows] | seen[reference.partners].any(axis=1))
    if fresh.sum() < MIN_SAMPLES <= len(fresh):
        raise ValueError(
            f"selection.keep: auto: the reference was trained on too many of the probe's samples "
            f"({int(fresh.sum())} of {len(fresh)} are left); score rows that it has not seen "
            "(--data.subset), or cross-fit"
        )
    counts = reference.counts
    of_token, of_control = np.repeat(np.arange(len(counts)), counts), reference.controls
    starts = np.zeros(len(of_token), dtype=bool)
    starts[1:] = reference.ends[:-1]
    starts[np.cumsum(counts) - counts] = True
    whole = Contrast(
        sample=of_token,
        sentence=np.cumsum(starts) - 1,
        base=base.own,
        reference=reference.own,
        base_others=base.others,
        reference_others=reference.others,
        gap=reference.gap,
        control_sample=np.repeat(np.arange(len(counts)), of_control),
        control_base=base.control,
        control_reference=reference.control,
    )
    chosen = np.flatnonzero(fresh)
    return whole.among(chosen), reference.rows


@dataclass
class Share:
    """The informative share of a pool, whole and source by source.

    Attributes:
        whole: of all samples.
        sources: of each source's.
    """

    whole: Estimate
    sources: dict[str, Estimate]

    @property
    def keep(self) -> float:
        return self.whole.keep

    def to_json(self) -> dict[str, Any]:
        return {
            **self.whole.to_json(),
            "sources": {name: found.to_json() for name, found in self.sources.items()},
        }


def share(probes: list[tuple[Probe, Probe]], pool: TokenPool) -> Share:
    """Estimate the informative share.

    Args:
        probes: of base and reference; several pairs, of the halves of a pool, count together.
        pool: that they are of.

    Raises:
        ValueError: see `contrast`.
    """
    parts, sources = [], []
    for base, reference in probes:
        found, rows = contrast(base, reference, pool)
        parts.append(found)
        # as `Contrast.joined` numbers samples
        last = int(found.sample.max(initial=-1)) + 1
        sources += pool.sources.take(rows[:last]).to_pylist()
    whole, of_sample = Contrast.joined(parts), np.array(sources)
    return Share(
        estimate(whole),
        {
            str(name): estimate(whole.among(np.flatnonzero(of_sample == name)))
            for name in np.unique(of_sample)
        },
    )
