from __future__ import annotations

import pytest
import torch

from stdit.config import Bucket, ConfigError, merge
from stdit.data.features import Sample
from stdit.data.loader import collate
from stdit.inference.video_conditions import prepare_frame_condition
from stdit.training.inputs import Inputs, batch_conditions
from tests.support.rank_jobs import config_of, settings

CPU = torch.device("cpu")
STATISTICS = {"shift": [1.0, 2.0], "scale": [0.5, 0.25]}


def inputs() -> Inputs:
    config = config_of(merge(settings("runs/x"), {"model": {"in_channels": 2, "micro_conditions": ["fps", "width"]}}))
    return Inputs(config, STATISTICS, CPU)


def samples(count: int) -> list[Sample]:
    mean, std = torch.ones(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)
    return [Sample(i, mean * i, std, torch.ones(2 + i, 8), i % 4, 8.0, 30, 40, "c") for i in range(count)]


BUCKET = Bucket(frames=1, height=4, width=4)


def test_latents_are_normalised_and_drawn_from_their_posterior() -> None:
    made, batch = inputs(), collate(samples(2), [0, 1], BUCKET)
    mean = made.latents(batch, None)
    torch.testing.assert_close(mean[1, :, 0, 0, 0], torch.tensor([0.0, -0.25]))
    drawn, again, later = (made.latents(batch, step) for step in (1, 1, 2))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, later)
    # Within five standard deviations, in normalised units.
    assert ((drawn - mean).abs() < 5 * 0.1 * 0.5).all()


def test_a_samples_conditions_do_not_depend_on_its_batch() -> None:
    made, all_ = inputs(), samples(6)
    whole = collate(all_, range(6), BUCKET)
    halves = [collate(all_[:3], range(3), BUCKET), collate(all_[3:], range(3, 6), BUCKET)]

    def given(batch: object) -> list[torch.Tensor]:
        x0 = made.latents(batch, 5)  # type: ignore[arg-type]
        positions = batch.positions  # type: ignore[attr-defined]
        dropped = made.drop_conditions(batch_conditions(batch, made.config.model, CPU), 5, positions)  # type: ignore[arg-type]
        return [
            x0,
            made.noise(x0, "noise", 5, positions),
            made.timesteps(x0, 5, positions),
            dropped["class_labels"],
            dropped["drop_condition"],
        ]

    for one, *parts in zip(given(whole), *map(given, halves), strict=True):
        assert torch.equal(one, torch.cat(parts))


def test_conditions_are_dropped_at_the_configured_rate() -> None:
    made = inputs()
    batch = collate(samples(4) * 500, range(2000), BUCKET)
    condition = batch_conditions(batch, made.config.model, CPU)
    dropped = made.drop_conditions(condition, 1, batch.positions)
    for share in ((dropped["class_labels"] == -1).float().mean(), dropped["drop_condition"].float().mean()):
        assert abs(share - 0.3) < 0.05
    kept = dropped["class_labels"] != -1
    assert torch.equal(dropped["class_labels"][kept], batch.class_labels[kept])


def test_the_model_receives_its_own_conditions_only() -> None:
    made, batch = inputs(), collate(samples(2), [0, 1], BUCKET)
    names = {"class_labels", "encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"}
    found = batch_conditions(batch, made.config.model, CPU)
    assert set(found) == names
    assert set(found["added_cond_kwargs"]) == {"fps", "width"}
    sized = made.config.model.model_copy(update={"micro_conditions": ("frames", "size")})
    added = batch_conditions(batch, sized, CPU)["added_cond_kwargs"]
    assert {k: v.tolist() for k, v in added.items()} == {"frames": [1, 1], "height": [30, 30], "width": [40, 40]}
    # Coordinates are those of the clip as it is cut, not of its source.
    scaled = made.config.model.model_copy(update={"micro_conditions": (), "position_reference": 512})
    added = batch_conditions(batch, scaled, CPU)["added_cond_kwargs"]
    assert (added["height"].tolist(), added["width"].tolist()) == ([4], [4])
    plain = made.config.model.model_copy(update={"num_classes": None, "text_dim": None, "micro_conditions": ()})
    assert batch_conditions(batch, plain, CPU) == {}
    assert made.drop_conditions({}, 1, batch.positions) == {}


def test_negatives_are_others_of_the_batch_all_equally_likely() -> None:
    config = config_of(merge(settings("runs/x"), {"diffusion": {"contrastive_weight": 0.05}}))
    made, positions = Inputs(config, STATISTICS, CPU), tuple(range(5))
    drawn = torch.stack([torch.as_tensor(made.negatives(step, positions)) for step in range(1000)])
    again = made.negatives(7, positions)
    assert torch.equal(drawn[7], torch.as_tensor(again))
    counts = torch.stack([(drawn == other).sum(0) for other in range(5)])  # (other, sample)
    assert torch.equal(counts.diag(), torch.zeros(5, dtype=counts.dtype))
    off = counts[~torch.eye(5, dtype=torch.bool)].float()
    assert ((off - 250).abs() < 70).all()  # five standard deviations
    assert torch.as_tensor(made.negatives(1, (3, 4))).tolist() == [1, 0]
    assert inputs().negatives(1, positions) is None


def test_a_batch_of_one_has_no_negative() -> None:
    changes = {
        "diffusion": {"contrastive_weight": 0.05},
        "data": {"buckets": [{**BUCKET.model_dump(), "batch_size": 1}]},
    }
    with pytest.raises(ConfigError, match=r"contrastive_weight.*1x4x4 has batch_size 1"):
        config_of(merge(settings("runs/x"), changes))


def test_conditioning_frames_are_the_same_at_the_same_step_whatever_the_batch() -> None:
    config = config_of(merge(settings("runs/x"), {"diffusion": {"frame_conditioning": {"first": 0.4, "random": 0.4}}}))
    made = Inputs(config, STATISTICS, CPU)
    x0 = torch.zeros(40, 2, 4, 4, 4)
    whole, again, later = (made.frame_mask(x0, step, tuple(range(40))) for step in (1, 1, 2))
    part = made.frame_mask(x0[10:], 1, tuple(range(10, 40)))
    assert whole is not None
    assert again is not None
    assert part is not None
    assert torch.equal(whole, again)
    assert torch.equal(whole[10:], part)
    assert not torch.equal(whole, torch.as_tensor(later))
    assert inputs().frame_mask(x0, 1, tuple(range(40))) is None
    assert made.frame_mask(x0[:, :, :1], 1, tuple(range(40))) is None


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["first", "head", "tail", "ends", "random"])
def test_every_training_mask_is_one_that_the_pipeline_takes(patch: int, pattern: str) -> None:
    changes = {"model": {"patch_size": [patch, 2, 2]}, "diffusion": {"frame_conditioning": {pattern: 0.9}}}
    config = config_of(merge(settings("runs/x"), changes))
    made = Inputs(config, STATISTICS, CPU)
    shape = (64, 2, 12, 4, 4)
    masks = made.frame_mask(torch.zeros(shape), 1, tuple(range(64)))
    assert masks is not None
    assert masks.any()
    assert not masks.all(1).any()
    told = prepare_frame_condition(masks, torch.zeros(shape), shape, patch, CPU)
    assert told is not None
    assert torch.equal(told.frames, masks)
    if pattern == "first":
        assert masks[masks.any(1)].sum(1).eq(patch).all()
    # One patch of frames is a clip that has none to give.
    assert made.frame_mask(torch.zeros(64, 2, patch, 4, 4), 1, tuple(range(64))) is None
