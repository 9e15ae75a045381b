"""A connection to another rank that has ended: what tells it from other errors, and whether a rank has failed or is
gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from stdit.errors import SaveError
from stdit.training import lost_rank, run_dir
from stdit.training.distributed import Ranks
from stdit.training.lost_rank import find_failure, lost_connection, record_failure
from tests.support.paths import ROOT
from tests.support.rank_jobs import config_of, settings

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
PAIR = GLOO + "pair.cc:553] "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(f"{PAIR}Connection closed by peer [10.0.0.2]:5009. This is typically caused by"), "Connection closed by peer [10.0.0.2]:5009"),
        (RuntimeError(f"{PAIR}Read error [10.0.0.2]:5009: Connection reset by peer"), "Read error [10.0.0.2]:5009: Connection reset by peer"),
        (RuntimeError(f"{GLOO}unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete"), "Timed out waiting 3000ms for recv operation to complete"),
        (DistNetworkError("Broken pipe\nframe #0"), "Broken pipe"),
        (DistBackendError("NCCL error in: x.cpp:1\nncclRemoteError: A call failed possibly due to a network error\nLast"), "ncclRemoteError: A call failed possibly due to a network error"),
        # Errors that would come again.
        (RuntimeError(f"{GLOO}device.cc:80] ifa != nullptr. Unable to find address for: ib7"), None),
        (RuntimeError("Connection closed by peer"), None),
        (OSError(32, "Broken pipe"), None),
        (ValueError(f"{PAIR}Connection closed by peer [10.0.0.2]:5009"), None),
    ],
)  # fmt: skip
def test_lost_connections_are_told_from_other_errors(error: Exception, said: str | None) -> None:
    assert lost_connection(error) == said
    saving = SaveError("runs/a: could not be written")
    saving.__cause__ = error
    assert lost_connection(saving) == said


def test_a_rank_that_has_failed_says_so_until_the_run_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_rank, "RECORD_S", 0.0)
    config = config_of(settings(tmp_path / "run"))
    record_failure(config.run_dir, 1, OSError(5, "Input/output error"))
    assert not config.run_dir.exists()
    with run_dir.lock(config, ALONE):
        assert find_failure(config.run_dir, 0) is None
        record_failure(config.run_dir, 1, OSError(5, "Input/output error"))
        assert find_failure(config.run_dir, 0) == "rank 1 failed: OSError: [Errno 5] Input/output error"
        assert find_failure(config.run_dir, 1) is None  # its own
    run_dir.check(config.run_dir)
    with run_dir.lock(config, ALONE):
        assert find_failure(config.run_dir, 0) is None


def test_a_fault_of_the_program_ends_a_rank_at_once_with_1() -> None:
    program = """
import sys, threading
from stdit import train
def fail(config, stop): raise KeyError("frames")
train.train = fail
threading.Thread(target=threading.Event().wait).start()  # as of a library that waits for other ranks
train.main(["--config", "configs/debug.yaml"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.endswith("error: KeyError('frames')\n")
    assert "Traceback" in ended.stderr
