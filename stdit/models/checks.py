"""Validation of inputs, configs and loaded weights: errors name both numbers, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stdit.config.load import shorten
from stdit.config.model import ModelConfig
from stdit.models.positions import Grid

if TYPE_CHECKING:
    from stdit.models.conditioning import ConditionInputs


def check_inputs(
    settings: ModelConfig, latents: Tensor, inputs: ConditionInputs, conditions: object | None = None
) -> Grid:
    """The grid (T, H, W) of patches of `latents`. ValueError for what does not fit the config or one another.

    conditions: precomputed, and checked then, in place of `inputs`.
    """
    grid = check_latents(settings, latents)
    if inputs.added_cond_kwargs is not None and not isinstance(inputs.added_cond_kwargs, Mapping):
        raise ValueError(f"added_cond_kwargs is a {type(inputs.added_cond_kwargs).__name__}; expected a mapping")
    batch, added = latents.shape[0], inputs.added_cond_kwargs or {}
    if conditions is None:
        check_conditions(settings, batch, inputs)
        _check_scalars(settings, batch, {"timestep": inputs.timestep, **added})
        if inputs.conditioning_frames is not None:
            _check_frames(settings, inputs.conditioning_frames, (batch, latents.shape[2]))
        return grid
    _check_precomputed(conditions, batch, grid[0])
    if settings.position_reference is not None:
        _check_scalars(settings.model_copy(update={"micro_conditions": ()}), batch, {"timestep": 0, **added})
    return grid


def _check_precomputed(conditions: object, batch: int, frames: int) -> None:
    """Precomputed conditions are for any batch size and number of frames (1), or for this one."""
    embedding = getattr(conditions, "embedding", None)
    if not isinstance(embedding, Tensor):
        raise ValueError(f"conditions is a {type(conditions).__name__}; expected one of precompute_conditions' results")
    for what, size, expected in (
        ("samples", embedding.shape[0], batch),
        ("frames of patches", embedding.shape[1], frames),
    ):
        if size not in (1, expected):
            raise ValueError(f"conditions were precomputed for {size} {what}; hidden_states has {expected}")
    text = getattr(conditions, "text", None)
    if text is not None and text.shape[0] not in (1, batch):
        raise ValueError(f"conditions were precomputed for {text.shape[0]} captions; hidden_states has {batch} samples")


def check_static(settings: ModelConfig, inputs: ConditionInputs) -> None:
    """Timestep-independent conditions, whose batch size follows from themselves."""
    added = inputs.added_cond_kwargs or {}
    batched = [v for v in inputs[1:6] if isinstance(v, Tensor) and v.ndim]
    batch = max((value.shape[0] for value in batched), default=1)
    check_conditions(settings, batch, inputs)
    numbers = [v.shape[0] for v in added.values() if isinstance(v, Tensor) and v.ndim]
    _check_scalars(settings, batch if batched else max(numbers, default=1), {"timestep": 0, **added})


def check_residuals(residuals: Sequence[Tensor], shape: tuple[int, ...], depth: int) -> None:
    """Residuals of a control branch: at most one per block, each of the tokens' shape (B, T, S, D)."""
    if not isinstance(residuals, list | tuple) or not all(isinstance(one, Tensor) for one in residuals):
        raise ValueError(f"block_residuals: expected a list of tensors, found {shorten(repr(residuals))}")
    if len(residuals) > depth:
        raise ValueError(f"block_residuals are {len(residuals)}; the model has {depth} blocks")
    for i, residual in enumerate(residuals):
        if tuple(residual.shape) != shape:
            raise ValueError(f"block_residuals[{i}] has shape {tuple(residual.shape)}; the tokens are {shape}")


