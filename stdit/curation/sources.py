"""Footage: files of a folder, pattern, list or manifest, of this machine or in an object store, and how the new
manifest names them.

# Objects are fetched into the cache; `digest` is that of `object_digest`.
with local_file(cache, source.file, digest) as path:
    …
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from stdit.config import ConfigError, CurateConfig, Url, parse_location
from stdit.data import filters, manifest, objects
from stdit.data.decoding import IMAGE_SUFFIXES
from stdit.data.manifest import Clip
from stdit.data.object_cache import ObjectCache, version_digest
from stdit.data.objects import ChangedObject, NoSuchObject, StoreError, is_of_object
from stdit.data.rows import CAPTION_SUFFIX, READERS, VIDEO_SUFFIXES, ManifestError, read_caption, scan_folder
from stdit.files import read_text

LINK = "footage"
MAX_LIST_BYTES = 64 << 20
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
# Requests about objects at a time.
REQUESTS = 16


@dataclass(frozen=True)
class Source:
    """One file of footage. key: its path below the new manifest's folder, or its URL. limits: the frames of it that are
    used, None: all."""

    key: str
    file: Path | Url
    caption: str | None = None
    class_name: str | None = None
    split: str | None = None
    limits: tuple[int, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def find_sources(config: CurateConfig) -> tuple[list[Source], dict[str, Path], int]:
    """All files of footage in order, the links that lead to those of this machine from the manifest's folder, and how
    many `where` excluded.

    ConfigError, ManifestError: footage that is not there or holds no clip; a store that does not answer, or gives no
    access.
    """
    entries = (config.footage,) if isinstance(config.footage, str) else config.footage
    sources: list[Source] = []
    links: dict[str, Path] = {}
    excluded = 0
    for number, entry in enumerate(entries, 1):
        name = LINK if len(entries) == 1 else f"{LINK}-{number}"
        clips, root = _clips(entry)
        if config.where:
            filters.check_where(manifest.Manifest(parse_location(entry), tuple(clips), ""), config.where)
            kept = filters.filtered(clips, config.where)
            excluded += len(clips) - len(kept)
            clips = kept
        if root is not None:
            links[name] = root
        sources += [_source(clip, name) for clip in clips]
    # One file may be named twice, by a folder and a pattern.
    unique: dict[tuple[str, tuple[int, int] | None], Source] = {}
    for source in sources:
        file = source.file if isinstance(source.file, Url) else os.path.realpath(source.file)
        unique.setdefault((file, source.limits), source)
    if not unique:
        raise ConfigError(f"footage: none of {excluded} files meets `where`" if excluded else "footage: no files")
    return list(unique.values()), links, excluded


def _clips(entry: str) -> tuple[list[Clip], Path | None]:
    """Clips that `entry` names, and the folder that the keys of those on this machine are relative to; None: all are
    objects."""
    try:
        path = parse_location(entry)
        if isinstance(path, Url):
            return _objects(path), None
    except (ConfigError, ManifestError):
        raise
    except (ValueError, StoreError) as error:
        raise ConfigError(f"footage: {error}") from error
    entry = str(path)
    if glob.has_magic(entry) and not path.exists():
        found = [Path(name) for name in sorted(glob.glob(entry, recursive=True))]
        files = [file for file in found if file.suffix.lower() in MEDIA_SUFFIXES and file.is_file()]
        if not files:
            raise ConfigError(f"footage: {entry} matches no video or image ({len(found)} other files)")
        return _listed(files)
    if path.suffix.lower() == ".txt" and path.is_file():
        try:
            text = read_text(path, MAX_LIST_BYTES)
        except (OSError, ValueError) as error:
            raise ConfigError(f"footage: {path}: cannot be read as a list of files ({error})") from error
        return _listed(_list(path, text))
    if path.is_file() and path.suffix.lower() in MEDIA_SUFFIXES:
        return _listed([path])
    if not path.exists():
        raise ConfigError(f"footage: {entry}: no such folder, list or manifest")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ConfigError(
            f"footage: {entry}: expected a folder, a pattern, a list of files (.txt) or a manifest ({', '.join(READERS)})"
        )
    return (_folder_clips(path), path) if path.is_dir() else (list(manifest.read(path)), path.parent)


def _folder_clips(folder: Path) -> list[Clip]:
    """Clips of a folder. Those whose names are not UTF-8, which no manifest holds, are there too, to be counted."""
    found = scan_folder(folder)
    unreadable = [name for name in found.clips if readable_name(name) is not None]
    named = tuple(name for name in found.clips if readable_name(name) is None)
    captions = {name: found.captions[name] for name in named if name in found.captions}
    clips = manifest.of_folder(folder, replace(found, clips=named, captions=captions)) if named else ()
    return [*clips, *(Clip(name, folder, "", captioned=False) for name in unreadable)]


def _objects(url: Url) -> list[Clip]:
    """Clips that a URL names, which is read as a path is. ValueError: it names none, or what is no footage.
    StoreError."""
    suffix = url.suffix.lower()
    if glob.has_magic(url.bucket):
        raise ConfigError(f"footage: {url}: a pattern may not stand for buckets")
    if glob.has_magic(url.key) and not _is_there(url):  # a name may have brackets of its own
        parts = url.key.split("/")
        plain = list(takewhile(lambda part: not glob.has_magic(part), parts))
        folder = Url(f"{url.scheme}://{'/'.join(plain)}")
        there = objects.listing(folder)
        pattern = re.compile(glob_translate("/".join(parts[len(plain) :])))
        files = [
            folder / name
            for name in there
            if pattern.match(name) and PurePosixPath(name).suffix.lower() in MEDIA_SUFFIXES
        ]
        if not files:
            raise ConfigError(f"footage: {url} matches no video or image ({len(there)} objects below {folder})")
        return _listed(files, {folder / name for name in there})[0]
    if suffix == ".txt":
        return _listed(_list(url, objects.read(url, MAX_LIST_BYTES).decode("utf-8-sig")))[0]
    return _listed([url])[0] if suffix in MEDIA_SUFFIXES else list(manifest.read(url))


def _is_there(url: Url) -> bool:
    """Whether an object or a folder of objects has this very name."""
    try:
        objects.stat(url)
    except NoSuchObject:
        return bool(objects.listing(url))
    return True


def _list(file: Path | Url, text: str) -> list[Path | Url]:
    """The files that a list names, a path relative to its folder or a URL a line. ConfigError: none, or what is
    neither."""
    found: list[Path | Url] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (name := line.strip()):
            continue
        try:
            if isinstance(file, Path):
                found.append(parse_location(name) if "://" in name else file.parent / name)
            elif "://" in name:
                found.append(Url.parse(name))  # a list from elsewhere names no files of this machine
            elif name.startswith("/"):
                raise ValueError(f"{name!r}: a list at a URL names objects, by URL or below its folder")
            else:
                found.append(Url.parse(f"{file.parent}/{name}"))
        except ValueError as error:
            raise ConfigError(f"footage: {file}:{number}: {error}") from error
    if not found:
        raise ConfigError(f"footage: {file}: the list is empty")
    return found


def _listed(files: Sequence[Path | Url], there: Container[Url] | None = None) -> tuple[list[Clip], Path | None]:
    """Clips of a list of files, with captions from NAME.txt beside each. there: the objects that there are, if that is
    known."""
    absolute = dict.fromkeys(file if isinstance(file, Url) else Path(os.path.abspath(file)) for file in files)
    folders = [file.parent for file in absolute if isinstance(file, Path)]
    root = Path(os.path.commonpath(folders)) if folders else None
    with ThreadPoolExecutor(REQUESTS) as pool:
        captions = list(pool.map(lambda file: _caption(file, there), absolute))
    clips = []
    for file, caption in zip(absolute, captions, strict=True):
        key = file if isinstance(file, Url) else file.relative_to(root or "").as_posix()
        clips.append(Clip(key, root or Path(), caption or "", captioned=caption is not None))
    return clips, root


def _caption(file: Path | Url, there: Container[Url] | None) -> str | None:
    """The caption of NAME.mp4 in NAME.txt beside it. ConfigError: it cannot be read."""
    if isinstance(file, Url):
        text = Url(f"{file.removesuffix(file.suffix)}{CAPTION_SUFFIX}")
        absent = there is not None and text not in there
    else:
        text = file.with_suffix(CAPTION_SUFFIX)
        absent = not text.is_file()
    try:
        return None if absent else " ".join(read_caption(text).split())
    except ManifestError as error:
        if isinstance(error.__cause__, NoSuchObject):
            return None
        raise ConfigError(f"footage: {text.parent}/{error}") from error


def _source(clip: Clip, link: str) -> Source:
    limits = (clip.start_frame or 0, clip.end_frame) if clip.end_frame is not None else None
    return Source(
        clip.location if isinstance(clip.location, Url) else f"{link}/{clip.key}",
        clip.location,
        clip.caption if clip.captioned else None,
        clip.class_name,
        None if clip.split == "train" else clip.split,
        limits,
        clip.extra,
    )


def readable_name(name: str) -> str | None:
    """What stands for a file's name that is not UTF-8, in reports; None: it is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return None


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


# ---------------------------------------------------------------------------------------------- objects


def object_digests(sources: Iterable[Source]) -> dict[Url, str | StoreError]:
    """Of the objects among footage, names of their versions, in place of fingerprints of their content; or why there is
    none.

    StoreError: a store that does not answer, or gives no access.
    """

    def digest(url: Url) -> str | StoreError:
        try:
            return version_digest(url, objects.stat(url))
        except StoreError as error:
            if not is_of_object(error):
                raise
            return error

    urls = list(dict.fromkeys(source.file for source in sources if isinstance(source.file, Url)))
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(urls, pool.map(digest, urls), strict=True))


@contextmanager
def local_file(cache: ObjectCache, file: str | Path | Url, digest: str) -> Iterator[Path]:
    """A path of this machine with the content of `file`, within the context.

    digest: of an object, its version's. ChangedObject: it is of another version now. StoreError, OSError: as
    ObjectCache.local.
    """
    location = parse_location(file) if isinstance(file, str) and not isinstance(file, Url) else file
    with cache.local(location) as path:
        if isinstance(location, Url) and not path.name.startswith(digest):
            raise ChangedObject(errno.ESTALE, "was changed during the curation; run it again", location)
        yield path
