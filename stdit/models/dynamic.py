"""Dynamic compute: which heads, MLP channels and tokens run, and how many blocks (Zhao et al. 2025, DyDiT, section 3).

B batch · (T, S) tokens · D hidden size · H heads, and groups of the MLP's inner channels

    heads, groups = router(time) > 0       the time's code alone: one choice for all that are drawn at that time
    tokens = router(x) > 0                 each token by itself, after attention; the others skip the MLP

In training every part is computed and masked, by straight-through Gumbel sigmoids. At inference less is computed: of
heads and channels only the chosen ones' weights are multiplied, and chosen tokens are gathered. How many blocks run
(early exit) is a table of times, `exit_depths`, and needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.attention import Attention
from stdit.models.pruning import Chosen, Parts, cut, for_some

# Of the Gumbel sigmoid, as published.
TEMPERATURE = 5.0
# Routers' biases at the start, with their weights at 0: all is on, in training but for one choice in 150.
OPEN = 5.0

Generators = torch.Generator | Sequence[torch.Generator] | None


class Noise(NamedTuple):
    """Logistic noise of one block's choices in training: heads, heads_temp, groups (B, H - 1); tokens (B, T, S, 1)."""

    heads: Tensor | None
    heads_temp: Tensor | None
    groups: Tensor | None
    tokens: Tensor | None


class Used(NamedTuple):
    """Multiply-adds of attention and MLP that a sample's choices cost, and the share of its tokens that went through
    the MLP: of one block, (B,) each; of the model, `compute` as a share of the whole, (B,), and `tokens` (depth, B)."""

    compute: Tensor
    tokens: Tensor


# Multiply-adds of attn, attn_temp and the MLP, for one sample.
Costs = tuple[float, float, float]


@dataclass
class DynamicOutput(Transformer2DModelOutput):
    """As diffusers', with what was used (in training)."""

    used: Used | None = None


