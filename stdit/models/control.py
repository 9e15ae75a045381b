"""Control branch (ControlNet): a trainable copy of a model's first blocks that reads a control signal.

B           batch
C'          channels of the control latents
T, H, W     latent frames, height, width; after patching, the grid of patches;  S = H W
D           hidden size

    x = x_embedder(x_t) + positions + control_proj(control_embedder(control))       control_proj starts at zero
    x = block_i(x);  residual_i = joins_i(x)                                        joins start at zero

The frozen model adds residual_i after its block i (Zhang et al. 2023, ControlNet; for transformers Chen et al. 2024,
PixArt-δ, section 2.3). The control signal is latents, usually of the model's own autoencoder: an image, for every
frame, or a video; depth, edges and poses are encoded as images.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.blocks import TextStream
from stdit.models.checks import check_config, check_inputs
from stdit.models.conditioning import ConditionInputs, Conditions, append_context_tokens, embed_conditions
from stdit.models.dynamic import Generators
from stdit.models.embeddings import PatchEmbed3D
from stdit.models.init import takes_model_config
from stdit.models.positions import Grid
from stdit.models.sequence_parallel import shard_tokens
from stdit.models.stdit import STDiT

# ModelMixin: DiffusionPipeline looks it up in the module of a component's class.
__all__ = ["Controlled", "ModelMixin", "STDiTControl", "static_settings"]

# Keys of its config beside the model's own.
OWN = ("control_blocks", "control_channels")
# Modules that no base model has.
NEW = ("control_embedder.", "control_proj.", "joins.")


class STDiTControl(STDiT):
    """The branch, a diffusers model of its own: `STDiTControl.of(base)` makes one that changes nothing yet.

    control_blocks: how many of the base's first blocks it copies. control_channels: of the condition's latents. The
    other settings are the base's.
    """

    @register_to_config
    @takes_model_config
    def __init__(self, *, control_blocks: int, control_channels: int, **settings: Any) -> None:
        super().__init__(**settings)
        width, depth, _ = self.settings.dimensions
        if not 0 < control_blocks <= depth:
            raise ValueError(f"control_blocks {control_blocks}: the model has {depth} blocks; give 1 to {depth}")
        if control_channels < 1:
            raise ValueError(f"control_channels {control_channels}: give 1 or more")
        self.control_channels = control_channels
        self.blocks = self.blocks[:control_blocks]
        last: Any = self.blocks[-1]
        if last.context is not None:  # its text ends here
            last.context = TextStream(self.settings, last=True)
        del self.final_layer
        self.control_embedder = PatchEmbed3D(control_channels, width, self.settings.patch_size)
        self.control_proj = nn.Linear(width, width)
        self.joins = nn.ModuleList(nn.Linear(width, width) for _ in range(control_blocks))
        with torch.no_grad():
            proj = self.control_embedder.proj
            nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
            for name, parameter in self.named_parameters():
                if name == "control_embedder.proj.bias" or name.startswith(NEW[1:]):
                    nn.init.zeros_(parameter)

    @classmethod
    @torch.no_grad()
    def of(cls, base: STDiT, blocks: int | None = None, channels: int | None = None, seed: int = 0) -> STDiTControl:
        """The branch of `base` with copies of its weights, on its device, in its dtype and its mode (training or not).

        blocks: None for half of the base's (at least one). channels: None for those of the base's own latents, whose
        patch embedding then is copied for the condition too. What is new is drawn from `seed`. ValueError: too many
        blocks, or a base whose sparse blocks may be dropped.
        """
        if base.settings.sparse_dense:
            raise ValueError(
                "a control branch of a model with sparse_dense: its residuals would be lost with the blocks"
            )
        settings = static_settings(base.settings)
        width, depth, _ = settings.dimensions
        kwargs = settings.model_kwargs()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            count = max(1, depth // 2) if blocks is None else blocks
            control = cls(control_blocks=count, control_channels=channels or settings.in_channels, **kwargs)
        source, state = base.state_dict(), control.state_dict()
        for name, own in state.items():
            if name.startswith(NEW):
                continue
            # The last block's text stream has the first two of six modulation vectors, unless it is the base's last
            # too.
            cut = ".context.adaLN_modulation." in name and own.shape != source[name].shape
            own.copy_(source[name][: 2 * width] if cut else source[name])
        if control.control_channels == settings.in_channels:
            for part in ("weight", "bias"):
                state[f"control_embedder.proj.{part}"].copy_(source[f"x_embedder.proj.{part}"])
        control = control.to(base.device).train(base.training)
        return control.to(base.dtype) if control.dtype != base.dtype else control

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'. ValueError: a config of another class, or with keys that it does not have."""
        if isinstance(config, dict):
            check_config(config, cls.__name__, OWN)
        return super(STDiT, cls).from_config(config, return_unused_kwargs, **kwargs)

    def check_base(self, base: STDiT) -> None:
        """ValueError where this is the branch of a model of other settings than `base`'s; they are listed.

        Of drop_path each may have its own: it is a matter of their training."""
        own, other = (settings.model_kwargs() for settings in (self.settings, static_settings(base.settings)))
        other["drop_path"] = own["drop_path"]
        if wrong := [f"{key}: {own[key]}, the model has {other[key]}" for key in own if own[key] != other[key]]:
            raise ValueError("this control branch is of another model:\n  " + "\n  ".join(wrong))

    def check_control(self, control: Tensor, latents: Tensor) -> None:
        """ValueError where `control` (B, C', T or 1, H, W) does not fit `latents` (B, C, T, H, W)."""
        if control.ndim != 5:
            raise ValueError(
                f"control has {control.ndim} dimensions {tuple(control.shape)}; expected 5, (B, C, T, H, W)"
            )
        if control.shape[1] != self.control_channels:
            raise ValueError(
                f"control has {control.shape[1]} channels; the branch takes control_channels {self.control_channels}"
            )
        expected, found = tuple(latents.shape[2:]), tuple(control.shape[2:])
        if found != expected and found != (1, *expected[1:]):
            raise ValueError(
                f"control is {found} (frames, height, width); the latents are {expected}: pass as many frames, or one, of their size"
            )
        if control.shape[0] not in (1, latents.shape[0]):
            raise ValueError(f"control has {control.shape[0]} samples; hidden_states has {latents.shape[0]}")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        control: Tensor,
        control_scale: float = 1.0,
        conditions: Conditions | None = None,
        generator: Generators = None,
        **inputs: Any,
    ) -> tuple[Tensor, ...]:
        """The `block_residuals` of `STDiT.forward`: (B, T, S, D) for each block of the branch.

        control: (B or 1, C', T or 1, H, W) latents; one frame is used for all. control_scale: factor of the residuals.
        conditions: precomputed with this branch. inputs: the other conditions of `STDiT.forward`. ValueError: shapes
        that do not fit, with both numbers, before any matrix product.
        """
        cond_inputs = ConditionInputs(timestep, **inputs)
        grid = check_inputs(self.settings, hidden_states, cond_inputs, conditions)
        self.check_control(control, hidden_states)

        x, positions = self.embed_latents(hidden_states, grid, cond_inputs.added_cond_kwargs)  # (B, T, S, D)
        x = x + self.embed_control(control, grid).to(x.dtype)
        cond = conditions or embed_conditions(self, cond_inputs, x.device, x.dtype)
        full = self.settings.attention == "full"
        x, cond, positions = append_context_tokens(x, cond, positions, grid, full)
        x, positions, shards = shard_tokens(x, positions, self.sequence_parallel, full)

        states = self.block_states(x, cond, positions, grid, generator=generator, shards=shards)
        blocks = self.run_blocks(x, cond.text, states)
        residuals = (join(x) for join, (x, _) in zip(self.joins, blocks, strict=True))
        return tuple(r * control_scale if control_scale != 1 else r for r in residuals)

    def final_modulation(self, embedding: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: a branch has no final layer."""
        return None

    def embed_control(self, control: Tensor, grid: Grid) -> Tensor:
        """(B, C', T or 1, H, W) -> (B, T or 1, S, D)."""
        frames, patch = control.shape[2], self.settings.patch_size[0]
        if frames == 1:
            control = control.expand(-1, -1, patch, -1, -1)
        x = self.control_proj(self.control_embedder(control.to(self.control_proj.weight.dtype)))
        return x.unflatten(1, (1 if frames == 1 else grid[0], -1))


def static_settings(settings: ModelConfig) -> ModelConfig:
    """A base's settings without dynamic compute and early exit, as its branch has them."""
    fields = ModelConfig.model_fields.items()
    off = {name: field.get_default() for name, field in fields if name.startswith(("dynamic_", "exit_"))}
    return settings.model_copy(update=off)


class Controlled(nn.Module):
    """A frozen model and its control branch as one model that takes `control` too."""

    def __init__(self, base: STDiT, control: STDiTControl) -> None:
        super().__init__()
        control.check_base(base)
        self.base, self.control = base.requires_grad_(False), control

    def train(self, mode: bool = True) -> Controlled:
        """As nn.Module's; the frozen base stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        control: Tensor,
        control_scale: float = 1.0,
        return_dict: bool = True,
        **inputs: Any,
    ) -> Any:
        """As `STDiT.forward`, with `control` and `control_scale` as in `STDiTControl.forward`."""
        residuals = self.control(hidden_states, timestep, control, control_scale, **inputs)
        return self.base(hidden_states, timestep, block_residuals=residuals, return_dict=return_dict, **inputs)
