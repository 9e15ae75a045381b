"""The manifest: every format says the same, and every bad row is named."""

import csv
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import Where
from stdit.data import rows as row_readers
from stdit.data.filters import check_where, passes
from stdit.data.manifest import Clip, Manifest, ManifestError, file_problem, read, write

ROWS: list[dict[str, Any]] = [
    {"path": "a.mp4", "caption": "a cat", "class": 3, "fps": 8, "frames": 4, "height": 16, "width": 24, "split": "train", "score": 0.5},
    {"path": "sub/b.png", "caption": "", "class": None, "fps": None, "frames": None, "height": None, "width": None, "split": "validation", "score": 1.0},
    {"path": "ünï.mp4", "caption": "猫が走る, \"quoted\"", "class": 10, "fps": 29.97, "frames": 9, "height": 1, "width": 1, "split": "train", "score": None},
]  # fmt: skip


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"path": "a.mp4", "caption": "a cat", **changes}


def as_csv(folder: Path) -> Path:
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read(path)
    return str(caught.value)


def facts(manifest: Manifest) -> list[tuple[Any, ...]]:
    return [
        (c.key, c.caption, c.class_name, c.split, c.fps, c.frames, c.height, c.width, dict(c.extra)) for c in manifest
    ]


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    first = read(jsonl(tmp_path, *ROWS))
    assert facts(first) == facts(read(as_csv(tmp_path))) == facts(read(as_parquet(tmp_path)))
    assert first.clips[0].file == tmp_path / "a.mp4"
    assert first.clips[0].class_name == "3"
    assert first.clips[1].fps is None
    assert first.clips[2].extra == {"score": None}


def test_a_class_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    made = read(jsonl(tmp_path, row(path="a.mp4", **{"class": "9" * 5000}), row(path="b.mp4", **{"class": 10})))
    assert made.classes == ["10", "9" * 5000]


def test_write_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", ROWS)
    assert facts(read(tmp_path / "m.jsonl")) == facts(read(jsonl(tmp_path, *ROWS)))


