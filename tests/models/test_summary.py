"""The arithmetic of costs, against counts taken on the running model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import ConfigError, ModelConfig
from stdit.models import summary as module
from stdit.models.stdit import STDiT
from stdit.models.summary import parameter_count, summary

Settings = Callable[..., ModelConfig]
KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "full", "text_dim": 24, "pooled_text": True, "qk_norm": "rms", "cross_qk_norm": "rms"},
    {"attention": "factorized", "text_dim": 24, "positions": "rope", "micro_conditions": ("fps", "width")},
    {"attention": "factorized", "temporal": False, "num_classes": 3, "learned_variance": True},
]


def inputs(model: ModelConfig, grid: tuple[int, int, int], length: int) -> dict[str, Any]:
    size = [n * p for n, p in zip(grid, model.patch_size, strict=True)]
    text = {"encoder_hidden_states": torch.ones(1, length, model.text_dim)} if model.text_dim else {}
    micro = dict.fromkeys(model.micro_conditions, torch.ones(1))
    return {"hidden_states": torch.ones(1, model.in_channels, *size), "timestep": 1, **text, **micro}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_multiply_adds_are_those_that_run(settings: Settings, kind: dict[str, Any]) -> None:
    model = settings(**kind)
    built = STDiT.from_settings(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(**inputs(model, (3, 4, 2), 5))
    counted = summary(model, (3, 4, 2), 5)
    assert counter.get_total_flops() == pytest.approx(2 * counted.forward_macs, rel=1e-3)
    assert counted.parameters == sum(p.numel() for p in built.parameters())
    assert counted.tokens == 24


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activations_are_those_that_backward_keeps(settings: Settings, kind: dict[str, Any]) -> None:
    model = settings(hidden_size=64, depth=6, text_tokens=20, **kind)
    built = STDiT.from_settings(model)
    built.set_attention_backend("native")  # the fused kernel: no matrix of scores is kept
    owned = {p.untyped_storage().data_ptr() for p in built.parameters()}
    for checkpointed in (False, True):
        if checkpointed:
            built.enable_gradient_checkpointing()
        kept: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, alive: list[torch.Tensor] = alive) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            built(**inputs(model, (4, 16, 16), 20))
        counted = summary(model, (4, 16, 16), 20)
        if checkpointed:  # one block at a time comes on top, in backward
            assert sum(kept.values()) < counted.activation_bytes_checkpointed < counted.activation_bytes
        else:
            assert counted.activation_bytes == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"), [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)]
)
def test_sizes_are_those_of_the_dit_paper(size: Any, parameters: float, gmacs: float) -> None:
    """Its multiply-adds at 256 x 256 (adaLN-single leaves out the networks that DiT has in each block: under 1 %)."""
    model = ModelConfig(size=size, temporal=False, learned_variance=True, num_classes=1000)
    counted = summary(model, (1, 16, 16))
    assert counted.forward_macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    width, depth, _ = model.dimensions
    networks = (depth - 1) * 6 * (width**2 + width) + 2 * (width**2 + width) - (6 * depth + 2) * width
    assert (parameter_count(model) + networks) / 1e6 == pytest.approx(parameters, rel=0.01)


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("model: {size: S, text_dim: 64}\n")
    command = [sys.executable, "-m", "stdit.models.summary", "--config", str(config), "--latent", "4", "32", "32"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tokens                                1024" in printed


def test_a_config_without_a_model_or_of_an_indivisible_size_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("name: x\n")
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config)])
    with pytest.raises(ConfigError, match=r"model\.yaml: model: missing key"):
        module.main()
    config.write_text("model: {size: S}\n")
    monkeypatch.setattr(sys, "argv", ["summary", "--config", str(config), "--latent", "1", "33", "32"])
    with pytest.raises(ConfigError, match=r"height 33 .* 2"):
        module.main()
