"""STDiT, the space-time diffusion transformer: one model for images and video, class labels and text.

B batch · C latent channels · (T, H, W) latent frames, height, width, then patches · S = H W · D hidden size · L text tokens

    tokens = x_embedder(latents) + positions      code = t_embedder(t) + class + pooled text + fps, size, …
    for block in blocks: tokens, text = block(tokens, y_embedder(text), t_block(code))
    prediction = unpatchify(final_layer(tokens, code))

Its config (stdit.config.model.ModelConfig) says which of the published models it is. Parameter names are those of DiT,
PixArt-α and Open-Sora, whose weights have the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.blocks import COMPILED, FinalLayer, STDiTBlock
from stdit.models.checks import check_config, check_inputs, check_loaded, check_residuals
from stdit.models.conditioning import ConditionEmbedder, TimestepEmbedder, micro_embedders
from stdit.models.dynamic import (
    DynamicOutput,
    Generators,
    Noise,
    Used,
    noises,
    total,
    uniform,
)
from stdit.models.embeddings import (
    Grid,
    PatchEmbed3D,
    unpatchify,
    with_still,
)
from stdit.models.init import initialize, takes_settings
from stdit.models.positions import Places, placed
from stdit.models.telling import Conditions, Telling


class STDiT(Telling, ModelMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    """A diffusers model: save_pretrained, from_pretrained, schedulers, LoRA, attention back ends and caches work as on any other.

    `STDiT.from_settings(ModelConfig(...))` makes one from a config; `.settings` gives the config back.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STDiTBlock"]  # noqa: RUF012 (diffusers' own declarations)
    _repeated_blocks = ["STDiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "_embedder", "final_layer", "norm"]  # noqa: RUF012

    if TYPE_CHECKING:  # diffusers' wrapper hides what it wraps

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    @register_to_config
    @takes_settings
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = c = ModelConfig(**settings)
        width, depth, _ = c.dimensions
        self.gradient_checkpointing = False
        self.patch_size: Grid = c.patch_size
        pt, ph, pw = c.patch_size
        self.out_channels = 2 * c.in_channels if c.learned_variance else c.in_channels

        self.x_embedder = PatchEmbed3D(c.in_channels, width, c.patch_size)
        self.pos_embed = self.temp_embed = None
        if c.positions == "learned" and c.position_grid is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, c.position_grid[0] * c.position_grid[1], width))
        if c.has_time and c.time_positions == "learned" and c.position_frames is not None:
            self.temp_embed = nn.Parameter(torch.zeros(1, c.position_frames, width))
        self.t_embedder = TimestepEmbedder(
            width, c.timestep_width or width, c.timestep_freq_shift, c.timestep_activation
        )
        self.t_block = None
        if c.conditioning == "adaln_single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = None
        if c.num_classes is not None or c.text_dim is not None or c.pooled_dim is not None:
            self.y_embedder = ConditionEmbedder(c)
        for name, outputs in micro_embedders(c).items():
            self.add_module(name, TimestepEmbedder(outputs))
        self.blocks = nn.ModuleList(STDiTBlock(c, i) for i in range(depth))
        self.final_layer = FinalLayer(c, pt * ph * pw * self.out_channels)
        initialize(self)

    # ------------------------------------------------------------------------------ making, loading

    @classmethod
    def from_settings(cls, settings: ModelConfig, seed: int = 0) -> STDiT:
        """The model that a config describes, its weights drawn from `seed`; torch's global random state is left alone."""
        kwargs = settings.model_kwargs()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(**kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'. ValueError: a config of another class, or with keys that STDiT does not have."""
        if isinstance(config, dict):
            check_config(config, cls.__name__)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', and strict: safetensors only unless told; ValueError listing keys missing, unexpected or of another shape."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        check_loaded(str(pretrained_model_name_or_path), info)
        for parameter in model.parameters():
            # Weights mapped from a file lie at odd addresses, where products are slower and differ in the last digit.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded if wants_info else model

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', block by block; unless told otherwise without graph breaks, and for any size at once."""
        super().compile_repeated_blocks(*args, **COMPILED | kwargs)

    # -------------------------------------------------------------------------------------- forward

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        drop_condition: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        frames: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        conditioning_frames: Tensor | None = None,
        block_residuals: Sequence[Tensor] = (),
        conditions: Conditions | None = None,
        generator: Generators = None,
        complete: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor] | tuple[Tensor, Used]:
        """Predicts noise or velocity, whatever the objective it is trained with asks for.

        Args:
            hidden_states: (B, C, T, H, W) noised latents.
            timestep: on 0 to 1000 (1000 is noise), float or int; a number, (1,) or (B,).
            encoder_hidden_states: (B, L, text_dim) text features; None is the null caption.
            encoder_attention_mask: (B, L), True (or 1) where a token is real; None: all are. A caption without any is null.
            class_labels: (B,) integers, -1 for null; None is null for all. Checked against num_classes on the CPU only
                (elsewhere the check would wait for the device at every step; CUDA's own assertion stops bad ones).
            drop_condition: (B,) bool, True where label and text are replaced by null (guidance dropout).
            fps, frames, height, width: (B,) or (1,) numbers, needed where `micro_conditions` names them (`size`: height
                and width), else not looked at; height and width, in pixels, also where there is a position_reference.
            aspect_ratio: (B,) or (1,), told with `size`; None: height / width.
            pooled_projections: (B, pooled_dim), the vector that comes with the text; None is zeros.
            conditioning_frames: (B, T) bool, True for latent frames that are given, not drawn: they are told time 0.
            block_residuals: added to the tokens after the first blocks, (B, T, S, D) each (a control branch's).
            conditions: of `prepare`, in place of the time and all that follows it.
            generator: of the drop path's and the routers' choices in training, one, or one for each sample; None: torch's.
            complete: (B,) bool, samples for which a dynamic model's every part runs (in training alone).

        Returns:
            `.sample` (B, C, T, H, W), or 2C channels with learned_variance; a 1-tuple without return_dict. Of dynamic
            models in training also `.used` (stdit.models.dynamic.Used), second of the tuple.

        Raises:
            ValueError: a shape or a label that does not fit, with both numbers, before any matrix product.
        """
        micro = {"fps": fps, "frames": frames, "height": height, "width": width, "aspect_ratio": aspect_ratio}
        text = (encoder_hidden_states, encoder_attention_mask, pooled_projections)
        grid = check_inputs(
            self.settings,
            hidden_states,
            timestep,
            text,
            class_labels,
            drop_condition,
            conditioning_frames,
            micro,
            conditions,
        )
        tokens = self.x_embedder(hidden_states)  # (B, T S, D)
        x, places = self._placed(tokens.unflatten(1, (grid[0], -1)), grid, (height, width))
        if conditions is None:
            conditions = self._conditions(timestep, text, class_labels, drop_condition, conditioning_frames, micro, x)
        x, places, conditions = self._joined(x, places, conditions, grid)
        check_residuals(block_residuals, tuple(x.shape), len(self.blocks))

        recompute = (
            self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None
        )
        words, kept = conditions.text, self._kept(x, generator)
        noise, used, depth = self._noises(x, generator), [], conditions.depth
        if self.training and complete is not None and depth is not None:
            depth = torch.where(complete, len(self.blocks), depth)
        costs = [] if noise is None else [block.costs(x) for block in self._blocks()]
        for i, block in enumerate(self.blocks):
            prepared = None if conditions.prepared is None else conditions.prepared[i]
            keep = None if kept is None else kept[i]
            if isinstance(depth, int) and i >= depth:
                break
            args = (x, words, conditions.signals, conditions.mask, grid, places, keep, prepared)
            if noise is not None:
                args = (*args, noise[i], complete)
            before = x
            x, words, *spent = block(*args) if recompute is None else recompute(block, *args)
            if i < len(block_residuals):
                x = x + block_residuals[i]
            if isinstance(depth, Tensor):  # samples that have left stay as they are
                x = torch.where((depth > i)[:, None, None, None], x, before)
            used += spent
        x = x[:, :, : grid[1] * grid[2]]
        patches = self.final_layer(x, conditions.code, conditions.final)
        sample = unpatchify(patches.flatten(1, 2), grid, self.patch_size)
        if used:
            whole = total(used, costs, depth)
            return DynamicOutput(sample=sample, used=whole) if return_dict else (sample, whole)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _placed(self, x: Tensor, grid: Grid, pixels: tuple[Any, Any]) -> tuple[Tensor, Places]:
        """Tokens (B, T, S, D) with positions, and those that attention needs; pixels: the clip's height and width."""
        return placed(self.settings, (self.pos_embed, self.temp_embed), x, grid, pixels)

    def _joined(
        self, x: Tensor, places: Places, conditions: Conditions, grid: Grid
    ) -> tuple[Tensor, Places, Conditions]:
        """Tokens (B, T, S, D) with the in-context ones, (B, T, S + K, D): time and class, and the text, in each frame."""
        if conditions.tokens is None:
            return x, places, conditions
        told = conditions.tokens.expand(x.shape[0], x.shape[1], -1, -1)
        x = torch.cat([x, told], dim=2)
        if conditions.mask is not None:
            seen = F.pad(conditions.mask, (x.shape[2] - conditions.mask.shape[-1], 0), value=True)
            conditions = conditions._replace(mask=seen)
        rope = places.rope and with_still(places.rope, grid, told.shape[2], self._full)
        return x, places._replace(rope=rope), conditions

    def _noises(self, x: Tensor, generator: Generators) -> list[Noise] | None:
        """What each block's routers need in training; None where there are none, or at inference."""
        if not (self.training and self.settings.dynamic):
            return None
        return noises(self.settings, x, self._blocks()[0].attn_temp is not None, generator)

    def _kept(self, x: Tensor, generator: Generators) -> Tensor | None:
        """Drop path (Huang et al. 2016; as timm and PixArt have it): (depth, 3, B, 1, 1, 1), each branch's 0 or 1 / kept."""
        c = self.settings
        if not self.training or c.drop_path == 0:
            return None
        _, depth, _ = c.dimensions
        kept = 1 - torch.linspace(0, c.drop_path, depth)
        drawn = uniform((depth, 3), x.shape[0], generator, x.device).permute(1, 2, 0)
        kept = kept.to(x.device)[:, None, None]
        return ((drawn < kept) / kept).to(x.dtype)[..., None, None, None]
