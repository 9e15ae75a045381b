"""Laws of an extraction whose `out` is a URL: the features of a local folder, complete or not there, and resumed from
any machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit import extract
from stdit.config import CacheConfig, ConfigError, ExtractConfig, Url
from stdit.data import objects
from stdit.data.extractor import Extractor
from stdit.data.features import FeatureSet
from stdit.data.objects import NoAccess, StoreError
from stdit.data.records import ShardResult, ShardSpec
from stdit.data.staging import local_folder
from tests.support import clip_folder
from tests.support.clip_folder import rows
from tests.support.object_store import ObjectStore, write

AT = Url("s3://bucket/made")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Finished features of four stills in two shards."""
    home = tmp_path_factory.mktemp("clips")
    made = [row for row in rows(home, 5) if row["path"].endswith("png")]
    config = clip_folder.config(home, made, clips_per_shard=2, text_encoder=None)
    extract.run(config)
    return config


@pytest.fixture
def store(s3: ObjectStore) -> ObjectStore:
    shutil.rmtree(s3.folder / "bucket/made", ignore_errors=True)
    return s3


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the shards that are extracted."""
    numbers: list[int] = []
    own = Extractor._extract

    def counted(self: Extractor, spec: ShardSpec, clips: Any) -> ShardResult:
        numbers.append(spec.number)
        return own(self, spec, clips)

    monkeypatch.setattr(Extractor, "_extract", counted)
    return numbers


def at_url(local: ExtractConfig, machine: Path, **changes: Any) -> ExtractConfig:
    """The extraction into the store, by a machine of this cache."""
    return local.model_copy(update={"out": AT, "cache": CacheConfig(folder=machine / "cache"), **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_features_at_a_url_are_those_of_a_local_folder_and_a_second_call_uploads_nothing(
    store: ObjectStore, local: ExtractConfig, tmp_path: Path
) -> None:
    remote = at_url(local, tmp_path)
    assert extract.run(remote) == AT
    assert isinstance(local.out, Path)
    expected = {name: content for name, content in files(local.out).items() if not name.startswith(".")}
    found = files(store.folder / "bucket/made")
    assert found.keys() == expected.keys()
    timed = [name for name in expected if name.startswith("parts/") or name == "report.json"]  # they say what it took
    assert {**found, **dict.fromkeys(timed)} == {**expected, **dict.fromkeys(timed)}
    assert not list(local_folder(remote).rglob("*.safetensors")), "shards stay in the store alone"
    store.requests.clear()
    assert extract.run(at_url(local, tmp_path / "other")) == AT
    assert {method for method, _, _ in store.requests} <= {"GET", "HEAD"}
    found, truth = FeatureSet(AT, remote.cache), FeatureSet(local.out)
    assert all(torch.equal(found.sample(i).mean, truth.sample(i).mean) for i in truth.ids.tolist())


@pytest.mark.parametrize("machine", [pytest.param("same", marks=pytest.mark.slow), "other"])
def test_an_interrupted_upload_leaves_no_features_and_is_resumed(
    machine: str, store: ObjectStore, local: ExtractConfig, tmp_path: Path, extracted: list[int]
) -> None:
    store.fail("400", times=1000, method="PUT", path="shards/00001")
    with pytest.raises(StoreError, match=r"^s3://bucket/made/shards/00001.safetensors: "):
        extract.run(at_url(local, tmp_path / "same"))
    store.heal()
    with pytest.raises(
        ConfigError, match=r"no index.json: nothing was extracted there, or the extraction has not ended"
    ):
        FeatureSet(AT, CacheConfig(folder=tmp_path / "reader"))
    extracted.clear()
    extract.run(at_url(local, tmp_path / machine))
    assert extracted == ([] if machine == "same" else [1]), "what was made is not made again"
    assert isinstance(local.out, Path)
    assert (store.folder / "bucket/made/index.json").read_bytes() == (local.out / "index.json").read_bytes()


def test_a_reader_sees_complete_features_or_none(
    store: ObjectStore, local: ExtractConfig, tmp_path: Path, extracted: list[int]
) -> None:
    extract.run(at_url(local, tmp_path))
    (store.folder / "bucket/made/shards/00001.safetensors").unlink()
    extracted.clear()
    store.requests.clear()
    extract.run(at_url(local, tmp_path))
    assert extracted == [1]
    changes = [(method, path.partition("?")[0]) for method, path, _ in store.requests if method in ("PUT", "DELETE")]
    changes = [(method, path.removeprefix("/bucket/made/")) for method, path in changes if path.count(".")]
    assert changes[0] == ("DELETE", "index.json")
    assert [path for method, path in changes if method == "PUT"] == [
        "parts/00001.parquet", "shards/00001.safetensors", "parts/00001.parquet", "report.json", "samples.parquet", "index.json",
    ]  # fmt: skip
    assert len(FeatureSet(AT, CacheConfig(folder=tmp_path / "reader"))) == 4


@pytest.mark.slow
def test_other_settings_and_other_objects_are_refused(store: ObjectStore, local: ExtractConfig, tmp_path: Path) -> None:
    write(AT / "own.txt", "mine")
    with pytest.raises(ConfigError, match=r"^out: s3://bucket/made holds own.txt and no extraction"):
        extract.run(at_url(local, tmp_path))
    (store.folder / "bucket/made/own.txt").unlink()
    extract.run(at_url(local, tmp_path))
    longer = at_url(local, tmp_path / "other", clips_per_shard=4)
    with pytest.raises(ConfigError, match=r"^s3://bucket/made holds features of another config"):
        extract.run(longer)
    extract.run(longer, overwrite=True)
    assert sorted(files(store.folder / "bucket/made/shards")) == ["00000.safetensors"]
    assert len(FeatureSet(AT, longer.cache)) == 4


def test_an_object_is_uploaded_whole_or_not_at_all(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    store.fail("503", times=2, method="PUT")
    store.fail("cut", times=1, method="PUT")
    objects.upload(tmp_path / "a", AT / "a")
    assert objects.read(AT / "a", 1 << 20) == (tmp_path / "a").read_bytes()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        objects.upload(tmp_path / "none", AT / "b")
    assert list(objects.listing(AT)) == ["a"]
    store.fail("403", times=100, method="PUT")
    with pytest.raises(NoAccess, match=r"made/c: access denied"):
        objects.upload(tmp_path / "a", AT / "c")
    store.heal()
    objects.delete(AT / "a")
    assert objects.listing(AT) == {}
