"""Laws of autoencoders, on tiny random models of the diffusers classes, saved to a folder and loaded from it."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.config import Bucket, ConfigError, VideoEncoderConfig
from stdit.encoders.video import PixelAutoencoder, VideoEncoder, load_video_encoder, video_encoder_from_identity

# The package exports its classes at run time, which a type checker doesn't see.
diffusers: Any = importlib.import_module("diffusers")

KL = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
IMAGE: dict[str, tuple[type, dict[str, Any]]] = {
    "kl": (diffusers.AutoencoderKL, KL),
    "kl_shift": (diffusers.AutoencoderKL, {**KL, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "kl_per_channel": (
        diffusers.AutoencoderKL,
        {**KL, "scaling_factor": 0.5, "latents_mean": (-1.6, 1.1, 3.3, -2.6), "latents_std": (8.4, 5.9, 6.6, 5.2)},
    ),
    "dc": (
        diffusers.AutoencoderDC,
        {
            "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": [1, 1], "downsample_block_type": "conv", "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41407,
        },
    ),
    "tiny": (
        diffusers.AutoencoderTiny,
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    ),
}  # fmt: skip
COGVIDEOX = {
    "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_height": 32, "sample_width": 32,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}  # fmt: skip
WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [-0.7, 0.2, 1.5, 0.1],
    "latents_std": [2.8, 1.4, 2.3, 2.6],
}
LTX = {
    "latent_channels": 8, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "layers_per_block": (1, 1, 1), "patch_size": 2,
    "down_block_types": ("LTXVideoDownBlock3D",) * 2, "decoder_layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False), "decoder_inject_noise": (False, False, False), "scaling_factor": 0.9,
}  # fmt: skip
VIDEO: dict[str, tuple[type, dict[str, Any]]] = {
    "cogvideox": (diffusers.AutoencoderKLCogVideoX, COGVIDEOX),
    "wan": (diffusers.AutoencoderKLWan, WAN),
    "wan_2_2": (
        diffusers.AutoencoderKLWan,
        {**WAN, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    ),
    "ltx": (diffusers.AutoencoderKLLTXVideo, LTX),
    "ltx_timestep": (diffusers.AutoencoderKLLTXVideo, {**LTX, "timestep_conditioning": True, "decoder_inject_noise": (True, True, False)}),
    "mochi": (
        diffusers.AutoencoderKLMochi,
        {
            "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": (1, 1, 1, 1, 1),
            "latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (0.9, 0.8, 1.1, 1.0),
        },
    ),
    "hunyuan": (
        diffusers.AutoencoderKLHunyuanVideo,
        {
            "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False,
        },
    ),
}  # fmt: skip
ALL = {**IMAGE, **VIDEO}


def build(name: str) -> Any:
    """A tiny random model; LTX gets statistics other than 0 and 1, as its published weights have."""
    cls, settings = ALL[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vae = cls(**settings).eval()
    if "latents_mean" in vae._buffers:
        vae.latents_mean.copy_(torch.linspace(-1, 1, len(vae.latents_mean)))
        vae.latents_std.copy_(torch.linspace(0.5, 2, len(vae.latents_std)))
    return vae


def clip(encoder: VideoEncoder, frames: int = 2, side: int = 32, count: int = 2) -> Tensor:
    """Random pixels whose size the compression divides: (count, 3, 1 + frames * t, side, side)."""
    t = 1 + frames * encoder.compression[0]
    return torch.rand((count, 3, t, side, side), generator=torch.Generator().manual_seed(1)) * 2 - 1


def saved(folder: Path, name: str) -> VideoEncoderConfig:
    build(name).save_pretrained(folder)
    return VideoEncoderConfig(kind="image" if name in IMAGE else "video", path=str(folder))


def own_statistics(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """(mean, divisor) as the class's pipeline writes them: SDXL's, SD3's, Wan's, LTX's lines."""
    mean, std = (
        getattr(vae, k, None) if k in vae._buffers else vae.config.get(k) for k in ("latents_mean", "latents_std")
    )
    factor = vae.config.get("scaling_factor", 1.0)
    if mean is None:
        return vae.config.get("shift_factor") or 0.0, 1 / factor
    return torch.as_tensor(mean).view(1, -1, 1, 1, 1), torch.as_tensor(std).view(1, -1, 1, 1, 1) / factor


