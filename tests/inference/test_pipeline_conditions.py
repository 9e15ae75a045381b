"""What STDiTPipeline tells the model: negatives, guided channels, sizes, given frames; and whose scheduler is left
alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image

from stdit.config import Bucket, ByteT5Config, DiffusionConfig, SamplerConfig, TextEncoderConfig
from stdit.diffusion.schedulers import is_ours, make_scheduler
from stdit.encoders.text import TextEncoder, TextFeatures
from stdit.encoders.text_loading import load_text_encoder
from stdit.encoders.video import PixelAutoencoder
from stdit.inference import inputs
from stdit.inference.inputs import ConditionEncoder, PipelineInputs, Prompts, check_memory
from stdit.inference.pipeline import STDiTPipeline, STDiTPipelineOutput
from stdit.models.stdit import STDiT
from tests.support.runs import CLASSES, TEXT, lively, model_config

WORDS: dict[str, Any] = dict(TEXT)
LABELS: dict[str, Any] = dict(CLASSES)

SIZE: dict[str, Any] = {"num_frames": 4, "height": 16, "width": 8, "num_inference_steps": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: STDiTPipeline, *args: Any, **kwargs: Any) -> Any:
    output = pipe(*args, **{**SIZE, "output_type": "latent", "generator": generator(), **kwargs})
    assert isinstance(output, STDiTPipelineOutput)
    return output.frames


def pipeline(encoder: bool = True, diffusion: DiffusionConfig | None = None, **settings: Any) -> STDiTPipeline:
    """A pipeline over pixels whose transformer has every weight drawn."""
    transformer = lively(STDiT.from_settings(model_config(**settings)), 0)
    diffusion = diffusion or DiffusionConfig()
    name = "flow_euler" if diffusion.objective == "flow" else "ddim"
    scheduler = make_scheduler(SamplerConfig(scheduler=name), diffusion, (1, 1, 1))
    parts: dict[str, Any] = {}
    if encoder and transformer.settings.text_dim:
        text = load_text_encoder(TextEncoderConfig(byte_t5=ByteT5Config(width=32, depth=1), max_text_tokens=24))
        parts = {"text_encoder": text.model, "tokenizer": text.tokenizer}
    pipe = STDiTPipeline(transformer, scheduler, PixelAutoencoder(3), diffusion=diffusion, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe: STDiTPipeline) -> list[Mapping[str, Any]]:
    """The keywords of the transformer's calls from now on."""
    seen: list[Mapping[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


# ------------------------------------------------------------------------------------- negatives


def test_a_model_without_a_null_caption_is_guided_away_from_the_empty_one() -> None:
    pipe = pipeline(**WORDS, null_text="empty")
    plain = draw(pipe, ["a", "a longer one"])
    assert torch.allclose(plain, draw(pipe, ["a", "a longer one"], negative_prompt=""), atol=1e-5)
    features, mask = pipe.encode_prompt("")
    given = {"negative_prompt_embeds": features, "negative_prompt_attention_mask": mask}
    assert torch.allclose(plain, draw(pipe, ["a", "a longer one"], **given), atol=1e-5)
    assert not torch.allclose(plain, draw(pipe, ["a", "a longer one"], negative_prompt="b"), atol=1e-3)


def test_features_serve_where_there_is_no_text_encoder() -> None:
    told = pipeline(**WORDS, null_text="empty")
    bare = pipeline(False, **WORDS, null_text="empty")
    (features, mask), (null, null_mask) = told.encode_prompt(["a", "bb"]), told.encode_prompt("")
    asked: dict[str, Any] = {"prompt_embeds": features, "prompt_attention_mask": mask}
    with pytest.raises(
        ValueError, match=r"null_text: empty.*negative_prompt_embeds and negative_prompt_attention_mask"
    ):
        draw(bare, **asked)
    found = draw(bare, **asked, negative_prompt_embeds=null, negative_prompt_attention_mask=null_mask)
    assert torch.equal(found, draw(told, ["a", "bb"]))
    # Without guidance nothing is needed.
    assert torch.equal(draw(bare, **asked, guidance_scale=1), draw(told, ["a", "bb"], guidance_scale=1))


def test_classes_alone_do_for_a_model_without_a_null_caption() -> None:
    pipe = pipeline(**WORDS, **LABELS, null_text="empty")
    found = draw(pipe, class_labels=[1, 2], generator=generator())
    assert torch.allclose(found, draw(pipe, ["", ""], class_labels=[1, 2], generator=generator()), atol=1e-5)


def test_pooled_vectors_are_used_and_left_out_of_the_negative() -> None:
    pipe = pipeline(**WORDS, null_text="empty", pooled_dim=5, conditioning="joint", attention="full")
    pooled = torch.randn(2, 5, generator=generator(1))
    plain = draw(pipe, ["a", "b"], pooled_prompt_embeds=pooled)
    assert not torch.allclose(plain, draw(pipe, ["a", "b"]), atol=1e-3)
    zeros = draw(pipe, ["a", "b"], pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=torch.zeros(1, 5))
    assert torch.allclose(plain, zeros, atol=1e-5)
    other = draw(pipe, ["a", "b"], pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled.flip(0))
    assert not torch.allclose(plain, other, atol=1e-3)
    # Several videos of a prompt have its pooled vector.
    twice = draw(
        pipe, ["a", "b"], pooled_prompt_embeds=pooled, num_videos_per_prompt=2, generator=[generator(i) for i in (0, 0, 1, 1)]
    )  # fmt: skip
    assert torch.allclose(twice[0::2], twice[1::2], atol=1e-4)


def test_an_encoders_own_pooled_vectors_are_used_unless_others_are_passed() -> None:
    def encode(prompt: Prompts) -> TextFeatures:
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return TextFeatures(
            torch.zeros(len(captions), 1, 4), torch.ones(len(captions), 1).bool(), lengths[:, None].expand(-1, 5)
        )

    settings = model_config(text_dim=4, max_text_tokens=8, null_text="empty", pooled_dim=5)
    encoder = ConditionEncoder(settings, encode, {}, torch.device("cpu"))
    asked = PipelineInputs(prompt=["a", "bbb"], num_videos_per_prompt=2)
    cond, batch = encoder.encode(asked)
    negative = encoder.encode_negative(asked, cond, batch)
    assert negative is not None
    assert cond["pooled_projections"][:, 0].tolist() == [1, 1, 3, 3]
    assert negative["pooled_projections"][:, 0].tolist() == [0, 0, 0, 0]
    other = encoder.encode_negative(
        PipelineInputs(prompt=["a", "bbb"], num_videos_per_prompt=2, negative_prompt=["cc", "dddd"]), cond, batch
    )
    assert other is not None
    assert other["pooled_projections"][:, 0].tolist() == [2, 2, 4, 4]
    own = PipelineInputs(prompt=["a", "bbb"], pooled_prompt_embeds=torch.full((2, 5), 7.0))
    assert encoder.encode(own)[0]["pooled_projections"].eq(7).all()
    # A model without them is told none.
    plain = ConditionEncoder(model_config(text_dim=4, max_text_tokens=8), encode, {}, torch.device("cpu"))
    assert "pooled_projections" not in plain.encode(asked)[0]


# ---------------------------------------------------------------------------- guided channels, size


def test_channels_that_are_not_guided_keep_the_conditional_prediction() -> None:
    """One step: the prediction itself can be read off."""
    pipe = pipeline(**LABELS)
    one: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 1}
    conditional, guided = draw(pipe, **one, guidance_scale=1), draw(pipe, **one, guidance_scale=5.0)
    some = draw(pipe, **one, guidance_scale=5.0, guidance_channels=2)
    assert torch.allclose(some[:, :2], guided[:, :2], atol=1e-5)
    assert torch.allclose(some[:, 2:], conditional[:, 2:], atol=1e-4)
    assert not torch.allclose(some[:, 2:], guided[:, 2:], atol=1e-2)
    with pytest.raises(ValueError, match="guidance_channels 4 is more than the 3 latent channels"):
        draw(pipe, **one, guidance_channels=4)


def test_a_model_receives_the_size_that_it_samples() -> None:
    pipe = pipeline(**WORDS, micro_conditions=("frames", "size"), hidden_size=48)
    seen = calls(pipe)
    sizes = [draw(pipe, "a", height=h, width=w) for h, w in ((16, 8), (8, 16))]
    assert sizes[0].shape[3:] == (16, 8)
    assert all("conditions" in kwargs for kwargs in seen)
    # Told to all of a batch at once: one row of modulation, guidance and several prompts notwithstanding.
    draw(pipe, ["a", "b"])
    assert seen[-1]["conditions"].modulation.video.shape[0] == 1
    model = pipe.transformer
    x, features = torch.zeros(1, 3, 4, 16, 8), torch.zeros(1, 1, 32)
    added: dict[str, Any] = {"frames": 4.0, "height": 16.0, "width": 8.0}
    ratio = model(x, 5.0, features, added_cond_kwargs=added | {"aspect_ratio": torch.tensor([2.0])}).sample
    assert torch.equal(ratio, model(x, 5.0, features, added_cond_kwargs=added).sample)


def test_an_image_has_fps_0_by_default() -> None:
    pipe = pipeline(**WORDS, micro_conditions=("fps",))
    still, asked, other = (draw(pipe, "a", num_frames=1, fps=fps) for fps in (None, 120.0, 60.0))
    assert not torch.equal(still, asked)
    assert not torch.equal(asked, other)
    assert torch.equal(draw(pipe, "a"), draw(pipe, "a", fps=8.0))


def test_models_with_a_position_reference_receive_pixels() -> None:
    pipe = pipeline(**WORDS, position_reference=32)
    seen = calls(pipe)
    assert draw(pipe, ["a", "b"]).isfinite().all()
    pixels = seen[0]["added_cond_kwargs"]
    assert {k: v.tolist() for k, v in pixels.items()} == {"height": [16.0], "width": [8.0]}


# ---------------------------------------------------------------------------------- given frames


def test_conditioning_frames_come_back_bit_for_bit_and_others_depend_on_them() -> None:
    pipe = pipeline(**WORDS, **LABELS)
    asked: dict[str, Any] = {"prompt": ["a", "b"], "class_labels": [1, 2]}
    whole = torch.randn(2, 3, 4, 16, 8, generator=generator(9))
    for frames in ([0], [0, 1, 2], [0, -1], [1, 3]):
        drawn = draw(pipe, **asked, conditioning_frames=frames, conditioning_latents=whole)
        assert torch.equal(drawn[:, :, frames], whole[:, :, frames])
        other = draw(pipe, **asked, conditioning_frames=frames, conditioning_latents=whole + 1)
        rest = [f for f in range(4) if f not in [n % 4 for n in frames]]
        assert not torch.allclose(drawn[:, :, rest], other[:, :, rest], atol=1e-3)
        # Those frames alone, in the order in which they are named, and as a mask.
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask[:, frames] = True
        assert torch.equal(
            drawn, draw(pipe, **asked, conditioning_frames=frames, conditioning_latents=whole[:, :, frames])
        )
        assert torch.allclose(
            drawn, draw(pipe, **asked, conditioning_frames=mask, conditioning_latents=whole), atol=1e-4
        )
    assert torch.equal(
        draw(pipe, **asked, conditioning_latents=whole[:, :, :2]),
        draw(pipe, **asked, conditioning_frames=[0, 1], conditioning_latents=whole),
    )


def test_each_video_may_have_frames_of_its_own() -> None:
    pipe = pipeline(**WORDS)
    whole = torch.randn(2, 3, 4, 16, 8, generator=generator(9))
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    drawn = draw(
        pipe, ["a", "b"], conditioning_frames=mask, conditioning_latents=whole, generator=[generator(0), generator(1)]
    )
    assert all(torch.equal(drawn[i][:, mask[i]], whole[i][:, mask[i]]) for i in range(2))
    second = draw(
        pipe, "b", conditioning_frames=[2, 1], conditioning_latents=whole[1:, :, [2, 1]], generator=generator(1)
    )
    assert torch.allclose(drawn[1:], second, atol=1e-4)


def test_the_model_receives_the_conditioning_frames_at_every_step() -> None:
    pipe = pipeline(**WORDS)
    inputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    seen = calls(pipe)
    whole = torch.randn(1, 3, 4, 16, 8, generator=generator(9))
    steps: list[torch.Tensor] = []
    draw(
        pipe, ["a", "b"], conditioning_frames=[0], conditioning_latents=whole,
        callback_on_step_end=lambda p, i, t, kept: steps.append(kept["latents"]) or kept,
    )  # fmt: skip
    for x in [*inputs, *steps]:
        assert torch.equal(x[:, :, 0], whole[:, :, 0].expand(len(x), -1, -1, -1))
    # The same for all of the batch, and so one row, of four frames.
    assert all(kwargs["conditions"].modulation.video.shape[:2] == (1, 4) for kwargs in seen)


def test_a_picture_is_brought_to_life() -> None:
    pipe = pipeline(**WORDS)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    frames = draw(pipe, "a", conditioning_video=Image.fromarray(pixels), output_type="np")
    assert np.array_equal((frames[0, 0] * 255).round().astype(np.uint8), pixels)
    # In whatever form, what the pipeline itself returns included.
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for video in (tensor, tensor[None], tensor[None, None], frames[:, :1], frames[0, :1], [Image.fromarray(pixels)]):
        assert np.allclose(draw(pipe, "a", conditioning_video=video, output_type="np"), frames, atol=1e-4)
    longer = draw(pipe, "a", conditioning_frames=[0, 1], conditioning_video=frames, output_type="np", num_frames=4)
    assert np.allclose(longer[:, :2], frames[:, :2], atol=1e-6)
    # Of another size it is stretched, as by diffusers' own pipelines.
    large = Image.fromarray(pixels).resize((40, 30), Image.Resampling.NEAREST)
    stretched = draw(pipe, "a", conditioning_video=large, output_type="np")[0, 0]
    expected = np.asarray(large.resize((8, 16), Image.Resampling.LANCZOS))
    assert np.array_equal((stretched * 255).round().astype(np.uint8), expected)


def test_a_video_autoencoder_takes_a_picture_as_the_first_latent_frame() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    transformer = lively(STDiT.from_settings(model_config(in_channels=4, patch_size=(1, 1, 1))), 0)
    pipe = STDiTPipeline(transformer, make_scheduler(SamplerConfig(), DiffusionConfig(), (1, 1, 1)), vae)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 1, 3, 16, 32, generator=generator(2))
    size: dict[str, Any] = {"num_frames": 9, "width": 32}
    first, again = (draw(pipe, **size, conditioning_video=picture, generator=generator(s)) for s in (0, 1))
    assert first.shape == (1, 4, 3, 2, 4)
    assert torch.equal(first[:, :, 0], again[:, :, 0])
    assert not torch.equal(first[:, :, 1:], again[:, :, 1:])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"conditioning_frames": [0]}, "conditioning_frames needs conditioning_latents or conditioning_video"),
    ({"conditioning_latents": torch.zeros(1, 3, 5, 16, 8)}, r"\(1, 3, 5, 16, 8\).*of 1 to 4 frames"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 8, 8)}, r"\(1, 3, 1, 8, 8\); expected \(1 or 1, 3, frames, 16, 8\)"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 16, 8), "conditioning_frames": [4]}, "latent frame 4; this clip has 4"),
    ({"conditioning_latents": torch.zeros(1, 3, 2, 16, 8), "conditioning_frames": [1]}, "has 2 frames, conditioning_frames lists 1"),
    ({"conditioning_latents": torch.zeros(1, 3, 2, 16, 8), "conditioning_frames": [1, -3]}, "lists a frame twice"),
    ({"conditioning_latents": torch.zeros(1, 3, 4, 16, 8), "conditioning_frames": torch.ones(3, dtype=torch.bool)}, r"\(3,\).*\(1 or 1, 4\)"),
    ({"conditioning_latents": torch.zeros(1, 3, 4, 16, 8), "conditioning_video": torch.zeros(1, 1, 3, 16, 8)}, "not both"),
    ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 1, 32)}, "not both"),
    ({"negative_prompt_attention_mask": torch.ones(1, 1)}, "needs negative_prompt_embeds"),
    ({"negative_prompt_embeds": torch.zeros(3, 1, 32)}, "of 3 rows for 1 prompts"),
    ({"pooled_prompt_embeds": torch.zeros(1, 5)}, "takes no pooled_prompt_embeds"),
    ({"negative_pooled_prompt_embeds": torch.zeros(1, 5)}, "needs pooled_prompt_embeds"),
    ({"prompt_attention_mask": torch.ones(1, 5)}, "prompt_attention_mask needs prompt_embeds"),
    ({"prompt": None, "prompt_embeds": torch.full((1, 4, 32), float("nan"))}, "prompt_embeds: not finite"),
    ({"prompt": None, "prompt_embeds": torch.full((1, 4, 32), 1e38)}, r"not finite \(NaN or infinity\) in videos \[0\] of 1"),
    ({"prompt": None, "prompt_embeds": torch.ones(1, 4, 32).bool()}, "expected floating point, found torch.bool"),
    ({"prompt": None, "prompt_embeds": torch.ones(1, 4, 32).to(torch.complex64)}, "expected floating point, found torch.complex64"),
    ({"prompt": None, "prompt_embeds": [[1.0]]}, "prompt_embeds: expected a tensor, found list"),
    ({"prompt": None, "prompt_embeds": torch.ones(1, 4, 32), "prompt_attention_mask": torch.full((1, 4), 0.5)}, "found torch.float32 with other values"),
    ({"negative_prompt_embeds": torch.full((1, 1, 32), float("inf"))}, "negative_prompt_embeds: not finite"),
    ({"latents": torch.full((1, 3, 4, 16, 8), float("nan"))}, "latents: not finite"),
    ({"latents": torch.ones(1, 3, 4, 16, 8).long()}, "latents: expected floating point, found torch.int64"),
    ({"conditioning_latents": torch.full((1, 3, 1, 16, 8), float("nan"))}, "conditioning_latents: not finite"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    ({"prompt": {"a": 1}}, "prompt: expected text, or a list of texts; found dict"),
    ({"guidance_channels": 0}, "guidance_channels must be a whole number above 0, found 0"),
    ({"guidance_channels": "2"}, "guidance_channels must be a whole number above 0, found '2'"),
    ({"guidance_scale": "4"}, "guidance_scale must be a finite number, 0 to 10000; found '4'"),
    ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, 0 to 10000; found 1000"),
    ({"guidance_scale": None}, "guidance_scale must be a finite number, 0 to 10000; found None"),
    ({"control_scale": "x"}, "control_scale must be a finite number"),
    ({"control": 7}, "control: expected an STDiTControl, found int"),
    ({"fps": "8"}, "fps must be a finite number, .* found '8'"),
    ({"fps": -1}, "fps must be a finite number, .* found -1"),
    ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt must be a whole number above 0, found 1.5"),
    ({"num_inference_steps": 10**9}, "num_inference_steps must be 100000 at most, found 1000000000"),
    ({"width": 10**6}, "width must be 65536 at most, found 1000000"),
    ({"num_frames": 10**6, "height": 2**16, "width": 2**16}, "1 videos of 1000000x65536x65536 are .* tokens and take .* GiB at least; the cpu has"),
    ({"prompt": ["a", "b"], "num_videos_per_prompt": 2**31 - 1}, "num_videos_per_prompt: 4294967294 videos of 4x16x8"),
    ({"prompt": np.array("a")}, "prompt: expected text, or a list of texts; found ndarray"),
    ({"negative_prompt": 7}, "negative_prompt: expected text, or a list of texts; found int"),
    ({"negative_prompt": ["a", None]}, "negative_prompt 1: expected text, found NoneType"),
    ({"output_type": 10**400}, "output_type 10+….* expected pil"),
    ({"generator": 7}, "generator must be a torch.Generator or a list of them, found int"),
    ({"generator": []}, "generator must be a torch.Generator or a list of them, found an empty list"),
    ({"generator": [None]}, "generator must be a torch.Generator or a list of them, found NoneType"),
    ({"callback_on_step_end": "log"}, "callback_on_step_end must be a function, found str"),
    ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs: only latents .* found None"),
    ({"conditioning_latents": [1.0]}, "conditioning_latents: expected a tensor, found list"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 16, 8), "conditioning_frames": [0.5]}, r"conditioning_frames: expected numbers .* found \[0.5\]"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 16, 8), "conditioning_frames": 0}, "conditioning_frames: expected numbers .* found 0"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 16, 8), "conditioning_frames": np.array(0.5)}, "conditioning_frames: expected numbers"),
    ({"conditioning_video": "clip.mp4"}, r"conditioning_video: not an image or a video \(str"),
    ({"conditioning_video": np.full((1, 16, 8, 3), 200, np.uint8)}, "conditioning_video: expected floating point from 0 to 1, or PIL images; found uint8"),
    ({"conditioning_video": np.full((1, 16, 8, 3), 200.0, np.float32)}, "conditioning_video: expected numbers from 0 to 1, found up to 200"),
    ({"conditioning_video": torch.full((1, 3, 16, 8), float("nan"))}, "conditioning_video: not finite"),
    ({"conditioning_video": {"frames": 1}}, r"conditioning_video: not an image or a video \(dict"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 31)}, r"prompt_embeds has shape \(1, 4, 31\); expected \(rows, tokens, 32\)"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 3)}, r"\(1, 3\).*\(1, 4\)"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 25, 32)}, "prompt_embeds has 25 tokens; the model takes max_text_tokens 24"),
    ({"negative_prompt_embeds": torch.zeros(1, 25, 32)}, "negative_prompt_embeds has 25 tokens"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32).to_sparse()}, "prompt_embeds: expected a dense tensor, found one of layout sparse_coo"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32, device="meta")}, "prompt_embeds: expected a tensor with values, found one on the meta device"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32).to(torch.float8_e4m3fn)}, "prompt_embeds: expected floating point, found torch.float8_e4m3fn"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 4, device="meta")}, "prompt_attention_mask: expected a tensor with values"),
    ({"latents": torch.zeros(1, 3, 4, 16, 8).to_sparse()}, "latents: expected a dense tensor"),
    ({"latents": torch.zeros(1, 3, 4, 16, 8, device="meta")}, "latents: expected a tensor with values"),
    ({"latents": torch.zeros(1, 3, 4, 16, 8).to(torch.float8_e5m2)}, "latents: expected floating point, found torch.float8_e5m2"),
    ({"conditioning_latents": torch.zeros(1, 3, 1, 16, 8).to_sparse()}, "conditioning_latents: expected a dense tensor"),
    ({"conditioning_latents": torch.tensor(1.0)}, r"conditioning_latents has shape \(\); expected \(videos, channels, frames, height, width\)"),
    ({"conditioning_video": torch.zeros(1, 5, 3, 16, 8)}, "conditioning_video has 5 frames; the clip has num_frames 4"),
    ({"conditioning_video": torch.zeros(2, 1, 3, 16, 8)}, "conditioning_video has 2 videos for 1 to be generated"),
    ({"conditioning_video": torch.zeros(1, 2, 3, 16, 8), "conditioning_frames": [1]}, "conditioning_video has 2 frames, conditioning_frames lists 1"),
    ({"negative_prompt": {"a": 1}, "guidance_scale": 1}, "negative_prompt: expected text, or a list of texts; found dict"),
    ({"negative_prompt": 7, "guidance_scale": 1}, "negative_prompt: expected text, or a list of texts; found int"),
    ({"callback_on_step_end": lambda *_: None, "prompt": None, "prompt_embeds": torch.zeros(1, 4, 32)}, "callback_on_step_end must return a dict, .* it returned NoneType"),
    ({"callback_on_step_end": lambda *_: {"latents": None}, "prompt": None, "prompt_embeds": torch.zeros(1, 4, 32)}, "callback_on_step_end: latents: expected a tensor, found NoneType"),
    ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 3, 4, 8, 8)}, "prompt": None, "prompt_embeds": torch.zeros(1, 4, 32)}, r"callback_on_step_end: latents has shape \(1, 3, 4, 8, 8\); expected \(1, 3, 4, 16, 8\)"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_what_does_not_fit_is_refused_before_anything_is_encoded(
    asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(**WORDS)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("text was encoded"))
    monkeypatch.setattr(PixelAutoencoder, "encode", lambda *_: pytest.fail("a video was encoded"))
    with pytest.raises(ValueError, match=message) as caught:
        draw(pipe, **{"prompt": "a", **asked})
    assert "\n" not in str(caught.value)


