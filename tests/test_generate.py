"""Generation: prompts in, files out; the same again makes only what is missing; one failure loses nothing else."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stdit import generate as generation
from stdit.config import Bucket, ConfigError, DiffusionConfig, GenerateConfig, SamplerConfig, default_bucket
from stdit.config.identity import FrameSampling
from stdit.data.decoding import open_clip
from stdit.evaluate import EvaluationPrompts, evaluate_run
from stdit.generate import Prompt, generate, job_from_config, noise_seed, read_prompts
from stdit.inference import job
from stdit.inference.job import find_source
from stdit.inference.pipeline import STDiTPipeline, STDiTPipelineOutput
from stdit.inference.prompts import NOT_OF_A_PROMPT, SLUG_LENGTH, items, slug
from stdit.media import write_clip
from stdit.models import lora
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint, machine
from tests.support.runs import CLASSES, TEXT, make_run, model_config
from tests.support.shapes_dataset import save_clip

SHAPE = Bucket(frames=4, height=16, width=16)
SAMPLER = SamplerConfig(steps=2, guidance_scale=2.0)
PROMPTS = [
    Prompt("a seven"),
    Prompt("../../etc/passwd"),
    Prompt("eine Sieben läuft 左へ"),
    Prompt("word " * 300),
    Prompt(),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "text": make_run(folder / "text", model_config(**TEXT)),
        "class": make_run(folder / "class", model_config(**CLASSES)),
        "other": make_run(folder / "other", model_config(**TEXT), step=30),
        "ddpm": make_run(folder / "ddpm", model_config(**TEXT), DiffusionConfig(objective="ddpm")),
    }


def make(run: Path, out: Path, prompts: list[Prompt] | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"shape": SHAPE, "sampler": SAMPLER, "batch_size": 2, "device": "cpu", **kwargs}
    return generate(run, PROMPTS if prompts is None else prompts, out, **asked)


def frames_of(path: Path) -> np.ndarray:
    with open_clip(path, "pyav") as reader:
        return reader.get(range(reader.frame_count))


# ------------------------------------------------------------------------------------------- files


def test_every_prompt_and_seed_has_a_file_a_row_and_a_place_on_the_sheet(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = make(runs["text"], out, videos_per_prompt=2, fps=12.5)
    assert rows == [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(r["index"], r["seed"]) for r in rows] == [(i, s) for i in range(5) for s in (0, 1)]
    files = {r["file"] for r in rows}
    assert len(files) == 10
    assert {p.name for p in out.iterdir()} == files | {
        "manifest.jsonl",
        "request.json",
        "contact_sheet.png",
        "contact_sheet.gif",
    }
    row = rows[0]
    assert (row["prompt"], row["frames"], row["height"], row["width"], row["fps"]) == ("a seven", 4, 16, 16, 12.5)
    protocol = row["protocol"]
    assert protocol["checkpoint"] == "step-00000020"
    assert (protocol["step"], protocol["weights"], protocol["steps"]) == (20, "ema", 2)
    assert (protocol["scheduler"], protocol["guidance_scale"]) == ("flow_euler", 2.0)
    with open_clip(out / row["file"], "pyav") as reader:
        assert (reader.frame_count, reader.height, reader.width, reader.fps) == (4, 16, 16, 12.5)


def test_a_file_holds_the_very_pixels_that_the_pipeline_draws(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = make(runs["text"], tmp_path, videos_per_prompt=1)
    pipe = STDiTPipeline.from_pretrained(runs["text"])
    made = items(PROMPTS, 1, SHAPE, 8)
    output = pipe(
        [p.text for p in PROMPTS[:2]],
        num_frames=4,
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(noise_seed(item)) for item in made[:2]],
        output_type="np",
    )
    assert isinstance(output, STDiTPipelineOutput)
    for row, video in zip(rows[:2], output.frames, strict=True):
        # Threads may differ from those of this process, and with them the last bit.
        difference = frames_of(tmp_path / row["file"]).astype(int) - (video * 255).round().astype(int)
        assert abs(difference).max() <= 1


def test_a_run_on_clips_and_images_generates_clips_by_default() -> None:
    image, short, long = (Bucket(frames=t, height=h, width=h) for t, h in ((1, 64), (8, 32), (16, 32)))
    assert default_bucket([image, short, long]) == long
    assert default_bucket([image, Bucket(frames=1, height=32, width=32)]) == image


def test_one_frame_is_a_png(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = make(runs["text"], tmp_path, shape=Bucket(frames=1, height=8, width=24))
    assert all(row["file"].endswith(".png") for row in rows)
    assert frames_of(tmp_path / rows[0]["file"]).shape == (1, 8, 24, 3)
    assert not (tmp_path / "contact_sheet.gif").exists()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_prompt_has_a_safe_name(text: str) -> None:
    name = slug(text)
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= SLUG_LENGTH
    assert not name.startswith("-")


def test_names_differ_where_prompts_do_not() -> None:
    names = [item.file for item in items([Prompt("a"), Prompt("a"), Prompt("A!"), Prompt(name="../a")], 2, SHAPE, 8)]
    assert len(set(names)) == 8
    assert names[0] == "00000-a-seed0.mp4"


# -------------------------------------------------------------------------------------- repetition


def test_a_second_call_makes_only_what_is_missing_and_makes_it_the_same(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make(runs["text"], tmp_path)
    before = {row["file"]: frames_of(tmp_path / row["file"]) for row in rows}
    times = {row["file"]: (tmp_path / row["file"]).stat().st_mtime_ns for row in rows}
    gone = rows[2]["file"]
    (tmp_path / gone).unlink()
    assert make(runs["text"], tmp_path) == rows
    assert np.array_equal(frames_of(tmp_path / gone), before[gone])
    kept = {file for file in times if (tmp_path / file).stat().st_mtime_ns == times[file]}
    assert kept == set(times) - {gone}
    # With nothing missing no pipeline is loaded.
    monkeypatch.setattr(generation, "load", None)
    assert make(runs["text"], tmp_path) == rows


def test_an_empty_file_does_not_count_as_generated(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = make(runs["text"], tmp_path)
    (tmp_path / rows[0]["file"]).write_bytes(b"")
    make(runs["text"], tmp_path)
    assert frames_of(tmp_path / rows[0]["file"]).shape == (4, 16, 16, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampler": SamplerConfig(steps=3, guidance_scale=2.0)}, "steps: 2 -> 3"),
        ({"videos_per_prompt": 2}, "videos_per_prompt: 1 -> 2"),
        ({"shape": Bucket(frames=2, height=16, width=16)}, "shape: 4x16x16 -> 2x16x16"),
        ({"prompts": PROMPTS[:4]}, "prompts: "),
        ({"weights": "model"}, "weights: ema -> model"),
        ({"run": "other"}, "checkpoint: step-00000020 .* -> step-00000030 .*"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_request_is_refused_without_overwrite(
    change: dict[str, Any], told: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    old = make(runs["text"], tmp_path)
    asked = {**change, "run": runs[change.get("run", "text")], "out": tmp_path}
    with pytest.raises(ValueError, match=f"other settings .*{told}.*--overwrite"):
        make(**asked)
    assert {row["file"] for row in old} <= {p.name for p in tmp_path.iterdir()}
    (tmp_path / "mine.txt").write_text("of the user")
    rows = make(**asked, overwrite=True)
    videos = {p.name for p in tmp_path.glob("*.mp4")}
    assert videos == {row["file"] for row in rows}
    assert (tmp_path / "mine.txt").exists()


def test_files_of_unknown_origin_are_not_taken_for_results(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / items(PROMPTS, 1, SHAPE, 8)[0].file).write_bytes(b"something")
    with pytest.raises(ValueError, match=r"holds 1 files such as 00000-a-seven-seed0.mp4, and no request.json"):
        make(runs["text"], tmp_path)


@pytest.mark.parametrize("name", ["manifest.jsonl", "contact_sheet.png"])
def test_results_of_others_are_not_overwritten(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"of the user")
    for overwrite in (False, True):  # which is for the videos of another request, not for what others have made
        with pytest.raises(ValueError, match=f"holds 1 files such as {name}, and no request.json"):
            make(runs["text"], tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_bytes() == b"of the user"


def test_a_damaged_request_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(ConfigError, match=r"request\.json: not valid JSON"):
        make(runs["text"], tmp_path)


def test_another_pipelines_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ConfigError, match="holds a WanPipeline, not an STDiTPipeline"):
        make(tmp_path, tmp_path / "out")


def test_a_prompts_noise_does_not_depend_on_its_place(runs: dict[str, Path], tmp_path: Path) -> None:
    first, last = items([Prompt("a", seed=7), Prompt("b", seed=7), Prompt("a", seed=7)], 1, SHAPE, 8)[::2]
    assert noise_seed(first) == noise_seed(last)
    assert noise_seed(first) != noise_seed(items([Prompt("b", seed=7)], 1, SHAPE, 8)[0])
    assert noise_seed(first) == noise_seed(items([Prompt("a", seed=6)], 2, SHAPE, 8)[1])
    forward = make(runs["text"], tmp_path / "f", [Prompt("a seven"), Prompt("another")])
    backward = make(runs["text"], tmp_path / "b", [Prompt("another"), Prompt("a seven")])
    both = [frames_of(tmp_path / f / rows["file"]).astype(int) for f, rows in (("f", forward[0]), ("b", backward[1]))]
    assert abs(both[0] - both[1]).max() <= 1


# ----------------------------------------------------------------------------------------- failures


def test_a_failing_prompt_is_reported_and_loses_no_other(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("a"), Prompt("bad \ud800"), Prompt("c")]
    rows = make(runs["text"], tmp_path, prompts)
    assert [row["file"] is None for row in rows] == [False, True, False]
    assert "not valid Unicode" in rows[1]["error"]
    # What can't be drawn is told again, and nothing is drawn for it.
    with monkeypatch.context() as patch:
        patch.setattr(STDiTPipeline, "__call__", None)
        assert make(runs["text"], tmp_path, prompts) == rows
    file = tmp_path.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in prompts))
    flags = ["--steps", "2", "--guidance", "2", "--batch-size", "2", "--device", "cpu"]
    command = ["--run", str(runs["text"]), "--prompts", str(file), "--out", str(tmp_path), *flags]
    assert generation.main(command) == 1
    told = capsys.readouterr()
    assert "failed: prompt 1 'bad \\ud800': " in told.err
    assert "2 of 3 videos" in told.out


def test_what_fails_in_a_batch_is_drawn_alone(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that takes the batch with it, and a video of NaN."""
    encode, decode = STDiTPipeline.encode_prompt, STDiTPipeline._decode

    def no_nine(self: STDiTPipeline, prompt: Any) -> Any:
        if "nine" in prompt:
            raise RuntimeError("out of memory")
        return encode(self, prompt)

    def no_first(self: STDiTPipeline, x: torch.Tensor, output_type: str) -> Any:
        frames = decode(self, x, output_type)
        frames[: int(len(x) == 2)] = np.nan
        return frames

    monkeypatch.setattr(STDiTPipeline, "encode_prompt", no_nine)
    rows = make(runs["text"], tmp_path / "a", [Prompt("one"), Prompt("nine"), Prompt("two")])
    assert [row.get("error") for row in rows] == [None, "RuntimeError: out of memory", None]
    monkeypatch.setattr(STDiTPipeline, "_decode", no_first)
    rows = make(runs["text"], tmp_path / "b", [Prompt("one"), Prompt("two")])
    assert [row.get("error") for row in rows] == [None, None]
    monkeypatch.setattr(STDiTPipeline, "_decode", lambda self, x, form: np.full((len(x), 4, 16, 16, 3), np.nan))
    rows = make(runs["text"], tmp_path / "c", [Prompt("one"), Prompt("two")])
    assert all("not finite" in row["error"] for row in rows)
    assert not list((tmp_path / "c").glob("*.mp4"))


