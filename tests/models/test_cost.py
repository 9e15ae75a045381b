"""What is measured without memory is what runs, and what backward keeps."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import ControlConfig, LoRAConfig, ModelConfig, TrainConfig
from stdit.models import cost as module
from stdit.models.cost import model_cost
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT

Settings = Callable[..., ModelConfig]
KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "full", "text_dim": 24, "pooled_text": True, "qk_norm": "rms", "cross_qk_norm": "rms"},
    {"attention": "factorized", "text_dim": 24, "positions": "rope", "micro_conditions": ("fps", "width")},
    {"attention": "factorized", "temporal": False, "num_classes": 3, "learned_variance": True},
    {"attention": "alternating", "conditioning": "adaln_zero", "num_classes": 3, "mlp": "conv3d"},
    {"attention": "alternating", "text_dim": 24, "position_reference": 64, "mlp": "swiglu", "null_text": "sequence"},
    {"attention": "factorized", "window_size": 2, "window_blocks": (0,), "kv_compress": 2, "kv_compress_blocks": (1,)},
    {"attention": "factorized", "mlp": "conv2d", "conditioning": "adaln", "qk_norm": "layer"},
    {"attention": "factorized", "conditioning": "in_context", "num_classes": 3, "text_dim": 24},
    {"attention": "full", "conditioning": "cross_attention", "num_classes": 3, "text_dim": 24},
    {"attention": "full", "conditioning": "joint", "text_dim": 24, "pooled_dim": 5, "null_text": "empty"},
    {"attention": "factorized", "conditioning": "joint", "text_dim": 24, "temporal": False},
    {"positions": "learned", "position_grid": (16, 16), "position_frames": 8, "drop_path": 0.1, "exit_depths": ((0.5, 1),)},
]  # fmt: skip
BATCH = 2


def inputs(model: ModelConfig, grid: tuple[int, int, int], length: int) -> dict[str, Any]:
    size = [n * p for n, p in zip(grid, model.patch_size, strict=True)]
    conditions: dict[str, Any] = {
        "hidden_states": torch.ones(BATCH, model.in_channels, *size),
        "timestep": torch.ones(BATCH),
    }
    conditions |= {"encoder_hidden_states": torch.ones(BATCH, length, model.text_dim)} if model.text_dim else {}
    conditions |= {"class_labels": torch.zeros(BATCH, dtype=torch.int64)} if model.num_classes else {}
    conditions |= {"pooled_projections": torch.ones(BATCH, model.pooled_dim)} if model.pooled_dim else {}
    return conditions | {"added_cond_kwargs": dict.fromkeys(("fps", "width", "height"), torch.full((1,), 32.0))}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_multiply_adds_are_those_that_run(settings: Settings, kind: dict[str, Any]) -> None:
    model = settings(**kind)
    built = STDiT.from_settings(model).train()
    with FlopCounterMode(display=False) as counter:
        built(**inputs(model, (3, 4, 2), 5))
    counted = model_cost(model, (3, 4, 2), 5)
    assert counter.get_total_flops() == 2 * BATCH * counted.forward_macs
    assert counted.parameters == sum(p.numel() for p in built.parameters())
    assert counted.tokens == 24


def test_attention_is_counted_by_its_two_products(settings: Settings) -> None:
    """2 N² D of each block's multiply-adds, as the DiT paper counts; to the text, 2 N L D."""
    model = settings(attention="full", text_dim=24, max_text_tokens=300)
    width, depth, _ = model.dimensions

    def rest(n: int, length: int) -> int:
        macs = model_cost(model, (1, n, 1), length).forward_macs
        return macs - depth * 2 * n * width * (n + length)

    # What is left is linear in both.
    assert rest(90, 50) - rest(60, 50) == rest(60, 50) - rest(30, 50)
    assert rest(60, 90) - rest(60, 60) == rest(60, 60) - rest(60, 30)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activations_are_those_that_backward_keeps(settings: Settings, kind: dict[str, Any]) -> None:
    model = settings(hidden_size=96, depth=6, max_text_tokens=20, **kind)
    built = STDiT.from_settings(model.model_copy(update={"exit_depths": ()})).train()
    built.set_attention_backend("native")  # the fused kernel: no matrix of scores is kept
    owned = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[bool, int] = {}
    for checkpointed in (False, True):
        if checkpointed:
            built.enable_gradient_checkpointing()
        sizes: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def keep(
            tensor: torch.Tensor, sizes: dict[int, int] = sizes, alive: list[torch.Tensor] = alive
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            built(**inputs(model, (4, 16, 16), 20))
        kept[checkpointed] = sum(sizes.values()) // BATCH
    counted = model_cost(model, (4, 16, 16), 20)
    assert counted.activation_bytes == pytest.approx(kept[False], rel=0.02)
    # One block at a time comes on top, in backward: about a sixth of what all keep.
    block = counted.activation_bytes_checkpointed - kept[True]
    assert 0.1 * kept[False] < block < 0.3 * kept[False]


def test_bfloat16_takes_half(settings: Settings) -> None:
    model = settings(text_dim=24)
    whole, half = (model_cost(model, (4, 16, 16), 5, size).activation_bytes for size in (4, 2))
    assert half == pytest.approx(whole / 2, rel=0.05)
    with pytest.raises(ValueError, match="bytes_per_element 3"):
        model_cost(model, (4, 16, 16), 5, 3)


def test_a_sample_alone_keeps_less(settings: Settings) -> None:
    model = settings()
    alone, together, more = (model_cost(model, (1, 16, 16), batch=n) for n in (1, 2, 4))
    assert alone.forward_macs == together.forward_macs
    assert alone.activation_bytes < together.activation_bytes
    assert more.activation_bytes == pytest.approx(together.activation_bytes, rel=0.01)


def test_dynamic_models_are_counted_with_all_that_can_run(settings: Settings) -> None:
    plain, dynamic = (model_cost(settings(dynamic_tokens=on, dynamic_width=on), (2, 4, 4)) for on in (False, True))
    assert dynamic.parameters > plain.parameters
    assert plain.forward_macs < dynamic.forward_macs < 1.1 * plain.forward_macs


def test_the_largest_size_is_measured_in_two_seconds() -> None:
    model = ModelConfig(size="XL", text_dim=4096, attention="factorized")
    start = time.process_time()
    model_cost(model, (17, 64, 64), 120)
    assert time.process_time() - start < 2


def test_a_grid_or_a_text_that_the_model_does_not_take_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"17 patches.*position_grid.* 16"):
        model_cost(settings(positions="learned", position_grid=(16, 16), position_frames=4), (1, 17, 4))
    with pytest.raises(ValueError, match="9 tokens; the model takes 1 to max_text_tokens 7"):
        model_cost(settings(text_dim=6), (1, 4, 4), 9)


