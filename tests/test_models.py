"""The network against a written-out float64 model, its adapter stack, and what it publishes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, llama_nll_float64, sentencepiece_tokenizer, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tokenclean.data.batches import Layout, Sample, collate
from tokenclean.models import (
    BaseConfig,
    LoraSettings,
    Network,
    adapter_tensors,
    check_base,
    load_tokenizer,
)

V = 61
LORA = LoraSettings(r=4, alpha=8, dropout=0.0)
LENGTHS = [2, 7, 3, 7, 12, 5, 2]
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def draw(lengths: Sequence[int], seed: int = 0, every: int = 1) -> list[Sample]:
    """Random samples; targets are every ``every``-th token, the last one always."""
    generator = np.random.default_rng(seed)
    samples = []
    for row, length in enumerate(lengths):
        positions = np.arange(length - 1, 0, -every)[::-1].copy()
        ids = generator.integers(0, V, length).astype(np.int32)
        samples.append(Sample(row, ids, positions, np.ones(len(positions), np.float32)))
    return samples


@torch.no_grad()
def losses(network: Network, samples: list[Sample], layout: Layout) -> dict[int, Tensor]:
    batch = collate(samples, layout)
    return {row: nll.clone() for row, nll in batch.split(network(batch))}


def randomise(network: Network, seed: int = 0) -> None:
    """A fresh LoRA has B = 0 and changes nothing: give the newest one weights that count."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if f".{network.stack[-1]}." in name:
            nn.init.normal_(parameter, std=0.1)


def deltas(network: Network, depth: int) -> dict[str, Tensor]:
    """sum of alpha / r * B A over the first ``depth`` adapters, in float64, by module."""
    total: dict[str, Tensor] = {}
    for name, module in network.hf.named_modules():
        if hasattr(module, "lora_A"):
            for adapter in network.stack[:depth]:
                a = module.lora_A[adapter].weight.detach().double()
                b = module.lora_B[adapter].weight.detach().double()
                total[name] = total.get(name, torch.zeros(())) + LORA.alpha / LORA.r * (b @ a)
    return total


def with_adapters(count: int, **changes: Any) -> tuple[Network, Any]:
    """A network with ``count`` randomised adapters, and an untouched copy of its base."""
    model = tiny_llama(V, **changes)
    network = Network(copy.deepcopy(model))
    for i in range(count):
        network.add_adapter(LORA)
        randomise(network, seed=i + 1)
    network.freeze()
    return network, model


