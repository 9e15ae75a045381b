"""A config against the features it names: refused before ranks are, with both numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdit import extract
from stdit.config import Bucket, ConfigError, merge
from stdit.config.identity import FrameSampling
from stdit.data.features import EmptyCaption
from stdit.models.stdit import STDiT
from stdit.training import data as train_data
from tests.support import clip_folder
from tests.support.rank_jobs import config_of, settings

TOLD = {"class": "T5", "dim": 4096, "max_text_tokens": 120}


class Features:
    """What open_data reads of a FeatureSet."""

    def __init__(self, **changes: Any) -> None:
        shape = {
            "kind": "image",
            "class": "AutoencoderKL",
            "channels": 4,
            "compression": [1, 8, 8],
            "shift": [0.0] * 4,
            "scale": [1.0] * 4,
        }
        self.video_encoder = {**shape, **changes.get("video", {})}
        self.text_encoder = changes.get("text", TOLD)
        self.empty_caption = changes.get("empty")
        self.classes = changes.get("classes", ["a", "b"])
        self.index = {"fingerprint": "f"}
        self.splits = changes.get("splits", {"train": 10, "validation": 10})

    def select(self, split: str, buckets: list[Bucket], where: Any = ()) -> dict[str, np.ndarray]:
        return {b.key: np.arange(self.splits.get(split, 0)) for b in buckets}

    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        return np.full(len(ids), 7)


BASE = {
    "model": {"in_channels": 4, "num_classes": None, "text_dim": 4096, "max_text_tokens": 120},
    "data": {"features": "somewhere", "buckets": [{"frames": 1, "height": 64, "width": 64, "batch_size": 1}]},
}


def check(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], **features: Any) -> train_data.TrainData:
    monkeypatch.setattr(train_data, "open_features", lambda data, vision=False: Features(**features))
    return train_data.open_data(config_of(merge(merge(settings("runs/x"), BASE), change)))


def test_what_fits_passes_and_says_its_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    data = check(monkeypatch, {})
    assert data.latents == {"1x64x64": (1, 8, 8)}
    assert data.fingerprint == "f"


def test_a_model_without_a_null_caption_uses_the_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = EmptyCaption(torch.zeros(1, 4096))
    assert check(monkeypatch, {"model": {"null_text": "empty"}}, empty=empty).empty_caption is empty
    assert check(monkeypatch, {}, empty=empty).empty_caption is None
    # Where nothing is dropped nothing is needed.
    never = {"model": {"null_text": "empty"}, "diffusion": {"caption_dropout": 0.0}}
    assert check(monkeypatch, never).empty_caption is None
    told = {**TOLD, "pooled_dim": 2048}
    assert check(monkeypatch, {"model": {"pooled_dim": 2048}}, text=told).text_encoder == told


@pytest.mark.parametrize(
    ("change", "features", "said"),
    [
        ({"model": {"in_channels": 3}}, {}, r"model.in_channels is 3, but data.features somewhere has latents of 4 channels \(AutoencoderKL\)"),
        ({"model": {"text_dim": 64}}, {}, "model.text_dim is 64, but data.features somewhere has text features 4096 wide"),
        ({}, {"text": None}, "model.text_dim is 4096, but data.features somewhere was extracted without a text encoder"),
        ({"model": {"max_text_tokens": 77}}, {}, "model.max_text_tokens is 77, but .* captions of up to 120 tokens"),
        ({"model": {"pooled_dim": 2048}}, {}, r"model.pooled_dim is 2048, but .* no pooled vectors \(pooled: true of a CLIP encoder\)"),
        ({"model": {"pooled_dim": 2048}}, {"text": {**TOLD, "pooled_dim": 768}}, "model.pooled_dim is 2048, but .* has pooled vectors 768 wide"),
        ({"model": {"text_dim": None, "pooled_dim": 2048}}, {"text": None}, "model.pooled_dim is 2048, but .* was extracted without a text encoder"),
        ({"model": {"null_text": "empty"}}, {}, "null_text is empty and diffusion.caption_dropout is 0.3: .* run its extraction again"),
        ({"model": {"null_text": "empty"}, "diffusion": {"caption_dropout": 0.0}, "samples": {"every": 1}}, {}, "null_text is empty and samples.sampler.guidance_scale is not 1"),
        ({"model": {"num_classes": 1}}, {}, "model.num_classes is 1, but .* has 2 classes"),
        ({"model": {"num_classes": 9}}, {"classes": []}, "model.num_classes is 9, but .* has no classes"),
        ({"data": {"buckets": [{"frames": 1, "height": 60, "width": 64, "batch_size": 1}]}}, {}, "height 60 is not divisible by the autoencoder's compression 8"),
        ({"data": {"buckets": [{"frames": 1, "height": 72, "width": 64, "batch_size": 1}]}}, {}, r"data.buckets\[0\] 1x72x64: latent height 9 is not divisible by model.patch_size 2"),
        ({"data": {"buckets": [{"frames": 4, "height": 64, "width": 64, "batch_size": 1}]}}, {"video": {"compression": [4, 8, 8]}}, "frames - 1 = 3 is not divisible"),
        ({"model": {"temporal": False}, "data": {"buckets": [{"frames": 4, "height": 64, "width": 64, "batch_size": 1}]}}, {}, r"data.buckets\[0\]: 4 frames, but model.temporal is false"),
        ({"samples": {"every": 1, "bucket": {"frames": 1, "height": 68, "width": 64}}}, {}, "height 68"),
        ({}, {"splits": {}}, r"data.buckets\[0\]: somewhere holds no sample of bucket 1x64x64 in split 'train'"),
        ({"validation": {"every": 1}}, {"splits": {"train": 4}}, "validation.every: .* holds no sample of split 'validation'"),
        ({"samples": {"every": 1}}, {"splits": {"train": 4}}, "samples.every: .* holds no sample of split 'validation'"),
        ({"train": {"attention_backend": "flash9"}}, {}, "train.attention_backend: 'flash9' is none of diffusers'"),
        ({"init": {"source": "/nowhere"}}, {}, "init.source: /nowhere: no config.json"),
        ({"diffusion": {"objective": "ddpm"}, "samples": {"every": 1, "sampler": {"scheduler": "ddim", "steps": 2000}}}, {}, "sampler.steps 2000 is more than"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mismatch_is_reported_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], features: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(monkeypatch, change, **features)


def test_features_that_are_not_there_are_named(tmp_path: Path) -> None:
    data = merge(settings("runs/x"), {"data": {"features": str(tmp_path / "gone")}})
    with pytest.raises(ConfigError, match="gone: no such folder"):
        train_data.open_data(config_of(data))


def test_a_sampler_of_another_objective_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"flow_euler draws from objective flow; this run's diffusion.objective is ddpm"
    ):
        config_of(merge(settings("runs/x"), {"diffusion": {"objective": "ddpm"}, "samples": {"every": 1}}))


def test_the_log_says_parameters_clips_frame_rates_and_the_buckets_left_out(tmp_path: Path) -> None:
    features = extract.run(clip_folder.config(tmp_path, clip_folder.rows(tmp_path, 6), clip_window="center"))
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, "text_dim": 16, "max_text_tokens": 24}
    config = config_of(
        {
            "run_dir": "runs/x",
            "model": sizes,
            "data": {
                "features": str(features),
                "buckets": [{"frames": f, "height": 16, "width": 16, "batch_size": 1} for f in (1, 5)],
            },
            "train": {"steps": 1},
        }
    )
    data = train_data.open_data(config)
    assert data.frame_rates == {"24": 1}
    assert data.frame_sampling == FrameSampling(clip_window="center")
    parameters = sum(p.numel() for p in STDiT.from_settings(config.model).parameters())
    assert train_data.describe_data(config, data) == (
        f"{parameters / 1e6:.2f} M parameters; training clips by bucket: 1x16x16 2, 5x16x16 1; "
        "not trained on: 5x16x32 (1 clip)"
    )
