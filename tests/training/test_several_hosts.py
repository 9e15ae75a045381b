"""Training on two hosts: equal to one host's, and what becomes of it when the link or a host is lost. The hosts are namespaces
(tests/support/hosts.py)."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stdit.training import checkpoint
from stdit.training.stopping import STOPPED
from tests.support.hosts import Host, Program, hosts, unavailable
from tests.support.launches import environment, metrics, wait_for
from tests.support.paths import ROOT
from tests.support.rank_pool import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

BIN = Path(sys.executable).parent
STEPS = 120
LIMIT_S = 10.0
# A host's own name is often a loopback address to itself (Debian's installer does so).
NAMES = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
# Of a launch: start, training, end.
LAUNCH_S = 280.0


def arguments(run_dir: Path, *settings: str) -> list[str]:
    """stdit/train.py and its arguments, of the run that all tests here train."""
    common = (
        f"run_dir={run_dir}", f"train.steps={STEPS}", "train.checkpoint_every=20", "train.keep_checkpoints=9",
        "train.tensorboard=false", f"train.step_timeout_s={LIMIT_S}",
    )  # fmt: skip
    return ["stdit/train.py", "--config", "configs/debug.yaml", *(f"--set={text}" for text in (*common, *settings))]


def deepspeed(run_dir: Path, machines: tuple[Host, ...], *settings: str) -> list[Program]:
    """The `deepspeed` command on each of `machines`, with one rank each: as docs/run.md says."""
    hostfile = machines[0].folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in machines))
    command = [str(BIN / "deepspeed"), "--no_ssh", "--hostfile", str(hostfile), "--master_addr", machines[0].address]
    return [
        host.run([*command, "--node_rank", str(rank), *arguments(run_dir, *settings)], DS_ACCELERATOR="cpu")
        for rank, host in enumerate(machines)
    ]


def end(programs: list[Program], timeout_s: float = LAUNCH_S) -> list[int]:
    """Exit codes of all, which end within `timeout_s`."""
    until = time.monotonic() + timeout_s
    try:
        return [program.wait(max(0.1, until - time.monotonic())) for program in programs]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not ended after {timeout_s} s:\n{output(programs)}") from None


def output(programs: list[Program]) -> str:
    return "\n".join(program.output for program in programs)


def losses(run_dir: Path) -> list[float]:
    """By step, of a run that is complete."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The files of the last weights, and of their average."""
    found = checkpoint.find_latest(run_dir)
    assert found is not None
    assert checkpoint.step_of(found) == STEPS
    files = {str(file.relative_to(found)): file.read_bytes() for file in found.glob("transformer*/*.safetensors")}
    assert len(files) == 2
    return files


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, trained by two ranks of one host."""
    run_dir = tmp_path_factory.mktemp("one-host") / "run"
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *arguments(run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LAUNCH_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with hosts(tmp_path, NAMES) as found:
        yield found


def check_equal(run_dir: Path, reference: Path) -> None:
    """Bit for bit."""
    assert losses(run_dir) == losses(reference)
    assert weights(run_dir) == weights(reference)


def wait_until_it_trains(run_dir: Path, programs: list[Program], steps: int = 45) -> None:
    """Until a run that has just begun has logged `steps` steps."""
    wait_for(
        lambda: len(metrics(run_dir)) >= steps or any(p.process.poll() is not None for p in programs), LAUNCH_S, 0.02
    )
    assert len(metrics(run_dir)) >= steps, output(programs)


def test_two_hosts_train_as_one(pair: tuple[Host, Host], one_host: Path, tmp_path: Path) -> None:
    programs = deepspeed(tmp_path / "run", pair)
    assert end(programs) == [0, 0], output(programs)
    check_equal(tmp_path / "run", one_host)


def test_a_link_that_is_cut_ends_both_hosts_with_75_and_the_same_command_goes_on(
    pair: tuple[Host, Host], one_host: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    programs = deepspeed(run_dir, pair)
    wait_until_it_trains(run_dir, programs)
    pair[1].link("down")
    began = time.monotonic()
    # The limit, the watchdog's poll, the other ranks' reports; DeepSpeed's launcher looks each second.
    assert end(programs, LIMIT_S + 25) == [STOPPED] * 2, output(programs)
    print(f"both ended {time.monotonic() - began:.1f} s after the cut")
    step = metrics(run_dir)[-1]["step"] + 1
    assert step < STEPS, "cut too late to show anything"
    for rank, program in enumerate(programs):
        assert re.search(
            rf"\[rank {rank}\] step {step}, [a-z ]+: more than 10 s \(train.step_timeout_s\)", program.output
        )
        assert f"[rank {rank}] every rank reports that it waits: the network between their hosts" in program.output
    pair[1].link("up")
    programs = deepspeed(run_dir, pair)
    assert end(programs) == [0, 0], output(programs)
    assert re.search(r"resumes after step [246]0", output(programs))
    check_equal(run_dir, one_host)
