"""The time limit of a file (`stall_timeout_s`) while it is opened: each packet and frame read is progress."""

from __future__ import annotations

from pathlib import Path

from stdit.curation.analysis import analyse
from tests.support.videos import encode, smooth


def test_counting_the_frames_of_a_file_without_times_is_progress(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", smooth(30, 48, 64), "mpeg4")
    reported: list[int] = []
    found = analyse(path, reported.append)
    assert found.frame_count == 30
    opening, decoding = reported[:-30], reported[-30:]
    assert decoding == list(range(30))
    # Packets are listed, the empty one at the end too; then frames are counted.
    assert opening == [0] * (31 + 30)


def test_a_file_with_times_is_not_decoded_to_be_opened(tmp_path: Path) -> None:
    reported: list[int] = []
    analyse(encode(tmp_path / "a.mp4", smooth(30, 48, 64), "mpeg4"), reported.append)
    assert reported == [0] * 31 + list(range(30))
