"""Decoding ahead: order, back-pressure, errors in their place, and an encoder that does not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdit import extract
from stdit.config import ExtractBucket, ExtractConfig
from stdit.config.extract import WindowsConfig
from stdit.data import decoder_pool
from stdit.data import extractor as room
from stdit.data.decoder_pool import PREFETCH_FACTOR, DecoderPool, decoder_workers
from stdit.data.extraction import plan_extraction, read_report, report_lines
from stdit.data.subprocess_decoder import SubprocessDecoder
from tests.support import clip_folder
from tests.support.videos import lossless, smooth

# Plays five grey frames, but for files that crash it, or hang with the interpreter's lock held.
FAKE_DECORD = """
import ctypes, os, signal, sys
import numpy as np
class DECORDError(Exception): pass
DECORDLimitReachedError = DECORDError
cpu = lambda number: None
class Batch(np.ndarray):
    def asnumpy(self): return np.asarray(self)
class VideoReader:
    def __init__(self, path, **settings):
        name = os.path.basename(path)
        if name.startswith("crash"): os.kill(os.getpid(), signal.SIGSEGV)
        if name.startswith("hang"): ctypes.PyDLL(None).sleep(1000)
        self.level = int(name[5:-4])
    def __len__(self): return 5
    def get_avg_fps(self): return 24.0
    def get_key_indices(self): return [0]
    def get_batch(self, indices):
        frames = np.full((len(indices), 16, 16, 3), self.level, np.uint8)
        return (frames + np.array(indices, np.uint8)[:, None, None, None]).view(Batch)
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_from_as_many_threads_and_no_more_than_are_taken(workers: int) -> None:
    begun, threads = [], set()

    def tasks() -> Iterator[int]:
        for i in range(40):
            begun.append(i)
            yield i

    def work(decoder: SubprocessDecoder, task: int) -> int:
        threads.add(decoder)
        time.sleep(0.002 * (task % 3))
        return task

    with DecoderPool("auto", 1, workers) as pool:
        for taken, result in enumerate(pool.map(work, tasks())):
            assert result == taken
            assert len(begun) <= taken + 1 + PREFETCH_FACTOR * workers
    assert len(threads) == workers


def test_an_error_is_raised_where_its_result_would_be() -> None:
    def work(decoder: SubprocessDecoder, task: int) -> int:
        return 1 // (3 - task)

    with DecoderPool("auto", 1, 4) as pool:
        found = pool.map(work, range(8))
        assert [next(found) for _ in range(3)] == [0, 0, 1]
        with pytest.raises(ZeroDivisionError):
            next(found)
        assert list(pool.map(work, [1])) == [0]


def test_auto_is_a_process_per_core_shared_by_encoders_and_fewer_for_few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "available_cores", lambda: 12)
    found = [decoder_workers("auto", clips, encoders) for clips, encoders in [(None, 1), (10_000, 4), (33, 1), (0, 99)]]
    assert found == [12, 3, 2, 1]
    assert decoder_workers(5, 1, 99) == 5
    monkeypatch.setattr(decoder_pool, "available_cores", lambda: 200)
    assert decoder_workers("auto") == decoder_pool.MOST_WORKERS


class SleepingEncoder:
    """Takes as long as a GPU would: `seconds` a clip."""

    identity: dict[str, Any] = {"dtype": "float32"}  # noqa: RUF012
    dtype = torch.float32

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(self.seconds * len(pixels))
        return pixels, None


def test_enough_decoders_keep_an_encoder_busy_and_the_record_says_where_time_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any) -> np.ndarray:
        time.sleep(0.03)
        return np.zeros((1, 8, 8, 3), np.uint8)

    monkeypatch.setattr(SubprocessDecoder, "read", slow)
    made = [{"path": f"{i}.mp4", "caption": "", "frames": 1, "height": 8, "width": 8, "fps": None} for i in range(32)]
    for row in made:
        (tmp_path / row["path"]).write_bytes(b"x")
    buckets = (ExtractBucket(frames=1, height=8, width=8),)
    config = clip_folder.config(tmp_path, made, buckets=buckets, text_encoder=None, clips_per_shard=16, batch_size=4)
    plan = plan_extraction(config, {"video_encoder": {}, "text_encoder": None})
    busy = {}
    for decoders in (1, 4):
        spent = []
        monkeypatch.setattr(room.records, "write_record", lambda *args, to=spent: to.append(args[3]["seconds"]))
        with room.Extractor(config, SleepingEncoder(0.012), None, {}, decoders) as extractor:
            list(extractor.extract_all(plan.shards))
        total = {name: sum(each[name] for each in spent) for name in spent[0]}
        assert total["decode"] >= 32 * 0.03
        assert total["encode"] >= 32 * 0.012
        assert total["encode"] + total["wait"] <= total["total"]
        busy[decoders] = total["encode"] / total["total"]
    assert busy[1] < 0.45  # 0.012 of 0.03 s
    assert busy[4] > 0.7