def close(got: dict[int, Tensor], want: dict[int, Tensor], atol: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for row in want:
        torch.testing.assert_close(got[row].double(), want[row].double(), rtol=0, atol=atol)


# -- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapters", [0, 1])
@pytest.mark.parametrize("every", [1, 3])
def test_losses_equal_the_written_out_model(layout: Layout, adapters: int, every: int) -> None:
    network, base = with_adapters(adapters)
    samples = draw(LENGTHS, every=every)
    added = deltas(network, adapters)
    want = {
        s.row: llama_nll_float64(base, s.input_ids.tolist(), added)[s.positions - 1]
        for s in samples
    }
    got = losses(network, samples, layout)
    assert all(v.dtype == torch.float32 for v in got.values())
    close(got, want)
    for i in range(0, len(samples), 3):  # batches of three with one left over
        part = samples[i : i + 3]
        close(losses(network, part, layout), {s.row: want[s.row] for s in part})


@pytest.mark.parametrize("adapters", [0, 1])
def test_losses_at_lengths_up_to_2048(adapters: int) -> None:
    network, base = with_adapters(adapters)
    samples = draw([2048, 2, 511, 64, 1025])
    added = deltas(network, adapters)
    want = {s.row: llama_nll_float64(base, s.input_ids.tolist(), added) for s in samples}
    assert sum(len(w) for w in want.values()) % 1024 != 0  # the last chunk of rows is left over
    close(losses(network, samples, "packed"), want)
    close(losses(network, samples, "padded"), want)


def test_one_token_has_no_loss() -> None:
    network, _ = with_adapters(0)
    samples = draw([1, 5, 1])
    assert list(losses(network, samples, "packed")) == [1]
    for layout in ("packed", "padded"):
        batch = collate(draw([1, 1]), layout)  # type: ignore[arg-type]
        assert batch.tokens == 0 and len(batch.targets) == 0


def test_layout_and_batch_order_change_only_rounding() -> None:
    network, _ = with_adapters(1)
    samples = draw(LENGTHS)
    want = losses(network, samples, "packed")
    shuffled = [samples[i] for i in (4, 0, 6, 2, 5, 1, 3)]
    close(losses(network, shuffled, "packed"), want)
    close(losses(network, samples, "padded"), want)
    alone = {s.row: losses(network, [s], "packed")[s.row] for s in samples}
    close(alone, want)


def test_the_same_plan_gives_the_same_bits() -> None:
    network, _ = with_adapters(1)
    samples = draw(LENGTHS)
    first, second = losses(network, samples, "packed"), losses(network, samples, "packed")
    for row in first:
        assert torch.equal(first[row], second[row])


def test_packed_samples_do_not_see_each_other() -> None:
    network, _ = with_adapters(0)
    assert network.layout == "packed"
    samples = draw([9, 9, 6, 12])
    before = losses(network, samples, "packed")
    for changed in range(len(samples)):
        others = [*samples]
        new_ids = (samples[changed].input_ids + 1) % V
        others[changed] = replace(samples[changed], input_ids=new_ids.astype(np.int32))
        after = losses(network, others, "packed")
        for row in before:
            assert torch.equal(before[row], after[row]) == (row != changed)


def test_one_segment_for_all_would_be_noticed() -> None:
    network, _ = with_adapters(0)
    samples = draw([9, 9, 6, 12])
    batch = collate(samples, "packed")
    with torch.no_grad():
        right = network(batch)
        wrong = network(replace(batch, segments=[batch.tokens]))
    first = batch.counts[0]
    assert torch.allclose(right[:first], wrong[:first], atol=2e-5)
    assert float((right[first:] - wrong[first:]).abs().max()) > 0.1


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    batch = collate(draw(LENGTHS), "packed")
    found = []
    for checkpointing in (False, True):
        network, _ = with_adapters(1)
        network.train_last_adapter(0.0)
        network.train()
        if checkpointing:
            network.hf.gradient_checkpointing_enable({"use_reentrant": False})
        network(batch).mean().backward()
        found.append([p.grad for p in network.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) == 2 * 7 * 2
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and one.any()
        torch.testing.assert_close(one, other)


def own_float64(model: Any, sample: Sample) -> Tensor:
    """From the whole logits of the model's own forward pass in float64."""
    ids = torch.as_tensor(sample.input_ids, dtype=torch.int64)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    return nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def mistral(window: int | None) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def gemma2() -> Any:
    torch.manual_seed(0)
    options = {**SMALL, "initializer_range": 0.5}
    return Gemma2ForCausalLM(
        Gemma2Config(
            **options,
            head_dim=8,
            sliding_window=4,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    )


def granite() -> Any:
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda: mistral(None), "packed"),
        (lambda: mistral(4), "padded"),
        (gpt2, "packed"),
        (gemma2, "padded"),
        (granite, "packed"),
        (lambda: tiny_llama(V, num_key_value_heads=1), "packed"),
        (lambda: tiny_llama(V, num_key_value_heads=4, tie_word_embeddings=True), "packed"),
    ],
    ids=["mistral", "mistral-window", "gpt2", "gemma2", "granite", "mqa", "mha-tied"],
)
def test_other_architectures(make: Any, layout: Layout) -> None:
    model = make().eval()
    if hasattr(model.config, "attn_logit_softcapping"):
        model.set_attn_implementation("eager")  # the only one with all of Gemma 2's attention
    oracle = copy.deepcopy(model).double()
    network = Network(model)
    assert network.layout == layout
    samples = draw([9, 15, 4, 9, 12])
    want = {s.row: own_float64(oracle, s) for s in samples}
    close(losses(network, samples, layout), want)
    close(losses(network, samples, "padded"), want)


