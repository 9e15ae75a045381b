"""Seconds that ranks exchange: counted where they are spent, and nothing else changes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from stdit.training.exchange import TimedBackend, timed_collectives
from tests.support.rank_jobs import for_ranks, numbers, run, run_with_slow_rank, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.rank_pool import Pool

SLEEP = 0.2


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_waits_for_another_counts_it_as_exchange(pair: Pool, tmp_path: Path, stage: int) -> None:
    data = settings(tmp_path, train={"zero_stage": stage, "steps": 4, "log_every": 1})
    data["data"]["buckets"] = for_ranks(2)
    found = pair(run_with_slow_rank, data, 1, SLEEP)[0]
    for entry in found["metrics"]:
        assert entry["seconds_exchange"] > 0.7 * SLEEP
        sections = ("forward", "backward", "optimizer")
        # The end of a step, too, is an exchange, and no section.
        assert entry["seconds_exchange"] < sum(entry[f"seconds_{name}"] for name in sections) + 0.1 * SLEEP
    assert "in exchange between ranks" in found["said"]


@pytest.mark.distributed
def test_a_rank_alone_has_no_exchange(solo: Pool, tmp_path: Path) -> None:
    (found,) = solo(run, settings(tmp_path, train={"steps": 2}))
    assert not any("seconds_exchange" in entry for entry in found["metrics"])
    assert "exchange" not in found["said"]
    assert numbers(found["metrics"])


def test_collectives_and_their_waits_are_timed_and_all_else_is_the_backends_own() -> None:
    log: list[str] = []

    @contextmanager
    def section() -> Iterator[None]:
        log.append("in")
        yield
        log.append("out")

    def collective(name: str, answer: Any) -> Any:
        return lambda *args, **kwargs: (log.append(f"{name}{args}{kwargs}"), answer)[1]

    work = SimpleNamespace(wait=collective("wait", "waited"), is_completed=lambda: True)
    backend = SimpleNamespace(all_reduce=collective("all_reduce", None), all_gather=collective("all_gather", work), get_rank=lambda: 3)  # fmt: skip
    timed = TimedBackend(backend, section)
    assert timed.get_rank() == 3
    assert timed.all_reduce(1, op="sum") is None
    pending = timed.all_gather()
    assert pending.is_completed()
    assert pending.wait(5) == "waited"
    assert log == ["in", "all_reduce(1,){'op': 'sum'}", "out", "in", "all_gather(){}", "out", "in", "wait(5,){}", "out"]


def test_deepspeed_gets_its_own_backend_back() -> None:
    from deepspeed.comm import comm

    module: Any = comm
    before = module.cdb
    with pytest.raises(ZeroDivisionError), timed_collectives(lambda: pytest.fail("not called")):
        assert isinstance(module.cdb, TimedBackend)
        raise ZeroDivisionError
    assert module.cdb is before


def test_every_collective_timed_is_one_of_deepspeeds() -> None:
    from deepspeed.comm.torch import TorchBackend

    from stdit.training.exchange import COLLECTIVES

    assert all(hasattr(TorchBackend, name) for name in COLLECTIVES)
