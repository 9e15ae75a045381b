"""Dynamic compute: what runs in part gives what its mask gives, and costs less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import DiffusionConfig, ModelConfig
from stdit.diffusion.objectives import make_objective
from stdit.models.conditioning import ConditionInputs, Conditions, encode_static, precompute_conditions
from stdit.models.control import STDiTControl
from stdit.models.dynamic import Router, exit_depths, uniform
from stdit.models.pruning import prune
from stdit.models.stdit import STDiT
from stdit.weights.transfer import transfer_weights

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]
Settings = Callable[..., ModelConfig]

BOTH: dict[str, Any] = {"dynamic_width": True, "dynamic_tokens": True}
TIMES = torch.tensor([910.0, 480.0, 120.0])
KINDS = [
    {"conditioning": "adaln_single", "text_dim": 6},
    {"conditioning": "adaln_single", "attention": "alternating", "text_dim": 6, "cross_qk_norm": "layer"},
    {"conditioning": "adaln_single", "window_size": 2, "relative_positions": True, "positions": "learned", "position_grid": (4, 4), "position_frames": 2},
    {"conditioning": "adaln_zero", "num_classes": 4, "qk_norm": "rms"},
    {"conditioning": "adaln_zero", "attention": "full", "positions": "rope", "mlp": "swiglu", "mlp_ratio": 6.0},
    {"conditioning": "adaln", "temporal": False},
    {"conditioning": "in_context", "attention": "full", "text_dim": 6},
    {"conditioning": "cross_attention", "text_dim": 6, "mlp": "swiglu", "mlp_ratio": 6.0},
]  # fmt: skip


def routed(model: STDiT, seed: int = 0) -> STDiT:
    """`model` with routers that choose: about half of everything, differently at each time."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router):
            for router in module.modules():
                if isinstance(router, torch.nn.Linear):
                    router.weight.data = torch.randn(router.weight.shape, generator=generator)
                    router.bias.data = 0.3 * torch.randn(router.bias.shape, generator=generator)
    return model


def condition_inputs(model: STDiT, noise: Noise, batch: int = 3) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if model.settings.text_dim:
        inputs["encoder_hidden_states"] = noise(batch, 5, 6, seed=1)
        inputs["encoder_attention_mask"] = torch.arange(5) < torch.tensor([[5], [2], [3]])
    if model.settings.num_classes:
        inputs["class_labels"] = torch.tensor([0, 3, -1])
    return inputs


def precomputed(
    model: STDiT, times: torch.Tensor, frames: torch.Tensor | None = None, **inputs: Any
) -> list[Conditions]:
    return precompute_conditions(model, times, encode_static(model, ConditionInputs(**inputs)), frames)


