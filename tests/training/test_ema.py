from __future__ import annotations

import pytest
import torch

from stdit.config import EMAConfig, EMAProfilesConfig
from stdit.training.ema import EMA, decay_at, power_function_exponent


def test_the_average_follows_its_formula() -> None:
    master = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ema = EMA(lambda: [master], EMAConfig(decay=0.5))
    expected = master.clone()
    for step in range(1, 8):
        master += 1
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * master
    torch.testing.assert_close(ema.average[0], expected)


def test_fewer_updates_forget_as_fast() -> None:
    # Late enough for the decay to be the set one.
    assert decay_at(EMAConfig(decay=0.9, every=3), 10_000) == pytest.approx(0.9**3)
    master = torch.ones(2)
    ema = EMA(lambda: [master], EMAConfig(decay=0.9, every=3))
    master += 1
    ema.update(10_000)
    assert torch.equal(ema.average[0], torch.ones(2))
    ema.update(10_002)
    torch.testing.assert_close(ema.average[0], torch.full((2,), 2 - 0.9**3))


def test_an_exchange_is_undone_to_the_last_bit_even_by_an_error() -> None:
    master = torch.randn(100, generator=torch.Generator().manual_seed(1))
    ema = EMA(lambda: [master], EMAConfig())
    average = torch.randn(100)
    ema.average[0].copy_(average)
    before, published = master.clone(), []
    with pytest.raises(KeyError), ema.swapped(lambda: published.append(master.clone())):
        assert torch.equal(master, average)
        raise KeyError
    assert torch.equal(master, before)
    assert torch.equal(ema.average[0], average)
    assert [torch.equal(p, e) for p, e in zip(published, (average, before), strict=True)] == [True, True]


@pytest.mark.parametrize("every", [1, 3])
def test_profiles_are_the_sum_of_all_weights_by_the_integral_of_their_power(every: int) -> None:
    widths = (0.05, 0.1, 0.2)
    master = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ema = EMA(lambda: [master], EMAConfig(every=every, profiles=EMAProfilesConfig(sigma_rel=widths, every=every)))
    history = []
    for step in range(1, 31):
        master += torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        history.append(master.clone())
        ema.update(step)
    for width in widths:
        power = power_function_exponent(width) + 1
        ends = range(every, 31, every)
        shares = [(end / 30) ** power - ((end - every) / 30) ** power for end in ends]
        assert sum(shares) == pytest.approx(1)
        expected = sum(share * history[end - 1] for share, end in zip(shares, ends, strict=True))
        torch.testing.assert_close(ema.profiles[width][0], expected)
        # Mean and variance of time / 30 under (gamma + 1) time^gamma.
        mean, square = power / (power + 1), power / (power + 2)
        assert (square - mean**2) ** 0.5 == pytest.approx(width)
    assert len(ema.averages()) == 4
