"""Several feature sets as one: shares to the exact rounding, each set in permutations of its own, any number of ranks,
any resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit import extract
from stdit.config import Bucket, ConfigError, DataConfig, VideoEncoderConfig, Where, validate
from stdit.config.diff import TRAINING_RUNTIME_KEYS, changes, matches
from stdit.config.identity import FrameSampling
from stdit.data.features import FeatureSet
from stdit.data.loader import Loader, Step
from stdit.data.manifest import in_label_order
from stdit.data.mixture import Mixture, apportion, open_features
from stdit.data.order import MixedStream
from tests.support import clip_folder

BUCKET = Bucket(frames=1, height=16, width=16)


def made(home: Path, count: int, **changes: Any) -> Path:
    rows = clip_folder.rows(home, count)
    for row in rows:
        row["class"] = f"{home.name}-{row['class']}"
    return Path(extract.run(clip_folder.config(home, rows, **changes)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Features of 24 and of 8 clips, of other classes; the second has no 5x16x32."""
    home = tmp_path_factory.mktemp("sets")
    return made(home / "a", 24), made(home / "b", 8, buckets=clip_folder.BUCKETS[:2])


def config(
    folders: tuple[Path, Path], *weights: float, sizes: tuple[int, ...] = (4, 2, 2), **changes: Any
) -> DataConfig:
    shares = [{"weight": w} for w in weights] or [{}, {}]
    buckets = [
        {"frames": b.frames, "height": b.height, "width": b.width, "global_batch": n}
        for b, n in zip(clip_folder.BUCKETS, sizes, strict=False)
    ]
    features = [{"path": str(path), **share} for path, share in zip(folders, shares, strict=True)]
    return validate({"features": features, "buckets": buckets, **changes}, DataConfig, "test")


def loader(data: DataConfig, rank: int = 0, ranks: int = 1, seed: int = 0, **changes: Any) -> Loader:
    return Loader(open_features(data), data, seed, rank, ranks, **changes)


def ids(step: Step) -> list[int]:
    return [i for batch in step.parts for i in batch.ids]


