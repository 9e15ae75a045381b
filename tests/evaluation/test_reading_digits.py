"""The demo's own clips: the reader learns them from the manifest alone and reads held-out ones right, at both sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit.config import Bucket, EvaluationConfig
from stdit.data.digits import DigitsOptions, Shape, make_digits
from stdit.data.manifest import read
from stdit.evaluate import reader_for
from stdit.evaluation.classifier import direction
from stdit.evaluation.held_out import class_of, direction_of, load, select

SHAPES = (Shape(4, 12, 12, 8, 1), Shape(8, 16, 16, 8, 1))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("digits"), DigitsOptions(shapes=SHAPES), workers=2)


def test_the_reader_reads_held_out_digits_at_both_sizes(digits: Path, tmp_path: Path) -> None:
    config, source = EvaluationConfig(reader_steps=200, reader_frames=2000), read(digits)
    reader = reader_for(source, config, tmp_path)
    assert reader is not None
    assert reader.info.classes == tuple("0123456789")
    accuracy = reader.info.held_out_accuracy
    assert accuracy is not None
    assert accuracy >= 0.97
    for shape in SHAPES:
        bucket = Bucket(frames=shape.frames, height=shape.height, width=shape.width)
        clips = select(source, "validation", bucket, 1, 0)
        frames = [load(clip, bucket) for clip in clips]
        read_right = sum(a == class_of(b, config) for a, b in zip(reader.read(frames).names, clips, strict=True))
        moved_right = sum(direction(f, 0.05) == direction_of(c, config) for f, c in zip(frames, clips, strict=True))
        assert len(clips) > 300
        assert read_right >= 0.97 * len(clips)
        assert moved_right >= 0.99 * len(clips)
