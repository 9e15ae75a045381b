"""Out of memory: the message of a step that did not fit, and the search for a batch size that does."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from stdit import find_batch_size
from stdit.find_batch_size import Try, search
from stdit.training.out_of_memory import is_out_of_memory
from tests.support.rank_jobs import run_out_of_memory, settings
from tests.support.rank_pool import Pool, RankError


def test_allocations_that_fail_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(None)


@pytest.mark.distributed
def test_a_step_that_does_not_fit_names_bucket_shape_tokens_and_what_would(solo: Pool, tmp_path: Path) -> None:
    data = settings(tmp_path, train={"zero_stage": 1, "steps": 9})
    data["data"]["buckets"] = [{"frames": 4, "height": 8, "width": 8, "batch_size": 8}]
    with pytest.raises(RankError) as error:
        solo(run_out_of_memory, data, 3)
    assert error.value.kind == "OutOfMemory"
    said = error.value.message
    assert said.startswith(
        "step 3: out of memory in bucket 4x8x8 (latent 4 x 8 x 8, 64 tokens, micro-batches of 8), for 1.07e+09 GiB more. "
    )
    for part in ("data.buckets[0].batch_size: 4 (", "train.activation_checkpointing: true (", "stdit find-batch-size"):
        assert part in said
    # The estimate of half the batch is smaller.
    estimates = [
        re.findall(pattern, said) for pattern in (r"a rank takes ([\d.e-]+) GiB", r"batch_size: 4 \(([\d.e-]+) GiB")
    ]
    (whole,), (half,) = estimates
    assert float(half) < float(whole)


@quick(deadline=None)
@given(limit=st.integers(0, 300), start=st.integers(1, 64), most=st.integers(1, 256), tries=st.integers(1, 12))
def test_the_search_is_bounded_and_finds_the_largest_that_fits(limit: int, start: int, most: int, tries: int) -> None:
    found = list(search(lambda size: Try(size, size <= limit), start, most, tries))
    sizes = [each.size for each in found]
    assert len(sizes) <= tries
    assert len(set(sizes)) == len(sizes)
    assert all(1 <= size <= most for size in sizes)
    unbounded = list(search(lambda size: Try(size, size <= limit), start, most, 99))
    assert max((each.size for each in unbounded if each.fits), default=0) == min(limit, most)


def config_file(folder: Path, **changes: Any) -> Path:
    import yaml

    data = settings(folder / "run", **changes)
    data["data"]["buckets"] = [{"frames": 4, "height": 32, "width": 32, "batch_size": 2}]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_a_try_says_what_fits_in_real_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    # 4 GiB hold two samples of 1,024 tokens, not 2**14 of them.
    command = ["--config", str(path), "--memory", "4", "--tries", "2", "--most", "16384"]
    assert (
        find_batch_size.main(
            [*command, "--set", "data.buckets=[{frames: 4, height: 32, width: 32, batch_size: 16384}]"]
        )
        == 1
    )
    lines = capfd.readouterr()
    assert "out of memory" in lines.out or "ended by SIG" in lines.out
    assert "nothing fits of bucket 4x32x32" in lines.err
    assert find_batch_size.main(["--config", str(path), "--memory", "4", "--tries", "1"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert re.match(r"4x32x32 +2  fits +[\d.]+ GiB +[\d.]+$", out[1])
    assert out[2] == "data.buckets[0].batch_size: 2   # 4x32x32"
    assert not (tmp_path / "run").exists()
    # The limit is the tries' own.
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_what_cannot_be_tried_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    for extra, said in (
        (["--set", "train.sequence_parallel=2"], "train.sequence_parallel is 2, but a try has one rank"),
        (["--bucket", "1x8x8"], "--bucket 1x8x8: the config has 4x32x32"),
        (["--tries", "0"], "--most, --tries, --timeout and --memory: expected numbers above 0"),
        (["--set", "model.hidden_sise=3"], "model.hidden_sise: unknown key"),
    ):
        assert find_batch_size.main(["--config", str(path), *extra]) == 2
        assert said in capsys.readouterr().err
