"""Clips, sheets and GIFs: what is written is what is decoded, in the colours that it was drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from stdit.data.decoding import open_clip
from stdit.fonts import FallbackFont
from stdit.media import (
    BT709,
    Cell,
    contact_sheet,
    moving_sheet,
    save_video,
    write_clip,
    write_gif,
    write_video,
)
from tests.support.videos import smooth

# Corners of the RGB cube: primaries, secondaries, black, white.
COLOURS = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]


def frames_of(path: Path, decoder: str = "pyav") -> np.ndarray:
    with open_clip(path, decoder) as reader:
        return reader.get(range(reader.frame_count))


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (1, 3), (256, 256), (250, 301)])
def test_a_small_or_odd_clip_is_stored_without_loss(size: tuple[int, int], tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    assert (frames_of(tmp_path / "a.mp4") == frames).all()


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (16, 16), (24, 24), (17, 31)])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_grey_clip_is_stored_without_loss(tmp_path: Path, size: tuple[int, int], count: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (count, *size), np.uint8)
    path = tmp_path / ("a.png" if count == 1 else "a.mp4")
    write_clip(path, frames, fps=8)
    assert (frames_of(path) == frames[..., None]).all()


def test_a_large_clip_is_stored_closely_at_its_own_size(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)[None, None, :, None]
    frames = np.repeat(ramp, 3, 0).repeat(320, 1).repeat(3, 3)
    write_video(tmp_path / "a.mp4", frames, 8)
    assert abs(frames_of(tmp_path / "a.mp4").astype(int) - frames).max() <= 4


@pytest.mark.parametrize("size", [(320, 512), (720, 1280)])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_large_clip_is_bt709_and_says_so(tmp_path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, *size, 3))
    write_video(tmp_path / "a.mp4", frames, 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context: Any = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace) == (BT709, BT709, BT709)
        frame = next(container.decode(video=0))
        assert frame.color_range == 1  # limited
        y, cb, cr = (np.asarray(plane).reshape(-1, plane.line_size)[4, 4] for plane in frame.planes)
    # ITU-R BT.709-6, sections 3.2 to 3.4.
    r, g, b = (value / 255 for value in colour)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = (16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748)
    assert np.abs(np.array([y, cb, cr], float) - expected).max() <= 1.5


def test_colours_of_a_large_clip_survive_decoding(tmp_path: Path) -> None:
    frames = np.zeros((2, 320, 512, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        frames[:, :, 64 * i : 64 * (i + 1)] = colour
    write_video(tmp_path / "a.mp4", frames, 24)
    # Edges between colours share their chroma.
    middles = frames_of(tmp_path / "a.mp4")[:, 8:-8, 32::64].astype(int)
    assert abs(middles - np.array(COLOURS)).max() <= 4


# --------------------------------------------------------------------------------------- save_video


def test_every_form_of_the_pipelines_output_is_saved_alike(tmp_path: Path) -> None:
    frames = smooth(3, 16, 24)
    floats = frames.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    images = [Image.fromarray(frame) for frame in frames]
    for i, form in enumerate((frames, floats, floats[None], tensor, tensor[None], images, [images])):
        path = save_video(form, tmp_path / f"{i}.mp4", fps=12)
        assert (frames_of(path) == frames).all()
    with av.open(str(tmp_path / "0.mp4")) as container:
        assert container.streams.video[0].average_rate == 12


@pytest.mark.parametrize("fps", [0.001, 1000, np.float32(12)])
def test_every_rate_that_is_accepted_is_written(tmp_path: Path, fps: float) -> None:
    assert len(frames_of(save_video(smooth(2, 16, 24), tmp_path / "a.mp4", fps))) == 2


def test_one_frame_is_saved_as_png(tmp_path: Path) -> None:
    frames = smooth(1, 16, 24)
    assert (np.asarray(Image.open(save_video(frames, tmp_path / "a.png"))) == frames[0]).all()
    assert (frames_of(save_video(Image.fromarray(frames[0]), tmp_path / "a.mp4")) == frames).all()


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        (smooth(2, 8, 8)[None].repeat(2, 0), "a.mp4", 8, r"found \(2, 2, 8, 8, 3\); take .frames\[i\]"),
        (torch.zeros(2, 8, 8, 3), "a.mp4", 8, r"\(T, 3, H, W\), found \(2, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.int64), "a.mp4", 8, "found int64"),
        (np.full((2, 8, 8, 3), np.nan), "a.mp4", 8, "not finite"),
        ([], "a.mp4", 8, "expected one video"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], "a.mp4", 8, "different sizes"),
        (smooth(2, 8, 8), "a.png", 8, "ending in .mp4 for 2 frames"),
        (smooth(2, 8, 8), "a.gif", 8, "ending in .mp4 for 2 frames"),
        (smooth(2, 8, 8), "a.mp4", 0, "fps must be a number from 0.001 to 1000, found 0"),
        (smooth(2, 8, 8), "a.mp4", float("nan"), "fps must be a number .* found nan"),
        (smooth(2, 8, 8), "a.mp4", 0.0004, "fps must be a number .* found 0.0004"),
        (smooth(2, 8, 8), "a.mp4", "8", "fps must be a number .* found '8'"),
        (smooth(2, 8, 8), "a.mp4", None, "fps must be a number .* found None"),
    ],
)
def test_save_video_names_what_does_not_fit(tmp_path: Path, frames: Any, name: str, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_video(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- sheets


def clip_of(frames: int = 4) -> np.ndarray:
    clip = np.zeros((frames, 8, 8, 3), np.uint8)
    clip[np.arange(frames), 2, np.arange(frames)] = 255
    return clip


def test_a_gif_has_a_page_for_each_frame_of_the_longest_clip(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", moving_sheet([Cell(clip_of(4), "a"), Cell(clip_of(2), "b")]), fps=8)
    assert getattr(Image.open(tmp_path / "a.gif"), "n_frames", 1) == 4


def test_pixels_are_enlarged_by_whole_factors() -> None:
    page = np.asarray(contact_sheet([Cell(clip_of(1), "")], side=72).convert("L"))
    assert (page == 255).sum() == 81  # One bright pixel, nine times as wide and as high.


@pytest.mark.parametrize(
    "text", ["赤いボール", "한국어", "中文标题", "🎈🚀", "हिन्दी", "ไทย", "العربية", "Ελληνικά", "кириллица", "plain"]
)
def test_captions_of_any_script_have_their_glyphs(text: str) -> None:
    def ink(text: str) -> np.ndarray:
        image = Image.new("L", (200, 20))
        font = FallbackFont(12)
        font.draw(ImageDraw.Draw(image), (2, 2), text, "white")
        assert 0 < font.getlength(text) < 196
        return np.asarray(image)

    pictures = [ink(character) for character in dict.fromkeys(text)]
    missing = ink("\U0010fffd")  # private use: no font has it
    for i, picture in enumerate(pictures):
        assert picture.any() or text[i] in "ुिी्ั็่"
        assert not np.array_equal(picture, missing)


def test_a_large_clip_is_shrunk_and_a_long_caption_cut() -> None:
    large = np.zeros((2, 300, 500, 3), np.uint8)
    words, letters = Cell(large, "very " * 200), Cell(large, "ы" * 500)
    assert contact_sheet([words, letters]).width < 700
