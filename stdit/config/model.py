"""Model config: one schema for DiT, PixArt, Latte, Open-Sora, MM-DiT and mixtures of them.

Written unchanged into the `config.json` beside the weights.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stdit.config.base import Count, Frozen, NonNegative, Positive, Scale, Table, Width

Positions = Literal["sincos", "learned", "rope", "none"]
QKNorm = Literal["rms", "layer"]
MicroCondition = Literal["fps", "frames", "height", "width", "size"]
# How a model is conditioned on classes: by them alone, or beside captions. None: not at all.
ClassConditioning = Literal["required", "optional"] | None


def class_conditioning(num_classes: int | None, text_dim: int | None) -> ClassConditioning:
    """Of a model of these settings."""
    if num_classes is None:
        return None
    return "required" if text_dim is None else "optional"


# Hidden size, depth and heads of Peebles & Xie 2023, table 1.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class ModelConfig(Frozen):
    """Architecture of the spatial-temporal diffusion transformer (STDiT)."""

    size: Literal["S", "B", "L", "XL"] | None = None
    """Named size from the DiT paper: sets hidden_size, depth and num_heads where they are left out."""
    hidden_size: Width | None = None
    """Width of the tokens, D."""
    depth: Count | None = None
    """Number of blocks; with `alternating` attention, spatial and temporal blocks together."""
    num_heads: Count | None = None
    """Attention heads; must divide hidden_size."""
    in_channels: Width = 4
    """Channels of the latents."""
    patch_size: tuple[Count, Count, Count] = (1, 2, 2)
    """Latent frames, rows and columns per patch (t, h, w)."""
    pad_latents: bool = False
    """Latents that patches do not fill are padded with zeros at the end, and the output is cropped (STDiT3). False:
    they are refused."""
    learned_variance: bool = False
    """Predict the variance too (2 * in_channels outputs), as DiT and PixArt do under DDPM."""

    conditioning: Literal["in_context", "cross_attention", "adaln", "adaln_zero", "adaln_single", "joint"] = (
        "adaln_single"
    )
    """How timestep and class enter the blocks: the four variants of DiT (`in_context`, `cross_attention`, `adaln`,
    `adaln_zero`), PixArt's `adaln_single`, or MM-DiT's `joint` attention over video and text tokens."""

    attention: Literal["factorized", "alternating", "full"] = "factorized"
    """`factorized`: spatial then temporal attention in each block (Open-Sora 1.0). `alternating`: spatial in even
    blocks, temporal in odd ones (Latte, STDiT3). `full`: over all tokens of the clip."""
    temporal: bool = True
    """False: no temporal attention (an image model); only with `factorized`."""
    temporal_norm: bool = True
    """`factorized`: temporal attention reads normed and modulated tokens; False: the residual stream (Open-Sora
    1.0)."""
    temporal_text: bool = True
    """`alternating`: temporal blocks have cross-attention to the text too (STDiT3 yes, Latte no)."""
    window_size: Count | None = None
    """Windowed spatial attention: patches per side of a window. None: attention over the full frame."""
    window_blocks: tuple[NonNegative, ...] | None = None
    """Indices of the blocks with windowed attention. None: all."""
    relative_positions: bool = False
    """Learned relative position bias within attention windows (ViTDet, PixArt-α)."""
    kv_compress: Annotated[int, Field(ge=2, le=1024)] | None = None
    """Key/value token compression of spatial attention: patches per side that one key stands for (PixArt-Σ)."""
    kv_compress_blocks: tuple[NonNegative, ...] | None = None
    """Indices of the blocks with key/value compression. None: all."""
    kv_compress_sampling: Literal["conv", "ave", "uniform", "uniform_every"] = "conv"
    """How key/value tokens are compressed: a depth-wise convolution and a norm; or, without weights, the first patch of
    each square (`ave` and `uniform`), or every n-th token in reading order (PixArt-Σ)."""
    qk_norm: QKNorm | None = None
    """Normalisation of queries and keys in self-attention: `rms` per head, or `layer` (LayerNorm over the full
    width)."""
    cross_qk_norm: QKNorm | None = None
    """The same in cross-attention."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Stochastic depth: drop rate of the last block's residual branches, rising linearly from 0 at the first."""

    positions: Positions = "sincos"
    """Spatial position embedding. `rope` for both spatial and temporal positions is 3D RoPE."""
    temporal_positions: Positions | None = None
    """Temporal position embedding. None: the same kind as `positions`."""
    temporal_position_injection: Literal["attention", "first_attention", "residual"] = "attention"
    """Where sincos or learned temporal positions are added: to the input of every temporal attention (`attention`), of
    the first one only (`first_attention`, Open-Sora 1.0), or to the residual stream before the first one (`residual`,
    Latte)."""
    position_base: Width | None = None
    """Patches per side of the grid whose coordinate range all grids are rescaled to. None: no rescaling."""
    position_interpolation: Scale = 1.0
    """Spatial coordinates are divided by this (PixArt: resolution / 512)."""
    position_reference: Width | None = None
    """Resolution, in pixels, at which coordinates are unscaled: base and interpolation follow from each clip's height
    and width (Open-Sora 1.1 and later)."""
    position_grid: tuple[Width, Width] | None = None
    """(H, W) patches of the spatial position table; smaller grids use its centre crop (SD3's pos_embed_max_size)."""
    position_frames: Width | None = None
    """Length, in patches, of the learned temporal position table."""
    temporal_interpolation: Scale = 1.0
    """Temporal coordinates are divided by this."""

    num_classes: Table | None = None
    """Class labels. None: no class conditioning."""
    null_class: bool = True
    """The class table has a row for the null class; False: the null class adds nothing."""
    text_dim: Width | None = None
    """Width of the text encoder's features. None: no text conditioning."""
    max_text_tokens: Width = 120
    """Longest caption, in tokens."""
    text_projection: Literal["mlp", "linear"] = "mlp"
    """Projection of text features to hidden_size."""
    null_text: Literal["token", "sequence", "empty"] = "token"
    """Null caption: one learned token; a learned `sequence` under the caption's mask (PixArt, Open-Sora); or `empty`,
    the text encoder's features of "" (diffusers, SD3)."""
    pooled_text: bool = False
    """Add the mean of the text features to the timestep embedding."""
    pooled_dim: Width | None = None
    """Width of a pooled text vector (CLIP's) that is added to the timestep embedding. None: there is none."""
    micro_conditions: tuple[MicroCondition, ...] = ()
    """Micro-conditions, embedded and added to the timestep embedding; `size` is PixArt-α 1024's height, width and
    aspect ratio."""

    mlp: Literal["gelu", "swiglu", "conv2d", "conv3d"] = "gelu"
    """Feed-forward network; conv2d and conv3d add a depth-wise convolution within frames or over time (LocalViT)."""
    mlp_ratio: float = Field(default=4.0, gt=0, le=64)
    """Inner width of the MLP over hidden_size (SwiGLU: 2/3 of it, at equal parameters)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU by its tanh approximation, or exact."""
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    """Epsilon of the LayerNorms."""
    mlp_norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    """Epsilon of the LayerNorm before the MLP. None: norm_eps."""

    dynamic_width: bool = False
    """Timestep-dependent width: routers choose attention heads and channel groups of the MLP (DyDiT)."""
    dynamic_tokens: bool = False
    """Token skipping: routers choose the tokens that go through the MLP (DyDiT)."""
    exit_depths: tuple[tuple[Annotated[float, Field(gt=0, lt=1)], Positive], ...] = ()
    """Early exit: (t, blocks) pairs, noisiest first; from t (0 data, 1 noise) upwards only the first `blocks` blocks
    run."""

    sparse_dense: tuple[Positive, Positive] | None = None
    """Sparse-dense residual fusion (SPRINT, arXiv 2510.21986): (start, end). Blocks start … end - 1 may run on a share
    of the tokens (`train.token_routing`) or, in sampling, not at all; their output is fused with that of the blocks
    before. None: off."""

    timestep_width: Width | None = 256
    """Channels of the sinusoidal timestep embedding. None: hidden_size."""
    timestep_freq_shift: Literal[0, 1] = 0
    """Frequencies are 10000^(-i / (half - shift)): 0 in DiT and PixArt, 1 in diffusers' DiT."""
    timestep_activation: Literal["silu", "gelu"] = "silu"
    """Activation of the timestep embedder's MLP."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.size is None:
            missing = [k for k in ("hidden_size", "depth", "num_heads") if getattr(self, k) is None]
            if missing:
                raise ValueError(
                    f"give size (one of {', '.join(SIZES)}) or hidden_size, depth and num_heads; missing: {', '.join(missing)}"
                )
        self._check_widths()
        self._check_attention()
        self._check_positions()
        self._check_conditions()
        self._check_dynamic()
        self._check_sparse_dense()
        return self

    def _check_widths(self) -> None:
        width, _, heads = self.dimensions
        if width % heads:
            raise ValueError(f"hidden_size {width} is not divisible by num_heads {heads}")
        head = f"head width {width // heads} (hidden_size {width} / num_heads {heads})"
        if "sincos" in (self.positions, self.time_positions) and width % 4:
            raise ValueError(f"hidden_size {width} is not divisible by 4, which sine-cosine positions need")
        if "rope" in (self.positions, self.time_positions) and (width // heads) % 2:
            raise ValueError(f"{head} is odd; RoPE needs pairs")
        if self.positions == "rope" and width // heads < 6:
            raise ValueError(f"{head} is below 6; RoPE needs a pair for each of t, h, w")
        if "size" in self.micro_conditions and width % 3:
            raise ValueError(f"hidden_size {width} is not divisible by 3, which micro-condition size needs")
        if (self.timestep_width or width) % 2:
            raise ValueError(f"timestep_width {self.timestep_width or width} is odd; sines and cosines come in pairs")

    def _check_attention(self) -> None:
        _, depth, _ = self.dimensions
        if not self.temporal and self.attention != "factorized":
            raise ValueError(
                f"temporal: false belongs to attention: factorized; {self.attention} attention has no temporal part to leave out"
            )
        if self.attention == "alternating" and depth % 2:
            raise ValueError(
                f"depth {depth} is odd; alternating attention needs as many temporal blocks as spatial ones"
            )
        within = {"window_size": self.window_size, "kv_compress": self.kv_compress}
        for name, value in within.items():
            blocks = getattr(self, f"{name.removesuffix('_size')}_blocks")
            if value is None and blocks is not None:
                raise ValueError(f"{name.removesuffix('_size')}_blocks without {name}")
            if value is not None and self.attention == "full":
                raise ValueError(f"{name} {value} belongs to attention within frames; attention is full")
            if value is not None and self.conditioning in ("joint", "in_context"):
                raise ValueError(f"{name} {value} does not go with conditioning {self.conditioning}")
            if value is not None and self.positions == "rope":
                raise ValueError(f"{name} {value} does not go with positions: rope")
            wrong = [i for i in blocks or () if i >= depth]
            if wrong:
                raise ValueError(f"{name.removesuffix('_size')}_blocks names block {wrong[0]}; depth is {depth}")
        if self.window_size and self.kv_compress:
            both = set(range(depth) if self.window_blocks is None else self.window_blocks) & set(
                range(depth) if self.kv_compress_blocks is None else self.kv_compress_blocks
            )
            if both:
                raise ValueError(
                    f"block {min(both)} has both window_size {self.window_size} and kv_compress {self.kv_compress}"
                )
        if self.kv_compress is None and self.kv_compress_sampling != "conv":
            raise ValueError(f"kv_compress_sampling {self.kv_compress_sampling} needs kv_compress")
        if self.relative_positions and self.window_size is None:
            raise ValueError("relative_positions needs window_size")

    def _check_positions(self) -> None:
        if self.positions == "learned" and self.position_grid is None:
            raise ValueError("positions: learned needs position_grid, the (H, W) patches of its table")
        if self.time_positions == "learned" and self.has_time and self.position_frames is None:
            raise ValueError("learned temporal positions need position_frames, the frames of their table")
        if self.position_reference and (self.position_base or self.position_interpolation != 1.0 or self.position_grid):
            raise ValueError(
                "position_reference sets base and interpolation itself; leave out position_base, position_interpolation and position_grid"
            )
        if self.attention == "full" and self.positions == "rope" and self.time_positions not in ("rope", "none"):
            raise ValueError(f"3D rope has no temporal_positions: {self.time_positions}")

    def _check_conditions(self) -> None:
        if self.pooled_text and self.text_dim is None:
            raise ValueError("pooled_text needs text_dim")
        if self.pooled_text and self.pooled_dim is not None:
            raise ValueError(f"give pooled_text (the features' mean) or pooled_dim {self.pooled_dim}, not both")
        if self.conditioning == "joint" and self.text_dim is None:
            raise ValueError("conditioning: joint needs text_dim, the text that it attends to jointly")
        if self.conditioning == "joint" and self.attention == "alternating":
            raise ValueError("conditioning: joint goes with attention full or factorized, not alternating")
        if self.conditioning == "joint" and self.mlp in ("conv2d", "conv3d"):
            raise ValueError(f"mlp {self.mlp} needs a grid of patches, which joint attention's text is not")
        if self.conditioning == "in_context" and self.mlp in ("conv2d", "conv3d"):
            raise ValueError(f"mlp {self.mlp} needs a grid of patches, which in-context tokens are not on")

    def _check_dynamic(self) -> None:
        width, depth, heads = self.dimensions
        for name in ("dynamic_width", "dynamic_tokens"):
            if getattr(self, name) and self.conditioning == "joint":
                raise ValueError(f"{name} does not go with conditioning joint")
            if getattr(self, name) and self.mlp in ("conv2d", "conv3d"):
                raise ValueError(f"{name} does not go with mlp {self.mlp}, which needs every patch's every channel")
        if self.dynamic_width and heads < 2:
            raise ValueError(
                f"dynamic_width with num_heads {heads}: the first head always runs, so there must be 2 or more"
            )
        if self.dynamic_width and self.mlp_width % heads:
            raise ValueError(
                f"dynamic_width: the MLP's {self.mlp_width} inner channels (hidden_size {width}, mlp_ratio {self.mlp_ratio}) are not divisible by num_heads {heads}"
            )
        if self.dynamic_width and self.qk_norm == "layer":
            raise ValueError("dynamic_width does not go with qk_norm: layer, which norms all heads together")
        if self.dynamic_width and self.kv_compress:
            raise ValueError(
                f"dynamic_width does not go with kv_compress {self.kv_compress}, which norms all heads together"
            )
        for i, (time, blocks) in enumerate(self.exit_depths):
            if blocks > depth:
                raise ValueError(f"exit_depths: {blocks} blocks from time {time} up; depth is {depth}")
            if i and (time >= self.exit_depths[i - 1][0] or blocks <= self.exit_depths[i - 1][1]):
                raise ValueError(
                    f"exit_depths: times must fall and blocks rise, found {list(self.exit_depths[i - 1])} before {[time, blocks]}"
                )

    def _check_sparse_dense(self) -> None:
        if self.sparse_dense is None:
            return
        _, depth, _ = self.dimensions
        start, end = self.sparse_dense
        if not start < end < depth:
            raise ValueError(
                f"sparse_dense {[start, end]}: expected 0 < start < end < depth {depth}, with dense blocks on both sides"
            )
        if self.conditioning == "joint":
            raise ValueError(
                "sparse_dense does not go with conditioning joint: the text goes through the sparse blocks too"
            )
        if self.dynamic or self.exit_depths:
            raise ValueError(
                "sparse_dense does not go with dynamic_width, dynamic_tokens and exit_depths, which choose by sample what runs"
            )

    def check_sequence_parallel(self, ranks: int) -> None:
        """ValueError: attention or MLP of this architecture can't be divided over so many ranks."""
        _, _, heads = self.dimensions
        if self.attention == "full" and heads < ranks:
            raise ValueError(f"sequence_parallel {ranks}: full attention divides heads, and num_heads is {heads}")
        if ranks > 1 and self.mlp == "conv3d":
            raise ValueError(f"sequence_parallel {ranks}: mlp conv3d needs every frame of every patch on one rank")

    def check_packing(self) -> None:
        """ValueError: clips of several shapes cannot share a sequence in this architecture."""
        where = "packed sequences"
        if self.conditioning in ("joint", "in_context"):
            raise ValueError(
                f"{where}: conditioning {self.conditioning} has text or conditions among the tokens, which are not packed"
            )
        if self.mlp in ("conv2d", "conv3d"):
            raise ValueError(f"{where}: mlp {self.mlp} needs a grid of patches, which tokens of several clips are not")
        for name in ("window_size", "kv_compress"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{where}: {name} {value} needs a grid of patches, which tokens of several clips are not"
                )
        if self.dynamic or self.exit_depths:
            raise ValueError(f"{where}: dynamic_width, dynamic_tokens and exit_depths choose by sample what runs")
        if self.sparse_dense:
            raise ValueError(f"{where}: sparse_dense {list(self.sparse_dense)} fuses the tokens of one grid of patches")

    def check_token_routing(self, start: int, end: int) -> None:
        """ValueError: tokens cannot bypass blocks start … end - 1 of this architecture."""
        _, depth, _ = self.dimensions
        where = f"token_routing of blocks {start} to {end - 1}"
        if not start < end <= depth:
            raise ValueError(f"token_routing has start {start}, end {end}: expected 0 <= start < end <= depth {depth}")
        if self.sparse_dense not in (None, (start, end)):
            raise ValueError(
                f"token_routing has start {start}, end {end}; the model's sparse_dense is {list(self.sparse_dense or ())}"
            )
        if self.dynamic:
            raise ValueError(f"{where} does not go with dynamic_width and dynamic_tokens, whose routers see all tokens")
        if self.mlp in ("conv2d", "conv3d"):
            raise ValueError(f"{where}: mlp {self.mlp} needs a grid of patches, which the tokens that are kept are not")
        for name, chosen in (("window_size", self.window_blocks), ("kv_compress", self.kv_compress_blocks)):
            blocks = set(range(start, end)) & set(range(depth) if chosen is None else chosen)
            if getattr(self, name) is not None and blocks and self.attention != "full":
                raise ValueError(
                    f"{where}: {name} {getattr(self, name)} of block {min(blocks)} needs a grid of patches, which the tokens "
                    "that are kept are not"
                )

    def check_alignment(self, block: int, target: str = "latents") -> None:
        """ValueError: the output of this block cannot be aligned to `target` (AlignmentConfig)."""
        _, depth, _ = self.dimensions
        if block >= depth:
            raise ValueError(f"alignment.block {block}: expected 0 to {depth - 1}, as depth is {depth}")
        if self.exit_depths and (least := self.exit_depths[0][1]) <= block:
            raise ValueError(
                f"alignment.block {block}: with exit_depths {list(self.exit_depths[0])} only {least} blocks run"
            )
        if target == "latents" and self.patch_values == 1:
            raise ValueError(
                f"alignment: patches of {list(self.patch_size)} with in_channels {self.in_channels} are single numbers, which have no direction"
            )

    @property
    def patch_values(self) -> int:
        """Numbers in a patch of the latents."""
        return self.in_channels * math.prod(self.patch_size)

    @property
    def dynamic(self) -> bool:
        """Whether parts of the blocks are chosen, by routers that are trained."""
        return self.dynamic_width or self.dynamic_tokens

    @property
    def mlp_width(self) -> int:
        """Inner channels of the MLP: of SwiGLU 2/3 of the others', so that it weighs the same."""
        width, _, _ = self.dimensions
        if self.mlp == "swiglu":
            return 8 * round(width * self.mlp_ratio * 2 / 3 / 8) or 8
        return int(width * self.mlp_ratio)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(hidden size, depth, heads), from the size table unless given."""
        table = SIZES[self.size] if self.size else (0, 0, 0)
        return (self.hidden_size or table[0], self.depth or table[1], self.num_heads or table[2])

    @property
    def has_time(self) -> bool:
        """Whether any attention sees more than one frame."""
        return self.temporal or self.attention != "factorized"

    @property
    def time_positions(self) -> Positions:
        return self.temporal_positions or self.positions

    @property
    def block_text(self) -> tuple[bool, ...]:
        """Which blocks have attention of their own to the text (or, as DiT's cross-attention block, to time and
        class)."""
        _, depth, _ = self.dimensions
        if self.conditioning in ("joint", "in_context"):
            return (False,) * depth
        takes_text = self.text_dim is not None or self.conditioning == "cross_attention"
        skips = self.attention == "alternating" and not self.temporal_text
        return tuple(takes_text and not (skips and i % 2) for i in range(depth))

    def at_width(self, hidden_size: int) -> ModelConfig:
        """The same architecture with another hidden size, and heads as wide as now. ValueError: no whole number of
        them."""
        width, _, heads = self.dimensions
        if hidden_size % (width // heads):
            raise ValueError(
                f"hidden size {hidden_size} is no multiple of the width of a head, {width // heads} (hidden_size {width}, num_heads {heads})"
            )
        return ModelConfig(
            **{**self.model_kwargs(), "hidden_size": hidden_size, "num_heads": hidden_size * heads // width}
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's constructor: these settings with the size spelt out."""
        width, depth, heads = self.dimensions
        return self.model_dump(exclude={"size"}) | {"hidden_size": width, "depth": depth, "num_heads": heads}
