"""From the pipeline's arguments to what the transformer is told: captions, classes, what guidance moves away from, given frames.

B videos · C latent channels · (t, h, w) latent frames, height, width · L text tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from stdit.config import Bucket, ModelConfig
from stdit.diffusion.schedulers import FrameCondition
from stdit.encoders.text import TextFeatures
from stdit.encoders.video import VideoEncoder
from stdit.inference.prompts import label_id

Prompts = str | Sequence[str]
Labels = int | str | Sequence[int | str | None] | Tensor
Frames = Tensor | Sequence[int]
# Captions -> features (B, L, D), mask (B, L), and where the encoder makes one the pooled vector (B, P).
Encode = Callable[[Prompts], TextFeatures]

TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


@dataclass(frozen=True)
class Asked:
    """The conditions that one call of the pipeline is given, by the names of its arguments; `each`: videos a prompt."""

    prompt: Prompts | None = None
    class_labels: Labels | None = None
    negative_prompt: Prompts | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    each: int = 1


@dataclass(frozen=True)
class Teller:
    """Makes the keywords of a transformer's forward. encode: None where there is no text encoder."""

    settings: ModelConfig
    encode: Encode | None
    classes: Mapping[str, int]
    device: torch.device

    def condition(self, asked: Asked) -> tuple[dict[str, Any], int]:
        """(keywords, B): every prompt's conditions, `each` times in a row. ValueError: what the model does not take."""
        self._check(asked)
        cond: dict[str, Tensor] = {}
        if asked.class_labels is not None:
            cond["class_labels"] = self.label_ids(asked.class_labels)
        prompt = asked.prompt
        if (
            prompt is None
            and asked.prompt_embeds is None
            and self.settings.text_dim
            and self.settings.null_text == "empty"
        ):
            prompt = [""] * len(cond["class_labels"])
        cond |= self._text(prompt, asked.prompt_embeds, asked.prompt_attention_mask)
        if asked.pooled_prompt_embeds is not None:
            cond[POOLED] = asked.pooled_prompt_embeds
        counts = {name: len(value) for name, value in cond.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"prompts and class_labels must be equally many, found {counts}")
        batch = next(iter(counts.values()), 1) * asked.each
        return {name: value.to(self.device).repeat_interleave(asked.each, 0) for name, value in cond.items()}, batch

    def negative(self, asked: Asked, cond: Mapping[str, Tensor], batch: int) -> dict[str, Tensor] | None:
        """The condition in whose place guidance else has the model's own null one; its class is null.

        A model without a null caption of its own is given the text encoder's features of "" unless asked for others. The
        pooled vector is the encoder's, or else zeros. ValueError: there is neither an encoder nor features.
        """
        embeds, mask, prompt = asked.negative_prompt_embeds, asked.negative_prompt_attention_mask, asked.negative_prompt
        pooled, prompts = asked.negative_pooled_prompt_embeds, batch // asked.each
        if mask is not None and embeds is None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_embeds")
        if prompt is not None and embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        if pooled is not None and POOLED not in cond:
            raise ValueError("negative_pooled_prompt_embeds needs pooled_prompt_embeds")
        if TEXT not in cond and (prompt is not None or embeds is not None):
            raise ValueError("negative_prompt needs prompt or prompt_embeds")
        needed = TEXT in cond and self.settings.null_text == "empty"
        if prompt is None and embeds is None and pooled is None and not needed:
            return None
        if prompt is None and embeds is None and needed:
            if self.encode is None:
                raise ValueError(
                    "guidance needs what stands for no caption, of which this model has nothing of its own (null_text: "
                    "empty), and the pipeline has no text_encoder: give negative_prompt_embeds and "
                    "negative_prompt_attention_mask, or guidance_scale 1"
                )
            prompt = ""
        if prompt is not None and not isinstance(prompt, str) and len(prompt) != prompts:
            raise ValueError(f"{len(prompt)} negative prompts for {prompts} prompts")
        negative = self._text(prompt, embeds, mask)
        if pooled is not None:
            negative[POOLED] = pooled
        elif POOLED in cond and POOLED not in negative:
            negative[POOLED] = torch.zeros_like(cond[POOLED][:1])
        for name, value in negative.items():
            if len(value) not in (1, prompts):
                raise ValueError(f"negative {name} of {len(value)} rows for {prompts} prompts; give 1 or {prompts}")
        spread = {
            name: (value if len(value) == prompts else value.expand(prompts, *value.shape[1:])).to(self.device)
            for name, value in negative.items()
        }
        made = {name: value.repeat_interleave(asked.each, 0) for name, value in spread.items()}
        if "class_labels" in cond:
            made["class_labels"] = torch.full_like(cond["class_labels"], -1)
        return made

    def label_ids(self, labels: Labels) -> Tensor:
        """Class labels as numbers, (B,) int64. ValueError: a name or number that is no class, with those there are."""
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        given = [labels] if isinstance(labels, int | str) else list(cast(Sequence[int | str | None], labels))
        count = self.settings.num_classes or 0
        if not given:
            raise ValueError("class_labels is an empty list")
        return torch.tensor([label_id(label, self.classes, count) for label in given])

    def _text(self, prompt: Prompts | None, embeds: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """The keywords of a caption, or of its features; the mask of None is one of real tokens alone."""
        if prompt is not None:
            if self.encode is None:
                raise ValueError("this pipeline has no text_encoder; give prompt_embeds and prompt_attention_mask")
            made = self.encode(prompt)
            pooled = {POOLED: made.pooled} if self.settings.pooled_dim and made.pooled is not None else {}
            return {TEXT: made.features, MASK: made.mask, **pooled}
        if embeds is None:
            return {}
        return {TEXT: embeds, MASK: torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()}

    def _check(self, asked: Asked) -> None:
        """ValueError: conditions that this model, or one another, don't allow; none at all."""
        settings = self.settings
        told = asked.prompt is not None or asked.prompt_embeds is not None
        if told and settings.text_dim is None:
            takes = "class_labels" if settings.num_classes else "no condition"
            raise ValueError(f"this model takes no text (text_dim None); it takes {takes}")
        if asked.class_labels is not None and settings.num_classes is None:
            raise ValueError("this model takes no class_labels (num_classes None)")
        if asked.pooled_prompt_embeds is not None and settings.pooled_dim is None:
            raise ValueError("this model takes no pooled_prompt_embeds (pooled_dim None)")
        if asked.prompt is not None and asked.prompt_embeds is not None:
            raise ValueError("give prompt or prompt_embeds, not both")
        if asked.prompt_attention_mask is not None and asked.prompt_embeds is None:
            raise ValueError("prompt_attention_mask needs prompt_embeds")
        if not told and asked.class_labels is None and (settings.text_dim or settings.num_classes):
            raise ValueError('give prompt or class_labels; prompt "" or class label -1 for no condition')
        if asked.each < 1:
            raise ValueError(f"num_videos_per_prompt must be 1 or more, found {asked.each}")


# -------------------------------------------------------------------------------- numbers and noise


def check_counts(**given: Any) -> None:
    """ValueError: anything but a whole number above 0."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, found {value!r}")


def check_output(output_type: str, callback_inputs: Sequence[str]) -> None:
    """ValueError: a form of output that there is not; something else than latents for callbacks."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r}: expected pil, np, pt or latent")
    if set(callback_inputs) - {"latents"}:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: only latents can be passed on, found {list(callback_inputs)}"
        )


