"""Patches, positions and timestep embeddings, against the published arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from stdit.models.embeddings import PatchConv, PatchEmbed3D, timestep_embedding, unpatchify
from stdit.models.positions import (
    apply_rope,
    pad_rope,
    rope_1d,
    rope_3d,
    rope_in_space,
    rope_in_time,
    sincos_spatial,
    sincos_temporal,
)

CPU = torch.device("cpu")
SMALL = st.integers(1, 3)


@settings(deadline=None, max_examples=25)
@given(st.tuples(SMALL, SMALL, SMALL), st.tuples(SMALL, SMALL, SMALL), st.integers(1, 4))
def test_unpatchify_inverts_patchify(grid: tuple[int, int, int], patch: tuple[int, int, int], channels: int) -> None:
    t, h, w = (n * p for n, p in zip(grid, patch, strict=True))
    x = torch.arange(2 * channels * t * h * w, dtype=torch.float32).view(2, channels, t, h, w)
    size = channels * patch[0] * patch[1] * patch[2]
    embed = PatchEmbed3D(channels, size, patch)
    # The identity map, from (c pt ph pw) as the convolution reads patches to (pt ph pw c) as the final layer writes
    # them.
    eye = rearrange(torch.eye(size), "(pt ph pw c) i -> (c pt ph pw) i", pt=patch[0], ph=patch[1], pw=patch[2])
    with torch.no_grad():
        embed.proj.weight.copy_(eye.T.reshape(embed.proj.weight.shape))
        assert embed.proj.bias is not None
        embed.proj.bias.zero_()
    tokens = embed(x)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], size)
    assert torch.equal(unpatchify(tokens, grid, patch, x.shape[2:]), x)
    # Latents that patches do not fill: padded, and cropped again.
    part = x[:, :, : t - patch[0] + 1, : h - patch[1] + 1, : w - patch[2] + 1]
    tokens = embed(part)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], size)
    assert torch.equal(unpatchify(tokens, grid, patch, part.shape[2:]), part)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 3), (1, 1, 1), (2, 4, 1)])
def test_the_patch_product_is_the_convolution(patch: tuple[int, int, int]) -> None:
    proj = PatchConv(3, 8, kernel_size=patch, stride=patch)
    x = torch.randn(2, 3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = F.conv3d(x, proj.weight, proj.bias, stride=patch)
    torch.testing.assert_close(proj(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("base", "interpolation"), [(16, 1.0), (16, 2.0), (32, 0.5)])
def test_positions_are_pixarts(base: int, interpolation: float) -> None:
    expected = get_2d_sincos_pos_embed(
        32, (6, 10), base_size=base, interpolation_scale=interpolation, output_type="pt", device=CPU
    )
    ours = sincos_spatial(6, 10, 32, base, interpolation, None, CPU, torch.float32)
    assert torch.equal(ours, torch.as_tensor(expected).float())


def test_the_first_half_of_the_position_is_w() -> None:
    table = sincos_spatial(3, 5, 32, None, 1.0, None, CPU, torch.float32).view(3, 5, 32)
    assert torch.equal(table[0, :, :16], table[2, :, :16])
    assert torch.equal(table[:, 0, 16:], table[:, 4, 16:])
    assert torch.equal(table[0, 2, :8], torch.sin(2.0 * 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)).float())


def test_a_table_gives_its_centre() -> None:
    """As SD3 crops its table: diffusers' PatchEmbed with pos_embed_max_size."""
    whole = sincos_spatial(6, 8, 32, 4, 1.0, None, CPU, torch.float32).view(6, 8, 32)
    part = sincos_spatial(2, 5, 32, 4, 1.0, (6, 8), CPU, torch.float32).view(2, 5, 32)
    assert torch.equal(part, whole[2:4, 1:6])


def test_a_base_gives_every_grid_the_same_range() -> None:
    small, large = (sincos_spatial(1, n, 32, 8, 1.0, None, CPU, torch.float32) for n in (8, 16))
    torch.testing.assert_close(large[::2], small)


