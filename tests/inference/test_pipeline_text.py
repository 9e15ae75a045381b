"""A pipeline with several text encoders: loaded from a run, saved, and telling the model what training told it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedModel

from stdit import extract
from stdit.config import Bucket, DiffusionConfig
from stdit.data.features import FeatureSet
from stdit.encoders.text_loading import components, load_text_encoder
from stdit.generate import _notes
from stdit.inference.pipeline import STDiTPipeline
from stdit.inference.prompts import Item, Prompt
from stdit.models.stdit import STDiT
from stdit.weights.convert import load_published
from tests.support import clip_folder, encoders, forked
from tests.support.encoders import CAPTIONS, LENGTH, T5, G, L
from tests.support.runs import lively, make_run, model_config

SIZE: dict[str, Any] = {"num_frames": 2, "height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np"}
POOLED = L + G + 8
SD3: dict[str, Any] = {
    "conditioning": "joint", "attention": "full", "null_text": "empty", "text_dim": T5, "max_text_tokens": LENGTH + 30,
    "pooled_dim": POOLED,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sd3")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> STDiTPipeline:
    run = make_run(folder / "run", model_config(**SD3), text=encoders.sd3(folder))
    loaded = STDiTPipeline.from_pretrained(run)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: STDiTPipeline, *args: Any, **more: Any) -> np.ndarray:
    output: Any = pipe(*args, generator=torch.Generator().manual_seed(0), **{**SIZE, **more})
    return output.frames


def test_prompts_are_encoded_as_extraction_did(pipe: STDiTPipeline, folder: Path, tmp_path: Path) -> None:
    made = clip_folder.rows(tmp_path, 4)
    features = FeatureSet(extract.run(clip_folder.config(tmp_path, made, text_encoder=encoders.sd3(folder))))
    samples = [features.sample(i) for i in range(4)]
    found = pipe.encode_prompt([sample.caption for sample in samples])
    for i, sample in enumerate(samples):
        torch.testing.assert_close(found.features[i], sample.text, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.pooled[i], sample.pooled, atol=1e-5, rtol=1e-4)  # type: ignore[index]
    own = load_text_encoder(encoders.sd3(folder)).encode(CAPTIONS)
    again = pipe.encode_prompt(CAPTIONS)
    assert torch.equal(again.features, own.features)
    assert torch.equal(again.pooled, own.pooled)  # type: ignore[arg-type]


def test_a_saved_pipeline_has_all_its_encoders(pipe: STDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"text_encoder", "text_encoder_2", "tokenizer_2", "text_encoder_3"}
    loaded = STDiTPipeline.from_pretrained(tmp_path)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert isinstance(getattr(loaded, name), PreTrainedModel)
    assert torch.equal(loaded.encode_prompt(CAPTIONS).features, pipe.encode_prompt(CAPTIONS).features)
    assert np.array_equal(draw(loaded, "a seven"), draw(pipe, "a seven"))


def test_guidance_leaves_the_empty_prompts_features_and_vector(pipe: STDiTPipeline) -> None:
    told, none = pipe.encode_prompt(["a seven"]), pipe.encode_prompt([""])
    given = draw(
        pipe,
        prompt_embeds=told.features,
        pooled_prompt_embeds=told.pooled,
        negative_prompt_embeds=none.features,
        negative_pooled_prompt_embeds=none.pooled,
    )
    assert np.array_equal(draw(pipe, ["a seven"]), given)
    assert not np.array_equal(draw(pipe, ["a seven"]), draw(pipe, ["an eight"]))


def test_clips_and_captions_to_videos_with_three_encoders(folder: Path, tmp_path: Path) -> None:
    """Extract, train with captions dropped and samples drawn, load the run, draw."""
    made = clip_folder.rows(tmp_path / "clips", 8)
    out = extract.run(clip_folder.config(tmp_path / "clips", made, text_encoder=encoders.sd3(folder)))
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, "micro_conditions": ["frames"]}
    shapes = [{"frames": n, "height": 16, "width": 16, "batch_size": 1} for n in (1, 5)]
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {**sizes, **SD3},
        "data": {"features": str(out), "buckets": shapes},
        "diffusion": {"caption_dropout": 0.5},
        "validation": {"every": 2, "samples": 2},
        "samples": {"every": 2, "count": 2, "sampler": {"steps": 2}},
        "train": {"steps": 4, "zero_stage": 0, "tensorboard": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = forked.run("stdit.train", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    assert len(losses) == 4
    loaded = STDiTPipeline.from_pretrained(tmp_path / "run")
    assert np.isfinite(draw(loaded, "a red wave")).all()


@pytest.mark.parametrize("negative", [None, "ugly"])
def test_a_converted_sd3_draws_what_sd3s_own_pipeline_draws(negative: str | None, folder: Path, tmp_path: Path) -> None:
    """Encoders, guidance against the empty prompt, scheduler and autoencoder together: the same images."""
    encoder = load_text_encoder(encoders.sd3(folder, 12))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        theirs = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=T5, caption_projection_dim=32, pooled_projection_dim=POOLED, pos_embed_max_size=12,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for weight in theirs.parameters():
                weight += 0.05 * torch.randn(weight.shape)
        vae = cast(Any, AutoencoderKL)(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4, latent_channels=4, scaling_factor=1.5, shift_factor=0.1,
        ).eval()  # fmt: skip
        noise = torch.randn(2, 4, 8, 12)
    theirs.save_pretrained(tmp_path)
    held = components(encoder)
    reference = cast(Any, StableDiffusion3Pipeline)(
        transformer=theirs, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, **held
    )
    ours = STDiTPipeline(
        load_published(tmp_path),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        diffusion=DiffusionConfig(flow_shift=3.0),
        text_layout=encoder.layout,
        **held,
    )
    for pipe in (reference, ours):
        pipe.set_progress_bar_config(disable=True)
    prompts = ["a seven", "the digit eight moves"]
    asked: dict[str, Any] = {
        "height": 16,
        "width": 24,
        "num_inference_steps": 12,
        "guidance_scale": 4.0,
        "output_type": "np",
    }
    wanted = reference(
        prompts, negative_prompt=negative and [negative] * 2, latents=noise.clone(), max_sequence_length=12, **asked
    ).images
    found: Any = ours(prompts, negative_prompt=negative, latents=noise[:, :, None].clone(), **asked)
    assert np.abs(found.frames[:, 0] - wanted).max() < 1e-5


def test_a_prompt_that_an_encoder_cuts_is_noted(pipe: STDiTPipeline) -> None:
    shape, texts = Bucket(frames=4, height=16, width=16), ["a seven", "a caption of more letters"]
    items = [Item(i, Prompt(text), 0, f"{i}.mp4", shape, 8) for i, text in enumerate(texts)]
    assert [(o.file, o.note) for o in _notes(pipe, items)] == [("1.mp4", f"caption of 23 tokens cut to {LENGTH}")]


def test_encoders_that_do_not_fit_the_model_are_refused(pipe: STDiTPipeline) -> None:
    def built(**model: Any) -> STDiTPipeline:
        transformer = lively(STDiT.from_settings(model_config(**{**SD3, **model})), 0)
        parts = {k: v for k, v in pipe.components.items() if k != "transformer"}
        return STDiTPipeline(transformer, text_layout=pipe.text_layout, **parts)

    assert built().text_encoder_3 is not None
    with pytest.raises(ValueError, match=f"pooled vectors are {POOLED} wide, the transformer takes pooled_dim 9"):
        built(pooled_dim=9)
    with pytest.raises(ValueError, match=f"features are {T5} wide, the transformer takes text_dim 16"):
        built(text_dim=16)
    with pytest.raises(
        ValueError, match=f"max_text_tokens {LENGTH + 30} is more than the transformer's max_text_tokens 9"
    ):
        built(max_text_tokens=9)
    parts = {k: v for k, v in pipe.components.items() if k != "transformer"}
    with pytest.raises(ValueError, match="3 text encoders: text_layout says how"):
        STDiTPipeline(pipe.transformer, **parts)
