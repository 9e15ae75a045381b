"""Laws of the feature networks: pixels as the published preprocessing makes them, the layers that scores are defined
by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from stdit.config import NetworkPaths
from stdit.evaluation import networks
from stdit.evaluation.networks import VJEPA2, Clip, Dino, DinoV2, MissingWeights, NetworkError, VideoMAE, find_network
from tests.support.encoders import clip_tokenizer
from tests.support.feature_networks import save_video_net

WIDTH: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLIP = np.random.default_rng(0).integers(0, 256, (6, 40, 30, 3), dtype=np.uint8)


def save(folder: Path, model: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = clip_tokenizer()
    text = WIDTH | {
        "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = WIDTH | {"image_size": 224, "patch_size": 32}
    folder = save(
        tmp_path_factory.mktemp("clip"), CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_of_clips_own_processor(clip: Path) -> None:
    model = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil()(list(CLIP), return_tensors="pt")["pixel_values"]
    tokens = clip_tokenizer()(["a red bar"], return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    expected = 100 * (output.image_embeds @ output.text_embeds.T).clamp_min(0).mean()
    found = Clip(clip).rows(CLIP, "a red bar")
    assert float(found["clip_score"][0]) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    assert set(Clip(clip).rows(CLIP[:1], None)) == set()
    assert set(found) == {"clip_score", "consistency"}


def test_a_caption_that_is_too_long_is_cut(clip: Path) -> None:
    assert Clip(clip).rows(CLIP[:1], "a very long caption " * 20)["clip_score"].shape == (1,)


def test_dinov2_gives_its_normalised_class_token(tmp_path: Path) -> None:
    folder = save(tmp_path, Dinov2Model(Dinov2Config(**WIDTH, patch_size=14, image_size=224)))
    found = DinoV2(folder).rows(CLIP[:1], None)["features"]
    model = Dinov2Model.from_pretrained(folder)
    x = networks._normalized(
        np.asarray(networks.Image.fromarray(CLIP[0]).resize((224, 224), networks.Image.Resampling.BICUBIC))[None],
        networks.IMAGENET,
    )
    with torch.no_grad():
        expected = model(x).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.from_numpy(found), expected)
    assert DinoV2(folder).width == len(found) == 16


@pytest.mark.parametrize("side", [(224, 224), (40, 30)])
def test_subject_consistency_is_of_class_tokens(tmp_path: Path, side: tuple[int, int]) -> None:
    folder = save(tmp_path, ViTModel(ViTConfig(**WIDTH, patch_size=16, image_size=224), add_pooling_layer=False))
    video = np.random.default_rng(1).integers(0, 256, (3, *side, 3), dtype=np.uint8)
    assert 0 < float(Dino(folder).rows(video, None)["consistency"][0]) < 1
    still = np.repeat(video[:1], 3, 0)
    assert float(Dino(folder).rows(still, None)["consistency"][0]) == pytest.approx(1)


def test_videomae_takes_its_own_processors_pixels(tmp_path: Path) -> None:
    config = VideoMAEConfig(**WIDTH, image_size=32, patch_size=16, num_frames=4, tubelet_size=2)
    folder = save(tmp_path, VideoMAEModel(config))
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    chosen = [CLIP[i] for i in (0, 2, 3, 5)]
    pixels = processor(chosen, return_tensors="pt")["pixel_values"]
    processor_mean = torch.tensor(processor.image_mean)
    # VideoMAE's own files normalise by ImageNet's moments, as ours; the class default is 0.5.
    raw = pixels * torch.tensor(processor.image_std)[:, None, None] + processor_mean[:, None, None]
    mean, std = (torch.tensor(m)[:, None, None] for m in networks.IMAGENET)
    with torch.no_grad():
        expected = VideoMAEModel.from_pretrained(folder)((raw - mean) / std).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(
        torch.from_numpy(VideoMAE(folder).rows(CLIP, None)["features"]), expected, atol=1e-4, rtol=1e-4
    )
    assert VideoMAE(folder).limits((3, 8, 8)) == "this VideoMAE takes 4 frames, these have 3"


def test_vjepa2_gives_its_encoders_tokens(tmp_path: Path) -> None:
    config = VJEPA2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=16, crop_size=32, frames_per_clip=4,
        pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2,
    )  # fmt: skip
    folder = save(tmp_path, VJEPA2Model(config))
    found = VJEPA2(folder).rows(CLIP, None)["features"]
    assert found.shape == (24,)
    assert np.isfinite(found).all()
    assert VJEPA2(folder).rows(CLIP[:3], None)["features"].shape == (24,)


def test_resizing_for_vbench_is_torchs_without_antialiasing() -> None:
    x = networks._interpolated(CLIP, 20, "bilinear")
    assert x.shape == (6, 3, 26, 20)
    expected = F.interpolate(torch.from_numpy(CLIP).permute(0, 3, 1, 2).float(), (26, 20), mode="bilinear")
    torch.testing.assert_close(x, expected)


# ------------------------------------------------------------------------------------------ refusals


def test_another_model_than_the_one_that_defines_a_score_is_refused_with_both_values(
    tmp_path: Path, clip: Path
) -> None:
    folder = save(tmp_path, Dinov2Model(Dinov2Config(**WIDTH, patch_size=14)))
    with pytest.raises(NetworkError, match=r"config\.json: hidden_size is 16; DINOv2 ViT-L/14, .* has 1024"):
        find_network("dinov2", NetworkPaths(dinov2=folder))
    with pytest.raises(NetworkError, match="model_type is 'clip'; DINO ViT-B/16"):
        find_network("dino", NetworkPaths(dino=clip))
    find_network("clip", NetworkPaths(clip=clip))
    with pytest.raises(MissingWeights, match=r"networks\.i3d is not set"):
        find_network("i3d", NetworkPaths())


def test_files_that_are_no_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"no weights")
    with pytest.raises(NetworkError, match=r"x\.pt: not a TorchScript file"):
        networks.I3D(tmp_path / "x.pt").rows(np.zeros((10, 8, 8, 3), np.uint8), None)
    with pytest.raises(NetworkError, match=r"no readable config\.json"):
        find_network("vjepa2", NetworkPaths(vjepa2=tmp_path))
    module = torch.jit.script(torch.nn.Linear(2, 2))
    module.save(str(tmp_path / "linear.pt"))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NetworkError, match=r"expected forward\(video, rescale, resize, return_features\)"):
        networks.I3D(tmp_path / "linear.pt").rows(np.zeros((10, 8, 8, 3), np.uint8), None)
    assert (
        networks.I3D(save_video_net(tmp_path / "i3d.pt")).limits((8, 8, 8))
        == "I3D takes 10 frames or more, these have 8"
    )