def failing(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says on its way out."""
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2
    printed, said = capsys.readouterr()
    assert said.startswith("error: ")
    assert not printed
    assert said.count("\n") == 1
    return said


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("model: {size: S, text_dim: 64}\n")
    module.main(["--config", str(config), "--latent", "4", "32", "32"])
    printed = capsys.readouterr().out
    assert "tokens                                1024" in printed
    assert [line.split()[0] for line in printed.splitlines()] == [
        "latent", "parameters", "tokens", "forward", "training", "activations", "with",
    ]  # fmt: skip


def test_a_size_may_be_in_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("model: {hidden_size: 32, depth: 2, num_heads: 2}\n")
    said = []
    for arguments in (["--latent", "5", "32", "48"], ["--pixels", "17", "256", "384", "--compression", "4", "8", "8"]):
        monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config), *arguments])
        module.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "5 x 32 x 48" in said[0]
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config), "--pixels", "1", "250", "256"])
    assert re.search(r"height 250 .* 8", failing(capsys))


def test_a_config_without_a_model_or_of_an_indivisible_size_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("name: x\n")
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config)])
    assert "model.yaml: model: missing key" in failing(capsys)
    config.write_text("model: {size: S}\n")
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config), "--latent", "1", "33", "32"])
    assert re.search(r"height 33 .* 2", failing(capsys))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--text-length -1", "--text-length -1: expected 0"),
        ("--pixels 1 64 64 --compression 0 8 8", "--compression 0 8 8: expected whole numbers"),
        ("--pixels 0 64 64", "--pixels 0 64 64: expected"),
        ("--latent 1 -2 2", "--latent 1 -2 2: expected"),
    ],
)
def test_the_command_says_errors_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    (tmp_path / "model.yaml").write_text("model: {size: S}\n")
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(tmp_path / "model.yaml"), *arguments.split()])
    assert said in failing(capsys)


@pytest.mark.parametrize("train", [{"lora": LoRAConfig(rank=2)}, {"control": ControlConfig()}], ids=["lora", "control"])
def test_beside_frozen_weights_their_gradients_cost_nothing(settings: Settings, train: dict[str, Any]) -> None:
    model, trained = settings(), TrainConfig(steps=1, **train)
    built = add_trainable(STDiT.from_settings(model), trained).train()
    given = inputs(model, (3, 4, 2), 5)
    given |= {"control": given["hidden_states"]} if trained.control else {}
    with FlopCounterMode(display=False) as counter:
        built(**given, return_dict=False)[0].sum().backward()
    counted = model_cost(model, (3, 4, 2), 5, train=trained)
    assert counter.get_total_flops() == BATCH * counted.training_flops
    assert counted.training_flops < 6 * counted.forward_macs
    assert counted.trained == sum(p.numel() for p in built.parameters() if p.requires_grad) < counted.parameters
