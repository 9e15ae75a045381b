"""What a model and its config refuse, with both numbers, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stdit.config import ModelConfig
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.stdit import STDiT

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_heads 4"),
    ({"num_heads": 8, "hidden_size": 36, "positions": "none"}, "hidden_size 36 is not divisible by num_heads 8"),
    ({"micro_conditions": ["size"]}, "hidden_size 32 is not divisible by 3"),
    ({"timestep_width": 33}, "timestep_width 33 is odd"),
    ({"temporal": False, "attention": "full"}, "full attention has no temporal part"),
    ({"depth": 3, "attention": "alternating"}, "depth 3 is odd"),
    ({"window_blocks": [0]}, "window_blocks without window_size"),
    ({"window_size": 2, "window_blocks": [2]}, "names block 2; depth is 2"),
    ({"window_size": 2, "attention": "full"}, "window_size 2 belongs to attention within frames"),
    ({"kv_compress": 2, "positions": "rope"}, "kv_compress 2 does not go with positions: rope"),
    ({"window_size": 2, "kv_compress": 2}, "block 0 has both window_size 2 and kv_compress 2"),
    ({"window_size": 2, "conditioning": "in_context"}, "window_size 2 does not go with conditioning in_context"),
    ({"relative_positions": True}, "relative_positions needs window_size"),
    ({"positions": "learned"}, "needs position_grid"),
    ({"positions": "learned", "position_grid": [4, 4]}, "need position_frames"),
    ({"position_reference": 512, "position_base": 32}, "leave out position_base"),
    ({"attention": "full", "positions": "rope", "temporal_positions": "sincos"}, "3D rope has no temporal_positions"),
    ({"pooled_text": True}, "pooled_text needs text_dim"),
    ({"pooled_text": True, "text_dim": 6, "pooled_dim": 5}, "or pooled_dim 5, not both"),
    ({"conditioning": "joint"}, "joint needs text_dim"),
    ({"conditioning": "joint", "text_dim": 6, "attention": "alternating"}, "not alternating"),
    ({"conditioning": "joint", "text_dim": 6, "mlp": "conv2d"}, "conv2d needs a grid"),
    ({"conditioning": "in_context", "mlp": "conv3d"}, "conv3d needs a grid"),
    ({"drop_path": 1.0}, "less than 1"),
    ({"kv_compress": 1}, "greater than or equal to 2"),
    ({"qk_norm": "batch"}, "'rms' or 'layer'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[message for _, message in CONFIGS])
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {"hidden_size": 32, "depth": 2, "num_heads": 4, **changes}
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig.model_validate(values)


INPUTS: list[tuple[dict[str, Any], tuple[int, ...], dict[str, Any], str]] = [
    ({}, (2, 3, 1, 7, 8), {}, "height 7 is not divisible by patch_size 2"),
    ({}, (2, 4, 1, 8, 8), {}, "4 channels; the model takes in_channels 3"),
    ({}, (2, 3, 8, 8), {}, "4 dimensions"),
    ({"window_size": 3}, (2, 3, 1, 8, 12), {}, "height of 4 patches is not divisible by window_size 3"),
    ({"kv_compress": 4}, (2, 3, 1, 8, 12), {}, "width of 6 patches is not divisible by kv_compress 4"),
    ({"positions": "learned", "position_grid": (4, 4), "position_frames": 2}, (2, 3, 3, 8, 8), {}, "3 frames of patches; the learned position table (position_frames) has 2"),
    ({"positions": "learned", "position_grid": (4, 4), "position_frames": 2}, (2, 3, 1, 8, 10), {}, "width of 5 patches; the position table (position_grid) has 4"),
    ({"text_dim": 6}, (2, 3, 1, 8, 8), {"encoder_hidden_states": torch.zeros(2, 5, 7)}, "7 wide; the model takes text_dim 6"),
    ({"text_dim": 6}, (2, 3, 1, 8, 8), {"encoder_hidden_states": torch.zeros(2, 9, 6)}, "9 tokens; the model takes 1 to max_text_tokens 7"),
    ({"text_dim": 6}, (2, 3, 1, 8, 8), {"encoder_hidden_states": torch.zeros(2, 5, 6), "encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask has shape (2, 4); encoder_hidden_states has (2, 5)"),
    ({"text_dim": 6, "null_text": "empty"}, (2, 3, 1, 8, 8), {}, "the model has no null caption"),
    ({"text_dim": 6, "null_text": "empty"}, (2, 3, 1, 8, 8), {"encoder_hidden_states": torch.zeros(2, 5, 6), "drop_condition": torch.tensor([True, False])}, "drop_condition: the model has no null"),
    ({"num_classes": 3}, (2, 3, 1, 8, 8), {"class_labels": torch.tensor([0, 3])}, "class label 3 is out of range; the model has 3 classes"),
    ({"num_classes": 3}, (2, 3, 1, 8, 8), {"class_labels": torch.tensor([0])}, "class_labels has shape (1,)"),
    ({}, (2, 3, 1, 8, 8), {"pooled_projections": torch.zeros(2, 5)}, "pooled_dim None"),
    ({"pooled_dim": 5}, (2, 3, 1, 8, 8), {"pooled_projections": torch.zeros(2, 4)}, "pooled_projections has shape (2, 4); expected (2, 5)"),
    ({"micro_conditions": ("frames",)}, (2, 3, 1, 8, 8), {}, "frames is missing; the model has micro_conditions frames"),
    ({"position_reference": 64}, (2, 3, 1, 8, 8), {}, "height is missing; the model has position_reference 64"),
    ({"position_reference": 64}, (2, 3, 1, 8, 8), {"added_cond_kwargs": {"height": torch.tensor([64.0, 32.0]), "width": 64.0}}, "height differs within the batch [64.0, 32.0]"),
    ({"micro_conditions": ("size",), "hidden_size": 24}, (2, 3, 1, 8, 8), {"added_cond_kwargs": {"height": torch.zeros(3), "width": 8.0}}, "height has shape (3,)"),
    ({}, (2, 3, 2, 8, 8), {"conditioning_frames": torch.zeros(2, 3, dtype=torch.bool)}, "conditioning_frames has shape (2, 3); expected (samples, latent frames) (2, 2)"),
    ({"conditioning": "cross_attention"}, (2, 3, 2, 8, 8), {"conditioning_frames": torch.zeros(2, 2, dtype=torch.bool)}, "cross_attention conditioning has one timestep for all frames"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "shape", "inputs", "message"), INPUTS, ids=[case[-1] for case in INPUTS])
def test_inputs_that_do_not_fit_are_refused_before_any_product(
    tiny: Tiny, changes: dict[str, Any], shape: tuple[int, ...], inputs: dict[str, Any], message: str
) -> None:
    model = tiny(**changes)
    model.x_embedder.register_forward_pre_hook(lambda *_: pytest.fail("computed something first"))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(shape), 300, **inputs)


PREPARED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text_dim": 6}, {"encoder_hidden_states": torch.zeros(2, 5, 7)}, "7 wide; the model takes text_dim 6"),
    (
        {"text_dim": 6},
        {"encoder_hidden_states": torch.zeros(2, 5, 6), "encoder_attention_mask": torch.ones(2, 4)},
        "has shape (2, 4); encoder_hidden_states has (2, 5)",
    ),
    (
        {"text_dim": 6},
        {"encoder_hidden_states": torch.zeros(2, 9, 6)},
        "9 tokens; the model takes 1 to max_text_tokens 7",
    ),
    ({"num_classes": 3}, {"class_labels": torch.tensor([0, 9])}, "class label 9 is out of range"),
    ({"micro_conditions": ("fps",)}, {}, "fps is missing"),
]


@pytest.mark.parametrize(("changes", "inputs", "message"), PREPARED, ids=[case[-1] for case in PREPARED])
def test_what_is_prepared_ahead_is_checked_then(
    tiny: Tiny, changes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_static(tiny(**changes), ConditionInputs(**inputs))


def test_conditions_of_other_samples_are_refused(tiny: Tiny, noise: Noise) -> None:
    model = tiny(num_classes=3)
    time = torch.tensor([500.0])
    static = encode_static(model, ConditionInputs(class_labels=torch.tensor([0, 1])))
    made = precompute_conditions(model, time, static)[0]
    with pytest.raises(ValueError, match="precomputed for 2 samples; hidden_states has 3"):
        model(noise(3, 3, 1, 8, 8), 500, conditions=made)
    static = encode_static(model, ConditionInputs())
    frames = precompute_conditions(model, time, static, torch.tensor([[True, False]]))[0]
    with pytest.raises(ValueError, match="precomputed for 2 frames of patches; hidden_states has 3"):
        model(noise(1, 3, 3, 8, 8), 500, conditions=frames)
    with pytest.raises(ValueError, match=r"conditions is a int; expected one of precompute_conditions' results"):
        model(noise(1, 3, 3, 8, 8), 500, conditions=3)


ODD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_classes": 3}, {"drop_condition": torch.tensor([0, 1])}, "drop_condition is torch.int64; expected torch.bool"),
    ({"num_classes": 3}, {"class_labels": [0, 1]}, "class_labels is a list; expected a tensor"),
    ({"micro_conditions": ("fps",)}, {"added_cond_kwargs": {"fps": "8"}}, "fps is '8'; expected a finite number"),
    ({"micro_conditions": ("fps",)}, {"added_cond_kwargs": {"fps": float("inf")}}, "fps is inf; expected a finite number"),
    ({"micro_conditions": ("fps",)}, {"added_cond_kwargs": {"fps": 10**400}}, "00000; expected a finite number"),
    ({"micro_conditions": ("fps",)}, {"added_cond_kwargs": [8.0]}, "added_cond_kwargs is a list; expected a mapping"),
    ({}, {"timestep": float("nan")}, "timestep is nan; expected a finite number"),
    ({}, {"timestep": torch.ones(2, dtype=torch.complex64)}, "timestep is torch.complex64; expected a finite number"),
    ({}, {"hidden_states": torch.ones(2, 3, 1, 8, 8, dtype=torch.int64)}, "hidden_states is torch.int64; expected floating point"),
    ({}, {"hidden_states": [[1.0]]}, "hidden_states is a list; expected a tensor"),
    ({}, {"conditioning_frames": torch.ones(2, 1)}, "conditioning_frames is torch.float32; expected torch.bool"),
    ({"text_dim": 8}, {"encoder_hidden_states": torch.ones(2, 3, 8).long()}, "encoder_hidden_states is torch.int64; expected floating point"),
    (
        {"text_dim": 8},
        {"encoder_hidden_states": torch.ones(2, 3, 8), "encoder_attention_mask": torch.ones(2, 3, dtype=torch.complex64)},
        "encoder_attention_mask is torch.complex64; expected torch.bool",
    ),
    ({"position_reference": 64}, {"added_cond_kwargs": {"height": 0, "width": 64}}, "height is 0; expected pixels, more than 0"),
    ({}, {"conditioning_frames": [[True], [False]]}, "conditioning_frames is a list; expected a tensor (2, 1)"),
    (
        {"text_dim": 6, "null_text": "empty"},
        {"encoder_hidden_states": torch.zeros(2, 5, 6), "encoder_attention_mask": torch.eye(2, 5) * torch.tensor([[1], [0]])},
        "caption 1 has no token, and the model has no null caption",
    ),
    ({}, {"block_residuals": [None]}, "block_residuals: expected a list of tensors, found [None]"),
    ({}, {"block_residuals": 7}, "block_residuals: expected a list of tensors, found 7"),
    ({}, {"added_cond_kwargs": torch.ones(2)}, "added_cond_kwargs is a Tensor; expected a mapping"),
    ({}, {"block_residuals": [torch.zeros(2, 1, 16, 31)]}, "block_residuals[0] has shape (2, 1, 16, 31); the tokens are (2, 1, 16, 32)"),
    ({}, {"block_residuals": [torch.zeros(2, 1, 16, 32)] * 3}, "block_residuals are 3; the model has 2 blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "inputs", "message"), ODD, ids=[case[-1] for case in ODD])
def test_values_of_another_kind_are_refused_with_what_was_expected(
    tiny: Tiny, changes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**changes)(**{"hidden_states": torch.zeros(2, 3, 1, 8, 8), "timestep": 300, **inputs})
