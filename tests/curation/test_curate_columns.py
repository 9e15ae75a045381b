"""What a curation knows of a clip: columns of clips.parquet and of filters; what scores and captions depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from stdit import curate
from stdit.config import CaptionConfig, CaptionServer, ConfigError, CurateConfig, CutsConfig, ScorerConfig, Where
from stdit.curation.analysis import analyse
from stdit.curation.clips import ClipView
from stdit.curation.curation import CurationError
from stdit.curation.scoring import is_passing
from stdit.curation.work import Mapper, Task, local_mapper
from tests.support.videos import lossless, smooth

SHORT = CutsConfig(min_seconds=0.1, margin_frames=0)


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    """An image, two videos, and one between black bars."""
    folder = tmp_path / "in"
    folder.mkdir()
    frames = smooth(24, 48, 64)
    Image.fromarray(frames[0]).save(folder / "a.png")
    lossless(folder / "b.mp4", frames)
    lossless(folder / "c.mp4", 255 - smooth(36, 48, 64)[:, ::-1])
    barred = 255 - frames.copy()[:, :, ::-1]
    barred[:, :8] = barred[:, -8:] = 0
    lossless(folder / "d.mp4", barred)
    return folder


def config(folder: Path, **changes: Any) -> CurateConfig:
    settings = {"footage": str(folder), "out": folder.parent / "out", "cuts": SHORT, "duplicates": None, **changes}
    return CurateConfig(**settings)


def in_process(kind: str, settings: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
    """Analyses without a process for it."""
    if kind != "analyse":
        yield from local_mapper(kind, settings, tasks)
        return
    for task in tasks:
        yield {"key": task["key"], "content": analyse(task["path"]).dumps(), "error": None, "again": False}


def run(curation: CurateConfig, mapper: Mapper = in_process) -> Path:
    return curate.run(curation, mapper)


def clips(curation: CurateConfig) -> dict[str, dict[str, Any]]:
    found = parquet.read_table(curation.out / "clips.parquet").to_pylist()
    return {Path(clip["path"]).name: clip for clip in found}


def test_clips_parquet_has_every_column_of_every_clip(footage: Path) -> None:
    curation = config(footage)
    run(curation)
    found = clips(curation)
    assert found["a.png"]["start_frame"] is None
    assert (found["b.mp4"]["start_frame"], found["b.mp4"]["end_frame"]) == (0, 24)
    assert found["d.mp4"]["crop"] == [8, 0, 32, 64]


def number_or_text(clip: ClipView) -> Any:
    return "short" if clip.frames == 1 else 1.0


def test_a_scorer_of_two_kinds_is_named(footage: Path) -> None:
    scorer = ScorerConfig(name="kind", function=f"{__name__}:number_or_text", frames=1)
    with pytest.raises(
        ConfigError, match=r"scorers: kind is text for footage/a.png and a number for footage/b.mp4\[0:24\]"
    ):
        run(config(footage, scorers=(scorer,)))


def test_manifests_of_footage_that_disagree_about_a_column_are_named(footage: Path) -> None:
    lists = [footage.parent / f"list{i}.jsonl" for i in range(2)]
    for file, name, value in zip(lists, ("a.png", "b.mp4"), (1, "north"), strict=True):
        file.write_text(json.dumps({"path": str(footage / name), "mine": value}))
    with pytest.raises(ConfigError, match="footage: mine is a number for .*/a.png and text for .*/b.mp4"):
        run(config(footage, footage=tuple(map(str, lists))))


def test_a_crop_is_no_number_to_compare(footage: Path) -> None:
    with pytest.raises(ConfigError, match="filters: .*crop"):
        run(config(footage, filters=(Where(column="crop", at_least=1),)))


def test_filters_see_what_the_manifest_says(footage: Path) -> None:
    filters = (
        Where(column="height", at_most=40),
        Where(column="end_frame", at_least=24),
        Where(column="split", one_of=("train",)),
    )
    curation = config(footage, filters=filters, validation_share=0.0)
    manifest = run(curation)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(Path(row["path"]).name, row["height"]) for row in rows] == [("d.mp4", 32)]


def test_a_share_per_duration_is_of_clips_of_as_many_seconds(footage: Path) -> None:
    top = Where(column="brightness", top=0.5, per="duration")
    curation = config(footage, filters=(top,), letterbox="keep")
    run(curation)
    found = clips(curation)
    # 24 frames of b and d are equally long, 36 of c are not.
    assert [found[name]["dropped"] is None for name in ("a.png", "c.mp4")] == [True, True]
    assert (found["b.mp4"]["dropped"] is None) != (found["d.mp4"]["dropped"] is None)


def test_a_share_per_an_unknown_column_is_refused(footage: Path) -> None:
    with pytest.raises(ConfigError, match="filters: no column 'typo'; columns: .*brightness"):
        run(config(footage, filters=(Where(column="brightness", top=0.5, per="typo"),)))


def caption_and_size(clip: ClipView) -> float:
    assert clip.pictures is not None
    (Path(str(clip.row["marks"])) / "asked").open("a").write(f"{clip.path} {clip.height}\n")
    return float(len(clip.caption or "")) + clip.pictures.shape[1] / 1000


def test_a_score_is_of_the_caption_and_the_crop_that_it_saw(footage: Path) -> None:
    """Two names of one content, too: each has its own."""
    listed = footage.parent / "list.jsonl"
    (footage / "same.mp4").write_bytes((footage / "d.mp4").read_bytes())

    def write(first: str, second: str) -> None:
        rows = [("d.mp4", first), ("same.mp4", second)]
        listed.write_text("".join(json.dumps({"path": str(footage / n), "caption": c, "marks": str(footage.parent)}) + "\n" for n, c in rows))  # fmt: skip

    scorer = ScorerConfig(name="own", function=f"{__name__}:caption_and_size", frames=1)
    curation = config(footage, footage=str(listed), scorers=(scorer,))

    def scores() -> list[float]:
        run(curation)
        return [clip["own"] for clip in clips(curation).values()]

    def asked() -> int:
        return len((footage.parent / "asked").read_text().splitlines())

    write("a", "bbb")
    assert scores() == [1.032, 3.032]
    assert asked() == 2
    write("a", "cc")
    assert scores() == [1.032, 2.032]
    assert asked() == 3
    curation = curation.model_copy(update={"letterbox": "keep"})
    assert scores() == [1.048, 2.048]
    curation = curation.model_copy(update={"letterbox": "crop"})
    assert scores() == [1.032, 2.032]
    assert asked() == 5


def test_a_caption_server_that_is_down_is_an_error_and_what_is_known_stays(footage: Path) -> None:
    server = CaptionServer(url="http://127.0.0.1:9/v1", model="m", attempts=1, backoff_s=0.01)
    curation = config(footage, captions=(CaptionConfig(name="dense", server=server),))
    with pytest.raises(
        CurationError, match="captions dense: no answer for 4 of 4 clips, 4 times: server: ConnectionError"
    ):
        run(curation)
    assert not (curation.out / "manifest.jsonl").exists()
    assert clips(curation).keys() == {"a.png", "b.mp4", "c.mp4", "d.mp4"}


def unreachable(clip: ClipView) -> str:
    (Path(str(clip.row["marks"])) / "asked").open("a").write("once\n")
    raise ConnectionError("no route to host")


def test_a_captioner_that_is_out_of_reach_is_not_asked_about_every_clip(
    footage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stdit.curation.curation.GIVEN_UP", 2)
    rows = [{"path": str(file), "marks": str(footage.parent)} for file in sorted(footage.iterdir())]
    (footage.parent / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caption = CaptionConfig(name="own", function=f"{__name__}:unreachable", batch_size=1)
    with pytest.raises(CurationError, match="no answer for 4 of 4 clips, 2 times: .*no route to host"):
        run(config(footage, footage=str(footage.parent / "list.jsonl"), captions=(caption,)))
    assert (footage.parent / "asked").read_text() == "once\n" * 2


@pytest.mark.parametrize("pattern", ["", "*"])
def test_a_name_that_is_not_utf_8_is_a_bad_file(footage: Path, pattern: str) -> None:
    name = os.fsencode(footage) + b"/caf\xe9.mp4"
    with open(name, "wb") as file:
        file.write((footage / "b.mp4").read_bytes())
    curation = config(footage, footage=str(footage / pattern), max_bad_share=0.5)
    manifest = run(curation)
    report = json.loads((curation.out / "report.json").read_text())
    (bad,) = report["bad_files"]
    assert bad["reason"] == "its name is not UTF-8"
    assert bad["path"].endswith("caf\\xe9.mp4")
    assert len(manifest.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (MemoryError(), True),
        (OSError(5, "Input/output error"), True),
        (TimeoutError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("HIP error: an illegal memory access was encountered"), True),
        (type("ReadTimeout", (Exception,), {})("as httpx has it"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("no number"), False),
        (np.linalg.LinAlgError("singular"), False),
    ],
)
def test_what_is_about_the_machine_is_not_remembered(error: Exception, passing: bool) -> None:
    assert is_passing(error) == passing


def test_a_filter_that_compares_a_crop_with_a_number_is_refused(footage: Path) -> None:
    with pytest.raises(ConfigError, match="filters: column 'crop' holds text"):
        run(config(footage, filters=(Where(column="crop", at_least=1),)))


@pytest.mark.parametrize(("prompt", "asked"), [("Describe it.", 0), ("Better than {caption}?", 1)])
def test_a_model_is_asked_again_for_a_new_caption_only_if_its_prompt_holds_it(
    footage: Path, prompt: str, asked: int
) -> None:
    seen: list[str] = []

    def answers(kind: str, own: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        if not kind.startswith("caption"):
            yield from local_mapper(kind, own, tasks)
            return
        keys = [clip["key"] for task in tasks for clip in task["clips"]]
        seen.extend(keys)
        yield {"captions": dict.fromkeys(keys, ("A ball rolls over the floor.", None)), "again": []}

    own = config(footage, captions=(CaptionConfig(name="dense", path="hub/model", prompt=prompt),))
    run(own, answers)
    seen.clear()
    (footage / "a.txt").write_text("A noise")
    run(own, answers)
    assert len(seen) == asked
