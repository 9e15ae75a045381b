"""What a machine cannot run is refused before a run is begun: too large a model, a back end that is not there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import (
    Config,
    ConfigError,
    ControlConfig,
    DataConfig,
    InitConfig,
    LoRAConfig,
    ModelConfig,
    TrainBucket,
    TrainConfig,
    validate,
)
from stdit.models.cost import ParameterSize, model_cost, parameter_count, parameter_sizes
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.train import train
from stdit.training import machine
from stdit.training.rank_memory import rank_memory

LATENTS = {"1x16x16": (1, 16, 16)}


def config_of(run_dir: Path, model: dict[str, Any] | None = None, batch_size: int = 1, **changes: Any) -> Config:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, **(model or {})}
    return Config(
        run_dir=run_dir,
        model=ModelConfig(**sizes),
        data=DataConfig(
            features="synthetic", buckets=(TrainBucket(frames=1, height=16, width=16, batch_size=batch_size),)
        ),
        train=TrainConfig(steps=1, **changes),
        init=InitConfig(source=run_dir) if {"lora", "control"} & changes.keys() else None,
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
    machine.check_machine(config_of(tmp_path / "run", attention_backend=backend, precision=precision), 1, LATENTS, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_limit_is_the_memory_that_weights_optimizer_and_activations_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    config = config_of(tmp_path / "run", zero_stage=0, activation_checkpointing=checkpointing, batch_size=6)
    # float32: weights, two moments and the average, four bytes each; beside that gradients and their copy, or
    # activations
    held, gradients = 16 * parameter_count(config.model), 8 * parameter_count(config.model)
    cost = model_cost(config.model, (1, 8, 8))
    states = held + gradients
    needed = held + 6 * (cost.activation_bytes_checkpointed if checkpointing else cost.activation_bytes)
    assert needed > states
    monkeypatch.setattr(machine, "host_memory", lambda: needed)
    machine.check_machine(config, 1, LATENTS, 0)
    monkeypatch.setattr(machine, "host_memory", lambda: needed - 1)
    with pytest.raises(
        ConfigError, match=r"^data.buckets 1x16x16: .* micro-batch of 6 .*ZeRO-0, fp32, 1 ranks"
    ) as caught:
        machine.check_machine(config, 1, LATENTS, 0)
    assert "Lower batch_size (and raise train.gradient_accumulation)" in str(caught.value)
    assert ("train.activation_checkpointing: true" in str(caught.value)) is not checkpointing
    monkeypatch.setattr(machine, "host_memory", lambda: states - 1)
    with pytest.raises(ConfigError, match=r"^model: .* a higher train.zero_stage or more ranks take less"):
        machine.check_machine(config, 1, LATENTS, 0)
    for launcher in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, DeepSpeed's
        with monkeypatch.context() as launched:
            launched.setenv(launcher, "2")
            launched.setattr(machine, "host_memory", lambda: 2 * needed - 1)
            with pytest.raises(ConfigError, match="for 2 ranks"):
                machine.check_machine(config, 2, LATENTS, 0)
            launched.setattr(machine, "host_memory", lambda: 2 * needed)
            machine.check_machine(config, 2, LATENTS, 0)


def test_a_processor_without_bfloat16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    with pytest.raises(ConfigError, match=r"^train.precision: Tesla T4 does not compute in bfloat16; use fp32$"):
        machine.check_machine(config_of(tmp_path / "run", precision="bf16"), 1, LATENTS, 0)


def test_samples_of_a_step_that_memory_does_not_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", batch_size=1, gradient_accumulation=10**6)
    monkeypatch.setattr("stdit.memory.host_memory", lambda: 10**6 * 3 * 16 * 16 * 4)
    machine.check_machine(config, 1, LATENTS, 0)
    monkeypatch.setattr("stdit.memory.host_memory", lambda: 10**6 * 3 * 16 * 16 * 4 - 1)
    with pytest.raises(ConfigError, match=r"data.buckets 1x16x16: the latents of a rank's 1,000,000 samples of a step"):
        machine.check_machine(config, 1, LATENTS, 0)


FINE_TUNING: list[dict[str, Any]] = [
    {"lora": LoRAConfig(rank=4)},
    {"control": ControlConfig(condition="low_resolution")},
]


@pytest.mark.parametrize("changes", FINE_TUNING, ids=["lora", "control"])
def test_frozen_weights_take_neither_gradients_nor_optimizer_state(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(tmp_path / "run", zero_stage=0, **changes)
    sizes = parameter_sizes(config.model, config.train)
    trained, frozen = (sum(p.numel for p in sizes if p.trained is kind) for kind in (True, False))
    assert frozen == parameter_count(config.model)
    assert 0 < trained < frozen
    memory = machine.step_memory(config, config.data.buckets[0], LATENTS["1x16x16"], 0, 1, 1, "cpu")
    assert memory.resident == {"weights": 4 * (trained + frozen), "optimizer": 8 * trained, "average": 4 * trained}
    assert memory.gradients == 4 * trained
    assert memory.activations > 0


def test_full_weights_are_counted_beside_the_copy_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", zero_stage=2, checkpoint_every=1)
    parameters = parameter_count(config.model)
    sizes = [ParameterSize(parameters, True)]
    needed = rank_memory(sizes, config.train, 2)
    assert needed.full_weights == 4 * parameters
    assert rank_memory(sizes, config.train, 1).full_weights == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    copies = needed.checkpoint_copy + needed.resident["optimizer"] + needed.resident["average"] + needed.full_weights
    monkeypatch.setattr(machine, "host_memory", lambda: 2 * needed.total + copies)
    machine._check_checkpoint_copy(needed, needed.total, config.train)
    monkeypatch.setattr(machine, "host_memory", lambda: 2 * needed.total + copies - 1)
    with pytest.raises(ConfigError, match=r"to the host's memory and joins .* GiB of full weights there, beside"):
        machine._check_checkpoint_copy(needed, needed.total, config.train)


@pytest.mark.parametrize(("precision", "whole", "part"), [("fp32", 4, 0), ("bf16", 8, 4)])
def test_building_the_model_takes_it_whole_but_under_zero_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, whole: int, part: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "device_memory", lambda device: 2**60)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for stage, needed in ((2, whole), (3, part / 8)):
        config = config_of(tmp_path / "run", {"hidden_size": 256}, zero_stage=stage, precision=precision)
        parameters = parameter_count(config.model)
        assert rank_memory([ParameterSize(parameters, True)], config.train, 8).building == needed * parameters
        monkeypatch.setattr("stdit.memory.host_memory", lambda p=parameters: 8 * whole * p - 1)
        if stage == 3:
            machine.check_machine(config, 8, LATENTS, 0)
            continue
        with pytest.raises(
            ConfigError, match=r"^model: to build its .* takes a rank .* for 8 ranks. Under train.zero_stage: 3"
        ):
            machine.check_machine(config, 8, LATENTS, 0)


def test_profiles_of_the_ema_are_counted_as_averages_of_their_own(tmp_path: Path) -> None:
    plain, kept = (
        rank_memory(
            [ParameterSize(1000, True)], config_of(tmp_path, zero_stage=2, checkpoint_every=1, ema=ema).train, 2
        )
        for ema in ({}, {"profiles": {"sigma_rel": (0.05, 0.1), "every": 1}})
    )
    average = plain.resident["average"]
    assert kept.resident["average"] == 3 * average
    assert kept.total - plain.total == kept.checkpoint_copy - plain.checkpoint_copy == 2 * average
    assert kept.full_weights - plain.full_weights == 2 * 1000  # float16


def test_a_batch_that_no_memory_holds_is_refused_before_the_run_is_begun(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a micro-batch of 1000000000 take [\d,.]+ GiB") as caught:
        train(config_of(tmp_path / "run", batch_size=10**9))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_step_takes_no_less_memory_than_was_estimated(tmp_path: Path) -> None:
    """What autograd keeps of a real forward: an estimate above it would refuse runs that fit."""
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}), ({"attention": "full", "qk_norm": "rms"}, {}), ({"num_classes": 3, "hidden_size": 48, "num_heads": 4}, {}),
        *(({}, changes) for changes in FINE_TUNING),
    ]  # fmt: skip
    for model, changes in cases:
        config = config_of(tmp_path / "run", model=model, batch_size=2, **changes)
        bucket = config.data.buckets[0]
        network = add_trainable(STDiT.from_settings(config.model, 0), config.train).train()
        inputs = {"control": torch.randn(2, 3, 1, 16, 16)} if config.train.control else {}
        owned = {p.untyped_storage().data_ptr() for p in network.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, owned: set[int] = owned) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.randn(2, 3, 1, 16, 16), torch.tensor([10.0, 900.0]), return_dict=False, **inputs)[0].sum()
        cost = machine.sample_cost(config, bucket, LATENTS[bucket.key], 0, 2)
        assert machine.saved_bytes(cost, 2, False) <= sum(kept.values())


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


@pytest.mark.parametrize("there", [True, False])
def test_weights_on_nvme_need_a_library_that_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: there)
    offload = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    config = config_of(tmp_path / "run", zero_stage=3, deepspeed=offload)
    message = r"offload_param.device: nvme needs DeepSpeed's async_io, .* libaio-dev"
    with nullcontext() if there else pytest.raises(ConfigError, match=message):
        machine.check_machine(config, 1, LATENTS, 0)
