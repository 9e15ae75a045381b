"""Clips and captions in, feature shards out: decode, crop to the bucket, encode, write. Idempotent, part by part.

    python -m stdit.extract --config configs/extract/digits.yaml                  # one process, without Ray
    python -m pipelines.extract_features --config configs/extract/digits.yaml     # the same on many workers

Run again, it goes on where it stopped, does again what has changed at the source, and refuses a
changed config. One clip that cannot be decoded stops nothing; more than `max_bad_share` do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.config import ExtractConfig, load_config

# Imported late, so that --help answers at once.
if TYPE_CHECKING:
    from stdit.data.extraction import Plan
    from stdit.data.extractor import Extractor
    from stdit.data.features import FeatureFacts
    from stdit.data.records import Outcome, Part


def plan_parts(config: ExtractConfig) -> Plan:
    """Checks all that can be checked without opening a clip, and divides the manifest into parts of a shard each.

    Raises ManifestError: the manifest. ConfigError: an encoder that is not there, sizes that the
    autoencoder's compression does not divide.
    """
    from stdit.data.extraction import divide
    from stdit.encoders.text_loading import feature_identity
    from stdit.encoders.video import load_video_encoder

    video = load_video_encoder(config.video_encoder)
    for bucket in config.buckets:
        video.check(bucket)
    return divide(config, _decisive(video.identity, config.text_encoder and feature_identity(config.text_encoder)))


def _decisive(video: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
    """What of the encoders decides features: their weights and not where these lie. text: this of the text encoder."""
    from stdit.encoders.source import UNCHECKED

    return {
        "video_encoder": {key: value for key, value in video.items() if key not in UNCHECKED},
        "text_encoder": text,
    }


def expected_facts(config: ExtractConfig) -> FeatureFacts:
    """What `FeatureSet.facts()` will say of the features of `config`, before anything is extracted: from the manifest and the
    encoders' settings. fps is what the manifest states: None where it states no frame rate.

    Raises ManifestError; ConfigError: an encoder that is not there, sizes that its compression does not divide.
    """
    from stdit.data import manifest
    from stdit.data.features import feature_facts
    from stdit.encoders.text_loading import feature_sizes
    from stdit.encoders.video import load_video_encoder

    clips = manifest.read(config.manifest)
    video = load_video_encoder(config.video_encoder).identity
    text = feature_sizes(config.text_encoder) if config.text_encoder else None
    rates = [clip.fps / config.frame_stride for clip in clips if clip.fps and clip.frames != 1]
    return feature_facts(video, text, config.buckets, len(clips.classes), rates)


def extractor(config: ExtractConfig, device: str | None = None) -> Extractor:
    """Loads the encoders, onto a GPU if there is one, for as many parts as there are to come. ConfigError: not there."""
    import torch

    from stdit.data.extractor import Extractor
    from stdit.encoders.text_loading import feature_identity_of, load_text_encoder
    from stdit.encoders.video import load_video_encoder

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    video = load_video_encoder(config.video_encoder, device)
    text = load_text_encoder(config.text_encoder, device) if config.text_encoder else None
    return Extractor(
        config, video, text, _decisive(video.identity, feature_identity_of(text.identity) if text else None)
    )


def extract(config: ExtractConfig, part: Part) -> Path:
    """Extracts one part unless it is up to date; the path of its shard (no file where none of its clips is kept)."""
    from stdit.data.features import shard_path
    from stdit.data.records import stale

    if stale(config.out, part):
        with extractor(config) as ready:
            ready.extract(part)
    return shard_path(config.out, part.number)


def unfinished(plan: Plan) -> tuple[list[Part], str]:
    """The parts still to extract, because they are new or have changed, and a line that says why."""
    from stdit.data import extraction

    return extraction.unfinished(plan)


def begin(config: ExtractConfig, overwrite: bool = False) -> tuple[Plan, list[Part]]:
    """The plan, and the parts that are to be extracted now. Errors as `plan_parts` and `claim`. Prints what there is to do."""
    from stdit.data.extraction import claim

    plan = plan_parts(config)
    claim(plan, overwrite)
    todo, line = unfinished(plan)
    if todo:
        print(f"{config.out}: {line}", file=sys.stderr)
    return plan, todo


def follow(plan: Plan, todo: Sequence[Part], outcomes: Iterable[Outcome]) -> Path:
    """Shows progress while parts come in, and ends the extraction, early if too many clips are bad. Errors as `finish`."""
    from tqdm import tqdm

    from stdit.data.extraction import finish, read_report, report_lines

    bad = 0
    with tqdm(total=sum(len(part.clips) for part in todo), desc="extract", unit="clip", disable=not todo) as bar:
        for outcome in outcomes:
            bad += outcome.bad
            bar.update(outcome.clips)
            if bad:
                bar.set_postfix(bad=bad)
            if bad > plan.bad_allowed:
                break
    out = finish(plan)
    if todo:
        print("\n".join(report_lines(read_report(out))), file=sys.stderr)
    return out


def run(config: ExtractConfig, overwrite: bool = False) -> Path:
    """The whole extraction in this process; the folder of features. A second call does nothing.

    Raises ConfigError, ManifestError, ExtractionError (after report.json is written), OSError.
    """
    plan, todo = begin(config, overwrite)
    if not todo:
        return follow(plan, (), ())
    with extractor(config) as ready:
        return follow(plan, todo, map(ready.extract, todo))


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


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments("python -m stdit.extract").parse_args(argv)
    try:
        out = run(load_config(given.config, ExtractConfig, given.set), given.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
