"""Curation of the films of handwriting: what is wrong with a shot is found, the rest is kept, and nothing is computed
twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as parquet
import pytest

from stdit.config import (
    CaptionConfig,
    CaptionServer,
    ConfigError,
    CurateConfig,
    ExtractBucket,
    ExtractConfig,
    ScorerConfig,
    VideoEncoderConfig,
    Where,
)
from stdit.curate import main, run
from stdit.curation.analysis_process import AnalysisProcess, Closed
from stdit.curation.clips import ClipView
from stdit.curation.curation import CurationError
from stdit.curation.work import Task, local_mapper
from stdit.data import manifest
from stdit.data.decoding import open_clip
from stdit.data.digit_films import Shot
from stdit.data.features import FeatureSet
from stdit.files import FolderLock
from tests.support.videos import encode, lossless, smooth

Films = tuple[Path, dict[str, list[Shot]]]
REASONS = {"frozen": "freeze", "black": "black", "duplicate": "duplicate", "short": "too_short"}


def rows(config: CurateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "manifest.jsonl").read_text().splitlines()]


def all_clips(config: CurateConfig) -> list[dict[str, Any]]:
    return parquet.read_table(config.out / "clips.parquet").to_pylist()


def no_work(kind: str, config: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
    raise AssertionError(f"{kind} of {len(tasks)} tasks, though all is known")


def copy(config: CurateConfig, out: Path, **changes: Any) -> CurateConfig:
    """The finished curation in another folder, with other settings."""
    shutil.copytree(config.out, out, symlinks=True)
    return config.model_copy(update={"out": out, **changes})


def test_every_shot_becomes_a_clip_and_every_fault_is_named(films: Films, curated: CurateConfig) -> None:
    clips = all_clips(curated)
    for name, shots in films[1].items():
        own = [clip for clip in clips if clip["path"] == f"footage/{name}.mp4"]
        assert len(own) == len(shots), name
        for shot, clip in zip(shots, own, strict=True):
            # Within its shot, and all of it but the margins and the ends of a dissolve.
            assert shot.start <= clip["start_frame"], (name, shot, clip)
            assert clip["end_frame"] <= shot.end, (name, shot, clip)
            assert clip["frames"] >= shot.end - shot.start - 8, (name, shot, clip)
            assert clip["dropped"] == REASONS.get(shot.fault or ""), (name, shot, clip["dropped"], clip["detail"])
    blurred = next(c for c in clips if c["path"].endswith("faults.mp4") and 60 <= c["start_frame"] < 90)
    assert blurred["blur"] > 1.5 * np.median([c["blur"] for c in clips if c["blur"] and c is not blurred])


def test_the_manifest_is_one_that_extraction_reads(curated: CurateConfig) -> None:
    found = manifest.read(curated.out / "manifest.jsonl")
    assert len(found) == sum(clip["dropped"] is None for clip in all_clips(curated))
    assert all(clip.file.is_file() for clip in found)
    still = next(clip for clip in found if clip.key.endswith("plain-still.png"))
    assert (still.frames, still.end_frame, still.fps) == (1, None, None)


def test_the_better_copy_stays_and_the_manifest_says_why(curated: CurateConfig) -> None:
    kept = next(row for row in rows(curated) if row["path"] == "footage/plain.mp4" and row["start_frame"] == 0)
    assert kept["duplicates"] == 1
    assert kept["kept_because"] == "more pixels: 12,288 against 6,912"
    dropped = next(clip for clip in all_clips(curated) if clip["dropped"] == "duplicate")
    assert dropped["duplicate_of"].startswith("footage/plain.mp4[0:")


def test_letterboxed_clips_are_cropped_to_the_picture(curated: CurateConfig) -> None:
    boxed = [row for row in rows(curated) if row["path"] == "footage/letterboxed.mp4"]
    assert [(row["crop"], row["height"], row["width"]) for row in boxed] == [([12, 0, 72, 128], 72, 128)] * 2
    assert not [row for row in rows(curated) if row.get("crop") and row["path"] != "footage/letterboxed.mp4"]


def test_the_rule_based_captions_say_where_the_digit_moves(films: Films, curated: CurateConfig) -> None:
    for row in rows(curated):
        name = Path(row["path"]).stem
        shot = next((s for s in films[1].get(name, []) if s.start <= row.get("start_frame", -1) < s.end), None)
        if shot is not None and shot.fault is None:
            assert f"moves {shot.direction} " in row["caption_rules"], (row["path"], row["start_frame"])
        own = name in ("plain", "letterboxed")
        assert (row["caption"] == row["caption_rules"]) != own  # the film's own caption where it has one


def test_a_second_run_computes_nothing_and_changes_no_file(curated: CurateConfig) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in curated.out.iterdir() if p.suffix in (".jsonl", ".html", ".json")}
    run(curated, no_work)
    assert {p.name: p.stat().st_mtime_ns for p in curated.out.iterdir() if p.name in before} == before


def test_another_threshold_computes_nothing_again(curated: CurateConfig, tmp_path: Path) -> None:
    stricter = copy(curated, tmp_path / "out", filters=(*curated.filters, Where(column="blur", at_most=12)))
    run(stricter, no_work)
    reasons = {clip["dropped"] for clip in all_clips(stricter)}
    assert "blur" in reasons
    assert len(rows(stricter)) < len(rows(curated))
    report = json.loads((stricter.out / "report.json").read_text())
    assert report["clips"] == report["kept"] + report["dropped"]


def test_other_lengths_of_clips_open_no_file_again(curated: CurateConfig, tmp_path: Path) -> None:
    cuts = curated.cuts.model_copy(update={"max_seconds": 2.0})
    shorter = copy(curated, tmp_path / "out", cuts=cuts, captions=())
    run(shorter, no_work)
    assert max(row["frames"] for row in rows(shorter)) < max(row["frames"] for row in rows(curated))


def test_four_workers_agree_with_one_exactly(films: Films, curated: CurateConfig, tmp_path: Path) -> None:
    four = curated.model_copy(update={"out": tmp_path / "out", "workers": 4, "captions": ()})
    one = copy(curated, tmp_path / "one", captions=())
    run(four)
    run(one, no_work)
    assert (four.out / "manifest.jsonl").read_bytes() == (one.out / "manifest.jsonl").read_bytes()


def test_an_interrupted_curation_goes_on_where_it_was(films: Films, tmp_path: Path) -> None:
    config = CurateConfig(footage=str(films[0] / "*.mp4"), out=tmp_path / "out")
    done: list[str] = []

    def interrupted(kind: str, own: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        for result in local_mapper(kind, own, tasks):
            done.append(result["key"])
            yield result
            if len(done) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupted)
    rest: list[int] = []

    def counted(kind: str, own: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        rest.append(len(tasks))
        return local_mapper(kind, own, tasks)

    run(config, counted)
    assert rest == [6 - 2]


# --------------------------------------------------------------------------------- ranges, extraction


def test_extraction_reads_exactly_the_frames_of_a_range(tmp_path: Path) -> None:
    frames = smooth(40, 24, 32)
    lossless(tmp_path / "film.mp4", frames)
    manifest.write(
        tmp_path / "manifest.jsonl",
        [
            {"path": "film.mp4", "caption": "a", "start_frame": 13, "end_frame": 18},
            {"path": "film.mp4", "caption": "b", "start_frame": 29, "end_frame": 34, "crop": [4, 8, 16, 16], "fps": 24},
        ],
    )
    from stdit.data.features import FeatureSet
    from stdit.extract import run as extract

    config = ExtractConfig(
        manifest=tmp_path / "manifest.jsonl",
        out=tmp_path / "features",
        buckets=(ExtractBucket(frames=5, height=24, width=32), ExtractBucket(frames=5, height=16, width=16)),
        video_encoder=VideoEncoderConfig(kind="pixels"),
    )
    extract(config)
    features = FeatureSet(config.out)
    wanted = {0: frames[13:18], 1: frames[29:34, 4:20, 8:24]}
    for number, expected in wanted.items():
        pixels = (features.sample(number).mean.numpy() + 1) * 127.5
        np.testing.assert_allclose(pixels.transpose(1, 2, 3, 0), expected, atol=0.51)
    assert features.rows["start_frame"].to_pylist() == [13, 29]
    assert features.rows["crop"].to_pylist() == [None, "[4, 8, 16, 16]"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start_frame": 5}, "needs an end_frame"),
        ({"start_frame": 5, "end_frame": 5}, "not behind start_frame 5"),
        ({"start_frame": 5, "end_frame": 9, "frames": 5}, "are 4"),
        ({"start_frame": -1, "end_frame": 5}, "start_frame"),
        ({"end_frame": 5.5}, "end_frame"),
        ({"crop": [0, 0, 8]}, "top, left, height, width"),
        ({"crop": [0, 0, 0, 8]}, "top, left, height, width"),
        ({"crop": [0, 0, 8, 8], "height": 9}, "height: 9"),
    ],
)
def test_a_contradictory_part_of_a_file_is_an_error_with_its_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.mp4", "caption": "", **row}) + "\n")
    with pytest.raises(manifest.ManifestError, match=message) as error:
        manifest.read(tmp_path / "m.jsonl")
    assert "m.jsonl:1:" in str(error.value)


def test_clips_of_one_file_have_different_ranges(tmp_path: Path) -> None:
    part = {"path": "a.mp4", "caption": "", "start_frame": 0, "end_frame": 5}
    (tmp_path / "m.jsonl").write_text(
        f"{json.dumps(part)}\n{json.dumps({**part, 'end_frame': 6})}\n{json.dumps(part)}\n"
    )
    with pytest.raises(manifest.ManifestError, match=r"'a.mp4\[0:5\]' is listed already, in row 1"):
        manifest.read(tmp_path / "m.jsonl")


@pytest.mark.parametrize("part", [{"start_frame": 0, "end_frame": 41}, {"crop": [20, 0, 16, 16]}])
def test_a_part_outside_its_file_is_a_bad_clip_with_a_reason(part: dict[str, Any], tmp_path: Path) -> None:
    lossless(tmp_path / "film.mp4", smooth(40, 24, 32))
    good = {"path": "film.mp4", "caption": "a", "start_frame": 0, "end_frame": 40}
    manifest.write(tmp_path / "manifest.jsonl", [good, {"path": "film.mp4", "caption": "b", **part}])
    from stdit.extract import run as extract

    bucket = ExtractBucket(frames=5, height=16, width=16)
    out = extract(
        ExtractConfig(manifest=tmp_path / "manifest.jsonl", out=tmp_path / "f", buckets=(bucket,), max_bad_share=0.5)
    )
    report = json.loads((Path(out) / "report.json").read_text())
    assert (report["kept"], report["bad"]) == (1, 1)
    assert "41" in report["bad_clips"][0]["reason"] or "crop" in report["bad_clips"][0]["reason"]


def test_what_a_row_states_of_a_part_is_compared_with_its_file(tmp_path: Path) -> None:
    lossless(tmp_path / "film.mp4", smooth(40, 24, 32))
    right = {"path": "film.mp4", "caption": "", "fps": 8, "height": 24, "width": 32}
    rows = [
        {**right, "start_frame": 0, "end_frame": 40, "frames": 40},
        {**right, "start_frame": 0, "end_frame": 60, "frames": 60},
        {**right, "start_frame": 1, "end_frame": 40, "frames": 39, "height": 240, "width": 160},
        {**right, "start_frame": 2, "end_frame": 40, "frames": 38, "height": 16, "width": 20, "crop": [8, 8, 16, 20]},
    ]
    manifest.write(tmp_path / "manifest.jsonl", rows)
    from stdit.extract import run as extract

    bucket = ExtractBucket(frames=5, height=16, width=16)
    out = extract(
        ExtractConfig(manifest=tmp_path / "manifest.jsonl", out=tmp_path / "f", buckets=(bucket,), max_bad_share=0.5)
    )
    report = json.loads((Path(out) / "report.json").read_text())
    assert (report["kept"], report["bad"]) == (3, 1)
    assert report["bad_clips"][0]["reason"] == "frames 0 to 60 were asked for, the file has 40"
    assert [(row["path"], "39 frames of 24x32" in row["detail"]) for row in report["misstated_clips"]] == [
        ("film.mp4", True)
    ]
    sizes = {(row["height"], row["width"]) for row in FeatureSet(out).rows.to_pylist()}
    assert sizes == {(24, 32), (16, 20)}


# ------------------------------------------------------------------------------------------ bad input


def index_first(path: Path, to: Path) -> Path:
    """The same MP4 with its index before the frames."""
    with av.open(str(path)) as old, av.open(str(to), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return to


def test_a_video_that_breaks_off_keeps_its_good_clips_and_says_where(tmp_path: Path) -> None:
    footage = tmp_path / "in"
    footage.mkdir()
    frames = np.concatenate([smooth(60, 96, 128), 255 - smooth(60, 96, 128)])
    # The index at the front, so that a part of the file can be read.
    content = index_first(encode(tmp_path / "whole.mp4", frames, g="12"), tmp_path / "first.mp4").read_bytes()
    (footage / "cut.mp4").write_bytes(content[: int(0.8 * len(content))])
    damaged = bytearray(encode(footage / "damaged.mkv", frames, g="12").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 400] = bytes(400)
    (footage / "damaged.mkv").write_bytes(damaged)
    (footage / "nothing.mp4").write_bytes(b"\0" * 5000)
    config = CurateConfig(footage=str(footage), out=tmp_path / "out", max_bad_share=0.5, duplicates=None)
    run(config)
    report = json.loads((config.out / "report.json").read_text())
    broken = {file["path"]: file["broken"] for file in report["broken_files"]}
    assert "breaks off at frame" in broken["footage/cut.mp4"][0] or "broke at frame" in broken["footage/cut.mp4"][0]
    assert "broke at frame" in broken["footage/damaged.mkv"][0]
    assert [file["path"] for file in report["bad_files"]] == ["footage/nothing.mp4"]
    kept = manifest.read(config.out / "manifest.jsonl")
    assert {clip.key for clip in kept} == {"footage/cut.mp4", "footage/damaged.mkv"}
    # Extraction reads them, from the files as they are.
    from stdit.data.subprocess_decoder import SubprocessDecoder

    with SubprocessDecoder() as decoder:
        for clip in kept:
            assert clip.start_frame is not None
            assert clip.end_frame is not None
            read = decoder.read_part(clip.file, [clip.start_frame, clip.end_frame - 1], None)
            # Damage took packets away, so that numbers are not those of the whole film; but no frame is a damaged one.
            for frame in read:
                assert min(np.abs(frame.astype(int) - whole).mean() for whole in frames) < 12


def test_too_many_bad_files_are_an_error_after_the_report(tmp_path: Path) -> None:
    footage = tmp_path / "in"
    footage.mkdir()
    lossless(footage / "good.mp4", smooth(40, 24, 32))
    (footage / "bad.mp4").write_bytes(b"\0" * 5000)
    # What would never end to be read is bad, too.
    os.mkfifo(footage / "pipe.mp4")
    (footage / "zero.mp4").symlink_to("/dev/zero")
    config = CurateConfig(footage=str(footage), out=tmp_path / "out")
    with pytest.raises(CurationError, match=r"3 of 4 files cannot be used.*max_bad_share 0\.2"):
        run(config)
    bad = {file["path"]: file["reason"] for file in json.loads((config.out / "report.json").read_text())["bad_files"]}
    assert bad.keys() == {f"footage/{name}.mp4" for name in ("bad", "pipe", "zero")}
    assert bad["footage/pipe.mp4"] == bad["footage/zero.mp4"] == "not a regular file"
    assert not (config.out / "manifest.jsonl").exists()


def saturation(clip: ClipView) -> float:
    assert clip.pictures is not None
    if clip.path.endswith("copied.mp4"):
        raise RuntimeError("no colours today")
    return float(np.ptp(clip.pictures.astype(int), axis=-1).mean())


def test_a_users_scorer_is_named_and_one_that_raises_harms_its_score_alone(
    curated: CurateConfig, tmp_path: Path
) -> None:
    scorer = ScorerConfig(name="saturation", function=f"{__name__}:saturation", frames=2)
    config = copy(
        curated, tmp_path / "out", scorers=(scorer,), filters=(*curated.filters, Where(column="saturation", at_least=1))
    )
    run(config)
    found = {clip["path"]: clip for clip in all_clips(config) if clip["dropped"] in (None, "saturation")}
    assert found["footage/plain.mp4"]["saturation"] > 1
    assert found["footage/copied.mp4"]["dropped"] == "saturation"
    assert json.loads((config.out / "report.json").read_text())["notes"] == ["scorer saturation: no score of 1 clips"]
    run(config, no_work)


def slow_at_first(clip: ClipView) -> float:
    seen = Path(str(clip.row["marks"])) / "seen"
    if not seen.exists():
        seen.touch()
        raise TimeoutError("no answer")
    return 1.0


def test_a_time_out_is_not_remembered(films: Films, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a scorer, and of an analysis that stood still: the next run tries again."""
    shutil.copy(films[0] / "short-still.png", tmp_path)
    row = {"path": "short-still.png", "marks": str(tmp_path)}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    scorer = ScorerConfig(name="late", function=f"{__name__}:slow_at_first", frames=1)
    config = CurateConfig(
        footage=str(tmp_path / "list.jsonl"), out=tmp_path / "out", scorers=(scorer,), max_bad_share=1.0
    )
    attempt = AnalysisProcess._attempt

    def stalls(process: AnalysisProcess, path: Path | str, until: int | None) -> tuple[int | None, bytes | str]:
        process.stalled = True
        return None, "decoding stood still for 60 s and was stopped"

    monkeypatch.setattr(AnalysisProcess, "_attempt", stalls)
    with pytest.raises(CurationError, match="none of 0 clips"):
        run(config)
    monkeypatch.setattr(AnalysisProcess, "_attempt", attempt)
    with pytest.raises(CurationError, match="scorer late: no answer for 1 of 1 clips, 1 times: TimeoutError"):
        run(config)
    assert all_clips(config)[0].get("late") is None
    run(config)
    assert all_clips(config)[0]["late"] == 1.0
    run(config, no_work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"footage": "/nowhere"}, "no such folder"),
        ({"footage": "/nowhere/*.mp4"}, "matches no video"),
        ({"footage": "ftp://host/films"}, "a URL begins with"),
        ({"filters": (Where(column="beauty", at_least=1),)}, "no column 'beauty'"),
        ({"scorers": (ScorerConfig(name="x", function="stdit.nothing:here"),)}, "cannot be imported"),
        (
            {"scorers": (ScorerConfig(name="x", function="stdit.curation.clips:median", settings={"a": 1}),)},
            "x: settings are for a class; stdit.curation.clips:median is a function",
        ),
        (
            {
                "scorers": (
                    ScorerConfig(
                        name="x",
                        function="stdit.curation.scorers.aesthetic:Aesthetic",
                        settings={"path": "hub/id", "head": "none.pth"},
                    ),
                )
            },
            "none.pth: no such file",
        ),
        (
            {
                "captions": (
                    CaptionConfig(
                        name="x", server=CaptionServer(url="http://127.0.0.1:9", model="m", api_key_env="NO_SUCH_KEY")
                    ),
                )
            },
            "NO_SUCH_KEY is not set",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_named(
    changes: dict[str, Any], message: str, curated: CurateConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(copy(curated, tmp_path / "out", **changes), no_work)


def test_two_curations_in_one_folder_are_refused(films: Films, curated: CurateConfig, tmp_path: Path) -> None:
    config = copy(curated, tmp_path / "out")
    lock = FolderLock(config.out)
    lock.acquire()
    with pytest.raises(ConfigError, match=r"another curation is at work .*process \d+"):
        run(config)
    lock.release()
    other = config.model_copy(update={"footage": str(tmp_path)})
    lossless(tmp_path / "a.mp4", smooth(30, 24, 32))
    with pytest.raises(ConfigError, match="not to the footage"):
        run(other)


def test_a_folder_of_something_else_is_left_alone(films: Films, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--config", _config(tmp_path / "c.yaml", str(films[0]), tmp_path)]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", "c.yaml"}


def _config(path: Path, footage: str, out: Path) -> str:
    path.write_text(json.dumps({"footage": footage, "out": str(out)}))
    return str(path)


def test_footage_is_a_list_a_pattern_or_a_manifest_with_ranges(films: Films, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{films[0] / 'plain.mp4'}\n\n{films[0] / 'short.mp4'}\n")
    listed = CurateConfig(footage=str(tmp_path / "list.txt"), out=tmp_path / "listed")
    run(listed)
    assert {row["path"] for row in rows(listed)} == {"footage/plain.mp4", "footage/short.mp4"}
    assert {row["caption"] for row in rows(listed) if "plain" in row["path"]} == {
        "handwritten digits over clouds, film plain"
    }
    (films[0].parent / "m.jsonl").write_text(
        json.dumps({"path": "films/plain.mp4", "caption": "x", "start_frame": 35, "end_frame": 80, "score": 3}) + "\n"
    )
    ranged = CurateConfig(footage=str(films[0].parent / "m.jsonl"), out=tmp_path / "ranged")
    run(ranged)
    assert [(row["start_frame"], row["end_frame"], row["score"]) for row in rows(ranged)] == [(35, 58, 3), (62, 80, 3)]


def test_the_page_shows_each_threshold_with_frames_on_both_sides(curated: CurateConfig) -> None:
    page = (curated.out / "curation.html").read_text()
    for text in ("just kept, by at_most 0.5", "just dropped", "near-duplicates", "<svg", "captions"):
        assert text in page
    assert page.count("data:image/jpeg;base64,") > 20


def test_the_page_shows_what_a_share_keeps(curated: CurateConfig, tmp_path: Path) -> None:
    filters = (*curated.filters, Where(column="brightness", top=0.5))
    config = copy(curated, tmp_path / "out", filters=filters)
    run(config)
    page = (config.out / "curation.html").read_text()
    section = page.split("<h2>brightness</h2>")[1].split("<h2>")[0]
    clips = [clip for clip in all_clips(config) if clip["dropped"] != "too_short"]
    cut = sum(clip["dropped"] == "brightness" for clip in clips)
    assert cut
    assert f"{len(clips) - cut:,} of {len(clips):,} clips pass" in section
    assert "just kept, by top 0.5" in section
    least = min(clip["brightness"] for clip in clips if clip["dropped"] is None)
    assert f">{least:.4g}<" in section


def test_a_reader_of_a_part_opens_a_film_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stdit.data import decoding, subprocess_decoder

    path = lossless(tmp_path / "a.mp4", smooth(30, 24, 32))
    opened: list[str] = []
    original = decoding.open_part
    monkeypatch.setattr(decoding, "open_part", lambda *a: opened.append(str(a[0])) or original(*a))
    request = {
        "path": str(path),
        "decoder": "auto",
        "indices": [3, 7],
        "size": None,
        "part": True,
        "crop": [2, 2, 8, 8],
    }
    first = subprocess_decoder._answer(request)[1]
    second = subprocess_decoder._answer({**request, "indices": [20]})[1]
    assert len(opened) == 1
    assert first is not None
    assert second is not None
    with open_clip(path, "pyav") as reader:
        np.testing.assert_array_equal(first, reader.get([3, 7])[:, 2:10, 2:10])
        np.testing.assert_array_equal(second, reader.get([20])[:, 2:10, 2:10])


def test_a_decoder_that_crashes_leaves_the_frames_before_it(films: Films, monkeypatch: pytest.MonkeyPatch) -> None:
    from stdit.curation.analysis import Analysis
    from stdit.curation.analysis_process import AnalysisProcess
    from stdit.data.decoding import DecodeError

    process = AnalysisProcess()
    attempt, asked = process._attempt, []

    def crashing(path: Path | str, until: int | None) -> tuple[int | None, bytes | str]:
        asked.append(until)
        return attempt(path, until) if until else (50, "the decoder died (SIGSEGV)")

    monkeypatch.setattr(process, "_attempt", crashing)
    with process:
        found = Analysis.loads(process.analyse(films[0] / "plain.mp4"))
        assert (found.segments, found.broken) == ([(0, 50)], ["broke behind frame 50: the decoder died (SIGSEGV)"])
        assert asked == [None, 50]
        monkeypatch.setattr(
            process, "_attempt", lambda path, until: (None, "decoding stood still for 60 s and was stopped")
        )
        with pytest.raises(DecodeError, match="stood still"):
            process.analyse(films[0] / "plain.mp4")


def test_a_child_that_is_killed_or_stands_still_is_noticed(films: Films) -> None:
    import signal

    from stdit.curation.analysis_process import AnalysisProcess

    with AnalysisProcess(stall_timeout_s=0.5) as process:
        child = process._living_child()
        child.send_signal(signal.SIGSTOP)
        assert process._attempt(films[0] / "plain.mp4", None) == (
            None,
            "decoding stood still for 0.5 s and was stopped",
        )
        child = process._living_child()
        child.kill()
        child.wait()
        process.stall_timeout_s = 60.0
        assert isinstance(process.analyse(films[0] / "plain.mp4"), bytes)


def test_a_process_that_is_closed_at_work_does_not_decode_again(films: Films, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C, while others of `workers` decode."""
    process, attempts = AnalysisProcess(), []

    def dies(self: AnalysisProcess, path: Path | str, until: int | None) -> tuple[int | None, bytes | str]:
        attempts.append(until)
        self._living_child()
        self.close()
        return 7, "the decoder died (SIGKILL)"

    monkeypatch.setattr(AnalysisProcess, "_attempt", dies)
    with pytest.raises(Closed):
        process.analyse(films[0] / "plain.mp4")
    assert attempts == [None, 7]
    assert process._child is None
