"""stdit: train and run spatial-temporal diffusion transformers for text-to-image and text-to-video.

    from stdit import STDiT, STDiTPipeline, load_config, save_video

Names are imported on first use, so that `import stdit` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdit.config import Config as Config
    from stdit.config import ConfigError as ConfigError
    from stdit.config import ModelConfig as ModelConfig
    from stdit.config import load_config as load_config
    from stdit.inference.pipeline import STDiTPipeline as STDiTPipeline
    from stdit.media import save_video as save_video
    from stdit.models.stdit import STDiT as STDiT

__version__ = "0.1.0"

_MODULES = {
    "Config": "stdit.config",
    "ConfigError": "stdit.config",
    "ModelConfig": "stdit.config",
    "STDiT": "stdit.models.stdit",
    "STDiTPipeline": "stdit.inference.pipeline",
    "load_config": "stdit.config",
    "save_video": "stdit.media",
}

__all__ = ["Config", "ConfigError", "ModelConfig", "STDiT", "STDiTPipeline", "__version__", "load_config", "save_video"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'stdit' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