def test_rows_are_read_again_only_when_the_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path, row(), row(path="other.mp4"))
    first = read(file)
    assert read(file).clips is first.clips
    before = file.stat()
    file.write_text(file.read_text().replace("other", "third"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert read(file).clips[1].key == "third.mp4"
    monkeypatch.chdir(tmp_path)
    relative = read(file.name)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (tmp_path / "folder" / file.name).write_bytes(file.read_bytes())
    assert read(file.name).clips is not relative.clips


def test_classes_are_ordered_by_number_where_they_are_numbers(tmp_path: Path) -> None:
    def classes(*names: Any) -> list[str]:
        return read(jsonl(tmp_path, *(row(path=f"{i}.mp4", **{"class": n}) for i, n in enumerate(names)))).classes

    assert classes(10, 9, None, 2) == ["2", "9", "10"]
    assert classes("b", 10, "a", 9) == ["10", "9", "a", "b"]


def write_formats(folder: Path, rows: list[dict[str, Any]]) -> list[Manifest]:
    """`rows` as each of the formats, as pandas writes them: CSV of an integer column with gaps has 1.0."""
    (folder / "m.csv").write_text(
        ",".join(rows[0])
        + "\n"
        + "".join(",".join("" if v is None else str(v) for v in r.values()) + "\n" for r in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "m.parquet")
    return [read(folder / "m.csv"), read(folder / "m.parquet"), read(jsonl(folder, *rows))]


def test_a_class_has_one_name_in_every_format(tmp_path: Path) -> None:
    rows = [row(path=f"{i}.mp4", **{"class": name}) for i, name in enumerate([1.0, 2.0, None, 10.0])]
    assert [made.classes for made in write_formats(tmp_path, rows)] == [["1", "2", "10"]] * 3
    spelt = ["7", "07", "+7", "7.0", "7.", 7, 7.0, "-0", "0", "-3"]
    made = read(jsonl(tmp_path, *(row(path=f"{i}.mp4", **{"class": name}) for i, name in enumerate(spelt))))
    assert made.classes == ["-3", "0", "7"]
    # Digits of another script, and what only begins with a number, are names.
    made = read(jsonl(tmp_path, *(row(path=f"{i}.mp4", **{"class": name}) for i, name in enumerate(["٧", "7", "7a"]))))
    assert made.classes == ["7", "7a", "٧"]


def test_absolute_paths_below_the_manifests_folder_are_those_clips(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for root in (folder, tmp_path / "link"):
        made = read(jsonl(root, row(path=str(folder / "a" / "b.mp4")), row(path=str(root / "c.mp4"))))
        assert [clip.key for clip in made] == ["a/b.mp4", "c.mp4"]
        assert made.clips[0].file == root / "a" / "b.mp4"
    error = error_of(jsonl(folder, row(path=str(tmp_path / "clips2" / "a.mp4"))))
    assert "leaves the manifest's folder" in error


def test_a_manifest_without_a_caption_column_has_clips_without_captions(tmp_path: Path) -> None:
    made = read(jsonl(tmp_path, {"path": "a.mp4", "class": 1}, {"path": "b.mp4", "class": 2}))
    assert made.uncaptioned == ["a.mp4", "b.mp4"]


def test_csv_cells_may_be_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"path,caption\na.mp4,{'x' * 200_000}\n")
    assert len(read(tmp_path / "m.csv").clips[0].caption) == 200_000


def test_dates_beyond_pythons_years_are_text(tmp_path: Path) -> None:
    dates = pa.array([2**62, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"path": ["a", "b"], "caption": ["", ""], "date": dates}), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet").clips[1].extra["date"] == "1970-01-01 00:00:00.000000"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_manifests_too_large_for_memory_are_refused_before_they_fill_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    with path.open("wb") as file:
        file.truncate(20 << 30)  # sparse
    assert ("21,474,836,480 bytes, more than" if suffix != ".parquet" else "not a readable") in error_of(path)
    columns = {"path": "a.mp4", "caption": "", **{f"c{i}": 1 for i in range(2000)}}
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([columns]), path)
    elif suffix == ".csv":
        path.write_text(",".join(columns) + "\n" + ",".join(map(str, columns.values())) + "\n")
    else:
        path = jsonl(tmp_path, columns)
    assert "1,000 columns" in error_of(path)


def test_a_text_that_parquet_stores_once_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pa.array(["x" * 1000] * 3000).dictionary_encode()
    table = pa.table({"path": [f"{i}.mp4" for i in range(3000)], "caption": text})
    for name in ("large.parquet", "small.parquet"):
        pq.write_table(table, tmp_path / name)
    at_once: list[int] = []
    monkeypatch.setattr(row_readers, "_to_python", lambda batch: at_once.append(batch.num_rows) or batch.to_pylist())
    assert len(read(tmp_path / "large.parquet").clips) == 3000
    assert at_once == [500] * 6
    at_once.clear()
    monkeypatch.setattr(row_readers, "PARQUET_BYTES", 100_000)
    assert {len(clip.caption) for clip in read(tmp_path / "small.parquet").clips} == {1000}
    assert sum(at_once) == 3000
    assert max(at_once) < 100
    monkeypatch.setattr(row_readers, "MAX_BYTES", 1_000_000)
    pq.write_table(table, tmp_path / "long.parquet")
    assert "more than the 1,000,000 bytes of text allowed" in error_of(tmp_path / "long.parquet")
    assert sum(at_once) < 4500


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_pipe_or_a_device_is_no_manifest(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        assert "is not a file" in error_of(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_empty_manifest_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"path": pa.array([], pa.string())}), path)
    else:
        path.write_text("path,caption\n" if suffix == ".csv" else "\n\n")
    assert error_of(path) == f"{path}: the manifest is empty: 0 clips"


def test_a_manifest_that_is_not_there_or_of_no_known_kind_is_an_error(tmp_path: Path) -> None:
    assert "no such manifest" in error_of(tmp_path / "m.jsonl")
    (tmp_path / "m.txt").write_text("x")
    assert "suffix '.txt'" in error_of(tmp_path / "m.txt")
    (tmp_path / "d.csv").mkdir()
    assert "no clip in this folder" in error_of(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object, found list"),
        ('{"path": "a.mp4", "path": "b.mp4", "caption": ""}', "key 'path' is given twice"),
        ('{"path": "a.mp4", "caption": "", "score": NaN}', "NaN"),
        ({"caption": "no path"}, "path: expected a path, found None"),
        ({"path": "a.mp4"}, "caption: missing"),
        (row(path=""), "path: expected a path"),
        (row(path="../a.mp4"), "leaves the manifest's folder"),
        (row(path="b/../../a.mp4"), "leaves the manifest's folder"),
        (row(path="/etc/passwd"), "leaves the manifest's folder"),
        (row(path="/"), "leaves the manifest's folder"),
        (row(path="https://example.org/a.mp4"), "a URL begins with file://, s3://"),
        (row(path="a\0.mp4"), "no path can have"),
        (row(caption=7), "caption: expected text, found 7"),
        (row(caption="\ud800"), "caption: holds half a surrogate pair"),
        (row(frames=0), "frames: expected a whole number above 0, found 0"),
        (row(frames=2.5), "frames: expected a whole number above 0, found 2.5"),
        (row(height="16"), "height: expected a whole number above 0, found '16'"),
        (row(width=True), "width: expected a whole number above 0, found True"),
        (row(fps=-1), "fps: expected frames per second, a number above 0 and below 2147483648, found -1"),
        (row(split=""), "split: expected the name of a split"),
        (row(**{"class": [1]}), "class: expected text, a whole number or null, found [1]"),
        (row(score=2**70), "does not fit 64 bits"),
        (row(frames=2**31), "frames: expected a whole number below 2147483648, found 2147483648"),
        (row(height=10**50), "height: expected a whole number below 2147483648, found a number of more than 40 digits"),
        (row(fps=10**50), "fps: expected frames per second, a number above 0 and below 2147483648"),
        (row(fps=10**400), "a number of 401 digits"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path: Path, bad: Any, message: str) -> None:
    path = jsonl(tmp_path, row(path="good.mp4"), "", bad)
    error = error_of(path)
    assert error.startswith(f"{path}:3: ")
    assert message in error


def test_bad_csv_is_named_by_line(tmp_path: Path) -> None:
    def csv_error(text: str) -> str:
        path = tmp_path / "m.csv"
        path.write_text(text)
        return error_of(path).removeprefix(f"{path}:")

    assert csv_error("path,caption\na.mp4,x\nb.mp4\n") == "3: 1 cells under a header of 2"
    assert csv_error("path,path,caption\n") == "1: column 'path' is given twice"
    assert csv_error("file,caption\na,b\n") == "1: no column 'path'; columns: file, caption"
    assert "not valid CSV" in csv_error('path,caption\n"a.mp4,x\n')
    assert csv_error("path,caption,frames\na.mp4,x,8\nb.mp4,y,many\n") == (
        "3: frames: expected a whole number above 0, found 'many'"
    )


def test_bad_parquet_and_bad_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 nonsense")
    assert "not a readable Parquet file" in error_of(tmp_path / "m.parquet")
    pq.write_table(pa.table({"file": ["a"]}), tmp_path / "m.parquet")
    assert "no column 'path'" in error_of(tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "a.mp4", "caption": "ok"}\n{"path": "\xff"}\n')
    assert ":2: not UTF-8 (byte 0xff" in error_of(tmp_path / "m.jsonl")


def test_a_clip_listed_twice_is_an_error_however_it_is_spelt(tmp_path: Path) -> None:
    error = error_of(jsonl(tmp_path, row(split="train"), row(path="./x/../a.mp4", split="validation")))
    assert error.endswith(":2: path: 'a.mp4' is listed already, in row 1")


def test_a_free_column_holds_one_kind_of_value(tmp_path: Path) -> None:
    error = error_of(jsonl(tmp_path, row(score=1), row(path="b.mp4", score=0.5), row(path="c.mp4", score="high")))
    assert error.endswith(":3: score: holds text ('high') where row 1 holds numbers")


def test_many_errors_are_listed_at_once_but_not_without_end(tmp_path: Path) -> None:
    error = error_of(jsonl(tmp_path, *({"path": f"{i}.mp4", "caption": i} for i in range(50))))
    assert len(error.splitlines()) == 21
    assert error.endswith("… and 30 more errors")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        (None, ""),
        ("  two\n words\t", "two words"),
        ("x" * 100_000, "x" * 100_000),
        ("e\u0301tude 猫 🙂 \u202eabc", "étude 猫 🙂 \u202eabc"),
    ],
)
def test_any_caption_is_accepted(tmp_path: Path, given: str | None, kept: str) -> None:
    assert read(jsonl(tmp_path, row(caption=given))).clips[0].caption == kept


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5))
def test_captions_survive_in_every_format(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    folder = tmp_path_factory.mktemp("captions")
    rows = [row(path=f"{i}.mp4", caption=c) for i, c in enumerate(captions)]
    write(folder / "m.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "m.parquet")
    kept = [c.caption for c in read(folder / "m.jsonl")]
    assert kept == [c.caption for c in read(folder / "m.parquet")]
    assert all(c == " ".join(c.split()) for c in kept)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".csv", ".parquet"]))
