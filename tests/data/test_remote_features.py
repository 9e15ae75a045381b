"""Laws of features at a URL: the batches of a local disk bit for bit, each shard fetched once, and damage that is
named."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit import extract
from stdit.config import CacheConfig, ConfigError, DataConfig, Url
from stdit.data import object_cache, objects
from stdit.data.features import SAMPLES, FeatureSet, shard_path
from stdit.data.loader import Loader, Step
from stdit.data.mixture import Mixture
from stdit.data.objects import NoAccess, StoreError
from tests.support import clip_folder
from tests.support.clip_folder import BUCKETS, rows
from tests.support.object_store import ObjectStore

AT = Url("s3://bucket/features")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 12 clips in four shards."""
    home = tmp_path_factory.mktemp("clips")
    return Path(extract.run(clip_folder.config(home, rows(home, 12))))


@pytest.fixture
def store(s3: ObjectStore, local: Path) -> ObjectStore:
    shutil.rmtree(s3.folder / "bucket/features", ignore_errors=True)
    shutil.copytree(local, s3.folder / "bucket/features")
    return s3


def cache(folder: Path, shards: float, local: Path) -> CacheConfig:
    """A cache of as many of the largest shards."""
    largest = max(path.stat().st_size for path in (local / "shards").iterdir())
    return CacheConfig(folder=folder / "cache", size_gb=shards * largest / 1e9)


def steps(features: FeatureSet | Mixture, count: int, workers: int = 0, ranks: int = 1, rank: int = 0) -> list[Step]:
    buckets = [{**b.model_dump(include={"frames", "height", "width"}), "batch_size": 2} for b in BUCKETS]
    data = DataConfig.model_validate({"features": "synthetic", "buckets": buckets, "workers": workers})
    return list(islice(iter(Loader(features, data, 0, rank, ranks)), count))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and not isinstance(a, str):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool(a == b)


def assert_same(found: Sequence[Step], expected: Sequence[Step]) -> None:
    assert len(found) == len(expected)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [100, 2.5])
def test_batches_over_a_slow_store_are_those_of_a_local_disk(
    workers: int, shards: float, store: ObjectStore, local: Path, tmp_path: Path
) -> None:
    store.latency_s = 0.05
    features = FeatureSet(AT, config := cache(tmp_path, shards, local))
    expected = steps(FeatureSet(local), 20)
    assert_same(steps(features, 20, workers), expected)
    assert len(store.fetches("shards")) == 4 or shards < 4
    held = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert held <= config.size_gb * 1e9
    empty, own = features.empty_caption, FeatureSet(local).empty_caption
    assert same(empty, own)


