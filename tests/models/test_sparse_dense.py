"""Sparse-dense residual fusion: a fresh one changes nothing, dropped places are the mask token, and a dropped path runs
no sparse block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import ModelConfig, TokenRoutingConfig, TrainConfig
from stdit.diffusion.guidance import DROPPED, check_path_drop, guided
from stdit.models.control import STDiTControl
from stdit.models.cost import model_cost
from stdit.models.sampling import CachedConditions
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, conditions_for

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]
SPARSE = (1, 3)
ROUTING = TokenRoutingConfig(share=0.5, start=1, end=3)
FUSED = ("adaln_single-factorized", "in_context-full", "latte")


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + i) for i in range(batch)]


def fused(tiny: Tiny, noise: Noise, name: str = FUSED[0]) -> tuple[STDiT, Tensor, dict[str, Any]]:
    """A model of 4 blocks, and its inputs. Fusion and mask token are not as initialised."""
    model = tiny(**MEMBERS[name], depth=4, sparse_dense=SPARSE)
    assert model.fusion is not None
    with torch.no_grad():
        model.fusion.proj.weight.add_(0.1 * noise(*model.fusion.proj.weight.shape, seed=5))
        model.fusion.mask_token.copy_(noise(len(model.fusion.mask_token), seed=6))
    return model, noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)


def fusion_inputs(model: STDiT) -> list[tuple[Tensor, Tensor]]:
    """(dense, sparse with mask tokens) of each later forward pass."""
    assert model.fusion is not None
    seen: list[tuple[Tensor, Tensor]] = []
    model.fusion.proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0].chunk(2, dim=-1)))
    return seen


def calls(model: STDiT) -> list[int]:
    """Numbers of the blocks that later forward passes run, in order."""
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda block, args, output, i=i: ran.append(i))
    return ran


@pytest.mark.parametrize("name", FUSED)
def test_a_fresh_fusion_on_all_tokens_is_the_model_without_it(noise: Noise, name: str) -> None:
    settings = {"hidden_size": 48, "num_heads": 4, **MEMBERS[name], "depth": 4}
    plain = STDiT.from_settings(ModelConfig(**settings, in_channels=3))
    model = STDiT.from_settings(ModelConfig(**settings, in_channels=3, sparse_dense=SPARSE))
    with torch.no_grad():
        for i, parameter in enumerate(plain.parameters()):  # the final layer and the gates start at zero
            parameter.copy_(0.1 * noise(*parameter.shape, seed=i))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {"fusion.proj.weight", "fusion.proj.bias", "fusion.mask_token"}
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(plain.settings, 3, noise)
    for mode in (False, True):
        expected = plain.train(mode)(x, **inputs).sample
        assert expected.abs().max() > 0.01
        model.set_token_routing(ROUTING.model_copy(update={"share": 0.0}))
        torch.testing.assert_close(model.train(mode)(x, **inputs).sample, expected)


@pytest.mark.parametrize("name", FUSED)
def test_sparse_blocks_see_the_kept_tokens_and_every_other_place_is_the_mask_token(
    tiny: Tiny, noise: Noise, name: str
) -> None:
    model, x, inputs = fused(tiny, noise, name)
    model.set_token_routing(ROUTING)
    states: list[Any] = []
    shapes: list[int] = []
    model.blocks[1].register_forward_hook(lambda block, args, output: states.append(args[2]))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: shapes.append(args[0].shape[2]))
    seen = fusion_inputs(model)
    model.train()(x, **inputs, generator=generators(3))
    (dense, sparse), kept = seen[0], states[0].kept
    assert shapes == [dense.shape[2], kept.shape[1], kept.shape[1], dense.shape[2]]
    assert kept.shape[1] == dense.shape[2] - 8
    ran = torch.zeros(3, dense.shape[2], dtype=torch.bool).scatter(1, kept, True)
    assert model.fusion is not None
    is_mask = (sparse == model.fusion.mask_token).all(-1)
    assert torch.equal(is_mask, ~ran[:, None].expand_as(is_mask))


@pytest.mark.parametrize("name", FUSED)
def test_a_dropped_path_runs_no_sparse_block_and_is_the_mask_token_everywhere(
    tiny: Tiny, noise: Noise, name: str
) -> None:
    model, x, inputs = fused(tiny, noise, name)
    ran, seen = calls(model), fusion_inputs(model)
    model.eval()
    skipped = model(x, **inputs, path_drop=True).sample
    assert ran == [0, 3]
    whole = model(x, **inputs).sample
    assert ran == [0, 3, 0, 1, 2, 3]
    assert model.fusion is not None
    assert torch.equal(seen[0][1], model.fusion.mask_token.expand_as(seen[0][1]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.allclose(skipped, whole)
    # In training the paths of some samples are dropped beside others.
    model.set_token_routing(ROUTING.model_copy(update={"share": 0.0, "path_drop": 0.75}))
    found = model.train()(x, **inputs, generator=generators(3)).sample
    dropped = (seen[-1][1] == model.fusion.mask_token).flatten(1).all(1)
    assert 0 < int(dropped.sum()) < 3
    torch.testing.assert_close(found, torch.where(dropped.view(-1, 1, 1, 1, 1), skipped, whole))


def test_gradients_reach_the_fusion_and_the_mask_token_with_checkpointing_too(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    model.set_token_routing(ROUTING.model_copy(update={"path_drop": 0.3}))
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(x, **inputs, generator=generators(3)).sample.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    assert all(gradients[0][f"fusion.{n}"].abs().max() > 0 for n in ("proj.weight", "proj.bias", "mask_token"))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_where_nothing_is_dropped_the_mask_token_still_has_a_gradient_of_zero(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    model.train()(x, **inputs).sample.square().sum().backward()
    assert model.fusion is not None
    assert model.fusion.mask_token.grad is not None
    assert not model.fusion.mask_token.grad.any()


def test_dense_steps_run_every_token_and_drop_the_same_paths(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    model.set_token_routing(ROUTING.model_copy(update={"path_drop": 0.5}))
    states: list[Any] = []
    model.blocks[1].register_forward_hook(lambda block, args, output: states.append(args[2]))
    for dense in (False, True):
        model.train()(x, **inputs, generator=generators(3), dense=dense)
    assert [s.kept is None for s in states] == [False, True]
    assert torch.equal(states[0].path_dropped, states[1].path_dropped)


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_gradients(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    model.set_token_routing(ROUTING.model_copy(update={"path_drop": 0.75}))
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(x, **inputs, generator=generators(3)).sample.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.compile_repeated_blocks(backend="aot_eager")  # fullgraph: a graph break is an error
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_costs_count_the_fusion_and_the_tokens_that_run(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    inputs.pop("encoder_attention_mask", None)
    model.set_token_routing(ROUTING)
    with FlopCounterMode(display=False) as counter:
        model.train()(x, **inputs)
    length = 5 if model.settings.text_dim else 0
    plain = ModelConfig(**{**model.settings.model_kwargs(), "sparse_dense": None})
    without = model_cost(plain, (2, 4, 4), length)
    dense, routed = (
        model_cost(model.settings, (2, 4, 4), length, train=TrainConfig(steps=1, token_routing=r))
        for r in (None, ROUTING)
    )
    width, _, _ = plain.dimensions
    assert dense.parameters - without.parameters == 2 * width * width + 2 * width
    assert dense.forward_macs - without.forward_macs == 2 * 4 * 4 * 2 * width * width
    assert routed.training_flops == 3 * counter.get_total_flops() // len(x)
    assert routed.training_flops < dense.training_flops


@pytest.mark.parametrize("name", [*FUSED[:2], "open-sora-1"])
def test_path_drop_guidance_goes_from_the_null_condition_without_sparse_blocks_to_the_condition(
    tiny: Tiny, noise: Noise, name: str
) -> None:
    model, x, inputs = fused(tiny, noise, name)
    model.eval()
    times = torch.tensor([700.0, 200.0])
    inputs.pop("timestep")
    null = {"drop_condition": torch.ones(3, dtype=torch.bool)} if inputs.keys() & set(DROPPED) else {}
    ran = calls(model)
    with torch.no_grad():
        steps = guided(CachedConditions(model), 3.0, path_drop=True).bind(inputs, times)
        for i, t in enumerate(times):
            ran.clear()
            found = steps(x, i)
            assert sorted(ran) == [0, 0, 1, 2, 3, 3]
            c = model(x, t.expand(3), **inputs).sample
            u = model(x, t.expand(3), **inputs | null, path_drop=True).sample
            torch.testing.assert_close(found, u + 3 * (c - u), rtol=1e-4, atol=1e-5)


def test_path_drop_guidance_saves_the_flops_of_the_sparse_blocks_of_one_prediction(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    model.eval()
    inputs.pop("timestep")

    def flops(path_drop: bool) -> int:
        step = guided(CachedConditions(model), 3.0, path_drop=path_drop).bind(inputs, torch.tensor([500.0]))
        step(x, 0)  # conditions and modulation are computed once
        with FlopCounterMode(display=False) as counter:
            step(x, 0)
        return counter.get_total_flops()

    with torch.no_grad():
        both, dropped = flops(False), flops(True)
    assert 0.7 < dropped / both < 0.8  # half of the blocks of half of the predictions


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparse_dense": (2, 4)}, "dense blocks on both sides"),
        ({"sparse_dense": (2, 2)}, "0 < start < end < depth 4"),
        ({"sparse_dense": SPARSE, "conditioning": "joint", "text_dim": 8}, "the text goes through"),
        ({"sparse_dense": SPARSE, "dynamic_tokens": True}, "choose by sample"),
        ({"sparse_dense": SPARSE, "exit_depths": ((0.8, 2),)}, "choose by sample"),
    ],
)
def test_what_cannot_be_fused_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelConfig(hidden_size=32, depth=4, num_heads=4, **changes)


def test_routing_of_other_blocks_and_packing_and_path_drop_without_fusion_are_refused(tiny: Tiny, noise: Noise) -> None:
    model, x, inputs = fused(tiny, noise)
    with pytest.raises(ValueError, match=r"start 1, end 2; the model's sparse_dense is \[1, 3\]"):
        model.settings.check_token_routing(1, 2)
    with pytest.raises(ValueError, match="sparse_dense"):
        model.settings.check_packing()
    with pytest.raises(ValueError, match="a control branch of a model with sparse_dense"):
        STDiTControl.of(model)
    with pytest.raises(ValueError, match="path-drop guidance.* needs a model with sparse_dense"):
        check_path_drop(True, None)
    with pytest.raises(ValueError, match="needs a model with sparse_dense"):
        tiny(**MEMBERS[FUSED[0]], depth=4)(x, **inputs, path_drop=True)