def test_no_content_brings_anything_but_a_manifest_or_a_manifest_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"m{suffix}"
    path.write_bytes(content)
    try:
        clips, message = len(read(path)), None
    except ManifestError as error:
        clips, message = 0, str(error)
    assert clips > 0 or (message is not None and message.startswith(str(path)))


def test_a_problem_of_one_clip_is_a_reason_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "good.mp4").write_bytes(b"x")
    clips = read(jsonl(tmp_path, *(row(path=f"{n}.mp4") for n in ("empty", "folder", "good", "missing")))).clips
    assert [file_problem(c) for c in clips] == ["is empty (0 bytes)", "is not a file", None, "no such file"]


def test_conditions_on_known_and_free_columns(tmp_path: Path) -> None:
    manifest = read(jsonl(tmp_path, *ROWS))

    def kept(**condition: Any) -> list[str]:
        return [c.key for c in manifest if passes([c], [Where(**condition)])[0]]

    assert kept(column="score", at_least=0.5, at_most=0.9) == ["a.mp4"]
    assert kept(column="score", at_least=0) == ["a.mp4", "sub/b.png"]  # a missing value meets nothing
    assert kept(column="frames", at_most=4) == ["a.mp4"]
    assert kept(column="split", one_of=("validation",)) == ["sub/b.png"]
    assert kept(column="class", one_of=("10",)) == ["ünï.mp4"]
    with pytest.raises(ValueError, match="column 'caption' holds text"):
        kept(column="caption", at_least=1)
    with pytest.raises(ManifestError, match="no column 'scoer'; columns: caption, class, .*score"):
        check_where(manifest, [Where(column="scoer", at_least=1)])
    check_where(manifest, [Where(column="score", at_least=1)])


