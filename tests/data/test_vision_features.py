"""Features of a vision encoder beside the latents: stored by extraction, read where they are asked for, named in
settings and facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit import extract
from stdit.config import ConfigError, DataConfig, VisionEncoderConfig
from stdit.data.features import FeatureSet, read_index
from stdit.data.loader import collate
from stdit.data.mixture import open_features
from stdit.encoders.vision import load_vision_encoder
from tests.support import clip_folder
from tests.support.clip_folder import rows
from tests.support.encoders import save_vision


def encoder(path: Path, **changes: Any) -> VisionEncoderConfig:
    return VisionEncoderConfig(path=str(path), pixels_per_feature=4, dtype="float32", **changes)


def config(folder: Path, vision: Path, count: int = 6, **changes: Any) -> clip_folder.LocalExtraction:
    changes = {"vision_encoder": encoder(vision), "text_encoder": None, **changes}
    return clip_folder.config(folder, rows(folder, count), **changes)


def test_features_are_those_of_the_clean_pixels_and_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    vision = save_vision(tmp_path / "vision")
    chosen = config(tmp_path / "a", vision)
    expected = extract.expected_facts(chosen)
    out = Path(extract.run(chosen))
    features = FeatureSet(out, vision=True)
    loaded = load_vision_encoder(encoder(vision))
    for id in features.ids.tolist():
        sample = features.sample(id)
        assert sample.vision is not None
        made = loaded.encode(sample.mean[None])[0]  # kind pixels: latents are the pixels
        torch.testing.assert_close(sample.vision, made, rtol=1e-4, atol=1e-4)
        assert sample.vision.shape[2:] == tuple(side // 4 for side in sample.mean.shape[2:])
    assert FeatureSet(out).sample(0).vision is None
    assert features.facts() == expected
    assert expected.features_dim == 16
    assert read_index(out)["vision_encoder"]["class"] == "Dinov2Model"
    images = [features.sample(i) for i in features.ids.tolist() if features.sample(i).mean.shape[1] == 1]
    batch = collate(images, range(len(images)), clip_folder.BUCKETS[0])
    assert batch.vision is not None
    assert batch.vision.shape == (len(images), 16, 1, 4, 4)


def test_without_an_encoder_features_are_as_they_were(tmp_path: Path) -> None:
    out = Path(extract.run(clip_folder.config(tmp_path, rows(tmp_path, 2), text_encoder=None)))
    index = read_index(out)
    assert "vision_encoder" not in index
    assert "vision_encoder" not in index["config"]
    assert "vision_encoder" not in json.loads((out / "extraction.json").read_text())
    features = FeatureSet(out, vision=True)
    assert features.vision_encoder is None
    assert features.sample(0).vision is None


def test_another_encoder_is_another_extraction_and_not_mixed_with_the_first(tmp_path: Path) -> None:
    first, second = save_vision(tmp_path / "v1"), save_vision(tmp_path / "v2", width=24)
    chosen = config(tmp_path / "a", first)
    out = Path(extract.run(chosen))
    times = {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    moved = first.rename(tmp_path / "moved")
    extract.run(chosen.model_copy(update={"vision_encoder": encoder(moved, frames_at_once=2)}))
    assert {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir()} == times
    with pytest.raises(ConfigError, match=r"vision_encoder.dim: 16 -> 24"):
        extract.run(chosen.model_copy(update={"vision_encoder": encoder(second)}))
    other = Path(extract.run(config(tmp_path / "b", second)))
    buckets = [{"frames": 1, "height": 16, "width": 16, "batch_size": 1}]
    sets = [{"path": str(out)}, {"path": str(other)}]
    with pytest.raises(ConfigError, match=r"do not go together: vision_encoder.*16 and 24"):
        open_features(DataConfig.model_validate({"features": sets, "buckets": buckets}), vision=True)


def test_damage_of_features_that_are_not_read_is_noticed_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = Path(extract.run(config(tmp_path, save_vision(tmp_path / "vision"), 2)))
    shard = out / "shards/00000.safetensors"
    tensors = load_file(shard)
    tensors["0.vision"][0] += 1
    save_file(tensors, shard)
    with pytest.raises(ConfigError, match="sample 0 is not what was written"):
        FeatureSet(out).sample(0)
