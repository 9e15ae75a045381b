"""Models without a null caption of their own: the empty caption stands for what is dropped and what guidance leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stdit.config import Bucket, Config, merge
from stdit.data.features import EmptyCaption, Sample
from stdit.data.loader import Batch, collate
from stdit.diffusion.denoiser import FunctionDenoiser
from stdit.diffusion.guidance import guided
from stdit.models.stdit import STDiT
from stdit.training.data import open_data
from stdit.training.distributed import Ranks
from stdit.training.inputs import Inputs, batch_conditions
from stdit.training.validation import Validator
from tests.support.rank_jobs import config_of, settings

CPU = torch.device("cpu")
STATISTICS = {"shift": [0.0], "scale": [1.0]}
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
EMPTY = EmptyCaption(torch.full((3, 8), -1.0), torch.full((5,), -2.0))
BUCKET = Bucket(frames=1, height=4, width=4)


def config(**model: Any) -> Config:
    told = {"null_text": "empty", "pooled_dim": 5, "conditioning": "joint", "attention": "full", **model}
    return config_of(merge(settings("runs/x"), {"model": told}))


def inputs(settings: Config, empty: EmptyCaption | None = EMPTY) -> Inputs:
    return Inputs(settings, STATISTICS, CPU, empty)


def batch_of(lengths: list[int]) -> Batch:
    latent = torch.ones(1, 1, 4, 4)
    samples = [
        Sample(i, latent, None, torch.full((n, 8), 1.0 + i), i % 4, 8.0, 30, 40, "c", pooled=torch.full((5,), 1.0 + i))
        for i, n in enumerate(lengths)
    ]
    return collate(samples, range(len(lengths)), BUCKET)


@pytest.mark.parametrize("lengths", [[1, 2], [7, 2, 5], [2] * 40])
def test_dropped_captions_are_replaced_by_the_empty_one(lengths: list[int]) -> None:
    made, batch = inputs(config()), batch_of(lengths)
    own = inputs(config(null_text="token")).drop_conditions(
        batch_conditions(batch, config().model, CPU), 3, batch.positions
    )
    told = made.drop_conditions(batch_conditions(batch, config().model, CPU), 3, batch.positions)
    assert "drop_condition" not in told
    without = own["drop_condition"]
    assert without.any()
    longest = max(*lengths, 3)
    for i, length in enumerate(lengths):
        seen = 3 if without[i] else length
        assert told[MASK][i].tolist() == [True] * seen + [False] * (longest - seen)
        assert torch.equal(told[TEXT][i, :seen], EMPTY.text if without[i] else torch.full((seen, 8), 1.0 + i))
        assert not told[TEXT][i, seen:].any()
        assert told[POOLED][i].tolist() == [-2.0 if without[i] else 1.0 + i] * 5
        if without[i]:
            assert told["class_labels"][i] == -1


def test_which_captions_are_dropped_does_not_depend_on_the_batch() -> None:
    made, whole = inputs(config()), batch_of([2] * 12)
    told = made.drop_conditions(batch_conditions(whole, config().model, CPU), 5, whole.positions)
    assert whole.text is not None
    assert whole.text_mask is not None
    assert whole.pooled is not None
    half = replace(whole, text=whole.text[6:], text_mask=whole.text_mask[6:], pooled=whole.pooled[6:],
                   class_labels=whole.class_labels[6:], positions=whole.positions[6:])  # fmt: skip
    part = made.drop_conditions(batch_conditions(half, config().model, CPU), 5, half.positions)
    assert torch.equal(part[POOLED], told[POOLED][6:])
    assert torch.equal(part["class_labels"], told["class_labels"][6:])


def test_nothing_dropped_changes_nothing() -> None:
    never = config_of(
        merge(config().model_dump(mode="json"), {"diffusion": {"caption_dropout": 0.0, "label_dropout": 0.0}})
    )
    batch = batch_of([1, 2])
    condition = batch_conditions(batch, never.model, CPU)
    told = inputs(never).drop_conditions(condition, 1, batch.positions)
    assert all(torch.equal(told[name], condition[name]) for name in condition)
    assert told.keys() == condition.keys()


def test_text_is_cut_to_the_longest_prompt_before_it_is_sent() -> None:
    batch = batch_of([2, 4])
    wide = replace(
        batch,
        text=torch.nn.functional.pad(batch.text, (0, 0, 0, 6)),  # type: ignore[arg-type]
        text_mask=torch.nn.functional.pad(batch.text_mask, (0, 6)),  # type: ignore[arg-type]
    )
    for one in (batch, wide):
        condition = batch_conditions(one, config().model, CPU)
        assert condition[TEXT].shape == (2, 4, 8)
        assert condition[MASK].shape == (2, 4)


def test_guidance_leaves_the_empty_caption() -> None:
    """At scale 0 a guided model is the model under the empty caption; that is what previews are given."""
    settings = config()
    model, made = STDiT.from_settings(settings.model).eval(), inputs(settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.2)
    x, t = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])

    def predict(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return model(x, t, **cond).sample

    condition = batch_conditions(batch_of([2, 7]), settings.model, CPU)
    with torch.no_grad():
        found = guided(FunctionDenoiser(predict), 0.0, made.empty(2)).bind(condition, t)(x, 0)
        own = predict(x, t, made.empty(2))
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)
    assert inputs(config(null_text="token")).empty(2) == {}


@pytest.mark.parametrize("conditioning", ["joint", "adaln_single"])
def test_such_a_model_trains_and_draws_on_synthetic_data(conditioning: str) -> None:
    change = {"samples": {"every": 1, "count": 2, "sampler": {"steps": 2}}, "validation": {"every": 1, "samples": 2}}
    told = config_of(merge(config(conditioning=conditioning).model_dump(mode="json"), change))
    data = open_data(told)
    made = Inputs(told, data.video_encoder, CPU, data.empty_caption)
    model = STDiT.from_settings(told.model)
    preview = Validator(told, data, made, Ranks(0, 1, 0, CPU))
    assert preview.sample_grid(model.eval()) is not None
    assert preview.loss(model)["validation_loss"] > 0
