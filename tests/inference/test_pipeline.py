"""STDiTPipeline: what users of diffusers expect of it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from stdit.config import ConfigError, DiffusionConfig, SamplerConfig
from stdit.diffusion.denoiser import FunctionDenoiser
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import make_scheduler, set_steps
from stdit.encoders.text import TextEncoder
from stdit.encoders.video import PixelAutoencoder
from stdit.errors import CheckpointError
from stdit.inference.pipeline import STDiTPipeline, STDiTPipelineOutput
from stdit.models.stdit import STDiT
from tests.support.runs import CLASSES, TEXT, lively, make_run, model_config

SIZE: dict[str, Any] = {"num_frames": 4, "height": 16, "width": 8, "num_inference_steps": 3}
SHIFTED = DiffusionConfig(flow_shift=2.0, shift_base=(1, 8, 8))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    learned = model_config(**TEXT, learned_variance=True)
    return {
        "text": make_run(folder / "text", model_config(**TEXT), SHIFTED),
        "class": make_run(folder / "class", model_config(**CLASSES)),
        "both": make_run(folder / "both", model_config(**TEXT, **CLASSES, micro_conditions=("fps", "height"))),
        "none": make_run(folder / "none", model_config()),
        "ddpm": make_run(folder / "ddpm", learned, DiffusionConfig(objective="ddpm")),
    }


@pytest.fixture(scope="module")
def pipes(runs: dict[str, Path]) -> dict[str, STDiTPipeline]:
    loaded = {name: STDiTPipeline.from_pretrained(run) for name, run in runs.items()}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe: STDiTPipeline, *args: Any, **kwargs: Any) -> Any:
    output = pipe(*args, **{**SIZE, "output_type": "np", **kwargs})
    assert isinstance(output, STDiTPipelineOutput)
    return output.frames


# --------------------------------------------------------------------------------------- drawing


def test_frames_come_in_every_form_that_diffusers_knows(pipes: dict[str, STDiTPipeline]) -> None:
    forms: dict[str, Any] = {
        form: draw(pipes["text"], ["a", "b"], generator=generators(0, 1), output_type=form)
        for form in ("pil", "np", "pt", "latent")
    }
    assert forms["np"].shape == (2, 4, 16, 8, 3)
    assert tuple(forms["pt"].shape) == (2, 4, 3, 16, 8)
    assert tuple(forms["latent"].shape) == (2, 3, 4, 16, 8)
    assert [len(video) for video in forms["pil"]] == [4, 4]
    assert forms["pil"][0][0].size == (8, 16)
    assert np.array_equal(np.asarray(forms["pil"][1][2]), (forms["np"][1, 2] * 255).round().astype(np.uint8))
    assert np.array_equal(forms["np"].transpose(0, 1, 4, 2, 3), forms["pt"].numpy())


@pytest.mark.parametrize("name", ["text", "class", "both", "none", "ddpm"])
def test_the_same_generator_gives_the_same_video(name: str, pipes: dict[str, STDiTPipeline]) -> None:
    asked: dict[str, Any] = {"text": {"prompt": "a seven"}, "ddpm": {"prompt": "a seven"}, "none": {}}.get(
        name, {"class_labels": 1}
    )
    first, again, other = (draw(pipes[name], **asked, generator=generators(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_image_is_a_one_frame_video(pipes: dict[str, STDiTPipeline]) -> None:
    assert draw(pipes["text"], "a seven", num_frames=1).shape == (1, 1, 16, 8, 3)


def test_a_video_does_not_depend_on_the_others_in_its_batch(pipes: dict[str, STDiTPipeline]) -> None:
    together = draw(pipes["text"], ["a seven", "a longer caption"], generator=generators(3, 4))
    alone = draw(pipes["text"], "a seven", generator=generators(3))
    assert np.allclose(together[:1], alone, atol=1e-5)


def test_guidance_scale_one_is_the_conditional_model(pipes: dict[str, STDiTPipeline]) -> None:
    pipe = pipes["text"]
    noise = torch.randn(1, 3, 4, 16, 8, generator=torch.Generator().manual_seed(5))
    features, mask = pipe.encode_prompt("a seven")
    seen = []

    def conditional(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        seen.append(t[0].item())
        return pipe.transformer(x, t, features, mask).sample

    scheduler = make_scheduler(SamplerConfig(), pipe.diffusion, (4, 16, 8))
    with torch.no_grad():
        expected = sample(FunctionDenoiser(conditional), scheduler, noise, 3, {})
    found = draw(pipe, "a seven", guidance_scale=1.0, latents=noise, output_type="latent")
    assert torch.allclose(found, expected, atol=1e-4)
    # 2 x sqrt(16 x 8 / 64) x sqrt(4): the shift of this latent.
    r = 2 * 2**0.5 * 2
    assert seen == pytest.approx([1000 * r * s / (1 + (r - 1) * s) for s in (1, 2 / 3, 1 / 3)])


@pytest.mark.parametrize("name", ["text", "class"])
def test_guidance_moves_away_from_the_null_condition(name: str, pipes: dict[str, STDiTPipeline]) -> None:
    asked: dict[str, Any] = {"prompt": "a seven"} if name == "text" else {"class_labels": "one"}
    scales = [
        draw(pipes[name], **asked, generator=generators(0), guidance_scale=s, output_type="latent") for s in (0, 1, 3)
    ]
    assert not torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[1], scales[2])
    if name == "class":
        null = draw(pipes[name], class_labels=-1, generator=generators(0), guidance_scale=1, output_type="latent")
        assert torch.allclose(scales[0], null, atol=1e-5)


def test_a_negative_prompt_takes_the_null_captions_place(pipes: dict[str, STDiTPipeline]) -> None:
    for name in ("text", "both"):
        asked: dict[str, Any] = {"prompt": ["a", "b"], "generator": generators(0, 1)}
        plain, negative = draw(pipes[name], **asked), draw(pipes[name], **asked, negative_prompt="ugly, a long one")
        assert not np.array_equal(plain, negative)
    # The negative at scale 0 is all there is.
    only = draw(pipes["text"], "a", negative_prompt="b", guidance_scale=0, generator=generators(0))
    assert np.allclose(only, draw(pipes["text"], "b", guidance_scale=1, generator=generators(0)), atol=1e-5)


def test_several_videos_of_a_prompt_stand_beside_each_other(pipes: dict[str, STDiTPipeline]) -> None:
    several = draw(pipes["text"], ["a", "b"], num_videos_per_prompt=2, generator=generators(0, 1, 2, 3))
    each = draw(pipes["text"], ["a", "a", "b", "b"], generator=generators(0, 1, 2, 3))
    assert np.array_equal(several, each)


def test_classes_go_by_name_or_number(pipes: dict[str, STDiTPipeline]) -> None:
    by_name = draw(pipes["class"], class_labels=["a/b", "zero"], generator=generators(0, 1))
    by_number = draw(pipes["class"], class_labels=torch.tensor([2, 0]), generator=generators(0, 1))
    assert np.array_equal(by_name, by_number)


def test_no_class_is_the_null_class(pipes: dict[str, STDiTPipeline]) -> None:
    assert pipes["class"].label_ids([None, -1, 2]).tolist() == [-1, -1, 2]


def test_features_stand_in_for_prompts(pipes: dict[str, STDiTPipeline]) -> None:
    features, mask = pipes["text"].encode_prompt(["a", "a longer one"])
    given = draw(pipes["text"], prompt_embeds=features, prompt_attention_mask=mask, generator=generators(0, 1))
    assert np.array_equal(given, draw(pipes["text"], ["a", "a longer one"], generator=generators(0, 1)))


def test_a_callback_sees_every_step_and_may_change_the_latents(pipes: dict[str, STDiTPipeline]) -> None:
    steps = []

    def callback(pipe: Any, i: int, timestep: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append((i, kept["latents"].shape))
        return {"latents": torch.zeros_like(kept["latents"])} if i == 2 else kept

    frames = draw(pipes["text"], "a", callback_on_step_end=callback)
    assert steps == [(i, (1, 3, 4, 16, 8)) for i in range(3)]
    assert np.array_equal(frames, np.full_like(frames, 0.5))


def test_a_callback_may_interrupt(pipes: dict[str, STDiTPipeline]) -> None:
    steps: list[int] = []

    def callback(pipe: Any, i: int, timestep: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(i)
        pipe._interrupt = i == 1
        return kept

    assert np.isfinite(draw(pipes["text"], "a", callback_on_step_end=callback)).all()
    assert steps == [0, 1]
    draw(pipes["text"], "a", callback_on_step_end=lambda pipe, i, t, kept: steps.append(i) or kept)
    assert steps == [0, 1, 0, 1, 2]  # the next call runs to its end


@pytest.mark.parametrize("caption", ["", "..\\../etc/passwd", "eine Sieben läuft 左へ 🎬", "long " * 400])
def test_any_caption_is_drawn(caption: str, pipes: dict[str, STDiTPipeline]) -> None:
    assert np.isfinite(draw(pipes["text"], caption)).all()


def test_fps_reaches_models_with_that_micro_condition(pipes: dict[str, STDiTPipeline]) -> None:
    slow, fast = (draw(pipes["both"], "a", fps=f, generator=generators(0)) for f in (4.0, 30.0))
    assert not np.array_equal(slow, fast)
    slow, fast = (draw(pipes["text"], "a", fps=f, generator=generators(0)) for f in (4.0, 30.0))
    assert np.array_equal(slow, fast)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm_solver", "unipc"])
def test_a_model_with_learned_variance_is_drawn_by_every_scheduler(scheduler: str, runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["ddpm"])
    pipe.use(SamplerConfig.model_validate({"scheduler": scheduler, "steps": 3}))
    assert np.isfinite(draw(pipe, "a", generator=generators(0))).all()


def test_the_opposite_velocity_is_drawn_from_too(runs: dict[str, Path]) -> None:
    """Open-Sora 1.2's sign: the same video from weights whose every prediction is turned around."""
    pipe, other = (STDiTPipeline.from_pretrained(runs["none"]) for _ in range(2))
    with torch.no_grad():
        for parameter in other.transformer.final_layer.linear.parameters():
            parameter.neg_()
    other.diffusion = other.diffusion.model_copy(update={"velocity": "data_minus_noise"})
    first, second = (draw(each, generator=generators(0)) for each in (pipe, other))
    assert np.array_equal(first, second)


