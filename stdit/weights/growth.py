"""What each change of architecture covers in the config, and what it does to the weights. Used by stdit.weights.transfer.

Every change joins so that outputs stay what they were, as far as that can be, and says where it cannot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.stdit import STDiT

# Settings of where patches and frames stand, that may change with resolution and duration.
POSITIONS = {
    "position_base",
    "position_interpolation",
    "position_reference",
    "position_grid",
    "position_frames",
    "temporal_interpolation",
}
# Settings that say nothing in a model that sees one frame at a time, or reads no text.
_TIME = {
    "temporal_positions",
    "temporal_norm",
    "temporal_position_injection",
    "position_frames",
    "temporal_interpolation",
}
_TEXT = {"max_text_tokens", "text_projection", "null_text"}
# Settings that name blocks: a block's number doubles where temporal blocks come between.
_BLOCKS = ("window_blocks", "kv_compress_blocks")
# The time at which modulation by a network of each block's and by one for all agree (PixArt-α, section 2.3).
SINGLE_TIME = 500.0


@dataclass
class Growth:
    """Weights on their way: `before` of the source, `fresh` as the target is newly made, `after` as it will be; `kept`:
    which name of the source each name of the target has its weights from."""

    source: STDiT
    new: ModelConfig
    before: dict[str, Tensor]
    fresh: dict[str, Tensor]
    after: dict[str, Tensor]
    kept: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def old(self) -> ModelConfig:
        return self.source.settings


# ------------------------------------------------------------------------------ which changes there are


def is_image(config: ModelConfig) -> bool:
    """Whether this model knows nothing of time: it has no temporal attention, or cannot tell frames apart (SD3)."""
    return not config.has_time or (config.attention == "full" and config.time_positions == "none")


def doubles(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether blocks over time come between an image model's blocks, which doubles the depth."""
    return is_image(old) and new.attention == "alternating"


def origin(name: str, doubled: bool) -> str | None:
    """The source's name of a target's parameter; None: of a block that has come between."""
    found = re.match(r"blocks\.(\d+)\.(.*)", name)
    if not doubled or found is None:
        return name
    index, rest = int(found[1]), found[2]
    return None if index % 2 else f"blocks.{index // 2}.{rest}"


def changes(old: ModelConfig, new: ModelConfig, allow: tuple[str, ...]) -> set[str]:
    """Which changes lie between two configs. ValueError listing every difference that is not allowed, with both values."""
    silent = _silent(old) | _silent(new)
    grown, depths = old, ""
    if doubles(old, new):
        grown, depths = doubled(old), f" (twice {old.dimensions[1]}, for as many blocks over time)"
    covered = _covered(grown, new, silent)
    free = silent.union(*(keys for change, keys in covered.items() if change in allow))
    sizes = {"size", "hidden_size", "depth", "num_heads"}
    wrong = [key for key in ModelConfig.model_fields if key not in sizes | free and _differs(grown, new, key)]
    lines = [f"model.{difference(grown, new, [key])}{_remedy(key, covered, allow)}" for key in wrong]
    if grown.dimensions != new.dimensions:
        lines.append(f"(hidden_size, depth, num_heads) {grown.dimensions}{depths} -> {new.dimensions}")
    if "text_dim" in wrong and old.text_dim is None and "class_to_text" not in covered:
        lines.append(f"captions cannot join conditioning {new.conditioning} without changing what it puts out")
    if lines:
        raise ValueError(
            "these weights are of another architecture, and no allowed change covers:\n  " + "\n  ".join(lines)
        )
    return set(covered)