def test_splits_and_fingerprint(tmp_path: Path) -> None:
    manifest = read(jsonl(tmp_path, *ROWS))
    assert manifest.splits == {"train": 2, "validation": 1}
    assert len(manifest.fingerprint) == 64
    assert Clip("a", Path("a"), "").split == "train"
    assert manifest.fingerprint != read(jsonl(tmp_path, *ROWS[:2])).fingerprint


@pytest.mark.parametrize("form", [jsonl, "csv"], ids=["jsonl", "csv"])
def test_a_row_takes_a_few_hundred_bytes_beside_its_path_and_caption(form: Any, tmp_path: Path) -> None:
    count = 2000
    rows = [
        {"path": f"{i:04d}.mp4", "caption": f"clip {i}", "class": f"kind {i % 7}", "fps": 25.0, "frames": 300 + i % 2, "source": "films"}
        for i in range(count)
    ]  # fmt: skip
    if form == "csv":
        path = tmp_path / "manifest.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = jsonl(tmp_path, *rows)
    read(path)  # what is imported and cached the first time
    tracemalloc.start()
    try:
        clips = read(path).clips
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / count < 800
    assert [clip.value("frames") for clip in clips[:3]] == [300, 301, 300]
    assert clips[1].class_name is clips[8].class_name


def test_values_that_are_equal_keep_their_types(tmp_path: Path) -> None:
    """1, 1.0 and true are equal in Python."""
    clips = read(
        jsonl(tmp_path, row(frames=1, fps=1, n=1, x=1.0, t=True), row(path="b.mp4", fps=1.0, n=0, x=0.0, t=False))
    ).clips
    assert [(type(c.fps), type(c.extra["n"]), type(c.extra["x"]), type(c.extra["t"])) for c in clips] == [
        (float, int, float, bool)
    ] * 2
