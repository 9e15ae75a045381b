"""Checkpoints that are written while training goes on: equal to those for which it stops, whole or not there."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from stdit.config import EMAConfig
from stdit.models.cost import parameter_sizes
from stdit.training import checkpoint, saving
from stdit.training.distributed import Ranks
from stdit.training.rank_memory import rank_memory
from stdit.training.snapshot import HostCopies, MasterLayout
from stdit.training.stopping import STOPPED
from tests.support import forked
from tests.support.paths import ROOT
from tests.support.rank_jobs import (
    config_of,
    for_ranks,
    metrics,
    numbers,
    run,
    run_failing_on_a_dead_disk,
    run_measuring_copies,
    run_watching_full_weights,
    run_with_full_disk,
    run_with_hanging_writes,
    run_with_slow_writes,
    settings,
)
from tests.support.rank_pool import Pool, RankError, free_port, serve

PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
MUON = {"optimizer": {"name": "muon"}}
LORA: dict[str, Any] = {"lora": {"rank": 4}}


def data_for(path: Path, stage: int, ranks: int = 2, **train: Any) -> dict[str, Any]:
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    data = settings(path, train={"zero_stage": stage, "checkpoint_every": 2, "keep_checkpoints": 9, **extra, **train})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


def files(run_dir: Path, step: int) -> dict[str, bytes]:
    """Content of a checkpoint's files, but for what names its run."""
    folder = run_dir / "checkpoints" / checkpoint.folder_of_step(step)
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in ("manifest.json", "identity.json")}


def identity(run_dir: Path, step: int) -> dict[str, Any]:
    found = json.loads((run_dir / "checkpoints" / checkpoint.folder_of_step(step) / "identity.json").read_text())
    found["config"]["run_dir"] = found["config"]["train"]["checkpoint_in_background"] = None
    return found


BF16 = {"precision": "bf16"}
REST = [(1, {}), (3, {}), (0, BF16), (1, BF16), (3, BF16), (2, MUON), (3, MUON)]
CASES = [
    *((0, {}), (2, {}), (2, BF16), (2, {"deepspeed": OFFLOAD})),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in REST),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "train"), CASES)
def test_a_checkpoint_in_the_background_is_the_one_that_training_stops_for(
    pair: Pool, stage: int, train: dict[str, Any], tmp_path: Path
) -> None:
    whole = pair(run_with_slow_writes, data_for(tmp_path / "stop", stage, **train, checkpoint_in_background=False), 0)[
        0
    ]
    # Two steps change weights, moments and average before anything is written.
    found = pair(run_with_slow_writes, data_for(tmp_path / "go", stage, **train), 2)
    assert numbers(found[0]["metrics"]) == numbers(whole["metrics"])
    for step in (2, 4, 6):
        assert checkpoint.verify(tmp_path / "go/checkpoints" / checkpoint.folder_of_step(step)) is None
        assert files(tmp_path / "go", step) == files(tmp_path / "stop", step)
        assert identity(tmp_path / "go", step) == identity(tmp_path / "stop", step)
    # One at a time; the last one at once, after the one before it.
    names = [f"step-0000000{n}" for n in (2, 4, 6)]
    for rank in found:
        assert [w[:2] for w in rank["writes"]] == [(name, what) for name in names for what in ("begins", "ends")]
        assert [taken for _, what, taken in rank["writes"] if what == "ends"][:2] >= [4, 6]
    reported = {r["checkpoint"] for r in found[0]["reports"] if r["checkpoint"]}
    assert {Path(path).name for path in reported} >= {"step-00000002", "step-00000006"}


