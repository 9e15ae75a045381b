"""Conditions extracted beside their clips: cut alike, kept track of, and read by training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stdit import extract
from stdit.config import ConfigError
from stdit.data.features import FeatureSet, read_index
from stdit.data.loader import collate
from tests.support import clip_folder
from tests.support.clip_folder import rows
from tests.support.videos import lossless


def paired(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    """Clips whose conditions are their negatives, of even ones' videos an image: that of their first frame."""
    made = rows(folder, count)
    (folder / "conditions").mkdir()
    for i, row in enumerate(made):
        frames, height, width = clip_folder.SHAPES[i % len(clip_folder.SHAPES)]
        pixels = 255 - (clip_folder.smooth(frames + i, height, width)[i:] + i).astype("uint8")
        row["depth"] = f"conditions/{i}.{'png' if frames == 1 or i % 2 == 0 else 'mp4'}"
        if row["depth"].endswith("png"):
            Image.fromarray(pixels[0]).save(folder / row["depth"])
        else:
            lossless(folder / row["depth"], pixels)
    return made


def config(folder: Path, made: list[dict[str, Any]], **changes: Any) -> clip_folder.LocalExtraction:
    return clip_folder.config(folder, made, text_encoder=None, control_column="depth", **changes)


def test_a_condition_is_cut_as_its_clip_is(tmp_path: Path) -> None:
    features = FeatureSet(extract.run(config(tmp_path, paired(tmp_path))))
    assert features.has_control
    frames = []
    for id in features.ids:
        sample = features.sample(int(id))
        assert sample.control is not None
        frames.append((sample.mean.shape[1], sample.control.shape[1]))
        # The negative's pixels are the pixels' negative, to within the rounding of resized ones.
        torch.testing.assert_close(sample.control, -sample.mean[:, : sample.control.shape[1]], rtol=0, atol=0.05)
    assert set(frames) == {(1, 1), (5, 1), (5, 5)}
    videos = [features.sample(int(i)) for i, (t, _) in zip(features.ids, frames, strict=True) if t == 5]
    same = [s for s in videos if s.mean.shape == videos[0].mean.shape]
    batch = collate(same, range(len(same)), clip_folder.BUCKETS[1])
    assert batch.control is not None
    assert batch.control.shape[0] == len(same)


def test_a_condition_that_changes_is_extracted_anew(tmp_path: Path) -> None:
    made = paired(tmp_path)
    settings = config(tmp_path, made)
    out = Path(extract.run(settings))
    before = read_index(out)["fingerprint"]
    shards = {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    extract.run(settings)
    assert {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir()} == shards
    Image.new("RGB", (16, 16)).save(tmp_path / made[3]["depth"])
    extract.run(settings)
    assert read_index(out)["fingerprint"] != before
    changed = [p.name for p in (out / "shards").iterdir() if p.stat().st_mtime_ns != shards[p.name]]
    assert changed == ["00001.safetensors"]


def test_without_conditions_features_are_as_they_were(tmp_path: Path) -> None:
    out = Path(extract.run(clip_folder.config(tmp_path, rows(tmp_path, 2), text_encoder=None)))
    assert "control_column" not in read_index(out)["config"]
    assert not FeatureSet(out).has_control


def test_a_condition_that_does_not_fit_makes_a_bad_clip(tmp_path: Path) -> None:
    made = paired(tmp_path)
    made[0]["depth"] = None
    made[1]["depth"] = "conditions/gone.png"
    lossless(tmp_path / "conditions/short.mp4", clip_folder.smooth(3, 16, 16))
    made[2]["depth"] = "conditions/short.mp4"
    Image.new("RGB", (64, 16)).save(tmp_path / "conditions/wide.png")
    made[3]["depth"] = "conditions/wide.png"
    made[4]["depth"] = "../outside.png"
    out = Path(extract.run(config(tmp_path, made, max_bad_share=1.0)))
    bad = {clip["path"]: clip["reason"] for clip in json.loads((out / "report.json").read_text())["bad_clips"]}
    assert "depth: expected a path, found None" in bad["0.png"]
    assert "conditions/gone.png: no such file" in bad["1.png"] or "gone.png: no such file" in bad["1.png"]
    assert "short.mp4 has 3 frames, the clip 5" in bad["2.mp4"]
    assert "wide.png is 16x64 (height x width), of another shape than the clip, 16x16" in bad["3.png"]
    assert "leaves the manifest's folder" in bad["4.png"]
    assert len(FeatureSet(out)) == 1
    with pytest.raises(ConfigError, match=r"control_column: .* has no column 'edges'; columns: .*depth"):
        extract.run(config(tmp_path, made).model_copy(update={"control_column": "edges", "out": tmp_path / "other"}))
