"""The embedded data: lossless small clips, scans split once, and a second call that does nothing."""

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from stdit.data import digits, manifest
from stdit.data.decoding import open_clip
from stdit.data.digits import (
    CLIP_CAPTIONS,
    DIRECTIONS,
    IMAGE_CAPTIONS,
    WORDS,
    DigitsOptions,
    Shape,
    caption,
    draw,
    make_digits,
    read_scans,
)
from stdit.data.manifest import Clip

OPTIONS = DigitsOptions(
    shapes=(Shape(1, 12, 12, 8, 2), Shape(3, 12, 14, 8, 1), Shape(4, 20, 20, 11, 1)), speed=1.5, scans=300
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 scans in three shapes."""
    out = tmp_path_factory.mktemp("digits") / "out"
    make_digits(out, OPTIONS, workers=2)
    return out


@pytest.fixture(scope="module")
def clips(made: Path) -> list[Clip]:
    return list(manifest.read(made / "manifest.jsonl"))


def frames_of(clip: Clip) -> np.ndarray:
    with open_clip(clip.file, "pyav") as reader:
        return reader.get(range(reader.frame_count))


def clips_of_shape(clips: list[Clip], shape: Shape, count: int) -> list[Clip]:
    found = [c for c in clips if (c.frames, c.height, c.width) == shape[:3]]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]


def test_the_manifest_holds_for_every_file(clips: list[Clip]) -> None:
    assert len(clips) == 300 * 4
    assert [manifest.file_problem(c) for c in clips] == [None] * len(clips)
    for shape in OPTIONS.shapes:
        for clip in clips_of_shape(clips, shape, 40):
            frames = frames_of(clip)
            assert frames.shape == (clip.frames, clip.height, clip.width, 3)
            with open_clip(clip.file) as reader:
                assert reader.fps == (clip.fps or 0)
                assert (reader.get(range(reader.frame_count)) == frames).all()
            assert (clip.extra["direction"] is None) == (clip.frames == 1) == clip.key.endswith(".png")


def test_no_scan_stands_in_both_splits(clips: list[Clip]) -> None:
    scans = {split: {c.extra["scan"] for c in clips if c.split == split} for split in ("train", "validation")}
    assert {c.split for c in clips} == set(scans)
    assert not scans["train"] & scans["validation"]
    assert len(scans["train"] | scans["validation"]) == 300
    assert len(scans["validation"]) == 60
    whole = read_scans(0, 0.2)
    assert sorted(s.number for s in whole) == list(range(1797))
    assert sum(s.split == "validation" for s in whole) == 359
    assert {c.class_name for c in clips if c.split == "validation"} == set("0123456789")


def test_no_picture_of_a_scan_stands_in_both_splits(clips: list[Clip]) -> None:
    """The same by pixels, so that the manifest is not its own witness."""
    flat, labels = load_digits(return_X_y=True)
    known = {np.rint(x * (255 / 16)).astype(np.uint8).tobytes(): i for i, x in enumerate(np.asarray(flat))}
    assert len(known) == 1797
    seen: dict[int, set[str]] = {}
    for shape in OPTIONS.shapes[:2]:  # those that draw the scan pixel for pixel
        for clip in clips_of_shape(clips, shape, 400):
            canvas = frames_of(clip)[-1, :, :, 0]
            windows = np.lib.stride_tricks.sliding_window_view(canvas, (8, 8)).reshape(-1, 64)
            numbers = {known[w.tobytes()] for w in windows if w.tobytes() in known}
            assert clip.extra["scan"] in numbers
            assert {str(np.asarray(labels)[n]) for n in numbers} == {clip.class_name}
            seen.setdefault(numbers.pop(), set()).add(clip.split)
    assert all(len(splits) == 1 for splits in seen.values())


def test_the_digit_moves_where_the_manifest_says_and_never_leaves_the_canvas(clips: list[Clip]) -> None:
    for shape in OPTIONS.shapes[1:]:
        for clip in clips_of_shape(clips, shape, 60):
            frames = frames_of(clip)[..., 0].astype(float)
            ink = frames.sum(axis=(1, 2))
            assert ink == pytest.approx(ink[0])
            rows, columns = np.mgrid[0 : shape.height, 0 : shape.width]
            centre = np.array([[(f * rows).sum(), (f * columns).sum()] for f in frames]) / ink[:, None]
            path = centre[-1] - centre[0]
            wanted = np.array(DIRECTIONS[str(clip.extra["direction"])]) * OPTIONS.path(shape)
            assert path == pytest.approx(wanted)


def test_directions_classes_and_wordings_vary(clips: list[Clip]) -> None:
    moving = [c for c in clips if c.frames != 1]
    for direction in DIRECTIONS:
        share = sum(c.extra["direction"] == direction for c in moving) / len(moving)
        assert 0.18 < share < 0.32
        assert all(direction in c.caption for c in moving if c.extra["direction"] == direction)
    assert len({c.caption for c in moving}) > 300
    for clip in clips:
        digit = int(str(clip.class_name))
        assert WORDS[digit] in clip.caption or str(digit) in clip.caption


def test_no_caption_stands_in_both_splits() -> None:
    random = np.random.default_rng(0)
    seen: dict[str, set[str]] = {"train": set(), "validation": set()}
    for digit in range(10):
        for direction in (*DIRECTIONS, None):
            for split, captions in seen.items():
                drawn = {caption(digit, direction, split, random) for _ in range(200)}
                assert len(drawn) >= 3
                captions |= drawn
    assert not seen["train"] & seen["validation"]


def test_captions_use_every_template_and_the_right_article() -> None:
    random = np.random.default_rng(0)
    found = {caption(8, d, s, random) for d in (*DIRECTIONS, None) for s in ("train", "validation") for _ in range(600)}
    for template in (*CLIP_CAPTIONS, *IMAGE_CAPTIONS):
        fixed = re.sub(r"\{\w\}", ".*", template)
        assert any(re.fullmatch(fixed, text) for text in found), template
    assert not any(re.search(r"\ba (8|eight)\b", text) for text in found)
    assert any("an eight" in text for text in found)
    assert any("to the left" in text for text in found)


def test_scores_rank_scans_within_their_class_and_split() -> None:
    scans = read_scans(0, 0.2)
    assert all(0 <= s.score <= 1 for s in scans)
    assert np.mean([s.score > 0.5 for s in scans]) > 0.95
    for split in ("train", "validation"):
        peers = [s for s in scans if s.split == split and s.digit == 8]
        kept = [s for s in peers if s.rank >= 0.4]
        assert len(kept) / len(peers) == pytest.approx(0.6, abs=0.03)
        assert min(s.score for s in kept) >= max(s.score for s in peers if s.rank < 0.4)


def small(**changes: object) -> DigitsOptions:
    return dataclasses.replace(DigitsOptions(shapes=(Shape(1, 9, 9, 8, 1),), scans=40), **changes)  # pyright: ignore


def test_a_second_call_does_nothing_and_other_options_are_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = make_digits(out, small(), workers=1)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    began = time.monotonic()
    assert make_digits(out, small(), workers=1) == path
    assert time.monotonic() - began < 0.5
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"was made with other options.*--overwrite"):
        make_digits(out, small(seed=1), workers=1)
    first = path.read_bytes()
    make_digits(out, small(seed=1), overwrite=True, workers=1)
    assert path.read_bytes() != first


def test_an_interrupted_call_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, "write_clip", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_digits(out, small(), workers=1)
    assert not (out / "manifest.jsonl").exists()
    assert len(manifest.read(make_digits(out, small(), workers=1))) == 40


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and was not made by this program"):
            make_digits(tmp_path, small(), overwrite=overwrite, workers=1)
    assert (tmp_path / "images" / "mine.png").exists()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        make_digits(tmp_path / "images" / "mine.png", small(), workers=1)


def test_the_result_does_not_depend_on_the_number_of_processes(made: Path, tmp_path: Path) -> None:
    make_digits(tmp_path / "out", OPTIONS, workers=1)
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == (made / "manifest.jsonl").read_bytes()
    for clip in list(manifest.read(made / "manifest.jsonl"))[::97]:
        other = dataclasses.replace(clip, folder=tmp_path / "out")
        assert (frames_of(clip) == frames_of(other)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ()}, "shapes: none given"),
        ({"shapes": (Shape(4, 8, 8, 8, 1),)}, "8 px on 8x8 has 0 px of room, 4 frames at 1.0 px a frame need 3"),
        ({"shapes": (Shape(1, 6, 9, 8, 1),)}, "a digit of 8 px on 6x9 has -2 px of room"),
        ({"shapes": (Shape(4, 16, 16, 8, 1), Shape(4, 16, 16, 9, 1))}, "listed twice"),
        ({"shapes": (Shape(2, 16, 16, 8, 1),), "speed": 0.2}, "would not move at 0.2 px a frame"),
        ({"held_out": 1.0}, "need 0 < held_out < 1"),
        ({"grid": 0}, "grid 0"),
        ({"scans": 2000}, "scans 2000: there are 1797"),
    ],
)
def test_options_that_cannot_be_met_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_digits(tmp_path / "out", small(**options), workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["16x16", "8x16x16:8", "8x16x16:8:0", "8:16:16:8:1", "axbxc:1:1", "8x16x16x8x4", ""])
def test_a_shape_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Shape.parse(text)


def test_shapes_are_read_as_they_are_written() -> None:
    for shape in DigitsOptions().shapes:
        assert Shape.parse(str(shape)) == shape
    DigitsOptions().check()


def test_drawing_moves_whole_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    frames = draw(pixels, Shape(3, 12, 14, 8, 1), (4, 3), (-1.5, 0.0))
    for frame, top in zip(frames, (4, 2, 1), strict=True):
        assert (frame[top : top + 8, 3:11] == pixels).all()
        assert frame.astype(int).sum() == pixels.astype(int).sum()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path / "out"), "--scans", "50", "--workers", "1", "--shapes", "1x9x9:8:1"]
    assert digits.main(command) == 0
    assert "50 clips, 40 train, 10 validation" in capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert set(row) >= {"path", "caption", "class", "fps", "frames", "height", "width", "split", "direction", "score"}
    assert digits.main([*command[:-1], "9x9:8"]) == 2
    assert capsys.readouterr().err.startswith("error: shape '9x9:8'")
