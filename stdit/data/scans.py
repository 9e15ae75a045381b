"""scikit-learn's 1,797 scans of handwritten digits: split, judged, and put into words (for digits.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

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


class Scan(NamedTuple):
    """One scan: uint8 (8, 8); its legibility, and the share of its split and class that is less legible."""

    number: int
    digit: int
    split: str
    score: float
    rank: float
    pixels: np.ndarray


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
    order = np.random.RandomState(seed).permutation(len(flat))  # RandomState: the same in every numpy
    count = round(len(flat) * (1 - held_out))
    train, held = np.sort(order[:count]), np.sort(order[count:])
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
    """One of many wordings. Every fifth is kept for the held-out split, so that its captions are in no training clip."""
    every = wordings(digit, direction)
    first = (3 * digit + [None, *DIRECTIONS].index(direction)) % 5  # another fifth for each digit and direction
    kept = set(range(first, len(every), 5))
    of_split = [c for i, c in enumerate(every) if (i in kept) == (split != "train")]
    return of_split[random.integers(len(of_split))]