def test_a_rank_that_fails_alone_ends_all_that_share_its_videos(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = generation.open_job(runs["text"], [Prompt("one"), Prompt("two")], tmp_path, SHAPE)
    pipe = generation.load(job, "cpu")

    def fails(error: Exception) -> None:
        def encode(self: STDiTPipeline, prompt: Any) -> Any:
            raise error

        monkeypatch.setattr(STDiTPipeline, "encode_prompt", encode)

    fails(RuntimeError("out of memory"))
    assert {outcome.error for outcome in generation.draw_group(pipe, job, 0)} == {"RuntimeError: out of memory"}
    monkeypatch.setattr(pipe.transformer, "sequence_parallel", SimpleNamespace(size=2, rank=0))
    with pytest.raises(RuntimeError, match="out of memory"):  # others are in the model already, and would wait for it
        generation.draw_group(pipe, job, 0)
    fails(ValueError("not a prompt"))  # of all ranks
    assert {outcome.error for outcome in generation.draw_group(pipe, job, 0)} == {"ValueError: not a prompt"}


def test_a_full_disk_stops_everything_and_leaves_nothing_half_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stdit.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        make(runs["text"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_classes_draws_by_class(runs: dict[str, Path], tmp_path: Path) -> None:
    prompts = [Prompt(class_label="a/b"), Prompt(class_label=0), Prompt("no class"), Prompt(class_label="ten")]
    rows = make(runs["class"], tmp_path, prompts)
    assert [row["file"] for row in rows[:2]] == ["00000-class-a-b-seed0.mp4", "00001-class-0-seed0.mp4"]
    assert "class-conditional; the prompt has no class" in rows[2]["error"]
    assert "class 'ten' is none of" in rows[3]["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "list is empty"),
        ({"shape": Bucket(frames=4, height=15, width=16)}, "height 15 is not divisible by model.patch_size 2"),
        ({"sampler": SamplerConfig(scheduler="ddim")}, "ddim samples objective ddpm"),
        ({"sampler": SamplerConfig(guidance_channels=4)}, "guidance_channels 4 is more than the 3 latent channels"),
        ({"run": Path("/nowhere")}, "neither a checkpoint .* nor a run directory"),
    ],
    ids=["prompts", "shape", "sampler", "channels", "run"],
)
def test_an_impossible_request_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"run": runs["text"], "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_a_saved_pipeline_serves_as_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    STDiTPipeline.from_pretrained(runs["text"]).save_pretrained(tmp_path / "saved")
    saved = make(tmp_path / "saved", tmp_path / "a")
    run = make(runs["text"], tmp_path / "b")
    assert np.array_equal(frames_of(tmp_path / "a" / saved[0]["file"]), frames_of(tmp_path / "b" / run[0]["file"]))
    with pytest.raises(ConfigError, match="give frames, height, width"):
        make(tmp_path / "saved", tmp_path / "c", shape=None)


def test_a_base_that_was_moved_is_named_and_draws_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint.find_weights(runs["text"]), base)
    run = lora_run(tmp_path / "style", base)
    some = PROMPTS[:1]
    before = make(run, tmp_path / "out", some)
    asked = json.loads((tmp_path / "out" / "request.json").read_text())["settings"]
    assert asked["base"] == adapters.weights_fingerprint(base)[:16]
    made = frames_of(tmp_path / "out" / before[0]["file"])
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"base are gone, .*if they were moved, .*--set base="):
        make(run, tmp_path / "out", some)
    # The same request, wherever the base lies: nothing is refused, and what is drawn is the same.
    (tmp_path / "out" / before[0]["file"]).unlink()
    make(run, tmp_path / "out", some, base=moved)
    assert np.array_equal(frames_of(tmp_path / "out" / before[0]["file"]), made)
    (tmp_path / "prompts.txt").write_text("a seven\n")
    told: dict[str, Any] = {"run": run, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "more", "base": moved}
    assert job_from_config(GenerateConfig(**told)).source.base == moved.resolve()
    with pytest.raises(ConfigError, match="are not those of the training"):
        make(run, tmp_path / "other", some, base=runs["other"])
    with pytest.raises(ConfigError, match=f"base {moved}: .* holds a complete model, which has no base"):
        make(runs["text"], tmp_path / "other", some, base=moved)


