"""Laws of extraction on many workers: the same features as one process makes, and the same errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.extract_features import extract_features
from stdit import extract
from stdit.config import TextEncoderConfig
from stdit.data.features import FeatureSet
from tests.support import clip_folder
from tests.support.clip_folder import damaged, rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def test_two_workers_extract_what_one_process_does(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, [*rows(tmp_path, 12), *damaged(tmp_path)], workers=2, max_bad_share=0.5)
    many = Path(extract_features(config))
    one = Path(extract.run(config.model_copy(update={"out": tmp_path / "one", "workers": 1})))
    names = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(many)) for p in many.rglob("*") if p.is_file()}
    for name in names:
        if name == "report.json":
            reports = [json.loads((folder / name).read_text()) for folder in (one, many)]
            assert all(report["seconds"]["encode"] > 0 for report in reports)
            assert {**reports[0], "seconds": None} == {**reports[1], "seconds": None}
        elif name.endswith(".json"):
            assert (one / name).read_text() == (many / name).read_text()
        elif name.endswith(".safetensors"):
            # Not bit for bit: torch's sums depend on how many threads share them.
            torch.testing.assert_close(load_file(many / name), load_file(one / name), atol=1e-5, rtol=1e-5)
    before = {p: p.stat().st_mtime_ns for p in many.rglob("*.safetensors")}
    assert len(FeatureSet(extract_features(config))) == 12
    assert {p: p.stat().st_mtime_ns for p in many.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_what_stops_a_worker_reaches_the_caller_without_rays_own(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 4))
    extract.prepare(config)
    # A file where the folder of shards should be: no worker can write.
    (config.out / "shards").touch()
    with pytest.raises(OSError, match="shards") as caught:
        extract_features(config)
    assert "Traceback" not in str(caught.value)
    assert not (config.out / "index.json").exists()


@pytest.mark.slow
def test_an_encoder_that_no_worker_can_load_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text("{}")
    config = clip_folder.config(tmp_path, rows(tmp_path, 2), text_encoder=TextEncoderConfig(path=str(tmp_path / "t5")))
    with pytest.raises(OSError, match="^ConfigError: text_encoder.path: .*t5"):
        extract_features(config)
