"""The embedded default's data: images and clips made from scikit-learn's 1,797 scans of handwritten digits.

    python -m stdit.data.digits --out data/digits

writes what a user would bring: PNG images, MP4 clips (a scan that moves left, right, up or down
over a black canvas) and manifest.jsonl. Nothing after this knows that they are digits. The scans
are split once; no scan stands in both splits, in any clip. A second call with the same options does
nothing; with others it is an error unless --overwrite.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stdit.console import echo
from stdit.cores import available_cores
from stdit.data import manifest
from stdit.errors import exit_code
from stdit.files import atomic_write, read_json
from stdit.media import write_clip

# Raised when the same options would give other files.
FORMAT = 1
MANIFEST, RECORD, FOLDERS = "manifest.jsonl", "digits.json", ("images", "clips")
CHUNK = 256  # clips a task
SCAN = 8  # px a side

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# {d}: the digit, as word or numeral; {a}: its article; {m}: where it moves.
CLIP_CAPTIONS = (
    "the digit {d} moves {m}",
    "a handwritten {d} drifting {m}",
    "{d} slides {m}",
    "{a} {d} is moving {m}",
    "a scan of the number {d} going {m}",
    "the number {d} glides {m}",
    "handwritten digit {d} travels {m}",
    "a white {d} on black, moving {m}",
    "we see {a} {d} that floats {m}",
    "{m} moves the digit {d}",
)
IMAGE_CAPTIONS = (
    "the digit {d}",
    "a handwritten {d}",
    "a picture of the number {d}",
    "{d}",
    "a white {d} on black",
    "a scan of {a} {d}",
    "handwritten digit {d}",
    "the number {d}, standing still",
)


class Shape(NamedTuple):
    """One kind of clip: size in px and frames, the digit's side in px, and how many are made of each scan."""

    frames: int
    height: int
    width: int
    digit: int
    per_scan: int

    @property
    def key(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @staticmethod
    def parse(text: str) -> Shape:
        """From FRAMESxHEIGHTxWIDTH:DIGIT:PER_SCAN, such as 8x16x16:8:4."""
        parts = text.replace(":", "x").split("x")
        if text.count(":") != 2 or len(parts) != 5 or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"shape {text!r}: expected FRAMESxHEIGHTxWIDTH:DIGIT:PER_SCAN, such as 8x16x16:8:4")
        return Shape(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.key}:{self.digit}:{self.per_scan}"


class Scan(NamedTuple):
    """One scan: uint8 (8, 8); its legibility, and the share of its split and class that is less legible."""

    number: int
    digit: int
    split: str
    score: float
    rank: float
    pixels: np.ndarray


@dataclass(frozen=True)
class DigitsOptions:
    """What is made. `speed` in px a frame; paths begin on multiples of `grid` px. `held_out`: share of scans
    in split "validation", of each of which there are at most `held_out_copies` clips of a shape. `scans`: fewer of
    them, for a quick look."""

    shapes: tuple[Shape, ...] = (
        Shape(1, 12, 12, 8, 4),
        Shape(4, 12, 12, 8, 4),
        Shape(6, 16, 16, 11, 8),
    )
    speed: float = 1.0
    grid: int = 2
    fps: int = 8
    held_out: float = 0.2
    held_out_copies: int = 2
    scans: int = 1797
    seed: int = 0

    def check(self) -> None:
        """ValueError where a digit has no room to move, or there is nothing to make."""
        if not self.shapes:
            raise ValueError("shapes: none given")
        if not 10 <= self.scans <= 1797:
            raise ValueError(f"scans {self.scans}: there are 1797, and 10 are the least")
        if len({shape.key for shape in self.shapes}) < len(self.shapes):
            raise ValueError(f"shapes: listed twice in {' '.join(map(str, self.shapes))}")
        if not 0 < self.held_out < 1 or self.speed <= 0 or min(self.fps, self.grid, self.held_out_copies) < 1:
            found = f"held_out {self.held_out}, speed {self.speed}, fps {self.fps}, grid {self.grid}, "
            found += f"held_out_copies {self.held_out_copies}"
            raise ValueError(f"{found}: need 0 < held_out < 1, the others above 0")
        for shape in self.shapes:
            if min(shape) < 1:
                raise ValueError(f"shape {shape}: every number must be above 0")
            room, path = min(shape.height, shape.width) - shape.digit, self.path(shape)
            if room < path:
                raise ValueError(
                    f"shape {shape}: a digit of {shape.digit} px on {shape.height}x{shape.width} has {room} px of room, "
                    f"{shape.frames} frames at {self.speed} px a frame need {path}"
                )
            if shape.frames > 1 and path < 1:
                raise ValueError(f"shape {shape}: the digit would not move at {self.speed} px a frame")

    def copies(self, shape: Shape, scan: Scan) -> range:
        """Which clips of a shape are made of a scan."""
        held_out = scan.split == "validation"
        return range(min(shape.per_scan, self.held_out_copies) if held_out else shape.per_scan)

    def path(self, shape: Shape) -> int:
        """How far the digit moves, in px."""
        return round(self.speed * (shape.frames - 1))


