"""STDiT, a spatial-temporal diffusion transformer: one model for images and video, class labels and text.

B           batch
C           latent channels
T, H, W     latent frames, height, width; after patching, the grid of patches
S           tokens of a frame, H W
D           hidden size
L           text tokens

    x    = x_embedder(latents) + positions                            (B, T, S, D)
    c    = t_embedder(t) + class + pooled text + micro-conditions     (B, D)
    x    = block(x, y_embedder(text), t_block(c))                     depth times
    out  = unpatchify(final_layer(x, c))                              (B, C, T, H, W)

The config (stdit.config.model.ModelConfig) selects DiT, PixArt, Latte, Open-Sora, MM-DiT or a mixture. Parameter names
and shapes are those of DiT, PixArt-α and Open-Sora.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.config.load import validate
from stdit.config.model import ModelConfig
from stdit.config.train import TokenRoutingConfig
from stdit.files import apply_umask, check_regular, read_json
from stdit.integrity import check_saved, is_manifest, seal_model
from stdit.models.blocks import COMPILE_OPTIONS, BlockState, FinalLayer, STDiTBlock
from stdit.models.checks import check_config, check_inputs, check_loaded, check_residuals
from stdit.models.conditioning import ConditionInputs, Conditions, append_context_tokens, embed_conditions
from stdit.models.dynamic import (
    ComputeStats,
    DynamicOutput,
    DynamicSTDiTBlock,
    Generators,
    model_stats,
    router_noise,
    uniform,
)
from stdit.models.embeddings import ConditionEmbedder, PatchEmbed3D, TimestepEmbedder, micro_embedders, unpatchify
from stdit.models.init import init_weights, takes_model_config
from stdit.models.packing import PackedClips, packed_forward
from stdit.models.positions import Grid, PositionEmbeddings, add_positions
from stdit.models.sequence_parallel import SequenceParallel, TokenShards, gather_tokens, shard_tokens
from stdit.models.token_routing import SparseDenseFusion, drop_path_of_all, put_back, route_tokens, take_tokens


class STDiT(ModelMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    """A diffusers model: save_pretrained, from_pretrained, schedulers, LoRA, attention back ends and caches work as
    usual.

    `STDiT.from_settings(ModelConfig(...))` constructs one; `.settings` is its config.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STDiTBlock", "DynamicSTDiTBlock"]  # noqa: RUF012 (diffusers' own declarations)
    _repeated_blocks = ["STDiTBlock", "DynamicSTDiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "_embedder", "final_layer", "norm"]  # noqa: RUF012

    if TYPE_CHECKING:  # diffusers' decorator hides the signature

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    @register_to_config
    @takes_model_config
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = c = ModelConfig(**settings)
        width, depth, _ = c.dimensions
        self.gradient_checkpointing = False
        self.sequence_parallel: SequenceParallel | None = None
        self.token_routing: TokenRoutingConfig | None = None
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
        block = DynamicSTDiTBlock if c.dynamic else STDiTBlock
        self.blocks = nn.ModuleList(block(c, i) for i in range(depth))
        self.fusion = None if c.sparse_dense is None else SparseDenseFusion(width)
        self.final_layer = FinalLayer(c, pt * ph * pw * self.out_channels)
        init_weights(self)

    # -------------------------------------------------------------------------------------- forward

    def forward(
        self,
        hidden_states: Tensor | PackedClips,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        drop_condition: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        pooled_projections: Tensor | None = None,
        conditioning_frames: Tensor | None = None,
        block_residuals: Sequence[Tensor] = (),
        conditions: Conditions | None = None,
        generator: Generators = None,
        force_full: Tensor | None = None,
        path_drop: bool = False,
        dense: bool = False,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor] | tuple[Tensor, ComputeStats] | list[Tensor]:
        """Predicts noise or velocity, by the objective that the model was trained with.

        Args:
            hidden_states: (B, C, T, H, W) noised latents; or clips of several shapes with their conditions, whose
                predictions are returned as a list (stdit.models.packing).
            timestep: 0 to 1000 (1000 is noise), float or int; a number, (1,) or (B,).
            encoder_hidden_states: (B, L, text_dim) text features; None: the null caption.
            encoder_attention_mask: (B, L), True (or 1) for valid tokens; None: all. A caption without any is null.
            class_labels: (B,) integers, -1 for null; None: null for all. Range-checked on the CPU only (on a GPU the
                check would synchronise at every step; CUDA's own assertion catches bad ones).
            drop_condition: (B,) bool, True where label and text are replaced by null (classifier-free guidance).
            added_cond_kwargs: micro-conditions fps, frames, height, width (pixels) and aspect_ratio (None: height /
                width), each a number, (1,) or (B,). Required where `micro_conditions` lists them (`size`: height and
                width) and, height and width, with `position_reference`; others are ignored.
            pooled_projections: (B, pooled_dim), pooled text vector; None: zeros.
            conditioning_frames: (B, T) bool, True for latent frames that are clean: their tokens get timestep 0.
            block_residuals: (B, T, S, D) each, added after the first blocks (a control branch's output).
            conditions: from `precompute_conditions`, in place of timestep and all conditions.
            generator: for drop path, routers and token routing in training: one, or one per sample; None: torch's.
            force_full: (B,) bool, samples for which a dynamic model skips nothing (in training).
            path_drop: leave the sparse blocks out, for path-drop guidance; of a model with `sparse_dense`.
            dense: all tokens run, whatever the token routing (in training); paths are dropped as ever.

        Returns:
            `.sample` (B, C, T, H, W), 2C channels with learned_variance; a tuple without return_dict. Dynamic models in
            training add `.compute_stats` (stdit.models.dynamic.ComputeStats).

        Raises:
            ValueError: shapes or labels that do not fit, with both numbers, before any matrix product.
        """
        if isinstance(hidden_states, PackedClips):
            return packed_forward(self, hidden_states, timestep)
        inputs = ConditionInputs(
            timestep, encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels, drop_condition,
            added_cond_kwargs, conditioning_frames,
        )  # fmt: skip
        grid = check_inputs(self.settings, hidden_states, inputs, conditions)

        x, positions = self.embed_latents(hidden_states, grid, added_cond_kwargs)  # (B, T, S, D)
        cond = conditions or embed_conditions(self, inputs, x.device, x.dtype)
        full = self.settings.attention == "full"
        x, cond, positions = append_context_tokens(x, cond, positions, grid, full)
        x, positions, shards = shard_tokens(x, positions, self.sequence_parallel, full)

        states = self.block_states(x, cond, positions, grid, block_residuals, generator, force_full, shards, dense)
        if path_drop:
            states = drop_path_of_all(self.sparse_blocks(), states)
        stats = []
        for hidden, block_stats in self.run_blocks(x, cond.text, states):
            x = hidden
            stats.append(block_stats)
        compute_stats = model_stats(self.block_list(), x, stats, shards)  # None except for dynamic models in training

        x = gather_tokens(self.final_layer(x, cond.embedding, cond.final_modulation), shards)
        x = x[:, :, : grid[1] * grid[2]].flatten(1, 2)  # without in-context tokens
        sample = unpatchify(x, grid, self.patch_size, hidden_states.shape[2:])  # (B, C, T, H, W)
        return self.output(sample, compute_stats, return_dict)

    def embed_latents(
        self, hidden_states: Tensor, grid: Grid, added_cond_kwargs: Mapping[str, Any] | None
    ) -> tuple[Tensor, PositionEmbeddings]:
        """Latents (B, C, T, H, W) to tokens (B, T, S, D) with positions, and the position embeddings of the
        attentions."""
        added = added_cond_kwargs or {}
        x = self.x_embedder(hidden_states).unflatten(1, (grid[0], -1))
        pixels = (added.get("height"), added.get("width"))
        return add_positions(self.settings, (self.pos_embed, self.temp_embed), x, grid, pixels)

    def run_blocks(
        self, x: Tensor, text: Tensor | None, states: Sequence[BlockState]
    ) -> Iterator[tuple[Tensor, ComputeStats | None]]:
        """Tokens x (B, T, S, D) after each block, and what a dynamic block computed (in training)."""
        before, stats = x, None
        start, end = self.settings.sparse_dense or (0, 0)
        for i, (block, state) in enumerate(zip(self.blocks, states, strict=False)):  # fewer states: early exit
            before = x if i == start else before
            if state.path_dropped is not True:
                x, text, stats = self.run_block(block, x, text, state)
            if self.fusion is not None and i == end - 1:
                x = self.fusion(before, x, state)
            yield x, stats

    def sparse_blocks(self) -> tuple[int, int]:
        """(start, end) of the sparse blocks. ValueError: there are none."""
        if self.settings.sparse_dense is None:
            raise ValueError("path_drop (path-drop guidance) needs a model with sparse_dense; this one has none")
        return self.settings.sparse_dense

    def run_block(
        self, block: nn.Module, x: Tensor, text: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor | None, ComputeStats | None]:
        """One block, recomputed in backward with gradient checkpointing; adds a control branch's residual."""
        inner = x if state.kept is None else take_tokens(x, state.kept)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            checkpoint: Any = self._gradient_checkpointing_func
            y, text, *rest = checkpoint(block, inner, text, state)
        else:
            y, text, *rest = block(inner, text, state)
        stats = rest[0] if rest else None  # a block that diffusers' FirstBlockCache skips returns two values
        if state.kept is not None:
            y = put_back(x, y, state.kept)
        if state.residual is not None:
            y = y + state.residual
        if state.active is not None:  # samples that have exited stay as they are
            y = torch.where(state.active, y, x)
            stats = stats and stats._replace(compute=stats.compute * state.active[:, 0, 0, 0])
        return y, text, stats

    def block_states(
        self,
        x: Tensor,
        cond: Conditions,
        positions: PositionEmbeddings,
        grid: Grid,
        residuals: Sequence[Tensor] = (),
        generator: Generators = None,
        force_full: Tensor | None = None,
        shards: TokenShards | None = None,
        dense: bool = False,
    ) -> list[BlockState]:
        """The inputs of each block that runs, for tokens x (B, T, S, D)."""
        count, depth = len(self.blocks), cond.depth
        check_residuals(residuals, tuple(x.shape), count)
        drop_path = self.drop_path_factors(x, generator)
        noise, force = None, None
        if self.training and self.settings.dynamic:
            noise, force = (
                router_noise(self.settings, x, self.block_list()[0].attn_temp is not None, generator, shards),
                force_full,
            )
        if self.training and force_full is not None and depth is not None:
            depth = torch.where(force_full, count, depth)
        states = [
            BlockState(
                grid,
                positions,
                cond.modulation,
                cond.mask,
                cache=None if cond.caches is None else cond.caches[i],
                drop_path=(None, None, None)
                if drop_path is None
                else (drop_path[i, 0], drop_path[i, 1], drop_path[i, 2]),
                router_noise=None if noise is None else noise[i],
                force_full=force,
                residual=residuals[i] if i < len(residuals) else None,
                active=(depth > i)[:, None, None, None] if isinstance(depth, Tensor) else None,
                shards=shards,
            )
            for i in range(depth if isinstance(depth, int) else count)
        ]
        if self.training and self.token_routing is not None:
            routing = self.token_routing.model_copy(update={"share": 0.0}) if dense else self.token_routing
            states = route_tokens(routing, self.settings, states, x, generator)
        return states

    @staticmethod
    def output(
        sample: Tensor, compute_stats: ComputeStats | None, return_dict: bool
    ) -> Transformer2DModelOutput | tuple[Tensor] | tuple[Tensor, ComputeStats]:
        """The prediction (B, C, T, H, W) as diffusers returns it, with compute statistics if there are any."""
        if compute_stats is None:
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
        return DynamicOutput(sample=sample, compute_stats=compute_stats) if return_dict else (sample, compute_stats)

    # ---------------------------------------------------------------------------------------- parts

    def block_list(self) -> list[Any]:
        """The blocks, without nn.Module's types."""
        return list(self.blocks)

    def final_modulation(self, embedding: Tensor) -> tuple[Tensor, Tensor] | None:
        """The final layer's modulation from the embedding (B or 1, T or 1, D); None with plain norms."""
        return self.final_layer.precompute(embedding)

    def drop_path_factors(self, x: Tensor, generator: Generators) -> Tensor | None:
        """Factors of the branches of each block (depth, 3, B, 1, 1, 1), 0 or 1 / keep rate; None: all are kept.

        Stochastic depth (Huang et al. 2016), with rates rising linearly over the blocks, as in timm and PixArt.
        """
        c = self.settings
        if not self.training or c.drop_path == 0:
            return None
        _, depth, _ = c.dimensions
        keep = 1 - torch.linspace(0, c.drop_path, depth)
        drawn = uniform((depth, 3), x.shape[0], generator, x.device).permute(1, 2, 0)
        keep = keep.to(x.device)[:, None, None]
        return ((drawn < keep) / keep).to(x.dtype)[..., None, None, None]

    def set_sequence_parallel(self, parallel: SequenceParallel | None) -> None:
        """Divides the tokens of every forward pass over a group of ranks, which must all call the model, with equal
        inputs; each gets the whole prediction (stdit.models.sequence_parallel). ValueError: the architecture does not
        allow it."""
        if parallel is not None:
            self.settings.check_sequence_parallel(parallel.size)
        self.sequence_parallel = parallel

    def set_token_routing(self, routing: TokenRoutingConfig | None) -> None:
        """Has tokens bypass blocks in training (stdit.models.token_routing). ValueError: the architecture does not
        allow it."""
        if routing is not None and self.sequence_parallel is not None:
            raise ValueError("token_routing does not go with sequence parallelism: ranks would keep unequal tokens")
        if routing is not None:
            self.settings.check_token_routing(routing.start, routing.end)
        self.token_routing = routing

    # -------------------------------------------------------------------------- construction, loading

    @classmethod
    def from_settings(cls, settings: ModelConfig, seed: int = 0) -> STDiT:
        """A model from its config, initialised from `seed`; torch's global random state is left alone."""
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
        """As diffusers', and strict: safetensors by default; ValueError listing missing, unexpected and mismatched
        keys."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        config = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        check_saved(config.parent)
        check_regular(config.parent)
        if config.exists():
            found = read_json(config)
            if found.get("_class_name", cls.__name__) == cls.__name__:  # else from_config refuses it
                values = {k: v for k, v in found.items() if k in ModelConfig.model_fields}
                validate(values, ModelConfig, str(config))
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        check_loaded(str(pretrained_model_name_or_path), info)
        for parameter in model.parameters():
            # Memory-mapped weights may be unaligned, which makes matrix products slower and differ in the last digit.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'. Of a folder that has a manifest (a conversion's), that is written anew."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if folder.is_dir():  # else diffusers has said so
            apply_umask(folder, "config.json", "diffusion_pytorch_model*")
            if is_manifest(folder):
                seal_model(folder)

    def save_lora_adapter(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'."""
        super().save_lora_adapter(save_directory, *args, **kwargs)
        apply_umask(Path(save_directory), kwargs.get("weight_name") or "pytorch_lora_weights*")

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', block by block; by default without graph breaks and with dynamic shapes."""
        super().compile_repeated_blocks(*args, **COMPILE_OPTIONS | kwargs)
