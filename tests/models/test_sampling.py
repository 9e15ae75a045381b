"""Sampling with cached conditions: the same as without, for every member of the family, at less work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.config import Bucket, DiffusionConfig, SamplerConfig
from stdit.diffusion.denoiser import Denoiser, FunctionDenoiser
from stdit.diffusion.frame_conditioning import FrameCondition
from stdit.diffusion.guidance import guided
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import OBJECTIVES, make_scheduler
from stdit.models import sampling
from stdit.models.control import STDiTControl
from stdit.models.embeddings import trim_padding
from stdit.models.sampling import CachedConditions, micro_conditions
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, conditions_for, shaken

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]
FLOW, DDPM = DiffusionConfig(), DiffusionConfig(objective="ddpm")
SHAPE = (2, 3, 3, 8, 8)


def uncached(model: STDiT) -> Denoiser:
    """The model, called with its conditions at every step."""
    return FunctionDenoiser(lambda x, t, cond: model(x, t, **cond, return_dict=False)[0])


def conditions(model: STDiT, noise: Noise, frames: bool) -> tuple[dict[str, Any], FrameCondition | None]:
    """Conditions of SHAPE, with some frames given."""
    cond = conditions_for(model.settings, 2, noise)
    if added := cond.get("added_cond_kwargs"):
        cond["added_cond_kwargs"] = {k: torch.as_tensor(v).reshape(-1) for k, v in added.items()}
    cond.pop("timestep")
    if not frames or model.settings.conditioning == "cross_attention":
        return cond, None
    given = FrameCondition(torch.tensor([[True, False, False], [True, False, True]]), noise(*SHAPE, seed=7))
    return cond | {"conditioning_frames": given.frames}, given


def negative(model: STDiT, noise: Noise) -> dict[str, Tensor] | None:
    """What guidance needs of a model without a null caption."""
    if model.settings.null_text != "empty":
        return None
    text = noise(2, 1, model.settings.text_dim, seed=5)
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "pooled_projections": torch.zeros(2, 5),
    }


@torch.no_grad()
def draw(
    model: STDiT,
    noise: Noise,
    name: str = "flow_euler",
    cached: bool = True,
    frames: bool = True,
    limit: int = sampling.LIMIT,
) -> Tensor:
    diffusion = FLOW if "flow" in OBJECTIVES[name] and not model.settings.learned_variance else DDPM
    sampler = SamplerConfig.model_validate({"scheduler": name, "steps": 4})
    scheduler = make_scheduler(sampler, diffusion, SHAPE[2:], model.settings.learned_variance)  # pyright: ignore
    cond, given = conditions(model, noise, frames)
    denoiser = CachedConditions(model, limit=limit) if cached else uncached(model)
    steered = guided(denoiser, 3.0, negative(model, noise))
    generator = torch.Generator().manual_seed(0)
    return sample(steered, scheduler, noise(*SHAPE), 4, cond, generator, frame_condition=given)


@pytest.mark.parametrize("member", MEMBERS.values(), ids=list(MEMBERS))
def test_cached_conditions_change_nothing(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    model = tiny(**member)
    name = "ddim" if model.settings.learned_variance else "flow_euler"
    for frames in (True, False):
        torch.testing.assert_close(
            draw(model, noise, name, frames=frames), draw(model, noise, name, False, frames), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("learned", [False, True])
def test_cached_conditions_suit_every_scheduler(tiny: Tiny, noise: Noise, name: str, learned: bool) -> None:
    if learned and name == "flow_euler":
        pytest.skip("flow matching has no variance to learn")
    model = tiny(text_dim=6, num_classes=3, learned_variance=learned)
    torch.testing.assert_close(draw(model, noise, name), draw(model, noise, name, False), rtol=1e-4, atol=1e-4)


def counted(model: STDiT) -> dict[str, int]:
    """How often each module is called from now on."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return count

    for name, module in model.named_modules():
        module.register_forward_pre_hook(hook(name))
    return counts


