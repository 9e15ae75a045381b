"""The documents' commands run as they are written, in a folder of a user, with few steps."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit import media
from tests.support import diffusers_models, published_weights
from tests.support.documents import PAGES, commands
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

# Each command of a document and what is added, or replaces a size, so that it takes seconds; files to look for
# afterwards.
SAMPLER = ["--set", "samples.sampler.steps=2"]
TINY_PLAN = ["--set", "run_dir=runs/demo", "--set", "overrides.train.steps=4", "--set", "overrides.train.checkpoint_every=4"]  # fmt: skip
FEW = ["--set", "train.steps=2", "--set", "validation.samples=4", *SAMPLER]
MEDIA = ["--set", "reference={path: data/curated/manifest.jsonl, split: train}", "--set", "bootstrap=10"]
OWN_CLIPS = [
    ("stdit init runs/mine --clips clips/", ["--steps", "2"], "runs/mine/plan.yaml"),
    ("stdit forecast --plan runs/mine/plan.yaml", [], ""),
    ("stdit train-stages --plan runs/mine/plan.yaml", ["--set", "stages.model.overrides.samples.sampler.steps=2"], "runs/mine/model/done.json"),
    ("stdit generate --run runs/mine/model --prompts runs/mine/prompts.txt --out runs/mine/videos", ["--steps", "2"], "runs/mine/videos/manifest.jsonl"),
]  # fmt: skip
WEIGHTS = [
    ("stdit convert PixArt-XL-2-512x512/ --to weights/pixart", [], "weights/pixart/config.json"),
    ("stdit transfer weights/pixart --to weights/video --set temporal=true --allow add_temporal", [], "weights/video/config.json"),
    ("stdit convert DiT-XL-2-256x256.pt --to weights/dit-xl", ["--set", "num_heads=4"], "weights/dit-xl/config.json"),
    ("stdit convert weights/dit-xl --to DiT.pt --layout dit", [], "DiT.pt"),
]  # fmt: skip
FOOTAGE = [
    ("python -m stdit.data.digit_films --out data/footage", [], "data/footage"),
    ("stdit curate --config configs/curate/footage.yaml", ["--set", "cuts.min_seconds=0.2", "--set", "filters=[]"], "data/curated/curation.html"),
    ("stdit forecast --plan configs/plans/demo.yaml", [], ""),
    ("stdit train-stages --plan configs/plans/tiny.yaml", TINY_PLAN, "runs/demo/report.html"),
    ("stdit train --config configs/debug.yaml --nproc 2 --set run_dir=runs/debug", FEW, "runs/debug/done.json"),
    ("stdit generate --run runs/demo/finest --prompts prompts.txt --out videos", ["--steps", "2"], "videos/manifest.jsonl"),
    ("stdit evaluate --config configs/evaluate/media.yaml --set generated=videos --set out=scores", MEDIA, "scores"),
    ("stdit compare runs/demo/clips runs/demo/finest --out comparison", [], "comparison"),
]  # fmt: skip
WRITTEN = {command for page in PAGES for command in commands(page)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that the commands name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "clips").mkdir()
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 256, (6, 24, 32, 3), np.uint8)
        media.write_video(tmp_path / f"clips/clip{i}.mp4", frames, 12.0)
        (tmp_path / f"clips/clip{i}.txt").write_text(f"clip number {i}")
    (tmp_path / "prompts.txt").write_text("the digit seven moves left\nthe digit two moves up\n")
    diffusers_models.pixart().save_pretrained(tmp_path / "PixArt-XL-2-512x512")
    torch.save(published_weights.dit_weights(), tmp_path / "DiT-XL-2-256x256.pt")
    return tmp_path


@pytest.mark.parametrize("group", [OWN_CLIPS, WEIGHTS, FOOTAGE], ids=["own clips", "weights", "footage"])
def test_the_commands_of_the_documents_run_one_after_the_other(
    group: list[tuple[str, list[str], str]], folder: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command, small, made in group:
        assert command in WRITTEN, f"{command}: no document says so any more"
        words = shlex.split(command)
        module = ["-m", "stdit.cli"] if words[0] == "stdit" else words[1:3]
        words = words[1:] if words[0] == "stdit" else words[3:]
        done = subprocess.run(
            [sys.executable, *module, *words, *small],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (
            f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        assert not made or (folder / made).exists(), f"{command} has not written {made}\n{done.stdout[-2000:]}"
