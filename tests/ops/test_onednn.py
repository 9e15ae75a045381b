"""Products by oneDNN are those of torch, with their gradients, and step aside where they do not fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from stdit.models.stdit import STDiT
from stdit.ops import onednn
from stdit.ops.onednn import MIN_ROWS, MIN_WEIGHT, apply, is_applied, onednn_serves, preferred, remove, set_backend

Noise = Callable[..., torch.Tensor]
needs_onednn = pytest.mark.skipif(not onednn._AVAILABLE, reason="this CPU's products are torch's own")


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(256, 192)
    apply(layer)
    return layer


@pytest.mark.parametrize("shape", [(17, 256), (1, 256), (0, 256), (2, 3, 5, 256)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_torch(
    layer: nn.Linear, noise: Noise, shape: tuple[int, ...], transposed: bool
) -> None:
    x = noise(*reversed(shape)).permute(*reversed(range(len(shape)))) if transposed else noise(*shape)
    outgoing = noise(192).expand(*shape[:-1], 192)  # not contiguous
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        own = x.clone().requires_grad_()
        y = run(own)
        found.append((y, *torch.autograd.grad(y, (own, layer.weight, layer.bias), outgoing)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_torch(layer: nn.Linear, noise: Noise) -> None:
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        x = noise(MIN_ROWS, 256).requires_grad_()
        (slope,) = torch.autograd.grad(run(x).pow(3).mean(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, layer.weight)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@needs_onednn
def test_it_serves_plain_float32_alone(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(MIN_ROWS, 256), noise(192, 256)
    assert onednn_serves(x, weight, None)
    assert not onednn_serves(x[1:], weight, None)  # a row less than is worth it
    assert not onednn_serves(x, noise(MIN_WEIGHT // 256 - 1, 256), None)
    assert not onednn_serves(x.bfloat16(), weight.bfloat16(), None)
    assert not onednn_serves(x.to("meta"), weight.to("meta"), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_serves(x, weight, None)
    assert torch.func.vmap(lambda one: torch.tensor(onednn_serves(one, weight, None)))(x).tolist() == [False] * MIN_ROWS
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


def test_a_precision_that_torch_cannot_name_is_no_error(layer: nn.Linear, noise: Noise) -> None:
    backend: Any = torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    x = noise(2, 256)
    try:
        products.fp32_precision = "bf16"
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        products.fp32_precision = before


def test_forward_mode_keeps_its_tangent(layer: nn.Linear, noise: Noise) -> None:
    x = noise(2, 256)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))


@pytest.mark.parametrize("run", [lambda f, x: torch.func.vmap(f)(x), lambda f, x: torch.func.jvp(f, (x,), (x,))[1]])
def test_function_transforms_pass_through(layer: nn.Linear, noise: Noise, run: Callable[..., torch.Tensor]) -> None:
    x = noise(3, 2, 256)
    torch.testing.assert_close(run(layer, x), run(lambda x: F.linear(x, layer.weight, layer.bias), x))


def test_autocast_gives_bfloat16(layer: nn.Linear, noise: Noise) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(noise(2, 256)).dtype == torch.bfloat16


def test_its_work_is_counted(layer: nn.Linear, noise: Noise) -> None:
    with FlopCounterMode(display=False) as counter:
        layer(noise(4, 5, 256))
    assert counter.get_total_flops() == 2 * 20 * 256 * 192


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_by_either_library_trains_alike(
    tiny: Callable[..., STDiT], noise: Noise, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    for by_onednn in (False, True):
        model = tiny(text_dim=6).train()
        if by_onednn:
            assert not onednn._AVAILABLE or apply(model)
        if recompute:
            model.enable_gradient_checkpointing()
        model(noise(2, 3, 2, 4, 4), torch.tensor([3.0, 500.0]), noise(2, 4, 6)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_many_gradients_at_once_are_those_of_torch(layer: nn.Linear, noise: Noise) -> None:
    x, outgoing = noise(2, 9, 256).requires_grad_(), noise(4, 2, 9, 192, seed=1)
    found = []
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        wanted = (x, layer.weight, layer.bias)
        found.append(torch.autograd.grad(run(x), wanted, outgoing, is_grads_batched=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_gradients_keep_their_tangents(layer: nn.Linear, noise: Noise) -> None:
    x, outgoing = noise(20, 256).requires_grad_(), noise(20, 192)
    y = layer(x)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(outgoing, outgoing.flip(0)))
        tangent = forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(tangent, outgoing.flip(0) @ layer.weight)


@pytest.mark.parametrize("run", [lambda f, x: torch.func.vmap(f)(x), lambda f, x: torch.func.jvp(f, (x,), (x,))[1]])
def test_compiled_function_transforms_pass_through(
    layer: nn.Linear, noise: Noise, run: Callable[..., torch.Tensor]
) -> None:
    x = noise(3, 2, 256)
    found = torch.compile(lambda x: run(layer, x), backend="eager")(x)
    torch.testing.assert_close(found, run(lambda x: F.linear(x, layer.weight, layer.bias), x))


@needs_onednn
def test_compiled_graphs_have_ours_and_exported_ones_torchs(layer: nn.Linear, noise: Noise) -> None:
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


class Marked(nn.Linear):
    """A layer of somebody else's."""


