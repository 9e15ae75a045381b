"""Generates docs/config.md and the JSON schemas of configs/schema/ from the config classes.

    python -m pipelines.config_reference            writes both (`make docs`)

Editors with yaml-language-server complete and check a YAML file by the schema that its first line names.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.plan import Plan
from stdit.config import Config, CurateConfig, EvaluateConfig, ExtractConfig, Frozen, GenerateConfig, Url
from stdit.console import echo
from stdit.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, SCHEMAS = Path("docs/config.md"), Path("configs/schema")

# Schema file, class, and what reads it.
DOCUMENTS: dict[str, tuple[type[BaseModel], str]] = {
    "train": (Config, "`stdit train --config FILE`; the `config` of a plan's stage"),
    "curate": (CurateConfig, "`stdit curate --config FILE`"),
    "extract": (ExtractConfig, "`stdit extract --config FILE`; the `extraction` of a plan"),
    "plan": (Plan, "`stdit train-stages --plan FILE`"),
    "generate": (GenerateConfig, "`stdit generate`, each key as a flag or as `--set KEY=VALUE`"),
    "evaluate": (
        EvaluateConfig,
        "`stdit evaluate --config FILE`; its `metrics` are those of `stdit evaluate --run … --set KEY=VALUE`",
    ),
}

# One line for each section; tests/config/test_reference.py validates them.
EXAMPLES: dict[str, str] = {
    "Config": "{run_dir: runs/a, model: {size: B}, data: {features: runs/features}, train: {steps: 1000}}",
    "ModelConfig": "{size: XL, patch_size: [1, 2, 2], qk_norm: rms}",
    "DiffusionConfig": "{objective: flow, flow_shift: 3.0, caption_dropout: 0.1}",
    "FrameConditioningConfig": "{first: 0.2, tail: 0.1}",
    "DataConfig": "{features: runs/features, batch_size: 4, where: [{column: aesthetic, at_least: 5.0}]}",
    "FeatureSetConfig": "{path: runs/films/features, weight: 0.7}",
    "CacheConfig": "{folder: /local/stdit, size_gb: 500}",
    "TrainBucket": "{frames: 17, height: 256, width: 256, batch_size: 4}",
    "Where": "{column: aesthetic, at_least: 5.0}",
    "TrainConfig": "{steps: 100000, precision: bf16, zero_stage: 2, checkpoint_every: 1000}",
    "LoRAConfig": "{rank: 16, targets: [attn.qkv, attn.proj]}",
    "ControlConfig": "{blocks: 6, condition: first_frame}",
    "DynamicConfig": "{target_flops_ratio: 0.5, warmup_steps: 1000}",
    "ProfileConfig": "{start: 100, steps: 3}",
    "OptimizerConfig": "{learning_rate: 1.0e-4, warmup_steps: 1000, lr_schedule: cosine}",
    "AlignmentConfig": "{block: 8, weight: 0.5}",
    "MuPConfig": "{base_width: 256}",
    "TokenRoutingConfig": "{share: 0.5, start: 2, end: 24}",
    "EMAConfig": "{decay: 0.999}",
    "EMAProfilesConfig": "{sigma_rel: [0.05, 0.1], every: 5000}",
    "ValidationConfig": "{every: 1000, samples: 256}",
    "SampleGridConfig": "{every: 1000, count: 8, sampler: {steps: 30}}",
    "Bucket": "{frames: 17, height: 256, width: 256}",
    "SamplerConfig": "{scheduler: flow_euler, steps: 30, guidance_scale: 5.0}",
    "InitConfig": "{source: runs/images, allow: [add_temporal]}",
    "CurateConfig": "{footage: films/, out: data/curated, filters: [{column: motion, at_least: 0.3}]}",
    "CutsConfig": "{margin_frames: 2, min_seconds: 2, max_seconds: 10}",
    "ScorerConfig": '{name: aesthetic, function: "stdit.curation.scorers.aesthetic:Aesthetic", settings: {path: openai/clip-vit-large-patch14, head: head.safetensors}}',
    "DuplicatesConfig": "{distance: 6, min_share: 0.6}",
    "CaptionConfig": "{name: dense, path: Qwen/Qwen2.5-VL-3B-Instruct, frames: 4}",
    "CaptionServer": '{url: "http://localhost:8000/v1", model: Qwen2.5-VL-7B-Instruct}',
    "ExtractConfig": "{manifest: clips/, out: runs/features, buckets: [{frames: 17, height: 256, width: 256}]}",
    "ExtractBucket": "{frames: 49, height: 256, width: 256, keep_probability: 0.5}",
    "AutoEntry": "{auto: {area: 262144, frames: [1, 17, 49]}}",
    "AutoBuckets": "{area: 262144, frames: [1, 17, 49], aspects: 9, multiple_of: 16}",
    "WindowsConfig": "{stride: 49, max: 20}",
    "VideoEncoderConfig": "{kind: video, path: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, subfolder: vae, dtype: bfloat16}",
    "VisionEncoderConfig": "{path: facebook/dinov2-base, pixels_per_feature: 16}",
    "TextEncoderConfig": "{path: google/t5-v1_1-xxl, max_text_tokens: 200, dtype: bfloat16}",
    "ByteT5Config": "{width: 128, depth: 2, num_heads: 4}",
    "Plan": "{name: a, run_dir: runs/a, extraction: {manifest: clips/, buckets: [{frames: 1, height: 64, width: 64}]}, stages: {images: {config: configs/debug.yaml}}}",
    "Curation": "{footage: films/, workers: 4}",
    "Extraction": "{manifest: clips/, buckets: [{frames: 17, height: 256, width: 256}], workers: auto}",
    "Prepare": "{module: stdit.data.digits, args: [--grid, 1]}",
    "SetConfig": "{extraction: {manifest: clips/, buckets: [{frames: 17, height: 256, width: 256}]}}",
    "Resources": "{workers: 8, cpus_per_worker: 8, use_gpu: true}",
    "ElasticWorkers": "{min: 2, max: 8}",
    "Stage": "{config: configs/stages/demo-2-clips.yaml, after: images, allow: [class_to_text]}",
    "Evaluation": "{prompts: 64, sampler: {steps: 30, guidance_scale: 5.0}}",
    "EvaluationConfig": "{class_column: null, direction_column: null}",
    "EvaluateConfig": "{generated: videos, reference: {path: clips/}, out: scores, networks: {i3d: weights/i3d_torchscript.pt}}",
    "ScoreConfig": "{scores: [fvd, clip_score], networks: {i3d: weights/i3d_torchscript.pt, clip: weights/clip}}",
    "NetworkPaths": "{inception: weights/pt_inception-2015-12-05-6726825d.pth}",
    "ReferenceConfig": "{path: runs/data/manifest.jsonl, split: validation, crop: true}",
    "GenerateConfig": "{run: runs/a, prompts: prompts.txt, out: videos, steps: 30}",
    "LoRASource": "{path: runs/style, scale: 0.8}",
}


def sections(root: type[BaseModel], found: dict[str, type[BaseModel]] | None = None) -> dict[str, type[BaseModel]]:
    """`root` and every section below it, by class name, in the order of the fields."""
    found = {} if found is None else found
    if root.__name__ not in found:
        found[root.__name__] = root
        for field in root.model_fields.values():
            for section in _models(_input(field)):
                sections(section, found)
    return found


def _input(field: FieldInfo) -> Any:
    """The annotation of what a file may give for a field."""
    stated = [item.json_schema_input_type for item in field.metadata if isinstance(item, BeforeValidator)]
    return next((kind for kind in stated if kind is not PydanticUndefined), field.annotation)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


# ---------------------------------------------------------------------------------------- markdown


def markdown() -> str:
    """The text of docs/config.md."""
    lines = [
        "# Config reference",
        "",
        "Every key of every YAML file: type, default, meaning. Generated from the code by `make docs`; do not edit.",
        "",
        "YAML files may begin with `extends: [FILE, …]` (relative to the file; mappings are merged, lists replaced), and "
        "commands take `--set a.b=value`. Unknown keys and wrong types are errors. A key without a default is required. ",
        "Where a config leaves out `model.in_channels`, `model.text_dim`, `model.max_text_tokens`, `model.pooled_dim` or "
        "`data.buckets`, they follow from the features (stdit/training/derive.py); the resolved config is written to "
        "`run_dir/config.yaml`.",
        "",
        "| file | class | read by |",
        "|---|---|---|",
    ]
    for name, (root, reader) in DOCUMENTS.items():
        lines.append(f"| {name} | [{root.__name__}](#{root.__name__.lower()}) | {reader} |")
    done: dict[str, type[BaseModel]] = {}
    for root, _ in DOCUMENTS.values():
        for name, section in sections(root).items():
            if name not in done:
                done[name] = section
                lines += ["", *_section(name, section)]
    return "\n".join(lines) + "\n"


def _section(name: str, section: type[BaseModel]) -> list[str]:
    doc = inspect.cleandoc(section.__doc__ or "")
    inherited = [key for base in section.__bases__ if base is not Frozen for key in base.model_fields]
    fields = {
        k: f for k, f in section.model_fields.items() if k not in inherited or k in inspect.get_annotations(section)
    }
    if inherited and len(fields) < len(section.model_fields):
        base = section.__bases__[0].__name__
        doc += f"\n\nThe keys of [{base}](#{base.lower()}), and:"
    lines = [f"## {name}", "", doc, "", f"Example: `{EXAMPLES[name]}`", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        meaning = " ".join((field.description or "").split())
        cells = (f"`{key}`", _type(_input(field), field.metadata), _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """An annotation in YAML's terms: `int > 0`, `a | b`, `list of int`, or a link to a section."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if metadata and origin in (Union, types.UnionType):
        metadata = ()
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        return " | ".join(f"`{_scalar(value)}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            several = get_origin(parts[0]) in (Union, types.UnionType)
            return f"list of ({_type(parts[0])})" if several else f"list of {_type(parts[0])}"
        return "[" + ", ".join(_type(part) for part in parts) + "]"
    if origin in (dict, Mapping):
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.__name__
        return f"[{name}](#{name.lower()})"
    names = {
        str: "text",
        int: "int",
        float: "number",
        bool: "true / false",
        Path: "path",
        Url: "URL",
        types.NoneType: "null",
    }
    return names.get(annotation, getattr(annotation, "__name__", "any")) + _bounds(metadata)


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    """` > 0`, from the constraints of an annotation."""
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    signs = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))
    found = [
        f" {sign} {getattr(item, key):g}"
        for item in flat
        for kind, key, sign in signs
        if isinstance(item, kind) and getattr(item, key) != 2**31
    ]
    return ",".join(found) + "".join(" (not empty)" for item in flat if isinstance(item, MinLen))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own"
    return f"`{_scalar(list(value) if isinstance(value, tuple) else value)}`"