@pytest.mark.distributed
@pytest.mark.slow
def test_adapters_are_written_in_the_background_too(pair: Pool, tmp_path: Path) -> None:
    base = {"init": {"source": str(tmp_path / "base")}}
    pair(run, data_for(tmp_path / "base", 1))
    for name, how in (("stop", False), ("go", True)):
        data = {**data_for(tmp_path / name, 2, **LORA, checkpoint_in_background=how), **base}
        pair(run_with_slow_writes, data, 2)
    for step in (2, 4, 6):
        assert files(tmp_path / "go", step) == files(tmp_path / "stop", step)
        assert any(name.startswith("lora_ema/") for name in files(tmp_path / "go", step))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_killed_while_writing_lose_that_checkpoint_alone(pair: Pool, stage: int, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", stage, steps=8))[0]
    data = data_for(tmp_path / "broken", stage, steps=8)
    port, pipes, processes = free_port(), [], []
    for rank in range(2):
        ours, theirs = forked.context().Pipe()
        processes.append(forked.context().Process(target=serve, args=(rank, 2, port, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
        # Step 4 is written in the background, but for the marks.
        ours.send((run_with_hanging_writes, (data, 2)))
    until = time.monotonic() + 60
    while len(metrics(tmp_path / "broken")) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    folder = tmp_path / "broken/checkpoints"
    while not list(folder.glob("step-00000004.partial/*optim*" if stage else "step-00000004.partial/*model*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000002", "step-00000004.partial"]
    resumed = pair(run, data)[0]
    assert "resumes after step 2" in resumed["said"]
    assert numbers(resumed["metrics"]) == numbers(whole["metrics"])
    # ZeRO-3's shards also have the numbers of parameters, which count on within a process.
    for name, content in files(tmp_path / "whole", 8).items():
        assert (stage == 3 and name.endswith(".pt")) or files(tmp_path / "broken", 8)[name] == content
    assert not list(folder.glob("*.partial"))


def test_rank_0_does_not_wait_for_ever_for_a_rank_that_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ORPHAN_S", 0.5)
    folder = tmp_path / "checkpoints/step-00000002"
    checkpoint.start_partial(checkpoint.partial_folder(folder))
    write = object.__new__(saving.Write)
    threading.Thread.__init__(write, daemon=True)
    write.folder, write.partial = folder, checkpoint.partial_folder(folder)
    write.config = cast(Any, SimpleNamespace(run_dir=tmp_path))
    write.ranks, write.layout = Ranks(0, 2, 0, torch.device("cpu")), MasterLayout({}, [{}, {}])
    write.shards = saving.ShardWriter(None, lambda state: state)
    write.written, write._abandoned, write.error = threading.Event(), threading.Event(), None
    write._weights, write.seconds = {}, 0.0
    write.start()
    began = time.monotonic()
    write.outlive()
    assert time.monotonic() - began < 10
    assert "other ranks have not written their part" in str(write.error)
    assert not folder.exists()


def test_a_checkpoint_that_is_written_counts_though_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    folder = tmp_path / "checkpoints/step-00000002"
    write: Any = object.__new__(saving.Write)
    write.folder, write.partial = folder, checkpoint.start_partial(checkpoint.partial_folder(folder))
    train = SimpleNamespace(keep_checkpoints=1, keep_every=None, keep_best=0, steps=4, ema=EMAConfig())
    write.config, write.state = SimpleNamespace(run_dir=tmp_path, train=train), SimpleNamespace(intact=set())
    write._identity, write._write_full, write.join = "{}", lambda weights: None, lambda: None
    write.written, write.error, write.remark, write.background = threading.Event(), None, "", False
    write._complete({})
    write.written.set()
    saver: Any = object.__new__(saving.Saver)
    said: list[str] = []
    saver._write, saver.ranks, saver.say = write, Ranks(0, 1, 0, torch.device("cpu")), said.append
    assert saver._finish() == folder
    assert write.state.intact == {folder}
    assert checkpoint.verify(folder) is None
    assert "is written, but older checkpoints could not be removed ([Errno 13] Permission denied)" in said[0]


def test_an_identity_that_no_json_reader_accepts_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "make_identity", lambda *_: {"recent_losses": {"1x8x8": [math.nan]}})
    write: Any = object.__new__(saving.Write)
    write.ranks, write.layout = Ranks(0, 1, 0, torch.device("cpu")), MasterLayout({}, [{}])
    write.engine, write.config = SimpleNamespace(masters=list, buffers=dict), None
    write.state, write._saver = None, SimpleNamespace(data=None, ema=SimpleNamespace(average=[], profiles={}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write.collect(lambda state: state)


@pytest.mark.distributed
def test_a_run_that_ends_by_an_error_on_a_disk_that_is_dead_is_ended_by_its_watchdog(tmp_path: Path) -> None:
    ours, theirs = forked.context().Pipe()
    process = forked.context().Process(target=serve, args=(0, 1, free_port(), theirs), daemon=True)
    process.start()
    ours.send((run_failing_on_a_dead_disk, (data_for(tmp_path, 1, ranks=1), 3)))
    process.join(60)
    process.kill()
    assert process.exitcode == STOPPED
    said = (tmp_path / "stalled-rank-0.txt").read_text()
    assert "step 3, waiting for a checkpoint to be written, after an error: more than 1 s" in said


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_fails_in_the_background_is_said_at_a_later_step(pair: Pool, rank: int, tmp_path: Path) -> None:
    found = pair(run_with_full_disk, data_for(tmp_path, 2, steps=8), [2, 4], rank)[0]
    folder = tmp_path / "checkpoints"
    assert f"WARNING: {folder}/step-00000002: the checkpoint could not be written on rank {rank} (" in found["said"]
    assert "Training goes on without it (2 in a row" in found["said"]
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000006", "step-00000008"]
    assert len(found["metrics"]) == 8
    data = data_for(tmp_path / "often", 2, steps=8, max_failed_saves=1)
    with pytest.raises(RankError, match="step-00000004: the checkpoint could not be written"):
        pair(run_with_full_disk, data, [2, 4], rank)


@pytest.mark.distributed
def test_a_run_that_ends_by_an_error_waits_for_the_checkpoint_that_is_being_written(pair: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="a test asked"):
        pair(run_with_slow_writes, data_for(tmp_path, 2), 0, 3)
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert checkpoint.step_of(found) == 2
    assert pair(run, data_for(tmp_path, 2))[0]["metrics"][-1]["step"] == 6


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forecast_counts_the_copy(pair: Pool, stage: int, precision: str, tmp_path: Path) -> None:
    data = data_for(tmp_path, stage, precision=precision, steps=3)
    data["model"]["hidden_size"] = 128
    first, second = pair(run_measuring_copies, data)
    config = config_of(data)
    forecast = rank_memory(parameter_sizes(config.model, config.train), config.train, 2).checkpoint_copy
    # The last save, at step 3, is written without a copy.
    assert first["copied"][0] == pytest.approx(forecast, rel=0.1)
    assert second["copied"][0] <= first["copied"][0]
    assert first["copied"][1] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("background", [True, False])
def test_full_weights_and_other_ranks_files_are_let_go_once_written(
    pair: Pool, background: bool, tmp_path: Path
) -> None:
    data = data_for(tmp_path, 2, steps=3, checkpoint_in_background=background)
    found = pair(run_watching_full_weights, data)[0]
    assert found["mapped"] == []
    assert found["held"] == [0] * 4


def saved(state: Any) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def test_copies_share_storage_as_their_originals_do_and_are_saved_as_the_same_bytes() -> None:
    flat = torch.arange(100.0)
    parameter = nn.Parameter(torch.randn(3, 4))
    parameter.ds_id = [1, 2]  # pyright: ignore[reportAttributeAccessIssue]  (an attribute of DeepSpeed's)
    views = {"a": flat[:40].view(4, 10), "b": flat[40:60], "t": flat.view(10, 10).t(), "step": torch.tensor(3)}
    state = {
        "views": views,
        "again": [views],
        "flat": (flat, "text", 1.5, None),
        "p": parameter,
        "empty": torch.empty(0),
    }
    expected = saved(state)
    copies, copied = HostCopies(pinned=False), state
    for _ in range(2):
        copies.begin()
        copied = copies.copy(state)
        copies.end()
        assert copies.nbytes == sum(t.untyped_storage().nbytes() for t in (flat, parameter, views["step"]))
        assert saved(copied) == expected
        assert copied["again"][0] is copied["views"]
        assert copied["views"]["b"].untyped_storage().data_ptr() == copied["flat"][0].untyped_storage().data_ptr()
    flat.zero_()
    with torch.no_grad():
        parameter.zero_()
    assert saved(copied) == expected


# In a process of its own: the settings are the process's.
PINS = """
import torch
from stdit.training.snapshot import HostCopies
get = torch._C._accelerator_getAllocatorSettings
HostCopies(pinned=False)
before = get()
HostCopies(pinned=True)
HostCopies(pinned=True)
print(before, get(), sep="|")
"""


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ("", "|pinned_max_cached_size_mb:1"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (
                    "expandable_segments:True",
                    "expandable_segments:True|expandable_segments:True,pinned_max_cached_size_mb:1",
                ),
                ("pinned_max_round_threshold_mb:8", "pinned_max_round_threshold_mb:8|pinned_max_round_threshold_mb:8"),
            )
        ),
    ],
)
def test_torch_is_told_to_pin_exact_sizes_unless_the_user_says_otherwise(users: str, expected: str) -> None:
    env = {**os.environ, "PYTORCH_ALLOC_CONF": users}
    found = subprocess.run([sys.executable, "-c", PINS], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


def test_the_next_copy_takes_the_memory_of_the_last_one() -> None:
    copies, state = HostCopies(pinned=False), [torch.randn(1000), torch.randn(1000), torch.randn(7)]
    places = []
    for _ in range(3):
        copies.begin()
        places.append({tensor.data_ptr() for tensor in copies.copy(state)})
        copies.end()
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 3
