"""float32 products of linear layers by oneDNN instead of torch's default (MKL), on CPUs where that is faster.

    set_backend(model, "auto")     # whichever is faster on this processor; call again after adding layers
    apply(model); remove(model)    # oneDNN's; torch's

torch multiplies float32 with MKL, which uses half of the vector width of processors other than Intel's; oneDNN, which
torch ships for bfloat16 and convolutions, uses all of it. torch / oneDNN, seconds of one thread, 256 rows, forward and
backward: EPYC Zen 5 2.2 (265 GFLOP/s); EPYC Zen 4, which has half-width units, 1.0 at width 384 to 1.1 at 768; Intel
Xeon with AMX 0.67 to 0.90 in the weights' gradient. Results differ in the last digits, as between two machines.

A layer's `forward` is replaced on the instance, as accelerate does it. Copies (copy.deepcopy) are applied too; pickles
are plain. Calls that oneDNN cannot serve (other devices and types, autocast, torch.func, exports, ZeRO-3) go to
F.linear.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

log = logging.getLogger(__name__)

# Smaller weights and fewer rows keep torch's product: there is nothing to gain (at one row: 0.6 to 0.9).
MIN_WEIGHT = 2**15
MIN_ROWS = 16

# The operator is private to torch: it is used only while its signature is the one expected here.
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
        and weight.numel() >= MIN_WEIGHT
        and x.ndim >= 2
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and F.linear is _OWN
        and _is_exact()
        and not torch.is_autocast_enabled("cpu")
        and _is_own(x)
        and _is_own(weight)
        and (bias is None or _fits(bias, weight))
        and not is_transformed()
        and not torch.compiler.is_exporting()  # a program that is to run without us
        and (torch.compiler.is_compiling() or x.numel() >= MIN_ROWS * weight.shape[1])
    )


@torch.compiler.assume_constant_result
def _is_exact() -> bool:
    """Whether torch multiplies float32 as it is, and oneDNN is wanted; else torch takes it itself, in bfloat16, or not.

    A compiled graph keeps what was said when it was made.
    """
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer switches, of which it cannot speak
        return False
    mkldnn: Any = torch.backends.mkldnn
    return exact and bool(mkldnn.enabled) and mkldnn.matmul.fp32_precision in ("none", "ieee")


def _is_own(x: Tensor) -> bool:
    """Whether a tensor is torch's own, not a subclass's: quantized, sharded."""
    return type(x) in (Tensor, nn.Parameter)


def _fits(bias: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN reads a bias right: numbers like the weight's, one a row, side by side."""
    like = bias.dtype == weight.dtype and bias.device == weight.device and bias.shape == weight.shape[:1]
    return like and bias.is_contiguous() and _is_own(bias)


def _is_batch(grad: Tensor) -> bool:
    """Whether this is many gradients in one, of `is_grads_batched`, which torch.func knows nothing of."""
    batched = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return batched is not None and not torch.compiler.is_compiling() and batched(grad)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the operator has no rules."""
    return _functions_are_transformed() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


@torch.compiler.assume_constant_result  # of which compiled code makes sure by itself; else the question is in the graph
def _functions_are_transformed() -> bool:
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


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


def _plain_product(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    """x weightᵀ by torch, which it can transform; F.linear cannot be, for many gradients at once."""
    return x @ weight.t()


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
        if is_transformed() or not _is_own(grad) or _is_batch(grad):
            times, rows = _plain_product, grad.reshape(-1, grad.shape[-1])
        else:
            grad = grad.contiguous()
            times, rows = product, grad.flatten(0, -2)
        to_x = times(grad, weight.t(), None) if wants_x else None
        to_weight = times(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if wants_weight else None
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


def forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """nn.Linear.forward by oneDNN. Named so that a pickled layer, which stores its method by name, loads as a plain
    one."""
    return linear(input, layer.weight, layer.bias)


# For code that has to know that a layer's forward is still its weights' product (stdit.models.pruning).
forward.is_linear = True  # pyright: ignore[reportFunctionMemberAccess]


def apply(model: nn.Module) -> list[str]:
    """Lets oneDNN compute the products of `model`'s nn.Linear layers; names of those where it does, [] without oneDNN.

    Left alone: small layers, subclasses of nn.Linear, and layers whose forward something else has replaced.
    """
    layers = _eligible(model)
    for layer in layers.values():
        layer.forward = MethodType(forward, layer)
    return list(layers)


def _eligible(model: nn.Module) -> dict[str, nn.Linear]:
    layers = {}
    for name, layer in model.named_modules() if _AVAILABLE else ():
        if type(layer) is nn.Linear and layer.in_features * layer.out_features >= MIN_WEIGHT:
            own = layer.__dict__.get("forward")
            # A pickled layer keeps nn.Linear's.
            if own is None or getattr(own, "__func__", None) in (forward, nn.Linear.forward):
                layers[name] = layer
    return layers


def remove(model: nn.Module) -> None:
    """Undoes `apply`."""
    for layer in model.modules():
        if is_applied(layer):
            del layer.__dict__["forward"]


def is_applied(layer: nn.Module) -> bool:
    """Whether `layer` itself computes by oneDNN where it can."""
    return getattr(layer.__dict__.get("forward"), "__func__", None) is forward


# --------------------------------------------------------------------------------------- choice

Backend = Literal["auto", "onednn", "torch"]


def set_backend(model: nn.Module, backend: Backend = "auto") -> list[str]:
    """Applies or removes oneDNN's products; names of the layers where they are applied. auto: what `preferred` says."""
    chosen, reason = preferred() if backend == "auto" else (backend, "as configured")
    names = apply(model) if chosen == "onednn" else []
    if not names:
        remove(model)
    log.info("float32 products on the CPU: oneDNN in %d layers (%s)", len(names), reason)
    return names


def preferred() -> tuple[Literal["onednn", "torch"], str]:
    """The faster library on this processor, and why.

    Goes by the vendor, as MKL itself does, and measures nothing: a measurement beside other programs may come out
    either way, and a resumed run has to multiply as the run before it did.
    """
    if not _AVAILABLE:
        return "torch", "no AVX-512, or a torch whose oneDNN operator is not the one expected"
    vendor = _vendor()
    if vendor == "AuthenticAMD":
        return "onednn", f"{vendor}: MKL uses half of the vector width"
    return "torch", f"{vendor or 'unknown vendor'}: MKL is as fast or faster"


@cache
def _vendor() -> str | None:
    """The processor's vendor_id, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)
