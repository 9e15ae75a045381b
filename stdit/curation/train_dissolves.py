"""Trains the classifier of stdit.curation.dissolves on generated films, and writes its weights beside it.

python -m stdit.curation.train_dissolves --films 80
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from stdit.console import echo
from stdit.curation.analysis import analyse
from stdit.curation.dissolves import WEIGHTS, features
from stdit.curation.footage import make_film
from stdit.media import write_video

HIDDEN = (48, 24)


def film_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of one film's frames: 1 within a dissolve or fade. At 24 to 60 frames a second."""
    film = make_film(seed, "train", shots=8, size=(54, 96), fps=(24, 25, 24, 30, 24, 25, 30, 60)[seed % 8])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, film.frames, film.fps)
        found = analyse(path)
    inside = np.zeros(found.frame_count, bool)
    for transition in film.transitions:
        inside[transition.start : transition.end] = True
    columns = {name: values.astype(np.float32) for name, values in found.frames.items()}
    return features(columns, found.fps), inside


def main(argv: Sequence[str] | None = None) -> None:
    from sklearn.neural_network import MLPClassifier

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--films", type=int, default=80)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(film_rows, range(1000, 1000 + args.films)))
    x, y = np.concatenate([a for a, _ in rows]), np.concatenate([b for _, b in rows])
    mean, scale = x.mean(0), x.std(0) + 1e-6
    classifier: Any = MLPClassifier
    model = classifier(HIDDEN, alpha=1e-2, batch_size=256, max_iter=60, early_stopping=True, random_state=0)
    model.fit((x - mean) / scale, y)
    layers = {f"weight{i}": w.astype(np.float32) for i, w in enumerate(model.coefs_)}
    layers |= {f"bias{i}": b.astype(np.float32) for i, b in enumerate(model.intercepts_)}
    np.savez(WEIGHTS, allow_pickle=False, mean=mean.astype(np.float32), scale=scale.astype(np.float32), **layers)
    echo(
        f"{len(y):,} frames, {y.mean():.1%} within transitions, accuracy {model.score((x - mean) / scale, y):.4f}: {WEIGHTS}"
    )


if __name__ == "__main__":
    main()
