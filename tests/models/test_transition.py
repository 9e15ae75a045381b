"""What crosses from one stage's model to the next one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stdit.config import ModelConfig
from stdit.models.stdit import STDiT
from stdit.models.transition import carry

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]
Settings = Callable[..., ModelConfig]
TIMES = torch.tensor([3.0, 700.0])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_captions_start_where_the_class_model_was_unconditional(
    tiny: Tiny, settings: Settings, noise: Noise, pooled: bool, attention: str
) -> None:
    source = tiny(num_classes=4, attention=attention)
    target = settings(text_dim=6, pooled_text=pooled, attention=attention)
    model, carried = carry(source, target, ("class_to_text",))
    x = noise(2, 3, 2, 4, 4)
    expected = source(x, TIMES).sample
    torch.testing.assert_close(model(x, TIMES, noise(2, 5, 6)).sample, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, TIMES).sample, expected, rtol=1e-5, atol=1e-5)
    assert model.settings == target
    assert carried.dropped == ("y_embedder.embedding_table.weight",)
    assert "y_embedder.y_embedding" in carried.new
    assert {n for n in carried.new if "cross_attn" not in n and "y_embedder" not in n} == set()


def test_classes_may_stay_when_captions_come(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4)
    model, carried = carry(source, settings(num_classes=4, text_dim=6, pooled_text=True), ("class_to_text",))
    x, labels = noise(2, 3, 2, 4, 4), torch.tensor([3, -1])
    expected = source(x, TIMES, class_labels=labels).sample
    torch.testing.assert_close(model(x, TIMES, noise(2, 5, 6), class_labels=labels).sample, expected)
    assert not carried.dropped


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_temporal_layers_join_at_zero(tiny: Tiny, settings: Settings, noise: Noise, positions: str) -> None:
    source = tiny(temporal=False, text_dim=6, positions=positions, hidden_size=48)
    model, carried = carry(source, settings(text_dim=6, positions=positions, hidden_size=48), ("add_temporal",))
    text, image = noise(2, 4, 6), noise(2, 3, 1, 4, 6)
    expected = source(image, TIMES, text).sample
    assert torch.equal(model(image, TIMES, text).sample, expected)
    repeated = model(image.expand(-1, -1, 3, -1, -1), TIMES, text).sample
    torch.testing.assert_close(repeated, expected.expand(-1, -1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    video = noise(2, 3, 3, 4, 6)
    torch.testing.assert_close(model(video, TIMES, text).sample, source(video, TIMES, text).sample)
    assert all(".attn_temp." in name for name in carried.new)
    # They are not dead: one step of training moves them.
    model(video, TIMES, text).sample.square().mean().backward()
    gradient = model.get_parameter("blocks.0.attn_temp.proj.weight").grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_an_image_model_becomes_full_3d_unchanged_at_one_frame(
    tiny: Tiny, settings: Settings, noise: Noise, positions: str
) -> None:
    source = tiny(temporal=False, positions=positions, hidden_size=48)
    model, carried = carry(source, settings(attention="full", positions=positions, hidden_size=48), ("add_temporal",))
    image = noise(2, 3, 1, 4, 6)
    torch.testing.assert_close(model(image, TIMES).sample, source(image, TIMES).sample)
    assert not carried.new
    assert not carried.dropped


def test_rescaled_positions_change_no_weight(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(position_base=2)
    model, carried = carry(source, settings(position_base=2, temporal_interpolation=2.0), ("rescale_positions",))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert "temporal_interpolation 1.0 -> 2.0" in str(carried)
    # Twice the frames, half the step: frame 2i stands where frame i stood.
    base = noise(1, 3, 2, 4, 4)
    slow = model._places((4, 2, 2), base).temporal
    fast = source._places((2, 2, 2), base).temporal
    assert slow is not None
    assert fast is not None
    torch.testing.assert_close(slow[::2], fast)


def test_another_text_encoder_brings_a_new_projection(tiny: Tiny, settings: Settings) -> None:
    source = tiny(text_dim=6, pooled_text=True)
    model, carried = carry(source, settings(text_dim=8, text_tokens=9, pooled_text=True), ("new_text_projection",))
    assert {name.split(".")[1] for name in carried.new} == {"y_embedding", "y_proj", "pooled_proj"}
    assert torch.equal(
        model.get_parameter("blocks.0.cross_attn.kv_linear.weight"),
        source.get_parameter("blocks.0.cross_attn.kv_linear.weight"),
    )


def test_several_changes_at_once(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source = tiny(num_classes=4, temporal=False)
    target = settings(text_dim=6, position_base=None, position_interpolation=2.0)
    model, carried = carry(source, target, ("class_to_text", "add_temporal", "rescale_positions"))
    assert len(carried.notes) == 3
    assert model(noise(1, 3, 2, 4, 4), 1).sample.isfinite().all()
    text = str(carried)
    assert "blocks.*.attn_temp.qkv.weight" in text
    assert "dropped: y_embedder.embedding_table.weight" in text


def test_no_change_carries_all(tiny: Tiny, settings: Settings) -> None:
    source = tiny(num_classes=4)
    model, carried = carry(source, settings(num_classes=4))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert carried.carried == tuple(source.state_dict())
    assert (carried.dropped, carried.new, carried.notes) == ((), (), ())
    assert str(carried) == f"carried: {len(carried.carried)} parameters"


def test_new_weights_come_from_the_seed(tiny: Tiny, settings: Settings) -> None:
    a, b, c = (carry(tiny(temporal=False), settings(), ("add_temporal",), seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.attn_temp.qkv.weight"], c["blocks.0.attn_temp.qkv.weight"])


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ({}, {"hidden_size": 64}, r"\(32, 2, 4\) -> \(64, 2, 4\)"),
        ({}, {"depth": 3}, r"\(32, 2, 4\) -> \(32, 3, 4\)"),
        ({}, {"in_channels": 4, "gelu": "erf"}, r"(?s)in_channels 3 -> 4.*gelu tanh -> erf"),
        ({"num_classes": 4}, {"text_dim": 6}, r"num_classes 4 -> None \(init.allow: \[class_to_text\] would\)"),
        ({"temporal": False}, {}, r"temporal False -> True \(init.allow: \[add_temporal\] would\)"),
        ({}, {"position_base": 4}, r"position_base None -> 4 \(init.allow: \[rescale_positions\] would\)"),
        ({"text_dim": 6}, {"text_dim": 8}, r"text_dim 6 -> 8 \(init.allow: \[new_text_projection\] would\)"),
        ({"num_classes": 4}, {"num_classes": 5}, r"num_classes 4 -> 5$"),
        ({}, {"attention": "full"}, r"attention factorized -> full$"),
        ({"text_dim": 6}, {"num_classes": 4}, r"text_dim 6 -> None"),
    ],
)
def test_a_change_that_is_not_allowed_is_named_with_both_values(
    tiny: Tiny, settings: Settings, source: dict[str, Any], target: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        carry(tiny(**source), settings(**target))
