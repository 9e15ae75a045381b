"""Given frames: the patterns, their shares, and a loss that does not look at them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stdit.config import DiffusionConfig, FrameConditioningConfig
from stdit.diffusion.frame_conditioning import PATTERNS, sample_frame_mask
from stdit.diffusion.objectives import make_objective
from stdit.diffusion.randomness import normal, uniform

MANY = 4000


def masks(frames: int = 5, /, **shares: float) -> Tensor | None:
    which, length = (uniform(0, purpose, 0, range(MANY)) for purpose in ("which", "length"))
    return sample_frame_mask(
        FrameConditioningConfig(**shares), which, length, normal((frames,), 0, "order", 0, range(MANY))
    )


def found(frames: int = 5, /, **shares: float) -> set[tuple[int, ...]]:
    mask = masks(frames, **shares)
    assert mask is not None
    return {tuple(row) for row in mask.int().tolist()}


def test_each_pattern_gives_its_frames() -> None:
    assert found(first=1.0) == {(1, 0, 0, 0, 0)}
    assert found(ends=1.0) == {(1, 0, 0, 0, 1)}
    assert found(2, ends=1.0) == {(1, 0)}
    assert found(head=1.0) == {tuple([1] * k + [0] * (5 - k)) for k in range(1, 5)}
    assert found(tail=1.0) == {tuple([0] * (5 - k) + [1] * k) for k in range(1, 5)}
    assert found(random=1.0) == {tuple(int(d) for d in f"{n:05b}") for n in range(1, 31)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_has_its_share_and_always_leaves_a_frame_to_draw(pattern: str) -> None:
    mask = masks(**{pattern: 0.25})
    assert mask is not None
    assert abs(float(mask.any(1).float().mean()) - 0.25) < 0.03
    assert not mask.all(1).any()


def test_images_and_configs_without_shares_give_nothing() -> None:
    assert masks(1, first=1.0) is None
    assert masks() is None


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"sum to 1\.2, which is more than 1"):
        FrameConditioningConfig(first=0.6, head=0.6)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_conditioning_frames_keep_their_data_and_are_out_of_the_loss(objective: str, learned: bool) -> None:
    if objective == "flow" and learned:
        pytest.skip("flow matching has no variance to learn")
    made = make_objective(DiffusionConfig(objective=objective), learned)  # type: ignore[arg-type]
    x0, noise = normal((2, 3, 4, 4), 0, "data", 0, range(2)), normal((2, 3, 4, 4), 0, "noise", 0, range(2))
    t, given = torch.tensor([0.5, 0.9]), torch.tensor([[True, False, False], [False, False, True]])
    seen: list[Tensor] = []

    def predict(x: Tensor, s: Tensor, off: float = 0.0) -> Tensor:
        seen.append(x)
        wrong = torch.where(given[:, None, :, None, None], x + off, 0.3 * x)
        return torch.cat([wrong, 0.1 * wrong], dim=1) if learned else wrong

    loss = made.loss(predict, x0, noise, t, given)
    assert torch.equal(loss, made.loss(lambda x, s: predict(x, s, 5.0), x0, noise, t, given))
    assert torch.equal(seen[0][0, :, 0], x0[0, :, 0])
    assert torch.equal(seen[0][1, :, 2], x0[1, :, 2])
    assert not torch.equal(seen[0][0, :, 1], x0[0, :, 1])


def test_the_loss_is_the_mean_over_the_frames_that_are_drawn() -> None:
    flow = make_objective(DiffusionConfig(), False)
    x0, noise = normal((2, 3, 4, 4), 0, "data", 0, range(2)), normal((2, 3, 4, 4), 0, "noise", 0, range(2))
    t, given = torch.tensor([0.5, 0.9]), torch.tensor([[True, False, False]] * 2)
    rest = flow.loss(lambda x, s: 0.3 * x, x0[:, :, 1:], noise[:, :, 1:], t)
    torch.testing.assert_close(flow.loss(lambda x, s: 0.3 * x, x0, noise, t, given), rest)