def _covered(old: ModelConfig, new: ModelConfig, silent: set[str]) -> dict[str, set[str]]:
    """The changes that would account for differences, each with the settings that it may change."""
    covered: dict[str, set[str]] = {}
    adaptive = {"adaln", "adaln_zero", "adaln_single"}
    if old.text_dim is None and new.text_dim is not None:
        if new.conditioning in adaptive:
            classes = {"num_classes", "null_class"} if new.num_classes is None else set()
            pooled = {"pooled_dim"} if old.pooled_dim is None else set()
            covered["class_to_text"] = {"text_dim", "pooled_text", *pooled} | classes
    elif old.text_dim is not None and any(_differs(old, new, key) for key in ("text_dim", *_TEXT)):
        covered["new_text_projection"] = {"text_dim", *_TEXT} if new.text_dim is not None else set()
    untimely = _TIME if is_image(old) else set()
    if is_image(old) and new.has_time and any(_differs(old, new, key) for key in ("temporal", "attention", *_TIME)):
        convolution = {"mlp"} if (old.mlp, new.mlp) == ("conv2d", "conv3d") else set()
        covered["add_temporal"] = {"temporal", "attention", *convolution, *_TIME}
    if any(_differs(old, new, key) for key in POSITIONS - silent - untimely):
        covered["rescale_positions"] = POSITIONS
    if set(new.micro_conditions) > set(old.micro_conditions):
        covered["add_micro_conditions"] = {"micro_conditions"}
    routers = {key for key in ("dynamic_width", "dynamic_tokens") if getattr(new, key) and not getattr(old, key)}
    if routers or _differs(old, new, "exit_depths"):
        covered["add_dynamic"] = {"exit_depths", *routers}
    if old.conditioning in ("adaln", "adaln_zero") and new.conditioning == "adaln_single":
        covered["adaln_to_single"] = {"conditioning"}
    return covered


def _silent(config: ModelConfig) -> set[str]:
    """Settings that say nothing in this model, or nothing of its outputs."""
    silent = {"drop_path"} | (set() if config.has_time else _TIME)
    silent |= _TEXT if config.text_dim is None else set()
    silent |= set() if any(config.block_text) else {"cross_qk_norm"}
    silent |= set() if config.attention == "alternating" and config.text_dim is not None else {"temporal_text"}
    return silent | (set() if config.num_classes is not None else {"null_class"})


def doubled(old: ModelConfig) -> ModelConfig:
    """`old` as its blocks are numbered, once others have come between."""
    numbers = {key: tuple(2 * i for i in getattr(old, key)) for key in _BLOCKS if getattr(old, key) is not None}
    exits = tuple((time, 2 * blocks) for time, blocks in old.exit_depths)
    return old.model_copy(update={**numbers, "depth": 2 * old.dimensions[1], "exit_depths": exits})


def _differs(old: ModelConfig, new: ModelConfig, key: str) -> bool:
    a, b = getattr(old, key), getattr(new, key)
    return set(a) != set(b) if key == "micro_conditions" else a != b


def difference(old: ModelConfig, new: ModelConfig, keys: list[str]) -> str:
    """`key old -> new` of those that differ."""
    return ", ".join(f"{key} {getattr(old, key)} -> {getattr(new, key)}" for key in keys if _differs(old, new, key))


def _remedy(key: str, covered: dict[str, set[str]], allow: tuple[str, ...]) -> str:
    named = [change for change, keys in covered.items() if key in keys and change not in allow]
    return f" (init.allow: [{', '.join(named)}] would)" if named else ""


# ------------------------------------------------------------------------------ what they do to weights


def new_text_projection(growth: Growth) -> None:
    """Text of another kind is read anew. Captions longer or shorter, or another null caption, keep what reads the text."""
    old, new = growth.old, growth.new
    anew = (old.text_dim, old.text_projection) != (new.text_dim, new.text_projection)
    for name in [n for n in growth.kept if n.startswith(("y_embedder.y_", "y_embedder.pooled_proj.")) and anew]:
        del growth.kept[name]
        growth.after[name] = growth.fresh[name]
    null, rows = "y_embedder.y_embedding", min(old.max_text_tokens, new.max_text_tokens)
    said = "text reads anew; outputs for captions change"
    if not anew:
        said = "outputs for captions are unchanged"
        if null in growth.before and null in growth.after:  # the rows that both have
            growth.after[null] = torch.cat([growth.before[null][:rows], growth.fresh[null][rows:]])
            growth.kept[null] = null
            said += f"; {rows} rows of the null caption stay"
    growth.notes.append(f"new_text_projection: {said}")


