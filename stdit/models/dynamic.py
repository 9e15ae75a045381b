"""Dynamic compute: routers select heads, MLP channels and tokens, a table the exit depth (Zhao et al. 2025, DyDiT,
section 3).

B           batch
T, S        frames, tokens of a frame
D           hidden size
H           heads, and channel groups of the MLP

    heads, groups = router(timestep embedding) > 0     dynamic width: one choice for all samples at a timestep
    tokens = router(x) > 0                             token skipping: after attention; other tokens skip the MLP

In training everything is computed and masked, with straight-through Gumbel sigmoids. At inference less is computed:
only the selected heads' and channels' weights are multiplied, and the selected tokens gathered. Early exit (how many
blocks run) is a table of timesteps, `exit_depths`, without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.blocks import BLOCK_METADATA, BlockState, Modulation, STDiTBlock, gated_add
from stdit.models.pruning import BlockModules, RouterMask, apply_to_tokens, prune
from stdit.models.sequence_parallel import TokenShards, mean_over_tokens, own_tokens, per_frame

# Temperature of the Gumbel sigmoid, as published.
TEMPERATURE = 5.0
# Initial bias of the routers, with weights at 0: everything is on; in training all but one choice in 150.
INITIAL_BIAS = 5.0

Generators = torch.Generator | Sequence[torch.Generator] | None


class RouterNoise(NamedTuple):
    """Logistic noise of one block's routers in training: heads, heads_temp, groups (B, H - 1); tokens (B, T, S, 1)."""

    heads: Tensor | None
    heads_temp: Tensor | None
    groups: Tensor | None
    tokens: Tensor | None


class ComputeStats(NamedTuple):
    """What the routers' choices cost each sample.

    Of a block: `compute` (B,), multiply-adds of attention and MLP, and `tokens` (B,), the share that the MLP processed.
    Of a model: `compute` (B,) as a share of the static model's, and `tokens` (depth, B).
    """

    compute: Tensor
    tokens: Tensor


# Multiply-adds of attn, attn_temp and the MLP, for one sample.
Costs = tuple[float, float, float]


@dataclass
class DynamicOutput(Transformer2DModelOutput):
    """As diffusers', with compute statistics (in training)."""

    compute_stats: ComputeStats | None = None