def make_digits(
    out: Path | str,
    options: DigitsOptions | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Writes images, clips and manifest below `out`; returns the manifest's path.

    The manifest is written last: without it the files of an interrupted call count for nothing and
    the next call makes them again. `workers`: processes (None: one per core).
    Raises ValueError: options that cannot be met, or a folder that holds something else.
    """
    options = options or DigitsOptions()
    options.check()
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers}: at least 1 is needed")
    out = Path(out)
    record = json.dumps({"format": FORMAT, "options": asdict(options)}, indent=2) + "\n"
    if _is_complete(out, record, overwrite):
        return out / MANIFEST
    for name in (MANIFEST, RECORD):
        (out / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    atomic_write(out / RECORD, record)
    for shape in options.shapes:
        _file(out, shape, 0, 0).parent.mkdir(parents=True)
    rows = _make(out, options, workers or available_cores(), progress)
    manifest.write(out / MANIFEST, rows)
    return out / MANIFEST


def _is_complete(out: Path, record: str, overwrite: bool) -> bool:
    """Whether `out` holds exactly this already. ValueError where it holds anything else, and may not be overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    if not _is_record(out / RECORD):
        raise ValueError(
            f"{out} is not empty and was not made by this program (no {RECORD} of it); give another folder"
        )
    if (out / RECORD).read_text(encoding="utf-8") == record:
        return (out / MANIFEST).is_file() and not overwrite
    if not overwrite:
        raise ValueError(f"{out} was made with other options, see {out / RECORD}; give another folder or --overwrite")
    return False


def _is_record(file: Path) -> bool:
    """Whether `file` is a record of this program, of any options."""
    try:
        return set(read_json(file)) == {"format", "options"}
    except ValueError:
        return False


def _make(out: Path, options: DigitsOptions, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Writes every image and clip; returns the manifest's rows."""
    scans = _some(read_scans(options.seed, options.held_out), options.scans)
    jobs = [(shape, scan, copy) for shape in options.shapes for scan in scans for copy in options.copies(shape, scan)]
    chunks = [jobs[at : at + CHUNK] for at in range(0, len(jobs), CHUNK)]
    bar = _bar(len(jobs), progress)
    rows: list[dict[str, Any]] = []
    if workers == 1:
        made: Iterator[list[dict[str, Any]]] = (_write_chunk(out, options, chunk) for chunk in chunks)
        _collect(rows, made, bar)
    else:
        # Spawned, not forked: scikit-learn has started threads by now.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context) as pool:
            _collect(rows, pool.map(_write_chunk, [out] * len(chunks), [options] * len(chunks), chunks), bar)
    return rows


def _some(scans: list[Scan], count: int) -> list[Scan]:
    """The first `count` scans, both splits in proportion."""
    splits = ([s for s in scans if s.split == name] for name in ("train", "validation"))
    return [scan for split in splits for scan in split[: max(1, round(count * len(split) / len(scans)))]]


def _collect(rows: list[dict[str, Any]], made: Iterator[list[dict[str, Any]]], bar: Any) -> None:
    with bar:
        for chunk in made:
            rows.extend(chunk)
            bar.update(len(chunk))


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="digits", unit="clip", disable=not shown, mininterval=1.0)


# ------------------------------------------------------------------------------------------ clips


def draw(pixels: np.ndarray, shape: Shape, start: tuple[int, int], step: tuple[float, float]) -> np.ndarray:
    """The clip, uint8 (T, H, W): the scan at `start` (top, left) px, moved by `step` (down, right) px a frame."""
    side = (shape.digit, shape.digit)
    digit = (
        pixels if pixels.shape == side else np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BILINEAR))
    )
    frames = np.zeros((shape.frames, shape.height, shape.width), np.uint8)
    for at, frame in enumerate(frames):
        top, left = start[0] + round(step[0] * at), start[1] + round(step[1] * at)
        frame[top : top + shape.digit, left : left + shape.digit] = digit
    return frames


