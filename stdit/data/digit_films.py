"""Raw footage for the embedded default: short films of scikit-learn's scans of handwriting, with what curation has to
find.

    python -m stdit.data.digit_films --out data/films

writes films/NAME.mp4 (some with NAME.txt, a caption), two images, and films.json: for each film its shots with frames,
what they show, and what is wrong with them. A second call with the same options does nothing.

    python -m stdit.data.digit_films --out data/films --on-black 40

writes so many films whose good shots, at 12 x 12 px and 8 frames a second, look like the clips of stdit.data.digits:
one digit to a film, another scan of it in each shot, which moves one way over black, and a caption in the same words.
Every sixth film has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from stdit.console import echo
from stdit.data.digits import DIRECTIONS, DigitsOptions, caption, split_scans
from stdit.errors import exit_code
from stdit.files import atomic_write
from stdit.media import write_video
from stdit.outputs import claim_outputs

FORMAT = 1
FPS, HEIGHT, WIDTH = 12, 96, 128
RECORD = "films.json"
# Shots of each film, as (seconds, what is wrong), and how each is joined to the next.
FILMS: dict[str, list[tuple[float, str | None, str]]] = {
    "plain": [(2.5, None, "cut"), (2.5, None, "cut"), (3, None, "cut"), (2.5, None, "cut")],
    "dissolves": [(3, None, "dissolve"), (3, None, "cut"), (3, None, "dissolve"), (3, None, "cut")],
    "faults": [(2.5, None, "cut"), (2.5, "frozen", "cut"), (2.5, "blurred", "cut"), (2, "black", "cut"), (2.5, None, "cut")],
    "letterboxed": [(2.5, None, "cut"), (2.5, None, "cut")],
    "copied": [(2.5, "duplicate", "cut"), (2.5, None, "cut")],
    "short": [(2.5, None, "cut"), (0.4, "short", "cut"), (2.5, None, "cut")],
}  # fmt: skip
CAPTIONED = ("plain", "letterboxed")
# The shots of a film on black, each of 13 frames: the way that there is at 1 px of 12 in an eighth of a second.
ON_BLACK: tuple[str | None, ...] = (None, None, "frozen", None, "black", None, "short", None)
BLACK_FPS, BLACK_SIDE, BLACK_DIGIT, BLACK_FRAMES, BLACK_STEP = 24, 48, 32, 13, 4 / 3
UNCAPTIONED = 6  # one film in so many
BARS = 12  # px above and below, of the letterboxed film
DISSOLVE = 8  # frames


@dataclass(frozen=True)
class Shot:
    """Frames [start, end) of a film that show one scene alone. fault: None, frozen, blurred, black, duplicate or
    short."""

    start: int
    end: int
    digit: int
    direction: str
    fault: str | None


def make_films(out: Path | str, seed: int = 0, on_black: int = 0) -> dict[str, list[Shot]]:
    """Writes the films below `out`, or `on_black` films over black in their place; the shots of each. ValueError: a
    folder with other films, a negative number."""
    if on_black < 0:
        raise ValueError(f"on_black {on_black}: a number of films, or 0 for those over clouds")
    out = Path(out)
    if not (out / RECORD).is_file():
        claim_outputs(out, "digit-films", [RECORD, "films"])
    films, made, captions = _films_on_black(seed, on_black) if on_black else _films(seed)
    options = {"seed": seed, "fps": BLACK_FPS, "on_black": on_black} if on_black else {"seed": seed, "fps": FPS}
    record = json.dumps(
        {"format": FORMAT, **options, "films": {k: [asdict(s) for s in v] for k, v in films.items()}}, indent=1
    )
    if (out / RECORD).is_file():
        if (out / RECORD).read_text(encoding="utf-8") != record:
            raise ValueError(f"{out} holds films of another seed or version; give another folder")
        return films
    folder = out / "films"
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in made.items():
        write_video(folder / f"{name}.mp4", frames, options["fps"])
        if name in captions:
            atomic_write(folder / f"{name}.txt", f"{captions[name]}\n")
    for name in () if on_black else ("plain", "short"):
        Image.fromarray(made[name][4]).save(folder / f"{name}-still.png")
    atomic_write(out / RECORD, record)
    return films


Films = tuple[dict[str, list[Shot]], dict[str, np.ndarray], dict[str, str]]


def _films(seed: int) -> Films:
    """The films over clouds: shots, frames and captions by name."""
    films, made = {}, {}
    first: np.ndarray | None = None
    for number, (name, parts) in enumerate(FILMS.items()):
        random = np.random.default_rng([seed, number])
        frames, shots = _film(random, parts, first)
        if name == "plain":
            first = frames[shots[0].start : shots[0].end]
        if name == "letterboxed":
            frames[:, :BARS] = frames[:, -BARS:] = 0
        if name == "copied":  # smaller, and encoded with loss: the same picture in other bytes
            frames = np.stack([np.asarray(Image.fromarray(f).resize((96, 72), Image.Resampling.BOX)) for f in frames])
        films[name], made[name] = shots, frames
    return films, made, {name: f"handwritten digits over clouds, film {name}" for name in CAPTIONED}


def _films_on_black(seed: int, count: int) -> Films:
    """`count` films of the scans that stdit.data.digits trains on with the same seed: shots, frames and captions by
    name."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    train, _ = split_scans(len(data.target), seed, DigitsOptions().held_out)
    films, made, captions = {}, {}, {}
    for number in range(count):
        name, random = f"film-{number:03d}", np.random.default_rng([seed, number])
        digit, direction = number % 10, list(DIRECTIONS)[number // 10 % len(DIRECTIONS)]
        scans = random.choice(train[data.target[train] == digit], len(ON_BLACK), replace=False)
        shots, frames, at = [], [], 0
        for scan, fault in zip(scans, ON_BLACK, strict=True):
            shot = _shot_on_black(random, np.rint(data.images[scan] * (255 / 16)).astype(np.uint8), direction, fault)
            shots.append(Shot(at, at + len(shot), digit, direction, fault))
            frames.append(shot)
            at += len(shot)
        films[name], made[name] = shots, np.concatenate(frames)
        if number % UNCAPTIONED:
            captions[name] = caption(digit, direction, "train", random)
    return films, made, captions


def _shot_on_black(random: np.random.Generator, scan: np.ndarray, direction: str, fault: str | None) -> np.ndarray:
    """uint8 (T, H, W): the scan, four times its size, moves over black."""
    if fault == "black":
        return np.zeros((BLACK_FRAMES, BLACK_SIDE, BLACK_SIDE), np.uint8)
    digit, room = scan.repeat(BLACK_DIGIT // len(scan), 0).repeat(BLACK_DIGIT // len(scan), 1), BLACK_SIDE - BLACK_DIGIT
    frames = np.zeros((6 if fault == "short" else BLACK_FRAMES, BLACK_SIDE, BLACK_SIDE), np.uint8)
    start = random.integers(0, room + 1, 2)  # across its way; along it there is room for one
    for t, frame in enumerate(frames):
        moved = 0 if fault == "frozen" else round(BLACK_STEP * t)
        top, left = (
            room - moved if step < 0 else moved if step > 0 else at
            for step, at in zip(DIRECTIONS[direction], start, strict=True)
        )
        frame[top : top + BLACK_DIGIT, left : left + BLACK_DIGIT] = digit
    return frames


def _film(
    random: np.random.Generator, parts: Sequence[tuple[float, str | None, str]], copied: np.ndarray | None
) -> tuple[np.ndarray, list[Shot]]:
    frames: list[np.ndarray] = []
    shots: list[Shot] = []
    at = 0
    for number, (seconds, fault, join) in enumerate(parts):
        digit, direction = int(random.integers(10)), str(random.choice(list(DIRECTIONS)))
        shot = _shot(random, round(seconds * FPS), digit, direction)
        if fault == "frozen":
            shot[:] = shot[len(shot) // 2]
        elif fault == "blurred":
            shot = np.stack([gaussian_filter(frame, (7, 7, 0)) for frame in shot])
        elif fault == "black":
            shot[:] = 4
        elif fault == "duplicate" and copied is not None:
            shot = copied.astype(np.float32)
        start = at
        if number and parts[number - 1][2] == "dissolve":
            weight = ((np.arange(DISSOLVE) + 1) / (DISSOLVE + 1))[:, None, None, None]
            frames[-1][-DISSOLVE:] = frames[-1][-DISSOLVE:] * (1 - weight) + shot[:DISSOLVE] * weight
            shot = shot[DISSOLVE:]
        at += len(shot)
        shots.append(Shot(start, at - DISSOLVE if join == "dissolve" else at, digit, direction, fault))
        frames.append(shot)
    return np.concatenate(frames).clip(0, 255).astype(np.uint8), shots


def _shot(random: np.random.Generator, frames: int, digit: int, direction: str) -> np.ndarray:
    """float32 (T, H, W, 3): a digit moves over clouds of one colour, with a little noise."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    scan = data.images[random.choice(np.flatnonzero(data.target == digit))]
    side = HEIGHT // 2
    picture = Image.fromarray((scan * 15.9).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    ink = np.asarray(picture)[..., None] / np.float32(255)
    clouds = np.zeros((HEIGHT, WIDTH, 1))
    for cell in (4, 8, 16, 32):
        coarse = random.normal(0, 1, (HEIGHT // cell, WIDTH // cell, 1))
        clouds += np.asarray(zoom(coarse, (cell, cell, 1), order=1)) * cell
    ground = random.integers(50, 150, 3) + clouds * random.uniform(0.8, 1.6)
    colour = random.integers(170, 255, 3)
    down, right = DIRECTIONS[direction]
    path = 1.2 * (frames - 1)
    top, left = (HEIGHT - side - down * path) / 2, (WIDTH - side - right * path) / 2
    made = np.repeat(ground[None], frames, 0).astype(np.float32)
    for t in range(frames):
        y = int(np.clip(top + down * 1.2 * t, 0, HEIGHT - side))
        x = int(np.clip(left + right * 1.2 * t, 0, WIDTH - side))
        place = made[t, y : y + side, x : x + side]
        place[:] = place * (1 - ink) + colour * ink
    return made + random.normal(0, 1.5, made.shape).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m stdit.data.digit_films", description="Raw footage of handwritten digits."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on-black", type=int, default=0, help="so many films that look like the clips of stdit.data.digits"
    )
    options = parser.parse_args(argv)
    try:
        films = make_films(options.out, options.seed, options.on_black)
    except (ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    echo(
        f"{options.out / 'films'}: {len(films)} films, {sum(map(len, films.values()))} shots"
        + ("" if options.on_black else ", 2 images")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
