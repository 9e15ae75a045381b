"""µP: nothing changes at the base width; at others activations and learning rates keep their scale, in runs under any
ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import AlignmentConfig, ConfigError, ModelConfig, OptimizerConfig, merge
from stdit.models.alignment import Aligned
from stdit.models.stdit import STDiT
from stdit.training.mup import scale_init
from stdit.training.optimizer import make_optimizer, parameter_groups
from tests.support.rank_jobs import config_of, for_ranks, run, settings
from tests.support.rank_pool import Pool

BASE = 64


def model_of(width: int, scaled: bool = True) -> STDiT:
    """With heads of 32; every kind of condition."""
    config = ModelConfig(
        hidden_size=width, depth=2, num_heads=width // 32, in_channels=4, num_classes=4, text_dim=8, max_text_tokens=4
    )
    model = STDiT.from_settings(config)
    if scaled:
        scale_init(model, BASE)
    return model.train()


def optimizer_of(model: torch.nn.Module, mup: bool, **changes: Any) -> torch.optim.Optimizer:
    scaling = {"mup": {"base_width": BASE}} if mup else {}
    return make_optimizer(
        model, OptimizerConfig.model_validate({"learning_rate": 4e-3, "betas": (0.9, 0.99), **scaling, **changes})
    )


def activations(model: STDiT, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, float]:
    """Mean absolute values of what layers put out, after some steps on one batch."""
    generator = torch.Generator().manual_seed(0)
    x, target, text = (torch.randn(size, generator=generator) for size in ((8, 4, 1, 4, 4), (8, 4, 1, 4, 4), (8, 4, 8)))
    found: dict[str, float] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: found.__setitem__(
            name, (out[0] if isinstance(out, tuple) else out).abs().mean().item()
        )

    layers = ("x_embedder", "t_embedder", "y_embedder.y_proj", "blocks.0", "blocks.1", "blocks.1.attn", "blocks.1.mlp")
    for name in (*layers, "final_layer"):
        model.get_submodule(name).register_forward_hook(keep(name))
    for step in range(steps + 1):
        inputs = {"class_labels": torch.arange(8) % 4, "encoder_hidden_states": text}
        y = model(x, torch.linspace(100, 900, 8), **inputs, return_dict=False)[0]
        if step < steps:
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
    return found


def spread(widths: tuple[int, ...], mup: bool, **changes: Any) -> dict[str, float]:
    """By layer: the largest activation over the widths as a multiple of the smallest."""
    models = [model_of(width, mup) for width in widths]
    found = [activations(model, optimizer_of(model, mup, **changes), 4) for model in models]
    return {name: max(f[name] for f in found) / min(f[name] for f in found) for name in found[0]}


def test_coordinate_check() -> None:
    """Activations after a few steps are the same at four times the width; without µP they are not."""
    assert max(spread((64, 256), True).values()) < 1.2
    assert max(spread((64, 256), False).values()) > 1.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_coordinate_check_up_to_eight_times_the_width(name: str) -> None:
    widths = (64, 128, 256, 512)
    assert max(spread(widths, True, name=name).values()) < 1.25
    assert max(spread(widths, False, name=name).values()) > 2


def test_at_the_base_width_nothing_changes() -> None:
    with_mup, plain = model_of(BASE), model_of(BASE, False)
    for model, mup in ((with_mup, True), (plain, False)):
        activations(model, optimizer_of(model, mup, weight_decay=0.1), 2)
    for (name, a), b in zip(with_mup.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_rates_decays_and_initial_weights_follow_the_number_of_inputs() -> None:
    model, plain, base = (
        Aligned(model_of(width, scaled), AlignmentConfig(block=0))
        for width, scaled in ((256, True), (256, False), (BASE, False))
    )
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, "weight_decay": 0.1, "mup": {"base_width": BASE}})
    groups = {id(p): group for group in parameter_groups(model, config) for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    rms = {
        n: [float(m.get_parameter(n).detach().square().mean().sqrt()) for m in (model.base, plain.base, base.base)]
        for n, _ in model.base.named_parameters()
    }
    for name, rate, scale in (
        ("x_embedder.proj.weight", 1, 1),  # inputs of fixed number
        ("x_embedder.proj.bias", 1, None),
        ("y_embedder.embedding_table.weight", 1, 1),
        ("y_embedder.y_proj.fc1.weight", 1, 1),
        ("y_embedder.y_proj.fc2.weight", 4, 1 / 2),  # hidden
        ("blocks.0.scale_shift_table", 1, 1),
        ("blocks.0.attn.qkv.weight", 4, 1 / 2),
        ("blocks.1.mlp.fc2.weight", 4, 1 / 2),
        ("t_block.1.weight", 4, None),  # 0
        ("final_layer.linear.weight", 4, None),
    ):
        group = groups[id(model.base.get_parameter(name))]
        assert group["lr_scale"] == group["lr"] == 1 / rate, name
        assert group["weight_decay"] in (0.0, pytest.approx(0.1 * rate)), name
        scaled, _, at_base = rms[name]
        assert scaled == (0 if scale is None else pytest.approx(at_base * scale, rel=1e-3)), name
    assert rms["x_embedder.proj.weight"][1] < 0.8 * rms["x_embedder.proj.weight"][2]  # not so without µP
    head = Aligned(STDiT.from_settings(model.base.settings), AlignmentConfig(block=0))
    before = head.head[2].weight.square().mean().sqrt()  # pyright: ignore
    scale_init(head, BASE)
    assert head.head[2].weight.square().mean().sqrt() < 0.7 * before  # pyright: ignore


def test_muons_matrices_stay_one_group_with_the_root_of_the_ratio() -> None:
    config = OptimizerConfig.model_validate({"name": "muon", "learning_rate": 1.0, "mup": {"base_width": BASE}})
    muon, *others = parameter_groups(model_of(256), config)
    assert muon["lr_scale"] == 0.5
    assert len(muon["parts"]) == len(muon["params"])
    assert {group["lr_scale"] for group in others} == {1.0, 0.25}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_goes_on_with_another_zero_stage_and_number_of_ranks(
    pair: Pool, solo: Pool, stage: int, name: str, tmp_path: Path
) -> None:
    def data_for(path: Path, ranks: int, stage: int) -> dict[str, Any]:
        optimizer = {"name": name, "mup": {"base_width": 16}}
        data = merge(settings(path), {"train": {"zero_stage": stage, "optimizer": optimizer}})
        data["data"]["buckets"] = for_ranks(ranks)
        return data

    whole = solo(run, data_for(tmp_path / "whole", 1, 0))[0]["metrics"]
    pair(run, data_for(tmp_path / "broken", 2, stage), 3)
    resumed = solo(run, data_for(tmp_path / "broken", 1, (stage + 1) % 4))[0]["metrics"]
    assert [m["loss"] for m in resumed] == pytest.approx([m["loss"] for m in whole], rel=1e-4)
    plain = merge(data_for(tmp_path / "plain", 1, 0), {"train": {"optimizer": {"mup": None}}})
    unscaled = solo(run, plain)[0]["metrics"]
    assert [m["loss"] for m in unscaled] != pytest.approx([m["loss"] for m in whole], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"optimizer": {"mup": {"base_width": 24}}}}, "mup.base_width 24: hidden size 24 is no multiple.*16"),
        (
            {"train": {"optimizer": {"mup": {"base_width": 16}}, "lora": {"rank": 2}}, "init": {"source": "x"}},
            "train.lora and train.optimizer.mup",
        ),
    ],
)
def test_it_is_refused_where_it_cannot_work(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_of(merge(settings("runs/x"), changes))
