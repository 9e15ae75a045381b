"""Labels, captions and their nulls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stdit.models.embeddings import trim_padding
from stdit.models.stdit import STDiT

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]


@pytest.fixture
def x(noise: Noise) -> torch.Tensor:
    return noise(2, 3, 2, 4, 4)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_padding_tokens_do_not_change_the_output(
    tiny: Tiny, noise: Noise, x: torch.Tensor, pooled: bool, attention: str
) -> None:
    model = tiny(text_dim=6, pooled_text=pooled, attention=attention)
    text, mask = noise(2, 7, 6), torch.arange(7) < torch.tensor([[2], [5]])
    padded = model(x, 400, text, mask).sample
    other = torch.where(mask[..., None], text, 1e3)
    torch.testing.assert_close(model(x, 400, other, mask).sample, padded)
    torch.testing.assert_close(model(x, 400, text[:, :5], mask[:, :5]).sample, padded)
    for i, length in enumerate((2, 5)):
        alone = model(x[i : i + 1], 400, text[i : i + 1, :length]).sample
        torch.testing.assert_close(alone, padded[i : i + 1], rtol=1e-4, atol=1e-5)


def test_only_columns_that_no_caption_reaches_are_cut_off(noise: Noise) -> None:
    text = noise(2, 5, 6)
    for seen, length in (
        ([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], 2),
        ([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]], 4),  # padding on the left, and within
        ([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], 5),
        ([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], 1),
    ):
        for mask in (torch.tensor(seen), torch.tensor(seen).bool()):
            cut, left = trim_padding(text, mask)
            assert torch.equal(cut, text[:, :length])
            assert torch.equal(left, mask[:, :length])


def test_a_mask_of_ones_is_no_mask(tiny: Tiny, noise: Noise, x: torch.Tensor) -> None:
    model, text = tiny(text_dim=6), noise(2, 4, 6)
    assert torch.equal(model(x, 400, text, torch.ones(2, 4, dtype=torch.int64)).sample, model(x, 400, text).sample)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_null_caption_is_one_token_whatever_it_stands_for(
    tiny: Tiny, noise: Noise, x: torch.Tensor, pooled: bool
) -> None:
    model = tiny(text_dim=6, pooled_text=pooled)
    null = model(x, 400).sample
    drop = torch.tensor([True, True])
    for length in (1, 3, 7):
        torch.testing.assert_close(model(x, 400, noise(2, length, 6), drop_condition=drop).sample, null)
    mixed = model(x, 400, noise(2, 3, 6), drop_condition=torch.tensor([True, False])).sample
    torch.testing.assert_close(mixed[0], null[0])
    assert not torch.allclose(mixed[1], null[1])


def test_a_caption_without_tokens_is_null(tiny: Tiny, noise: Noise, x: torch.Tensor) -> None:
    model = tiny(text_dim=6, pooled_text=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    sample = model(x, 400, noise(2, 3, 6), mask).sample
    torch.testing.assert_close(sample[0], model(x, 400).sample[0])
    assert sample.isfinite().all()


def test_dropped_negative_and_absent_labels_are_null(tiny: Tiny, x: torch.Tensor) -> None:
    model = tiny(num_classes=4)
    null = model(x, 400).sample
    torch.testing.assert_close(model(x, 400, class_labels=torch.tensor([-1, -1])).sample, null)
    dropped = model(x, 400, class_labels=torch.tensor([3, 1]), drop_condition=torch.tensor([True, False])).sample
    torch.testing.assert_close(dropped[0], null[0])
    assert not torch.allclose(dropped[1], null[1])


def test_labels_and_captions_join(tiny: Tiny, noise: Noise, x: torch.Tensor) -> None:
    model, text, labels = tiny(num_classes=4, text_dim=6), noise(2, 3, 6), torch.tensor([0, 3])
    both = model(x, 400, text, class_labels=labels).sample
    assert not torch.allclose(both, model(x, 400, text).sample)
    assert not torch.allclose(both, model(x, 400, class_labels=labels).sample)
    dropped = model(x, 400, text, class_labels=labels, drop_condition=torch.tensor([True, True])).sample
    torch.testing.assert_close(dropped, model(x, 400).sample)


def test_new_conditions_start_at_zero(settings: Callable, noise: Noise, x: torch.Tensor) -> None:
    model = STDiT.from_settings(settings(text_dim=6, pooled_text=True, micro_conditions=("fps", "height")))
    assert not model.get_parameter("y_embedder.pooled_proj.2.weight").any()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    for block in model.block_list():
        torch.nn.init.ones_(block.scale_shift_table)
    expected = model(x, 400, added_cond_kwargs={"fps": torch.zeros(1), "height": torch.zeros(1)}).sample
    added = {"fps": torch.tensor([8.0, 24.0]), "height": torch.tensor([32.0])}
    sample = model(x, 400, noise(2, 3, 6), added_cond_kwargs=added).sample
    torch.testing.assert_close(sample, expected)


@pytest.mark.parametrize("name", ["fps", "height", "width"])
def test_a_micro_condition_counts_only_where_it_is_configured(tiny: Tiny, x: torch.Tensor, name: str) -> None:
    with_it, without = tiny(micro_conditions=(name,)), tiny()
    slow, fast = {name: torch.tensor([8.0, 8.0])}, {name: torch.tensor([8.0, 24.0])}
    one, other = (with_it(x, 400, added_cond_kwargs=added).sample for added in (slow, fast))
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1])
    assert torch.equal(without(x, 400, added_cond_kwargs=slow).sample, without(x, 400, added_cond_kwargs=fast).sample)


def test_gradients_reach_every_parameter(tiny: Tiny, noise: Noise, x: torch.Tensor) -> None:
    model = tiny(
        num_classes=4, text_dim=6, pooled_text=True, micro_conditions=("fps",), qk_norm="rms", cross_qk_norm="rms"
    )
    drop = torch.tensor([True, False])
    added = {"fps": torch.tensor([8.0])}
    sample = model(x, 400, noise(2, 3, 6), None, torch.tensor([1, 2]), drop, added).sample
    sample.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
