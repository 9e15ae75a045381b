"""What the model refuses: inputs and files that do not fit, each with both numbers, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stdit.config import ModelConfig
from stdit.models.embeddings import Grid


def check_inputs(
    settings: ModelConfig,
    latents: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    per_sample: Mapping[str, Tensor | None],
    scalars: Mapping[str, Any],
) -> Grid:
    """The grid (T, H, W) of patches of `latents`. ValueError for what does not fit the config or one another.

    `per_sample`: tensors that must be (B,) or None. `scalars`: numbers, (1,) or (B,), none of them None.
    """
    if latents.ndim != 5:
        raise ValueError(
            f"hidden_states has {latents.ndim} dimensions {tuple(latents.shape)}; expected 5, (B, C, T, H, W)"
        )
    batch, channels, *sizes = latents.shape
    if channels != settings.in_channels:
        raise ValueError(f"hidden_states has {channels} channels; the model takes in_channels {settings.in_channels}")
    for axis, size, patch in zip(("frames", "height", "width"), sizes, settings.patch_size, strict=True):
        if size % patch or not size:
            raise ValueError(f"hidden_states: {axis} {size} is not divisible by patch_size {patch}")
    _check_text(settings, batch, text, mask)
    for name, tensor in per_sample.items():
        if tensor is not None and tuple(tensor.shape) != (batch,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; hidden_states has {batch} samples, expected ({batch},)"
            )
    _check_labels(settings, per_sample.get("class_labels"))
    for name, value in scalars.items():
        if value is None:
            raise ValueError(
                f"{name} is missing; the model has micro_conditions {', '.join(settings.micro_conditions)}"
            )
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape not in ((), (1,), (batch,)):
            raise ValueError(
                f"{name} has shape {shape}; hidden_states has {batch} samples, expected a number or ({batch},)"
            )
    t, h, w = (size // patch for size, patch in zip(sizes, settings.patch_size, strict=True))
    return t, h, w


def _check_text(settings: ModelConfig, batch: int, text: Tensor | None, mask: Tensor | None) -> None:
    if text is None:
        if mask is not None:
            raise ValueError(f"encoder_attention_mask {tuple(mask.shape)} without encoder_hidden_states")
        return
    if settings.text_dim is None:
        raise ValueError(f"encoder_hidden_states {tuple(text.shape)} given to a model without text (text_dim None)")
    if text.ndim != 3 or text.shape[0] != batch:
        raise ValueError(
            f"encoder_hidden_states has shape {tuple(text.shape)}; expected ({batch}, L, {settings.text_dim})"
        )
    if text.shape[2] != settings.text_dim:
        raise ValueError(f"encoder_hidden_states is {text.shape[2]} wide; the model takes text_dim {settings.text_dim}")
    if not 0 < text.shape[1] <= settings.text_tokens:
        raise ValueError(
            f"encoder_hidden_states has {text.shape[1]} tokens; the model takes 1 to text_tokens {settings.text_tokens}"
        )
    if mask is not None and mask.shape != text.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask has shape {tuple(mask.shape)}; encoder_hidden_states has {tuple(text.shape[:2])}"
        )


def _check_labels(settings: ModelConfig, labels: Tensor | None) -> None:
    if labels is None:
        return
    if settings.num_classes is None:
        raise ValueError(f"class_labels {tuple(labels.shape)} given to a model without classes (num_classes None)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"class_labels is {labels.dtype}; expected torch.int64")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in labels.aminmax())
        if low < -1 or high >= settings.num_classes:
            worst = low if low < -1 else high
            raise ValueError(
                f"class label {worst} is out of range; the model has {settings.num_classes} classes (and -1 for null)"
            )


def check_config(config: Mapping[str, Any], class_name: str) -> None:
    """ValueError for a diffusers config of another class, or with keys or without sizes that ours has not."""
    other = config.get("_class_name", class_name)
    if other != class_name:
        raise ValueError(f"these are weights of {other}, not of {class_name}")
    known = set(ModelConfig.model_fields) - {"size"}
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
    missing = sorted({"hidden_size", "depth", "num_heads"} - set(config))
    if unknown or missing:
        raise ValueError(f"config of {class_name}: unknown keys {unknown}, missing keys {missing}")


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """ValueError listing what did not match when weights were loaded. `info`: diffusers' loading info."""
    wrong = {kind: list(info.get(f"{kind}_keys") or []) for kind in ("missing", "unexpected", "mismatched")}
    wrong["error"] = list(info.get("error_msgs") or [])
    if any(wrong.values()):
        lines = [f"  {kind}: {', '.join(map(str, found))}" for kind, found in wrong.items() if found]
        raise ValueError(f"{source}: the weights do not fit the model\n" + "\n".join(lines))
