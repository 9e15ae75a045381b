"""train.packing: the loss and gradients of packed micro-batches are those of their samples unpacked; what does not go
with it is refused."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.forecast import EqualSource, forecast
from pipelines.plan import ResolvedStage, Resources
from stdit.config import Config, ConfigError, merge
from stdit.data.loader import PACKED, Loader
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.training.data import open_data
from stdit.training.derive import complete
from stdit.training.distributed import Ranks
from stdit.training.inputs import Inputs
from stdit.training.out_of_memory import MemoryErrors
from tests.support.models import shaken
from tests.support.rank_jobs import config_of, run, run_recorded, settings
from tests.support.rank_pool import Pool, RankError

BUCKETS = [{"frames": frames, "height": side, "width": 8} for frames, side in ((3, 8), (1, 8), (1, 4))]


def packed(run_dir: Path | str, **changes: Any) -> dict[str, Any]:
    train = {"packing": True, "tokens_per_step": 700, "tokens_per_micro_batch": 150, "zero_stage": 1}
    return merge(merge(settings(run_dir), {"data": {"buckets": BUCKETS}, "train": train}), changes)


def completed(**changes: Any) -> Config:
    return complete(config_of(packed("runs/x", **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"attention": "full"}, "diffusion": {"frame_conditioning": {"first": 0.5}}},
        {
            "model": {"drop_path": 0.3, "learned_variance": True},
            "diffusion": {"objective": "ddpm", "min_snr_gamma": 5.0},
        },
        {"train": {"lora": {"rank": 2}}, "init": {"source": "runs/other"}},
    ],
    ids=["full", "ddpm", "lora"],
)
def test_a_packed_step_has_the_loss_and_gradients_of_its_samples_unpacked(changes: dict[str, Any]) -> None:
    config = completed(**changes)
    data = open_data(config) if config.init is None else open_data(config.model_copy(update={"init": None}))
    model = shaken(add_trainable(STDiT.from_settings(config.model), config.train)).train()  # pyright: ignore
    inputs = Inputs(config, data.video_encoder, torch.device("cpu"))
    step = next(iter(Loader(data.source, config.data, 0, packing=config.train.packing_budget)))

    def gradients(parts: bool) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        total, each = 0.0, []
        for batch in step.batches:
            for one in batch.parts if parts else (batch,):
                loss = inputs.loss(model, one, 1)
                share = len(one) / step.samples if parts else batch.weight / len(step.batches)
                (loss.total * share).backward()
                total += float(loss.total.detach()) * share
                each.append(loss.each)
        return total, torch.cat(each), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, found = gradients(parts=True), gradients(parts=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert len(found[2]) == len(expected[2]) > 0
    for x, y in zip(found[2], expected[2], strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-7


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_then_one_train_packed_as_one_does_and_log_their_work(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    whole = solo(run_recorded, packed(tmp_path / "whole", train={"tokens_per_micro_batch": None}))
    data = packed(tmp_path / "parts", train={"activation_checkpointing": True})
    parts = [pair(run_recorded, data, 3), solo(run_recorded, data)]

    def samples(runs: list[Any]) -> dict[tuple[Any, ...], Any]:
        return {entry[:3]: entry[3:] for ranks in runs for rank in ranks for entry in rank["samples"]}

    assert samples(parts) == samples([whole])
    metrics = parts[-1][0]["metrics"]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in whole[0]["metrics"]], rel=1e-5)
    for m in metrics:
        assert m["bucket"] == "packed"
        assert 700 - 48 < m["tokens_per_step"] <= 700
        assert m["rank_imbalance"] <= 0.1
        assert 0.5 < m["useful_tokens"] <= 1
    with pytest.raises(RankError, match=r"train.tokens_per_step: 700 -> 705") as error:
        solo(run, {**data, "train": {**data["train"], "tokens_per_step": 705}})
    assert error.value.kind == "ConfigError"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{"zero_stage": 0}, {"zero_stage": 2}, {"precision": "bf16"}], ids=str)
def test_so_under_other_zero_stages_and_in_bfloat16(
    changes: dict[str, Any], pair: Pool, solo: Pool, tmp_path: Path
) -> None:
    whole = solo(run, packed(tmp_path / "whole"))
    found = pair(run, packed(tmp_path / "pair", train=changes))
    tolerance = 0.05 if "precision" in changes else 1e-4
    losses = [[m["loss"] for m in ranks[0]["metrics"]] for ranks in (found, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"buckets": [{**BUCKETS[0], "batch_size": 2}]}, "train": {"tokens_per_step": None, "tokens_per_micro_batch": None}}, "packing needs train.tokens_per_step"),
        ({"train": {"samples_multiple_of": 2}}, "samples_multiple_of 2: a step is filled"),
        ({"train": {"sequence_parallel": 2}}, "sequence_parallel 2: the tokens"),
        ({"train": {"control": {}}, "init": {"source": "x"}}, "train.control .*: a control branch's residuals"),
        ({"train": {"dynamic": {"target_flops_ratio": 0.5}}, "model": {"dynamic_width": True}}, "train.dynamic .*: routers"),
        ({"train": {"alignment": {"block": 0}}}, "train.alignment .*: its head"),
        ({"train": {"zero_stage": 3}}, "train.zero_stage 3: ranks gather the embeddings' weights"),
        ({"train": {"token_routing": {"start": 0, "end": 1}}}, "train.token_routing .*: kept tokens"),
        ({"train": {"compile": True}}, "train.compile True: blocks would be compiled anew"),
        ({"train": {"on_spike": "rewind"}}, "train.on_spike rewind: a rewind"),
        ({"diffusion": {"contrastive_weight": 0.1}}, "diffusion.contrastive_weight 0.1: it compares"),
        ({"model": {"conditioning": "joint"}}, "train.packing: packed sequences: conditioning joint"),
        ({"model": {"mlp": "conv2d"}}, "train.packing: packed sequences: mlp conv2d"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_packing_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(packed("runs/x", **changes))


def test_too_few_tokens_for_the_ranks_are_refused_before_the_run() -> None:
    config = completed()
    config.micro_batches(2)
    with pytest.raises(ConfigError, match="tokens_per_step is 700; .* 20 data-parallel ranks it takes 960"):
        config.micro_batches(20)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_a_packed_step_that_does_not_fit_advises_is_accepted(stage: int) -> None:
    config = completed(train={"zero_stage": stage})
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    message = MemoryErrors(config, open_data(config), ranks).describe(torch.OutOfMemoryError(""), 3, PACKED)
    assert "out of memory in a packed micro-batch" in message
    advised = dict(re.findall(r"train\.(\w+): (\w+)", message))
    expected = {"tokens_per_micro_batch": "96", "activation_checkpointing": "true"}
    assert advised == expected | ({"zero_stage": "1"} if stage == 0 else {})
    for name, value in advised.items():
        completed(train={"zero_stage": stage, name: yaml.safe_load(value)}).micro_batches(2)


def test_the_forecast_counts_the_samples_that_training_takes() -> None:
    config = completed(train={"steps": 30})
    found = forecast(
        ResolvedStage("a", config, None, "a"), Resources(workers=2), EqualSource(Path("m.jsonl")), (1, 1, 1), 5
    )
    loader = Loader(open_data(config).source, config.data, 0, packing=config.train.packing_budget)
    last = list(islice(loader, 30))[-1]
    assert {b.key: b.samples for b in found.buckets} == last.position
    assert f"{sum(last.position.values()):,} samples" in str(found)
