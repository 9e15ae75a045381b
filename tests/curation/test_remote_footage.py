"""Laws of footage by URL: the clips of a local folder, and objects that fail harm no other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stdit.config import (
    CacheConfig,
    ConfigError,
    CurateConfig,
    CutsConfig,
    ExtractBucket,
    ExtractConfig,
    ScorerConfig,
    Url,
)
from stdit.curate import main, run
from stdit.curation.analysis import analyse
from stdit.curation.analysis_process import AnalysisProcess
from stdit.curation.clips import ClipView
from stdit.curation.curation import CurationError
from stdit.curation.sources import find_sources
from stdit.curation.work import Task, local_mapper
from stdit.data import manifest
from stdit.data.decoding import open_part
from stdit.data.objects import NoSuchBucket, StoreError
from stdit.data.subprocess_decoder import SubprocessDecoder
from tests.support.object_store import ObjectStore
from tests.support.videos import encode, smooth

AT = Url("s3://bucket/films")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one of them of two shots, with a caption of one."""
    folder = tmp_path_factory.mktemp("local") / "films"
    (folder / "old").mkdir(parents=True)
    first, second = smooth(30, 48, 64), 255 - smooth(30, 48, 64)[:, ::-1] // 2
    encode(folder / "a.mp4", np.concatenate([first, second]))
    encode(folder / "old/b.mp4", second[:, :, ::-1])
    (folder / "a.txt").write_text("waves")
    return folder


