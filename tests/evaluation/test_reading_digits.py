"""The demo's own clips: a classifier trained on the manifest classifies held-out ones right, at both sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit.config import Bucket, EvaluationConfig
from stdit.data.digits import DigitsOptions, Shape, make_digits
from stdit.data.manifest import read
from stdit.evaluation.classifier import direction
from stdit.evaluation.evaluator import load_or_train_classifier
from stdit.evaluation.validation_clips import class_of, direction_of, load_clip, select

SHAPES = (Shape(4, 12, 12, 8, 1), Shape(8, 16, 16, 8, 1))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("digits"), DigitsOptions(shapes=SHAPES), workers=2)


@pytest.mark.slow
def test_the_classifier_recognises_held_out_digits_at_both_sizes(digits: Path, tmp_path: Path) -> None:
    config, source = EvaluationConfig(classifier_steps=200, classifier_frames=2000), read(digits)
    classifier = load_or_train_classifier(source, config, tmp_path)
    assert classifier is not None
    assert classifier.info.classes == tuple("0123456789")
    accuracy = classifier.info.held_out_accuracy
    assert accuracy is not None
    assert accuracy >= 0.97
    for shape in SHAPES:
        bucket = Bucket(frames=shape.frames, height=shape.height, width=shape.width)
        clips = select(source, "validation", bucket, 1, 0)
        frames = [load_clip(clip, bucket) for clip in clips]
        classified_right = sum(
            a == class_of(b, config) for a, b in zip(classifier.predict(frames).names, clips, strict=True)
        )
        moved_right = sum(direction(f, 0.05) == direction_of(c, config) for f, c in zip(frames, clips, strict=True))
        assert len(clips) > 300
        assert classified_right >= 0.97 * len(clips)
        assert moved_right >= 0.99 * len(clips)