def check_latents(settings: ModelConfig, latents: Tensor, name: str = "hidden_states") -> Grid:
    """The grid (T, H, W) of patches of latents (B, C, T, H, W)."""
    _check_floating(name, latents)
    if latents.ndim != 5:
        raise ValueError(f"{name} has {latents.ndim} dimensions {tuple(latents.shape)}; expected 5, (B, C, T, H, W)")
    channels, sizes = latents.shape[1], latents.shape[2:]
    if channels != settings.in_channels:
        raise ValueError(f"{name} has {channels} channels; the model takes in_channels {settings.in_channels}")
    for axis, size, patch in zip(("frames", "height", "width"), sizes, settings.patch_size, strict=True):
        if not size or (size % patch and not settings.pad_latents):
            raise ValueError(f"{name}: {axis} {size} is not divisible by patch_size {patch}")
    t, h, w = (-(-size // patch) for size, patch in zip(sizes, settings.patch_size, strict=True))
    _check_grid(settings, (t, h, w), name)
    return t, h, w


def _check_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor")
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}; expected floating point")


def _check_grid(settings: ModelConfig, grid: Grid, name: str) -> None:
    """Limits of position tables, attention windows and key/value compression."""
    t, h, w = grid
    for axis, size, most in zip(("height", "width"), (h, w), settings.position_grid or (h, w), strict=True):
        if size > most:
            raise ValueError(f"{name}: {axis} of {size} patches; the position table (position_grid) has {most}")
    learned_time = settings.has_time and settings.time_positions == "learned"
    if learned_time and settings.position_frames is not None and t > settings.position_frames:
        raise ValueError(
            f"{name}: {t} frames of patches; the learned position table (position_frames) has {settings.position_frames}"
        )
    for what, side in (("window_size", settings.window_size), ("kv_compress", settings.kv_compress)):
        for axis, size in (("height", h), ("width", w)):
            if side is not None and size % side:
                raise ValueError(f"{name}: {axis} of {size} patches is not divisible by {what} {side}")


def check_conditions(settings: ModelConfig, batch: int, inputs: ConditionInputs) -> None:
    """Text features, mask, pooled vector, labels and guidance dropout of a batch."""
    features, mask, pooled = inputs.encoder_hidden_states, inputs.encoder_attention_mask, inputs.pooled_projections
    class_labels, drop = inputs.class_labels, inputs.drop_condition
    named = {
        "encoder_hidden_states": features,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
        "class_labels": class_labels,
        "drop_condition": drop,
    }
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor")
    for name in ("encoder_hidden_states", "pooled_projections"):
        if named[name] is not None:
            _check_floating(name, named[name])
    if mask is not None and mask.is_complex():
        raise ValueError(f"encoder_attention_mask is {mask.dtype}; expected torch.bool")
    _check_text(settings, batch, features, mask, drop)
    if pooled is not None and settings.pooled_dim is None:
        raise ValueError(
            f"pooled_projections {tuple(pooled.shape)} passed to a model without pooled text (pooled_dim None)"
        )
    if pooled is not None and tuple(pooled.shape) != (batch, settings.pooled_dim):
        raise ValueError(
            f"pooled_projections has shape {tuple(pooled.shape)}; expected ({batch}, {settings.pooled_dim}), pooled_dim {settings.pooled_dim}"
        )
    for name, tensor in (("class_labels", class_labels), ("drop_condition", drop)):
        if tensor is not None and tuple(tensor.shape) != (batch,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; hidden_states has {batch} samples, expected ({batch},)"
            )
    if drop is not None and drop.dtype != torch.bool:
        raise ValueError(f"drop_condition is {drop.dtype}; expected torch.bool")
    _check_labels(settings, class_labels)


def _check_scalars(settings: ModelConfig, batch: int, values: Mapping[str, Any]) -> None:
    required = {"timestep", *settings.micro_conditions} - {"size"}
    pixels = {"height", "width"} if settings.position_reference or "size" in settings.micro_conditions else set()
    for name in sorted(required | pixels):
        if values.get(name) is None:
            why = f"position_reference {settings.position_reference}"
            if settings.micro_conditions:
                why = f"micro_conditions {', '.join(settings.micro_conditions)}"
            raise ValueError(f"{name} is missing" + ("" if name == "timestep" else f"; the model has {why}"))
    for name in sorted((required | pixels | {"aspect_ratio"}) & values.keys()):
        value = values[name]
        if value is None:
            continue
        if not isinstance(value, Tensor | int | float) or not _is_real(value):
            found = value.dtype if isinstance(value, Tensor) else f"{value!r:.80}"
            raise ValueError(f"{name} is {found}; expected a finite number or a tensor of them")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape not in ((), (1,), (batch,)):
            raise ValueError(
                f"{name} has shape {shape}; hidden_states has {batch} samples, expected a number or ({batch},)"
            )
        if name in pixels and _is_readable(value) and not bool((torch.as_tensor(value) > 0).all()):
            raise ValueError(f"{name} is {value}; expected pixels, more than 0")
    if settings.position_reference:
        for name in ("height", "width"):
            value = values[name]
            if isinstance(value, Tensor) and _is_readable(value) and not bool((value == value.flatten()[0]).all()):
                raise ValueError(
                    f"{name} differs within the batch {value.tolist()}; position_reference needs one for all"
                )


def _is_real(value: Tensor | int | float) -> bool:
    """A number that is finite, or a tensor of real numbers, whose values are not read."""
    if isinstance(value, Tensor):
        return not value.is_complex() and value.dtype != torch.bool
    # Compiled, a number may be a symbol.
    return torch.compiler.is_compiling() or (math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63)


def _is_readable(value: Any) -> bool:
    """Whether reading a value neither synchronises with a device nor breaks a compiled graph."""
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and not torch.compiler.is_compiling())


