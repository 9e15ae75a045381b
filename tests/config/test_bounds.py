"""Values that pass their type and yet can be no setting: refused by name when the config is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
        (TRAIN, "train.start_timeout_s=0", "train.start_timeout_s: .* greater than 0"),
        (TRAIN, "train.step_timeout_s=1e12", "train.step_timeout_s: .* less than or equal to 100000000"),
        (EXTRACT, "decode_timeout_s=1e12", "decode_timeout_s: .* less than or equal to 100000000"),
        (CURATE, "stall_timeout_s=1e12", "stall_timeout_s: .* less than or equal to 100000000"),
        (
            CURATE,
            "scorers=[{name: a, function: 'm:f', frames: 1000000}]",
            "scorers.0.frames: .* less than or equal to 1024",
        ),
        (TRAIN, f"run_dir=a/{'é' * 150}/b", "run_dir: a path with a name of 300 bytes in it; at most 255"),
        (TRAIN, f"run_dir={'a/' * 2100}b", "run_dir: a path of 4,201 bytes; at most 4,095"),
        (TRAIN, f"data.features=file:///{'a' * 300}", "a path with a name of 300 bytes in it; at most 255"),
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


# Seeds, values of columns and arguments, numbers of blocks (compared with the depth), and counts of which nothing is
# made.
UNBOUNDED = {
    "seed", "classifier_seed", "one_of", "args", "block", "kv_compress_blocks", "window_blocks", "start", "factor", "margin_frames",
    "keep_best", "max_bad_steps", "max_failed_saves", "max_failures", "max_rewinds", "warmup_steps",
}  # fmt: skip


def unbounded(schema: Any, key: str = "") -> Iterator[str]:
    """Keys of a JSON schema whose integers have no upper bound."""
    if isinstance(schema, list):
        for entry in schema:
            yield from unbounded(entry, key)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer" and not schema.keys() & {"maximum", "exclusiveMaximum", "const", "enum"}:
            yield key
        for name, value in schema.items():
            inner = value.items() if name in ("properties", "$defs") else [(key, value)]
            for own, entry in inner:
                yield from unbounded(entry, own)


def test_every_size_and_count_of_which_something_is_made_has_an_upper_bound() -> None:
    found = {
        path.name: set(unbounded(json.loads(path.read_text()))) for path in (ROOT / "configs/schema").glob("*.json")
    }
    assert {"train.json", "plan.json", "evaluate.json"} <= found.keys()
    assert {name: keys - UNBOUNDED for name, keys in found.items()} == {name: set() for name in found}
    assert set().union(*found.values()) == UNBOUNDED, "what is bounded now is no exception"
