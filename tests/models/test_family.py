"""Laws that hold for every member of the family, whatever its config says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import ModelConfig
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, conditions_for

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]


@pytest.fixture(params=MEMBERS.values(), ids=list(MEMBERS))
def member(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def blocks_of(model: STDiT) -> list[Any]:
    return list(model.blocks)


def row(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """Sample i of a batch of conditions."""
    rows = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return {k: row(v, i) if isinstance(v, dict) else v for k, v in rows.items()}


def test_a_new_model_predicts_zero(settings: Callable[..., ModelConfig], noise: Noise, member: dict[str, Any]) -> None:
    config = settings(**member)
    sample = STDiT.from_settings(config)(noise(3, 3, 3, 8, 8), **conditions_for(config, 3, noise)).sample
    assert sample.shape == (3, 6 if config.learned_variance else 3, 3, 8, 8)
    assert not sample.any()


def test_samples_do_not_see_each_other(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    model = tiny(**member)
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)
    together = model(x, **inputs).sample
    for i in range(3):
        torch.testing.assert_close(
            model(x[i : i + 1], **row(inputs, i)).sample, together[i : i + 1], rtol=1e-4, atol=1e-5
        )


def test_padding_does_not_change_the_output(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    if "text_dim" not in member:
        pytest.skip("no text")
    model = tiny(**member)
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)
    other = dict(inputs)
    hidden = ~inputs["encoder_attention_mask"][..., None]
    other["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(hidden, 7.0)
    assert torch.equal(model(x, **inputs).sample, model(x, **other).sample)
    longer = {
        "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], noise(3, 2, 6, seed=9)], 1),
        "encoder_attention_mask": torch.cat([inputs["encoder_attention_mask"], torch.zeros(3, 2, dtype=torch.bool)], 1),
    }
    assert torch.equal(model(x, **inputs).sample, model(x, **{**inputs, **longer}).sample)


def test_conditions_prepared_ahead_are_the_same(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    model = tiny(**member)
    x, inputs = noise(3, 3, 2, 8, 8), conditions_for(model.settings, 3, noise)
    frames = None if member.get("conditioning") == "cross_attention" else torch.eye(3, 2, dtype=torch.bool)
    times = torch.tensor([900.0, 500.0, 20.0])
    inputs.pop("timestep")
    pixels = {k: v for k, v in inputs.items() if k == "added_cond_kwargs"}
    static = encode_static(model, ConditionInputs(**inputs))
    for t, conditions in zip(times, precompute_conditions(model, times, static, frames), strict=True):
        plain = model(x, t, conditioning_frames=frames, **inputs).sample
        torch.testing.assert_close(model(x, t, conditions=conditions, **pixels).sample, plain, rtol=1e-4, atol=1e-5)


def test_conditioning_frames_have_timestep_zero(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    if member.get("conditioning") == "cross_attention":
        pytest.skip("one time for all frames")
    model = tiny(**member)
    x, inputs = noise(2, 3, 3, 8, 8), conditions_for(model.settings, 2, noise)
    plain = model(x, **inputs).sample
    none, some, all_ = (torch.tensor([mask, mask], dtype=torch.bool) for mask in ([0, 0, 0], [1, 0, 0], [1, 1, 1]))
    torch.testing.assert_close(model(x, conditioning_frames=none, **inputs).sample, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, conditioning_frames=some, **inputs).sample, plain, atol=1e-4)
    if member.get("conditioning") != "joint":  # there the text keeps the time of what is drawn
        at_zero = model(x, **{**inputs, "timestep": torch.zeros(2)}).sample
        torch.testing.assert_close(model(x, conditioning_frames=all_, **inputs).sample, at_zero, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    model = tiny(**member)
    x, inputs = noise(2, 3, 2, 8, 8), conditions_for(model.settings, 2, noise)
    again = copy.deepcopy(model)
    again.enable_gradient_checkpointing()
    for m in (model, again):
        m.train()
        m(x, **inputs).sample.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None, name
        assert torch.equal(p.grad, torch.as_tensor(q.grad)), name


def test_a_saved_model_comes_back(tiny: Tiny, noise: Noise, member: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**member)
    model.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path).eval()
    assert again.settings == model.settings
    x, inputs = noise(1, 3, 2, 8, 8), conditions_for(model.settings, 1, noise)
    assert torch.equal(again(x, **inputs).sample, model(x, **inputs).sample)


def test_windows_do_not_see_each_other(tiny: Tiny, noise: Noise) -> None:
    model = tiny(depth=1, temporal=False, window_size=2, relative_positions=True)
    x = noise(1, 3, 1, 8, 8)
    y = x.clone()
    y[..., 0, 0] += 1.0
    changed = (model(x, 300).sample - model(y, 300).sample).abs().amax((0, 1, 2)) > 1e-6
    assert changed[:4, :4].all()  # two patches of two a side
    assert not changed[4:].any()
    assert not changed[:, 4:].any()


def test_relative_positions_at_zero_change_nothing(tiny: Tiny, noise: Noise) -> None:
    model, plain = (tiny(window_size=2, relative_positions=relative) for relative in (True, False))
    with torch.no_grad():
        for block in blocks_of(model):
            block.attn.rel_pos_h.zero_()
            block.attn.rel_pos_w.zero_()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "rel_pos" not in k})
    x = noise(2, 3, 2, 8, 8)
    torch.testing.assert_close(model(x, 300).sample, plain(x, 300).sample)


def test_relative_positions_are_vitdets(tiny: Tiny, noise: Noise) -> None:
    """Scores gain q · rel_pos_h[row - key row] and the same by columns, of queries that are not scaled."""
    attn = blocks_of(tiny(depth=1, temporal=False, window_size=3, relative_positions=True))[0].attn
    q = noise(2, 9, 4, 8)
    found = attn._relative_bias(q, attn.rel_pos_h, attn.rel_pos_w)
    for i in range(9):
        for j in range(9):
            code = attn.rel_pos_h[i // 3 - j // 3 + 2] + attn.rel_pos_w[i % 3 - j % 3 + 2]
            torch.testing.assert_close(found[:, :, i, j], q[:, i] @ code)


def test_pooled_keys_are_pixart_sigmas(tiny: Tiny, noise: Noise) -> None:
    attn = blocks_of(tiny(depth=1, temporal=False, kv_compress=2, qk_norm="layer"))[0].attn
    x = noise(2, 24, 32)
    q, k, v = attn.qkv(x).chunk(3, -1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    k, v = (attn.norm(attn.sr(y.transpose(1, 2).reshape(2, 32, 4, 6)).flatten(2).transpose(1, 2)) for y in (k, v))
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(x, plane=(4, 6)), attn.proj(expected))
    assert k.shape[2] == 6


def test_a_new_models_pooled_keys_are_means(settings: Callable[..., ModelConfig]) -> None:
    model = STDiT.from_settings(settings(temporal=False, kv_compress=2))
    sr = blocks_of(model)[0].attn.sr
    assert torch.equal(sr.weight, torch.full_like(sr.weight, 0.25))


def test_repeated_frames_pass_a_convolution_over_time_as_one(tiny: Tiny, noise: Noise) -> None:
    mlp = blocks_of(tiny(mlp="conv3d"))[0].mlp
    x = noise(2, 1, 12, 32)
    torch.testing.assert_close(mlp(x.expand(-1, 4, -1, -1), (4, 3, 4)), mlp(x, (1, 3, 4)).expand(-1, 4, -1, -1))


def test_a_convolution_in_the_mlp_reaches_its_neighbours(tiny: Tiny, noise: Noise) -> None:
    mlp = blocks_of(tiny(mlp="conv2d"))[0].mlp
    x = noise(1, 2, 25, 32)
    y = x.clone()
    y[0, 1, 12] += 1.0  # the centre of frame 1
    changed = ((mlp(x, (2, 5, 5)) - mlp(y, (2, 5, 5))).abs().amax(-1) > 1e-6).view(2, 5, 5)
    assert changed[1, 1:4, 1:4].all()
    assert changed.sum() == 9


def test_swiglu_weighs_what_the_mlp_does(settings: Callable[..., ModelConfig]) -> None:
    gelu, swiglu = (
        sum(p.numel() for p in STDiT.from_settings(settings(hidden_size=384, num_heads=6, mlp=mlp)).parameters())
        for mlp in ("gelu", "swiglu")
    )
    assert abs(swiglu - gelu) < 0.01 * gelu


def test_drop_path_drops_whole_branches_of_samples(tiny: Tiny, noise: Noise) -> None:
    model = tiny(depth=4, drop_path=0.9).train()
    x = noise(1, 3, 1, 8, 8).expand(64, -1, -1, -1, -1)
    draws = [model(x, 300.0, generator=torch.Generator().manual_seed(seed)).sample for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].flatten(1).unique(dim=0)) > 8
    model.eval()
    assert len(model(x, 300.0).sample.flatten(1).unique(dim=0)) == 1


def test_drop_path_keeps_the_mean_of_a_branch(tiny: Tiny, noise: Noise) -> None:
    model = tiny(depth=3, drop_path=0.5).train()
    kept = model.drop_path_factors(noise(4000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert kept is not None
    assert torch.equal(kept[0], torch.ones_like(kept[0]))  # the first block's branches always stay
    torch.testing.assert_close(kept.mean((1, 2, 3, 4, 5)), torch.ones(3), atol=0.05, rtol=0)
    assert kept[2].unique().tolist() == [0.0, 2.0]


def test_a_null_sequence_stands_under_its_captions_mask(tiny: Tiny, noise: Noise) -> None:
    """As PixArt and Open-Sora drop captions: y_embedding in the caption's place, seen as far as the caption was."""
    model = tiny(text_dim=6, null_text="sequence")
    x, text = noise(2, 3, 1, 8, 8), noise(2, 5, 6, seed=1)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    dropped = model(x, 300, text, mask, drop_condition=torch.tensor([True, True])).sample
    assert model.y_embedder is not None
    assert model.y_embedder.y_embedding is not None
    null = model.y_embedder.y_embedding[:5].expand(2, -1, -1)
    assert torch.equal(dropped, model(x, 300, null, mask).sample)


def test_a_dropped_pooled_vector_is_zero(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6, pooled_dim=5)
    x, text, pooled = noise(2, 3, 1, 8, 8), noise(2, 5, 6, seed=1), noise(2, 5, seed=2)
    drop = torch.tensor([True, True])
    found = model(x, 300, text, drop_condition=drop, pooled_projections=pooled).sample
    torch.testing.assert_close(found, model(x, 300, text, drop_condition=drop).sample)


def test_no_class_adds_nothing_without_a_null_row(tiny: Tiny, noise: Noise) -> None:
    model = tiny(num_classes=3, null_class=False)
    x = noise(2, 3, 1, 8, 8)
    assert model.y_embedder is not None
    assert model.y_embedder.embedding_table is not None
    assert len(model.y_embedder.embedding_table.weight) == 3
    alone = model(x, 300, class_labels=torch.tensor([-1, -1])).sample
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()
    assert torch.equal(alone, model(x, 300, class_labels=torch.tensor([0, 2])).sample)
