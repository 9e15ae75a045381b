"""An STDiT as sampling takes it (stdit.diffusion.denoiser): conditions are embedded once, modulation precomputed.

    step_model = CachedConditions(model).bind(cond, times)
    prediction = step_model(x_t, i)

N timesteps · B batch · T latent frames · D hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stdit.config import Bucket
from stdit.config.model import ModelConfig
from stdit.models.checks import check_static
from stdit.models.conditioning import ConditionInputs, Conditions, encode_static, precompute_conditions
from stdit.models.control import STDiTControl
from stdit.models.embeddings import trim_padding
from stdit.models.stdit import STDiT

# Bytes of modulation precomputed at a time: 50 steps of DiT-XL in float32 fit for six samples, of PixArt for any
# number.
LIMIT = 256 * 2**20


class CachedConditions:
    """A model, with its control branch if there is one, whose conditions are computed once per sampling run.

    Text, class and size are embedded and the text's keys and values projected once; every block's modulation is
    computed for many timesteps in one matrix product, as many as fit in `limit` bytes (of model and branch together).

    Weights that only the model's own forward fetches (ZeRO-3 partitions, group offloading) can't be used ahead: the
    model is then called with its conditions at every step.
    """

    def __init__(
        self, model: STDiT, branch: STDiTControl | None = None, *, scale: float = 1.0, limit: int = LIMIT
    ) -> None:
        self.model, self.branch, self.scale, self.limit = model, branch, scale, limit
        self.parts: tuple[STDiT, ...] = (model,) if branch is None else (model, branch)

    def bind(self, cond: Mapping[str, Any], times: Tensor) -> Callable[[Tensor, int], Tensor]:
        """(x_t (B, C, T, H, W), step) -> prediction, of x_t's dtype, at times[step] under `cond`.

        cond: by the keywords of the model's forward, (B, …) or (1, …), and `control` for the branch; path_drop is a
        bool. times (N,).
        ValueError: conditions that don't fit the model, before any matrix product.
        """
        inputs = dict(cond)
        control = None if self.branch is None else inputs.pop("control")
        skips = {"path_drop": True} if inputs.pop("path_drop", False) else {}
        inputs = _trimmed(self.model.settings, inputs)
        precomputed: _Precomputed | None = None
        if all(_weights_at_hand(part, times.device) for part in self.parts):
            precomputed = _Precomputed(self.parts, inputs, times, self.limit)
        added = {}
        if self.model.settings.position_reference is not None:
            # Positions are computed from these as numbers: on a GPU every step would wait for them.
            pixels = {name: inputs["added_cond_kwargs"][name][:1].cpu() for name in ("height", "width")}
            added = {"added_cond_kwargs": pixels}

        def step_model(x_t: Tensor, step: int) -> Tensor:
            x, t = x_t.to(self.model.dtype), times[step].expand(x_t.shape[0])
            kwargs: list[dict[str, Any]] = [inputs] * len(self.parts)
            if precomputed is not None:
                kwargs = [{**added, "conditions": conditions} for conditions in precomputed.at(step)]
            residuals: tuple[Tensor, ...] = ()
            if self.branch is not None:
                residuals = self.branch(x, t, control=control, control_scale=self.scale, **kwargs[1])
            return self.model(x, t, **kwargs[0], **skips, block_residuals=residuals, return_dict=False)[0].to(x_t.dtype)

        return step_model


class _Precomputed:
    """Conditions of model and branch at each timestep, a window of timesteps at a time."""

    def __init__(self, parts: Sequence[STDiT], inputs: Mapping[str, Any], times: Tensor, limit: int) -> None:
        self.parts, self.times = parts, times
        self.static = [encode_static(part, ConditionInputs(**inputs)) for part in parts]
        frames = inputs.get("conditioning_frames")
        self.frames = frames[:1] if frames is not None and frames.stride(0) == 0 else frames
        self.size = self._window_size(limit)
        self.first = 0
        self.window: list[tuple[Conditions, ...]] = []

    def at(self, step: int) -> tuple[Conditions, ...]:
        """`conditions` of each part's forward at a step; computes the window that begins with it where it has to."""
        if not self.first <= step < self.first + len(self.window):
            times = self.times[step : step + self.size]
            self.first, self.window = step, []  # the old window is freed before the new one is computed
            each = [
                precompute_conditions(part, times, static, self.frames)
                for part, static in zip(self.parts, self.static, strict=True)
            ]
            self.window = list(zip(*each, strict=True))
        return self.window[step - self.first]

    def _window_size(self, limit: int) -> int:
        """Timesteps whose modulation fits in `limit` bytes: some 8 D per block and sample (and frame, with its own)."""
        model = self.parts[0]
        settings = model.settings
        if settings.conditioning in ("in_context", "cross_attention"):
            return 1  # no modulation; every timestep has its own tokens, text included
        vector = self.static[0].vector
        rows = 1 if vector is None else vector.shape[0]
        if self.frames is not None:
            rows = max(rows, self.frames.shape[0]) * self.frames.shape[1]
        width, _, _ = settings.dimensions
        streams = 2 if settings.conditioning == "joint" else 1
        vectors = sum(8 * len(part.blocks) * streams + 16 for part in self.parts)
        return max(1, limit // (rows * width * vectors * model.x_embedder.proj.weight.element_size()))


def _trimmed(settings: ModelConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """The conditions, checked, with text cut to the longest caption. ValueError: they don't fit the model."""
    check_static(settings, ConditionInputs(**inputs))
    text, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
    if text is None or mask is None:
        return inputs
    if settings.null_text == "empty" and not bool((valid := mask.bool().any(1)).all()):
        raise ValueError(
            f"encoder_attention_mask: caption {int((~valid).nonzero()[0])} has no token, and the model has no null caption "
            '(null_text: empty); pass the text encoder\'s features of ""'
        )
    text, mask = trim_padding(text, mask)
    return {**inputs, "encoder_hidden_states": text, "encoder_attention_mask": mask}


def _weights_at_hand(model: STDiT, device: torch.device) -> bool:
    """Whether every weight is on the device: none partitioned among ranks (and empty), none offloaded."""
    return all(p.numel() and p.device == device for p in model.parameters())


def micro_conditions(settings: ModelConfig, clip: Bucket, fps: float, device: torch.device) -> dict[str, Tensor]:
    """Micro-conditions of a clip, and its size for `position_reference`, as far as the model has them; (1,) each."""
    values = {
        "fps": fps,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
        "aspect_ratio": clip.height / clip.width,
    }
    wanted = {name for name in settings.micro_conditions if name != "size"}
    if "size" in settings.micro_conditions:
        wanted |= {"height", "width", "aspect_ratio"}
    if settings.position_reference is not None:
        wanted |= {"height", "width"}
    return {name: torch.tensor([float(values[name])], device=device) for name in sorted(wanted)}
