"""Prompt files, names of output files, and the command line of generation. No torch.

A prompt file is text (one prompt per line) or JSONL (one object per line): `prompt`, and optionally `class`, `seed`,
`name`, sizes of its own (`frames`, `height`, `width`, `fps`) and what the video begins with or contains (`image`; or
`conditioning_video` with `conditioning_frames`; `control`). Other keys are copied to the manifest, but for names of
settings.
"""

from __future__ import annotations

import argparse
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from stdit.config import Bucket, GenerateConfig, apply_override, validate
from stdit.config.load import shorten
from stdit.files import parse_jsonl, read_text

# Longest slug of a file name; with index and seed well below the 255 bytes that file systems allow.
SLUG_LENGTH = 60
KEYS = ("prompt", "class", "seed", "name")
# A prompt's own settings, in place of the job's.
OWN_KEYS = ("frames", "height", "width", "fps", "image", "conditioning_video", "conditioning_frames")
TEXT_SUFFIXES, JSON_SUFFIXES = ("", ".txt", ".text", ".md"), (".jsonl", ".ndjson")
MAX_BYTES = 1 << 30
# Videos of one job: a list of them is made.
MAX_VIDEOS = 1_000_000
LIMITS = {"frames": 1_000_000, "height": 65_536, "width": 65_536}  # a bucket's
# Path of the control input, for runs with a control branch; otherwise among the prompt's other keys.
CONTROL = "control"
# Other names of a prompt's keys.
SYNONYMS = {
    "video": "conditioning_video", "given_frames": "conditioning_frames", "num_frames": "frames", "class_label": "class",
    "class_labels": "class", "generator": "seed", "control_image": CONTROL, "control_video": CONTROL,
}  # fmt: skip
# Names of the job's settings, the flag of guidance_scale and the pipeline's arguments (STDiTPipeline.__call__), which
# would do nothing in a prompt.
NOT_OF_A_PROMPT = frozenset(GenerateConfig.model_fields) | {
    "guidance", "prompt", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "generator", "class_labels",
    "negative_prompt", "guidance_channels", "fps", "num_videos_per_prompt", "latents", "prompt_embeds", "prompt_attention_mask",
    "pooled_prompt_embeds", "negative_prompt_embeds", "negative_prompt_attention_mask", "negative_pooled_prompt_embeds",
    "conditioning_frames", "conditioning_latents", "conditioning_video", "control", "control_image", "control_video",
    "control_latents", "control_scale", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
# Keys of manifest rows that generation writes.
RESERVED = ("index", "file", "error", "protocol")


@dataclass(frozen=True)
class Prompt:
    """A prompt. `class_label`: name or number, for class-conditional runs; `seed`: of its first video.

    frames, height, width, fps: None: the job's. image: path of the first frame. conditioning_video: path of an image or
    video, whose content the latent frames `conditioning_frames` have (None: as many of the first as it has).
    """

    text: str = ""
    class_label: str | int | None = None
    seed: int = 0
    name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    image: str | None = None
    conditioning_video: str | None = None
    conditioning_frames: tuple[int, ...] | None = None

    def row(self) -> dict[str, Any]:
        """The row of a manifest or a prompt file; `read_prompts` reads it back."""
        own = {key: getattr(self, key) for key in OWN_KEYS if getattr(self, key) is not None}
        if self.conditioning_frames is not None:
            own["conditioning_frames"] = list(self.conditioning_frames)  # as JSON has it
        row = {**self.extra, "name": self.name, "prompt": self.text, "class": self.class_label, "seed": self.seed}
        return {**row, **own}

    def check(self, where: str) -> None:
        """ValueError, beginning with `where`: sizes that are no whole numbers above 0, files that are not there."""
        for key in ("frames", "height", "width"):
            value = getattr(self, key)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMITS[key]
            ):
                raise ValueError(
                    f"{where}: {key}: expected a whole number above 0 and at most {LIMITS[key]}, found {shorten(repr(value))}"
                )
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"{where}: fps: expected a number from 0.001 to 1000, found {self.fps!r}")
        if self.image is not None and self.conditioning_video is not None:
            raise ValueError(f"{where}: give image or conditioning_video, not both")
        if self.conditioning_frames is not None and self.conditioning_video is None:
            raise ValueError(f"{where}: conditioning_frames needs conditioning_video")
        for key in ("image", "conditioning_video"):
            path = getattr(self, key)
            # os.path: a name longer than file systems allow is no file, and no OSError
            if path is not None and not os.path.isfile(path):
                raise ValueError(
                    f"{where}: {key}: {path}: {'is not a file' if os.path.exists(path) else 'no such file'}"
                )