@needs_onednn
def test_layers_stay_plain_and_keep_names_and_types() -> None:
    model = nn.Sequential(nn.Linear(256, 192), nn.Linear(4, 4), Marked(256, 192), nn.LayerNorm(4))
    types, keys = [type(m) for m in model], list(model.state_dict())
    assert apply(model) == ["0"]
    assert [is_applied(m) for m in model] == [True, False, False, False]
    assert apply(model) == ["0"]  # again changes nothing
    assert [type(m) for m in model] == types
    assert list(model.state_dict()) == keys
    remove(model)
    assert not any("forward" in m.__dict__ for m in model)


@needs_onednn
def test_a_replaced_forward_is_left_alone() -> None:
    layer = nn.Linear(256, 192)
    layer.forward = lambda input: input  # as accelerate's hooks do
    assert apply(layer) == []
    remove(layer)
    assert "forward" in layer.__dict__


@needs_onednn
def test_copies_compute_with_their_own_weights_and_pickles_are_plain(layer: nn.Linear, noise: Noise) -> None:
    x = noise(20, 256)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            other.weight.zero_()
            other.bias.zero_()
        assert not other(x).any()
        assert layer(x).any()
    assert is_applied(copy.deepcopy(layer))
    loaded = pickle.loads(pickle.dumps(layer))
    assert not is_applied(loaded)
    assert apply(loaded) == [""]
    assert is_applied(loaded)


def test_saved_and_loaded_it_is_the_same_model(
    tiny: Callable[..., STDiT], noise: Noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    model = tiny(text_dim=6).eval()
    apply(model)
    model.save_pretrained(tmp_path)
    loaded = STDiT.from_pretrained(tmp_path).eval()
    assert not any(is_applied(m) for m in loaded.modules())
    args = noise(2, 3, 2, 4, 4), torch.tensor([3.0, 500.0]), noise(2, 4, 6)
    torch.testing.assert_close(loaded(*args).sample, model(*args).sample, rtol=1e-4, atol=1e-5)


def test_other_types_go_to_torch(layer: nn.Linear, noise: Noise) -> None:
    x = noise(3, 256)
    layer.to(torch.bfloat16)
    torch.testing.assert_close(layer(x.bfloat16()), F.linear(x.bfloat16(), layer.weight, layer.bias))
    layer.to("meta")
    assert layer(x.to("meta")).is_meta


@needs_onednn
def test_quantisation_by_exact_type_finds_every_layer(tiny: Callable[..., STDiT], monkeypatch: Any) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    model = tiny(text_dim=6).eval()
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert apply(model) == linears
    assert all(type(model.get_submodule(name)) is nn.Linear for name in linears)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = {
        f"{type(module).__module__}.{type(module).__name__}"
        for name in linears
        for module in [quantized.get_submodule(name)]
    }
    assert found == {"torch.ao.nn.quantized.dynamic.modules.linear.Linear"}


@needs_onednn
@pytest.mark.parametrize(("vendor", "applied"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
def test_auto_applies_it_only_where_it_wins(vendor: str | None, applied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    model = nn.Sequential(nn.Linear(256, 192))
    assert set_backend(model) == (["0"] if applied else [])
    assert is_applied(model[0]) == applied
    assert preferred()[0] == ("onednn" if applied else "torch")
    assert set_backend(model, "onednn") == ["0"]
    assert set_backend(model, "torch") == []
    assert "forward" not in model[0].__dict__
    apply(model)
    assert is_applied(model[0])
    set_backend(model)
    assert is_applied(model[0]) == applied  # what is chosen replaces what was


def test_the_choice_and_its_reason_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_AVAILABLE", True)
    monkeypatch.setattr(onednn, "_vendor", lambda: "GenuineIntel")
    with caplog.at_level("INFO", logger=onednn.log.name):
        set_backend(nn.Linear(256, 192))
    assert "oneDNN in 0 layers (GenuineIntel: MKL is as fast or faster)" in caplog.text


@needs_onednn
@pytest.mark.parametrize("lora_first", [False, True])
def test_adapters_around_layers_train_and_unload(
    tiny: Callable[..., STDiT], noise: Noise, lora_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    lora = LoraConfig(r=2, target_modules=["attn.qkv"], init_lora_weights=False)
    found, args = [], (noise(2, 3, 2, 4, 4), torch.tensor([3.0, 500.0]), noise(2, 4, 6))
    for by_onednn in (False, True):
        torch.manual_seed(0)
        model = tiny(text_dim=6).eval()
        if by_onednn and not lora_first:
            apply(model)
        torch.manual_seed(1)
        model.add_adapter(lora)
        if by_onednn and lora_first:
            assert any(name.endswith("qkv.base_layer") for name in apply(model))
        y = model(*args).sample
        y.square().mean().backward()
        found.append((y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        assert any("lora_A" in name for name in found[-1][1])
        model.unload_lora()
        assert type(model.get_submodule("blocks.0.attn.qkv")) is nn.Linear
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_weights_partitioned_by_zero3_go_to_torch(
    layer: nn.Linear, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args))  # DeepSpeed puts its own in its place
    layer(noise(20, 256))
    assert len(called) == 1


def test_hooks_offloading_and_swapped_parameters_pass_through(layer: nn.Linear, noise: Noise) -> None:
    x, seen = noise(20, 256), []
    handle = layer.register_forward_hook(lambda *args: seen.append(args))
    expected = layer(x)
    handle.remove()
    assert len(seen) == 1
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True))
    torch.testing.assert_close(layer(x), expected)
    remove_hook_from_module(layer)
    torch.testing.assert_close(layer(x), expected)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,)).any()
