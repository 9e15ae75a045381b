"""Cuts, dissolves and fades of generated films are found, flashes and movement are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stdit.config import CutsConfig
from stdit.curation.analysis import Analysis, analyse
from stdit.curation.footage import Detection, compare, make_film
from stdit.curation.transitions import Transition, find_transitions, shots
from stdit.media import write_video
from tests.support.videos import encode, smooth


def measure(seeds: range, folder: Path) -> dict[str, Detection]:
    counts: dict[str, Detection] = {}
    for seed in seeds:
        film = make_film(seed, "test", shots=6)
        write_video(folder / "film.mp4", film.frames, film.fps)
        compare(film.transitions, find_transitions(analyse(folder / "film.mp4"), CutsConfig()), counts)
    return counts


def test_cuts_of_two_films_are_found_at_their_frames(tmp_path: Path) -> None:
    counts = measure(range(2), tmp_path)
    cuts, dissolves = counts["cut"], counts["dissolve"]
    assert (cuts.missed, cuts.false) == (0, 0)
    assert dissolves.recall >= 0.8
    assert dissolves.false <= 2


@pytest.mark.slow
def test_precision_and_recall_over_many_films(tmp_path: Path) -> None:
    counts = measure(range(100, 130), tmp_path)
    assert counts["cut"].recall >= 0.98
    assert counts["cut"].precision >= 0.98
    assert counts["dissolve"].recall >= 0.9
    assert counts["dissolve"].precision >= 0.9


def test_a_flash_a_lamp_and_movement_are_no_cut(tmp_path: Path) -> None:
    frames = smooth(72, 96, 128).astype(np.float32)
    frames[24:26] = 255 - (255 - frames[24:26]) * 0.1
    frames[48:] = (frames[48:] * 0.6).clip(0, 255)
    found = find_transitions(analyse(encode(tmp_path / "a.mp4", frames.astype(np.uint8))), CutsConfig())
    assert [t for t in found if t.kind == "cut"] == []


def test_an_analysis_comes_back_from_its_bytes(tmp_path: Path) -> None:
    found = analyse(encode(tmp_path / "a.mp4", smooth(30, 48, 64)))
    again = Analysis.loads(found.dumps())
    assert (again.fps, again.segments, again.frame_count) == (found.fps, found.segments, 30)
    for mine, theirs in ((found.frames, again.frames), (found.samples, again.samples)):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name])


def test_numbers_do_not_depend_on_the_size_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", smooth(150, 32, 48))
    whole = analyse(path)
    monkeypatch.setattr("stdit.curation.analysis.CHUNK", 17)
    for name, values in analyse(path).frames.items():
        np.testing.assert_allclose(
            values.astype(float), whole.frames[name].astype(float), rtol=2e-3, atol=2e-3, err_msg=name
        )


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("a.mp4", "libx264", "yuv420p10le"), ("a.mkv", "ffv1", "yuv444p"), ("a.webm", "libvpx-vp9", "yuv420p")],
)
def test_other_formats_are_analysed(name: str, codec: str, pixels: str, tmp_path: Path) -> None:
    found = analyse(encode(tmp_path / name, smooth(30, 50, 66), codec, pixels))
    assert found.segments == [(0, 30)]
    assert (found.height, found.width) == (50, 66)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (None, [(0, 40, False, True), (50, 100, True, False)]),
        ((45, 90), [(50, 90, True, False)]),
        ((10, 45), [(10, 40, False, True)]),
        ((42, 48), []),
        ((50, 90), [(50, 90, False, False)]),
    ],
)
def test_limits_within_a_dissolve_leave_its_frames_out(
    limits: tuple[int, int] | None, expected: list[tuple[int, int, bool, bool]]
) -> None:
    analysis = Analysis(24.0, 8, 8, 100, segments=[(0, 100)])
    assert shots(analysis, [Transition(40, 50, "dissolve")], limits) == expected
