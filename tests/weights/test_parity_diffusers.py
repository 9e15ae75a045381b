"""The installed diffusers classes, tiny and random, converted to ours: outputs and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.stdit import STDiT
from stdit.weights.convert import load_published
from tests.support.diffusers_models import dit, latte, pixart, sd3
from tests.support.parity import Differences, differences, layout_of, ragged

LIMIT = 1e-5
Noise = Callable[..., Tensor]


def against(theirs: Any, folder: Path, x: Tensor, call: Callable[[Tensor], Any], **inputs: Any) -> Differences:
    """Their class and ours, by way of its folder. Images are clips of one frame."""
    theirs.save_pretrained(folder)
    model: STDiT = load_published(folder)
    image = x.ndim == 4

    def ours(clip: Tensor) -> Tensor:
        out = model(clip[:, :, None] if image else clip, **inputs, return_dict=False)[0]
        return out[:, :, 0] if image else out

    weights = dict(theirs.named_parameters())
    return differences(ours, lambda clip: call(clip).sample, x, model, layout_of(weights), weights)


@pytest.mark.parametrize("changes", [{}, {"activation_fn": "gelu"}, {"norm_eps": 1e-3}, {"out_channels": 6}])
@pytest.mark.parametrize("side", [8, 12])
def test_dit_equals_diffusers(tmp_path: Path, noise: Noise, side: int, changes: dict[str, Any]) -> None:
    model = dit(**changes)
    x, t, y = noise(3, 3, side, side), torch.tensor([3, 981, 500]), torch.tensor([0, 4, 5])
    inputs = {"timestep": t, "class_labels": torch.where(y == 5, -1, y)}
    found = against(model, tmp_path, x, lambda z: model(z, timestep=t, class_labels=y), **inputs)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (14, 6)])
@pytest.mark.parametrize("scale", [None, 2, 0.5])
def test_pixart_equals_diffusers(
    tmp_path: Path, noise: Noise, sized: bool, shape: tuple[int, int], scale: float | None
) -> None:
    model = pixart(use_additional_conditions=sized, interpolation_scale=scale)
    x, words, t = noise(3, 3, *shape), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500])
    mask = ragged([7, 2, 5], 7)
    more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    inputs: dict[str, Any] = {"timestep": t, "encoder_hidden_states": words, "encoder_attention_mask": mask}
    if sized:
        more["resolution"] = torch.tensor([[512.0, 640.0], [256.0, 1024.0], [333.0, 77.0]])
        more["aspect_ratio"] = torch.tensor([[0.8], [0.25], [4.3]])
        height, width = more["resolution"].unbind(1)
        inputs["added_cond_kwargs"] = {"height": height, "width": width, "aspect_ratio": more["aspect_ratio"][:, 0]}

    def call(z: Tensor) -> Any:
        return model(z, words, timestep=t, added_cond_kwargs=more, encoder_attention_mask=mask.float())

    found = against(model, tmp_path, x, call, **inputs)
    assert found.below(LIMIT), found


def test_pixart_with_one_timestep_and_one_sample_equals_diffusers(tmp_path: Path, noise: Noise) -> None:
    model = pixart(norm_eps=1e-5)
    x, words, t = noise(1, 3, 8, 8), noise(1, 4, 10, seed=1), torch.tensor([77])
    call = lambda z: model(z, words, timestep=t, added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # noqa: E731
    found = against(model, tmp_path, x, call, timestep=77, encoder_hidden_states=words)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12)])
def test_latte_equals_diffusers(tmp_path: Path, noise: Noise, frames: int, shape: tuple[int, int]) -> None:
    model = latte(video_length=3)
    x, words, t = noise(3, 3, frames, *shape), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500])
    mask = ragged([7, 2, 5], 7)
    bias = (-10000.0 * (~mask).float())[:, None].repeat_interleave(frames, 0)
    inputs = {"timestep": t, "encoder_hidden_states": words, "encoder_attention_mask": mask}
    call = lambda z: model(z, t, words, bias)  # noqa: E731
    found = against(model, tmp_path, x, call, **inputs)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("norm", [None, "rms_norm"])
@pytest.mark.parametrize("shape", [(8, 8), (4, 14), (14, 6)])
def test_sd3_equals_diffusers(tmp_path: Path, noise: Noise, norm: str | None, shape: tuple[int, int]) -> None:
    model = sd3(qk_norm=norm)
    x, words, pooled = noise(3, 3, *shape), noise(3, 7, 10, seed=1), noise(3, 12, seed=2)
    t = torch.tensor([3.5, 981.0, 500.0])
    inputs = {"timestep": t, "encoder_hidden_states": words, "pooled_projections": pooled}
    found = against(model, tmp_path, x, lambda z: model(z, words, pooled, t), **inputs)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("kind", ["dit", "pixart", "latte", "sd3"])
def test_precomputed_conditions_equal_diffusers(tmp_path: Path, noise: Noise, kind: str) -> None:
    words, pooled, y = noise(3, 7, 10, seed=1), noise(3, 12, seed=2), torch.tensor([0, 4, 2])
    shape = (3, 3, 3, 8, 8) if kind == "latte" else (3, 3, 8, 8)
    x, times = noise(*shape), torch.tensor([981, 500])
    theirs = {"dit": dit, "pixart": pixart, "latte": latte, "sd3": sd3}[kind]()
    inputs: dict[str, Any] = {"class_labels": y} if kind == "dit" else {"encoder_hidden_states": words}
    inputs |= {"pooled_projections": pooled} if kind == "sd3" else {}
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if kind == "pixart" else {}
    theirs.save_pretrained(tmp_path)
    model = load_published(tmp_path)
    clip = x if kind == "latte" else x[:, :, None]
    with torch.no_grad():
        static = encode_static(model, ConditionInputs(**inputs))
        for t, conditions in zip(times, precompute_conditions(model, times, static), strict=True):
            ours = model(clip, t, conditions=conditions).sample
            expected = theirs(x, timestep=t.repeat(3), **inputs, **more).sample.view_as(ours)
            assert (ours - expected).abs().max() <= LIMIT * expected.abs().max()
