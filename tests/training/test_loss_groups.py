"""Training losses by noise level and bucket: means of their samples, over all ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stdit.config import Bucket, DataConfig
from stdit.training.loss_groups import LossGroups
from tests.support.rank_jobs import run, settings
from tests.support.rank_pool import Pool

SMALL, LARGE = "1x8x8", "4x8x8"
DATA = DataConfig.model_validate(
    {"features": "features", "buckets": [{"frames": n, "height": 8, "width": 8, "batch_size": 2} for n in (1, 4)]}
)


def part(key: str, samples: int) -> Any:
    class Part:
        bucket = Bucket.parse(key)

        def __len__(self) -> int:
            return samples

    return Part()


def test_each_group_has_the_mean_of_its_samples_over_ranks_and_micro_batches() -> None:
    groups = LossGroups(DATA)
    first = groups.sums(
        SimpleNamespace(parts=[part(SMALL, 2), part(LARGE, 1)]),  # pyright: ignore[reportArgumentType]
        [torch.tensor([0.1, 0.6]), torch.tensor([1.0])],
        [torch.tensor([1.0, 2.0]), torch.tensor([6.0])],
    )
    second = groups.sums(
        SimpleNamespace(parts=[part(SMALL, 1)]),  # pyright: ignore[reportArgumentType]
        [torch.tensor([0.2])],
        [torch.tensor([4.0])],
    )
    assert groups.metrics([a + b for a, b in zip(first, second, strict=True)]) == {
        "loss/t=0-0.25": 2.5, "loss/t=0.5-0.75": 2.0, "loss/t=0.75-1": 6.0,
        f"loss/{SMALL}": pytest.approx(7 / 3), f"loss/{LARGE}": 6.0,
    }  # fmt: skip


def test_a_loss_that_is_not_finite_does_not_hide_the_others() -> None:
    groups = LossGroups(DATA)
    step: Any = SimpleNamespace(parts=[part(SMALL, 2)])
    found = groups.metrics(groups.sums(step, [torch.tensor([0.1, 0.1])], [torch.tensor([float("nan"), 3.0])]))
    assert found == {"loss/t=0-0.25": 3.0, f"loss/{SMALL}": 3.0}


def test_a_run_logs_them_beside_its_loss(solo: Pool, tmp_path: Path) -> None:
    packed = {"packing": True, "tokens_per_step": 400, "tokens_per_micro_batch": 150}
    shapes = {"buckets": [{"frames": n, "height": 8, "width": 8} for n in (1, 2)]}
    for name, changes in {"buckets": {"train": {}}, "packed": {"train": packed, "data": shapes}}.items():
        changes["train"]["steps"] = 3
        for line in solo(run, settings(tmp_path / name, **changes))[0]["metrics"]:
            by_bucket = {key: value for key, value in line.items() if key.startswith("loss/") and "t=" not in key}
            by_time = [value for key, value in line.items() if key.startswith("loss/t=")]
            if name == "buckets":
                assert by_bucket == {f"loss/{line['bucket']}": pytest.approx(line["loss"])}
            assert min(by_time) <= line["loss"] * (1 + 1e-6)
            assert max(by_time) >= line["loss"] * (1 - 1e-6)
            assert min(by_bucket.values()) <= line["loss"] * (1 + 1e-6)
