"""Sequence parallelism: ranks that share a clip's tokens train, to float tolerance, as one rank does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import merge
from stdit.data.decoding import open_clip
from tests.support.models import MEMBERS
from tests.support.rank_jobs import config_of, run
from tests.support.rank_pool import Pool
from tests.support.runs import TEXT, make_run, model_config
from tests.support.sequence_jobs import KINDS, ExchangedBytes, model_errors, run_settings, train_steps

pytestmark = pytest.mark.distributed

STEPS = 10


@pytest.fixture(scope="module")
def quad() -> Iterator[Pool]:
    """Four ranks."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(solo: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The same run on one rank, without ZeRO."""
    return cache(lambda kind: solo(train_steps, run_settings(tmp_path_factory.mktemp("run"), kind, 0, 1), STEPS)[0])


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-4)
    assert set(found["gradients"]) == set(expected["gradients"])
    largest = max(float(g.abs().max()) for g in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-4, atol=2e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    for part in ("weights", "ema"):
        for name, weight in expected[part].items():
            torch.testing.assert_close(
                found[part][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


SHORT = [("factorized", stage) for stage in range(4)] + [("full", 2), ("full", 3), ("alternating", 1), ("joint", 2)]
SHORT += [("joint-factorized", 3), ("dynamic", 2), ("dynamic-full", 1)]


@pytest.mark.parametrize(("kind", "stage"), SHORT)
def test_two_ranks_that_share_each_clip_train_as_one(
    pair: Pool, alone: Callable[..., dict[str, Any]], kind: str, stage: int, tmp_path: Path
) -> None:
    assert_equal(pair(train_steps, run_settings(tmp_path, kind, stage, 2), STEPS)[0], alone(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("degree", "data_ranks"), [(1, 4), (2, 2), (4, 1)])
def test_four_ranks_divided_in_any_way_train_as_one(
    quad: Pool, pair: Pool, solo: Pool, kind: str, stage: int, degree: int, data_ranks: int, tmp_path: Path
) -> None:
    # The compute loss of a dynamic model is that of a rank's micro-batch: it depends on data parallelism.
    others = data_ranks if kind.startswith("dynamic") else 1
    if others == 4:
        pytest.skip("four data-parallel ranks have nothing to be compared with")
    pool = pair if others == 2 else solo
    expected = pool(train_steps, run_settings(tmp_path / "alone", kind, 0, 1, others, batch=4), STEPS)[0]
    found = quad(train_steps, run_settings(tmp_path, kind, stage, degree, data_ranks, batch=4), STEPS)[0]
    assert_equal(found, expected)


@pytest.mark.parametrize("broken", ["factor", "left out"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_broken_reduction_is_found(
    pair: Pool, alone: Callable[..., dict[str, Any]], broken: str, stage: int, tmp_path: Path
) -> None:
    found = pair(train_steps, run_settings(tmp_path, "factorized", stage, 2), STEPS, broken)[0]
    expected = alone("factorized")
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)  # the values are right
    with pytest.raises(AssertionError):
        assert_equal(found, expected)
    wrong = [
        name
        for name, gradient in expected["gradients"].items()
        if not torch.allclose(found["gradients"][name], gradient, rtol=1e-3, atol=1e-6)
    ]
    assert len(wrong) > len(expected["gradients"]) // 4


def test_every_kind_of_model_predicts_and_differentiates_as_alone(pair: Pool) -> None:
    names = [name for name in MEMBERS if name != "conv3d"]
    for rank in pair(model_errors, names, 3, 8, 8, 1):
        for name, (output, gradient) in rank.items():
            assert output < 1e-5, name
            assert gradient < 1e-5, name


def exchanged(data: dict[str, Any]) -> tuple[int, int]:
    """Bytes that this rank sends in one step, counted, and the forecast's for the rank with the largest share."""
    from stdit.models.cost import model_cost

    config = config_of(data)
    with ExchangedBytes(int(os.environ["RANK"])) as counter:
        train_steps(data, 1)
    (bucket,) = config.data.buckets
    assert bucket.batch_size is not None
    grid = (bucket.frames, bucket.height // 2, bucket.width // 2)
    cost = model_cost(config.model, grid, 0, batch=bucket.batch_size, sequence_parallel=config.train.sequence_parallel)
    checkpointed = config.train.activation_checkpointing
    each = cost.exchanged_bytes_checkpointed if checkpointed else cost.exchanged_bytes
    return counter.bytes, each * bucket.batch_size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_factorized_attention_exchanges_half_of_ulysses_and_the_forecast_counts_it(
    pair: Pool, checkpointing: bool, tmp_path: Path
) -> None:
    sent = {}
    for kind in ("factorized", "alternating", "full"):
        # Counts that divide, so that ranks send alike; without the prediction, which either gathers.
        changes = {
            "train": {"activation_checkpointing": checkpointing},
            "diffusion": {"frame_conditioning": {"first": 0}},
        }
        data = run_settings(tmp_path / kind, kind, 0, 2, **changes)
        data["data"]["buckets"] = [{"frames": 4, "height": 8, "width": 8, "batch_size": 2}]
        (counted, forecast), *others = pair(exchanged, data)
        assert counted == forecast
        assert others == [(counted, forecast)]
        gathered = 2 * 2 * (4 * 16) // 2 * 4 * 4  # forward and backward, 2 samples, half of the patches, 4 numbers each
        sent[kind] = counted - gathered
    assert 0 < sent["factorized"] <= sent["full"] / 2  # full attention exchanges heads: DeepSpeed-Ulysses
    assert sent["alternating"] == sent["factorized"] / 2  # one of two blocks is spatial


def test_four_ranks_save_a_quarter_of_the_activations() -> None:
    from stdit.models.cost import model_cost

    for kind in ("factorized", "alternating", "full", "joint"):
        model = config_of(run_settings("unused", kind, 0, 1, model={"num_heads": 4, "depth": 4})).model
        whole, part = (model_cost(model, (8, 8, 8), 12, batch=1, sequence_parallel=degree) for degree in (1, 4))
        assert part.activation_bytes <= 0.35 * whole.activation_bytes
        assert part.forward_macs <= 0.3 * whole.forward_macs


def saved_bytes(data: dict[str, Any]) -> int:
    """Most bytes that one micro-batch keeps for backward on this rank, each storage once, without parameters."""
    from stdit.training.engine import Engine

    kept: dict[int, int] = {}
    alive = []
    forward = Engine.__call__

    def watched(self: Engine, *args: Any, **kwargs: Any) -> Any:
        own = {p.untyped_storage()._cdata for p in self.module.parameters()}

        def save(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                alive.append(storage)
                kept[storage._cdata] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            return forward(self, *args, **kwargs)

    Engine.__call__ = watched
    try:
        train_steps(data, 1)
    finally:
        Engine.__call__ = forward
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factorized", "alternating", "full", "joint"])
def test_four_ranks_keep_at_most_035_of_one_ranks_activations(
    quad: Pool, solo: Pool, kind: str, tmp_path: Path
) -> None:
    model = {"num_heads": 4, "depth": 4}
    (whole,) = solo(saved_bytes, _long_clip(tmp_path / "1", kind, 1, model))
    parts = quad(saved_bytes, _long_clip(tmp_path / "4", kind, 4, model))
    assert max(parts) <= 0.35 * whole


def _long_clip(run_dir: Path, kind: str, degree: int, model: dict[str, Any]) -> dict[str, Any]:
    data = run_settings(run_dir, kind, 1, degree, model=model)
    data["data"]["buckets"] = [{"frames": 8, "height": 16, "width": 16, "batch_size": 1}]
    return data


BAD: list[tuple[int, dict[str, Any], str]] = [
    (3, {}, r"train.sequence_parallel is 3, which does not divide the number of ranks, 2"),
    (2, {"data": {"buckets": [{"frames": 3, "height": 2, "width": 2, "batch_size": 2}]}},
     r"train.sequence_parallel is 2, but data.buckets\[0\] 3x2x2 has 1 patches a frame \(1 x 1\)"),
    (2, {"data": {"buckets": [{"frames": 1, "height": 8, "width": 8, "batch_size": 1}]}},
     r"train.sequence_parallel is 2, but data.buckets\[0\] 1x8x8 has 1 frames a micro-batch \(batch_size 1, 1 frames"),
    (8, {"model": {"attention": "full"}}, r"train.sequence_parallel 8: full attention divides heads, and num_heads is 6"),
    (2, {"model": {"mlp": "conv3d"}}, r"train.sequence_parallel 2: mlp conv3d needs every frame"),
]  # fmt: skip


@pytest.mark.parametrize(("degree", "changes", "message"), BAD)
def test_what_cannot_be_divided_is_refused_on_every_rank(
    pair: Pool, degree: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = merge(run_settings(tmp_path / "run", "factorized", 2, degree), changes)
    for kind, said in pair(refusal, data):
        assert kind == "ConfigError"
        assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def refusal(data: dict[str, Any]) -> tuple[str, str]:
    from stdit.train import train

    try:
        train(config_of(data))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "trained"


# ------------------------------------------------------------------------- beside everything else

BESIDE: dict[str, dict[str, Any]] = {
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "accumulation": {"train": {"gradient_accumulation": 2}},
    "lora": {"train": {"lora": {"rank": 2}}, "init": {"source": "BASE"}},
    "control": {"train": {"control": {"condition": "first_frame", "dropout": 0.3}}, "init": {"source": "BASE"}},
}
FEATURES = {"block": 0, "target": "features", "features_dim": 6, "projector_dim": 16}
ALIGNED = {"alignment": {"block": 0}, "features": FEATURES, "irepa": FEATURES | {"irepa": True}}


@pytest.mark.parametrize(("kind", "stage"), [("factorized", 2), pytest.param("joint", 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("beside", [*BESIDE, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIGNED)])
def test_it_goes_with(pair: Pool, solo: Pool, kind: str, stage: int, beside: str, tmp_path: Path) -> None:
    changes = BESIDE.get(beside) or {"train": {"alignment": ALIGNED[beside]}}
    if "init" in changes:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text("{}")  # its being there is all that is checked
        changes = {**changes, "init": {"source": str(tmp_path / "base")}}
    expected = solo(train_steps, run_settings(tmp_path / "1", kind, 0, 1, **changes), STEPS)[0]
    assert_equal(pair(train_steps, run_settings(tmp_path / "2", kind, stage, 2, **changes), STEPS)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("factorized", 2), ("full", 3)])
def test_it_goes_with_a_fusion_of_sparse_blocks(pair: Pool, solo: Pool, kind: str, stage: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"depth": 3, "sparse_dense": [1, 2]}}
    expected = solo(train_steps, run_settings(tmp_path / "1", kind, 0, 1, **changes), STEPS)[0]
    assert_equal(pair(train_steps, run_settings(tmp_path / "2", kind, stage, 2, **changes), STEPS)[0], expected)


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_in_bfloat16_it_stays_near_float32(
    pair: Pool, alone: Callable[..., dict[str, Any]], stage: int, tmp_path: Path
) -> None:
    found = pair(train_steps, run_settings(tmp_path, "factorized", stage, 2, train={"precision": "bf16"}), STEPS)[0]
    expected = alone("factorized")
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=5e-2)


def compiled_steps(data: dict[str, Any], count: int) -> dict[str, Any]:
    """`train_steps` with blocks traced and differentiated as for a compiler, and run without one, which takes
    minutes."""
    from stdit.models.blocks import COMPILE_OPTIONS

    COMPILE_OPTIONS["backend"] = "aot_eager"
    try:
        return train_steps(data, count)
    finally:
        del COMPILE_OPTIONS["backend"]
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("factorized", 1), ("full", 2)])
def test_it_goes_with_compiled_blocks(
    pair: Pool, alone: Callable[..., dict[str, Any]], kind: str, stage: int, tmp_path: Path
) -> None:
    data = run_settings(tmp_path, kind, stage, 2, train={"compile": True})
    assert_equal(pair(compiled_steps, data, STEPS)[0], alone(kind))


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_degree(pair: Pool, solo: Pool, stage: int, tmp_path: Path) -> None:
    def data(folder: str, degree: int, data_ranks: int) -> dict[str, Any]:
        return run_settings(
            tmp_path / folder, "factorized", stage, degree, data_ranks,
            validation={"every": 3, "samples": 3}, samples={"every": 6, "count": 2, "sampler": {"steps": 2}},
        )  # fmt: skip

    whole = solo(run, data("whole", 1, 1))[0]["metrics"]
    pair(run, data("moved", 1, 2), 2)
    pair(run, data("moved", 2, 1), 4)
    moved = solo(run, data("moved", 1, 1))[0]["metrics"]
    shared = pair(run, data("shared", 2, 1))[0]["metrics"]
    for found in (moved, shared):
        assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
        for key in ("loss", "grad_norm", "validation_loss"):
            expected = [m[key] for m in whole if key in m]
            assert [m[key] for m in found if key in m] == pytest.approx(expected, rel=1e-4)
        assert [m["samples_seen"] for m in found] == [m["samples_seen"] for m in whole]


def sampled(run_dir: str, shared: bool) -> Any:
    """Latents of a guided video by the pipeline of a run."""
    from stdit.inference.pipeline import STDiTPipeline
    from stdit.training.distributed import sequence_group
    from stdit.training.engine import init_distributed

    pipe = STDiTPipeline.from_pretrained(run_dir)
    pipe.set_progress_bar_config(disable=True)
    if shared:
        pipe.set_sequence_parallel(sequence_group(init_distributed(int(os.environ["WORLD_SIZE"]))))
    output: Any = pipe(
        ["a seven", "two moving left"], num_frames=3, height=10, width=6, num_inference_steps=3, guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(n) for n in (1, 2)], output_type="latent",
    )  # fmt: skip
    return output.frames


@pytest.mark.parametrize("attention", ["factorized", "full"])
def test_a_video_over_several_ranks_is_that_of_one(pair: Pool, attention: str, tmp_path: Path) -> None:
    path = str(make_run(tmp_path / "run", model_config(**TEXT, attention=attention)))
    alone = sampled(path, shared=False)
    for found in pair(sampled, path, True):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def generated(arguments: list[str]) -> tuple[int, str]:
    from stdit.generate import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(arguments), said.getvalue()


def test_the_command_under_a_launcher_writes_each_video_once(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", model_config(**TEXT))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\ntwo moving left\nthree\n")
    common = ["--run", str(path), "--prompts", str(prompts), "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    for pool, out in ((solo, "one"), (pair, "two")):
        for code, _ in pool(generated, [*common, "--out", str(tmp_path / out)]):
            assert code == 0
    one, two = ((tmp_path / out / "manifest.jsonl").read_text().splitlines() for out in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        with open_clip(tmp_path / "one" / a["file"], "pyav") as x, open_clip(tmp_path / "two" / b["file"], "pyav") as y:
            difference = x.get(range(4)).astype(int) - y.get(range(4)).astype(int)
        assert abs(difference).max() <= 2
    # What is wrong is said once, by rank 0, and ends every rank.
    bad = pair(generated, [*common, "--out", str(tmp_path / "two"), "--frames", "8"])
    assert [code for code, _ in bad] == [2, 2]
    assert "holds videos with other settings" in bad[0][1]
    assert bad[1][1] == ""
