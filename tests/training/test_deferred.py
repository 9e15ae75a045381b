"""A model that is built without memory has the weights of one that is built at once, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._tensor_str import _str

from stdit.config import ModelConfig, TrainConfig
from stdit.models.control import STDiTControl
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.training.deferred import DeferredTensors
from stdit.weights.transfer import to_video, transfer_weights
from tests.support.models import MEMBERS, TINY

FAST = ("cross_attention-factorized", "sd3")
Make = Callable[[], nn.Module]


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def weights(model: nn.Module, deferred: DeferredTensors | None = None) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        with (deferred or DeferredTensors()).resident(tensor):
            found[name] = tensor.clone()
    return found


def check_equal(make: Make) -> DeferredTensors:
    expected = weights(make())
    torch.manual_seed(5)
    with DeferredTensors(smallest=0) as deferred:
        model = make()
    state = torch.get_rng_state()
    assert not any(p.untyped_storage().nbytes() for p in model.parameters())
    for _ in range(2):  # read as often as one likes
        found = weights(model, deferred)
        assert found.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.untyped_storage().nbytes() for p in model.parameters())
    return deferred


@pytest.mark.parametrize(
    "member", [*FAST, *(pytest.param(m, marks=pytest.mark.slow) for m in MEMBERS if m not in FAST)]
)
def test_new_weights_are_those_of_the_seed(member: str) -> None:
    check_equal(lambda: STDiT.from_settings(small(**MEMBERS[member]), seed=3))


def test_so_are_those_beside_a_frozen_model() -> None:
    config = small(text_dim=8)
    lora = TrainConfig(steps=1, lora={"rank": 2})  # pyright: ignore[reportArgumentType]
    check_equal(lambda: add_trainable(STDiT.from_settings(config), lora, seed=1))
    check_equal(lambda: STDiTControl.of(STDiT.from_settings(config), 1, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_so_are_those_read_from_a_file_and_carried_over(tmp_path: Path, dtype: torch.dtype) -> None:
    image = small(num_classes=3, temporal=False, positions="learned", position_grid=(2, 2))
    STDiT.from_settings(image, 1).to(dtype).save_pretrained(tmp_path)
    text = ModelConfig(**{**image.model_dump(), "num_classes": None, "text_dim": 8, "position_grid": (4, 4)})

    def read() -> STDiT:
        return STDiT.from_pretrained(tmp_path).float()

    check_equal(read)
    check_equal(lambda: to_video(read(), "alternating", temporal_positions="sincos")[0])
    check_equal(lambda: transfer_weights(read(), text, ("class_to_text", "rescale_positions"), 2)[0])


def test_tensors_without_memory_can_be_printed() -> None:
    with DeferredTensors(smallest=0) as deferred:
        layer = nn.Linear(8, 4)
        inside = repr(layer.weight)
    expected = "tensor(..., size=(4, 8), dtype=torch.float32, deferred)"
    for text in (inside, repr(layer.weight), f"{layer.weight}", f"{[layer.weight]}"):
        assert expected in text
    assert repr(layer.weight.detach()) == expected
    with deferred.resident(layer.weight):
        assert repr(layer.weight) == f"Parameter containing:\n{_str(layer.weight)}"
    # Others are printed as ever.
    for tensor in (torch.zeros(0), torch.zeros(2), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")):
        assert repr(tensor) == _str(tensor)
    printed: list[str] = []
    torch.func.grad(lambda x: printed.append(repr(x)) or x.sum())(torch.ones(2))
    assert "GradTrackingTensor" in printed[0]


def test_values_are_those_of_their_time() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        a = nn.Linear(8, 8)
        with torch.no_grad():
            b = nn.Parameter(a.weight * 2)
            a.weight.fill_(7.0)
            a.weight[0] = b[1]
            a.weight[:, 2:4].normal_(generator=torch.Generator().manual_seed(3))
            small = torch.ones(8)
            a.bias.mul_(small)
            small.zero_()
            b[b > 0] = a.weight.clone()[b > 0]
        return nn.ParameterList([*a.parameters(), b])  # pyright: ignore[reportReturnType]

    check_equal(make)
