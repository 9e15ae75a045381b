"""A control branch changes nothing at first, learns alone, and takes an image or a video as its condition."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.models.control import Controlled, STDiTControl
from stdit.models.stdit import STDiT

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]

FAMILY: dict[str, dict[str, Any]] = {
    "class": {"num_classes": 3},
    "text": {"text_dim": 8},
    "both, size": {"hidden_size": 48, "text_dim": 8, "num_classes": 3, "micro_conditions": ("size", "fps")},
    "joint": {"text_dim": 8, "conditioning": "joint", "attention": "full", "qk_norm": "rms"},
    "joint by frame": {"text_dim": 8, "conditioning": "joint"},
    "in context": {"text_dim": 8, "num_classes": 3, "conditioning": "in_context"},
    "cross-attention": {"num_classes": 3, "conditioning": "cross_attention", "attention": "alternating"},
    "unconditional, adaln": {"conditioning": "adaln_zero", "positions": "rope"},
    "learned positions": {"positions": "learned", "position_grid": (4, 4), "position_frames": 4},
    "window_size": {"window_size": 2, "window_blocks": (0, 3), "relative_positions": True, "mlp": "swiglu"},
    "image": {"temporal": False, "num_classes": 3},
    "patches of two frames": {"patch_size": (2, 2, 2), "text_dim": 8, "pooled_text": True},
}


def shaken(module: torch.nn.Module, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return module


def condition_inputs(model: STDiT, noise: Noise, batch: int = 2) -> dict[str, Any]:
    c, found = model.settings, {}
    if c.text_dim:
        found["encoder_hidden_states"] = noise(batch, 5, c.text_dim, seed=9)
        found["encoder_attention_mask"] = torch.arange(5) < torch.tensor([5, 3])[:batch, None]
    if c.num_classes:
        found["class_labels"] = torch.tensor([0, 2])[:batch]
    if c.micro_conditions:
        size = {"height": torch.tensor([64.0]), "width": torch.tensor([96.0])}
        found["added_cond_kwargs"] = {"fps": torch.tensor([8.0]), **size}
    return found


def latents(model: STDiT, noise: Noise, seed: int = 0) -> Tensor:
    return noise(2, 3, 1 if not model.settings.has_time else 4, 8, 8, seed=seed)


@pytest.fixture(params=FAMILY, ids=list(FAMILY))
def base(request: pytest.FixtureRequest, tiny: Tiny) -> STDiT:
    return tiny(depth=4, **FAMILY[request.param])


def test_a_new_branch_changes_nothing(base: STDiT, noise: Noise) -> None:
    x, conditions = latents(base, noise), condition_inputs(base, noise)
    plain = base(x, 300.0, **conditions).sample
    for blocks in (1, None, 4):
        both = Controlled(base, STDiTControl.of(base, blocks))
        for control in (latents(base, noise, 3), noise(2, 3, 1, 8, 8, seed=4)):
            found = both(x, torch.tensor([300.0, 300.0]), control, **conditions).sample
            torch.testing.assert_close(
                found, base(x, torch.tensor([300.0, 300.0]), **conditions).sample, rtol=0, atol=0
            )
    assert torch.equal(both(x, 300.0, control, **conditions).sample, plain)


def test_gradients_reach_all_of_the_branch_and_nothing_of_the_base(base: STDiT, noise: Noise) -> None:
    both = Controlled(base, shaken(STDiTControl.of(base))).train()
    x, conditions = latents(base, noise), condition_inputs(base, noise)
    if base.settings.text_dim:
        conditions["drop_condition"] = torch.tensor([False, True])  # so that the null caption is read
    both(x, 300.0, latents(base, noise, 3), **conditions).sample.square().mean().backward()
    assert [n for n, p in both.base.named_parameters() if p.grad is not None] == []
    idle = [n for n, p in both.control.named_parameters() if p.grad is None or not p.grad.any()]
    # Of the last joint block's text, as of the model's own last one, keys and values alone are asked for.
    assert [n for n in idle if not n.endswith("context.attn.q_norm.weight")] == []
    # The first step moves what joins; only then the rest.
    fresh = Controlled(base, STDiTControl.of(base))
    fresh(x, 300.0, latents(base, noise, 3), **conditions).sample.square().mean().backward()
    moved = {n.split(".")[0] for n, p in fresh.control.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"joins"}


def test_recomputed_activations_give_the_same_gradients(base: STDiT, noise: Noise) -> None:
    both = Controlled(base, shaken(STDiTControl.of(base))).train()
    x, conditions, control = latents(base, noise), condition_inputs(base, noise), latents(base, noise, 3)
    both(x, 300.0, control, **conditions).sample.square().mean().backward()
    plain = {n: p.grad.clone() for n, p in both.control.named_parameters() if p.grad is not None}
    both.zero_grad()
    for part in (both.base, both.control):
        part.enable_gradient_checkpointing()
    both(x, 300.0, control, **conditions).sample.square().mean().backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in both.control.named_parameters() if p.grad is not None)


def test_one_frame_stands_for_all_and_one_sample_too(base: STDiT, noise: Noise) -> None:
    both = Controlled(base, shaken(STDiTControl.of(base)))
    x, conditions = latents(base, noise), condition_inputs(base, noise)
    image = noise(1, 3, 1, 8, 8, seed=4)
    one = both(x, 300.0, image, **conditions).sample
    repeated = both(x, 300.0, image.expand(2, -1, x.shape[2], -1, -1), **conditions).sample
    torch.testing.assert_close(one, repeated, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, both(x, 300.0, image + 1, **conditions).sample, atol=1e-4)


def test_a_branch_is_created_in_its_bases_mode(tiny: Tiny) -> None:
    base = tiny(depth=4, num_classes=3)
    for training in (False, True):
        branch = STDiTControl.of(base.train(training))
        assert all(module.training is training for module in branch.modules())


def test_a_branch_learns_with_its_bases_drop_path_and_may_serve_one_with_another(tiny: Tiny, noise: Noise) -> None:
    base, x = tiny(depth=4, num_classes=3, drop_path=0.9), noise(2, 3, 4, 8, 8)
    both = Controlled(base, shaken(STDiTControl.of(base, 4))).train()
    assert both.control.settings.drop_path == 0.9

    def residuals(seed: int) -> tuple[Tensor, ...]:
        return both.control(x, 300.0, x, generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(residuals(0), residuals(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(residuals(0), residuals(1), strict=True))
    both.eval()
    assert all(torch.equal(a, b) for a, b in zip(residuals(0), residuals(1), strict=True))
    both.control.check_base(tiny(depth=4, num_classes=3))


def test_the_scale_is_of_what_is_added(tiny: Tiny, noise: Noise) -> None:
    base = tiny(depth=4, num_classes=3)
    both, x = Controlled(base, shaken(STDiTControl.of(base))), noise(2, 3, 4, 8, 8)
    residuals = both.control(x, 300.0, x)
    assert len(residuals) == 2
    assert residuals[0].shape == (2, 4, 16, 32)
    halved = both.control(x, 300.0, x, 0.5)
    assert all(torch.equal(h, 0.5 * r) for h, r in zip(halved, residuals, strict=True))
    assert torch.equal(both(x, 300.0, x, 0.0).sample, base(x, 300.0).sample)


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(base: STDiT, noise: Noise, tmp_path: Path) -> None:
    control = shaken(STDiTControl.of(base, channels=5)).eval()
    before = os.umask(0o027)
    try:
        control.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    again = STDiTControl.from_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert again.settings == control.settings
    assert all(
        torch.equal(a, b) for a, b in zip(control.state_dict().values(), again.state_dict().values(), strict=True)
    )
    x, conditions, condition = latents(base, noise), condition_inputs(base, noise), noise(2, 5, 1, 8, 8)
    for a, b in zip(control(x, 1.0, condition, **conditions), again(x, 1.0, condition, **conditions), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="these are weights of STDiTControl, not of STDiT"):
        STDiT.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="these are weights of STDiT, not of STDiTControl"):
        STDiTControl.from_pretrained(tmp_path / "base")


def test_it_learns_what_the_base_cannot_know(tiny: Tiny, noise: Noise) -> None:
    base = tiny(depth=4, num_classes=3)
    both = Controlled(base, STDiTControl.of(base)).train()
    optimizer = torch.optim.AdamW(both.control.parameters(), lr=3e-3)
    x, control, losses = noise(4, 3, 2, 8, 8), noise(4, 3, 2, 8, 8, seed=5), []
    for _ in range(30):
        loss = (both(x, 500.0, control).sample - control).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_what_does_not_fit_is_refused_with_both_numbers(tiny: Tiny, noise: Noise) -> None:
    base = tiny(depth=4, num_classes=3)
    control, x = STDiTControl.of(base), noise(2, 3, 4, 8, 8)
    for wrong, message in (
        (noise(2, 4, 4, 8, 8), "control has 4 channels; the branch takes control_channels 3"),
        (noise(2, 3, 2, 8, 8), r"control is \(2, 8, 8\) .* the latents are \(4, 8, 8\)"),
        (noise(2, 3, 4, 8, 6), r"control is \(4, 8, 6\) .* the latents are \(4, 8, 8\)"),
        (noise(3, 3, 4, 8, 8), "control has 3 samples; hidden_states has 2"),
        (noise(2, 3, 8, 8), "control has 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            control(x, 1.0, wrong)
    with pytest.raises(ValueError, match="control_blocks 5: the model has 4 blocks"):
        STDiTControl.of(base, 5)
    with pytest.raises(ValueError, match=r"(?s)of another model.*num_classes: 3, the model has 4"):
        Controlled(tiny(depth=4, num_classes=4), control)