def test_temporal_positions_from_the_first_frame_start_at_zero() -> None:
    assert not sincos_temporal(1, 32, 1.0, True, CPU, torch.float32).any()
    absolute = sincos_temporal(4, 32, 2.0, False, CPU, torch.float32)
    relative = sincos_temporal(4, 32, 2.0, True, CPU, torch.float32)
    torch.testing.assert_close(absolute - absolute[:1], relative)
    torch.testing.assert_close(absolute[2], sincos_temporal(2, 32, 1.0, False, CPU, torch.float32)[1])


def test_tables_cached_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        rope = rope_1d(3, 8, 7.25, CPU)  # a scale that no other test asks for
    q = torch.ones(1, 3, 1, 8, requires_grad=True)
    apply_rope(q, rope).sum().backward()
    assert q.grad is not None


def test_fake_tables_are_not_kept() -> None:
    with FakeTensorMode():
        assert isinstance(rope_1d(3, 8, 9.25, CPU).cos, FakeTensor)  # a scale that no other test asks for
    assert not isinstance(rope_1d(3, 8, 9.25, CPU).cos, FakeTensor)


def test_tables_of_one_shape_are_computed_once() -> None:
    grid = (2, 3, 4)
    for make in (
        lambda: rope_in_space(grid, 12, None, (1.0, 1.0), CPU),
        lambda: rope_in_time(grid, 12, 1.0, CPU),
        lambda: pad_rope(rope_in_time(grid, 12, 1.0, CPU), grid, 5, True),
    ):
        assert make() is make()


def test_rotations_in_space_and_in_time_are_those_of_both() -> None:
    grid = (2, 3, 4)
    space, time = rope_in_space(grid, 12, None, (1.0, 1.0), CPU), rope_in_time(grid, 12, 1.0, CPU)
    frame, frames = rope_3d((1, 3, 4), 12, None, (1.0, 1.0), CPU), rope_1d(2, 12, 1.0, CPU)
    for table, one in zip(space, frame, strict=True):
        assert torch.equal(table.view(2, 12, 1, 6), one.expand(2, 12, 1, 6))
    for table, one in zip(time, frames, strict=True):
        assert torch.equal(table.view(2, 12, 1, 6), one[:, None].expand(2, 12, 1, 6))


def test_the_timestep_embedding_is_dits() -> None:
    t = torch.tensor([0.0, 1.0, 500.5, 999.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 256), expected, rtol=0, atol=0)
    assert torch.equal(timestep_embedding(torch.tensor([7]), 256), timestep_embedding(torch.tensor([7.0]), 256))


def test_rotations_keep_lengths_and_see_only_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 12, generator=generator).expand(1, 24, 2, 12) for _ in range(2))
    rope = rope_3d((2, 3, 4), 12, None, (1.0, 1.0), CPU)
    turned_q, turned_k = apply_rope(q, rope), apply_rope(k, rope)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = torch.einsum("bnhd,bmhd->hnm", turned_q, turned_k).view(2, 2, 3, 4, 2, 3, 4)
    torch.testing.assert_close(scores[:, 0, 0, 0, 1, 1, 1], scores[:, 0, 1, 2, 1, 2, 3])
    assert not torch.allclose(scores[:, 0, 0, 0, 1, 1, 1], scores[:, 0, 0, 0, 0, 1, 1])


def test_rotated_pairs_are_neighbours() -> None:
    rope = rope_1d(2, 4, 1.0, CPU)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4).expand(1, 2, 1, 4)
    expected = torch.tensor([torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0)), 0.0, 0.0])
    torch.testing.assert_close(apply_rope(x, rope)[0, 1, 0], expected)


def test_one_frame_is_rotated_in_space_alone() -> None:
    one, two = (rope_3d((t, 3, 4), 12, 8, (1.0, 2.0), CPU) for t in (1, 2))
    assert torch.equal(one.cos, two.cos[:12])
    assert torch.equal(one.sin, two.sin[:12])
