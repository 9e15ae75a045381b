"""`stdit init`: a manifest and a plan for a folder of clips.

    stdit init runs/mine --clips clips/                                         a rehearsal on pixels: CPU, no downloads
    stdit init runs/mine --clips clips/ --video-encoder Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --text-encoder google/t5-v1_1-xxl
    stdit train-stages --plan runs/mine/plan.yaml

Opens every clip once, chooses buckets from the sizes, lengths and frame rates that it finds, and prints its choices.
The clips stay where they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.config import ConfigError, Url, parse_location
from stdit.config.location import hide_credentials
from stdit.console import count_of, echo
from stdit.cores import available_cores
from stdit.errors import exit_code
from stdit.files import atomic_write

if TYPE_CHECKING:
    from stdit.config import VideoEncoderConfig
    from stdit.data.probe import BucketProposal, Probe, ProbedClip

# One clip in so many is held out for validation, at most MAX_VALIDATION.
VALIDATION_EVERY, MAX_VALIDATION = 20, 256
# Lines of prompts.txt.
PROMPTS = 8
# Without an autoencoder (rehearsal): pixels of a frame, frames of a clip.
PIXELS = {"max_pixels": 32 * 32, "max_frames": 9}
LATENTS = {"max_pixels": 256 * 256, "max_frames": 49}


@dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    out: Path
    clips: Path | Url
    video_encoder: str | None = None
    text_encoder: str | None = None
    max_pixels: int | None = None
    max_frames: int | None = None
    steps: int | None = None


def init(choices: Choices, progress: bool = True) -> list[str]:
    """Writes OUT/plan.yaml, OUT/prompts.txt (some captions, held-out ones first) and, for a folder of clips,
    OUT/manifest.jsonl and the link OUT/clips; the lines to print.

    ConfigError: OUT has one of them already, there are no usable clips, or an encoder is not there. ManifestError: as
    stdit.data.manifest.read.
    """
    out, source = choices.out, choices.clips
    _check_out(out, source)
    from stdit.data import manifest
    from stdit.data.probe import probe, propose_buckets

    found = probe(source, progress=progress)
    limits = LATENTS if choices.video_encoder else PIXELS
    encoder, compression = _autoencoder(choices.video_encoder)
    patch = (1, 2, 2) if encoder else (1, 4, 4)
    multiple_of = math.lcm(compression[1] * patch[1], compression[2] * patch[2])
    proposal = propose_buckets(
        found.clips,
        compression,
        patch,
        max_pixels=choices.max_pixels or limits["max_pixels"],
        max_frames=choices.max_frames or limits["max_frames"],
    )
    out.mkdir(parents=True, exist_ok=True)
    path: Path | Url = source
    prompts = [clip for clip in found.clips if clip.split == "validation"]
    held_out = len(prompts)
    if _is_folder(source):
        path = out / "manifest.jsonl"
        validation = validation_clips([clip for clip in found.clips if clip.path not in proposal.dropped])
        held_out = len(validation)
        prompts = [clip for clip in found.clips if clip.path in validation]
        below = str(source)
        if isinstance(source, Path):
            below = "clips"
            (out / below).symlink_to(source.resolve(), target_is_directory=True)
        manifest.write(path, [_row(clip, validation, below) for clip in found.clips])
    # Those held out come first.
    captions = dict.fromkeys(" ".join(clip.caption.split()) for clip in (*prompts, *found.clips) if clip.caption)
    if captions:
        atomic_write(out / "prompts.txt", "".join(f"{caption}\n" for caption in list(captions)[:PROMPTS]))
    atomic_write(out / "plan.yaml", plan_text(choices, path, proposal, held_out, multiple_of, encoder))
    return [*_report(found, proposal, held_out), f"wrote {out / 'plan.yaml'}" + (f", {path}" if path != source else "")]


def _is_folder(source: Path | Url) -> bool:
    from stdit.data.rows import READERS

    return source.suffix.lower() not in READERS if isinstance(source, Url) else source.is_dir()


def _check_out(out: Path, source: Path | Url) -> None:
    """ConfigError: no clips there, or something that would be overwritten."""
    if isinstance(source, Path) and not source.exists():
        raise ConfigError(f"--clips {source}: no such folder or manifest")
    if isinstance(source, Path) and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} is inside --clips {source}, where its own files would count as clips")
    for name in ("plan.yaml", "prompts.txt", "manifest.jsonl", "clips"):
        if (out / name).exists() or (out / name).is_symlink():
            raise ConfigError(f"{out / name} exists already; nothing was written. Remove it, or choose another folder")


def _autoencoder(path: str | None) -> tuple[VideoEncoderConfig | None, tuple[int, int, int]]:
    """The autoencoder at `path`, of videos or of images, by itself or in the vae/ of a pipeline; and its compression
    (t, h, w). None: pixels.

    ConfigError: there is none.
    """
    if path is None:
        return None, (1, 1, 1)
    from stdit.config import VideoEncoderConfig
    from stdit.encoders.video import load_video_encoder

    alone = (Path(path) / "config.json").is_file()
    errors: list[ConfigError] = []
    for subfolder in (None,) if alone else ("vae", None):
        for kind in ("video", "image"):
            config = VideoEncoderConfig(kind=kind, path=path, subfolder=subfolder, dtype="bfloat16")
            try:
                return config, load_video_encoder(config).identity["compression"]
            except ConfigError as error:
                errors.append(error)
                if not str(error).startswith("video_encoder.kind:"):
                    break
    raise errors[0]


def validation_clips(clips: Sequence[ProbedClip]) -> set[str]:
    """Paths of the clips to hold out: evenly spread, one in VALIDATION_EVERY, at least one of two or more."""
    if len(clips) < 2:
        return set()
    count = min(MAX_VALIDATION, max(1, len(clips) // VALIDATION_EVERY))
    return {clips[i * len(clips) // count].path for i in range(count)}


def _row(clip: ProbedClip, validation: set[str], below: str) -> dict[str, Any]:
    row: dict[str, Any] = {"path": f"{below}/{clip.path}", "caption": clip.caption or ""}
    row |= {"split": "validation" if clip.path in validation else "train"}
    row |= {"fps": clip.fps} if clip.frames > 1 and clip.fps > 0 else {}
    return row | {"frames": clip.frames, "height": clip.height, "width": clip.width}


def _report(found: Probe, proposal: BucketProposal, held_out: int) -> list[str]:
    """What was found and chosen, a line each."""
    videos = [clip for clip in found.clips if clip.frames > 1]
    sizes = sorted({(clip.height, clip.width) for clip in found.clips})
    lines = [f"{count_of(len(videos), 'video')} and {count_of(len(found.clips) - len(videos), 'image')}"]
    if sizes:
        lines[0] += f", from {sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]} px (height x width)"
    if videos:
        frames = sorted(clip.frames for clip in videos)
        lines.append(f"{frames[0]} to {frames[-1]} frames, half have {frames[len(frames) // 2]} or more")
        rates = found.frame_rates
        lines.append("frame rates: " + ", ".join(f"{fps:g} fps ({count:,})" for fps, count in list(rates.items())[:5]))
        if len(rates) > 1:
            lines.append("note: frame rates differ, so motion is seen at several speeds")
    lines += ["buckets (frames x height x width), the largest size that nine in ten clips cover:"]
    lines += [f"  {line}" for line in proposal.lines()]
    be = "is" if held_out == 1 else "are"
    lines.append(f"{count_of(held_out, 'clip')} {be} held out for validation (split: validation)")
    if uncaptioned := found.uncaptioned:
        have = "has" if len(uncaptioned) == 1 else "have"
        lines.append(
            f"note: {count_of(len(uncaptioned), 'clip')} {have} no caption (NAME.txt beside NAME.mp4), such as {uncaptioned[0]}"
        )
    lines += [f"cannot be used: {path}: {reason}" for path, reason in list(found.failures.items())[:5]]
    if len(found.failures) > 5:
        lines.append(f"… and {len(found.failures) - 5:,} more that cannot be used")
    return lines


# -------------------------------------------------------------------------------------------- plan


def plan_text(
    choices: Choices,
    manifest: Path | Url,
    proposal: BucketProposal,
    held_out: int,
    multiple_of: int,
    encoder: VideoEncoderConfig | None,
) -> str:
    """plan.yaml, annotated. multiple_of: what sides of frames have to be multiples of, px. encoder: None for pixels."""
    latent = encoder is not None
    gpus = _gpus()
    workers, cpus = (gpus, 4) if gpus else (1, available_cores())
    buckets = "\n".join(
        f"    - {{frames: {b.frames}, height: {b.height}, width: {b.width}}}  # {count_of(proposal.clips_by_bucket[b.key], 'clip')}"
        for b in proposal.buckets
    )
    video = "{kind: pixels}"
    if encoder is not None:
        folder = f", subfolder: {encoder.subfolder}" if encoder.subfolder else ""
        video = f"{{kind: {encoder.kind}, path: {_quoted(str(encoder.path))}{folder}, dtype: bfloat16}}"
    text = (
        f"{{path: {_quoted(choices.text_encoder)}, max_text_tokens: 200, dtype: bfloat16}}"
        if choices.text_encoder
        else "{byte_t5: {width: 128}, max_text_tokens: 128}"
    )
    model = (
        "{size: B, patch_size: [1, 2, 2], qk_norm: rms, cross_qk_norm: rms}"
        if latent
        else "{hidden_size: 192, depth: 4, num_heads: 6, patch_size: [1, 4, 4], qk_norm: rms, cross_qk_norm: rms}"
    )
    steps = choices.steps or (20000 if latent else 200)
    rate = "1e-4" if latent else "1e-3"
    video_bucket = max(proposal.buckets, key=lambda b: (b.frames, b.height * b.width))
    area = max(b.height * b.width for b in proposal.buckets)
    frames = sorted({b.frames for b in proposal.buckets})
    auto = f"{{area: {area}, frames: {frames}, multiple_of: {multiple_of}}}"
    every = f"{max(1, steps // 4)}"
    watch = (
        f"      validation: {{every: {every}, samples: {min(64, held_out)}}}\n"
        f"      samples: {{every: {every}, count: {min(8, held_out)}, sampler: {{steps: 20}}, "
        f"bucket: {{frames: {video_bucket.frames}, height: {video_bucket.height}, width: {video_bucket.width}}}}}\n"
        if held_out
        else ""
    )
    rehearsal = "" if latent else REHEARSAL
    return f"""\
