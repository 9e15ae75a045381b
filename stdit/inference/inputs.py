"""From the pipeline's arguments to the transformer's: text, classes, negative conditions, noise.

B videos · C latent channels · (t, h, w) latent frames, height, width · L text tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit.config import Bucket, ModelConfig
from stdit.config.load import shorten
from stdit.encoders.text import TextFeatures
from stdit.inference.prompts import check_text, label_id
from stdit.memory import device_memory, gib
from stdit.models.positions import Grid
from stdit.models.stdit import STDiT

Prompts = str | Sequence[str]
Labels = int | str | Sequence[int | str | None] | Tensor
# Captions -> features (B, L, D), mask (B, L), and where the encoder makes one the pooled vector (B, P).
Encode = Callable[[Prompts], TextFeatures]

NO_ENCODER = "this pipeline has no text_encoder; give prompt_embeds and prompt_attention_mask"
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


@dataclass(frozen=True)
class PipelineInputs:
    """Text and class conditions of one call of the pipeline, by the names of its arguments."""

    prompt: Prompts | None = None
    class_labels: Labels | None = None
    negative_prompt: Prompts | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    num_videos_per_prompt: int = 1


@dataclass(frozen=True)
class ConditionEncoder:
    """Encodes conditions as keywords of the transformer's forward. encode_prompt: None without a text encoder."""

    settings: ModelConfig
    encode_prompt: Encode | None
    classes: Mapping[str, int]
    device: torch.device

    def check(self, inputs: PipelineInputs, guided: bool) -> int:
        """The number of videos B, before anything is encoded. guided: negative conditions will be encoded too.

        ValueError: conditions that the model does not take, that exclude one another, or are not equally many.
        """
        self._check(inputs)
        given = (inputs.prompt, inputs.prompt_embeds, inputs.pooled_prompt_embeds)
        names = ("prompt", "prompt_embeds", "pooled_prompt_embeds")
        counts = {
            name: 1 if isinstance(v, str) else len(v) for name, v in zip(names, given, strict=True) if v is not None
        }
        if inputs.class_labels is not None:
            counts["class_labels"] = len(self.label_ids(inputs.class_labels))
        if len(set(counts.values())) > 1:
            raise ValueError(f"prompts and class_labels must be equally many, found {counts}")
        prompts = next(iter(counts.values()), 1)
        self._check_negative(inputs, prompts)
        told = inputs.prompt is not None or (guided and inputs.negative_prompt is not None)
        if (told or self._lacks_text(inputs)) and self.encode_prompt is None:
            raise ValueError(NO_ENCODER)
        if guided and counts and self._needs_negative(inputs) and self.encode_prompt is None:
            raise ValueError(
                "the model has no null caption (null_text: empty) and the pipeline no text_encoder: give "
                "negative_prompt_embeds and negative_prompt_attention_mask, or guidance_scale 1"
            )
        return prompts * inputs.num_videos_per_prompt

    def encode(self, inputs: PipelineInputs) -> tuple[dict[str, Tensor], int]:
        """(keywords, B): every prompt's conditions, num_videos_per_prompt times in a row. inputs: as `check` passes
        them."""
        cond: dict[str, Tensor] = {}
        if inputs.class_labels is not None:
            cond["class_labels"] = self.label_ids(inputs.class_labels)
        prompt = inputs.prompt
        if self._lacks_text(inputs):
            prompt = [""] * len(cond["class_labels"])
        cond |= self._encode_text(prompt, inputs.prompt_embeds, inputs.prompt_attention_mask)
        if inputs.pooled_prompt_embeds is not None:
            cond[POOLED] = inputs.pooled_prompt_embeds
        repeats = inputs.num_videos_per_prompt
        batch = next((len(value) for value in cond.values()), 1) * repeats
        return {name: value.to(self.device).repeat_interleave(repeats, 0) for name, value in cond.items()}, batch

    def encode_negative(
        self, inputs: PipelineInputs, cond: Mapping[str, Tensor], batch: int
    ) -> dict[str, Tensor] | None:
        """Negative conditions for classifier-free guidance; None: the model's own null condition. Their class is null.

        A model without a null caption gets the text encoder's features of "" by default. The pooled vector is the
        encoder's, or zeros. inputs: as `check` passes them.
        """
        embeds, mask = inputs.negative_prompt_embeds, inputs.negative_prompt_attention_mask
        prompt, pooled = inputs.negative_prompt, inputs.negative_pooled_prompt_embeds
        repeats = inputs.num_videos_per_prompt
        prompts = batch // repeats
        if prompt is None and embeds is None:
            needed = self._needs_negative(inputs)
            if not needed and pooled is None:
                return None
            prompt = "" if needed else None
        negative = self._encode_text(prompt, embeds, mask)
        if pooled is not None and POOLED not in cond:
            raise ValueError("negative_pooled_prompt_embeds needs pooled_prompt_embeds")
        if pooled is not None:
            negative[POOLED] = pooled
        elif POOLED in cond and POOLED not in negative:
            negative[POOLED] = torch.zeros_like(cond[POOLED][:1])
        for name, value in negative.items():
            expanded = value if len(value) == prompts else value.expand(prompts, *value.shape[1:])
            negative[name] = expanded.to(self.device).repeat_interleave(repeats, 0)
        if "class_labels" in cond:
            negative["class_labels"] = torch.full_like(cond["class_labels"], -1)
        return negative

    def label_ids(self, labels: Labels) -> Tensor:
        """Class labels as numbers, (B,) int64. ValueError: a name or number that is no class, with those there are."""
        if isinstance(labels, Tensor):
            check_dense("class_labels", labels)
            labels = labels.tolist()
        if isinstance(labels, np.ndarray):
            labels = cast(Labels, labels.tolist())
        if not isinstance(labels, int | str | list | tuple | range):
            raise ValueError(f"class_labels: expected numbers or names, found {type(labels).__name__}")
        values = [labels] if isinstance(labels, int | str) else list(cast(Sequence[int | str | None], labels))
        count = self.settings.num_classes or 0
        if not values:
            raise ValueError("class_labels is an empty list")
        if any(isinstance(label, bool) for label in values):
            raise ValueError("class_labels: expected numbers or names, found bool")
        return torch.tensor([label_id(label, self.classes, count) for label in values])

    def _encode_text(self, prompt: Prompts | None, embeds: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """Keywords of captions, or of their embeddings; without a mask every token is valid."""
        if prompt is not None:
            if self.encode_prompt is None:
                raise ValueError(NO_ENCODER)
            encoded = self.encode_prompt(prompt)
            pooled = {POOLED: encoded.pooled} if self.settings.pooled_dim and encoded.pooled is not None else {}
            return {TEXT: encoded.features, MASK: encoded.mask, **pooled}
        if embeds is None:
            return {}
        return {TEXT: embeds, MASK: torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()}

    def _lacks_text(self, inputs: PipelineInputs) -> bool:
        """Whether there are classes alone for a model of text without a null caption: it gets empty ones."""
        no_text = inputs.prompt is None and inputs.prompt_embeds is None
        return no_text and bool(self.settings.text_dim) and self.settings.null_text == "empty"

    def _needs_negative(self, inputs: PipelineInputs) -> bool:
        """Whether guidance needs features of "" that nobody gave."""
        told = inputs.negative_prompt is not None or inputs.negative_prompt_embeds is not None
        return bool(self.settings.text_dim) and self.settings.null_text == "empty" and not told

    def _check_negative(self, inputs: PipelineInputs, prompts: int) -> None:
        """ValueError: negative conditions without their positive ones, that exclude one another, or neither one nor
        `prompts`."""
        embeds, pooled, prompt = (
            inputs.negative_prompt_embeds, inputs.negative_pooled_prompt_embeds, inputs.negative_prompt
        )  # fmt: skip
        if inputs.negative_prompt_attention_mask is not None and embeds is None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_embeds")
        if prompt is not None and embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        text = inputs.prompt is not None or inputs.prompt_embeds is not None or self._lacks_text(inputs)
        encoded = text and inputs.prompt_embeds is None and self.settings.pooled_dim
        if pooled is not None and inputs.pooled_prompt_embeds is None and not encoded:
            raise ValueError("negative_pooled_prompt_embeds needs pooled_prompt_embeds")
        if not text and (prompt is not None or embeds is not None):
            raise ValueError("negative_prompt needs prompt or prompt_embeds")
        if prompt is not None:
            listed = checked_prompts("negative_prompt", prompt)
            if not isinstance(prompt, str) and len(listed) != prompts:
                raise ValueError(f"{len(listed)} negative prompts for {prompts} prompts")
        for name, value in (("negative_prompt_embeds", embeds), ("negative_pooled_prompt_embeds", pooled)):
            if value is not None and len(value) not in (1, prompts):
                raise ValueError(f"{name} of {len(value)} rows for {prompts} prompts; give 1 or {prompts}")

    def _check(self, inputs: PipelineInputs) -> None:
        """ValueError: conditions that the model doesn't take, that exclude one another, or none at all."""
        settings = self.settings
        text = inputs.prompt is not None or inputs.prompt_embeds is not None
        if text and settings.text_dim is None:
            takes = "class_labels" if settings.num_classes else "no condition"
            raise ValueError(f"this model takes no text (text_dim None); it takes {takes}")
        if inputs.class_labels is not None and settings.num_classes is None:
            raise ValueError("this model takes no class_labels (num_classes None)")
        if inputs.pooled_prompt_embeds is not None and settings.pooled_dim is None:
            raise ValueError("this model takes no pooled_prompt_embeds (pooled_dim None)")
        if inputs.prompt is not None and inputs.prompt_embeds is not None:
            raise ValueError("give prompt or prompt_embeds, not both")
        if inputs.prompt_attention_mask is not None and inputs.prompt_embeds is None:
            raise ValueError("prompt_attention_mask needs prompt_embeds")
        if not text and inputs.class_labels is None and (settings.text_dim or settings.num_classes):
            raise ValueError('give prompt or class_labels; prompt "" or class label -1 for no condition')
        check_counts(num_videos_per_prompt=inputs.num_videos_per_prompt)
        check_embeds(inputs, settings)


def checked_prompts(name: str, prompts: Any) -> list[str]:
    """One or several captions as a list. ValueError: not text, or none."""
    unfit = isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable)
    if unfit or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"{name}: expected text, or a list of texts; found {type(prompts).__name__}")
    listed: list[str] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise ValueError(f"{name} is an empty list")
    for i, text in enumerate(listed):
        check_text(text, f"{name} {i}")
    return listed