def test_a_caption_without_tokens_is_refused_by_a_model_without_a_null_caption() -> None:
    pipe = pipeline(**WORDS, null_text="empty")
    asked: dict[str, Any] = {"prompt_embeds": torch.zeros(2, 4, 32)}
    mask = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match="^prompt_attention_mask: caption 1 has no token"):
        draw(pipe, **asked, prompt_attention_mask=mask)
    with pytest.raises(ValueError, match="^negative_prompt_attention_mask: caption 1 has no token"):
        draw(pipe, **asked, negative_prompt_embeds=torch.zeros(2, 4, 32), negative_prompt_attention_mask=mask)


def test_conditioning_frames_come_in_whole_patches() -> None:
    pipe = pipeline(patch_size=(2, 2, 2))
    with pytest.raises(ValueError, match="2 latent frames share a patch"):
        draw(pipe, conditioning_frames=[0, 3], conditioning_latents=torch.zeros(1, 3, 2, 16, 8))
    assert (
        draw(pipe, conditioning_frames=[0, 1], conditioning_latents=torch.zeros(1, 3, 2, 16, 8))[:, :, :2].eq(0).all()
    )


# --------------------------------------------------------------------------- whose scheduler it is


def times_of(pipe: STDiTPipeline) -> list[float]:
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda m, args: seen.append(args[1].flatten()[0].item()))
    draw(pipe)
    return seen


