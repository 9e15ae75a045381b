"""Laws of manifests and clips by URL: the features of a local folder, and bad objects that harm no other clip."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stdit import extract
from stdit.config import CacheConfig, ConfigError, CurateConfig, ExtractConfig, Url, load_config, validate
from stdit.data import manifest
from stdit.data.features import FeatureSet
from stdit.data.objects import StoreError
from stdit.data.rows import ManifestError
from stdit.init import main as init
from tests.support import clip_folder
from tests.support.clip_folder import rows
from tests.support.object_store import ObjectStore

AT = Url("s3://bucket/clips")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips and their manifest."""
    home = tmp_path_factory.mktemp("local") / "clips"
    clip_folder.write(home, rows(home, 7))
    return home


@pytest.fixture
def store(s3: ObjectStore, local: Path) -> ObjectStore:
    shutil.rmtree(s3.folder / "bucket/clips", ignore_errors=True)
    shutil.copytree(local, s3.folder / "bucket/clips")
    return s3


def config(folder: Path, at: Path | Url, **changes: object) -> clip_folder.LocalExtraction:
    made = {"manifest": at, "out": folder / "features", "cache": CacheConfig(folder=folder / "cache"), **changes}
    return clip_folder.config(folder / "unused", rows(folder / "unused", 1)).model_copy(update=made)


def test_features_of_clips_at_a_url_are_those_of_a_local_folder(
    store: ObjectStore, local: Path, tmp_path: Path
) -> None:
    truth = FeatureSet(extract.run(config(tmp_path / "a", local / "manifest.jsonl")))
    remote = config(tmp_path / "b", AT / "manifest.jsonl")
    found = FeatureSet(extract.run(remote))
    assert found.index["fingerprint"] == truth.index["fingerprint"]
    assert found.index["shards"] == truth.index["shards"]
    store.requests.clear()
    assert not extract.pending_shards(extract.plan_shards(remote))[0]
    assert not store.fetches("mp4") + store.fetches("png")
    (clip := store.folder / "bucket/clips/2.mp4").write_bytes(clip.read_bytes() + b" ")
    todo, line = extract.pending_shards(extract.plan_shards(remote))
    assert [spec.number for spec in todo] == [0]
    assert f"{AT}/2.mp4 has changed" in line


def test_a_local_manifest_may_name_objects(store: ObjectStore, tmp_path: Path) -> None:
    made = [{"path": f"{AT}/{name}", "caption": ""} for name in ("0.png", "2.mp4")]
    manifest.write(tmp_path / "manifest.jsonl", [*made, {"path": "own.png", "caption": ""}])
    shutil.copy(store.folder / "bucket/clips/1.png", tmp_path / "own.png")
    found = FeatureSet(extract.run(config(tmp_path, tmp_path / "manifest.jsonl", text_encoder=None)))
    assert found.rows["path"].to_pylist() == [f"{AT}/0.png", f"{AT}/2.mp4", "own.png"]


def test_a_folder_of_objects_is_a_manifest(store: ObjectStore, tmp_path: Path) -> None:
    (store.folder / "bucket/clips/manifest.jsonl").rename(tmp_path / "manifest.jsonl")
    (store.folder / "bucket/clips/2.txt").write_text("a wave")
    found = manifest.read(AT)
    assert [clip.key for clip in found] == [f"{i}.{'mp4' if i in (2, 5) else 'png'}" for i in range(7)]
    assert found.clips[2].caption == "a wave"
    assert next(iter(found)).location == AT / "0.png"


def test_bad_objects_are_bad_clips_with_a_reason(store: ObjectStore, tmp_path: Path) -> None:
    (store.folder / "bucket/clips/1.png").unlink()
    (store.folder / "bucket/clips/2.mp4").write_bytes(b"no video")
    remote = config(tmp_path, AT / "manifest.jsonl", max_bad_share=0.5)
    assert FeatureSet(extract.run(remote)).ids.tolist() == [0, 3, 4, 5, 6]
    from stdit.data.extraction import read_report

    bad = {clip["path"]: clip["reason"] for clip in read_report(remote.out)["bad_clips"]}
    assert bad.pop("1.png") == "no such object"
    assert list(bad) == ["2.mp4"]


