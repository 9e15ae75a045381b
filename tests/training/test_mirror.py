"""Laws of a run's mirror in an object store: whole checkpoints or none, failures that harm nothing, and a fresh machine
that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import plan
from stdit.config import Config, ConfigError, Url, dump, validate
from stdit.errors import SaveError
from stdit.metrics_log import read as read_metrics
from stdit.training import checkpoint, mirror, run_dir
from stdit.training.derive import with_precision
from stdit.training.identity import load_identity
from stdit.training.mirror import NotUploaded, RunMirror, fetch
from tests.support.object_store import ObjectStore
from tests.support.paths import ROOT
from tests.support.rank_jobs import numbers, settings
from tests.support.runs import make_run, model_config

AT = Url("s3://bucket/run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 20 and 40."""
    run = tmp_path_factory.mktemp("made") / "run"
    for step in (20, 40):
        make_run(run, model_config(), step=step)
    return run


@pytest.fixture
def store(s3: ObjectStore) -> ObjectStore:
    shutil.rmtree(s3.folder / "bucket/run", ignore_errors=True)
    return s3


def run_of(made: Path, folder: Path, steps: tuple[int, ...] = (20, 40), **train: Any) -> Config:
    """The run with these of its checkpoints, in another folder; its config."""
    data = load_identity(made / "checkpoints/step-00000040")["config"]
    config = validate(
        {**data, "run_dir": str(folder), "train": {**data["train"], "upload_to": AT, **train}}, Config, "test"
    )
    for step in steps:
        name = checkpoint.folder_of_step(step)
        shutil.copytree(made / "checkpoints" / name, folder / "checkpoints" / name)
    folder.mkdir(exist_ok=True)
    run_dir.start(config)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps))
    return config


def upload(config: Config, said: list[str] | None = None) -> RunMirror:
    uploads = RunMirror(config, True, [].append if said is None else said.append)
    uploads.begin()
    uploads.close()
    return uploads


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps(folder: Path) -> list[int]:
    """Whole checkpoints in a run directory or mirror."""
    return [checkpoint.step_of(c) for c in checkpoint.list_checkpoints(folder) if (c / "manifest.json").exists()]


def fresh(config: Config, folder: Path) -> Config:
    """The same run on a machine that has nothing of it."""
    folder.mkdir()
    return config.model_copy(update={"run_dir": folder})


def test_a_fresh_machine_gets_the_newest_checkpoint_bit_for_bit(store: ObjectStore, made: Path, tmp_path: Path) -> None:
    config = run_of(made, tmp_path / "run")
    store.requests.clear()
    upload(config)
    puts = [p.partition("?")[0] for method, p, _ in store.requests if method == "PUT" and "step-00000040/" in p]
    assert puts[-1].endswith("step-00000040/manifest.json"), "what completes a checkpoint comes last"
    assert files(store.folder / "bucket/run") == {
        name: content for name, content in files(tmp_path / "run").items() if not name.startswith(".")
    }
    other = fresh(config, tmp_path / "other")
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [40]
    name = "checkpoints/step-00000040"
    assert files(other.run_dir / name) == files(config.run_dir / name)
    assert checkpoint.verify(other.run_dir / name) is None
    assert run_dir.read_config(other.run_dir) == config
    assert [entry["step"] for entry in read_metrics(other.run_dir / "metrics.jsonl")] == [20, 40]
    # With a checkpoint as new, nothing but its identity is fetched.
    store.requests.clear()
    fetch(other, "none", 1)
    assert {p.rpartition("/")[2] for method, p, _ in store.requests if method == "GET" and "?" not in p} == {
        "identity.json"
    }


def test_a_failed_upload_leaves_the_older_checkpoint_and_is_made_up_for(
    store: ObjectStore, made: Path, tmp_path: Path
) -> None:
    config, said = run_of(made, tmp_path / "run", (20,)), list[str]()
    uploads = upload(config, said)
    shutil.copytree(made / "checkpoints/step-00000040", tmp_path / "run/checkpoints/step-00000040")
    store.fail("400", times=1000, method="PUT", path="step-00000040/transformer_ema")
    for failed in (1, 2):
        uploads.update()
        uploads.close()
        assert uploads.failed_in_a_row == failed
    assert said[-1].startswith("WARNING: train.upload_to: s3://bucket/run/checkpoints/step-00000040/transformer_ema/")
    assert said[-1].endswith(
        "Training goes on; the next checkpoint is uploaded with what is missing (2 failed in a row)"
    )
    with pytest.raises(
        NotUploaded, match=r"complete in .*/run, and not at s3://bucket/run: the same command uploads it"
    ):
        uploads.finish()
    other = fresh(config, tmp_path / "other")
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [20]
    store.heal()
    mirror.upload_finished(config)
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [40, 20]


