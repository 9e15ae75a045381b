"""A folder of clips is a manifest: NAME.mp4 with its caption in NAME.txt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stdit import extract
from stdit.config import ConfigError, ExtractConfig
from stdit.data.features import FeatureSet
from stdit.data.manifest import ManifestError, fingerprint, read
from tests.support.clip_folder import BUCKETS, TEXT
from tests.support.videos import lossless, smooth


def clips(folder: Path) -> Path:
    """Two videos and two images with captions, one of them empty, an image without, and files that are none of
    these."""
    for place in ("", "b", "validation"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    lossless(folder / "z.mp4", smooth(5, 16, 16))
    lossless(folder / "b" / "a.mp4", smooth(5, 16, 32) // 2)
    for name in ("ü.PNG", "b/none.jpg", "validation/c.png"):
        Image.fromarray(smooth(1, 16, 16)[0]).save(folder / name)
    (folder / "z.txt").write_text("  a wave,\n moving\n")
    (folder / "b" / "a.txt").write_bytes(b"\xef\xbb\xbfslow")
    (folder / "ü.txt").write_text("")
    (folder / "validation" / "c.txt").write_text("held out")
    (folder / "notes.md").write_text("not a clip")
    (folder / "b" / "nobody.txt").write_text("a caption of no clip")
    (folder / ".z.mp4").touch()
    return folder


def config(folder: Path, **changes: object) -> ExtractConfig:
    settings = {"manifest": folder, "out": folder.parent / "features", "buckets": BUCKETS, "text_encoder": TEXT}
    return ExtractConfig.model_validate({**settings, **changes})


def test_clips_captions_and_splits_are_found_in_order_and_other_files_counted(tmp_path: Path) -> None:
    found = read(clips(tmp_path / "clips"))
    assert [(clip.key, clip.caption, clip.split) for clip in found] == [
        ("b/a.mp4", "slow", "train"),
        ("b/none.jpg", "", "train"),
        ("validation/c.png", "held out", "validation"),
        ("z.mp4", "a wave, moving", "train"),
        ("ü.PNG", "", "train"),
    ]
    assert all(clip.file.is_file() for clip in found)
    assert found.uncaptioned == ["b/none.jpg"]
    assert found.other_files == 3


def test_the_fingerprint_is_of_paths_and_captions(tmp_path: Path) -> None:
    first = clips(tmp_path / "one" / "clips")
    same = clips(tmp_path / "two" / "elsewhere")
    (same / "notes.md").unlink()
    assert read(first).fingerprint == read(same).fingerprint == fingerprint(first)
    (same / "z.txt").write_text("another wave")
    changed = read(same).fingerprint
    (same / "ü.txt").unlink()
    assert len({read(first).fingerprint, changed, read(same).fingerprint}) == 3
    assert fingerprint(tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("z.txt", b"caf\xe9", r"clips:4: .*z\.txt:1: not UTF-8"),
        ("z.txt", b"word " * 300_000, r"z\.txt: cannot be read \(1,500,000 bytes, more than the 1,048,576 allowed\)"),
        ("z.png", b"", r"z\.mp4 and z\.png share the caption file z\.txt"),
        ("manifest.jsonl", b"", r"clips: holds manifest\.jsonl; give .*clips/manifest\.jsonl"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips")
    (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read(folder)


def test_a_folder_without_clips_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"empty: no clip in this folder \(it is empty\); clips end in .*\.mp4"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "empty" / "a.doc").touch()
    with pytest.raises(ManifestError, match=r"no clip in this folder \(1 \.txt files and 1 others\)"):
        read(tmp_path / "empty")


def test_extraction_of_a_folder_names_clips_without_caption_and_follows_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clips(tmp_path / "clips")
    features = FeatureSet(extract.run(config(folder)))
    assert features.rows["caption"].to_pylist() == ["slow", "", "held out", "a wave, moving", ""]
    assert features.rows["bucket"].to_pylist() == ["5x16x32", "1x16x16", "1x16x16", "5x16x16", "1x16x16"]
    assert features.rows["split"].to_pylist().count("validation") == 1
    report = json.loads(Path(features.path, "report.json").read_text())
    assert (report["uncaptioned"], report["uncaptioned_clips"]) == (1, ["b/none.jpg"])
    assert "captions: 1 clip without one: b/none.jpg" in capsys.readouterr().err
    before = features.index["fingerprint"]
    assert FeatureSet(extract.run(config(folder))).index["fingerprint"] == before
    (folder / "z.txt").write_text("another caption")
    assert FeatureSet(extract.run(config(folder))).index["fingerprint"] != before


def test_a_text_encoder_without_any_caption_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "clips" / "a.png")
    with pytest.raises(ConfigError, match=r"text_encoder: none of the 1 clips of .*clips has a caption"):
        extract.run(config(tmp_path / "clips"))
    assert len(FeatureSet(extract.run(config(tmp_path / "clips", text_encoder=None)))) == 1
