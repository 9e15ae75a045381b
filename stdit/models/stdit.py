"""STDiT, the space-time diffusion transformer: one model for images and video, class labels and text.

B batch · C latent channels · (T, H, W) latent frames, height, width, then patches · S = H W · D hidden size · L text tokens

    tokens = x_embedder(latents) + positions      code = t_embedder(t) + class + pooled text + fps, size, …
    for block in blocks: tokens, text = block(tokens, y_embedder(text), t_block(code))
    prediction = unpatchify(final_layer(tokens, code))

Its config (stdit.modelconfig.ModelConfig) says which of the published models it is. Parameter names are those of DiT,
PixArt-α and Open-Sora, whose weights have the same shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.modelconfig import ModelConfig
from stdit.models.blocks import COMPILED, AdaLN, FinalLayer, Places, Prepared, Signals, STDiTBlock
from stdit.models.checks import check_config, check_inputs, check_loaded
from stdit.models.conditioning import ConditionEmbedder, TimestepEmbedder, Told
from stdit.models.dynamic import (
    Dynamic,
    DynamicOutput,
    Generators,
    Noise,
    Used,
    depths,
    is_shared,
    noises,
    total,
    uniform,
)
from stdit.models.embeddings import (
    Grid,
    PatchEmbed3D,
    centre,
    rope_1d,
    rope_3d,
    sincos_spatial,
    sincos_temporal,
    unpatchify,
    with_still,
)
from stdit.models.partial import cut_ahead


class Conditions(NamedTuple):
    """Everything that the tokens are told at one time. code (B or 1, T or 1, D); text (B or 1, L, D) or None; mask
    (B, 1, 1, keys) bool or None; tokens (B or 1, T or 1, K, D), in-context ones; prepared: what each block made of it;
    depth: how many blocks run, one number or each sample's, (B or 1,); None: all."""

    code: Tensor
    signals: Signals
    text: Tensor | None
    mask: Tensor | None
    tokens: Tensor | None
    prepared: tuple[Prepared, ...] | None = None
    final: tuple[Tensor, Tensor] | None = None
    depth: Tensor | int | None = None


class Known(NamedTuple):
    """What the conditions come to but for the time. rest (B or 1, D): what is added to its code; keys_values: of each block."""

    rest: Tensor | None
    told: Told
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...]


