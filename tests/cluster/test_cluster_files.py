"""The files for real clusters, checked as far as a machine without a cluster can: parsed, against schemas where there
are some, and the scripts run with stand-ins for SLURM's commands."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stdit.training.stopping import STOPPED
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
YAML = sorted(CLUSTER.rglob("*.yaml"))
SCRIPTS = sorted((CLUSTER / "slurm").iterdir())


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def kuberay(kind: str) -> dict[str, Any]:
    (found,) = [d for p in (CLUSTER / "kuberay").iterdir() for d in load(p) if d["kind"] == kind]
    return found


def clusters() -> list[dict[str, Any]]:
    """The RayCluster's spec and the one inside the RayJob."""
    return [kuberay("RayCluster")["spec"], kuberay("RayJob")["spec"]["rayClusterSpec"]]


def words(command: str) -> str:
    return " ".join(command.split())


# -------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_every_yaml_parses(path: Path) -> None:
    documents = load(path)
    assert documents
    assert all(isinstance(document, dict) for document in documents)


@pytest.mark.parametrize("path", sorted((CLUSTER / "ray").iterdir()), ids=lambda p: p.name)
def test_the_autoscaler_accepts_its_yaml(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = load(path)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("path", sorted((CLUSTER / "ray").iterdir()), ids=lambda p: p.name)
def test_a_launched_head_has_a_token_and_its_dashboard_on_loopback(path: Path) -> None:
    (config,) = load(path)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_kubernetes_objects_have_what_they_need() -> None:
    for path in (CLUSTER / "kuberay").iterdir():
        for document in load(path):
            assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
            assert document["metadata"]["name"]
    job = kuberay("RayJob")
    assert kuberay("RayCluster")["apiVersion"] == job["apiVersion"] == "ray.io/v1"
    assert job["spec"]["entrypoint"].startswith("python -m pipelines.train_stages --plan configs/plans/")
    assert job["spec"]["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize("spec", clusters(), ids=["RayCluster", "RayJob"])
def test_a_ray_cluster_has_a_head_workers_and_a_token(spec: dict[str, Any]) -> None:
    import ray

    assert spec["rayVersion"] == ray.__version__, "the operator chooses its commands by this"
    assert spec["authOptions"] == {"mode": "token"}
    # rayStartParams are strings, all of them: KubeRay's schema refuses numbers.
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for worker in spec["workerGroupSpecs"]:
        assert worker["groupName"]
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@pytest.mark.parametrize("spec", clusters(), ids=["RayCluster", "RayJob"])
def test_every_pod_is_labelled_unprivileged_and_sees_the_shared_volume(spec: dict[str, Any]) -> None:
    policy = kuberay("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    claim = kuberay("PersistentVolumeClaim")["metadata"]["name"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        template = group["template"]
        assert policy.items() <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        for container in template["spec"]["containers"]:
            assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
            assert {m["name"] for m in container["volumeMounts"]} <= set(volumes)
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_plan_that_clusters_run_has_its_files_on_the_volume_that_every_node_mounts() -> None:
    def paths(value: Any) -> Iterator[str]:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from paths(inner)
        if isinstance(value, str) and value.startswith("/"):
            yield value

    configs = [ROOT / "configs/plans/cluster-64gpu.yaml", *(ROOT / "configs/stages").glob("cluster-*.yaml")]
    named = {path for config in configs for document in load(config) for path in paths(document)}
    assert {"/shared/clips/manifest.parquet", "/shared/features/wan-t5-512"} <= named
    assert {path for path in named if not path.startswith("/shared/")} == set()
    for file in YAML:
        assert set(re.findall(r"run_dir=(/\w+)", file.read_text())) <= {"/shared"}, file
    (aws,) = load(CLUSTER / "ray/aws.yaml")
    assert "--volume=/shared:/shared" in aws["docker"]["run_options"]


def test_a_standing_cluster_keeps_its_dashboard_on_loopback_and_a_job_is_fenced_in() -> None:
    standing, job = clusters()
    assert standing["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    # The operator must reach a RayJob's server: then the submitter, and nobody else, is let through.
    assert job["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    policy = kuberay("NetworkPolicy")["spec"]
    submitter = kuberay("RayJob")["spec"]["submitterPodTemplate"]
    assert policy["podSelector"]["matchLabels"].items() <= submitter["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    assert all("ipBlock" not in source for rule in policy["ingress"] for source in rule["from"])


def test_plans_and_folders_that_cluster_files_name_exist() -> None:
    for path in [*YAML, *SCRIPTS, CLUSTER / "README.md"]:
        for name in re.findall(r"configs/[\w./-]+\.yaml", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


# ------------------------------------------------------------------------------------------- image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n(\s*#.*\n)*", " ", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, words(rest)) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_copies_what_is_there_and_runs_unprivileged() -> None:
    known = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    steps = instructions()
    assert {word for word, _ in steps} <= known
    assert steps[0][0] == "FROM"
    for word, rest in steps:
        if word == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
        if word in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest)
    assert [rest for word, rest in steps if word == "USER"] == ["ray"]
    assert "RAY_AUTH_MODE=token" in next(rest for word, rest in steps if word == "ENV")


def test_the_image_has_every_room_that_runs() -> None:
    copied = {rest.split()[0] for word, rest in instructions() if word == "COPY" and len(rest.split()) == 2}
    assert {"stdit", "pipelines", "configs"} <= copied


# ------------------------------------------------------------------------------------------- SLURM


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    found = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_ask_to_be_warned_and_requeued(script: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))
    assert {"nodes", "time", "requeue", "signal", "output"} <= set(options)
    assert options["ntasks-per-node"] == "1", "one launcher a node"
    assert options["open-mode"] == "append", "a requeued job must not wipe its log"
    assert re.fullmatch(r"(B:)?USR1@\d+", options["signal"])


# What stands in for SLURM: three nodes; srun runs its command once per node of the step, each with its SLURM_NODEID.
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node0\\nnode1\\nnode2\\n"; else echo "scontrol $*" >>"$LOG"; fi',
    "srun": """
        nodes=3
        while [[ ${1:-} == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
        pids=()
        for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & pids+=($!); done
        trap 'kill "${pids[@]}" 2>/dev/null' TERM
        code=0
        for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
        exit $code""",
    "hostname": "echo 10.9.8.7",
}
# Stands in for Python and Ray: writes its words and what its ranks would see, ends as told.
RECORDER = """#!/bin/bash
line="$(basename "$0") $* | $SLURM_NODEID $MASTER_ADDR $MASTER_PORT $RAY_ADDRESS $RAY_AUTH_MODE $DS_ACCELERATOR $OMP_NUM_THREADS"
printf '%s\\n' "${line//$'\\n'/ }" >>"$LOG"
if [[ $* == *--block* ]]; then exec sleep 60; fi
if [[ $1 == - ]]; then for i in {1..100}; do (($(grep -c -- --block "$LOG") >= $2)) && exit 0; sleep 0.1; done; exit 1; fi
if [[ $HOLD && $* == *pipelines.train_stages* ]]; then
    trap 'echo "saved" >>"$LOG"; exit 75' TERM
    for i in {1..300}; do sleep 0.1; done
fi
[[ $* == *pipelines.train_stages* || $* == *launch* ]] && exit "${CODE:-0}"
exit 0
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """Runs a script of cluster/slurm under the stand-ins; returns (exit code, lines recorded, output)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    for name in ("python", "ray"):
        (venv / name).write_text(RECORDER)
    for file in [*folder.iterdir(), *venv.iterdir()]:
        file.chmod(0o755)
    log = tmp_path / "log"

    def run(script: str, *arguments: str, warn: bool = False, **extra: str) -> tuple[int, list[str], str]:
        log.write_text("")
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "LOG": str(log),
            "VENV": str(venv.parent),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[0-2]",
            "SLURM_CPUS_PER_TASK": "8",
            **extra,
        }
        command = ["bash", str(CLUSTER / "slurm" / script), *arguments]
        # A file, not a pipe: what a script leaves behind would hold a pipe open.
        with (tmp_path / "output").open("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if warn:
                until = time.monotonic() + 30
                while "pipelines.train_stages" not in log.read_text() and time.monotonic() < until:
                    time.sleep(0.05)
                time.sleep(0.3)  # Until the stand-in has set its trap.
                process.send_signal(signal.SIGUSR1)
            code = process.wait(timeout=200)
            output.seek(0)
            return code, log.read_text().splitlines(), output.read()

    return run


def test_deepspeed_has_one_launcher_a_node_that_agree(slurm) -> None:
    code, lines, output = slurm(
        "deepspeed.sbatch", "configs/x.yaml", "--set", "a.b=[1, 2]", SLURM_GPUS_ON_NODE="4", RANKS_PER_NODE=""
    )
    assert code == 0, output
    assert len(lines) == 3
    assert sorted(re.search(r"--node_rank=(\d)", line).group(1) for line in lines) == ["0", "1", "2"]  # type: ignore[union-attr]
    (world,) = {re.search(r"--world_info=(\S+)", line).group(1) for line in lines}  # type: ignore[union-attr]
    assert json.loads(base64.urlsafe_b64decode(world)) == {f"node{i}": [0, 1, 2, 3] for i in range(3)}
    for line in lines:
        assert "--master_addr=node0 --master_port=23456 " in line
        assert line.split(" | ")[0].endswith("stdit/train.py --config configs/x.yaml --set a.b=[1, 2]")
        assert line.split(" | ")[1].split() == [re.search(r"node_rank=(\d)", line).group(1), "node0", "23456", "2"]  # type: ignore[union-attr]


def test_deepspeed_on_cpus_says_so(slurm) -> None:
    code, lines, output = slurm("deepspeed.sbatch", "configs/x.yaml", RANKS_PER_NODE="2")
    assert code == 0, output
    assert all(line.split(" | ")[1].split()[-2:] == ["cpu", "4"] for line in lines)


def test_a_stopped_run_is_requeued_and_a_failed_one_is_not(slurm) -> None:
    code, lines, output = slurm("deepspeed.sbatch", "configs/x.yaml", CODE=str(STOPPED))
    assert (code, lines[-1]) == (0, "scontrol requeue 123456"), output
    code, lines, _ = slurm("deepspeed.sbatch", "configs/x.yaml", CODE="1")
    assert code == 1
    assert "requeue" not in "".join(lines)


def test_deepspeeds_launcher_takes_the_arguments_given(slurm, monkeypatch) -> None:
    _, lines, _ = slurm("deepspeed.sbatch", "configs/x.yaml")
    from deepspeed.launcher import launch

    command = lines[0].split(" | ")[0].split()
    assert command[:3] == ["python", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr(sys, "argv", command[2:])
    arguments = launch.parse_args()
    assert arguments.training_script == "stdit/train.py"
    assert arguments.training_script_args == ["--config", "configs/x.yaml"]


def test_ray_has_one_head_workers_on_the_rest_and_the_driver_in_it(slurm) -> None:
    code, lines, output = slurm("ray.sbatch", "configs/plans/demo.yaml", "--set", "run_dir=/x", SLURM_GPUS_ON_NODE="4")
    assert code == 0, output
    heads = [line for line in lines if line.startswith("ray start --head")]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert "--port=23456" in heads[0]
    workers = [line for line in lines if line.startswith("ray start --block --address=10.9.8.7:23456")]
    assert len(workers) == 2
    (driver,) = [line for line in lines if "pipelines.train_stages" in line]
    assert "--plan configs/plans/demo.yaml --set run_dir=/x" in driver
    assert "10.9.8.7:23456 token" in driver
    assert lines.index(heads[0]) < lines.index(driver)


def test_near_its_time_limit_ray_writes_a_checkpoint_and_is_requeued(slurm) -> None:
    code, lines, output = slurm("ray.sbatch", "configs/plans/demo.yaml", HOLD="1", warn=True)
    assert code == 0, output
    assert lines[-2:] == ["saved", "scontrol requeue 123456"], output


def test_a_failed_plan_fails_the_job_and_leaves_no_ray(slurm, tmp_path) -> None:
    code, _, _ = slurm("ray.sbatch", "configs/plans/demo.yaml", CODE="3")
    assert code == 3
    marker = str(tmp_path)
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if _holds(p, marker)]
    assert left == []


def _holds(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
