from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from stdit.config import ConfigError
from stdit.training.distributed import Ranks, choose_interface, complete_environment
from stdit.training.stopping import Stop, parent_of
from tests.support.rank_pool import Pool, RankError


def test_alone_there_is_nothing_to_agree_on() -> None:
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    assert ranks.is_main
    assert ranks.all_reduce(1.5, 2.0) == [1.5, 2.0]
    assert ranks.broadcast(lambda: "x") == "x"
    assert torch.equal(ranks.all_gather(torch.ones(2)), torch.ones(2))


def meet(fail: bool) -> list[object]:
    from stdit.training.engine import init_distributed

    ranks = init_distributed()

    def look_up() -> int:
        if fail:
            raise ValueError("rank 0 found nothing")
        return 10 + ranks.rank

    part = torch.full((2, 1), float(ranks.rank))
    return [
        ranks.all_reduce(1.0, float(ranks.rank)),
        ranks.broadcast(look_up),
        ranks.all_gather(part).flatten().tolist(),
    ]


@pytest.mark.distributed
def test_ranks_agree_also_on_what_rank_0_failed_at(pair: Pool) -> None:
    assert pair(meet, False) == [[[2.0, 1.0], 10, [0.0, 0.0, 1.0, 1.0]]] * 2
    with pytest.raises(RankError, match="rank 0 found nothing") as error:
        pair(meet, True)
    assert error.value.kind == "ValueError"
    # And are in step afterwards.
    assert pair(meet, False)[1][1] == 10


def own_interface() -> tuple[str, str]:
    """An interface of this machine that is not loopback, and its address."""
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return name, entry.address
    pytest.skip("this machine has no address but loopback")


@pytest.mark.parametrize(
    ("local_size", "preset", "expected"),
    [("1", None, "{own}"), (None, None, "{own}"), ("2", None, None), ("1", "ib0", "ib0")],
)
def test_gloo_takes_the_interface_that_reaches_the_master_where_there_are_several_hosts(
    local_size: str | None, preset: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, address = own_interface()
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "LOCAL_SIZE": local_size, "GLOO_SOCKET_IFNAME": preset}
    for key, value in {"LOCAL_WORLD_SIZE": None, **environment}.items():
        monkeypatch.setenv(key, value or "")
        if value is None:
            monkeypatch.delenv(key)
    choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == (expected and expected.format(own=name))


def test_a_master_on_loopback_is_refused_where_there_are_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        ConfigError, match=r"MASTER_ADDR localhost is (127\.0\.0\.1|::1) on this host.*GLOO_SOCKET_IFNAME"
    ):
        choose_interface()
    monkeypatch.delenv("LOCAL_SIZE")  # ranks of this host alone, for all that is known
    choose_interface()


def test_a_request_keeps_its_first_reason() -> None:
    stop = Stop()
    assert not stop
    stop.request("one")
    stop.request("two")
    assert stop
    assert stop.reason == "one"


WATCHER = """
import os, sys, time
from stdit.training.stopping import Stop
stop = Stop().listen()
stop.start_training()
print(os.getpid(), flush=True)
for _ in range(200):
    if stop:
        break
    time.sleep(0.05)
open(sys.argv[1], "w").write(stop.reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="death of a parent is told by Linux alone")
@pytest.mark.parametrize("launched", [True, False])
def test_the_launchers_death_is_noticed_and_a_shells_is_not(launched: bool, tmp_path: object) -> None:
    said = f"{tmp_path}/said"
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | ({"LOCAL_RANK": "0"} if launched else {})
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WATCHER!r}, {said!r}])"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent_of(child) == parent.pid
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while launched and not os.path.exists(said) and time.monotonic() < until:
        time.sleep(0.05)
    if launched:
        with open(said) as file:
            gone = "the process that started this one"  # the last one: before the thread that watches had begun
            assert file.read() in ("SIGTERM", f"{gone} is gone", f"{gone} was gone from the start")
    else:
        time.sleep(1.5)
        assert not os.path.exists(said)
        os.kill(child, 9)


def test_plain_python_gets_what_a_launcher_would_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that monkeypatch takes away what complete_environment leaves.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    complete_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert os.environ["MASTER_PORT"] == "0"  # the system picks one
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4 but MASTER_PORT is not set"):
        complete_environment()
