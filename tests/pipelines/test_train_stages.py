"""A whole plan under Ray, killed and run again; and what is refused before anything is begun."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from pipelines import plan as plans
from pipelines import train_stages, workers
from pipelines.record import Record, set_aside
from pipelines.runner import PlanFailed, PlanRunner
from stdit import extract, metrics_log
from stdit.config import ConfigError
from stdit.curation.curation import CurationError
from stdit.data.extraction import ExtractionError
from stdit.evaluation import networks
from tests.support.paths import ROOT
from tests.support.runs import make_run, model_config

# Enough to kill a worker in a stage; SHORT is for a plan that nothing happens to.
STEPS, SHORT = 200, 20


def clips(folder: Path, count: int = 24) -> Path:
    """A manifest of small pictures of two classes, some held out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        kind, side = i % 2, 8
        pixels = rng.integers(0, 60, (side, side), dtype=np.uint8)
        pixels[2:6, 2:6] = 255 if kind else 120
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({
            "path": f"{i}.png", "caption": f"a {'bright' if kind else 'dim'} square", "class": kind, "fps": None, "frames": 1,
            "height": side, "width": side, "split": "validation" if i % 6 > 3 else "train", "score": i / count,
        })  # fmt: skip
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def stage(steps: int = STEPS, **model: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "in_channels": 1, "patch_size": [1, 4, 4]}
    return {
        "run_dir": "unused",
        "model": {**sizes, **model},
        "data": {"features": "unused", "buckets": [{"frames": 1, "height": 8, "width": 8, "batch_size": 4}]},
        "train": {
            "steps": steps, "zero_stage": 1, "checkpoint_every": steps // 4, "log_every": 1, "tensorboard": False,
            "optimizer": {"learning_rate": 1e-3}, "ema": {"decay": 0.9},
        },
    }  # fmt: skip


