from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import ModelConfig, OptimizerConfig
from stdit.models.stdit import STDiT
from stdit.training.optimizer import last_stable_step, learning_rate, parameter_groups


@settings(deadline=None, max_examples=40)
@given(
    warmup=st.integers(0, 20),
    steps=st.integers(1, 60),
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    final=st.floats(0, 1),
)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(warmup: int, steps: int, schedule: str, final: float) -> None:
    config = OptimizerConfig.model_validate(
        {"learning_rate": 2.0, "warmup_steps": warmup, "lr_schedule": schedule, "min_lr_ratio": final}
    )
    rates = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    rising, falling = rates[: max(0, warmup - 1)], rates[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= 2.0 for rate in rates)
    if steps > warmup and schedule != "constant":
        assert rates[-1] == pytest.approx(2.0 * final)
    if 1 <= warmup <= steps:
        assert rates[warmup - 1] == pytest.approx(2.0)
        assert rates[0] == pytest.approx(2.0 / warmup)


@settings(deadline=None, max_examples=40)
@given(warmup=st.integers(0, 20), steps=st.integers(1, 60), longer=st.integers(1, 60), share=st.floats(0, 1))
def test_the_stable_phase_does_not_depend_on_where_the_run_ends(
    warmup: int, steps: int, longer: int, share: float
) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup, lr_schedule="wsd", decay_share=share)
    stable = min(last_stable_step(config, steps), last_stable_step(config, steps + longer))
    for step in range(1, stable + 1):
        assert learning_rate(config, step, steps) == learning_rate(config, step, steps + longer)
        assert learning_rate(config, step, steps) == 2.0 * min(1.0, step / warmup if warmup else 1.0)


def test_wsd_decays_by_one_minus_the_square_root() -> None:
    config = OptimizerConfig(learning_rate=2.0, lr_schedule="wsd", decay_share=0.4, min_lr_ratio=0.5)
    rates = [learning_rate(config, step, 10) for step in range(1, 11)]
    assert rates == pytest.approx([2.0] * 6 + [2 * (0.5 + 0.5 * (1 - (k / 4) ** 0.5)) for k in (1, 2, 3, 4)])
    forever = OptimizerConfig(learning_rate=2.0, lr_schedule="wsd", decay_share=0.0)
    assert [learning_rate(forever, step, 10) for step in range(1, 11)] == [2.0] * 10


def test_the_rate_is_a_function_of_the_step_alone() -> None:
    config = OptimizerConfig(lr_schedule="cosine", warmup_steps=3)
    assert [learning_rate(config, s, 9) for s in (9, 2, 5)] == [learning_rate(config, s, 9) for s in (9, 2, 5)]


def test_weight_decay_pulls_on_matrices_alone() -> None:
    model = STDiT.from_settings(ModelConfig(hidden_size=32, depth=1, num_heads=2, num_classes=3, text_dim=8))
    decayed, spared = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    assert {id(p) for group in (decayed, spared) for p in group["params"]} == set(names)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    spared_names = [names[id(p)] for p in spared["params"]]
    assert any("scale_shift_table" in n for n in spared_names)
    assert any("embedding_table" in n for n in spared_names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_without_weight_decay_there_is_one_group() -> None:
    model = STDiT.from_settings(ModelConfig(hidden_size=32, depth=1, num_heads=2))
    (group,) = parameter_groups(model, OptimizerConfig())
    assert len(group["params"]) == len(list(model.parameters()))
