from __future__ import annotations

from stdit.config.diff import TRAINING_RUNTIME_KEYS, Change, changes, flatten, global_batch_sizes, matches
from tests.support.rank_jobs import config_of, settings


def test_flattening_indexes_lists_of_mappings_and_keeps_other_lists() -> None:
    nested = {
        "train": {"steps": 20},
        "buckets": [{"frames": 4}, {"frames": 1}],
        "patch": [1, 2, 2],
        "where": [],
        "raw": {},
    }
    flat = {"train.steps": 20, "buckets.0.frames": 4, "buckets.1.frames": 1, "patch": [1, 2, 2], "where": [], "raw": {}}
    assert flatten(nested) == flat
    assert flatten(flat) == flat


def test_changes_have_both_values_and_an_absent_key_is_null() -> None:
    found = changes({"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": "x"}, "e": True})
    assert found == [Change("a.c", 2, "x"), Change("e", None, True)]
    assert [str(change) for change in found] == ["a.c: 2 -> x", "e: null -> true"]


def test_a_key_matches_itself_and_its_section_alone() -> None:
    assert matches("validation.every", TRAINING_RUNTIME_KEYS)
    assert matches("train.compile", TRAINING_RUNTIME_KEYS)
    assert not matches("train.compiled", TRAINING_RUNTIME_KEYS)
    assert not matches("train.steps", TRAINING_RUNTIME_KEYS)


def test_every_runtime_key_exists() -> None:
    train = {"checkpoint_every": 1, "ema": {"profiles": {"every": 1}}}
    dumped = config_of(settings("runs/x", train=train)).model_dump(mode="json")
    keys = [*flatten(dumped), "validation", "samples"]
    assert all(key in keys for key in TRAINING_RUNTIME_KEYS)


def test_a_global_batch_counts_ranks_and_accumulation() -> None:
    config = config_of(settings("runs/x", train={"gradient_accumulation": 3}))
    assert global_batch_sizes(config, 2) == {"2x8x8": 24, "1x8x8": 48}
