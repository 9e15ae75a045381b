"""A forecast counts every clip, every step and every byte once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.forecast import EqualSource, ManifestSource, _bytes, forecast
from pipelines.plan import ResolvedStage, Resources
from stdit.config import Config, ConfigError, ExtractConfig, TrainConfig, validate
from stdit.data import manifest
from stdit.data.extraction import report_lines
from stdit.models.cost import ParameterSize
from stdit.training.rank_memory import rank_memory

GIB = 2**30


def stage(**train: object) -> ResolvedStage:
    config = {
        "run_dir": "r",
        "model": {"hidden_size": 64, "depth": 2, "num_heads": 2, "in_channels": 3, "text_dim": 8},
        "data": {
            "features": "f",
            "buckets": [
                {"frames": 1, "height": 16, "width": 16, "batch_size": 8},
                {"frames": 4, "height": 16, "width": 16, "batch_size": 2, "weight": 2.0},
            ],
            "where": [{"column": "score", "at_least": 0.5}],
        },
        "train": {"steps": 60, **train},
        **({"init": {"source": "base"}} if "lora" in train else {}),
    }
    return ResolvedStage("s", validate(config, Config, "test"), None, "test")


class Source:
    """40 clips of one bucket and 20 of the other; `where` leaves half."""

    def select(self, split, buckets, where=()):
        return {b.key: np.arange((40 if b.frames == 1 else 20) // (2 if where else 1)) for b in buckets}

    captions = ("original",)


def test_steps_and_clips_are_counted_as_training_takes_them() -> None:
    found = forecast(stage(), Resources(workers=2), Source(), (1, 1, 1), 5)
    assert sum(b.steps for b in found.buckets) == 60
    assert [(b.clips, b.left_out, b.samples_per_step, b.tokens) for b in found.buckets] == [
        (20, 20, 16, 64),
        (10, 10, 4, 256),
    ]
    # Twice the weight: each clip of the second bucket is seen about twice as often.
    assert found.buckets[1].epochs / found.buckets[0].epochs == pytest.approx(2, rel=0.15)
    assert "20 clips (20 left out: not score at least 0.5)" in str(found)


def test_flops_are_those_of_all_ranks_and_steps() -> None:
    one = forecast(stage(), Resources(workers=1), Source(), (1, 1, 1), 5)
    two = forecast(stage(steps=120), Resources(workers=1), Source(), (1, 1, 1), 5)
    assert two.flops == 2 * one.flops
    accumulated = forecast(stage(gradient_accumulation=3), Resources(workers=1), Source(), (1, 1, 1), 5)
    assert accumulated.flops == 3 * one.flops


def test_what_a_rank_sends_in_a_step_is_forecast() -> None:
    alone, two, accumulated = (
        forecast(stage(gradient_accumulation=n), Resources(workers=ranks), Source(), (1, 1, 1), 5)
        for ranks, n in ((1, 1), (2, 1), (2, 3))
    )
    assert "sends" not in str(alone)
    sent = 4 * two.parameters * 3 // 2  # float32: all-reduced, which sends twice, and gathered; half is a rank's own
    zero = [bucket.zero for bucket in two.buckets]
    assert [z and z.sent for z in zero] == [sent, sent]
    assert f"; a rank sends {sent / 2**20:.1f} MiB (ZeRO-2) a step" in str(two)
    more = accumulated.buckets[0].zero  # stage 2 reduces every micro-batch
    assert more is not None
    assert more.sent == 4 * two.parameters * (3 * 2 + 1) // 2
    shared = forecast(stage(sequence_parallel=2), Resources(workers=2, use_gpu=True), Source(), (1, 1, 1), 5)
    exchanged = 2 * 4 * 2 * (2 * 256 * 64) // 4 * 2 + 2 * 4 * 2 * (256 * 12) // 4 * 2  # two blocks; the prediction
    assert shared.buckets[1].exchanged_bytes == exchanged
    assert f"(ZeRO-2) + {exchanged / 2**10:.1f} KiB (sequence parallelism) a step, 0.0 ms on H100" in str(shared)


def test_checkpointed_activations_take_less() -> None:
    plain, checkpointed = (
        forecast(stage(activation_checkpointing=on), Resources(), Source(), (1, 1, 1), 5).memory for on in (False, True)
    )
    assert checkpointed.activations < plain.activations


def test_an_adapter_s_forecast_counts_what_it_trains() -> None:
    whole = forecast(stage(), Resources(), Source(), (1, 1, 1), 5)
    lora = stage(lora={"rank": 2})
    found = forecast(lora, Resources(), Source(), (1, 1, 1), 5)
    assert 0 < found.trained < found.parameters / 5
    assert found.memory.resident["optimizer"] == 12 * found.trained < whole.memory.resident["optimizer"] / 5
    assert found.memory.resident["weights"] >= whole.memory.resident["weights"]
    assert found.flops < whole.flops
    assert "M parameters (0.0" in str(found)
    assert " trained), " in str(found)


def test_held_out_clips_that_a_stage_needs_are_looked_for(tmp_path: Path) -> None:
    class Training(Source):
        def select(self, split, buckets, where=()):
            return {
                b.key: ids[: len(ids) * (split == "train")]
                for b, ids in zip(buckets, super().select(split, buckets, where).values(), strict=True)
            }

    forecast(stage(), Resources(), Training(), (1, 1, 1), 5)
    validating = stage()
    section = validating.config.validation.model_copy(update={"every": 10})
    validating = replace(validating, config=validating.config.model_copy(update={"validation": section}))
    with pytest.raises(
        ConfigError,
        match=r"validation.every: no clip of split 'validation' .* is in the stage's buckets, 1x16x16, 4x16x16",
    ):
        forecast(validating, Resources(), Training(), (1, 1, 1), 5)


def test_a_bucket_that_the_model_does_not_take_is_named() -> None:
    wide = stage()
    model = wide.config.model.model_copy(update={"positions": "learned", "position_grid": (4, 8), "position_frames": 4})
    wide = replace(wide, config=wide.config.model_copy(update={"model": model}))
    with pytest.raises(ConfigError, match=r"data.buckets 1x16x16: .*height of 8 patches.* has 4"):
        forecast(wide, Resources(), Source(), (1, 1, 1), 5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"zero_stage": 2}, "building the model: {fp32} of the host's memory a rank"),
        ({"zero_stage": 3}, "building the model: one weight at a time in the host's memory"),
        (
            {"zero_stage": 3, "precision": "bf16"},
            "building the model: {fp32} of the host's memory a rank, and one weight",
        ),
    ],
)
def test_the_host_s_memory_for_building_the_model_is_printed(changes: dict[str, Any], line: str) -> None:
    found = forecast(stage(**changes), Resources(workers=1), Source(), (1, 1, 1), 5)
    assert line.format(fp32=_bytes(4 * found.parameters)) in str(found)


def test_memory_is_rajbhandaris() -> None:
    """ZeRO's own example (table 1): 7.5 B parameters, 64 ranks, mixed precision, 16 bytes a parameter."""
    sizes = {}
    for zero in (0, 1, 2, 3):
        train = validate({"steps": 1, "precision": "bf16", "zero_stage": zero}, TrainConfig, "test")
        found = rank_memory([ParameterSize(7_500_000_000, True)], train, 64)
        # The paper sums gradients in 16 bits and has no moving average.
        gradients = found.gradients // (2 if zero else 1)
        sizes[zero] = (found.resident["weights"] + gradients + found.resident["optimizer"]) / 1e9
    assert [round(sizes[zero], 1) for zero in (0, 1, 2, 3)] == [120.0, 31.4, 16.6, 1.9]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**9), st.integers(1, 512), st.sampled_from(["fp32", "bf16"]))
