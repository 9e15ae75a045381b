"""The raw DeepSpeed JSON: merged, and looked at before DeepSpeed ignores what it does not know."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from stdit.config import ConfigError, TrainConfig
from stdit.training.deepspeed_config import ALLOWED, SET_BY_CONFIG, UNSUPPORTED, make_deepspeed_config, offloads
from tests.support.paths import ROOT


def made(raw: Any = None, **train: Any) -> dict[str, Any]:
    return make_deepspeed_config(TrainConfig(steps=1, deepspeed=raw, **train), 1000, "cpu")


def test_a_bucket_is_an_eighth_of_the_model_within_bounds_even_and_no_larger_than_what_is_trained() -> None:
    sizes = {
        1: 2,
        1001: 1002,
        24_999_999: 25_000_000,
        150_000_000: 25_000_000,
        675_000_008: 84_375_002,
        10**10: 500_000_000,
    }
    for parameters, expected in sizes.items():
        zero = make_deepspeed_config(TrainConfig(steps=1, zero_stage=2), parameters, "cpu")["zero_optimization"]  # pyright: ignore
        assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (expected, expected)


def test_raw_settings_are_merged_key_by_key() -> None:
    merged = made({"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}, zero_stage=3)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 7
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimizaton": {}}, "zero_optimizaton: unknown to DeepSpeed; did you mean zero_optimization?"),
        ({"gradient_cliping": 1}, "gradient_cliping: unknown to DeepSpeed; did you mean gradient_clipping?"),
        (
            {"gradient_clipping": 0.3},
            r"gradient_clipping: set by this trainer \(train.optimizer.max_grad_norm\), which makes it 1.0; found 0.3",
        ),
        ({"optimizer": {"type": "Adam"}}, r"optimizer: set by this trainer \(train.optimizer\)"),
        ({"fp16": {"enabled": True}}, r"fp16: set by this trainer \(train.precision\)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3, but train.zero_stage is 2"),
        (
            {"zero_optimization": {"ofload_param": {}}},
            "zero_optimization.ofload_param: unknown to DeepSpeed; did you mean offload_param?",
        ),
        ({"zero_optimization": 2}, "zero_optimization: expected an object, found 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm: false"),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpoint: unknown to DeepSpeed; did you mean cpu_checkpointing",
        ),
        (
            {"flops_profiler": {"profil_step": 2}},
            "flops_profiler.profil_step: unknown to DeepSpeed; did you mean profile_step",
        ),
        ({"aio": 7}, "aio: expected an object, found 7"),
        (
            {"steps_per_print": 0},
            "train.deepspeed: steps_per_print: expected a finite number, of sizes above 0; found 0",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size: expected a finite number",
        ),
        ({"zero_optimization": {"allgather_bucket_size": -5}}, "allgather_bucket_size"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, "zero_optimization.overlap_comm: .* found 'maybe'"),
        (
            {"checkpoint": {"writer": {"type": "FAST", "decoupled": True}}},
            "checkpoint.writer: .* writes checkpoints itself",
        ),
        ({"pipeline": {}}, "pipeline: this part of DeepSpeed is not supported"),
    ],
)
@pytest.mark.parametrize("background", [True, False])
def test_what_deepspeed_would_ignore_or_contradict_is_refused(raw: dict[str, Any], said: str, background: bool) -> None:
    with pytest.raises(ConfigError, match=said):
        made(raw, checkpoint_in_background=background)


def test_a_whole_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient_predivide_factor: the number is beyond ±9\.22337e\+18"):
        made({"gradient_predivide_factor": 10**400})


def test_values_auto_are_left_to_the_trainer() -> None:
    raw = {
        "train_batch_size": "auto",
        "fp16": {"enabled": "auto"},
        "optimizer": {"params": {"lr": "auto"}},
        "zero_optimization": {"reduce_bucket_size": "auto"},
    }
    assert made(raw) == made()


def test_settings_equal_to_the_trainers_own_are_accepted() -> None:
    assert made({"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}) == made()


def test_a_file_is_named_in_what_is_said_of_it(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"wall_clock_breakdown": true}')
    assert made(path)["wall_clock_breakdown"] is True
    for content, said in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"aio": {}, "aio": {}}', "key 'aio' is given twice"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"aio": ' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
        (f'{{"gradient_predivide_factor": 1{"0" * 400}}}', "a number of 401 digits; at most 64"),
        ('{"gradient_predivide_factor": NaN}', "NaN is not a JSON number"),
        ('{"wal_clock_breakdown": true}', "unknown to DeepSpeed"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: .*{said}"):
            made(path)
    with pytest.raises(ConfigError, match="gone.json: cannot be read"):
        made(tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="pipe.json: cannot be read"):
        made(tmp_path / "pipe.json")


def test_every_key_on_our_lists_is_one_that_deepspeed_reads() -> None:
    import deepspeed

    source = "\n".join(p.read_text() for p in Path(deepspeed.__file__).parent.rglob("*.py"))
    for key in sorted(ALLOWED | set(SET_BY_CONFIG) | UNSUPPORTED):
        assert re.search(rf"""["']{key}["']|^\s+{key}:""", source, re.MULTILINE), key


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ds").glob("*.json")), ids=lambda p: p.name)
def test_every_example_override_is_accepted(path: Path) -> None:
    stage = json.loads(path.read_text()).get("zero_optimization", {}).get("stage", 2)
    made(path, zero_stage=stage)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"cpu_offload": True}}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, False),
        ({"zero_optimization": {"offload_optimizer": "auto"}}, False),
        ({"csv_monitor": {"enabled": True, "output_path": "offload"}}, False),
    ],
)
def test_offloading_is_read_from_settings_and_from_a_file(raw: Any, expected: bool, tmp_path: Path) -> None:
    assert offloads(TrainConfig(steps=1, zero_stage=3, deepspeed=raw)) is expected
    if raw is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(raw))
        assert offloads(TrainConfig(steps=1, zero_stage=3, deepspeed=file)) is expected
