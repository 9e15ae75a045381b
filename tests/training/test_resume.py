"""The same command again: what comes back, what is refused, what another number of ranks makes of it."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from stdit.config import Config, validate
from stdit.training import checkpoint
from stdit.training.engine import restrict_unpickling
from stdit.training.resume import encoder_notes, find_resume_state
from tests.support.rank_jobs import (
    for_ranks,
    metrics,
    numbers,
    run,
    run_saving_on_rank_1,
    run_spoiled,
    run_stopping_on_rank_1,
    run_with_full_disk,
    run_with_nan,
    settings,
)
from tests.support.rank_pool import Pool, RankError
from tests.support.runs import TEXT, make_run, model_config

pytestmark = pytest.mark.distributed

PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def data_for(path: Path, stage: int, ranks: int = 2, **train: Any) -> dict[str, Any]:
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    data = settings(path, train={"zero_stage": stage, **extra, **train})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / checkpoint.folder_of_step(step)
    return {
        name: (folder / name / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("transformer", "transformer_ema")
    }


PROFILES = {"profiles": {"sigma_rel": [0.05, 0.1], "every": 2}}


def profiles(run_dir: Path, step: int) -> dict[str, bytes]:
    """Averages of the EMA's profiles in a checkpoint, and in all snapshots."""
    found = [
        *(run_dir / "checkpoints" / checkpoint.folder_of_step(step) / "ema_profiles").iterdir(),
        *(run_dir / "ema_snapshots").glob("step-????????/*/*.safetensors"),
    ]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_profiles_of_the_ema_resume_bit_for_bit(pair: Pool, stage: int, precision: str, tmp_path: Path) -> None:
    train: dict[str, Any] = {"checkpoint_every": 2, "ema": PROFILES, "precision": precision}
    pair(run, data_for(tmp_path / "whole", stage, **train))
    broken = data_for(tmp_path / "broken", stage, **train)
    pair(run_stopping_on_rank_1, broken, 3)
    assert sorted(p.name for p in (tmp_path / "broken/ema_snapshots").iterdir()) == ["step-00000002"]
    pair(run, broken)
    found, expected = (profiles(tmp_path / name, 6) for name in ("broken", "whole"))
    assert found == expected
    assert len(found) == 2 + 3 * 2


