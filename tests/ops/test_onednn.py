"""Products by oneDNN are those of torch, with their gradients, and step aside where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from stdit.models.stdit import STDiT
from stdit.ops import onednn as room
from stdit.ops.onednn import SMALLEST, Linear, is_bare, linear_gelu, onednn_serves

Noise = Callable[..., torch.Tensor]
needs_onednn = pytest.mark.skipif(not room._AVAILABLE, reason="this CPU's products are torch's own")


@pytest.fixture
def layer() -> Linear:
    torch.manual_seed(0)
    return Linear(256, 192)


def test_it_is_a_linear_layer(layer: Linear) -> None:
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(nn.Linear(256, 192).state_dict())


@pytest.mark.parametrize("shape", [(7, 256), (1, 256), (0, 256), (2, 3, 5, 256)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_torch(
    layer: Linear, noise: Noise, shape: tuple[int, ...], transposed: bool
) -> None:
    x = noise(*reversed(shape)).permute(*reversed(range(len(shape)))) if transposed else noise(*shape)
    outgoing = noise(192).expand(*shape[:-1], 192)  # not contiguous
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        own = x.clone().requires_grad_()
        y = run(own)
        found.append((y, *torch.autograd.grad(y, (own, layer.weight, layer.bias), outgoing)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_torch(layer: Linear, noise: Noise) -> None:
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        x = noise(5, 256).requires_grad_()
        (slope,) = torch.autograd.grad(run(x).pow(3).mean(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, layer.weight)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_in_one_pass_is_gelu(layer: Linear, noise: Noise, approximate: str) -> None:
    x = noise(3, 5, 256)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate=approximate)
    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(layer, x, approximate), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_gelu(layer, x, approximate), expected)


def test_hooks_on_a_layer_are_heard(layer: Linear, noise: Noise) -> None:
    layer.register_forward_hook(lambda *args: torch.zeros(3, 192))
    with torch.no_grad():
        assert not linear_gelu(layer, noise(3, 256), "tanh").any()


@needs_onednn
def test_it_serves_plain_float32_alone(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(2, 256), noise(192, 256)
    assert onednn_serves(x, weight, None)
    assert not onednn_serves(x, noise(SMALLEST // 256 - 1, 256), None)
    assert not onednn_serves(x.bfloat16(), weight.bfloat16(), None)
    assert not onednn_serves(x.to("meta"), weight.to("meta"), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_serves(x, weight, None)
    assert torch.func.vmap(lambda one: torch.tensor(onednn_serves(one, weight, None)))(x).tolist() == [False, False]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    assert not onednn_serves(x, weight, None)
    torch.set_float32_matmul_precision(before)
    assert not onednn_serves(x, weight, noise(2, 192)[:, 0][:1].expand(192))  # a bias with strides
    assert not onednn_serves(x[0], weight, None)
    assert not onednn_serves(x.as_subclass(Subclass), weight, None)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_serves(x, weight, None)
    with forward_ad.dual_level():
        assert not onednn_serves(forward_ad.make_dual(x, x), weight, None)
    assert not onednn_serves(x, weight, noise(192).double())
    assert not onednn_serves(x, weight, noise(192).as_subclass(Subclass))
    monkeypatch.setattr(F, "linear", lambda *args: None)  # as ZeRO-3 does
    assert not onednn_serves(x, weight, None)


class Subclass(torch.Tensor):
    """Of which the operator knows nothing."""


def test_a_precision_that_torch_cannot_name_is_no_error(layer: Linear, noise: Noise) -> None:
    backend: Any = torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    x = noise(2, 256)
    try:
        products.fp32_precision = "bf16"
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        products.fp32_precision = before


def test_forward_mode_keeps_its_tangent(layer: Linear, noise: Noise) -> None:
    x = noise(2, 256)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))


def test_a_hook_on_all_modules_is_heard(layer: Linear, noise: Noise) -> None:
    heard = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    with torch.no_grad():
        linear_gelu(layer, noise(3, 256), "tanh")
    handle.remove()
    assert heard == [layer]


@pytest.mark.parametrize("run", [lambda f, x: torch.func.vmap(f)(x), lambda f, x: torch.func.jvp(f, (x,), (x,))[1]])
def test_function_transforms_pass_through(layer: Linear, noise: Noise, run: Callable[..., torch.Tensor]) -> None:
    x = noise(3, 2, 256)
    torch.testing.assert_close(run(layer, x), run(lambda x: F.linear(x, layer.weight, layer.bias), x))


def test_autocast_gives_bfloat16(layer: Linear, noise: Noise) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(noise(2, 256)).dtype == torch.bfloat16


def test_its_work_is_counted(layer: Linear, noise: Noise) -> None:
    with FlopCounterMode(display=False) as counter:
        layer(noise(4, 3, 256))
    assert counter.get_total_flops() == 2 * 12 * 256 * 192


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_by_either_library_trains_alike(
    tiny: Callable[..., STDiT], noise: Noise, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for smallest in (10**9, 1):
        monkeypatch.setattr(room, "SMALLEST", smallest)
        model = tiny(text_dim=6).train()
        if recompute:
            model.enable_gradient_checkpointing()
        model(noise(2, 3, 2, 4, 4), torch.tensor([3.0, 500.0]), noise(2, 4, 6)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_many_gradients_at_once_are_those_of_torch(layer: Linear, noise: Noise) -> None:
    x, outgoing = noise(2, 3, 256).requires_grad_(), noise(4, 2, 3, 192, seed=1)
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        wanted = (x, layer.weight, layer.bias)
        found.append(torch.autograd.grad(run(x), wanted, outgoing, is_grads_batched=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_gradients_keep_their_tangents(layer: Linear, noise: Noise) -> None:
    x, outgoing = noise(3, 256).requires_grad_(), noise(3, 192)
    y = layer(x)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(outgoing, outgoing.flip(0)))
        tangent = forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(tangent, outgoing.flip(0) @ layer.weight)


@pytest.mark.parametrize("run", [lambda f, x: torch.func.vmap(f)(x), lambda f, x: torch.func.jvp(f, (x,), (x,))[1]])
def test_compiled_function_transforms_pass_through(
    layer: Linear, noise: Noise, run: Callable[..., torch.Tensor]
) -> None:
    x = noise(3, 2, 256)
    found = torch.compile(lambda x: run(layer, x), backend="eager")(x)
    torch.testing.assert_close(found, run(lambda x: F.linear(x, layer.weight, layer.bias), x))


@needs_onednn
def test_compiled_graphs_have_ours_and_exported_ones_torchs(layer: Linear, noise: Noise) -> None:
    operators: list[str] = []

    def listed(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = noise(3, 256)
    with torch.no_grad():
        torch.compile(layer, backend=listed)(x)
        assert operators == ["stdit.linear"]
        operators.clear()
        torch.compile(layer, backend=listed)(x.as_subclass(Subclass))
    assert "stdit.linear" not in operators
    exported = torch.export.export(layer, (x,)).graph.nodes
    assert [str(node.target) for node in exported if node.op == "call_function"] == ["aten.linear.default"]


def test_a_bare_layer_is_its_weight_alone(layer: Linear) -> None:
    assert is_bare(layer)
    assert is_bare(nn.Linear(2, 2))
    assert not is_bare(nn.Linear(2, 2, device="meta"))
    assert not is_bare(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    layer._hf_hook = None  # as accelerate leaves one  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    assert not is_bare(layer)
