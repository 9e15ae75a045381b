"""Argument parsers of the commands whose modules import torch: `--help` and usage errors come before that import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from stdit.config import Transition

# Names of stdit.weights.layouts; tests/test_cli.py compares the two.
LAYOUTS = (
    "stdit", "diffusers", "dit", "pixart", "latte", "opensora-v1", "stdit3", "rineau", "diffusers-dit",
    "diffusers-pixart", "diffusers-latte", "diffusers-sd3",
)  # fmt: skip


def convert(prog: str = "python -m stdit.weights.convert") -> argparse.ArgumentParser:
    """Command line of stdit.weights.convert."""
    parser = argparse.ArgumentParser(
        prog,
        description="Converts weights between layouts, bit-exactly. SOURCE's layout is detected from its keys.",
        epilog="docs/weights.md describes the layouts.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a .safetensors, .pt, .pth, .bin or .ckpt file; a diffusers folder; a pipeline; a checkpoint or run directory",
    )
    parser.add_argument("--to", dest="out", metavar="OUT", type=Path, required=True, help="the folder or file to write")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="stdit",
        help="the layout of OUT: a folder for stdit (default) and diffusers', one file for the others",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="a key of the model config that SOURCE does not determine, or that replaces its own, such as num_heads=16",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="which weights of a checkpoint that has both (default: ema)"
    )
    return parser


def transfer(prog: str = "python -m stdit.weights.transfer") -> argparse.ArgumentParser:
    """Command line of stdit.weights.transfer."""
    parser = argparse.ArgumentParser(
        prog,
        description="Transfers weights to another architecture: loads what matches and initialises the rest.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="weights of any layout, a checkpoint or a run directory"
    )
    parser.add_argument("--to", dest="out", metavar="OUT", type=Path, required=True, help="the new folder to write")
    parser.add_argument(
        "--config", type=Path, help="YAML file with the target's `model:` section (default: the source's)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of `model:`, such as temporal=true; repeatable",
    )
    parser.add_argument("--allow", nargs="*", default=[], choices=get_args(Transition), help="changes that may be made")
    parser.add_argument("--seed", type=int, default=0, help="seed of newly initialised weights")
    return parser


def ema(prog: str = "python -m stdit.training.post_hoc_ema") -> argparse.ArgumentParser:
    """Command line of stdit.training.post_hoc_ema."""
    parser = argparse.ArgumentParser(
        prog,
        description="Computes the average of a run's weights over any width, from snapshots of its EMA profiles "
        "(train.ema.profiles; post-hoc EMA, Karras et al. 2024).",
        epilog="OUT is read like a checkpoint: by generate, evaluate, convert, init.source and STDiTPipeline.",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run directory with ema_snapshots/")
    parser.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        help="width: standard deviation as a share of the training, such as 0.08",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--step", type=int, help="a snapshot's step: the average as of it (default: the last one's)")
    return parser


def summary(prog: str = "python -m stdit.models.cost") -> argparse.ArgumentParser:
    """Command line of stdit.models.cost."""
    parser = argparse.ArgumentParser(prog, description="Parameters, multiply-adds and activation memory of a model.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file with a `model:` section")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--latent", type=int, nargs=3, metavar=("T", "H", "W"), default=(1, 32, 32), help="latent size")
    size.add_argument("--pixels", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="size in pixels")
    parser.add_argument(
        "--compression", type=int, nargs=3, metavar=("T", "H", "W"), default=(1, 8, 8), help="pixels per latent"
    )
    parser.add_argument("--text-length", type=int, default=0, help="caption length in tokens; 0: the null caption")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of activations")
    return parser