def part(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------- off, and at the start


def test_a_static_model_has_nothing_of_it(settings: Settings) -> None:
    plain = STDiT.from_settings(settings()).state_dict()
    assert not [name for name in plain if "dynamic" in name]
    assert STDiT.from_settings(settings(exit_depths=[(0.5, 1)])).state_dict().keys() == plain.keys()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@torch.no_grad()
def test_a_new_dynamic_model_is_the_static_one(tiny: Tiny, settings: Settings, noise: Noise, kind: dict) -> None:
    static = tiny(**kind)
    model = STDiT.from_settings(settings(**kind, **BOTH)).eval()
    missing, unexpected = model.load_state_dict(static.state_dict(), strict=False)
    assert {name.split(".")[2] for name in missing} == {"dynamic"}
    assert not unexpected
    x, inputs = noise(3, 3, 2, 4, 4), condition_inputs(static, noise)
    for t in (TIMES, 300.0):
        torch.testing.assert_close(model(x, t, **inputs).sample, static(x, t, **inputs).sample, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- less is computed


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@torch.no_grad()
def test_pruning_and_gathering_equals_masking(
    tiny: Tiny, noise: Noise, kind: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed(tiny(**kind, **BOTH))
    x, inputs = noise(3, 3, 2, 4, 4), condition_inputs(model, noise)
    prepared = precomputed(model, TIMES, **inputs)
    for i, t in enumerate(TIMES):
        # One time for all: cut and gathered; through a prepared step; a batch of mixed times; everything masked.
        shared = model(x, t, **inputs).sample
        ahead = model(x, t, conditions=prepared[i]).sample
        mixed = model(x, TIMES, **inputs).sample[i]
        with monkeypatch.context() as patched:
            patched.setattr("torch.compiler.is_compiling", lambda: True)
            masked = model(x, t, **inputs).sample
        torch.testing.assert_close(shared, masked, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ahead, masked, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed, masked[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_conditioning_frames_do_not_change_what_the_timestep_selects(tiny: Tiny, noise: Noise) -> None:
    model = routed(tiny(**BOTH))
    x, frames = noise(2, 3, 3, 4, 4), torch.tensor([[True, False, False], [False, False, True]])
    out = model(x, 700.0, conditioning_frames=frames).sample
    ahead = model(x, 700.0, conditions=precomputed(model, torch.tensor([700.0]), frames)[0]).sample
    torch.testing.assert_close(ahead, out, rtol=1e-4, atol=1e-5)
    for i in range(2):
        one = model(x[i : i + 1], 700.0, conditioning_frames=frames[i : i + 1]).sample
        torch.testing.assert_close(one[0], out[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("attention", ["factorized", "alternating", "full"])
@torch.no_grad()
def test_what_is_left_out_is_not_computed(tiny: Tiny, noise: Noise, attention: str, mlp: str) -> None:
    kind = {"attention": attention, "mlp": mlp, "mlp_ratio": 6.0}
    model, x = routed(tiny(**kind, dynamic_width=True)), noise(2, 3, 2, 4, 4)
    static = tiny(**kind)
    time = model.t_embedder(torch.tensor([300.0]), torch.float32)
    left_out = 0.0
    routers = 0
    for block in model.block_list():
        tokens = torch.empty(2, 2, 4, 32)
        mask = block.dynamic.route(time, None, None)
        stats = block.compute_stats(mask, None, tokens)
        left_out += float((sum(block.costs(tokens)) - stats.compute).sum())
        routers += 2 * sum(p.numel() for n, p in block.dynamic.named_parameters() if n.endswith("weight"))
    saved = flops(lambda: static(x, 300.0)) - flops(lambda: model(x, 300.0))
    assert left_out > 0
    assert saved == 2 * left_out - routers


@torch.no_grad()
def test_skipped_tokens_cost_nothing_and_stay_as_they_are(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(dynamic_tokens=True, depth=1), noise(2, 3, 1, 4, 4)
    static = tiny(depth=1)
    full = flops(lambda: static(x, 300.0))
    for module in model.modules():
        if isinstance(module, Router) and module.tokens is not None:
            module.tokens.get_parameter("2.bias").data.fill_(-50.0)
    routers = 2 * 8 * (32 * 2 + 2)
    mlp = 2 * 8 * 2 * 32 * 128
    assert full - flops(lambda: model(x, 300.0)) == mlp - routers
    assert model(x, 300.0).sample.isfinite().all()


@torch.no_grad()
def test_the_first_head_and_group_always_run(tiny: Tiny, noise: Noise) -> None:
    model = tiny(dynamic_width=True)
    for module in model.modules():
        if isinstance(module, Router):
            for router in (module.heads, module.heads_temp, module.groups):
                assert router is not None
                router.bias.data.fill_(-50.0)
    assert model(noise(1, 3, 2, 4, 4), 300.0).sample.isfinite().all()
    used = model.train()(noise(1, 3, 2, 4, 4), 300.0).compute_stats
    torch.testing.assert_close(used.compute, torch.full((1,), 1 / 4))


@torch.no_grad()
def test_equal_masks_share_their_pruned_weights(tiny: Tiny) -> None:
    model = routed(tiny(dynamic_width=True))
    first, second, other = (c.caches for c in precomputed(model, torch.tensor([300.0, 300.0, 900.0])))
    assert first is not None
    assert second is not None
    assert other is not None
    assert all(a.pruned is b.pruned and a.pruned is not None for a, b in zip(first, second, strict=True))
    assert any(a.pruned is not b.pruned for a, b in zip(first, other, strict=True))


@torch.no_grad()
def test_past_the_limit_weights_are_pruned_when_they_are_needed(
    tiny: Tiny, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = routed(tiny(dynamic_width=True)), noise(1, 3, 1, 4, 4)
    expected = model(x, 300.0, conditions=precomputed(model, TIMES[:1] * 0 + 300.0)[0]).sample
    monkeypatch.setattr("stdit.models.pruning._cache_limit", lambda blocks: 0)
    conditions = precomputed(model, torch.tensor([300.0]))[0]
    assert conditions.caches is not None
    assert all(cache.pruned is None for cache in conditions.caches)
    assert torch.equal(model(x, 300.0, conditions=conditions).sample, expected)


@torch.no_grad()
def test_a_layer_that_is_more_than_its_weight_is_called(tiny: Tiny, noise: Noise) -> None:
    model, x = routed(tiny(dynamic_width=True)), noise(1, 3, 1, 4, 4)
    expected = model(x, 300.0).sample
    calls = []
    for block in model.block_list():
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        assert prune(block.prunable, block.dynamic.route(torch.zeros(1, 32), None, None)) is None
    torch.testing.assert_close(model(x, 300.0).sample, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ training


def test_training_draws_from_its_generators_alone(tiny: Tiny, noise: Noise) -> None:
    model, x = routed(tiny(**BOTH, drop_path=0.5)).train(), noise(3, 3, 1, 4, 4)

    def each(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    state = torch.get_rng_state()
    first, second, other = (model(x, TIMES, generator=each(*s)) for s in ((0, 1, 2), (0, 1, 2), (5, 1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.sample, second.sample)
    assert not torch.equal(first.sample[0], other.sample[0])
    torch.testing.assert_close(first.sample[1:], other.sample[1:])
    alone = model(x[2:], TIMES[2:], generator=each(2))
    torch.testing.assert_close(alone.sample[0], first.sample[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.compute_stats.compute[0], first.compute_stats.compute[2])


def test_as_many_generators_as_samples(tiny: Tiny, noise: Noise) -> None:
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        tiny(**BOTH).train()(noise(3, 3, 1, 4, 4), 5.0, generator=[torch.Generator(), torch.Generator()])
    assert uniform((4,), 2, None, torch.device("cpu")).shape == (2, 4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_routers_are_trained_by_the_loss_and_by_the_compute(tiny: Tiny, noise: Noise, kind: dict) -> None:
    model = routed(tiny(**kind, **BOTH)).train()
    inputs = condition_inputs(model, noise)
    out = model(noise(3, 3, 2, 4, 4), TIMES, generator=torch.Generator().manual_seed(0), **inputs)
    assert out.compute_stats.compute.shape == (3,)
    assert out.compute_stats.tokens.shape == (2, 3)
    assert ((out.compute_stats.compute > 0) & (out.compute_stats.compute < 1)).all()
    routers = {n: p for n, p in model.named_parameters() if ".dynamic." in n}
    for value in (out.sample.square().mean(), out.compute_stats.compute.mean()):
        grads = dict(zip(routers, torch.autograd.grad(value, list(routers.values()), retain_graph=True), strict=True))
        assert all(grad.isfinite().all() for grad in grads.values())
        # Two ReLUs of the tokens' routers may both be shut.
        assert all(grad.any() for name, grad in grads.items() if name.endswith("bias") and ".tokens.0." not in name)


def test_forced_samples_go_through_everything(tiny: Tiny, noise: Noise) -> None:
    model, static, x = routed(tiny(**BOTH)).train(), tiny(), noise(3, 3, 2, 4, 4)
    static.load_state_dict({k: v for k, v in model.state_dict().items() if ".dynamic." not in k})
    force_full = torch.tensor([True, False, True])
    out = model(x, TIMES, force_full=force_full, generator=torch.Generator().manual_seed(0))
    full = static(x, TIMES).sample
    torch.testing.assert_close(out.sample[force_full], full[force_full], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.sample[1], full[1], atol=1e-3)
    assert out.compute_stats.compute[force_full].tolist() == [1, 1]
    assert out.compute_stats.compute[1] < 1
    sample, used = model(x, TIMES, force_full=force_full, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert torch.equal(sample, out.sample)
    assert torch.equal(used.compute, out.compute_stats.compute)


def test_recomputed_activations_make_the_same_choices(tiny: Tiny, noise: Noise) -> None:
    model, x = routed(tiny(**BOTH, drop_path=0.3)).train(), noise(3, 3, 2, 4, 4)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = model(x, TIMES, generator=torch.Generator().manual_seed(0))
        parameters = [p for p in model.parameters() if p.requires_grad]
        value = out.sample.square().mean() + out.compute_stats.compute.mean()
        return out.sample, list(torch.autograd.grad(value, parameters, allow_unused=True))

    sample, grads = run()
    model.enable_gradient_checkpointing()
    again, recomputed = run()
    assert torch.equal(sample, again)
    for a, b in zip(grads, recomputed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_dynamic_block_compiles_whole(tiny: Tiny, noise: Noise, training: bool) -> None:
    model, x = routed(tiny(**BOTH)).train(training), noise(3, 3, 2, 4, 4)
    with torch.set_grad_enabled(training):
        expected = model(x, TIMES, generator=torch.Generator().manual_seed(0)).sample
        model.compile_repeated_blocks(fullgraph=True)
        found = model(x, TIMES, generator=torch.Generator().manual_seed(0)).sample
        shared = model(x, 500.0, generator=torch.Generator().manual_seed(0)).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert shared.isfinite().all()


# ---------------------------------------------------------------------------------------------- early exit

EXITS = {"depth": 4, "exit_depths": [(0.8, 1), (0.5, 2)]}


def test_the_table_of_exits_is_read_from_the_noisy_end(settings: Settings) -> None:
    times = torch.tensor([1000.0, 800.0, 799.9, 500.0, 499.0, 0.0])
    assert exit_depths(settings(**EXITS), times).tolist() == [1, 1, 2, 2, 4, 4]


def test_ddpm_steps_leave_at_the_times_at_which_they_stand(settings: Settings) -> None:
    t = torch.linspace(0, 1, 1001)
    flow, ddpm = (
        make_objective(DiffusionConfig(objective=objective), False).timestep(t) for objective in ("flow", "ddpm")
    )
    assert ddpm[500] == 499
    config = settings(**EXITS)
    found = exit_depths(config, ddpm)
    assert found[[499, 500, 799, 800, 1000]].tolist() == [4, 2, 2, 1, 1]
    assert torch.equal(found[1:], exit_depths(config, flow.round())[1:])


@torch.no_grad()
def test_blocks_beyond_the_exit_are_not_run(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(**EXITS), noise(2, 3, 2, 4, 4)
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    prepared = precomputed(model, torch.tensor([900.0, 600.0, 100.0]))
    for i, (t, blocks) in enumerate(((900.0, 1), (600, 2), (torch.tensor([100.0, 100.0]), 4))):
        ran.clear()
        out = model(x, t).sample
        assert ran == list(range(blocks))
        torch.testing.assert_close(model(x, 0.0, conditions=prepared[i]).sample, out, rtol=1e-5, atol=1e-5)
        assert ran == 2 * list(range(blocks))
    # The first blocks alone are a model of that depth.
    shallow = tiny(**{**EXITS, "depth": 1, "exit_depths": []})
    shallow.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith(("blocks.1", "blocks.2", "blocks.3"))}
    )
    torch.testing.assert_close(shallow(x, 900.0).sample, model(x, 900.0).sample)


@pytest.mark.parametrize("kind", [{}, {"conditioning": "joint", "text_dim": 6}, *KINDS], ids=str)
def test_a_sample_that_has_left_stays_as_it_is(tiny: Tiny, noise: Noise, kind: dict) -> None:
    model = tiny(**kind, **EXITS)
    x, inputs = noise(3, 3, 2, 4, 4), condition_inputs(model, noise)
    for training in (False, True):
        whole = model.train(training)(x, TIMES, **inputs).sample
        for i in range(3):
            one = model(x[i : i + 1], TIMES[i : i + 1], **part(inputs, i)).sample
            torch.testing.assert_close(one[0], whole[i], rtol=1e-4, atol=1e-5)


def test_residuals_of_a_control_branch_stop_at_the_exit(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(**EXITS), noise(2, 3, 1, 4, 4)
    residuals = [noise(2, 1, 4, 32, seed=i) for i in range(2)]
    t = torch.tensor([900.0, 100.0])
    mixed = model(x, t, block_residuals=residuals).sample
    for i in range(2):
        some = [r[i : i + 1] for r in residuals]
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], block_residuals=some).sample[0], mixed[i])


def test_blocks_that_are_not_run_cost_nothing(tiny: Tiny, noise: Noise) -> None:
    model = tiny(**EXITS, **BOTH).train()
    for name, parameter in model.named_parameters():
        if ".dynamic." in name and ".tokens.0." not in name:
            parameter.data.fill_(50.0 if name.endswith("bias") else 0.0)
    used = model(noise(3, 3, 1, 4, 4), TIMES).compute_stats
    torch.testing.assert_close(used.compute, torch.tensor([1 / 4, 1.0, 1.0]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("routers", [{}, BOTH], ids=["static", "routed"])
def test_a_forced_sample_does_not_leave_early(tiny: Tiny, noise: Noise, routers: dict, recompute: bool) -> None:
    model, x = routed(tiny(**EXITS, **routers)).train(), noise(3, 3, 2, 4, 4)
    whole = tiny(depth=4)
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if ".dynamic." not in k})
    if recompute:
        model.enable_gradient_checkpointing()
    times, force_full = torch.full((3,), 910.0), torch.tensor([True, False, True])
    out = model(x, times, force_full=force_full, generator=torch.Generator().manual_seed(0))
    full = whole(x, times).sample
    torch.testing.assert_close(out.sample[force_full], full[force_full], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.sample[1], full[1], atol=1e-3)
    if routers:
        assert out.compute_stats.compute[force_full].tolist() == [1, 1]
        assert out.compute_stats.compute[1] < 1 / 4
    # The last block, beyond the exit, learns of them.
    last = dict(model.named_parameters())["blocks.3.attn.qkv.weight"]
    assert torch.autograd.grad(out.sample[force_full].square().mean(), last)[0].any()


@pytest.mark.slow
def test_a_forced_sample_stays_in_a_compiled_model(tiny: Tiny, noise: Noise) -> None:
    model, x = routed(tiny(**EXITS, **BOTH)).train(), noise(3, 3, 2, 4, 4)
    inputs = {"force_full": torch.tensor([True, False, True])}
    expected = model(x, TIMES, **inputs, generator=torch.Generator().manual_seed(0))
    model.compile_repeated_blocks(fullgraph=True)
    found = model(x, TIMES, **inputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.compute_stats.compute, expected.compute_stats.compute)


@torch.no_grad()
def test_nothing_is_forced_at_inference(tiny: Tiny, noise: Noise) -> None:
    model, x = tiny(**EXITS), noise(1, 3, 1, 4, 4)
    assert torch.equal(model(x, 900.0, force_full=torch.tensor([True])).sample, model(x, 900.0).sample)


# -------------------------------------------------------------------------------------- files, configs, others


@torch.no_grad()
def test_a_dynamic_model_comes_back_from_its_files(tiny: Tiny, noise: Noise, tmp_path: Path) -> None:
    model, x = routed(tiny(**BOTH, **EXITS)), noise(2, 3, 1, 4, 4)
    model.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again.eval()(x, 300.0).sample, model(x, 300.0).sample)


@torch.no_grad()
def test_captions_may_come_to_a_dynamic_class_model(tiny: Tiny, settings: Settings, noise: Noise) -> None:
    source, x = routed(tiny(**BOTH, num_classes=4)), noise(2, 3, 1, 4, 4)
    model, _ = transfer_weights(source, settings(**BOTH, text_dim=6), ("class_to_text",))
    for t in (910.0, 480.0, 120.0):
        expected = source(x, t).sample
        torch.testing.assert_close(model(x, t, noise(2, 5, 6)).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_control_branch_of_a_dynamic_model_runs_whole(tiny: Tiny) -> None:
    base = tiny(**BOTH, **EXITS)
    branch = STDiTControl.of(base)
    assert not branch.settings.dynamic
    assert not branch.settings.exit_depths
    branch.check_base(base)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dynamic_width": True, "conditioning": "joint", "text_dim": 6}, "dynamic_width does not go with conditioning joint"),
        ({"dynamic_tokens": True, "conditioning": "joint", "text_dim": 6}, "dynamic_tokens does not go with conditioning joint"),
        ({"dynamic_tokens": True, "mlp": "conv2d"}, "dynamic_tokens does not go with mlp conv2d"),
        ({"dynamic_width": True, "mlp": "conv3d"}, "dynamic_width does not go with mlp conv3d"),
        ({"dynamic_width": True, "num_heads": 1}, "dynamic_width with num_heads 1"),
        ({"dynamic_width": True, "mlp_ratio": 1.1}, "35 inner channels .* not divisible by num_heads 4"),
        ({"dynamic_width": True, "hidden_size": 36, "num_heads": 9, "mlp": "swiglu"}, "96 inner channels .* not divisible by num_heads 9"),
        ({"dynamic_width": True, "qk_norm": "layer"}, "dynamic_width does not go with qk_norm: layer"),
        ({"dynamic_width": True, "kv_compress": 2}, "dynamic_width does not go with kv_compress 2"),
        ({"exit_depths": [(0.5, 3)]}, "3 blocks from time 0.5 up; depth is 2"),
        ({"exit_depths": [(0.3, 1), (0.5, 2)]}, r"times must fall and blocks rise, found \[0.3, 1\] before \[0.5, 2\]"),
        ({"exit_depths": [(0.5, 2), (0.3, 1)]}, r"found \[0.5, 2\] before \[0.3, 1\]"),
        ({"exit_depths": [(1.0, 1)]}, "less than 1"),
        ({"exit_depths": [(0.5, 0)]}, "greater than 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(settings: Settings, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**wrong)
