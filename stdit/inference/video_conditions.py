"""What a video to be generated begins with or follows, in the pipeline's arguments: conditioning frames and control
inputs.

Each is checked before anything is encoded.

B videos · C latent channels · (t, h, w) latent frames, height, width · (T, H, W) the same in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from stdit.config import Bucket, ConfigError, latent_shape
from stdit.config.load import shorten
from stdit.diffusion.frame_conditioning import FrameCondition
from stdit.encoders.text import onload
from stdit.encoders.video import VideoEncoder
from stdit.inference.inputs import check_dense, check_floats
from stdit.models.control import STDiTControl

Frames = Tensor | Sequence[int]


@dataclass(frozen=True)
class VideoCondition:
    """An argument that is a video, checked: latents, or the pixels from which `encode` makes them.

    shape: of the latents (B, C, t, h, w). pixels: (B, 3, T, H, W) in [-1, 1].
    """

    name: str
    shape: tuple[int, ...]
    latents: Tensor | None = None
    pixels: Tensor | None = None

    def encode(self, encoder: VideoEncoder) -> Tensor:
        """Normalised latents."""
        if self.latents is not None:
            return self.latents
        assert self.pixels is not None
        onload(encoder.vae)
        return encoder.normalise(encoder.encode(self.pixels)[0])


def read_latents(name: str, latents: Any) -> VideoCondition:
    """ValueError: no floating-point tensor of five dimensions, or not finite."""
    check_dense(name, latents)
    check_floats(name, latents, ("videos", "channels", "frames", "height", "width"))
    return VideoCondition(name, tuple(latents.shape), latents)


def read_video(encoder: VideoEncoder, processor: VideoProcessor, video: Any, clip: Bucket, name: str) -> VideoCondition:
    """An image or video in any of diffusers' forms. Nothing is encoded yet.

    As diffusers does, pictures of another size are stretched to the clip's. ValueError: none of these forms, values
    beyond -1 to 1, more frames than the clip, or a number of frames that the autoencoder does not take.
    """
    if isinstance(video, Image.Image):
        video = [video]
    elif isinstance(video, Tensor | np.ndarray) and video.ndim in (3, 4):
        video = [video[None] if video.ndim == 3 else video]
    return _of_pixels(encoder, preprocess(processor.preprocess_video, video, clip, name), clip, name)


def _of_pixels(encoder: VideoEncoder, pixels: Tensor, clip: Bucket, name: str) -> VideoCondition:
    """pixels: (B, 3, T, H, W)."""
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise ValueError(
            f"{name}: expected pictures of 3 channels, found an array of {tuple(pixels.shape)} (B, C, T, H, W)"
        )
    if (frames := pixels.shape[2]) > clip.frames:
        raise ValueError(f"{name} has {frames} frames; the clip has num_frames {clip.frames}")
    try:
        size = latent_shape(Bucket(frames=frames, height=clip.height, width=clip.width), encoder.compression)
    except ConfigError as error:
        raise ValueError(f"{name}: {error}") from None
    return VideoCondition(name, (len(pixels), encoder.channels, *size), pixels=pixels)


def preprocess(into: Callable[..., Tensor], pictures: Any, clip: Bucket, name: str) -> Tensor:
    """Pictures in any of diffusers' forms as a tensor in [-1, 1]. ValueError: none of them, or not finite, or numbers
    that are no colours from 0 to 1 (or, as diffusers allows, -1 to 1)."""
    if _dtype_of(pictures) in INTEGERS:
        raise ValueError(f"{name}: expected floating point from 0 to 1, or PIL images; found {_dtype_of(pictures)}")
    try:
        pixels = into(pictures, clip.height, clip.width)
    except Exception as error:  # diffusers looks at what it is given piece by piece
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{name}: not an image or a video ({type(pictures).__name__}: {shorten(reason, 200)})"
        ) from error
    check_floats(name, pixels, pixels.shape)
    if pixels.abs().max() > 3:  # a decoder may be a little beyond; 0 to 255 is far
        raise ValueError(f"{name}: expected numbers from 0 to 1, found up to {(pixels.max().item() + 1) / 2:g}")
    return pixels


INTEGERS = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", "object")


def _dtype_of(pictures: Any) -> str:
    """dtype of an array or tensor, or of the first one in (nested) lists; "" of anything else."""
    for _ in range(3):
        if isinstance(pictures, list | tuple) and pictures:
            pictures = pictures[0]
    return str(pictures.dtype).removeprefix("torch.") if isinstance(pictures, Tensor | np.ndarray) else ""


def read_control(
    control: STDiTControl,
    encoder: VideoEncoder,
    processor: VideoProcessor,
    conditions: Mapping[str, Any],
    clip: Bucket,
    latent: tuple[int, int, int],
    batch: int,
    num_videos_per_prompt: int,
) -> VideoCondition:
    """A control branch's condition, from control_image, control_video or control_latents. Nothing is encoded yet.

    An image is a clip of one frame. One condition serves all videos; or there is one per prompt, or per video.
    ValueError: none or several are passed, or one of another size, with both numbers.
    """
    passed = [name for name, value in conditions.items() if value is not None]
    if len(passed) != 1:
        raise ValueError(f"a control branch needs one of {', '.join(conditions)}; found {', '.join(passed) or 'none'}")
    name, value = passed[0], conditions[passed[0]]
    if name == "control_latents":
        condition = read_latents(name, value)
    elif name == "control_video":
        condition = read_video(encoder, processor, value, clip, name)
    else:
        condition = _of_pixels(encoder, preprocess(processor.preprocess, value, clip, name)[:, :, None], clip, name)
    rows, prompts = condition.shape[0], batch // num_videos_per_prompt
    try:
        control.check_control(
            torch.empty(1, *condition.shape[1:], device="meta"), torch.empty(1, 1, *latent, device="meta")
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if rows not in (1, prompts, batch):
        raise ValueError(
            f"{rows} conditions ({name}) for {prompts} prompts of {num_videos_per_prompt} videos; give 1 or as many"
        )
    return condition


def prepare_control_latents(
    condition: VideoCondition, encoder: VideoEncoder, batch: int, num_videos_per_prompt: int
) -> Tensor:
    """Encodes a control branch's condition: (1 or B, C', t or 1, h, w)."""
    latents = condition.encode(encoder)
    per_prompt = len(latents) == batch // num_videos_per_prompt
    return latents.repeat_interleave(num_videos_per_prompt, 0) if per_prompt else latents


def prepare_frame_condition(
    frames: Frames | None, latents: Tensor, shape: tuple[int, ...], patch: int, device: torch.device
) -> FrameCondition:
    """Conditioning frames of latents of `shape` (B, C, T, h, w); patch: latent frames of one patch.

    frames: (B or 1, T) or (T,) bool, or latent frame numbers (-1 is the last); None: as many of the first as `latents`
    has. latents (B or 1, C, t, h, w), normalised: the whole clip (t = T), or the conditioning frames alone, in the
    order in which they are listed. ValueError: one without the other, or what doesn't fit, with both numbers.
    """
    numbers, mask = check_frame_condition(frames, read_latents("conditioning_latents", latents), shape, patch)
    _, channels, length, *plane = shape
    whole = latents.to(device, torch.float32)
    if latents.shape[2] != length:
        rows = max(len(numbers), len(whole))
        spread = torch.zeros(rows, channels, length, *plane, device=device)
        for i in range(rows):
            spread[i][:, numbers[i % len(numbers)]] = whole[i % len(whole)]
        whole = spread
    return FrameCondition(mask.to(device), whole)


def check_frame_condition(
    frames: Frames | None, condition: VideoCondition | None, shape: tuple[int, ...], patch: int
) -> tuple[list[list[int]], Tensor]:
    """Numbers of the conditioning frames of each sample (or of all), in their order, and the mask (B or 1, T) bool.

    frames, shape, patch: as in `prepare_frame_condition`. ValueError: they or the condition's shape do not fit, with
    both numbers.
    """
    batch, channels, length, *plane = shape
    if condition is None:
        if frames is not None:
            raise ValueError("conditioning_frames needs conditioning_latents or conditioning_video")
        return [], torch.zeros(1, length, dtype=torch.bool)
    rows, count = condition.shape[0], condition.shape[2]
    if rows not in (1, batch) or condition.shape[1] != channels or list(condition.shape[3:]) != plane or count > length:
        if condition.pixels is not None:
            raise ValueError(f"{condition.name} has {rows} videos for {batch} to be generated; give 1 or {batch}")
        expected = f"(1 or {batch}, {channels}, frames, {', '.join(map(str, plane))})"
        raise ValueError(f"{condition.name} has shape {condition.shape}; expected {expected}, of 1 to {length} frames")
    numbers, mask = _frame_numbers(frames, count, batch, length)
    full = torch.cat([mask, mask[:, -1:].expand(-1, -length % patch)], dim=1)  # a last patch may be partly padding
    if (part := full.unflatten(1, (-1, patch))).any(2).ne(part.all(2)).any():
        raise ValueError(
            f"conditioning_frames {numbers[0]}: {patch} latent frames share a patch; condition on all of them or none"
        )
    wrong = next((row for row in numbers if len(row) != count), None) if count != length else None
    if wrong is not None:
        raise ValueError(
            f"{condition.name} has {count} frames, conditioning_frames lists {len(wrong)}; give as many, or the whole clip of {length}"
        )
    return numbers, mask


def _frame_numbers(frames: Frames | None, count: int, batch: int, length: int) -> tuple[list[list[int]], Tensor]:
    """Numbers of the conditioning frames of each sample (or of all), in their order, and the mask (B or 1, T) bool."""
    if isinstance(frames, Tensor):
        check_dense("conditioning_frames", frames)
        mask = frames[None] if frames.ndim == 1 else frames
        if frames.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != length or len(mask) not in (1, batch):
            raise ValueError(
                f"conditioning_frames is {frames.dtype} of shape {tuple(frames.shape)}; expected bool of (1 or {batch}, {length}), "
                f"{length} latent frames"
            )
        return [row.nonzero().flatten().tolist() for row in mask.cpu()], mask
    listed: Any = range(count) if frames is None else frames
    if isinstance(listed, np.ndarray):
        listed = listed.tolist()
    if not isinstance(listed, list | tuple | range) or not all(
        isinstance(n, Integral) and not isinstance(n, bool) for n in listed
    ):
        raise ValueError(
            f"conditioning_frames: expected numbers of latent frames, or a mask (a bool tensor); found {shorten(repr(frames))}"
        )
    named = [int(number) for number in listed]
    if wrong := [number for number in named if not -length <= number < length]:
        raise ValueError(
            f"conditioning_frames lists latent frame {wrong[0]}; this clip has {length}, 0 to {length - 1}"
        )
    numbers = [number % length for number in named]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"conditioning_frames {named} lists a frame twice")
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, numbers] = True
    return [numbers], mask
