"""Several captions a clip: features of each once, and training draws among them by shares, per clip and epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from stdit.config import (
    ByteT5Config,
    ConfigError,
    DataConfig,
    ExtractBucket,
    ExtractConfig,
    TextEncoderConfig,
    TrainBucket,
    VideoEncoderConfig,
)
from stdit.data import manifest
from stdit.data.features import FeatureSet
from stdit.data.loader import Loader
from tests.support.videos import lossless, smooth

CLIPS = 24


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    from stdit.extract import run

    folder = tmp_path_factory.mktemp("captions")
    lossless(folder / "film.mp4", smooth(CLIPS * 2, 16, 16))
    rows = [
        {
            "path": "film.mp4", "start_frame": 2 * i, "end_frame": 2 * i + 2, "fps": 24, "height": 16, "width": 16,
            "caption": f"own {i}", "caption_dense": f"dense and longer {i}" if i else None, "caption_short": f"short {i}",
        }
        for i in range(CLIPS)
    ]  # fmt: skip
    manifest.write(folder / "manifest.jsonl", rows)
    text = TextEncoderConfig(byte_t5=ByteT5Config(width=16, depth=1, num_heads=2), max_text_tokens=24)
    config = ExtractConfig(
        manifest=folder / "manifest.jsonl", out=folder / "features", captions=("dense", "short"), text_encoder=text,
        buckets=(ExtractBucket(frames=2, height=16, width=16),), video_encoder=VideoEncoderConfig(kind="pixels"),
    )  # fmt: skip
    return FeatureSet(run(config))


def loader(
    features: FeatureSet, captions: dict[str, float] | None, ranks: int = 1, rank: int = 0, seed: int = 0
) -> Loader:
    bucket = TrainBucket(frames=2, height=16, width=16, batch_size=6 // ranks)
    data = DataConfig(features=features.path, buckets=(bucket,), captions=captions)
    return Loader(features, data, seed, rank, ranks)


def drawn(own: Loader, steps: int) -> list[str]:
    found: list[str] = []
    for step in own:
        found += [caption for batch in step.parts for caption in batch.captions]
        if len(found) >= steps * 6 // own.ranks:
            return found
    raise AssertionError


def test_a_caption_has_the_features_that_it_would_have_alone(features: FeatureSet) -> None:
    from stdit.encoders.text_loading import load_text_encoder

    text = TextEncoderConfig(byte_t5=ByteT5Config(width=16, depth=1, num_heads=2), max_text_tokens=24)
    encoded = load_text_encoder(text, "cpu").encode(["dense and longer 3"])
    sample = features.sample(3, "dense")
    assert sample.caption == "dense and longer 3"
    assert sample.text is not None
    torch.testing.assert_close(sample.text, encoded.features[0][encoded.mask[0]], atol=1e-5, rtol=1e-4)
    assert features.captions_of(0) == ("original", "short")
    assert features.sample(3).caption == "own 3"


def test_captions_are_drawn_by_their_shares_anew_in_each_epoch(features: FeatureSet) -> None:
    found = drawn(loader(features, {"dense": 0.7, "original": 0.3}), 40 * 4)
    counts = Counter(caption.split()[0] for caption in found if caption != "own 0")
    assert counts["dense"] / counts.total() == pytest.approx(0.7, abs=0.05)
    # A clip without that caption takes the other.
    assert {caption for caption in found if caption.endswith(" 0")} == {"own 0"}
    of_one = {caption for caption in found if caption.endswith(" 5")}
    assert of_one == {"own 5", "dense and longer 5"}


def test_the_draw_depends_on_seed_clip_and_epoch_alone(features: FeatureSet) -> None:
    shares = {"dense": 1.0, "short": 1.0, "original": 2.0}
    one = drawn(loader(features, shares), 8)
    two = [drawn(loader(features, shares, 2, rank), 8) for rank in range(2)]
    assert sorted(one) == sorted([*two[0], *two[1]])
    resumed = loader(features, shares)
    resumed.position = {"2x16x16": 24}
    assert drawn(resumed, 4) == one[24:48]
    assert drawn(loader(features, shares, seed=1), 8) != one


def test_without_shares_the_original_captions_are_read(features: FeatureSet) -> None:
    assert {caption.split()[0] for caption in drawn(loader(features, None), 4)} == {"own"}


def test_a_caption_that_was_not_extracted_is_an_error(features: FeatureSet) -> None:
    with pytest.raises(ConfigError, match="no captions motion; it has original, dense, short"):
        loader(features, {"motion": 1.0})


def test_a_caption_that_a_clip_lacks_is_named(features: FeatureSet) -> None:
    with pytest.raises(KeyError, match="sample 0 has no caption 'dense'"):
        features.sample(0, "dense")


def test_all_captions_are_read_once_to_verify_them_and_then_the_one_asked_for(
    features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, read = FeatureSet(features.path), []

    class Recorded:
        def __init__(self, shard: Any) -> None:
            self.shard = shard

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.shard.get_tensor(name)

    shard = own._shard
    monkeypatch.setattr(own, "_shard", lambda number: Recorded(shard(number)))
    first = own.sample(3, "dense").text
    assert sorted(read) == ["3.mean", "3.text", "3.text.dense", "3.text.short"]
    read.clear()
    again = own.sample(3, "dense").text
    assert sorted(read) == ["3.mean", "3.text.dense"]
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
