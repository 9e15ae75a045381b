"""Modules pruned ahead of sampling equal those pruned at each timestep, with one synchronisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stdit.models.pruning import BlockModules, RouterMask, _prune_linear, is_bare, prune, prune_ahead
from stdit.models.stdit import STDiT
from stdit.ops import onednn

Blocks = list[tuple[BlockModules, RouterMask]]


@pytest.fixture
def blocks(tiny: Callable[..., STDiT], noise: Callable[..., torch.Tensor]) -> Blocks:
    """Two blocks, and their masks at five timesteps."""
    torch.manual_seed(0)
    model = tiny(text_dim=6, dynamic_width=True)
    time = 9 * noise(5, 32)
    return [(block.prunable, block.dynamic.route(time, None, None)) for block in model.block_list()]


@torch.no_grad()
def test_modules_pruned_ahead_are_those_pruned_when_needed(blocks: Blocks) -> None:
    ahead = prune_ahead(blocks)
    assert len(ahead) == 5
    for number, step in enumerate(ahead):
        for (whole, every), parts in zip(blocks, step, strict=True):
            now = prune(whole, RouterMask(*(c if c is None else c[number : number + 1] for c in every)))
            assert parts is not None
            assert now is not None
            for one, other in zip(parts, now, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_all_masks_come_to_the_host_at_once(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[torch.Size] = []
    fetch = torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        fetched.append(self.shape)
        return fetch(self)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    prune_ahead(blocks)
    assert [shape[0] for shape in fetched] == [5]


def test_a_bare_layer_is_its_weight_alone() -> None:
    layer = nn.Linear(256, 192)
    onednn.apply(layer)
    assert is_bare(layer)
    assert is_bare(nn.Linear(2, 2))
    assert not is_bare(nn.Linear(2, 2, device="meta"))
    assert not is_bare(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda input: input
    assert not is_bare(replaced)
    layer._hf_hook = None  # as accelerate leaves one  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    assert not is_bare(layer)


def test_pruned_layers_by_onednn_compute_with_their_own_weights(noise: Callable[..., torch.Tensor]) -> None:
    layer = nn.Linear(256, 256)
    onednn.apply(layer)
    pruned = _prune_linear(layer, torch.tensor([1, 3]), 4, stacked=1)
    x = noise(3, 256)
    torch.testing.assert_close(pruned(x), layer(x).unflatten(1, (4, 64))[:, [1, 3]].flatten(1), rtol=1e-4, atol=1e-5)
