"""Footage: files of a folder, pattern, list or manifest, and how the new manifest names them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stdit.config import ConfigError, CurateConfig
from stdit.data import filters, manifest
from stdit.data.decoding import IMAGE_SUFFIXES
from stdit.data.manifest import Clip
from stdit.data.rows import CAPTION_SUFFIX, READERS, VIDEO_SUFFIXES, ManifestError, read_caption
from stdit.files import read_text

LINK = "footage"
MAX_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """One file of footage. key: its path below the new manifest's folder. limits: the frames of it that are used, None: all."""

    key: str
    file: Path
    caption: str | None = None
    class_name: str | None = None
    split: str | None = None
    limits: tuple[int, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def find_sources(config: CurateConfig) -> tuple[list[Source], dict[str, Path], int]:
    """All files of footage in order, the links that lead to them from the manifest's folder, and how many `where` excluded.

    ConfigError, ManifestError: footage that is not there or holds no clip.
    """
    entries = (config.footage,) if isinstance(config.footage, str) else config.footage
    sources: list[Source] = []
    links: dict[str, Path] = {}
    excluded = 0
    for number, entry in enumerate(entries, 1):
        name = LINK if len(entries) == 1 else f"{LINK}-{number}"
        clips, root = _clips(entry)
        if config.where:
            filters.check_where(manifest.Manifest(Path(entry), tuple(clips), ""), config.where)
            kept = filters.filtered(clips, config.where)
            excluded += len(clips) - len(kept)
            clips = kept
        links[name] = root
        sources += [_source(clip, name) for clip in clips]
    # One file may be named twice, by a folder and a pattern.
    unique: dict[tuple[str, tuple[int, int] | None], Source] = {}
    for source in sources:
        unique.setdefault((os.path.realpath(source.file), source.limits), source)
    if not unique:
        raise ConfigError(f"footage: none of {excluded} files meets `where`" if excluded else "footage: no files")
    return list(unique.values()), links, excluded


def _clips(entry: str) -> tuple[list[Clip], Path]:
    """Clips that `entry` names, and the folder that their keys are relative to."""
    if "://" in entry:
        raise ConfigError(f"footage: {entry} is an address; files are read from folders of this machine")
    path = Path(entry)
    if glob.has_magic(entry) and not path.exists():
        found = [Path(name) for name in sorted(glob.glob(entry, recursive=True))]
        files = [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and file.is_file()]
        if not files:
            raise ConfigError(f"footage: {entry} matches no video or image ({len(found)} other files)")
        return _listed(files)
    if path.suffix.lower() == ".txt" and path.is_file():
        try:
            lines = [line.strip() for line in read_text(path, MAX_LIST_BYTES).splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"footage: {path}: cannot be read as a list of files ({error})") from error
        if not lines:
            raise ConfigError(f"footage: {path}: the list is empty")
        return _listed([path.parent / line for line in lines])
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return _listed([path])
    if not path.exists():
        raise ConfigError(f"footage: {entry}: no such folder, list or manifest")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ConfigError(
            f"footage: {entry}: expected a folder, a pattern, a list of files (.txt) or a manifest ({', '.join(READERS)})"
        )
    return list(manifest.read(path)), path if path.is_dir() else path.parent


def _listed(files: list[Path]) -> tuple[list[Clip], Path]:
    """Clips of a list of files, with captions from NAME.txt beside each."""
    absolute = [Path(os.path.abspath(file)) for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    clips = []
    for file in dict.fromkeys(absolute):
        text = file.with_suffix(CAPTION_SUFFIX)
        caption = None
        if text.is_file():
            try:
                caption = " ".join(read_caption(text).split())
            except ManifestError as error:
                raise ConfigError(f"footage: {text.parent / str(error)}") from error
        clips.append(Clip(file.relative_to(root).as_posix(), root, caption or "", captioned=caption is not None))
    return clips, root


def _source(clip: Clip, link: str) -> Source:
    limits = (clip.start_frame or 0, clip.end_frame) if clip.end_frame is not None else None
    return Source(
        f"{link}/{clip.key}",
        clip.file,
        clip.caption if clip.captioned else None,
        clip.class_name,
        None if clip.split == "train" else clip.split,
        limits,
        clip.extra,
    )


def make_links(out: Path, links: Mapping[str, Path]) -> None:
    """Links to the footage below `out`. ConfigError: something else has their name."""
    for name, root in links.items():
        link = out / name
        if link.is_symlink() and link.resolve() == root.resolve():
            continue
        if link.is_symlink() or link.exists():
            raise ConfigError(f"{link} leads to {link.resolve()}, not to the footage {root}; give another out")
        link.symlink_to(root.resolve(), target_is_directory=True)


def stale_links(out: Path, names: Iterable[str]) -> Iterator[Path]:
    """Links to footage among these names of files in `out`."""
    yield from (path for name in names if name.startswith(LINK) and (path := out / name).is_symlink())
