"""An STDiT as guidance and sampling take a model, `(x_t, t, cond) -> prediction`, with nothing computed twice.

What the conditions come to (the text's projection, its keys and values, the codes of class, size, …) is computed once
for as long as the conditions are the same tensors, not changed in place, and the modulations of all steps in one product.

B batch · T latent frames · L text tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stdit.config import Bucket
from stdit.config.model import ModelConfig
from stdit.held import Held
from stdit.models.checks import check_inputs
from stdit.models.conditioning import (
    ConditionInputs,
    Conditions,
    StaticConditions,
    encode_static,
    precompute_conditions,
)
from stdit.models.control import STDiTControl
from stdit.models.embeddings import trim_padding
from stdit.models.stdit import STDiT

# Bytes that steps prepared ahead may take: 50 steps of DiT-XL in float32 fit for six samples, of PixArt for any number.
LIMIT = 256 * 2**20


class Sampled:
    """A model whose conditions are prepared ahead for the times that `expect` was told; at others it is simply called.

    It is simply called, too, where weights are not all at hand (ZeRO-3's partitions, offloading by parts), which only
    the model's own forward fetches. branch: a control branch, which is told `control` of the conditions, whose output
    is added times `scale`, and whose conditions are prepared likewise. limit: bytes of modulations held at a time, of both.
    """

    def __init__(
        self, model: STDiT, branch: STDiTControl | None = None, *, scale: float = 1.0, limit: int = LIMIT
    ) -> None:
        self.model, self.branch, self.scale, self.limit = model, branch, scale, limit
        self._parts: tuple[STDiT, ...] = (model,) if branch is None else (model, branch)
        self._times: Tensor | None = None
        self._held: Held | None = None
        self._told: dict[str, Any] = {}
        self._pixels: dict[str, Any] = {}
        self._at_hand = False
        self._control: Tensor | None = None
        # Of the model and of its branch, in this order.
        self._known: tuple[StaticConditions, ...] = ()
        self._ahead: dict[int, tuple[Conditions, ...]] = {}

    def expect(self, times: Tensor) -> None:
        """The times (N,) that are to come, in this order; each `t` is then a view of one of them."""
        self._times = times
        self._ahead = {}

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """x_t (B, C, T, H, W), t (B,), conditions by the names of the model's forward -> its prediction, of x_t's dtype."""
        if self._held is None or not self._held.same(cond):
            self._take(x_t, t, cond)
        x, step = x_t.to(self.model.dtype), self._step(t)
        told: list[dict[str, Any]] = [self._told] * len(self._parts)
        if step is not None and self._at_hand:
            told = [{**self._pixels, "conditions": conditions} for conditions in self._conditions(step)]
        added: tuple[Tensor, ...] = ()
        if self.branch is not None:
            added = self.branch(x, t, control=self._control, control_scale=self.scale, **told[1])
        return self.model(x, t, **told[0], block_residuals=added, return_dict=False)[0].to(x_t.dtype)

    def _take(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> None:
        """Holds new conditions, their text cut to its longest. ValueError: they don't fit the model."""
        told = dict(cond)
        self._control = None if self.branch is None else told.pop("control")
        inputs = ConditionInputs(t, **told)
        check_inputs(self.model.settings, x_t, inputs)
        text, mask = inputs.encoder_hidden_states, inputs.encoder_attention_mask
        if text is not None and mask is not None:
            if self.model.settings.null_text == "empty" and not bool((seen := mask.bool().any(1)).all()):
                raise ValueError(
                    f"encoder_attention_mask: caption {int((~seen).nonzero()[0])} has no token, and the model has no null caption "
                    '(null_text: empty); pass the text encoder\'s features of ""'
                )
            told["encoder_hidden_states"], told["encoder_attention_mask"] = trim_padding(text, mask)
        self._held, self._told, self._known, self._ahead = Held(cond), told, (), {}
        self._at_hand = all(_at_hand(part, x_t.device) for part in self._parts)
        if self.model.settings.position_reference is not None:
            # The model computes with these two as numbers: on another device it would wait for them at every step.
            added = told["added_cond_kwargs"]
            pixels = {name: added[name][:1].cpu() for name in ("height", "width")}
            self._pixels = {"added_cond_kwargs": pixels}

    def _step(self, t: Tensor) -> int | None:
        """Which of the expected times t is: told by its place in memory, for which no device has to be waited for."""
        times = self._times
        if times is None or t.dtype != times.dtype or (t.ndim and t.shape[0] > 1 and t.stride(0) != 0):
            return None
        if t.untyped_storage().data_ptr() != times.untyped_storage().data_ptr():
            return None
        apart = int(t.storage_offset() - times.storage_offset())
        step, rest = divmod(apart, int(times.stride(0)) or 1)
        return step if not rest and 0 <= step < len(times) else None

    @torch.no_grad()
    def _conditions(self, step: int) -> tuple[Conditions, ...]:
        """What the forward of model and branch takes as `conditions` at a step; with it those of as many more as the limit
        allows."""
        if step not in self._ahead:
            assert self._times is not None
            told = self._told
            if not self._known:
                self._known = tuple(encode_static(part, ConditionInputs(**told)) for part in self._parts)
            frames = told.get("conditioning_frames")
            if frames is not None and frames.stride(0) == 0:
                frames = frames[:1]
            times = self._times[step : step + self._at_once(frames)]
            self._ahead = {}  # freed before more is made
            made = [
                precompute_conditions(part, times, known, frames)
                for part, known in zip(self._parts, self._known, strict=True)
            ]
            self._ahead = {step + i: each for i, each in enumerate(zip(*made, strict=True))}
        return self._ahead[step]

    def _at_once(self, frames: Tensor | None) -> int:
        """Steps whose modulations stay below the limit: some 8 D in each block for each sample (and frame) of its own."""
        settings = self.model.settings
        if settings.conditioning in ("in_context", "cross_attention"):
            return 1  # nothing but tokens, of which each step has its own with the text
        rest = self._known[0].vector
        rows = 1 if rest is None else rest.shape[0]
        if frames is not None:
            rows = max(rows, frames.shape[0]) * frames.shape[1]
        width, _, _ = settings.dimensions
        streams = 2 if settings.conditioning == "joint" else 1
        vectors = sum(8 * len(part.blocks) * streams + 16 for part in self._parts)
        each = rows * width * vectors * self.model.x_embedder.proj.weight.element_size()
        return max(1, self.limit // each)


def _at_hand(model: STDiT, device: torch.device) -> bool:
    """Whether every weight is here: none partitioned among ranks (and empty), none put aside on another device."""
    return all(p.numel() and p.device == device for p in model.parameters())


def micro_conditions(settings: ModelConfig, clip: Bucket, fps: float, device: torch.device) -> dict[str, Tensor]:
    """What a model with micro-conditions, or with a position_reference, is told of the clip that it draws, (1,) each: one
    for the whole batch."""
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
