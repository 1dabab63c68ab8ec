"""`ScoringModule`: one model, one pass, one loss per response token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy as np
import torch
import transformers
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from tokenclean.data.batches import Batch, collate, plan_batches
from tokenclean.data.datamodule import PlannedBatches, TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.interrupts import deferred
from tokenclean.loss import token_nll, token_statistics
from tokenclean.models import (
    BaseConfig,
    Network,
    adapter_folders,
    in_float32,
    load_tokenizer,
    trained_ids,
)
from tokenclean.models.sharding import no_samples, shard
from tokenclean.publish import write_text
from tokenclean.scoring.attributes import AttributeSettings, TokenAttributes
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.table import Column, ScoreTable
from tokenclean.scoring.writer import ScoreWriter

log = logging.getLogger(__name__)

#: One sample in so many is scored a second time to measure the noise, within these bounds.
PROBE_EVERY, MIN_PROBE, MAX_PROBE = 100, 4, 64


class ScoringModule(LightningModule):
    """Negative log-likelihood of response tokens under a base model and, if any, its adapters.

    Cross-entropy is float32 whatever the weights' dtype. On a GPU run it under
    ``precision: 16-mixed`` (the default there): rounding to bfloat16 moves several times as many
    tokens across the cut. Adapters are merged into a copy of the weights for the pass; see
    `Network.merged`.

    Under FSDP2 (``trainer.strategy: fsdp2``) each process holds a part of every decoder layer, and
    all compute side by side: one that has no batch left computes a pass that is thrown away.
    Adapters are not merged then.

    Attributes:
        noise: after a pass, what its precision and batches did to the losses: ``p50``, ``p99`` and
            ``max`` of the absolute difference, in nats, to a float32 pass over ``samples`` of the
            samples (``tokens`` tokens), one at a time and nothing merged; 4-bit weights are not
            widened. On the first process; empty if it could not be measured.

    Args:
        base: the base model.
        adapters: PEFT adapter folders (or runs that hold one), stacked in this order; none scores
            the base itself.
        columns: what to store besides the losses, for rules that read it: ``gap``, ``alone``,
            ``attention``, ``attention_keys``, ``relevance``, ``relevance_hidden``; see `Column`.
            ``alone`` takes a pass of its own over the responses, ``relevance_hidden`` one over the
            expert words and every vocabulary entry in the pool.
        attributes: what some columns rest on.

    Raises:
        ValueError: if a column is unknown, or needs expert words that are not given.
    """

    def __init__(
        self,
        base: BaseConfig,
        adapters: str | list[str] | None = None,
        columns: list[Column] | None = None,
        attributes: AttributeSettings = AttributeSettings(),  # noqa: B008
    ):
        super().__init__()
        known: tuple[Column, ...] = get_args(Column)
        if unknown := set(columns or []) - set(known):
            raise ValueError(
                f"model.columns: {', '.join(sorted(unknown))} is none of {', '.join(known)}"
            )
        # In one order, so that whoever asks for the same columns shares their table.
        self.columns: list[Column] = [column for column in known if column in (columns or [])]
        self.attributes = attributes
        for column in self.columns:
            attributes.check(column)
        self.base, self.adapters = base, adapter_folders(adapters)
        #: set it beforehand to score with what is already in memory
        self.network: Network | None = None
        self.noise: dict[str, float] = {}
        #: what deals the batches and takes the losses; `score_pool` sets it
        self.writer: ScoreWriter | None = None
        #: tokens of a pass, once one of that many did not fit into memory
        self.limit: int | None = None
        self._merged = ExitStack()
        self._attributes: TokenAttributes | None = None

    def configure_model(self) -> None:
        """Load the weights, unless that was done before, and split them under FSDP2.

        A network that is split cannot be put together again: it is good for one pass.
        """
        check_precision(self)
        device = self.trainer.strategy.root_device
        self.load(device)
        assert self.network is not None
        use_layout(self, self.network)
        if self._shards:
            shard(self.network.hf, device)

    @property
    def _shards(self) -> bool:
        """Whether the network's layers are split over the processes (FSDP2)."""
        return splits_layers(self.trainer)

    @property
    def _waited_for(self) -> bool:
        """Whether a pass that this process breaks off leaves others waiting in theirs."""
        return self._shards and self.trainer.world_size > 1

    def load(self, device: torch.device) -> None:
        """Read base and adapters, unless a network was handed over.

        Args:
            device: that it will run on; decides ``dtype: auto``.
        """
        if self.network is None:
            self.network = Network.load(self.base, device)
            for folder in self.adapters:
                self.network.load_adapter(folder)
            self.network.freeze()

    def on_predict_start(self) -> None:
        assert self.network is not None
        self.network.check_on_device()
        # A copy in bfloat16 would round away much of what an adapter adds; float16 keeps it.
        half = str(self.trainer.precision) == "16-mixed"
        if "mixed" not in str(self.trainer.precision) or half:
            merged = self.network.merged(torch.float16 if half else None)
            self._merged.enter_context(merged)
        tokenizer = partial(load_tokenizer, self.base)
        settings = (self.columns, self.attributes, self.network, self._planned.rows, tokenizer)
        self._attributes = TokenAttributes(*settings)

    def predict_dataloader(self) -> PlannedBatches:
        """This process's batches."""
        assert self.writer is not None
        return self.writer.deal(self.trainer)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Losses of the batch's targets: float32, (N,), or (1 + columns, N) with the columns.

        Raises:
            FloatingPointError: naming the first sample with a loss that is not finite.
            ValueError: naming a sample that does not fit into the device's memory by itself, or
                under FSDP2 the size of the batch that does not.
        """
        assert self.network is not None
        if self._shards and not batch.rows:
            # Through all that a batch goes through: the others gather as many layers.
            filler = no_samples(self.network.layout).to(self.device)
            found = self._computed(filler)[:, :0]
            return found if self.columns else found[0]
        found = torch.cat([self._checked(part) for part in self._fitting(batch)], dim=1)
        return found if self.columns else found[0]

    def _fitting(self, batch: Batch) -> Iterator[Batch]:
        """The batch, in parts if one as large did not fit before; in the same order."""
        if self.limit is None or batch.tokens <= self.limit:
            yield batch
            return
        rows, layout = self._planned.rows, self._planned.layout
        members = np.searchsorted(rows.rows, batch.rows)
        # Longest first, as they are in the batch.
        for part in plan_batches(rows.lengths[members], self.limit, layout):
            yield self._planned.collated(members[part]).to(self.device)

    def _checked(self, batch: Batch) -> Tensor:
        """Losses and columns of a batch, (1 + columns, N), computed in parts if it must be."""
        try:
            found = self._computed(batch)
        except torch.OutOfMemoryError as error:
            self._halve(batch, error)
        else:
            self._check_finite(batch, found)
            return found
        # Not in the handler: the error holds on to all that the pass had allocated.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return torch.cat([self._checked(part) for part in self._fitting(batch)], dim=1)

    def _computed(self, batch: Batch) -> Tensor:
        """Losses and columns of a batch in one go, (1 + columns, N)."""
        assert self.network is not None
        with self.network.clock(batch.tokens):
            return torch.stack(self._statistics(batch))

    def _halve(self, batch: Batch, error: torch.OutOfMemoryError) -> None:
        """Lower the limit to half of a batch that did not fit.

        Raises:
            ValueError: if it is one sample alone, or other processes would wait meanwhile.
        """
        if len(batch.rows) <= 1:
            name = self._name(batch.rows[0]) if batch.rows else "an empty batch"
            raise ValueError(
                f"out of memory: {name} alone, {batch.tokens} tokens, does not fit; lower "
                "data.max_length, take smaller weights (--model.base.dtype bfloat16, "
                "--model.base.load_in_4bit true) or a device with more memory "
                f"({_first_line(error)})"
            ) from error
        if self._waited_for:
            raise ValueError(
                f"out of memory in a pass over {batch.tokens} tokens, where other processes wait "
                "for this one: score on more devices, or under another --name with "
                f"--data.token_budget {batch.tokens // 2} "
                f"({_first_line(error)})"
            ) from error
        first = self.limit is None
        self.limit = batch.tokens // 2
        if first:
            log.warning(
                "out of memory in a pass over %d tokens: such batches are computed in parts from "
                "now on, which changes losses by rounding alone; --data.token_budget %d would "
                "plan for it",
                *(batch.tokens, self.limit),
            )

    def _check_finite(self, batch: Batch, found: Tensor) -> None:
        # Attention is not a number where there is none to read.
        names = ["loss", *(f"column {name}" for name in self.columns)]
        for name, values in zip(names, found, strict=True):
            if name.startswith("column attention") or bool(torch.isfinite(values).all()):
                continue
            for row, part in batch.split(values):
                if not bool(torch.isfinite(part).all()):
                    raise FloatingPointError(
                        f"the {name} of {self._name(row)} is not finite under precision "
                        f"{self.trainer.precision}; score in bf16-mixed or 32-true "
                        "(--trainer.precision), or look into that sample"
                    )

    def _statistics(self, batch: Batch) -> list[Tensor]:
        """Losses and what else is asked for, float32, shape (N,) each."""
        assert self.network is not None and self._attributes is not None
        if not self.columns or not batch.rows:
            nll: Tensor = self.network(batch)
            return [nll] * (1 + len(self.columns))
        states = self.network.hidden(batch, self._attributes.readers)
        found: dict[Column, Tensor] = {}
        if "gap" in self.columns:
            logits = token_statistics(states, self.network.head, batch.targets)
            nll = logits.nll
            found["gap"] = logits.gap
        else:
            nll = token_nll(states, self.network.head, batch.targets)
        found |= self._attributes.of(batch)
        return [nll, *(found[column] for column in self.columns)]

    def on_predict_epoch_end(self) -> None:
        self._merged.close()
        if self.writer is None or not self.writer.ran:
            return
        if self.writer.values is None and not self._shards:
            return  # another process has them
        unmeasured = self.writer.shards.unmeasured
        if self._shards and unmeasured.is_file():
            said = unmeasured.read_text(encoding="utf-8")
            log.warning("the noise of the scores is not measured: %s", said)
            return
        losses = None if self.writer.values is None else self.writer.values[0]
        try:
            self.noise = self._measure_noise(losses)
        except (RuntimeError, TypeError) as error:
            # No reason to lose a finished pass.
            if self._waited_for and isinstance(error, torch.OutOfMemoryError):
                write_text(unmeasured, "memory ran out in an earlier call")
                raise ValueError(
                    "out of memory as the noise of the scores was measured: all is scored, and "
                    f"the same command ends without that measurement ({_first_line(error)})"
                ) from error
            if self._waited_for:  # it failed on all of them alike, or the others are gone
                self.trainer.strategy.barrier("noise")
            log.warning("the noise of the scores could not be measured: %s", error)

    def _measure_noise(self, losses: np.ndarray | None) -> dict[str, float]:
        """Score some samples again, as exactly as float32 can.

        Args:
            losses: of all targets of the rows, end to end, float32, shape (n,); None on a process
                that has them not and computes along, which returns nothing.
        """
        assert self.network is not None
        planned, gaps = self._planned, [torch.zeros(0)]
        order = np.concatenate([np.zeros(0, dtype=np.int64), *planned.plan])
        size = max(min(MAX_PROBE, len(order) // PROBE_EVERY), min(MIN_PROBE, len(order)))
        chosen = order[np.linspace(0, len(order) - 1, size).astype(np.int64)] if size else order
        ends = np.cumsum(planned.rows.counts)
        for place in np.unique(chosen):
            batch = collate([planned.rows[int(place)]], "padded").to(self.device)
            with self.network.clock(batch.tokens), in_float32(self.device):
                exact: Tensor = self.network(batch)
            if losses is None:
                continue
            stored = losses[ends[place] - len(exact) : ends[place]]
            gaps.append((torch.from_numpy(np.array(stored)) - exact.cpu()).abs())
        gap = torch.cat(gaps).double()
        if not len(gap):
            return {}
        return {
            "p50": float(gap.quantile(0.5)),
            "p99": float(gap.quantile(0.99)),
            "max": float(gap.max()),
            "tokens": len(gap),
            "samples": len(gaps) - 1,
        }

    @property
    def _planned(self) -> PlannedBatches:
        assert self.writer is not None
        return self.writer.planned

    def _name(self, row: int) -> str:
        table = self._planned.rows.table
        return f"sample {table.ids[row]!r}" if isinstance(table, TokenPool) else f"pool row {row}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]


def use_layout(module: LightningModule, network: Network) -> None:
    """Have the trainer's data module, if there is one, collate as this network wants it."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is not None:
        data.layout = network.layout


