"""Laws of crops, motion directions and the classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from stdit.evaluation.classifier import (
    DIRECTIONS,
    NO_DIRECTION,
    ClassifierInfo,
    ClipClassifier,
    centroids,
    crops,
    direction,
    foreground,
    to_float,
    train_classifier,
)

SIZE = 16
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def clip_of(picture: np.ndarray, canvas: int, frames: int, towards: str = "right", seed: int = 0) -> np.ndarray:
    """`picture` (h, w) in [0, 1], nearest-neighbour enlarged to half the canvas, moving a pixel a frame. uint8 (T, H,
    W, 3)."""
    enlarged = np.kron(picture, np.ones((canvas // 2 // len(picture),) * 2))
    side, rng = len(enlarged), np.random.default_rng(seed)
    path = np.array([np.array(STEPS[towards]) * t for t in range(frames)])
    low, high = path.min(0), path.max(0)
    start = rng.integers(-low, canvas - side - high + 1)
    clip = np.zeros((frames, canvas, canvas))
    for image, (y, x) in zip(clip, path + start, strict=True):
        image[y : y + side, x : x + side] = enlarged
    return np.repeat((clip * 255).round().astype(np.uint8)[..., None], 3, -1)


@pytest.fixture(scope="module")
def scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits, split once: train and held_out, each (pictures in [0, 1], labels)."""
    flat, target = load_digits(return_X_y=True)
    pictures = np.asarray(flat).reshape(-1, 8, 8) / 16
    order = np.random.default_rng(0).permutation(len(pictures))
    cut = int(0.8 * len(order))
    return {
        name: (pictures[chosen], np.asarray(target)[chosen])
        for name, chosen in (("train", order[:cut]), ("held_out", order[cut:]))
    }


@pytest.fixture(scope="module")
def classifier(scans) -> ClipClassifier:
    pictures, labels = scans["train"]
    images = torch.cat([crops(clip_of(p, 16, 1, seed=i), SIZE) for i, p in enumerate(pictures)])
    info = ClassifierInfo(tuple("0123456789"), SIZE, "foreground", fingerprint="f")
    return train_classifier(images, torch.from_numpy(labels), info, steps=200)


@pytest.mark.parametrize(("canvas", "frames"), [(16, 1), (16, 4), (32, 8)])
def test_the_classifier_recognises_held_out_clips_at_sizes_and_lengths_it_was_not_trained_on(
    classifier, scans, canvas: int, frames: int
) -> None:
    pictures, labels = scans["held_out"]
    clips = [clip_of(p, canvas, frames, DIRECTIONS[i % 4], seed=i) for i, p in enumerate(pictures)]
    output = classifier.predict(clips)
    assert np.mean(np.array(output.names) == labels.astype(str)) >= 0.97
    assert output.features.shape == (len(clips), 64)
    assert all(0.1 <= p <= 1 for p in output.probabilities)


def test_the_classifier_tolerates_noise_on_the_background(classifier, scans) -> None:
    pictures, labels = scans["held_out"]
    noise = np.random.default_rng(0)
    clips = [
        np.clip(clip_of(p, 16, 2, seed=i) + noise.normal(0, 12, (2, 16, 16, 1)), 0, 255).astype(np.uint8)
        for i, p in enumerate(pictures)
    ]
    assert np.mean(np.array(classifier.predict(clips).names) == labels.astype(str)) >= 0.97


def test_the_same_seed_gives_the_same_classifier_whatever_the_global_state(scans) -> None:
    pictures, labels = scans["train"]
    images = torch.cat([crops(clip_of(p, 16, 1), SIZE) for p in pictures[:64]])
    info = ClassifierInfo(tuple("0123456789"), SIZE, "foreground")
    classifiers = []
    for _ in range(2):
        torch.rand(3)
        classifiers.append(train_classifier(images, torch.from_numpy(labels[:64]), info, steps=3, seed=5))
    a, b = (r.net.state_dict() for r in classifiers)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_saved_classifier_predicts_the_same(classifier, scans, tmp_path: Path) -> None:
    classifier.save(tmp_path / "classifier.safetensors")
    again = ClipClassifier.load(tmp_path / "classifier.safetensors")
    assert again.info == classifier.info
    clips = [clip_of(p, 16, 2) for p in scans["held_out"][0][:5]]
    np.testing.assert_array_equal(again.predict(clips).features, classifier.predict(clips).features)


