"""The films of handwriting, made once; a curation of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit.config import CaptionConfig, CurateConfig, CutsConfig, Where
from stdit.data.digit_films import Shot, make_films

RULES = CaptionConfig(name="rules", function="stdit.curation.rule_based:rule_based_caption", batch_size=64)
CUTS = CutsConfig(margin_frames=1, min_seconds=1, max_seconds=4)
FILTERS = (Where(column="black", at_most=0.1), Where(column="freeze", at_most=0.5))


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Shot]]]:
    out = tmp_path_factory.mktemp("films")
    return out / "films", make_films(out)


@pytest.fixture(scope="session")
def curated(films: tuple[Path, dict[str, list[Shot]]], tmp_path_factory: pytest.TempPathFactory) -> CurateConfig:
    """A finished curation of the films; not to be changed by a test."""
    from stdit.curate import run

    out = tmp_path_factory.mktemp("curated") / "out"
    config = CurateConfig(footage=str(films[0]), out=out, cuts=CUTS, filters=FILTERS, captions=(RULES,))
    run(config)
    return config
