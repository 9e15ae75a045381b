"""The schema of a model: one set of values for DiT, PixArt, Latte, Open-Sora, MM-DiT and what lies between them.

stdit.config passes these names on; import them from there. Written as it is into the `config.json` of the weights.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stdit.config.base import Frozen, NonNegative, Positive

Positions = Literal["sincos", "learned", "rope", "none"]
QKNorm = Literal["rms", "layer"]
MicroCondition = Literal["fps", "frames", "height", "width", "size"]


# Hidden size, depth and heads of Peebles & Xie 2023, table 1.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class ModelConfig(Frozen):
    """The space-time transformer."""

    size: Literal["S", "B", "L", "XL"] | None = None
    hidden_size: Positive | None = None
    # Blocks; of `alternating` attention, spatial and temporal ones together.
    depth: Positive | None = None
    num_heads: Positive | None = None
    in_channels: Positive = 4
    patch_size: tuple[Positive, Positive, Positive] = (1, 2, 2)
    learned_variance: bool = False

    # How blocks are told the time and the class: the four of DiT (in_context, cross_attention, adaln, adaln_zero),
    # PixArt's adaln_single, or MM-DiT's joint attention over video and text, each with weights of its own.
    conditioning: Literal["in_context", "cross_attention", "adaln", "adaln_zero", "adaln_single", "joint"] = (
        "adaln_single"
    )

    # factorized: each block attends within a frame, then over time (Open-Sora's pairs). alternating: even blocks within
    # a frame, odd ones over time (Latte, STDiT3). full: over all tokens.
    attention: Literal["factorized", "alternating", "full"] = "factorized"
    # False: no temporal attention (an image model); only `factorized` can leave it out.
    temporal: bool = True
    # factorized: whether temporal attention reads the modulated tokens, or the stream itself (Open-Sora 1.0).
    temporal_norm: bool = True
    # alternating: whether blocks over time attend to the text too (STDiT3 does, Latte does not).
    temporal_text: bool = True
    # Attention within a frame is confined to windows of so many patches a side, in these blocks (None: in all).
    window: Positive | None = None
    window_blocks: tuple[NonNegative, ...] | None = None
    # Learned positions relative to the query, in those windows.
    relative_positions: bool = False
    # Keys and values of attention within a frame are pooled over squares of so many patches a side (PixArt-Σ).
    kv_compress: Annotated[int, Field(ge=2)] | None = None
    kv_compress_blocks: tuple[NonNegative, ...] | None = None
    # Queries and keys of self-attention, and of attention to text: RMS norm per head, or LayerNorm over the full width (Σ).
    qk_norm: QKNorm | None = None
    cross_qk_norm: QKNorm | None = None
    # Stochastic depth: the last block's share of dropped branches, rising from 0 at the first (training alone).
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    # Where a token stands within its frame, and in time (None: as within the frame). rope in both places is 3D.
    positions: Positions = "sincos"
    temporal_positions: Positions | None = None
    # Where sine-cosine or learned codes of time are added: to what every temporal attention reads; to what the first one
    # reads (Open-Sora 1.0); to the stream, before the first one (Latte).
    temporal_place: Literal["attention", "first", "stream"] = "attention"
    # Grid (in patches a side) whose coordinate range every other grid is rescaled to; None: not rescaled.
    position_base: Positive | None = None
    position_interpolation: float = Field(default=1.0, gt=0)
    # Side, in pixels, at which coordinates are a square grid's own: base and interpolation follow from the clip's
    # `height` and `width` (Open-Sora 1.1 and later). None: they are the two above.
    position_reference: Positive | None = None
    # (H, W) patches of the table that grids take the centre of: the learned one's size, or SD3's pos_embed_max_size.
    position_grid: tuple[Positive, Positive] | None = None
    # Frames (in patches) of the learned table of time.
    position_frames: Positive | None = None
    temporal_interpolation: float = Field(default=1.0, gt=0)

    num_classes: Positive | None = None
    # Whether the table of classes has a row for no class; without it, no class adds nothing.
    null_class: bool = True
    text_dim: Positive | None = None
    # Longest caption, in tokens, that the model is given.
    text_tokens: Positive = 120
    text_projection: Literal["mlp", "linear"] = "mlp"
    # What stands for no caption: one learned token; a learned sequence under the caption's own mask (PixArt, Open-Sora);
    # or nothing of the model's own, but the text encoder's features of "" (diffusers, SD3).
    null_text: Literal["token", "sequence", "empty"] = "token"
    # The mean of the text's features, or a vector of this width that comes with them, is added to the code of time.
    pooled_text: bool = False
    pooled_dim: Positive | None = None
    # Also told, through networks of their own: `size` is PixArt-α 1024's height, width and aspect ratio.
    micro_conditions: tuple[MicroCondition, ...] = ()

    # conv2d, conv3d: GELU with a depth-wise convolution after it, within a frame or over time too (LocalViT).
    mlp: Literal["gelu", "swiglu", "conv2d", "conv3d"] = "gelu"
    mlp_ratio: float = Field(default=4.0, gt=0)
    gelu: Literal["tanh", "erf"] = "tanh"
    norm_eps: float = Field(default=1e-6, gt=0)
    # Of the norm before the MLP; None: norm_eps.
    mlp_norm_eps: Annotated[float, Field(gt=0)] | None = None

    # Dynamic compute (stdit/models/dynamic.py; Zhao et al. 2025, DyDiT): heads and groups of the MLP's inner channels, as
    # many as there are heads, are chosen by the time; tokens that go through the MLP by themselves.
    dynamic_width: bool = False
    dynamic_tokens: bool = False
    # Early exit: (time, blocks) pairs; at that time (0 data, 1 noise) and above only the first so many blocks run. The
    # noisiest comes first.
    exit_depths: tuple[tuple[Annotated[float, Field(gt=0, lt=1)], Positive], ...] = ()

    # Sines and cosines that a time is coded in (None: the hidden size), at frequencies 10000^(-i / (half - shift)):
    # shift 0 is DiT's and PixArt's, 1 is that of diffusers' DiT.
    timestep_width: Positive | None = 256
    timestep_shift: Literal[0, 1] = 0
    timestep_activation: Literal["silu", "gelu"] = "silu"

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
        within = {"window": self.window, "kv_compress": self.kv_compress}
        for name, value in within.items():
            blocks = getattr(self, f"{name}_blocks")
            if value is None and blocks is not None:
                raise ValueError(f"{name}_blocks without {name}")
            if value is not None and self.attention == "full":
                raise ValueError(f"{name} {value} belongs to attention within frames; attention is full")
            if value is not None and self.conditioning in ("joint", "in_context"):
                raise ValueError(f"{name} {value} does not go with conditioning {self.conditioning}")
            if value is not None and self.positions == "rope":
                raise ValueError(f"{name} {value} does not go with positions: rope")
            wrong = [i for i in blocks or () if i >= depth]
            if wrong:
                raise ValueError(f"{name}_blocks names block {wrong[0]}; depth is {depth}")
        if self.window and self.kv_compress:
            both = set(range(depth) if self.window_blocks is None else self.window_blocks) & set(
                range(depth) if self.kv_compress_blocks is None else self.kv_compress_blocks
            )
            if both:
                raise ValueError(f"block {min(both)} has both window {self.window} and kv_compress {self.kv_compress}")
        if self.relative_positions and self.window is None:
            raise ValueError("relative_positions needs window")

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
        """Which blocks have attention of their own to the text (or, as DiT's cross-attention block, to time and class)."""
        _, depth, _ = self.dimensions
        if self.conditioning in ("joint", "in_context"):
            return (False,) * depth
        told = self.text_dim is not None or self.conditioning == "cross_attention"
        skips = self.attention == "alternating" and not self.temporal_text
        return tuple(told and not (skips and i % 2) for i in range(depth))

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's constructor: these settings with the size spelt out."""
        width, depth, heads = self.dimensions
        return self.model_dump(exclude={"size"}) | {"hidden_size": width, "depth": depth, "num_heads": heads}
