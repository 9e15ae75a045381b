"""Config of the evaluation of generated clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stdit.config.base import Count, Frozen, NonNegative, Samples, Share, Steps, Threads, Workers
from stdit.config.location import LocalPath

# Scores by name; stdit/evaluation/scores.py defines each.
ScoreName = Literal[
    "fid", "kid", "inception_score", "precision", "recall",
    "fd_dinov2", "kd_dinov2", "precision_dinov2", "recall_dinov2", "clip_score",
    "fvd", "frechet_videomae", "frechet_vjepa2",
    "vbench_temporal_flickering", "vbench_motion_smoothness", "vbench_dynamic_degree",
    "vbench_subject_consistency", "vbench_background_consistency",
    "linear_motion_smoothness", "vmaf_motion", "class_accuracy", "direction_accuracy",
]  # fmt: skip


class EvaluationConfig(Frozen):
    """Metrics of generated clips against a manifest's held-out clips (stdit/evaluation/)."""

    train_split: str = Field(default="train", min_length=1)
    """Split of the manifest that the classifier is trained on."""
    validation_split: str = Field(default="validation", min_length=1)
    """Split of held-out clips: prompts and reference of the metrics."""
    class_column: str | None = "class"
    """Column with the class of a clip. null, or absent in the manifest: no class accuracy, no Fréchet distance."""
    class_name: str = Field(default="class", pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the class in reports: `digit` gives digit_accuracy."""
    direction_column: str | None = "direction"
    """Column with the motion direction: left, right, up or down. null, or absent: no direction accuracy."""
    min_motion: Share = 0.05
    """Least displacement of the centroid, as a fraction of the shorter side; below it the direction is `none`."""
    crop: Literal["foreground", "frame"] = "foreground"
    """Input of the classifier: `foreground`, what differs from the border colour, centred and scaled; `frame`, all of
    it."""
    real_clips: Samples = 512
    """Largest number of held-out clips in the reference."""
    classifier_frames: Samples = 4096
    """Largest number of frames that the classifier is trained on, one of each clip."""
    classifier_steps: Steps = 400
    """Optimizer steps of the classifier."""
    classifier_seed: NonNegative = 0
    """Seed of the classifier's initialisation, batches and frames."""
    classifier_size: Annotated[int, Field(ge=8, le=256, multiple_of=4)] = 16
    """Input size of the classifier in pixels."""


class NetworkPaths(Frozen):
    """Weights of feature networks. Scores of a network without a path are skipped, with the reason."""

    inception: Path | None = None
    """pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity): FID, KID, Inception Score, precision,
    recall."""
    dinov2: Path | None = None
    """Folder of DINOv2 ViT-L/14 for transformers (facebook/dinov2-large): FD-DINOv2."""
    clip: Path | None = None
    """Folder of a CLIP model: CLIP score; ViT-B/32 for VBench's background consistency."""
    dino: Path | None = None
    """Folder of DINO ViT-B/16 (facebook/dino-vitb16): VBench's subject consistency."""
    i3d: Path | None = None
    """i3d_torchscript.pt of StyleGAN-V: FVD."""
    videomae: Path | None = None
    """Folder of a VideoMAE model: Fréchet distance of its features."""
    vjepa2: Path | None = None
    """Folder of a V-JEPA 2 model: Fréchet distance of its features."""


class ReferenceConfig(Frozen):
    """Media that generated ones are compared with, or a training set."""

    path: Path
    """A folder of images or videos, a manifest, or an .npz (samples arr_0, or statistics mu and sigma)."""
    split: str | None = None
    """Split of a manifest; null: all."""
    crop: bool = False
    """Resizes and centre-crops media, and takes frames, to the shape of the generated ones: of a manifest's clips those
    that the extraction took that the generated media's run was trained on (its frame_stride, target_fps, clip_window
    and windows, a medium each), else the first. Clips whose frame rate it drops (target_fps, min_fps and max_fps of
    buckets) are left out and counted. Smaller and shorter media are left out and counted; where at least half of the
    rest have exactly that shape, only those are taken."""


class ScoreConfig(Frozen):
    """Which scores, with which networks (stdit/evaluation/scores.py)."""

    scores: tuple[ScoreName, ...] | None = None
    """null: all that the media, the reference and the networks allow."""
    networks: NetworkPaths = NetworkPaths()
    """Weights of feature networks, by path."""
    bootstrap: Annotated[int, Field(ge=2, le=10_000)] = 50
    """Resamples of the 95 % intervals."""
    seed: NonNegative = 2020
    """Seed of subsets, splits and resamples (2020: torch-fidelity's)."""
    kid_subsets: Annotated[int, Field(gt=0, le=10_000)] = 100
    """Pairs of subsets of KID."""
    kid_subset_size: Annotated[int, Field(ge=2, le=10_000)] = 1000
    """Samples of each; fewer where there are fewer."""
    neighbors: Count = 3
    """Neighbours of precision and recall."""
    splits: Count = 10
    """Parts of the Inception Score."""


class EvaluateConfig(ScoreConfig):
    """Scores of a folder of generated media (`stdit evaluate --config FILE`)."""

    generated: Path
    """Folder that stdit.generate wrote, any other folder of images or videos of one shape, a manifest, or an .npz
    (arr_0)."""
    reference: ReferenceConfig | None = None
    """What they are compared with; null: only scores that need none."""
    training: ReferenceConfig | None = None
    """Training set whose media must not be in the reference: they are counted. null: split train of a reference's
    manifest."""
    out: LocalPath
    """Folder of scores.json, the statistics and the cache of features."""
    cache: Path | None = None
    """Folder of features, which other evaluations may share; null: OUT/features."""
    save_samples: bool = False
    """Also writes OUT/samples.npz, the images as ADM's evaluator reads them."""
    metrics: EvaluationConfig = EvaluationConfig()
    """Of class_accuracy and direction_accuracy: how the reference's manifest is read."""
    workers: Workers = 1
    """Ray actors that compute features."""
    threads: Threads = 1
    """CPU threads of each."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where networks run."""
