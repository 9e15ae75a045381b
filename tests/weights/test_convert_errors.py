"""What conversion refuses: unknown keys, wrong shapes, unsupported values, files that are not weights."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import pickle
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from stdit.models.stdit import STDiT
from stdit.weights.convert import convert, export, load_published, main
from stdit.weights.state_dict import read_file
from tests.support import published_weights
from tests.support.diffusers_models import dit, latte, pixart, sd3

Tiny = Callable[..., STDiT]
HEADS = {"num_heads": 4}


def saved(state: dict[str, Any], folder: Path) -> Path:
    path = folder / "weights.pt"
    torch.save(state, path)
    return path


# ------------------------------------------------------------------------------------ names, shapes


def test_names_that_are_missing_unknown_or_misshapen_are_all_listed(tmp_path: Path) -> None:
    state = published_weights.dit_weights(depth=3)
    for i in range(3):
        del state[f"blocks.{i}.attn.proj.bias"]
    del state["t_embedder.mlp.2.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(3)
    state["blocks.0.mlp.fc2.bias"] = torch.zeros(7)
    state["final_layer.linear.bias"] = torch.zeros(24, dtype=torch.int64)
    with pytest.raises(ValueError, match="weights.pt: the state dict does not match its layout") as caught:
        load_published(saved(state, tmp_path), HEADS)
    message = str(caught.value)
    assert "missing: t_embedder.mlp.2.bias, blocks.*.attn.proj.bias (3)" in message
    assert "unknown: blocks.1.attn.extra" in message
    assert "blocks.0.mlp.fc2.bias (7,), expected (32,)" in message
    assert "not dense floating-point: final_layer.linear.bias torch.int64" in message


@pytest.mark.parametrize(
    "name",
    ["x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight", "t_embedder.mlp.0.weight"],
)
def test_a_missing_tensor_is_named_whichever_it_is(tmp_path: Path, name: str) -> None:
    state = published_weights.dit_weights()
    del state[name]
    with pytest.raises(ValueError, match=f"missing: {name}"):
        load_published(saved(state, tmp_path), HEADS)


def test_a_block_that_is_missing_altogether_is_named(tmp_path: Path) -> None:
    state = {n: t for n, t in published_weights.dit_weights(depth=3).items() if not n.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"numbered up to 2, but some are missing\s+missing: blocks\.1$"):
        load_published(saved(state, tmp_path), HEADS)


def test_a_number_of_blocks_that_no_file_has_is_not_built(tmp_path: Path) -> None:
    state = published_weights.dit_weights() | {"blocks.999999999.attn.qkv.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"missing: blocks\.2, blocks\.3"):
        load_published(saved(state, tmp_path), HEADS)


MALFORMED: list[tuple[Callable[[], dict[str, Tensor]], str, tuple[int, ...]]] = [
    (published_weights.dit_weights, "x_embedder.proj.weight", (3,)),
    (published_weights.dit_weights, "pos_embed", ()),
    (published_weights.dit_weights, "pos_embed", (1, 0, 32)),
    (published_weights.dit_weights, "y_embedder.embedding_table.weight", ()),
    (published_weights.dit_weights, "final_layer.linear.weight", (24,)),
    (published_weights.latte_weights, "temp_embed", (4, 32)),
    (lambda: published_weights.pixart_weights(pooled=(1,)), "blocks.1.attn.sr.weight", (3,)),
    (lambda: published_weights.pixart_weights(windowed=(1,)), "blocks.1.attn.rel_pos_h", ()),
    (published_weights.pixart_weights, "y_embedder.y_proj.fc1.weight", (10,)),
    (published_weights.pixart_weights, "y_embedder.y_embedding", ()),
    (published_weights.rineau_weights, "first_layer.patchify.projection.weight", (16,)),
    (published_weights.rineau_weights, "first_layer.pos_embed", (16, 32)),
    (published_weights.v3_weights, "spatial_blocks.0.mlp.fc1.weight", ()),
]


@pytest.mark.parametrize(("make", "name", "size"), MALFORMED)
def test_a_tensor_with_other_axes_is_named(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]], name: str, size: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + " has the wrong shape"):
        load_published(saved(make() | {name: torch.zeros(size)}, tmp_path), {} if "spatial" in name else HEADS)


@pytest.mark.parametrize("overrides", [HEADS, {**HEADS, "positions": "learned", "position_grid": (4, 4)}])
def test_a_table_that_is_not_finite_is_refused(tmp_path: Path, overrides: dict[str, Any]) -> None:
    state = published_weights.dit_weights()
    state["pos_embed"][0, 0, :3] = float("nan")
    with pytest.raises(ValueError, match=r"weights\.pt: pos_embed has 3 non-finite values of 512"):
        load_published(saved(state, tmp_path), overrides)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_converted(tmp_path: Path, value: float) -> None:
    state = published_weights.dit_weights()
    state["blocks.0.mlp.fc1.weight"][0, 0] = value
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight and 1 more tensors hold NaN or infinity"):
        convert(saved(state, tmp_path), tmp_path / "out", overrides=HEADS)
    assert not (tmp_path / "out").exists()


SET: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": [2, 2, 2]}, r"patch_size is \(2, 2, 2\); DiT has square patches"),
    ({"patch_size": [1, 2, 4]}, r"patch_size is \(1, 2, 4\); DiT has square patches"),
    ({"mlp": "swiglu"}, "mlp is 'swiglu'; DiT has 'gelu'"),
    ({"conditioning": "adaln_single"}, r"missing: t_block\.1\.weight"),
    ({"temporal": True}, r"missing: blocks\.\*\.attn_temp"),
    ({"qk_norm": "rms"}, "qk_norm|missing"),
    ({"position_interpolation": float("inf")}, "position_interpolation"),
]


@pytest.mark.parametrize(("overrides", "said"), SET)
def test_what_is_set_against_the_layout_is_named_with_both_values(
    tmp_path: Path, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=r"weights\.pt: [\s\S]*" + said):
        convert(saved(published_weights.dit_weights(), tmp_path), tmp_path / "out", overrides={**HEADS, **overrides})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", [{"position_grid": 4}, {"position_grid": ["a", "b"]}, {"in_channels": None}])
def test_what_is_set_of_rineaus_is_checked(tmp_path: Path, overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"weights\.pt: [\s\S]*{next(iter(overrides))}"):
        load_published(saved(published_weights.rineau_weights(), tmp_path), {**HEADS, **overrides})


def test_patches_that_are_not_square_are_refused(tmp_path: Path) -> None:
    state = published_weights.dit_weights()
    wide = {"final_layer.linear.weight": (48, 32), "final_layer.linear.bias": (48,)}
    state |= {n: torch.zeros(s) for n, s in {**wide, "x_embedder.proj.weight": (32, 3, 2, 4)}.items()}
    with pytest.raises(ValueError, match=r"patch_size is \(1, 2, 4\); DiT has square patches"):
        load_published(saved(state, tmp_path), HEADS)


def test_tensors_without_values_are_named(tmp_path: Path) -> None:
    state = published_weights.dit_weights() | {"blocks.0.attn.proj.weight": torch.empty(32, 32, device="meta")}
    with pytest.raises(ValueError, match=r"weights\.pt: .*meta device.*: blocks\.0\.attn\.proj\.weight"):
        load_published(saved(state, tmp_path), HEADS)


def test_weights_of_no_known_layout_are_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no known layout .*down_blocks\.0\.weight"):
        load_published(saved({"down_blocks.0.weight": torch.zeros(2)}, tmp_path))


def test_outputs_that_are_neither_noise_nor_noise_and_variance_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 outputs a patch; with 12 inputs it has 12, or 24"):
        load_published(saved(published_weights.dit_weights(outputs=4), tmp_path), HEADS)


def test_copies_in_dits_blocks_have_to_agree(tmp_path: Path) -> None:
    theirs = dit()
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight[0, 0] += 1e-3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"differs from its copies: transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    ):
        load_published(tmp_path)


def test_channels_of_rineaus_patches_are_assumed_aloud_or_asked_for(tmp_path: Path) -> None:
    done = convert(saved(published_weights.rineau_weights(), tmp_path), tmp_path / "ours", overrides=HEADS)
    assert "in_channels 4 is assumed" in str(done)
    for channels in (1, 3):
        path = saved(published_weights.rineau_weights(channels=channels), tmp_path)
        with pytest.raises(ValueError, match="--set in_channels="):
            load_published(path, HEADS)
        assert load_published(path, {**HEADS, "in_channels": channels}).settings.patch_size == (1, 2, 2)


def test_overrides_are_checked(tmp_path: Path) -> None:
    path = saved(published_weights.dit_weights(), tmp_path)
    with pytest.raises(ValueError, match="heads_: unknown key"):
        load_published(path, {**HEADS, "heads_": 3})
    with pytest.raises(ValueError, match="hidden_size 32 is not divisible by num_heads 5"):
        load_published(path, {"num_heads": 5})
    with pytest.raises(ValueError, match="unknown: y_embedder.embedding_table.weight"):
        load_published(path, {**HEADS, "num_classes": None})


# ------------------------------------------------------------------------------------------- files


class Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, old: bool) -> None:
    state = {**published_weights.dit_weights(), "payload": Harmful(f"touch {tmp_path}/ran")}
    path = tmp_path / "harmful.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"harmful.pt: refused: .*system"):
        load_published(path, HEADS)
    path.write_bytes(pickle.dumps(state["payload"]))
    with pytest.raises(ValueError, match="harmful.pt: "):
        load_published(path, HEADS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    state = published_weights.dit_weights()
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"hello, these are no weights\n",
        whole[: len(whole) // 2],
        whole[:-100],
        whole[:10],
        os.urandom(4096),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"file{suffix}"):
            load_published(path, HEADS)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_flipped_bit_in_a_file_that_we_wrote_is_noticed_or_changes_no_tensor(tmp_path: Path, suffix: str) -> None:
    convert(saved(published_weights.dit_weights(), tmp_path), tmp_path / "ours", overrides=HEADS)
    file = tmp_path / f"file{suffix}"
    convert(tmp_path / "ours", file, "dit")
    expected, whole = read_file(file), file.read_bytes()
    header = int.from_bytes(whole[:8], "little") if suffix == ".safetensors" else 0
    noticed = 0
    for place in {*range(0, header, 7), *range(header, len(whole), len(whole) // 150)}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert_equal(read_file(file), expected)
        except ValueError:
            noticed += 1
    assert noticed > 130  # the rest is padding and names of parts
    # The last byte of a tensor, by its name.
    place = whole.index(next(iter(expected.values())).numpy().tobytes())
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=rf"file{suffix}: .* (stdit_sha256|CRC-32).*: the file is damaged"):
        load_published(file, HEADS)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_without_a_digest_or_checksums_are_read(tmp_path: Path) -> None:
    state = published_weights.dit_weights()
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert_equal(read_file(tmp_path / name), state)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def torch_file(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


TENSORS = {"blocks.0.weight": torch.zeros(64)}
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "HTML": (lambda: b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "html in capitals": (lambda: b"<HTML>", "an HTML page"),
    "XML": (lambda: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML file"),
    "text": (lambda: b"hello, these are no weights\n", "a text file"),
    "text of another alphabet": (lambda: ("重み" * 9000).encode(), "a text file"),
    "JSON": (lambda: b'{"a": 1}', "a text file"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "gzip": (lambda: gzip.compress(torch_file(TENSORS)), "a gzip archive"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "safetensors": (lambda: save(TENSORS), "a safetensors file: give it the suffix .safetensors"),
    "TorchScript": (torchscript, "a TorchScript archive"),
    "cut archive": (lambda: cut(torch_file(TENSORS)), "damaged or cut short"),
    "cut, of old": (lambda: cut(torch_file(TENSORS, _use_new_zipfile_serialization=False)), "refused: damaged"),
    "model": (lambda: torch_file(torch.nn.Linear(2, 2)), "refused.*torch.nn.modules.linear.Linear"),
    "date": (lambda: torch_file({**TENSORS, "at": datetime.datetime(2024, 1, 1)}), "refused.*datetime.datetime"),
    "NumPy": (lambda: torch_file({**TENSORS, "n": np.float64(1)}), "refused.*numpy"),
    "pickle": (lambda: pickle.dumps(TENSORS), "not a valid weight file: damaged, or not written by torch.save"),
    "noise": (lambda: bytes(range(256)) * 16, "not a valid weight file: damaged, or not written by torch.save"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_weights_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, expected = FOREIGN[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=rf"weights\.pt: {expected}") as caught:
        load_published(path)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search("weights_only|weights only|\x1b|torch.load", message, re.IGNORECASE)


def test_stdit2_is_named_as_not_supported(tmp_path: Path) -> None:
    state = published_weights.v1_weights() | {"blocks.0.scale_shift_table_temporal": torch.zeros(3, 32)}
    for name in ("t_block_temp.1.weight", "fl_embedder.mlp.0.weight"):
        state[name] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"weights\.pt: weights of Open-Sora STDiT2 \(1\.1\), which is not supported"):
        load_published(saved(state, tmp_path), HEADS)


@pytest.mark.parametrize(
    "make", [published_weights.pixart_weights, published_weights.v1_weights, published_weights.v3_weights]
)
def test_a_file_without_a_null_caption_names_the_override_that_works(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]]
) -> None:
    state = make()
    del state["y_embedder.y_embedding"]
    path = saved(state, tmp_path)
    with pytest.raises(ValueError, match=r"weights\.pt: no y_embedder\.y_embedding.*--set null_text=empty"):
        load_published(path, HEADS)
    assert load_published(path, {**HEADS, "null_text": "empty"}).settings.max_text_tokens == 300


def test_things_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("list", [torch.zeros(2)]),
        ("empty", {}),
        ("numbers", {"a.b": 3}),
        ("deep", {"x": {"a.b": torch.zeros(2)}}),
    ):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{name}.pt: "):
            load_published(path)
    torch.save({**published_weights.dit_weights(), "step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"values that are not tensors: step \(int\)"):
        load_published(tmp_path / "step.pt", HEADS)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="not a weight file by its suffix"):
        load_published(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_published(tmp_path / "nowhere")


def test_folders_without_one_choice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights in this folder"):
        load_published(tmp_path)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="2 weight files; give one of them: a.pt, b.safetensors"):
        load_published(tmp_path)


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    theirs = pixart()
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    index = tmp_path / "in" / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = next(iter(listed["weight_map"]))
    for place in ("../elsewhere.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({**listed, "weight_map": {**listed["weight_map"], first: place}}))
        with pytest.raises(ValueError, match=r"is not a file in the same folder"):
            load_published(tmp_path / "in")
    index.write_text(
        json.dumps({**listed, "weight_map": {**listed["weight_map"], "ghost": listed["weight_map"][first]}})
    )
    with pytest.raises(ValueError, match="not in the files that it lists: ghost"):
        load_published(tmp_path / "in")


# -------------------------------------------------------------------------------- diffusers' config values

UNSUPPORTED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (dit, {"norm_type": "ada_norm"}, "norm_type: 'ada_norm'"),
    (dit, {"activation_fn": "geglu"}, "activation_fn: 'geglu'"),
    (dit, {"attention_bias": False}, "attention_bias: False; supported: True"),
    (dit, {"norm_elementwise_affine": True}, "norm_elementwise_affine: True"),
    (dit, {"out_channels": 5}, "out_channels: 5"),
    (dit, {"dropout": 0.1}, "dropout: 0.1"),
    (dit, {"new_switch": 1}, "new_switch: 1, a key that DiTTransformer2DModel does not have"),
    (dit, {"patch_size": None}, "patch_size: None"),
    (pixart, {"cross_attention_dim": 64}, "cross_attention_dim: 64; supported: 48"),
    (pixart, {"caption_channels": None}, "caption_channels: None"),
    (pixart, {"activation_fn": "gelu"}, "activation_fn: 'gelu'"),
    (pixart, {"attention_type": "gated"}, "attention_type: 'gated'"),
    (
        pixart,
        {"interpolation_scale": "x"},
        "config.json of PixArtTransformer2DModel has unsupported values:\n  interpolation_scale: 'x'",
    ),
    (pixart, {"interpolation_scale": -1.0}, "interpolation_scale: -1.0; expected a positive number"),
    (dit, {"norm_eps": [1]}, "norm_eps: [1]"),
    (latte, {"norm_type": "layer_norm"}, "norm_type: 'layer_norm'"),
    (latte, {"attention_bias": False}, "attention_bias: False"),
    (sd3, {"dual_attention_layers": [0, 1]}, "dual_attention_layers: [0, 1]; supported: ()"),
    (sd3, {"qk_norm": "layer_norm"}, "qk_norm: 'layer_norm'"),
    (sd3, {"caption_projection_dim": 16}, "caption_projection_dim: 16"),
    (sd3, {"pos_embed_max_size": None}, "pos_embed_max_size: None"),
]


@pytest.mark.parametrize(("make", "changes", "expected"), UNSUPPORTED)
def test_unsupported_values_of_diffusers_are_named(
    tmp_path: Path, make: Callable[..., Any], changes: dict[str, Any], expected: str
) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match="unsupported values") as caught:
        load_published(tmp_path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("value", "name"), [(float("inf"), "Infinity"), (float("nan"), "NaN")])
def test_a_config_with_a_number_that_json_has_not_is_refused(tmp_path: Path, value: float, name: str) -> None:
    pixart().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": value}))
    with pytest.raises(ValueError, match=rf"config\.json: {name} is not a JSON number"):
        load_published(tmp_path)


def test_diffusers_tensors_need_the_config_of_their_class(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(ValueError, match="those of DiTTransformer2DModel; config.json says PixArtTransformer2DModel"):
        load_published(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="without a config.json of that class beside them"):
        load_published(tmp_path)


# ----------------------------------------------------------------------------- what a layout cannot represent

PLAIN_DIT = {"temporal": False, "conditioning": "adaln_zero", "num_classes": 3, "position_base": 4}
PLAIN_PIXART = {"temporal": False, "text_dim": 10, "position_base": 4, "null_text": "sequence"}
UNREPRESENTABLE: list[tuple[str, dict[str, Any], str]] = [
    ("dit", {**PLAIN_DIT, "text_dim": 10}, "text_dim is 10; DiT has None"),
    ("dit", {**PLAIN_DIT, "gelu": "erf"}, "gelu is 'erf'; DiT has 'tanh'"),
    ("dit", {**PLAIN_DIT, "temporal": True}, "temporal is True; DiT has False"),
    ("dit", {**PLAIN_DIT, "conditioning": "adaln_single"}, "conditioning is 'adaln_single'; DiT has 'adaln_zero'"),
    ("dit", {**PLAIN_DIT, "position_base": None}, "position_base is None"),
    ("dit", {**PLAIN_DIT, "positions": "rope"}, "positions is 'rope'"),
    ("dit", {**PLAIN_DIT, "mlp": "swiglu"}, "mlp is 'swiglu'; DiT has 'gelu'"),
    ("dit", {**PLAIN_DIT, "patch_size": (1, 2, 4)}, "patch_size is (1, 2, 4)"),
    ("dit", {**PLAIN_DIT, "timestep_freq_shift": 1}, "timestep_freq_shift is 1; DiT has 0"),
    ("pixart", {**PLAIN_PIXART, "temporal": True}, "temporal is True; PixArt has False"),
    ("pixart", {**PLAIN_PIXART, "null_text": "token"}, "null_text is 'token'; PixArt has 'sequence'"),
    ("pixart", {**PLAIN_PIXART, "micro_conditions": ("fps",)}, "micro_conditions is ('fps',)"),
    ("pixart", {**PLAIN_PIXART, "cross_qk_norm": "rms"}, "cross_qk_norm is 'rms'; PixArt has None"),
    ("diffusers-pixart", {**PLAIN_PIXART, "qk_norm": "layer"}, "qk_norm is 'layer'; diffusers' PixArt has None"),
    ("diffusers-pixart", PLAIN_PIXART, "--set null_text=empty"),
    ("diffusers-pixart", {**PLAIN_PIXART, "kv_compress": 2}, "kv_compress is 2"),
    ("diffusers-pixart", {**PLAIN_PIXART, "mlp_ratio": 2.0}, "mlp_ratio is 2.0; diffusers' PixArt has 4.0"),
    ("diffusers-latte", {**PLAIN_PIXART, "attention": "alternating", "temporal": True}, "temporal_text is True"),
    ("diffusers", {**PLAIN_DIT, "positions": "learned", "position_grid": (4, 4)}, "positions is 'learned'"),
    ("opensora-v1", {**PLAIN_PIXART, "temporal": True}, "temporal_norm is True; Open-Sora STDiT v1 has False"),
    ("stdit3", PLAIN_PIXART, "attention is 'factorized'; Open-Sora STDiT3 has 'alternating'"),
    ("rineau", PLAIN_DIT, "positions is 'sincos'; J. Rineau's DiT has 'learned'"),
    ("diffusers-sd3", PLAIN_PIXART, "conditioning is 'adaln_single'; diffusers' SD3 has 'joint'"),
]


@pytest.mark.parametrize(("layout", "changes", "expected"), UNREPRESENTABLE)
def test_what_a_layout_cannot_represent_is_named_with_both_values(
    tiny: Tiny, layout: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match="cannot represent this model") as caught:
        export(tiny(**changes), layout)
    assert expected in str(caught.value)


def test_the_null_caption_is_left_out_when_asked(tmp_path: Path, tiny: Tiny) -> None:
    tiny(**PLAIN_PIXART).save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", "diffusers", {"null_text": "empty"})
    assert "y_embedder.y_embedding is dropped" in str(done)


# --------------------------------------------------------------------------------------------- out


def test_out_is_never_something_else_than_weights(tmp_path: Path, tiny: Tiny) -> None:
    tiny(**PLAIN_DIT).save_pretrained(tmp_path / "ours")
    ours = tmp_path / "ours"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    state: dict[str, Tensor] = published_weights.dit_weights()
    source = saved(state, tmp_path)
    for out, layout, expected in (
        (tmp_path / "home", None, "has files other than weights .thesis.tex."),
        (tmp_path, None, "would replace the source"),
        (source, None, "would replace the source"),
        (tmp_path / "x.pt", None, "is a folder with config.json and weights, not a file"),
        (tmp_path / "x", "dit", "is one file"),
        (tmp_path / "home" / "thesis.tex", None, "is a file"),
        (tmp_path / "y", "dat", "unknown layout 'dat'; available: stdit, diffusers, dit"),
    ):
        with pytest.raises(ValueError, match=expected):
            convert(source, out, layout, HEADS)
    with pytest.raises(ValueError, match="already in our own layout"):
        convert(ours, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "ours", "weights.pt"]
    # A conversion that was made before is replaced.
    for _ in range(2):
        convert(source, tmp_path / "again", overrides=HEADS)
        convert(ours, tmp_path / "again.pt", "dit")


def test_nothing_is_written_when_the_source_is_refused(tmp_path: Path) -> None:
    state = published_weights.dit_weights()
    del state["t_embedder.mlp.2.bias"]
    with pytest.raises(ValueError, match="missing"):
        convert(saved(state, tmp_path), tmp_path / "out", overrides=HEADS)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]


UNRELATED: list[dict[str, str]] = [
    {"config.json": '{"other": 1}'},
    {"config.json": '{"_class_name": "STDiT"}'},
    {"config.json": '{"_class_name": "STDiT"}', "diffusion_pytorch_model.safetensors": "x"},
    {"config.json": '{"_class_name": "UNet"}', "diffusion_pytorch_model.safetensors": "x"},
    {"config.json": "{", "diffusion_pytorch_model.safetensors": "x"},
    {"diffusion_pytorch_model.safetensors": "x"},
    {
        "config.json": '{"_class_name": "STDiT"}',
        "diffusion_pytorch_model.safetensors": "x",
        "diffusion_pytorch_model-precious.bin": "x",
    },
    {
        "config.json": '{"_class_name": "STDiT"}',
        "diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "mine.txt"}}',
        "mine.txt": "x",
    },
]


@pytest.mark.parametrize("files", UNRELATED)
def test_a_folder_is_replaced_only_if_a_conversion_wrote_it(tmp_path: Path, files: dict[str, str]) -> None:
    source, out = saved(published_weights.dit_weights(), tmp_path), tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_text(content)
    with pytest.raises(ValueError, match="has files other than weights") as caught:
        convert(source, out, overrides=HEADS)
    assert any(name in str(caught.value) for name in files)
    assert {p.name: p.read_text() for p in out.iterdir()} == files


def test_a_conversion_in_pieces_is_replaced_and_a_foreign_file_is_not(tmp_path: Path) -> None:
    source, out = saved(published_weights.dit_weights(), tmp_path), tmp_path / "out"
    convert(source, out, overrides=HEADS)
    (out / "diffusion_pytorch_model.safetensors").unlink()
    load_published(source, HEADS).save_pretrained(out, max_shard_size="50KB")
    assert len(list(out.iterdir())) > 3
    convert(source, out, overrides=HEADS)
    files = ["config.json", "diffusion_pytorch_model.safetensors", "manifest.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    torch.save({"thesis": 1}, tmp_path / "mine.pt")
    torch.save(published_weights.dit_weights(), published := tmp_path / "published.pt")
    for file in (tmp_path / "mine.pt", published):
        before = file.read_bytes()
        with pytest.raises(ValueError, match=rf"{file.name}: exists and is not an earlier conversion"):
            convert(out, file, "dit")
        assert file.read_bytes() == before
    theirs, settings = tmp_path / "diffusers", {**HEADS, "timestep_freq_shift": 1, "mlp_norm_eps": 1e-5}
    for _ in range(2):
        convert(source, theirs, "diffusers-dit", settings)
    (theirs / "manifest.json").unlink()  # as others publish it
    with pytest.raises(ValueError, match="has files other than weights"):
        convert(source, theirs, "diffusers-dit", settings)


def test_links_and_places_under_files_are_refused(tmp_path: Path) -> None:
    source = saved(published_weights.dit_weights(), tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("gone")
    for out, expected in (
        (tmp_path / "link", "link: is a symbolic link to real"),
        (tmp_path / "dangling", "dangling: is a symbolic link to gone"),
        (source / "out", r"out: .*weights\.pt is not a folder"),
        (source / "a" / "b", r"b: .*weights\.pt is not a folder"),
        (tmp_path / "dangling" / "out", "dangling is not a folder"),
    ):
        with pytest.raises(ValueError, match=expected):
            convert(source, out, overrides=HEADS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "real", "weights.pt"]
    assert not list((tmp_path / "real").iterdir())


def test_the_command_says_errors_in_a_line_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(published_weights.dit_weights(), tmp_path)
    assert main([str(source), "--to", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source}: the file does not determine the number of heads")


def test_an_earlier_conversion_is_kept_where_the_new_one_does_not_fit_onto_the_disk(tmp_path: Path) -> None:
    source, out = saved(published_weights.dit_weights(), tmp_path), tmp_path / "new"
    arguments = [str(source), "--to", str(out), "--set", "num_heads=4"]
    assert main(arguments) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes of a file
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "weights.pt"]
