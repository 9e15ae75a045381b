"""Writes what people look at: MP4 and PNG clips, contact sheets, GIFs. The one writer of each; files in, no torch.

    save_video(pipe(["a seven moving left"], …).frames[0], "seven.mp4", fps=8)

T frames · H height · W width, in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stdit.files import atomic_path
from stdit.fonts import FallbackFont

Frames = NDArray[np.uint8]  # (T, H, W, 3), or (T, H, W) grey

# Clips with frames of up to this many pixels are stored without loss; larger ones at a visually lossless quality.
LOSSLESS_PIXELS = 256 * 256
# H.273's number for BT.709: colour primaries, transfer characteristics and matrix.
BT709 = 1
# Frames per second that a file can state.
MIN_FPS, MAX_FPS = 0.001, 1000

# Contact sheets: one dark ground, legible on light pages as on dark ones.
GROUND, PLATE, TEXT, FAINT, RIGHT, WRONG = "#14171c", "#20242c", "#e8eaed", "#9aa0a8", "#5fd38a", "#ff7b72"
GAP = 10
CAPTION_LINES = 3


# -------------------------------------------------------------------------------------------- clips


def save_video(frames: Any, path: Path | str, fps: float = 8.0) -> Path:
    """Saves one video: MP4, or PNG for a single frame. An existing file is replaced only by a complete one.

    Args:
        frames: one video of `STDiTPipeline(...).frames`, in any of its forms: a list of PIL images; an array
            (T, H, W, 3) or tensor (T, 3, H, W), float in 0 to 1 or uint8; or a batch of one video.
        path: ends in .mp4, or in .png for one frame.
        fps: frames per second.

    Raises:
        ValueError: several videos, another shape, dtype or file name, values that are not finite, fps below 0.001 or
            above 1000.
    """
    path = Path(path)
    video = _as_uint8(frames)
    expected = (".mp4", ".png") if len(video) == 1 else (".mp4",)
    if path.suffix.lower() not in expected:
        raise ValueError(f"path {path}: expected a name ending in {' or '.join(expected)} for {len(video)} frames")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not MIN_FPS <= cast(Any, fps) <= MAX_FPS:
        raise ValueError(f"fps must be a number from {MIN_FPS} to {MAX_FPS}, found {fps!r:.80}")
    with atomic_path(path) as part:
        if path.suffix.lower() == ".png":
            Image.fromarray(video[0]).save(part, "PNG")
        else:
            write_video(part, video, fps)
    return path


def _as_uint8(frames: Any) -> Frames:
    """One video in any of the pipeline's output forms -> uint8 (T, H, W, 3)."""
    if isinstance(frames, Image.Image):
        frames = [frames]
    if isinstance(frames, list | tuple):
        while len(frames) == 1 and isinstance(frames[0], list | tuple):  # a batch of one video
            frames = frames[0]
        if not frames or not all(isinstance(f, Image.Image) for f in frames):
            raise ValueError(
                "frames: expected one video, as PIL images, an array or a tensor; take .frames[i] of several"
            )
        if len(sizes := {f.size for f in frames}) > 1:
            raise ValueError(f"frames: images of different sizes (width, height): {sorted(sizes)}")
        return np.stack([np.asarray(f.convert("RGB")) for f in frames])
    channels_first = hasattr(frames, "detach")  # a tensor of output_type "pt": (T, 3, H, W)
    video = np.asarray(frames.detach().float().cpu() if channels_first and frames.is_floating_point() else frames)
    shape = video.shape
    if video.ndim == 5 and shape[0] == 1:
        video = video[0]
    if channels_first and video.ndim == 4:
        video = video.transpose(0, 2, 3, 1)
    if video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
        form = "(T, 3, H, W)" if channels_first else "(T, H, W, 3)"
        raise ValueError(
            f"frames: expected one video of shape {form}, found {tuple(shape)}; take .frames[i] of several"
        )
    if video.dtype == np.uint8:
        return video
    if video.dtype.kind != "f":
        raise ValueError(f"frames: expected uint8, or floats in 0 to 1; found {video.dtype}")
    if not np.isfinite(video).all():
        raise ValueError("frames: not finite (NaN or infinity)")
    return (video.clip(0, 1) * 255).round().astype(np.uint8)


def write_clip(path: Path | str, frames: Frames, fps: float) -> None:
    """Writes uint8 (T, H, W, 3), or grey (T, H, W), as a PNG (one frame) or an MP4 of the same size.

    Not atomic: wrap it in stdit.files.atomic_path where a crash must not leave a part.
    """
    if len(frames) == 1:
        Image.fromarray(frames[0]).save(path, "PNG")
    else:
        write_video(path, frames, fps)


