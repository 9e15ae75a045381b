"""Random weights of published models, with the names and shapes of their files, and their tables of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


class Weights:
    """Random tensors by name, each drawn from one stream."""

    def __init__(self, seed: int = 0, std: float = 0.1) -> None:
        self.generator, self.std, self.state = torch.Generator().manual_seed(seed), std, {}

    def tensor(self, name: str, *shape: int) -> None:
        self.state[name] = self.std * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.tensor(f"{name}.weight", outputs, inputs)
        self.tensor(f"{name}.bias", outputs)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        self.tensor(f"{name}.weight", width)
        self.state[f"{name}.weight"] += 1
        if bias:
            self.tensor(f"{name}.bias", width)


def axis_code(at: Any, size: int) -> Any:
    """[sin, cos] of coordinates (n,), in float64."""
    omega = np.arange(size // 2, dtype=np.float64)
    omega = 1.0 / 10000 ** (omega / (size / 2.0))
    angle = np.einsum("m,d->md", np.asarray(at).reshape(-1), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def plane_code(width: int, rows: int, columns: int, base: int | None = None, scale: float = 1.0) -> Tensor:
    """(1, rows columns, width): w first, then h. float32 coordinates, as published."""
    h, w = np.arange(rows, dtype=np.float32), np.arange(columns, dtype=np.float32)
    if base is not None:
        h, w = h / (rows / base), w / (columns / base)
    grid = np.stack(np.meshgrid(w / scale, h / scale), axis=0)
    code = np.concatenate([axis_code(grid[0], width // 2), axis_code(grid[1], width // 2)], axis=1)
    return torch.from_numpy(code).float()[None]


def time_table(width: int, frames: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(axis_code(np.arange(frames) / scale, width)).float()[None]


def dit_weights(
    width: int = 32, depth: int = 2, grid: int = 4, channels: int = 3, outputs: int = 6, classes: int = 5
) -> State:
    """DiT's (facebookresearch), patches of 2."""
    w = Weights()
    w.state["pos_embed"] = plane_code(width, grid, grid)
    w.tensor("x_embedder.proj.weight", width, channels, 2, 2)
    w.tensor("x_embedder.proj.bias", width)
    w.linear("t_embedder.mlp.0", 256, width)
    w.linear("t_embedder.mlp.2", width, width)
    if classes:
        w.tensor("y_embedder.embedding_table.weight", classes + 1, width)
    for i in range(depth):
        b = f"blocks.{i}"
        w.linear(f"{b}.attn.qkv", width, 3 * width)
        w.linear(f"{b}.attn.proj", width, width)
        w.linear(f"{b}.mlp.fc1", width, 4 * width)
        w.linear(f"{b}.mlp.fc2", 4 * width, width)
        w.linear(f"{b}.adaLN_modulation.1", width, 6 * width)
    w.linear("final_layer.linear", width, 4 * outputs)
    w.linear("final_layer.adaLN_modulation.1", width, 2 * width)
    return w.state


def latte_weights(frames: int = 4, **sizes: int) -> State:
    state = dit_weights(**sizes)
    return state | {"temp_embed": time_table(state["pos_embed"].shape[-1], frames)}


