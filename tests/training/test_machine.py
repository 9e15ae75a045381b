"""What a machine cannot run is refused before a run is begun: too large a model, a back end that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stdit.config import Config, ConfigError, DataConfig, ModelConfig, TrainBucket, TrainConfig, validate
from stdit.models.cost import parameter_count
from stdit.train import train
from stdit.training import machine


def config_of(run_dir: Path, model: dict[str, Any] | None = None, **changes: Any) -> Config:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, **(model or {})}
    return Config(
        run_dir=run_dir,
        model=ModelConfig(**sizes),
        data=DataConfig(features="synthetic", buckets=(TrainBucket(frames=1, height=16, width=16, batch_size=1),)),
        train=TrainConfig(steps=1, **changes),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"hidden_size": 65536, "depth": 8}},
            r"model: \d{3},\d{3} M parameters take .* GiB .* this machine has",
        ),
        ({"attention_backend": "flash"}, "train.attention_backend: flash cannot be used here, on cpu in fp32"),
        ({"attention_backend": "sage"}, "train.attention_backend: sage cannot be used here"),
    ],
)
def test_what_the_machine_cannot_run_is_refused_before_the_run_is_begun(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(config_of(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", [None, "native", "_native_math"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_it_can_run_passes(tmp_path: Path, backend: str | None, precision: str) -> None:
    machine.check_machine(config_of(tmp_path / "run", attention_backend=backend, precision=precision), 1)


def test_the_limit_is_the_memory_that_weights_gradients_and_optimizer_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", zero_stage=0)
    # float32: weights, gradients, two moments and the average, four bytes each
    needed = 20 * parameter_count(config.model)
    monkeypatch.setattr(machine, "_host_memory", lambda: needed)
    machine.check_machine(config, 1)
    monkeypatch.setattr(machine, "_host_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"ZeRO-0, fp32, 1 ranks"):
        machine.check_machine(config, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "_host_memory", lambda: 2 * needed - 1)
    with pytest.raises(ConfigError, match="2 ranks of"):
        machine.check_machine(config, 2)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"depth": 10**8}, "depth"),
        ({"num_heads": 2000}, "num_heads"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"mlp_ratio": 1e6}, "mlp_ratio"),
        ({"position_interpolation": float("inf")}, "position_interpolation"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"text_dim": 10**9}, "text_dim"),
        ({"position_grid": [10**6, 2], "positions": "learned"}, "position_grid"),
        ({"patch_size": [1, 10**6, 2]}, "patch_size"),
        ({"kv_compress": 10**6}, "kv_compress"),
    ],
)
def test_sizes_of_no_model_are_refused_by_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"test: {key}"):
        validate({"hidden_size": 32, "depth": 2, "num_heads": 2, **changes}, ModelConfig, "test")