def takes_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Gives a constructor the keywords of ModelConfig, beside its own, so that diffusers' config.json holds them one by one."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(name, kind, default=field.get_default() if not field.is_required() else inspect.Parameter.empty)
        for name, field in ModelConfig.model_fields.items()
        if name != "size"
    ]
    init.__signature__ = inspect.Signature([*own, *fields])  # pyright: ignore[reportFunctionMemberAccess]
    return init


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
        self.t_embedder = TimestepEmbedder(width, c.timestep_width or width, c.timestep_shift, c.timestep_activation)
        self.t_block = None
        if c.conditioning == "adaln_single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = None
        if c.num_classes is not None or c.text_dim is not None or c.pooled_dim is not None:
            self.y_embedder = ConditionEmbedder(c)
        for name, outputs in _micro_embedders(c).items():
            self.add_module(name, TimestepEmbedder(outputs))
        self.blocks = nn.ModuleList(STDiTBlock(c, i) for i in range(depth))
        self.final_layer = FinalLayer(c, pt * ph * pw * self.out_channels)
        self._initialize_weights()

    # ------------------------------------------------------------------------------ making, loading

    @classmethod
    def from_settings(cls, settings: ModelConfig, seed: int = 0) -> STDiT:
        """The model that a config describes, its weights drawn from `seed`; torch's global random state is left alone."""
        kwargs = settings.model_kwargs()
        del kwargs["size"]
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

    @torch.no_grad()
    def _initialize_weights(self) -> None:
        """As DiT, PixArt and LocalViT start, except that all gates are 0, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(_bias(module))
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        nn.init.zeros_(_bias(proj))
        for table in (self.pos_embed, self.temp_embed):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        small: list[Any] = [*_linears(self.t_embedder)]
        zero: list[Any] = [self.final_layer.linear]
        zero += [] if self.t_block is None else [self.t_block[1]]
        for name in _micro_embedders(self.settings):
            first, last = _linears(self.get_submodule(name))
            small.append(first)
            zero.append(last)
        if self.y_embedder is not None:
            small += [m for m in (self.y_embedder.embedding_table, *_linears(self.y_embedder.y_proj)) if m]
            zero += _linears(self.y_embedder.pooled_proj)[1:] if self.settings.pooled_text else []
        for module in self.modules():
            if isinstance(module, AdaLN):
                zero += _linears(module)
            if isinstance(module, Dynamic):
                module.open()
        for block in self._blocks():
            if self.settings.conditioning == "adaln_single":
                block.scale_shift_table[[2, 5]] = 0.0
            if block.cross_attn is not None:
                zero.append(block.cross_attn.proj)
            if block.attn.sr is not None:  # starts as the mean
                nn.init.constant_(block.attn.sr.weight, 1 / block.attn.sr.weight[0, 0].numel())
                nn.init.zeros_(block.attn.sr.bias)
        for module in small:
            nn.init.normal_(module.weight, std=0.02)
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

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
        given_frames: Tensor | None = None,
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
            given_frames: (B, T) bool, True for latent frames that are given, not drawn: they are told time 0.
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
            self.settings, hidden_states, timestep, text, class_labels, drop_condition, given_frames, micro, conditions
        )
        tokens = self.x_embedder(hidden_states)  # (B, T S, D)
        x, places = self._placed(tokens.unflatten(1, (grid[0], -1)), grid, (height, width))
        if conditions is None:
            conditions = self._conditions(timestep, text, class_labels, drop_condition, given_frames, micro, x)
        x, places, conditions = self._joined(x, places, conditions, grid)

        recompute = (
            self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None
        )
        words, kept = conditions.text, self._kept(x, generator)
        noise, used, depth = self._noises(x, generator), [], conditions.depth
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

    def _joined(self, x: Tensor, places: Places, conditions: Conditions, grid: Grid) -> tuple[Tensor, Places, Conditions]:
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

    @property
    def _full(self) -> bool:
        return self.settings.attention == "full"

    # ------------------------------------------------------------------------------------ conditions

    @torch.no_grad()
    def prepare(
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        class_labels: Tensor | None = None,
        drop_condition: Tensor | None = None,
        given_frames: Tensor | None = None,
        known: Known | None = None,
        **micro: Tensor | None,
    ) -> list[Conditions]:
        """What `forward` takes as `conditions`, for each of `timesteps` (N,), the rest as forward's: all times in one
        product, the text and its keys and values once. Memory: N times each block's modulation.

        known: of `know`, in place of all but given_frames; it serves any number of calls."""
        weight = self.x_embedder.proj.weight
        if known is None:
            text = (encoder_hidden_states, encoder_attention_mask, pooled_projections)
            known = self.know(text, class_labels, drop_condition, micro)
        rest, told, keys_values = known
        time = self.t_embedder(timesteps.to(weight.device), weight.dtype)
        own = code = time[:, None, None]  # (N, 1, 1, D)
        if given_frames is not None:
            still = self.t_embedder(torch.zeros(1, device=weight.device), weight.dtype)
            code = torch.where(self._given(given_frames)[..., None], still, code)
        code, own = (c if rest is None else c + rest[:, None] for c in (code, own))  # (N, B or 1, T or 1, D)
        if self.settings.conditioning in ("in_context", "cross_attention"):
            each = [self._assembled(*both, told) for both in zip(code, own, strict=True)]
            return self._timed_each(each, timesteps, time)
        steps = len(timesteps)
        whole = self._assembled(code.flatten(0, 1), own.flatten(0, 1), told)
        prepared = [block.prepare(whole.signals) for block in self._blocks()]
        final = self.final_layer.prepare(whole.code)

        def at(step: int, made: Any) -> Any:
            """Of what has all steps along its first axis, one's."""
            if isinstance(made, Tensor):
                return made.unflatten(0, (steps, -1))[step]
            return made and tuple(at(step, m) for m in made)

        each = [
            whole._replace(
                code=at(step, whole.code),
                signals=Signals(*at(step, whole.signals)),
                prepared=tuple(
                    Prepared(at(step, p.modulation), at(step, p.text_modulation), kv)
                    for p, kv in zip(prepared, keys_values, strict=True)
                ),
                final=at(step, final),
            )
            for step in range(steps)
        ]
        return self._timed_each(each, timesteps, time)

    def _timed_each(self, each: list[Conditions], times: Tensor, time: Tensor) -> list[Conditions]:
        """The conditions of each of `times` (N,), whose codes are `time` (N, D), with what dynamic compute goes by."""
        c = self.settings
        if c.dynamic_width and not self.training:
            ahead = cut_ahead([(block.parts, block.dynamic.choose(time, None, None)) for block in self._blocks()])
            each = [
                made if made.prepared is None else made._replace(
                    prepared=tuple(p._replace(parts=parts) for p, parts in zip(made.prepared, cuts, strict=True))
                )
                for made, cuts in zip(each, ahead, strict=True)
            ]
        return [self._timed(*one) for one in zip(each, times.split(1), time.split(1), strict=True)]

    def _timed(self, conditions: Conditions, times: Tensor, time: Tensor) -> Conditions:
        """Conditions of times (B or 1,), whose codes are `time`, with what dynamic compute goes by: at inference one time
        for the batch, where it has one, so that only what is chosen runs."""
        c = self.settings
        if not (c.dynamic_width or c.exit_depths):
            return conditions
        one = not self.training and is_shared(times)
        if c.dynamic_width:
            signals = conditions.signals._replace(time=time[:1] if one else time)
            conditions = conditions._replace(signals=signals)
        if c.exit_depths:
            depth = depths(c, times)
            conditions = conditions._replace(depth=int(depth[0]) if one else depth)
        return conditions

    @torch.no_grad()
    def know(
        self,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop_condition: Tensor | None,
        micro: dict[str, Any],
    ) -> Known:
        """The part of `prepare` that no time enters. text: features, mask and pooled vector."""
        weight = self.x_embedder.proj.weight
        rest, told = self._told(text, class_labels, drop_condition, micro, weight.device, weight.dtype)
        reads = told.text is not None and self.settings.conditioning != "cross_attention"  # that text has the time in it
        crosses = [block.cross_attn for block in self._blocks()]
        return Known(rest, told, tuple(c.keys_values(told.text) if c is not None and reads else None for c in crosses))

    def _conditions(
        self,
        timestep: Tensor | float,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop: Tensor | None,
        given_frames: Tensor | None,
        micro: dict[str, Any],
        x: Tensor,
    ) -> Conditions:
        rest, told = self._told(text, class_labels, drop, micro, x.device, x.dtype)
        times = _as_vector(timestep, x.device)
        time = self.t_embedder(times, x.dtype)  # (B or 1, D)
        own = code = time[:, None]
        if given_frames is not None:
            still = self.t_embedder(torch.zeros(1, device=x.device), x.dtype)
            code = torch.where(self._given(given_frames)[..., None], still, code)
        code, own = (c if rest is None else c + rest[:, None] for c in (code, own))
        return self._timed(self._assembled(code, own, told), times, time)

    def _given(self, given_frames: Tensor) -> Tensor:
        """(B, T) of latent frames -> (B, T) of patches: those of which every frame is given."""
        return given_frames.bool().unflatten(1, (-1, self.patch_size[0])).all(2)

    def _told(
        self,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop: Tensor | None,
        micro: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Told]:
        """What is added to the code of the time, (B or 1, D) or None, and what comes of text and class."""
        told = Told(None, None, None)
        if self.y_embedder is not None:
            features, mask, pooled = text
            seen = None if mask is None else mask.bool()
            told = self.y_embedder(class_labels, features, seen, pooled, drop, dtype)
        codes = [self._micro(name, micro, device, dtype) for name in self.settings.micro_conditions]
        if told.code is not None and self.settings.conditioning not in ("in_context", "cross_attention"):
            codes.append(told.code)
        return (sum(codes[1:], codes[0]) if codes else None), told

    def _micro(self, name: str, micro: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """A micro-condition's code, (B or 1, D)."""
        if name != "size":
            return self.get_submodule(f"{name}_embedder")(_as_vector(micro[name], device), dtype)
        height, width = (_as_vector(micro[n], device).float() for n in ("height", "width"))
        ratio = micro.get("aspect_ratio")
        ratio = height / width if ratio is None else _as_vector(ratio, device)
        size, aspect = self.get_submodule("csize_embedder"), self.get_submodule("ar_embedder")
        thirds = torch.broadcast_tensors(size(height, dtype), size(width, dtype), aspect(ratio, dtype))
        return torch.cat(thirds, dim=1)

    def _assembled(self, code: Tensor, own: Tensor, told: Told) -> Conditions:
        """The conditions of a code (B or 1, T or 1, D); own (B or 1, 1, D): the same without given frames."""
        c = self.settings
        if c.conditioning == "adaln_single":
            assert self.t_block is not None
            return Conditions(code, Signals(self.t_block(code)), told.text, told.mask, None)
        if c.conditioning in ("adaln", "adaln_zero", "joint"):
            signal = F.silu(code)
            per_text = F.silu(own) if self._full else signal
            return Conditions(signal, Signals(signal, per_text), told.text, told.mask, None)
        # Time and class are tokens, which come before the text's.
        tokens = code[:, :, None]  # (B or 1, T or 1, 1, D)
        if told.code is not None:
            label = told.code[:, None, None].expand(-1, tokens.shape[1], -1, -1)
            tokens = torch.cat(_with_batch(tokens, label), dim=2)
        text, mask = told.text, told.mask
        if c.conditioning == "cross_attention":
            tokens = tokens[:, 0]
            text = tokens if text is None else torch.cat(_with_batch(tokens, text), dim=1)
            mask = None if mask is None else F.pad(mask, (tokens.shape[1], 0), value=True)
            return Conditions(code, Signals(None), text, mask, None)
        if text is not None:
            tokens = torch.cat(_with_batch(tokens, text[:, None].expand(-1, tokens.shape[1], -1, -1)), dim=2)
        return Conditions(code, Signals(None), None, mask, tokens)

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

    # ------------------------------------------------------------------------------------- positions

    def _placed(self, x: Tensor, grid: Grid, pixels: tuple[Any, Any]) -> tuple[Tensor, Places]:
        """Tokens (B, T, S, D) with what is added to them for their places, and what attention needs to know of these."""
        c, (t, h, w) = self.settings, grid
        base, interpolation = c.position_base, c.position_interpolation
        if c.position_reference is not None:
            height, width = (float(_as_vector(p, torch.device("cpu"))[0]) for p in pixels)
            base, interpolation = round((h * w) ** 0.5), (height * width) ** 0.5 / c.position_reference
        size, _, heads = c.dimensions
        spatial = temporal = rope = rope_temp = None
        if c.positions == "sincos":
            spatial = sincos_spatial(h, w, size, base, interpolation, c.position_grid, x.device, x.dtype)
        elif self.pos_embed is not None and c.position_grid is not None:
            rows, columns = centre(c.position_grid[0], h), centre(c.position_grid[1], w)
            spatial = self.pos_embed[0].unflatten(0, c.position_grid)[rows, columns].flatten(0, 1)
        elif c.positions == "rope":
            full = self._full and c.time_positions == "rope"
            scales = (c.temporal_interpolation, interpolation)
            rope = rope_3d((t if full else 1, h, w), size // heads, base, scales, x.device)
            if self._full and not full:
                rope = type(rope)(*(r.repeat(t, 1, 1) for r in rope))
        if c.time_positions == "sincos":
            temporal = sincos_temporal(t, size, c.temporal_interpolation, self._full, x.device, x.dtype)
        elif self.temp_embed is not None:
            temporal = self.temp_embed[0, :t]
            temporal = temporal - temporal[:1] if self._full else temporal
        elif c.time_positions == "rope" and rope is None and self._full:
            over_time = rope_1d(t, size // heads, c.temporal_interpolation, x.device)
            rope = type(over_time)(*(r.repeat_interleave(h * w, 0) for r in over_time))
        elif c.time_positions == "rope" and not self._full:
            rope_temp = rope_1d(t, size // heads, c.temporal_interpolation, x.device)
        if spatial is not None:
            x = x + spatial
        if self._full and temporal is not None:  # the first frame's is 0
            x = x + temporal[:, None]
        return x, Places(spatial, temporal, rope, rope_temp)


def _micro_embedders(config: ModelConfig) -> dict[str, int]:
    """Names and widths of the networks of the micro-conditions."""
    width, _, _ = config.dimensions
    found = {f"{name}_embedder": width for name in config.micro_conditions if name != "size"}
    if "size" in config.micro_conditions:
        found |= {"csize_embedder": width // 3, "ar_embedder": width // 3}
    return found


def _linears(module: nn.Module | None) -> list[Any]:
    return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Linear)]


def _bias(module: nn.Module) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias


def _with_batch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger batch of the two; one may be 1."""
    batch = max(a.shape[0], b.shape[0])
    return a.expand(batch, *a.shape[1:]), b.expand(batch, *b.shape[1:])


def _as_vector(value: Any, device: torch.device) -> Tensor:
    """A number, (), (1,) or (B,) -> (1,) or (B,). One value expanded over a batch comes back as (1,): the batch shares it."""
    vector = torch.as_tensor(value, device=device).reshape(-1)
    return vector[:1] if vector.stride(0) == 0 else vector
