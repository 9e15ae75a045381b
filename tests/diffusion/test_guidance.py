"""Classifier-free guidance as a function from a model to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.diffusion.denoiser import FunctionDenoiser
from stdit.diffusion.guidance import guided

X = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.full((3,), 500.0)
COND = {
    "encoder_hidden_states": torch.arange(3.0).view(3, 1, 1).expand(3, 2, 5) + 1,
    "encoder_attention_mask": torch.ones(3, 2, dtype=torch.bool),
}


class Linear:
    """A model whose prediction shows what it was given; counts its calls and their batch sizes."""

    def __init__(self, variance: bool = False) -> None:
        self.batches: list[int] = []
        self.variance = variance

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.batches.append(x.shape[0])
        drop = cond.get("drop_condition", torch.zeros(x.shape[0], dtype=torch.bool))
        mask = cond["encoder_attention_mask"].unsqueeze(-1)
        text = (cond["encoder_hidden_states"] * mask).sum((1, 2)) / (5 * mask.sum((1, 2)))
        value = torch.where(drop, 0.0, text).view(-1, 1, 1, 1, 1)
        prediction = x * t.view(-1, 1, 1, 1, 1) / 1000 + value
        return torch.cat([prediction, prediction - 7], dim=1) if self.variance else prediction


Predict = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def predict(model: Predict, *args: Any, **kwargs: Any) -> Predict:
    """The guided model as a function of x, one time for the batch, and conditions."""
    steered = guided(FunctionDenoiser(model), *args, **kwargs)
    return lambda x, t, cond: steered.bind(cond, t[:1])(x, 0)


def test_guidance_scale_one_is_the_conditional_model() -> None:
    model = Linear()
    denoiser = FunctionDenoiser(model)
    assert guided(denoiser, 1.0) is denoiser
    near = predict(model, 1 + 1e-6)(X, T, COND)
    assert torch.allclose(near, model(X, T, COND), atol=1e-4)


def test_guidance_scale_zero_is_the_unconditional_model() -> None:
    dropped = {**COND, "drop_condition": torch.ones(3, dtype=torch.bool)}
    assert torch.allclose(predict(Linear(), 0.0)(X, T, COND), Linear()(X, T, dropped))


def test_guidance_goes_on_from_the_unconditional_through_the_conditional() -> None:
    model = Linear()
    conditional = model(X, T, COND)
    unconditional = model(X, T, {**COND, "drop_condition": torch.ones(3, dtype=torch.bool)})
    expected = unconditional + 3 * (conditional - unconditional)
    assert torch.allclose(predict(model, 3.0)(X, T, COND), expected)


def test_both_predictions_come_from_one_call() -> None:
    model = Linear()
    predict(model, 3.0)(X, T, COND)
    predict(model, 3.0)(X, torch.tensor(500.0).expand(3), COND)
    assert model.batches == [6, 6]


def test_a_learned_variance_is_not_guided() -> None:
    guided_prediction = predict(Linear(variance=True), 3.0)(X, T, COND)
    assert torch.allclose(guided_prediction[:, :2], predict(Linear(), 3.0)(X, T, COND))
    assert torch.allclose(guided_prediction[:, 2:], Linear(variance=True)(X, T, COND)[:, 2:])


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_negative_condition_takes_the_place_of_the_null(length: int) -> None:
    negative = {
        "encoder_hidden_states": torch.full((3, length, 5), -2.0),
        "encoder_attention_mask": torch.ones(3, length, dtype=torch.bool),
    }
    model = Linear()
    expected = model(X, T, negative) + 2 * (model(X, T, COND) - model(X, T, negative))
    assert torch.allclose(predict(model, 2.0, negative)(X, T, COND), expected)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_means_nothing_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"found {scale}"):
        guided(FunctionDenoiser(Linear()), scale)


def test_guidance_channels_guides_the_first_channels_only() -> None:
    """DiT's and PixArt's forward_with_cfg: `eps, rest = out[:, :3], out[:, 3:]`; only eps is guided, rest is each
    half's own."""
    x = torch.randn(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    model = Linear(variance=True)
    found = predict(model, 3.0, channels=3)(x, T, COND)
    with_condition = model(x, T, COND)
    without = model(x, T, {**COND, "drop_condition": torch.ones(3, dtype=torch.bool)})
    eps = without[:, :3] + 3.0 * (with_condition[:, :3] - without[:, :3])
    assert torch.allclose(found, torch.cat([eps, with_condition[:, 3:]], dim=1))
    assert torch.equal(predict(model, 3.0, channels=4)(x, T, COND), predict(model, 3.0)(x, T, COND))
    with pytest.raises(ValueError, match="guidance_channels 5 is more than the 4 latent channels"):
        predict(model, 3.0, channels=5)(x, T, COND)
    with pytest.raises(ValueError, match="found 0"):
        guided(FunctionDenoiser(model), 3.0, channels=0)


def test_conditions_are_doubled_once_for_all_steps() -> None:
    seen: list[Mapping[str, Tensor]] = []

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen.append(cond)
        return x

    cond, times = dict(COND), torch.tensor([900.0, 100.0])
    step_model = guided(FunctionDenoiser(model), 3.0).bind(cond, times)
    for i in range(2):
        step_model(X, i)
    assert seen[0] is seen[1]
    cond["encoder_attention_mask"] = torch.zeros(3, 2, dtype=torch.bool)
    guided(FunctionDenoiser(model), 3.0).bind(cond, times)(X, 0)
    assert not seen[2]["encoder_attention_mask"].any()


def test_what_samples_share_stays_shared() -> None:
    seen: list[tuple[Tensor, Mapping[str, Any]]] = []

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        seen.append((t, cond))
        return x

    fps, frames = torch.tensor([8.0]), torch.tensor([[True, False]]).expand(3, -1)
    times = torch.tensor([900.0, 100.0])
    steered = guided(FunctionDenoiser(model), 3.0)
    steered.bind(
        {
            "class_labels": torch.arange(3),
            "conditioning_frames": frames,
            "added_cond_kwargs": {"fps": fps, "height": torch.arange(3.0)},
        },
        times,
    )(X, 1)
    t, cond = seen[0]
    assert (t.tolist(), t.stride()) == ([100.0] * 6, (0,))
    added = cond["added_cond_kwargs"]
    assert (added["fps"].shape, added["fps"].stride(0)) == ((6,), 0)
    assert (cond["conditioning_frames"].shape, cond["conditioning_frames"].stride(0)) == ((6, 2), 0)
    assert added["height"].tolist() == [0, 1, 2, 0, 1, 2]
    assert cond["drop_condition"].tolist() == [False] * 3 + [True] * 3


def test_nothing_is_dropped_where_a_negative_stands_in() -> None:
    """A model without a null condition of its own refuses to be told so."""
    seen: list[Mapping[str, Tensor]] = []

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen.append(cond)
        return x

    negative = {"encoder_hidden_states": torch.zeros(3, 2, 5), "encoder_attention_mask": COND["encoder_attention_mask"]}
    predict(model, 3.0, negative)(X, T, COND)
    assert "drop_condition" not in seen[0]
