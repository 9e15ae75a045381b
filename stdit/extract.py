"""Clips and captions in, feature shards out: decode, crop to the bucket, encode, write. Idempotent; one shard is the
unit of work.

    python -m stdit.extract --config configs/extract/digits.yaml                  # one process, without Ray
    python -m pipelines.extract_features --config configs/extract/digits.yaml     # the same on many workers

A second run resumes where the first stopped, extracts changed sources again, and refuses a changed config.
Clips that cannot be decoded are skipped, up to `max_bad_share` of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.config import ExtractConfig, Url, load_config
from stdit.console import echo
from stdit.errors import exit_code

# Imported late, so that --help answers at once.
if TYPE_CHECKING:
    from stdit.data.extraction import ExtractionPlan
    from stdit.data.extractor import Extractor
    from stdit.data.features import FeatureFacts
    from stdit.data.records import ShardResult, ShardSpec


def plan_shards(config: ExtractConfig) -> ExtractionPlan:
    """Checks what can be checked without opening a clip, and divides the manifest into shards.

    Raises ManifestError: the manifest. ConfigError: an encoder that is not there, sizes that the
    autoencoder's compression does not divide, a batch that memory does not hold.
    """
    from stdit.data.extraction import plan_extraction
    from stdit.encoders.text_loading import feature_identity
    from stdit.encoders.video import load_video_encoder
    from stdit.encoders.vision import vision_identity

    video = load_video_encoder(config.video_encoder)
    for bucket in config.buckets:
        video.check(bucket)
    text = config.text_encoder and feature_identity(config.text_encoder)
    vision = config.vision_encoder and vision_identity(config.vision_encoder)
    plan = plan_extraction(config, _encoder_identities(video.identity, text, vision))
    check_batch(config, plan.clips)
    return plan


def check_batch(config: ExtractConfig, clips: int) -> None:
    """ConfigError: the decoded pixels of `batch_size` of the `clips`, in float32, are more than memory holds."""
    from stdit.memory import check_fits

    most = min(config.batch_size, min(clips, config.clips_per_shard) * config.most_windows)
    bucket = max(config.buckets, key=lambda b: b.frames * b.height * b.width)
    check_fits(
        f"batch_size {config.batch_size}: the pixels of {most:,} clips of bucket {bucket.key} take",
        most * bucket.frames * bucket.height * bucket.width * 3 * 4,
        "Lower batch_size, or leave the bucket out",
    )


def _encoder_identities(
    video: dict[str, Any], text: dict[str, Any] | None, vision: dict[str, Any] | None
) -> dict[str, Any]:
    """Identities of the encoders as far as they determine features: weights, not paths. text: `feature_identity`;
    vision: `vision_identity`."""
    from stdit.encoders.source import UNCHECKED

    return {
        "video_encoder": {key: value for key, value in video.items() if key not in UNCHECKED},
        "text_encoder": text,
        **({"vision_encoder": vision} if vision else {}),
    }


def expected_facts(config: ExtractConfig) -> FeatureFacts:
    """What `FeatureSet.facts()` will say of the features of `config`, before anything is extracted: from the manifest
    and the encoders' settings. fps is what the manifest states: None where it states no frame rate.

    Raises ManifestError; ConfigError: an encoder that is not there, sizes that its compression does not divide.
    """
    from stdit.data import manifest
    from stdit.data.features import feature_facts
    from stdit.data.transforms import frame_step
    from stdit.encoders.text_loading import feature_sizes
    from stdit.encoders.video import load_video_encoder
    from stdit.encoders.vision import feature_width

    clips = manifest.read(config.manifest)
    video = load_video_encoder(config.video_encoder).identity
    text = feature_sizes(config.text_encoder) if config.text_encoder else None
    moving = [clip.fps for clip in clips if clip.fps and clip.frames != 1]
    rates = [fps / frame_step(fps, config.frame_stride, config.target_fps) for fps in moving]
    vision = {"dim": feature_width(config.vision_encoder)} if config.vision_encoder else None
    return feature_facts(video, text, config.buckets, len(clips.classes), rates, vision)


def load_extractor(config: ExtractConfig, clips: int | None = None, encoders: int = 1) -> Extractor:
    """Loads the encoders, on a GPU if there is one. ConfigError: not found.

    clips: that it will extract, as far as that is known; encoders: of this machine. Both decide
    `decoder_workers: auto`.
    """
    import torch

    from stdit.data.decoder_pool import decoder_workers
    from stdit.data.extractor import Extractor
    from stdit.encoders.text_loading import feature_identity_of, load_text_encoder
    from stdit.encoders.video import load_video_encoder
    from stdit.encoders.vision import load_vision_encoder, vision_identity

    device = "cuda" if torch.cuda.is_available() else "cpu"
    video = load_video_encoder(config.video_encoder, device)
    text = load_text_encoder(config.text_encoder, device) if config.text_encoder else None
    vision = load_vision_encoder(config.vision_encoder, device) if config.vision_encoder else None
    settings = _encoder_identities(
        video.identity,
        feature_identity_of(text.identity) if text else None,
        config.vision_encoder and vision_identity(config.vision_encoder),
    )
    return Extractor(config, video, text, settings, decoder_workers(config.decoder_workers, clips, encoders), vision)


def extract_shard(config: ExtractConfig, spec: ShardSpec) -> Path | Url:
    """Extracts one shard unless it is up to date; returns its path or URL (nothing is there if none of its clips is
    kept)."""
    from stdit.data.features import shard_path
    from stdit.data.object_cache import ObjectCache
    from stdit.data.records import stale_reason
    from stdit.data.staging import local_folder, staging_of

    staging = staging_of(config)
    if stale_reason(local_folder(config), spec, ObjectCache.of(config.cache), staging and staging.stored()):
        with load_extractor(config, len(spec.clips)) as extractor:
            extractor.extract(spec)
    return shard_path(config.out, spec.number)


def pending_shards(plan: ExtractionPlan) -> tuple[list[ShardSpec], str]:
    """Shards still to extract, because they are new or have changed, and a line that says why."""
    from stdit.data import extraction

    return extraction.pending_shards(plan)


def prepare(config: ExtractConfig, overwrite: bool = False) -> tuple[ExtractionPlan, list[ShardSpec]]:
    """The plan and the shards to extract; prints how many. Errors as `plan_shards` and `write_settings`."""
    from stdit.data.extraction import write_settings

    plan = plan_shards(config)
    write_settings(plan, overwrite)
    todo, line = pending_shards(plan)
    if plan.staging:
        plan.staging.push_waiting([spec.number for spec in todo])
    if todo:
        echo(f"{config.out}: {line}", file=sys.stderr)
    return plan, todo


def collect(
    plan: ExtractionPlan, todo: Sequence[ShardSpec], results: Iterable[ShardResult], summary: bool = True
) -> Path | Url:
    """Shows progress over the results, then completes the extraction and prints what became of the clips (`summary`);
    stops early at too many bad clips. Errors as `finish`."""
    from tqdm import tqdm

    from stdit.data.extraction import finish, read_report, report_lines

    bad = 0
    with tqdm(total=sum(len(spec.clips) for spec in todo), desc="extract", unit="clip", disable=not todo) as bar:
        for result in results:
            bad += result.bad
            bar.update(result.clips)
            if bad:
                bar.set_postfix(bad=bad)
            if bad > plan.bad_allowed:
                break
    out = finish(plan)
    if todo and summary:
        echo("\n".join(report_lines(read_report(out))), file=sys.stderr)
    return out


def run(config: ExtractConfig, overwrite: bool = False) -> Path | Url:
    """Runs the extraction in this process; returns the folder of features, or their URL. A second call does nothing.

    Raises ConfigError, ManifestError, ExtractionError (after report.json is written), OSError.
    """
    plan, todo = prepare(config, overwrite)
    if not todo:
        return collect(plan, (), ())
    with load_extractor(config, sum(len(spec.clips) for spec in todo)) as extractor:
        return collect(plan, todo, extractor.extract_all(todo))


def arguments(program: str) -> argparse.ArgumentParser:
    """The command line of `python -m stdit.extract` and of `python -m pipelines.extract_features`."""
    parser = argparse.ArgumentParser(program, description="Clips and captions in, feature shards out.")
    parser.add_argument("--config", required=True, help="YAML with the fields of ExtractConfig")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, such as out=DIR"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="discard features of another config in the same folder"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: complete; 1: too many bad clips, or a write that failed; 2: unusable config, manifest or folder."""
    args = arguments("python -m stdit.extract").parse_args(argv)
    try:
        out = run(load_config(args.config, ExtractConfig, args.set), args.overwrite)
    except (ValueError, OSError) as error:
        return report_error(error)
    echo(out)
    return 0


def report_error(error: Exception) -> int:
    """Prints why an extraction ended; its exit code: 2 for a config, manifest or folder that cannot be used, else 1."""
    echo(f"error: {error}", file=sys.stderr)
    return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