def _check_frames(settings: ModelConfig, frames: Tensor, expected: tuple[int, int]) -> None:
    if not isinstance(frames, Tensor):
        raise ValueError(f"conditioning_frames is a {type(frames).__name__}; expected a tensor {expected}")
    if frames.dtype != torch.bool:
        raise ValueError(f"conditioning_frames is {frames.dtype}; expected torch.bool")
    if tuple(frames.shape) != expected:
        raise ValueError(
            f"conditioning_frames has shape {tuple(frames.shape)}; expected (samples, latent frames) {expected}"
        )
    if settings.conditioning == "cross_attention":
        raise ValueError("conditioning_frames: cross_attention conditioning has one timestep for all frames")


def _check_text(
    settings: ModelConfig, batch: int, text: Tensor | None, mask: Tensor | None, drop: Tensor | None
) -> None:
    no_null_caption = settings.text_dim is not None and settings.null_text == "empty"
    if no_null_caption and (text is None or drop is not None):
        what = "encoder_hidden_states is missing" if text is None else "drop_condition"
        raise ValueError(
            f"{what}: the model has no null caption (null_text: empty); pass the text encoder's features of an empty caption"
        )
    if text is None:
        if mask is not None:
            raise ValueError(f"encoder_attention_mask {tuple(mask.shape)} without encoder_hidden_states")
        return
    if settings.text_dim is None:
        raise ValueError(f"encoder_hidden_states {tuple(text.shape)} passed to a model without text (text_dim None)")
    if text.ndim != 3 or text.shape[0] != batch:
        raise ValueError(
            f"encoder_hidden_states has shape {tuple(text.shape)}; expected ({batch}, L, {settings.text_dim})"
        )
    if text.shape[2] != settings.text_dim:
        raise ValueError(f"encoder_hidden_states is {text.shape[2]} wide; the model takes text_dim {settings.text_dim}")
    if not 0 < text.shape[1] <= settings.max_text_tokens:
        raise ValueError(
            f"encoder_hidden_states has {text.shape[1]} tokens; the model takes 1 to max_text_tokens {settings.max_text_tokens}"
        )
    if mask is not None and mask.shape != text.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask has shape {tuple(mask.shape)}; encoder_hidden_states has {tuple(text.shape[:2])}"
        )
    if mask is not None and no_null_caption and _is_readable(mask) and not bool(mask.bool().any(1).all()):
        row = int((~mask.bool().any(1)).nonzero()[0])
        raise ValueError(
            f"encoder_attention_mask: caption {row} has no token, and the model has no null caption (null_text: empty)"
        )


def _check_labels(settings: ModelConfig, labels: Tensor | None) -> None:
    if labels is None:
        return
    if settings.num_classes is None:
        raise ValueError(f"class_labels {tuple(labels.shape)} passed to a model without classes (num_classes None)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"class_labels is {labels.dtype}; expected torch.int64")
    if _is_readable(labels) and labels.numel():
        low, high = (int(x) for x in labels.aminmax())
        if low < -1 or high >= settings.num_classes:
            worst = low if low < -1 else high
            raise ValueError(
                f"class label {worst} is out of range; the model has {settings.num_classes} classes (and -1 for null)"
            )


def check_config(config: Mapping[str, Any], class_name: str, own: tuple[str, ...] = ()) -> None:
    """ValueError for a diffusers config of another class, or with keys or without sizes that ours has not. own: keys of
    the class beside the model's."""
    other = config.get("_class_name", class_name)
    if other != class_name:
        raise ValueError(f"these are weights of {other}, not of {class_name}")
    fields = {*ModelConfig.model_fields, *own} - {"size"}
    unknown = sorted(key for key in config if not key.startswith("_") and key not in fields)
    missing = sorted({"hidden_size", "depth", "num_heads", *own} - set(config))
    if unknown or missing:
        raise ValueError(f"config of {class_name}: unknown keys {unknown}, missing keys {missing}")


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """ValueError listing what did not match when weights were loaded. `info`: diffusers' loading info."""
    wrong = {kind: list(info.get(f"{kind}_keys") or []) for kind in ("missing", "unexpected", "mismatched")}
    wrong["error"] = list(info.get("error_msgs") or [])
    if any(wrong.values()):
        lines = [f"  {kind}: {', '.join(map(str, found))}" for kind, found in wrong.items() if found]
        raise ValueError(f"{source}: the weights do not fit the model\n" + "\n".join(lines))