def test_a_checkpoint_that_one_rank_is_asked_for_is_written_and_training_goes_on(pair: Pool, tmp_path: Path) -> None:
    found = pair(run_saving_on_rank_1, data_for(tmp_path / "run", 1), 3)
    assert [r["stopped"] for r in found] == [False, False]
    assert found[0]["metrics"][-1]["step"] == 6
    # Written in the background: reported with step 3, or with the step at which it was there.
    assert found[0]["reports"][-1]["checkpoint"]
    assert (tmp_path / "run/checkpoints" / checkpoint.folder_of_step(3)).is_dir()


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_is_bitwise_equal(pair: Pool, stage: int, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", stage))[0]
    broken = data_for(tmp_path / "broken", stage)
    # One rank is asked; both stop, at the same step, with a checkpoint.
    stopped = pair(run_stopping_on_rank_1, broken, 3)
    assert [r["stopped"] for r in stopped] == [True, True]
    assert stopped[0]["metrics"][-1]["step"] == 3
    resumed = pair(run, broken)[0]
    assert numbers(resumed["metrics"]) == numbers(whole["metrics"])
    assert weights(tmp_path / "broken", 6) == weights(tmp_path / "whole", 6)
    assert "resumes after step 3" in resumed["said"]


def test_bfloat16_resumes_bitwise_too(pair: Pool, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", 2, precision="bf16"))[0]
    broken = data_for(tmp_path / "broken", 2, precision="bf16")
    pair(run_stopping_on_rank_1, broken, 3)
    assert numbers(pair(run, broken)[0]["metrics"]) == numbers(whole["metrics"])
    assert weights(tmp_path / "broken", 6) == weights(tmp_path / "whole", 6)


# Stages 1 to 3 go through DeepSpeed's converter, some three seconds each; those of 1 and 2 are alike.
FORTH = [(0, 2)]
BACK = [(0, 1), (2, 1), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2)]


@pytest.mark.parametrize(("stage", "ranks"), [*FORTH, *(pytest.param(*c, marks=pytest.mark.slow) for c in BACK)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_losses(
    pair: Pool, solo: Pool, stage: int, ranks: int, precision: str, tmp_path: Path
) -> None:
    first, second = (pair, solo) if ranks == 2 else (solo, pair)
    whole = first(run, data_for(tmp_path / "whole", stage, first.size, precision=precision))[0]["metrics"]
    first(run, data_for(tmp_path / "broken", stage, first.size, precision=precision), 3)
    resumed = second(run, data_for(tmp_path / "broken", stage, second.size, precision=precision))[0]
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    assert [m["loss"] for m in resumed["metrics"]] == pytest.approx([m["loss"] for m in whole], rel=tolerance)
    assert [m["samples_seen"] for m in resumed["metrics"]] == [m["samples_seen"] for m in whole]
    assert "the global batch is the same" in resumed["said"]
    assert not list((tmp_path / "broken").glob("checkpoints/.universal"))


def test_a_finished_run_returns_at_once_and_more_steps_go_on(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 1, 1, steps=3)
    solo(run, data)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = solo(run, data)[0]
    assert again["reports"] == []
    assert (tmp_path / "metrics.jsonl").read_text() == before
    longer = solo(run, data_for(tmp_path, 1, 1, steps=5))[0]
    assert [m["step"] for m in longer["metrics"]] == [1, 2, 3, 4, 5]
    assert "train.steps: 3 -> 5" in longer["said"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, 1, checkpoint_every=2, steps=6, ema=PROFILES)
    whole = solo(run, data)[0]["metrics"]
    averages = profiles(tmp_path, 6)
    (tmp_path / "done.json").unlink()
    flip(next((tmp_path / "checkpoints/step-00000006").glob("zero_pp_rank_0*")))
    resumed = solo(run, data)[0]
    assert "step-00000006 is skipped: zero_pp_rank_0" in resumed["said"]
    assert "resumes after step 4" in resumed["said"]
    assert numbers(resumed["metrics"]) == numbers(whole)
    # Set aside and saved again, never passed off as saved.
    assert (tmp_path / "checkpoints/step-00000006.damaged").is_dir()
    assert checkpoint.verify(tmp_path / "checkpoints/step-00000006") is None
    # Snapshots outlive checkpoints; those of steps that are trained once more are written anew.
    assert profiles(tmp_path, 6) == averages
    names = [f"step-0000000{end}" for end in ("2", "4", "6", "6.replaced")]
    assert sorted(p.name for p in (tmp_path / "ema_snapshots").iterdir()) == names
    assert [checkpoint.verify(tmp_path / "ema_snapshots" / name) for name in names] == [None] * 4
    # A finished run whose checkpoint is damaged is not finished.
    flip(tmp_path / "checkpoints/step-00000006/transformer_ema/diffusion_pytorch_model.safetensors")
    mended = solo(run, data)[0]
    assert "resumes after step 4" in mended["said"]
    assert numbers(mended["metrics"]) == numbers(whole)
    assert checkpoint.verify(tmp_path / "checkpoints/step-00000006") is None
    # All damaged: not a start from step 0.
    (tmp_path / "done.json").unlink()
    for folder in checkpoint.list_checkpoints(tmp_path):
        flip(folder / "identity.json")
    with pytest.raises(RankError, match="no checkpoint is intact") as error:
        solo(run, data)
    assert error.value.kind == "CheckpointError"


def test_damaged_checkpoints_never_cost_the_last_intact_one(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, 1, steps=6, checkpoint_every=2, keep_checkpoints=9)
    solo(run, data)
    (tmp_path / "done.json").write_text("")
    flip(tmp_path / "checkpoints/step-00000006/identity.json")
    flip(tmp_path / "checkpoints/step-00000002/identity.json")
    stopped = solo(run, data_for(tmp_path, 2, 1, steps=8, keep_checkpoints=1), 6)[0]
    assert "resumes after step 4" in stopped["said"]
    assert f"{tmp_path / 'done.json'} is ignored: is empty" in stopped["said"]
    assert [checkpoint.step_of(c) for c in checkpoint.list_checkpoints(tmp_path)] == [6]
    assert checkpoint.find_latest(tmp_path) is not None
    # The path of the checkpoint that it came from, which is gone, is nowhere in it.
    assert "_name_or_path" not in (tmp_path / "checkpoints/step-00000006/transformer_ema/config.json").read_text()


def test_a_save_that_was_cut_off_counts_as_not_there(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, 1, steps=4)
    solo(run, data, 2)
    last = tmp_path / "checkpoints/step-00000004"
    torn = checkpoint.start_partial(checkpoint.partial_folder(last))
    shutil.copytree(tmp_path / "checkpoints/step-00000002", torn, dirs_exist_ok=True)
    (torn / "manifest.json").unlink()
    # Lines of steps after the checkpoint, and one that was cut off.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    resumed = solo(run, data)[0]
    assert [m["step"] for m in resumed["metrics"]] == [1, 2, 3, 4]
    assert resumed["metrics"][2]["loss"] < 9
    assert checkpoint.find_latest(tmp_path) == last
    assert not torn.exists()


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("model", {"depth": 3}, "model.depth: 2 -> 3"),
        ("data", {"train_split": "validation"}, "data.train_split: train -> validation"),
        (
            "train",
            {"optimizer": {"learning_rate": 1.0}},
            "train.optimizer.learning_rate: 0.003 -> 1.0",
        ),
        ("train", {"precision": "bf16"}, "train.precision: fp32 -> bf16"),
        ("train", {"gradient_accumulation": 2}, "train.gradient_accumulation: 1 -> 2"),
    ],
)
def test_other_settings_are_another_run(
    solo: Pool, small: dict[str, Any], section: str, change: Any, said: str
) -> None:
    from stdit.config import merge

    with pytest.raises(RankError, match="holds a run with other settings") as error:
        solo(run, merge(small, {section: change}))
    assert error.value.kind == "ConfigError"
    assert said in error.value.message


@pytest.fixture(scope="module")
def small(solo: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that stopped after two of its four steps."""
    data = data_for(tmp_path_factory.mktemp("run"), 1, 1, steps=4)
    solo(run, data, 2)
    return data


class Poison:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_a_checkpoint_cannot_run_code(
    solo: Pool, pair: Pool, small: dict[str, Any], kind: str, ranks: int, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small["run_dir"], copy)
    folder = copy / "checkpoints/step-00000002"
    poisoned = list(folder.glob(f"*{kind}.pt"))
    for shard in poisoned:
        torch.save({"optimizer_state_dict": 0, "module": Poison(tmp_path / "ran")}, shard, pickle_module=pickle)
    assert poisoned
    reseal(folder)
    # Two ranks: the shards go through DeepSpeed's converter, another process.
    data = {**small, "run_dir": str(copy), "data": {**small["data"], "buckets": for_ranks(ranks)}}
    with pytest.raises(RankError, match="no checkpoint is intact"):
        (solo if ranks == 1 else pair)(run, data)
    assert not (tmp_path / "ran").exists()


def test_every_file_of_a_checkpoint_is_one_that_cannot_hold_code_or_is_tested_for_it(small: dict[str, Any]) -> None:
    """Tensors in safetensors, numbers in JSON, settings in YAML; torch's files are those of the test above."""
    files = [path for path in (Path(small["run_dir"]) / "checkpoints/step-00000002").rglob("*") if path.is_file()]
    others = [path.name for path in files if path.suffix not in (".safetensors", ".json", ".yaml")]
    assert others
    assert all(name.endswith(("optim_states.pt", "model_states.pt")) for name in others), others


def reseal(folder: Path) -> None:
    """Writes the manifest for the files as they are now."""
    (folder / "manifest.json").unlink()
    checkpoint.write_manifest(folder)


def test_an_intact_checkpoint_whose_identity_cannot_be_read_is_skipped(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    restrict_unpickling()
    older, newer = (tmp_path / "checkpoints" / checkpoint.folder_of_step(step) for step in (2, 4))
    for folder in (older, newer):
        shutil.copytree(Path(small["run_dir"]) / "checkpoints/step-00000002", folder)
    identity = checkpoint.read_identity(older)
    (newer / "identity.json").write_text(json.dumps({**identity, "validation_loss": math.nan}))
    reseal(newer)
    config = validate({**identity["config"], "run_dir": str(tmp_path)}, Config, "test")
    data = cast(Any, SimpleNamespace(fingerprint=identity["features"]))
    assert find_resume_state(config, data, 1).checkpoint == older
    assert re.search("step-00000004 is skipped: .*NaN is not a JSON number", capsys.readouterr().err)
    # Nor is a run finished that ended with it.
    (tmp_path / "done.json").write_text(json.dumps({"step": 4, "samples_seen": 32, "checkpoint": newer.name}))
    assert checkpoint.find_final(tmp_path, 4) is None
    assert re.search("done.json is ignored: .*NaN is not a JSON number", capsys.readouterr().err)


def test_a_checkpoint_that_deepspeed_cannot_load_is_skipped_and_saved_again(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, 1, checkpoint_every=1, steps=5, keep_checkpoints=9)
    whole = solo(run, data)[0]["metrics"]
    (tmp_path / "done.json").unlink()
    checkpoints = {checkpoint.step_of(c): c for c in checkpoint.list_checkpoints(tmp_path)}
    shard = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert shard in {p.name for p in checkpoints[5].iterdir()}
    (checkpoints[5] / shard).unlink()
    (checkpoints[4] / shard).write_bytes(b"no file of torch.save")
    # As DeepSpeed's by its looks.
    torch.save({"optimizer_state_dict": {}, "ds_config": {}}, checkpoints[3] / shard)
    for folder in checkpoints.values():
        reseal(folder)
    resumed = solo(run, data)[0]
    for reason in (
        "step-00000005 is skipped: it holds the optimizer state of 0 ranks, and was saved by 1",
        f"step-00000004 is skipped: {shard} is no file of torch.save",
        "step-00000003 is skipped: it cannot be loaded (",
        "resumes after step 2",
    ):
        assert reason in resumed["said"]
    assert numbers(resumed["metrics"]) == numbers(whole)
    assert {p.name for p in (tmp_path / "checkpoints").glob("*.damaged")} == {
        f"step-0000000{n}.damaged" for n in (3, 4, 5)
    }
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.list_checkpoints(tmp_path))


def test_if_deepspeed_can_load_none_nothing_is_renamed(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, 1, checkpoint_every=1, steps=2)
    solo(run, data)
    (tmp_path / "done.json").unlink()
    folders = checkpoint.list_checkpoints(tmp_path)
    for folder in folders:
        for shard in folder.glob("*optim_states.pt"):
            torch.save({"optimizer_state_dict": {}, "ds_config": {}}, shard)
        reseal(folder)
    with pytest.raises(RankError, match="no checkpoint is intact"):
        solo(run, data)
    assert checkpoint.list_checkpoints(tmp_path) == folders


SPOILED = [
    pytest.param(2, 2, "weights", marks=pytest.mark.slow),
    *((1, 0, "ema"), (1, 1, "moments"), (1, 2, "weights")),
]


@pytest.mark.parametrize(("ranks", "stage", "what"), SPOILED)
def test_weights_that_are_not_finite_are_never_saved(
    pair: Pool, solo: Pool, ranks: int, stage: int, what: str, tmp_path: Path
) -> None:
    pool = pair if ranks == 2 else solo
    data = data_for(tmp_path, stage, ranks, steps=4, checkpoint_every=2)
    with pytest.raises(RankError, match=r"step 4: the .* are not finite, and are not saved") as error:
        pool(run_spoiled, data, 4, what)
    assert error.value.kind == "Diverged"
    assert [checkpoint.step_of(c) for c in checkpoint.list_checkpoints(tmp_path)] == [2]
    assert not (tmp_path / "done.json").exists()
    # Once more, as if nothing had happened; on another number of ranks too.
    other = solo if ranks == 2 else pool
    finished = other(run, data_for(tmp_path, stage, other.size, steps=4, checkpoint_every=2))[0]
    assert "resumes after step 2" in finished["said"]
    assert (tmp_path / "done.json").exists()
    if ranks == 2:  # through DeepSpeed's universal format
        longer = data_for(tmp_path, stage, 2, steps=6)
        with pytest.raises(RankError, match=r"step 6: the .* are not finite"):
            pair(run_spoiled, longer, 6, what)
        assert checkpoint.step_of(checkpoint.list_checkpoints(tmp_path)[0]) == 4


def test_a_short_run_of_nothing_but_nan_is_not_finished(solo: Pool, tmp_path: Path) -> None:
    with pytest.raises(
        RankError, match=r"step 8: \d of the last \d steps of bucket .* had a gradient that is not finite"
    ):
        solo(run, data_for(tmp_path, 0, 1, steps=8, optimizer={"learning_rate": 1e12, "warmup_steps": 0}))
    assert not (tmp_path / "done.json").exists()


def test_samples_whose_loss_is_not_finite_are_named_on_all_ranks(pair: Pool, tmp_path: Path) -> None:
    spoiled = [3, 250, 1007]
    found = pair(run_with_nan, data_for(tmp_path, 1, steps=12, max_bad_share=1), spoiled)[0]
    # 12 steps, about half of 8 clips, half of 16 images, of 256 each: the steps that had one of the three.
    named = [name for line in found["metrics"] for name in line.get("bad_samples", ())]
    bad = [line["step"] for line in found["metrics"] if line["loss"] is None]
    assert [line["step"] for line in found["metrics"] if line.get("bad_samples")] == bad
    assert 0 < len(named) <= 3
    for name in named:
        id = int(name.split()[1])
        assert id in spoiled
        bucket = "1x8x8" if id > 999 else "2x8x8"
        assert name.startswith(f"sample {id} (bucket {bucket}, clips/{id}.mp4, 'waves of kind ")
        assert name in found["said"]
    assert "skipped steps, whose gradient was not finite: " in found["said"]


def test_skipped_steps_are_counted_over_a_resume(solo: Pool, tmp_path: Path) -> None:
    spoiled = [*range(0, 256, 12), *range(1000, 1256, 24)]

    def trained(name: str, steps: int) -> tuple[str, Any]:
        data = data_for(tmp_path / name, 0, 1, steps=steps, max_bad_share=1, max_bad_steps=steps)
        said = solo(run_with_nan, data, spoiled)[0]["said"]
        lines = [line for line in said.splitlines() if line.startswith("skipped steps")]
        return lines[0], checkpoint.read_identity(tmp_path / name)

    expected = trained("whole", 12)
    first, _ = trained("resumed", 6)
    assert trained("resumed", 12)[0] == expected[0] != first
    found = checkpoint.read_identity(tmp_path / "resumed")["skipped_steps"]
    assert found == expected[1]["skipped_steps"]


def test_a_bucket_that_is_all_nan_ends_the_run(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 0, 1, steps=40, max_bad_steps=3)
    with pytest.raises(RankError, match=r"4 of the last 4 steps of bucket 1x8x8 had a gradient") as error:
        solo(run_with_nan, data, list(range(1000, 2000)))
    assert error.value.kind == "Diverged"
    assert not (tmp_path / "done.json").exists()


def test_not_a_number_for_too_long_ends_the_run(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 0, 1, steps=9, max_bad_steps=2, optimizer={"learning_rate": 1e12, "warmup_steps": 0})
    with pytest.raises(RankError, match=r"step 4: 3 consecutive steps had a gradient .*max_bad_steps is 2") as error:
        solo(run, data)
    assert error.value.kind == "Diverged"
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4]
    assert metrics(tmp_path)[3]["loss"] is None
    assert not (tmp_path / "done.json").exists()


def test_looking_at_a_run_does_not_change_it(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    plain = pair(run, data_for(tmp_path / "plain", 3))[0]["metrics"]
    looked_at = data_for(tmp_path / "looked", 3)
    looked_at |= {
        "validation": {"every": 2, "samples": 5, "times": [0.2, 0.8]},
        "samples": {"every": 3, "count": 3, "sampler": {"steps": 2, "guidance_scale": 2.0}},
    }
    seen = pair(run, looked_at)[0]
    strip = [{k: v for k, v in m.items() if not k.startswith("validation_loss")} for m in numbers(seen["metrics"])]
    assert strip == numbers(plain)
    assert sorted(p.name for p in (tmp_path / "looked/samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    # The same clips, noise and times on any number of ranks.
    alone = {**looked_at, "run_dir": str(tmp_path / "alone")}
    alone["data"] = {**alone["data"], "buckets": for_ranks(1)}
    other = [m["validation_loss"] for m in solo(run, alone)[0]["metrics"] if "validation_loss" in m]
    found = [m["validation_loss"] for m in seen["metrics"] if "validation_loss" in m]
    assert len(found) == 3
    assert found == pytest.approx(other, rel=1e-4)


def test_every_rank_receives_the_checkpoints_identity(pair: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 2, steps=3)
    both = pair(run, data)
    assert [[r["checkpoint"] for r in one["reports"]] for one in both] == [
        [None, None, str(tmp_path / "checkpoints/step-00000003")]
    ] * 2
    told = checkpoint.read_identity(tmp_path)
    assert told["step"] == 3
    assert told["architecture"]["depth"] == 2
    assert told["video_encoder"]["kind"] == "pixels"
    assert told["classes"] == ["0", "1", "2", "3"]
    assert sum(told["data_position"].values()) == told["samples_seen"] == both[0]["metrics"][-1]["samples_seen"]
    assert told["config"]["seed"] == 0
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["checkpoint"] == "step-00000003"


def test_a_new_run_begins_from_another_one(solo: Pool, small: dict[str, Any], tmp_path: Path) -> None:
    changed = {**small, "run_dir": str(tmp_path), "init": {"source": small["run_dir"], "allow": ["rescale_positions"]}}
    changed["model"] = {**small["model"], "position_base": 4}
    told = solo(run, changed)[0]
    assert "weights from" in told["said"]
    assert "loaded" in told["said"]
    assert [m["step"] for m in told["metrics"]] == [1, 2, 3, 4]
    refused = {**changed, "run_dir": str(tmp_path / "other"), "init": {"source": small["run_dir"]}}
    with pytest.raises(RankError, match="init.source") as error:
        solo(run, refused)
    assert error.value.kind == "ConfigError"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_save_that_fails_is_said_and_the_run_goes_on_as_if_it_had_not_been_due(
    pair: Pool, rank: int, tmp_path: Path
) -> None:
    whole = pair(run, data_for(tmp_path / "whole", 1))[0]
    data = data_for(tmp_path / "run", 1, checkpoint_every=1, keep_checkpoints=9)
    found = pair(run_with_full_disk, data, [2, 3], rank)[0]
    folder = tmp_path / "run/checkpoints"
    assert f"WARNING: {folder}/step-00000002: the checkpoint could not be written on rank {rank} (" in found["said"]
    assert "Training goes on without it (2 in a row; train.max_failed_saves is 3)" in found["said"]
    # Neither a part of them nor anything that counts as damaged.
    assert sorted(p.name for p in folder.glob("step-*")) == [f"step-0000000{n}" for n in (1, 4, 5, 6)]
    assert all(checkpoint.verify(each) is None for each in checkpoint.list_checkpoints(tmp_path / "run"))
    assert [m["loss"] for m in found["metrics"]] == [m["loss"] for m in whole["metrics"]]
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "whole", 6)


def test_saves_that_fail_too_often_or_at_the_end_end_the_run(pair: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path / "often", 1, checkpoint_every=1, max_failed_saves=1)
    with pytest.raises(RankError, match="step-00000003: the checkpoint could not be written") as error:
        pair(run_with_full_disk, data, [2, 3], 1)
    assert error.value.kind == "NotWritten"
    assert [checkpoint.step_of(c) for c in checkpoint.list_checkpoints(tmp_path / "often")] == [1]
    with pytest.raises(RankError, match="step-00000006: the checkpoint could not be written"):
        pair(run_with_full_disk, data_for(tmp_path / "end", 1), [6])
    assert not (tmp_path / "end/done.json").exists()
    # The same command goes on.
    assert pair(run, data)[0]["metrics"][-1]["step"] == 6


def test_the_best_by_validation_and_every_nth_checkpoint_stay(solo: Pool, tmp_path: Path) -> None:
    data = data_for(tmp_path, 1, 1, steps=12, checkpoint_every=1, keep_checkpoints=1, keep_every=5, keep_best=2)
    data["validation"] = {"every": 1, "samples": 4, "times": [0.5]}
    losses = {m["step"]: m["validation_loss"] for m in solo(run, data)[0]["metrics"]}
    best = sorted(losses, key=losses.__getitem__)[:2]
    left = [checkpoint.step_of(c) for c in checkpoint.list_checkpoints(tmp_path)]
    assert sorted(left) == sorted({12, 5, 10, *best})
    assert checkpoint.read_identity(tmp_path)["validation_loss"] == losses[12]


def test_the_batch_of_a_bad_step_is_kept(pair: Pool, tmp_path: Path) -> None:
    spoiled = [3, 250]
    found = pair(run_with_nan, data_for(tmp_path, 1, steps=24, max_bad_share=1), spoiled)[0]
    bad = [line for line in found["metrics"] if line.get("bad_samples")]
    files = sorted((tmp_path / "bad_batches").glob("*.safetensors"))
    assert len(files) == len(bad) > 0
    for line, path in zip(bad, files, strict=True):
        assert path.name.startswith(f"step-{line['step']:08d}-rank-")
        with safe_open(path, "pt") as file:
            said = file.metadata()
            facts, mean = json.loads(said["samples"]), file.get_tensor("mean")
        assert said["bucket"] == "2x8x8"
        (at,) = (i for i, id in enumerate(facts["ids"]) if id in spoiled)
        assert facts["losses"][at] == "nan"
        assert facts["paths"][at] == f"clips/{facts['ids'][at]}.mp4"
        assert [bool(sample.isfinite().all()) for sample in mean] == [i != at for i in range(len(mean))]


def test_weights_of_a_run_on_other_latents_or_captions_are_noted(tmp_path: Path) -> None:
    init = checkpoint.find_weights(make_run(tmp_path / "run", model_config(**TEXT)), "ema")
    identity = checkpoint.identity_beside(init)
    video, text = identity["video_encoder"], identity["text_encoder"]

    def notes(**now: Any) -> list[str]:
        return encoder_notes(init, cast(Any, SimpleNamespace(**{"video_encoder": video, "text_encoder": text} | now)))

    assert notes() == []
    assert notes(text_encoder={**text, "path": "elsewhere"}) == []
    (said,) = notes(video_encoder={**video, "scale": [2.0 * value for value in video["scale"]]})
    assert said.startswith("note: init.source was trained with another video_encoder: scale")
    (said,) = notes(text_encoder={**text, "class": "UMT5EncoderModel"})
    assert (
        said == f"note: init.source was trained with another text_encoder: class: {text['class']} -> UMT5EncoderModel"
    )
    (init.parent / checkpoint.IDENTITY).unlink()  # a diffusers folder
    assert notes(text_encoder=None, video_encoder={}) == []
