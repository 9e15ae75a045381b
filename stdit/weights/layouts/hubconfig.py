"""A diffusers config.json, read: its values in our names, and a list of those that we do not have.

A value of it that is not ours is an error, and so is a key that its class does not know.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel

from stdit.weights.layouts.layout import Foreign, count_blocks, need, shape
from stdit.weights.layouts.original import heads_of

# The two values of `activation_fn` that are ours.
GELUS = {"gelu-approximate": "tanh", "gelu": "erf"}
# What every class has beside that, and we have one value of.
ONLY = {"dropout": 0.0, "attention_bias": True, "norm_elementwise_affine": False, "upcast_attention": False}
# What these classes were called before, in config.json of older folders.
FORMER_NAMES = ("Transformer2DModel", "LatteT2V")


class Values:
    """A config.json with the defaults of its class; notes what is not ours."""

    def __init__(self, foreign: Foreign, model: type[Any], title: str) -> None:
        self.where, self.title = foreign.where, title
        names = {model.__name__, *FORMER_NAMES}
        given = foreign.config if "_class_name" in foreign.config else told_by_tensors(foreign, model.__name__)
        if given["_class_name"] not in names:
            raise ValueError(
                f"{foreign.where}: the tensors are those of {model.__name__}; config.json says {given['_class_name']}"
            )
        self.values = defaults(model)
        known = set(self.values)
        self.values |= {key: value for key, value in given.items() if not key.startswith("_")}
        self.wrong = [
            f"{key}: {value!r}, a key that {model.__name__} does not have"
            for key, value in self.values.items()
            if key not in known and not _says_nothing(key, value)
        ]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def only(self, **expected: Any) -> None:
        """Notes values other than the ones that are ours."""
        for key, value in expected.items():
            if key in self.values and self.values[key] != value:
                self.wrong.append(f"{key}: {self.values[key]!r}; ours is {value!r}")

    def one_of(self, key: str, values: Mapping[str, str]) -> Any:
        """What a value is called here."""
        if self.values[key] not in values:
            self.wrong.append(f"{key}: {self.values[key]!r}; ours are {', '.join(map(repr, values))}")
        return values.get(self.values[key], next(iter(values.values())))

    def sizes(self) -> dict[str, Any]:
        """Width, heads, channels and patches, as all classes name them."""
        v = self.values
        wanted = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "num_layers", "sample_size")
        numbers = [k for k in wanted if not isinstance(v[k], int) or isinstance(v[k], bool) or v[k] < 1]
        self.wrong += [f"{key}: {v[key]!r}; expected a whole number, 1 or more" for key in numbers]
        if numbers:
            self.check()
        outputs = v["in_channels"] if v["out_channels"] is None else v["out_channels"]
        if outputs not in (v["in_channels"], 2 * v["in_channels"]):
            self.wrong.append(
                f"out_channels: {outputs}; with in_channels {v['in_channels']} ours is that, or its double"
            )
        return {
            "hidden_size": v["num_attention_heads"] * v["attention_head_dim"],
            "depth": v["num_layers"],
            "num_heads": v["num_attention_heads"],
            "in_channels": v["in_channels"],
            "patch_size": (1, v["patch_size"], v["patch_size"]),
            "learned_variance": outputs == 2 * v["in_channels"],
            "position_base": v["sample_size"] // v["patch_size"],
        }

    def number(self, key: str, default: float | None = None) -> float:
        """A value above 0. default: what None stands for, where it may be there."""
        value = default if self.values[key] is None else self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.wrong.append(f"{key}: {value!r}; expected a number above 0")
            return 1.0
        return float(value)

    def check(self) -> None:
        """ValueError listing what is not ours."""
        if self.wrong:
            lines = "\n  ".join(dict.fromkeys(self.wrong))
            raise ValueError(f"{self.where}: config.json of {self.title} has values that are not ours:\n  {lines}")


def told_by_tensors(foreign: Foreign, name: str) -> dict[str, Any]:
    """A config.json for tensors that come without one, as published models have it; the grid has to be set by the user."""
    state, proj = foreign.state, "pos_embed.proj.weight"
    final = "proj_out_2.weight" if name.startswith("DiT") else "proj_out.weight"
    base = foreign.overrides.get("position_base")
    if not isinstance(base, int):
        raise ValueError(
            f"{foreign.where}: these are tensors of diffusers' {name}, which don't say of which grid, and there is no "
            "config.json of that class beside them; convert the folder that has it, or give --set position_base=…, the "
            "patches a side that the model was trained with"
        )
    need(foreign, proj, final)
    (width, channels, patch, _), layers = shape(foreign, proj, 4), count_blocks(foreign, "transformer_blocks.")
    heads = heads_of(foreign, width, layers, ("transformer_blocks.0.attn.norm_q.weight",))
    captions = {
        "DiTTransformer2DModel": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "SD3Transformer2DModel": "context_embedder.weight",
    }.get(name, "caption_projection.linear_1.weight")
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    need(foreign, captions, *([pooled] if name.startswith("SD3") else []))
    told: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": shape(foreign, final, 2)[0] // patch**2,
        "num_layers": layers,
        "patch_size": patch,
        "sample_size": base * patch,
    }
    if name.startswith("DiT"):
        told["num_embeds_ada_norm"] = shape(foreign, captions, 2)[0] - 1
    elif name.startswith("SD3"):
        told |= {"joint_attention_dim": shape(foreign, captions, 2)[1], "caption_projection_dim": width}
        told |= {"pooled_projection_dim": shape(foreign, pooled, 2)[1]}
        told["pos_embed_max_size"] = math.isqrt(shape(foreign, "pos_embed.pos_embed", 3)[1])
        told["qk_norm"] = "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in state else None
    else:
        told |= {"caption_channels": shape(foreign, captions, 2)[1], "cross_attention_dim": width, "norm_eps": 1e-6}
        told |= {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "attention_bias": True}
        told["norm_elementwise_affine"] = False
    if name.startswith("PixArt"):
        told["use_additional_conditions"] = any(".resolution_embedder." in n for n in state)
    return {"_class_name": name, **told}


def defaults(model: type[Any]) -> dict[str, Any]:
    """The arguments of a class's constructor, with their defaults."""
    parameters = inspect.signature(model.__init__).parameters
    return {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a key is one of the class that these classes were once, switched off or at its default."""
    former = defaults(Transformer2DModel)
    return key in former and (not value or value == former[key])
