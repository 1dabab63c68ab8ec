"""The faster passes: each gives the numbers of the plain one, or says what it leaves out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from test_models import LENGTHS, LORA, V, draw, gpt2, randomise
from torch import Tensor, nn

from tokenclean.data.batches import Batch, Layout, collate
from tokenclean.models import Network, Speed, in_float32
from tokenclean.models.attention import Segments, segment_attention

PLAIN = Speed(gather_last_layer=False, lean_lora=False, merge=False)
BATCH = collate(draw(LENGTHS, every=2), "packed")


def network(speed: Speed, adapters: int, dropout: float = 0.0, **changes: Any) -> Network:
    """The same base and adapters every time; the newest adapter is in training."""
    made = Network(tiny_llama(V, **changes), speed=speed)
    for i in range(adapters):
        made.add_adapter(LORA)
        randomise(made, seed=i + 1)
    if adapters and dropout:
        made.train_last_adapter(dropout)
        made.train()
    return made


def gradients(made: Network, batch: Batch = BATCH) -> dict[str, Tensor]:
    """Of a loss in which every token has a weight of its own."""
    weights = torch.linspace(0.5, 2.0, len(batch.targets))
    made.zero_grad()
    (made(batch) * weights).sum().backward()
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys() and len(got) == 2 * 7 * 2  # A and B, 7 modules, 2 layers
    for name in want:
        error = float((got[name] - want[name]).norm() / want[name].norm())
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize(
    "speed",
    [
        Speed(merge=False, gather_last_layer=False),
        Speed(merge=False, lean_lora=False),
        Speed(lean_lora=False, gather_last_layer=False),
        Speed(),
    ],
    ids=["lean_lora", "gather_last_layer", "merge", "all"],
)
def test_every_switch_keeps_losses_and_gradients(
    speed: Speed, adapters: int, layout: Layout
) -> None:
    batch = collate(draw(LENGTHS, every=2), layout)
    plain, fast = network(PLAIN, adapters), network(speed, adapters)
    with torch.no_grad():
        torch.testing.assert_close(fast(batch), plain(batch), rtol=0, atol=5e-6)
    same_gradients(gradients(fast, batch), gradients(plain, batch), 5e-6)


def test_lean_lora_draws_the_dropout_that_peft_draws() -> None:
    got, want = (
        network(speed, 2, dropout=0.4)
        for speed in (Speed(merge=False, gather_last_layer=False), PLAIN)
    )
    drawn = []
    for made in (got, want):
        torch.manual_seed(3)
        drawn.append(gradients(made))
    same_gradients(drawn[0], drawn[1], 5e-6)
    torch.manual_seed(4)
    assert any(
        not torch.allclose(a, b)
        for a, b in zip(gradients(got).values(), drawn[0].values(), strict=True)
    )


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_lean_lora_under_autocast(weights: torch.dtype) -> None:
    def made(speed: Speed) -> Network:
        result = Network(tiny_llama(V).to(weights), speed=speed)
        result.add_adapter(LORA)
        randomise(result)
        return result

    plain, lean = made(PLAIN), made(Speed(merge=False, gather_last_layer=False))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = gradients(lean), gradients(plain)
    assert all(g.dtype == torch.float32 for g in got.values())
    same_gradients(got, want, 0.05)


def rows_through_the_last_mlp(made: Network, batch: Batch) -> int:
    seen = []
    mlp = made.hf.base_model.layers[-1].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        made(batch)
    handle.remove()
    (rows,) = seen
    return rows


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_last_layer_computes_target_rows_only(layout: Layout) -> None:
    batch = collate(draw(LENGTHS, every=2), layout)
    assert rows_through_the_last_mlp(network(Speed(), 1), batch) == len(batch.targets)
    assert rows_through_the_last_mlp(network(PLAIN, 1), batch) == batch.tokens


def test_a_gathering_model_still_generates() -> None:
    made, plain = network(Speed(), 1), network(PLAIN, 1)
    prompt = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        assert torch.equal(
            made.hf.generate(prompt, max_new_tokens=6, do_sample=False),
            plain.hf.generate(prompt, max_new_tokens=6, do_sample=False),
        )


# -- merging ------------------------------------------------------------------------------------


def adapted_weights(made: Network) -> dict[str, Tensor]:
    return {n: p for n, p in made.named_parameters() if n.endswith("base_layer.weight")}


def test_a_merged_pass_gives_the_losses_and_the_weights_back() -> None:
    made = network(Speed(), 2)
    made.freeze()
    before = {n: (p.data_ptr(), p.clone()) for n, p in adapted_weights(made).items()}
    fingerprint = made.fingerprint()
    with torch.no_grad():
        want = made(BATCH)
        with made.at_depth(1):
            want_first = made(BATCH)
            with made.merged():
                torch.testing.assert_close(made(BATCH), want_first, rtol=0, atol=5e-6)
        with made.merged():
            assert all(not torch.equal(p, before[n][1]) for n, p in adapted_weights(made).items())
            torch.testing.assert_close(made(BATCH), want, rtol=0, atol=5e-6)
            assert made.fingerprint() == fingerprint
        assert torch.equal(made(BATCH), want)
    assert not any(p.requires_grad for p in made.parameters())
    assert not torch.allclose(want, want_first, atol=1e-2)
    for name, parameter in adapted_weights(made).items():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


def test_a_merged_pass_runs_no_adapter() -> None:
    made = network(Speed(), 2)
    made.freeze()
    for module in made.hf.modules():
        for name in getattr(module, "lora_A", {}):
            module.lora_A[name].weight.data = module.lora_A[name].weight.data.clone()
    with torch.no_grad(), made.merged():
        merged = made(BATCH)
        for module in made.hf.modules():
            for name in getattr(module, "lora_A", {}):
                module.lora_A[name].weight.data.fill_(torch.nan)
        assert torch.equal(made(BATCH), merged)


def test_merged_in_16_bits_is_one_rounding() -> None:
    made = network(Speed(), 1)
    made.freeze()
    want = {}
    for name, module in made.hf.named_modules():
        if hasattr(module, "lora_A"):
            a = module.lora_A["round_0"].weight.double()
            b = module.lora_B["round_0"].weight.double()
            exact = module.base_layer.weight.double() + LORA.alpha / LORA.r * (b @ a)
            want[f"hf.{name}.base_layer.weight"] = exact
    with made.merged(torch.float16):
        for name, weight in adapted_weights(made).items():
            assert weight.dtype == torch.float16
            # half a unit in the last place of 11 bits, and the float32 sum's own rounding
            bound = want[name].abs() * 2**-11 * 1.001 + 1e-7
            assert bool(((weight.double() - want[name]).abs() <= bound).all())


def test_frozen_adapters_are_merged_under_a_trained_one() -> None:
    made, plain = network(Speed(), 3), network(PLAIN, 3)
    changed = [
        not torch.equal(p, adapted_weights(plain)[n]) for n, p in adapted_weights(made).items()
    ]
    assert all(changed)
    assert made.fingerprint() == plain.fingerprint()
    # going down and up again in the middle of training leaves it as it was
    before = gradients(made)
    with made.at_depth(1), plain.at_depth(1), torch.no_grad():
        torch.testing.assert_close(made(BATCH), plain(BATCH), rtol=0, atol=5e-6)
    after = gradients(made)
    assert all(torch.equal(after[n], before[n]) for n in before)
    made.freeze()
    assert all(torch.equal(p, adapted_weights(plain)[n]) for n, p in adapted_weights(made).items())


def test_bfloat16_weights_are_never_merged() -> None:
    model = tiny_llama(V).to(torch.bfloat16)
    made = Network(copy.deepcopy(model), speed=Speed())
    for _ in range(2):
        made.add_adapter(LORA)
        randomise(made)
    own = dict(model.named_parameters())
    for name, parameter in adapted_weights(made).items():
        assert torch.equal(parameter, own[name.removeprefix("hf.").replace(".base_layer", "")])
    made.freeze()
    with made.merged():
        assert all(p.dtype == torch.bfloat16 for p in adapted_weights(made).values())
        assert torch.equal(made(BATCH), made(BATCH))
        assert not made._unmerged


def test_without_room_nothing_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(Speed(), 1)
    made.freeze()
    monkeypatch.setattr("tokenclean.models.network.free_memory", lambda device: 1000)
    before = {n: p.clone() for n, p in adapted_weights(made).items()}
    with torch.no_grad():
        want = made(BATCH)
        with made.merged():
            assert all(torch.equal(p, before[n]) for n, p in adapted_weights(made).items())
            assert torch.equal(made(BATCH), want)


# -- float32 on 16-bit weights -------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_float32_is_the_float32_model(half: torch.dtype) -> None:
    rounded = tiny_llama(V).to(half)
    narrow, wide = Network(copy.deepcopy(rounded)), Network(rounded.float())
    for made in (narrow, wide):
        made.add_adapter(LORA)
        randomise(made)
        made.freeze()
    with torch.no_grad():
        want = wide(BATCH)
        gap = (narrow(BATCH) - want).abs().max()
        with in_float32(torch.device("cpu")):
            got = narrow(BATCH)
    assert float(gap) > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_in_float32_widens_other_architectures_too() -> None:
    rounded = gpt2().to(torch.bfloat16)
    narrow, wide = Network(copy.deepcopy(rounded)), Network(rounded.float())
    batch = collate(draw([6, 4]), narrow.layout)
    with torch.no_grad(), in_float32(torch.device("cpu")):
        torch.testing.assert_close(narrow(batch), wide(batch), rtol=0, atol=1e-5)


# -- backward through kept tokens ---------------------------------------------------------------


def stopped_gradients(batch: Batch) -> dict[str, Tensor]:
    """By definition: what any adapted module says at a row that predicts nothing is a constant."""
    made = network(PLAIN, 2)
    chosen = torch.zeros(batch.tokens, dtype=torch.bool)
    chosen[batch.predicting] = True

    def stop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.where(chosen.view(output.shape[:-1])[..., None], output, output.detach())

    for module in made.hf.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(stop)
    return gradients(made, batch)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("gather", [False, True])
def test_kept_backward_stops_at_the_other_rows(gather: bool, layout: Layout) -> None:
    batch = collate(draw(LENGTHS, every=2), layout)
    made = network(Speed(merge=False, gather_last_layer=gather), 2)
    made.kept_backward = True
    plain = network(PLAIN, 2)
    with torch.no_grad():
        torch.testing.assert_close(made(batch), plain(batch), rtol=0, atol=5e-6)
    got = gradients(made, batch)
    same_gradients(got, stopped_gradients(batch), 5e-6)
    exact = gradients(plain, batch)
    assert max(float((got[n] - exact[n]).norm() / exact[n].norm()) for n in exact) > 0.01


def test_kept_backward_is_exact_when_everything_is_kept() -> None:
    batch = collate(draw(LENGTHS), "packed")  # every row predicts something
    made, plain = network(Speed(), 1), network(PLAIN, 1)
    made.kept_backward = True
    same_gradients(gradients(made, batch), gradients(plain, batch), 5e-6)


def test_kept_backward_saves_less() -> None:
    def saved(kept: bool) -> int:
        made = network(Speed(), 1)
        made.kept_backward = kept
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
        batch = collate(draw([40] * 8, every=8), "packed")
        with torch.autograd.graph.saved_tensors_hooks(pack, keep):
            made(batch).sum().backward()
        return sum(sizes.values())

    assert saved(True) < 0.9 * saved(False)


# -- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_variable_length_attention_is_asked_for_the_same(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's kernel, spelt out: what it is handed must mean what the segments mean."""

    def spelt_out(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0) and scale is not None
        assert q.shape[1] == k.shape[1] or enable_gqa
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        output = torch.empty_like(q)
        for start, stop in pairwise(cu_q.tolist()):
            assert stop - start <= min(max_q, max_k)
            for head in range(q.shape[1]):
                shared = head * k.shape[1] // q.shape[1]
                for i in range(start, stop):
                    logits = (k[start : i + 1, shared].float() @ q[i, head].float()) * scale
                    output[i, head] = logits.softmax(0) @ v[start : i + 1, shared].float()
        return output

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spelt_out)
    from tokenclean.models import attention

    lengths = [5, 3, 3, 1]
    bounds = torch.tensor([0, 5, 8, 11, 12], dtype=torch.int32)
    torch.manual_seed(0)
    query = torch.randn(1, 4, 12, 8)
    key, value = torch.randn(2, 1, kv_heads, 12, 8)
    module = nn.Module()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    segments = Segments(lengths, bounds)
    want, _ = segment_attention(module, query, key, value, None, segments, scaling=0.3)
    got = attention._varlen(query, key, value, segments, torch.float32, 0.3)
    assert got.shape == want.shape == (1, 12, 4, 8)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_batches_say_where_samples_begin() -> None:
    batch = collate(draw([4, 9, 2]), "packed")
    # cut before the last token, which nothing follows: 8, 3 and 1 tokens
    assert batch.bounds.tolist() == [0, 8, 11, 12]
    assert batch.bounds.dtype == torch.int32
    assert batch.segments == np.diff(batch.bounds.numpy()).tolist()


# -- accounting ---------------------------------------------------------------------------------


def test_the_clock_counts_seconds_and_tokens() -> None:
    made = network(PLAIN, 0)
    with made.clock(12):
        sum(range(100_000))
    with made.clock():
        pass
    assert made.tokens == 12 and 0.0 < made.seconds < 10.0
