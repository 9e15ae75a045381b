"""Training on two hosts: equal to one host's, and what becomes of it when the link or a host is lost. The hosts are
namespaces (tests/support/hosts.py)."""

from __future__ import annotations

import os
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
# Of the slow link. A step of this run sends about a megabyte, 0.3 s.
RATE = "30mbit"
LIMIT_S = 10.0
# A host's own name is often a loopback address to itself (Debian's installer does so).
NAMES = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
# Of a launch: start, training, end.
LAUNCH_S = 280.0


def arguments(run_dir: Path, *settings: str, script: str = "stdit/train.py") -> list[str]:
    """stdit/train.py and its arguments, of the run that all tests here train."""
    common = (
        f"run_dir={run_dir}", f"train.steps={STEPS}", "train.checkpoint_every=20", "train.keep_checkpoints=9",
        "train.tensorboard=false", f"train.step_timeout_s={LIMIT_S}",
    )  # fmt: skip
    return [script, "--config", "configs/debug.yaml", *(f"--set={text}" for text in (*common, *settings))]


def deepspeed(
    run_dir: Path, machines: tuple[Host, ...], *settings: str, scripts: tuple[str, ...] = ("stdit/train.py",) * 2
) -> list[Program]:
    """The `deepspeed` command on each of `machines`, with one rank each: as docs/run.md says. scripts: what each of
    them runs."""
    hostfile = machines[0].folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in machines))
    command = [str(BIN / "deepspeed"), "--no_ssh", "--hostfile", str(hostfile), "--master_addr", machines[0].address]
    return [
        host.run(
            [*command, "--node_rank", str(rank), *arguments(run_dir, *settings, script=script)], DS_ACCELERATOR="cpu"
        )
        for rank, (host, script) in enumerate(zip(machines, scripts, strict=False))
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


@pytest.fixture
def named_pair(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts that know one another by name, as a cluster's do."""
    with hosts(tmp_path, "127.0.0.1 localhost\n10.77.0.1 host1\n10.77.0.2 host2\n") as found:
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


GLOBAL = "data.buckets=[{frames: 1, height: 16, width: 16, global_batch: 16}, {frames: 4, height: 16, width: 16, global_batch: 8}]"


@pytest.mark.parametrize("link", ["down", "up"])
def test_a_host_that_vanishes_is_noticed_and_the_other_goes_on_alone(
    link: str, pair: tuple[Host, Host], one_host: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    programs = deepspeed(run_dir, pair, GLOBAL)
    wait_until_it_trains(run_dir, programs)
    pair[1].link(link)
    pair[1].kill()  # with the link up, its kernel closes the connections
    began = time.monotonic()
    assert end(programs[:1], LIMIT_S + 25) == [STOPPED], output(programs)
    print(f"link {link}: ended {time.monotonic() - began:.1f} s after the other host")
    step = metrics(run_dir)[-1]["step"] + 1
    assert step < STEPS, "killed too late to show anything"
    said = programs[0].output
    if link == "down":
        assert re.search(rf"\[rank 0\] step {step}, [a-z ]+: more than 10 s \(train.step_timeout_s\)", said), said
        assert "[rank 0] no report of rank 1: the process, its host or the link to it may be gone" in said
    else:
        assert re.search(
            rf"\[rank 0\] step {step}, [a-z ]+: the connection to another rank ended \(.*10.77.0.2", said
        ), said
        assert "ends with code 75" in said
        assert "Traceback" not in said
    pair[0].link("up")  # of a switch that stayed
    programs = deepspeed(run_dir, pair[:1], GLOBAL)
    assert end(programs) == [0], output(programs)
    assert re.search(r"resumes after step [246]0", output(programs))
    assert losses(run_dir) == pytest.approx(losses(one_host), rel=1e-4)  # sums in another order


FAILS = """
import sys
sys.path.insert(0, ".")
from stdit import train
from stdit.training.engine import Engine
step, taken = Engine.step, []
def fail(self, lr):
    taken.append(lr)
    if len(taken) == 30:
        raise ERROR
    return step(self, lr)
Engine.step = fail
train.main()
"""


@pytest.mark.parametrize(
    ("error", "own", "named"),
    [
        ('OSError(5, "Input/output error", "/dev/nvme0")', "[Errno 5] Input/output error: '/dev/nvme0'", "OSError: [Errno 5] Input/output error: '/dev/nvme0'"),
        ('KeyError("frames")', "KeyError('frames')", "KeyError: 'frames'"),
    ],
    ids=["of a disk", "of the program"],
)  # fmt: skip
def test_an_error_of_one_host_ends_the_other_with_1_and_is_named_there(
    pair: tuple[Host, Host], tmp_path: Path, error: str, own: str, named: str
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS.replace("ERROR", error))
    programs = deepspeed(tmp_path / "run", pair, scripts=("stdit/train.py", str(script)))
    assert end(programs) == [1, 1], output(programs)
    assert f"[rank 1] error: {own}" in programs[1].output
    said = programs[0].output
    assert re.search(rf"\[rank 0\] step 30, .*rank 1 failed: {re.escape(named)}", said), said


def test_hosts_without_a_shared_disk_are_refused_before_anything_is_trained(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    pair[1].kill()
    pair[1].administer(f"mount -t tmpfs tmpfs {folder}")
    pair[1].start()
    programs = deepspeed(folder / "run", pair)
    assert end(programs) == [2, 2], output(programs)
    said = f"[rank 0] error: run_dir: {folder / 'run'} is another folder on host2 (rank 1) than on host1; all hosts need a shared one"
    assert said in programs[0].output
    assert "Traceback" not in output(programs)
    assert "error:" not in programs[1].output
    assert not (folder / "run/config.yaml").exists()


def test_a_slow_link_and_one_that_is_down_for_a_moment_cost_time_alone(
    pair: tuple[Host, Host], one_host: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for host in pair:
        host.limit(RATE)
    programs = deepspeed(run_dir, pair, f"train.step_timeout_s={3 * LIMIT_S}")
    wait_until_it_trains(run_dir, programs)
    pair[0].link("down")
    time.sleep(1.5)
    pair[0].link("up")
    assert end(programs) == [0, 0], output(programs)
    check_equal(run_dir, one_host)
    seconds = [sum(line["seconds"] for line in metrics(folder)[:40]) / 40 for folder in (one_host, run_dir)]
    print(f"seconds a step, one host and two with {RATE}: {seconds[0]:.4f}, {seconds[1]:.4f}")
    assert seconds[1] > seconds[0] + 0.1
    longest = max(line["seconds"] for line in metrics(run_dir)[40:])
    assert longest > 1.4, "the link was not missed"


# In place of SLURM's: srun runs its command once on each host, and ends with the highest code.
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "host1\\nhost2\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "srun": """while [[ ${1:-} == --* ]]; do shift; done
        SLURM_NODEID=0 $HOST0 "$@" & first=$!
        SLURM_NODEID=1 $HOST1 "$@" & second=$!
        wait $first; code=$?; wait $second; other=$?
        exit $((code > other ? code : other))""",
}


def sbatch(run_dir: Path, machines: tuple[Host, ...]) -> Program:
    """cluster/slurm/deepspeed.sbatch, with STAND_INS; SLURM would run it on the first host."""
    folder = machines[0].folder / "slurm"
    folder.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}", "VENV": str(BIN.parent), "LOG": str(folder / "log"), "RANKS_PER_NODE": "1",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_CPUS_PER_TASK": "1",
        **{f"HOST{number}": " ".join(host.enter()) for number, host in enumerate(machines)},
    }  # fmt: skip
    _, _, config, *settings = arguments(run_dir)
    sets = [part for text in settings for part in ("--set", text.removeprefix("--set="))]
    command = ["env", f"--chdir={ROOT}", "bash", "cluster/slurm/deepspeed.sbatch", config, *sets]
    return Program(command, machines[0].folder / "slurm.log", environment() | variables)


def test_slurms_script_trains_on_two_hosts_and_goes_back_into_the_queue_when_their_link_is_cut(
    named_pair: tuple[Host, Host], one_host: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(run_dir, named_pair)
    wait_until_it_trains(run_dir, [job])
    named_pair[0].link("down")
    assert end([job], LIMIT_S + 25) == [0], job.output
    assert len(metrics(run_dir)) < STEPS, "cut too late to show anything"
    assert (tmp_path / "slurm/log").read_text() == "scontrol requeue 7\n"
    named_pair[0].link("up")
    job = sbatch(run_dir, named_pair)
    assert end([job]) == [0], job.output
    assert (tmp_path / "slurm/log").read_text() == "scontrol requeue 7\n"
    assert re.search(r"resumes after step [246]0", job.output)
    check_equal(run_dir, one_host)


# Trains one stage as a plan does. Arguments: workers, where Ray keeps its records, settings.
STAGE = """
import json, sys
from pathlib import Path
from pipelines import workers
from pipelines.plan import Resources
from stdit.config import Config, load_config, validate
resources = {"workers": json.loads(sys.argv[1]), "max_failures": 5, "deadline_s": 400}
config = load_config("configs/debug.yaml", Config, sys.argv[3:])
workers.connect()
workers.train_stage(config, validate(resources, Resources, "test"), Path(sys.argv[2]), lambda: None)
"""
# How soon Ray misses a node: three times this long.
HEALTH = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ray_cluster(machines: tuple[Host, Host]) -> list[Program]:
    """Ray on two hosts, with a CPU for one worker each."""
    common = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", "--port=6379", "--include-dashboard=false", f"--node-ip-address={machines[0].address}"]
    other = [f"--address={machines[0].address}:6379", f"--node-ip-address={machines[1].address}"]
    path = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **HEALTH}
    started = [machines[0].run([str(BIN / "ray"), "start", *head, *common], **path)]
    wait_for(lambda: "Ray runtime started" in started[0].output, 120)
    started.append(machines[1].run([str(BIN / "ray"), "start", *other, *common], **path))
    wait_for(lambda: "Ray runtime started" in started[1].output, 120)
    return started


def ray_stage(host: Host, run_dir: Path, workers: str) -> Program:
    _, _, _, *settings = arguments(run_dir, GLOBAL)
    command = [sys.executable, "-c", STAGE, workers, str(run_dir.parent / f"ray-{run_dir.name}")]
    variables = {"RAY_ADDRESS": f"{host.address}:6379", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return host.run([*command, *(text.removeprefix("--set=") for text in settings)], **variables)


@pytest.mark.ray
def test_ray_trains_on_two_hosts_and_goes_on_alone_when_one_is_lost(
    pair: tuple[Host, Host], one_host: Path, tmp_path: Path
) -> None:
    ray_cluster(pair)
    whole = ray_stage(pair[0], tmp_path / "whole", "2")
    assert end([whole]) == [0], whole.output
    check_equal(tmp_path / "whole", one_host)
    run_dir = tmp_path / "run"
    stage = ray_stage(pair[0], run_dir, '{"min": 1, "max": 2}')
    wait_until_it_trains(run_dir, [stage])
    pair[1].link("down")
    pair[1].kill()
    began, step = time.monotonic(), metrics(run_dir)[-1]["step"]
    assert step < STEPS - 5, "killed too late to show anything"
    assert end([stage], 400) == [0], stage.output
    print(f"complete on one host {time.monotonic() - began:.1f} s after the other was lost, at step {step}")
    assert losses(run_dir) == pytest.approx(losses(one_host), rel=1e-4)
    assert checkpoint.read_identity(run_dir)["world_size"] == 1
