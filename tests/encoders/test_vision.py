"""Vision encoders by path: patch features as transformers' own classes make them, of the frames that latents stand
for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from stdit.config import ConfigError, VisionEncoderConfig
from stdit.encoders.vision import feature_width, load_vision_encoder, vision_identity
from tests.support.encoders import save_clip, save_vision


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def config(path: Path, **changes: object) -> VisionEncoderConfig:
    return VisionEncoderConfig.model_validate(
        {"path": str(path), "pixels_per_feature": 2, "dtype": "float32", "frames_at_once": 3, **changes}
    )


@pytest.mark.parametrize(("kind", "before"), [("dinov2", 1), ("registers", 5), ("siglip", 0), ("clip", 1)])
def test_features_are_the_last_hidden_states_of_the_patches(kind: str, before: int, tmp_path: Path) -> None:
    encoder = load_vision_encoder(config(save_vision(tmp_path, kind)))
    pixels = noise(2, 3, 5, 8, 8).clamp(-1, 1)
    found = encoder.encode(pixels, stride=2)
    assert found.shape == (2, 16, 3, 4, 4)  # frames 0, 2 and 4
    model = AutoModel.from_pretrained(tmp_path).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    with torch.no_grad():
        states = model(((pixels[:, :, 2] + 1) / 2 - mean) / std).last_hidden_state
    assert states.shape[1] == before + 16
    torch.testing.assert_close(found[:, :, 1], states[:, before:].transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "clip"])
def test_a_feature_stands_for_so_many_pixels_whatever_the_patch_and_the_shape(kind: str, tmp_path: Path) -> None:
    folder, pixels = save_vision(tmp_path, kind), noise(1, 3, 1, 16, 24).clamp(-1, 1)
    found = load_vision_encoder(config(folder, pixels_per_feature=4)).encode(pixels)
    assert found.shape == (1, 16, 1, 4, 6)
    resized = F.interpolate(pixels[:, :, 0], (8, 12), mode="bicubic", antialias=True).clamp(-1, 1)
    same = load_vision_encoder(config(folder)).encode(resized[:, :, None])
    torch.testing.assert_close(found, same)


def test_features_do_not_depend_on_frames_at_once_and_identity_needs_no_weights(tmp_path: Path) -> None:
    folder, pixels = save_vision(tmp_path), noise(2, 3, 4, 8, 8)
    one, many = (load_vision_encoder(config(folder, frames_at_once=n)) for n in (1, 16))
    torch.testing.assert_close(one.encode(pixels), many.encode(pixels))
    stated = vision_identity(config(folder))
    assert {key: one.identity[key] for key in stated} == stated
    assert stated["dim"] == feature_width(config(folder)) == one.encode(pixels).shape[1]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert vision_identity(config(folder))["fingerprint"] != stated["fingerprint"]


def test_what_cannot_be_an_encoder_is_refused_by_its_path(tmp_path: Path) -> None:
    save_clip(tmp_path / "text_encoder", 16)
    with pytest.raises(ConfigError, match=r"vision_encoder.path: .*clip_text_model, which is no vision transformer"):
        vision_identity(config(tmp_path / "text_encoder"))
    with pytest.raises(ConfigError, match=r"vision_encoder.path: .*/gone: no such folder"):
        vision_identity(config(tmp_path / "gone"))
    folder = save_vision(tmp_path / "vision")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"vision_encoder.path: .*missing_keys"):
        load_vision_encoder(config(folder))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ConfigError, match=r"image_mean \[0.5\] and image_std None; three numbers each"):
        load_vision_encoder(config(folder))
