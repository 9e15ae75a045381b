"""docs/scaling.md is what the code says."""

from __future__ import annotations

import pytest

from pipelines.scaling import PAGE, markdown
from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert (ROOT / PAGE).read_text(encoding="utf-8") == markdown(), f"{PAGE} differs from the code: run `make docs`"
