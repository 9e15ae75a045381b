"""What a config leaves out follows from its features; what it states stays; the result states everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import Config, ConfigError, validate
from stdit.data.features import FeatureFacts
from stdit.training import machine, run_dir
from stdit.training.derive import complete, derive, is_complete, with_precision

FACTS = FeatureFacts(
    in_channels=16,
    text_dim=4096,
    max_text_tokens=200,
    pooled_dim=768,
    num_classes=10,
    latents={"17x64x64": (5, 8, 8), "1x64x64": (1, 8, 8), "17x64x96": (5, 8, 12)},
    fps=24.0,
)
CLIPS = {"17x64x64": 90, "1x64x64": 500, "17x64x96": 0}


def config(model: dict[str, Any] | None = None, **sections: Any) -> Config:
    base = {"size": "S", "patch_size": [1, 2, 2], **(model or {})}
    data = {"run_dir": "runs/x", "model": base, "data": {"features": "features"}, "train": {"steps": 1}}
    return validate({**data, **sections}, Config, "test")


def test_what_is_left_out_follows_from_the_features_and_the_result_is_explicit() -> None:
    found = derive(config(diffusion={"shift_base": "auto"}), FACTS, CLIPS)
    model = found.model
    assert (model.in_channels, model.text_dim, model.max_text_tokens, model.pooled_dim) == (16, 4096, 200, 768)
    assert found.diffusion.shift_base == (1, 8, 8)
    assert is_complete(found)
    assert derive(found, FACTS, {}) is found


@pytest.mark.parametrize(
    ("avx512", "amx", "gpus", "precision"),
    [
        (False, False, None, "fp32"),
        (True, False, None, "bf16"),
        (False, True, None, "bf16"),
        (False, False, True, "bf16"),
    ],
)
def test_automatic_precision_is_what_the_machine_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, gpus: bool | None, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    automatic = config(train={"steps": 1, "precision": "auto"})
    assert not is_complete(automatic)
    assert with_precision(automatic, gpus).train.precision == precision
    if gpus is None:
        assert derive(with_precision(automatic), FACTS, CLIPS).train.precision == precision
    assert with_precision(config(), gpus).train.precision == "fp32"


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = config(run_dir=str(tmp_path / "run"), train={"steps": 1, "precision": "auto"})
    for first, later in ((True, False), (False, True)):
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda gpus, found=first: found)
        began = derive(with_precision(automatic), FACTS, CLIPS)
        run_dir.start(began)
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda gpus, found=later: found)
        assert with_precision(automatic).train.precision == began.train.precision == ("bf16" if first else "fp32")
        (tmp_path / "run" / run_dir.CONFIG).unlink()


def test_explicit_values_stay_even_where_they_do_not_fit() -> None:
    model = {"in_channels": 4, "text_dim": 8, "max_text_tokens": 9, "pooled_dim": None}
    found = derive(config(model, diffusion={"shift_base": None}), FACTS, CLIPS)
    assert (found.model.in_channels, found.model.text_dim, found.model.max_text_tokens) == (4, 8, 9)
    assert (found.model.pooled_dim, found.diffusion.shift_base) == (None, None)


@pytest.mark.parametrize("model", [{"num_classes": 10}, {"text_dim": None}])
def test_a_model_of_classes_or_of_nothing_takes_no_text(model: dict[str, Any]) -> None:
    assert derive(config(model), FACTS, CLIPS).model.text_dim is None


def test_buckets_without_training_clips_are_left_out_and_batches_hold_about_as_many_tokens() -> None:
    data = {"features": "features", "batch_size": 2}
    found = derive(config(data=data), FACTS, CLIPS).data
    assert [(b.key, b.batch_size) for b in found.buckets] == [("17x64x64", 2), ("1x64x64", 10)]


def test_an_image_model_trains_on_images() -> None:
    found = derive(config({"temporal": False}), FACTS, CLIPS).data
    assert [b.key for b in found.buckets] == ["1x64x64"]
    with pytest.raises(ConfigError, match="no bucket of one frame"):
        derive(config({"temporal": False}), FACTS, {"17x64x64": 3})


def test_a_batch_size_beside_stated_buckets_is_refused() -> None:
    data = {"features": "f", "batch_size": 2, "buckets": [{"frames": 1, "height": 64, "width": 64, "batch_size": 4}]}
    with pytest.raises(ConfigError, match="batch_size 2 is for buckets that follow"):
        config(data=data)


def test_nothing_follows_from_synthetic_features() -> None:
    with pytest.raises(ConfigError, match="synthetic"):
        complete(config(data={"features": "synthetic"}))


def test_features_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        complete(config(data={"features": str(tmp_path / "absent")}))
