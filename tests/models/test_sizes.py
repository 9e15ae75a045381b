"""The published sizes: parameters and multiply-adds of the papers' tables, computed on the configs that the house
has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stdit.config import ModelConfig, read_extended, validate
from stdit.models.cost import ModelCost, model_cost, parameter_count
from tests.support.paths import ROOT

MODELS = ROOT / "configs/models"

# Peebles & Xie 2023, table 4: parameters (M) and Gflops (multiply-adds) at 256 pixels, latents of 32 x 32.
DIT = {
    "S-8": (33, 0.36), "S-4": (33, 1.41), "S-2": (33, 6.06),
    "B-8": (131, 1.42), "B-4": (130, 5.56), "B-2": (130, 23.01),
    "L-8": (459, 5.01), "L-4": (458, 19.70), "L-2": (458, 80.71),
    "XL-8": (676, 7.39), "XL-4": (675, 29.05), "XL-2": (675, 118.64),
}  # fmt: skip


def read(name: str) -> ModelConfig:
    return validate(read_extended(MODELS / f"{name}.yaml")["model"], ModelConfig, name)


def at(model: ModelConfig, pixels: int, frames: int = 1, text_length: int = 0) -> ModelCost:
    """Of a clip through an autoencoder of 8 x 8 pixels a latent."""
    side = pixels // 8 // model.patch_size[1]
    return model_cost(model, (frames, side, side), text_length)


@pytest.mark.parametrize("name", DIT)
def test_sizes_are_those_of_the_dit_paper(name: str) -> None:
    parameters, gmacs = DIT[name]
    counted = at(read(f"dit-{name}"), 256)
    assert counted.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert counted.forward_macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert counted.training_flops == 6 * counted.forward_macs


def test_dit_xl_2_has_675_million_parameters() -> None:
    """Its published count, 675,129,632, has the fixed table of 256 positions in it."""
    assert parameter_count(read("dit-XL-2")) + 256 * 1152 == 675_129_632


def test_dit_at_512_pixels_is_that_of_the_paper() -> None:
    assert at(read("dit-XL-2"), 512).forward_macs / 1e9 == pytest.approx(524.6, rel=0.01)


@pytest.mark.parametrize(
    ("conditioning", "gmacs"),
    [("in_context", 119.37), ("cross_attention", 137.62), ("adaln", 118.56), ("adaln_zero", 118.64)],
)
def test_conditionings_cost_what_the_dit_paper_says(conditioning: Any, gmacs: float) -> None:
    """Its section 5, of XL/2. The tolerance tells adaLN from adaLN-Zero."""
    model = read("dit-XL-2").model_copy(update={"conditioning": conditioning})
    assert at(model, 256).forward_macs / 1e9 == pytest.approx(gmacs, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Without the learned null caption: what diffusers' and the papers' counts have.
        ("pixart-XL-2", 610.86),
        ("pixart-sigma-XL-2", 610.86),
        ("latte-XL-2", 673.80),
        ("latte-t2v-XL-2", 1057.25),
        ("stdit-XL-2", 759.6),
        ("mmdit-sd3", 2028.33),
    ],
)
def test_other_members_have_their_published_sizes(name: str, parameters: float) -> None:
    model = read(name)
    null = model.max_text_tokens * (model.text_dim or 0) if model.null_text != "empty" else 0
    assert (parameter_count(model) - null) / 1e6 == pytest.approx(parameters, abs=0.1)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_model_in_configs_is_counted(path: Path) -> None:
    model = read(path.stem)
    frames = 2 if model.has_time else 1
    counted = at(model, 256, frames, min(20, model.max_text_tokens) if model.text_dim else 0)
    assert 0 < counted.activation_bytes_checkpointed < counted.activation_bytes
    assert counted.tokens * model.patch_size[1] ** 2 == frames * 1024


def test_compressed_keys_and_values_cost_less() -> None:
    """PixArt-Σ, section 2.3: at 2048 pixels attention to 16,384 patches is most of the cost."""
    compressed = read("pixart-sigma-XL-2-2K")
    whole = compressed.model_copy(update={"kv_compress": None, "kv_compress_blocks": None})
    assert at(compressed, 2048).forward_macs < 0.8 * at(whole, 2048).forward_macs
