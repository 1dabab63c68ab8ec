"""The loss kernel against the written-out loss in float64, and against itself cut differently."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tokenclean.loss import Head, greedy_tokens, token_nll, token_statistics

V, H = 53, 16


class Case(NamedTuple):
    bias: bool
    scale: float
    softcap: float | None


CASES = [
    Case(False, 1.0, None),
    Case(True, 1.0, None),
    Case(False, 0.25, None),
    Case(False, 1.0, 3.0),
    Case(True, 2.0, 5.0),
]


def written_out(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, case: Case
) -> Tensor:
    """-log p(target), straight from the definition: every logit at once, no chunks."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    chosen = logits[torch.arange(len(targets)), targets]
    return torch.log(torch.exp(logits - logits.max()).sum(-1)) + logits.max() - chosen


def drawn(
    rows: int, case: Case, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if case.bias else None
    return hidden, weight, bias, torch.randint(0, V, (rows,), generator=generator)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_the_float64_cross_entropy(case: Case, rows: int) -> None:
    hidden, weight, bias, targets = drawn(rows, case, torch.float32)
    got = token_nll(hidden, Head(weight, bias, case.scale, case.softcap), targets, chunk_rows=5)
    want = written_out(
        hidden.double(), weight.double(), None if bias is None else bias.double(), targets, case
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_by_hand() -> None:
    # logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    got = token_nll(torch.ones(3, 1), Head(weight), torch.tensor([0, 1, 2]))
    want = torch.tensor([8.0, 4.0, 8 / 5]).log()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_chunk_size_changes_nothing_but_rounding(case: Case) -> None:
    hidden, weight, bias, targets = drawn(23, case, torch.float64)
    head = Head(weight, bias, case.scale, case.softcap)
    whole = token_nll(hidden, head, targets, chunk_rows=23)
    for chunk_rows in (1, 4, 11, 22, 24, 1000):  # 23 is prime: left-over rows in every one
        got = token_nll(hidden, head, targets, chunk_rows=chunk_rows)
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"]
)
def test_gradients(case: Case, trained_head: bool, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, targets = drawn(17, case, dtype)
    # Signed and zero weights: every row has a slope of its own.
    generator = torch.Generator().manual_seed(5)
    slopes = torch.randn(17, generator=generator, dtype=torch.float64)
    slopes[3] = 0.0

    def leaves(as_dtype: torch.dtype) -> list[Tensor | None]:
        values = [hidden, weight, bias]
        trained = [True, trained_head, trained_head]
        return [
            None if v is None else v.to(as_dtype).clone().requires_grad_(t)
            for v, t in zip(values, trained, strict=True)
        ]

    h, w, b = leaves(dtype)
    assert h is not None and w is not None
    nll = token_nll(h, Head(w, b, case.scale, case.softcap), targets, chunk_rows=6)
    (nll * slopes.to(nll.dtype)).sum().backward()

    h64, w64, b64 = leaves(torch.float64)
    assert h64 is not None and w64 is not None
    (written_out(h64, w64, b64, targets, case) * slopes).sum().backward()

    for got, want in ((h, h64), (w, w64), (b, b64)):
        if got is None or not got.requires_grad:
            continue
        assert want is not None and got.grad is not None and want.grad is not None
        error = float((got.grad.double() - want.grad).norm() / want.grad.norm())
        assert error < tolerance


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = drawn(5, CASES[0], torch.float32)
    hidden.requires_grad_(True)
    token_nll(hidden, Head(weight), targets).sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_head_trained_on_frozen_hidden_rows() -> None:
    hidden, weight, bias, targets = drawn(5, CASES[1], torch.float64)
    assert bias is not None
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    token_nll(hidden, Head(weight, bias), targets, chunk_rows=2).sum().backward()
    probabilities = (hidden @ weight.T + bias).softmax(-1)
    slope = (probabilities - torch.eye(V, dtype=torch.float64)[targets]).detach()
    assert weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(weight.grad, slope.T @ hidden)
    torch.testing.assert_close(bias.grad, slope.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_give_unrounded_float32_losses(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = drawn(40, CASES[0], dtype)
    got = token_nll(hidden, Head(weight), targets)
    want = written_out(hidden.double(), weight.double(), None, targets, CASES[0])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    # The check can fail: logits rounded to 16 bits are far outside of it.
    rounded = written_out(
        (hidden @ weight.T).double(), torch.eye(V).double(), None, targets, CASES[0]
    )
    assert float((rounded - want).abs().max()) > 1e-3


def test_bfloat16_autocast_rounds_operands_only() -> None:
    hidden, weight, _, targets = drawn(40, CASES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_nll(hidden, Head(weight), targets)
    as_bf16 = [x.bfloat16().double() for x in (hidden, weight)]
    want = written_out(as_bf16[0], as_bf16[1], None, targets, CASES[0])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained_head", [False, True])
def test_gradients_under_bfloat16_autocast(trained_head: bool) -> None:
    hidden, weight, _, targets = drawn(40, CASES[0], torch.float32)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained_head)
    with torch.autocast("cpu", torch.bfloat16):
        nll = token_nll(hidden, Head(weight), targets, chunk_rows=16)
    nll.sum().backward()
    h64 = hidden.detach().double().requires_grad_(True)
    w64 = weight.detach().double().requires_grad_(True)
    written_out(h64, w64, None, targets, CASES[0]).sum().backward()
    for got, want in [(hidden, h64), (weight, w64)][: 2 if trained_head else 1]:
        assert got.grad is not None and want.grad is not None
        assert got.grad.dtype == torch.float32
        assert float((got.grad.double() - want.grad).norm() / want.grad.norm()) < 2e-2


@pytest.mark.parametrize("trained_head", [False, True])
def test_zero_rows(trained_head: bool) -> None:
    hidden, weight, _, targets = drawn(0, CASES[0], torch.float32)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained_head)
    nll = token_nll(hidden, Head(weight), targets)
    assert nll.shape == (0,) and nll.dtype == torch.float32
    nll.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    if trained_head:
        assert weight.grad is not None and not weight.grad.any()
    assert greedy_tokens(hidden, Head(weight)).shape == (0,)


def test_extreme_logits_stay_finite() -> None:
    weight = torch.tensor([[1.0], [-1.0]])
    got = token_nll(torch.tensor([[300.0], [300.0]]), Head(weight), torch.tensor([0, 1]))
    assert got.tolist() == [0.0, 600.0]


def test_greedy_is_the_largest_logit() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    hidden = torch.tensor([[3.0, 1.0], [0.5, 2.0], [-4.0, -1.0]])
    assert greedy_tokens(hidden, Head(weight), chunk_rows=2).tolist() == [0, 1, 2]
    # a bias can change the answer
    biased = Head(weight, torch.tensor([0.0, 2.5, 0.0]))
    assert greedy_tokens(hidden, biased).tolist() == [1, 1, 2]


def test_statistics_by_hand() -> None:
    # probabilities 1/8, 2/8, 5/8: entropy 1/8 ln 8 + 2/8 ln 4 + 5/8 ln 8/5
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    got = token_statistics(torch.ones(3, 1), Head(weight), torch.tensor([0, 1, 2]), chunk_rows=2)
    torch.testing.assert_close(got.nll, torch.tensor([8.0, 4.0, 8 / 5]).log())
    torch.testing.assert_close(got.top_probability, torch.full((3,), 5 / 8))
    by_hand = 1 / 8 * math.log(8) + 2 / 8 * math.log(4) + 5 / 8 * math.log(8 / 5)
    torch.testing.assert_close(got.entropy, torch.full((3,), by_hand))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained_head", [False, True])
def test_statistics_come_with_the_loss_and_its_gradient(case: Case, trained_head: bool) -> None:
    hidden, weight, bias, targets = drawn(9, case, torch.float32)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained_head)
    head = Head(weight, bias, case.scale, case.softcap)
    got = token_statistics(hidden, head, targets, chunk_rows=4)
    alone = token_nll(hidden, head, targets, chunk_rows=4)
    assert torch.equal(got.nll, alone)
    (grad,) = torch.autograd.grad(got.nll.sum(), hidden)
    (grad_alone,) = torch.autograd.grad(alone.sum(), hidden)
    assert torch.equal(grad, grad_alone)
    assert not got.entropy.requires_grad and not got.top_probability.requires_grad

    # every token's loss in float64 is the whole distribution
    wide = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    assert wide[0] is not None and wide[1] is not None
    every = torch.stack(
        [written_out(wide[0], wide[1], wide[2], torch.full((9,), v), case) for v in range(V)], dim=1
    )
    probability = torch.exp(-every)
    torch.testing.assert_close(
        got.entropy.double(), (probability * every).sum(1), rtol=0, atol=5e-6
    )
    torch.testing.assert_close(got.top_probability.double(), probability.amax(1), rtol=0, atol=5e-7)


def test_a_wide_hidden_row_is_not_rounded_to_the_heads_precision() -> None:
    hidden, weight, _, targets = drawn(12, CASES[0], torch.float32)
    half = weight.to(torch.bfloat16)
    got = token_nll(hidden, Head(half), targets)
    want = written_out(hidden.double(), half.double(), None, targets, CASES[0])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_the_most_likely_tokens_by_hand() -> None:
    # probabilities 1/8, 2/8, 5/8: the top two are 2/7 and 5/7 among themselves
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    arguments = torch.ones(3, 1), Head(weight), torch.tensor([0, 1, 2]), 2
    got = token_statistics(*arguments, top=2)
    assert got.top_entropy is not None and got.top_mass is not None
    by_hand = 2 / 7 * math.log(7 / 2) + 5 / 7 * math.log(7 / 5)
    torch.testing.assert_close(got.top_entropy, torch.full((3,), by_hand))
    torch.testing.assert_close(got.top_mass, torch.full((3,), 7 / 8))
    # of all there are, if they are fewer than asked for
    everything = token_statistics(*arguments, top=20)
    assert everything.top_entropy is not None and everything.top_mass is not None
    torch.testing.assert_close(everything.top_entropy, everything.entropy)
    torch.testing.assert_close(everything.top_mass, torch.ones(3))
    plain = token_statistics(*arguments)
    assert plain.top_entropy is None and plain.top_mass is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_most_likely_tokens_leave_loss_and_gradient_alone(
    case: Case, trained_head: bool
) -> None:
    hidden, weight, bias, targets = drawn(9, case, torch.float32)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained_head)
    head = Head(weight, bias, case.scale, case.softcap)
    got = token_statistics(hidden, head, targets, chunk_rows=4, top=6)
    alone = token_nll(hidden, head, targets, chunk_rows=4)
    assert torch.equal(got.nll, alone)
    grads = [torch.autograd.grad(nll.sum(), hidden)[0] for nll in (got.nll, alone)]
    assert torch.equal(*grads)
    wide = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    assert wide[0] is not None and wide[1] is not None
    every = torch.stack(
        [written_out(wide[0], wide[1], wide[2], torch.full((9,), v), case) for v in range(V)], dim=1
    )
    largest = torch.exp(-every).sort(descending=True).values[:, :6]
    mass = largest.sum(1)
    among = largest / mass[:, None]
    assert got.top_entropy is not None and got.top_mass is not None
    assert not got.top_entropy.requires_grad and not got.top_mass.requires_grad
    torch.testing.assert_close(got.top_mass.double(), mass, rtol=0, atol=1e-6)
    want = -(among * among.log()).sum(1)
    torch.testing.assert_close(got.top_entropy.double(), want, rtol=0, atol=5e-6)
