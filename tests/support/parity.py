"""Two models compared: outputs, and gradients of the input and of every weight, mapped back to the file's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from stdit.models.stdit import STDiT
from stdit.weights.convert import load_published
from stdit.weights.layouts import detect_layout
from stdit.weights.layouts.layout import Layout

State = dict[str, Tensor]


class Differences(NamedTuple):
    """Greatest difference over greatest value: of the output, the input's gradient, the worst weight's gradient."""

    output: float
    inputs: float
    weights: float

    def below(self, limit: float) -> bool:
        return max(self) <= limit


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-30))


def loaded(state: State, folder: Path, **overrides: object) -> STDiT:
    """Our model of a state dict, by way of a file."""
    path = folder / "weights.safetensors"
    save_file(state, path)
    return load_published(path, overrides)


def differences(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    model: STDiT,
    layout: Layout,
    weights: Mapping[str, Tensor],
) -> Differences:
    """`ours` and `theirs` of the same x; weights: theirs, by the names in the file, requiring gradients."""
    model.requires_grad_(True)
    model.zero_grad()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    mine, other = ours(a), theirs(b)
    cotangent = torch.randn(other.shape, generator=torch.Generator().manual_seed(9))
    mine.backward(cotangent)
    other.backward(cotangent)
    assert a.grad is not None
    assert b.grad is not None
    worst, parameters = 0.0, dict(model.named_parameters())
    # Some gradients are 0 but for rounding (a bias of keys changes no softmax): they are held against the greatest.
    largest = max(float(w.grad.abs().max()) for w in weights.values() if w.grad is not None)
    for rule in layout.rules(model.settings):
        own = parameters[rule.ours].grad
        found = [g if (g := weights[n].grad) is not None else torch.zeros_like(weights[n]) for n in rule.theirs]
        if own is None:  # a null caption that was not asked for
            assert not any(g.any() for g in found), rule.ours
            continue
        made = [sum(found[1:], found[0])] if rule.copies else found
        for one, other_one in zip(rule.unpack(own), made, strict=False):
            scale = max(float(other_one.abs().max()), 0.05 * largest)
            worst = max(worst, float((one - other_one).abs().max()) / scale)
    return Differences(relative(mine, other), relative(a.grad, b.grad), worst)


def learning(state: State) -> State:
    """The tensors of a state dict, requiring gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    return detect_layout(state, "test")


def ragged(lengths: list[int], longest: int) -> Tensor:
    """A mask (B, L), True for the first tokens."""
    return torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