def test_a_higher_zero_stage_never_takes_more_but_for_buffers(parameters: int, ranks: int, precision: str) -> None:
    totals = []
    for zero in (1, 2, 3):
        train = validate({"steps": 1, "precision": precision, "zero_stage": zero}, TrainConfig, "t")
        found = rank_memory([ParameterSize(parameters, True)], train, ranks)
        totals.append(sum(found.resident[name] for name in ("weights", "optimizer", "average")) + found.gradients)
    assert totals == sorted(totals, reverse=True)


def test_the_manifest_alone_says_what_would_be_kept(tmp_path: Path) -> None:
    sizes = [(1, 16), (1, 16), (4, 16), (9, 16), (1, 8), (None, 16)]
    rows = [
        {
            "path": f"{i}.png",
            "caption": "x",
            "frames": frames,
            "height": side,
            "width": side,
            "split": "train",
            "score": i,
        }
        for i, (frames, side) in enumerate(sizes)
    ]
    manifest.write(tmp_path / "manifest.jsonl", rows)
    config = ExtractConfig.model_validate({
        "manifest": tmp_path / "manifest.jsonl",
        "out": tmp_path / "out",
        "buckets": [{"frames": 1, "height": 16, "width": 16}, {"frames": 4, "height": 16, "width": 16}],
        "where": [{"column": "score", "at_least": 1}],
    })  # fmt: skip
    source = ManifestSource(config)
    counts = {key: len(ids) for key, ids in source.select("train", config.buckets).items()}
    assert counts == {"1x16x16": 1, "4x16x16": 2}
    first = source.lines()[0]
    assert "6 in the manifest" in first
    assert "3 would be kept, 2 dropped (1 where, 1 too_small)" in first
    assert "1 can't be used" in first
    assert source.lines()[-1].strip() == "5.png: no such file"


