"""What Linux alone has is not needed: affinity masks, /proc, cgroups, glibc's mallopt, prctl. macOS has none of
them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from stdit import cores, memory
from stdit.ops import onednn
from stdit.training import deepspeed_config, deferred, launcher, performance, stopping
from tests.support.launches import environment, metrics
from tests.support.paths import ROOT

# -------------------------------------------------------------------------------------------- cores


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 12 cores, 8 of which this process may use. Files of cgroup 2 and 1 may be put into the folder."""
    one, two = tmp_path / "cpu.max", (tmp_path / "cpu.cfs_quota_us", tmp_path / "cpu.cfs_period_us")
    monkeypatch.setattr(cores, "CGROUP_QUOTAS", ((one,), two))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 10)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    return tmp_path


def test_cores_are_those_of_the_affinity_mask_or_of_the_machine_where_there_is_none(
    quota: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cores.available_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.available_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.available_cores() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.cfs_quota_us": "300000\n"}, 8),
    ],
)
def test_cores_are_no_more_than_a_containers_quota_rounded_up(
    quota: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (quota / name).write_text(text)
    assert cores.available_cores() == expected


# ------------------------------------------------------------------------------------------- others


def test_memory_of_the_host_is_known_where_sysconf_has_no_name_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = memory.host_memory()

    sysconf = os.sysconf

    def unknown(name: str) -> int:
        if name == "SC_PHYS_PAGES":
            raise ValueError(f"unrecognized configuration name: {name}")
        return sysconf(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert memory.host_memory() == pytest.approx(expected, rel=1e-3)


def test_resident_memory_is_in_bytes_on_macos_and_in_kilobytes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance.resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 5000}))
    found = []
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(performance.sys, "platform", platform)
        found.append(performance.peak_memory(torch.device("cpu")))
    assert found == [5000 * 1024, 5000]


def test_models_are_built_without_memory_where_malloc_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred.ctypes, "CDLL", lambda _: object())
    with deferred.freed_memory_returned(), deferred.DeferredTensors(smallest=0) as tensors:
        layer = torch.nn.Linear(4, 4)
    with tensors.resident(layer.weight):
        assert layer.weight.isfinite().all()


def test_processors_are_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    onednn._vendor.cache_clear()
    monkeypatch.setattr(Path, "read_text", no_proc)
    monkeypatch.setattr(Path, "read_bytes", no_proc)
    try:
        assert onednn._vendor() is None
        assert stopping.ancestors() == ()
    finally:
        onednn._vendor.cache_clear()


def test_a_child_needs_no_prctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping.sys, "platform", "darwin")
    monkeypatch.setattr(stopping.ctypes, "CDLL", lambda _: pytest.fail("prctl is Linux's"))
    stopping.die_with_parent(os.getppid())


@pytest.mark.parametrize("cuda", [False, True])
def test_deepspeed_runs_on_the_cpu_unless_there_is_cuda(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "removed at the end")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # Apple's MPS is one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    deepspeed_config.set_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == (None if cuda else "cpu")


@pytest.mark.parametrize(("platform", "chosen"), [("linux", None), ("darwin", "cpu")])
def test_so_does_its_launcher_on_macos(
    platform: str, chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        pid = 0

        def __init__(self, *_: Any, env: dict[str, str] | None, **__: Any) -> None:
            assert (os.environ if env is None else env).get("DS_ACCELERATOR") == chosen

        def poll(self) -> int:
            return 2

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(launcher.sys, "platform", platform)
    monkeypatch.setattr(launcher.subprocess, "Popen", Process)
    assert launcher.launch(2, [], cast(Any, SimpleNamespace(run_dir=tmp_path))) == 2


# ------------------------------------------------------------------------------------ a whole run


# Read by every process at its start. Libraries may read /proc: they have their own ways on other systems.
WITHOUT_LINUX = """
import os, select, signal, sys
with open({log!r}, "a") as file:
    file.write(f"{{sys.orig_argv}}\\n")
LINUX = {{
    os: "sched_ fdatasync posix_fadvise posix_fallocate memfd_create eventfd pidfd_open copy_file_range splice getrandom O_DIRECT O_TMPFILE "
        "O_NOATIME getxattr setxattr listxattr removexattr",
    signal: "SIGRTMIN SIGRTMAX SIGPOLL SIGPWR SIGSTKFLT sigwaitinfo sigtimedwait",
    select: "epoll",
}}
for module, names in LINUX.items():
    for name in [n for n in vars(module) if n.startswith(tuple(names.split()))]:
        delattr(module, name)

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(("/proc", "/sys")):
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__") in ("pathlib", "io", "codecs"):
            frame = frame.f_back
        if frame and frame.f_globals.get("__name__", "").startswith("stdit"):
            raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_a_run_of_two_ranks_needs_nothing_of_linux(tmp_path: Path) -> None:
    shim, log = tmp_path / "shim", tmp_path / "processes"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(WITHOUT_LINUX.format(log=str(log)))
    variables = environment()
    variables = variables | {"PYTHONPATH": os.pathsep.join([str(shim), str(ROOT), variables.get("PYTHONPATH", "")])}
    del variables["OMP_NUM_THREADS"]  # ranks count the cores
    command = [sys.executable, "-m", "stdit.cli", "train", "--config", "configs/debug.yaml", "--nproc", "2"]
    command += ["--set", f"run_dir={tmp_path / 'run'}", "--set", "train.steps=2"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 2
    assert log.read_text().count("stdit/train.py") >= 2
