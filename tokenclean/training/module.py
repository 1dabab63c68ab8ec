"""`CleanedSFTModule`: fine-tuning on the tokens that were kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics.aggregation import MeanMetric
from transformers import get_scheduler

from tokenclean.data.batches import Batch
from tokenclean.data.datamodule import GlobalBatch
from tokenclean.estimate import ModelShape, needs_checkpointing
from tokenclean.models import BaseConfig, LoraSettings, Network, adapter_folders
from tokenclean.models.sharding import (
    average_whole,
    clip_gradient,
    is_filler,
    local,
    no_samples,
    same_number,
    shard,
    whole_and_sharded,
)
from tokenclean.named import Value
from tokenclean.scoring.module import check_precision, use_layout
from tokenclean.training.online import weigh_globally, weighted_pass
from tokenclean.training.trouble import (
    first_line,
    not_finite,
    samples_without_gradient,
    smaller_budget,
)
from tokenclean.training.weights import Tokens, Weighting, make_weighting

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
        self._metrics: dict[str, float] = {}
        self.validation_nll = MeanMetric()
        self._seed = 0
        #: of a checkpoint that training goes on from
        self._resumed: dict[str, Any] | None = None
        #: of the step in progress, micro-batches with their losses so far
        self._computed: list[tuple[Batch, Tensor]] = []
        #: whether the step in progress can still be begun again without other processes
        self._repeatable = True
        #: the micro-batch being computed
        self._now: Batch | None = None

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
            if self._shards:
                raise ValueError(
                    "trainer.strategy: `clean` keeps its network in memory from round to round, "
                    "which sharded weights do not go with; use ddp, or run the stages by hand"
                )
            return
        device = self.trainer.strategy.root_device
        base = self.base
        if self._shards:  # what is merged into a weight could not be taken out of its parts again
            base = replace(base, speed=replace(base.speed, merge=False))
        self.network = Network.load(base, device, full=self.lora is None)
        for folder in self.adapters:
            self.network.load_adapter(folder)
        use_layout(self, self.network)
        self.start_round()
        if self._shards:
            shard(self.network.hf, device)

    @property
    def _shards(self) -> bool:
        """Whether the network's layers are split over the processes (FSDP2)."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

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
        budget: int = self._steps.budget
        if self.weighs_globally:
            budget = max(budget, self._steps.tokens_per_step())
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
        whole, sharded = whole_and_sharded(self._trained())
        # One kernel cannot update tensors of both kinds.
        groups = [{"params": group} for group in (whole, sharded) if group]
        optimizer = self.make_optimizer(groups if len(groups) > 1 else groups[0]["params"])
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

    def _trained(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.requires_grad]

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
        if self._resumed is not None:
            loader: Any = self.trainer.train_dataloader
            loader.load_state_dict(self._resumed["loader"])
            self._seed = self._resumed["seed"]
            self._resumed = None
        self._look_at_weights()

    def _look_at_weights(self) -> None:
        """Say what a weighting takes for its batch, and what that costs.

        Raises:
            ValueError: if tokens are to be weighted and others to be unlearnt.
        """
        if self.weighting is None:
            return
        if self._steps.rows.negative.any():
            raise ValueError(
                "model.weighting: this cleaned pool has negative weights (rule forgetting), which "
                "online weights do not go with; leave it out"
            )
        if self.weighs_globally:
            tokens, budget = self._steps.tokens_per_step(), self._steps.budget
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
            FloatingPointError: if loss or gradient are not finite; the sample is named.
            ValueError: if memory does not even suffice for a sample at a time.
        """
        assert self.network is not None
        tokens = sum(micro.tokens for micro in batch.micro)
        before = self.network.seconds
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        with self.network.clock(tokens):
            found = self._gradient(batch, optimizer)
            norm = self._gradient_norm()
        if not math.isfinite(norm) or not math.isfinite(found["train/loss"]):
            raise FloatingPointError(self._not_finite(batch))
        # A batch whose every token was dropped teaches nothing: the schedule goes on, the
        # optimiser's momentum does not move the weights.
        rate = scheduler.get_last_lr()[0]
        if batch.kept and found.get("train/weight_mean", 1.0):
            with self.network.clock():
                self._step(optimizer)
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

    def _step(self, optimizer: Any) -> None:
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory in the optimizer's step ({first_line(error)}): its state does not "
                "fit beside the weights; train fewer of them (model.lora.r)"
            ) from None

    def _gradient(self, batch: GlobalBatch, optimizer: Any) -> dict[str, float]:
        """`_accumulate`, in smaller micro-batches from where on memory runs out."""
        steps = self._steps
        # Planned before, with a budget that turned out too large.
        if any(micro.tokens > steps.budget and len(micro.rows) > 1 for micro in batch.micro):
            batch = steps[batch.key].to(self.device)
        while True:
            place = [self._seed, *batch.key, self.global_rank]
            self._draw_from(int(np.random.SeedSequence(place).generate_state(1)[0]))
            optimizer.zero_grad()
            self._computed.clear()
            self._repeatable = not self._shards
            try:
                return self._accumulate(batch)
            except torch.OutOfMemoryError as error:
                problem = first_line(error)
            # Past the handler: the error holds on to the activations of the pass that failed.
            self._computed.clear()
            when = f"out of memory ({problem}) at step {self.global_step}"
            assert self._now is not None
            if self.weighs_globally:
                raise ValueError(
                    f"{when}: {self.weighting_name} keeps the activations of the whole batch; set "
                    "model.weighting_scope to micro, model.gradient_checkpointing to true, or "
                    "data.batch_size lower"
                )
            if not self._repeatable:
                raise ValueError(
                    f"{when}, where other processes wait for this one: set data.token_budget below "
                    f"{self._now.tokens}, or model.gradient_checkpointing to true"
                )
            steps.budget = smaller_budget(batch, self._now, steps, when)
            self._now = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            batch = steps[batch.key].to(self.device)

    @property
    def _steps(self) -> Any:
        """The data set of `TuluDataModule.training_loader`."""
        loader: Any = self.trainer.train_dataloader
        return loader.dataset

    def _not_finite(self, batch: GlobalBatch) -> str:
        """What to say of a step whose loss or gradient is not finite."""
        network, steps = self.network, self._steps
        assert network is not None

        def alone(step: int) -> tuple[list[int], int]:
            budget, steps.budget = steps.budget, 1
            single = steps[batch.key].to(self.device)
            steps.budget = budget
            return samples_without_gradient(
                single, lambda micro: (network(micro) * micro.weights).sum(), self._trained()
            )

        tried = None if self._shards else alone
        return not_finite(self._computed, self.global_step, tried, steps.id_of)

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
        alone = world == 1 or self._shards or not isinstance(strategy, ParallelStrategy)
        if self._shards:
            filled = same_number(batch.micro, self.network.layout, self.device)
            batch = replace(batch, micro=filled)
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
                losses = nll * weights
                self._computed.append((batch.micro[number], losses.detach()))
                loss = losses.sum()
                self._repeatable &= alone or not last
                # Processes average their gradients; the weights already sum to one over all.
                self.manual_backward(loss * world)
            total += loss.detach()
            if online is not None:
                sums += torch.stack([weights.double().sum(), online.sum(), (online == 0.0).sum()])
        if self._shards:
            average_whole(self._trained())
        elif not batch.micro:
            # Every process takes part in the exchange of gradients, even with nothing to say.
            self._repeatable = alone
            nothing = torch.stack([(p * 0.0).sum() for p in self._trained()]).sum()
            self.manual_backward(nothing)
        found["train/loss"] = float(strategy.reduce(total, reduce_op="sum"))
        if self.weighting is not None:
            weight, online_sum, zeros = strategy.reduce(sums, reduce_op="sum").tolist()
            found["train/weight_mean"] = online_sum / max(batch.kept, 1)
            found["train/weight_zero_share"] = zeros / max(batch.kept, 1)
            if self.weighting.mean_over == "weights" and weight > 0.0:
                # Known only now; gradients are linear in the weights.
                found["train/loss"] /= weight
                for parameter in self._trained():
                    if parameter.grad is not None:
                        local(parameter.grad).div_(weight)
        return found

    def _lambda(self) -> float:
        """What negative weights are multiplied by in this step."""
        trainer: Any = self.trainer
        steps = int(trainer.estimated_stepping_batches)
        return self.negative_weight * trainer.fit_loop.total_batch_idx / max(steps - 1, 1)

    def _losses(self, batch: GlobalBatch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each micro-batch: losses, loss weights, and online weights if there are any; (N,)."""
        network, weighting = self.network, self.weighting
        assert network is not None
        if self.weighs_globally:
            assert weighting is not None
            if batch.kept:
                yield from self._losses_weighed_globally(network, weighting, batch)
            return
        for micro in batch.micro:
            self._now = micro
            if weighting is None or is_filler(micro):
                yield network(micro), micro.weights, None
            else:
                nll, tokens = weighted_pass(network, micro, weighting)
                online = weighting.weigh(tokens)
                yield nll, micro.weights * online.to(micro.weights.dtype), online

    def _losses_weighed_globally(
        self, network: Network, weighting: Weighting, batch: GlobalBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        passes: list[tuple[Tensor, Tokens | None]] = []
        for micro in batch.micro:
            self._now = micro
            if is_filler(micro):
                passes.append((network(micro), None))
            else:
                passes.append(weighted_pass(network, micro, weighting))
        parts = weigh_globally(weighting, [t for _, t in passes if t is not None], self.trainer)
        weights = iter(parts)
        for micro, (nll, tokens) in zip(batch.micro, passes, strict=True):
            self._now = micro
            online = None if tokens is None else next(weights)
            factor = 1.0 if online is None else online.to(micro.weights.dtype)
            yield nll, micro.weights * factor, online

    def _gradient_norm(self) -> float:
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        trained = [p for p in self._trained() if p.grad is not None]
        if self._shards:
            return clip_gradient(trained, limit)
        return float(torch.nn.utils.clip_grad_norm_(trained, limit))

    def on_train_end(self) -> None:
        if not all(bool(local(p).isfinite().all()) for p in self._trained()):
            raise FloatingPointError(
                f"weights are not finite after step {self.global_step}: lower the learning rate"
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean loss over the tokens that `TuluDataModule.validated_rows` names."""
        assert self.network is not None
        if batch.rows:
            with self.network.clock(batch.tokens):
                mean = self.network(batch).double().mean()
            self.validation_nll.update(mean, len(batch.targets))
        elif self._shards:  # the others wait for this process's part of the layers
            self.network(no_samples(self.network.layout).to(self.device))

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
        checkpoint["seed"] = self._seed
        checkpoint["metrics"] = (self._validated(), self.last_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept_seen, self.response_seen = checkpoint["tokens_seen"]
        self._metrics, self.last_step = checkpoint["metrics"]
        self._resumed = {name: checkpoint[name] for name in ("loader", "seed")}

    def metrics(self) -> dict[str, float]:
        """The latest validation's and the latest step's, a resumed run's from before as well."""
        return {**self._validated(), **self.last_step}

    def _validated(self) -> dict[str, float]:
        now = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**self._metrics, **now}