def class_to_text(growth: Growth) -> None:
    """Attention to text starts at zero, as does what pooled text adds. The null class's code moves into the bias of the
    time network (the re-parametrisation of PixArt-α, section 2.2) where classes go."""
    if growth.old.pooled_dim is None:
        _zero(growth.after, r"^y_embedder\.pooled_proj\.2\.")
    if growth.new.num_classes is None and growth.old.num_classes is not None and growth.old.null_class:
        bias = "t_embedder.mlp.2.bias"
        null = growth.before["y_embedder.embedding_table.weight"][-1]
        growth.after[bias] = growth.before[bias] + null
        for name, weight in growth.before.items():  # routers go by the time alone
            if found := re.match(r"(.*\.dynamic\.(?:heads|heads_temp|groups))\.weight$", name):
                router = f"{found[1]}.bias"
                growth.after[router] = growth.before[router] - weight @ null
        growth.notes.append(
            f"class_to_text: the null class is now in {bias}; outputs are the old model's unconditional ones"
        )
    elif growth.new.num_classes is None and growth.old.num_classes is not None:
        growth.notes.append(
            "class_to_text: attention to text joins at zero; outputs are those that the old model had without a class"
        )
    else:
        growth.notes.append("class_to_text: attention to text joins at zero; outputs are unchanged")


def add_temporal(growth: Growth) -> None:
    """What looks over time joins at zero; convolutions within a frame become the middle slice of those over time."""
    new, after = growth.new, growth.after
    if (growth.old.mlp, new.mlp) == ("conv2d", "conv3d"):
        for name in [n for n in after if n.endswith("depthwise_conv.weight")]:
            source = origin(name, doubles(growth.old, new))
            if source is not None:
                after[name] = F.pad(growth.before[source][:, :, None], (0, 0, 0, 0, 1, 1))
                growth.kept[name] = source
    if "temp_embed" in after and (new.temporal_position_injection == "residual" or new.attention == "full"):
        _zero(after, "^temp_embed$")  # nothing hides it
    if new.attention == "full":
        growth.notes.append(
            f"add_temporal: attention now spans frames; outputs for one frame are unchanged{_full(new)}"
        )
        return
    if new.attention == "factorized":
        _zero(after, r"\.attn_temp\.proj\.")
        said = "temporal attention joins at zero"
    else:
        said = "image block i is now block 2 i; those between, over time, join "
        # New gates are at zero: were what they multiply at zero too, neither would ever learn.
        if new.conditioning == "adaln_zero":
            said += "with their gates at zero"
        else:
            _zero(after, r"^blocks\.\d*[13579]\.(attn\.proj|cross_attn\.proj|mlp\.fc2|mlp\.w3)\.")
            said += "at zero"
    coded = new.temporal_position_injection == "residual" and new.time_positions == "sincos"
    growth.notes.append(
        f"add_temporal: {said}; outputs are the image model's, frame by frame"
        if not coded
        else f"add_temporal: {said}; outputs for one frame are unchanged, those for more are not: "
        "temporal_position_injection residual adds sincos temporal positions to the input of all blocks"
    )


def _full(new: ModelConfig) -> str:
    """What is to be said of more frames, under full attention."""
    if new.conditioning == "joint":
        return "; more frames weigh against the same text"
    if new.time_positions in ("sincos", "rope"):
        return f"; of more frames, codes of time ({new.time_positions}) tell one from another at once"
    return ", and so are those of one repeated frame"


def _zero(weights: dict[str, Tensor], names: str) -> None:
    for name, weight in weights.items():
        if re.search(names, name):
            weights[name] = torch.zeros_like(weight)


