"""Under ZeRO-3 no rank holds the whole model while it is built or loaded: measured on one that is larger than the
limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stdit.config import ModelConfig
from stdit.models.stdit import STDiT
from tests.support.rank_jobs import peak_of_restoring, run, settings
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_model_is_never_whole(fresh: Pool, precision: str, tmp_path: Path) -> None:
    train = {"precision": precision}
    fresh(peak_of_restoring, data_for(tmp_path / "small", SMALL, train=train))
    # bfloat16: parts of two bytes a weight, and of four that are not rounded
    found = peaks(fresh, data_for(tmp_path / "run", MODEL, train=train), False, True)
    assert (0.5 if precision == "fp32" else 0.75) < found < (LIMIT if precision == "fp32" else 0.95)
    assert peaks(fresh, data_for(tmp_path / "run", MODEL, train=train), True, True) > 1


def test_nor_is_a_published_one_or_one_of_another_stage(fresh: Pool, tmp_path: Path) -> None:
    for name, model in (("image", {**MODEL, "temporal": False}), ("published", MODEL)):
        config = ModelConfig(**data_for(tmp_path, model)["model"])
        STDiT.from_settings(config).save_pretrained(tmp_path / name)
    fresh(peak_of_restoring, data_for(tmp_path / "small", SMALL))
    lora: dict[str, Any] = {"train": {"lora": {"rank": 2}, "steps": 1}}
    for source, init in (("published", {}), ("image", {"allow": ["add_temporal"]})):
        data = data_for(tmp_path / source, MODEL, **lora, init={"source": str(tmp_path / source), **init})
        # To the end: a frozen model has neither gradients nor optimizer state.
        assert 0.5 < peaks(fresh, data) < LIMIT
        assert peaks(fresh, data, True) > 1


def test_nor_is_one_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    config = ModelConfig(**data_for(tmp_path, MODEL)["model"])
    STDiT.from_settings(config).save_pretrained(tmp_path / "base")
    train = {"lora": {"rank": 2}, "steps": 4, "checkpoint_every": 1}
    data = data_for(tmp_path / "run", MODEL, train=train, init={"source": str(tmp_path / "base")})
    trained = Pool(2)
    try:
        trained(run, data, 2)
    finally:
        trained.close()
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()]
    assert checkpoints
    found = []
    for whole in (False, True):
        resumed = Pool(2)
        try:
            resumed(peak_of_restoring, data_for(tmp_path / f"small-{whole}", SMALL))
            found.append(peaks(resumed, data, whole))
        finally:
            resumed.close()
    assert 0.5 < found[0] < LIMIT
    assert found[1] > 1
