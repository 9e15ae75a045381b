"""Decoding in a child: the same frames, and neither a hang nor a crash reaches the parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stdit.data.decoding import ClipInfo, DecodeError, DecodeTimeout
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.data.transforms import resize_crop
from tests.support.videos import encode, lossless, smooth

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 64, 80, 3), np.uint8)
# sleep() called so that the interpreter's lock stays held, as in dmlc/decord#373.
HANG = "import ctypes\nctypes.PyDLL(None).sleep(1000)\n"
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lossless(tmp_path_factory.mktemp("clip") / "a.mp4", FRAMES)


@pytest.fixture(scope="module")
def decoder():
    with SubprocessDecoder() as decoder:
        yield decoder


def fake_decord(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (folder / "decord.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_frames_are_the_readers(decoder: SubprocessDecoder, clip: Path) -> None:
    assert decoder.probe(clip) == ClipInfo(9, 24.0, 64, 80)
    assert (decoder.read(clip, [8, 0, 3]) == FRAMES[[8, 0, 3]]).all()
    assert (decoder.read(clip, range(2), size=(32, 32)) == resize_crop(FRAMES[:2], 32, 32)).all()


def test_frames_are_resized_in_pieces_that_fit_memory(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit.data.subprocess_decoder.CHUNK_BYTES", 1)
    from stdit.data.subprocess_decoder import _answer

    answer, frames = _answer({"path": str(clip), "indices": list(range(9)), "size": [32, 40], "decoder": "auto"})
    assert answer["shape"] == (9, 32, 40, 3)
    assert frames is not None
    assert (frames == resize_crop(FRAMES, 32, 40)).all()


def test_one_child_serves_good_clips_after_bad_ones(decoder: SubprocessDecoder, clip: Path, tmp_path: Path) -> None:
    decoder.read(clip, [0])
    child = decoder._child
    (tmp_path / "text.mp4").write_text("hello " * 100)
    bad = [
        (tmp_path / "none.mp4", [0], None, "no such file"),
        (tmp_path / "text.mp4", [0], None, "is a text file"),
        (clip, [9], None, "frame 9 was asked for, the clip has 9"),
        (clip, [0], (65, 80), "does not cover 65x80, and clips are never enlarged"),
    ]
    for path, indices, size, reason in bad:
        with pytest.raises(DecodeError) as caught:
            decoder.read(path, indices, size)
        assert reason in caught.value.reason
        assert caught.value.path == str(path)
    assert (decoder.read(clip, [4]) == FRAMES[[4]]).all()
    assert decoder._child is child


def test_a_hang_is_stopped_in_time(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, HANG)
    began = time.monotonic()
    with SubprocessDecoder("decord", timeout_s=1) as decoder:
        with pytest.raises(DecodeTimeout, match=r"took more than 1 s and was stopped"):
            decoder.read(clip, [0])
        assert decoder._child is None
    assert time.monotonic() - began < 10


def test_a_long_video_that_is_opened_has_the_time_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each packet that is listed takes 0.2 s: opening takes twice the limit, and a step of it a fraction.
    clip = encode(tmp_path / "a.avi", smooth(12, 48, 64), "mpeg4")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nimport stdit.data.decoding as d\n"
        "reported = d._reported\n"
        "def slow(items, progress):\n    for item in reported(items, progress):\n        time.sleep(0.2)\n        yield item\n"
        "d._reported = slow\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    with SubprocessDecoder("pyav", timeout_s=2.5) as decoder:
        began = time.monotonic()
        assert decoder.probe(clip).frame_count == 12
        assert time.monotonic() - began > 4
        assert decoder.read_part(clip, [11], None).shape == (1, 48, 64, 3)


def test_a_crash_is_a_reason(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, CRASH)
    with SubprocessDecoder("decord", timeout_s=20) as decoder:
        for _ in range(2):
            with pytest.raises(DecodeError, match=r"the decoding process died \(signal SIGSEGV\)"):
                decoder.read(clip, [0])


def test_a_child_killed_between_clips_is_replaced(clip: Path) -> None:
    with SubprocessDecoder("pyav") as decoder:
        decoder.read(clip, [0])
        assert decoder._child is not None
        os.kill(decoder._child.pid, signal.SIGKILL)
        decoder._child.wait()
        assert (decoder.read(clip, [1]) == FRAMES[[1]]).all()


def test_a_worn_out_child_is_replaced(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit.data.subprocess_decoder.CLIPS_PER_CHILD", 2)
    pids = []
    with SubprocessDecoder("pyav") as decoder:
        for _ in range(4):
            decoder.read(clip, [0])
            assert decoder._child is not None
            pids.append(decoder._child.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_file_in_the_working_folder_shadows_nothing(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with SubprocessDecoder("pyav") as decoder:
        assert decoder.probe(clip).frame_count == 9


def _read_in_fork(path: Path, decoder: SubprocessDecoder, queue: "multiprocessing.Queue[bool]") -> None:
    queue.put(bool((decoder.read(path, [2]) == FRAMES[[2]]).all()))


def test_a_forked_worker_gets_a_child_of_its_own(clip: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with SubprocessDecoder("pyav") as decoder:
        decoder.read(clip, [0])
        fork = context.Process(target=_read_in_fork, args=(clip, decoder, queue))
        fork.start()
        assert queue.get(timeout=60)
        fork.join(60)
        assert (decoder.read(clip, [1]) == FRAMES[[1]]).all()


def test_the_child_ends_with_its_parent(clip: Path) -> None:
    code = f"""
import os, signal
from stdit.data.subprocess_decoder import SubprocessDecoder
decoder = SubprocessDecoder("pyav")
decoder.read({str(clip)!r}, [0])
print(decoder._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
            break  # ended, and nobody in this container collects orphans
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}").exists()