def write_plan(folder: Path, workers: int = 2, steps: int = STEPS) -> Path:
    """Two stages, classes and then captions."""
    (folder / "one.yaml").write_text(yaml.safe_dump(stage(steps, num_classes=2)))
    (folder / "two.yaml").write_text(yaml.safe_dump(stage(steps, text_dim=16, max_text_tokens=32)))
    plan = {
        "name": "small",
        "run_dir": str(folder / "run"),
        "extraction": {
            "manifest": str(clips(folder / "clips")),
            "buckets": [{"frames": 1, "height": 8, "width": 8}],
            "video_encoder": {"kind": "pixels", "channels": 1},
            "text_encoder": {"byte_t5": {"width": 16, "depth": 1, "num_heads": 2}, "max_text_tokens": 32},
        },
        "resources": {"workers": workers, "deadline_s": 400},
        "stages": {
            "one": {"config": str(folder / "one.yaml")},
            "two": {"config": str(folder / "two.yaml"), "after": "one", "allow": ["class_to_text"]},
        },
        "evaluation": {
            "prompts": 4,
            "sampler": {"steps": 2},
            "metrics": {"classifier_steps": 5, "direction_column": None},
            "scores": {"bootstrap": 2},
        },
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def write_sets(folder: Path, steps: int = SHORT) -> Path:
    """The plan of two sets, of 24 and of 12 pictures: the first stage takes both, three to one, the second the smaller
    one alone."""
    path = write_plan(folder, 1, steps)
    plan = yaml.safe_load(path.read_text())
    plan["sets"] = {
        "squares": {"extraction": {"manifest": plan["extraction"].pop("manifest")}},
        "few": {"extraction": {"manifest": str(clips(folder / "few", 12))}},
    }
    plan["stages"]["one"]["sets"] = {"squares": 0.75, "few": 0.25}
    plan["stages"]["two"]["sets"] = {"few": 1}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


class Run:
    """`python -m pipelines.train_stages` as a user starts it."""

    def __init__(self, plan: Path, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.train_stages", "--plan", str(plan)],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def until(self, condition: Callable[[], Any], timeout_s: float = 400) -> Any:
        """Waits for a condition while the run lives."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"nothing after {timeout_s} s:\n{self.log.read_text()}"
            time.sleep(0.05)
        return found

    def trainers(self) -> list[psutil.Process]:
        """The processes that train."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in below if "TrainWorker" in _title(p)]

    def end(self) -> int:
        """Waits for the end; its exit code."""
        return self.process.wait(timeout=300)

    def cut_off(self) -> None:
        """Ends driver, Ray and trainers at once, as a power cut would."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        assert any("TrainWorker" in _title(p) for p in tree)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, left = psutil.wait_procs(tree, timeout=30)
        assert not left


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def steps(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in metrics_log.read(run_dir / metrics_log.FILE)]


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_plan_survives_its_driver_and_its_workers_and_then_does_nothing(workers: int, tmp_path: Path, capsys) -> None:
    plan = write_plan(tmp_path, workers)
    out = tmp_path / "run"

    # All is cut off in the first stage.
    run = Run(plan, tmp_path / "1.log")
    run.until(lambda: checkpoints(out / "one"))
    run.cut_off()
    assert not (out / "one" / "done.json").exists()

    # Run again: the first stage goes on; in the second a worker is killed, and started again from the newest
    # checkpoint.
    run = Run(plan, tmp_path / "2.log")
    run.until(lambda: checkpoints(out / "two") and run.trainers())
    run.trainers()[0].kill()
    assert run.end() == 0, run.log.read_text()
    log = run.log.read_text()
    assert "extraction: " in log
    assert "is complete" in log, "what was extracted is not extracted again"
    assert "stage 1/2 one: resumes from step-" in log
    check_a_finished_plan(plan, out, log, STEPS, capsys)


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.timeout(560)
def test_a_plan_goes_through_its_stages_and_then_does_nothing(tmp_path: Path, capsys) -> None:
    """The short form of the test above: nothing is killed."""
    plan = write_plan(tmp_path, 1, SHORT)
    run = Run(plan, tmp_path / "1.log")
    assert run.end() == 0, run.log.read_text()
    check_a_finished_plan(plan, tmp_path / "run", run.log.read_text(), SHORT, capsys)


def check_a_finished_plan(plan: Path, out: Path, log: str, count: int, capsys) -> None:
    assert "note: class_to_text" in log, "what crosses is said"
    assert log.count("+ 0 that can't be used") == 1, "what became of the clips is said once"
    for name in ("one", "two"):
        assert steps(out / name) == list(range(1, count + 1)), "every step once, none twice, none missing"

    # What it leaves behind.
    assert "class_accuracy" in json.loads((out / "evaluation/two/scores/scores.json").read_text())["scores"]
    report = json.loads((out / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == ["one", "two"]
    assert all(s["steps"] == count and s["counts"]["generated"] == 4 for s in report["stages"])
    assert report["seconds"] >= sum(s["seconds"] for s in report["stages"]) > 0

    # Once more: nothing is trained, and no Ray is started.
    done = {name: (out / name / "done.json").stat().st_mtime_ns for name in ("one", "two")}
    assert train_stages.main(["--plan", str(plan)]) == 0
    told = capsys.readouterr().out
    assert told.count("finished, skipped") == 2
    assert "ray: " not in told
    assert done == {name: (out / name / "done.json").stat().st_mtime_ns for name in ("one", "two")}

    # A changed plan says what it makes void, and touches nothing.
    change = ["--plan", str(plan), "--set", f"stages.two.overrides.train.steps={count + 1}"]
    assert train_stages.main(change) == 2
    told = capsys.readouterr().err
    assert f"stages.two.train.steps: {count} -> {count + 1}" in told
    assert "stages.two (changed)" in told
    assert "stages.one (" not in told
    assert (out / "two" / "done.json").exists()


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_plan_of_two_sets_trains_on_both_in_their_shares_and_resumes(tmp_path: Path, capsys) -> None:
    plan, out = write_sets(tmp_path, STEPS), tmp_path / "run"
    run = Run(plan, tmp_path / "1.log")
    run.until(lambda: checkpoints(out / "one"))
    run.cut_off()
    run = Run(plan, tmp_path / "2.log")
    assert run.end() == 0, run.log.read_text()
    log = run.log.read_text()
    assert "stage 1/2 one: resumes from step-" in log
    assert log.count("features is complete") == 2
    assert "set squares:\n" in log
    for name in ("one", "two"):
        assert steps(out / name) == list(range(1, STEPS + 1))
    last = metrics_log.read(out / "one" / metrics_log.FILE)[-1]
    seen = {name: last[f"samples_seen/{out / 'sets' / name / 'features'}"] for name in ("squares", "few")}
    # Of each epoch's 24 clips 18 are of the first set: within one epoch of the share.
    assert sum(seen.values()) == 4 * STEPS
    assert abs(seen["squares"] - 3 * STEPS) <= 6
    told = refused(capsys, plan, "sets.few.extraction.seed=1")
    assert "sets.few.extraction.seed: 0 -> 1" in told
    assert "stages.two (depends on sets.few.extraction)" in told
    assert "sets.squares.extraction (" not in told


# ------------------------------------------------------------------------------- without training


def test_a_forecast_counts_the_clips_of_both_sets_before_they_are_extracted_and_after(tmp_path: Path, capsys) -> None:
    plan = write_sets(tmp_path)
    assert train_stages.main(["--plan", str(plan), "--forecast"]) == 0
    before = capsys.readouterr().out
    assert "set squares:\n  clips: 24 in the manifest, not extracted yet: 24 would be kept, 0 dropped" in before
    assert "set few:\n  clips: 12 in the manifest, not extracted yet: 12 would be kept, 0 dropped" in before
    counts = [line.partition(";")[0].strip() for line in before.splitlines() if " epochs" in line]
    assert counts == ["1x8x8        24 clips", "1x8x8        8 clips"], "training clips of both, and of the smaller one"
    for one in plans.read(plan).feature_sets.values():
        extract.run(one.extract)
    assert train_stages.main(["--plan", str(plan), "--forecast"]) == 0
    after = capsys.readouterr().out
    assert [line.partition(";")[0].strip() for line in after.splitlines() if " epochs" in line] == counts
    assert "set few:\n  12 = 12 kept" in after.replace("clips: ", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sets.few.extraction.text_encoder.byte_t5.width=32", "text_encoder.byte_t5.width is 16 and 32"),
        ("sets.few.extraction.video_encoder.channels=3", "video_encoder.channels is 1 and 3"),
        ("sets.few.extraction.control_column=path", "control_column is false and true"),
    ],
)
def test_sets_of_other_encoders_are_refused_before_anything_is_written(
    tmp_path: Path, capsys, override: str, message: str
) -> None:
    told = refused(capsys, write_sets(tmp_path), override)
    assert "stages.one (" in told
    assert f": sets squares and few do not go together: {message}" in told
    assert not (tmp_path / "run").exists()


def test_sets_of_other_latent_statistics_are_refused_before_the_first_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sets(tmp_path)
    encoders = []
    for scale in (0.5, 0.25):
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=scale)
        vae.save_pretrained(tmp_path / f"vae-{scale}")
        encoders.append({"kind": "image", "path": str(tmp_path / f"vae-{scale}")})
    overrides = [
        f"sets.{name}.extraction.video_encoder={json.dumps(one)}"
        for name, one in zip(("squares", "few"), encoders, strict=True)
    ]
    plan = plans.read(path, overrides)
    runner = PlanRunner(plan, plans.resolve(plan, str(path)), str(path), False)
    monkeypatch.setattr(runner, "_extract", lambda *_: pytest.fail("extracted"))
    with pytest.raises(
        ConfigError,
        match=r"stages\.one .*: sets squares and few do not go together: video_encoder\..* is .*0\.5.* and .*0\.25",
    ):
        runner.extraction()


def test_a_set_without_a_clip_for_a_stage_is_named_by_the_forecast(tmp_path: Path, capsys) -> None:
    none = "sets.few.extraction.where=[{column: score, at_least: 2}]"
    assert train_stages.main(["--plan", str(write_sets(tmp_path)), "--forecast", "--set", none]) == 2
    told = capsys.readouterr().err
    assert "stages.one (" in told
    assert "data.features: few has no training sample in this run's buckets; leave it out" in told


def refused(capsys, plan: Path, *sets: str) -> str:
    """Runs a plan that can't be used; what it said."""
    arguments = [argument for text in sets for argument in ("--set", text)]
    assert train_stages.main(["--plan", str(plan), *arguments]) == 2
    told = capsys.readouterr()
    assert "ray" not in told.out
    return told.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.one.after=two", "cycle: one comes after two comes after one"),
        ("stages.two.after=none", "stages.two.after: no stage is called 'none'; there are: one, two"),
        ("stages.two.allow=[]", "model.num_classes 2 -> None (needs init.allow: [class_to_text])"),
        ("stages.two.overrides.model.hidden_size=32", "(hidden_size, depth, num_heads) (16, 1, 2) -> (32, 1, 2)"),
        ("stages.one.overrides.model.patch_size=[1, 3, 3]", "latent height 8 is not divisible by model.patch_size 3"),
        (
            "stages.one.overrides.model.in_channels=4",
            "model.in_channels 4, but the autoencoder's latents have 1 channels",
        ),
        ("extraction.text_encoder=null", "model.text_dim 16, but the plan's extraction has no text_encoder"),
        (
            "extraction.text_encoder.max_text_tokens=33",
            "model.max_text_tokens 32, but the plan's extraction gives up to 33 tokens",
        ),
        (
            "stages.two.overrides.model.pooled_dim=8",
            "model.pooled_dim 8, but no text_encoder of the plan's extraction has pooled: true",
        ),
        ("extraction.manifest=nowhere.jsonl", "extraction.manifest: nowhere.jsonl does not exist"),
        ("stages.one.config=nowhere.yaml", "stages.one.config: nowhere.yaml: cannot be read"),
        ("stages.one.overrides.train.stepz=1", "train.stepz: unknown key"),
        ("evaluation.prompts=2000000", "evaluation.prompts: Input should be less than or equal to 1000000"),
        ("evaluation.fps=5000", "evaluation.fps: Input should be less than or equal to 1000"),
        ("evaluation.sampler.guidance_channels=2", "evaluation.sampler: guidance_channels 2 is more than the 1 latent"),
        ("evaluation.metrics.direction_column=caption", "a direction is one of left, right, up, down"),
        (
            "extraction.text_encoder.byte_t5={width: 65536, depth: 64, num_heads: 4}",
            "extraction.text_encoder.byte_t5: width 65536 and depth 64 are 2,748,",
        ),
        ("evaluation.scores={scores: [fid], networks: {inception: README.md}}", "README.md has SHA-256 "),
        ("evaluation.sampler.scheduler=ddim", "evaluation.sampler: sampler.scheduler ddim "),
        ("evaluation.metrics.validation_split=test", "evaluation.metrics.validation_split 'test': no clip of "),
        ("evaluation.metrics.direction_column=heading", "direction_column: no column 'heading'; columns: "),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, capsys, override: str, message: str
) -> None:
    plan = write_plan(tmp_path)
    assert message in refused(capsys, plan, override)
    assert not (tmp_path / "run").exists()


def test_held_out_clips_of_a_stage_s_shape_and_class_are_looked_for_at_the_forecast(tmp_path: Path, capsys) -> None:
    plan = write_plan(tmp_path)
    larger = "extraction.buckets=[{frames: 1, height: 8, width: 8}, {frames: 1, height: 16, width: 16}]"
    stage = "stages.two.overrides.data.buckets=[{frames: 1, height: 16, width: 16, batch_size: 4}]"
    told = refused(capsys, plan, larger, stage, "extraction.frame_stride=2")
    assert "stages.two (" in told
    assert "evaluation.metrics: " in told
    assert (
        "validation_split 'validation': none of its 8 clips has, or can be cropped to, 1x16x16 (frames x height x width); the longest is 1x8x8 "
        "(frames as extracted: frame_stride 2)" in told
    )
    # A class-conditional stage takes its own classes, whatever is measured.
    free = "evaluation.metrics.class_column=null"
    assert train_stages.main(["--plan", str(plan), "--forecast", "--set", free]) == 0
    manifest = tmp_path / "clips" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = [row | {"class": None if row["split"] == "validation" else row["class"]} for row in rows]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = refused(capsys, plan, free)
    assert "stages.one (" in told
    assert "the model is class-conditional, but 8 of 8 clips have no class (column class)" in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CurationError("3 of 4 files cannot be used"), 1),
        (ExtractionError("3 of 4 clips cannot be used"), 1),
        (OSError(28, "No space left on device"), 1),
        (PlanFailed("stage a: evaluation: no clip was generated"), 1),
        (ConfigError("run_dir: a key"), 2),
        (FileNotFoundError(2, "No such file"), 2),
    ],
)
def test_a_plan_ends_with_the_exit_code_of_the_command_that_does_the_same(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(train_stages, "run_plan", fail)
    assert train_stages.main(["--plan", "p.yaml"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_scores_that_need_more_clips_than_are_generated_are_refused(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "find_network", lambda *names: None)
    plan = write_plan(tmp_path)
    told = refused(capsys, plan, "evaluation.scores={scores: [inception_score]}")
    assert "evaluation.scores: inception_score (splits) needs 10 clips or more, but evaluation.prompts is 4" in told
    told = refused(capsys, plan, "evaluation.scores={scores: [recall], neighbors: 4}")
    assert "evaluation.scores: recall (neighbors) needs 5 clips or more, but evaluation.prompts is 4" in told


def test_guidance_that_a_stages_model_cannot_do_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, write_plan(tmp_path), "evaluation.sampler.path_drop=true")
    assert "evaluation.sampler: path_drop (path-drop guidance) needs a model with sparse_dense" in told


def test_an_evaluation_that_fails_is_a_failed_part_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(tmp_path)
    plan = plans.read(path)
    stages = plans.resolve(plan, str(path))
    runner = PlanRunner(plan, stages, str(path), False)

    def fail(*args: object) -> None:
        raise ValueError("no clip was generated")

    monkeypatch.setattr(runner, "_evaluate_run", fail)
    with pytest.raises(PlanFailed, match=r"^stage one: evaluation: no clip was generated$"):
        runner.evaluate(stages[0])


def test_evaluations_generate_as_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(tmp_path)
    plan = plans.read(path, ["evaluation.precision=bf16", "evaluation.batch_size=3"])
    stages = plans.resolve(plan, str(path))
    told: dict[str, Any] = {}
    monkeypatch.setattr("stdit.evaluate.evaluate_run", lambda *args, **settings: told.update(settings) or {})
    PlanRunner(plan, stages, str(path), False)._evaluate_run(stages[0], stages[0])
    assert (told["precision"], told["batch_size"], told["threads"]) == ("bf16", 3, 1)


def test_a_stage_is_finished_by_its_own_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(tmp_path)
    plan = plans.read(path)
    stages = plans.resolve(plan, str(path))
    runner, run = PlanRunner(plan, stages, str(path), False), stages[0].config.run_dir
    make_run(run, model_config(), step=1)
    (run / "done.json").write_text(json.dumps({"step": 1, "samples_seen": 8, "checkpoint": "step-00000001"}))
    assert stages[0].config.train.steps > 1
    assert not runner.is_finished(stages[0])
    monkeypatch.setattr(runner, "connect", lambda: None)
    monkeypatch.setattr(runner, "_train", lambda *_: None)
    monkeypatch.setattr(workers, "check_capacity", lambda _: None)
    with pytest.raises(PlanFailed, match=r"stage one: its workers ended without an error, but .* is not complete"):
        runner.train(stages[0], 1)


def test_a_forecast_starts_nothing_and_counts_every_clip(tmp_path: Path, capsys) -> None:
    plan = write_plan(tmp_path)
    where = "stages.two.overrides.data.where=[{column: score, at_least: 0.5}]"
    assert train_stages.main(["--plan", str(plan), "--forecast", "--set", where]) == 0
    told = capsys.readouterr().out
    assert "clips: 24 in the manifest, not extracted yet: 24 would be kept, 0 dropped" in told
    assert f"stage one: {STEPS} steps, 2 ranks, {8 * STEPS:,} samples" in told
    assert f"16 clips; 4 tokens; {STEPS} steps of 8" in told
    assert "8 clips (8 left out: not score at least 0.5)" in told
    assert "stage two from one:\n  loaded: " in told
    assert not (tmp_path / "run").exists()


def test_what_the_plan_cannot_read_is_an_error_before_training(tmp_path: Path, capsys) -> None:
    plan = write_plan(tmp_path)
    (tmp_path / "clips" / "manifest.jsonl").write_text("")
    assert "manifest.jsonl" in refused(capsys, plan)


def test_clips_by_url_that_an_evaluation_could_not_read_are_refused_before_training(tmp_path: Path, capsys) -> None:
    plan = write_plan(tmp_path)
    manifest = tmp_path / "clips" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[3]["path"] = "s3://bucket/clips/3.mp4"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(capsys, plan)
    assert (
        f"evaluation: compares with the clips of {manifest}, which are read from this machine; row 4 is s3://bucket/"
        in said
    )
    assert not (tmp_path / "run").exists()


def test_two_at_once_is_refused(tmp_path: Path, capsys) -> None:
    from pipelines.record import lock_run_dir

    plan = write_plan(tmp_path)
    with lock_run_dir(tmp_path / "run"):
        assert "another train_stages is running there (process" in refused(capsys, plan)


def test_changes_that_are_allowed_set_results_aside_and_keep_the_rest(tmp_path: Path) -> None:
    from pipelines import plan as plans
    from pipelines.runner import PlanRunner

    path = write_plan(tmp_path)

    def runner(*overrides: str, allow: bool = True) -> PlanRunner:
        plan = plans.read(path, overrides)
        return PlanRunner(plan, plans.resolve(plan), str(path), allow)

    first = runner()
    for part, settings in first.parts().items():
        first.record.start(part, settings)
    first.record.add_seconds("two", 5.0)
    for name in ("one", "two", "features", "evaluation/two"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"stages\.two\.seed"):
        runner("seed=1", allow=False).handle_changes()
    second = runner("stages.two.overrides.train.steps=3")
    second.handle_changes()
    left = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert left == {"one", "features", "evaluation", "replaced"}
    assert {p.name for p in (tmp_path / "run" / "replaced").iterdir()} == {"two-1", "two-2"}, "the run and its videos"
    assert "stages.two" not in Record.read(tmp_path / "run").parts
    assert Record.read(tmp_path / "run").seconds == {}
    second.handle_changes()  # Settled: the same plan again has nothing to say.


def test_a_run_made_by_hand_counts_for_what_it_says_it_is(tmp_path: Path, capsys) -> None:
    from pipelines import plan as plans
    from stdit.config import dump

    path = write_plan(tmp_path)
    stage = plans.resolve(plans.read(path))[0]
    stage.config.run_dir.mkdir(parents=True)
    (stage.config.run_dir / "config.yaml").write_text(dump(stage.config))
    told = refused(capsys, path, "stages.one.overrides.train.steps=7")
    assert f"stages.one.train.steps: {STEPS} -> 7" in told


def test_features_that_other_plans_may_read_are_never_set_aside(tmp_path: Path) -> None:
    from pipelines import plan as plans
    from pipelines.runner import PlanRunner

    path = write_plan(tmp_path)
    elsewhere = f"extraction.out={tmp_path / 'shared'}"
    plan = plans.read(path, [elsewhere])
    runner = PlanRunner(plan, plans.resolve(plan), str(path), True)
    runner.record.start("extraction", runner.parts()["extraction"])
    plan = plans.read(path, [elsewhere, "extraction.seed=1"])
    with pytest.raises(ConfigError, match=r"extraction\.out .*shared.* lies outside run_dir"):
        PlanRunner(plan, plans.resolve(plan), str(path), True).handle_changes()


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    for expected in ("a-1", "a-2"):
        (tmp_path / "a").mkdir()
        found = set_aside(tmp_path / "a", tmp_path)
        assert found is not None
        assert found.name == expected
    assert set_aside(tmp_path / "a", tmp_path) is None


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 1, "par')
    with pytest.raises(ConfigError, match=r"plan\.json: not valid JSON"):
        Record.read(tmp_path)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"plan\.json: expected a JSON object, found list"):
        Record.read(tmp_path)


def test_help_answers_at_once() -> None:
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pipelines.train_stages", "--help"], cwd=ROOT, check=True, capture_output=True
    )
    code = "import sys, pipelines.train_stages; print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", "heavy modules are imported late"
    assert time.monotonic() - began < 20


def test_a_plan_whose_run_dir_is_a_file_is_refused_and_the_file_kept(tmp_path: Path) -> None:
    from pipelines.record import lock_run_dir

    (tmp_path / "run").write_text("of the user")
    with (
        pytest.raises(ConfigError, match=r"run_dir: .*run: cannot be written to \(is not a folder\)"),
        lock_run_dir(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run").read_text() == "of the user"
