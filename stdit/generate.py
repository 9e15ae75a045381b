"""Generates videos for a file of prompts: an MP4 (or PNG) for each prompt and seed, a manifest and a contact sheet.

    python -m stdit.generate --run runs/demo/clips --prompts prompts.txt --out videos --guidance 3

OUT then holds the videos, manifest.jsonl (one row each: prompt, seed, settings, file or error), request.json (the job's
settings), contact_sheet.png and, for videos, contact_sheet.gif.

The same command again generates only what is missing, and gives the same videos with any number of workers
(`pipelines.generate_videos`). A video depends on its prompt, seed and settings and, in the last bit, on its batch:
batches are cut from the list of prompts alone, a batch with a gap is sampled again as a whole, and every worker has the
same number of threads.

Under a launcher (`torchrun --nproc_per_node 4 -m stdit.generate …`) the ranks share each video's tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stdit.config import Bucket, LoRASource, Precision, SamplerConfig, Url
from stdit.config.identity import FrameSampling
from stdit.config.load import shorten
from stdit.console import echo
from stdit.data.decoding import open_clip
from stdit.data.frame_sampling import sampled_count, sampled_indices
from stdit.data.transforms import resize_crop
from stdit.diffusion.randomness import seed_for
from stdit.errors import CheckpointError, exit_code
from stdit.files import atomic_path, atomic_write
from stdit.inference.job import MANIFEST, MOVING, SHEET, Job, job_from_config, open_job
from stdit.inference.parallel import launched_ranks
from stdit.inference.pipeline import STDiTPipeline, STDiTPipelineOutput
from stdit.inference.prompts import CONTROL, Item, Prompt, arguments, check_text, label_id, read_prompts, settings
from stdit.media import Cell, contact_sheet, moving_sheet, write_clip, write_gif, write_png
from stdit.training.distributed import Ranks, sequence_group

# Videos on the contact sheet, the first of the manifest.
SHEET_CLIPS = 24

__all__ = ["Job", "Prompt", "draw_group", "finish", "generate", "job_from_config", "load", "open_job", "read_prompts"]


@dataclass(frozen=True)
class Outcome:
    """An error of one item, or a note on a video that was generated."""

    file: str
    error: str | None = None
    note: str | None = None


# ------------------------------------------------------------------------------------------ drawing


def load(job: Job, device: str | None = None, ranks: Ranks | None = None) -> STDiTPipeline:
    """The job's pipeline with its sampler, without progress bar, on `device` (None: cuda where there is one). ranks:
    those that share each video's tokens; None: this process has them all."""
    base = {} if job.source.base is None else {"base": job.source.base}
    pipe = STDiTPipeline.from_pretrained(job.source.local_path(), weights=job.source.weights, **base)
    for adapter in job.lora:
        pipe.load_lora_weights(adapter.path, scale=adapter.scale, weights=job.source.weights)
    if job.precision == "bf16":
        for part in (pipe.transformer, pipe.control):
            if part is not None:
                nn.Module.to(part, torch.bfloat16)
    pipe.use(job.sampler)
    pipe.set_progress_bar_config(disable=True)
    if ranks is not None:
        pipe.set_sequence_parallel(sequence_group(ranks))
        return pipe.to(ranks.device)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def draw_group(pipe: STDiTPipeline, job: Job, number: int) -> list[Outcome]:
    """Samples batch `number` and writes its missing videos. Failures are reported, the rest is generated.

    OSError: a file can't be written (disk full), which would stop the other batches too.
    """
    outcomes: list[Outcome] = []
    able: list[Item] = []
    for item in job.batches[number]:
        try:
            _check_item(pipe, item)
            able.append(item)
        except ValueError as error:
            outcomes.append(Outcome(item.file, str(error)))
    if all(job.is_complete(item) for item in able):
        return outcomes
    with _threads(job.threads):
        failures = _draw(pipe, job, able)
        if failures and len(able) > 1:
            # One item may have failed the whole batch: each on its own.
            failed = {failure.file for failure in failures}
            failures = [f for item in able if item.file in failed for f in _draw(pipe, job, [item])]
    return outcomes + failures + _notes(pipe, able)


