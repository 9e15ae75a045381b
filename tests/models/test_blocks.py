"""Laws of one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stdit.config import ModelConfig
from stdit.models.blocks import BlockState, FinalLayer, ModulationInput, STDiTBlock, modulate
from stdit.models.mlp import Mlp
from stdit.models.positions import Grid, PositionEmbeddings

Noise = Callable[..., torch.Tensor]
NO_POSITIONS = PositionEmbeddings(None, None, None, None)


def block(**changes: Any) -> STDiTBlock:
    kwargs: dict[str, Any] = {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "text_dim": 16,
        "qk_norm": "rms",
        "cross_qk_norm": "rms",
    }
    return STDiTBlock(ModelConfig(**{**kwargs, **changes}), 0)


def state(modulation: torch.Tensor, grid: Grid, mask: torch.Tensor | None = None) -> BlockState:
    """What a block takes, from modulation (B, T or 1, 6, D)."""
    return BlockState(grid, NO_POSITIONS, ModulationInput(modulation.flatten(-2)), mask)


def shut(made: STDiTBlock) -> STDiTBlock:
    """Gates and the text's projection at zero, as a model starts; all else random."""
    with torch.no_grad():
        made.scale_shift_table[[2, 5]] = 0.0
        if made.cross_attn is not None:
            made.cross_attn.proj.weight.zero_()
            made.cross_attn.proj.bias.zero_()
    return made


@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_a_zero_initialised_block_is_the_identity(noise: Noise, attention: str) -> None:
    x, modulation = noise(2, 3, 4, 16), noise(2, 1, 6, 16)
    modulation[:, :, [2, 5]] = 0.0
    y, *_ = shut(block(attention=attention))(x, noise(2, 5, 16), state(modulation, (3, 2, 2)))
    assert torch.equal(y, x)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_an_image_block_is_pixarts(noise: Noise, gelu: str) -> None:
    made = block(temporal=False, qk_norm=None, cross_qk_norm=None, gelu=gelu)
    x, text, modulation = noise(2, 6, 16), noise(2, 3, 16, seed=1), noise(2, 6, 16, seed=2)
    s1, c1, g1, s2, c2, g2 = (made.scale_shift_table[None] + modulation).chunk(6, dim=1)
    y = F.layer_norm(x, (16,), eps=1e-6) * (1 + c1) + s1
    z = x + g1 * made.attn(y)
    assert made.cross_attn is not None
    z = z + made.cross_attn(z, text)
    assert isinstance(made.mlp, Mlp)
    y = made.mlp.fc1(F.layer_norm(z, (16,), eps=1e-6) * (1 + c2) + s2)
    expected = z + g2 * made.mlp.fc2(F.gelu(y, approximate="none" if gelu == "erf" else "tanh"))
    found, *_ = made(x[:, None], text, state(modulation[:, None], (1, 2, 3)))
    torch.testing.assert_close(found[:, 0], expected)


@pytest.mark.parametrize("layer", ["spatial", "temporal"])
def test_factorized_attention_stays_within_frames_and_places(noise: Noise, layer: str) -> None:
    made = block(text_dim=None)
    closed = made.attn_temp if layer == "spatial" else made.attn
    assert closed is not None
    torch.nn.init.zeros_(closed.proj.weight)
    x, modulation = noise(1, 3, 4, 16), noise(1, 1, 6, 16, seed=1)
    y = x.clone()
    y[0, 1, 1, :3] += 1.0  # frame 1 of 3, place 1 of 4
    before, after = (made(tokens, None, state(modulation, (3, 2, 2)))[0].flatten(0, 2) for tokens in (x, y))
    reached = {i for i in range(12) if not torch.allclose(before[i], after[i], atol=1e-6)}
    assert reached == ({4, 5, 6, 7} if layer == "spatial" else {1, 5, 9})


def test_a_shared_modulation_is_one_for_each(noise: Noise) -> None:
    x, shift, scale = noise(3, 1, 5, 16), noise(1, 1, 1, 16, seed=1), noise(1, 1, 1, 16, seed=2)
    each = modulate(x, shift.expand(3, -1, -1, -1), scale.expand(3, -1, -1, -1), 1e-6)
    torch.testing.assert_close(modulate(x, shift, scale, 1e-6), each)
    layer = FinalLayer(ModelConfig(hidden_size=16, depth=1, num_heads=2), 4)
    code = noise(1, 1, 16, seed=3)
    torch.testing.assert_close(layer(x, code), layer(x, code.expand(3, -1, -1)))


@pytest.mark.slow  # tests/models/test_compile.py has a short form
@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_a_block_compiles_without_graph_breaks(noise: Noise, attention: str) -> None:
    made = block(attention=attention)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    mask = (torch.arange(3) < torch.tensor([[1], [3]]))[:, None, None]
    for grid in ((1, 2, 3), (2, 2, 3)):
        args = (noise(2, grid[0], 6, 16), noise(2, 3, 16), state(noise(2, 1, 6, 16), grid, mask))
        torch.testing.assert_close(compiled(*args), made(*args))
