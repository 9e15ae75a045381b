"""Kernels of one forward at published sizes, counted on the meta device: what a GPU would have to launch.

Attention counts as one, views as none. Counted so, diffusers' own classes come to what was counted for them elsewhere
(1,147, 871 and 1,547), give or take what its pipelines do to the timesteps and masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stdit.config.model import ModelConfig
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.stdit import STDiT

# Operators that move no data, and allocation.
FREE = frozenset(
    [
        "view",
        "transpose",
        "t",
        "unsqueeze",
        "permute",
        "slice",
        "select",
        "split",
        "expand",
        "alias",
        "detach",
        "unbind",
        "_unsafe_view",
        "squeeze",
        "as_strided",
        "chunk",
        "split_with_sizes",
        "empty",
        "empty_like",
        "empty_strided",
        "_reshape_alias",
        "unsafe_split",
    ]
)
WIDTH, DEPTH, HEADS, TEXT = 1152, 28, 16, 4096
XL: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "num_layers": DEPTH,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "attention_bias": True,
}
TEXTUAL: dict[str, Any] = XL | {"cross_attention_dim": WIDTH, "caption_channels": TEXT}
LATTE: dict[str, Any] = TEXTUAL | {
    "video_length": 16,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_embeds_ada_norm": 1000,
}
OURS: dict[str, ModelConfig] = {
    "dit": ModelConfig(
        size="XL",
        temporal=False,
        conditioning="adaln_zero",
        num_classes=1000,
        learned_variance=True,
        timestep_freq_shift=1,
    ),
    "pixart": ModelConfig(size="XL", temporal=False, text_dim=TEXT, null_text="empty", learned_variance=True),
    "latte": ModelConfig(
        hidden_size=WIDTH,
        depth=2 * DEPTH,
        num_heads=HEADS,
        attention="alternating",
        temporal_text=False,
        temporal_position_injection="residual",
        text_dim=TEXT,
        null_text="empty",
        learned_variance=True,
    ),
}
FRAMES = {"dit": 1, "pixart": 1, "latte": 16}
MOST = {"dit": 400, "pixart": 480, "latte": 850}
# Without caches each block's modulation, and of text its keys and values, come on top.
MOST_WITHOUT = {"dit": 460, "pixart": 540, "latte": 960}


class Kernels(TorchDispatchMode):
    """Counts the operators that do something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        self.names[name] += name not in FREE
        return func(*args, **(kwargs or {}))


class OneAttention(TorchFunctionMode):
    """Attention as the fused kernels have it: one operator, its result laid out as the queries are."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.kernels.names["attention"] += 1
        query: Tensor = args[0] if args else kwargs["query"]
        batch, heads, tokens, width = query.shape
        return torch.empty(batch, tokens, heads, width, device="meta").transpose(1, 2)


def count(run: Callable[[], Any]) -> int:
    """Kernels of the second of two runs: tables that depend on shapes alone are there by then."""
    with torch.no_grad(), torch.device("meta"):
        run()
        with Kernels() as kernels, OneAttention(kernels):
            run()
    return kernels.names.total()


def condition_inputs(name: str, batch: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        if name == "dit":
            return {"class_labels": torch.empty(batch, dtype=torch.long)}
        words = {"encoder_hidden_states": torch.empty(batch, 120, TEXT)}
        mask = {"encoder_attention_mask": torch.empty(batch, 120, dtype=torch.long)} if name == "pixart" else {}
        return words | mask


def latents(name: str, batch: int) -> Tensor:
    return torch.empty(batch, 4, FRAMES[name], 32, 32, device="meta")


@pytest.fixture(scope="module")
def ours() -> dict[str, STDiT]:
    with torch.device("meta"):
        return {name: STDiT.from_settings(config).eval() for name, config in OURS.items()}


def test_the_rule_gives_what_is_known_of_diffusers() -> None:
    time = torch.empty(2, dtype=torch.long, device="meta")
    with torch.device("meta"):
        dit = DiTTransformer2DModel(**XL, num_embeds_ada_norm=1000).eval()
        pixart = PixArtTransformer2DModel(**TEXTUAL).eval()
        latte = LatteTransformer3DModel(**LATTE).eval()
    size = {"resolution": None, "aspect_ratio": None}
    runs: dict[int, Callable[[], Any]] = {
        1147: lambda: dit(latents("dit", 2)[:, :, 0], timestep=time, **condition_inputs("dit", 2)),
        871: lambda: pixart(
            latents("pixart", 2)[:, :, 0], timestep=time, added_cond_kwargs=size, **condition_inputs("pixart", 2)
        ),
        1547: lambda: latte(latents("latte", 2), timestep=time, **condition_inputs("latte", 2)),
    }
    for known, run in runs.items():
        assert count(run) == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", OURS)
def test_a_forward_takes_few_kernels(ours: dict[str, STDiT], name: str, batch: int) -> None:
    model, x = ours[name], latents(name, batch)
    inputs: dict[str, Any] = dict(condition_inputs(name, batch))
    with torch.device("meta"):
        conditions = precompute_conditions(model, torch.empty(10), encode_static(model, ConditionInputs(**inputs)))[0]
    assert count(lambda: model(x, 500.0, conditions=conditions)) <= MOST[name]
    shared = torch.empty(1, device="meta")
    assert count(lambda: model(x, shared, **inputs)) <= MOST_WITHOUT[name]


@pytest.mark.parametrize("name", OURS)
def test_times_of_their_own_cost_no_kernels(ours: dict[str, STDiT], name: str) -> None:
    times = torch.empty(4, device="meta")
    assert (
        count(lambda: ours[name](latents(name, 4), times, **condition_inputs(name, 4)))
        <= MOST_WITHOUT[name] + 2 * 56 + 2
    )