def test_clips_whose_size_the_manifest_does_not_state_are_opened(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.png", "caption": "x"} for i in range(2)]
    for i in range(2):
        Image.new("RGB", (16, 16 - 8 * i)).save(tmp_path / f"{i}.png")
    manifest.write(tmp_path / "manifest.jsonl", rows)
    config = ExtractConfig.model_validate({
        "manifest": tmp_path / "manifest.jsonl",
        "out": tmp_path / "out",
        "buckets": [{"frames": 1, "height": 16, "width": 16}],
    })  # fmt: skip
    source = ManifestSource(config)
    assert len(source.select("train", config.buckets)["1x16x16"]) == 1
    assert "1 would be kept, 1 dropped (1 too_small)" in source.lines()[0]
    assert not (tmp_path / "out").exists()


def test_every_clip_of_a_report_is_printed() -> None:
    report = {
        "clips": 12, "kept": 4, "kept_by_bucket": {"1x8x8": {"train": 3, "validation": 1}, "4x8x8": {}},
        "dropped": 1, "dropped_by_reason": {"too_short": 1}, "bad": 7,
        "bad_clips": [{"path": f"{i}.mp4", "reason": "no frames"} for i in range(7)],
        "captions_cut": 0, "uncaptioned": 0, "uncaptioned_clips": [], "kept_share_by_bucket": {"1x8x8": 0.9},
        "samples": 4, "used_frames_by_bucket": {"1x8x8": 0.25},
        "most_cropped_clips": [], "frame_rates": {}, "misstated_clips": [],
        "seconds": {"decode": 0, "encode": 0, "wait": 0, "total": 0},
    }  # fmt: skip
    lines = report_lines(report)
    assert lines[0] == "clips: 12 = 4 kept + 1 dropped (1 too_short) + 7 that can't be used"
    assert "3 train, 1 validation; 10% of the pixels are cropped, 25% of the frames used" in lines[1]
    assert lines[2].endswith("none")
    assert "0.mp4: no frames" in lines[3]
    assert lines[-1].strip() == "… and 2 more, all in report.json"
    captions = report_lines({**report, "captions_cut": 3, "uncaptioned": 1, "uncaptioned_clips": ["a.mp4"]})
    assert captions[:-2] == lines
    assert "3 of 4 cut" in captions[-2]
    assert captions[-1].endswith("1 clip without one: a.mp4")


def test_without_a_manifest_the_cost_of_a_step_is_still_forecast() -> None:
    found = forecast(stage(), Resources(), EqualSource(Path("m.jsonl")), (1, 1, 1), 120)
    assert found.flops > 0
    assert "m.jsonl is not there" in EqualSource(Path("m.jsonl")).lines()[0]
