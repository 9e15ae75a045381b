"""The .npz files of ADM's evaluator (guided-diffusion): samples `arr_0`, statistics `mu` and `sigma`.

DiT's and others' reference statistics are such files, and samples written here can be scored by their evaluators.
Statistics that we write also say of which network they are: `network`, `count`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stdit.evaluation.metrics import Statistics
from stdit.files import atomic_path

SAMPLES = "arr_0"
_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError)


@dataclass(frozen=True)
class AdmFile:
    """What an .npz holds. samples: shape (n, H, W, 3) of `arr_0`; network: recorded by us alone."""

    path: Path
    samples: tuple[int, int, int, int] | None
    statistics: Statistics | None
    network: str | None = None


def read_adm(path: Path) -> AdmFile:
    """Statistics, and the shape of the samples, which SampleReader reads. ValueError: damaged, or neither is in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            samples = None
            if f"{SAMPLES}.npy" in names:
                with archive.open(f"{SAMPLES}.npy") as member:
                    samples = _samples_shape(path, member)
        statistics, network = None, None
        if {"mu.npy", "sigma.npy"} <= names:
            with np.load(path, allow_pickle=False) as arrays:
                count = int(arrays["count"]) if "count.npy" in names else None
                network = str(arrays["network"]) if "network.npy" in names else None
                statistics = _statistics(path, arrays["mu"], arrays["sigma"], count)
    except _ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    if samples is None and statistics is None:
        raise ValueError(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}; expected arr_0, or mu and sigma")
    return AdmFile(path, samples, statistics, network)


def _statistics(path: Path, mu: NDArray[Any], sigma: NDArray[Any], count: int | None) -> Statistics:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean and covariance")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu or sigma is not finite (NaN or infinity)")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), count)


def _samples_shape(path: Path, member: Any) -> tuple[int, int, int, int]:
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (n, height, width, 3)")
    return shape


class SampleReader:
    """Images of `arr_0` by row, without reading the whole file: rows ahead of the last one are read on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self._rewind()

    def _rewind(self) -> None:
        self._member = self._archive.open(f"{SAMPLES}.npy")
        self.count, self.height, self.width, _ = _samples_shape(self.path, self._member)
        self._next = 0

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """Image (H, W, 3). ValueError: the file ends before it."""
        if row < self._next:
            self._member.close()
            self._rewind()
        while True:
            content = self._member.read(self.height * self.width * 3)
            if len(content) < self.height * self.width * 3:
                raise ValueError(f"{self.path}: arr_0 ends within image {self._next} of {self.count}")
            self._next += 1
            if self._next > row:
                return np.frombuffer(content, np.uint8).reshape(self.height, self.width, 3)


def write_samples(path: Path, images: Iterable[NDArray[np.uint8]], count: int) -> None:
    """Writes `count` images (H, W, 3) as `arr_0`, one after the other, atomically. ValueError: other counts or
    shapes."""
    with atomic_path(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        shape, written = None, 0
        with archive.open(f"{SAMPLES}.npy", "w", force_zip64=True) as member:
            for image in images:
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    npy.write_array_header_1_0(member, header)
                if image.shape != shape:
                    raise ValueError(f"{path}: images of {shape} and of {image.shape}")
                member.write(np.ascontiguousarray(image, np.uint8).tobytes())
                written += 1
        if written != count:
            raise ValueError(f"{path}: {written} images, {count} were announced")


def write_statistics(path: Path, statistics: Statistics, network: str) -> None:
    """Writes mu and sigma, and of which network they are, atomically."""
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez(
            file, mu=statistics.mean, sigma=statistics.covariance,
            count=np.array(statistics.count or 0), network=np.array(network),
        )  # fmt: skip
