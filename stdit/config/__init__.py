"""Every setting of stdit: frozen pydantic models, loaded from YAML. No torch.

An unknown key, a wrong type, a missing file or sizes that do not divide are errors that name the
file, the key and the numbers.

    config = load_config("configs/debug.yaml", Config, ["train.steps=100", "run_dir=runs/x"])
"""

from __future__ import annotations

from stdit.config.base import (
    MAX_WORKERS,
    FileSchema,
    Frozen,
    NonNegative,
    Positive,
    SealedSchema,
    Sha256,
    Share,
    Threads,
    Workers,
)
from stdit.config.buckets import Bucket, ExtractBucket, TrainBucket, default_bucket, latent_shape, token_grid
from stdit.config.curate import (
    CaptionConfig,
    CaptionServer,
    CurateConfig,
    CutsConfig,
    DuplicatesConfig,
    ScorerConfig,
)
from stdit.config.data import CacheConfig, DataConfig, Where
from stdit.config.diffusion import DiffusionConfig, FrameConditioningConfig, SamplerConfig
from stdit.config.evaluate import (
    EvaluateConfig,
    EvaluationConfig,
    NetworkPaths,
    ReferenceConfig,
    ScoreConfig,
    ScoreName,
)
from stdit.config.extract import MOST_TEXT_ENCODERS, ByteT5Config, ExtractConfig, TextEncoderConfig, VideoEncoderConfig
from stdit.config.generate import GenerateConfig, LoRASource
from stdit.config.load import (
    ConfigError,
    apply_override,
    check,
    dump,
    load_config,
    merge,
    parse_yaml,
    read_extended,
    read_json,
    read_yaml,
    validate,
)
from stdit.config.location import LocalPath, Location, Url, parse_location
from stdit.config.model import SIZES, ModelConfig
from stdit.config.train import (
    Config,
    ControlConfig,
    DynamicConfig,
    EMAConfig,
    InitConfig,
    LoRAConfig,
    OptimizerConfig,
    SampleGridConfig,
    TokenRoutingConfig,
    TrainConfig,
    Transition,
    ValidationConfig,
)

__all__ = [
    "MAX_WORKERS",
    "MOST_TEXT_ENCODERS",
    "SIZES",
    "Bucket",
    "ByteT5Config",
    "CacheConfig",
    "CaptionConfig",
    "CaptionServer",
    "Config",
    "ConfigError",
    "ControlConfig",
    "CurateConfig",
    "CutsConfig",
    "DataConfig",
    "DiffusionConfig",
    "DuplicatesConfig",
    "DynamicConfig",
    "EMAConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExtractBucket",
    "ExtractConfig",
    "FileSchema",
    "FrameConditioningConfig",
    "Frozen",
    "GenerateConfig",
    "InitConfig",
    "LoRAConfig",
    "LoRASource",
    "LocalPath",
    "Location",
    "ModelConfig",
    "NetworkPaths",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "ReferenceConfig",
    "SampleGridConfig",
    "SamplerConfig",
    "ScoreConfig",
    "ScoreName",
    "ScorerConfig",
    "SealedSchema",
    "Sha256",
    "Share",
    "TextEncoderConfig",
    "Threads",
    "TokenRoutingConfig",
    "TrainBucket",
    "TrainConfig",
    "Transition",
    "Url",
    "ValidationConfig",
    "VideoEncoderConfig",
    "Where",
    "Workers",
    "apply_override",
    "check",
    "default_bucket",
    "dump",
    "latent_shape",
    "load_config",
    "merge",
    "parse_location",
    "parse_yaml",
    "read_extended",
    "read_json",
    "read_yaml",
    "token_grid",
    "validate",
]