def test_inference_fetches_identity_and_weights_once(
    store: ObjectStore, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(run_of(made, tmp_path / "run"))

    def fetched(url: Url, weights: checkpoint.Weights) -> tuple[Path, set[str]]:
        store.requests.clear()
        folder = mirror.fetch_weights(url, weights)[1]
        return folder, {p.rpartition("/")[2] for method, p, _ in store.requests if method == "GET" and "?" not in p}

    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    folder, names = fetched(AT, "ema")
    assert names == {"identity.json", "manifest.json", *weights}
    assert checkpoint.verify(folder) is None
    assert checkpoint.find_weights(folder, "ema") == folder / "transformer_ema"
    source = made / "checkpoints/step-00000040"
    assert files(folder / "transformer_ema") == files(source / "transformer_ema")
    assert not (folder / "transformer").exists()
    again, names = fetched(AT, "ema")
    assert (again, names) == (folder, {"identity.json", "manifest.json"})
    for file in (folder / "transformer_ema").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert fetched(AT, "ema")[1] >= weights
    assert checkpoint.verify(folder) is None
    older, names = fetched(AT / "checkpoints/step-00000020", "model")
    assert files(older / "transformer") == files(made / "checkpoints/step-00000020/transformer")
    # A damaged checkpoint gives way to the one before it, and stays where it is: it is another's.
    damaged = next((store.folder / "bucket/run/checkpoints/step-00000040/transformer").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[::-1])
    assert fetched(AT, "model")[0] == older
    assert "step-00000040 is skipped" in capsys.readouterr().err
    assert (damaged.parents[1] / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"s3://bucket/nothing: neither a checkpoint .* nor a run"):
        mirror.fetch_weights(Url("s3://bucket/nothing"), "ema")


def test_videos_of_a_run_at_a_url_are_those_of_the_run(
    store: ObjectStore, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stdit.config import GenerateConfig
    from stdit.generate import finish, job_from_config, run_groups

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = run_of(made, tmp_path / "run")
    upload(config)
    (tmp_path / "prompts.txt").write_text("a seven\n")

    def pixels(run: str, out: Path) -> bytes:
        given = {"run": run, "prompts": str(tmp_path / "prompts.txt"), "out": str(out), "steps": 1, "frames": 1}
        job = job_from_config(validate(given, GenerateConfig, "test"))
        (row,) = finish(job, run_groups(job, "cpu"))
        assert row["protocol"]["run"] == run
        return (out / row["file"]).read_bytes()

    assert pixels(AT, tmp_path / "far") == pixels(str(config.run_dir), tmp_path / "near")


def test_workers_elsewhere_take_the_checkpoint_that_the_job_found(
    store: ObjectStore, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stdit.inference.job import find_source

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    config = run_of(made, tmp_path / "run", (20,))
    uploads = upload(config)
    source = find_source(AT, "ema")
    shutil.copytree(made / "checkpoints/step-00000040", config.run_dir / "checkpoints/step-00000040")
    uploads.update()
    uploads.close()
    store.requests.clear()
    assert source.local_path() == source.path
    assert not store.requests, "what is on this machine is not asked for again"
    shutil.move(tmp_path / "here", tmp_path / "away")
    assert source.local_path().name == "step-00000020"
    assert find_source(AT, "ema").path.name == "step-00000040"


def test_a_damaged_checkpoint_is_skipped_and_uploaded_again(
    store: ObjectStore, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(made, tmp_path / "run")
    upload(config)
    weights = store.folder / "bucket/run/checkpoints/step-00000040/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = fresh(config, tmp_path / "other")
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [20]
    assert "step-00000040 is skipped: s3://bucket/run/checkpoints/step-00000040/transformer/" in capsys.readouterr().err
    upload(config)
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [40, 20]
    # A damaged one of this machine is replaced.
    (other.run_dir / "checkpoints/step-00000040/identity.json").write_text("{}")
    fetch(other, "none", 1)
    assert checkpoint.verify(other.run_dir / "checkpoints/step-00000040") is None
    assert (other.run_dir / "checkpoints/step-00000040.damaged").is_dir()


def test_an_interrupted_fetch_goes_on(store: ObjectStore, made: Path, tmp_path: Path) -> None:
    config = run_of(made, tmp_path / "run")
    upload(config)
    other = fresh(config, tmp_path / "other")
    store.fail("500", times=1000, path="step-00000040/transformer_ema/diff")
    with pytest.raises(SaveError, match=r"^train.upload_to: .*transformer_ema/diff.*\(12 tries\)"):
        fetch(other, "none", 1)
    assert steps(other.run_dir) == []
    run_dir.check(other.run_dir)
    store.heal()
    fetch(other, "none", 1)
    assert steps(other.run_dir) == [40]
    assert not store.fetches("step-00000040/transformer/diff"), "what has arrived is not fetched again"


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        pytest.param({"keep_checkpoints": 2}, [50, 40], marks=pytest.mark.slow),
        pytest.param({"keep_checkpoints": 1, "keep_every": 20}, [50, 40, 20], marks=pytest.mark.slow),
        ({"keep_checkpoints": 1, "keep_best": 1}, [50, 10]),
    ],
)
def test_the_mirror_keeps_what_run_dir_keeps_and_what_another_machine_left(
    train: dict[str, int], kept: list[int], store: ObjectStore, made: Path, tmp_path: Path
) -> None:
    config = run_of(made, tmp_path / "run", (), **{k: v for k, v in train.items() if k != "keep_best"})
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    for folder, own in ((tmp_path / "run", (10, 20)), (tmp_path / "other", (40, 50))):
        (folder / "checkpoints").mkdir(parents=True)
        for step in own:
            whole = folder / "checkpoints" / checkpoint.folder_of_step(step)
            whole.mkdir()
            identity = load_identity(made / "checkpoints/step-00000040")
            text = json.dumps({**identity, "step": step, "validation_loss": float(step)})
            (whole / "identity.json").write_text(text)
            checkpoint.write_manifest(whole)
        shutil.copy(tmp_path / "run/config.yaml", folder / "config.yaml") if folder.name == "other" else None
        upload(config.model_copy(update={"run_dir": folder}))
    assert steps(store.folder / "bucket/run") == kept


def test_a_checkpoint_that_is_removed_here_while_it_is_uploaded_arrives_whole(
    store: ObjectStore, made: Path, tmp_path: Path
) -> None:
    config = run_of(made, tmp_path / "run", (20,))
    uploads = RunMirror(config, True, print)
    store.latency_s = 0.02
    uploads.begin()
    until = time.monotonic() + 20
    while not any("step-00000020" in path for _, path, _ in store.requests) and time.monotonic() < until:
        time.sleep(0.005)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    since = time.monotonic()
    uploads.update()
    assert time.monotonic() - since < 0.2, "training does not wait for an upload"
    uploads.finish()
    store.heal()
    assert checkpoint.verify(store.folder / "bucket/run/checkpoints/step-00000020") is None
    assert not (tmp_path / "run/checkpoints/.uploading").exists()


def test_a_mirror_of_another_run_or_without_access_is_refused_before_anything_is_fetched(
    store: ObjectStore, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(made, tmp_path / "run")
    upload(config)
    other = fresh(config, tmp_path / "other").model_copy(update={"seed": 7})
    with pytest.raises(
        ConfigError, match=r"^train.upload_to: s3://bucket/run holds a run with other settings[^$]*seed: 0 -> 7"
    ):
        fetch(other, "none", 1)
    with pytest.raises(ConfigError, match=r"data.features: not the features of the checkpoint"):
        fetch(config, "others", 1)
    assert not any(other.run_dir.iterdir())
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
        with pytest.raises(ConfigError, match=r"^train.upload_to: s3://bucket/run: access denied"):
            fetch(config, "none", 1)
    store.fail("403", times=100, method="PUT")
    with pytest.raises(ConfigError, match=r"^train.upload_to: s3://bucket/run/config.yaml: access denied"):
        RunMirror(config, True, print).begin()


def test_ranks_but_the_first_and_runs_without_a_mirror_upload_nothing(
    store: ObjectStore, made: Path, tmp_path: Path
) -> None:
    config = run_of(made, tmp_path / "run")
    uploads = RunMirror(config, False, print)
    uploads.begin()
    uploads.update()
    uploads.finish()
    alone = run_of(made, tmp_path / "alone", upload_to=None)
    upload(alone)
    fetch(alone, "none", 1)
    mirror.upload_finished(alone)
    assert not store.requests


def test_a_fresh_machine_keeps_the_precision_that_the_run_began_with(
    store: ObjectStore, made: Path, tmp_path: Path
) -> None:
    upload(run_of(made, tmp_path / "run", precision="fp32"))
    auto = run_of(made, tmp_path / "run2", precision="auto").model_copy(update={"run_dir": tmp_path / "other"})
    assert with_precision(auto, gpus=True).train.precision == "fp32"


def test_upload_to_is_a_url_and_a_plans_stages_have_one_each(tmp_path: Path) -> None:
    for bad, message in (
        ("runs/a", "expected the URL of an object store"),
        ("s3://key:secret@bucket/a", "a URL, which is logged"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            validate(settings(tmp_path, train={"upload_to": bad}), Config, "f")
        assert "secret" not in str(error.value)
    file = tmp_path / "plan.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "plan",
                "run_dir": str(tmp_path / "plan"),
                "extraction": {
                    "manifest": "clips",
                    "buckets": [{"frames": n, "height": 8, "width": 8} for n in (1, 2)],
                },
                "overrides": {**settings(tmp_path), "train": {"steps": 2, "upload_to": str(AT)}},
                "stages": {"a": {}, "b": {"overrides": {"train": {"upload_to": "s3://bucket/own"}}}},
            }
        )
    )
    stages = plan.resolve(plan.read(file), str(file))
    assert [stage.config.train.upload_to for stage in stages] == [AT / "a", Url("s3://bucket/own")]


# --------------------------------------------------------------------------------------- whole runs


def command(tmp_path: Path, name: str, **train: Any) -> list[str]:
    data = settings(tmp_path / name, train={"checkpoint_every": 2, "steps": 8, **train})
    file = tmp_path / f"{name}.yaml"
    file.write_text(dump(validate(data, Config, "test")))
    return [sys.executable, str(ROOT / "stdit/train.py"), "--config", str(file)]


@pytest.mark.slow
def test_a_killed_run_goes_on_on_a_fresh_machine_with_the_same_losses(store: ObjectStore, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path, "whole"), env=environment, check=True, timeout=300)
    store.fail("503", times=6, method="PUT")  # passes by itself
    first = subprocess.Popen(command(tmp_path, "first", upload_to=str(AT)), env=environment)
    manifest = store.folder / "bucket/run/checkpoints/step-00000004/manifest.json"
    until = time.monotonic() + 300
    while not manifest.exists() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    store.fail("500", times=1, method="GET")
    subprocess.run(command(tmp_path, "second", upload_to=str(AT)), env=environment, check=True, timeout=300)
    found, expected = (numbers(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("second", "whole"))
    assert found == expected
    for name in ("transformer", "transformer_ema"):
        file = f"checkpoints/step-00000008/{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        assert (store.folder / "bucket/run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_a_store_that_is_gone_does_not_end_training(store: ObjectStore, tmp_path: Path) -> None:
    store.fail("400", times=10_000, method="PUT", path="checkpoints/")
    done = subprocess.run(
        command(tmp_path, "run", upload_to=str(AT)), env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "WARNING: train.upload_to: s3://bucket/run/checkpoints/" in done.stderr
    assert "the same command uploads it" in done.stderr.splitlines()[-1]
    assert checkpoint.find_final(tmp_path / "run", 8) is not None
    store.heal()
    subprocess.run(command(tmp_path, "run", upload_to=str(AT)), env=os.environ, check=True, timeout=300)
    assert steps(store.folder / "bucket/run") == [8, 6]