def _draw(pipe: STDiTPipeline, job: Job, some: Sequence[Item]) -> list[Outcome]:
    """Samples items in one batch and writes what is missing; returns the failures."""
    shape, shared = some[0].shape, pipe.transformer.sequence_parallel
    try:
        output = pipe(
            **_conditions(pipe, some),
            **_control(pipe, some),
            **_conditioning_frames(pipe, some),
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            num_inference_steps=job.sampler.steps,
            guidance_scale=job.sampler.guidance_scale,
            guidance_channels=job.sampler.guidance_channels,
            path_drop=job.sampler.path_drop,
            generator=[torch.Generator().manual_seed(noise_seed(item)) for item in some],
            fps=some[0].fps if shape.frames > 1 else None,
            output_type="np",
        )
    except Exception as error:  # One bad prompt must not cost the others.
        if shared is not None and isinstance(error, RuntimeError):
            raise  # as out of memory on this rank: the others wait for it inside the model until the launcher ends them
        return [Outcome(item.file, f"{type(error).__name__}: {error}") for item in some]
    assert isinstance(output, STDiTPipelineOutput)
    writes = shared is None or shared.rank == 0
    failures = []
    for item, video in zip(some, output.frames, strict=True):  # (T, H, W, 3), 0 to 1
        if not np.isfinite(video).all():
            failures.append(Outcome(item.file, "the model's output is not finite (NaN or infinity)"))
        elif writes and not job.is_complete(item):
            with atomic_path(job.out / item.file) as part:
                write_clip(part, (video * 255).round().astype(np.uint8), item.fps)
    return failures


def noise_seed(item: Item) -> int:
    """The seed of an item's noise: different for different prompts, independent of the position in the file."""
    return seed_for(item.seed, "generate", item.prompt.text, str(item.prompt.class_label))


def _check_item(pipe: STDiTPipeline, item: Item) -> None:
    """ValueError: the model can't be conditioned on this item."""
    model = pipe.transformer.settings
    check_text(item.prompt.text, "prompt")
    if model.num_classes and item.prompt.class_label is not None:
        label_id(item.prompt.class_label, pipe.classes, model.num_classes)
    elif model.num_classes and not model.text_dim:
        raise ValueError("this run is class-conditional; the prompt has no class (use JSONL with the key class)")
    control = item.prompt.extra.get(CONTROL)
    if pipe.control is None and control is not None:
        raise ValueError(f"this run has no control branch; the prompt has {CONTROL} {shorten(repr(control))}")
    if pipe.control is not None and not isinstance(control, str):
        raise ValueError(
            "this run has a control branch; the prompt has no condition (use JSONL with the key control, a path)"
        )


def _conditions(pipe: STDiTPipeline, some: Sequence[Item]) -> dict[str, Any]:
    """The pipeline's arguments for these items: prompts, classes or both, as the model takes them."""
    model = pipe.transformer.settings
    found: dict[str, Any] = {}
    if model.text_dim:
        found["prompt"] = [item.prompt.text for item in some]
    if model.num_classes:
        labels = [item.prompt.class_label for item in some]
        found["class_labels"] = [-1 if label is None else label for label in labels]
    return found or {"num_videos_per_prompt": len(some)}


def _conditioning_frames(pipe: STDiTPipeline, some: Sequence[Item]) -> dict[str, Any]:
    """What these items' videos begin with or contain: an image each, or one video for all (they are one prompt's)."""
    prompt, shape = some[0].prompt, some[0].shape
    if prompt.image is not None:
        return {"conditioning_video": [_first_frame(item.prompt.image, shape) for item in some]}
    if prompt.conditioning_video is None:
        return {}
    frames = _read_clip(prompt.conditioning_video, shape, pipe.frame_sampling, shorter=True)
    return {"conditioning_video": [frames], "conditioning_frames": prompt.conditioning_frames}


def _first_frame(path: Path | str | None, shape: Bucket) -> np.ndarray:
    """The first frame of an image or video, cropped and resized to `shape`: (1, H, W, 3) in 0 to 1."""
    assert path is not None
    with open_clip(path, "pyav") as reader:
        return resize_crop(reader.get([0]), shape.height, shape.width) / 255


