"""Hosts on this machine: each has a network, a name and processes of its own (Linux namespaces), and a link joins them.

Everything ends with the processes that hold the namespaces, so that nothing of it stays in the machine. Needs root and
iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from tests.support.launches import environment, wait_for
from tests.support.paths import ROOT

DEVICE = "net0"
# Longest that a command may take to set something up.
SET_UP_S = 20.0


class Program:
    """A command that runs on a host, and what it printed."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Its exit code. subprocess.TimeoutExpired: it still runs."""
        return self.process.wait(timeout_s)


class Host:
    """A host: .name, .address. Its network outlives its processes, as a real one's does to those who talk to it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = f"host{number}", f"10.77.0.{number}", folder
        self._network = subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sleep", "infinity"])
        wait_for(lambda: Path(f"/proc/{self._network.pid}/comm").read_text() == "sleep\n", SET_UP_S, 0.01)
        self._init: subprocess.Popen[bytes] | None = None
        self._programs = 0

    @property
    def pid(self) -> int:
        """Of the process that holds its network."""
        return self._network.pid

    def configure(self, names: str) -> None:
        """Gives it its address, its name and /etc/hosts, and starts it; the link is there already."""
        hosts = self.folder / f"{self.name}.hosts"
        hosts.write_text(names)
        self.administer(
            f"echo {self.name} > /proc/sys/kernel/hostname; mount --bind {hosts} /etc/hosts; ip link set lo up; "
            f"ip address add {self.address}/24 dev {DEVICE}; ip link set {DEVICE} up; "
            # By the way to anywhere programs find their own address; files in memory and Ray's sockets are a host's
            # own.
            f"ip route add default dev {DEVICE}; mount -t tmpfs tmpfs /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray"
        )
        self.start()

    def administer(self, script: str) -> None:
        """Runs shell commands in its network."""
        command = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "sh", "-e", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SET_UP_S)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {script}: {done.stderr.strip()}")

    def start(self) -> None:
        """Starts its first process, with which all others end."""
        inner = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"]
        # Killed, unshare says that it could not unblock its signals.
        command = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", *inner]
        self._init = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(
            lambda: [child.name() for child in psutil.Process(self._init_pid()).children()] == ["sleep"], SET_UP_S, 0.01
        )

    def _init_pid(self) -> int:
        assert self._init is not None, f"{self.name} is not running"
        return self._init.pid

    def enter(self) -> list[str]:
        """The beginning of a command that runs its remainder here, in the repository's folder."""
        (first,) = psutil.Process(self._init_pid()).children()
        return ["nsenter", "-t", str(first.pid), "-n", "-u", "-m", "-p", "env", f"--chdir={ROOT}"]

    def run(self, command: list[str], **variables: str) -> Program:
        """Starts a command; `variables` are laid over the tests' environment."""
        self._programs += 1
        log = self.folder / f"{self.name}-{self._programs}.log"
        return Program([*self.enter(), *command], log, environment() | variables)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once; its network stays."""
        if self._init is not None:
            with suppress(psutil.NoSuchProcess):
                for first in psutil.Process(self._init.pid).children():
                    first.kill()
            self._init.kill()
            self._init.wait()
            self._init = None

    def link(self, state: str) -> None:
        """`up`, or `down`: nothing comes through, in either direction, and nobody is told."""
        self.administer(f"ip link set {DEVICE} {state}")

    def limit(self, rate: str) -> None:
        """What it sends goes out at `rate` at most (10mbit)."""
        self.administer(f"tc qdisc replace dev {DEVICE} root tbf rate {rate} burst 32kb latency 1s")

    def close(self) -> None:
        """Ends it."""
        self.kill()
        self._network.kill()
        self._network.wait()


@contextmanager
def hosts(folder: Path, names: str = "127.0.0.1 localhost\n") -> Iterator[tuple[Host, Host]]:
    """Two hosts, joined by a link. names: what their /etc/hosts say; {name} is the host's own."""
    first, second = Host(1, folder), Host(2, folder)
    try:
        command = ["ip", "link", "add", "name", DEVICE, "netns", str(first.pid), "type", "veth"]
        command += ["peer", "name", DEVICE, "netns", str(second.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SET_UP_S)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        for host in (first, second):
            host.configure(names.format(name=host.name))
        yield first, second
    finally:
        first.close()
        second.close()


@cache
def unavailable() -> str | None:
    """Why hosts can't be made on this machine; None: they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are network namespaces, which need root on Linux"
    if absent := [name for name in ("unshare", "nsenter", "ip", "tc") if shutil.which(name) is None]:
        return f"hosts are network namespaces, which need {', '.join(absent)} (util-linux, iproute2)"
    done = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"hosts can't be made: {done.stderr.decode().strip()}" if done.returncode else None