def _scalar(value: Any) -> str:
    if isinstance(value, Path):
        return "follows from the plan" if value == Path() else str(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ------------------------------------------------------------------------------------------ schema


def schema(name: str) -> dict[str, Any]:
    """JSON schema of one kind of file, for editors: nothing is required, since `extends`, a plan or `--set` may bring
    it."""
    root, reader = DOCUMENTS[name]
    found = _optional(root.model_json_schema())
    found["properties"] = {
        "extends": {"type": "array", "items": {"type": "string"}, "description": "Files that this one is laid over."},
        **found["properties"],
    }
    if name == "plan":
        for section in (found, found["$defs"]["Stage"]):
            text = section["properties"]["overrides"]["description"]
            section["properties"]["overrides"] = {"$ref": "train.json", "description": text}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "description": f"Read by {reader}.", **found}


def _optional(value: Any) -> Any:
    """`value` without the lists of required keys."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not (key == "required" and isinstance(each, list))}
        return {key: _optional(each) for key, each in kept.items()}
    return [_optional(each) for each in value] if isinstance(value, list) else value


def files() -> dict[Path, str]:
    """Every generated file, relative to the repository, with its text."""
    made = {
        SCHEMAS / f"{name}.json": json.dumps(schema(name), indent=1, ensure_ascii=False) + "\n" for name in DOCUMENTS
    }
    return {REFERENCE: markdown(), **made}


def main() -> None:
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(ROOT / path, text)
        echo(path)


if __name__ == "__main__":
    main()