@pytest.mark.parametrize("name", ALL)
def test_encode_normalise_denormalise_decode_agrees_with_the_classs_own(name: str, tmp_path: Path) -> None:
    config = saved(tmp_path, name)
    encoder, vae = load_video_encoder(config), build(name)
    pixels = clip(encoder)
    mean, std = encoder.encode(pixels)

    def own(f: Any, x: Tensor) -> Tensor:
        """The class's own function; frame after frame for an image autoencoder."""
        return torch.stack([f(frame) for frame in x.unbind(2)], 2) if config.kind == "image" else f(x)

    def encode(x: Tensor) -> Tensor:
        output = vae.encode(x)
        return output[0] if std is None else output.latent_dist.mean

    def decode(z: Tensor) -> Tensor:
        time = (torch.zeros(len(z)),) if vae.config.get("timestep_conditioning") else ()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # for a decoder that injects noise
            return vae.decode(z, *time).sample

    with torch.no_grad():
        torch.testing.assert_close(mean, own(encode, pixels), atol=1e-5, rtol=1e-4)
        if std is not None:
            torch.testing.assert_close(std, own(lambda x: vae.encode(x).latent_dist.std, pixels), atol=1e-5, rtol=1e-4)
        shift, divisor = own_statistics(vae)
        torch.testing.assert_close(encoder.normalise(mean), (mean - shift) / divisor, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.denormalise(encoder.normalise(mean)), mean, atol=1e-5, rtol=1e-5)
        decoded = encoder.decode(encoder.normalise(mean))
        assert decoded.shape == pixels.shape
        torch.testing.assert_close(decoded, own(decode, mean).clamp(-1, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_latent_has_the_shape_that_check_promises(name: str) -> None:
    encoder = VideoEncoder(build(name))
    for frames in (0, 2):
        pixels = clip(encoder, frames, count=1)
        shape = encoder.check(Bucket(frames=pixels.shape[2], height=32, width=32))
        mean, _ = encoder.encode(pixels)
        assert mean.shape == (1, encoder.channels, *shape)
        assert encoder.decode(mean).shape == pixels.shape


def test_sizes_that_a_class_does_not_give_back_are_refused_without_a_forward() -> None:
    """CogVideoX takes 1 + 8 k frames, although its compression is 4."""
    encoder = VideoEncoder(build("cogvideox"))
    with pytest.raises(
        ConfigError, match="bucket 5x32x32: AutoencoderKLCogVideoX turns its 5 frames of 32x32 into 8 of 32x32"
    ):
        encoder.check(Bucket(frames=5, height=32, width=32))
    assert encoder.check(Bucket(frames=9, height=32, width=32)) == (3, 4, 4)


def test_a_real_size_is_checked_without_its_memory() -> None:
    """Wan's own widths at 81 frames of 480x832: gigabytes of activations, none of them made."""
    with torch.device("meta"):
        encoder = VideoEncoder(diffusers.AutoencoderKLWan())
    assert encoder.check(Bucket(frames=81, height=480, width=832)) == (21, 60, 104)


@pytest.mark.parametrize("name", IMAGE)
def test_an_image_autoencoder_treats_a_clip_as_its_frames(name: str) -> None:
    encoder = VideoEncoder(build(name), frames_at_once=2)
    pixels = clip(encoder, frames=4)
    mean, _ = encoder.encode(pixels)
    frames = torch.cat([encoder.encode(frame)[0] for frame in pixels.split(1, dim=2)], 2)
    torch.testing.assert_close(mean, frames, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        encoder.decode(mean), torch.cat([encoder.decode(z) for z in mean.split(1, dim=2)], 2), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["kl", "wan", "ltx_timestep"])
def test_an_identity_is_json_and_rebuilds_the_same_encoder(name: str, tmp_path: Path) -> None:
    encoder = load_video_encoder(saved(tmp_path, name))
    again = video_encoder_from_identity(json.loads(json.dumps(encoder.identity)))
    assert again.identity == encoder.identity
    pixels = clip(encoder)
    assert torch.equal(again.encode(pixels)[0], encoder.encode(pixels)[0])
    assert torch.equal(again.decode(encoder.encode(pixels)[0]), encoder.decode(encoder.encode(pixels)[0]))


def test_an_identity_finds_its_weights_elsewhere_but_not_other_weights(tmp_path: Path) -> None:
    encoder = load_video_encoder(saved(tmp_path / "a", "kl"))
    moved = (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ConfigError, match="no such folder"):
        video_encoder_from_identity(encoder.identity)
    assert (
        video_encoder_from_identity(encoder.identity, path=str(moved)).identity["fingerprint"]
        == encoder.identity["fingerprint"]
    )
    weights = load_file(moved / "diffusion_pytorch_model.safetensors")
    save_file(
        {k: v + 0.01 for k, v in weights.items()}, moved / "diffusion_pytorch_model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match="not the one that these features were made with: fingerprint"):
        video_encoder_from_identity(encoder.identity, path=str(moved))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_as_they_were(channels: int, tmp_path: Path) -> None:
    encoder = load_video_encoder(VideoEncoderConfig(kind="pixels", channels=channels))  # type: ignore[arg-type]
    assert (encoder.kind, encoder.compression, encoder.channels) == ("pixels", (1, 1, 1), channels)
    grey = clip(encoder)[:, :1].expand(-1, 3, -1, -1, -1)
    mean, std = encoder.encode(grey)
    assert std is None
    assert mean.shape[1] == channels
    torch.testing.assert_close(encoder.decode(encoder.normalise(mean)), grey)
    assert video_encoder_from_identity(encoder.identity).identity == encoder.identity
    encoder.vae.save_pretrained(tmp_path)
    again = PixelAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(VideoEncoder(again).encode(grey)[0], mean)


def test_colours_become_luma_in_one_channel() -> None:
    encoder = load_video_encoder(VideoEncoderConfig(kind="pixels", channels=1))
    red, green, blue = (torch.zeros(1, 3, 1, 1, 1).index_fill(1, torch.tensor(i), 1.0) for i in range(3))
    assert [round(encoder.encode(x)[0].item(), 3) for x in (red, green, blue)] == [0.299, 0.587, 0.114]


def test_weights_have_the_requested_dtype_and_latents_are_float32(tmp_path: Path) -> None:
    config = saved(tmp_path, "kl").model_copy(update={"dtype": "bfloat16"})
    encoder = load_video_encoder(config)
    assert encoder.dtype == torch.bfloat16
    mean, std = encoder.encode(clip(encoder))
    assert mean.dtype == torch.float32
    assert std is not None
    assert std.dtype == torch.float32
    assert encoder.decode(mean).dtype == torch.float32


def test_decoding_draws_nothing_from_the_global_random_state() -> None:
    encoder = VideoEncoder(build("ltx_timestep"))
    mean, _ = encoder.encode(clip(encoder))
    state = torch.get_rng_state()
    first = encoder.decode(mean)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(encoder.decode(mean), first)


# ------------------------------------------------------------------------------------- bad input


def test_sizes_that_do_not_divide_are_refused_with_both_numbers() -> None:
    encoder = VideoEncoder(build("wan"))
    with pytest.raises(ConfigError, match="4x32x32: frames - 1 = 3 is not divisible by .* 4"):
        encoder.encode(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(ConfigError, match="5x36x32: height 36 is not divisible by .* 8"):
        encoder.encode(torch.zeros(1, 3, 5, 36, 32))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nowhere", "video_encoder.path: .*nowhere: no such folder"),
        ("{tmp}/empty", "has no config.json"),
        ("{tmp}/pipeline", r"has no config.json; it has subfolders with one: vae \(set video_encoder.subfolder\)"),
        ("{tmp}/unet", "holds UNet2DModel, which is no autoencoder"),
        ("{tmp}/t5", "holds no diffusers model"),
        ("{tmp}/file", "is a file"),
    ],
)
def test_a_wrong_autoencoder_path_is_an_error_that_says_what_is_there(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    build("kl").save_pretrained(tmp_path / "pipeline" / "vae")
    for name, content in (("unet", {"_class_name": "UNet2DModel"}), ("t5", {"model_type": "t5"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_video_encoder(VideoEncoderConfig(kind="image", path=path.format(tmp=tmp_path)))


def test_an_autoencoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = saved(tmp_path, "wan").model_copy(update={"kind": "image"})
    with pytest.raises(ConfigError, match="kind: 'image', but .* holds AutoencoderKLWan, which is of kind 'video'"):
        load_video_encoder(config)


@pytest.mark.parametrize("fault", ["missing", "left over", "truncated"])
def test_weights_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    config = saved(tmp_path, "kl")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "missing":
        save_file({k: v for k, v in weights.items() if k != "decoder.conv_out.bias"}, file, {"format": "pt"})
    else:
        save_file({**weights, "decoder.extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(
        ConfigError,
        match={"missing": "missing_keys: .*decoder.conv_out.bias", "left over": "unexpected_keys: .*decoder.extra"}.get(
            fault, "cannot be loaded"
        ),
    ):
        load_video_encoder(config)


def test_unknown_statistics_are_not_guessed() -> None:
    vae = build("kl")
    vae.register_to_config(scaling_factor=None)
    with pytest.raises(ValueError, match="states no latent statistics"):
        VideoEncoder(vae)
    vae.register_to_config(latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0))
    with pytest.raises(ValueError, match="latents_mean has 2 values for 4 latent channels"):
        VideoEncoder(vae)