def test_another_file_is_no_classifier(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: not a classifier"):
        ClipClassifier.load(tmp_path / "x.safetensors")


def test_a_classifier_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 and 0"):
        train_classifier(
            torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long), ClassifierInfo(("a",), 16, "frame")
        )


@pytest.mark.parametrize("towards", DIRECTIONS)
@pytest.mark.parametrize("inverted", [False, True])
def test_the_direction_is_that_of_the_foreground(scans, towards: str, inverted: bool) -> None:
    for i, picture in enumerate(scans["train"][0][:20]):
        clip = clip_of(picture, 32, 6, towards, seed=i)
        # Black on white is foreground as well as white on black.
        assert direction(255 - clip if inverted else clip, 0.05) == towards


def test_what_stands_still_or_shows_nothing_has_no_direction(scans) -> None:
    still = np.repeat(clip_of(scans["train"][0][0], 16, 1), 5, 0)
    assert direction(still, 0.05) == NO_DIRECTION
    assert direction(np.zeros((5, 16, 16, 3), np.uint8), 0.0) == NO_DIRECTION
    assert direction(still[:1], 0.0) == NO_DIRECTION


def test_a_motion_below_the_least_is_none(scans) -> None:
    clip = clip_of(scans["train"][0][0], 32, 3, "left")  # 2 pixels of 32: 0.0625
    assert direction(clip, 0.05) == "left"
    assert direction(clip, 0.08) == NO_DIRECTION


def test_a_crop_does_not_depend_on_where_the_foreground_is(scans) -> None:
    clip = clip_of(scans["train"][0][3], 32, 9, "down")
    cut = crops(clip, SIZE)
    assert cut.shape == (9, 3, SIZE, SIZE)
    torch.testing.assert_close(cut, cut[:1].expand_as(cut), atol=1e-5, rtol=0)


def test_a_crop_does_not_depend_on_how_large_the_foreground_is(scans) -> None:
    small, large = (crops(clip_of(scans["train"][0][3], canvas, 1), SIZE) for canvas in (32, 64))
    assert (small - large).abs().mean() < 0.03


def test_an_empty_frame_is_not_cropped() -> None:
    gray = np.full((2, 12, 20, 3), 100, np.uint8)
    torch.testing.assert_close(crops(gray, SIZE), torch.full((2, 3, SIZE, SIZE), 100 / 255))


def test_crop_frame_takes_the_full_frame() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, None, :, None], (1, 32, 64, 3))
    cut = crops(np.ascontiguousarray(ramp), SIZE, "frame")
    expected = (torch.arange(64.0).view(16, 4).mean(1) / 255).expand(1, 3, SIZE, SIZE)
    torch.testing.assert_close(cut, expected, atol=1e-3, rtol=0)


def test_a_few_stray_pixels_hardly_move_the_centre(scans) -> None:
    clip = clip_of(scans["train"][0][7], 32, 1)
    stray = clip.copy()
    stray[0, 1, 30] = stray[0, 30, 1] = 255
    centres = [centroids(foreground(to_float(c))) for c in (clip, stray)]
    assert (centres[0] - centres[1]).abs().max() < 1.0


def test_an_array_that_is_not_a_clip_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"float64 \(2, 4, 4, 3\)"):
        direction(np.zeros((2, 4, 4, 3)), 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"uint8 \(4, 4, 3\)"):
        crops(np.zeros((4, 4, 3), np.uint8), SIZE)
