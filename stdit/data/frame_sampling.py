"""Which frames of a clip an extraction takes: its own rule, and what features and runs remember of it for
evaluations."""

from __future__ import annotations

from stdit.config import ExtractConfig
from stdit.config.identity import FrameSampling
from stdit.data.decoding import ClipInfo
from stdit.data.transforms import frame_step, frames_available, rate_reaches, window_count, window_indices

Sampling = FrameSampling | ExtractConfig
# The first frames of a clip, each of them: where it is not known how a model's clips were read.
FIRST_FRAMES = FrameSampling()


def step_of(info: ClipInfo, sampling: Sampling) -> float:
    """Frames of a clip from one that is taken to the next."""
    return frame_step(info.fps, sampling.frame_stride, sampling.target_fps)


def sampled_count(info: ClipInfo, sampling: Sampling) -> int:
    """How many frames an extraction finds in a clip; 0: its frame rate is below target_fps."""
    if info.frame_count > 1 and not rate_reaches(info.fps, sampling.target_fps):
        return 0
    return frames_available(info.frame_count, step_of(info, sampling))


def samples_of(found: int, frames: int, sampling: Sampling) -> int:
    """How many samples of `frames` frames it makes of a clip in which it finds `found`."""
    return window_count(found, frames, _windows(sampling))


def sampled_windows(info: ClipInfo, frames: int, sampling: Sampling) -> list[list[int]]:
    """The frames of each sample of a clip, `frames` each. ValueError: it has fewer, or its frame rate is below
    target_fps."""
    if not sampled_count(info, sampling):
        raise ValueError(f"{info.fps:g} frames a second, the extraction's target_fps is {sampling.target_fps:g}")
    return window_indices(info.frame_count, frames, step_of(info, sampling), sampling.clip_window, _windows(sampling))


def sampled_indices(info: ClipInfo, frames: int, sampling: Sampling) -> list[int]:
    """The first of `sampled_windows`. ValueError: likewise."""
    return sampled_windows(info, frames, sampling)[0]


def _windows(sampling: Sampling) -> tuple[int, int]:
    return (1, 1) if sampling.windows is None else (sampling.windows.stride, sampling.windows.max)