class Router(nn.Module):
    """The routers of one block."""

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
    def init_weights(self) -> None:
        """Everything on, at any timestep and for any token."""
        last = None if self.tokens is None else self.tokens[2]
        for router in (self.heads, self.heads_temp, self.groups, last):
            if isinstance(router, nn.Linear):
                nn.init.zeros_(router.weight)
                nn.init.constant_(router.bias, INITIAL_BIAS)

    def route(self, time: Tensor, noise: RouterNoise | None, force_full: Tensor | None) -> RouterMask:
        """Heads and channel groups for timestep embeddings (B or 1, D); the first of each is always on."""
        assert self.heads is not None
        assert self.groups is not None
        noise = noise or RouterNoise(None, None, None, None)
        heads = _first_on(_gate(self.heads(time), noise.heads, force_full))
        heads_temp = None
        if self.heads_temp is not None:
            heads_temp = _first_on(_gate(self.heads_temp(time), noise.heads_temp, force_full))
        groups = _first_on(_gate(self.groups(time), noise.groups, force_full))
        channels = groups.repeat_interleave(self.config.mlp_width // groups.shape[1], dim=1)
        return RouterMask(heads, heads_temp, channels[:, None, None])

    def route_tokens(self, x: Tensor, noise: RouterNoise | None, force_full: Tensor | None) -> Tensor | None:
        """Tokens of x (B, T, S, D) that go through the MLP: (B, T, S, 1), 1 or 0 (bool at inference). None: all do."""
        if self.tokens is None:
            return None
        logits = self.tokens(x)
        return logits > 0 if noise is None else _gate(logits, noise.tokens, force_full)


class DynamicSTDiTBlock(STDiTBlock):
    """A block whose heads, MLP channels and tokens are selected by `Router`."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.dynamic = Router(config, self.attn_temp is not None)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor | None, ComputeStats | None]:
        """As STDiTBlock's, with pruned or masked modules."""
        x, text = hidden_states, encoder_hidden_states
        cache = state.cache or self.precompute(state.modulation)
        shift_msa, scale_msa, gate_msa, *_ = cache.modulation
        drop_attn, drop_temp, drop_mlp = state.drop_path
        modules, mask = self._select_modules(state, cache.pruned)

        if self.over_time:
            x = self.add_temporal_positions(x, state)
        heads = mask.heads
        if heads is not None and state.shards is not None and not (self.full or self.over_time):
            heads = per_frame(heads.expand(len(x), -1), state.grid[0], state.shards)
        attn = partial(modules.attn, head_mask=heads)
        y, text = self.self_attention(attn, self.norm_msa(x, shift_msa, scale_msa), text, state, cache)
        x = gated_add(x, gate_msa, y, drop_attn)
        if modules.attn_temp is not None:
            x = self.add_temporal_positions(x, state)
            attn = partial(modules.attn_temp, head_mask=mask.heads_temp)
            y = self.temporal_attention(attn, self.norm_temp(x, shift_msa, scale_msa), state)
            x = gated_add(x, gate_msa, y, drop_temp)
        if self.cross_attn is not None:
            x = x + self.text_attention(x, text, state, cache)
        x, tokens = self._selected_tokens_mlp(modules.mlp, x, cache.modulation, mask.groups, drop_mlp, state)
        return x, text, self.compute_stats(mask, tokens, x, state.shards) if self.training else None

    def _select_modules(self, state: BlockState, pruned: BlockModules | None) -> tuple[BlockModules, RouterMask]:
        """The modules to run, and masks over their outputs.

        Pruned, without masks, where nothing is differentiated and the batch has one timestep; compiled graphs, whose
        shapes are fixed, mask.
        """
        time, compiling = state.modulation.time, torch.compiler.is_compiling()
        if time is None:
            return self.prunable, RouterMask()
        if pruned is not None and not compiling:
            return pruned, RouterMask()
        mask = self.dynamic.route(time, state.router_noise, state.force_full)
        if not self.training and len(time) == 1 and not compiling and not torch.is_grad_enabled():
            pruned = prune(self.prunable, mask)
            return (self.prunable, mask) if pruned is None else (pruned, RouterMask())
        return self.prunable, mask

    def _selected_tokens_mlp(
        self,
        mlp: nn.Module,
        x: Tensor,
        modulation: Modulation,
        groups: Tensor | None,
        drop_path: Tensor | None,
        state: BlockState,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, S, D) plus the MLP's branch for the selected tokens, and these (B, T, S, 1); None: all.

        Gathered at inference; in training and compiled graphs, all tokens run and are masked.
        """

        def branch(x: Tensor, shift: Any, scale: Any, gate: Any, groups: Any, tokens: Tensor | None = None) -> Tensor:
            y = mlp(self.norm_mlp(x, shift, scale), None, groups)
            return gated_add(x, gate, y if tokens is None else y * tokens, drop_path)

        tokens = self.dynamic.route_tokens(x, state.router_noise, state.force_full)
        vectors = (*modulation[3:], groups)
        if tokens is None or self.training or torch.compiler.is_compiling():
            return branch(x, *vectors, tokens), tokens
        return apply_to_tokens(x, tokens, vectors, branch), tokens

    # ---------------------------------------------------------------------------------------- compute

    def costs(self, x: Tensor, shards: TokenShards | None = None) -> Costs:
        """Multiply-adds of attn, attn_temp and the MLP for one sample of tokens x (B, T, S, D), all selected."""
        c, t, s = self.config, x.shape[1], x.shape[2] if shards is None else shards.tokens
        width, _, _ = c.dimensions
        keys = t * s if c.attention == "full" else t if self.over_time else s
        if self.attn.window_size is not None:
            keys = self.attn.window_size**2
        if self.attn.kv_compress is not None:
            keys = s / self.attn.kv_compress ** (1 if self.attn.kv_sampling == "uniform_every" else 2)
        n, products = t * s, 3 if c.mlp == "swiglu" else 2
        projections = 4 * width**2
        temporal = n * (projections + 2 * t * width) if c.attention == "factorized" and c.temporal else 0.0
        return n * (projections + 2 * keys * width), temporal, float(n * products * width * c.mlp_width)

    def compute_stats(
        self, mask: RouterMask, tokens: Tensor | None, x: Tensor, shards: TokenShards | None = None
    ) -> ComputeStats:
        """What the routers' choices cost each sample of x (B, T, S, D), in float32."""
        ones, costs = x.new_ones(len(x), dtype=torch.float32), self.costs(x, shards)
        share = ones if tokens is None else mean_over_tokens(tokens.float(), shards)
        heads, temp, groups = (ones if m is None else ones * m.float().flatten(1).mean(1) for m in mask)
        return ComputeStats(costs[0] * heads + costs[1] * temp + costs[2] * groups * share, share)


TransformerBlockRegistry.register(DynamicSTDiTBlock, BLOCK_METADATA)


# --------------------------------------------------------------------------------------- sampling


def _gate(logits: Tensor, noise: Tensor | None, force_full: Tensor | None) -> Tensor:
    """1 where a logit is above 0, else 0; with noise (in training) the gradient is that of sigmoid((logit + noise) /
    5).

    force_full (B,) bool: samples for which everything is on.
    """
    if noise is None:
        on = (logits > 0).to(logits.dtype)
    else:
        logits = logits + noise
        soft = (logits / TEMPERATURE).sigmoid()
        on = (logits > 0).to(logits.dtype) + (soft - soft.detach())
    if force_full is not None:
        on = torch.where(force_full.view(-1, *[1] * (on.ndim - 1)), 1.0, on)
    return on


def _first_on(mask: Tensor) -> Tensor:
    """(B, H - 1) -> (B, H), the first on."""
    return F.pad(mask, (1, 0), value=1.0)


def uniform(shape: tuple[int, ...], batch: int, generator: Generators, device: torch.device) -> Tensor:
    """Numbers in [0, 1), (B, *shape), from one generator, one per sample, or torch's (None)."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(batch, *shape, generator=generator, device=source).to(device)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} samples")
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generator]).to(device)


def router_noise(
    config: ModelConfig, x: Tensor, temporal: bool, generator: Generators, shards: TokenShards | None = None
) -> list[RouterNoise]:
    """Every block's noise for tokens x (B, T, S, D): logistic, as the difference of two Gumbel variables."""
    _, depth, heads = config.dimensions
    batch, t, s = x.shape[0], x.shape[1], x.shape[2] if shards is None else shards.tokens
    widths = (heads - 1 if config.dynamic_width else 0, t * s if config.dynamic_tokens else 0)
    routers = 3 if temporal else 2
    drawn = uniform((depth, routers * widths[0] + widths[1]), batch, generator, x.device)
    noise = []
    for block in torch.logit(drawn, eps=1e-6).to(x.dtype).unbind(1):
        wide, tokens = block.split([routers * widths[0], widths[1]], dim=1)
        groups = [*wide.chunk(routers, dim=1)] if widths[0] else [None] * routers
        temp = groups.pop(1) if temporal else None
        own = own_tokens(tokens.view(batch, t, s, 1), shards) if widths[1] else None
        noise.append(RouterNoise(groups[0], temp, groups[1], own))
    return noise


# ------------------------------------------------------------------------------ exit depth, totals


def exit_depths(config: ModelConfig, timesteps: Tensor) -> Tensor:
    """Blocks that run at timesteps (B,) on 0 to 1000: (B,) int64, from the table `exit_depths`.

    Integer timesteps are DDPM's, 0 to 999, of which k is t = (k + 1) / 1000 (stdit.diffusion.objectives).
    """
    _, depth, _ = config.dimensions
    if not timesteps.is_floating_point():
        timesteps = timesteps + 1
    found = torch.full(timesteps.shape, depth, dtype=torch.long, device=timesteps.device)
    for t, blocks in reversed(config.exit_depths):
        found = torch.where(timesteps.float() >= 1000 * t, blocks, found)
    return found


def is_shared(timesteps: Tensor) -> bool:
    """Whether all timesteps (B,) agree. Synchronises with the device; False where that would break a compiled graph."""
    return not torch.compiler.is_compiling() and bool((timesteps == timesteps[:1]).all())


def model_stats(
    blocks: Sequence[Any], x: Tensor, stats: Sequence[ComputeStats | None], shards: TokenShards | None = None
) -> ComputeStats | None:
    """A model's statistics from those of its blocks, run on tokens x (B, T, S, D); None without any."""
    found = [s for s in stats if s is not None]
    if not found:
        return None
    compute = torch.stack([s.compute for s in found]).sum(0)
    full = sum(sum(block.costs(x, shards)) for block in blocks)
    return ComputeStats(compute / full, torch.stack([s.tokens for s in found]))