def test_mistral_equals_the_written_out_model() -> None:
    model = mistral(None)
    samples = draw(LENGTHS)
    want = {s.row: llama_nll_float64(model, s.input_ids.tolist()) for s in samples}
    close(losses(Network(model), samples, "packed"), want)


def test_a_window_narrower_than_the_probe_is_not_the_only_reason_to_pad() -> None:
    # The probe's samples are shorter than this window: the config has to be read.
    assert Network(mistral(256)).layout == "padded"
    with pytest.raises(ValueError, match=r"model\.base\.layout: packed needs full"):
        Network(mistral(256), layout="packed")


def test_padded_on_request() -> None:
    assert Network(tiny_llama(V), layout="padded").layout == "padded"


def test_attention_other_than_sdpa_is_left_alone() -> None:
    model = tiny_llama(V)
    model.set_attn_implementation("eager")
    network = Network(model)
    assert (network.layout, model.config._attn_implementation) == ("padded", "eager")


def test_gemma2_loads_from_disk_with_its_own_attention(tmp_path: Path) -> None:
    model = gemma2()
    model.save_pretrained(tmp_path)
    oracle = copy.deepcopy(model).double().eval()
    oracle.set_attn_implementation("eager")
    network = Network.load(BaseConfig(str(tmp_path)))
    samples = draw([9, 15, 4])
    close(losses(network, samples, "padded"), {s.row: own_float64(oracle, s) for s in samples})


def test_a_head_with_transforms_of_its_own_is_refused() -> None:
    torch.manual_seed(0)
    config = FalconH1Config(
        **SMALL, lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8
    )
    with pytest.raises(ValueError, match=r"FalconH1ForCausalLM: its output head .* chunks"):
        Network(FalconH1ForCausalLM(config))


# -- the stack ----------------------------------------------------------------------------------


def test_every_depth_is_the_base_plus_the_adapters_below() -> None:
    network, base = with_adapters(2)
    samples = draw(LENGTHS)
    seen = []
    for depth in (0, 1, 2):
        added = deltas(network, depth)
        want = {s.row: llama_nll_float64(base, s.input_ids.tolist(), added) for s in samples}
        with network.at_depth(depth):
            got = losses(network, samples, "packed")
        close(got, want)
        seen.append(torch.cat([got[row] for row in sorted(got)]))
    assert float((seen[0] - seen[1]).abs().max()) > 0.1
    assert float((seen[1] - seen[2]).abs().max()) > 0.1
    assert network.depth == 2
    with pytest.raises(ValueError, match="depth 3 of a stack of 2"), network.at_depth(3):
        pass


def test_at_depth_restores_what_was_in_training() -> None:
    network, _ = with_adapters(1)
    network.add_adapter(replace(LORA, dropout=0.25))
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".round_1." in n for n in trained)
    with pytest.raises(RuntimeError, match="on purpose"), network.at_depth(1):
        assert not any(p.requires_grad for p in network.parameters())
        raise RuntimeError("on purpose")
    assert network.depth == 2
    assert {n for n, p in network.named_parameters() if p.requires_grad} == trained
    assert dropouts(network, "round_1") == {0.25}
    assert dropouts(network, "round_0") == {None}


def dropouts(network: Network, adapter: str) -> set[float | None]:
    """Dropout rates in one adapter's modules; None for no dropout at all."""
    return {
        getattr(module.lora_dropout[adapter], "p", None)
        for module in network.hf.modules()
        if adapter in getattr(module, "lora_dropout", {})
    }


