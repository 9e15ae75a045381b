"""What can be added to a pipeline's model: LoRA adapters, several at once, and the condition of a control branch.

pipe.load_lora("runs/style", scale=0.8)
pipe.set_adapters({"style": 1.0, "motion": 0.5}); pipe.fuse_lora(); pipe.unload_lora()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stdit.config import Bucket
from stdit.encoders.video import VideoEncoder
from stdit.inference.inputs import encoded
from stdit.models import lora
from stdit.models.control import STDiTControl
from stdit.models.stdit import STDiT
from stdit.training import adapters
from stdit.training.checkpoint import Weights


class LoRA:
    """The methods of a pipeline with a `transformer` that adapters can be given to."""

    transformer: STDiT

    def load_lora(self, path: Path | str, name: str | None = None, scale: float = 1.0, weights: Weights = "ema") -> str:
        """Adds an adapter, beside those that are active; returns its name (None: lora_0, lora_1, …).

        path: the folder of its safetensors, as training, diffusers and peft's users write them; or a run or checkpoint
        that trained one, of which `weights` are taken. scale: of what it adds. ValueError: no adapter, or one that does
        not fit this model, with the layers; a name that is taken.
        """
        held = lora.names(self.transformer)
        if name is None:
            name = next(free for n in range(len(held) + 1) if (free := f"lora_{n}") not in held)
        lora.read(self.transformer, adapters.resolve_lora(Path(path), weights), name, scale)
        return name

    @property
    def adapters(self) -> dict[str, float]:
        """Every adapter and its scale, 0 for those that are not active."""
        active = lora.active(self.transformer)
        return {name: active.get(name, 0.0) for name in lora.names(self.transformer)}

    def set_adapters(
        self, names: str | Sequence[str] | Mapping[str, float], weights: float | Sequence[float] | None = None
    ) -> None:
        """Makes these adapters the active ones, and no others, at their scales. weights: None for 1; one, or one for each.

        ValueError: an adapter that is not loaded; as many weights as there are not names.
        """
        if isinstance(names, Mapping):
            lora.stack(self.transformer, names)
            return
        wanted = [names] if isinstance(names, str) else list(names)
        scales = [weights] * len(wanted) if isinstance(weights, int | float) else list(weights or [1.0] * len(wanted))
        if len(scales) != len(wanted):
            raise ValueError(f"{len(scales)} weights for {len(wanted)} adapters ({', '.join(wanted)})")
        lora.stack(self.transformer, dict(zip(wanted, map(float, scales), strict=True)))

    def fuse_lora(self, permanent: bool = False) -> None:
        """Adds the active adapters into the weights, where they cost nothing. permanent: for good, as before save_pretrained;
        else the weights as they were are kept, and `unfuse_lora` and `unload_lora` bring them back to the last bit."""
        lora.merge(self.transformer, keep=not permanent)

    def unfuse_lora(self) -> None:
        """Takes fused adapters out of the weights again; they stay loaded and active."""
        lora.unmerge(self.transformer)

    def unload_lora(self, names: str | Sequence[str] | None = None) -> None:
        """Takes adapters away (None: all), fused or not: what is left is what there was without them, to the last bit."""
        lora.remove(self.transformer, [names] if isinstance(names, str) else names)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'. ValueError: adapters are loaded, which no pipeline's folder has a place for."""
        if held := lora.names(self.transformer):
            raise ValueError(
                f"adapters are loaded ({', '.join(held)}): fuse_lora(permanent=True) or unload_lora() before saving the pipeline"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def control_of(
    control: STDiTControl,
    encoder: VideoEncoder,
    processor: VideoProcessor,
    given: Mapping[str, Any],
    clip: Bucket,
    latent: tuple[int, int, int],
    batch: int,
    each: int,
) -> Tensor:
    """A branch's condition as latents (1 or `batch`, C', t or 1, h, w), of what is given as image, video or latents.

    An image is encoded as a clip of one frame. `each`: videos for each prompt; one condition serves all, or one for each
    prompt, or for each video. ValueError: none or several are given, or it is of another size, with both numbers.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"a control branch needs one of {', '.join(given)}; found {', '.join(named) or 'none'}")
    name, value = named[0], given[named[0]]
    if name == "control_latents":
        latents = value
    else:
        frames = clip if name == "control_video" else Bucket(frames=1, height=clip.height, width=clip.width)
        if name == "control_image":
            value = processor.preprocess(value)[:, :, None].add(1).div(2)  # (B, 3, 1, H, W) in 0 to 1
            value = list(value.movedim(2, 1))
        latents = encoded(encoder, processor, value, frames, name)
    control.check_control(latents[:1], torch.empty(1, 1, *latent, device="meta"))
    if len(latents) not in (1, batch // each, batch):
        raise ValueError(
            f"{len(latents)} conditions ({name}) for {batch // each} prompts of {each} videos; give 1 or as many"
        )
    if len(latents) == batch // each:
        latents = latents.repeat_interleave(each, 0)
    return latents
