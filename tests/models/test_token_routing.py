"""Token routing: blocks compute what they would with the bypassed tokens masked out, and these stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import ModelConfig, TokenRoutingConfig, TrainConfig
from stdit.models.attention import plain_attention
from stdit.models.cost import model_cost
from stdit.models.stdit import STDiT
from stdit.models.token_routing import choose_tokens, put_back, take_tokens
from tests.support.models import MEMBERS, conditions_for

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]
ROUTING = TokenRoutingConfig(share=0.5, start=1, end=3)
GRIDLESS = ("pixart-sigma", "windows", "conv2d", "conv3d", "rineau")
ROUTED = [name for name in MEMBERS if name not in GRIDLESS]


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + i) for i in range(batch)]


def results(model: STDiT, x: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients in training, with the same draws each time."""
    model.train().zero_grad()
    y = model(x, **inputs, generator=generators(len(x)), return_dict=False)[0]
    y.square().sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mask_instead(model: STDiT, kept: Tensor, t: int) -> None:
    """Has the routed blocks run all tokens, of which only `kept` (B, S) bool are seen, and undo what the others
    became."""

    def processor(full: bool) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            seen = kept.repeat(1, t) if full else kept.repeat_interleave(t, 0)
            text = torch.ones(len(seen), k.shape[1] - seen.shape[1], dtype=torch.bool)  # of joint attention
            seen = torch.cat([seen, text], 1)[:, None, None]
            return plain_attention(q, k, v, seen if mask is None else seen & mask)

        return attend

    def undo(block: Any, args: Any, output: Any) -> Any:
        return torch.where(kept[:, None, :, None], output[0], args[0]), *output[1:]

    for block in model.block_list()[ROUTING.start : ROUTING.end]:
        if not block.over_time:
            block.attn.processor = processor(block.full)
        block.register_forward_hook(undo)


@pytest.mark.parametrize("name", ROUTED)
def test_routed_blocks_are_dense_ones_that_see_the_kept_tokens(tiny: Tiny, noise: Noise, name: str) -> None:
    settings = {**MEMBERS[name], "depth": 4}
    model, dense = tiny(**settings), tiny(**settings)
    x, inputs = noise(3, 3, 2 if model.settings.has_time else 1, 8, 8), conditions_for(model.settings, 3, noise)
    model.set_token_routing(ROUTING)
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, args, output: seen.append(args[2].kept))
    output, gradients = results(model, x, inputs)
    every, _ = results(dense, x, inputs)
    tokens = 16 + (0 if model.settings.conditioning != "in_context" else seen[0].shape[1] - 8)
    assert seen[0].shape == (3, tokens - 8)
    assert not torch.allclose(output, every, rtol=1e-3, atol=1e-3)

    kept = torch.zeros(3, tokens, dtype=torch.bool).scatter(1, seen[0], True)
    mask_instead(dense, kept, x.shape[2])
    expected, expected_gradients = results(dense, x, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[key], rtol=1e-3, atol=1e-6 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ["adaln_single-factorized", "in_context-full", "joint-factorized"])
def test_at_share_zero_nothing_changes_and_sampling_never_does(tiny: Tiny, noise: Noise, name: str) -> None:
    model = tiny(**MEMBERS[name], depth=4, drop_path=0.3)
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)
    sampled = model(x, **inputs).sample
    expected, gradients = results(model, x, inputs)
    model.set_token_routing(ROUTING.model_copy(update={"share": 0.0}))
    found, found_gradients = results(model, x, inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[key], gradient) for key, gradient in gradients.items())
    model.set_token_routing(ROUTING)
    assert not torch.equal(results(model, x, inputs)[0], expected)
    assert torch.equal(model.eval()(x, **inputs).sample, sampled)


