from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.training.parallel import Ranks
from stdit.training.preview import FILLER, draw_grid, shares


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 30), size=st.integers(1, 5), batch_size=st.integers(1, 6))
def test_ranks_share_samples_in_order_and_are_equally_busy(count: int, size: int, batch_size: int) -> None:
    parts = [shares(count, Ranks(r, size, r, torch.device("cpu")), batch_size) for r in range(size)]
    # As many forward passes, of the same sizes, on every rank.
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1
    together = [n for batches in zip(*parts, strict=True) for batch in batches for n in batch]
    assert [n for n in together if n != FILLER] == list(range(count))
    # Fillers come last, fewer than there are ranks.
    assert together[count:] == [FILLER] * (len(together) - count)
    assert len(together) - count < size


def test_a_grid_has_a_row_of_frames_for_each_clip() -> None:
    pixels = torch.full((5, 3, 4, 16, 16), -1.0)
    pixels[4, :, 3] = 1.0
    grid = draw_grid(pixels, ["one", "два", "3", "4", "5"])
    # Frames of 64 px and a gap of 2; three clips side by side, two rows.
    assert grid.size == (3 * 4 * 66, 2 * 80)
    # The last frame of the last clip is white, its first is black.
    assert grid.getpixel((4 * 66 + 3 * 66 + 5, 80 + 14 + 5)) == (255, 255, 255)
    assert grid.getpixel((4 * 66 + 5, 80 + 14 + 5)) == (0, 0, 0)
    assert draw_grid(torch.zeros(1, 3, 40, 80, 80), ["x"]).size == (8 * 82, 96)