def check_embeds(inputs: PipelineInputs, settings: ModelConfig) -> None:
    """ValueError: embeddings or masks of another kind, dtype or shape than the model takes, or not finite."""
    for prefix in ("", "negative_"):
        embeds = getattr(inputs, f"{prefix}prompt_embeds")
        mask = getattr(inputs, f"{prefix}prompt_attention_mask")
        pooled = getattr(inputs, f"{prefix}pooled_prompt_embeds")
        check_floats(f"{prefix}prompt_embeds", embeds, ("rows", "tokens", settings.text_dim))
        check_floats(f"{prefix}pooled_prompt_embeds", pooled, ("rows", settings.pooled_dim))
        if embeds is not None and settings.text_dim and embeds.shape[1] > settings.max_text_tokens:
            raise ValueError(
                f"{prefix}prompt_embeds has {embeds.shape[1]} tokens; the model takes max_text_tokens {settings.max_text_tokens} at most"
            )
        if mask is None or embeds is None:
            continue
        name = f"{prefix}prompt_attention_mask"
        check_dense(name, mask)
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}; {prefix}prompt_embeds {tuple(embeds.shape)} needs {tuple(embeds.shape[:2])}"
            )
        if mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name}: expected bool, or 0 and 1; found {mask.dtype} with other values")
        if settings.null_text == "empty" and not bool((mask == 1).any(1).all()):
            row = int((~(mask == 1).any(1)).nonzero()[0])
            raise ValueError(
                f"{name}: caption {row} has no token, and the model has no null caption (null_text: empty)"
            )


