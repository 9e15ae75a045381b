"""The demo's footage: films of digits over black, whose curated clips are the demo's clips of digits in other files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines import plan as plans
from stdit import curate, extract
from stdit.data.digit_films import ON_BLACK, RECORD, UNCAPTIONED, make_films
from stdit.data.digits import DIRECTIONS, wordings
from stdit.data.features import FeatureSet
from tests.support.paths import ROOT


def test_films_over_black_have_good_shots_and_faults_and_a_caption_but_for_every_sixth(tmp_path: Path) -> None:
    films = make_films(tmp_path / "a", on_black=7)
    for number, (name, shots) in enumerate(films.items()):
        assert tuple(shot.fault for shot in shots) == ON_BLACK
        file = tmp_path / "a" / "films" / f"{name}.mp4"
        with av.open(str(file)) as container:
            assert sum(1 for _ in container.decode(video=0)) == shots[-1].end
        text = file.with_suffix(".txt")
        assert text.is_file() == bool(number % UNCAPTIONED)
        if text.is_file():
            assert text.read_text().strip() in wordings(shots[0].digit, shots[0].direction)
    record = (tmp_path / "a" / RECORD).stat().st_mtime_ns
    assert make_films(tmp_path / "a", on_black=7) == films
    assert (tmp_path / "a" / RECORD).stat().st_mtime_ns == record
    with pytest.raises(ValueError, match="films of another seed or version"):
        make_films(tmp_path / "a", on_black=6)
    with pytest.raises(ValueError, match="on_black -1"):
        make_films(tmp_path / "b", on_black=-1)


@pytest.mark.slow
def test_the_demo_s_curated_clips_move_the_captioned_way_over_black_and_faults_are_dropped(tmp_path: Path) -> None:
    source = plans.read(ROOT / "configs/plans/demo.yaml", [f"run_dir={tmp_path}"]).feature_sets["films"]
    assert source.prepare_out is not None
    assert source.curate is not None
    films = make_films(source.prepare_out, on_black=8)
    curate.run(source.curate)
    features = FeatureSet(extract.run(source.extract))
    good = sum(shot.fault is None for shots in films.values() for shot in shots)
    assert 0.7 * good < len(features) <= good
    report = json.loads((source.curate.out / "report.json").read_text())
    assert {"black", "freeze", "too_short"} <= set(report["dropped_by_reason"])
    captions: Counter[bool] = Counter()
    for id in features.ids.tolist():
        sample = features.sample(id)
        frames = (sample.mean[0].numpy() + 1) / 2  # (4, 12, 12)
        shot = films[Path(sample.path).stem][0]
        assert np.median(frames) < 0.02, "black ground"
        rows, columns = np.mgrid[:12, :12]
        middle = [((f * rows).sum() / f.sum(), (f * columns).sum() / f.sum()) for f in frames]
        moved = np.subtract(middle[-1], middle[0])
        assert np.abs(moved - 3 * np.array(DIRECTIONS[shot.direction])).max() < 0.6, (sample.path, moved)
        own = sample.caption in wordings(shot.digit, shot.direction)
        captions[own] += 1
        assert own or sample.caption == f"A bright shape moves {shot.direction} over a dark ground"
    assert captions[True] > captions[False] > 0
