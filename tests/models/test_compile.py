"""Compiled blocks and models: one graph each, and none made anew for a bucket that was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from stdit.config import Config, load_config
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.stdit import STDiT
from stdit.ops import onednn
from stdit.train import prepare

Tiny = Callable[..., STDiT]
Noise = Callable[..., torch.Tensor]

CONDITIONING = ("in_context", "cross_attention", "adaln", "adaln_zero", "adaln_single", "joint")
ATTENTION = ("factorized", "alternating", "full")
KINDS = [pair for pair in product(CONDITIONING, ATTENTION) if pair != ("joint", "alternating")]
# The other pairs take more than a minute.
SHORT = (("cross_attention", "factorized"), ("adaln_single", "full"))
MODELS: dict[str, dict[str, Any]] = {
    "dit": {"conditioning": "adaln_zero", "num_classes": 3, "temporal": False},
    "pixart": {"text_dim": 6, "null_text": "sequence", "temporal": False},
    "latte": {
        "text_dim": 6,
        "attention": "alternating",
        "temporal_text": False,
        "temporal_position_injection": "residual",
    },
    "stdit": {"text_dim": 6},
    "stdit3": {"text_dim": 6, "attention": "alternating", "temporal_positions": "rope", "qk_norm": "rms"},
    "mmdit": {"text_dim": 6, "conditioning": "joint", "attention": "full", "text_projection": "linear"},
    "full_rope": {"text_dim": 6, "attention": "full", "positions": "rope"},
}
# (batch, frames, height, width, text tokens)
BUCKETS = [(2, 1, 8, 8, 5), (2, 4, 8, 8, 7), (3, 4, 8, 12, 7), (2, 8, 12, 8, 3), (1, 1, 12, 8, 6), (2, 2, 16, 8, 4)]


def nothing_is_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Compiled code belongs to the function, not to the model: begin and end without any."""
    nothing_is_compiled()
    yield
    torch._dynamo.reset()


def inputs(model: STDiT, noise: Noise, bucket: tuple[int, int, int, int, int]) -> dict[str, Any]:
    batch, frames, height, width, tokens = bucket
    frames = frames if model.settings.has_time else 1
    conditions: dict[str, Any] = {}
    if model.settings.text_dim:
        conditions["encoder_hidden_states"] = noise(batch, tokens, 6, seed=1)
        conditions["encoder_attention_mask"] = torch.arange(tokens) < (torch.arange(batch)[:, None] % 2 + 2)
    if model.settings.num_classes:
        conditions["class_labels"] = torch.arange(batch) % 3
    return {
        "hidden_states": noise(batch, 3, frames, height, width),
        "timestep": 100.0 + torch.arange(batch),
        **conditions,
    }


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("conditioning", "attention"), [pytest.param(*k, marks=[] if k in SHORT else pytest.mark.slow) for k in KINDS]
)
def test_every_kind_of_block_is_one_graph(tiny: Tiny, noise: Noise, conditioning: str, attention: str) -> None:
    model = tiny(text_dim=6, num_classes=3, conditioning=conditioning, attention=attention)
    args = inputs(model, noise, (2, 2, 8, 8, 4))
    expected = model(**args).sample
    model.compile_repeated_blocks(backend="eager")  # fullgraph, as train.compile has it
    torch.testing.assert_close(model(**args).sample, expected)
    static = encode_static(model, ConditionInputs(**{k: v for k, v in args.items() if k != "hidden_states"}))
    conditions = precompute_conditions(model, args["timestep"][:1], static)[0]
    again = model(args["hidden_states"], 100.0, conditions=conditions).sample
    torch.testing.assert_close(again[0], expected[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("dit", "stdit") else pytest.mark.slow) for name in MODELS]
)
def test_whole_models_are_one_graph(tiny: Tiny, noise: Noise, name: str) -> None:
    model = tiny(**MODELS[name])
    args = inputs(model, noise, (2, 4, 8, 8, 4))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**args).sample, model(**args).sample)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stdit", 3),
        pytest.param("mmdit", 3, marks=pytest.mark.slow),
        *(pytest.param(name, 6, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_buckets_that_were_seen_compile_nothing(tiny: Tiny, noise: Noise, name: str, count: int) -> None:
    model, buckets = tiny(**MODELS[name], depth=4), BUCKETS[:count]
    model.compile_repeated_blocks(backend="eager")
    for bucket in buckets:
        model(**inputs(model, noise, bucket))
    kinds = {"latte": 3, "stdit3": 2, "mmdit": 2}.get(name, 1)
    assert graphs() <= 5 * kinds  # one frame or several, one sample or several, two sizes alike; not one a bucket
    seen = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bucket in (*reversed(buckets), *buckets[::2]):
            model(**inputs(model, noise, bucket))
    assert graphs() == seen


@pytest.mark.parametrize("name", ["dit", pytest.param("stdit3", marks=pytest.mark.slow)])
def test_onednn_adds_no_graph_and_compiles_no_bucket_twice(
    tiny: Tiny, noise: Noise, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    counts = []
    for by_onednn in (False, True):
        nothing_is_compiled()
        model = tiny(**MODELS[name], depth=4)
        model.compile_repeated_blocks(backend="eager")
        if by_onednn:
            assert bool(onednn.apply(model)) == onednn._AVAILABLE
        for bucket in BUCKETS[:4]:
            model(**inputs(model, noise, bucket))
        counts.append(graphs())
    assert counts[0] == counts[1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bucket in BUCKETS[3::-1]:
            model(**inputs(model, noise, bucket))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart", "stdit"])
def test_a_whole_model_compiles_no_bucket_twice(tiny: Tiny, noise: Noise, name: str) -> None:
    model = tiny(**MODELS[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for bucket in BUCKETS:
        compiled(**inputs(model, noise, bucket))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bucket in (*reversed(BUCKETS), *BUCKETS[::2]):
            compiled(**inputs(model, noise, bucket))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_train_to_the_same_gradients(
    tiny: Tiny, noise: Noise, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    gradients = []
    for compiled in (False, True):
        model = tiny(**MODELS["stdit"]).train()
        onednn.apply(model)
        if recompute:
            model.enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager")
        model(**inputs(model, noise, BUCKETS[1])).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "stdit"])
def test_inductor_gives_the_same(tiny: Tiny, noise: Noise, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MIN_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    model = tiny(**MODELS[name])
    onednn.apply(model)
    expected = [model(**inputs(model, noise, bucket)).sample for bucket in BUCKETS[:3]]
    model.compile_repeated_blocks()
    with torch.no_grad():
        for bucket, wanted in zip(BUCKETS[:3], expected, strict=True):
            torch.testing.assert_close(model(**inputs(model, noise, bucket)).sample, wanted)
    model(**inputs(model, noise, BUCKETS[1])).sample.square().mean().backward()


@pytest.mark.slow
def test_what_train_compile_asks_for_trains(noise: Noise) -> None:
    config = load_config("configs/debug.yaml", Config, ["train.compile=true", "train.activation_checkpointing=true"])
    model = prepare(STDiT.from_settings(config.model), config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    conditions = {"class_labels": torch.arange(4)} if config.model.num_classes else {}
    if config.model.text_dim:
        conditions["encoder_hidden_states"] = noise(4, 6, config.model.text_dim)
    losses = []
    for _ in range(8):
        x = noise(4, config.model.in_channels, 2, 8, 8)
        loss = (model(x, torch.arange(4) * 200.0, **conditions).sample - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert graphs() <= 2
