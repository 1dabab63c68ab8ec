"""One causal LM in memory with a stack of LoRA adapters over it.

Depth 0 is the base, depth 1 the warm-up model, depth t + 1 the model after round t. Adapters add
up exactly (W + sum_i alpha/r * B_i A_i), so no merged model is needed on disk to score, to train
on, or to go on from; a merged copy in memory only saves time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tokenclean.data.batches import Batch, Layout, Sample, collate
from tokenclean.loss import Head, greedy_tokens, token_nll
from tokenclean.machine import free_memory, settled
from tokenclean.models.adapters import (
    LoraSettings,
    check_adapter_folder,
    check_fits,
    disk_errors,
    join_adapters,
    share,
    write_adapter,
)
from tokenclean.models.attention import SEGMENTS, AttentionReader, Segments, check_layer
from tokenclean.models.loading import BaseConfig, Speed
from tokenclean.models.passes import (
    BackwardRows,
    gather_last_layer,
    lean_lora,
    whole_last_layer,
)
from tokenclean.models.sharding import gather

log = logging.getLogger(__name__)


class Network(nn.Module):
    """One causal LM with a stack of LoRA adapters.

    Attributes:
        hf: the transformers model.
        layout: how batches for it must be collated.
        stack: adapter names, oldest first; the last may be in training, the others are frozen.
        training_full: all weights are trained, no adapters (``lora: null``).
    """

    def __init__(
        self,
        hf: Any,
        layout: Literal["auto", "packed", "padded"] = "auto",
        speed: Speed | None = None,
    ):
        super().__init__()
        self.hf = hf
        self.speed = speed or Speed()
        self.stack: list[str] = []
        self.training_full = False
        #: approximate: gradients flow through the rows that predict kept tokens only
        self.kept_backward = False
        #: seconds spent in passes and steps, and tokens they computed, padding included
        self.seconds = 0.0
        self.tokens = 0
        self._clocked = False
        #: how many adapters of the stack are active
        self.depth = 0
        self._base_fingerprint: str | None = None
        self._peft: list[Any] = []  # in a list: its modules already live in `hf`
        self._backward = BackwardRows()
        #: weights that hold merged adapters at the moment, with what they held before
        self._unmerged: list[tuple[nn.Parameter, Tensor]] = []
        self._gathers = False
        self.requires_grad_(False)
        self.eval()
        self.layout: Layout = self._choose_layout(layout)
        if self.speed.gather_last_layer:
            self._try_gathering()

    @classmethod
    def load(
        cls, base: BaseConfig, device: torch.device | str = "cpu", full: bool = False
    ) -> Network:
        """Read a model's weights (safetensors only).

        Args:
            base: which model.
            device: where it will run; decides ``dtype: auto``. Weights are left on the CPU.
            full: all weights are going to be trained.
        """
        on_gpu = torch.device(device).type == "cuda"
        dtype = base.dtype
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu and not full else "float32"
        options: dict[str, Any] = {}
        if base.load_in_4bit:
            if full:
                raise ValueError("model.base.load_in_4bit: 4-bit weights cannot be trained in full")
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        try:
            hf = AutoModelForCausalLM.from_pretrained(
                base.name,
                revision=base.revision,
                dtype=getattr(torch, dtype),
                trust_remote_code=base.trust_remote_code,
                use_safetensors=True,
                **options,
            )
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            text = " ".join(str(error).split())[:500]
            raise ValueError(f"model.base.name: {base.name} could not be loaded: {text}") from error
        network = cls(hf, base.layout, base.speed)
        log.info("base %s: %s weights, %s batches", base.name, dtype, network.layout)
        return network

    # -- running ------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every target of a batch: float32, shape (N,)."""
        if not batch.rows:
            return torch.zeros(0, device=batch.input_ids.device)
        return token_nll(self.hidden(batch), self.head, batch.targets)

    def greedy(self, batch: Batch) -> Tensor:
        """Most likely token at every target of a batch: int64, shape (N,)."""
        return greedy_tokens(self.hidden(batch), self.head)

    def hidden(
        self, batch: Batch, reader: AttentionReader | Sequence[AttentionReader] = ()
    ) -> Tensor:
        """Final hidden states of the rows that predict the targets, shape (N, H).

        Args:
            reader: readers whose ``values`` are filled on the way; one may stand alone.

        Raises:
            ValueError: if attention cannot be read from this model, or not from that layer.
        """
        readers = self._by_layer([reader] if isinstance(reader, AttentionReader) else reader)
        # Right padding needs no mask: a causal model never looks at what comes later.
        options: dict[str, Any] = {}
        if batch.segments is not None:
            varlen = self.speed.varlen_attention
            options = {
                "position_ids": batch.position_ids,
                "segments": Segments(batch.segments, batch.bounds, varlen, readers),
                # Samples are kept apart by `segments`. Any 4-d mask stops transformers from
                # building a T x T one from the position ids.
                "attention_mask": batch.input_ids.new_zeros((1, 1, 1, 1)),
            }
        if self._gathers:
            options["predicting"] = batch.predicting
        self._backward.chosen = batch.predicting if self.kept_backward else None
        self._backward.total = batch.input_ids.numel()
        states = self.hf.base_model(
            input_ids=batch.input_ids, use_cache=False, **options
        ).last_hidden_state
        return states[0] if self._gathers else states.flatten(0, 1)[batch.predicting]

    def _by_layer(self, readers: Sequence[AttentionReader]) -> dict[int, list[AttentionReader]]:
        if readers and self.layout != "packed":
            raise ValueError(
                f"attention cannot be read from {type(self.hf).__name__}: its batches are padded "
                "and its attention is its own; leave out what needs attention (columns or weights),"
                " or take another base"
            )
        layers = self.hf.config.get_text_config().num_hidden_layers
        found: dict[int, list[AttentionReader]] = {}
        for reader in readers:
            check_layer(reader.layer, self.hf.config, f"attention of {type(self.hf).__name__}")
            found.setdefault(reader.layer % layers, []).append(reader)
        return found

    @contextmanager
    def clock(self, tokens: int = 0) -> Iterator[None]:
        """Count the block's time, once if nested, and the tokens it computes, as model compute."""
        self.tokens += tokens
        if self._clocked:
            yield
            return
        self._clocked, started = True, settled(self.device)
        try:
            yield
        finally:
            self._clocked = False
        self.seconds += settled(self.device) - started

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.hf.get_input_embeddings().weight
        return weight.device

    @property
    def head(self) -> Head:
        """The output head, with the logit transforms that the model's config declares."""
        config, module = self.hf.config.get_text_config(), self.hf.get_output_embeddings()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return Head(module.weight, getattr(module, "bias", None), scale, cap)

    def _choose_layout(self, wish: Literal["auto", "packed", "padded"]) -> Layout:
        """Packed wherever it computes the same as the model's own forward pass, sample by sample.

        Raises:
            ValueError: if not even padded batches agree with the model's own logits, or ``packed``
                was asked for and does not agree.
        """
        samples = self._probe_samples()
        own = self._own_losses(samples)
        if wish != "padded" and self._full_attention():
            self.hf.set_attn_implementation(SEGMENTS)
            error = self._probe(samples, own, "packed")
            if error is None:
                return "packed"
            if wish == "packed":
                raise ValueError(f"model.base.layout: packed does not work for it: {error}")
            log.info("packed batches do not suit this model (%s); using padded ones", error)
            self.hf.set_attn_implementation("sdpa")
        elif wish == "packed":
            raise ValueError(
                "model.base.layout: packed needs full, scaled dot-product attention in every layer"
            )
        error = self._probe(samples, own, "padded")
        if error is not None:
            raise ValueError(
                f"{type(self.hf).__name__}: its output head is not one this project knows how to "
                f"run in chunks ({error})"
            )
        return "padded"

    def _try_gathering(self) -> None:
        """Gather in the last layer if the model is built that way and agrees with itself."""
        self._gathers = gather_last_layer(self.hf.base_model)
        if self._gathers:
            samples = self._probe_samples()
            error = self._probe(samples, self._own_losses(samples), self.layout)
            if error is not None:
                log.info("the last layer does not gather (%s); it computes every row", error)
                whole_last_layer(self.hf.base_model)
                self._gathers = False

    def check_on_device(self) -> None:
        """Try variable-length attention where the weights now are; do without it if it fails."""
        if self.layout != "packed" or not self.speed.varlen_attention or self.device.type != "cuda":
            return
        training = self.training
        self.eval()  # dropout would differ between the two
        self.speed = replace(self.speed, varlen_attention=False)
        batch = collate(self._probe_samples(), "packed").to(self.device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            want = self(batch)
            self.speed = replace(self.speed, varlen_attention=True)
            try:
                gap = float((self(batch) - want).abs().max())
                error = None if gap <= 0.2 else f"per-token losses differ by {gap:.3g}"
                trained = [p for p in self.parameters() if p.requires_grad]
                if trained:
                    with torch.enable_grad():
                        torch.autograd.grad(self(batch).sum(), trained, allow_unused=True)
            except Exception as failure:  # whatever it is, there is another way
                error = f"{type(failure).__name__}: {failure}"
        self.train(training)
        if error is not None:
            self.speed = replace(self.speed, varlen_attention=False)
            log.warning("no variable-length attention on this device (%s)", error)

    def _full_attention(self) -> bool:
        # Without SDPA the attention does something of its own (softcap, sinks, biases).
        if self.hf.config._attn_implementation != "sdpa":
            return False
        config = self.hf.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            return False
        return kinds == {"full_attention"}

    def _probe_samples(self) -> list[Sample]:
        config = self.hf.config.get_text_config()
        generator = torch.Generator().manual_seed(0)
        samples = []
        for row, length in enumerate((11, 6, 11)):
            drawn = torch.randint(0, config.vocab_size, (length,), generator=generator)
            positions = np.arange(1, length)
            weights = np.ones(length - 1, dtype=np.float32)
            samples.append(Sample(row, drawn.numpy().astype(np.int32), positions, weights))
        return samples

    @torch.no_grad()
    def _own_losses(self, samples: list[Sample]) -> list[Tensor]:
        """From the logits of the model's own forward pass with its own attention, one by one."""
        device = self.hf.get_input_embeddings().weight.device
        losses = []
        for sample in samples:
            ids = torch.as_tensor(sample.input_ids, dtype=torch.int64, device=device)
            logits = self.hf(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        return losses

    @torch.no_grad()
    def _probe(self, samples: list[Sample], own: list[Tensor], layout: Layout) -> str | None:
        """Compare our path with the model's own losses on three short samples; None if equal."""
        device = self.hf.get_input_embeddings().weight.device
        tolerance = 1e-3 if self.hf.dtype in (torch.float32, torch.float64) else 0.2
        try:
            batch = collate(samples, layout).to(device)
            for row, got in batch.split(self(batch)):
                gap = float((got - own[row]).abs().max())
                if not gap <= tolerance:
                    return f"per-token losses differ by {gap:.3g}"
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def fingerprint(self) -> str:
        """Hash of the weights that count: the base's and those of the active adapters."""
        if self.training_full:
            return _hash_tensors(dict(self.hf.state_dict()))
        if self._base_fingerprint is None:
            self._base_fingerprint = _hash_tensors(self._base_state())
        parts = [_hash_tensors(self._adapter_state(name)) for name in self.stack[: self.depth]]
        return "+".join([self._base_fingerprint, *parts])

    def config_hash(self) -> str:
        """Hash of what the model's configuration says about its computation."""
        config = self.hf.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)
        text = json.dumps(config, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- training -----------------------------------------------------------------------------

    def train_all_weights(self) -> None:
        """Full fine-tuning: every weight of the base is trained in place."""
        if self.stack:
            raise ValueError("model.lora: null (full fine-tuning) cannot go on top of adapters")
        self.requires_grad_(True)
        self.training_full = True

    def add_adapter(self, lora: LoraSettings) -> None:
        """A fresh LoRA on top of the stack; everything below is frozen and without dropout."""
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
            bias="none",
        )
        name = f"round_{len(self.stack)}"
        try:
            if self._peft:
                self._peft[0].add_adapter(name, config)
            else:
                self._peft = [get_peft_model(self.hf, config, adapter_name=name)]
        except ValueError as error:
            raise ValueError(
                f"model.lora.target_modules: {', '.join(lora.target_modules)} do not fit "
                f"{type(self.hf).__name__}: {error}"
            ) from error
        self._check_adapter("model.lora.target_modules")
        self.stack.append(name)
        self._activate(len(self.stack), train_last=True)

    def train_last_adapter(self, dropout: float) -> None:
        """Train the newest adapter on, with dropout on its input again."""
        self._activate(len(self.stack), train_last=True)
        for module in self.hf.modules():
            if self.stack[-1] in getattr(module, "lora_dropout", {}):
                module.lora_dropout[self.stack[-1]] = nn.Dropout(dropout)

    def load_adapter(self, folder: str | Path) -> None:
        """Put a saved adapter, frozen, on top of the stack.

        Raises:
            ValueError: if the folder holds no adapter, one that is not plain LoRA, or one whose
                tensors do not fit the model's modules.
        """
        folder = Path(folder)
        check_adapter_folder(folder)
        name = f"round_{len(self.stack)}"
        try:
            if self._peft:
                self._peft[0].load_adapter(str(folder), adapter_name=name)
            else:
                peft = PeftModel.from_pretrained(self.hf, str(folder), adapter_name=name)
                self._peft = [peft]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model.adapters: {folder} cannot be read: {error}") from error
        except RuntimeError as error:  # shapes of another model
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"model.adapters: {folder} does not fit model.base: {text}") from error
        self._check_adapter(f"model.adapters: {folder}")
        check_fits(folder, self._adapter_state(name))
        self.stack.append(name)
        self._activate(len(self.stack), train_last=False)

    def _check_adapter(self, option: str) -> None:
        for module in (self.hf.get_input_embeddings(), self.hf.get_output_embeddings()):
            if hasattr(module, "base_layer"):
                raise ValueError(
                    f"{option}: embeddings and output head cannot be adapted, since losses are "
                    "computed from the head's own weights; leave them out"
                )

    def freeze(self) -> None:
        """End of training: nothing in the network takes gradients any more.

        If it was sharded, every process must call it, and the first one's is whole afterwards.
        """
        gather(self.hf)
        self._activate(self.depth, train_last=False)
        self.requires_grad_(False)
        self.eval()

    def drop_adapters(self) -> None:
        """Back to the bare base."""
        self._unmerge()
        if self._peft:
            self.hf = self._peft[0].unload()
            self._peft, self.stack, self.depth = [], [], 0

    @contextmanager
    def at_depth(self, depth: int) -> Iterator[Network]:
        """Run with the first ``depth`` adapters only; 0 is the base."""
        if not 0 <= depth <= len(self.stack):
            raise ValueError(f"depth {depth} of a stack of {len(self.stack)} adapters")
        before = self.depth
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        last = self.stack[-1] if self.stack else ""
        dropouts = [
            (module.lora_dropout, module.lora_dropout[last])
            for module in self.hf.modules()
            if last in getattr(module, "lora_dropout", {})
        ]
        self._activate(depth, train_last=False)
        try:
            yield self
        finally:
            self._activate(before, train_last=bool(trained))
            for holder, dropout in dropouts:
                holder[last] = dropout
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name in trained)

    def _activate(self, depth: int, train_last: bool) -> None:
        """Make the first ``depth`` adapters count.

        Under a trained one the frozen ones are merged into float32 weights. peft switches gradients
        on for whatever it activates, so they are set again afterwards.
        """
        self._unmerge()
        self.depth = depth
        if not self._peft:
            return
        if self.speed.lean_lora:
            lean_lora(self.hf, self._backward)
        tuner = self._peft[0].base_model
        if depth == 0:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(self.stack[:depth])
            below = self.stack[: depth - 1]
            exact = self.hf.dtype == torch.float32
            if train_last and below and exact and self._merge(below, None):
                tuner.set_adapter(self.stack[depth - 1 : depth])
        trained = self.stack[-1] if train_last else None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained is not None and f".{trained}." in name)
        for module in self.hf.modules():
            for name in self.stack[: -1 if train_last else None]:
                if name in getattr(module, "lora_dropout", {}):
                    module.lora_dropout[name] = nn.Identity()

    # -- merging ------------------------------------------------------------------------------

    @contextmanager
    def merged(self, dtype: torch.dtype | None = None) -> Iterator[Network]:
        """Score with the active adapters added to a copy of the weights.

        Deltas are added in float32 and rounded once. Without adapters, with too little memory for
        the copy, with ``speed.merge`` off or where the copy would be bfloat16, which rounds away
        much of what an adapter adds, nothing changes.

        Args:
            dtype: of the copy: what products are computed in (float16 under ``16-mixed``); by
                default that of the weights.
        """
        names = self.stack[: self.depth]
        if self._unmerged or not names or not self._merge(names, dtype):
            yield self
            return
        mine, tuner = self._unmerged, self._peft[0].base_model
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        tuner.disable_adapter_layers()
        try:
            yield self
        finally:
            # After an error somebody else may have put things right already.
            if self._unmerged is mine:
                self._unmerge()
                tuner.enable_adapter_layers()
                for name, parameter in self.named_parameters():
                    parameter.requires_grad_(name in trained)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, names: list[str], dtype: torch.dtype | None) -> bool:
        """Swap in weights with these adapters added; False if that cannot be done."""
        modules = [
            m for m in self.hf.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")
        ]
        if not self.speed.merge or any(type(m.base_layer) is not nn.Linear for m in modules):
            return False
        if (dtype or self.hf.dtype) == torch.bfloat16:
            return False
        weights = [m.base_layer.weight for m in modules]
        need = sum(w.numel() * (dtype or w.dtype).itemsize for w in weights)
        # A float32 sum per module, and room for the pass itself.
        if need + 4 * max(w.numel() for w in weights) > 0.5 * free_memory(self.device):
            log.info("no room for a merged copy of the weights (%.1f GB)", need / 1e9)
            return False
        with torch.autocast(self.device.type, enabled=False):
            for module, weight in zip(modules, weights, strict=True):
                plain = weight.data
                self._unmerged.append((weight, plain))
                weight.data = _plus_deltas(module, plain, names).to(dtype or plain.dtype)
        return True

    def _unmerge(self) -> None:
        for weight, plain in self._unmerged:
            # Lightning may have moved the model meanwhile.
            weight.data = plain.to(weight.device)
        self._unmerged = []

    def _base_state(self) -> dict[str, Tensor]:
        """The base's own weights by their own names, whatever is on top of them or merged in."""
        plain = {weight.data_ptr(): tensor for weight, tensor in self._unmerged}
        return {
            k.replace(".base_layer.", "."): plain.get(v.data_ptr(), v)
            for k, v in self.hf.state_dict().items()
            if ".lora_" not in k
        }

    # -- publishing ---------------------------------------------------------------------------

    def save_last_adapter(self, folder: Path) -> None:
        """The newest adapter alone, in PEFT's format: one round of a run."""
        name = self.stack[-1]
        write_adapter(folder, self._peft[0].peft_config[name], self._adapter_state(name))

    def save_stack(self, folder: Path) -> None:
        """The whole stack as one adapter that `PeftModel.from_pretrained` loads."""
        configs = [self._peft[0].peft_config[name] for name in self.stack]
        write_adapter(folder, *join_adapters(configs, [self._adapter_state(n) for n in self.stack]))

    def save_merged(self, folder: Path, tokenizer: Any) -> None:
        """Base plus stack as one ordinary model, which `AutoModelForCausalLM` loads.

        Deltas are added in float32 and rounded once to the weights' dtype.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plain = self._base_state()
        for module_name, module in self.hf.named_modules():
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                key = f"{module_name}.weight"
                plain[key] = _plus_deltas(module, plain[key], self.stack).to(plain[key].dtype)
        target = self._peft[0].get_base_model() if self._peft else self.hf
        implementation = target.config._attn_implementation
        if implementation == SEGMENTS:
            target.set_attn_implementation("sdpa")
        with disk_errors(folder):
            target.save_pretrained(folder, state_dict=plain)
        target.set_attn_implementation(implementation)
        tokenizer.save_pretrained(folder)
        for weights in sorted(folder.glob("*.safetensors")):
            share(weights)

    def _adapter_state(self, name: str) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(
            self._peft[0], adapter_name=name, save_embedding_layers=False
        )
        return {k: v.detach().cpu().contiguous() for k, v in sorted(state.items())}


def _plus_deltas(module: Any, weight: Tensor, names: list[str]) -> Tensor:
    """A module's weight plus its adapters of these names, in float32 (float64 stays)."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name in names:
        if name in module.lora_A:
            total = total + module.get_delta_weight(name).to(total)
    return total


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