@dataclass(frozen=True)
class Item:
    """One video to generate: the prompt at `index` of the file, its seed, shape and frame rate."""

    index: int
    prompt: Prompt
    seed: int
    file: str
    shape: Bucket
    fps: float

    def row(self) -> dict[str, Any]:
        size = {"frames": self.shape.frames, "height": self.shape.height, "width": self.shape.width, "fps": self.fps}
        return {"index": self.index, **self.prompt.row(), "seed": self.seed, "file": self.file, **size}

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Items of one key can be sampled together."""
        conditions = (self.index,) if self.prompt.conditioning_video else (self.prompt.image is not None,)
        return (self.shape.key, self.fps, *conditions)


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a file: JSONL (.jsonl, .ndjson), or text (.txt, or no suffix), whose empty lines are skipped.

    ValueError: of another kind, unreadable, too large, not UTF-8, no prompt in it, or (JSONL) a bad line, with file,
    line and key.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix not in TEXT_SUFFIXES + JSON_SUFFIXES:
        raise ValueError(
            f"{path}: prompts are text (.txt, one per line) or JSONL ({', '.join(JSON_SUFFIXES)}), found suffix {suffix!r}"
        )
    try:
        text = read_text(path, MAX_BYTES).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"{path}: holds no prompt (0 lines that are not empty)")
    if suffix not in JSON_SUFFIXES:
        return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]
    return [_parsed(row, f"{path}:{number}") for number, row in parse_jsonl(text)]


def _parsed(row: dict[str, Any] | str, where: str) -> Prompt:
    if isinstance(row, str):
        raise ValueError(f"{where}: {row}")
    kinds: dict[str, tuple[type, ...]] = {
        "prompt": (str,), "class": (str, int), "seed": (int,), "name": (str,), "frames": (int,), "height": (int,),
        "width": (int,), "fps": (int, float), "image": (str,), "conditioning_video": (str,), "conditioning_frames": (list,),
    }  # fmt: skip
    for key, kind in kinds.items():
        value = row.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{where}: {key}: expected {' or '.join(k.__name__ for k in kind)}, found {value!r}")
    if row.get("prompt") is None and row.get("class") is None:
        raise ValueError(f"{where}: has neither prompt nor class; keys found: {', '.join(map(str, row)) or 'none'}")
    if taken := [key for key in row if key in RESERVED]:
        raise ValueError(f"{where}: key {taken[0]!r} is written by generation; give it another name")
    own_keys = (*KEYS, *OWN_KEYS, CONTROL)
    for key in row:
        name = key.lower().replace("-", "_")
        meant = SYNONYMS.get(name, name)
        if key not in own_keys and (meant in own_keys or name in NOT_OF_A_PROMPT):
            other = "it is a setting of the whole job or an argument of the pipeline"
            instead = f"did you mean {meant}?" if meant in own_keys else other
            raise ValueError(f"{where}: key {key!r} is none that a prompt has; {instead}")
    numbers = row.get("conditioning_frames")
    if numbers is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"{where}: conditioning_frames: expected a list of whole numbers, found {numbers!r}")
    extra = {key: value for key, value in row.items() if key not in KEYS + OWN_KEYS}
    own = {key: row[key] for key in OWN_KEYS if row.get(key) is not None}
    if numbers is not None:
        own["conditioning_frames"] = tuple(numbers)
    prompt = Prompt(row.get("prompt") or "", row.get("class"), row.get("seed") or 0, row.get("name"), extra, **own)
    prompt.check(where)
    return prompt


def slug(text: str) -> str:
    """`text` as part of a file name: a to z, 0 to 9, single hyphens, at most SLUG_LENGTH; "prompt" if nothing is left.

    Accents are dropped; path separators, "..", leading dots and NUL can't get through.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:SLUG_LENGTH].strip("-") or "prompt"