def lora_run(run: Path, base: Path) -> Path:
    """A run directory with one checkpoint of adapters beside `base`."""
    make_run(run, model_config(**TEXT), init={"source": str(base)})
    (place,) = (run / checkpoint.FOLDER).glob("step-*")
    identity = json.loads((place / checkpoint.IDENTITY).read_text())
    identity["config"]["train"]["lora"] = {"rank": 2}
    identity |= {"trained": "lora", "base": asdict(adapters.make_base(base))}
    (place / checkpoint.IDENTITY).write_text(json.dumps(identity))
    for weights, name in checkpoint.TRANSFORMER.items():
        shutil.rmtree(place / name)
        model = STDiT.from_pretrained(base)
        lora.add_adapter(model, 2)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
        lora.save_adapter(model, place / checkpoint.weights_folder("lora", weights))
    (place / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(place)
    return run


def test_shape_and_sampler_default_to_the_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = make(runs["ddpm"], tmp_path, [Prompt("a")], shape=None, sampler=None)
    assert (rows[0]["frames"], rows[0]["height"]) == (4, 16)
    assert (rows[0]["protocol"]["scheduler"], rows[0]["protocol"]["steps"]) == ("ddim", 50)


def test_the_transformer_computes_as_in_training_where_that_is_native(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", model_config(**TEXT), precision="bf16")

    def drawn(name: str, native: bool, **asked: Any) -> tuple[torch.dtype, str, np.ndarray]:
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda gpus: native)
        computed: list[torch.dtype] = []
        forward = STDiT.forward

        def seen(model: STDiT, *args: Any, **kwargs: Any) -> Any:
            computed.append(model.x_embedder.proj.weight.dtype)
            return forward(model, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(STDiT, "forward", seen)
            (row,) = make(run, tmp_path / name, PROMPTS[:1], **asked)
        return computed[0], row["protocol"]["precision"], frames_of(tmp_path / name / row["file"])

    half, name, pixels = drawn("half", True)
    assert (half, name) == (torch.bfloat16, "bf16")
    whole, name, exact = drawn("whole", False)
    assert (whole, name) == (torch.float32, "fp32")
    assert 0 < np.abs(pixels.astype(float) - exact).mean() < 2
    assert drawn("asked", True, precision="fp32")[:2] == (torch.float32, "fp32")
    assert drawn("forced", False, precision="bf16")[:2] == (torch.bfloat16, "bf16")
    with pytest.raises(ValueError, match="precision: bf16 -> fp32"):
        drawn("half", False)
    plain = make_run(tmp_path / "plain", model_config(**TEXT))
    assert find_source(plain, "ema").precision == "fp32"


def test_the_frame_rate_is_that_of_most_training_videos(tmp_path: Path) -> None:
    model = model_config(**TEXT, micro_conditions=("fps",))
    run = make_run(tmp_path / "run", model, frame_rates={"25": 9, "8": 2})
    assert {row["fps"] for row in make(run, tmp_path / "out", PROMPTS[:2])} == {25}
    assert {row["fps"] for row in make(run, tmp_path / "slow", PROMPTS[:2], fps=8.0)} == {8}
    with open_clip(tmp_path / "out" / "00000-a-seven-seed0.mp4", "pyav") as reader:
        assert reader.fps == 25
    pipe = STDiTPipeline.from_pretrained(run)
    pipe.save_pretrained(tmp_path / "saved")
    assert generation.open_job(tmp_path / "saved", PROMPTS, tmp_path / "again", SHAPE, SAMPLER).items[0].fps == 25

    def drawn(pipe: STDiTPipeline, **fps: float) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        size = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 2}
        output = pipe("a seven", generator=generator, output_type="np", **size, **fps)  # pyright: ignore[reportArgumentType]
        assert isinstance(output, STDiTPipelineOutput)
        return output.frames

    saved = STDiTPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(drawn(pipe), drawn(pipe, fps=25))
    assert np.array_equal(drawn(saved), drawn(pipe, fps=25))
    assert not np.array_equal(drawn(pipe), drawn(pipe, fps=8))
    unknown = make_run(tmp_path / "unknown", model)
    assert generation.open_job(unknown, PROMPTS, tmp_path / "eight", SHAPE, SAMPLER).items[0].fps == 8


def test_prompts_may_have_a_shape_and_a_frame_rate_of_their_own(runs: dict[str, Path], tmp_path: Path) -> None:
    prompts = [
        Prompt("a"),
        Prompt("b", frames=1),
        Prompt("c", height=32, fps=12.0),
        Prompt("a", frames=1, seed=3),
        Prompt("d"),
    ]
    rows = make(runs["text"], tmp_path / "out", prompts)
    sizes = [(row["frames"], row["height"], row["width"], row["fps"]) for row in rows]
    assert sizes == [(4, 16, 16, 8), (1, 16, 16, 8), (4, 32, 16, 12), (1, 16, 16, 8), (4, 16, 16, 8)]
    for row in rows:
        assert frames_of(tmp_path / "out" / row["file"]).shape == (row["frames"], row["height"], row["width"], 3)
    alone = make(runs["text"], tmp_path / "alone", [prompts[0], prompts[4]])
    for one, row in zip(alone, (rows[0], rows[4]), strict=True):
        assert (tmp_path / "alone" / one["file"]).read_bytes()
        assert np.array_equal(frames_of(tmp_path / "alone" / one["file"]), frames_of(tmp_path / "out" / row["file"]))
    with pytest.raises(ValueError, match="not divisible"):
        make(runs["text"], tmp_path / "bad", [Prompt("a"), Prompt("b", height=15)])
    assert not (tmp_path / "bad").exists()


def test_prompts_may_have_a_first_frame_or_a_video_of_their_own(runs: dict[str, Path], tmp_path: Path) -> None:
    first = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(first).save(tmp_path / "first.png")
    write_clip(tmp_path / "six.mp4", np.stack([first + np.uint8(i) for i in range(6)]), 8)
    prompts = [
        Prompt("a"),
        Prompt("a", image=str(tmp_path / "first.png")),
        Prompt("a", conditioning_video=str(tmp_path / "six.mp4"), conditioning_frames=(1, 2)),
        Prompt("a", conditioning_video=str(tmp_path / "first.png"), conditioning_frames=(3,)),
    ]
    rows = make(runs["text"], tmp_path / "out", prompts)
    assert [row.get("error") for row in rows] == [None] * 4
    assert rows[1]["image"] == str(tmp_path / "first.png")
    assert rows[2]["conditioning_frames"] == [1, 2]
    free, begun, middle, end = (frames_of(tmp_path / "out" / row["file"]) for row in rows)
    assert np.array_equal(begun[0], first)
    assert np.array_equal(end[3], first)
    assert np.array_equal(middle[1:3], np.stack([first + np.uint8(i) for i in (1, 2)]))
    assert not np.array_equal(free[0], first)


@pytest.mark.parametrize(
    ("sampling", "length", "frames"),
    [
        ({}, 9, [0, 1, 2, 3]),
        ({"frame_stride": 2}, 9, [0, 2, 4, 6]),
        ({"frame_stride": 2}, 3, [0, 2]),
        ({"target_fps": 4.0, "clip_window": "center"}, 9, [1, 3, 5, 7]),
        ({"frame_stride": 2}, 4, [0, 1, 2, 3]),
    ],
)
def test_a_given_video_is_read_as_extraction_reads_its_clips(
    tmp_path: Path, sampling: dict[str, Any], length: int, frames: list[int]
) -> None:
    """Of 8 frames a second, for a video of 4 frames, whose length is taken as it is."""
    video = np.arange(length, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3) * 25
    save_clip(tmp_path / "c.png", video)
    pipe = cast(STDiTPipeline, SimpleNamespace(frame_sampling=FrameSampling(**sampling)))
    prompt = Prompt("a", conditioning_video=str(tmp_path / "c.png"))
    found = generation._conditioning_frames(pipe, items([prompt], 1, SHAPE, 8))["conditioning_video"]
    assert (found[0][:, 0, 0, 0] * 255).round().tolist() == [25 * frame for frame in frames]


def test_a_given_video_below_the_target_rate_is_refused(tmp_path: Path) -> None:
    save_clip(
        tmp_path / "c.png", np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    )
    with pytest.raises(
        ValueError, match=r"c\.png: 8 frames a second, the extraction's target_fps is 24; 4 frames, or 1, are"
    ):
        generation._read_clip(tmp_path / "c.png", SHAPE, FrameSampling(target_fps=24.0), shorter=True)


def test_rows_say_which_frames_of_its_clips_a_run_was_trained_on(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["text"], tmp_path / "run")
    place = job.find_source(tmp_path / "run", "ema").path
    identity = json.loads((place / checkpoint.IDENTITY).read_text())
    assert "frame_sampling" not in job.find_source(runs["text"], "ema").facts
    for told, found in (({"frame_stride": 2}, {"frame_stride": 2}), ({"clip_window": "first"}, None)):
        full = FrameSampling.model_validate(told).model_dump(mode="json")
        (place / checkpoint.IDENTITY).write_text(json.dumps({**identity, "frame_sampling": full}))
        checkpoint.write_manifest(place)
        facts = job.find_source(tmp_path / "run", "ema").facts
        assert facts.get("frame_sampling") == (found and full)
        if found:
            row = {"path": "a.mp4", "caption": "a", "split": "validation", "frames": 5, "height": 16, "width": 16}
            (tmp_path / "m.jsonl").write_text(json.dumps(row))
            size = EvaluationPrompts(**SHAPE.model_dump())
            with pytest.raises(ValueError, match=r"the longest is 3x16x16 \(frames as extracted: frame_stride 2\)"):
                evaluate_run(tmp_path / "run", tmp_path / "m.jsonl", tmp_path / "out", size)


def test_a_cut_caption_is_noted(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("word " * 300)
    out = ["--out", str(tmp_path / "out"), "--steps", "1", "--device", "cpu"]
    assert generation.main(["--run", str(runs["text"]), "--prompts", str(tmp_path / "p.txt"), *out]) == 0
    assert "caption of 1500 tokens cut to 24" in capsys.readouterr().err


def test_the_command_line_refuses_with_exit_code_two(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a")
    base = ["--run", str(runs["text"]), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    for extra, told in (
        (["--scheduler", "ddim"], "ddim samples objective ddpm"),
        (["--scheduler", "euler"], "command line: scheduler"),
        (["--set", "guidence=3"], "command line: guidence: unknown key"),
        (["--guidance", "-1"], "command line: guidance_scale"),
        (["--height", "15"], "height 15 is not divisible"),
        (["--prompts", str(tmp_path / "p.csv")], "found suffix '.csv'"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
    ):
        assert generation.main([*base, *extra]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ prompts


def test_prompts_come_as_text_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa seven\n\n  eine Sieben 左  \r\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a seven"), Prompt("eine Sieben 左")]
    rows = [
        {"prompt": "a", "class": "7", "seed": 3, "name": "x", "direction": "left"},
        {"class": 0},
        {"prompt": "", "class": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read_prompts(tmp_path / "p.jsonl")
    assert found == [Prompt("a", "7", 3, "x", {"direction": "left"}), Prompt("", 0), Prompt("")]
    assert found[0].row() == rows[0]


def test_a_file_of_prompts_that_never_ends_is_refused_at_once(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name in (f"pipe{suffix}", f"zero{suffix}"):
            with pytest.raises(ValueError, match=f"{name}: cannot be read .*not a regular file"):
                read_prompts(tmp_path / name)


def test_an_image_of_a_name_that_no_file_has_is_an_error_of_its_prompt() -> None:
    with pytest.raises(ValueError, match=r"p.jsonl:1: image: x{300}: no such file"):
        Prompt("a", image="x" * 300).check("p.jsonl:1")


def test_threads_are_at_least_one_and_bounded(tmp_path: Path) -> None:
    for threads in (0, 10**6):
        with pytest.raises(ValueError, match=f"threads: expected 1 to 1024, found {threads}"):
            generation.open_job(tmp_path / "run", PROMPTS, tmp_path / "out", threads=threads)


@pytest.mark.timeout(20)
def test_a_pipe_among_a_pipelines_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: not a regular file"):
        job._fingerprint(tmp_path)


def test_a_job_of_more_videos_than_a_list_holds_is_refused() -> None:
    message = r"2 prompts with videos_per_prompt 600,000 are 1,200,000 videos; a job has at most 1,000,000"
    with pytest.raises(ValueError, match=message):
        items([Prompt("a"), Prompt("b")], 600_000, SHAPE, 8.0)


def test_overwriting_in_a_place_that_cannot_be_written_removes_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompts": PROMPTS[:1], "shape": SHAPE, "sampler": SAMPLER}
    out = generation.open_job(runs["text"], out=tmp_path / "out", **asked).out
    name = json.loads((out / "request.json").read_text())["files"][0]
    (out / name).write_bytes(b"a video")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def refuse(folder: Path) -> None:
        raise ValueError(f"{folder}: cannot be written to (Read-only file system)")

    monkeypatch.setattr(job, "check_writable", refuse)
    with pytest.raises(ValueError, match="cannot be written to"):
        generation.open_job(runs["text"], out=out, **asked, fps=3.0, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", r"p.txt: holds no prompt"),
        ("p.txt", b"\n \n", r"p.txt: holds no prompt"),
        ("p.txt", b"\xff\xfe", r"p.txt: cannot be read as UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', r"p.jsonl:2: not valid JSON"),
        ("p.jsonl", b"[1]", r"p.jsonl:1: expected an object, found list"),
        ("p.jsonl", b'{"prompt": 7}', r"p.jsonl:1: prompt: expected str, found 7"),
        ("p.jsonl", b'{"prompt": "a", "seed": "x"}', r"p.jsonl:1: seed: expected int, found 'x'"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', r"p.jsonl:1: seed: expected int, found True"),
        ("p.jsonl", b'{"caption": "a"}', r"p.jsonl:1: has neither prompt nor class; keys found: caption"),
        ("p.jsonl", b'{"prompt": "a", "frames": 2.5}', r"p.jsonl:1: frames: expected int, found 2.5"),
        (
            "p.jsonl",
            b'{"prompt": "a", "height": 0}',
            r"p.jsonl:1: height: expected a whole number above 0 and at most 65536, found 0",
        ),
        ("p.jsonl", b'{"prompt": "a", "height": 70000}', r"height: .* at most 65536, found 70000"),
        ("p.jsonl", b'{"prompt": "a", "video": "b.mp4"}', r"key 'video' .* did you mean conditioning_video"),
        ("p.jsonl", b'{"prompt": "a", "Frames": 4}', r"key 'Frames' .* did you mean frames"),
        ("p.jsonl", b'{"prompt": "a", "negative_prompt": "b"}', r"'negative_prompt' .* a setting of the whole job"),
        ("p.jsonl", b'{"prompt": "a", "Steps": 4}', r"key 'Steps' .* a setting of the whole job"),
        ("p.jsonl", b'{"prompt": "a", "guidance": 4}', r"key 'guidance' .* a setting of the whole job"),
        (
            "p.jsonl",
            b'{"prompt": "a", "videos-per-prompt": 4}',
            r"key 'videos-per-prompt' .* a setting of the whole job",
        ),
        ("p.jsonl", b'{"prompt": "a", "Control": "b.png"}', r"key 'Control' .* did you mean control"),
        ("p.jsonl", b'{"prompt": "a", "fps": -1}', r"p.jsonl:1: fps: expected a number from 0.001 to 1000"),
        ("p.jsonl", b'{"prompt": "a", "image": "none.png"}', r"p.jsonl:1: image: none.png: no such file"),
        ("p.jsonl", b'{"prompt": "a", "conditioning_frames": [0]}', r"conditioning_frames needs conditioning_video"),
        ("p.jsonl", b'{"prompt": "a", "x": NaN}', r"p.jsonl:1: not a usable row"),
        ("p.json", b'["a"]', r"p.json: prompts are text .* found suffix '.json'"),
        ("p.ndjson", b'{"prompt": 7}', r"p.ndjson:1: prompt: expected str, found 7"),
        ("p.jsonl", b'{"prompt": "a", "file": "b"}', r"p.jsonl:1: key 'file' is written by generation"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_no_setting_of_the_job_or_argument_of_the_pipeline_is_copied_in_silence(tmp_path: Path) -> None:
    own = {"prompt", "class", "seed", "name", "control", "frames", "height", "width", "fps", "image"}
    own |= {"conditioning_video", "conditioning_frames"}
    known = {*GenerateConfig.model_fields, *inspect.signature(STDiTPipeline.__call__).parameters} - {"self"}
    assert known | {"guidance"} == NOT_OF_A_PROMPT
    names = known - own
    assert {"guidance_channels", "control_image", "control_scale", "conditioning_latents", "steps"} < names
    for name in names:
        for key in (name, name.title()):
            (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", key: 1}))
            with pytest.raises(ValueError, match=f"key '{key}' is none that a prompt has"):
                read_prompts(tmp_path / "p.jsonl")


def test_control_of_a_run_without_a_control_branch_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    [row] = make(runs["text"], tmp_path / "out", [Prompt("a", extra={"control": "edge.png"})])
    assert (row["file"], row["error"]) == (None, "this run has no control branch; the prompt has control 'edge.png'")