def test_drawing_leaves_a_model_in_training_mode_as_it_was(runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["none"])
    pipe.transformer.train()
    draw(pipe)
    assert pipe.transformer.training


def test_parts_put_aside_are_fetched_before_their_inputs_are_placed(runs: dict[str, Path]) -> None:
    """What enable_model_cpu_offload does on a GPU; here the hooks are seen to be called."""
    pipe = STDiTPipeline.from_pretrained(runs["text"])
    plain = draw(pipe, "a", generator=generators(0))
    called: list[str] = []

    class Aside(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(type(module).__name__)
            return args, kwargs

    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        assert isinstance(part, torch.nn.Module)
        add_hook_to_module(part, Aside())
    assert np.array_equal(draw(pipe, "a", generator=generators(0)), plain)
    assert list(dict.fromkeys(called)) == ["T5EncoderModel", "STDiT", "PixelAutoencoder"]


def test_a_users_own_scheduler_is_shifted_to_the_latent_too(runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["text"])
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[1][0].item()))
    draw(pipe, "a")
    mine = make_scheduler(SamplerConfig(scheduler="unipc"), SHIFTED, (4, 16, 8))
    assert seen == pytest.approx(set_steps(mine, 3).tolist())


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler])
def test_other_schedulers_of_flow_matching_draw(kind: type, runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["text"])
    pipe.scheduler = kind()
    assert np.isfinite(draw(pipe, "a", generator=generators(0)[0])).all()