@pytest.mark.parametrize("lost", ["secret", "token", "bucket"])
def test_features_survive_an_extraction_that_may_not_read_the_clips(
    lost: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.{'mp4' if i in (2, 5) else 'png'}" for i in range(7)]
    manifest.write(tmp_path / "manifest.jsonl", [{"path": f"{AT}/{name}", "caption": ""} for name in names])
    remote = config(tmp_path, tmp_path / "manifest.jsonl", text_encoder=None)
    out = Path(extract.run(remote))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if lost == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-expired-secret")
    elif lost == "token":  # it expires in the midst
        store.fail("403", times=1000, method="HEAD", path="5.mp4")
    else:
        (store.folder / "bucket").rename(store.folder / "moved")
    try:
        with pytest.raises(StoreError, match=r"access denied|no such bucket"):
            extract.run(remote)
    finally:
        if lost == "bucket":
            (store.folder / "moved").rename(store.folder / "bucket")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_access_that_is_lost_in_the_midst_makes_no_clip_bad(store: ObjectStore, tmp_path: Path) -> None:
    remote = config(tmp_path, AT / "manifest.jsonl", max_bad_share=1.0)
    store.fail("403", times=1000, method="HEAD", path="5.mp4")
    with pytest.raises(StoreError, match=r"5.mp4: access denied"):
        extract.run(remote)
    store.heal()
    assert len(FeatureSet(extract.run(remote))) == 7


def test_a_store_that_stays_away_ends_the_extraction_and_a_second_call_resumes(
    store: ObjectStore, tmp_path: Path
) -> None:
    remote = config(tmp_path, AT / "manifest.jsonl")
    store.fail("500", times=1000, method="HEAD", path="4.png")
    with pytest.raises(StoreError, match=r"^s3://bucket/clips/4.png: .*\(12 tries\)"):
        extract.run(remote)
    store.heal()
    assert len(FeatureSet(extract.run(remote))) == 7


def test_a_manifest_that_cannot_be_read_is_one_line_and_exit_code_2(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "extract.yaml"
    file.write_text(
        f"manifest: {AT}/manifest.jsonl\nout: {tmp_path / 'out'}\nbuckets: [{{frames: 1, height: 16, width: 16}}]\n"
    )
    assert load_config(file, ExtractConfig).manifest == AT / "manifest.jsonl"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    assert extract.main(["--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {AT}/manifest.jsonl: access denied (ACCESS_DENIED)\n"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.environment["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(ManifestError, match=rf"^{AT}/x.jsonl: no such manifest$"):
        manifest.read(AT / "x.jsonl")
    (store.folder / "bucket/clips/x.jsonl").write_text('{"path": "../up.mp4"}\n{"path": "file:///etc/passwd"}\n')
    with pytest.raises(
        ManifestError, match=rf"^{AT}/x.jsonl:1: path: '../up.mp4' leaves .*\n{AT}/x.jsonl:2: path: 'file:"
    ):
        manifest.read(AT / "x.jsonl")
    with pytest.raises(
        ConfigError, match=r"f: out: s3://bucket/out is in an object store; this is a folder of this machine"
    ):
        validate({"footage": "films", "out": "s3://bucket/out"}, CurateConfig, "f")


def test_init_writes_a_plan_for_a_folder_of_objects(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (store.folder / "bucket/clips/manifest.jsonl").unlink()
    assert init([str(tmp_path / "run"), "--clips", str(AT)]) == 0, capsys.readouterr().err
    found = manifest.read(tmp_path / "run/manifest.jsonl")
    assert found.clips[0].location == AT / "0.png"
    assert len(found) == 7
