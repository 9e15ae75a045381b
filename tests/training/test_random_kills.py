"""Runs whose ranks are killed at random instants, saves included: nothing is lost, and not a bit differs in the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.rank_jobs import for_ranks, metrics, numbers, run, settings
from tests.support.rank_pool import free_port, serve

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
# Of each of the 16 kinds of run: 208 in all.
KILLS = 13
STEPS, EVERY = 40, 4


def data_for(path: Path, stage: int, precision: str, sequence_parallel: int) -> dict[str, Any]:
    train = {"zero_stage": stage, "precision": precision, "sequence_parallel": sequence_parallel}
    extra = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    data = settings(path, train={"steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, **extra, **train})
    data["data"]["buckets"] = for_ranks(2 // sequence_parallel)
    return data


class Launch:
    """Two ranks that train."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.began, self.pipes, self.processes = time.monotonic(), [], []
        port = free_port()
        for rank in range(2):
            ours, theirs = forked.context().Pipe()
            self.processes.append(forked.context().Process(target=serve, args=(rank, 2, port, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
            ours.send((run, (data,)))

    def ends_before(self, seconds: float) -> bool:
        """Whether both ranks have trained to the end `seconds` after the start."""
        for pipe in self.pipes:
            if not pipe.poll(max(0.0, self.began + seconds - time.monotonic())):
                return False
            fine, result = pipe.recv()
            assert fine, result
        return True

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


def outcome(run_dir: Path) -> tuple[Any, dict[str, bytes]]:
    """Logged numbers, and the weights and EMA of the last checkpoint."""
    folder = run_dir / f"checkpoints/step-{STEPS:08d}"
    weights = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    return numbers(metrics(run_dir)), weights


@pytest.mark.parametrize("sequence_parallel", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_runs_killed_at_random_instants_end_as_if_nothing_had_happened(
    stage: int, precision: str, sequence_parallel: int, tmp_path: Path
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    draw, killed, whole = random.Random(seed), tmp_path / "killed", tmp_path / "whole"
    print(f"seed {seed}")
    took = 0.0
    for _ in range(2):  # the first one, of this worker, imports for all
        shutil.rmtree(whole, ignore_errors=True)
        launch = Launch(data_for(whole, stage, precision, sequence_parallel))
        assert launch.ends_before(240)
        took = time.monotonic() - launch.began
        launch.close()
    expected = outcome(whole)
    assert len(expected[1]) >= 2
    kills = completed = 0
    while kills < KILLS or not completed:
        instant, victims = draw.uniform(0, took), draw.choice([[0], [1], [0, 1]])
        launch = Launch(data_for(killed, stage, precision, sequence_parallel))
        try:
            if launch.ends_before(instant if kills < KILLS else 240):
                assert outcome(killed) == expected
                shutil.rmtree(killed)
                completed += 1
                continue
            launch.kill(victims)
            kills += 1
            time.sleep(draw.uniform(0, 0.3))
            saved = sorted(p.name for p in (killed / "checkpoints").glob("step-*"))
            print(f"kill {kills}: {instant:.2f} of {took:.2f} s, ranks {victims}, {' '.join(saved) or 'no checkpoint'}")
        finally:
            launch.close()
    print(f"{kills} kills, {completed} runs completed, all bit-equal")
