"""LoRA adapters of a pipeline, by diffusers' method names.

pipe.load_lora_weights("runs/style", adapter_name="style", scale=0.8)
pipe.set_adapters({"style": 1.0, "motion": 0.5}); pipe.fuse_lora(); pipe.unload_lora_weights()
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from stdit.config.load import shorten
from stdit.files import apply_umask
from stdit.inference.inputs import MAX_SCALE, checked_number
from stdit.integrity import MANIFEST, is_manifest, write_manifest
from stdit.models import lora
from stdit.models.stdit import STDiT
from stdit.training import adapters
from stdit.training.checkpoint import Weights


class LoraMixin:
    """LoRA methods of a pipeline, for its `transformer`."""

    transformer: STDiT
    # Bases of the loaded adapters that come from runs.
    _lora_bases: Mapping[str, adapters.Base] = MappingProxyType({})

    def load_lora_weights(
        self, path: Path | str, adapter_name: str | None = None, scale: float = 1.0, weights: Weights = "ema"
    ) -> str:
        """Loads an adapter and activates it beside those that are active; returns its name.

        Args:
            path: folder of its safetensors, as training, diffusers and peft write them; or a run or checkpoint that
                trained one.
            adapter_name: None: lora_0, lora_1, …
            scale: factor on what the adapter adds.
            weights: of a run, the exponential moving average ("ema") or those of the last step ("model").

        Raises:
            ValueError: no adapter there, half of one, one that does not fit this model (with the layers), one of
                another base than an adapter that is loaded, a name that is taken.
        """
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"path: expected a folder, found {shorten(repr(path))}")
        if adapter_name is not None and not isinstance(adapter_name, str):
            raise ValueError(f"adapter_name: expected text, found {shorten(repr(adapter_name))}")
        scale = checked_number("scale", scale, -MAX_SCALE, MAX_SCALE)
        loaded = lora.adapter_names(self.transformer)
        if adapter_name is None:
            adapter_name = next(free for n in range(len(loaded) + 1) if (free := f"lora_{n}") not in loaded)
        folder = adapters.resolve_lora(Path(path), weights)
        base = adapters.recorded_base(folder)
        bases = {name: self._lora_bases[name] for name in loaded if name in self._lora_bases}
        for name, other in bases.items():
            if base is not None and base.fingerprint != other.fingerprint:
                raise ValueError(
                    f"{path}: this adapter was trained on {base.folder}, adapter {name} on other weights, {other.folder}; "
                    "they do not add up"
                )
        lora.load_adapter(self.transformer, folder, adapter_name, scale)
        self._lora_bases = bases if base is None else {**bases, adapter_name: base}
        return adapter_name

    @property
    def adapters(self) -> dict[str, float]:
        """Scales of the loaded adapters; 0: not active."""
        active = lora.active_adapters(self.transformer)
        return {name: active.get(name, 0.0) for name in lora.adapter_names(self.transformer)}

    def set_adapters(
        self, names: str | Sequence[str] | Mapping[str, float], weights: float | Sequence[float] | None = None
    ) -> None:
        """Activates these adapters, and no others. weights: their scales, one or one for each; None: 1.

        ValueError: an adapter that is not loaded; another number of weights than of names; weights that are no finite
        numbers.
        """
        chosen = _names(list(names) if isinstance(names, Mapping) else names)
        if isinstance(names, Mapping):
            weights = list(names.values())
        if isinstance(weights, np.ndarray):
            weights = cast(Any, weights.tolist())
        one = 1.0 if weights is None else weights
        scales = list(weights) if isinstance(weights, list | tuple) else [one] * len(chosen)
        if len(scales) != len(chosen):
            raise ValueError(f"{len(scales)} weights for {len(chosen)} adapters ({', '.join(chosen)})")
        numbers = [
            checked_number(f"weights: adapter {n}", s, -MAX_SCALE, MAX_SCALE)
            for n, s in zip(chosen, scales, strict=True)
        ]
        lora.set_adapters(self.transformer, dict(zip(chosen, numbers, strict=True)))

    def fuse_lora(self, permanent: bool = False) -> None:
        """Adds the active adapters to the weights, so that they cost nothing.

        The original weights are kept, and restored bit for bit by `unfuse_lora` and `unload_lora_weights`. permanent:
        they are not, as before `save_pretrained`.
        """
        lora.merge_adapters(self.transformer, keep=not permanent)

    def unfuse_lora(self) -> None:
        """Takes fused adapters out of the weights; they stay loaded and active."""
        lora.unmerge_adapters(self.transformer)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters, fused or not. ValueError: one that is not loaded."""
        lora.delete_adapters(self.transformer, _names(adapter_names))

    def unload_lora_weights(self) -> None:
        """Removes all adapters, fused or not: the weights are bit for bit what they were before."""
        lora.delete_adapters(self.transformer, None)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers', and a manifest with the SHA-256 of every file, which `from_pretrained` checks.

        ValueError: adapters are loaded, which a pipeline's folder can't hold; a manifest.json of another program is
        there.
        """
        folder = Path(save_directory)
        if os.path.lexists(folder / MANIFEST) and not is_manifest(folder):
            raise ValueError(
                f"{folder}: holds a {MANIFEST} that is none of ours, or damaged; choose another folder, or move it away"
            )
        if loaded := lora.adapter_names(self.transformer):
            raise ValueError(
                f"adapters are loaded ({', '.join(loaded)}): fuse_lora(permanent=True) or unload_lora_weights() before saving the pipeline"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        apply_umask(folder, "model_index.json", *(f"{name}/**/*" for name in self.components))  # pyright: ignore
        parts = [path for name in self.components for path in (folder / name).rglob("*")]  # pyright: ignore
        write_manifest(folder, (path for path in (folder / "model_index.json", *parts) if path.is_file()))


def _names(names: Any) -> list[str]:
    """One or several names of adapters as a list. ValueError: anything else."""
    chosen = [names] if isinstance(names, str) else names
    if not isinstance(chosen, list | tuple) or not all(isinstance(name, str) for name in chosen):
        raise ValueError(f"adapters: expected names, found {shorten(repr(names))}")
    return list(chosen)
