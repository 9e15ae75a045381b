"""Prompt files, names of output files, and the command line of generation. No torch.

A prompt file is text (one prompt per line) or JSONL (one object per line): `prompt`, and optionally `class`, `seed`,
`name`. Other keys are copied to the manifest.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from stdit.config import GenerateConfig, apply_override, validate
from stdit.files import parse_jsonl

# Longest slug of a file name; with index and seed well below the 255 bytes that file systems allow.
SLUG_LENGTH = 60
KEYS = ("prompt", "class", "seed", "name")
# Keys of manifest rows that generation writes.
RESERVED = ("index", "file", "error", "protocol")


@dataclass(frozen=True)
class Prompt:
    """A prompt. `class_label`: name or number, for class-conditional runs; `seed`: of its first video."""

    text: str = ""
    class_label: str | int | None = None
    seed: int = 0
    name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The row of a manifest or a prompt file; `read_prompts` reads it back."""
        return {**self.extra, "name": self.name, "prompt": self.text, "class": self.class_label, "seed": self.seed}


@dataclass(frozen=True)
class Item:
    """One video to generate: the prompt at `index` of the file, and its seed."""

    index: int
    prompt: Prompt
    seed: int
    file: str

    def row(self) -> dict[str, Any]:
        return {"index": self.index, **self.prompt.row(), "seed": self.seed, "file": self.file}


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a file: JSONL if it ends in .jsonl, else text, whose empty lines are skipped.

    ValueError: unreadable, not UTF-8, no prompt in it, or (JSONL) a bad line, with file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"{path}: holds no prompt (0 lines that are not empty)")
    if path.suffix.lower() != ".jsonl":
        return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]
    return [_parsed(row, f"{path}:{number}") for number, row in parse_jsonl(text)]


def _parsed(row: dict[str, Any] | str, where: str) -> Prompt:
    if isinstance(row, str):
        raise ValueError(f"{where}: {row}")
    kinds = {"prompt": (str,), "class": (str, int), "seed": (int,), "name": (str,)}
    for key, kind in kinds.items():
        value = row.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{where}: {key}: expected {' or '.join(k.__name__ for k in kind)}, found {value!r}")
    if row.get("prompt") is None and row.get("class") is None:
        raise ValueError(f"{where}: has neither prompt nor class; keys found: {', '.join(map(str, row)) or 'none'}")
    if taken := [key for key in row if key in RESERVED]:
        raise ValueError(f"{where}: key {taken[0]!r} is written by generation; give it another name")
    extra = {key: value for key, value in row.items() if key not in KEYS}
    return Prompt(row.get("prompt") or "", row.get("class"), row.get("seed") or 0, row.get("name"), extra)


def slug(text: str) -> str:
    """`text` as part of a file name: a to z, 0 to 9, single hyphens, at most SLUG_LENGTH; "prompt" if nothing is left.

    Accents are dropped; path separators, "..", leading dots and NUL can't get through.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:SLUG_LENGTH].strip("-") or "prompt"


def items(prompts: Sequence[Prompt], videos_per_prompt: int, suffix: str) -> list[Item]:
    """All videos to generate, in the order of the prompts: `videos_per_prompt` each, from consecutive seeds.

    File names begin with the prompt's index, so they are unique whatever the prompts are.
    """
    return [
        Item(i, p, p.seed + k, f"{i:05d}-{slug(p.name or p.text or f'class {p.class_label}')}-seed{p.seed + k}{suffix}")
        for i, p in enumerate(prompts)
        for k in range(videos_per_prompt)
    ]


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
        raise ValueError(f"class {label!r} is none of this model's {count} classes ({known})")
    return number


# ---------------------------------------------------------------------------------- command line


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser of the command line; every flag is a key of GenerateConfig."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory, checkpoint, or folder of a saved pipeline")
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
