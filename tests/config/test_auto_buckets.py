"""`buckets: {auto: …}`: the sizes of the published tables, within the area, and a list like any other afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan import Plan
from stdit.config import ConfigError, ExtractConfig, dump, load_config, validate
from stdit.config.auto_buckets import AutoBuckets, size_table

BASE = {"manifest": "clips", "out": "features"}


def extraction(buckets: Any) -> ExtractConfig:
    return validate({**BASE, "buckets": buckets}, ExtractConfig, "x.yaml")


@settings(deadline=None, max_examples=100)
@given(
    area=st.integers(256, 2**21),
    aspects=st.integers(1, 21),
    max_aspect=st.floats(1, 4),
    multiple_of=st.sampled_from([1, 4, 8, 16]),
)
def test_sizes_are_within_the_area_and_come_as_near_to_it_as_the_multiple_allows(
    area: int, aspects: int, max_aspect: float, multiple_of: int
) -> None:
    sizes = AutoBuckets(area=area, aspects=aspects, max_aspect=max_aspect, multiple_of=multiple_of).sizes()
    assert 1 <= len(sizes) <= aspects
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple_of == width % multiple_of == 0
        short, long = sorted((height, width))
        assert height * width <= area < (short + (short == long) * multiple_of) * (long + multiple_of)
    # A size and its transpose, tall to wide.
    assert sorted(sizes) == sorted((w, h) for h, w in sizes)
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(ratios)


def test_the_table_of_sdxl_and_pixart_is_among_the_sizes() -> None:
    table = set(size_table(1024**2, 64))
    published = {(int(h), int(w)) for h, w in ASPECT_RATIO_1024_BIN.values()}
    # They have further sizes of the same shorter side, smaller than the area allows.
    largest = {(h, w) for h, w in published if min(h, w) * (max(h, w) + 64) > 1024**2}
    assert len(largest) >= 16
    assert largest <= table


def test_the_default_aspects_are_those_of_screens_and_cameras() -> None:
    sizes = AutoBuckets(area=512**2, multiple_of=16).sizes()
    assert len(sizes) == 9
    for aspect in (9 / 16, 3 / 4, 1, 4 / 3, 16 / 9):
        assert min(abs(math.log(w / h / aspect)) for h, w in sizes) < 0.04


def test_every_length_comes_in_every_size_and_the_expanded_list_is_what_is_kept(tmp_path: Path) -> None:
    config = extraction({"auto": {"area": 4096, "frames": [1, 17], "aspects": 5, "multiple_of": 8}})
    sizes = AutoBuckets(area=4096, aspects=5, multiple_of=8).sizes()
    assert [b.key for b in config.buckets] == [f"{n}x{h}x{w}" for n in (1, 17) for h, w in sizes]
    assert "auto:" not in dump(config)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_config(tmp_path / "resolved.yaml", ExtractConfig) == config


def test_several_areas_and_lists_with_buckets_of_their_own() -> None:
    listed = {"frames": 5, "height": 48, "width": 48, "keep_probability": 0.5}
    config = extraction([{"auto": {"area": [1024, 4096], "aspects": 1, "multiple_of": 8}}, listed])
    assert [b.key for b in config.buckets] == ["1x32x32", "1x64x64", "5x48x48"]
    assert config.buckets[2].keep_probability == 0.5


def test_a_plan_and_set_take_it(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "{name: a, run_dir: runs/a, extraction: {manifest: clips, buckets: {auto: {area: 4096}}}, stages: {a: {}}}"
    )
    plan = load_config(tmp_path / "plan.yaml", Plan, ["extraction.buckets.auto.frames=[1, 5]"])
    assert {b.frames for b in plan.reference.extract.buckets} == {1, 5}


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ({"auto": {"area": 100}}, "area 100 is less than the smallest size, 16x16 px"),
        ({"auto": {"area": 4096, "aspect": 3}}, "auto.aspect: unknown key"),
        ({"auto": {"area": "4096"}}, "auto.area"),
        ({"auto": {"area": 4096}, "frames": 1}, "frames: unknown key"),
        ([{"auto": {"area": 4096, "aspects": 1}}, {"frames": 1, "height": 64, "width": 64}], "listed twice: 1x64x64"),
        ([], "at least 1 item"),
        ({}, "buckets"),
    ],
)
def test_what_cannot_be_made_is_named(buckets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: buckets") as error:
        extraction(buckets)
    assert message in str(error.value)
