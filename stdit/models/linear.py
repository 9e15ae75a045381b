"""Linear layers of the tokens, by the faster of the two libraries that torch brings for a CPU.

torch gives every float32 product to MKL, which on processors that are not Intel's uses half their vector width; oneDNN,
which torch has too and keeps for bfloat16 and convolutions, uses all of it. One thread of an EPYC (Zen 5): 118 against
265 GFLOP/s at 256 x 384 x 1536, forward and backward alike. Results differ in the last digits, as between two machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Weights below this many numbers stay with torch's own product: there is little to win.
SMALLEST = 2**15

# The operator is not a published one: only as it is known is it used.
SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def _available() -> bool:
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    known = operator is not None and str(getattr(getattr(operator, "default", None), "_schema", "")) == SCHEMA
    return known and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


_AVAILABLE = _available()
# F.linear, unless DeepSpeed's ZeRO-3 has put its own in its place.
_OWN = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's product is used: plain float32 tensors on a CPU, at full precision, and a weight large enough.

    Of the input only what a compiled graph knows ahead, so that no number of tokens makes it compile anew.
    """
    return (
        _AVAILABLE
        and weight.numel() >= SMALLEST
        and x.ndim >= 2
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and F.linear is _OWN
        and _is_exact()
        and not torch.is_autocast_enabled("cpu")
        and type(x) in (Tensor, nn.Parameter)  # no subclass: quantized, sharded
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_exporting()  # a program that is to run without us
        and (torch.compiler.is_compiling() or _is_plain(x))
    )


@torch.compiler.assume_constant_result
def _is_exact() -> bool:
    """Whether torch multiplies float32 as it is, and oneDNN is wanted; else torch takes it itself, in bfloat16, or not."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer switches, of which it cannot speak
        return False
    return exact and bool(torch.backends.mkldnn.enabled)


def _is_plain(x: Tensor) -> bool:
    """Whether there is anything to multiply, and no derivative of torch.func or of forward mode, which it has not."""
    transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)()
    return x.numel() > 0 and not transformed and getattr(torch.autograd.forward_ad, "_current_level", 0) < 0


if _AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.stdit.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The same under a name of ours, for compiled graphs: inductor would take the operator for one of its own making, whose
# weights are constants.
_library = torch.library.Library("stdit", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "linear", "CPU")
def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


@torch.library.register_fake("stdit::linear", lib=_library)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Product(torch.autograd.Function):
    """x weightᵀ + bias, which oneDNN's operator has no gradient for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)
        to_x = product(grad, weight.t(), None) if wants_x else None
        to_weight = product(rows.t(), x.flatten(0, -2).t(), None) if wants_weight else None
        return to_x, to_weight, rows.sum(0) if wants_bias else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias by oneDNN, with gradients of any order. x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and wanted:
        return _Product.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, by oneDNN where it serves."""
    return product(x.contiguous(), weight, bias) if onednn_serves(x, weight, bias) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, with products by oneDNN where `onednn_serves`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """gelu(layer(x)); in one pass where that is possible and nobody has hooked anything to the layer or replaced it."""
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if (
        eager
        and type(layer) is Linear
        and is_bare(layer)
        and not _all_are_heard()
        and onednn_serves(x, layer.weight, layer.bias)
    ):
        operator = torch.ops.mkldnn._linear_pointwise
        return operator(x.contiguous(), layer.weight, layer.bias, "gelu", [], approximate)
    return F.gelu(layer(x), approximate=approximate)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is what its weights say: no hook on it, torch's, accelerate's or diffusers', and no other forward."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    return not (hooked or hasattr(layer, "_diffusers_hook") or "forward" in layer.__dict__)


def _all_are_heard() -> bool:
    """Whether somebody listens to every module, as counters and profilers do."""
    everywhere = nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
