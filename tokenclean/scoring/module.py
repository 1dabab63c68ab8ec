"""`ScoringModule`: one model, one pass, one loss per response token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning import LightningModule
from torch import Tensor

from tokenclean.data.batches import Batch
from tokenclean.data.pool import TokenPool
from tokenclean.models import BaseConfig, Network, adapter_folders, trained_ids


class ScoringModule(LightningModule):
    """Negative log-likelihood of response tokens under a base model and, if any, its adapters.

    Cross-entropy is float32 whatever the weights' dtype. On a GPU run it under
    ``precision: 16-mixed`` (the default there): rounding to bfloat16 moves several times as many
    tokens across the cut.

    Args:
        base: the base model.
        adapters: PEFT adapter folders (or runs that hold one), stacked in this order; none scores
            the base itself.
    """

    def __init__(self, base: BaseConfig, adapters: str | list[str] | None = None):
        super().__init__()
        self.base, self.adapters = base, adapter_folders(adapters)
        #: set it beforehand to score with what is already in memory
        self.network: Network | None = None

    def configure_model(self) -> None:
        """Load the weights, unless a network was handed over."""
        check_precision(self)
        if self.network is None:
            device = self.trainer.strategy.root_device
            self.network = Network.load(self.base, device)
            for folder in self.adapters:
                self.network.load_adapter(folder)
            use_layout(self, self.network)
            self.network.freeze()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Losses of the batch's targets: float32, shape (N,).

        Raises:
            FloatingPointError: naming the first sample with a loss that is not finite.
        """
        assert self.network is not None
        nll: Tensor = self.network(batch)
        if not bool(torch.isfinite(nll).all()):
            for row, values in batch.split(nll):
                if not bool(torch.isfinite(values).all()):
                    raise FloatingPointError(
                        f"the loss of {self._name(row)} is not finite under precision "
                        f"{self.trainer.precision}; score in bf16-mixed or 32-true "
                        "(--trainer.precision), or look into that sample"
                    )
        return nll

    def _name(self, row: int) -> str:
        loader: Any = self.trainer.predict_dataloaders
        table = getattr(getattr(loader.dataset, "rows", None), "table", None)
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


def score_manifest(
    pool: TokenPool, base: BaseConfig, adapters: list[str], network: Network, budget: int
) -> dict[str, Any]:
    """What a score table says about where its numbers come from."""
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
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning.__version__,
        },
    }
