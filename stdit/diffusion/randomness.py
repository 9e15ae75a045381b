"""Noise and times that are a function of (seed, purpose, step, position) and of nothing else.

One generator per sample: a sample's noise depends neither on how many ranks there are, nor on which
others share its batch. torch's CPU generator keeps 32 bits of its seed, so that two of some 77,000 samples
share their noise by chance: harmless in training, where each also has its own data and time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order, the same on every machine."""
    # A length before each part: ("ab", "c") and ("a", "bc") differ, as do 1 and "1".
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def generators(seed: int, purpose: str, step: int, positions: Sequence[int]) -> list[torch.Generator]:
    """One for each of B `positions`, on the CPU, for what draws by itself."""
    return [torch.Generator().manual_seed(seed_for(seed, purpose, step, int(position))) for position in positions]


def _generators(seed: int, purpose: str, step: int, positions: Sequence[int]):
    generator = torch.Generator()
    for position in positions:
        yield generator.manual_seed(seed_for(seed, purpose, step, int(position)))


def normal(
    each: tuple[int, ...],
    seed: int,
    purpose: str,
    step: int,
    positions: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal float32 of shape (B, *each), one sample for each of B `positions`. Drawn on the CPU, so that
    every device has the same."""
    drawn = [torch.randn(each, generator=g) for g in _generators(seed, purpose, step, positions)]
    return (torch.stack(drawn) if drawn else torch.empty(0, *each)).to(device)


def uniform(seed: int, purpose: str, step: int, positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Uniform float32 in [0, 1) of shape (B,), one for each of B `positions`."""
    drawn = [torch.rand((), generator=g) for g in _generators(seed, purpose, step, positions)]
    return (torch.stack(drawn) if drawn else torch.empty(0)).to(device)
