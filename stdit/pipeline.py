"""STDiTPipeline: a diffusers DiffusionPipeline from captions or class labels to videos and images.

    pipe = STDiTPipeline.from_pretrained("runs/demo/clips")
    pipe(["a seven moving left"], num_frames=8, height=16, width=16, guidance_scale=3.0).frames

diffusers' own `DiffusionPipeline.from_pretrained` does not know this class: call it on STDiTPipeline.

B videos · C latent channels · (t, h, w) latent frames, height, width · (T, H, W) the same in pixels · L text tokens
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stdit.config import Bucket, DiffusionConfig, SamplerConfig, token_grid, validate
from stdit.diffusion.guidance import guided
from stdit.diffusion.schedulers import fitting, is_flow, make_scheduler, sample, shifted
from stdit.diffusion.timesteps import shift_for
from stdit.encoders.source import folder_of
from stdit.encoders.text import TextEncoder, text_encoder_from_identity
from stdit.encoders.video import VideoEncoder, video_encoder_from_identity
from stdit.models.stdit import STDiT
from stdit.prompts import check_text, label_id
from stdit.training import checkpoint

Labels = int | str | Sequence[int | str | None] | Tensor
Weights = Literal["ema", "model"]


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """`frames`: a list of lists of PIL images ("pil"), an array (B, T, H, W, 3) in 0 to 1 ("np"), a tensor (B, T, 3, H, W)
    in 0 to 1 ("pt"), or normalised latents (B, C, t, h, w) ("latent")."""

    frames: Any


class STDiTPipeline(DiffusionPipeline):
    """A transformer with all that it takes to draw from it. `text_encoder` and `tokenizer`: None for runs without text.

    diffusion: the DiffusionConfig (or its JSON) that the transformer was trained with; None: its defaults.
    max_tokens: at which captions were cut in training; None: the transformer's `text_tokens`.
    classes: names of the classes and their labels; None: classes have numbers only.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' own declaration)

    transformer: STDiT
    scheduler: Any
    vae: ModelMixin
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        transformer: STDiT,
        scheduler: Any,
        vae: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        diffusion: dict | DiffusionConfig | None = None,
        max_tokens: int | None = None,
        classes: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        if isinstance(diffusion, dict):
            diffusion = validate(diffusion, DiffusionConfig, "STDiTPipeline: diffusion")
        self.diffusion = diffusion or DiffusionConfig()
        self.max_tokens = max_tokens or transformer.settings.text_tokens
        self.classes: dict[str, int] = dict(classes or {})
        self.register_to_config(
            diffusion=self.diffusion.model_dump(mode="json"), max_tokens=max_tokens, classes=classes
        )
        self.video_processor = VideoProcessor(do_resize=False)
        self._check_parts()

    def _check_parts(self) -> None:
        """ValueError: parts that don't belong together, with both numbers."""
        settings, channels = self.transformer.settings, VideoEncoder(self.vae).channels
        if channels != settings.in_channels:
            raise ValueError(
                f"the autoencoder ({type(self.vae).__name__}) has {channels} latent channels, the transformer takes in_channels {settings.in_channels}"
            )
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError("text_encoder and tokenizer: give both or neither")
        if self.text_encoder is not None:
            width = self.text_encoder.config.d_model
            if settings.text_dim != width:
                raise ValueError(
                    f"the text encoder's features are {width} wide, the transformer takes text_dim {settings.text_dim}"
                )
            if self.max_tokens > settings.text_tokens:
                raise ValueError(
                    f"max_tokens {self.max_tokens} is more than the transformer's text_tokens {settings.text_tokens}"
                )

    # ---------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, weights: Weights = "ema", **kwargs: Any
    ) -> STDiTPipeline:
        """The pipeline of a run directory, of one of its checkpoints, or of a folder or hub id that `save_pretrained` made.

        weights: of a run, the averaged ones or those trained last. Other keywords are diffusers' (`torch_dtype`;
        `vae=…` and other parts, to use in place of the stored ones). Modules come in evaluation mode.
        ValueError: neither of these; weights of another architecture; an encoder that is gone or changed.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "model_index.json").is_file() and folder.exists():
            if (folder / checkpoint.IDENTITY).is_file() or (folder / checkpoint.FOLDER).is_dir():
                pipe = cls._from_run(folder, weights, kwargs)
            else:
                raise ValueError(
                    f"{folder}: no pipeline here (looked for model_index.json), no run (checkpoints/) and no checkpoint (identity.json)"
                )
        else:
            folder_of(str(pretrained_model_name_or_path), "STDiTPipeline")
            saved = cast(dict[str, Any], cls.load_config(str(pretrained_model_name_or_path))).get("_class_name")
            if saved != cls.__name__:
                raise ValueError(f"{pretrained_model_name_or_path} holds a {saved}, not a {cls.__name__}")
            pipe = super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipe

    @classmethod
    def _from_run(cls, run: Path, weights: Weights, kwargs: dict[str, Any]) -> STDiTPipeline:
        """Assembled from a checkpoint: its transformer, and the encoders that its identity names."""
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        parts = {name: kwargs.pop(name) for name in ("scheduler", "vae", "text_encoder", "tokenizer") if name in kwargs}
        if kwargs:
            raise ValueError(f"{run}: a run takes no {', '.join(kwargs)}")
        # Asked for once: it reads every byte of the checkpoint to see that it is whole.
        place = checkpoint.transformer_folder(run, weights)
        identity = json.loads((place.parent / checkpoint.IDENTITY).read_text())
        transformer = STDiT.from_pretrained(place, torch_dtype=dtype)
        diffusion = validate(identity["diffusion"], DiffusionConfig, f"{run}: identity.json: diffusion")
        if "vae" not in parts:
            if identity["video_encoder"]["kind"] == "synthetic":
                raise ValueError(
                    f"{run} was trained on latents made on the spot, which no autoencoder decodes; give vae=…"
                )
            parts["vae"] = video_encoder_from_identity(identity["video_encoder"]).vae
        # Features for a run of several stages have text, which a stage with class labels alone does not take.
        of_text = identity["text_encoder"] if transformer.settings.text_dim else None
        if of_text is not None and of_text["class"] != "synthetic" and "text_encoder" not in parts:
            encoder = text_encoder_from_identity(of_text)
            parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, **parts}
        if "scheduler" not in parts:
            sampler = validate(identity["config"]["samples"]["sampler"], SamplerConfig, f"{run}: samples.sampler")
            parts["scheduler"] = make_scheduler(
                fitting(sampler, diffusion), diffusion, (1, 1, 1), transformer.settings.learned_variance
            )
        return cls(
            transformer,
            diffusion=diffusion,
            max_tokens=of_text["max_tokens"] if of_text else None,
            classes={name: i for i, name in enumerate(identity.get("classes") or [])} or None,
            **parts,
        )

    def use(self, sampler: SamplerConfig) -> None:
        """Takes the scheduler that `sampler` names. ValueError: one of another objective, or too many steps."""
        self.scheduler = make_scheduler(sampler, self.diffusion, (1, 1, 1), self.transformer.settings.learned_variance)

    # --------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        class_labels: Labels | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        fps: float = 8.0,
        num_videos_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> STDiTPipelineOutput | tuple[Any]:
        """Draws a video (`num_frames` 1: an image) for each prompt or class label.

        Args:
            prompt: captions, for runs with text; cut to `max_tokens`. None: the null caption.
            num_frames, height, width: in pixels; the autoencoder and the patches must divide them.
            guidance_scale: 1 is the conditional model alone; more costs twice as much.
            generator: on the CPU; a list has one for each video, which then does not depend on the others.
            class_labels: numbers or names, for runs with classes; -1 or None is the null class.
            negative_prompt: stands in the null caption's place in guidance; one, or one for each prompt.
            fps: told to models that were trained with it (images: 0).
            latents: the noise to begin from, (B, C, t, h, w), in place of the generator's.
            prompt_embeds, prompt_attention_mask: features (B, L, D) and mask (B, L) in place of prompts.
            callback_on_step_end: called as (pipe, step, timestep, {"latents": x_t}) after each step; returns the same
                dict, perhaps with other latents. They are all that it can have (…_tensor_inputs).

        Returns:
            STDiTPipelineOutput, or (frames,) without return_dict.

        Raises:
            ValueError: an argument that this model or another argument does not allow, with both numbers.
        """
        if height is None or width is None:
            raise ValueError(f"give height and width in pixels; found height {height}, width {width}")
        _check_counts(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: expected pil, np, pt or latent")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callbacks are given latents alone, asked for {list(callback_on_step_end_tensor_inputs)}")
        self._check_scheduler()
        device = self._execution_device
        clip = Bucket(frames=num_frames, height=height, width=width)
        encoder = VideoEncoder(self.vae)
        shape = encoder.check(clip)
        token_grid(shape, self.transformer.settings.patch_size, f"a clip of {clip.key}")
        cond, batch = self._condition(prompt, class_labels, prompt_embeds, prompt_attention_mask, num_videos_per_prompt)
        negative = self._negative(negative_prompt, batch, num_videos_per_prompt, cond)
        cond |= self._micro(clip, fps, batch, device)
        noise = self._noise((batch, encoder.channels, *shape), generator, latents, device)
        scheduler = self.scheduler
        if is_flow(scheduler):
            scheduler = shifted(scheduler, shift_for(self.diffusion, shape))

        with _evaluating(self.transformer), cast(Any, self).progress_bar(total=num_inference_steps) as bar:

            def on_step(i: int, timestep: Tensor, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                return callback_on_step_end(self, i, timestep, {"latents": x}).get("latents", x)

            unconditional = not {"class_labels", "encoder_hidden_states"} & set(cond)
            model = guided(self._predict, 1.0 if unconditional else _checked(guidance_scale), negative)
            x = sample(model, scheduler, noise, num_inference_steps, cond, generator, on_step)
        frames = x if output_type == "latent" else self._decode(encoder, x, output_type)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames=frames) if return_dict else (frames,)

    def _predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The transformer as a callable of the kind that guidance and sampling take."""
        return self.transformer(x.to(self.transformer.dtype), t, **cond, return_dict=False)[0]

    def _decode(self, encoder: VideoEncoder, x: Tensor, output_type: str) -> Any:
        """Latents (B, C, t, h, w) -> frames. One video at a time: it is the decoder that takes the memory."""
        _wake(self.vae)
        pixels = torch.cat([encoder.decode(one) for one in x.split(1)])  # (B, 3, T, H, W)
        return self.video_processor.postprocess_video(pixels, output_type)

    def _check_scheduler(self) -> None:
        wanted, kind = self.diffusion.objective, "flow" if is_flow(self.scheduler) else "ddpm"
        if kind != wanted:
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} draws from objective {kind}; the transformer was trained with objective {wanted}"
            )

    # ------------------------------------------------------------------------------- conditions

    def _condition(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: Labels | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        each: int,
    ) -> tuple[dict[str, Tensor], int]:
        """(keywords of the transformer's forward, B): every prompt's conditions, `each` times in a row."""
        settings = self.transformer.settings
        if (prompt is not None or embeds is not None) and settings.text_dim is None:
            takes = "class_labels" if settings.num_classes else "no condition"
            raise ValueError(f"this model takes no text (text_dim None); it takes {takes}")
        if class_labels is not None and settings.num_classes is None:
            raise ValueError("this model takes no class_labels (num_classes None)")
        if prompt is not None and embeds is not None:
            raise ValueError("give prompt or prompt_embeds, not both")
        if prompt is None and embeds is None and class_labels is None and (settings.text_dim or settings.num_classes):
            raise ValueError('give prompt or class_labels; prompt "" or class label -1 for no condition')
        if each < 1:
            raise ValueError(f"num_videos_per_prompt must be 1 or more, found {each}")
        cond: dict[str, Tensor] = {}
        if prompt is not None:
            embeds, mask = self.encode_prompt(prompt)
        if embeds is not None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            cond |= {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        if class_labels is not None:
            cond["class_labels"] = self.label_ids(class_labels)
        counts = {name: len(value) for name, value in cond.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"prompts and class_labels must be equally many, found {counts}")
        batch = next(iter(counts.values()), 1) * each
        device = self._execution_device
        return {name: value.to(device).repeat_interleave(each, 0) for name, value in cond.items()}, batch

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) float32 and mask (B, L). ValueError: not text, no text encoder, no prompts at all."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text_encoder; give prompt_embeds and prompt_attention_mask")
        if not prompts:
            raise ValueError("prompt is an empty list")
        for i, text in enumerate(prompts):
            check_text(text, f"prompt {i}")
        _wake(self.text_encoder)
        return TextEncoder(self.text_encoder, self.tokenizer, self.max_tokens).encode(prompts)

    def label_ids(self, labels: Labels) -> Tensor:
        """Class labels as numbers, (B,) int64. ValueError: a name or number that is no class, with those there are."""
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        given = [labels] if isinstance(labels, int | str) else list(cast(Sequence[int | str | None], labels))
        count = self.transformer.settings.num_classes or 0
        if not given:
            raise ValueError("class_labels is an empty list")
        return torch.tensor([label_id(label, self.classes, count) for label in given])

    def _negative(
        self, negative_prompt: str | Sequence[str] | None, batch: int, each: int, cond: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The condition in whose place guidance else has the null one; its class is null."""
        if negative_prompt is None:
            return None
        if "encoder_hidden_states" not in cond:
            raise ValueError("negative_prompt needs prompt or prompt_embeds")
        texts = [negative_prompt] * (batch // each) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(texts) * each != batch:
            raise ValueError(f"{len(texts)} negative prompts for {batch // each} prompts")
        device = cond["encoder_hidden_states"].device
        features, mask = (value.to(device).repeat_interleave(each, 0) for value in self.encode_prompt(texts))
        negative = {"encoder_hidden_states": features, "encoder_attention_mask": mask}
        if "class_labels" in cond:
            negative["class_labels"] = torch.full_like(cond["class_labels"], -1)
        return negative

    def _micro(self, clip: Bucket, fps: float, batch: int, device: torch.device) -> dict[str, Tensor]:
        """What models with micro-conditions are told of the clip, (B,) each."""
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, found {fps}")
        values = {"fps": fps if clip.frames > 1 else 0.0, "height": clip.height, "width": clip.width}
        wanted = self.transformer.settings.micro_conditions
        return {name: torch.full((batch,), float(values[name]), device=device) for name in wanted}

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """float32 noise to begin from: `latents`, or drawn from the generator (or one for each video)."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} videos")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, these videos need {shape}")
        return latents.to(device, torch.float32)


def _check_counts(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, found {value!r}")


def _checked(scale: float) -> float:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale must be a finite number, 0 or more; found {scale}")
    return scale


def _wake(module: Any) -> None:
    """Fetches a module that enable_model_cpu_offload has put aside: the encoders put their inputs where it lies."""
    if hasattr(module, "_hf_hook"):
        module._hf_hook.pre_forward(module)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: training may hand in the very model that it trains."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