def _pixart_block(w: Weights, b: str, width: int, norm: str | None, heads: int) -> None:
    w.tensor(f"{b}.scale_shift_table", 6, width)
    w.linear(f"{b}.attn.qkv", width, 3 * width)
    w.linear(f"{b}.attn.proj", width, width)
    for name in ("q_norm", "k_norm") if norm else ():
        w.norm(f"{b}.attn.{name}", width if norm == "layer" else width // heads, bias=norm == "layer")
    w.linear(f"{b}.cross_attn.q_linear", width, width)
    w.linear(f"{b}.cross_attn.kv_linear", width, 2 * width)
    w.linear(f"{b}.cross_attn.proj", width, width)
    w.linear(f"{b}.mlp.fc1", width, 4 * width)
    w.linear(f"{b}.mlp.fc2", 4 * width, width)


def _pixart_ends(w: Weights, width: int, text: int, tokens: int, outputs: int) -> None:
    w.linear("t_embedder.mlp.0", 256, width)
    w.linear("t_embedder.mlp.2", width, width)
    w.linear("t_block.1", width, 6 * width)
    w.tensor("y_embedder.y_embedding", tokens, text)
    w.linear("y_embedder.y_proj.fc1", text, width)
    w.linear("y_embedder.y_proj.fc2", width, width)
    w.linear("final_layer.linear", width, 4 * outputs)
    w.tensor("final_layer.scale_shift_table", 2, width)


def pixart_weights(
    width: int = 48,
    depth: int = 2,
    grid: int = 4,
    scale: float = 2.0,
    sized: bool = False,
    norm: bool = False,
    pooled: tuple[int, ...] = (),
    windowed: tuple[int, ...] = (),
    channels: int = 3,
    outputs: int = 6,
    heads: int = 4,
) -> State:
    """PixArt-α's and -Σ's, patches of 2, captions of 7 tokens, 10 wide."""
    w = Weights()
    w.state["pos_embed"] = plane_code(width, grid, grid, grid, scale)
    w.tensor("x_embedder.proj.weight", width, channels, 2, 2)
    w.tensor("x_embedder.proj.bias", width)
    _pixart_ends(w, width, 10, 7, outputs)
    for name in ("csize_embedder", "ar_embedder") if sized else ():
        w.linear(f"{name}.mlp.0", 256, width // 3)
        w.linear(f"{name}.mlp.2", width // 3, width // 3)
    for i in range(depth):
        _pixart_block(w, f"blocks.{i}", width, "layer" if norm else None, heads)
        if i in pooled:
            w.tensor(f"blocks.{i}.attn.sr.weight", width, 1, 2, 2)
            w.tensor(f"blocks.{i}.attn.sr.bias", width)
            w.norm(f"blocks.{i}.attn.norm", width)
        if i in windowed:
            for name in ("rel_pos_h", "rel_pos_w"):
                w.tensor(f"blocks.{i}.attn.{name}", 2 * 2 - 1, width // heads)
    return w.state


def v1_weights(
    width: int = 32, depth: int = 2, grid: tuple[int, int, int] = (3, 4, 4), scales: tuple[float, float] = (0.5, 1.0)
) -> State:
    """Open-Sora STDiT v1's; scales of space and time."""
    w = Weights()
    w.state["pos_embed"] = plane_code(width, grid[1], grid[2], None, scales[0])
    w.state["pos_embed_temporal"] = time_table(width, grid[0], scales[1])
    w.tensor("x_embedder.proj.weight", width, 3, 1, 2, 2)
    w.tensor("x_embedder.proj.bias", width)
    _pixart_ends(w, width, 10, 7, 6)
    for i in range(depth):
        _pixart_block(w, f"blocks.{i}", width, None, 4)
        w.linear(f"blocks.{i}.attn_temp.qkv", width, 3 * width)
        w.linear(f"blocks.{i}.attn_temp.proj", width, width)
    return w.state


def v3_weights(width: int = 32, pairs: int = 2, heads: int = 4, norm: bool = True) -> State:
    """Open-Sora STDiT3's."""
    w = Weights()
    head = width // heads
    w.state["rope.freqs"] = 1.0 / (10000 ** (torch.arange(0, head, 2)[: head // 2].float() / head))
    w.tensor("x_embedder.proj.weight", width, 3, 1, 2, 2)
    w.tensor("x_embedder.proj.bias", width)
    _pixart_ends(w, width, 10, 7, 6)
    w.linear("fps_embedder.mlp.0", 256, width)
    w.linear("fps_embedder.mlp.2", width, width)
    for kind in ("spatial", "temporal"):
        for i in range(pairs):
            _pixart_block(w, f"{kind}_blocks.{i}", width, "rms" if norm else None, heads)
    return w.state


def rineau_weights(width: int = 32, depth: int = 2, grid: int = 4, channels: int = 4, classes: int = 5) -> State:
    """J. Rineau's, patches of 2."""
    w = Weights()
    w.tensor("first_layer.pos_embed", 1, grid * grid, width)
    w.linear("first_layer.patchify.projection", 4 * channels, width)
    w.linear("first_layer.t_embedder.1", width, width)
    w.linear("first_layer.t_embedder.3", width, width)
    if classes:
        w.tensor("first_layer.y_embedder.weight", classes, width)
    for i in range(depth):
        b = f"blocks.{i}"
        w.linear(f"{b}.attn.c_attn", width, 3 * width)
        w.linear(f"{b}.attn.c_proj", width, width)
        w.linear(f"{b}.mlp.c_fc", width, 4 * width)
        w.linear(f"{b}.mlp.c_proj", 4 * width, width)
        w.tensor(f"{b}.mlp.depthwise_conv.weight", 4 * width, 1, 3, 3)
        w.tensor(f"{b}.mlp.depthwise_conv.bias", 4 * width)
        w.linear(f"{b}.adaLN_modulation.1", width, 6 * width)
    w.linear("final_layer.linear", width, 4 * channels)
    w.linear("final_layer.adaLN_modulation.1", width, 2 * width)
    return w.state
