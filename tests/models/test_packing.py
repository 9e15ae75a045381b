"""Packed sequences: outputs and every parameter's gradient are those of each clip alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.config import ModelConfig, TokenRoutingConfig
from stdit.models.attention import AttentionProcessor
from stdit.models.block_diagonal import Run, block_diagonal
from stdit.models.lora import add_adapter
from stdit.models.packing import PackedClips
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, TINY, shaken

SHAPES = ((2, 3, 4, 6), (1, 1, 8, 4), (1, 3, 4, 6), (2, 1, 4, 4))  # (B, T, H, W): two parts of one shape


def packable(name: str) -> bool:
    try:
        ModelConfig(**{**TINY, **MEMBERS[name]}).check_packing()
    except ValueError:
        return False
    return True


def parts_of(model: STDiT, shapes: tuple[tuple[int, int, int, int], ...]) -> tuple[list[dict[str, Any]], Tensor]:
    """Arguments of each part, with captions of other lengths, and a timestep for each clip."""
    c, generator = model.settings, torch.Generator().manual_seed(0)
    parts = []
    for i, (b, t, h, w) in enumerate(shapes):
        t = t if c.has_time else 1
        part: dict[str, Any] = {"hidden_states": torch.randn(b, c.in_channels, t, h, w, generator=generator)}
        if c.text_dim is not None:
            lengths = torch.randint(1, 4 + i, (b,), generator=generator)
            part["encoder_hidden_states"] = torch.randn(b, 3 + i, c.text_dim, generator=generator)
            part["encoder_attention_mask"] = torch.arange(3 + i) < lengths[:, None]
            if c.null_text != "empty":
                part["drop_condition"] = torch.arange(b) == i  # of the first part, its first clip
        if c.num_classes is not None:
            part["class_labels"] = torch.randint(-1, c.num_classes, (b,), generator=generator)
        if c.pooled_dim is not None:
            part["pooled_projections"] = torch.randn(b, c.pooled_dim, generator=generator)
        part["added_cond_kwargs"] = {"fps": 8.0 + i, "frames": float(t), "height": 8.0 * h, "width": 8.0 * w}
        if t > 1 and c.conditioning != "cross_attention":
            part["conditioning_frames"] = torch.arange(t).expand(b, -1) < torch.arange(b)[:, None]
        parts.append(part)
    return parts, torch.rand(sum(shape[0] for shape in shapes), generator=generator) * 1000


def alone(model: STDiT, parts: list[dict[str, Any]], timesteps: Tensor) -> list[Tensor]:
    each = timesteps.split([len(part["hidden_states"]) for part in parts])
    return [model(timestep=t, **part).sample for part, t in zip(parts, each, strict=True)]


def with_gradients(model: STDiT, outputs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    sum((i + 1) * y.float().square().sum() for i, y in enumerate(outputs)).backward()  # pyright: ignore
    return [y.detach() for y in outputs], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model: STDiT, seeds: bool = False, tolerance: float = 1e-5) -> None:
    parts, timesteps = parts_of(model, SHAPES)

    def drawing() -> list[dict[str, Any]]:
        counted = [(i, len(part["hidden_states"])) for i, part in enumerate(parts)]
        generators = [[torch.Generator().manual_seed(10 * i + n) for n in range(count)] for i, count in counted]
        return [{**part, "generator": g} if seeds else part for part, g in zip(parts, generators, strict=True)]

    expected, gradients = with_gradients(model, alone(model, drawing(), timesteps))
    found, own = with_gradients(model, model(PackedClips(drawing()), timesteps))
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= tolerance * y.abs().max()
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("name", [name for name in MEMBERS if packable(name)])
def test_outputs_and_gradients_are_those_of_each_clip_alone(name: str, tiny: Callable[..., STDiT]) -> None:
    check_equal(tiny(**MEMBERS[name]))


@pytest.mark.parametrize("positions", ["rope", "learned", "sincos"])
@pytest.mark.parametrize("attention", ["full", "factorized", "alternating"])
def test_so_with_any_positions(positions: str, attention: str, tiny: Callable[..., STDiT]) -> None:
    tables = {"position_grid": (5, 6), "position_frames": 4} if positions == "learned" else {}
    wide = {"hidden_size": 48} if positions == "rope" else {}
    check_equal(tiny(positions=positions, attention=attention, text_dim=6, **tables, **wide))


def test_so_with_recomputed_activations_drop_path_and_latents_that_patches_do_not_fill(
    settings: Callable[..., ModelConfig],
) -> None:
    model = shaken(STDiT.from_settings(settings(text_dim=6, drop_path=0.5, patch_size=(2, 2, 2), pad_latents=True)))
    model.train().enable_gradient_checkpointing()
    check_equal(model, seeds=True)


def test_so_with_lora_adapters(tiny: Callable[..., STDiT]) -> None:
    model = tiny(attention="full", text_dim=6)
    add_adapter(model, rank=2)
    check_equal(shaken(model))


def test_so_in_bfloat16(tiny: Callable[..., STDiT]) -> None:
    check_equal(tiny(attention="full", text_dim=6, num_classes=3).to(torch.bfloat16), tolerance=0.05)


def test_a_clip_does_not_depend_on_what_it_is_packed_with(tiny: Callable[..., STDiT]) -> None:
    model = tiny(attention="full", text_dim=6)
    parts, timesteps = parts_of(model, SHAPES)
    with torch.no_grad():
        before = model(PackedClips(parts), timesteps)
        parts[1] = {**parts[1], "hidden_states": parts[1]["hidden_states"] + 1}
        after = model(PackedClips(parts), timesteps)
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, False, True, True]


RUNS = (Run(2, 3, 4), Run(3, 5, 2), Run(2, 2, 2, stride=3))


def dense_mask(runs: tuple[Run, ...]) -> Tensor:
    """The block-diagonal mask written out, (N, M) bool."""

    def owners(lengths: list[int]) -> Tensor:
        ids, first = [], 0
        for run, n in zip(runs, lengths, strict=True):
            blocks = torch.arange(first, first + run.groups * run.stride).view(run.groups, 1, run.stride)
            ids.append(blocks.expand(-1, n, -1).flatten())
            first += run.groups * run.stride
        return torch.cat(ids)

    return owners([r.queries for r in runs])[:, None] == owners([r.keys for r in runs])


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_blocks_is_attention_under_the_block_diagonal_mask(
    padded: bool, noise: Callable[..., Tensor]
) -> None:
    mask = dense_mask(RUNS)
    n, m = mask.shape
    q, k, v = noise(1, n, 2, 4), noise(1, m, 2, 4, seed=1), noise(1, m, 2, 4, seed=2)
    valid = torch.arange(m) % 2 == 0 if padded else None
    found = AttentionProcessor()(q, k, v, block_diagonal(RUNS, q.device, valid))
    mask = mask if valid is None else mask & valid
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_varlen_kernel_gives_what_the_blocks_give(noise: Callable[..., Tensor]) -> None:
    runs = (Run(2, 3, 3), Run(3, 5, 5), Run(2, 2, 2, stride=3))
    q, k, v = (noise(1, 33, 2, 16, seed=i).to("cuda", torch.bfloat16).requires_grad_() for i in range(3))
    blocks, outputs = block_diagonal(runs, q.device), []
    for each in (blocks, blocks._replace(offsets=None)):
        y = AttentionProcessor()(q, k, v, each)
        outputs.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    for x, y in zip(*outputs, strict=True):
        assert (x - y).abs().max() < 0.02 * y.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": "joint", "text_dim": 6}, "conditioning joint has text"),
        ({"conditioning": "in_context"}, "conditioning in_context"),
        ({"mlp": "conv2d"}, "mlp conv2d needs a grid"),
        ({"window_size": 2}, "window_size 2 needs a grid"),
        ({"kv_compress": 2}, "kv_compress 2 needs a grid"),
        ({"dynamic_width": True}, "dynamic_width"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes: dict[str, Any], message: str, tiny: Callable[..., STDiT]) -> None:
    model = tiny(**changes)
    with pytest.raises(ValueError, match=f"packed sequences: .*{message}"):
        model(PackedClips([{"hidden_states": torch.zeros(1, 3, 1, 4, 4)}]), 0)


def test_nor_with_token_routing_or_too_few_timesteps(tiny: Callable[..., STDiT]) -> None:
    model, clip = tiny(), {"hidden_states": torch.zeros(1, 3, 1, 4, 4)}
    with pytest.raises(ValueError, match=r"timestep has shape \(2,\); 3 clips are packed"):
        model(PackedClips([clip] * 3), torch.zeros(2))
    model.set_token_routing(TokenRoutingConfig(start=0, end=1))
    with pytest.raises(ValueError, match="token routing"):
        model(PackedClips([clip]), 0)