def splits_layers(trainer: Trainer) -> bool:
    """Whether a trainer's strategy splits decoder layers over the processes (FSDP2)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_precision(module: LightningModule) -> None:
    """Refuse ``16-true`` and ``bf16-true``.

    They round the rotary frequencies, which spoils long positions, and LoRA's own weights.
    """
    if str(module.trainer.precision) in ("16-true", "bf16-true"):
        raise ValueError(
            f"trainer.precision: {module.trainer.precision} rounds rotary frequencies and LoRA "
            "weights; use 16-mixed (scoring) or bf16-mixed (training)"
        )


def score_pool(
    module: ScoringModule,
    trainer: Trainer,
    data: TuluDataModule,
    rows: TokenRows,
    folder: Path,
    budget: int,
    cache: ScoreCache | None = None,
    against: ScoreTable | None = None,
) -> bool:
    """Write one model's score table, or take it from the cache.

    What an earlier call computed of it is not computed again: see `Shards`.

    Args:
        module: with its network loaded, whole; under FSDP2 it is in parts afterwards.
        trainer: a fresh one, whose processes see one file system.
        data: plans the batches.
        rows: the rows of a token pool to score, ascending.
        folder: where the table goes.
        budget: tokens per batch.
        cache: where tables that others have made, or may need, are kept.
        against: see `ScoreWriter`.

    Returns:
        Whether the model was run.

    Raises:
        Stopped: if the process was told to stop, after the shard that it was at.
        NotWritten: if the disk takes no more; finished shards stay.
    """
    pool, network = rows.table, module.network
    assert isinstance(pool, TokenPool) and network is not None
    if splits_layers(trainer) and network.depth:
        # Merged weights would not fit, and the table says what was done.
        network.speed = replace(network.speed, merge=False)
    manifest = score_manifest(pool, module.base, module.adapters, network, budget, trainer)
    data.layout = network.layout
    planned = data.planned(rows)
    manifest["cut_after_last_target"] = planned.rows.cut
    if module.columns:  # a table without them is the one it has always been
        manifest["columns"] = module.columns
        if stated := module.attributes.stated(module.columns, network.hf.config):
            manifest["attributes"] = stated
    if rows.of != "response":
        manifest["targets"] = rows.of
    writer = ScoreWriter(planned, folder, manifest, against, cache)
    # Several processes must agree on it, which they can once they have begun.
    if trainer.world_size == 1 and writer.take():
        return False
    module.writer = writer
    callbacks: Any = trainer
    callbacks.callbacks.append(writer)
    with deferred():
        trainer.predict(module, return_predictions=False)
    return writer.ran


def score_manifest(
    pool: TokenPool,
    base: BaseConfig,
    adapters: list[str],
    network: Network,
    budget: int,
    trainer: Trainer,
) -> dict[str, Any]:
    """What a score table says about where its numbers come from.

    Args:
        budget: tokens per batch.
        trainer: that runs the pass.
    """
    device = trainer.strategy.root_device
    return {
        "pool": pool.fingerprint,
        "pool_folder": str(pool.folder),
        "tokenizer": pool.manifest["tokenizer"],
        "vocabulary": pool.manifest["vocabulary"],
        "model": network.fingerprint(),
        "base": base.name,
        "adapters": adapters,
        "trained_on": sorted(
            {i for folder in (base.name, *adapters) for i in trained_ids(Path(folder))}
        ),
        "weights_dtype": str(network.hf.dtype).removeprefix("torch."),
        "layout": network.layout,
        "token_budget": budget,
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": network.hf.config._attn_implementation,
        "speed": asdict(network.speed),
        "config": network.config_hash(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning.__version__,
        },
    }