def write_video(path: Path | str, frames: Frames, fps: float) -> None:
    """Writes uint8 (T, H, W, 3), or grey (T, H, W), as an H.264 MP4 of the same size.

    Small or odd-sized clips are lossless (RGB, quantiser 0): what is decoded is what the model drew. Larger ones are
    YUV 4:2:0, converted and tagged as BT.709 in limited range, which players assume of HD and read from the tags.
    """
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    height, width = frames.shape[1:3]
    lossless = height * width <= LOSSLESS_PIXELS or height % 2 or width % 2
    options = {"qp": "0", "preset": "ultrafast"} if lossless else {"crf": "12"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264rgb" if lossless else "libx264",
            rate=Fraction(float(fps)).limit_denominator(1001),
            options=options | {"threads": "1"},  # more threads write other bytes
        )
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        if not lossless:
            codec: Any = stream.codec_context
            codec.color_primaries = codec.color_trc = codec.colorspace = BT709
            codec.color_range = ColorRange.MPEG
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if not lossless:
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ----------------------------------------------------------------------------------- contact sheets


@dataclass(frozen=True)
class Cell:
    """A clip (T, H, W, 3) on a sheet, its caption, and a verdict on it; right: green or red, None: neither."""

    frames: Frames
    caption: str
    verdict: str = ""
    right: bool | None = None


def contact_sheet(cells: Sequence[Cell], columns: int = 4, side: int = 72, strip: int = 4) -> Image.Image:
    """Each clip as a strip of at most `strip` frames from first to last, enlarged to about `side` pixels."""
    return _page(cells, [_strip(cell.frames, side, strip) for cell in cells], columns)


def moving_sheet(cells: Sequence[Cell], columns: int = 6, side: int = 128) -> list[Image.Image]:
    """The pages of a contact sheet on which all clips run side by side; shorter clips stop at their last frame."""
    length = max(len(cell.frames) for cell in cells)
    return [
        _page(cells, [_enlarge(cell.frames[min(t, len(cell.frames) - 1)], side) for cell in cells], columns)
        for t in range(length)
    ]


def write_png(path: Path | str, image: Image.Image) -> None:
    """Writes an image as an optimised PNG, atomically."""
    with atomic_path(path) as part:
        image.save(part, "PNG", optimize=True)


def write_gif(path: Path | str, pages: Sequence[Image.Image], fps: float) -> None:
    """Writes pages of one size as a looping GIF, atomically; the last page is shown half a second longer."""
    # One palette for all: colours would flicker otherwise.
    palette = pages[len(pages) // 2].quantize(128)
    quantized = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    each = max(20, round(1000 / fps)) if fps > 0 else 500
    durations = [each] * (len(pages) - 1) + [each + 500]
    with atomic_path(path) as part:
        quantized[0].save(
            part, "GIF", save_all=True, append_images=quantized[1:], duration=durations, loop=0, disposal=1
        )


def _page(cells: Sequence[Cell], pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Plates in rows, each a picture with its caption and verdict below; all plates are of one size."""
    if not cells:
        raise ValueError("a sheet needs at least one clip, found 0")
    font, small = FallbackFont(12), FallbackFont(11)
    width = max(max(p.width for p in pictures), 110) + 2 * GAP
    tall = max(p.height for p in pictures)
    wrapped = [_wrap(cell.caption, font, width - 2 * GAP) for cell in cells]
    text_height = 16 * max(len(lines) for lines in wrapped)
    verdict_height = 17 if any(cell.verdict for cell in cells) else 0
    height = tall + text_height + verdict_height + 2 * GAP + 6
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), GROUND)
    draw = ImageDraw.Draw(page)
    for i, (cell, picture, lines) in enumerate(zip(cells, pictures, wrapped, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, PLATE)
        page.paste(picture, (x + (width - picture.width) // 2, y + GAP))
        for k, line in enumerate(lines):
            font.draw(draw, (x + GAP, y + tall + GAP + 6 + 16 * k), line, TEXT)
        colour = FAINT if cell.right is None else RIGHT if cell.right else WRONG
        verdict = _wrap(cell.verdict, small, width - 2 * GAP)[:1]
        small.draw(draw, (x + GAP, y + height - GAP - 14), verdict[0] if verdict else "", colour)
    return page


def _enlarge(frame: np.ndarray, side: int) -> Image.Image:
    """Nearest neighbour by a whole factor, so that every pixel stays a square; what is larger than `side` is shrunk."""
    image = Image.fromarray(frame)
    longest = max(image.size)
    if longest > side:
        scale = side / longest
        return image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
        )
    factor = max(1, round(side / longest))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _strip(frames: Frames, side: int, count: int) -> Image.Image:
    """At most `count` frames, the first and the last among them, beside each other."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    images = [_enlarge(frames[i], side) for i in chosen]
    strip = Image.new("RGB", (sum(i.width for i in images) + 2 * (len(images) - 1), images[0].height), PLATE)
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + 2
    return strip


def _wrap(text: str, font: FallbackFont, width: int) -> list[str]:
    """`text` in at most CAPTION_LINES lines of `width` pixels, an ellipsis where it is cut; long words are broken."""
    lines: list[str] = []
    line = ""
    for word in text[:400].split():
        while font.getlength(word) > width:  # No blank to break at: break where it fits.
            fits = max(n for n in range(1, len(word) + 1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, line, word = [*lines, *([line] if line else [])], word[:fits], word[fits:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines, line = [*lines, line], word
    lines = [*lines, line] if line else lines
    if len(lines) <= CAPTION_LINES:
        return lines
    last = lines[CAPTION_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: CAPTION_LINES - 1], last + "…"]
