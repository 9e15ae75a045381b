"""tokens_per_step: as many samples of a bucket as fit, the same for any number of ranks, shared out equally, or
refused."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as quick
from hypothesis import strategies as st

from pipelines.forecast import EqualSource, forecast
from pipelines.plan import ResolvedStage, Resources
from stdit import find_batch_size
from stdit.config import Config, ConfigError, ModelConfig, dump, load_config, merge
from stdit.config.token_budget import MAX_IMBALANCE, NODE, imbalance, step_sizes
from stdit.data.features import pad_texts
from stdit.data.loader import Loader, Synthetic, collate
from stdit.training.data import open_data
from stdit.training.derive import complete
from stdit.training.performance import useful_tokens
from tests.support.rank_jobs import config_of, run_recorded, settings
from tests.support.rank_pool import Pool, RankError

BUCKETS = [{"frames": frames, "height": 8, "width": 8} for frames in (2, 1)]  # of 32 and 16 tokens


def budgeted(run_dir: Path | str, tokens: int = 2048, **train: Any) -> dict[str, Any]:
    data = settings(run_dir, train={"tokens_per_step": tokens, "zero_stage": 1, **train})
    return merge(data, {"data": {"buckets": BUCKETS}})


def sizes(config: Config) -> list[tuple[int | None, int | None, int | None]]:
    return [(b.tokens, b.global_batch, b.batch_size) for b in config.data.buckets]


@quick(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.integers(1, 20_000), min_size=1, max_size=6),
    budget=st.integers(1, 2**24),
    multiple=st.none() | st.integers(1, 48),
    micro=st.none() | st.integers(1, 100_000),
)
def test_budgets_are_kept_and_used_but_for_a_multiple(
    tokens: list[int], budget: int, multiple: int | None, micro: int | None
) -> None:
    by_key = {str(i): n for i, n in enumerate(tokens)}
    assume(budget >= max(tokens) * (multiple or 1) and (micro is None or micro >= max(tokens)))
    unit = multiple or math.gcd(budget // max(tokens), NODE)
    for key, (samples, size) in step_sizes(by_key, budget, multiple, micro).items():
        assert samples % unit == 0
        assert samples * by_key[key] <= budget < (samples + unit) * by_key[key]
        assert (size is None) == (micro is None)
        assert size is None or micro is None or 1 <= size * by_key[key] <= micro


@quick(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.integers(1, 5000), min_size=2, max_size=5),
    budget=st.integers(5000, 2**22),
    ranks=st.integers(1, 32),
)
def test_with_a_multiple_of_the_ranks_their_work_is_equal(tokens: list[int], budget: int, ranks: int) -> None:
    assume(budget >= ranks * max(tokens))
    for samples, _ in step_sizes({str(i): n for i, n in enumerate(tokens)}, budget, ranks, None).values():
        assert imbalance(samples, ranks) == 0
    # Of any number of samples, ten or more a rank are near enough.
    assert imbalance(10 * ranks + budget % ranks, ranks) <= MAX_IMBALANCE


@quick(deadline=None, max_examples=40)
@given(samples=st.integers(1, 60), ranks=st.integers(1, 5), size=st.integers(1, 7))
def test_ranks_differ_by_one_sample_at_most_with_accumulation_too(samples: int, ranks: int, size: int) -> None:
    assume(samples >= ranks)
    data = {"frames": 1, "height": 2, "width": 2, "global_batch": samples, "batch_size": size}
    config = config_of(merge(settings("x"), {"data": {"buckets": [data]}}))
    try:
        loaders = [Loader(Synthetic(1, 4, None, 1), config.data, 0, rank, ranks) for rank in range(ranks)]
    except ConfigError:
        return
    steps = [next(iter(loader)) for loader in loaders]
    taken = [sum(map(len, step.batches)) for step in steps]
    assert sum(taken) == samples
    assert max(taken) - min(taken) <= 1
    assert max(abs(n * ranks / samples - 1) for n in taken) == pytest.approx(imbalance(samples, ranks))
    positions = [p for step in steps for batch in step.parts for p in batch.positions]
    assert positions == list(range(samples))


def test_sizes_follow_from_the_models_tokens_and_stand_in_the_resolved_config(tmp_path: Path) -> None:
    config = complete(config_of(budgeted("runs/x", tokens_per_micro_batch=480)))
    assert sizes(config) == [(32, 64, 15), (16, 128, 30)]
    larger = config_of(merge(budgeted("runs/x"), {"model": {"patch_size": [1, 4, 4]}}))
    assert [b.tokens for b in complete(larger).data.buckets] == [8, 4]
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_config(tmp_path / "config.yaml", Config) == config
    assert complete(config) is config
    with pytest.raises(ConfigError, match=r"global_batch 64 .* not what train.tokens_per_step 4096 makes, \(128, 15\)"):
        load_config(tmp_path / "config.yaml", Config, ["train.tokens_per_step=4096"])
    coarser = load_config(tmp_path / "config.yaml", Config, ["model.patch_size=[1, 4, 4]"])
    with pytest.raises(ConfigError, match=r"data.buckets\[0\] 2x8x8: tokens is 32, but a sample of this model has 8"):
        open_data(complete(coarser))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"buckets": [{**BUCKETS[0], "batch_size": 4}]}}, r"tokens_per_step is 2048 and data.buckets 2x8x8: batch_size 4"),
        ({"data": {"buckets": [{**BUCKETS[0], "global_batch": 4}]}}, r"tokens_per_step is 2048 and .*: global_batch 4"),
        ({"data": {"buckets": [{**BUCKETS[0], "tokens": 32}]}}, r"global_batch None .* are not what train.tokens_per_step 2048 makes, \(64, None\)"),
        ({"train": {"gradient_accumulation": 2}}, r"gradient_accumulation is 2, which follows from train.tokens_per_step"),
        ({"train": {"tokens_per_step": None, "samples_multiple_of": 2}}, r"samples_multiple_of is 2, which needs train.tokens_per_step"),
        ({"train": {"tokens_per_step": None}}, r"bucket 2x8x8 states neither batch_size nor global_batch"),
        ({"train": {"tokens_per_step": 31}}, r"tokens_per_step is 31, less than one sample of bucket 2x8x8, which has 32 tokens; give 32"),
        ({"train": {"tokens_per_step": 100, "samples_multiple_of": 4}}, r"less than 4 samples .* of bucket 2x8x8.*give 128 or more"),
        ({"train": {"tokens_per_micro_batch": 20}}, r"tokens_per_micro_batch is 20, less than one sample of bucket 2x8x8"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_or_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(config_of(merge(budgeted("runs/x"), changes)))


def test_ranks_far_from_equal_work_are_refused_with_what_helps() -> None:
    config = complete(config_of(budgeted("runs/x", 5 * 32)))
    assert [b.global_batch for b in config.data.buckets] == [5, 10]
    config.micro_batches(1)
    config.micro_batches(5)
    with pytest.raises(
        ConfigError, match=r"2x8x8: .* 5 samples of 32 tokens, 2 to 3 .* 20% from equal work \(10% at most\)"
    ) as error:
        config.micro_batches(2)
    found = re.search(r"samples_multiple_of: (\d+)$", str(error.value))
    assert found is not None
    helped = complete(config_of(budgeted("runs/x", 5 * 32, samples_multiple_of=int(found[1]))))
    helped.micro_batches(2)
    assert [b.global_batch for b in helped.data.buckets] == [4, 10]
    with pytest.raises(ConfigError, match=r"samples_multiple_of: 8 and a tokens_per_step of 256 or more"):
        config.micro_batches(8)


@pytest.mark.distributed
def test_two_ranks_then_one_train_as_stated_global_batches_do_and_log_their_work(
    pair: Pool, solo: Pool, tmp_path: Path
) -> None:
    stated = settings(tmp_path / "stated", train={"zero_stage": 0})
    stated["data"]["buckets"] = [{**b, "global_batch": n} for b, n in zip(BUCKETS, (64, 128), strict=True)]
    whole = solo(run_recorded, stated)
    data = budgeted(tmp_path / "parts", tokens_per_micro_batch=480)
    parts = [pair(run_recorded, data, 3), solo(run_recorded, data)]

    def samples(runs: list[Any]) -> dict[tuple[Any, ...], Any]:
        return {entry[:3]: entry[3:] for ranks in runs for rank in ranks for entry in rank["samples"]}

    assert samples(parts) == samples([whole])
    metrics = parts[-1][0]["metrics"]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in whole[0]["metrics"]], rel=1e-5)
    for m in metrics:
        assert m["tokens_per_step"] == 2048
        assert m["rank_imbalance"] <= MAX_IMBALANCE
        assert 0.5 < m["useful_tokens"] <= 1
    with pytest.raises(RankError, match="global_batch: 64 -> 32") as error:
        solo(run_recorded, {**data, "train": {**data["train"], "tokens_per_step": 1024}})
    assert error.value.kind == "ConfigError"


def test_useful_tokens_are_those_that_are_not_padding() -> None:
    texts = [torch.ones(n, 4) for n in (2, 5, 5)]
    model = ModelConfig(hidden_size=8, depth=1, num_heads=1, patch_size=(1, 2, 2), text_dim=4, in_channels=1)
    source = Synthetic(1, None, None, 1)
    bucket = complete(config_of(budgeted("x"))).data.buckets[1]
    samples = [source.sample(i) for i in source.select("train", [bucket])[bucket.key][:3]]
    batch = collate(samples, range(3), bucket)
    assert useful_tokens(batch, model) == (48, 48)
    features, mask = pad_texts(texts)
    captioned = type(batch)(**{**vars(batch), "text": features, "text_mask": mask})
    assert useful_tokens(captioned, model) == (48 + 12, 48 + 15)
    # 8x8 latents in patches of 3: 9 patches of which 64 / 9 are latents.
    assert useful_tokens(batch, model.model_copy(update={"patch_size": (1, 3, 3)})) == (pytest.approx(3 * 64 / 9), 27)


def test_at_usual_sizes_nearly_all_tokens_are_useful() -> None:
    """256 px, compression 8, patches of 2, 17 frames; captions of 20 to 120 tokens."""
    model = ModelConfig(size="S", patch_size=(1, 2, 2), text_dim=1, in_channels=1)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.ones(int(n), 1) for n in torch.randint(20, 121, (16,), generator=generator)]
    source, bucket = Synthetic(1, None, None, 1), config_of(budgeted("x")).data.buckets[0]
    (first, *_) = source.select("train", [bucket])[bucket.key]
    sample = source.sample(first)
    batch = collate(
        [type(sample)(**{**vars(sample), "mean": torch.zeros(1, 5, 32, 32), "text": text}) for text in texts],
        range(16),
        bucket,
    )
    useful, processed = useful_tokens(batch, model)
    assert useful / processed > 0.95


def test_the_forecast_has_the_sizes_of_each_bucket() -> None:
    config = complete(config_of(budgeted("runs/x", 2050, tokens_per_micro_batch=480)))
    found = forecast(
        ResolvedStage("a", config, None, "a"), Resources(workers=2), EqualSource(Path("m.jsonl")), (1, 1, 1), 5
    )
    assert [(b.samples_per_step, b.tokens) for b in found.buckets] == [(64, 32), (128, 16)]
    assert "steps of 128" in str(found)
    assert "100% of tokens_per_step, ranks 0% from equal work" in str(found)


def test_find_batch_size_gives_the_tokens_of_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(budgeted(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(dump(config))
    fits = {"2x8x8": 5, "1x8x8": 12}
    monkeypatch.setattr(
        find_batch_size,
        "run_try",
        lambda own, key, size, *_: find_batch_size.Try(
            size, size <= fits[key], "" if size <= fits[key] else "full", 1, 1.0
        ),
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert find_batch_size.main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert said.getvalue().splitlines()[-1].startswith("train.tokens_per_micro_batch: 160 ")
    alone = find_batch_size.with_bucket(complete(config), "2x8x8", 3)
    assert alone.train.tokens_per_step is None
    assert alone.micro_batches(1)["2x8x8"].samples == 3
