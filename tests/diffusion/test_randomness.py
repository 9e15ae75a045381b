"""Noise is a function of (seed, purpose, step, position)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.diffusion.randomness import normal, seed_for, uniform


def test_a_seed_depends_on_every_part_and_their_order() -> None:
    parts = [(0, "noise", 1), (1, "noise", 0), ("0", "noise", 1), (0, "nois", "e1"), (0, "noise"), ("noise", 0, 1)]
    seeds = [seed_for(*p) for p in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert seed_for(0, "noise", 1) == 1635307953253320122


def test_a_seed_may_hold_any_text() -> None:
    assert seed_for("eine Sieben läuft 左へ") != seed_for("\ud800")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.data())
def test_noise_does_not_depend_on_the_grouping_of_a_batch(positions: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(positions)))
    whole = normal((2, 3), 7, "noise", 5, positions)
    parts = [normal((2, 3), 7, "noise", 5, p) for p in (positions[:cut], positions[cut:])]
    assert torch.equal(whole, torch.cat(parts))
    times = torch.cat([uniform(7, "time", 5, p) for p in (positions[:cut], positions[cut:])])
    assert torch.equal(uniform(7, "time", 5, positions), times)


def test_purposes_steps_and_seeds_draw_apart() -> None:
    draws = [normal((4,), s, p, k, [0]) for s, p, k in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4


def test_noise_is_standard_normal_and_times_are_uniform() -> None:
    noise = normal((16,), 0, "noise", 0, range(4096))
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    u = uniform(0, "time", 0, range(4096))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean().item() - 0.5) < 0.02


def test_random_state_of_the_process_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    normal((4,), 0, "noise", 0, [0, 1])
    uniform(0, "time", 0, [0, 1])
    assert torch.equal(before, torch.random.get_rng_state())