def _control(pipe: STDiTPipeline, some: Sequence[Item]) -> dict[str, Any]:
    """Control conditions of these items: images, repeated over time where another item's is a video."""
    if pipe.control is None:
        return {}
    shape, clips = some[0].shape, []
    for item in some:
        clips.append(_read_clip(item.prompt.extra[CONTROL], shape, pipe.frame_sampling))
    if all(len(clip) == 1 for clip in clips):
        return {"control_image": np.concatenate(clips)}
    return {"control_video": [clip.repeat(shape.frames // len(clip), 0) for clip in clips]}


def _read_clip(path: Path | str, shape: Bucket, sampling: FrameSampling, shorter: bool = False) -> np.ndarray:
    """An image or video (1 or T, H, W, 3) in 0 to 1: of a video the frames that extraction takes of a clip of its
    length; one that is as long as what is generated is taken as it is. shorter: one with fewer frames gives those.
    ValueError: one that is too short, or of a lower frame rate than the extraction takes."""
    with open_clip(path, "pyav") as reader:
        count, indices = reader.frame_count, range(reader.frame_count)
        if count not in (1, shape.frames):
            wanted = min(shape.frames, sampled_count(reader.info, sampling)) if shorter else shape.frames
            try:
                indices = sampled_indices(reader.info, wanted, sampling)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; {shape.frames} frames, or 1, are taken as they are") from error
        frames = reader.get(indices)
    return resize_crop(frames, shape.height, shape.width) / 255


def _notes(pipe: STDiTPipeline, some: Sequence[Item]) -> list[Outcome]:
    """Notes on captions that were truncated."""
    encoder = pipe.prompt_encoder
    if encoder is None:
        return []
    cuts = encoder.cuts([item.prompt.text for item in some])
    return [
        Outcome(item.file, note=f"caption of {cut[0]} tokens cut to {cut[1]}")
        for item, cut in zip(some, cuts, strict=True)
        if cut is not None
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sets the number of torch's threads, which determines the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- results


def finish(job: Job, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Writes manifest.jsonl and the contact sheet; returns the manifest's rows.

    A row has `file`, or `file` None and `error`.
    """
    of = {outcome.file: outcome for outcome in outcomes if outcome.error}
    rows = []
    for item in job.items:
        row = {**item.row(), "protocol": job.protocol}
        if not job.is_complete(item):
            error = of[item.file].error if item.file in of else "was not made; run the same command again"
            row |= {"file": None, "error": error}
        rows.append(row)
    atomic_write(job.out / MANIFEST, "".join(json.dumps(row) + "\n" for row in rows))
    _contact_sheet(job, [row for row in rows if row["file"]][:SHEET_CLIPS])
    return rows


def _contact_sheet(job: Job, rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        with open_clip(job.out / row["file"], "pyav") as reader:
            caption = row["prompt"] or ("" if row["class"] is None else f"class {row['class']}")
            cells.append(Cell(reader.get(range(reader.frame_count)), caption))
    if not cells:
        return
    write_png(job.out / SHEET, contact_sheet(cells))
    if any(len(cell.frames) > 1 for cell in cells):
        write_gif(job.out / MOVING, moving_sheet(cells), job.items[0].fps)


def report(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], out: Path) -> int:
    """Prints what was generated and what failed; returns the exit code, 0 if nothing is missing."""
    failed = [row for row in rows if row["file"] is None]
    for row in failed:
        echo(f"failed: prompt {row['index']} {row['prompt'][:60]!r}: {row['error']}", file=sys.stderr)
    for outcome in outcomes:
        if outcome.note:
            echo(f"note: {outcome.file}: {outcome.note}", file=sys.stderr)
    echo(f"{len(rows) - len(failed)} of {len(rows)} videos are in {out} (see {MANIFEST} and {SHEET})")
    return 1 if failed else 0


def generate(
    run: Path | Url | str,
    prompts: Sequence[Prompt],
    out: Path | str,
    shape: Bucket | None = None,
    sampler: SamplerConfig | None = None,
    *,
    weights: Literal["ema", "model"] = "ema",
    batch_size: int = 8,
    fps: float | None = None,
    threads: int = 1,
    device: str | None = None,
    videos_per_prompt: int = 1,
    lora: Sequence[LoRASource] = (),
    base: Path | str | None = None,
    precision: Precision = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Generates the missing videos of `out` in this process; returns the manifest's rows.

    Rows of failed prompts have `error`, and `file` None. Arguments and errors: as `open_job`.
    """
    job = open_job(
        run, prompts, out, shape, sampler, weights=weights, batch_size=batch_size, fps=fps, threads=threads,
        videos_per_prompt=videos_per_prompt, lora=lora, base=base, precision=precision, device=device,
        overwrite=overwrite,
    )  # fmt: skip
    return finish(job, run_groups(job, device, progress))


def run_groups(
    job: Job, device: str | None = None, progress: bool = False, ranks: Ranks | None = None
) -> list[Outcome]:
    """Samples the missing batches in this process, or over `ranks`, which share each video and all call this."""
    from tqdm import tqdm

    missing = job.missing() if ranks is None else ranks.broadcast(job.missing)
    if not missing:
        return []
    pipe = load(job, device, ranks)
    progress = progress and (ranks is None or ranks.is_main)
    bar = tqdm(missing, desc="generate", unit="batch", disable=not progress)
    return [outcome for number in bar for outcome in draw_group(pipe, job, number)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, in one process or on every rank of a launcher. Exit code 0: all generated; 1: some prompts
    failed, or a file could not be written; 2: a job that cannot be run, nothing was done."""
    options = arguments(__doc__).parse_args(argv)
    try:
        config = settings(options)
        with launched_ranks(config.device) as ranks:
            job = ranks.broadcast(lambda: job_from_config(config))
            outcomes = run_groups(job, config.device, True, ranks if ranks.size > 1 else None)
            rows = ranks.broadcast(lambda: finish(job, outcomes))
    except (ValueError, CheckpointError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            echo(f"stdit.generate: {error}", file=sys.stderr)
        return exit_code(error)
    if not ranks.is_main:
        return int(any(row["file"] is None for row in rows))
    return report(rows, outcomes, job.out)


if __name__ == "__main__":
    sys.exit(main())
