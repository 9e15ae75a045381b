"""What stdit.generate left in a folder: its clips, what was asked of each, and how they were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.data.decoding import DecodeError, open_clip
from stdit.evaluation.classifier import Frames
from stdit.files import fingerprint_file, fingerprint_files, read_jsonl

LISTING = "manifest.jsonl"


@dataclass(frozen=True)
class Generated:
    """One clip that was made: its file (relative to the folder), what was asked for (None: nothing), and its frames."""

    file: str
    prompt: str
    seed: int | None
    class_name: str | None
    direction: str | None
    frames: Frames
    row: Mapping[str, Any]


def read_generated(videos: Path, limit: int | None = None) -> tuple[list[Generated], list[str]]:
    """The clips of `videos` in the order of its manifest.jsonl (the first `limit`), and why prompts failed that did.

    ValueError: no listing, no clip, a file that cannot be decoded, clips of different shapes.
    """
    listing = _listing(videos)
    made: list[Generated] = []
    failures: list[str] = []
    for row in read_jsonl(listing):
        if row.get("error") or row.get("file") is None:
            failures.append(f"{row.get('prompt')!r}: {row.get('error') or 'no file'}")
            continue
        if limit is not None and len(made) >= limit:
            break
        wanted = {key: None if row.get(key) is None else str(row[key]) for key in ("class", "direction")}
        frames = _decode(videos / row["file"])
        prompt = str(row.get("prompt") or "")
        made.append(Generated(row["file"], prompt, row.get("seed"), wanted["class"], wanted["direction"], frames, row))
    if not made:
        raise ValueError(f"{listing}: no clip was made, {len(failures)} failed: {'; '.join(failures[:3])}")
    shapes = sorted({clip.frames.shape[:3] for clip in made})
    if len(shapes) > 1:
        raise ValueError(
            f"{videos}: clips of {len(shapes)} shapes (frames, height, width) {shapes}; score each by itself"
        )
    return made, failures


def protocol_of(clips: Sequence[Generated]) -> dict[str, Any]:
    """How the clips were drawn: what the listing says alike of all of them, with their shape and seeds.

    What differs between them (some made before a setting was changed, say) is a list of all its values.
    """
    frames, height, width = clips[0].frames.shape[:3]
    seeds = [clip.seed for clip in clips if clip.seed is not None]
    found: dict[str, list[Any]] = {}
    for clip in clips:
        for key, value in (clip.row.get("protocol") or {}).items():
            if value not in (values := found.setdefault(key, [])):
                values.append(value)
    return {
        "frames": frames,
        "height": height,
        "width": width,
        "fps": clips[0].row.get("fps"),
        **{key: values[0] if len(values) == 1 else values for key, values in found.items()},
        "seeds": {"first": min(seeds), "last": max(seeds), "different": len(set(seeds))} if seeds else None,
        "captions": {"count": len(clips), "different": len({clip.prompt for clip in clips})},
    }


def fingerprint_of(videos: Path) -> str:
    """Hex SHA-256 over the listing of a folder and the files that it names. ValueError: no listing."""
    listing = _listing(videos)
    files = [videos / str(row.get("file")) for row in read_jsonl(listing)]
    return fingerprint_files([listing, *files], lambda path: fingerprint_file(path) if path.is_file() else "-")


def _listing(videos: Path) -> Path:
    listing = videos / LISTING
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file; {videos} is not a folder that stdit.generate has written")
    return listing


def _decode(path: Path) -> Frames:
    try:
        with open_clip(path, "pyav") as reader:
            return reader.get(range(reader.frame_count))
    except DecodeError as error:
        raise ValueError(f"{error}; remove the file and run the same command to make it again") from error
