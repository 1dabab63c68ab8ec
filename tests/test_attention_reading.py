"""`AttentionReader` against attention maps written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import llama_nll_float64, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig

import tokenclean.models.attention as attention
from tokenclean.data.batches import Batch, Sample, collate
from tokenclean.models import AttentionReader, Network, default_layer
from tokenclean.models.attention import Reading

LENGTHS = (9, 2, 1, 23, 9, 9, 3)


def sample(row: int, length: int) -> Sample:
    """One whose every token is computed: its last target is the token after them."""
    ids = np.random.default_rng(row).integers(3, 60, length + 1).astype(np.int32)
    positions = np.arange(1, length + 1)
    return Sample(row, ids, positions, np.ones(length, np.float32))


def expected(kind: Reading, weights: torch.Tensor, prompt: list[bool]) -> list[float]:
    """One layer's full map, (heads, T, T), reduced entry by entry."""
    heads, length, _ = weights.shape
    result = []
    for token in range(length):
        if kind == "keys":
            result.append(float(weights[:, token].mean(0).sum() / length))
        elif kind == "to_prompt":
            keys = [j for j in range(token + 1) if prompt[j]]
            result.append(float(weights[:, token, keys].sum() / heads))
        else:
            found = [
                float(weights[head, i, token] / weights[head, i, 1 : i + 1].sum())
                for i in range(token + 1, length)
                for head in range(heads)
            ]
            result.append(float(np.mean(found)) if found and token else float("nan"))
    return result


def prompt_of(row: int, length: int) -> list[bool]:
    return np.random.default_rng(100 + row).integers(0, 2, length).astype(bool).tolist()


def want_for(model: Any, batch: Batch, kind: Reading, layer: int) -> np.ndarray:
    assert batch.segments is not None
    parts: list[float] = []
    for row, ids in zip(batch.rows, batch.input_ids[0].split(batch.segments), strict=True):
        found: dict[str, torch.Tensor] = {}
        llama_nll_float64(model, ids.tolist(), found=found)
        prompt = prompt_of(row, len(ids))
        parts += expected(kind, found["attention"][layer], prompt)
    return np.array(parts)


def prompts(batch: Batch) -> torch.Tensor:
    assert batch.segments is not None
    return torch.tensor(
        [p for r, n in zip(batch.rows, batch.segments, strict=True) for p in prompt_of(r, n)]
    )


@pytest.mark.parametrize("chunk", [1, 40, 300, 1 << 22])
@pytest.mark.parametrize("kind", ["received", "keys", "to_prompt"])
def test_every_kind_against_whole_maps(
    kind: Reading, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)  # single rows, some rows, some samples, all
    network = Network(tiny_llama(60, seed=1))
    assert network.layout == "packed"
    for lengths in (LENGTHS, (17,)):
        batch = collate([sample(row, length) for row, length in enumerate(lengths)])
        readers = [AttentionReader(layer, kind, prompts(batch)) for layer in (0, -1)]
        states = network.hidden(batch, readers)
        assert torch.equal(states, network.hidden(batch))
        for reader, layer in zip(readers, (0, 1), strict=True):
            assert reader.values is not None and reader.values.dtype == torch.float32
            want = want_for(network.hf, batch, kind, layer)
            np.testing.assert_allclose(reader.values.numpy(), want, rtol=2e-5, atol=2e-6)


def test_by_hand() -> None:
    """One head, keys that do not move: rows 0 to 3 weigh the keys 1 : 2 : 1 : 4."""
    key = torch.tensor([1.0, 2.0, 1.0, 4.0]).log()[None, :, None]
    query = torch.ones(1, 4, 1)
    values = {}
    for kind in ("received", "keys", "to_prompt"):
        prompt = torch.tensor([True, True, False, False])
        reader = AttentionReader(0, kind, prompt)  # type: ignore[arg-type]
        reader.read(query, key, [4], 1.0)
        assert reader.values is not None
        values[kind] = reader.values.numpy()
    # Without key 0 row 2 is (2, 1) / 3 and row 3 is (2, 1, 4) / 7.
    received = [np.nan, (2 / 3 + 2 / 7) / 2, 1 / 7, np.nan]
    np.testing.assert_allclose(values["received"], received, rtol=1e-6)
    np.testing.assert_allclose(values["keys"], [0.25] * 4, rtol=1e-6)
    np.testing.assert_allclose(values["to_prompt"], [1.0, 1.0, 3 / 4, 3 / 8], rtol=1e-6)
    # The scale is the model's own.
    reader = AttentionReader(0, "to_prompt", torch.tensor([True, True, False, False]))
    reader.read(query, key, [4], 2.0)  # 1 : 4 : 1 : 16
    assert reader.values is not None
    np.testing.assert_allclose(reader.values.numpy(), [1.0, 1.0, 5 / 6, 5 / 22], rtol=1e-6)