# Written by `stdit init`: trains a text-to-video model on {choices.clips}.
#   stdit forecast --plan {choices.out}/plan.yaml       clips per bucket, tokens, FLOPs, memory; starts nothing
#   stdit train-stages --plan {choices.out}/plan.yaml   the same command again resumes
#   stdit generate --run {choices.out}/model --prompts {choices.out}/prompts.txt --out {choices.out}/videos
# Left out because they follow from the features: in_channels, text_dim, max_text_tokens, latent statistics, the
# training buckets and their batch sizes. docs/config.md explains every key.
name: {_quoted(choices.out.resolve().name or "clips")}
run_dir: {_quoted(choices.out)}

extraction:
  manifest: {_quoted(manifest)}
{rehearsal}  video_encoder: {video}
  text_encoder: {text}
  # Frames x height x width in pixels: multiples of compression x patch. A table of aspect ratios in their place:
  # buckets: {{auto: {auto}}}
  buckets:
{buckets}

resources: {{workers: {workers}, cpus_per_worker: {cpus}, use_gpu: {str(bool(gpus)).lower()}}}

stages:
  model:
    overrides:
      model: {model}
      diffusion: {{shift_base: auto}}
      # Samples of the largest bucket per rank; smaller buckets take more.
      data: {{batch_size: {1 if latent else 8}}}
      train:
        steps: {steps}
        precision: auto
        optimizer: {{learning_rate: {rate}, warmup_steps: {max(1, steps // 20)}}}
        ema: {{decay: {0.9999 if latent else 0.99}}}
        checkpoint_every: {max(1, steps // 4)}
{"        activation_checkpointing: true" + chr(10) if latent else ""}{watch}"""


REHEARSAL = """\
  # A rehearsal: small pixels and a random text encoder, which need no download and no GPU. For a real model run
  # `stdit init` with --video-encoder and --text-encoder, or edit the next two lines, the buckets and the model's size.
"""


def _quoted(value: Path | str) -> str:
    """A string as YAML: quoted where it would read as something else."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z/.][\w./-]*", text, re.ASCII) else json.dumps(text)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# ----------------------------------------------------------------------------------- command line


def _location(text: str) -> Path | Url:
    """`parse_location` for argparse, which prints the value in place of a ValueError's reason."""
    try:
        return parse_location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(hide_credentials(str(error))) from None


def arguments(prog: str = "stdit init") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the plan and everything that it makes")
    parser.add_argument(
        "--clips",
        type=_location,
        required=True,
        help="folder of NAME.mp4 and NAME.txt, or a manifest; path or URL",
    )
    parser.add_argument(
        "--video-encoder", metavar="PATH", help="autoencoder, or pipeline with one: folder or hub id (default: pixels)"
    )
    parser.add_argument("--text-encoder", metavar="PATH", help="T5: folder or hub id (default: a small random one)")
    parser.add_argument(
        "--max-pixels", type=int, help="height x width of a frame at most (1024; 65536 with an encoder)"
    )
    parser.add_argument("--max-frames", type=int, help="frames of a clip at most (9; 49 with an encoder)")
    parser.add_argument("--steps", type=int, help="training steps (200; 20000 with an encoder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: written; 1: a file cannot be written; 2: unusable arguments or clips, nothing was written."""
    parser = arguments()
    options = parser.parse_args(argv)
    for name in ("max_pixels", "max_frames", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    try:
        lines = init(Choices(**vars(options)))
    except (ValueError, OSError) as error:
        echo(f"stdit init: {error}", file=sys.stderr)
        return exit_code(error)
    echo("\n".join(lines))
    echo(f"next: stdit train-stages --plan {options.out}/plan.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