def test_putting_back_what_was_taken_is_the_identity_and_so_is_the_bypassed_tokens_gradient(noise: Noise) -> None:
    x = noise(2, 3, 6, 4).requires_grad_()
    kept = torch.tensor([[0, 2, 5], [1, 3, 4]])
    assert torch.equal(put_back(x, take_tokens(x, kept), kept), x)
    upstream = noise(2, 3, 6, 4, seed=1)
    (gradient,) = torch.autograd.grad(put_back(x, 2 * take_tokens(x, kept), kept), x, upstream)
    factor = torch.ones(2, 6).scatter(1, kept, 2.0)[:, None, :, None]
    assert torch.equal(gradient, upstream * factor)


def test_a_samples_tokens_are_its_own_and_every_patch_is_as_likely(noise: Noise) -> None:
    x, grid = noise(200, 1, 12, 2), (1, 2, 5)  # two in-context tokens
    kept = choose_tokens(0.3, grid, x, generators(200))
    part = choose_tokens(0.3, grid, x[150:], generators(200)[150:])
    assert torch.equal(kept[150:], part)
    assert kept.shape == (200, 9)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept[:, 7:], torch.tensor([[10, 11]]).expand(200, -1))
    assert ((kept[:, :7].flatten().bincount() - 140).abs() < 33).all()  # five standard deviations
    assert choose_tokens(0.99, grid, x, generators(200)).shape == (200, 3)  # one patch at least


def test_checkpointing_recomputes_the_same_tokens(tiny: Tiny, noise: Noise) -> None:
    model = tiny(**MEMBERS["adaln_single-factorized"], depth=4)
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)
    model.set_token_routing(ROUTING)
    expected, gradients = results(model, x, inputs)
    model.enable_gradient_checkpointing()
    found, found_gradients = results(model, x, inputs)
    torch.testing.assert_close(found, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient)


@pytest.mark.parametrize("name", ["adaln_single-factorized", "joint-full", "latte"])
def test_training_flops_are_those_that_run_and_sampling_costs_as_before(tiny: Tiny, noise: Noise, name: str) -> None:
    model = tiny(**MEMBERS[name], depth=4).train()
    x, inputs = noise(2, 3, 2, 8, 8), conditions_for(model.settings, 2, noise)
    inputs.pop("encoder_attention_mask", None)
    model.set_token_routing(ROUTING)
    with FlopCounterMode(display=False) as counter:
        model(x, **inputs)
    length = 5 if model.settings.text_dim else 0
    dense, routed = (
        model_cost(model.settings, (2, 4, 4), length, train=TrainConfig(steps=1, token_routing=r))
        for r in (None, ROUTING)
    )
    assert routed.training_flops == 3 * counter.get_total_flops() // 2
    assert routed.training_flops < dense.training_flops
    assert routed.forward_macs == dense.forward_macs
    assert routed.activation_bytes < dense.activation_bytes


@pytest.mark.parametrize(
    ("changes", "routing", "named"),
    [
        ({}, (1, 5), "depth 4"),
        ({}, (3, 3), "start 3, end 3"),
        ({"mlp": "conv2d"}, (1, 3), "mlp conv2d needs a grid"),
        ({"window_size": 2, "window_blocks": (2,)}, (1, 3), "window_size 2 of block 2"),
        ({"kv_compress": 2}, (1, 3), "kv_compress 2 of block 1"),
        ({"dynamic_tokens": True}, (1, 3), "routers see all tokens"),
    ],
)
def test_what_cannot_be_routed_is_refused(changes: dict[str, Any], routing: tuple[int, int], named: str) -> None:
    model = ModelConfig(hidden_size=32, depth=4, num_heads=4, **changes)
    with pytest.raises(ValueError, match=named):
        model.check_token_routing(*routing)


def test_windows_outside_of_the_route_are_fine() -> None:
    model = ModelConfig(hidden_size=32, depth=4, num_heads=4, window_size=2, window_blocks=(0, 3))
    model.check_token_routing(1, 3)
    with pytest.raises(ValueError, match="window_size 2 of block 3"):
        model.check_token_routing(1, 4)
