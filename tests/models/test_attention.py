"""Attention by any back end gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from stdit.models.attention import MASKED, Attention, AttentionProcessor, CrossAttention, plain_attention
from stdit.models.stdit import STDiT

Noise = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def active_backend() -> Iterator[None]:
    """diffusers keeps the last back end that was set for every model in the process: put it back."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_equal_the_fused_kernel(noise: Noise, masked: bool) -> None:
    q, k, v = noise(2, 5, 3, 8), noise(2, 7, 3, 8, seed=1), noise(2, 7, 3, 8, seed=2)
    mask = (torch.arange(7) < torch.tensor([[3], [7]]))[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(plain_attention(q, k, v, mask), expected)
    torch.testing.assert_close(AttentionProcessor()(q, k, v, mask), expected)


def test_long_sequences_and_short_ones_agree(noise: Noise) -> None:
    attention = Attention(16, 2)
    x = noise(1, 150, 16)
    long = attention(x)
    q, k, v = attention.qkv(x).view(1, 150, 3, 2, 8).unbind(2)
    torch.testing.assert_close(long, attention.proj(plain_attention(q, k, v, None).flatten(2)))


def test_rows_of_qkv_are_queries_then_keys_then_values(noise: Noise) -> None:
    attention = Attention(8, 2)
    x = noise(1, 4, 8)
    q, k, v = (
        F.linear(x, w, b).view(1, 4, 2, 4)
        for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    )
    torch.testing.assert_close(attention(x), attention.proj(plain_attention(q, k, v, None).flatten(2)))


def test_one_text_serves_the_whole_batch(noise: Noise) -> None:
    cross = CrossAttention(16, 2)
    x, text = noise(3, 5, 16), noise(1, 4, 16, seed=1)
    torch.testing.assert_close(cross(x, text), cross(x, text.expand(3, -1, -1)))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_backends_go_by_name(tiny: Callable[..., STDiT], noise: Noise, backend: str) -> None:
    model = tiny(text_dim=6)
    x, text, mask = noise(2, 3, 2, 4, 4), noise(2, 5, 6), torch.arange(5) < torch.tensor([[2], [5]])
    expected = model(x, 3, text, mask).sample
    model.set_attention_backend(backend)
    processors = [m.processor for m in model.modules() if isinstance(m, (Attention, CrossAttention))]
    assert len(processors) == 6
    assert {p._attention_backend for p in processors} == {AttentionBackendName(backend)}
    torch.testing.assert_close(model(x, 3, text, mask).sample, expected)


def test_a_backend_that_is_not_installed_or_not_known_says_so(tiny: Callable[..., STDiT]) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        tiny().set_attention_backend("nonesuch")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, ImportError), match=r"(?i)flash"):
            tiny().set_attention_backend("flash")


def test_kernels_without_masks_leave_masked_attention_to_sdpa(noise: Noise) -> None:
    processor = AttentionProcessor()
    processor._attention_backend = AttentionBackendName._NATIVE_FLASH
    q, mask = noise(2, 4, 2, 8), (torch.arange(4) < torch.tensor([[2], [4]]))[:, None, None]
    torch.testing.assert_close(processor(q, q, q, mask), plain_attention(q, q, q, mask))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "_flash_3", "_native_flash", "_native_cudnn"])
def test_flash_and_sdpa_agree(tiny: Callable[..., STDiT], noise: Noise, backend: str) -> None:
    model = tiny(hidden_size=128, num_heads=2, text_dim=6).to("cuda", torch.bfloat16)
    x, text = noise(2, 3, 2, 16, 16).cuda(), noise(2, 5, 6).cuda()
    mask = torch.arange(5).cuda() < torch.tensor([[2], [5]]).cuda()
    model.set_attention_backend("_native_math")
    expected = model(x, 500, text, mask).sample
    try:
        model.set_attention_backend(backend)
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"{backend}: {error}")
    torch.testing.assert_close(model(x, 500, text, mask).sample, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", sorted(MASKED, key=str))
def test_scores_that_are_added_to_go_to_the_kernel_that_takes_them(
    backend: AttentionBackendName, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of packed sequences take boolean masks alone; relative positions are numbers."""
    asked: list[AttentionBackendName] = []

    def dispatch(query: torch.Tensor, *_: Any, backend: AttentionBackendName, **__: Any) -> torch.Tensor:
        asked.append(backend)
        return query

    monkeypatch.setattr("stdit.models.attention.dispatch_attention_fn", dispatch)
    processor = AttentionProcessor()
    processor._attention_backend = backend
    q = noise(1, 4, 2, 8)
    processor(q, q, q, torch.zeros(1, 2, 4, 4))
    processor(q, q, q, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    assert asked == [AttentionBackendName.NATIVE, backend]