def _file(out: Path, shape: Shape, scan: int, copy: int) -> Path:
    folder, suffix = ("images", "png") if shape.frames == 1 else ("clips", "mp4")
    return out / folder / shape.key / f"{scan:04d}-{copy}.{suffix}"


def _write_chunk(out: Path, options: DigitsOptions, jobs: Sequence[tuple[Shape, Scan, int]]) -> list[dict[str, Any]]:
    return [_write_one(out, options, *job) for job in jobs]


def _write_one(out: Path, options: DigitsOptions, shape: Shape, scan: Scan, copy: int) -> dict[str, Any]:
    # A clip depends on its own name alone, not on which process makes it, or after which others.
    random = np.random.default_rng([options.seed, scan.number, copy, shape.frames, shape.height, shape.width])
    direction = None if shape.frames == 1 else list(DIRECTIONS)[random.integers(4)]
    down, right = DIRECTIONS[direction] if direction else (0, 0)
    path = options.path(shape)
    top = _begin(random, shape.height - shape.digit, path * down, options.grid)
    left = _begin(random, shape.width - shape.digit, path * right, options.grid)
    frames = draw(scan.pixels, shape, (top, left), (down * options.speed, right * options.speed))
    file = _file(out, shape, scan.number, copy)
    write_clip(file, frames, options.fps)
    return {
        "path": file.relative_to(out).as_posix(),
        "caption": caption(scan.digit, direction, scan.split, random),
        "class": scan.digit,
        "fps": None if shape.frames == 1 else options.fps,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "split": scan.split,
        "direction": direction,
        "score": scan.score,
        "score_rank": scan.rank,
        "scan": scan.number,
    }


def _begin(random: np.random.Generator, room: int, path: int, grid: int) -> int:
    """Where along one axis a digit begins, in px, so that a path of `path` px, backwards if negative, stays in
    `room`."""
    places = (room - abs(path)) // grid + 1
    return max(-path, 0) + grid * int(random.integers(places))


# ------------------------------------------------------------------------------------------ scans


