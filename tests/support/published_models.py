"""The arithmetic of published models whose classes are not installed, plainly, over their raw state dicts.

Written from the papers and the published code's behaviour, with no help of stdit's. x (B, C, T, H, W) or (B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.published_weights import plane_code

State = dict[str, Tensor]


def lin(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """(B, N, D) and (B, M, D) twice -> (B, N, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def mlp(s: State, name: str, x: Tensor) -> Tensor:
    return lin(s, f"{name}.fc2", F.gelu(lin(s, f"{name}.fc1", x), approximate="tanh"))


def time_code(t: Tensor, size: int = 256, below: float = 128.0) -> Tensor:
    """[cos, sin] at frequencies 10000^(-i / below)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(size // 2, dtype=torch.float32) / below)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embedder(s: State, name: str, t: Tensor, below: float = 128.0) -> Tensor:
    return lin(s, f"{name}.mlp.2", F.silu(lin(s, f"{name}.mlp.0", time_code(t, 256, below))))


def image_tokens(s: State, x: Tensor) -> Tensor:
    return F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)


def picture(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, N, 2 2 C) -> (B, C, 2 rows, 2 columns)."""
    x = tokens.unflatten(1, (rows, columns)).unflatten(-1, (2, 2, -1))
    return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


def _adaln_block(s: State, b: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = lin(s, f"{b}.adaLN_modulation.1", F.silu(c))[:, None].chunk(
        6, dim=-1
    )
    q, k, v = lin(s, f"{b}.attn.qkv", norm(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
    x = x + gate1 * lin(s, f"{b}.attn.proj", attend(q, k, v, heads))
    return x + gate2 * mlp(s, f"{b}.mlp", norm(x) * (1 + scale2) + shift2)


def _adaln_final(s: State, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = lin(s, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    return lin(s, "final_layer.linear", norm(x) * (1 + scale) + shift)


def dit(s: State, x: Tensor, t: Tensor, y: Tensor, heads: int = 4, below: float = 128.0) -> Tensor:
    """DiT. y: labels, the null class being the table's last row."""
    c = embedder(s, "t_embedder", t, below) + s["y_embedder.embedding_table.weight"][y]
    tokens = image_tokens(s, x) + s["pos_embed"]
    for i in range(count(s, "blocks")):
        tokens = _adaln_block(s, f"blocks.{i}", tokens, c, heads)
    return picture(_adaln_final(s, tokens, c), x.shape[2] // 2, x.shape[3] // 2)


def latte(s: State, x: Tensor, t: Tensor, y: Tensor | None, heads: int = 4) -> Tensor:
    """Latte, class-conditional or not. x (B, C, F, H, W)."""
    batch, frames = x.shape[0], x.shape[2]
    images = x.transpose(1, 2).flatten(0, 1)
    tokens = image_tokens(s, images) + s["pos_embed"]  # (B F, S, D)
    c = embedder(s, "t_embedder", t)
    c = c if y is None else c + s["y_embedder.embedding_table.weight"][y]
    for i in range(0, count(s, "blocks"), 2):
        tokens = _adaln_block(s, f"blocks.{i}", tokens, c.repeat_interleave(frames, 0), heads)
        tokens = tokens.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # (B S, F, D)
        tokens = tokens + s["temp_embed"] if i == 0 else tokens
        places = tokens.shape[0] // batch
        tokens = _adaln_block(s, f"blocks.{i + 1}", tokens, c.repeat_interleave(places, 0), heads)
        tokens = tokens.unflatten(0, (batch, places)).transpose(1, 2).flatten(0, 1)
    out = picture(_adaln_final(s, tokens, c.repeat_interleave(frames, 0)), x.shape[3] // 2, x.shape[4] // 2)
    return out.unflatten(0, (batch, frames)).transpose(1, 2)


def count(s: State, prefix: str) -> int:
    return 1 + max(int(n.split(".")[1]) for n in s if n.startswith(f"{prefix}."))


def caption(s: State, y: Tensor) -> Tensor:
    return mlp(s, "y_embedder.y_proj", y)


def cross(s: State, b: str, x: Tensor, y: Tensor, lengths: list[int], heads: int) -> Tensor:
    """x (B, N, D) to the first tokens of each of y (B, L, D), one sample at a time, as BlockDiagonalMask has it."""
    rows = []
    for one, words, length in zip(x.split(1), y.split(1), lengths, strict=True):
        k, v = lin(s, f"{b}.kv_linear", words[:, :length]).chunk(2, dim=-1)
        rows.append(attend(lin(s, f"{b}.q_linear", one), k, v, heads))
    return lin(s, f"{b}.proj", torch.cat(rows))


def _affine(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def _pixart_attention(s: State, b: str, x: Tensor, plane: tuple[int, int], heads: int, sampling: str) -> Tensor:
    """Σ's: norm over the full width, keys and values pooled by a convolution, or by `sampling` in factors of 2; α's
    windows with relative positions."""
    q, k, v = lin(s, f"{b}.qkv", x).chunk(3, dim=-1)
    if f"{b}.q_norm.weight" in s:
        q, k = _affine(s, f"{b}.q_norm", q), _affine(s, f"{b}.k_norm", k)
    if f"{b}.sr.weight" in s:

        def pooled(z: Tensor) -> Tensor:
            z = z.transpose(1, 2).unflatten(2, plane)
            z = F.conv2d(z, s[f"{b}.sr.weight"], s[f"{b}.sr.bias"], stride=2, groups=z.shape[1])
            return _affine(s, f"{b}.norm", z.flatten(2).transpose(1, 2))

        k, v = pooled(k), pooled(v)
    if sampling == "uniform_every":
        k, v = k[:, ::2], v[:, ::2]
    elif sampling:

        def sampled(z: Tensor) -> Tensor:
            z = z.transpose(1, 2).unflatten(2, plane)
            z = F.interpolate(z, scale_factor=0.5, mode="nearest") if sampling == "ave" else z[:, :, ::2, ::2]
            return z.flatten(2).transpose(1, 2)

        k, v = sampled(k), sampled(v)
    if f"{b}.rel_pos_h" in s:
        return lin(s, f"{b}.proj", _windowed(s, b, q, k, v, plane, heads))
    return lin(s, f"{b}.proj", attend(q, k, v, heads))


def _windowed(s: State, b: str, q: Tensor, k: Tensor, v: Tensor, plane: tuple[int, int], heads: int) -> Tensor:
    """Attention within squares of side w, one square at a time, query by query the code of its distance to each key."""
    side = (s[f"{b}.rel_pos_h"].shape[0] + 1) // 2
    out = torch.zeros_like(q).unflatten(1, plane)
    q, k, v = (z.unflatten(1, plane) for z in (q, k, v))
    for i in range(0, plane[0], side):
        for j in range(0, plane[1], side):
            here = (slice(None), slice(i, i + side), slice(j, j + side))
            qw, kw, vw = (z[here].flatten(1, 2) for z in (q, k, v))
            per_head = qw.unflatten(-1, (heads, -1))
            bias = torch.zeros(qw.shape[0], heads, side * side, side * side)
            for a in range(side * side):
                for c in range(side * side):
                    row = s[f"{b}.rel_pos_h"][a // side - c // side + side - 1]
                    column = s[f"{b}.rel_pos_w"][a % side - c % side + side - 1]
                    bias[:, :, a, c] = (per_head[:, a] * (row + column)).sum(-1)
            out[here] = attend(qw, kw, vw, heads, bias).unflatten(1, (side, side))
    return out.flatten(1, 2)


def _single_final(s: State, x: Tensor, t: Tensor) -> Tensor:
    shift, scale = (s["final_layer.scale_shift_table"][None] + t[:, None]).chunk(2, dim=1)
    return lin(s, "final_layer.linear", norm(x) * (1 + scale) + shift)


def pixart(
    s: State,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    lengths: list[int],
    base: int = 4,
    scale: float = 2.0,
    sizes: tuple[Tensor, Tensor] | None = None,
    heads: int = 4,
    sampling: tuple[str, ...] = ("", ""),
) -> Tensor:
    """PixArtMS. sampling: of each block's keys and values. y (B, L, 10) with the null rows in it already; sizes: (B, 2)
    heights and widths, and (B, 1) aspect ratios."""
    plane = (x.shape[2] // 2, x.shape[3] // 2)
    tokens = image_tokens(s, x) + plane_code(s["t_block.1.weight"].shape[1], *plane, base, scale)
    code = embedder(s, "t_embedder", t)
    if sizes is not None:
        each = embedder(s, "csize_embedder", sizes[0].flatten()).unflatten(0, (-1, 2)).flatten(1)
        code = code + torch.cat([each, embedder(s, "ar_embedder", sizes[1].flatten())], dim=1)
    six, words = lin(s, "t_block.1", F.silu(code)), caption(s, y)
    for i in range(count(s, "blocks")):
        b = f"blocks.{i}"
        m = (s[f"{b}.scale_shift_table"][None] + six.unflatten(1, (6, -1))).chunk(6, dim=1)
        inputs = norm(tokens) * (1 + m[1]) + m[0]
        tokens = tokens + m[2] * _pixart_attention(s, f"{b}.attn", inputs, plane, heads, sampling[i])
        tokens = tokens + cross(s, f"{b}.cross_attn", tokens, words, lengths, heads)
        tokens = tokens + m[5] * mlp(s, f"{b}.mlp", norm(tokens) * (1 + m[4]) + m[3])
    return picture(_single_final(s, tokens, code), *plane)


def video_tokens(s: State, x: Tensor) -> Tensor:
    y = F.conv3d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=(1, 2, 2))
    return y.flatten(3).permute(0, 2, 3, 1)  # (B, T, S, D)


def video(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, T, S, 2 2 C) -> (B, C, T, H, W)."""
    frames = picture(tokens.flatten(0, 1), rows, columns)
    return frames.unflatten(0, tokens.shape[:2]).transpose(1, 2)


def chosen(mask: Tensor | None, with_time: Tensor, at_zero: Tensor) -> Tensor:
    """t_mask_select: (B, T) True where the frame is drawn, at its time; else what time 0 makes. (B, T or 1, S or 1,
    D)."""
    return with_time if mask is None else torch.where(mask[:, :, None, None], with_time, at_zero)


def over_time(f: Any, x: Tensor) -> Tensor:
    """f on (B S, T, D) of x (B, T, S, D)."""
    b, _, s, _ = x.shape
    return f(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, s)).transpose(1, 2)


def in_frames(f: Any, x: Tensor) -> Tensor:
    return f(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _modulations(s: State, b: str, code: Tensor) -> Iterator[Tensor]:
    six = lin(s, "t_block.1", F.silu(code)).unflatten(1, (6, -1))
    return iter((s[f"{b}.scale_shift_table"][None] + six)[:, :, None, None].unbind(1))  # (B, 1, 1, D) each


def v1(
    s: State, x: Tensor, t: Tensor, y: Tensor, lengths: list[int], heads: int = 4, mask: Tensor | None = None
) -> Tensor:
    """Open-Sora STDiT v1. mask (B, T): x_mask, True where a frame is drawn."""
    tokens = video_tokens(s, x) + s["pos_embed"][:, None]
    code, still = embedder(s, "t_embedder", t), embedder(s, "t_embedder", torch.zeros_like(t))
    words = caption(s, y)
    for i in range(count(s, "blocks")):
        b = f"blocks.{i}"
        m, z = tuple(_modulations(s, b, code)), tuple(_modulations(s, b, still))

        def attention(name: str, inputs: Tensor, b: str = b) -> Tensor:
            q, k, v = lin(s, f"{b}.{name}.qkv", inputs).chunk(3, dim=-1)
            return lin(s, f"{b}.{name}.proj", attend(q, k, v, heads))

        normed = norm(tokens)
        inputs = chosen(mask, normed * (1 + m[1]) + m[0], normed * (1 + z[1]) + z[0])
        out = in_frames(lambda f: attention("attn", f), inputs)
        tokens = tokens + chosen(mask, m[2] * out, z[2] * out)
        read = tokens + s["pos_embed_temporal"][:, :, None] if i == 0 else tokens
        tokens = tokens + m[2] * over_time(
            lambda f: attention("attn_temp", f), read
        )  # published: t's gate for all frames
        tokens = tokens + cross(s, f"{b}.cross_attn", tokens.flatten(1, 2), words, lengths, heads).view_as(tokens)
        normed = norm(tokens)
        out = mlp(s, f"{b}.mlp", chosen(mask, normed * (1 + m[4]) + m[3], normed * (1 + z[4]) + z[3]))
        tokens = tokens + chosen(mask, m[5] * out, z[5] * out)
    return video(_masked_final(s, tokens, code, still, mask), x.shape[3] // 2, x.shape[4] // 2)


def _masked_final(s: State, x: Tensor, code: Tensor, still: Tensor, mask: Tensor | None) -> Tensor:
    def modulated(c: Tensor) -> Tensor:
        shift, scale = (s["final_layer.scale_shift_table"][None] + c[:, None])[:, :, None, None].unbind(1)
        return norm(x) * (1 + scale) + shift

    return lin(s, "final_layer.linear", chosen(mask, modulated(code), modulated(still)))


def _rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """x (B, T, H, d): neighbouring channels as pairs, turned by frame number times `freqs`."""
    angles = torch.einsum("t,f->tf", torch.arange(x.shape[1], dtype=freqs.dtype), freqs).repeat_interleave(2, -1)[
        :, None
    ]
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def v3(
    s: State,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    lengths: list[int],
    fps: Tensor,
    pixels: tuple[float, float],
    mask: Tensor | None = None,
    heads: int = 4,
) -> Tensor:
    """Open-Sora STDiT3 (v1.2). pixels: height and width; mask (B, T): x_mask, True where a frame is drawn."""
    height, width = x.shape[3:]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    out = _v3_padded(s, x, t, y, lengths, fps, pixels, mask, heads)
    return out[..., :height, :width]


def _v3_padded(
    s: State,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    lengths: list[int],
    fps: Tensor,
    pixels: tuple[float, float],
    mask: Tensor | None,
    heads: int,
) -> Tensor:
    rows, columns, width = x.shape[3] // 2, x.shape[4] // 2, s["t_block.1.weight"].shape[1]
    base, scale = round((rows * columns) ** 0.5), (pixels[0] * pixels[1]) ** 0.5 / 512
    tokens = video_tokens(s, x) + plane_code(width, rows, columns, base, scale)[:, None]
    rate = embedder(s, "fps_embedder", fps)
    code, still = (embedder(s, "t_embedder", at) + rate for at in (t, torch.zeros_like(t)))
    words = caption(s, y)
    for i in range(2 * count(s, "spatial_blocks")):
        b = f"{'temporal' if i % 2 else 'spatial'}_blocks.{i // 2}"
        m, z = tuple(_modulations(s, b, code)), tuple(_modulations(s, b, still))

        def attention(inputs: Tensor, b: str = b, temporal: bool = bool(i % 2)) -> Tensor:
            q, k, v = (part.unflatten(-1, (heads, -1)) for part in lin(s, f"{b}.attn.qkv", inputs).chunk(3, dim=-1))
            if f"{b}.attn.q_norm.weight" in s:
                q, k = _rms(q, s[f"{b}.attn.q_norm.weight"]), _rms(k, s[f"{b}.attn.k_norm.weight"])
            if temporal:
                q, k = _rotated(q, s["rope.freqs"]), _rotated(k, s["rope.freqs"])
            return lin(s, f"{b}.attn.proj", attend(q.flatten(2), k.flatten(2), v.flatten(2), heads))

        normed = norm(tokens)
        inputs = chosen(mask, normed * (1 + m[1]) + m[0], normed * (1 + z[1]) + z[0])
        out = over_time(attention, inputs) if i % 2 else in_frames(attention, inputs)
        tokens = tokens + chosen(mask, m[2] * out, z[2] * out)
        tokens = tokens + cross(s, f"{b}.cross_attn", tokens.flatten(1, 2), words, lengths, heads).view_as(tokens)
        normed = norm(tokens)
        out = mlp(s, f"{b}.mlp", chosen(mask, normed * (1 + m[4]) + m[3], normed * (1 + z[4]) + z[3]))
        tokens = tokens + chosen(mask, m[5] * out, z[5] * out)
    return video(_masked_final(s, tokens, code, still, mask), rows, columns)


def rineau(s: State, x: Tensor, t: Tensor, y: Tensor | None, heads: int = 4) -> Tensor:
    """J. Rineau's DiT, the label of each sample its own (the published code gives all the last one's)."""
    side, half = x.shape[2] // 2, s["first_layer.t_embedder.1.weight"].shape[1] // 2
    patches = x.unflatten(3, (side, 2)).unflatten(2, (side, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    tokens = lin(s, "first_layer.patchify.projection", patches) + s["first_layer.pos_embed"]
    angles = t[:, None].float() * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    c = lin(s, "first_layer.t_embedder.1", torch.cat([angles.sin(), angles.cos()], dim=-1))
    c = lin(s, "first_layer.t_embedder.3", F.gelu(c, approximate="tanh"))
    c = c if y is None else c + s["first_layer.y_embedder.weight"][y]
    for i in range(count(s, "blocks")):
        b = f"blocks.{i}"
        m = lin(s, f"{b}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
        q, k, v = lin(s, f"{b}.attn.c_attn", norm(tokens) * (1 + m[1]) + m[0]).chunk(3, dim=-1)
        tokens = tokens + m[2] * lin(s, f"{b}.attn.c_proj", attend(q, k, v, heads))
        z = F.gelu(lin(s, f"{b}.mlp.c_fc", norm(tokens) * (1 + m[4]) + m[3]), approximate="tanh")
        z = z.transpose(1, 2).unflatten(2, (side, side))
        conv = f"{b}.mlp.depthwise_conv"
        z = F.conv2d(z, s[f"{conv}.weight"], s[f"{conv}.bias"], padding=1, groups=z.shape[1]).flatten(2).transpose(1, 2)
        tokens = tokens + m[5] * lin(s, f"{b}.mlp.c_proj", z)
    return picture(_adaln_final(s, tokens, c), side, side)
