"""What is trained beside a model: LoRA adapters or a control branch on a frozen one, or the head of an alignment."""

from __future__ import annotations

from torch import nn

from stdit.config import TrainConfig
from stdit.models import lora
from stdit.models.alignment import Aligned
from stdit.models.control import Controlled, STDiTControl
from stdit.models.stdit import STDiT


def add_trainable(base: STDiT, train: TrainConfig, seed: int = 0) -> STDiT | Controlled | Aligned:
    """`base` with new LoRA adapters or a new control branch, and otherwise frozen, if `train` has one; with a new head
    for `train.alignment`; else `base`.

    ValueError: a target that no layer has, more blocks than the model.
    """
    if (settings := train.lora) is not None:
        lora.add_adapter(base, settings.rank, settings.targets, settings.alpha, settings.dropout, seed)
        return base
    if (control := train.control) is not None:
        return Controlled(base, STDiTControl.of(base, control.blocks, seed=seed))
    return base if train.alignment is None else Aligned(base, train.alignment, seed)


def submodels(model: nn.Module) -> list[STDiT]:
    """The diffusers models in `model`: itself, that with a head, or base and control branch."""
    if isinstance(model, Aligned):
        return [model.base]
    return [model.base, model.control] if isinstance(model, Controlled) else [model]  # pyright: ignore
