"""The published models of the speed table, twice: diffusers' class, and ours with the same weights, on the same inputs.

B batch · L text tokens · E width of the text features. Latents are ours, (B, C, T, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from stdit.config.model import SIZES
from stdit.models.stdit import STDiT
from stdit.weights.convert import load_published

SIDE = 32  # latent pixels: 256 of the picture, 16 x 16 patches
TEXT_TOKENS, TEXT_DIM = 120, 4096


@dataclass(frozen=True)
class Peer:
    """One model of the table. `conditions`: a batch size to the model's conditioning keywords."""

    name: str
    theirs: nn.Module
    ours: STDiT
    frames: int = 1
    conditions: Callable[[int], dict[str, Tensor]] = field(default=lambda batch: {})

    def latents(self, batch: int, side: int = SIDE) -> Tensor:
        return torch.randn(batch, 4, self.frames, side, side, generator=torch.Generator().manual_seed(1))

    def null(self) -> dict[str, Tensor]:
        """The null conditions of classifier-free guidance: no class, or the features of an empty caption, one token
        long."""
        conditions = self.conditions(1)
        if "class_labels" in conditions:
            return {"class_labels": torch.full((1,), 1000)}
        conditions["encoder_hidden_states"] = conditions["encoder_hidden_states"].flip(1)
        if "encoder_attention_mask" in conditions:
            conditions["encoder_attention_mask"] = (torch.arange(TEXT_TOKENS) < 1).long()[None]
        return conditions

    def compiled(self) -> Peer:
        """Copies of both models whose blocks are compiled."""
        theirs, ours = copy.deepcopy(self.theirs), copy.deepcopy(self.ours)
        for block in theirs.modules():
            if isinstance(block, BasicTransformerBlock):
                block.compile(fullgraph=True)
        ours.compile_repeated_blocks(dynamic=None)
        return replace(self, theirs=theirs, ours=ours)

    def run_ours(self, latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor], /, **kwargs: Any) -> Tensor:
        return self.ours(latents, timestep, **conditions, **kwargs, return_dict=False)[0]

    def run_theirs(self, latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """As diffusers' pipelines call it: timesteps (B,), masks of the tokenizer."""
        kwargs: dict[str, Any] = dict(conditions)
        timestep = timestep.expand(latents.shape[0])
        if isinstance(self.theirs, PixArtTransformer2DModel):
            kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if isinstance(self.theirs, LatteTransformer3DModel):
            return self.theirs(latents, timestep=timestep, **kwargs, return_dict=False)[0]
        return self.theirs(latents[:, :, 0], timestep=timestep, **kwargs, return_dict=False)[0][:, :, None]


def make_tiny() -> None:
    """Replaces all sizes by tiny ones, for a smoke test."""
    SIZES.update(dict.fromkeys(SIZES, (48, 2, 4)))


def labels(batch: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(batch) * 37 % 1000}


def captions(batch: int) -> dict[str, Tensor]:
    """Captions of 12 to 60 tokens (the first has 32), padded to 120, as a tokenizer with padding="max_length" leaves
    them."""
    random = torch.Generator().manual_seed(2)
    lengths = torch.randint(12, 61, (batch, 1), generator=random)
    lengths[0] = 32
    return {
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=random),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths).long(),
    }


def full_captions(batch: int) -> dict[str, Tensor]:
    """120 tokens without a mask: diffusers' Latte takes none (its pipeline cuts a single caption, and pads others with
    zeros)."""
    return {"encoder_hidden_states": captions(batch)["encoder_hidden_states"]}


def dit(size: str) -> Peer:
    shape = _shape(size)
    theirs = DiTTransformer2DModel(**shape, sample_size=SIDE)
    return Peer(f"DiT-{size}/2", *_same_weights(theirs), conditions=labels)


def pixart(size: str) -> Peer:
    shape = _shape(size)
    width = SIZES[size][0]
    theirs = PixArtTransformer2DModel(
        **shape, sample_size=SIDE, cross_attention_dim=width, caption_channels=TEXT_DIM, interpolation_scale=1
    )
    return Peer(f"PixArt-{size}/2", *_same_weights(theirs), conditions=captions)


def latte(size: str, frames: int, pairs: int | None = None) -> Peer:
    """`pairs` of a spatial and a temporal block; None: half the size's depth."""
    width, depth, _ = SIZES[size]
    pairs = pairs or depth // 2
    theirs = LatteTransformer3DModel(
        **({**_shape(size), "num_layers": pairs}),
        sample_size=SIDE,
        cross_attention_dim=width,
        caption_channels=TEXT_DIM,
        video_length=frames,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return Peer(f"Latte-{size}/2", *_same_weights(theirs), frames, full_captions)


def _shape(size: str) -> dict[str, Any]:
    width, depth, heads = SIZES[size]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": depth,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "attention_bias": True,
        "num_embeds_ada_norm": 1000,
    }


def _same_weights(theirs: ModelMixin) -> tuple[nn.Module, STDiT]:
    """Both in eval mode, with the same random weights, none of them zero: ours by way of a folder, as users convert."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02)
        if isinstance(theirs, DiTTransformer2DModel):  # one embedder, stored in every block
            first, *rest = (
                b.norm1.get_submodule("emb") for b in theirs.modules() if isinstance(b, BasicTransformerBlock)
            )
            for embedder in rest:
                embedder.load_state_dict(first.state_dict())
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_published(folder)
    return theirs.eval(), ours
