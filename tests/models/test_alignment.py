"""Alignment: the tokens of one block, the patches of the clean latents, and the cosine between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.config import AlignmentConfig, ModelConfig, TrainConfig
from stdit.models.alignment import Aligned, captured_tokens
from stdit.models.cost import model_cost
from stdit.models.embeddings import patchify, unpatchify
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, conditions_for

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]


@pytest.mark.parametrize("size", [(4, 6, 8), (3, 5, 7)])
def test_patches_of_latents_are_unpatchified_to_them(noise: Noise, size: tuple[int, int, int]) -> None:
    x, patch = noise(2, 3, *size), (2, 2, 2)
    grid = tuple(-(-n // p) for n, p in zip(size, patch, strict=True))
    tokens = patchify(x, patch)
    assert tokens.shape == (2, grid[0], grid[1] * grid[2], 24)
    assert torch.equal(unpatchify(tokens.flatten(1, 2), grid, patch, size), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_captured_tokens_are_the_blocks_output_and_the_prediction_stays(
    tiny: Tiny, noise: Noise, name: str
) -> None:
    model, x = tiny(**MEMBERS[name]), noise(2, 3, 2, 4, 4)
    inputs = conditions_for(model.settings, 2, noise)
    outputs: list[Tensor] = []
    plain = model(x, **inputs).sample
    handle = model.block_list()[0].register_forward_hook(lambda block, args, out: outputs.append(out[0]))
    with captured_tokens(model, 0) as captured:
        found = model(x, **inputs).sample
    handle.remove()
    assert torch.equal(found, plain)
    assert len(captured) == 1
    assert torch.equal(captured[0][0], outputs[0])
    assert "run_blocks" not in vars(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_one_less_the_cosine_and_trains_the_blocks_up_to_the_aligned_one(
    tiny: Tiny, noise: Noise, checkpointing: bool
) -> None:
    model = Aligned(tiny(depth=3, num_classes=4), AlignmentConfig(block=1)).train()
    if checkpointing:
        model.base.enable_gradient_checkpointing()
    x, clean = noise(2, 3, 2, 4, 4), noise(2, 3, 2, 4, 4, seed=1)
    inputs: dict[str, Any] = {"class_labels": torch.tensor([0, 3]), "return_dict": False}
    prediction, loss = model(x, torch.tensor([200.0, 700.0]), clean, **inputs)
    with captured_tokens(model.base, 1) as captured:
        assert torch.equal(prediction, model.base(x, torch.tensor([200.0, 700.0]), **inputs)[0])
    projected = unpatchify(model.head(captured[0][0]).flatten(1, 2), (2, 2, 2), (1, 2, 2), (2, 4, 4))
    a, b = (patchify(v, (1, 2, 2)).double() for v in (projected, clean))
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(loss.double(), 1 - cosine.mean((1, 2)))
    loss.sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(n.startswith("base.blocks.0.") for n in reached)
    assert any(n.startswith("base.blocks.1.") for n in reached)
    assert any(n.startswith("head.2.") for n in reached)
    assert not any(n.startswith(("base.blocks.2.", "base.final_layer")) for n in reached)


def test_without_a_target_it_is_the_model(tiny: Tiny, noise: Noise) -> None:
    base, x = tiny(), noise(1, 3, 1, 4, 4)
    assert torch.equal(Aligned(base, AlignmentConfig(block=0))(x, 500.0).sample, base(x, 500.0).sample)


def features_config(**changes: Any) -> AlignmentConfig:
    return AlignmentConfig(block=1, target="features", features_dim=10, projector_dim=12, **changes)


@pytest.mark.parametrize("irepa", [False, True])
def test_the_loss_of_features_is_repas_and_trains_the_blocks_up_to_the_aligned_one(
    tiny: Tiny, noise: Noise, irepa: bool
) -> None:
    model = Aligned(tiny(depth=3), features_config(irepa=irepa, irepa_gamma=0.7)).train()
    x, features = noise(2, 3, 2, 4, 6), noise(2, 10, 2, 2, 3, seed=1)  # on the grid of the tokens
    *_, loss = model(x, torch.tensor([200.0, 700.0]), features, return_dict=False)
    with captured_tokens(model.base, 1) as captured:
        model.base(x, torch.tensor([200.0, 700.0]))
    tokens, target = captured[0][0], features.flatten(3).permute(0, 2, 3, 1)
    if irepa:
        kernel, bias = model.head.get_parameter("weight"), model.head.get_parameter("bias")
        padded = F.pad(tokens.unflatten(2, (2, 3)), (0, 0, 1, 1, 1, 1))  # (B, T, H + 2, W + 2, D)
        shifted = [(padded[:, :, i : i + 2, j : j + 3], kernel[:, :, i, j]) for i in range(3) for j in range(3)]
        projected = bias + sum(part @ weight.T for part, weight in shifted)
        projected = projected.flatten(2, 3)
        target = target - 0.7 * target.mean(2, keepdim=True)
        target = target / (target.std(2, keepdim=True) + 1e-6)
    else:
        weights = [(model.head.get_parameter(f"{i}.weight"), model.head.get_parameter(f"{i}.bias")) for i in (0, 2, 4)]
        projected = tokens
        for i, (weight, bias) in enumerate(weights):
            projected = (F.silu(projected) if i else projected) @ weight.T + bias
    a, b = F.normalize(projected.double(), dim=-1), F.normalize(target.double(), dim=-1)
    torch.testing.assert_close(loss.double(), 1 - (a * b).sum(-1).mean((1, 2)), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(n.startswith("base.blocks.1.") for n in reached)
    assert any(n.startswith("head.") for n in reached)
    assert not any(n.startswith(("base.blocks.2.", "base.final_layer")) for n in reached)


def test_features_of_another_grid_are_interpolated_to_the_tokens(tiny: Tiny, noise: Noise) -> None:
    model = Aligned(tiny(), features_config())
    coarse, fine = noise(2, 10, 3, 2, 3), noise(2, 10, 2, 4, 6)
    found = model.targets(coarse, (3, 4, 6)).unflatten(2, (4, 6)).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(found, F.interpolate(coarse, (3, 4, 6), mode="trilinear"))
    halved = model.targets(fine, (2, 2, 3)).unflatten(2, (2, 3)).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(halved, F.avg_pool3d(fine, (1, 2, 2)))  # a token stands for the mean of four


def test_a_token_after_the_patches_is_not_aligned(tiny: Tiny, noise: Noise) -> None:
    in_context = tiny(attention="full", conditioning="in_context", num_classes=4)
    inputs = {"class_labels": torch.tensor([0, 3]), "return_dict": False}
    for alignment in (features_config(), features_config(irepa=True)):
        *_, loss = Aligned(in_context, alignment)(noise(2, 3, 2, 4, 4), 300.0, noise(2, 10, 2, 2, 2), **inputs)
        assert loss.shape == (2,)


@pytest.mark.parametrize("irepa", [False, True])
def test_the_head_of_features_counts_in_training_and_not_in_sampling(
    settings: Callable[..., ModelConfig], irepa: bool
) -> None:
    model = settings()
    chosen = features_config(irepa=irepa).model_dump()
    plain, aligned = (
        model_cost(model, (2, 2, 2), train=TrainConfig.model_validate({"steps": 1, **extra}))
        for extra in ({}, {"alignment": chosen})
    )
    each = 9 * 32 * 10 if irepa else 32 * 12 + 12 * 12 + 12 * 10
    assert aligned.forward_macs == plain.forward_macs
    assert aligned.training_flops - plain.training_flops == 6 * 8 * each
    assert aligned.trained - plain.trained == each + (10 if irepa else 12 + 12 + 10)


def test_features_of_unknown_width_and_settings_of_the_other_target_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="features_dim is not known"):
        Aligned(tiny(), AlignmentConfig(block=0, target="features"))
    with pytest.raises(ValueError, match="irepa True belongs to target features; target is latents"):
        AlignmentConfig(block=0, irepa=True)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss(tiny: Tiny, noise: Noise) -> None:
    model, x, clean = (
        Aligned(tiny(), AlignmentConfig(block=0)).train(),
        noise(2, 3, 2, 4, 4),
        noise(2, 3, 2, 4, 4, seed=1),
    )
    losses = []
    for compiled in (False, True):
        if compiled:
            model.base.compile_repeated_blocks()
        model.zero_grad()
        *_, loss = model(x, torch.tensor([200.0, 700.0]), clean, return_dict=False)
        loss.sum().backward()
        losses.append([loss.detach(), model.base.get_parameter("blocks.0.attn.qkv.weight").grad.clone()])  # pyright: ignore
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_the_head_counts_in_training_and_not_in_sampling(settings: Callable[..., ModelConfig]) -> None:
    model = settings()
    plain, aligned = (
        model_cost(model, (2, 2, 2), train=TrainConfig.model_validate({"steps": 1, **extra}))
        for extra in ({}, {"alignment": {"block": 0}})
    )
    head = 8 * (32 * 32 + 32 * 12)  # multiply-adds of eight tokens
    assert aligned.forward_macs == plain.forward_macs
    assert aligned.training_flops - plain.training_flops == 6 * head
    assert aligned.trained - plain.trained == 32 * 32 + 32 + 32 * 12 + 12