def test_dropout_acts_on_the_adapter_in_training_alone() -> None:
    network = Network(tiny_llama(V))
    network.add_adapter(replace(LORA, dropout=0.5))
    randomise(network)
    batch = collate(draw(LENGTHS), "packed")
    network.train()
    with torch.no_grad():
        assert not torch.equal(network(batch), network(batch))
        network.add_adapter(replace(LORA, dropout=0.5))  # B = 0: it adds nothing yet
        assert dropouts(network, "round_0") == {None} and dropouts(network, "round_1") == {0.5}
        assert torch.equal(network(batch), network(batch))
        randomise(network, seed=3)
        assert not torch.equal(network(batch), network(batch))
        network.freeze()
        assert torch.equal(network(batch), network(batch))
    network.train_last_adapter(0.3)
    assert dropouts(network, "round_1") == {0.3}


def test_training_the_top_adapter_leaves_everything_below_alone() -> None:
    network, _ = with_adapters(1)
    network.add_adapter(LORA)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    batch = collate(draw(LENGTHS), "packed")
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step B = 0 keeps A where it is
        optimizer.zero_grad()
        network(batch).mean().backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == (".round_1." not in name), name


def test_drop_adapters_gives_the_base_back() -> None:
    network, base = with_adapters(2)
    network.drop_adapters()
    samples = draw(LENGTHS)
    assert network.stack == [] and network.depth == 0
    assert network.fingerprint() == Network(base).fingerprint()
    before, after = losses(Network(base), samples, "packed"), losses(network, samples, "packed")
    assert all(torch.equal(before[row], after[row]) for row in before)


# -- publishing ---------------------------------------------------------------------------------


