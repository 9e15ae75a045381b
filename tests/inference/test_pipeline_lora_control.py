"""Adapters and control branches in the pipeline: added up, merged, taken away; images and videos as conditions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image
from torch import Tensor

from stdit.config import (
    Bucket,
    Config,
    ConfigError,
    ControlConfig,
    DataConfig,
    InitConfig,
    LoRAConfig,
    LoRASource,
    SamplerConfig,
    TrainBucket,
    TrainConfig,
)
from stdit.config.identity import FrameSampling
from stdit.data.transforms import frame_indices, frame_step
from stdit.generate import _read_clip, generate
from stdit.inference.pipeline import STDiTPipeline
from stdit.inference.prompts import Prompt
from stdit.media import write_clip
from stdit.models import lora
from stdit.models.control import STDiTControl
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint
from tests.support.runs import CLASSES, make_run, model_config

SIZE: dict[str, Any] = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "base", model_config(**CLASSES))


def shaken(parameters: Any, seed: int, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in parameters:
            weight += std * torch.randn(weight.shape, generator=generator)


def adapter(run: Path, folder: Path, seed: int | None, **settings: Any) -> Path:
    """An adapter of the run's model; seed None: as it starts."""
    model = STDiT.from_pretrained(checkpoint.find_weights(run))
    lora.add_adapter(model, **{"rank": 2, **settings})
    if seed is not None:
        shaken((p for p in model.parameters() if p.requires_grad), seed)
    lora.save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def style(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(run, tmp_path_factory.mktemp("style"), 1)


@pytest.fixture(scope="module")
def motion(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(
        run, tmp_path_factory.mktemp("motion"), 2, rank=3, target_modules=["attn_temp.qkv", "mlp.fc1"], alpha=6.0
    )


def opened(run: Path, **kwargs: Any) -> STDiTPipeline:
    pipe = STDiTPipeline.from_pretrained(run, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: STDiTPipeline, **changes: Any) -> Tensor:
    asked = {**SIZE, "class_labels": [0, 2], "guidance_scale": 2.0, **changes}
    return pipe(**asked, generator=torch.Generator().manual_seed(0)).frames  # type: ignore[union-attr]


def test_an_adapter_that_learnt_nothing_changes_nothing(run: Path, tmp_path: Path) -> None:
    pipe = opened(run)
    plain = draw(pipe)
    pipe.load_lora_weights(adapter(run, tmp_path, None))
    assert torch.equal(draw(pipe), plain)


def test_adapters_add_up_and_merge_and_leave_no_trace(run: Path, style: Path, motion: Path) -> None:
    pipe = opened(run)
    plain, weights = draw(pipe), {n: w.clone() for n, w in pipe.transformer.state_dict().items()}
    assert pipe.load_lora_weights(style) == "lora_0"
    first = draw(pipe)
    assert not torch.allclose(first, plain, atol=1e-3)
    pipe.load_lora_weights(motion, adapter_name="motion", scale=0.5)
    assert pipe.adapters == {"lora_0": 1.0, "motion": 0.5}
    both = draw(pipe)
    assert not torch.allclose(both, first, atol=1e-3)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), both, rtol=1e-5, atol=1e-5)
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), both)
    with pytest.raises(ValueError, match=r"adapters: expected names, found \[7\]"):
        pipe.set_adapters(cast(Any, [7]))
    pipe.set_adapters("lora_0")
    assert torch.equal(draw(pipe), first)
    pipe.set_adapters(["motion", "lora_0"], [0.5, 1.0])
    assert torch.equal(draw(pipe), both)
    pipe.set_adapters({})
    assert torch.equal(draw(pipe), plain)
    pipe.set_adapters({"lora_0": 1.0, "motion": 0.5})
    pipe.fuse_lora()
    pipe.delete_adapters("motion")
    torch.testing.assert_close(draw(pipe), first, rtol=1e-5, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    after = pipe.transformer.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[n], w) for n, w in weights.items())
    assert pipe.adapters == {}


