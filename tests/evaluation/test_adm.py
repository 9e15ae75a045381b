"""Laws of ADM's .npz files: what is written is what numpy and others read, and the other way round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stdit.evaluation.adm import SampleReader, read_adm, write_samples, write_statistics
from stdit.evaluation.metrics import Statistics, statistics_of

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_of_others_are_read_one_by_one(tmp_path: Path, save) -> None:
    path = tmp_path / "x.npz"
    save(path, IMAGES, np.arange(5))  # arr_0, and the labels arr_1
    assert read_adm(path).samples == IMAGES.shape
    reader = SampleReader(path)
    for row in (0, 1, 4, 2, 2, 3):
        np.testing.assert_array_equal(reader[row], IMAGES[row])


def test_samples_that_are_written_are_what_numpy_reads(tmp_path: Path) -> None:
    write_samples(tmp_path / "x.npz", iter(IMAGES), 5)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
    with pytest.raises(ValueError, match="5 images, 6 were announced"):
        write_samples(tmp_path / "y.npz", iter(IMAGES), 6)
    assert not (tmp_path / "y.npz").exists()


def test_statistics_survive(tmp_path: Path) -> None:
    statistics = statistics_of(np.random.default_rng(0).normal(size=(20, 4)))
    write_statistics(tmp_path / "s.npz", statistics, "abc")
    found = read_adm(tmp_path / "s.npz")
    assert (found.network, found.samples) == ("abc", None)
    assert isinstance(found.statistics, Statistics)
    np.testing.assert_array_equal(found.statistics.covariance, statistics.covariance)
    assert found.statistics.count == 20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "holds x.npy; expected arr_0, or mu and sigma"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 \(2, 4, 4, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "are no mean and covariance"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.array([None, 1], object), "sigma": np.zeros((2, 2))}, "not a readable .npz"),
    ],
)
def test_other_files_are_refused_in_a_line_with_their_name(tmp_path: Path, arrays, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        read_adm(tmp_path / "bad.npz")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", IMAGES)
    content = (tmp_path / "bad.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"bad\.npz: not a readable \.npz"):
        read_adm(tmp_path / "bad.npz")