def test_saved_stack_is_one_peft_adapter(tmp_path: Path) -> None:
    network, base = with_adapters(3)
    network.save_stack(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (12, 24)
    assert config["target_modules"] == sorted(LORA.target_modules)
    samples = draw(LENGTHS)
    added = deltas(network, 3)
    want = {s.row: llama_nll_float64(base, s.input_ids.tolist(), added) for s in samples}
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close({s.row: own_float64(peft, s) for s in samples}, want)
    again = Network(copy.deepcopy(base))
    again.load_adapter(tmp_path)
    again.freeze()
    close(losses(again, samples, "packed"), want)


def test_saved_stack_of_unlike_adapters(tmp_path: Path) -> None:
    base = tiny_llama(V)
    network = Network(copy.deepcopy(base))
    settings = [
        LoraSettings(r=2, alpha=8, dropout=0.0, target_modules=["q_proj", "up_proj"]),
        LoraSettings(r=3, alpha=2, dropout=0.0, target_modules=["up_proj", "o_proj"]),
    ]
    for number, lora in enumerate(settings):
        network.add_adapter(lora)
        randomise(network, seed=number)
    network.freeze()
    network.save_stack(tmp_path)
    samples = draw(LENGTHS)
    peft = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    close({s.row: own_float64(peft, s) for s in samples}, losses(network, samples, "packed"))


def test_saved_adapters_stack_again(tmp_path: Path) -> None:
    network, base = with_adapters(1)
    network.save_last_adapter(tmp_path / "first")
    network.add_adapter(LORA)
    randomise(network, seed=9)
    network.save_last_adapter(tmp_path / "second")
    network.freeze()
    again = Network(copy.deepcopy(base))
    for name in ("first", "second"):
        again.load_adapter(tmp_path / name)
    again.freeze()
    assert again.stack == ["round_0", "round_1"] and again.depth == 2
    assert not any(p.requires_grad for p in again.parameters())
    assert again.fingerprint() == network.fingerprint()
    samples = draw(LENGTHS)
    one, other = losses(network, samples, "packed"), losses(again, samples, "packed")
    assert all(torch.equal(one[row], other[row]) for row in one)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        network, _ = with_adapters(2)
        network.save_last_adapter(tmp_path / name / "last")
        network.save_stack(tmp_path / name / "stack")
    for kind in ("last", "stack"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            one, other = (tmp_path / name / kind / file for name in ("a", "b"))
            assert one.read_bytes() == other.read_bytes()
    tensors = adapter_tensors(tmp_path / "a" / "last")
    assert len(tensors) == 2 * 7 * 2


@pytest.mark.parametrize("tied", [False, True])
def test_saved_merged_model_is_an_ordinary_one(tmp_path: Path, tied: bool) -> None:
    network, base = with_adapters(2, tie_word_embeddings=tied)
    tokenizer = byte_level_tokenizer()
    samples = draw(LENGTHS)
    before = losses(network, samples, "packed")
    network.save_merged(tmp_path, tokenizer)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    merged, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert merged.num_parameters() == base.num_parameters()
    added = deltas(network, 2)
    close(
        {s.row: own_float64(merged.eval(), s) for s in samples},
        {s.row: llama_nll_float64(base, s.input_ids.tolist(), added) for s in samples},
    )
    after = losses(network, samples, "packed")  # saving leaves the network as it was
    assert all(torch.equal(before[row], after[row]) for row in before)
    assert "tokenclean" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_merging_rounds_once(tmp_path: Path) -> None:
    network = Network(tiny_llama(V).bfloat16())
    network.add_adapter(LORA)
    randomise(network)
    network.freeze()
    network.save_merged(tmp_path, byte_level_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert merged.dtype == torch.bfloat16
    name = "model.layers.1.mlp.down_proj"
    plain = network.hf.get_submodule(name).base_layer.weight.double()
    want = (plain + deltas(network, 1)[name]).float().bfloat16()
    assert torch.equal(merged.get_parameter(f"{name}.weight"), want)


# -- fingerprints -------------------------------------------------------------------------------


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    base = tiny_llama(V)
    plain = Network(copy.deepcopy(base)).fingerprint()
    assert Network(tiny_llama(V, seed=1)).fingerprint() != plain
    assert Network(copy.deepcopy(base).bfloat16()).fingerprint() != plain
    base.save_pretrained(tmp_path)
    assert Network.load(BaseConfig(str(tmp_path))).fingerprint() == plain

    network, _ = with_adapters(2)
    both = network.fingerprint()
    assert both.startswith(plain + "+") and both.count("+") == 2
    with network.at_depth(0):
        assert network.fingerprint() == plain
    with network.at_depth(1):
        assert both.startswith(network.fingerprint() + "+")
    assert network.fingerprint() == both
    randomise(network, seed=77)
    assert network.fingerprint() not in (both, plain)


def test_fingerprint_of_a_fully_trained_model_is_not_remembered() -> None:
    network = Network(tiny_llama(V))
    before = network.fingerprint()
    network.train_all_weights()
    assert network.fingerprint() == before
    with torch.no_grad():
        next(iter(network.parameters())).add_(1.0)
    assert network.fingerprint() != before


# -- loading and refusing -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_frequencies_stay_float32(
    model_folder: Path, dtype: Literal["bfloat16", "float16"]
) -> None:
    network = Network.load(BaseConfig(str(model_folder), dtype=dtype))
    exact = Network.load(BaseConfig(str(model_folder)))
    assert network.hf.dtype == getattr(torch, dtype)
    assert network.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(network.hf.model.rotary_emb.inv_freq, exact.hf.model.rotary_emb.inv_freq)
    network.add_adapter(LORA)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


def test_automatic_dtype_is_float32_on_a_cpu(model_folder: Path) -> None:
    assert Network.load(BaseConfig(str(model_folder))).hf.dtype == torch.float32
    full = Network.load(BaseConfig(str(model_folder)), "cuda", full=True)
    assert full.hf.dtype == torch.float32
    assert Network.load(BaseConfig(str(model_folder)), "cuda").hf.dtype == torch.bfloat16


def test_loaded_network_is_frozen_and_in_eval_mode(model_folder: Path) -> None:
    network = Network.load(BaseConfig(str(model_folder)))
    assert not network.training and not network.hf.training
    assert not any(p.requires_grad for p in network.parameters())


def test_context_is_checked_before_weights(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, tmp_path)  # no weights here at all
    base = BaseConfig(str(tmp_path))
    tokenizer = load_tokenizer(base)
    check_base(base, tokenizer, 2048)
    with pytest.raises(ValueError, match=r"data\.max_length: 2049 exceeds .* 2048"):
        check_base(base, tokenizer, 2049)
    with pytest.raises(ValueError, match=r"model\.base\.name: .* could not be loaded"):
        Network.load(base)


def test_token_beyond_the_embedding_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    tokenizer = byte_level_tokenizer()
    config["vocab_size"] = len(tokenizer) - 1
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.base\.tokenizer: token id .* no embedding"):
        check_base(BaseConfig(str(tmp_path)), tokenizer, 16)


def test_pad_token_beyond_the_embedding_is_harmless(model_folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<a new pad>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    check_base(BaseConfig(str(model_folder)), tokenizer, 16)


@pytest.mark.parametrize("name", ["./no-such-model", "some/deep/path"])
def test_missing_paths_name_the_option(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.base\.name: {name} does not exist"):
        load_tokenizer(BaseConfig(name))
    with pytest.raises(ValueError, match=rf"model\.base\.tokenizer: {name} does not exist"):
        load_tokenizer(BaseConfig("x", tokenizer=name))


def test_four_bit_needs_a_gpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = BaseConfig(str(model_folder), load_in_4bit=True)
    with pytest.raises(ValueError, match=r"model\.base\.load_in_4bit: needs a GPU"):
        check_base(base, byte_level_tokenizer(), 16)
    with pytest.raises(ValueError, match="cannot be trained in full"):
        Network.load(base, full=True)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(V)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.base\.name: .*safetensors"):
        Network.load(BaseConfig(str(tmp_path)))


def test_missing_target_modules_are_named() -> None:
    network = Network(gpt2())
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules: q_proj, .*GPT2LMHead"):
        network.add_adapter(LORA)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_on_head_or_embedding_are_refused(module: str) -> None:
    # Losses come from the head's own weights: an adapter there would silently not count.
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules: embeddings and output"):
        Network(tiny_llama(V)).add_adapter(replace(LORA, target_modules=["q_proj", module]))


def test_only_plain_lora_is_stacked(tmp_path: Path) -> None:
    network = Network(tiny_llama(V))
    with pytest.raises(ValueError, match=r"model\.adapters: .* holds no PEFT adapter"):
        network.load_adapter(tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(V), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"not plain LoRA \(use_rslora\)"):
        network.load_adapter(tmp_path)


def test_full_training_on_top_of_adapters_is_refused() -> None:
    network, _ = with_adapters(1)
    with pytest.raises(ValueError, match=r"model\.lora: null"):
        network.train_all_weights()


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=["r", "one", "negative"]
)
def test_lora_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(changes))}"):
        LoraSettings(**changes)


def test_tokenizer_without_pad_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.pad_token is None
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = BaseConfig(str(tmp_path))
    loaded = load_tokenizer(base)
    check_base(base, loaded, 64)
    network = Network.load(base)
    assert len(network.hf.get_input_embeddings().weight) == len(tokenizer)
    assert len(loaded) == len(tokenizer)
    samples = draw(LENGTHS)
    close(losses(network, samples, "padded"), losses(network, samples, "packed"))


def test_greedy_equals_the_written_out_argmax() -> None:
    network, base = with_adapters(0)
    samples = draw(LENGTHS)
    batch = collate(samples, "packed")
    for row, got in batch.split(network.greedy(batch)):
        ids = torch.as_tensor(samples[row].input_ids, dtype=torch.int64)
        with torch.no_grad():
            assert torch.equal(got, base(input_ids=ids[None]).logits[0, :-1].argmax(-1))