# --------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("name", ["text", "class", "ddpm"])
def test_a_saved_pipeline_draws_the_very_same(name: str, pipes: dict[str, STDiTPipeline], tmp_path: Path) -> None:
    pipe = pipes[name]
    asked: dict[str, Any] = {"class_labels": ["a/b"]} if name == "class" else {"prompt": ["die Sieben läuft 左"]}
    pipe.save_pretrained(tmp_path / "saved")
    loaded = STDiTPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(draw(pipe, **asked, generator=generators(0)), draw(loaded, **asked, generator=generators(0)))
    assert (loaded.diffusion, loaded.max_text_tokens, loaded.classes) == (
        pipe.diffusion,
        pipe.max_text_tokens,
        pipe.classes,
    )
    assert not any(part.training for part in loaded.components.values() if isinstance(part, torch.nn.Module))


AUTOENCODERS: list[tuple[Any, tuple[int, int, int]]] = [
    (
        lambda: cast(Any, AutoencoderKL)(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        (5, 8, 4),
    ),
    (
        lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
        ),
        (2, 2, 4),
    ),
]


@pytest.mark.parametrize(("vae", "latent"), AUTOENCODERS, ids=["image", "video"])
def test_autoencoders_of_diffusers_are_decoded_and_saved(
    vae: Any, latent: tuple[int, int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    transformer = lively(STDiT.from_settings(model_config(in_channels=4, patch_size=(1, 1, 1))), 0)
    pipe = STDiTPipeline(transformer, make_scheduler(SamplerConfig(), DiffusionConfig(), (1, 1, 1)), vae())
    size: dict[str, Any] = {"num_frames": 5, "height": 16, "width": 8 if latent[0] == 5 else 32}
    assert tuple(draw(pipe, **size, output_type="latent").shape) == (1, 4, *latent)
    frames = draw(pipe, **size, generator=generators(0))
    assert frames.shape == (1, 5, 16, size["width"], 3)
    pipe.save_pretrained(tmp_path)
    loaded = STDiTPipeline.from_pretrained(tmp_path)
    assert np.array_equal(draw(loaded, **size, generator=generators(0)), frames)
    with pytest.raises(ConfigError, match=r"height 15 is not divisible"):
        draw(pipe, **{**size, "height": 15})


def test_a_run_its_checkpoint_and_either_weights_can_be_had(runs: dict[str, Path]) -> None:
    place = runs["class"] / "checkpoints" / "step-00000020"
    for source in (runs["class"], str(place)):
        pipe = STDiTPipeline.from_pretrained(source)
        averaged = load_file(place / "transformer_ema" / WEIGHTS)
        assert all(torch.equal(v, averaged[k]) for k, v in pipe.transformer.state_dict().items())
    trained = STDiTPipeline.from_pretrained(runs["class"], weights="model").transformer.state_dict()
    last = load_file(place / "transformer" / WEIGHTS)
    assert all(torch.equal(v, last[k]) for k, v in trained.items())


def test_a_class_conditional_run_needs_no_text_encoder(pipes: dict[str, STDiTPipeline]) -> None:
    assert pipes["class"].text_encoder is None
    assert pipes["text"].text_encoder is not None


def test_a_component_can_replace_the_stored_one(runs: dict[str, Path]) -> None:
    mine = PixelAutoencoder(3)
    assert STDiTPipeline.from_pretrained(runs["text"], vae=mine).vae is mine


def test_the_default_scheduler_fits_the_objective(pipes: dict[str, STDiTPipeline], runs: dict[str, Path]) -> None:
    assert type(pipes["text"].scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    pipe = STDiTPipeline.from_pretrained(runs["ddpm"])
    assert pipe.scheduler.config["prediction_type"] == "epsilon"


def test_a_run_is_loaded_in_the_requested_dtype(runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["text"], torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert np.isfinite(draw(pipe, "a")).all()


# --------------------------------------------------------------------------------------- refusals


def test_weights_of_another_architecture_are_refused(pipes: dict[str, STDiTPipeline], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    pipes["class"].save_pretrained(saved)
    deeper = lively(STDiT.from_settings(model_config(**CLASSES, depth=3)), 0)
    deeper.save_pretrained(tmp_path / "deeper")
    (saved / "manifest.json").unlink()
    shutil.copy(tmp_path / "deeper" / WEIGHTS, saved / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected.*blocks\.2"):
        STDiTPipeline.from_pretrained(saved)
    shutil.rmtree(saved / "transformer")
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    dit.save_pretrained(saved / "transformer")
    with pytest.raises(ValueError, match="DiTTransformer2DModel"):
        STDiTPipeline.from_pretrained(saved)


def test_another_pipelines_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="StableDiffusionPipeline, not an STDiTPipeline"):
        STDiTPipeline.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run: no such folder"):
        STDiTPipeline.from_pretrained(tmp_path / "run")


def test_a_folder_that_is_no_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_index.json"):
        STDiTPipeline.from_pretrained(tmp_path)


def test_a_damaged_checkpoint_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["none"], run)
    weights = run / "checkpoints" / "step-00000020" / "transformer_ema" / WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        STDiTPipeline.from_pretrained(run)


def test_a_missing_weight_is_an_error(pipes: dict[str, STDiTPipeline], tmp_path: Path) -> None:
    pipes["class"].save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    file = tmp_path / "transformer" / WEIGHTS
    weights = load_file(file)
    del weights["blocks.1.scale_shift_table"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*blocks\.1\.scale_shift_table"):
        STDiTPipeline.from_pretrained(tmp_path)


def test_parts_that_do_not_belong_together_are_refused(pipes: dict[str, STDiTPipeline]) -> None:
    text, classes = pipes["text"], pipes["class"]
    with pytest.raises(ValueError, match="1 latent channels.*in_channels 3"):
        STDiTPipeline(classes.transformer, classes.scheduler, PixelAutoencoder(1))
    with pytest.raises(ValueError, match="32 wide.*text_dim None"):
        STDiTPipeline(classes.transformer, classes.scheduler, classes.vae, text.text_encoder, text.tokenizer)
    with pytest.raises(ValueError, match="both or neither"):
        STDiTPipeline(text.transformer, text.scheduler, text.vae, text.text_encoder)
    with pytest.raises(ValueError, match=r"max_text_tokens 99 .* max_text_tokens 24"):
        STDiTPipeline(text.transformer, text.scheduler, text.vae, text.text_encoder, text.tokenizer, max_text_tokens=99)
    with pytest.raises(ConfigError, match="diffusion: sift: unknown key"):
        STDiTPipeline(classes.transformer, classes.scheduler, classes.vae, diffusion={"sift": 3.0})


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"prompt": "a", "height": 15}, r"15 is not divisible by model.patch_size 2"),
    ("text", {"prompt": "a", "height": None}, "height None"),
    ("text", {"prompt": "a", "num_frames": 0}, "num_frames|frames"),
    ("text", {"prompt": "a", "num_frames": 2.5}, "num_frames must be a whole number above 0, found 2.5"),
    ("text", {"prompt": "a", "num_inference_steps": 0}, "num_inference_steps .* found 0"),
    ("text", {"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps .* found 2.5"),
    ("class", {"class_labels": [1.5]}, "class 1.5 is none of this model's 3 classes"),
    ("text", {"prompt": []}, "empty list"),
    ("text", {"prompt": ["a", 7]}, "prompt 1: expected text, found int"),
    ("text", {"prompt": "a\ud800"}, r"prompt 0: .*surrogates"),
    ("text", {}, "give prompt or class_labels"),
    ("text", {"prompt": "a", "class_labels": 1}, "takes no class_labels"),
    ("text", {"prompt": "a", "guidance_scale": -1}, "guidance_scale .* found -1"),
    ("text", {"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale .* found nan"),
    ("text", {"prompt": ["a", "b"], "generator": generators(0)}, "1 generators for 2 videos"),
    ("text", {"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
    ("text", {"prompt": "a", "latents": torch.zeros(1, 3, 4, 8, 8)}, r"\(1, 3, 4, 8, 8\).*\(1, 3, 4, 16, 8\)"),
    ("text", {"prompt": "a", "output_type": "gif"}, "'gif'"),
    ("text", {"prompt": "a", "num_videos_per_prompt": 0}, "found 0"),
    ("text", {"prompt": "a", "fps": 0}, "fps .* found 0"),
    ("text", {"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 32)}, "not both"),
    ("text", {"prompt": "a", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "only latents can be passed on"),
    ("class", {"prompt": "a"}, "takes no text .* class_labels"),
    ("class", {"class_labels": 3}, "class 3 is none of this model's 3 classes"),
    ("class", {"class_labels": "seven"}, "class 'seven' .* zero, one, a/b"),
    ("class", {"class_labels": []}, "empty list"),
    ("class", {"class_labels": torch.tensor([True, False])}, "class_labels: expected numbers or names, found bool"),
    ("class", {"class_labels": torch.tensor([1], device="meta")}, "class_labels: expected a tensor with values"),
    ("class", {"class_labels": 1, "negative_prompt": "a"}, "negative_prompt needs prompt"),
    ("none", {"prompt": "a"}, "takes no text .* no condition"),
    ("both", {"prompt": ["a", "b"], "class_labels": [1]}, "equally many"),
]


@pytest.mark.parametrize(("name", "asked", "message"), BAD, ids=[f"{n}-{m[:24]}" for n, _, m in BAD])
def test_bad_input_is_refused_before_work(
    name: str, asked: dict[str, Any], message: str, pipes: dict[str, STDiTPipeline]
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipes[name], **asked)


def test_a_scheduler_of_another_objective_is_refused(runs: dict[str, Path]) -> None:
    pipe = STDiTPipeline.from_pretrained(runs["text"])
    with pytest.raises(ValueError, match="ddim samples objective ddpm"):
        pipe.use(SamplerConfig(scheduler="ddim"))
    flow = make_scheduler(SamplerConfig(scheduler="dpm_solver"), pipe.diffusion, (1, 1, 1))
    for other in (DDIMScheduler(), DDIMScheduler.from_config(flow.config)):
        pipe.scheduler = other
        with pytest.raises(ValueError, match="DDIMScheduler samples objective ddpm; .* flow"):
            draw(pipe, "a")


def test_captions_are_cut_where_training_cut_them(pipes: dict[str, STDiTPipeline], monkeypatch: Any) -> None:
    seen: list[int] = []
    encode: Callable[..., Any] = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts: seen.append((r := encode(self, texts))[0].shape[1]) or r
    )
    pipes["text"].encode_prompt("long " * 100)
    assert seen == [24]