def checked_scale(scale: float) -> float:
    """A guidance scale. ValueError: not a finite number, or below 0."""
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale must be a finite number, 0 or more; found {scale}")
    return scale


def checked_fps(fps: float | None, frames: int) -> float:
    """Frames a second: of None 8, and 0 of an image, as training has it. ValueError: not a finite number above 0."""
    if fps is None:
        return 8.0 if frames > 1 else 0.0
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, found {fps}")
    return fps


def initial_noise(shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
    """float32 noise to begin from: `latents`, or drawn from the generator (or one for each video). ValueError: of another shape."""
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} videos")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, these videos need {shape}")
    return latents.to(device, torch.float32)


# ------------------------------------------------------------------------------------ given frames


def encoded(
    encoder: VideoEncoder, processor: VideoProcessor, video: Any, clip: Bucket, name: str = "conditioning_video"
) -> Tensor:
    """An image or video in any form that diffusers knows -> normalised latents (B, C, t, h, w). ValueError: of another size."""
    if isinstance(video, Image.Image):
        video = [video]
    elif isinstance(video, Tensor | np.ndarray) and video.ndim in (3, 4):
        video = [video[None] if video.ndim == 3 else video]
    pixels = processor.preprocess_video(video)  # (B, 3, T, H, W) in [-1, 1]
    height, width = pixels.shape[3:]
    if (height, width) != (clip.height, clip.width):
        raise ValueError(f"{name} is {height}x{width} (height x width), the clip {clip.height}x{clip.width}")
    return encoder.normalise(encoder.encode(pixels)[0])


