"""resources.workers: {min, max}: a stage follows the nodes that there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.train import PreemptionInfo

from pipelines import checks, workers
from pipelines.plan import Resources
from stdit.config import ConfigError, validate
from stdit.training import checkpoint
from tests.support.rank_jobs import config_of, settings


def elastic(**changes: Any) -> Resources:
    return validate({"workers": {"min": 1, "max": 2, **changes}}, Resources, "test")


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A connected Ray of two nodes with a core each, and the second of them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
    try:
        workers.connect()
        yield cluster, second
    finally:
        workers.disconnect()
        cluster.shutdown()


def test_ray_is_given_both_numbers_and_one_number_stays_one() -> None:
    assert workers._workers(Resources(workers=3)) == {"num_workers": 3}
    found = workers._workers(elastic(check_every_s=5))
    assert found == {"num_workers": (1, 2), "elastic_resize_monitor_interval_s": 5}
    assert elastic().cpus == 2
    with pytest.raises(ConfigError, match=r"workers: min 3 is above max 2"):
        elastic(min=3)


@pytest.mark.parametrize(
    ("bucket", "resources", "train", "said"),
    [
        (
            {"batch_size": 4},
            {"max": 2},
            {},
            "resources.workers may be 1 to 2, but bucket 1x8x8 states batch_size alone",
        ),
        (
            {"global_batch": 3},
            {"max": 4},
            {},
            r"global_batch is 3, .* for 4 data-parallel ranks .*\(resources.workers\)",
        ),
        (
            {"global_batch": 4},
            {"min": 2, "max": 4},
            {"sequence_parallel": 2},
            r"train.sequence_parallel is 2, which does not divide the number of ranks, 3 \(resources.workers\)",
        ),
    ],
)
def test_every_number_of_workers_must_serve(
    bucket: dict[str, Any], resources: dict[str, Any], train: dict[str, Any], said: str, tmp_path: Path
) -> None:
    data = settings(tmp_path, train=train)
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, **bucket}]
    with pytest.raises(ConfigError, match=said):
        checks.check_workers(elastic(**resources), config_of(data), "stage.yaml")


def test_each_node_that_is_to_be_taken_away_asks_for_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def notice(*nodes: str) -> PreemptionInfo:
        return PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})

    told = iter([None, notice("a"), notice("a"), notice("a", "b"), notice("b")])
    asked: list[int] = []
    monkeypatch.setattr(workers, "PREEMPTION_POLL_S", 0)
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(told))
    with pytest.raises(StopIteration):
        workers._watch_preemption(lambda: asked.append(1))
    assert len(asked) == 2


def test_a_stage_that_was_asked_to_stop_is_not_started_again_when_ray_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_fit: Any, _name: str, _deadline: Any, tick: Callable[[], None]) -> None:
        tick()
        raise workers.RayLost("stage run: Ray's controller died")

    monkeypatch.setattr(workers, "_trainer_class", lambda: MagicMock())
    monkeypatch.setattr(workers, "_wait", dies)
    config = config_of({**settings(tmp_path / "run"), "name": "run"})
    with pytest.raises(workers.RayLost):
        workers.train_stage(config, Resources(workers=2), tmp_path, lambda: None)
    with pytest.raises(workers.StageStopped, match="controller died, while it was stopping"):
        workers.train_stage(config, Resources(workers=2), tmp_path, (tmp_path / "run.stop").touch)
    assert not (tmp_path / "run.stop").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_is_to_be_taken_away_has_a_checkpoint_written_first(
    two_nodes: tuple[Any, Any], tmp_path: Path
) -> None:
    cluster, second = two_nodes
    data = settings(tmp_path / "run", train={"steps": 10**6, "checkpoint_every": 10**6, "log_every": 1})
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, "global_batch": 8}]
    data["name"] = "preempted"
    log, drained = tmp_path / "run/metrics.jsonl", False

    def tick() -> None:
        nonlocal drained
        if not drained and log.exists() and log.stat().st_size:
            drained = True
            drain = [
                "--address",
                cluster.address,
                "--node-id",
                second.node_id,
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
            ]
            told = ["--reason-message", "a spot machine", "--deadline-remaining-seconds", "600"]
            subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *drain, *told], check=True, timeout=60)
        if any(checkpoint.list_checkpoints(tmp_path / "run")):
            (tmp_path / "ray/preempted.stop").touch()

    resources = Resources(workers=2, deadline_s=800)
    with pytest.raises(workers.StageStopped):
        workers.train_stage(config_of(data), resources, tmp_path / "ray", tick)
    steps = sorted(int(path.name[-8:]) for path in checkpoint.list_checkpoints(tmp_path / "run"))
    assert len(steps) == 2, "of the notice, and of the stop after it"


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_node_shrinks_a_stage_and_one_that_comes_lets_it_grow(
    two_nodes: tuple[Any, Any], tmp_path: Path
) -> None:
    cluster, second = two_nodes
    data = settings(tmp_path / "run", train={"steps": 10**6, "checkpoint_every": 20, "log_every": 20})
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, "global_batch": 8}]
    data["name"] = "elastic"
    seen: list[int] = []

    def tick() -> None:
        """Waits for a checkpoint of two ranks, takes a node away; of one rank, brings one; of two again, asks to
        stop."""
        nonlocal second
        newest = next(iter(checkpoint.list_checkpoints(tmp_path / "run")), None)
        if newest is None:
            return
        ranks = json.loads((newest / "identity.json").read_text())["world_size"]
        if seen[-1:] == [ranks] or (not seen and ranks == 1):
            return
        seen.append(ranks)
        if seen == [2]:
            cluster.remove_node(second, allow_graceful=False)
        elif seen == [2, 1]:
            second = cluster.add_node(num_cpus=1)
        elif seen == [2, 1, 2]:
            (tmp_path / "ray/elastic.stop").touch()

    resources = validate({"workers": {"min": 1, "max": 2, "check_every_s": 3}, "max_failures": 9, "deadline_s": 800}, Resources, "test")  # fmt: skip
    with pytest.raises(workers.StageStopped):
        workers.train_stage(config_of(data), resources, tmp_path / "ray", tick)
    assert seen == [2, 1, 2]
    # Each sample of the stream once, whatever the ranks.
    told = checkpoint.read_identity(tmp_path / "run")
    assert told["data_position"] == {"1x8x8": 8 * told["step"]}
    assert told["samples_seen"] == 8 * told["step"]
