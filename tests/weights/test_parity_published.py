"""Models whose classes are not installed: ours, converted, against the published arithmetic written out
(published_models.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.models.embeddings import timestep_embedding
from stdit.models.positions import sincos_spatial, sincos_temporal
from stdit.models.stdit import STDiT
from tests.support import published_models, published_weights
from tests.support.parity import Differences, differences, layout_of, learning, loaded, ragged

LIMIT = 1e-5
Noise = Callable[..., Tensor]


def against(state: published_models.State, model: STDiT, x: Tensor, theirs: Any, **inputs: Any) -> Differences:
    """`theirs(state, x)` against `model(x, **inputs)`; images are clips of one frame."""
    weights = learning(state)
    image = x.ndim == 4

    def ours(clip: Tensor) -> Tensor:
        out = model(clip[:, :, None] if image else clip, **inputs, return_dict=False)[0]
        return out[:, :, 0] if image else out

    return differences(ours, lambda clip: theirs(weights, clip), x, model, layout_of(state), weights)


# --------------------------------------------------------------------------------------------- DiT


@pytest.mark.parametrize(("below", "shift"), [(128.0, 0), (127.0, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_dit_equals_the_published_arithmetic(
    tmp_path: Path, noise: Noise, below: float, shift: int, batch: int
) -> None:
    state = published_weights.dit_weights()
    overrides = {"timestep_freq_shift": shift} if shift else {}
    model = loaded(state, tmp_path, num_heads=4, **overrides)
    x, t, y = noise(batch, 3, 8, 8), torch.tensor([3, 981, 500])[:batch], torch.tensor([0, 4, 5])[:batch]
    found = against(
        state,
        model,
        x,
        lambda s, z: published_models.dit(s, z, t, y, 4, below),
        timestep=t,
        class_labels=torch.where(y == 5, -1, y),
    )
    assert found.below(LIMIT), found


def test_the_two_codes_of_time_differ(tmp_path: Path, noise: Noise) -> None:
    state = published_weights.dit_weights()
    model = loaded(state, tmp_path, num_heads=4)
    x, t, y = noise(2, 3, 8, 8), torch.tensor([3, 981]), torch.tensor([0, 4])
    found = against(
        state, model, x, lambda s, z: published_models.dit(s, z, t, y, 4, 127.0), timestep=t, class_labels=y
    )
    assert found.output > 10 * LIMIT


def test_one_timestep_for_all_is_that_timestep_for_each(tmp_path: Path, noise: Noise) -> None:
    state = published_weights.dit_weights()
    model = loaded(state, tmp_path, num_heads=4)
    x, y = noise(3, 3, 8, 8), torch.tensor([0, 4, 2])
    theirs = lambda s, z: published_models.dit(s, z, torch.full((3,), 700), y)  # noqa: E731
    assert against(state, model, x, theirs, timestep=700, class_labels=y).below(LIMIT)


# ------------------------------------------------------------------------------------------- Latte


@pytest.mark.parametrize("classes", [5, 0])
def test_class_conditional_latte_equals_the_published_arithmetic(tmp_path: Path, noise: Noise, classes: int) -> None:
    state = published_weights.latte_weights(frames=4, depth=4, classes=classes)
    model = loaded(state, tmp_path, num_heads=4)
    x, t = noise(3, 3, 4, 8, 8), torch.tensor([3, 981, 500])
    y = torch.tensor([0, 4, 2]) if classes else None
    found = against(state, model, x, lambda s, z: published_models.latte(s, z, t, y), timestep=t, class_labels=y)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("shape", [(4, 6), (6, 2)])
def test_latte_counts_the_patches_of_other_grids_as_published(
    tmp_path: Path, noise: Noise, shape: tuple[int, int]
) -> None:
    state = published_weights.latte_weights(frames=4)
    model = loaded(state, tmp_path, num_heads=4)
    x, t, y = noise(2, 3, 3, 2 * shape[0], 2 * shape[1]), torch.tensor([3, 981]), torch.tensor([0, 4])
    tables = {"pos_embed": published_weights.plane_code(32, *shape), "temp_embed": published_weights.time_table(32, 3)}
    found = against(
        state, model, x, lambda s, z: published_models.latte(s | tables, z, t, y), timestep=t, class_labels=y
    )
    assert found.below(LIMIT), found


# ------------------------------------------------------------------------------------------ PixArt

PIXARTS: dict[str, dict[str, Any]] = {
    "α": {},
    "α 1024": {"sized": True},
    "Σ": {"scale": 0.5},
    "Σ, norms and pooling": {"norm": True, "pooled": (1,)},
    "windows": {"windowed": (0,)},
}


@pytest.mark.parametrize("kind", PIXARTS)
@pytest.mark.parametrize("shape", [(8, 8), (4, 12)])
def test_pixart_equals_the_published_arithmetic(
    tmp_path: Path, noise: Noise, kind: str, shape: tuple[int, int]
) -> None:
    options = PIXARTS[kind]
    state = published_weights.pixart_weights(**options)
    model = loaded(state, tmp_path, num_heads=4)
    x, y, t, lengths = noise(3, 3, *shape), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500]), [7, 2, 5]
    inputs: dict[str, Any] = {"timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": ragged(lengths, 7)}
    sizes = None
    if options.get("sized"):
        sizes = (torch.tensor([[512.0, 640.0], [256.0, 1024.0], [333.0, 77.0]]), torch.tensor([[0.8], [0.25], [4.3]]))
        added = {"height": sizes[0][:, 0], "width": sizes[0][:, 1], "aspect_ratio": sizes[1][:, 0]}
        inputs["added_cond_kwargs"] = added
    scale = options.get("scale", 2.0)
    found = against(
        state, model, x, lambda s, z: published_models.pixart(s, z, t, y, lengths, 4, scale, sizes), **inputs
    )
    assert found.below(LIMIT), found


@pytest.mark.parametrize("sampling", ["ave", "uniform", "uniform_every"])
def test_sampled_keys_and_values_equal_the_published_arithmetic(tmp_path: Path, noise: Noise, sampling: str) -> None:
    state = published_weights.pixart_weights(norm=True)
    compression = {"kv_compress": 2, "kv_compress_sampling": sampling, "kv_compress_blocks": (1,)}
    model = loaded(state, tmp_path, num_heads=4, **compression)
    x, y, t, lengths = noise(3, 3, 8, 12), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500]), [7, 2, 5]
    inputs = {"timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": ragged(lengths, 7)}

    def theirs(s: published_models.State, z: Tensor) -> Tensor:
        return published_models.pixart(s, z, t, y, lengths, sampling=("", sampling))

    found = against(state, model, x, theirs, **inputs)
    assert found.below(LIMIT), found


def test_a_dropped_caption_is_the_null_sequence_under_its_own_mask(tmp_path: Path, noise: Noise) -> None:
    state = published_weights.pixart_weights()
    model = loaded(state, tmp_path, num_heads=4)
    x, y, t, lengths = noise(3, 3, 8, 8), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500]), [7, 2, 5]
    drop = torch.tensor([False, True, True])

    def theirs(s: published_models.State, z: Tensor) -> Tensor:
        words = torch.where(drop[:, None, None], s["y_embedder.y_embedding"], y)
        return published_models.pixart(s, z, t, words, lengths)

    inputs = {
        "timestep": t,
        "encoder_hidden_states": y,
        "encoder_attention_mask": ragged(lengths, 7),
        "drop_condition": drop,
    }
    found = against(state, model, x, theirs, **inputs)
    assert found.below(LIMIT), found


# --------------------------------------------------------------------------------------- Open-Sora


@pytest.mark.parametrize(("scales", "shape"), [((0.5, 1.0), (4, 4)), ((1.0, 0.75), (2, 6))])
def test_stdit_v1_equals_the_published_arithmetic(
    tmp_path: Path, noise: Noise, scales: tuple[float, float], shape: tuple[int, int]
) -> None:
    state = published_weights.v1_weights(grid=(3, *shape), scales=scales)
    model = loaded(state, tmp_path, num_heads=4)
    x, y, t, lengths = (
        noise(3, 3, 3, 2 * shape[0], 2 * shape[1]),
        noise(3, 7, 10, seed=1),
        torch.tensor([3, 981, 500]),
        [7, 2, 5],
    )
    inputs = {"timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": ragged(lengths, 7)}
    found = against(state, model, x, lambda s, z: published_models.v1(s, z, t, y, lengths), **inputs)
    assert found.below(LIMIT), found


@pytest.mark.parametrize("shape", [(6, 6), (2, 6)])
def test_stdit_v1_counts_the_patches_of_other_grids_as_published(
    tmp_path: Path, noise: Noise, shape: tuple[int, int]
) -> None:
    state = published_weights.v1_weights(grid=(3, 4, 4), scales=(0.5, 0.75))
    model = loaded(state, tmp_path, num_heads=4)
    x, y = noise(2, 3, 5, 2 * shape[0], 2 * shape[1]), noise(2, 7, 10, seed=1)
    t, lengths = torch.tensor([3, 981]), [7, 2]
    tables = {"pos_embed": published_weights.plane_code(32, *shape, None, 0.5)}
    tables["pos_embed_temporal"] = published_weights.time_table(32, 5, 0.75)
    inputs = {"timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": ragged(lengths, 7)}
    found = against(state, model, x, lambda s, z: published_models.v1(s | tables, z, t, y, lengths), **inputs)
    assert found.below(LIMIT), found


def test_stdit_v1_gates_conditioning_frames_by_their_own_timestep(tmp_path: Path, noise: Noise) -> None:
    """The one place where we differ: published, temporal attention's gate is the drawn frames' for given ones too."""
    state = published_weights.v1_weights()
    for name, tensor in state.items():
        if ".attn_temp.proj" in name:
            tensor.zero_()
    model = loaded(state, tmp_path, num_heads=4)
    x, y, t, lengths = noise(2, 3, 3, 8, 8), noise(2, 7, 10, seed=1), torch.tensor([981, 500]), [7, 2]
    given = torch.tensor([[True, False, False], [False, True, False]])
    inputs = {
        "timestep": t,
        "encoder_hidden_states": y,
        "encoder_attention_mask": ragged(lengths, 7),
        "conditioning_frames": given,
    }
    with torch.no_grad():
        ours = model(x, **inputs).sample
        theirs = published_models.v1(state, x, t, y, lengths, mask=~given)
    assert (ours - theirs).abs().max() <= LIMIT * theirs.abs().max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("pixels", "shape"),
    [
        ((512, 512), (8, 8)),
        ((240, 426), (4, 12)),
        ((144, 90), (12, 6)),
        ((360, 640), (5, 8)),
        ((240, 426), (8, 13)),
        ((72, 40), (9, 5)),
    ],
)
def test_stdit3_equals_the_published_arithmetic(
    tmp_path: Path, noise: Noise, masked: bool, pixels: tuple[int, int], shape: tuple[int, int]
) -> None:
    state = published_weights.v3_weights()
    model = loaded(state, tmp_path)
    x, y, t, lengths = noise(3, 3, 5, *shape), noise(3, 7, 10, seed=1), torch.tensor([3, 981, 500]), [7, 2, 5]
    fps = torch.tensor([24.0, 8.0, 120.0])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool() if masked else None
    added = {"fps": fps, "height": torch.full((3,), float(pixels[0])), "width": torch.full((3,), float(pixels[1]))}
    inputs: dict[str, Any] = {"timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": ragged(lengths, 7)}
    inputs["added_cond_kwargs"] = added
    inputs |= {} if mask is None else {"conditioning_frames": ~mask}
    found = against(state, model, x, lambda s, z: published_models.v3(s, z, t, y, lengths, fps, pixels, mask), **inputs)
    assert found.below(LIMIT), found


# -------------------------------------------------------------------------------------- J. Rineau


@pytest.mark.parametrize("classes", [5, 0])
def test_rineaus_dit_equals_the_published_arithmetic(tmp_path: Path, noise: Noise, classes: int) -> None:
    state = published_weights.rineau_weights(classes=classes)
    model = loaded(state, tmp_path, num_heads=4)
    x, t = noise(3, 4, 8, 8), torch.tensor([3, 981, 500])
    y = torch.tensor([0, 4, 2]) if classes else None
    found = against(state, model, x, lambda s, z: published_models.rineau(s, z, t, y), timestep=t, class_labels=y)
    # His frequencies are rounded elsewhere: at t = 981 the code of time differs by some 1e-5, and so does one gradient.
    assert found._replace(weights=found.weights / 10).below(LIMIT), found


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_and_codes_are_the_published_ones_to_the_last_bit(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for rows, columns, base, scale in ((16, 16, 16, 1.0), (64, 64, 64, 2.0), (32, 32, 16, 0.5), (10, 24, 64, 2.0)):
        theirs = published_weights.plane_code(1152, rows, columns, base, scale)[0]
        assert torch.equal(sincos_spatial(rows, columns, 1152, base, scale, None, cpu, dtype), theirs.to(dtype))
    assert torch.equal(
        sincos_temporal(16, 1152, 1.0, False, cpu, dtype), published_weights.time_table(1152, 16)[0].to(dtype)
    )
    t = torch.tensor([0, 1, 77, 500, 999])
    for below, shift in ((128.0, 0), (127.0, 1)):
        assert torch.equal(timestep_embedding(t, 256, shift), published_models.time_code(t, 256, below))
