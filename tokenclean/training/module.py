"""`CleanedSFTModule`: fine-tuning on the tokens that were kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics.aggregation import MeanMetric
from transformers import get_scheduler

from tokenclean.data.batches import Batch
from tokenclean.data.datamodule import GlobalBatch
from tokenclean.estimate import ModelShape, needs_checkpointing
from tokenclean.models import BaseConfig, LoraSettings, Network, adapter_folders
from tokenclean.named import Value
from tokenclean.scoring.module import check_precision, use_layout
from tokenclean.training.online import weigh_globally, weighted_pass
from tokenclean.training.weights import make_weighting

log = logging.getLogger(__name__)


def paper_optimizer(params: Iterable[Any]) -> Optimizer:
    """AdamW, learning rate 1e-4, no weight decay (arXiv 2502.01968, D.3 and released code)."""
    return AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)


class CleanedSFTModule(LightningModule):
    """Supervised fine-tuning with a loss on kept tokens only, Eq. (1) of arXiv 2502.01968.

    The loss of one optimiser step is the sum over the kept tokens of the *global* batch divided by
    their number. The data module puts 1/number into every token's weight, so micro-batches,
    padding, accumulation and number of processes change nothing but rounding.

    Dropout is drawn from (seed, epoch, step, process), so a resumed run repeats it. Within a step
    the masks follow the order in which micro-batches are computed: runs that cut the global batch
    differently draw different dropout; the loss they estimate is the same.

    A cleaned pool may have negative weights (the rule ``forgetting``, arXiv 2508.04329): tokens to
    unlearn. With P the targets of the global batch whose weight is not negative and Q the others,
    the loss of step s = 0 ... S - 1 is

        sum_P w nll / |P| + lambda sum_Q w nll / |Q|,   lambda = negative_weight s / (S - 1)

    and no step is taken where P is empty.

    Online weights (``weighting``) multiply each token's own; see `tokenclean.training.weights`. A
    weighting that depends on one token or one sample costs a few operations per token. One that
    depends on the whole batch needs all its losses before the first backward pass: activations of
    all micro-batches of a process are in memory at once, where otherwise those of one are.
    ``weighting_scope: micro`` spares that memory and takes each micro-batch for the batch.

    Args:
        base: the base model.
        adapters: PEFT adapter folders (or runs that hold one) to stand on, frozen, in this order.
        lora: LoRA settings, or null to train all weights.
        optimizer: made from the trainable parameters.
        schedule: learning-rate schedule by its transformers name, stepped once per step.
        warmup_ratio: share of all steps spent warming up.
        gradient_clip: largest norm of the gradient; null does not clip (as the paper).
        gradient_checkpointing: recompute activations in the backward pass to save memory; ``auto``
            does so when the estimate for one micro-batch exceeds the free memory.
        backward: ``exact``, or ``kept_tokens``: gradients flow only through the rows that predict a
            kept token, so that the others' activations need not be kept. Approximate: what a
            dropped token's row feeds into later ones through attention is taken for constant.
        save_merged: also write base and adapters as one ordinary model.
        weighting: online token weights: a file of ``tokenclean/training/weighting``, or a module of
            your own by its dotted name; null: none.
        weighting_options: its options.
        weighting_scope: what a weighting takes for the batch: ``global``, the samples of one
            optimiser step over all processes, or ``micro``, those of one forward pass.
        negative_weight: what lambda, above, rises to.
    """

    def __init__(
        self,
        base: BaseConfig,
        adapters: str | list[str] | None = None,
        lora: LoraSettings | None = LoraSettings(),  # noqa: B008
        optimizer: OptimizerCallable = paper_optimizer,
        schedule: str = "linear",
        warmup_ratio: float = 0.03,
        gradient_clip: float | None = None,
        gradient_checkpointing: bool | Literal["auto"] = "auto",
        backward: Literal["exact", "kept_tokens"] = "exact",
        save_merged: bool = False,
        weighting: str | None = None,
        weighting_options: dict[str, Value] | None = None,
        weighting_scope: Literal["global", "micro"] = "global",
        negative_weight: float = 0.25,
    ):
        super().__init__()
        if not 0.0 <= warmup_ratio < 1.0:
            raise ValueError(f"model.warmup_ratio: {warmup_ratio} is not in [0, 1)")
        if gradient_clip is not None and gradient_clip <= 0.0:
            raise ValueError(f"model.gradient_clip: {gradient_clip} is not positive; null disables")
        if lora is None and base.load_in_4bit:
            raise ValueError("model.base.load_in_4bit: 4-bit weights cannot be trained in full")
        if save_merged and base.load_in_4bit:
            raise ValueError("model.save_merged: 4-bit weights cannot be merged into; leave it out")
        self.base, self.adapters, self.lora = base, adapter_folders(adapters), lora
        self.make_optimizer = optimizer
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.gradient_clip = gradient_clip
        if backward == "kept_tokens" and (lora is None or not base.speed.lean_lora):
            raise ValueError(
                "model.backward: kept_tokens needs LoRA and model.base.speed.lean_lora, whose "
                "backward pass it cuts"
            )
        if backward == "kept_tokens" and base.load_in_4bit:
            raise ValueError("model.backward: kept_tokens does not go with 4-bit weights")
        self.backward_rows: str = backward
        self.weighting_scope: str = weighting_scope
        self.use_weighting(weighting, weighting_options)
        if negative_weight < 0.0:
            raise ValueError(
                f"model.negative_weight: {negative_weight} is negative; the weights of tokens to "
                "unlearn are already"
            )
        self.negative_weight = negative_weight
        self.gradient_checkpointing, self.save_merged = gradient_checkpointing, save_merged
        #: set it beforehand to train what is already in memory
        self.network: Network | None = None
        #: replaces the optimizer's own learning rate (the warm-up's, in the loop)
        self.learning_rate: float | None = None
        # One optimiser step spans a varying number of micro-batches, which Lightning's automatic
        # accumulation (a fixed number, each with equal say) cannot express.
        self.automatic_optimization = False
        # Checkpoints hold trained weights only; the base is read from where it came from.
        self.strict_loading = False
        self.kept_seen = 0
        self.response_seen = 0
        #: scalars of the latest step
        self.last_step: dict[str, float] = {}
        self.validation_nll = MeanMetric()
        self._seed = 0
        self._loader_state: dict[str, int] | None = None

    def use_weighting(self, name: str | None, options: dict[str, Value] | None = None) -> None:
        """Set ``weighting`` and ``weighting_options``, before training.

        Raises:
            ValueError: for unknown ones, or what they do not go with.
        """
        if name is None and options:
            raise ValueError("model.weighting_options: there is no model.weighting to take them")
        self.weighting_name = name
        self.weighting = None if name is None else make_weighting(name, options)
        if self.weighs_globally and self.backward_rows == "kept_tokens":
            raise ValueError(
                f"model.weighting: {name} looks at the whole batch, which does not go with "
                "model.backward: kept_tokens; set model.weighting_scope to micro"
            )

    @property
    def weighs_globally(self) -> bool:
        """Whether all losses of a step are needed before any backward pass."""
        batch = self.weighting is not None and self.weighting.scope == "batch"
        return batch and self.weighting_scope == "global"

    @property
    def carry(self) -> tuple[str, ...]:
        """What training samples must bring along: for `TuluDataModule.training_loader`."""
        return () if self.weighting is None else self.weighting.carry

    # -- set-up -------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base, stack the frozen adapters, put a fresh LoRA on top."""
        check_precision(self)
        if str(self.trainer.precision) == "16-mixed":
            raise ValueError(
                "trainer.precision: 16-mixed needs a loss scale, which would spoil the gradient's "
                "norm; train in bf16-mixed or 32-true"
            )
        if self.network is not None:
            return
        device = self.trainer.strategy.root_device
        self.network = Network.load(self.base, device, full=self.lora is None)
        for folder in self.adapters:
            self.network.load_adapter(folder)
        use_layout(self, self.network)
        self.start_round()

    def start_round(self) -> None:
        """Fresh trainable weights: a new LoRA, or all weights where ``lora`` is null."""
        assert self.network is not None
        if self.lora is None:
            self.network.train_all_weights()
        else:
            self.network.add_adapter(self.lora)
        self._ready()

    def continue_round(self) -> None:
        """Go on training the newest adapter instead of a fresh one."""
        assert self.network is not None and self.lora is not None
        self.network.train_last_adapter(self.lora.dropout)
        self._ready()

    def _ready(self) -> None:
        assert self.network is not None
        # Lightning keeps each module's mode as it finds it, and a network waits in eval mode.
        self.network.train()
        self.network.kept_backward = self.backward_rows == "kept_tokens"

    def _checkpoint(self) -> bool:
        """Whether to recompute activations; under ``auto`` what the memory estimate says."""
        assert self.network is not None
        if self.gradient_checkpointing != "auto":
            return self.gradient_checkpointing
        loader: Any = self.trainer.train_dataloader
        budget: int = loader.dataset.budget
        if self.weighs_globally:
            budget = max(budget, loader.dataset.tokens_per_step())
        mixed = "mixed" in str(self.trainer.precision)
        needed = needs_checkpointing(
            ModelShape.of_config(self.network.hf.config, self.base.trust_remote_code),
            budget,
            self.lora,
            self.trainer.strategy.root_device,
            weights=self.network.hf.dtype,
            compute=torch.bfloat16 if mixed else self.network.hf.dtype,
            four_bit=self.base.load_in_4bit,
            stack=len(self.network.stack) - 1,
        )
        if needed:
            log.info("gradient checkpointing: %d tokens at a time do not fit without it", budget)
        return needed

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(trained)
        if self.learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError(
                "trainer.max_epochs: the schedule needs an end; give max_epochs or max_steps"
            )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=math.ceil(self.warmup_ratio * steps),
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    # -- training -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        assert self.network is not None
        self.network.check_on_device()
        if self._checkpoint():
            self.network.hf.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.network.hf.is_gradient_checkpointing:
            self.network.hf.gradient_checkpointing_disable()
        # Counting the steps for the schedule makes Lightning set the loader up before it has read
        # the checkpoint's loops, after which it would never hand the loader its place in the epoch.
        if self._loader_state is not None:
            loader: Any = self.trainer.train_dataloader
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
        self._look_at_weights()

    def _look_at_weights(self) -> None:
        """Say what a weighting takes for its batch, and what that costs.

        Raises:
            ValueError: if tokens are to be weighted and others to be unlearnt.
        """
        if self.weighting is None:
            return
        loader: Any = self.trainer.train_dataloader
        if loader.dataset.rows.negative.any():
            raise ValueError(
                "model.weighting: this cleaned pool has negative weights (rule forgetting), which "
                "online weights do not go with; leave it out"
            )
        if self.weighs_globally:
            tokens, budget = loader.dataset.tokens_per_step(), loader.dataset.budget
            if tokens > budget:
                log.info(
                    "%s weighs tokens over the global batch: activations of about %d tokens are in "
                    "memory at once, where otherwise those of %d are",
                    *(self.weighting_name, tokens, budget),
                )
        elif self.weighting.scope == "batch":
            log.info("%s weighs tokens over each micro-batch", self.weighting_name)

    def training_step(self, batch: GlobalBatch, batch_idx: int) -> None:
        """One optimiser step over one global batch.

        Raises:
            FloatingPointError: if the gradient is not finite.
        """
        assert self.network is not None
        tokens = sum(micro.tokens for micro in batch.micro)
        before = self.network.seconds
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        place = [self._seed, self.current_epoch, batch_idx, self.global_rank]
        self._draw_from(int(np.random.SeedSequence(place).generate_state(1)[0]))
        with self.network.clock(tokens):
            optimizer.zero_grad()
            found = self._accumulate(batch)
            norm = self._gradient_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.global_step}: lower the learning rate "
                "or set model.gradient_clip"
            )
        # A batch whose every token was dropped teaches nothing: the schedule goes on, the
        # optimiser's momentum does not move the weights.
        rate = scheduler.get_last_lr()[0]
        if batch.kept and found.get("train/weight_mean", 1.0):
            with self.network.clock():
                optimizer.step()
        scheduler.step()
        self.kept_seen += batch.kept
        self.response_seen += batch.responses
        loss = found["train/loss"]
        self.last_step = {
            **found,
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
            "train/kept_share": batch.kept / max(batch.responses, 1),
            "train/tokens_per_second": tokens / (self.network.seconds - before),
            "train/kept_tokens_seen": float(self.kept_seen),
        }
        # Mostly past Lightning's own bookkeeping, which is a twentieth of a small model's step.
        trainer: Any = self.trainer
        number, every = trainer.fit_loop.total_batch_idx, trainer.log_every_n_steps
        if every and (number + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True, logger=False)
            for logger in self.loggers:
                logger.log_metrics(self.last_step, step=number)

    def _draw_from(self, seed: int) -> None:
        # Not torch.manual_seed: where there is no GPU it keeps a note, with the stack, of every
        # call for the devices that might still come.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _accumulate(self, batch: GlobalBatch) -> dict[str, float]:
        """Backward through every micro-batch of this process.

        Returns:
            For the log, of the global batch: ``train/loss``; with a weighting the mean of its
            weights and the share that is 0; with negative weights lambda.
        """
        assert self.network is not None
        strategy: Any = self.trainer.strategy
        world = self.trainer.world_size
        alone = not isinstance(strategy, ParallelStrategy) or not hasattr(
            strategy, "block_backward_sync"
        )
        found: dict[str, float] = {}
        if batch.negative:
            found["train/negative_weight"] = self._lambda()
        total = torch.zeros((), device=self.device)
        #: over this process's tokens: the loss weights, the online weights, how many of those are 0
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for number, (nll, weights, online) in enumerate(self._losses(batch)):
            if batch.negative:
                weights = torch.where(weights < 0.0, weights * self._lambda(), weights)
            last = number == len(batch.micro) - 1
            with nullcontext() if last or alone else strategy.block_backward_sync():
                loss = (nll * weights).sum()
                # Processes average their gradients; the weights already sum to one over all.
                self.manual_backward(loss * world)
            total += loss.detach()
            if online is not None:
                sums += torch.stack([weights.double().sum(), online.sum(), (online == 0.0).sum()])
        if not batch.micro:
            # Every process takes part in the exchange of gradients, even with nothing to say.
            nothing = sum((p * 0.0).sum() for p in self.parameters() if p.requires_grad)
            assert isinstance(nothing, Tensor)
            self.manual_backward(nothing)
        found["train/loss"] = float(strategy.reduce(total, reduce_op="sum"))
        if self.weighting is not None:
            weight, online_sum, zeros = strategy.reduce(sums, reduce_op="sum").tolist()
            found["train/weight_mean"] = online_sum / max(batch.kept, 1)
            found["train/weight_zero_share"] = zeros / max(batch.kept, 1)
            if self.weighting.mean_over == "weights" and weight > 0.0:
                # Known only now; gradients are linear in the weights.
                found["train/loss"] /= weight
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= weight
        return found

    def _lambda(self) -> float:
        """What negative weights are multiplied by in this step."""
        trainer: Any = self.trainer
        steps = int(trainer.estimated_stepping_batches)
        return self.negative_weight * trainer.fit_loop.total_batch_idx / max(steps - 1, 1)

    def _losses(self, batch: GlobalBatch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each micro-batch: losses, loss weights, and online weights if there are any; (N,)."""
        assert self.network is not None
        if self.weighting is None:
            for micro in batch.micro:
                yield self.network(micro), micro.weights, None
            return
        if self.weighs_globally:
            if not batch.kept:
                return
            passes = [weighted_pass(self.network, m, self.weighting) for m in batch.micro]
            parts = weigh_globally(self.weighting, [tokens for _, tokens in passes], self.trainer)
            for micro, (nll, _), online in zip(batch.micro, passes, parts, strict=True):
                yield nll, micro.weights * online.to(micro.weights.dtype), online
        else:
            for micro in batch.micro:
                nll, tokens = weighted_pass(self.network, micro, self.weighting)
                online = self.weighting.weigh(tokens)
                yield nll, micro.weights * online.to(micro.weights.dtype), online

    def _gradient_norm(self) -> float:
        trained = [p for p in self.parameters() if p.grad is not None]
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        return float(torch.nn.utils.clip_grad_norm_(trained, limit))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean loss over the tokens that `TuluDataModule.validated_rows` names."""
        assert self.network is not None
        if batch.rows:
            with self.network.clock(batch.tokens):
                mean = self.network(batch).double().mean()
            self.validation_nll.update(mean, len(batch.targets))

    def on_validation_epoch_end(self) -> None:
        self.log("validation/loss", self.validation_nll, prog_bar=True)

    # -- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained}
        checkpoint["tokens_seen"] = (self.kept_seen, self.response_seen)
        loader: Any = self.trainer.train_dataloader
        checkpoint["loader"] = loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept_seen, self.response_seen = checkpoint["tokens_seen"]
        self._loader_state = checkpoint["loader"]
