"""Laws of the metrics against torch-fidelity: on the same features, and from pixels with the same random Inception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from stdit.evaluation import inception as inception_module
from stdit.evaluation.inception import load_inception, resize_as_tensorflow1
from stdit.evaluation.metrics import (
    frechet_distance,
    frechet_distance_of_statistics,
    inception_score,
    kernel_inception_distance,
    precision_recall,
    statistics_of,
)
from tests.support.feature_networks import save_inception
from tests.support.fidelity import torch_fidelity


def features(seed: int, count: int, width: int = 16, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def pictures(seed: int, count: int, side: int = 40) -> torch.Tensor:
    """Smooth random pictures, uint8 (n, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().byte()


# ------------------------------------------------------------------------------ the same features


def test_the_frechet_distance_is_torch_fidelitys() -> None:
    fid = torch_fidelity("metric_fid")
    a, b = features(0, 300), features(1, 200, shift=0.3)
    theirs = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False
    )[fid.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)
    assert frechet_distance_of_statistics(statistics_of(a), statistics_of(b)) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("subsets", "size"), [(10, 50), (3, 200)])
def test_the_kernel_distance_is_torch_fidelitys(subsets: int, size: int) -> None:
    kid = torch_fidelity("metric_kid")
    a, b = features(0, 300), features(1, 200, shift=0.3)
    theirs = kid.kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=2020,
        verbose=False,
    )[kid.KEY_METRIC_KID_MEAN]
    assert kernel_inception_distance(a, b, subsets, size) == pytest.approx(theirs, rel=1e-9)


def test_the_inception_score_is_torch_fidelitys() -> None:
    isc = torch_fidelity("metric_isc")
    logits = 3 * features(2, 205, 30)
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits), 10, True, 2020)[isc.KEY_METRIC_ISC_MEAN]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("neighbors", [1, 3])
def test_precision_and_recall_are_torch_fidelitys_and_scikit_learns(neighbors: int) -> None:
    prc = torch_fidelity("metric_prc")
    a, b = features(3, 150, 4), features(3, 120, 4, shift=1.0)
    precision, recall = (float(x.mean()) for x in precision_recall(a, b, neighbors))
    theirs = prc.prc_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), prc_neighborhood=neighbors, prc_batch_size=1000, save_cpu_ram=False,
        verbose=False,
    )  # fmt: skip
    assert (precision, recall) == (
        pytest.approx(theirs[prc.KEY_METRIC_PRECISION]),
        pytest.approx(theirs[prc.KEY_METRIC_RECALL]),
    )
    assert 0 < precision < 1
    reach = NearestNeighbors(n_neighbors=neighbors + 1).fit(b).kneighbors(b)[0][:, -1]
    inside = np.linalg.norm(a[:, None] - b[None], axis=2) <= reach
    assert precision == inside.any(1).mean()


# ------------------------------------------------------------------------------------ from pixels


def test_the_resize_is_tensorflow_1s_to_the_bit() -> None:
    theirs = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    for side in (8, 40, 299, 400):
        x = pictures(side, 2, side).float()
        assert torch.equal(resize_as_tensorflow1(x, 299), theirs(x, size=(299, 299), align_corners=False))


def test_features_and_logits_of_inception_are_torch_fidelitys(inception: Path) -> None:
    theirs = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "test", ["64", "192", "768", "2048", "logits_unbiased"], feature_extractor_weights_path=str(inception)
    )
    net, images = load_inception(inception), pictures(0, 3)
    found = theirs(images)
    for dims, expected in zip((64, 192, 768, 2048), found[:4], strict=True):
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(net(images, dims)[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(images)[1], found[4], rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dims", [64, 192, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_distance_from_pixels_is_torch_fidelitys(
    inception: Path, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pictures than dimensions: eigenvalues of torch-fidelity's product are exact to 1e-6 at full rank alone.

    Both resize to 75 pixels in place of 299, the least that the network takes, which costs a sixteenth.
    """
    fid = torch_fidelity("metric_fid")
    theirs = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "test", [str(dims)], feature_extractor_weights_path=str(inception)
    )
    monkeypatch.setattr(type(theirs), "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(inception_module, "SIZE", 75)
    net = load_inception(inception)
    found, expected = [], []
    for seed in (1, 2):
        batches = (pictures(seed, dims + 4, 24) // seed).split(32)
        found.append(torch.cat([net(x, dims)[0] for x in batches]).numpy())
        expected.append(fid.fid_features_to_statistics(torch.cat([theirs(x)[0] for x in batches])))
    value = fid.fid_statistics_to_metric(*expected, False)[fid.KEY_METRIC_FID]
    assert value > 0
    assert frechet_distance(*found) == pytest.approx(value, rel=1e-6)


def test_other_weights_are_not_inception(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: not InceptionV3 .* keys are missing"):
        load_inception(tmp_path / "x.pth")
