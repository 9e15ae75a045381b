"""Times of flow matching and their shift."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import DiffusionConfig
from stdit.diffusion.timesteps import sample_times, shift_for, shift_times

GRID = torch.linspace(0, 1, 1001)[:-1]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 12))
def test_a_shift_keeps_both_ends_and_the_order(r: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shift_times(t, r)
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(1, abs=1e-12)
    assert (moved.diff() > 0).all()
    assert torch.allclose(shift_times(moved, 1 / r), t)


def test_shift_one_changes_nothing() -> None:
    assert torch.equal(shift_times(GRID, 1.0), GRID)


def test_the_shift_grows_with_the_square_root_of_area_and_of_frames() -> None:
    config = DiffusionConfig(flow_shift=2.0, shift_base=(1, 16, 16))
    assert shift_for(config, (1, 16, 16)) == 2.0
    assert shift_for(config, (1, 32, 32)) == pytest.approx(4.0)
    assert shift_for(config, (4, 16, 16)) == pytest.approx(4.0)
    assert shift_for(config, (9, 32, 8)) == pytest.approx(6.0)
    assert shift_for(config, (1, 8, 8)) == pytest.approx(1.0)


def test_without_a_base_every_latent_has_the_same_shift() -> None:
    assert shift_for(DiffusionConfig(flow_shift=3.0), (17, 60, 104)) == 3.0


def test_the_shift_is_that_of_open_sora() -> None:
    # r = sqrt(H W / 512^2) sqrt(latent frames), in pixels; an autoencoder of 8 makes 512 pixels 64.
    config = DiffusionConfig(shift_base=(1, 64, 64))
    assert shift_for(config, (15, 90, 160)) == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(15))


def test_logit_normal_times_have_a_logistic_of_a_normal_distribution() -> None:
    config = DiffusionConfig(logit_mean=0.5, logit_std=0.8)
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logit = torch.logit(sample_times(config, u, (1, 8, 8)))
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_times_rise_with_u_and_stay_between_data_and_noise(sampling: str) -> None:
    config = DiffusionConfig.model_validate({"time_sampling": sampling, "flow_shift": 3.0})
    t = sample_times(config, torch.cat([GRID, torch.tensor([1 - 2**-24])]), (1, 8, 8))
    assert t.isfinite().all()
    assert (t.diff() >= 0).all()
    assert t.min() >= 0
    assert t.max() <= 1


def test_training_times_are_shifted_as_sampling_is() -> None:
    shifting = DiffusionConfig(flow_shift=1.5, shift_base=(1, 16, 16))
    latent = (4, 32, 32)
    plain = sample_times(DiffusionConfig(), GRID, latent)
    assert torch.allclose(sample_times(shifting, GRID, latent), shift_times(plain, 6.0))
