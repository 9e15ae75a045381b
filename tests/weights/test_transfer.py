"""Weight transfer between stages: outputs are preserved, and every difference is allowed or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from stdit.config import ModelConfig, Transition
from stdit.models.positions import add_positions
from stdit.models.stdit import STDiT
from stdit.weights.transfer import CHANGES, main, to_video, transfer_weights

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]
Settings = Callable[..., ModelConfig]
TIMES = torch.tensor([3.0, 700.0])

# Image models of every kind, with their conditions.
IMAGES: dict[str, dict[str, Any]] = {
    "in-context": {"conditioning": "in_context", "num_classes": 4, "text_dim": 6},
    "cross-attention": {"conditioning": "cross_attention", "num_classes": 4, "text_dim": 6},
    "adaln": {"conditioning": "adaln", "num_classes": 4},
    "dit": {"conditioning": "adaln_zero", "num_classes": 4, "learned_variance": True},
    "dit-text": {"conditioning": "adaln_zero", "text_dim": 6},
    "pixart": {"text_dim": 6, "null_text": "sequence", "hidden_size": 48, "micro_conditions": ("size",)},
    "sigma": {"text_dim": 6, "qk_norm": "layer", "kv_compress": 2, "kv_compress_blocks": (1,)},
    "windows": {"window_size": 2, "window_blocks": (0,), "relative_positions": True},
    "rope": {"positions": "rope", "hidden_size": 48, "qk_norm": "rms"},
    "learned": {"positions": "learned", "position_grid": (5, 6), "mlp": "swiglu"},
    "rineau": {"conditioning": "adaln_zero", "positions": "learned", "position_grid": (4, 4), "mlp": "conv2d"},
    "mmdit": {"conditioning": "joint", "text_dim": 6, "pooled_dim": 5, "qk_norm": "rms"},
}  # fmt: skip


@pytest.fixture(params=IMAGES.values(), ids=list(IMAGES))
def image(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"temporal": False, **request.param}


# Each with each kind of temporal attention that it supports.
JOINED = [
    pytest.param({"temporal": False, **kind}, attention, id=f"{name}-{attention}")
    for name, kind in IMAGES.items()
    for attention in ("factorized", "alternating")
    if attention == "factorized" or name != "mmdit"
]
FULL = [
    pytest.param({"temporal": False, **kind}, positions, id=f"{name}-{positions}")
    for name, kind in IMAGES.items()
    for positions in ("none", "learned", "sincos", "rope")
    if name not in ("windows", "sigma") and (name != "rope" or positions in ("rope", "none"))
]
OVER_TIME: list[dict[str, Any]] = [
    {"temporal_positions": "sincos"},
    {"temporal_positions": "sincos", "temporal_position_injection": "first_attention", "temporal_norm": False},
    {"temporal_positions": "rope", "temporal_interpolation": 2.0},
    {"temporal_positions": "learned", "position_frames": 4},
]


def conditions(config: ModelConfig, noise: Noise) -> dict[str, Any]:
    """Conditions of two samples of every kind that `config` has."""
    inputs: dict[str, Any] = {"timestep": TIMES}
    if config.text_dim:
        inputs["encoder_hidden_states"] = noise(2, 5, config.text_dim, seed=1)
        inputs["encoder_attention_mask"] = torch.arange(5) < torch.tensor([[2], [4]])
    if config.num_classes:
        inputs["class_labels"] = torch.tensor([3, -1])
    if config.pooled_dim:
        inputs["pooled_projections"] = noise(2, config.pooled_dim, seed=2)
    if config.micro_conditions or config.position_reference:
        size = {"height": torch.tensor([32.0, 32.0]), "width": 48.0}
        inputs["added_cond_kwargs"] = {"fps": 8.0, "frames": 3.0, **size}
    return inputs


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- images to videos


@pytest.mark.parametrize("over_time", OVER_TIME, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize(("image", "attention"), JOINED)
def test_an_image_model_becomes_a_video_model_that_draws_the_same_frames(
    tiny: Tiny, noise: Noise, image: dict[str, Any], attention: Any, over_time: dict[str, Any]
) -> None:
    changes: dict[str, Any] = over_time | ({"mlp": "conv3d"} if image.get("mlp") == "conv2d" else {})
    source = tiny(**image)
    model, report = to_video(source, attention, **changes)
    inputs, x = conditions(source.settings, noise), noise(2, 3, 1, 8, 8)
    expected = source(x, **inputs).sample
    if not changes.get("mlp"):  # in three dimensions the convolution sums in another order
        assert torch.equal(model(x, **inputs).sample, expected)
    close(model(x, **inputs).sample, expected)
    close(model(x.expand(-1, -1, 3, -1, -1), **inputs).sample, expected.expand(-1, -1, 3, -1, -1))
    clip = noise(2, 3, 3, 8, 8, seed=3)
    close(model(clip, **inputs).sample, source(clip, **inputs).sample)
    assert not report.dropped
    assert set(report.loaded) | set(report.newly_initialised) == set(model.state_dict())
    assert not set(report.loaded) & set(report.newly_initialised)
    assert "frame by frame" in str(report)


@pytest.mark.parametrize(("image", "attention"), JOINED)
def test_what_joins_at_zero_is_not_dead(tiny: Tiny, noise: Noise, image: dict[str, Any], attention: Any) -> None:
    changes: dict[str, Any] = {"temporal_positions": "sincos"} | (
        {"mlp": "conv3d"} if image.get("mlp") == "conv2d" else {}
    )
    model, report = to_video(tiny(**image), attention, **changes)
    inputs, x = conditions(model.settings, noise), noise(2, 3, 3, 8, 8)
    before = model(x, **inputs).sample.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, **inputs).sample.square().mean().backward()
        optimizer.step()
    still = model(x, **inputs).sample - model(x.flip(2), **inputs).sample.flip(2)
    assert before.isfinite().all()
    assert still.abs().max() > 0, "the order of frames is seen"
    new = [
        name
        for name in report.newly_initialised
        if "attn" in name and name.endswith("proj.weight") and "cross" not in name
    ]
    assert new
    assert all(model.get_parameter(name).grad is not None for name in new)
    assert any(bool(model.get_parameter(name).grad.any()) for name in new)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("image", "temporal_positions"), FULL)
def test_an_image_model_becomes_full_3d_unchanged_at_one_frame(
    tiny: Tiny, noise: Noise, image: dict[str, Any], temporal_positions: str
) -> None:
    changes: dict[str, Any] = {"mlp": "conv3d"} if image.get("mlp") == "conv2d" else {}
    source = tiny(**image)
    model, report = to_video(source, "full", temporal_positions=temporal_positions, position_frames=4, **changes)
    inputs, x = conditions(source.settings, noise), noise(2, 3, 1, 8, 8)
    expected = source(x, **inputs).sample
    close(model(x, **inputs).sample, expected)
    assert set(report.newly_initialised) == ({"temp_embed"} if temporal_positions == "learned" else set())
    assert not report.dropped
    # What repeats is as if it were there once, unless it is told apart, or a text weighs against it.
    same = temporal_positions in ("none", "learned") and image.get("conditioning") != "joint"
    repeated = model(x.expand(-1, -1, 3, -1, -1), **inputs).sample
    assert torch.allclose(repeated, expected.expand(-1, -1, 3, -1, -1), rtol=1e-5, atol=1e-5) == same
    assert ("one repeated frame" in str(report)) == same


def test_blocks_over_time_come_between(tiny: Tiny) -> None:
    source = tiny(temporal=False, window_size=2, window_blocks=(1,), exit_depths=((0.5, 1),))
    model, report = to_video(source, "alternating")
    assert model.settings.dimensions == (32, 4, 4)
    assert model.settings.window_blocks == (2,)
    assert model.settings.exit_depths == ((0.5, 2),)
    for i in range(2):
        name = "attn.qkv.weight"
        assert torch.equal(model.get_parameter(f"blocks.{2 * i}.{name}"), source.get_parameter(f"blocks.{i}.{name}"))
        assert not model.get_parameter(f"blocks.{2 * i + 1}.attn.proj.weight").any()
        assert not model.get_parameter(f"blocks.{2 * i + 1}.mlp.fc2.weight").any()
    assert {name.split(".")[1] for name in report.newly_initialised} == {"1", "3"}
    assert "image block i is now block 2i" in str(report)
    assert "newly initialised: blocks.1,3.scale_shift_table, blocks.1,3.attn.qkv.weight" in str(report)


def test_codes_in_the_stream_join_at_zero_or_are_said_to_change_outputs(tiny: Tiny, noise: Noise) -> None:
    source = tiny(temporal=False)
    x = noise(2, 3, 1, 8, 8)
    expected = source(x, TIMES).sample
    model, report = to_video(
        source, "alternating", temporal_position_injection="residual", temporal_positions="learned", position_frames=3
    )
    close(model(x.expand(-1, -1, 3, -1, -1), TIMES).sample, expected.expand(-1, -1, 3, -1, -1))
    assert "frame by frame" in str(report)
    model, report = to_video(source, "alternating", temporal_position_injection="residual")
    close(model(x, TIMES).sample, expected)
    assert not torch.allclose(model(x.expand(-1, -1, 3, -1, -1), TIMES).sample, expected)
    assert "those for more are not" in str(report)


def test_a_joint_model_that_cannot_tell_frames_apart_is_an_image_model(tiny: Tiny, noise: Noise) -> None:
    source = tiny(conditioning="joint", attention="full", temporal_positions="none", text_dim=6, null_text="empty")
    model, _ = to_video(source, "factorized", temporal_positions="sincos")
    x, text = noise(2, 3, 1, 8, 8), noise(2, 5, 6)
    expected = source(x, TIMES, text).sample
    close(model(x.expand(-1, -1, 3, -1, -1), TIMES, text).sample, expected.expand(-1, -1, 3, -1, -1))


def test_a_video_model_does_not_become_one(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="has temporal attention already"):
        to_video(tiny())


# ------------------------------------------------------------------------------- classes to captions


@pytest.mark.parametrize("pooled", [{}, {"pooled_text": True}, {"pooled_dim": 5}], ids=str)
@pytest.mark.parametrize("attention", ["factorized", "alternating", "full"])
@pytest.mark.parametrize("conditioning", ["adaln", "adaln_zero", "adaln_single"])
def test_captions_start_where_the_class_model_was_unconditional(
    tiny: Tiny, settings: Settings, noise: Noise, pooled: dict[str, Any], attention: str, conditioning: str
) -> None:
    source = tiny(num_classes=4, attention=attention, conditioning=conditioning)
    target = settings(text_dim=6, attention=attention, conditioning=conditioning, null_text="sequence", **pooled)
    model, report = transfer_weights(source, target, ("class_to_text",))
    x = noise(2, 3, 2, 4, 4)
    expected = source(x, TIMES).sample
    more = {"pooled_projections": noise(2, 5)} if "pooled_dim" in pooled else {}
    close(model(x, TIMES, noise(2, 5, 6), **more).sample, expected)
    close(model(x, TIMES).sample, expected)
    assert model.settings == target
    assert report.dropped == ("y_embedder.embedding_table.weight",)
    assert "y_embedder.y_embedding" in report.newly_initialised
    assert {n for n in report.newly_initialised if "cross_attn" not in n and "y_embedder" not in n} == set()


def test_classes_may_stay_when_captions_come(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4)
    model, report = transfer_weights(source, settings(num_classes=4, text_dim=6, pooled_text=True), ("class_to_text",))
    x, labels = noise(2, 3, 2, 4, 4), torch.tensor([3, -1])
    expected = source(x, TIMES, class_labels=labels).sample
    torch.testing.assert_close(model(x, TIMES, noise(2, 5, 6), class_labels=labels).sample, expected)
    assert not report.dropped


def test_without_a_null_class_captions_start_where_there_was_no_class(
    tiny: Tiny, settings: Settings, noise: Noise
) -> None:
    source = tiny(num_classes=4, null_class=False)
    model, _ = transfer_weights(source, settings(text_dim=6), ("class_to_text",))
    x = noise(2, 3, 2, 4, 4)
    close(model(x, TIMES, noise(2, 5, 6)).sample, source(x, TIMES).sample)


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention"])
def test_captions_among_the_tokens_cannot_join_unnoticed(tiny: Tiny, settings: Settings, conditioning: str) -> None:
    source = tiny(num_classes=4, conditioning=conditioning)
    with pytest.raises(ValueError, match=f"text cannot be added to conditioning {conditioning}"):
        transfer_weights(source, settings(text_dim=6, conditioning=conditioning), ("class_to_text",))


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("conditioning", ["adaln", "adaln_zero"])
def test_dit_becomes_pixart_with_the_same_output_at_one_time(
    tiny: Tiny, settings: Settings, noise: Noise, conditioning: str, classes: int | None
) -> None:
    source = tiny(num_classes=4, conditioning=conditioning, temporal=False)
    target = settings(num_classes=classes, text_dim=6, temporal=False)
    model, report = transfer_weights(source, target, ("adaln_to_single", "class_to_text"))
    x = noise(2, 3, 1, 4, 4)
    close(model(x, 500, noise(2, 5, 6)).sample, source(x, 500).sample)
    assert not torch.allclose(model(x, 900).sample, source(x, 900).sample)
    assert {"blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"} <= set(report.dropped)
    assert {"t_block.1.weight", "blocks.1.scale_shift_table", "final_layer.scale_shift_table"} <= set(
        report.newly_initialised
    )


def test_dit_becomes_a_video_pixart_in_one_call(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4, conditioning="adaln_zero", temporal=False)
    target = settings(text_dim=6, attention="alternating", depth=4, micro_conditions=("fps",))
    allow = ("adaln_to_single", "class_to_text", "add_temporal", "add_micro_conditions")
    model, report = transfer_weights(source, target, allow)
    x = noise(2, 3, 1, 4, 4)
    clip = model(x.expand(-1, -1, 3, -1, -1), 500, noise(2, 5, 6), added_cond_kwargs={"fps": 8.0}).sample
    close(clip, source(x, 500).sample.expand(-1, -1, 3, -1, -1))
    assert len(report.notes) == 4


# -------------------------------------------------------------- positions and micro-conditions


def test_rescaled_positions_change_no_weight(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(position_base=2)
    model, report = transfer_weights(
        source, settings(position_base=2, temporal_interpolation=2.0), ("rescale_positions",)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert "temporal_interpolation 1.0 -> 2.0" in str(report)
    # Twice the frames, half the step: frame 2i stands where frame i stood.
    slow, fast = (
        add_positions(m.settings, (None, None), torch.zeros(1, t, 4, 32), (t, 2, 2), (None, None))[1].temporal
        for m, t in ((model, 4), (source, 2))
    )
    assert slow is not None
    assert fast is not None
    torch.testing.assert_close(slow[::2], fast)


def test_positions_may_follow_the_clip_s_size(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(position_base=2)
    model, report = transfer_weights(source, settings(position_reference=16), ("rescale_positions",))
    assert model(noise(1, 3, 2, 4, 4), 3, added_cond_kwargs={"height": 16, "width": 16}).sample.isfinite().all()
    assert "position_reference None -> 16" in str(report)


def test_learned_positions_are_interpolated(tiny: Tiny, settings: Settings) -> None:
    learned = {"positions": "learned", "position_grid": (4, 6), "position_frames": 4}
    source = tiny(**learned)
    with torch.no_grad():  # a ramp over columns and one over frames stay ramps, at half the step
        ramp = torch.arange(6.0).repeat(4)
        source.get_parameter("pos_embed").copy_(ramp[None, :, None].expand(1, 24, 32))
        source.get_parameter("temp_embed").copy_(torch.arange(4.0)[None, :, None].expand(1, 4, 32))
    target = settings(**learned | {"position_grid": (8, 12), "position_frames": 8})
    model, report = transfer_weights(source, target, ("rescale_positions",))
    table = model.get_parameter("pos_embed").unflatten(1, (8, 12))[0, :, :, 0]
    torch.testing.assert_close(table[:, 4:-4], (torch.arange(4.0, 8.0) / 2 - 0.25).expand(8, -1))
    torch.testing.assert_close(model.get_parameter("temp_embed")[0, 1:-1, 5], torch.arange(1.0, 7.0) / 2 - 0.25)
    assert not report.newly_initialised
    assert not report.dropped
    assert "spatial table is interpolated; the learned temporal table is interpolated" in str(report)
    # A grid of as many patches, but of another shape, is another grid.
    model, report = transfer_weights(source, settings(**learned | {"position_grid": (6, 4)}), ("rescale_positions",))
    assert not torch.equal(model.get_parameter("pos_embed"), source.get_parameter("pos_embed"))


def test_micro_conditions_join_at_zero(tiny: Tiny, settings: Settings, noise: Noise, image: dict[str, Any]) -> None:
    source = tiny(**image)
    more = (*source.settings.micro_conditions, "fps", "frames")
    model, report = transfer_weights(source, settings(**image | {"micro_conditions": more}), ("add_micro_conditions",))
    x = noise(2, 3, 1, 8, 8)
    inputs = conditions(model.settings, noise)
    close(model(x, **inputs).sample, source(x, **inputs).sample)
    assert {name.split(".")[0] for name in report.newly_initialised} == {"fps_embedder", "frames_embedder"}
    model(x, **inputs).sample.square().mean().backward()
    gradient = model.get_parameter("fps_embedder.mlp.2.weight").grad
    assert gradient is not None
    assert gradient.any()


def test_routers_join_open(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4)
    target = settings(num_classes=4, dynamic_width=True, dynamic_tokens=True)
    model, report = transfer_weights(source, target, ("add_dynamic",))
    x = noise(2, 3, 2, 8, 8)
    close(model(x, TIMES).sample, source(x, TIMES).sample)
    assert report.newly_initialised
    assert all(".dynamic." in name for name in report.newly_initialised)


def test_a_fusion_joins_as_the_sparse_blocks_output(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4, depth=4)
    target = settings(num_classes=4, depth=4, sparse_dense=(1, 3))
    with pytest.raises(ValueError, match=r"sparse_dense None -> \(1, 3\) \(needs init.allow: \[add_sparse_dense\]"):
        transfer_weights(source, target)
    model, report = transfer_weights(source, target, ("add_sparse_dense",))
    x = noise(2, 3, 2, 8, 8)
    close(model(x, TIMES).sample, source(x, TIMES).sample)
    assert set(report.newly_initialised) == {"fusion.proj.weight", "fusion.proj.bias", "fusion.mask_token"}
    assert "outputs are unchanged" in report.notes[0]


def test_another_text_encoder_brings_a_new_projection(tiny: Tiny, settings: Settings) -> None:
    source = tiny(text_dim=6, pooled_text=True)
    model, report = transfer_weights(
        source, settings(text_dim=8, max_text_tokens=9, pooled_text=True), ("new_text_projection",)
    )
    assert {name.split(".")[1] for name in report.newly_initialised} == {"y_embedding", "y_proj", "pooled_proj"}
    assert torch.equal(
        model.get_parameter("blocks.0.cross_attn.kv_linear.weight"),
        source.get_parameter("blocks.0.cross_attn.kv_linear.weight"),
    )


@pytest.mark.parametrize(("null", "tokens"), [("token", 9), ("token", 5), ("sequence", 9), ("empty", 7)])
def test_captions_of_another_length_are_read_as_before(
    tiny: Tiny, settings: Settings, noise: Noise, null: str, tokens: int
) -> None:
    source = tiny(text_dim=6, null_text=null)
    kind = "sequence" if null == "empty" else null
    model, report = transfer_weights(
        source, settings(text_dim=6, max_text_tokens=tokens, null_text=kind), ("new_text_projection",)
    )
    x, text = noise(2, 3, 2, 4, 4), noise(2, 5, 6)
    assert torch.equal(model(x, TIMES, text).sample, source(x, TIMES, text).sample)
    if null == "token":
        assert torch.equal(model(x, TIMES).sample, source(x, TIMES).sample)
    assert set(report.newly_initialised) == ({"y_embedder.y_embedding"} if null == "empty" else set())


# ------------------------------------------------------------------------------------ what is report


def test_several_changes_at_once(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4, temporal=False)
    target = settings(text_dim=6, position_base=None, position_interpolation=2.0)
    model, report = transfer_weights(source, target, ("class_to_text", "add_temporal", "rescale_positions"))
    assert len(report.notes) == 3
    assert model(noise(1, 3, 2, 4, 4), 1).sample.isfinite().all()
    text = str(report)
    assert "blocks.*.attn_temp.qkv.weight" in text
    assert "dropped: y_embedder.embedding_table.weight" in text


def test_equal_configs_load_all(tiny: Tiny, settings: Settings) -> None:
    source = tiny(num_classes=4)
    model, report = transfer_weights(source, settings(num_classes=4))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert report.loaded == tuple(source.state_dict())
    assert (report.dropped, report.newly_initialised, report.notes) == ((), (), ())
    assert str(report) == f"loaded: {len(report.loaded)} parameters"


def test_drop_path_is_no_difference(tiny: Tiny, settings: Settings) -> None:
    assert not transfer_weights(tiny(drop_path=0.2), settings())[1].newly_initialised


def test_new_weights_come_from_the_seed(tiny: Tiny, settings: Settings) -> None:
    a, b, c = (
        transfer_weights(tiny(temporal=False), settings(), ("add_temporal",), seed)[0].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.attn_temp.qkv.weight"], c["blocks.0.attn_temp.qkv.weight"])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, {"hidden_size": 64}, r"\(32, 2, 4\) -> \(64, 2, 4\)"),
        ({}, {"depth": 3}, r"\(32, 2, 4\) -> \(32, 3, 4\)"),
        ({}, {"in_channels": 4, "gelu": "erf"}, r"(?s)in_channels 3 -> 4.*gelu tanh -> erf"),
        ({"num_classes": 4}, {"text_dim": 6}, r"num_classes 4 -> None \(needs init.allow: \[class_to_text\]\)"),
        ({"temporal": False}, {}, r"temporal False -> True \(needs init.allow: \[add_temporal\]\)"),
        ({}, {"position_base": 4}, r"position_base None -> 4 \(needs init.allow: \[rescale_positions\]\)"),
        ({"text_dim": 6}, {"text_dim": 8}, r"text_dim 6 -> 8 \(needs init.allow: \[new_text_projection\]\)"),
        ({"num_classes": 4}, {"num_classes": 5}, r"num_classes 4 -> 5$"),
        (
            {},
            {"micro_conditions": ("fps",)},
            r"micro_conditions \(\) -> \('fps',\) \(needs init.allow: \[add_micro_conditions\]",
        ),
        ({"micro_conditions": ("fps",)}, {}, r"micro_conditions \('fps',\) -> \(\)$"),
        ({}, {"conditioning": "adaln_zero"}, r"conditioning adaln_single -> adaln_zero$"),
        ({"conditioning": "adaln"}, {}, r"conditioning adaln -> adaln_single \(needs init.allow: \[adaln_to_single\]"),
        ({}, {"dynamic_tokens": True}, r"dynamic_tokens False -> True \(needs init.allow: \[add_dynamic\]"),
        ({"mlp": "conv2d"}, {"mlp": "conv3d"}, r"mlp conv2d -> conv3d$"),
        ({"positions": "learned", "position_grid": (4, 4), "position_frames": 2}, {}, r"positions learned -> sincos\n"),
        (
            {"temporal": False},
            {"attention": "alternating", "depth": 6},
            r"\(32, 4, 4\) \(twice 2, .*\) -> \(32, 6, 4\)",
        ),
        ({}, {"attention": "full"}, r"attention factorized -> full$"),
        ({"text_dim": 6}, {"num_classes": 4}, r"text_dim 6 -> None"),
    ],
)
def test_a_change_that_is_not_allowed_is_named_with_both_values(
    tiny: Tiny, settings: Settings, source: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        transfer_weights(tiny(**source), settings(**target))


def test_an_unknown_change_is_refused(tiny: Tiny, settings: Settings) -> None:
    with pytest.raises(ValueError, match="unknown change grow_depth; available: new_text_projection"):
        transfer_weights(tiny(), settings(), ("grow_depth",))


def test_every_transition_of_the_config_is_implemented() -> None:
    assert set(get_args(Transition)) == set(CHANGES)


# ---------------------------------------------------------------------------------------- the command


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_writes_a_model_and_says_what_is_new(
    tiny: Tiny, noise: Noise, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny(temporal=False, num_classes=4)
    source.save_pretrained(tmp_path / "image")
    (tmp_path / "video.yaml").write_text(
        "model: {hidden_size: 32, depth: 2, num_heads: 4, in_channels: 3, text_dim: 6, max_text_tokens: 7}\n"
    )
    allow = ["--allow", "add_temporal", "class_to_text"]
    run(tmp_path / "image", "--to", tmp_path / "video", "--config", tmp_path / "video.yaml", *allow)
    printed = capsys.readouterr().out
    assert "dropped: y_embedder.embedding_table.weight" in printed
    assert "blocks.*.attn_temp.qkv.weight" in printed
    model = STDiT.from_pretrained(tmp_path / "video")
    x = noise(2, 3, 2, 4, 4)
    close(model(x, TIMES, noise(2, 5, 6)).sample, source(x, TIMES).sample)
    # Without a file, the source's own config, changed.
    run(tmp_path / "image", "--to", tmp_path / "b", "--set", "temporal=true", "--allow", "add_temporal")
    assert STDiT.from_pretrained(tmp_path / "b").settings == source.settings.model_copy(update={"temporal": True})


def test_the_command_refuses_before_it_writes(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, video = tmp_path / "image", tmp_path / "video"
    tiny(temporal=False).save_pretrained(image)
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        ((image, "--to", tmp_path / "taken"), "exists already"),
        ((image, "--to", image), "is the source"),
        ((image, "--to", image / "sub" / "video"), "is the source .*, or inside it"),
        ((image, "--to", image / "config.json" / "x"), "is the source .*, or inside it"),
        ((tmp_path, "--to", video), "is the source .*, or inside it"),
        ((tmp_path / "nowhere", "--to", video), r"no such file or folder"),
        (
            (image, "--to", video, "--set", "temporal=true"),
            r"temporal False -> True \(needs init.allow: \[add_temporal\]",
        ),
        ((image, "--to", video, "--set", "widht=1"), "widht: unknown key"),
        (
            (image, "--to", video, "--set", "hidden_size=65536", "--set", "depth=1000"),
            r"the target has [\d,]{10,} M parameters, which take [\d,.]+ GiB; this machine has",
        ),
        ((image, "--to", video, "--config", tmp_path / "no.yaml"), r"no\.yaml: cannot be read"),
    ):
        assert run(*arguments) == 2
        assert re.match(f"error: [\\s\\S]*{message}", capsys.readouterr().err)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["image", "taken"]
    assert len(list(image.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_command_keeps_the_dtype_and_reports_when_nothing_changes(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: torch.dtype,
) -> None:
    tiny(temporal=False).to(dtype).save_pretrained(tmp_path / "image")
    run(tmp_path / "image", "--to", tmp_path / "b", "--set", "temporal=true", "--allow", "add_temporal")
    assert "nothing changes" not in capsys.readouterr().out
    written = load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    run(tmp_path / "image", "--to", tmp_path / "copy")
    assert "nothing changes" in capsys.readouterr().out
    copy, source = (load_file(tmp_path / n / "diffusion_pytorch_model.safetensors") for n in ("copy", "image"))
    assert all(torch.equal(copy[name], source[name]) for name in source)