def test_a_published_scheduler_steps_as_it_is() -> None:
    pipe = pipeline(diffusion=DiffusionConfig(flow_shift=5.0))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(3)
    assert times_of(pipe) == torch.as_tensor(theirs.timesteps).tolist()
    pipe = pipeline(diffusion=DiffusionConfig(objective="ddpm", noise_schedule="squaredcos_cap_v2"))
    for kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        pipe.scheduler, theirs = kind(beta_schedule="squaredcos_cap_v2"), kind(beta_schedule="squaredcos_cap_v2")
        theirs.set_timesteps(3)
        assert times_of(pipe)[-3:] == torch.as_tensor(theirs.timesteps).tolist()


def test_a_scheduler_of_ours_stays_ours_through_saving_and_changing(tmp_path: Path) -> None:
    pipe = pipeline(diffusion=DiffusionConfig(flow_shift=5.0))
    pipe.save_pretrained(tmp_path)
    loaded = STDiTPipeline.from_pretrained(tmp_path)
    assert is_ours(loaded.scheduler)
    assert times_of(loaded) == times_of(pipe)[:3] != [1000.0, 1000 * 2 / 3, 1000 / 3]
    changed = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    assert is_ours(changed)
    assert not is_ours(UniPCMultistepScheduler())


def test_memory_is_that_of_a_ranks_share_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipeline(**WORDS).transformer
    clip, grid, asked = Bucket(frames=4, height=16, width=8), (4, 16, 8), PipelineInputs(prompt="a")
    tokens = 4 * 16 * 8
    needed = 2 * tokens * int(model.settings.dimensions[0] * (2 + model.settings.mlp_ratio)) * 4
    monkeypatch.setattr(inputs, "device_memory", lambda device: needed)
    check_memory(model, clip, grid, asked, guided=True)
    monkeypatch.setattr(inputs, "device_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match="1 videos of 4x16x8 are 512 tokens"):
        check_memory(model, clip, grid, asked, guided=True)
    monkeypatch.setattr(model, "sequence_parallel", SimpleNamespace(size=2))
    check_memory(model, clip, grid, asked, guided=True)
