"""Reads a diffusers config.json: maps its values to ModelConfig, and collects the unsupported ones.

Unsupported values and unknown keys are errors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel

from stdit.weights.layouts.layout import SourceWeights, count_blocks, require_tensors, tensor_shape
from stdit.weights.layouts.original import infer_num_heads

# Supported values of `activation_fn`.
GELUS = {"gelu-approximate": "tanh", "gelu": "erf"}
# Keys of every class that have one supported value.
ONLY = {"dropout": 0.0, "attention_bias": True, "norm_elementwise_affine": False, "upcast_attention": False}
# Earlier names of these classes, in older config.json files.
FORMER_NAMES = ("Transformer2DModel", "LatteT2V")


class DiffusersConfig:
    """A config.json with the defaults of its class; collects unsupported values in `errors`."""

    def __init__(self, source: SourceWeights, model: type[Any], title: str) -> None:
        self.where, self.title, self.source = source.where, title, source
        names = {model.__name__, *FORMER_NAMES}
        self.inferred = "_class_name" not in source.config
        config = infer_config(source, model.__name__) if self.inferred else source.config
        if config["_class_name"] not in names:
            raise ValueError(
                f"{source.where}: the tensors are those of {model.__name__}; config.json says {config['_class_name']}"
            )
        self.values = constructor_defaults(model)
        known = set(self.values)
        self.values |= {key: value for key, value in config.items() if not key.startswith("_")}
        self.errors = [
            f"{key}: {value!r}, a key that {model.__name__} does not have"
            for key, value in self.values.items()
            if key not in known and not _is_obsolete(key, value)
        ]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def require(self, **expected: Any) -> None:
        """Collects an error for every key with another value."""
        for key, value in expected.items():
            if key in self.values and self.values[key] != value:
                self.errors.append(f"{key}: {self.values[key]!r}; supported: {value!r}")

    def one_of(self, key: str, values: Mapping[str, str]) -> Any:
        """Our name of a value."""
        if self.values[key] not in values:
            self.errors.append(f"{key}: {self.values[key]!r}; supported: {', '.join(map(repr, values))}")
        return values.get(self.values[key], next(iter(values.values())))

    def sizes(self) -> dict[str, Any]:
        """Width, heads, channels and patch size, whose keys all classes share."""
        v = self.values
        keys = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "num_layers", "sample_size")
        invalid = [k for k in keys if not isinstance(v[k], int) or isinstance(v[k], bool) or v[k] < 1]
        self.errors += [f"{key}: {v[key]!r}; expected an integer, 1 or more" for key in invalid]
        if invalid:
            self.check()
        outputs = v["in_channels"] if v["out_channels"] is None else v["out_channels"]
        if outputs not in (v["in_channels"], 2 * v["in_channels"]):
            self.errors.append(f"out_channels: {outputs}; supported: in_channels {v['in_channels']}, or twice that")
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
        """A positive number. default: replaces None, where None is allowed."""
        value = default if self.values[key] is None else self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.errors.append(f"{key}: {value!r}; expected a positive number")
            return 1.0
        return float(value)

    def assumed(self, key: str, value: Any) -> Any:
        """The value of our `key`, with a note where no config.json determines it."""
        return self.source.assume(key, value) if self.inferred else value

    def check(self) -> None:
        """ValueError listing all collected errors."""
        if self.errors:
            lines = "\n  ".join(dict.fromkeys(self.errors))
            raise ValueError(f"{self.where}: config.json of {self.title} has unsupported values:\n  {lines}")


def infer_config(source: SourceWeights, name: str) -> dict[str, Any]:
    """The config.json for tensors without one, from their shapes and published models' values; position_base must be
    set."""
    state, proj = source.state, "pos_embed.proj.weight"
    final = "proj_out_2.weight" if name.startswith("DiT") else "proj_out.weight"
    base = source.overrides.get("position_base")
    if not isinstance(base, int):
        raise ValueError(
            f"{source.where}: tensors of diffusers' {name} without a config.json of that class beside them do not "
            "determine the position grid; convert the folder with config.json, or give --set position_base=…, the side "
            "in patches that the model was trained with"
        )
    require_tensors(source, proj, final)
    (width, channels, patch, _), layers = tensor_shape(source, proj, 4), count_blocks(source, "transformer_blocks.")
    heads = infer_num_heads(source, width, layers, ("transformer_blocks.0.attn.norm_q.weight",))
    captions = {
        "DiTTransformer2DModel": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "SD3Transformer2DModel": "context_embedder.weight",
    }.get(name, "caption_projection.linear_1.weight")
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    require_tensors(source, captions, *([pooled] if name.startswith("SD3") else []))
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": tensor_shape(source, final, 2)[0] // patch**2,
        "num_layers": layers,
        "patch_size": patch,
        "sample_size": base * patch,
    }
    if name.startswith("DiT"):
        config["num_embeds_ada_norm"] = tensor_shape(source, captions, 2)[0] - 1
    elif name.startswith("SD3"):
        config |= {"joint_attention_dim": tensor_shape(source, captions, 2)[1], "caption_projection_dim": width}
        config |= {"pooled_projection_dim": tensor_shape(source, pooled, 2)[1]}
        config["pos_embed_max_size"] = math.isqrt(tensor_shape(source, "pos_embed.pos_embed", 3)[1])
        config["qk_norm"] = "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in state else None
    else:
        config |= {
            "caption_channels": tensor_shape(source, captions, 2)[1],
            "cross_attention_dim": width,
            "norm_eps": 1e-6,
        }
        config |= {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "attention_bias": True}
        config["norm_elementwise_affine"] = False
    if name.startswith("PixArt"):
        config["use_additional_conditions"] = any(".resolution_embedder." in n for n in state)
    return {"_class_name": name, **config}


def constructor_defaults(model: type[Any]) -> dict[str, Any]:
    """Constructor arguments that have defaults."""
    parameters = inspect.signature(model.__init__).parameters
    return {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _is_obsolete(key: str, value: Any) -> bool:
    """Whether the key belongs to the earlier Transformer2DModel, and is off or at its default."""
    former = constructor_defaults(Transformer2DModel)
    return key in former and (not value or value == former[key])