def rescale_positions(growth: Growth) -> None:
    """Sine-cosine positions and rotations follow from the config. Learned ones are interpolated: bicubic within a frame,
    linear over time."""
    old, new = growth.old, growth.new
    said = "rescale_positions: " + difference(old, new, sorted(POSITIONS - (_TIME if is_image(old) else set())))
    if "pos_embed" in growth.before and old.position_grid != new.position_grid:
        assert old.position_grid is not None
        assert new.position_grid is not None
        table = rearrange(growth.before["pos_embed"].float(), "n (h w) d -> n d h w", h=old.position_grid[0])
        table = F.interpolate(table, new.position_grid, mode="bicubic", antialias=True)
        growth.after["pos_embed"] = rearrange(table, "n d h w -> n (h w) d")
        growth.kept["pos_embed"] = "pos_embed"
        said += "; the learned table of positions is interpolated"
    if "temp_embed" in growth.before and not is_image(old) and old.position_frames != new.position_frames:
        assert new.position_frames is not None
        table = growth.before["temp_embed"].float().transpose(1, 2)
        table = F.interpolate(table, new.position_frames, mode="linear", align_corners=False)
        growth.after["temp_embed"] = table.transpose(1, 2)
        growth.kept["temp_embed"] = "temp_embed"
        said += "; the learned table of time is interpolated"
    growth.notes.append(said)


def add_micro_conditions(growth: Growth) -> None:
    """Their networks end in zeros, as in every new model."""
    added = [name for name in growth.new.micro_conditions if name not in growth.old.micro_conditions]
    growth.notes.append(f"add_micro_conditions: {', '.join(added)} join at zero; outputs are unchanged")


def add_dynamic(growth: Growth) -> None:
    """Routers start with everything on, as in every new model."""
    said = "add_dynamic: routers join with everything on; outputs are unchanged"
    if growth.old.exit_depths != growth.new.exit_depths:
        said = "add_dynamic: routers, if any, join with everything on; outputs change where blocks are left out"
    growth.notes.append(said)


def adaln_to_single(growth: Growth) -> None:
    """Each block's network of its own gives way to one for all, their mean, and a table a block: what is left of the
    block's modulation at SINGLE_TIME, without a class (PixArt-α, section 2.3: E(i) such that S(i) is the source's)."""
    old, width = growth.old, growth.old.dimensions[0]
    table = growth.before.get("y_embedder.embedding_table.weight")
    time = torch.full((1,), SINGLE_TIME, device=growth.source.device)
    code = growth.source.t_embedder(time, growth.source.dtype)[0].float()  # (D,)
    if table is not None and old.null_class:
        code = code + table[-1].float()
    signal = F.silu(code)
    networks = [_six_of(growth.before, i, width) for i in range(old.dimensions[1])]
    weight, bias = (torch.stack(parts).mean(0) for parts in zip(*networks, strict=True))
    growth.after["t_block.1.weight"], growth.after["t_block.1.bias"] = weight.flatten(0, 1), bias.flatten()
    doubled = doubles(old, growth.new)
    for i, (own_weight, own_bias) in enumerate(networks):
        name = f"blocks.{2 * i if doubled else i}.scale_shift_table"
        growth.after[name] = (own_weight - weight) @ signal + own_bias - bias
    final = [growth.before[f"final_layer.adaLN_modulation.1.{n}"].float() for n in ("weight", "bias")]
    growth.after["final_layer.scale_shift_table"] = (final[0] @ signal + final[1]).unflatten(0, (2, -1)) - code
    more = {"micro-conditions": old.micro_conditions, "a pooled vector": old.pooled_text or old.pooled_dim}
    without = "".join(f" and {name}" for name, there in more.items() if there)
    growth.notes.append(
        "adaln_to_single: t_block is the mean of the blocks' adaLN_modulation, scale_shift_table what is left of each at "
        f"time {SINGLE_TIME:g}, where outputs without a class{without} are unchanged; at other times they change"
    )


def _six_of(weights: dict[str, Tensor], index: int, width: int) -> tuple[Tensor, Tensor]:
    """A block's modulation network as (6, D, D) and (6, D), float32; of adaLN's four vectors, with gates of 1 between."""
    weight, bias = (weights[f"blocks.{index}.adaLN_modulation.1.{n}"].float() for n in ("weight", "bias"))
    weight, bias = weight.unflatten(0, (-1, width)), bias.unflatten(0, (-1, width))
    if len(bias) == 4:
        still, one = torch.zeros_like(weight[:1]), torch.ones_like(bias[:1])
        weight = torch.cat([weight[:2], still, weight[2:], still])
        bias = torch.cat([bias[:2], one, bias[2:], one])
    return weight, bias
