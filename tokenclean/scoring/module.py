"""`ScoringModule`: one model, one pass, one loss per response token."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy as np
import torch
import transformers
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from tokenclean.data.batches import Batch, collate
from tokenclean.data.datamodule import PlannedBatches, TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.loss import token_nll, token_statistics
from tokenclean.models import (
    BaseConfig,
    Network,
    adapter_folders,
    in_float32,
    load_tokenizer,
    trained_ids,
)
from tokenclean.runs import stop_if_interrupted
from tokenclean.scoring.attributes import AttributeSettings, TokenAttributes
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.table import Column, ScoreTable, ScoreWriter

log = logging.getLogger(__name__)

#: One sample in so many is scored a second time to measure the noise, within these bounds.
PROBE_EVERY, MIN_PROBE, MAX_PROBE = 100, 4, 64


class ScoringModule(LightningModule):
    """Negative log-likelihood of response tokens under a base model and, if any, its adapters.

    Cross-entropy is float32 whatever the weights' dtype. On a GPU run it under
    ``precision: 16-mixed`` (the default there): rounding to bfloat16 moves several times as many
    tokens across the cut. Adapters are merged into a copy of the weights for the pass; see
    `Network.merged`.

    Attributes:
        noise: after a pass, what its precision and batches did to the losses: ``p50``, ``p99`` and
            ``max`` of the absolute difference, in nats, to a float32 pass over ``samples`` of the
            samples (``tokens`` tokens), one at a time and nothing merged. Of the first process's
            share; 4-bit weights are not widened. Empty if it could not be measured.

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
        self._merged = ExitStack()
        self._attributes: TokenAttributes | None = None
        self._probe: dict[int, Tensor | None] = {}

    def configure_model(self) -> None:
        """Load the weights, unless that was done before."""
        check_precision(self)
        self.load(self.trainer.strategy.root_device)
        assert self.network is not None
        use_layout(self, self.network)

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
        planned = self._planned()
        tokenizer = partial(load_tokenizer, self.base)
        settings = (self.columns, self.attributes, self.network, planned.rows, tokenizer)
        self._attributes = TokenAttributes(*settings)
        order = np.concatenate([np.zeros(0, dtype=np.int64), *planned.plan])
        size = max(min(MAX_PROBE, len(order) // PROBE_EVERY), min(MIN_PROBE, len(order)))
        chosen = order[np.linspace(0, len(order) - 1, size).astype(np.int64)] if size else order
        self._probe = {int(planned.rows.rows[i]): None for i in chosen}

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Losses of the batch's targets: float32, (N,), or (1 + columns, N) with the columns.

        Raises:
            FloatingPointError: naming the first sample with a loss that is not finite.
            SIGTERMException: if the process was told to stop; Lightning looks for that in training
                alone.
        """
        assert self.network is not None
        if self.trainer.received_sigterm:
            raise SIGTERMException
        with self.network.clock(batch.tokens):
            nll, *others = self._statistics(batch)
        if not bool(torch.isfinite(nll).all()):
            for row, values in batch.split(nll):
                if not bool(torch.isfinite(values).all()):
                    raise FloatingPointError(
                        f"the loss of {self._name(row)} is not finite under precision "
                        f"{self.trainer.precision}; score in bf16-mixed or 32-true "
                        "(--trainer.precision), or look into that sample"
                    )
        if not self._probe.keys().isdisjoint(batch.rows):
            for row, values in batch.split(nll):
                if row in self._probe:
                    self._probe[row] = values.cpu()
        return torch.stack([nll, *others]) if others else nll

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
        try:
            self.noise = self._measure_noise()
        except (RuntimeError, TypeError) as error:
            # No reason to lose a finished pass.
            log.warning("the noise of the scores could not be measured: %s", error)

    def _measure_noise(self) -> dict[str, float]:
        """Score the probe's samples again, as exactly as float32 can."""
        assert self.network is not None
        planned, gaps = self._planned(), [torch.zeros(0)]
        places = {int(row): i for i, row in enumerate(planned.rows.rows) if int(row) in self._probe}
        for row, values in self._probe.items():
            if values is not None:  # another process's, or the pass was cut short
                batch = collate([planned.rows[places[row]]], "padded").to(self.device)
                with self.network.clock(batch.tokens), in_float32(self.device):
                    exact: Tensor = self.network(batch)
                gaps.append((values - exact.cpu()).abs())
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

    def _planned(self) -> PlannedBatches:
        loader: Any = self.trainer.predict_dataloaders
        planned: PlannedBatches = loader.dataset
        return planned

    def _name(self, row: int) -> str:
        table = self._planned().rows.table
        return f"sample {table.ids[row]!r}" if isinstance(table, TokenPool) else f"pool row {row}"


def use_layout(module: LightningModule, network: Network) -> None:
    """Have the trainer's data module, if there is one, collate as this network wants it."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is not None:
        data.layout = network.layout


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
    source: Any,
    rows: TokenRows,
    folder: Path,
    budget: int,
    cache: ScoreCache | None = None,
    against: ScoreTable | None = None,
) -> bool:
    """Write one model's score table, or take it from the cache.

    Args:
        module: with its network loaded.
        trainer: a fresh one.
        source: a data module or a loader of the rows' batches.
        rows: the rows of a token pool to score.
        folder: where the table goes.
        budget: tokens per batch.
        cache: where tables that others have made, or may need, are kept.
        against: see `ScoreWriter`.

    Returns:
        Whether the model was run.

    Raises:
        KeyboardInterrupt: if the trainer was told to stop.
    """
    pool, network = rows.table, module.network
    assert isinstance(pool, TokenPool) and network is not None
    manifest = score_manifest(pool, module.base, module.adapters, network, budget, trainer)
    loaded = source if isinstance(source, TuluDataModule) else source.dataset.rows
    manifest["cut_after_last_target"] = loaded.cut
    if module.columns:  # a table without them is the one it has always been
        manifest["columns"] = module.columns
        if stated := module.attributes.stated(module.columns, network.hf.config):
            manifest["attributes"] = stated
    if rows.of != "response":
        manifest["targets"] = rows.of
    if cache is not None and cache.has(manifest, rows.rows):
        if trainer.is_global_zero:
            cache.take(manifest, rows.rows, folder)
        return False
    callbacks: Any = trainer
    callbacks.callbacks.append(ScoreWriter(rows, folder, manifest, against))
    trainer.predict(module, source, return_predictions=False)
    stop_if_interrupted(trainer)
    if cache is not None and trainer.is_global_zero:
        cache.put(manifest, rows.rows, folder)
    return True


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
