"""STDiTPipeline: a diffusers DiffusionPipeline from captions or class labels to videos and images.

    pipe = STDiTPipeline.from_pretrained("runs/demo/clips")
    pipe(["a seven moving left"], num_frames=8, height=16, width=16, guidance_scale=3.0).frames

diffusers' own `DiffusionPipeline.from_pretrained` does not know this class: call it on STDiTPipeline.

B videos · C latent channels · (t, h, w) latent frames, height, width · (T, H, W) the same in pixels · L text tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stdit.config import Bucket, DiffusionConfig, SamplerConfig, token_grid, validate
from stdit.config.identity import FrameSampling
from stdit.diffusion.guidance import check_channels, check_path_drop, guided
from stdit.diffusion.objectives import with_scheduler_sign
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import is_flow, make_scheduler, shifted
from stdit.diffusion.timesteps import shift_for
from stdit.encoders.pretrained import no_remote_code
from stdit.encoders.source import folder_of
from stdit.encoders.text import TextFeatures, onload
from stdit.encoders.text_loading import from_components
from stdit.encoders.video import VideoEncoder
from stdit.files import check_regular
from stdit.inference.components import check_components, check_index, load_components, load_strictly, read_index
from stdit.inference.inputs import (
    MAX_SCALE,
    ConditionEncoder,
    Labels,
    PipelineInputs,
    callback_latents,
    check_callable,
    check_counts,
    check_finite,
    check_generator,
    check_memory,
    check_output,
    checked_fps,
    checked_number,
    checked_prompts,
    prepare_latents,
)
from stdit.inference.lora import LoraMixin
from stdit.inference.video_conditions import (
    Frames,
    VideoCondition,
    check_frame_condition,
    prepare_control_latents,
    prepare_frame_condition,
    read_control,
    read_latents,
    read_video,
)
from stdit.integrity import check_saved
from stdit.models.control import STDiTControl
from stdit.models.sampling import CachedConditions, micro_conditions
from stdit.models.sequence_parallel import SequenceParallel
from stdit.models.stdit import STDiT
from stdit.ops import onednn
from stdit.training import checkpoint

Weights = Literal["ema", "model"]


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """`frames`: a list of lists of PIL images ("pil"), an array (B, T, H, W, 3) in 0 to 1 ("np"), a tensor
    (B, T, 3, H, W) in 0 to 1 ("pt"), or normalised latents (B, C, t, h, w) ("latent")."""

    frames: Any


class STDiTPipeline(LoraMixin, DiffusionPipeline):
    """A transformer with all that it takes to draw from it. `text_encoder` and `tokenizer`: None for runs without text.

    diffusion: the DiffusionConfig (or its JSON) that the transformer was trained with; None: the defaults of the
        objective that the scheduler draws from.
    max_text_tokens: at which captions were cut in training; None: the transformer's `max_text_tokens`.
    classes: names of the classes and their labels; None: classes have numbers only.
    text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, text_layout: more text encoders, and how the features of
        all are concatenated (the `layout` of stdit.encoders.text); None: there is one.
    control: a control branch of the transformer.
    fps: frames per second of most of the videos that the transformer was trained on; None: not known.
    frame_sampling: which frames of a clip it was trained on (FrameSampling or its JSON), as `stdit generate` reads
        control videos; None: the first.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = [  # noqa: RUF012 (diffusers' own declaration)
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "control"
    ]  # fmt: skip

    # Who multiplies float32 matrices on a CPU: "auto", "onednn" or "torch" (stdit.ops.onednn).
    cpu_matmul_backend: onednn.Backend = "auto"

    transformer: STDiT
    scheduler: Any
    vae: ModelMixin
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    control: STDiTControl | None

    def __init__(
        self,
        transformer: STDiT,
        scheduler: Any,
        vae: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        diffusion: dict | DiffusionConfig | None = None,
        max_text_tokens: int | None = None,
        classes: dict | None = None,
        control: STDiTControl | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        text_layout: dict | None = None,
        fps: float | None = None,
        frame_sampling: dict | FrameSampling | None = None,
    ) -> None:
        super().__init__()
        self._interrupt = False
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
            control=control,
        )  # fmt: skip
        if isinstance(diffusion, dict):
            diffusion = validate(diffusion, DiffusionConfig, "STDiTPipeline: diffusion")
        self.diffusion = diffusion or DiffusionConfig(objective="flow" if is_flow(scheduler) else "ddpm")
        self.max_text_tokens = max_text_tokens or transformer.settings.max_text_tokens
        self.classes: dict[str, int] = dict(classes or {})
        self.text_layout = text_layout
        self.fps = fps
        if isinstance(frame_sampling, dict):
            frame_sampling = validate(frame_sampling, FrameSampling, "STDiTPipeline: frame_sampling")
        self.frame_sampling = frame_sampling or FrameSampling()
        self.register_to_config(
            diffusion=self.diffusion.model_dump(mode="json"),
            max_text_tokens=max_text_tokens,
            classes=classes,
            text_layout=text_layout,
            fps=fps,
            frame_sampling=self.frame_sampling.model_dump(mode="json"),
        )
        self.video_processor = VideoProcessor()
        check_components(transformer, vae, control, self.prompt_encoder)

    # ---------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, weights: Weights = "ema", **kwargs: Any
    ) -> STDiTPipeline:
        """The pipeline of a run directory, of one of its checkpoints, or of a folder or hub id that `save_pretrained`
        made.

        weights: of a run, the averaged ones or those trained last. A run that trained adapters or a control branch
        comes with the base that they belong to; `base=…` says where that lies now, if it was moved. Other keywords are
        diffusers' (`torch_dtype`; `vae=…` and other parts, to use in place of the stored ones). Modules come in
        evaluation mode.
        ValueError: neither of these; weights of another architecture; an encoder that is gone or changed.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "model_index.json").is_file() and folder.exists():
            if (folder / checkpoint.IDENTITY).is_file() or (folder / checkpoint.FOLDER).is_dir():
                pipe = cls(**load_components(folder, weights, kwargs))
            else:
                raise ValueError(
                    f"{folder}: no pipeline here (looked for model_index.json), no run (checkpoints/) and no checkpoint (identity.json)"
                )
        else:
            path = str(pretrained_model_name_or_path)
            saved = folder_of(path, "STDiTPipeline")
            if kwargs.pop("trust_remote_code", False):
                raise ValueError("trust_remote_code: code of a pipeline's folder is never run")
            index = read_index(path, cls.__name__) if saved else check_index(cls.load_config(path), path, cls.__name__)
            if saved:
                check_saved(saved)
                for part in index:
                    check_regular(saved / part)
            kwargs |= load_strictly(path, cast(dict[str, Any], index), kwargs)
            try:
                with no_remote_code():
                    pipe = super().from_pretrained(path, **kwargs)
            except Exception as error:  # whatever diffusers raises for files that are damaged
                raise ValueError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipe

    def use(self, sampler: SamplerConfig) -> None:
        """Takes the scheduler that `sampler` names. ValueError: one of another objective, or too many steps."""
        self.scheduler = make_scheduler(sampler, self.diffusion, (1, 1, 1), self.transformer.settings.learned_variance)

    def set_sequence_parallel(self, parallel: SequenceParallel | None) -> None:
        """Divides the tokens of each video over a group of ranks, which all call the pipeline with equal arguments and
        generators; each gets the videos (stdit.inference.parallel). ValueError: the architecture does not allow it."""
        for part in filter(None, (self.transformer, self.control)):
            part.set_sequence_parallel(parallel)

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
        guidance_channels: int | None = None,
        path_drop: bool = False,
        fps: float | None = None,
        num_videos_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        conditioning_frames: Frames | None = None,
        conditioning_latents: Tensor | None = None,
        conditioning_video: Any = None,
        control: STDiTControl | None = None,
        control_image: Any = None,
        control_video: Any = None,
        control_latents: Tensor | None = None,
        control_scale: float = 1.0,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> STDiTPipelineOutput | tuple[Any]:
        """Generates a video (`num_frames` 1: an image) for each prompt or class label.

        Args:
            prompt: captions, for text-conditional models; truncated to `max_text_tokens`. None: the null caption.
            num_frames, height, width: in pixels; multiples of the autoencoder's compression and the patch size.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance scale; 1 is no guidance, at half the cost.
            guidance_channels: number of latent channels that are guided, from the first. None: all, as in diffusers and
                Latte; 3 (of 4) is what DiT's and PixArt's own code does.
            path_drop: path-drop guidance, for models with sparse_dense: the unconditional prediction leaves their
                sparse blocks out.
            generator: on the CPU; a list has one per video, which makes each video independent of its batch.
            class_labels: numbers or names, for class-conditional models; -1 or None is the null class.
            negative_prompt: replaces the null caption in guidance; one, or one per prompt. Default of a model without a
                null caption (null_text: empty): "".
            fps: frames per second, for models with that micro-condition; None: that of most training videos (or 8), and
                0 for images.
            latents: initial noise (B, C, t, h, w) in place of the generator's.
            prompt_embeds, prompt_attention_mask: text features (B, L, D) and mask (B, L) in place of prompts;
                pooled_prompt_embeds (B, P) for models with a pooled vector. negative_…: likewise, of one row or B.
            conditioning_frames: latent frames that are not generated, as numbers or bool (B or 1, t): the first for
                image-to-video, the first few for extension, first and last ([0, -1]) for a loop, any for in-betweening.
                None: as many of the first as there are latents or video.
            conditioning_latents, conditioning_video: their content: normalised latents (B or 1, C, frames, h, w), or an
                image or video in any of diffusers' forms, 0 to 1, of any size; of the whole clip, or of those frames
                alone.
            control: a control branch in place of the pipeline's own.
            control_image, control_video, control_latents: its condition, one of the three: an image for all frames; a
                video of the clip's length; normalised latents (…, C', t or 1, h, w). One for all prompts, or one each.
            control_scale: factor on the control branch's residuals; at 0 it is not run.
            callback_on_step_end: called as (pipe, step, timestep, {"latents": x_t}) after each step; returns a dict,
                from which latents are taken. Setting `pipe._interrupt = True` ends sampling.
            callback_on_step_end_tensor_inputs: ("latents",); no other tensors can be passed.

        Returns:
            STDiTPipelineOutput, or (frames,) without return_dict.

        Raises:
            ValueError: an argument that the model or another argument does not allow, with both numbers.
        """
        if height is None or width is None:
            raise ValueError(f"give height and width in pixels; found height {height!r:.80}, width {width!r:.80}")
        check_counts(
            num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
        )  # fmt: skip
        check_output(output_type, callback_on_step_end_tensor_inputs)
        self._check_scheduler()
        self._interrupt = False
        settings, device = self.transformer.settings, self._execution_device
        if device.type == "cpu":
            for part in filter(None, (self.transformer, self.control)):
                onednn.set_backend(part, self.cpu_matmul_backend)
        check_channels(guidance_channels, settings.in_channels)
        check_path_drop(path_drop, settings.sparse_dense)
        check_callable("callback_on_step_end", callback_on_step_end)
        check_generator(generator)
        guidance_scale = checked_number("guidance_scale", guidance_scale, 0, MAX_SCALE)
        control_scale = checked_number("control_scale", control_scale, -MAX_SCALE, MAX_SCALE)
        clip = Bucket(frames=num_frames, height=height, width=width)
        vae = VideoEncoder(self.vae)
        latent = vae.check(clip)
        grid = token_grid(latent, settings.patch_size, f"a clip of {clip.key}", settings.pad_latents)

        # 1. Arguments, checked before anything is encoded
        if prompt is not None:
            prompt = checked_prompts("prompt", prompt)
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            negative_prompt = checked_prompts("negative_prompt", negative_prompt)
        inputs = PipelineInputs(
            prompt, class_labels, negative_prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds,
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds, num_videos_per_prompt,
        )  # fmt: skip
        check_memory(self.transformer, clip, grid, inputs, guidance_scale != 1)
        encoder = self._condition_encoder()
        batch = encoder.check(inputs, guidance_scale != 1)
        fps = checked_fps(fps, num_frames, self.fps)
        shape, patch = (batch, settings.in_channels, *latent), settings.patch_size[0]
        noise = prepare_latents(shape, generator, latents, device)
        conditioning = self._read_conditioning(vae, conditioning_video, conditioning_latents, clip)
        check_frame_condition(conditioning_frames, conditioning, shape, patch)
        controls = {
            "control_image": control_image, "control_video": control_video, "control_latents": control_latents
        }  # fmt: skip
        branch, control_condition = self._read_control(
            control, controls, control_scale, vae, clip, latent, batch, num_videos_per_prompt
        )

        # 2. Text, class and micro-conditions, conditioning frames, control
        cond, _ = encoder.encode(inputs)
        if not cond:
            guidance_scale = 1.0  # an unconditional model
        negative = None if guidance_scale == 1 else encoder.encode_negative(inputs, cond, batch)
        arguments: dict[str, Any] = dict(cond)
        if added := micro_conditions(settings, clip, fps, device):
            arguments["added_cond_kwargs"] = added
        frame_condition = None
        if conditioning is not None:
            frame_condition = prepare_frame_condition(
                conditioning_frames, conditioning.encode(vae), shape, patch, device
            )
            arguments["conditioning_frames"] = frame_condition.frames.expand(batch, -1)
        if control_condition is not None:
            arguments["control"] = prepare_control_latents(control_condition, vae, batch, num_videos_per_prompt).to(
                device
            )

        # 3. Denoising
        scheduler = self.scheduler
        if is_flow(scheduler):
            scheduler = shifted(scheduler, shift_for(self.diffusion, latent))
        onload(self.transformer)
        onload(branch)
        model = with_scheduler_sign(CachedConditions(self.transformer, branch, scale=control_scale), self.diffusion)
        model = guided(model, guidance_scale, negative, guidance_channels, path_drop)
        with _eval_mode(self.transformer, branch), cast(Any, self).progress_bar(total=num_inference_steps) as bar:

            def on_step(i: int, timestep: Tensor, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                return callback_latents(callback_on_step_end(self, i, timestep, {"latents": x}), x)

            x = sample(
                model, scheduler, noise, num_inference_steps, arguments, generator, on_step, frame_condition,
                interrupted=lambda: self.interrupt,
            )  # fmt: skip

        check_finite(x)

        # 4. Decoding
        frames = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames=frames) if return_dict else (frames,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt`: sampling ends after that step, with the latents as they are."""
        return self._interrupt

    def _control_branch(self, control: STDiTControl | None, conditions: Mapping[str, Any]) -> STDiTControl | None:
        """The control branch of this call. ValueError: conditions without a branch; a branch of another model."""
        branch = self.control if control is None else control
        if branch is None and any(value is not None for value in conditions.values()):
            raise ValueError("this pipeline has no control branch; give control=…")
        if branch is not None and not isinstance(branch, STDiTControl):
            raise ValueError(f"control: expected an STDiTControl, found {type(branch).__name__}")
        if branch is None:
            return None
        branch.check_base(self.transformer)
        if branch.dtype != self.transformer.dtype:
            raise ValueError(f"the control branch is {branch.dtype}, the transformer {self.transformer.dtype}")
        return branch

    def _read_control(
        self, control: STDiTControl | None, conditions: Mapping[str, Any], scale: float, vae: VideoEncoder, clip: Bucket,
        latent: tuple[int, int, int], batch: int, num_videos_per_prompt: int,
    ) -> tuple[STDiTControl | None, VideoCondition | None]:  # fmt: skip
        """The control branch and its condition, checked and not yet encoded; None of either where it does nothing."""
        branch = self._control_branch(control, conditions)
        if branch is None or (scale == 0 and all(value is None for value in conditions.values())):
            return None, None
        condition = read_control(
            branch, vae, self.video_processor, conditions, clip, latent, batch, num_videos_per_prompt
        )
        return (None, None) if scale == 0 else (branch, condition)

    def _read_conditioning(
        self, vae: VideoEncoder, video: Any, latents: Tensor | None, clip: Bucket
    ) -> VideoCondition | None:
        """The content of the conditioning frames, not yet encoded. ValueError: both are passed, or neither is a
        video."""
        if video is None:
            return None if latents is None else read_latents("conditioning_latents", latents)
        if latents is not None:
            raise ValueError("give conditioning_latents or conditioning_video, not both")
        return read_video(vae, self.video_processor, video, clip, "conditioning_video")

    def _decode(self, x: Tensor, output_type: str) -> Any:
        """Latents (B, C, t, h, w) -> frames, one video at a time: decoding takes the most memory."""
        onload(self.vae)
        vae = VideoEncoder(self.vae)
        pixels = torch.cat([vae.decode(one) for one in x.split(1)])  # (B, 3, T, H, W)
        return self.video_processor.postprocess_video(pixels, output_type)

    def _check_scheduler(self) -> None:
        expected, kind = self.diffusion.objective, "flow" if is_flow(self.scheduler) else "ddpm"
        if kind != expected:
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} samples objective {kind}; the transformer was trained with objective {expected}"
            )

    # ------------------------------------------------------------------------------- conditions

    def _condition_encoder(self) -> ConditionEncoder:
        encode = None if self.text_encoder is None else self.encode_prompt
        return ConditionEncoder(self.transformer.settings, encode, self.classes, self._execution_device)

    @property
    def prompt_encoder(self) -> Any:
        """The text encoder, or encoders as one (stdit.encoders.text); None where there is none."""
        return from_components(self.components, self.text_layout, self.max_text_tokens)

    def encode_prompt(self, prompt: str | Sequence[str]) -> TextFeatures:
        """(features (B, L, D) float32, mask (B, L)), and `.pooled`. ValueError: not text, no text encoder, no
        prompts."""
        prompts = checked_prompts("prompt", prompt)
        encoder = self.prompt_encoder
        if encoder is None:
            raise ValueError("this pipeline has no text_encoder; give prompt_embeds and prompt_attention_mask")
        return encoder.encode(prompts)

    def label_ids(self, labels: Labels) -> Tensor:
        """Class labels as numbers, (B,) int64. ValueError: a name or number that is no class, with those there are."""
        return self._condition_encoder().label_ids(labels)


@contextmanager
def _eval_mode(*modules: nn.Module | None) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode that each module was in (training passes the model that it
    trains)."""
    present = [module for module in modules if module is not None]
    training = [module for module in present if module.training]
    for module in present:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
