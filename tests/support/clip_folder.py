"""A folder of clips with its manifest, as a user would bring: stills and videos of several sizes, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from stdit.config import ByteT5Config, ExtractBucket, ExtractConfig, TextEncoderConfig, VideoEncoderConfig
from stdit.data import manifest
from tests.support.videos import lossless, smooth

TEXT = TextEncoderConfig(byte_t5=ByteT5Config(width=16, depth=1, num_heads=2), max_text_tokens=24)
BUCKETS = (
    ExtractBucket(frames=1, height=16, width=16),
    ExtractBucket(frames=5, height=16, width=16),
    ExtractBucket(frames=5, height=16, width=32),
)
CAPTIONS = ["a red wave", "", "ein süßer Käfer – 左へ", "a very long caption that no text encoder here takes whole"]
# Two stills to a video, and the shape of each in turn: (frames, height, width).
SHAPES = [(1, 20, 16), (1, 16, 24), (5, 16, 16), (1, 16, 16), (1, 32, 32), (9, 16, 32)]


def rows(folder: Path, count: int, stated: bool = True) -> list[dict[str, Any]]:
    """Writes `count` clips into `folder`; their rows of the manifest, with sizes if `stated`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(count):
        frames, height, width = SHAPES[i % len(SHAPES)]
        pixels = (smooth(frames + i, height, width)[i:] + i).astype("uint8")
        if frames == 1:
            path = folder / f"{i}.png"
            Image.fromarray(pixels[0]).save(path)
        else:
            path = lossless(folder / f"{i}.mp4", pixels)
        size = {"frames": frames, "height": height, "width": width, "fps": 24 if frames > 1 else None}
        made.append(
            {
                "path": path.name,
                "caption": CAPTIONS[i % len(CAPTIONS)],
                "class": ["wave", "beetle"][i % 2],
                "split": "train" if i % 4 else "validation",
                "score": i / count,
                "direction": [None, "left"][i % 2],
                **(size if stated else {}),
            }
        )
    return made


def write(folder: Path, made: list[dict[str, Any]]) -> Path:
    """The manifest of `made` in `folder`."""
    manifest.write(folder / "manifest.jsonl", made)
    return folder / "manifest.jsonl"


def damaged(folder: Path) -> list[dict[str, Any]]:
    """Rows of files that cannot be decoded: none, empty, text, and half a video."""
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 9)
    whole = lossless(folder / "half.mp4", smooth(5, 16, 16)).read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    return [{"path": f"{name}.mp4", "caption": name} for name in ("missing", "empty", "text", "half")]


class LocalExtraction(ExtractConfig):
    """An extraction into a folder of this machine."""

    out: Path  # pyright: ignore[reportIncompatibleVariableOverride]


def config(folder: Path, made: list[dict[str, Any]], **changes: Any) -> LocalExtraction:
    """An extraction of `made` into folder/features, three clips a shard, as pixels."""
    given = {
        "manifest": write(folder, made),
        "out": folder / "features",
        "buckets": BUCKETS,
        "video_encoder": VideoEncoderConfig(kind="pixels"),
        "text_encoder": TEXT,
        "clips_per_shard": 3,
        "batch_size": 2,
        **changes,
    }
    return LocalExtraction(**given)