@pytest.fixture
def store(s3: ObjectStore, local: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The videos as objects. Decoders work in this process: theirs of their own take a second to start."""
    shutil.rmtree(s3.folder / "bucket/films", ignore_errors=True)
    shutil.copytree(local, s3.folder / "bucket/films")

    def read_part(self: SubprocessDecoder, path: Path, indices: list[int], size: Any, crop: Any) -> np.ndarray:
        with open_part(path, "pyav") as reader:
            return reader.get(indices)

    monkeypatch.setattr(AnalysisProcess, "analyse", lambda self, path: analyse(path).dumps())
    monkeypatch.setattr(SubprocessDecoder, "read_part", read_part)
    return s3


def config(folder: Path, *footage: str, **changes: Any) -> CurateConfig:
    cuts = CutsConfig(margin_frames=1, min_seconds=0.5, max_seconds=4)
    cache = CacheConfig(folder=folder / "cache")
    return CurateConfig(footage=footage, out=folder / "out", cuts=cuts, cache=cache, duplicates=None, **changes)


def rows(config: CurateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "manifest.jsonl").read_text().splitlines()]


def test_footage_at_a_url_makes_the_clips_of_a_local_folder_and_extraction_reads_them(
    store: ObjectStore, local: Path, tmp_path: Path
) -> None:
    here, remote = config(tmp_path / "a", str(local)), config(tmp_path / "b", str(AT))
    run(here)
    run(remote)
    truth = [{**row, "path": row["path"].replace("footage/", f"{AT}/")} for row in rows(here)]
    assert rows(remote) == truth
    assert [(row["path"], row["caption"]) for row in truth] == [
        (f"{AT}/a.mp4", "waves"), (f"{AT}/a.mp4", "waves"), (f"{AT}/old/b.mp4", None),
    ]  # fmt: skip
    assert not (remote.out / "footage").exists()
    fetched = store.fetches("mp4")
    assert len(fetched) == 2, "each object is fetched once"

    def no_work(kind: str, config: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        raise AssertionError(f"{kind} of {len(tasks)} tasks, though all is known")

    run(remote, no_work)
    assert store.fetches("mp4") == fetched
    from stdit.data.extraction import plan_extraction

    bucket = ExtractBucket(frames=9, height=16, width=16)
    plan = plan_extraction(
        ExtractConfig(manifest=remote.out / "manifest.jsonl", out=tmp_path / "features", buckets=(bucket,)),
        {"video_encoder": {}, "text_encoder": None},
    )
    clip = plan.shards[0].clips[1]
    assert (clip.location, clip.start_frame, clip.end_frame) == (
        AT / "a.mp4",
        truth[1]["start_frame"],
        truth[1]["end_frame"],
    )


def test_an_object_a_pattern_a_list_and_a_manifest_name_the_same_objects(
    store: ObjectStore, local: Path, tmp_path: Path
) -> None:
    a, b = AT / "a.mp4", AT / "old" / "b.mp4"
    (store.folder / "bucket/films/list.txt").write_text(f"a.mp4\n{b}\n")
    own = tmp_path / "own.txt"
    own.write_text(f"{a}\n{local / 'old/b.mp4'}\n")
    manifest.write(
        tmp_path / "m.jsonl", [{"path": f"{a}", "caption": "", "start_frame": 3, "end_frame": 20, "film": 7}]
    )
    expected = {
        f"{AT}/**/*.mp4": [a, b],
        f"{AT}/*.mp4": [a],
        f"{AT}/[a-c].mp4": [a],
        f"{AT}/list.txt": [a, b],
        f"{b}": [b],
        f"{own}": [a, local / "old/b.mp4"],
        f"{tmp_path}/m.jsonl": [a],
        f"file://{local}/old": [local / "old/b.mp4"],
    }
    for entry, files in expected.items():
        found, links, _ = find_sources(config(tmp_path, entry))
        assert [source.file for source in found] == files, entry
        assert bool(links) == any(isinstance(file, Path) for file in files) or entry.endswith("jsonl")
        assert [source.caption for source in found if source.file == a] in ([], ["waves"], [""])
    part = find_sources(config(tmp_path, f"{tmp_path}/m.jsonl"))[0][0]
    assert (part.key, part.limits, part.extra) == (a, (3, 20), {"film": 7})
    both, _, _ = find_sources(config(tmp_path, str(AT), f"{AT}/*.mp4", str(local)))
    assert [source.key for source in both] == [a, b, "footage-3/a.mp4", "footage-3/old/b.mp4"]
    # A folder may have brackets in its name.
    (store.folder / "bucket/films/old").rename(store.folder / "bucket/films/old [1]")
    assert [source.file for source in find_sources(config(tmp_path, f"{AT}/old [1]"))[0]] == [AT / "old [1]" / "b.mp4"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (f"{AT}/none", r"films/none: no clip in this folder"),
        (f"{AT}/none.mp4", r"1 of 1 files cannot be used.*\n  s3://bucket/films/none.mp4: no such object"),
        (f"{AT}/*.mkv", r"\*.mkv matches no video or image \(\d objects below s3://bucket/films\)"),
        ("s3://*/a.mp4", r"a pattern may not stand for buckets"),
        ("s3://key:secret@bucket/a", r"names more than a bucket"),
        ("ftp://host/a", r"a URL begins with file://"),
        (f"{AT}/list.txt", r"list.txt:1: '/etc/a.mp4': a list at a URL names objects"),
        ("s3://absent/a.mp4", r"no such bucket as absent"),
    ],
)
def test_footage_that_cannot_be_used_is_one_line(entry: str, message: str, store: ObjectStore, tmp_path: Path) -> None:
    (store.folder / "bucket/films/list.txt").write_text("/etc/a.mp4\n")
    with pytest.raises((ConfigError, manifest.ManifestError, CurationError, NoSuchBucket), match=message) as error:
        run(config(tmp_path, entry))
    assert "secret" not in str(error.value)


def test_no_access_is_exit_code_2_and_a_store_that_stays_away_is_1_and_resumed(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = config(tmp_path, str(AT))
    file = tmp_path / "curate.yaml"
    file.write_text(json.dumps(remote.model_dump(mode="json")))
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
        assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {AT}: access denied (")
    store.fail("500", times=1000, path="b.mp4")
    assert main(["--config", str(file)]) == 1
    assert f"error: {AT}/old/b.mp4: " in capsys.readouterr().err
    store.heal()
    seen: list[str] = []

    def counted(kind: str, own: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        seen.extend(task["path"] for task in tasks)
        return local_mapper(kind, own, tasks)

    run(remote, counted)
    assert seen == [f"{AT}/old/b.mp4"], "what was analysed is not analysed again"
    assert len(rows(remote)) == 3


def test_access_lost_in_the_midst_ends_the_curation(store: ObjectStore, tmp_path: Path) -> None:
    store.fail("403", times=1000, method="HEAD", path="b.mp4")
    with pytest.raises(StoreError, match=r"b.mp4: access denied"):
        run(config(tmp_path, str(AT), max_bad_share=1.0))


def brightness(clip: ClipView) -> float:
    assert clip.pictures is not None
    return float(clip.pictures.mean())


def test_an_object_that_changes_is_noticed_and_analysed_again(store: ObjectStore, local: Path, tmp_path: Path) -> None:
    scorer = ScorerConfig(name="light", function=f"{__name__}:brightness", frames=1)
    remote = config(tmp_path, str(AT), max_bad_share=1.0, scorers=(scorer,))

    def changing(kind: str, own: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        if kind == "analyse":  # after the objects were looked at, before they are fetched
            shutil.copy(local / "old/b.mp4", store.folder / "bucket/films/a.mp4")
        return local_mapper(kind, own, tasks)

    run(remote, changing)
    report = json.loads((remote.out / "report.json").read_text())
    assert report["bad_files"] == [{"path": f"{AT}/a.mp4", "reason": "was changed during the curation; run it again"}]
    run(remote)
    assert [row["path"] for row in rows(remote)] == [f"{AT}/a.mp4", f"{AT}/old/b.mp4"]
    assert all(row["light"] > 0 for row in rows(remote))
