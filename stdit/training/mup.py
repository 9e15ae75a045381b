"""µP: a learning rate found at one width holds at others (Yang et al. 2022, Tensor Programs V, table 3, for Adam; for
diffusion transformers Zheng et al. 2025, Scaling Diffusion Transformers Efficiently via µP).

r           inputs of a weight matrix, over those of the same matrix at the base width; 1 where their number is fixed

    weights                                        learning rate       initial root mean square
    matrices with r > 1: hidden ones               base's / r          base's / √r
    those of them with a fixed number of outputs   base's / r          base's / r
    other matrices, vectors, tables                base's              base's

At the base width nothing changes. The forward pass changes at none: the width of heads is the base's, so that attention
has the same scale; the output layer starts at 0, so that its multiplier is its learning rate's. Weight decay, which
AdamW multiplies by the learning rate, is multiplied by r. Muon's steps for hidden matrices have a root mean square of
their own, so that their largest singular value grows by √r: their learning rate is the base's / √r (Yang et al. 2023, A
Spectral Condition for Feature Learning).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stdit.models.alignment import Aligned
from stdit.models.stdit import STDiT

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Scaled(NamedTuple):
    """A parameter, the same one of the base model, and how many times as many inputs and outputs it has."""

    parameter: nn.Parameter
    base: nn.Parameter
    inputs: float
    outputs: float


def at_width(model: nn.Module, width: int, seed: int = 0) -> nn.Module:
    """A new model as `model`, with or without the head of an alignment, of another hidden size. ValueError: it cannot
    have it."""
    if isinstance(model, Aligned):
        base = at_width(model.base, width, seed)
        assert isinstance(base, STDiT)
        return Aligned(base, model.alignment, seed)
    assert isinstance(model, STDiT)
    return STDiT.from_settings(model.settings.at_width(width), seed)


def compare(model: nn.Module, base: nn.Module) -> Iterator[Scaled]:
    """The parameters of `model` beside those of `base`, the same at another width."""
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            other = modules[name].get_parameter(own)
            inputs = outputs = 1.0
            if isinstance(module, MATRICES) and own == "weight":
                inputs = math.prod(parameter.shape[1:]) / math.prod(other.shape[1:])
                outputs = parameter.shape[0] / other.shape[0]
            yield Scaled(parameter, other, inputs, outputs)


@torch.no_grad()
def scale_init(model: nn.Module, base_width: int, seed: int = 0) -> None:
    """Gives new weights of `model` the scale that follows from those of a new model of the base width."""
    for parameter, base, inputs, outputs in compare(model, at_width(model, base_width, seed)):
        wanted = _rms(base) / (inputs if outputs == 1 else math.sqrt(inputs))
        if parameter.shape != base.shape and (found := _rms(parameter)):
            parameter.mul_(wanted / found)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def scale_learning_rates(
    groups: list[dict[str, Any]], model: nn.Module, base_width: int, learning_rate: float
) -> list[dict[str, Any]]:
    """Parameter groups divided so that each has one `lr_scale`, by which the optimizer's learning rate is
    multiplied."""
    with torch.device("meta"):
        ratios = {id(scaled.parameter): scaled.inputs for scaled in compare(model, at_width(model, base_width))}
    divided = []
    for group in groups:
        by_ratio: dict[float, list[nn.Parameter]] = defaultdict(list)
        if "parts" in group:  # Muon's matrices, which stay together
            width, _, _ = (model.base if isinstance(model, Aligned) else model).settings.dimensions  # pyright: ignore
            by_ratio[math.sqrt(width / base_width)] = group["params"]
        else:
            for parameter in group["params"]:
                by_ratio[ratios[id(parameter)]].append(parameter)
        for ratio, parameters in by_ratio.items():
            own = {"lr": learning_rate / ratio, "lr_scale": 1 / ratio, "weight_decay": group["weight_decay"] * ratio}
            divided.append({**group, "params": parameters, **own})
    return divided
