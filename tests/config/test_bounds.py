"""Values that pass their type and yet can be no setting: refused by name when the config is read."""

from __future__ import annotations

import pytest

from stdit.config import Config, ConfigError, CurateConfig, EvaluateConfig, ExtractConfig, load_config
from tests.support.paths import ROOT

TRAIN, EXTRACT, CURATE, EVALUATE = "debug.yaml", "extract/digits.yaml", "curate/footage.yaml", "evaluate/media.yaml"
KINDS = {TRAIN: Config, EXTRACT: ExtractConfig, CURATE: CurateConfig, EVALUATE: EvaluateConfig}


@pytest.mark.parametrize(
    ("file", "setting", "message"),
    [
        (TRAIN, "run_dir=''", "run_dir: expected a path, found ''"),
        (TRAIN, 'run_dir="a\\nb"', "run_dir: expected a path, found 'a.nb'"),
        (EXTRACT, "out=''", "out: .*expected a path, found ''"),
        (EXTRACT, "manifest=''", "manifest: .*expected a path, found ''"),
        (TRAIN, "train.optimizer.betas=[1.5, -3.0]", "train.optimizer.betas.0: .* less than 1"),
        (TRAIN, "data.captions={a: 1.7e308, b: 1.0}", "data.captions: a: 1.7e.308 is beyond"),
        (
            TRAIN,
            "train.deepspeed={gradient_predivide_factor: .nan}",
            "train.deepspeed: gradient_predivide_factor: expected a finite number",
        ),
        (TRAIN, "train.step_timeout_s=1e12", "train.step_timeout_s: .* less than or equal to 100000000"),
        (EXTRACT, "decode_timeout_s=1e12", "decode_timeout_s: .* less than or equal to 100000000"),
        (CURATE, "stall_timeout_s=1e12", "stall_timeout_s: .* less than or equal to 100000000"),
        (
            CURATE,
            "scorers=[{name: a, function: 'm:f', frames: 1000000}]",
            "scorers.0.frames: .* less than or equal to 1024",
        ),
        (TRAIN, "train.steps=2000000000", "train.steps: .* less than or equal to 10000000"),
        (TRAIN, "validation.samples=2000000000", "validation.samples: .* less than or equal to 1000000"),
        (EXTRACT, "batch_size=2000000000", "batch_size: .* less than or equal to 1000000"),
        (EVALUATE, "metrics.classifier_size=100000", "metrics.classifier_size: .* less than or equal to 256"),
        (
            EVALUATE,
            "metrics.classifier_frames=2000000000",
            "metrics.classifier_frames: .* less than or equal to 1000000",
        ),
        (EVALUATE, "kid_subset_size=100000", "kid_subset_size: .* less than or equal to 10000"),
    ],
)
def test_what_can_be_no_setting_is_refused_by_its_key(file: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / file, KINDS[file], [setting])
