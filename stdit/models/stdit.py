"""STDiT, the space-time diffusion transformer: one model for images and video, class labels and text.

B batch · C latent channels · (T, H, W) latent frames, height, width · N tokens · D hidden size · L text tokens

    tokens = x_embedder(latents) + positions      code = t_embedder(t) + class + pooled text + fps, height, width
    for block in blocks: tokens = block(tokens, y_embedder(text), t_block(code))
    prediction = unpatchify(final_layer(tokens, code))

Parameter names are those of DiT, PixArt-α and Open-Sora, whose weights have the same shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.config import ModelConfig
from stdit.models.blocks import FinalLayer, Places, STDiTBlock
from stdit.models.checks import check_config, check_inputs, check_loaded
from stdit.models.conditioning import ConditionEmbedder, TimestepEmbedder
from stdit.models.embeddings import Grid, PatchEmbed3D, rope_1d, rope_3d, sincos_spatial, sincos_temporal, unpatchify


class STDiT(ModelMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
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
    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        attention: Literal["factorized", "full"] = "factorized",
        temporal: bool = True,
        qk_norm: bool = False,
        positions: Literal["sincos", "rope"] = "sincos",
        position_base: int | None = None,
        position_interpolation: float = 1.0,
        temporal_interpolation: float = 1.0,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_tokens: int = 120,
        pooled_text: bool = False,
        micro_conditions: tuple[Literal["fps", "height", "width"], ...] = (),
        learned_variance: bool = False,
        gelu: Literal["tanh", "erf"] = "tanh",
    ) -> None:
        super().__init__()
        self.settings = c = ModelConfig(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            in_channels=in_channels,
            patch_size=patch_size,
            attention=attention,
            temporal=temporal,
            qk_norm=qk_norm,
            positions=positions,
            position_base=position_base,
            position_interpolation=position_interpolation,
            temporal_interpolation=temporal_interpolation,
            num_classes=num_classes,
            text_dim=text_dim,
            text_tokens=text_tokens,
            pooled_text=pooled_text,
            micro_conditions=micro_conditions,
            learned_variance=learned_variance,
            gelu=gelu,
        )
        self.gradient_checkpointing = False
        self.patch_size: Grid = c.patch_size
        pt, ph, pw = c.patch_size
        self.out_channels = 2 * in_channels if learned_variance else in_channels

        self.x_embedder = PatchEmbed3D(in_channels, hidden_size, c.patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = None
        if num_classes is not None or text_dim is not None:
            self.y_embedder = ConditionEmbedder(hidden_size, num_classes, text_dim, text_tokens, pooled_text, gelu)
        for name in c.micro_conditions:
            self.add_module(f"{name}_embedder", TimestepEmbedder(hidden_size))
        self.blocks = nn.ModuleList(
            STDiTBlock(hidden_size, num_heads, mlp_ratio, attention, temporal, text_dim is not None, qk_norm, gelu)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, pt * ph * pw * self.out_channels)
        self._initialize_weights()

    # ------------------------------------------------------------------------------ making, loading

    @classmethod
    def from_settings(cls, settings: ModelConfig, seed: int = 0) -> STDiT:
        """The model that a config describes, its weights drawn from `seed`; torch's global random state is left alone."""
        width, depth, heads = settings.dimensions
        kwargs = settings.model_dump(exclude={"size", "hidden_size", "depth", "num_heads"})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(hidden_size=width, depth=depth, num_heads=heads, **kwargs)

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

    @torch.no_grad()
    def _initialize_weights(self) -> None:
        """As DiT and PixArt start, except that all gates are 0, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        nn.init.zeros_(_bias(proj))
        small = [*self._linears(self.t_embedder)]
        zero = [self.t_block[1], self.final_layer.linear]
        for name in self.settings.micro_conditions:
            first, last = self._linears(self.get_submodule(f"{name}_embedder"))
            small.append(first)
            zero.append(last)
        if self.y_embedder is not None:
            small += [m for m in (self.y_embedder.embedding_table, *self._linears(self.y_embedder.y_proj)) if m]
            zero += [*self._linears(self.y_embedder.pooled_proj)][1:]
        for block in self._blocks():
            block.scale_shift_table[[2, 5]] = 0.0
            if block.cross_attn is not None:
                zero.append(block.cross_attn.proj)
        for module in small:
            nn.init.normal_(module.weight, std=0.02)
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @staticmethod
    def _linears(module: nn.Module | None) -> list[Any]:
        return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Linear)]

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

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
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise or velocity, whatever the objective it is trained with asks for.

        Args:
            hidden_states: (B, C, T, H, W) noised latents.
            timestep: on 0 to 1000 (1000 is noise), float or int; a number, (1,) or (B,).
            encoder_hidden_states: (B, L, text_dim) text features; None is the null caption.
            encoder_attention_mask: (B, L), True (or 1) where a token is real; None: all are. A caption without any is null.
            class_labels: (B,) integers, -1 for null; None is null for all. Checked against num_classes on the CPU only
                (elsewhere the check would wait for the device at every step; CUDA's own assertion stops bad ones).
            drop_condition: (B,) bool, True where label and text are replaced by null (guidance dropout).
            fps, height, width: (B,) or (1,) numbers, needed where `micro_conditions` names them, else not looked at.

        Returns:
            `.sample` (B, C, T, H, W), or 2C channels with learned_variance; a 1-tuple without return_dict.

        Raises:
            ValueError: a shape or a label that does not fit, with both numbers, before any matrix product.
        """
        micro = {"fps": fps, "height": height, "width": width}
        grid = check_inputs(
            self.settings,
            hidden_states,
            encoder_hidden_states,
            encoder_attention_mask,
            {"class_labels": class_labels, "drop_condition": drop_condition},
            {"timestep": timestep, **{name: micro[name] for name in self.settings.micro_conditions}},
        )
        x = self.x_embedder(hidden_states)  # (B, N, D)
        places = self._places(grid, x)
        x = self._placed(x, grid, places)

        code = self.t_embedder(_as_vector(timestep, x.device), x.dtype)  # (B or 1, D)
        for name in self.settings.micro_conditions:
            code = code + self.get_submodule(f"{name}_embedder")(_as_vector(micro[name], x.device), x.dtype)
        text = mask = None
        if self.y_embedder is not None:
            seen = None if encoder_attention_mask is None else encoder_attention_mask.bool()
            labels = torch.full((1,), -1, device=x.device) if class_labels is None else class_labels
            condition = self.y_embedder(labels, encoder_hidden_states, seen, drop_condition, x.dtype)
            text, mask = condition.text, condition.mask
            code = code if condition.code is None else code + condition.code
        modulation = self.t_block(code).unflatten(1, (6, -1))  # (B or 1, 6, D)

        recompute = (
            self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None
        )
        for block in self.blocks:
            args = (x, text, mask, modulation, grid, places)
            x = block(*args) if recompute is None else recompute(block, *args)
        sample = unpatchify(self.final_layer(x, code), grid, self.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _places(self, grid: Grid, x: Tensor) -> Places:
        """The positions of `grid`, on x's device: tables that are made once per shape."""
        c, (t, h, w) = self.settings, grid
        full, (width, _, heads) = c.attention == "full", c.dimensions
        if c.positions == "rope":
            scales = (c.temporal_interpolation, c.position_interpolation)
            rope = rope_3d((t if full else 1, h, w), width // heads, c.position_base, scales, x.device)
            over_time = None if full else rope_1d(t, width // heads, c.temporal_interpolation, x.device)
            return Places(None, None, rope, over_time)
        spatial = sincos_spatial(h, w, width, c.position_base, c.position_interpolation, x.device, x.dtype)
        temporal = sincos_temporal(t, width, c.temporal_interpolation, full, x.device, x.dtype)
        return Places(spatial, temporal, None, None)

    def _placed(self, x: Tensor, grid: Grid, places: Places) -> Tensor:
        """(B, N, D) with sine-cosine positions added; over time too for full attention, where the first frame's is 0."""
        if places.spatial is None:
            return x
        frames = x.unflatten(1, (grid[0], -1)) + places.spatial
        if self.settings.attention == "full" and places.temporal is not None:
            frames = frames + places.temporal[:, None]
        return frames.flatten(1, 2)


def _bias(module: nn.Module) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias


def _as_vector(value: Any, device: torch.device) -> Tensor:
    """A number, (), (1,) or (B,) -> (1,) or (B,). One value expanded over a batch comes back as (1,): the batch shares it."""
    vector = torch.as_tensor(value, device=device).reshape(-1)
    return vector[:1] if vector.stride(0) == 0 else vector
