"""Weights in and out: every layout is detected from its keys, and round-trips bit-exactly."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.auto_model import AutoModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.integrity import write_manifest
from stdit.models.stdit import STDiT
from stdit.weights.convert import convert, export, load_published, main
from stdit.weights.layouts import LAYOUTS, detect_layout
from tests.support import published_weights
from tests.support.diffusers_models import dit, latte, pixart, sd3

State = dict[str, Tensor]
Tiny = Callable[..., STDiT]
HUB = {"diffusers-dit": dit, "diffusers-pixart": pixart, "diffusers-latte": latte, "diffusers-sd3": sd3}
# Layout, random weights, and what the file does not determine.
ORIGINAL: dict[str, tuple[str, Callable[[], State], dict[str, Any]]] = {
    "DiT": ("dit", published_weights.dit_weights, {}),
    "DiT, no learned variance": ("dit", lambda: published_weights.dit_weights(outputs=3), {}),
    "Latte": ("latte", published_weights.latte_weights, {}),
    "PixArt-α": ("pixart", lambda: published_weights.pixart_weights(scale=1.0), {}),
    "PixArt-α 1024": ("pixart", lambda: published_weights.pixart_weights(sized=True), {}),
    "PixArt-Σ": ("pixart", lambda: published_weights.pixart_weights(scale=0.5, norm=True, pooled=(1,)), {}),
    "PixArt, all pooled": ("pixart", lambda: published_weights.pixart_weights(pooled=(0, 1)), {}),
    "PixArt, windows": ("pixart", lambda: published_weights.pixart_weights(windowed=(0,)), {}),
    "STDiT v1": ("opensora-v1", published_weights.v1_weights, {}),
    "STDiT v1, slow": ("opensora-v1", lambda: published_weights.v1_weights(scales=(1.0, 0.75)), {}),
    "STDiT v1, oblong": ("opensora-v1", lambda: published_weights.v1_weights(grid=(3, 4, 6)), {}),
    "STDiT3": ("stdit3", published_weights.v3_weights, {}),
    "STDiT3, no norms": ("stdit3", lambda: published_weights.v3_weights(norm=False), {}),
    "Rineau": ("rineau", published_weights.rineau_weights, {}),
    "Rineau, no classes": ("rineau", lambda: published_weights.rineau_weights(classes=0), {}),
}


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    wrong = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ORIGINAL)
def test_original_weights_round_trip_bit_exactly(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    layout, make, _ = ORIGINAL[kind]
    state = {name: tensor.to(dtype) for name, tensor in make().items()}
    torch.save(state, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "new" / "folder" / "ours", overrides={"num_heads": 4})
    (tmp_path / "new" / "folder" / "ours").rename(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out.safetensors", layout)
    assert_same(load_file(tmp_path / "out.safetensors"), state)
    # And ours, from there, is ours.
    convert(tmp_path / "out.safetensors", tmp_path / "again", overrides={"num_heads": 4})
    again, ours = ("diffusion_pytorch_model.safetensors", "config.json")
    assert_same(load_file(tmp_path / "again" / again), load_file(tmp_path / "ours" / again))
    assert json.loads((tmp_path / "again" / ours).read_text()) == json.loads((tmp_path / "ours" / ours).read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HUB)
def test_diffusers_weights_round_trip_bit_exactly(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    options: list[dict[str, Any]] = [{}]
    if kind == "diffusers-sd3":
        options.append({"qk_norm": "rms_norm"})
    if kind == "diffusers-pixart":
        options += [{"use_additional_conditions": True}, {"interpolation_scale": 4}]
    for n, option in enumerate(options):
        theirs = HUB[kind](**option).to(dtype)
        theirs.save_pretrained(tmp_path / f"in{n}")
        convert(tmp_path / f"in{n}", tmp_path / f"ours{n}")
        for layout in (kind, "diffusers"):
            convert(tmp_path / f"ours{n}", tmp_path / f"out{n}", layout)
            back = type(theirs).from_pretrained(tmp_path / f"out{n}", torch_dtype=dtype)
            assert_same(back.state_dict(), theirs.state_dict())
            config = {k: v for k, v in theirs.config.items() if v is not None and not k.startswith("_")}
            changed = {k for k, v in config.items() if back.config[k] != v}
            assert changed <= {"dual_attention_layers"}  # () is [] in JSON


@pytest.mark.parametrize(("kind", "size"), [("diffusers-dit", 9), ("diffusers-pixart", 13), ("diffusers-sd3", 9)])
def test_a_latent_size_that_patches_do_not_fill_comes_back(tmp_path: Path, kind: str, size: int) -> None:
    theirs = HUB[kind](sample_size=size)
    theirs.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "ours")
    # What our own class reads and writes again still says so.
    STDiT.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    for ours in ("ours", "again"):
        convert(tmp_path / ours, tmp_path / "out", kind)
        back = type(theirs).from_pretrained(tmp_path / "out")
        assert back.config["sample_size"] == size
        assert_same(back.state_dict(), theirs.state_dict())
    # Of another grid it says nothing.
    convert(tmp_path / "ours", tmp_path / "out", kind, {"position_base": 8})
    assert type(theirs).from_pretrained(tmp_path / "out").config["sample_size"] == 16


@pytest.mark.parametrize("kind", ORIGINAL)
def test_the_layout_is_detected_from_keys_alone(kind: str) -> None:
    layout, make, _ = ORIGINAL[kind]
    state = make()
    assert detect_layout(state, "here").name == layout
    # One name less, and the missing one is what the error is about.
    assert detect_layout(list(state)[1:], "here").name == layout


def test_our_folder_loads_as_any_diffusers_model(tmp_path: Path) -> None:
    theirs = pixart()
    theirs.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "ours")
    model = STDiT.from_pretrained(tmp_path / "ours")
    assert model.settings == load_published(tmp_path / "in").settings
    assert_same(dict(model.state_dict()), dict(load_published(tmp_path / "in").state_dict()))


def test_diffusers_own_pipeline_class_reads_what_was_written(tmp_path: Path, tiny: Tiny, noise: Any) -> None:
    ours = tiny(temporal=False, text_dim=10, null_text="empty", position_base=4, learned_variance=True)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    theirs: Any = AutoModel.from_pretrained(str(tmp_path / "theirs"))
    x, words, t = noise(2, 3, 8, 12), noise(2, 5, 10), torch.tensor([1, 900])
    with torch.no_grad():
        a = ours(x[:, :, None], t, words).sample[:, :, 0]
        b = theirs(x, words, t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_dit_with_diffusers_frequencies_needs_an_override(tmp_path: Path) -> None:
    torch.save(published_weights.dit_weights(), tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "ours", overrides={"num_heads": 4})
    with pytest.raises(ValueError, match=r"timestep_freq_shift is 0; diffusers' DiT has 1"):
        convert(tmp_path / "ours", tmp_path / "theirs", "diffusers-dit")
    overrides = {"timestep_freq_shift": 1, "mlp_norm_eps": 1e-5}
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers-dit", overrides)
    found: Any = AutoModel.from_pretrained(str(tmp_path / "theirs"))
    assert found.config["norm_eps"] == 1e-5
    assert found.config["num_embeds_ada_norm"] == 5


# -------------------------------------------------------------------------------- files and folders


def wrapped(kind: str, state: State) -> dict[str, Any]:
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    averaged["pos_embed"] = state["pos_embed"]
    rest = {"opt": {"state": {}, "lr": 1e-4}, "args": argparse.Namespace(model="DiT-XL/2"), "step": 7}
    return {
        "bare": dict(state),
        "state_dict": {"state_dict": state, "epoch": 3},
        "DiT's training": {"model": state, "ema": averaged, **rest},
        "PixArt's training": {"state_dict": state, "state_dict_ema": averaged, "optimizer": {}, "epoch": 1},
        "module": {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "compiled blocks": {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in state.items()},
        "Lightning": {"state_dict": {f"net.{n}": t for n, t in state.items()}, "pytorch-lightning_version": "2.4.0"},
        "averaged only": {"ema": {"state_dict": {f"module.{n}": t for n, t in averaged.items()}}},
    }[kind]


KINDS = (
    "bare",
    "state_dict",
    "DiT's training",
    "PixArt's training",
    "module",
    "compiled",
    "compiled blocks",
    "Lightning",
)


@pytest.mark.parametrize("kind", [*KINDS, "averaged only"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_checkpoints_are_unwrapped(tmp_path: Path, kind: str, suffix: str) -> None:
    state = published_weights.dit_weights()
    torch.save(wrapped(kind, state), tmp_path / f"file{suffix}")
    averaged = kind in ("DiT's training", "PixArt's training", "averaged only")
    bias = state["t_embedder.mlp.0.bias"]
    found = load_published(tmp_path / f"file{suffix}", {"num_heads": 4}).state_dict()["t_embedder.mlp.0.bias"]
    assert torch.equal(found, bias + 1 if averaged else bias)
    if kind.endswith("training"):
        trained = load_published(tmp_path / f"file{suffix}", {"num_heads": 4}, ema=False)
        assert torch.equal(trained.state_dict()["t_embedder.mlp.0.bias"], bias)
    if kind == "averaged only":
        with pytest.raises(ValueError, match="no weights"):
            load_published(tmp_path / f"file{suffix}", {"num_heads": 4}, ema=False)


def test_sharded_folders_pipelines_and_lone_files_are_found(tmp_path: Path) -> None:
    theirs = pixart()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="100KB")
    assert (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    (tmp_path / "lone").mkdir()
    save_file(published_weights.v3_weights(), tmp_path / "lone" / "model.safetensors")
    (tmp_path / "lone" / "config.json").write_text(json.dumps({"model_type": "STDiT3", "input_sq_size": 256}))
    whole = dict(load_published(tmp_path / "pipeline").state_dict())
    assert_same(dict(load_published(tmp_path / "pickled").state_dict()), whole)
    file = tmp_path / "pickled" / "diffusion_pytorch_model.bin"
    assert_same(dict(load_published(file).state_dict()), whole)
    assert load_published(tmp_path / "lone").settings.position_reference == 256


@pytest.mark.parametrize("kind", HUB)
def test_diffusers_tensors_alone_need_only_the_grid(tmp_path: Path, kind: str) -> None:
    """Latte's own file of its text model has diffusers' names, too, and no config.json."""
    theirs = HUB[kind]()
    theirs.save_pretrained(tmp_path / "folder")
    torch.save({"ema": theirs.state_dict()}, tmp_path / "t2v.pt")
    overrides = {"num_heads": 4, "position_base": 4}
    with pytest.raises(ValueError, match=r"--set position_base="):
        load_published(tmp_path / "t2v.pt", {"num_heads": 4})
    alone, whole = load_published(tmp_path / "t2v.pt", overrides), load_published(tmp_path / "folder")
    ignored = {"position_frames": None}
    assert alone.settings.model_copy(update=ignored) == whole.settings.model_copy(update=ignored)
    assert_same(dict(alone.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("diffusers-dit", {"mlp_norm_eps": 1e-5, "gelu": "tanh"}),
        ("diffusers-pixart", {"norm_eps": 1e-6, "position_interpolation": 0.5}),
        ("diffusers-latte", {"norm_eps": 1e-6, "position_frames": 16}),
    ],
)
def test_what_diffusers_tensors_alone_leave_open_is_noted_until_it_is_set(
    tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    HUB[kind]().save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    assert "is assumed" not in str(convert(tmp_path / "folder", tmp_path / "ours"))
    (tmp_path / "folder" / "config.json").unlink()
    overrides = {"num_heads": 4, "position_base": 16}  # that of PixArt-α 256 and of PixArt-Σ 256, whose scale is 0.5
    said = str(convert(file, tmp_path / "ours", overrides=overrides))
    assert all(f"{key} " in said and f"change it with --set {key}=" in said for key in keys)
    done = convert(file, tmp_path / "ours", overrides=overrides | keys)
    assert "is assumed" not in str(done)
    assert all(getattr(done.settings, key) == value for key, value in keys.items())


OLDER = {
    # As facebook/DiT-XL-2-256, PixArt-alpha/PixArt-XL-2-512x512 and maxin-cn/Latte-1 have it.
    "diffusers-dit": ({"_class_name": "Transformer2DModel", "cross_attention_dim": None}, ("norm_eps",)),
    "diffusers-pixart": ({"_class_name": "Transformer2DModel"}, ("interpolation_scale", "use_additional_conditions")),
    "diffusers-latte": ({"_class_name": "LatteT2V", "attention_type": "default", "norm_num_groups": 32}, ()),
}


@pytest.mark.parametrize("kind", OLDER)
def test_older_folders_of_diffusers_are_read(tmp_path: Path, kind: str) -> None:
    HUB[kind]().save_pretrained(tmp_path)
    settings = load_published(tmp_path).settings
    new, absent = OLDER[kind]
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False}
    config |= {"use_linear_projection": False, "upcast_attention": False, **new}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))
    assert load_published(tmp_path).settings == settings


NULL_CAPTION = "caption_projection.y_embedding"


def with_null_caption(kind: str, folder: Path) -> Tensor:
    """Writes a folder of diffusers 0.22 to 0.25, with PixArt's learned null caption, which later classes do not
    have."""
    HUB[kind]().save_pretrained(folder)
    file, null = folder / "diffusion_pytorch_model.safetensors", torch.randn(120, 10)
    save_file(load_file(file) | {NULL_CAPTION: null}, file)
    return null


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("kind", "default"), [("diffusers-pixart", "sequence"), ("diffusers-latte", "empty")])
def test_the_null_caption_of_older_folders_is_used_or_dropped_and_a_note_says_which(
    tmp_path: Path, kind: str, default: str, alone: bool
) -> None:
    null = with_null_caption(kind, tmp_path / "old")
    source, sizes = tmp_path / "old", {}
    if alone:  # Latte's own t2v.pt
        source, sizes = tmp_path / "t2v.pt", {"num_heads": 4, "position_base": 4}
        torch.save({"ema": load_file(tmp_path / "old" / "diffusion_pytorch_model.safetensors")}, source)
    for choice in (None, "sequence", "empty"):
        done = convert(source, tmp_path / "ours", overrides=sizes | ({} if choice is None else {"null_text": choice}))
        state = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
        assert done.settings.null_text == (choice or default)
        if done.settings.null_text == "sequence":
            assert torch.equal(state["y_embedder.y_embedding"], null)
            assert done.settings.max_text_tokens == 120
        else:
            assert "y_embedder.y_embedding" not in state
        assert (NULL_CAPTION in str(done)) == (choice != "sequence")
    convert(tmp_path / "ours", tmp_path / "theirs", kind)  # the last one, without the learned null caption
    HUB[kind]().save_pretrained(tmp_path / "new")
    theirs = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("theirs", "new"))
    assert_same(*theirs)


def test_the_ema_weights_of_our_checkpoints_are_the_default(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny(temporal=False, conditioning="adaln_zero", num_classes=3, position_base=4)
    model.save_pretrained(tmp_path / "step-00000007" / "transformer")
    with torch.no_grad():
        model.get_parameter("t_embedder.mlp.0.bias").add_(1)
    model.save_pretrained(tmp_path / "step-00000007" / "transformer_ema")
    bias = model.state_dict()["t_embedder.mlp.0.bias"]
    for ema, expected in ((None, bias), (True, bias), (False, bias - 1)):
        done = convert(tmp_path / "step-00000007", tmp_path / "dit.pt", "dit", ema=ema)
        assert f"{'transformer' if ema is False else 'transformer_ema'} was taken" in str(done)
        found = torch.load(tmp_path / "dit.pt", weights_only=True)["t_embedder.mlp.0.bias"]
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_run_directory_is_its_newest_complete_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny(num_classes=3)
    for step in (1, 2, 3):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        with torch.no_grad():
            model.get_parameter("t_embedder.mlp.0.bias").fill_(step)
        model.save_pretrained(checkpoint / "transformer")
        if step < 3:  # the third was interrupted: its manifest is written last
            write_manifest(checkpoint, (checkpoint / "transformer").iterdir())
    assert load_published(tmp_path).state_dict()["t_embedder.mlp.0.bias"].unique().tolist() == [2]
    convert(tmp_path, tmp_path / "converted")
    assert STDiT.from_pretrained(tmp_path / "converted").settings == model.settings
    (tmp_path / "lora-run" / "lora").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"lora-run: a checkpoint of lora training has no full model"):
        load_published(tmp_path / "lora-run")


# -------------------------------------------------------------------------- what a file does not determine


def test_heads_are_those_of_the_published_size_or_an_override(tmp_path: Path) -> None:
    torch.save(published_weights.dit_weights(width=384, depth=12, grid=2), tmp_path / "s.pt")
    assert load_published(tmp_path / "s.pt").settings.num_heads == 6
    torch.save(published_weights.dit_weights(), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"hidden size 32 with 2 blocks.*--set num_heads="):
        load_published(tmp_path / "tiny.pt")
    torch.save(published_weights.v3_weights(heads=2), tmp_path / "v3.pt")
    assert load_published(tmp_path / "v3.pt").settings.num_heads == 2


ASSUMED: list[tuple[Callable[[], State], dict[str, Any], str]] = [
    (lambda: published_weights.dit_weights(width=384, depth=12, grid=2), {"num_heads": 12}, "num_heads 6 is assumed"),
    (published_weights.dit_weights, {"null_class": True}, "null_class True is assumed"),
    (published_weights.dit_weights, {"position_base": 4}, "of 4x4 patches: other grids are rescaled"),
    (
        published_weights.latte_weights,
        {"position_base": 4},
        "of 4x4 patches: patches of other grids are counted from 0",
    ),
    (published_weights.v1_weights, {"position_base": 4}, "of 4x4 patches: patches of other grids are counted from 0"),
    (
        published_weights.pixart_weights,
        {"kv_compress": 2, "kv_compress_sampling": "uniform"},
        "no key/value compression is assumed",
    ),
]


@pytest.mark.parametrize(("make", "overrides", "note"), ASSUMED)
def test_what_the_file_does_not_determine_is_noted_with_its_override_until_it_is_set(
    tmp_path: Path, make: Callable[[], State], overrides: dict[str, Any], note: str
) -> None:
    torch.save(make(), tmp_path / "x.pt")
    heads = {} if "num_heads" in overrides else {"num_heads": 4}
    said = str(convert(tmp_path / "x.pt", tmp_path / "ours", overrides=heads))
    assert note in said
    assert all(f"{key}=" in said for key in overrides)
    assert note not in str(convert(tmp_path / "x.pt", tmp_path / "ours", overrides=heads | overrides))


def test_windows_that_the_published_code_ignores_are_noted_in_both_directions(tmp_path: Path) -> None:
    torch.save(published_weights.pixart_weights(windowed=(0,)), tmp_path / "x.pth")
    note = "PixArt-α's released code ignores window_size 2 and relative positions"
    assert note in str(convert(tmp_path / "x.pth", tmp_path / "ours", overrides={"num_heads": 4}))
    assert note in str(convert(tmp_path / "ours", tmp_path / "back.pth", "pixart"))
    torch.save(published_weights.pixart_weights(), tmp_path / "y.pth")
    assert note not in str(convert(tmp_path / "y.pth", tmp_path / "plain", overrides={"num_heads": 4}))


@pytest.mark.parametrize("kind", [*KINDS, "averaged only"])
def test_a_note_names_which_of_several_weights_was_taken(tmp_path: Path, kind: str) -> None:
    torch.save(wrapped(kind, published_weights.dit_weights()), tmp_path / "x.pt")
    taken = {
        "DiT's training": "ema and model: ema",
        "PixArt's training": "state_dict_ema and state_dict: state_dict_ema",
    }
    said = str(convert(tmp_path / "x.pt", tmp_path / "ours", overrides={"num_heads": 4}))
    assert ("has weights under" in said) == (kind in taken)
    assert f"{taken.get(kind, '')}" in said


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0, 1.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_read_off_the_table(tmp_path: Path, scale: float, dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) for n, t in published_weights.pixart_weights(grid=16, scale=scale).items()}
    torch.save(state, tmp_path / "x.pth")
    c = load_published(tmp_path / "x.pth", {"num_heads": 4}).settings
    assert (c.positions, c.position_base, c.position_interpolation) == ("sincos", 16, scale)


def test_tables_of_lower_precision_are_still_recognised(tmp_path: Path) -> None:
    state = published_weights.pixart_weights(grid=16)
    state["pos_embed"] = state["pos_embed"].half().float()
    torch.save(state, tmp_path / "x.pth")
    assert load_published(tmp_path / "x.pth", {"num_heads": 4}).settings.positions == "sincos"


def test_a_table_that_is_no_sine_and_cosine_is_kept_as_learned(tmp_path: Path) -> None:
    state = published_weights.dit_weights()
    state["pos_embed"] = state["pos_embed"] + 0.01 * torch.randn(state["pos_embed"].shape)
    torch.save(state, tmp_path / "x.pt")
    done = convert(tmp_path / "x.pt", tmp_path / "ours", overrides={"num_heads": 4})
    assert done.settings.positions == "learned"
    assert "learned positions" in str(done)
    convert(tmp_path / "ours", tmp_path / "back.pt", "dit")
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), state)


def test_a_file_without_positions_needs_overrides(tmp_path: Path) -> None:
    state = published_weights.pixart_weights(grid=16)
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"no pos_embed.*--set position_base=… position_interpolation=…"):
        load_published(tmp_path / "x.pth", {"num_heads": 4})
    overrides = {"num_heads": 4, "position_base": 16, "position_interpolation": 2}
    model = load_published(tmp_path / "x.pth", overrides)
    found = export(model, "pixart")
    assert torch.equal(found.pop("pos_embed"), published_weights.plane_code(48, 16, 16, 16, 2.0))
    assert_same(found, state)


def test_positions_other_than_the_files_are_refused(tmp_path: Path) -> None:
    torch.save(published_weights.pixart_weights(grid=16), tmp_path / "x.pth")
    with pytest.raises(
        ValueError,
        match="pos_embed is not the table that the config determines .position_base 16, position_interpolation 4.0",
    ):
        load_published(tmp_path / "x.pth", {"num_heads": 4, "position_base": 16, "position_interpolation": 4})


# ------------------------------------------------------------------------------------- command line


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_converts_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": published_weights.pixart_weights()}, tmp_path / "in.pth")
    run(tmp_path / "in.pth", "--to", tmp_path / "ours", "--set", "num_heads=4")
    assert "PixArt -> stdit" in capsys.readouterr().out
    run(tmp_path / "ours", "--to", tmp_path / "out.pth", "--layout", "pixart")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_same(found["state_dict"], published_weights.pixart_weights())


def test_the_commands_errors_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.pth", "--to", tmp_path / "x") == 2
    said = capsys.readouterr().err
    assert "none.pth: no such file or folder" in said
    assert said.count("\n") == 1


def test_every_layout_is_named_once() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