# Dtypes that torch computes in; those of 8 bits and less are for storage.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_dense(name: str, value: Any) -> None:
    """ValueError: no tensor, or one without values or with others than dense ones (sparse, nested, on the meta
    device)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, found {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        found = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense tensor, found one of layout {found}")
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, found one on the meta device")


def check_floats(name: str, value: Any, shape: Sequence[int | str | None]) -> None:
    """ValueError: no floating-point tensor of this shape (None and strings: any size), or NaN or infinity in it."""
    if value is None:
        return
    check_dense(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{name}: expected floating point, found {value.dtype}; float32, float64, float16 and bfloat16 are"
        )
    sizes = [size if isinstance(size, int) else None for size in shape]
    fits = value.ndim == len(sizes) and all(s in (None, n) for s, n in zip(sizes, value.shape, strict=True))
    if not fits or 0 in value.shape:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({expected})")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: not finite (NaN or infinity)")


# ---------------------------------------------------------------------------------- numbers, noise


def check_counts(**counts: Any) -> None:
    """ValueError: anything but a whole number above 0, up to its limit."""
    for name, value in counts.items():
        most = LIMITS[name] if name in LIMITS else 2**31 - 1
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, found {shorten(repr(value))}")
        if int(value) > most:
            raise ValueError(f"{name} must be {most} at most, found {shorten(repr(value))}")


# As in configs.
LIMITS = {"num_frames": 1_000_000, "height": 65_536, "width": 65_536, "num_inference_steps": 100_000}


def check_output(output_type: str, callback_inputs: Sequence[str]) -> None:
    """ValueError: an unknown output_type; other callback tensors than latents."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {shorten(repr(output_type))}: expected pil, np, pt or latent")
    names = callback_inputs if isinstance(callback_inputs, list | tuple) else [callback_inputs]
    if any(name != "latents" for name in names):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: only latents can be passed on, as ['latents']; found {shorten(repr(callback_inputs))}"
        )