def given(
    frames: Frames | None, latents: Tensor | None, shape: tuple[int, ...], patch: int, device: torch.device
) -> FrameCondition | None:
    """The frames that are not drawn, of latents of `shape` (B, C, T, h, w); patch: latent frames of one patch.

    frames: (B or 1, T) or (T,) bool, or latent frame numbers (-1 is the last); None: as many of the first as `latents`
    has. latents (B or 1, C, t, h, w), normalised: the whole clip (t = T), of which the given frames are taken, or those
    alone, in the order in which they are named. ValueError: one without the other, or what doesn't fit, with both numbers.
    """
    if latents is None:
        if frames is None:
            return None
        raise ValueError(
            "conditioning_frames needs conditioning_latents or conditioning_video, what stands in those frames"
        )
    batch, channels, length, *plane = shape
    expected = f"(1 or {batch}, {channels}, frames, {', '.join(map(str, plane))})"
    fits = latents.ndim == 5 and latents.shape[0] in (1, batch) and latents.shape[1] == channels
    if not fits or list(latents.shape[3:]) != plane or not 0 < latents.shape[2] <= length:
        raise ValueError(
            f"conditioning_latents have shape {tuple(latents.shape)}; expected {expected}, of 1 to {length} frames"
        )
    numbers, mask = _given_numbers(frames, latents.shape[2], batch, length)
    if (part := mask.unflatten(1, (-1, patch))).any(2).ne(part.all(2)).any():
        raise ValueError(
            f"conditioning_frames {numbers[0]}: {patch} latent frames share a patch, which is given whole or not at all"
        )
    whole = latents.to(device, torch.float32)
    if latents.shape[2] != length:
        count = latents.shape[2]
        if wrong := next((row for row in numbers if len(row) != count), None):
            raise ValueError(
                f"conditioning_latents have {count} frames, conditioning_frames names {len(wrong)}; give as many, or the whole clip of {length}"
            )
        rows = max(len(numbers), len(whole))
        spread = torch.zeros(rows, channels, length, *plane, device=device)
        for i in range(rows):
            spread[i][:, numbers[i % len(numbers)]] = whole[i % len(whole)]
        whole = spread
    return FrameCondition(mask.to(device), whole)


def _given_numbers(frames: Frames | None, count: int, batch: int, length: int) -> tuple[list[list[int]], Tensor]:
    """Numbers of the given frames for each sample (or one for all), in their order, and the mask (B or 1, T) bool."""
    if isinstance(frames, Tensor):
        mask = frames[None] if frames.ndim == 1 else frames
        if frames.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != length or len(mask) not in (1, batch):
            raise ValueError(
                f"conditioning_frames is {frames.dtype} of shape {tuple(frames.shape)}; expected bool of (1 or {batch}, {length}), "
                f"{length} latent frames"
            )
        return [row.nonzero().flatten().tolist() for row in mask.cpu()], mask
    named = list(range(count)) if frames is None else [int(number) for number in frames]
    if wrong := [number for number in named if not -length <= number < length]:
        raise ValueError(
            f"conditioning_frames names latent frame {wrong[0]}; this clip has {length}, 0 to {length - 1}"
        )
    numbers = [number % length for number in named]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"conditioning_frames {named} names a frame twice")
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, numbers] = True
    return [numbers], mask