def test_a_sample_does_not_see_its_neighbours() -> None:
    network = Network(tiny_llama(60, seed=1))
    samples = [sample(row, length) for row, length in enumerate((12, 5, 5))]
    together = collate(samples)
    reader = AttentionReader(1, "received")
    network.hidden(together, reader)
    assert together.segments is not None and reader.values is not None
    parts = dict(zip(together.rows, reader.values.split(together.segments), strict=True))
    for one in samples:
        network.hidden(collate([one]), reader)
        assert reader.values is not None
        np.testing.assert_allclose(parts[one.row], reader.values, rtol=1e-5, equal_nan=True)


def test_training_with_checkpointing_reads_the_same_and_costs_no_gradient() -> None:
    model = tiny_llama(60, seed=1)
    batch = collate([sample(row, length) for row, length in enumerate(LENGTHS)])
    network = Network(model)
    plain = AttentionReader(0, "to_prompt", prompts(batch))
    network.hidden(batch, plain)
    network.train_all_weights()
    network.train()
    network.hf.gradient_checkpointing_enable()
    gradients = []
    for readers in ((), (AttentionReader(0, "to_prompt", prompts(batch)),)):
        network.zero_grad()
        network.hidden(batch, readers).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        for reader in readers:
            assert reader.values is not None and not reader.values.requires_grad
            assert plain.values is not None
            torch.testing.assert_close(reader.values, plain.values)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_reads_in_float32() -> None:
    network = Network(tiny_llama(60, seed=1))
    batch = collate([sample(0, 23)])
    reader = AttentionReader(1, "keys")
    with torch.autocast("cpu", torch.bfloat16):
        network.hidden(batch, reader)
    assert reader.values is not None
    # Rows of a softmax in bfloat16 miss 1 by a thousandth.
    np.testing.assert_allclose(reader.values.numpy(), np.full(23, 1 / 23), rtol=1e-6)


def test_at_most_one_chunk_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 tokens and 4 heads are 4 M weights; none of the tensors in between is near that."""
    monkeypatch.setattr(attention, "CHUNK", 1 << 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    torch.manual_seed(0)
    query, key = torch.randn(4, 1000, 8), torch.randn(2, 1000, 8)
    reader = AttentionReader(0, "received")
    with Watch():
        reader.read(query, key, [1000], 0.3)
    assert 0 < largest <= 1 << 16


def test_layers_are_counted_and_refused() -> None:
    network = Network(tiny_llama(60))
    batch = collate([sample(0, 5)])
    for layer in (2, -3):
        with pytest.raises(ValueError, match=f"no layer {layer}; the model has 2"):
            network.hidden(batch, AttentionReader(layer, "keys"))
    layers = {n: default_layer(LlamaConfig(num_hidden_layers=n)) for n in (1, 2, 4, 28)}
    assert layers == {1: 0, 2: 1, 4: 3, 28: 21}


def test_a_model_of_padded_batches_is_refused() -> None:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    )
    network = Network(GPTNeoForCausalLM(config).eval())
    assert network.layout == "padded"
    with pytest.raises(ValueError, match="attention cannot be read from GPTNeoForCausalLM"):
        network.hidden(collate([sample(0, 5)], "padded"), AttentionReader(0, "keys"))


def test_another_architecture() -> None:
    """GPT-2 scales and masks in its own code; eager attention shows its maps."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(3, 14)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions[1][0].double()
    model.set_attn_implementation("sdpa")
    network = Network(model)
    assert network.layout == "packed"
    one = Sample(0, np.append(ids[0].numpy(), 0).astype(np.int32), np.array([11]), np.ones(1))
    reader = AttentionReader(1, "received")
    network.hidden(collate([one]), reader)
    assert reader.values is not None
    want = expected("received", maps, [])
    np.testing.assert_allclose(reader.values.numpy(), want, rtol=1e-4, atol=1e-6)
