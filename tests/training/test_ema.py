from __future__ import annotations

import pytest
import torch

from stdit.config import EMAConfig
from stdit.training.ema import EMA, decay_at


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
