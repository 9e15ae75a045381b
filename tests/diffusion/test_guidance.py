"""Classifier-free guidance as a function from a model to a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

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


def test_guidance_scale_one_is_the_conditional_model() -> None:
    model = Linear()
    assert guided(model, 1.0) is model
    near = guided(model, 1 + 1e-6)(X, T, COND)
    assert torch.allclose(near, model(X, T, COND), atol=1e-4)


def test_guidance_scale_zero_is_the_unconditional_model() -> None:
    dropped = {**COND, "drop_condition": torch.ones(3, dtype=torch.bool)}
    assert torch.allclose(guided(Linear(), 0.0)(X, T, COND), Linear()(X, T, dropped))


def test_guidance_goes_on_from_the_unconditional_through_the_conditional() -> None:
    model = Linear()
    conditional = model(X, T, COND)
    unconditional = model(X, T, {**COND, "drop_condition": torch.ones(3, dtype=torch.bool)})
    expected = unconditional + 3 * (conditional - unconditional)
    assert torch.allclose(guided(model, 3.0)(X, T, COND), expected)


def test_both_predictions_come_from_one_call() -> None:
    model = Linear()
    guided(model, 3.0)(X, T, COND)
    guided(model, 3.0)(X, torch.tensor(500.0).expand(3), COND)
    assert model.batches == [6, 6]


def test_a_learned_variance_is_not_guided() -> None:
    guided_prediction = guided(Linear(variance=True), 3.0)(X, T, COND)
    assert torch.allclose(guided_prediction[:, :2], guided(Linear(), 3.0)(X, T, COND))
    assert torch.allclose(guided_prediction[:, 2:], Linear(variance=True)(X, T, COND)[:, 2:])


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_negative_condition_takes_the_place_of_the_null(length: int) -> None:
    negative = {
        "encoder_hidden_states": torch.full((3, length, 5), -2.0),
        "encoder_attention_mask": torch.ones(3, length, dtype=torch.bool),
    }
    model = Linear()
    expected = model(X, T, negative) + 2 * (model(X, T, COND) - model(X, T, negative))
    assert torch.allclose(guided(model, 2.0, negative)(X, T, COND), expected)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_means_nothing_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"found {scale}"):
        guided(Linear(), scale)