class Dynamic(nn.Module):
    """One block's routers."""

    def __init__(self, config: ModelConfig, temporal: bool) -> None:
        """temporal: the block has an `attn_temp`."""
        super().__init__()
        width, _, heads = config.dimensions
        self.config = config
        self.heads = self.heads_temp = self.groups = self.tokens = None
        if config.dynamic_width:
            self.heads = nn.Linear(width, heads - 1)
            self.heads_temp = nn.Linear(width, heads - 1) if temporal else None
            self.groups = nn.Linear(width, heads - 1)
        if config.dynamic_tokens:
            inner = max(1, width // 16)
            self.tokens = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, 1))

    @torch.no_grad()
    def open(self) -> None:
        """Everything on, whatever the time and the tokens."""
        last = None if self.tokens is None else self.tokens[2]
        for router in (self.heads, self.heads_temp, self.groups, last):
            if isinstance(router, nn.Linear):
                nn.init.zeros_(router.weight)
                nn.init.constant_(router.bias, OPEN)

    def parts(
        self, whole: Parts, time: Tensor | None, noise: Noise | None, complete: Tensor | None, ready: Parts | None
    ) -> tuple[Parts, Chosen]:
        """What is to run, and masks over it. Where nothing is differentiated and the batch has one time, the parts are cut
        down and there are no masks; ready: those parts, made ahead."""
        if time is None:
            return whole, Chosen()
        fixed = torch.compiler.is_compiling()  # the shapes of a compiled graph do not change
        if ready is not None and not fixed:
            return ready, Chosen()
        chosen = self.choose(time, noise, complete)
        if not self.training and len(time) == 1 and not fixed and not torch.is_grad_enabled():
            made = cut(whole, chosen)
            return (whole, chosen) if made is None else (made, Chosen())
        return whole, chosen

    def choose(self, time: Tensor, noise: Noise | None, complete: Tensor | None) -> Chosen:
        """Heads and groups at a time's code (B or 1, D); the first of each always runs."""
        assert self.heads is not None
        assert self.groups is not None
        own = noise or Noise(None, None, None, None)
        heads = _first(_switch(self.heads(time), own.heads, complete))
        temp = None
        if self.heads_temp is not None:
            temp = _first(_switch(self.heads_temp(time), own.heads_temp, complete))
        groups = _first(_switch(self.groups(time), own.groups, complete))
        channels = groups.repeat_interleave(self.config.mlp_width // groups.shape[1], dim=1)
        return Chosen(heads, temp, channels[:, None, None])

    def select(self, x: Tensor, noise: Noise | None, complete: Tensor | None) -> Tensor | None:
        """Which tokens (B, T, S, D) go through the MLP: (B, T, S, 1), 1 or 0 (bool at inference). None: all, they are not chosen."""
        if self.tokens is None:
            return None
        logits = self.tokens(x)
        return logits > 0 if noise is None else _switch(logits, noise.tokens, complete)

    def feed(
        self,
        x: Tensor,
        vectors: Sequence[Tensor | None],
        run: Callable[..., Tensor],
        noise: Noise | None,
        complete: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """run(x, *vectors), x (B, T, S, D) and what its MLP adds, and which tokens are chosen; see `for_some`.

        In training, and in a compiled graph, whose shapes are fixed, all tokens run, masked: run(x, *vectors, tokens).
        """
        tokens = self.select(x, noise, complete)
        if tokens is None or self.training or torch.compiler.is_compiling():
            return run(x, *vectors, tokens), tokens
        return for_some(x, tokens, vectors, run), tokens

    def costs(self, attn: Attention, t: int, s: int, over_time: bool) -> Costs:
        """Multiply-adds of `attn`, of attn_temp (if the block has one) and of the MLP for T frames of S tokens."""
        width, _, _ = self.config.dimensions
        seen = t * s if self.config.attention == "full" else t if over_time else s
        if attn.window_size is not None:
            seen = attn.window_size**2
        if attn.sr is not None and self.config.kv_compress:
            seen = s / self.config.kv_compress**2
        n, products = t * s, 3 if self.config.mlp == "swiglu" else 2
        project, temporal = 4 * width**2, self.config.attention == "factorized" and self.config.temporal
        temp = n * (project + 2 * t * width) if temporal else 0.0
        return n * (project + 2 * seen * width), temp, float(n * products * width * self.config.mlp_width)

    def used(self, chosen: Chosen, tokens: Tensor | None, costs: Costs, x: Tensor) -> Used:
        """What a block's choices cost each sample of x (B, T, S, D), in float32."""
        ones = x.new_ones(len(x), dtype=torch.float32)
        share = ones if tokens is None else tokens.float().mean((1, 2, 3))
        heads, temp, groups = (ones if c is None else ones * c.float().flatten(1).mean(1) for c in chosen)
        return Used(costs[0] * heads + costs[1] * temp + costs[2] * groups * share, share)


# --------------------------------------------------------------------------------------- choosing


def _switch(logits: Tensor, noise: Tensor | None, complete: Tensor | None) -> Tensor:
    """1 where a logit is above 0, else 0; with noise (of training) with the gradient of sigmoid((logit + noise) / 5).

    complete (B,) bool: samples for which all is on.
    """
    if noise is None:
        on = (logits > 0).to(logits.dtype)
    else:
        logits = logits + noise
        soft = (logits / TEMPERATURE).sigmoid()
        on = (logits > 0).to(logits.dtype) + (soft - soft.detach())
    if complete is not None:
        on = torch.where(complete.view(-1, *[1] * (on.ndim - 1)), 1.0, on)
    return on


def _first(on: Tensor) -> Tensor:
    """(B, H - 1) -> (B, H), the first on."""
    return F.pad(on, (1, 0), value=1.0)


def uniform(each: tuple[int, ...], batch: int, generator: Generators, device: torch.device) -> Tensor:
    """Numbers in [0, 1), (B, *each): from one generator, or from each sample's own, or torch's (None)."""
    if generator is None or isinstance(generator, torch.Generator):
        at = device if generator is None else generator.device
        return torch.rand(batch, *each, generator=generator, device=at).to(device)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} samples")
    return torch.stack([torch.rand(each, generator=g, device=g.device) for g in generator]).to(device)


def noises(config: ModelConfig, x: Tensor, temporal: bool, generator: Generators) -> list[Noise]:
    """Every block's noise for tokens x (B, T, S, D). The difference of two Gumbel variables is a logistic one."""
    _, depth, heads = config.dimensions
    widths = (heads - 1 if config.dynamic_width else 0, x.shape[1] * x.shape[2] if config.dynamic_tokens else 0)
    choices = 3 if temporal else 2
    drawn = uniform((depth, choices * widths[0] + widths[1]), len(x), generator, x.device)
    found = []
    for block in torch.logit(drawn, eps=1e-6).to(x.dtype).unbind(1):
        wide, tokens = block.split([choices * widths[0], widths[1]], dim=1)
        groups = [*wide.chunk(choices, dim=1)] if widths[0] else [None] * choices
        temp = groups.pop(1) if temporal else None
        found.append(Noise(groups[0], temp, groups[1], tokens.view(*x.shape[:3], 1) if widths[1] else None))
    return found


# --------------------------------------------------------------------------- depth, and what is used


def depths(config: ModelConfig, times: Tensor) -> Tensor:
    """How many blocks run at times (B,) on 0 to 1000: (B,) int64, by `exit_depths`.

    Integers are steps of DDPM, 0 to 999, of which k stands at t = (k + 1) / 1000 (stdit.diffusion.objectives).
    """
    _, depth, _ = config.dimensions
    if not times.is_floating_point():
        times = times + 1
    found = torch.full(times.shape, depth, dtype=torch.long, device=times.device)
    for time, blocks in reversed(config.exit_depths):
        found = torch.where(times.float() >= 1000 * time, blocks, found)
    return found


def is_shared(times: Tensor) -> bool:
    """Whether all times (B,) are one. Waits for the device; False where that would break a compiled graph."""
    return not torch.compiler.is_compiling() and bool((times == times[:1]).all())


def total(used: Sequence[Used], costs: Sequence[Costs], depth: Tensor | int | None) -> Used:
    """What a model used, of what each of its blocks did; blocks beyond a sample's depth (B or 1,) cost it nothing."""
    compute = torch.stack([u.compute for u in used])  # (depth, B)
    if isinstance(depth, Tensor):
        compute = compute * (torch.arange(len(used), device=depth.device)[:, None] < depth)
    return Used(compute.sum(0) / sum(map(sum, costs)), torch.stack([u.tokens for u in used]))
