"""RMSNorm's own gradient on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from stdit.ops.rms_norm import rms_norm

EPS = 1e-6
Norm = Callable[[Tensor, Tensor], Tensor]


def own(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = torch.randn(shape[-1], generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def name(y: Tensor) -> str:
    """Of the function that computes its gradient."""
    return y.grad_fn.name() if y.grad_fn else ""


SHAPE = (16, 24, 4, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_as_near_to_the_exact_ones_as_torchs(dtype: torch.dtype) -> None:
    x, weight = tensors(*SHAPE, dtype=dtype)
    outgoing = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert name(own(x, weight)) == "_RMSNormBackward"

    def results(run: Norm, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = run(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), outgoing.to(y.dtype))

    exact = results(by_torch, *(t.detach().double().requires_grad_() for t in (x, weight)))
    for found, other, right in zip(results(own, x, weight), results(by_torch, x, weight), exact, strict=True):
        assert found.dtype == dtype
        error, allowed = (found - right).norm(), (other - right).norm()
        assert error <= 1.5 * allowed + 1e-7 * right.norm()


def test_outputs_are_the_same_with_and_without_gradients() -> None:
    x, weight = tensors(*SHAPE)
    with torch.no_grad():
        assert torch.equal(own(x, weight), own(x.clone().requires_grad_(), weight))
    assert torch.equal(own(x, weight), own(x.detach(), weight.detach()))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    both = tensors(*SHAPE)
    both[frozen].requires_grad_(False)
    own(*both).sum().backward()
    assert both[frozen].grad is None
    assert both[1 - frozen].grad is not None


def test_second_derivatives_are_those_of_torch() -> None:
    found = []
    for run in (own, by_torch):
        x, weight = tensors(*SHAPE)
        slopes = torch.autograd.grad(run(x, weight).pow(3).mean(), (x, weight), create_graph=True)
        found.append(torch.autograd.grad(slopes[0].square().sum() + slopes[1].square().sum(), (x, weight)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_many_gradients_at_once_are_those_one_by_one() -> None:
    x, weight = tensors(*SHAPE)
    outgoing = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = own(x, weight)
    together = torch.autograd.grad(y, (x, weight), outgoing, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(y, (x, weight), outgoing[i], retain_graph=True)
        torch.testing.assert_close(tuple(g[i] for g in together), alone)


def test_function_transforms_and_forward_mode_pass_through() -> None:
    x, weight = (t.detach() for t in tensors(*SHAPE))
    torch.testing.assert_close(torch.func.vmap(own, (0, None))(x.unsqueeze(0), weight)[0], by_torch(x, weight))
    ours, torchs = (torch.func.jvp(run, (x, weight), (x, weight))[1] for run in (own, by_torch))
    torch.testing.assert_close(ours, torchs)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(own(forward_ad.make_dual(x, x), weight)).tangent
    assert tangent is not None