def test_a_lost_connection_changes_no_batch(
    store: ObjectStore, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = FeatureSet(AT, cache(tmp_path, 100, local))
    store.fail("cut", times=4, path="shards/")
    store.fail("503", times=2, method="HEAD", path="shards/")
    assert_same(steps(features, 12), steps(FeatureSet(local), 12))
    assert "try 2 of 12" in capsys.readouterr().err


def test_ranks_of_a_node_share_what_they_fetch(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    ranks = [FeatureSet(AT, cache(tmp_path, 100, local)) for _ in range(2)]
    for rank, features in enumerate(ranks):
        assert_same(steps(features, 8, ranks=2, rank=rank), steps(FeatureSet(local), 8, ranks=2, rank=rank))
    assert len(store.fetches("shards")) == len(set(store.fetches("shards"))) == 4


def test_a_mixture_may_have_sets_at_urls(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    own, remote = FeatureSet(local), FeatureSet(AT, cache(tmp_path, 100, local))
    assert_same(steps(Mixture([own, remote], [1, 2]), 12), steps(Mixture([own, own], [1, 2]), 12))
    assert len(store.fetches("shards")) == 4


def test_features_at_a_url_are_pickled_by_it(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    features = pickle.loads(pickle.dumps(FeatureSet(AT, cache(tmp_path, 100, local))))
    assert same(features.sample(3), FeatureSet(local).sample(3))


def test_a_shard_damaged_in_the_cache_is_fetched_again(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    FeatureSet(AT, config := cache(tmp_path, 100, local)).sample(0)
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(cached.read_bytes())
    content[-400:] = bytes(400)
    cached.write_bytes(content)
    found, truth = FeatureSet(AT, config), FeatureSet(local)
    assert all(same(found.sample(i), truth.sample(i)) for i in range(3))


def damage(folder: Path, pattern: str) -> None:
    """Zeros at the end of the one file, in place: maps of it change too."""
    (path,) = folder.glob(pattern)
    with path.open("r+b") as file:
        file.seek(-400, 2)
        file.write(bytes(400))


def test_all_ranks_that_find_a_damaged_copy_go_on(
    store: ObjectStore, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, truth = cache(tmp_path, 100, local), FeatureSet(local)
    first, second = FeatureSet(AT, config), FeatureSet(AT, config)
    first.sample(0)
    damage(tmp_path / "cache", "*.safetensors")
    second._shard(0)  # pyright: ignore[reportPrivateUsage]
    # The first has removed the copy and is fetching another when the second finds the same damage in its map.
    first._discard(0)  # pyright: ignore[reportPrivateUsage]
    assert all(same(second.sample(i), truth.sample(i)) for i in range(3))
    assert all(same(first.sample(i), truth.sample(i)) for i in range(3))


def test_the_table_and_the_empty_caption_are_fetched_again_too(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    found, truth = FeatureSet(AT, config := cache(tmp_path, 100, local)), FeatureSet(local)
    assert same(found.empty_caption, truth.empty_caption)
    damage(tmp_path / "cache", "*.parquet")
    assert FeatureSet(AT, config).rows.equals(truth.rows)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    path.write_bytes(bytes(path.stat().st_size))
    assert same(FeatureSet(AT, config).empty_caption, truth.empty_caption)
    (store.folder / "bucket/features" / SAMPLES).write_bytes((local / SAMPLES).read_bytes() + b" ")
    with pytest.raises(ConfigError, match=rf"^{AT}/samples.parquet: is not what was written .*run the extraction"):
        FeatureSet(AT, config)


@pytest.mark.parametrize("lost", ["store", "access", "room", "disk"])
def test_a_store_or_cache_that_fails_is_no_fault_of_the_features(
    lost: str, store: ObjectStore, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OSError ends training with exit code 1, a ConfigError with 2: nothing was started."""
    config = cache(tmp_path, 100, local)
    features = FeatureSet(AT, config)
    error = OSError
    if lost == "store":
        store.fail("503", times=10_000, method="HEAD")
        error = StoreError
    elif lost == "access":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-expired-secret")
        error = NoAccess
    elif lost == "room":
        monkeypatch.setattr(object_cache, "ROOM_WAIT_S", 0.0)
        monkeypatch.setattr(object_cache.ObjectCache, "_usage", lambda self: (self.limit, []))
        error = StoreError
    else:
        monkeypatch.setattr(objects, "download", full)
    for read in (lambda: steps(features, 1), lambda: features.empty_caption):
        with pytest.raises(error) as found:
            read()
        assert "run the extraction" not in str(found.value)
    for path in (tmp_path / "cache").glob("*.parquet"):
        path.unlink()
    if lost != "access":  # of which read_index says that nothing has begun
        with pytest.raises(error) as found:
            FeatureSet(AT, config)
        assert "run the extraction" not in str(found.value)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "longer",
            r"shards/00001.safetensors: has [\d,]+ bytes where [\d,]+ were written; it was changed; run the extraction",
        ),
        ("other", r"shards/00001.safetensors: sha256 .*; it was changed or damaged; run the extraction again"),
        ("gone", r"shards/00001.safetensors: no such object"),
    ],
)
def test_a_changed_shard_is_named_before_it_is_trained_on(
    change: str, message: str, store: ObjectStore, local: Path, tmp_path: Path
) -> None:
    features = FeatureSet(AT, cache(tmp_path, 100, local))
    shard = shard_path(store.folder / "bucket/features", 1)
    content = shard.read_bytes()
    if change == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content + b" " if change == "longer" else content[:-1] + b"\xff")
    with pytest.raises(ConfigError, match=rf"^{AT}/{message}"):
        steps(features, 12)


def test_what_cannot_be_opened_is_one_line(
    store: ObjectStore, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"^{AT}x: no index.json: nothing was extracted there"):
        FeatureSet(Url(f"{AT}x"))
    with pytest.raises(ConfigError, match=r"^s3://nobucket/f/index.json: no such bucket as nobucket$"):
        FeatureSet("s3://nobucket/f")
    (store.folder / "bucket/features/index.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"^{AT}/index.json: not valid JSON .*run the extraction again"):
        FeatureSet(AT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "no-such-secret")
    with pytest.raises(ConfigError, match=rf"^{AT}/index.json: access denied \(ACCESS_DENIED\)$"):
        FeatureSet(AT)
