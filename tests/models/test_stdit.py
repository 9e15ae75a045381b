"""The model as a whole, and as a diffusers model."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from stdit.config import ModelConfig
from stdit.encoders.video import PixelAutoencoder
from stdit.models.stdit import STDiT

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]
Settings = Callable[..., ModelConfig]
KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "full", "positions": "rope", "hidden_size": 48},
    {"attention": "factorized"},
    {"attention": "factorized", "positions": "rope", "qk_norm": "rms", "cross_qk_norm": "rms"},
    {"attention": "factorized", "temporal": False},
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity(
    settings: Settings, noise: Noise, kind: dict[str, Any]
) -> None:
    model = STDiT.from_settings(settings(text_dim=6, num_classes=3, **kind))
    seen: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    sample = model(noise(2, 3, 2, 4, 4), 300, noise(2, 4, 6), class_labels=torch.tensor([0, 2])).sample
    assert not sample.any()
    assert len(seen) == 2
    assert all(torch.equal(before, after) for before, after in seen)


def test_an_image_is_a_one_frame_video(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(**kind)
    x = noise(2, 3, 1, 4, 6)
    assert model(x, 300).sample.shape == x.shape
    if kind.get("temporal", True) and kind["attention"] == "factorized":
        # The same weights run at T = 1: temporal attention is not skipped.
        before = model(x, 300).sample
        with torch.no_grad():
            model.blocks[0].attn_temp.proj.bias += 1.0  # pyright: ignore
        assert not torch.allclose(model(x, 300).sample, before)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4), (1, 1, 1), (3, 4, 2)])
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_any_patch_and_any_grid(tiny: Tiny, noise: Noise, patch: tuple[int, int, int], positions: str) -> None:
    model = tiny(patch_size=patch, positions=positions, learned_variance=True)
    for grid in ((1, 1, 1), (2, 3, 1), (1, 2, 5)):
        t, h, w = (n * p for n, p in zip(grid, patch, strict=True))
        assert model(noise(2, 3, t, h, w), 300).sample.shape == (2, 6, t, h, w)


def test_positions_tell_places_and_frames_apart(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(**kind)
    x = noise(1, 3, 3, 4, 6)
    out = model(x, 300).sample
    for dim in (3, 4):  # moving the picture round by a patch
        moved = model(x.roll(2, dim), 300).sample
        assert not torch.allclose(moved.roll(-2, dim), out, atol=1e-4)
    shuffled = model(x.flip(2), 300).sample.flip(2)
    assert torch.allclose(shuffled, out, atol=1e-5) is (not kind.get("temporal", True))


def test_samples_of_a_batch_do_not_meet(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model, x, t = tiny(text_dim=6, **kind), noise(3, 3, 2, 4, 4), torch.tensor([10.0, 500.0, 999.0])
    text = noise(3, 4, 6)
    together = model(x, t, text).sample
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], text[i : i + 1]).sample
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor(7).expand(2)],
)
def test_timesteps_are_numbers_or_one_each(tiny: Tiny, noise: Noise, timestep: Any) -> None:
    model, x = tiny(), noise(2, 3, 2, 4, 4)
    torch.testing.assert_close(model(x, timestep).sample, model(x, torch.tensor([7.0, 7.0])).sample)


def test_a_tuple_comes_back_without_return_dict(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(), noise(1, 3, 1, 4, 4)
    (sample,) = model(x, 1, return_dict=False)
    assert torch.equal(sample, model(x, 1).sample)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        DDIMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@torch.no_grad()
def test_any_scheduler_drives_it(tiny: Tiny, noise: Noise, scheduler: Any) -> None:
    model, x = tiny(), noise(2, 3, 2, 4, 4)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(
            model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t).sample, t, x
        ).prev_sample
    assert x.isfinite().all()


# ------------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_weights_are_bit_equal(tiny: Tiny, tmp_path: Path, kind: dict[str, Any]) -> None:
    model = tiny(num_classes=3, text_dim=6, pooled_text=True, micro_conditions=("fps",), **kind)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = STDiT.from_pretrained(tmp_path)
    assert loaded.settings == model.settings
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    x, fps = torch.ones(1, 3, 2, 4, 4), {"fps": torch.ones(1)}
    assert torch.equal(loaded(x, 5, added_cond_kwargs=fps).sample, model(x, 5, added_cond_kwargs=fps).sample)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_of_new_ones_and_those_of_others_keep_theirs(
    tiny: Tiny, tmp_path: Path, umask: int
) -> None:
    (tmp_path / "key.json").write_text('{"mine": 1}')
    (tmp_path / "manifest.json").write_text('{"mine": 1}')
    (tmp_path / "key.json").chmod(0o400)
    model = tiny()
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.qkv"]))
    before = os.umask(umask)
    try:
        model.save_lora_adapter(tmp_path / "lora")
        tiny().save_pretrained(tmp_path)
        PixelAutoencoder().save_pretrained(tmp_path / "pixels")
    finally:
        os.umask(before)
    written = list(tmp_path.rglob("*.safetensors"))
    assert len(written) == 3
    assert {path.stat().st_mode & 0o777 for path in (*written, tmp_path / "config.json")} == {0o666 & ~umask}
    assert (tmp_path / "key.json").stat().st_mode & 0o777 == 0o400
    assert (tmp_path / "manifest.json").read_text() == '{"mine": 1}', "no manifest of ours"


def test_names_are_the_published_ones(tiny: Tiny) -> None:
    names = set(tiny(depth=1, text_dim=6, num_classes=3, qk_norm="rms", cross_qk_norm="rms").state_dict())
    block = {
        "scale_shift_table",
        *(f"{a}.{m}.{p}" for a in ("attn", "attn_temp") for m in ("qkv", "proj") for p in ("weight", "bias")),
        *(f"{a}.{m}_norm.weight" for a in ("attn", "attn_temp", "cross_attn") for m in "qk"),
        *(f"cross_attn.{m}.{p}" for m in ("q_linear", "kv_linear", "proj") for p in ("weight", "bias")),
        *(f"mlp.{m}.{p}" for m in ("fc1", "fc2") for p in ("weight", "bias")),
    }
    rest = {
        *(f"{m}.{p}" for m in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2") for p in ("weight", "bias")),
        *(f"{m}.{p}" for m in ("t_block.1", "final_layer.linear") for p in ("weight", "bias")),
        *(f"y_embedder.y_proj.{m}.{p}" for m in ("fc1", "fc2") for p in ("weight", "bias")),
        *("y_embedder.y_embedding", "y_embedder.embedding_table.weight", "final_layer.scale_shift_table"),
    }
    assert names == rest | {f"blocks.0.{name}" for name in block}


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("t_block.1.bias"), "missing: t_block.1.bias"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda w: w.update({"t_block.1.bias": torch.ones(3)}), "t_block.1.bias"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tiny: Tiny, tmp_path: Path, change: Any, said: str) -> None:
    tiny().save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        STDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"hidden_size": 30}, "30 is not divisible by num_heads 4"),
    ],
    ids=["class", "key", "value"],
)
def test_configs_of_another_architecture_are_refused(tiny: Tiny, tmp_path: Path, change: Any, said: str) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        STDiT.from_pretrained(tmp_path)


def test_pickles_are_not_opened(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        STDiT.from_pretrained(tmp_path)


def test_weights_come_from_the_seed_alone(settings: Settings) -> None:
    torch.manual_seed(1)
    a = STDiT.from_settings(settings(), seed=3).state_dict()
    before = torch.get_rng_state()
    b = STDiT.from_settings(settings(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    other = STDiT.from_settings(settings(), seed=4).state_dict()
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], a["blocks.0.attn.qkv.weight"])


# -------------------------------------------------------------------------- diffusers' other services


def test_checkpointing_changes_neither_loss_nor_gradients(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(text_dim=6, **kind).train()
    again = copy.deepcopy(model)
    again.enable_gradient_checkpointing()
    assert again.is_gradient_checkpointing
    for m in (model, again):
        m(noise(2, 3, 2, 4, 4), torch.tensor([1, 900]), noise(2, 4, 6)).sample.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_a_new_lora_adapter_starts_at_zero_and_trains_alone(tiny: Tiny, noise: Noise, attention: str) -> None:
    model, x = tiny(text_dim=6, attention=attention), noise(1, 3, 2, 4, 4)
    before = model(x, 300).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv", "proj", "q_linear", "kv_linear", "fc1", "fc2"]))
    torch.testing.assert_close(model(x, 300).sample, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    model(x, 300).sample.square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.ones_(p)
    assert not torch.allclose(model(x, 300).sample, before)
    model.disable_adapters()
    torch.testing.assert_close(model(x, 300).sample, before)


@torch.no_grad()
def test_step_caches_run_and_come_off(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(depth=3, text_dim=6), noise(1, 3, 2, 4, 4)
    before = model(x, 300).sample
    configs = [
        (FirstBlockCacheConfig(threshold=1e9), "blocks.2.mlp"),
        (
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=2,
                current_timestep_callback=lambda: 300,
            ),
            "blocks.2.cross_attn.proj",
        ),
    ]
    for config, name in configs:
        model.enable_cache(config)
        runs: list[int] = []
        handle = model.get_submodule(name).register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with model.cache_context("cond"):
            first = model(x, 300).sample
            second = model(x, 300).sample
        handle.remove()
        model.disable_cache()
        torch.testing.assert_close(first, before)
        torch.testing.assert_close(second, before)  # the same input: what is kept is what would be computed
        assert len(runs) == 1, type(config)  # and the second step did not compute it
    assert torch.equal(model(x, 300).sample, before)


# Blocks without rotary positions: tests/models/test_compile.py.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "positions" in kind])
def test_blocks_compile_without_graph_breaks(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(text_dim=6, depth=1, **kind)
    x, text, mask = noise(2, 3, 2, 4, 4), noise(2, 4, 6), torch.arange(4) < torch.tensor([[2], [4]])
    expected = model(x, 300, text, mask).sample
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(x, 300, text, mask).sample, expected)


@pytest.mark.slow
def test_the_whole_model_compiles_without_graph_breaks(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6, num_classes=3, pooled_text=True, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    text, mask = noise(2, 4, 6), torch.arange(4) < torch.tensor([[2], [4]])
    for frames in (1, 2):
        args = (noise(2, 3, frames, 4, 4), torch.tensor([1.0, 9.0]), text, mask, torch.tensor([1, -1]))
        torch.testing.assert_close(compiled(*args).sample, model(*args).sample)


def test_bfloat16_weights_take_float32_inputs(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(text_dim=6, pooled_text=True, **kind)
    x, text = noise(1, 3, 2, 4, 4), noise(1, 4, 6)
    expected = model(x, 300.0, text).sample
    half = model.to(torch.bfloat16)(x, 300.0, text).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


def test_autocast_trains(tiny: Tiny, noise: Noise, kind: dict[str, Any]) -> None:
    model = tiny(text_dim=6, pooled_text=True, **kind)
    x, text, mask = noise(2, 3, 2, 4, 4), noise(2, 4, 6), torch.arange(4) < torch.tensor([[2], [4]])
    expected = model(x, 300, text, mask).sample
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(x, 300, text, mask).sample
    assert (sample.float() - expected).norm() < 0.05 * expected.norm()
    sample.float().square().mean().backward()


# ----------------------------------------------------------------------------------------- bad input


def spoilt(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "hidden_states": torch.zeros(2, 3, 2, 4, 4),
        "timestep": torch.tensor([1.0, 2.0]),
        "encoder_hidden_states": torch.zeros(2, 4, 6),
        "encoder_attention_mask": torch.ones(2, 4, dtype=torch.bool),
        "class_labels": torch.tensor([0, 2]),
        "added_cond_kwargs": {"fps": torch.tensor([8.0, 8.0])},
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (spoilt(hidden_states=torch.zeros(2, 3, 4, 4)), r"4 dimensions .* expected 5"),
        (spoilt(hidden_states=torch.zeros(2, 4, 2, 4, 4)), r"4 channels.* in_channels 3"),
        (spoilt(hidden_states=torch.zeros(2, 3, 2, 5, 4)), r"height 5 is not divisible by patch_size 2"),
        (spoilt(hidden_states=torch.zeros(2, 3, 2, 4, 7)), r"width 7 is not divisible by patch_size 2"),
        (spoilt(hidden_states=torch.zeros(2, 3, 0, 4, 4)), r"frames 0"),
        (spoilt(timestep=torch.zeros(3)), r"timestep has shape \(3,\).* 2 samples"),
        (spoilt(encoder_hidden_states=torch.zeros(2, 4, 5)), r"5 wide.* text_dim 6"),
        (spoilt(encoder_hidden_states=torch.zeros(3, 4, 6)), r"\(3, 4, 6\).* \(2, L, 6\)"),
        (spoilt(encoder_hidden_states=torch.zeros(2, 9, 6)), r"9 tokens.* max_text_tokens 7"),
        (spoilt(encoder_attention_mask=torch.ones(2, 5)), r"\(2, 5\).* \(2, 4\)"),
        (spoilt(encoder_hidden_states=None), r"encoder_attention_mask .* without"),
        (spoilt(class_labels=torch.tensor([0, 3])), r"label 3 is out of range.* 3 classes"),
        (spoilt(class_labels=torch.tensor([-2, 0])), r"label -2 is out of range.* 3 classes"),
        (spoilt(class_labels=torch.tensor([0.0, 1.0])), r"float32; expected torch.int64"),
        (spoilt(class_labels=torch.tensor([0])), r"\(1,\).* 2 samples"),
        (spoilt(drop_condition=torch.tensor([True])), r"drop_condition .*\(1,\).* 2 samples"),
        (spoilt(added_cond_kwargs=None), r"fps is missing.* micro_conditions fps"),
        (spoilt(added_cond_kwargs={"fps": torch.zeros(5)}), r"fps has shape \(5,\).* 2 samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_do_not_fit_are_refused_with_both_numbers(settings: Settings, inputs: Any, said: str) -> None:
    model = STDiT.from_settings(settings(num_classes=3, text_dim=6, micro_conditions=("fps",)))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # before the first matrix product
            module.register_forward_hook(lambda *_: pytest.fail("computed before checking"))
    with pytest.raises(ValueError, match=said):
        model(**inputs)


def test_rope_needs_a_pair_for_each_axis(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"head width 4 .* below 6"):
        settings(hidden_size=16, num_heads=4, positions="rope")


@pytest.mark.parametrize("given", ["encoder_hidden_states", "class_labels"])
def test_conditions_that_the_model_has_not_are_refused(settings: Settings, given: str) -> None:
    with pytest.raises(ValueError, match=f"{given} .* passed to a model without"):
        STDiT.from_settings(settings())(torch.zeros(2, 3, 1, 4, 4), 1, **{given: spoilt()[given]})