# Scales beyond this overflow float32 within a few steps.
MAX_SCALE = 10_000.0


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """ValueError: not a number from `low` to `high`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= cast(Any, value) <= high:
        raise ValueError(f"{name} must be a finite number, {low:g} to {high:g}; found {shorten(repr(value))}")
    return float(value)


def check_callable(name: str, value: Any) -> None:
    """ValueError: neither None nor a function."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, found {type(value).__name__}")


def callback_latents(returned: Any, x: Tensor) -> Tensor:
    """The latents of what callback_on_step_end returned; x where it names none. ValueError: no dict, or latents unlike
    x."""
    name = "callback_on_step_end"
    if not isinstance(returned, Mapping):
        raise ValueError(f'{name} must return a dict, as {{"latents": …}}; it returned {type(returned).__name__}')
    latents = returned.get("latents", x)
    if latents is x:
        return x
    check_dense(f"{name}: latents", latents)
    check_floats(f"{name}: latents", latents, x.shape)
    return latents.to(x.device, x.dtype)


def check_generator(generator: Any) -> None:
    """ValueError: neither None, a torch.Generator, nor a list of them."""
    if generator is None:
        return
    several = generator if isinstance(generator, list) else [generator]
    wrong = [type(one).__name__ for one in several if not isinstance(one, torch.Generator)]
    if wrong or not several:
        found = wrong[0] if wrong else "an empty list"
        raise ValueError(f"generator must be a torch.Generator or a list of them, found {found}")


def check_memory(transformer: STDiT, clip: Bucket, grid: Grid, inputs: PipelineInputs, guided: bool) -> None:
    """ValueError: all videos at once take more memory than the device has.

    grid: patches (T, H, W). guided: every video is computed twice. Counted is the least: the tokens (of this rank),
    their norm and the MLP's hidden layer of one block, and the pixels in float32.
    """
    given: tuple[Any, ...] = (inputs.prompt, inputs.class_labels, inputs.prompt_embeds)
    rows = (len(x) for x in given if isinstance(x, list | tuple) or getattr(x, "ndim", 0) > 0)
    videos = inputs.num_videos_per_prompt * next(rows, 1)
    settings, tokens = transformer.settings, videos * math.prod(grid)
    ranks = 1 if transformer.sequence_parallel is None else transformer.sequence_parallel.size
    channels = settings.dimensions[0] * (2 + settings.mlp_ratio)
    activations = (1 + guided) * (tokens // ranks) * int(channels) * transformer.dtype.itemsize
    pixels = videos * 3 * clip.frames * clip.height * clip.width * 4
    available = device_memory(transformer.device)
    if (needed := max(activations, pixels)) > available:
        raise ValueError(
            f"num_frames, height, width, num_videos_per_prompt: {videos} videos of {clip.key} are {tokens:,} tokens and take "
            f"{gib(needed)} at least; the {transformer.device.type} has {gib(available)}"
        )


# Frames per second where neither caller nor training says.
DEFAULT_FPS, MAX_FPS = 8.0, 10_000.0


def checked_fps(fps: float | None, frames: int, trained: float | None) -> float:
    """Frames per second; None: those of most training videos (None: 8), and 0 for an image, as in training.

    ValueError: not a number above 0, up to MAX_FPS.
    """
    if fps is None:
        return (trained or DEFAULT_FPS) if frames > 1 else 0.0
    return checked_number("fps", fps, math.ulp(0.0), MAX_FPS)


def check_finite(x: Tensor) -> None:
    """ValueError: videos of the sampled latents (B, C, t, h, w) that are not finite, with their numbers."""
    if wrong := (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"the result is not finite (NaN or infinity) in videos {shorten(str(wrong))} of {len(x)}: embeddings, latents or "
            f"guidance_scale are too large for {x.dtype}, or the weights are damaged"
        )


def prepare_latents(shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
    """Initial noise (B, C, t, h, w) float32: `latents`, or drawn from the generator (or one per video).

    ValueError: latents of another shape or dtype, or not finite; another number of generators.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} videos")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    check_floats("latents", latents, shape)
    return latents.to(device, torch.float32)