def items(prompts: Sequence[Prompt], videos_per_prompt: int, shape: Bucket | None, fps: float) -> list[Item]:
    """All videos to generate, in the order of the prompts: `videos_per_prompt` each, from consecutive seeds.

    shape, fps: of prompts without their own. File names begin with the prompt's index, so they are unique whatever the
    prompts are. ValueError: neither the prompt nor `shape` says a size; more than MAX_VIDEOS.
    """
    if (count := len(prompts) * videos_per_prompt) > MAX_VIDEOS:
        raise ValueError(
            f"{len(prompts):,} prompts with videos_per_prompt {videos_per_prompt:,} are {count:,} videos; a job has at most {MAX_VIDEOS:,}"
        )
    found = []
    for i, p in enumerate(prompts):
        size: dict[str, Any] = {
            key: getattr(p, key) or getattr(shape, key, None) for key in ("frames", "height", "width")
        }
        if absent := [key for key, value in size.items() if value is None]:
            raise ValueError(
                f"prompt {i}: a saved pipeline does not say what it was trained on; give {', '.join(absent)}"
            )
        bucket = Bucket(**size)
        suffix = ".png" if bucket.frames == 1 else ".mp4"
        name = slug(p.name or p.text or f"class {p.class_label}")
        for seed in range(p.seed, p.seed + videos_per_prompt):
            found.append(Item(i, p, seed, f"{i:05d}-{name}-seed{seed}{suffix}", bucket, float(p.fps or fps)))
    return found


def check_text(text: Any, name: str) -> None:
    """ValueError: not a string, or not encodable as UTF-8 (half of a surrogate pair)."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {text[:40]!r} is not valid Unicode ({error.reason} at {error.start})") from error


def label_id(label: int | str | None, classes: Mapping[str, int], count: int) -> int:
    """A class label as a number, 0 to count - 1; -1: null (None). A string is looked up as a name, then as a number."""
    if label is None:
        return -1
    if isinstance(label, str) and label in classes:
        return classes[label]
    known = f"0 to {count - 1}" + (f" or {', '.join(list(classes)[:20])}" if classes else "")
    try:
        number = int(label) if isinstance(label, str) else index(label)
    except (TypeError, ValueError):
        number = count
    if not -1 <= number < count or (isinstance(label, str) and classes):
        raise ValueError(f"class {shorten(repr(label))} is none of this model's {count} classes ({known})")
    return number


# ---------------------------------------------------------------------------------- command line


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser of the command line; every flag is a key of GenerateConfig."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", required=True, help="run directory, checkpoint, folder of a saved pipeline, or URL of a run"
    )
    parser.add_argument(
        "--prompts", required=True, help="text, one prompt per line; or JSONL with prompt, class, seed, name"
    )
    parser.add_argument("--out", required=True, help="folder for the videos")
    for key, kind, help in (
        ("frames", int, "number of frames; 1 for images (default: of the run's largest video bucket)"),
        ("height", int, "pixels (default likewise)"),
        ("width", int, "pixels (default likewise)"),
        ("scheduler", str, "flow_euler, ddim, ddpm, dpm_solver or unipc (default: the run's)"),
        ("steps", int, "sampling steps (default: the run's)"),
        ("guidance", float, "guidance scale, 1 for none (default: the run's)"),
        ("videos-per-prompt", int, "videos for each prompt (default: 1)"),
        ("fps", float, "frames per second (default: of most training videos)"),
        ("batch-size", int, "videos sampled at a time (default: 8)"),
        ("workers", int, "pipelines in parallel, under Ray (default: 1)"),
        ("threads", int, "CPU threads of each worker (default: 1)"),
        ("weights", str, "ema or model (default: ema)"),
        ("device", str, "cpu or cuda (default: cuda where there is one)"),
        ("precision", str, "auto, fp32 or bf16 (default: auto, as the run was trained)"),
    ):
        parser.add_argument(f"--{key}", type=kind, help=help, metavar=key.upper().replace("-", "_"))
    parser.add_argument("--overwrite", action="store_true", help="remove videos that other settings left in OUT")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of GenerateConfig")
    return parser


def settings(options: argparse.Namespace) -> GenerateConfig:
    """The config of a command line. ConfigError: an invalid value, with its key."""
    values = {key: value for key, value in vars(options).items() if value is not None and key != "set"}
    if "guidance" in values:
        values["guidance_scale"] = values.pop("guidance")
    for text in options.set:
        values = apply_override(values, text)
    return validate(values, GenerateConfig, "command line")