def test_the_end_of_an_extraction_says_what_the_encoder_waited_for(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, clip_folder.rows(tmp_path, 3))
    told = read_report(extract.run(config))
    seconds = told["seconds"]
    assert all(seconds[name] >= 0 for name in ("decode", "encode", "wait"))
    assert seconds["total"] > 0
    told["seconds"] = {"decode": 6.0, "encode": 1.5, "wait": 0.75, "total": 3.0}
    assert report_lines(told)[-1] == (
        "seconds a clip: 2 decode, 0.5 encode, 0.25 wait; encoders were busy 50% of the time; 25% was waiting for clips: "
        "raise decoder_workers"
    )


def content(config: ExtractConfig) -> tuple[Any, ...]:
    """All that an extraction says and has, but for times."""
    assert isinstance(config.out, Path)
    shards = {path.name: path.read_bytes() for path in (config.out / "shards").iterdir()}
    names = ("index.json", "samples.parquet", "extraction.json")
    return shards, [(config.out / name).read_bytes() for name in names], {**read_report(config.out), "seconds": None}


@pytest.mark.slow
def test_features_are_equal_bit_for_bit_by_any_number_of_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [*clip_folder.rows(tmp_path, 12), *clip_folder.rows(tmp_path / "unstated", 6, stated=False)]
    for row in made[12:]:
        row["path"] = f"unstated/{row['path']}"
    made += clip_folder.damaged(tmp_path)
    lossless(tmp_path / "long.mp4", smooth(60, 16, 16))
    made.append({"path": "long.mp4", "caption": "long", "fps": 24, "frames": 60, "height": 16, "width": 16})
    made += [{"path": "long.mp4", "caption": "part", "start_frame": i, "end_frame": i + 12} for i in (3, 20, 40)]
    monkeypatch.setattr(room, "READ_BYTES", 10 * 16 * 16 * 3)  # long clips are read in groups
    found = {}
    for decoders in (1, 2, 5):
        config = clip_folder.config(
            tmp_path, made, out=tmp_path / f"{decoders}", decoder_workers=decoders, max_bad_share=0.5,
            windows=WindowsConfig(stride=3, max=12),
        )  # fmt: skip
        extract.run(config)
        found[decoders] = content(config)
    assert found[1] == found[2] == found[5]
    assert len(found[1][2]["bad_clips"]) == 4


@pytest.mark.slow
def test_a_decoder_that_crashes_or_hangs_costs_one_clip_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    source, made = lossless(tmp_path / "source.mp4", smooth(5, 16, 16)).read_bytes(), []
    for i in range(24):
        name = f"crash{i}.mp4" if i % 8 == 3 else f"hang{i}.mp4" if i == 12 else f"clip_{i}.mp4"
        (tmp_path / name).write_bytes(source)
        made.append({"path": name, "caption": "", "fps": 24, "frames": 5, "height": 16, "width": 16})
    found = {}
    for decoders in (1, 3):
        config = clip_folder.config(
            tmp_path, made, out=tmp_path / f"{decoders}", decoder_workers=decoders, decoder="decord",
            decode_timeout_s=15, max_bad_share=0.5, text_encoder=None,
        )  # fmt: skip
        extract.run(config)
        found[decoders] = content(config)
    assert found[1] == found[3]
    reasons = {clip["path"]: clip["reason"] for clip in found[3][2]["bad_clips"]}
    died, hung = "the decoding process died (signal SIGSEGV)", "decoding took more than 15 s and was stopped"
    assert reasons == {"crash3.mp4": died, "crash11.mp4": died, "crash19.mp4": died, "hang12.mp4": hung}


@pytest.mark.slow
def test_closing_ends_what_is_under_way_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for i in range(2):
        lossless(tmp_path / f"hang{i}.mp4", smooth(5, 16, 16))
    pool, children = DecoderPool("decord", 100, 2), []
    failed: list[BaseException] = []

    def read(decoder: SubprocessDecoder, path: Path) -> np.ndarray:
        children.append(decoder)
        return decoder.read(path, [0])

    def consume() -> None:
        try:
            list(pool.map(read, [tmp_path / "hang0.mp4", tmp_path / "hang1.mp4"]))
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    deadline = time.monotonic() + 60
    while sum(decoder._child is not None for decoder in children) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [decoder._child.pid for decoder in children if decoder._child is not None]
    began = time.monotonic()
    pool.close()
    thread.join(30)
    assert time.monotonic() - began < 30
    assert len(failed) == 1
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert all(decoder._child is None for decoder in children)