def test_the_scale_is_of_what_is_added(run: Path, style: Path) -> None:
    pipe = opened(run)
    x, told = torch.linspace(-1, 1, 768).reshape(1, 3, 1, 16, 16), {"timestep": 300.0}
    block: Any = pipe.transformer.blocks[0]
    layer = block.attn.qkv
    code = torch.linspace(-1, 1, 64).reshape(2, 32)
    plain = layer(code)
    pipe.load_lora_weights(style, "style", scale=0.25)
    wrapped = block.attn.qkv
    quarter = wrapped(code) - plain
    pipe.set_adapters("style", 1.0)
    torch.testing.assert_close(4 * quarter, wrapped(code) - plain, rtol=1e-4, atol=1e-5)
    assert pipe.transformer(x, **told).sample.isfinite().all()


def test_what_is_fused_for_good_is_saved_as_a_plain_pipeline(run: Path, style: Path, tmp_path: Path) -> None:
    pipe = opened(run)
    pipe.load_lora_weights(style)
    both = draw(pipe)
    with pytest.raises(ValueError, match=r"lora_0.*fuse_lora\(permanent=True\)"):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora(permanent=True)
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(opened(tmp_path)), both, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(run: Path, style: Path, tmp_path: Path) -> None:
    pipe = opened(run)
    plain = draw(pipe)
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ConfigError, match="no adapter here: this run trained the transformer"):
        pipe.load_lora_weights(run)
    other = make_run(tmp_path / "other", model_config(hidden_size=48, **CLASSES))
    wide = adapter(other, tmp_path / "wide", 1)
    with pytest.raises(ValueError, match=r"(?s)not an adapter of this model.*blocks.0.attn.qkv.lora_A.weight has shape \(2, 48\); the layer's weight has \(96, 32\)"):  # fmt: skip
        pipe.load_lora_weights(wide)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "pytorch_lora_weights.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        pipe.load_lora_weights(tmp_path / "torn")
    pipe.load_lora_weights(style, "style")
    for name, message in (("style", "is taken"), ("a.b", "expected letters")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(style, name)
    with pytest.raises(ValueError, match="no adapter b; there are style"):
        pipe.set_adapters("b")
    with pytest.raises(ValueError, match="2 weights for 1 adapters"):
        pipe.set_adapters("style", [1.0, 2.0])
    wrong: list[tuple[Any, str]] = [
        (lambda: pipe.load_lora_weights(style, "b", scale=cast(Any, "x")), "scale must be a finite number, .* found 'x'"),
        (lambda: pipe.load_lora_weights(style, "b", scale=cast(Any, None)), "scale must be a finite number, .* found None"),
        (lambda: pipe.load_lora_weights(style, cast(Any, 7)), "adapter_name: expected text, found 7"),
        (lambda: pipe.load_lora_weights(cast(Any, 7)), "path: expected a folder, found 7"),
        (lambda: pipe.set_adapters({"style": cast(Any, "x")}), "weights: adapter style must be a finite number, .* found 'x'"),
        (lambda: pipe.set_adapters("style", [cast(Any, None)]), "weights: adapter style must be a finite number, .* found None"),
        (lambda: pipe.set_adapters(cast(Any, {7: 1.0})), r"adapters: expected names, found \[7\]"),
        (lambda: pipe.delete_adapters(cast(Any, 7)), "adapters: expected names, found 7"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    pipe.set_adapters("style", cast(Any, np.float32(0.5)))
    assert pipe.adapters == {"style": 0.5}
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def trained_beside(base: Path, run: Path, kind: str, sampling: dict[str, Any] | None = None) -> Path:
    """The run directory of an adapter's or a branch's training on `base`, without the training."""
    source = checkpoint.find_weights(base)
    config = Config(
        run_dir=run,
        model=model_config(**CLASSES),
        data=DataConfig(features="synthetic", buckets=(TrainBucket(frames=4, height=16, width=16, batch_size=1),)),
        train=TrainConfig(
            steps=1,
            lora=LoRAConfig(rank=2) if kind == "lora" else None,
            control=ControlConfig(condition="first_frame") if kind == "control" else None,
        ),
        init=InitConfig(source=base),
    )
    model = add_trainable(adapters.load_base(source, config)[0], config.train, config.seed)
    shaken((p for p in model.parameters() if p.requires_grad), 3)
    folder = run / checkpoint.FOLDER / checkpoint.folder_of_step(1)
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for weights in ("ema", "model"):
        adapters.save_trained(model, state, folder / checkpoint.weights_folder(kind, weights))  # type: ignore[arg-type]
    told = checkpoint.read_identity(base)
    data = {key: told[key] for key in ("video_encoder", "text_encoder", "classes", "features", "frame_rates")}
    data["frame_sampling"] = sampling
    found = adapters.make_base(source)
    identity = checkpoint.make_identity(
        config, told["architecture"], data, 1, 1, {}, 1, {"folder": found.folder, "fingerprint": found.fingerprint}
    )
    (folder / checkpoint.IDENTITY).write_text(json.dumps(identity))
    checkpoint.write_manifest(folder)
    return run


def test_a_run_of_adapters_comes_with_its_base(run: Path, tmp_path: Path) -> None:
    made = trained_beside(run, tmp_path / "lora", "lora")
    whole, beside = opened(made), opened(run)
    assert list(whole.adapters) == ["default"]
    beside.load_lora_weights(made, "default")
    assert torch.equal(draw(whole), draw(beside))
    shutil.copytree(run, tmp_path / "moved")
    shutil.copytree(run, tmp_path / "old")
    again = trained_beside(tmp_path / "old", tmp_path / "again", "lora")
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(ConfigError, match="are gone"):
        opened(again)
    assert torch.equal(draw(opened(again, base=tmp_path / "moved")), draw(whole))


def test_generation_adds_adapters(run: Path, style: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"shape": Bucket(frames=1, height=16, width=16), "sampler": SamplerConfig(steps=1)}
    prompts = [Prompt(class_label=1)]
    generate(run, prompts, tmp_path / "plain", **asked)
    rows = generate(run, prompts, tmp_path / "styled", **asked, lora=[LoRASource(path=style, scale=2.0)])
    assert rows[0]["protocol"]["lora"] == [{"path": str(style), "scale": 2.0}]
    a, b = ((tmp_path / which / rows[0]["file"]).read_bytes() for which in ("plain", "styled"))
    assert a != b
    with pytest.raises(ValueError, match="other settings .*lora"):
        generate(run, prompts, tmp_path / "styled", **asked, lora=[LoRASource(path=style, scale=1.0)])
    made = trained_beside(run, tmp_path / "lora", "lora")
    assert generate(made, prompts, tmp_path / "whole", **asked)[0]["file"]


# ------------------------------------------------------------------------------------------ control


def pixels(batch: int, frames: int) -> np.ndarray:
    return np.random.default_rng(0).random((batch, frames, 16, 16, 3), np.float32)


def test_a_condition_is_an_image_a_video_or_latents(run: Path, tmp_path: Path) -> None:
    pipe = opened(trained_beside(run, tmp_path / "control", "control"))
    assert isinstance(pipe.control, STDiTControl)
    plain = draw(pipe, control_scale=0.0)
    assert torch.equal(plain, draw(opened(run)))
    video = (pixels(1, 4) * 255).round() / 255
    moved = draw(pipe, control_video=video[0])
    assert not torch.allclose(moved, plain, atol=1e-3)
    latents = torch.from_numpy(video).permute(0, 4, 1, 2, 3) * 2 - 1  # the pixels themselves
    torch.testing.assert_close(draw(pipe, control_latents=latents), moved, rtol=1e-4, atol=1e-4)
    first = draw(pipe, control_latents=latents[:, :, :1])
    still = [Image.fromarray((video[0, 0] * 255).round().astype(np.uint8))] * 2
    torch.testing.assert_close(draw(pipe, control_image=still[0]), first, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe, control_image=still), draw(pipe, control_image=still[0]))
    image = draw(pipe, num_frames=1, control_image=still[0])
    assert image.shape == (2, 3, 1, 16, 16)
    many = draw(pipe, control_latents=latents[:, :, :1].expand(2, -1, -1, -1, -1), num_videos_per_prompt=2)
    assert many.shape[0] == 4


def test_generation_takes_conditions_from_the_prompts(run: Path, tmp_path: Path) -> None:
    made = trained_beside(run, tmp_path / "control", "control")
    video = (pixels(1, 4)[0] * 255).round().astype(np.uint8)
    write_clip(tmp_path / "c.mp4", video, 8.0)
    Image.fromarray(video[0]).save(tmp_path / "c.png")
    prompts = [
        Prompt(class_label=1, extra={"control": str(tmp_path / "c.mp4")}),
        Prompt(class_label=1, extra={"control": str(tmp_path / "c.png")}),
        Prompt(class_label=1, extra={"control": str(tmp_path / "none.png")}),
        Prompt(class_label=1),
    ]
    asked: dict[str, Any] = {"shape": Bucket(frames=4, height=16, width=16), "sampler": SamplerConfig(steps=1)}
    rows = generate(made, prompts, tmp_path / "out", **asked)
    assert [row["file"] is not None for row in rows] == [True, True, False, False]
    assert "none.png" in rows[2]["error"]
    assert "the key control" in rows[3]["error"]
    alone = generate(made, prompts[:1], tmp_path / "alone", **asked)
    assert (tmp_path / "alone" / alone[0]["file"]).stat().st_size


@pytest.mark.parametrize(
    ("sampling", "frames"),
    [
        ({"frame_stride": 2}, [0, 2, 4, 6]),
        ({"target_fps": 4.0, "clip_window": "center"}, [1, 3, 5, 7]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_a_control_video_is_read_as_extraction_reads_its_clips(
    run: Path, tmp_path: Path, sampling: dict[str, Any], frames: list[int]
) -> None:
    """The same control clip, of 9 frames at 8 fps, through both."""
    video = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3) * 25
    Image.fromarray(video[0]).save(
        tmp_path / "c.png", save_all=True, append_images=[Image.fromarray(f) for f in video[1:]], duration=125
    )
    own, shape = FrameSampling(**sampling), Bucket(frames=4, height=16, width=16)
    found = _read_clip(tmp_path / "c.png", shape, own)
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [25 * frame for frame in frames]
    step = frame_step(8.0, own.frame_stride, own.target_fps)
    assert frame_indices(9, 4, step, own.clip_window) == frames, "as the extractor"
    as_long = _read_clip(tmp_path / "c.png", Bucket(frames=9, height=16, width=16), own)
    assert len(as_long) == 9
    if len(sampling) == 1:
        with pytest.raises(
            ValueError,
            match=r"c.png: 8 frames at stride 2 span 15 frames, the clip has 9; 8 frames, or 1, are taken as they are",
        ):
            _read_clip(tmp_path / "c.png", Bucket(frames=8, height=16, width=16), own)
    pipe = opened(trained_beside(run, tmp_path / "control", "control", sampling))
    assert pipe.frame_sampling == own
    pipe.save_pretrained(tmp_path / "saved")
    assert opened(tmp_path / "saved").frame_sampling == own


def test_a_branch_goes_with_the_pipeline(run: Path, tmp_path: Path) -> None:
    pipe = opened(run)
    control = STDiTControl.of(pipe.transformer)
    condition = torch.linspace(-1, 1, 768).reshape(1, 3, 1, 16, 16)
    assert torch.equal(draw(pipe, control=control, control_latents=condition), draw(pipe))
    shaken(control.parameters(), 5)
    moved = draw(pipe, control=control, control_latents=condition)
    parts: dict[str, Any] = {**pipe.components, "control": control}
    whole = STDiTPipeline(**parts, diffusion=pipe.diffusion, classes=pipe.classes)
    whole.save_pretrained(tmp_path)
    assert (tmp_path / "control" / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(draw(opened(tmp_path), control_latents=condition), moved)


def test_a_branch_in_training_draws_as_it_will_in_use(tmp_path: Path) -> None:
    """With drop path in training mode two drawings would differ, by torch's global random state."""
    pipe = opened(make_run(tmp_path / "run", model_config(drop_path=0.9, **CLASSES)))
    control = STDiTControl.of(pipe.transformer, 2)  # drop path begins at the second block
    assert not control.training
    shaken(control.parameters(), 5)
    condition = torch.linspace(-1, 1, 768).reshape(1, 3, 1, 16, 16)
    expected = draw(pipe, control=control, control_latents=condition)
    control.train()
    pipe.transformer.train()
    state = torch.get_rng_state()
    assert torch.equal(draw(pipe, control=control, control_latents=condition), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert control.training
    assert pipe.transformer.training
    pipe.transformer.eval()
    pipe.control = control
    assert torch.equal(draw(pipe, control_latents=condition), expected)
    assert control.training
    assert not pipe.transformer.training


def test_an_offloaded_branch_is_loaded_once(run: Path) -> None:
    """What enable_model_cpu_offload does on a GPU; here the hooks are seen to be called."""
    pipe = opened(run)
    control = STDiTControl.of(pipe.transformer)
    called: list[str] = []

    class Aside(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(type(module).__name__)
            return args, kwargs

    for part in (pipe.transformer, control):
        add_hook_to_module(part, Aside())
    labels: list[int] = []
    embedder: Any = control.y_embedder
    embedder.register_forward_pre_hook(lambda *_: labels.append(len(called)))
    draw(pipe, control=control, control_latents=torch.zeros(1, 3, 1, 16, 16))
    assert called[:2] == ["STDiT", "STDiTControl"]
    assert labels == [2]  # before the first step's forward, and never again


@pytest.mark.parametrize("name", ["control_image", "control_video"])
def test_a_condition_of_another_size_is_stretched_as_diffusers_does(run: Path, name: str) -> None:
    pipe = opened(run)
    control = STDiTControl.of(pipe.transformer)
    with torch.no_grad():
        for weight in control.parameters():
            weight.add_(0.05)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    large = picture.resize((48, 40), Image.Resampling.NEAREST)
    fitting = large.resize((16, 16), Image.Resampling.LANCZOS)
    found, expected = (
        draw(pipe, control=control, **{name: one if name == "control_image" else [one] * 4}) for one in (large, fitting)
    )
    assert torch.equal(found, expected)


def test_conditions_that_a_branch_cannot_take_are_refused(run: Path) -> None:
    pipe = opened(run)
    condition = torch.zeros(1, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="no control branch"):
        draw(pipe, control_latents=condition)
    control = STDiTControl.of(pipe.transformer)
    with pytest.raises(ValueError, match=r"the control branch is torch.float64, the transformer torch.float32"):
        draw(pipe, control=STDiTControl.of(pipe.transformer).double(), control_latents=condition)
    for asked, message in (
        ({}, "needs one of control_image, control_video, control_latents; found none"),
        ({"control_latents": condition, "control_image": pixels(1, 1)[0]}, "found control_image, control_latents"),
        ({"control_latents": condition[:, :2]}, "control has 2 channels"),
        ({"control_latents": torch.tensor(1.0)}, r"control_latents has shape \(\); expected \(videos, channels"),
        ({"control_latents": condition.to_sparse()}, "control_latents: expected a dense tensor"),
        ({"control_latents": condition * float("nan"), "control_scale": 0}, "control_latents: not finite"),
        ({"control_video": pixels(1, 5)[0]}, "control_video has 5 frames; the clip has num_frames 4"),
        ({"control_latents": condition[..., :8]}, r"control is \(1, 16, 8\) .* the latents are \(4, 16, 16\)"),
        ({"control_latents": condition.expand(3, -1, -1, -1, -1)}, "3 conditions .* for 2 prompts"),
        ({"control_video": pixels(1, 2)[0]}, r"control is \(2, 16, 16\) .* the latents are \(4, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, control=control, **asked)