def test_text_is_projected_once_and_steps_are_modulated_together(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6, num_classes=3)
    counts = counted(model)
    draw(model, noise, frames=False)
    assert counts[""] == 4
    once = ("y_embedder.y_proj", "t_block", "t_embedder", "y_embedder", "y_embedder.embedding_table")
    assert [counts[name] for name in once] == [1] * 5
    # A block projects its text as a whole, not by the module's forward: its linear layer is called once.
    assert [counts[f"blocks.{i}.cross_attn.kv_linear"] for i in range(2)] == [1, 1]
    assert [counts[f"blocks.{i}.attn.qkv"] for i in range(2)] == [4, 4]
    model = tiny(conditioning="adaln_zero", num_classes=3)
    counts = counted(model)
    draw(model, noise, frames=False)
    assert [counts[f"blocks.{i}.adaLN_modulation"] for i in range(2)] == [1, 1]


def test_precomputed_modulation_is_bounded(tiny: Tiny, noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(text_dim=6, num_classes=3, conditioning="adaln_zero")
    asked: list[int] = []
    precompute = sampling.precompute_conditions
    monkeypatch.setattr(
        sampling,
        "precompute_conditions",
        lambda model, times, *rest: asked.append(len(times)) or precompute(model, times, *rest),
    )
    whole = draw(model, noise)
    assert asked == [4]
    asked.clear()
    # Four samples of three frames, each of 32 x (2 x 8 + 16) float32 a step: two steps fit.
    limit = 2 * 4 * 3 * 32 * 32 * 4
    counts = counted(model)
    torch.testing.assert_close(draw(model, noise, limit=limit), whole, rtol=1e-4, atol=1e-4)
    assert asked == [2, 2]
    asked.clear()
    torch.testing.assert_close(draw(model, noise, limit=1), whole, rtol=1e-4, atol=1e-4)
    assert asked == [1, 1, 1, 1]
    # Text and classes still once for each of the two runs.
    assert counts["y_embedder.y_proj"] == 2


# ------------------------------------------------------------------------------------ with a branch


@torch.no_grad()
def steered(
    model: STDiT, branch: STDiTControl, noise: Noise, cached: bool = True, limit: int = sampling.LIMIT
) -> Tensor:
    """Four guided steps with a control branch; uncached, both are called with all conditions at every step."""

    def predict(x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        told = dict(cond)
        residuals = branch(x, t, told.pop("control"), 0.7, **told)
        return model(x, t, **told, block_residuals=residuals, return_dict=False)[0]

    name = "ddim" if model.settings.learned_variance else "flow_euler"
    diffusion = DDPM if model.settings.learned_variance else FLOW
    sampler = SamplerConfig.model_validate({"scheduler": name, "steps": 4})
    scheduler = make_scheduler(sampler, diffusion, SHAPE[2:], model.settings.learned_variance)  # pyright: ignore
    cond, given = conditions(model, noise, True)
    denoiser = CachedConditions(model, branch, scale=0.7, limit=limit) if cached else FunctionDenoiser(predict)
    return sample(
        guided(denoiser, 3.0, negative(model, noise)), scheduler, noise(*SHAPE), 4, cond | {"control": noise(2, 3, 1, 8, 8, seed=3)},
        torch.Generator().manual_seed(0), frame_condition=given,
    )  # fmt: skip


def branch_of(model: STDiT) -> STDiTControl:
    branch = shaken(STDiTControl.of(model), 2)
    assert isinstance(branch, STDiTControl)
    return branch


@pytest.mark.parametrize("member", MEMBERS.values(), ids=list(MEMBERS))
def test_cached_conditions_of_a_branch_change_nothing(tiny: Tiny, noise: Noise, member: dict[str, Any]) -> None:
    model = tiny(**member)
    branch = branch_of(model)
    expected = steered(model, branch, noise, cached=False)
    torch.testing.assert_close(steered(model, branch, noise), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(model, noise, "ddim" if model.settings.learned_variance else "flow_euler"), expected)


def test_a_branch_embeds_its_conditions_once_as_its_model_does(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6, num_classes=3)
    branch = branch_of(model)
    both = (counted(model), counted(branch))
    steered(model, branch, noise)
    for counts in both:
        assert counts[""] == 4
        once = (
            "y_embedder.y_proj",
            "t_block",
            "y_embedder",
            "y_embedder.embedding_table",
            "blocks.0.cross_attn.kv_linear",
        )
        assert [counts[name] for name in once] == [1] * 5
        assert counts["blocks.0.attn.qkv"] == 4
    model = tiny(conditioning="adaln_zero", num_classes=3)
    branch = branch_of(model)
    counts = counted(branch)
    steered(model, branch, noise)
    assert counts["blocks.0.adaLN_modulation"] == 1


def test_precomputed_modulation_is_bounded_for_both_together(
    tiny: Tiny, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(text_dim=6, num_classes=3, conditioning="adaln_zero")
    branch, asked = branch_of(model), []
    precompute = sampling.precompute_conditions
    monkeypatch.setattr(
        sampling,
        "precompute_conditions",
        lambda part, times, *rest: asked.append((type(part), len(times))) or precompute(part, times, *rest),
    )
    whole = steered(model, branch, noise)
    assert asked == [(STDiT, 4), (STDiTControl, 4)]
    asked.clear()
    # As the model's alone, and one block and its 16 more: where two of its steps fit, one does.
    model_alone = 4 * 3 * 32 * (2 * 8 + 16) * 4
    torch.testing.assert_close(steered(model, branch, noise, limit=2 * model_alone), whole, rtol=1e-4, atol=1e-4)
    assert asked == [(STDiT, 1), (STDiTControl, 1)] * 4
    asked.clear()
    both = 4 * 3 * 32 * (3 * 8 + 2 * 16) * 4
    torch.testing.assert_close(steered(model, branch, noise, limit=2 * both), whole, rtol=1e-4, atol=1e-4)
    assert asked == [(STDiT, 2), (STDiTControl, 2)] * 2


@torch.no_grad()
def test_a_branch_whose_weights_only_a_forward_fetches_is_simply_called(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6)
    branch = branch_of(model)
    expected = steered(model, branch, noise)
    weight = branch.get_parameter("blocks.0.scale_shift_table")
    held = weight.data
    weight.data = torch.empty(0)
    branch.register_forward_pre_hook(lambda *_: setattr(weight, "data", held))
    branch.register_forward_hook(lambda *_: setattr(weight, "data", torch.empty(0)))
    torch.testing.assert_close(steered(model, branch, noise), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- others


def test_samples_share_equal_conditions(tiny: Tiny, noise: Noise) -> None:
    """One fps, one time, text only: the modulations of a guided batch of eight are one row."""
    model = tiny(text_dim=6, micro_conditions=("fps", "size"), hidden_size=48)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["conditions"]), with_kwargs=True)
    mask = torch.ones(4, 5, dtype=torch.bool)
    cond: dict[str, Any] = {"encoder_hidden_states": noise(4, 5, 6), "encoder_attention_mask": mask}
    added = micro_conditions(model.settings, Bucket(frames=1, height=8, width=16), 8.0, torch.device("cpu"))
    scheduler = make_scheduler(SamplerConfig(), FLOW, (1, 4, 8))
    cond["added_cond_kwargs"] = added
    sample(guided(CachedConditions(model), 2.0), scheduler, noise(4, 3, 1, 4, 8), 3, cond)
    assert [c.modulation.video.shape for c in seen] == [(1, 1, 6 * 48)] * 3
    assert seen[0].text.shape == (8, 5, 48)


def test_no_product_sees_padding(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6)
    lengths: list[int] = []
    model.y_embedder.y_proj.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))  # pyright: ignore
    draw(model, noise)
    assert lengths == [4]
    text, mask = trim_padding(noise(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    assert (text.shape[1], mask.shape[1]) == (1, 1)


@torch.no_grad()
def test_bindings_of_one_model_do_not_disturb_each_other(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6)
    denoiser, x, times = CachedConditions(model), noise(*SHAPE), torch.tensor([900.0, 400.0])
    first, _ = conditions(model, noise, False)
    second = {**first, "encoder_hidden_states": noise(2, 5, 6, seed=11)}
    bound = [(cond, denoiser.bind(cond, times)) for cond in (first, second)]
    for i in (0, 1, 0):  # in any order
        for cond, step_model in bound:
            expected = uncached(model).bind(cond, times)(x, i)
            torch.testing.assert_close(step_model(x, i), expected, rtol=1e-4, atol=1e-5)


def test_conditions_are_bound_in_inference_mode_too(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6)
    with torch.inference_mode():
        cond, x, times = {"encoder_hidden_states": noise(2, 5, 6)}, noise(*SHAPE), torch.tensor([900.0, 400.0])
        counts = counted(model)
        step_model = CachedConditions(model).bind(cond, times)
        _, found = (step_model(x, i) for i in range(2))
        assert counts["y_embedder.y_proj"] == 1
        torch.testing.assert_close(found, uncached(model).bind(cond, times)(x, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_only_a_forward_fetches_are_left_to_it(tiny: Tiny, noise: Noise) -> None:
    """As under ZeRO-3: between forwards a rank holds nothing of them."""
    model = tiny(text_dim=6)
    expected = draw(model, noise)
    weight = model.get_parameter("blocks.0.scale_shift_table")
    held = weight.data

    def fetch(*_: Any) -> None:
        weight.data = held

    def release(*_: Any) -> None:
        weight.data = torch.empty(0)

    release()
    model.register_forward_pre_hook(fetch)
    model.register_forward_hook(release)
    torch.testing.assert_close(draw(model, noise), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_is_computed(tiny: Tiny, noise: Noise) -> None:
    model = tiny(text_dim=6)
    counts = counted(model)
    times = torch.tensor([500.0])
    with pytest.raises(ValueError, match=r"5 wide.*text_dim 6"):
        CachedConditions(model).bind({"encoder_hidden_states": noise(2, 3, 5)}, times)
    with pytest.raises(ValueError, match=r"for 2 (samples|captions); hidden_states has 3"):
        CachedConditions(model).bind({"encoder_hidden_states": noise(2, 3, 6)}, times)(noise(3, 3, 3, 8, 8), 0)
    assert counts.pop("") == 1
    assert "x_embedder" not in counts
    model = tiny(text_dim=6, null_text="empty")
    cond = {"encoder_hidden_states": noise(2, 3, 6), "encoder_attention_mask": torch.tensor([[1, 0, 0], [0, 0, 0]])}
    with pytest.raises(ValueError, match="caption 1 has no token.*null_text: empty"):
        CachedConditions(model).bind(cond, times)


def test_a_model_receives_the_size_of_the_clip(settings: Callable[..., Any]) -> None:
    clip, device = Bucket(frames=17, height=48, width=64), torch.device("cpu")
    every = settings(micro_conditions=("fps", "frames", "size"), hidden_size=48)
    found = {k: v.tolist() for k, v in micro_conditions(every, clip, 24.0, device).items()}
    assert found == {"fps": [24.0], "frames": [17.0], "height": [48.0], "width": [64.0], "aspect_ratio": [0.75]}
    assert set(micro_conditions(settings(position_reference=512), clip, 24.0, device)) == {"height", "width"}
    assert micro_conditions(settings(), clip, 24.0, device) == {}
    assert sampling.LIMIT == 256 * 2**20