def split_scans(count: int, seed: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the scans to train on, and of those held out, which are a share of `held_out`."""
    order = np.random.RandomState(seed).permutation(count)  # RandomState: the same in every numpy
    train = round(count * (1 - held_out))
    return np.sort(order[:train]), np.sort(order[train:])


def read_scans(seed: int, held_out: float) -> list[Scan]:
    """scikit-learn's scans with their split and legibility.

    Legibility: the probability that a classifier gives to the right class. Training scans are judged by
    classifiers that did not see them (5 folds), held-out ones by one that saw all training scans.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.svm import SVC
    from threadpoolctl import threadpool_limits

    # Shapes as scikit-learn documents them; its annotations allow much else.
    data: Any = load_digits()
    flat, digits = np.asarray(data.data, np.float64), np.asarray(data.target)
    train, held = split_scans(len(flat), seed, held_out)
    machine: Any = SVC
    calibrated: Any = CalibratedClassifierCV
    model = calibrated(machine(C=5, gamma=0.05), ensemble=False, cv=3)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = np.zeros(len(flat))
    with threadpool_limits(1):  # on busy cores, many threads take 20 s for what one does in a second
        unseen: Any = cross_val_predict(model, flat[train] / 16, digits[train], cv=folds, method="predict_proba")
        judged = model.fit(flat[train] / 16, digits[train]).predict_proba(flat[held] / 16)
    scores[train] = unseen[np.arange(len(train)), digits[train]]
    scores[held] = judged[np.arange(len(held)), digits[held]]
    pixels = np.rint(flat.reshape(-1, SCAN, SCAN) * (255 / 16)).astype(np.uint8)
    scans = []
    for split, members in (("train", train), ("validation", held)):
        for i in members.tolist():
            peers = scores[members[digits[members] == digits[i]]]
            rank = float((peers < scores[i]).mean())
            scans.append(Scan(i, int(digits[i]), split, round(float(scores[i]), 4), round(rank, 4), pixels[i]))
    return scans


def wordings(digit: int, direction: str | None) -> list[str]:
    """Every caption of a digit standing still (None) or moving."""
    names, article = (WORDS[digit], str(digit)), "an" if digit == 8 else "a"
    if direction is None:
        return [c.format(d=name, a=article) for c in IMAGE_CAPTIONS for name in names]
    sideways = direction in ("left", "right")
    where = (direction, f"to the {direction}" if sideways else f"{direction}wards", f"{direction}ward")
    return [c.format(d=name, a=article, m=m) for c in CLIP_CAPTIONS for name in names for m in where]


def caption(digit: int, direction: str | None, split: str, random: np.random.Generator) -> str:
    """One of many wordings. Every fifth is kept for the held-out split, so that its captions are in no training
    clip."""
    every = wordings(digit, direction)
    first = (3 * digit + [None, *DIRECTIONS].index(direction)) % 5  # another fifth for each digit and direction
    kept = set(range(first, len(every), 5))
    of_split = [c for i, c in enumerate(every) if (i in kept) == (split != "train")]
    return of_split[random.integers(len(of_split))]


# ------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 on an error that the user can mend."""
    default = DigitsOptions()
    shapes = " ".join(map(str, default.shapes))
    parser = argparse.ArgumentParser(
        prog="python -m stdit.data.digits",
        description="Images and clips of handwritten digits, with a manifest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--shapes", nargs="+", default=shapes.split(), metavar="FxHxW:DIGIT:N", help="frames x height x width : the digit's side in px : clips of each scan")  # fmt: skip
    add("--speed", type=float, default=default.speed, help="px a frame")
    add("--grid", type=int, default=default.grid, help="paths begin on multiples of this many px")
    add("--fps", type=int, default=default.fps, help="frames a second of the clips")
    add("--held-out", type=float, default=default.held_out, help="share of scans in split validation")
    add("--held-out-copies", type=int, default=default.held_out_copies, help="clips of each of those, at most")
    add("--scans", type=int, default=default.scans, help="scans that are used, for a quick look")
    add("--seed", type=int, default=default.seed, help="of the split, the paths and the wording")
    add("--workers", type=int, help="processes; one per core if not given")
    add("--overwrite", action="store_true", help="replace what other options made")
    given = parser.parse_args(arguments)
    try:
        values = {f.name: getattr(given, f.name) for f in fields(DigitsOptions) if f.name != "shapes"}
        options = DigitsOptions(tuple(map(Shape.parse, given.shapes)), **values)
        path = make_digits(given.out, options, overwrite=given.overwrite, workers=given.workers, progress=True)
    except (ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    clips = manifest.read(path)
    echo(f"{path}: {len(clips)} clips, {', '.join(f'{count} {split}' for split, count in clips.splits.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