@settings(deadline=None, max_examples=200)
@given(total=st.integers(1, 10**6), shares=st.lists(st.floats(0, 1e3), min_size=1, max_size=6))
def test_shares_are_rounded_to_the_largest_remainder_and_none_is_lost(total: int, shares: list[float]) -> None:
    positive = sum(share > 0 for share in shares)
    if not positive or total < positive or min((s for s in shares if s), default=1) / sum(shares) < 1e-9:
        return
    found = apportion(total, shares)
    assert sum(found) == total
    assert all((n > 0) == (share > 0) for n, share in zip(found, shares, strict=True))
    exact = [total * share / sum(shares) for share in shares]
    if all(n >= 1 for n, share in zip(exact, shares, strict=True) if share):
        assert all(abs(n - x) < 1 for n, x in zip(found, exact, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    extra=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    seed=st.integers(0, 5),
)
def test_an_epoch_has_each_sets_share_and_a_set_repeats_no_sample_before_all_were_there(
    sizes: list[int], extra: list[int], seed: int
) -> None:
    sets = [np.arange(100 * i, 100 * i + n) for i, n in enumerate(sizes)]
    counts = [1 + n for n in extra[: len(sizes)]]
    stream = MixedStream(sets, counts, seed, BUCKET)
    order = [stream.at(p) for p in range(3 * stream.length)]
    for epoch in range(3):
        part = order[epoch * stream.length : (epoch + 1) * stream.length]
        assert Counter(i // 100 for i in part) == dict(enumerate(counts))
    for number, own in enumerate(sets):
        seen = [i for i in order if i // 100 == number]
        for start in range(0, len(seen) - len(own) + 1, len(own)):
            assert sorted(seen[start : start + len(own)]) == own.tolist()
        at = [p for p, i in enumerate(order) if i // 100 == number]
        assert [stream.epoch_of(p) for p in at] == [k // len(own) for k in range(len(at))]
    # From anywhere, and counted without going there.
    anew = MixedStream(sets, counts, seed, BUCKET)
    for position in (2 * stream.length + 1, 1, stream.length):
        assert anew.at(position) == order[position]
        assert anew.samples_before(position).tolist() == [
            sum(i // 100 == n for i in order[:position]) for n in range(len(sets))
        ]
    # Its own order in each epoch and for each seed.
    if stream.length > 12:
        other = MixedStream(sets, counts, seed + 1, BUCKET)
        assert [other.at(p) for p in range(len(order))] != order


def test_samples_are_those_of_the_sets_with_classes_of_all(folders: tuple[Path, Path]) -> None:
    first, second = map(FeatureSet, folders)
    mixture = Mixture([first, second])
    assert mixture.classes == ["a-beetle", "a-wave", "b-beetle", "b-wave"]
    everything = mixture.select(None, clip_folder.BUCKETS)
    assert sorted(np.concatenate(list(everything.values())).tolist()) == list(range(32))
    assert len(everything["5x16x32"]) == len(first.select(None, clip_folder.BUCKETS)["5x16x32"])
    for own, id in ((first, 3), (second, 3)):
        found, expected = mixture.sample(id + (24 if own is second else 0)), own.sample(id)
        assert torch.equal(found.mean, expected.mean)
        assert found.caption == expected.caption
        assert mixture.classes[found.class_label] == own.classes[expected.class_label]
    every = np.array([25, 0, 31, 2])
    lengths = [first.text_lengths(np.array([0, 2])), second.text_lengths(np.array([1, 7]))]
    assert mixture.text_lengths(every).tolist() == [lengths[1][0], lengths[0][0], lengths[1][1], lengths[0][1]]
    assert sum(mixture.frame_rates(np.arange(32)).values()) == sum(
        sum(own.frame_rates(own.ids).values()) for own in (first, second)
    )
    assert mixture.facts().num_classes == 4
    assert mixture.frame_sampling == first.frame_sampling == FrameSampling()
    with pytest.raises(KeyError):
        mixture.sample(32)
    with pytest.raises(ConfigError, match=r"buckets 9x16x16 were not extracted into any of"):
        mixture.select(None, [Bucket(frames=9, height=16, width=16)])
    with pytest.raises(ConfigError, match="no column 'nope'"):
        mixture.select(None, clip_folder.BUCKETS, [Where(column="nope", at_least=1)])
    assert in_label_order(["10", "2", "-1", "2"]) == ["-1", "2", "10"]
    assert in_label_order(["1", "02", "01", "2"]) == ["01", "1", "02", "2"], "whatever the order of a set"


def test_without_weights_every_sample_of_an_epoch_comes_once(folders: tuple[Path, Path]) -> None:
    data = config(folders, sizes=(1, 1, 1))
    found = loader(data)
    clips = sum(found.counts.values())
    epoch = [i for step in islice(iter(found), clips) for i in ids(step)]
    assert sorted(epoch) == sorted(np.concatenate(list(found.ids.values())).tolist())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (0.25, 0.75)])
def test_sets_have_their_shares_of_the_samples_whatever_their_sizes(
    folders: tuple[Path, Path], weights: tuple[float, float]
) -> None:
    data = config(folders, *weights, sizes=(1, 1, 1))
    found = loader(data)
    assert found.mixed is not None
    for i, bucket in enumerate(data.buckets):
        counts = found.mixed[bucket.key].counts
        assert sum(counts) == found.counts[bucket.key]
        if i == 2:
            assert counts[1] == 0
    # Many epochs: the shares of whole epochs are rounded, within a sample of each bucket; schedule and rounding stay
    # within that.
    *_, last = islice(iter(found), 2000)
    seen = np.array(list(found.samples_by_set(last.position).values()))
    assert seen.sum() == 2000
    # Rounded counts of an epoch, by the buckets' shares.
    wanted = sum(
        found.shares[b.key] * np.array(found.mixed[b.key].counts) / sum(found.mixed[b.key].counts) for b in data.buckets
    )
    assert np.abs(seen / 2000 - wanted).max() < 0.01
    rounding = sum(found.shares[b.key] / found.counts[b.key] for b in data.buckets)
    assert np.abs(wanted - np.array(weights) / sum(weights)).max() <= rounding + 1e-9


def test_ranks_and_resumes_change_nothing(folders: tuple[Path, Path]) -> None:
    data = config(folders, 0.5, 0.5)
    steps = list(islice(iter(loader(data, seed=3)), 12))
    pair = [islice(iter(loader(data, rank, 2, seed=3)), 12) for rank in (0, 1)]
    for whole, *parts in zip(steps, *pair, strict=True):
        assert ids(whole) == ids(parts[0]) + ids(parts[1])
        assert whole.position == parts[0].position
    resumed = loader(data, seed=3, position=steps[4].position)
    assert [ids(step) for step in islice(iter(resumed), 7)] == [ids(step) for step in steps[5:]]
    counted = Counter("ab"[i >= 24] for step in steps for i in ids(step))
    taken = resumed.samples_by_set(steps[-1].position)
    assert taken == {str(path): counted["ab"[n]] for n, path in enumerate(folders)}
    ahead = loader(config(folders, 0.5, 0.5, workers=2), seed=3)
    assert [ids(step) for step in islice(iter(ahead), 12)] == [ids(step) for step in steps]
    assert [ids(s) for s in islice(iter(loader(data, seed=4)), 12)] != [ids(s) for s in steps]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_encoder": VideoEncoderConfig(kind="pixels", channels=1)}, r"video_encoder.channels is 3 and 1"),
        ({"text_encoder": None}, r"text_encoder.* is .* and null"),
        (
            {"text_encoder": clip_folder.TEXT.model_copy(update={"max_text_tokens": 20})},
            r"text_encoder.max_text_tokens is 24 and 20",
        ),
    ],
)
def test_sets_of_other_encoders_are_refused_with_both_values(
    changed: dict[str, Any], message: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = made(tmp_path / "c", 3, **changed)
    with pytest.raises(ConfigError, match=f"{folders[0]} and {other} do not go together: .*{message}"):
        open_features(config((folders[0], other)))


def test_what_a_config_cannot_mean_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = map(str, folders)
    base = {"buckets": [{"frames": 1, "height": 16, "width": 16, "batch_size": 1}]}
    for features, message in (
        ([{"path": a, "weight": 1.0}, {"path": b}], "has no weight, but others have"),
        ([{"path": a}, {"path": a}], "listed twice"),
        ([{"path": a, "weight": 0}], "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate({**base, "features": features}, DataConfig, "test")
    one = validate({**base, "features": [{"path": a}]}, DataConfig, "test")
    assert isinstance(open_features(one), FeatureSet)
    with pytest.raises(ConfigError, match="b/features has no training sample in this run's buckets"):
        loader(config(folders, where=[{"column": "class", "one_of": ["a-wave", "a-beetle"]}]))
    with pytest.raises(ConfigError, match="no such folder"):
        open_features(config((folders[0], tmp_path / "absent")))


def test_a_resume_may_move_the_sets_but_not_change_their_weights(folders: tuple[Path, Path]) -> None:
    def flat(*weights: float, home: tuple[Path, Path] = folders) -> dict[str, Any]:
        return {"data": config(home, *weights).model_dump(mode="json")}

    moved = (Path("elsewhere/a"), Path("elsewhere/b"))
    assert all(matches(c.key, TRAINING_RUNTIME_KEYS) for c in changes(flat(0.5, 0.5), flat(0.5, 0.5, home=moved)))
    (found,) = changes(flat(0.5, 0.5), flat(0.5, 0.4))
    assert found.key == "data.features.1.weight"
    assert not matches(found.key, TRAINING_RUNTIME_KEYS)
