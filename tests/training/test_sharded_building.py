"""Under ZeRO-3 no rank holds the whole model while it is built: measured on one that is larger than the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_jobs import peak_of_restoring, settings
from tests.support.rank_pool import Pool

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = {"hidden_size": 1024, "depth": 4, "num_heads": 16}  # some 100 M parameters, of at most 4 M each
SMALL: dict[str, Any] = {"hidden_size": 32, "depth": 1, "num_heads": 2}
# Of the model's bytes: half of them are a rank's.
LIMIT = 0.75


def data_for(path: Path, model: dict[str, Any], stage: int = 3, **sections: Any) -> dict[str, Any]:
    return settings(path, model=model, **{**sections, "train": {"zero_stage": stage, **sections.get("train", {})}})


def peaks(ranks: Pool, *args: Any) -> float:
    """The largest rank's peak, as a share of the model."""
    return max(peak / model for peak, model in ranks(peak_of_restoring, *args))


@pytest.fixture
def fresh() -> Any:
    """Two ranks whose memory is their own, with everything imported."""
    ranks = Pool(2)
    yield ranks
    ranks.close()


def test_a_new_model_is_never_whole(fresh: Pool, tmp_path: Path) -> None:
    fresh(peak_of_restoring, data_for(tmp_path / "small", SMALL))
    assert 0.5 < peaks(fresh, data_for(tmp_path / "run", MODEL), False, True) < LIMIT
    assert peaks(fresh, data_for(tmp_path / "run", MODEL), True, True) > 1
