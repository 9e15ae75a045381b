"""Checks of a plan before its long work: shapes, text, transitions between stages, evaluation; and its forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipelines import plan as plans
from pipelines.plan import FeatureSource, Plan, ResolvedStage, Resources
from pipelines.sources import Sources, check_encoders, extracted_features
from stdit.config import Config, ConfigError, TextEncoderConfig, Url
from stdit.config.identity import FrameSampling
from stdit.config.model import class_conditioning


def check_early(plan: Plan, stages: Sequence[ResolvedStage]) -> None:
    """ConfigError for everything that is known to fail before clips are created or read."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        check_encoders(plan, stage)
        extract = plan.sets_of(stage.name)[0].extract  # the others have the same encoders
        # The compression of an autoencoder is known once it is loaded, at extraction.
        if extract.video_encoder.kind == "pixels":
            plans.check_shapes(stage, (1, 1, 1), extract.video_encoder.channels)
        _check_text(stage, extract.text_encoder)
        check_workers(plan.resources, stage.config, stage.source)
        if stage.after is not None:
            check_transition(by_name[stage.after], stage)
        check_evaluation(plan, stage)
    for one in plan.feature_sets.values():
        _check_byte_t5(one)
    check_scores(plan)


def check_workers(resources: Resources, config: Config, source: str) -> None:
    """ConfigError where a number of workers that there may be cannot train a stage, or would change its steps."""
    ranks = resources.ranks
    try:
        for count in ranks:
            config.micro_batches(count)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error} (resources.workers)") from error
    alone = [bucket.key for bucket in config.data.buckets if bucket.global_batch is None and bucket.is_sized]
    if len(ranks) > 1 and alone:
        raise ConfigError(
            f"{source}: resources.workers may be {ranks[0]} to {ranks[-1]}, but bucket {alone[0]} states batch_size alone, so that a "
            "step would change with them; give it a global_batch"
        )


def _check_text(stage: ResolvedStage, encoder: TextEncoderConfig | None) -> None:
    """ConfigError where a stage's model and the extraction's text encoder do not match, as far as the configs tell."""
    model = stage.config.model
    for key, value in (("text_dim", model.text_dim), ("pooled_dim", model.pooled_dim)):
        if value is not None and encoder is None:
            raise ConfigError(f"{stage.source}: model.{key} {value}, but the plan's extraction has no text_encoder")
    if encoder is None:
        return
    if model.pooled_dim is not None and not any(one.pooled for one in encoder.encoders):
        raise ConfigError(
            f"{stage.source}: model.pooled_dim {model.pooled_dim}, but no text_encoder of the plan's extraction has pooled: true"
        )
    if model.text_dim is not None and encoder.feature_tokens > model.max_text_tokens:
        raise ConfigError(
            f"{stage.source}: model.max_text_tokens {model.max_text_tokens}, but the plan's extraction gives up to {encoder.feature_tokens} "
            "tokens per caption (text_encoder.max_text_tokens)"
        )


def _check_byte_t5(source: FeatureSource) -> None:
    """ConfigError: a byte_t5 whose sizes do not go together, or that memory does not hold."""
    from stdit.encoders.byte_t5 import check_byte_t5

    encoder = source.extract.text_encoder
    for one in () if encoder is None else encoder.encoders:
        if one.byte_t5 is not None:
            try:
                check_byte_t5(one.byte_t5)
            except ConfigError as error:
                raise ConfigError(f"{source.key('extraction')}.{error}") from error


def check_evaluation(plan: Plan, stage: ResolvedStage) -> None:
    """ConfigError where the plan's evaluation cannot work for a stage, whatever the clips are: its sampler."""
    evaluation = plan.evaluation
    if evaluation is None:
        return
    from stdit.diffusion.guidance import check_channels, check_path_drop
    from stdit.diffusion.schedulers import check_sampler

    try:
        check_sampler(evaluation.sampler, stage.config.diffusion)
        check_channels(evaluation.sampler.guidance_channels, stage.config.model.in_channels)
        check_path_drop(evaluation.sampler.path_drop, stage.config.model.sparse_dense)
    except ValueError as error:
        raise ConfigError(f"{stage.source}: evaluation.sampler: {error}") from error


def check_scores(plan: Plan) -> None:
    """ConfigError where a score that the plan names has other weights than those that define it, or one that will be
    computed needs more clips than are generated."""
    if plan.evaluation is None or plan.evaluation.scores is None:
        return
    from stdit.evaluation.networks import MissingWeights, NetworkError, find_network
    from stdit.evaluation.scores import SPECS

    scores, prompts = plan.evaluation.scores, plan.evaluation.prompts
    least = {"inception_score": ("splits", scores.splits)}
    least |= dict.fromkeys(("precision", "recall"), ("neighbors", scores.neighbors + 1))
    for name in scores.scores or tuple(SPECS):
        if name not in SPECS or SPECS[name].kind == "accuracy":
            continue
        try:
            find_network(SPECS[name].network, scores.networks)
        except MissingWeights:
            continue  # the score is skipped, with the reason
        except NetworkError as error:
            if scores.scores is None:
                continue  # likewise
            raise ConfigError(f"evaluation.scores: {name}: {error}") from error
        key, needed = least.get(SPECS[name].kind, ("two samples", 2 if SPECS[name].needs_reference else 1))
        if prompts < needed:
            raise ConfigError(
                f"evaluation.scores: {name} ({key}) needs {needed} clips or more, but evaluation.prompts is {prompts}"
            )


def check_validation_split(plan: Plan, stages: Sequence[ResolvedStage]) -> None:
    """ConfigError where the manifest lacks the validation split, a column, or clips of a stage's shape (with a class,
    if the stage is class-conditional) for the plan's evaluation, has clips by URL, which evaluation does not read, or
    more than memory holds."""
    if plan.evaluation is None:
        return
    from stdit.data import manifest
    from stdit.evaluation.evaluator import check_memory
    from stdit.evaluation.validation_clips import check_clips, check_columns

    extract = plan.reference.extract
    config, source = plan.evaluation.metrics, manifest.read(extract.manifest)
    check_columns(source, config)
    if remote := next((clip for clip in source if isinstance(clip.location, Url)), None):
        raise ConfigError(
            f"evaluation: compares with the clips of {extract.manifest}, which are read from this machine; row {remote.row} is "
            f"{remote.location}: fetch the clips, or leave evaluation out"
        )
    if not any(clip.split == config.validation_split for clip in source):
        raise ConfigError(
            f"evaluation.metrics.validation_split {config.validation_split!r}: no clip of {extract.manifest} is in "
            f"it; splits: {', '.join(map(str, source.splits))}"
        )
    sampling = FrameSampling(**extract.model_dump(include=set(FrameSampling.model_fields)))
    for stage in stages:
        classes = class_conditioning(stage.config.model.num_classes, stage.config.model.text_dim)
        try:
            check_clips(source, config.validation_split, stage.largest, classes, sampling)
            check_memory(config, source, stage.largest, plan.evaluation.prompts, sampling)
        except ValueError as error:
            raise ConfigError(f"{stage.source}: evaluation.metrics: {error}") from error


def complete(plan: Plan, stages: Sequence[ResolvedStage]) -> list[ResolvedStage]:
    """Stages with what their configs leave out (stdit.training.derive): from the features if they are extracted, else
    from the manifest and the encoders' configs.

    ConfigError, ManifestError: there is no manifest or encoder; a stage has no bucket to train on.
    """
    from stdit.training.derive import derive, is_complete, with_precision

    # Whoever reads the plan may have no GPU.
    gpus = plan.resources.use_gpu
    stages = [replace(stage, config=with_precision(stage.config, gpus)) for stage in stages]
    if all(is_complete(stage.config) for stage in stages):
        return list(stages)

    check_manifests(plan)
    sources = Sources(plan)
    completed: list[ResolvedStage] = []
    for stage in stages:
        data = stage.config.data
        buckets = {b.key: b for one in plan.sets_of(stage.name) for b in one.extract.buckets}
        check_encoders(plan, stage)
        facts = sources.facts(stage)
        try:
            clips = sources.of_stage(stage).select(data.train_split, list(buckets.values()), data.where)
            config = derive(stage.config, facts, {key: len(ids) for key, ids in clips.items()})
        except ConfigError as error:
            raise ConfigError(f"{stage.source}: {error}") from error
        check_workers(plan.resources, config, stage.source)
        completed.append(replace(stage, config=config))
    return completed


def check_manifests(plan: Plan) -> None:
    """ConfigError without a manifest and without `prepare` and `curation`, which write one."""
    for one in plan.feature_sets.values():
        if one.prepare is None and one.curate is None and not one.extract.has_manifest:
            raise ConfigError(f"{one.key('extraction.manifest')}: {one.extract.manifest} does not exist")


def check_transition(before: ResolvedStage, stage: ResolvedStage) -> str:
    """Report of the weight transfer between two stages, tried on the meta device (no weights, no memory).

    ConfigError: the architectures differ in something that `allow` does not permit.
    """
    import torch

    from stdit.models.stdit import STDiT
    from stdit.weights.transfer import transfer_weights

    allow = stage.config.init.allow if stage.config.init else ()
    try:
        with torch.device("meta"):
            _, report = transfer_weights(STDiT.from_settings(before.config.model), stage.config.model, allow)
    except ValueError as error:
        raise ConfigError(f"{stage.source}: after {before.name}: {error}") from error
    return "\n".join([str(report), *positions(before, stage)])


def positions(before: ResolvedStage, stage: ResolvedStage) -> list[str]:
    """Effect of a change of resolution on position coordinates; empty if the size stays."""
    old, new, model = before.largest, stage.largest, stage.config.model
    if (old.height, old.width) == (new.height, new.width) or model.positions == "none":
        return []
    if model.position_grid is not None:
        spans = f"every grid uses the centre of a table, model.position_grid {list(model.position_grid)}"
    elif model.position_reference is not None:
        spans = f"rescaled by each clip's size, against model.position_reference {model.position_reference}"
    elif model.position_base is None:
        spans = "coordinates exceed those of training, because model.position_base is not set"
    else:
        spans = f"rescaled, every grid spans the same 0 to {model.position_base / model.position_interpolation:g}"
    return [f"positions: {old.height}x{old.width} to {new.height}x{new.width} px; {spans}"]


def stage_lines(plan: Plan, stages: Sequence[ResolvedStage]) -> list[str]:
    """Forecast of every stage from the extracted features. ConfigError: a stage that does not match them."""
    from pipelines.forecast import forecast
    from stdit.data.extraction import read_report, report_lines
    from stdit.training.data import open_data

    lines = set_lines(plan, lambda one: report_lines(read_report(one.extract.out)))
    for stage in stages:
        try:
            # Without `init`: the previous stage may not be trained yet; `check_transition` compares architectures.
            config = stage.config if stage.after is None else stage.config.model_copy(update={"init": None})
            data = open_data(config, plan.resources.ranks[0])
        except ConfigError as error:
            raise ConfigError(f"{stage.source}: {error}") from error
        t, h, w = data.video_encoder["compression"]
        lines += str(forecast(stage, plan.resources, data.source, (t, h, w), data.text_tokens)).splitlines()
    return lines


def set_lines(plan: Plan, of: Callable[[FeatureSource], list[str]]) -> list[str]:
    """Lines on each set, below its name where there are several."""
    found: list[str] = []
    for name, one in plan.feature_sets.items():
        found += [f"set {name}:", *(f"  {line}" for line in of(one))] if name else of(one)
    return found


def forecast_lines(plan: Plan, stages: Sequence[ResolvedStage]) -> list[str]:
    """Cost of a plan and the transfers between its stages: from the features if they exist, else from the manifest,
    else from the plan alone. ConfigError: a missing autoencoder."""
    from pipelines.forecast import forecast

    if all(extracted_features(one) is not None for one in plan.feature_sets.values()):
        lines = stage_lines(plan, stages)
    else:
        sources = Sources(plan)
        lines = set_lines(plan, sources.lines)
        for stage in stages:
            # No caption has been tokenized yet: count the maximum length.
            text = stage.config.model.max_text_tokens
            of = sources.of_stage(stage)
            lines += str(forecast(stage, plan.resources, of, compression(plan, stage), text)).splitlines()
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.after is not None:
            lines += [f"stage {stage.name} from {stage.after}:"]
            lines += [f"  {line}" for line in check_transition(by_name[stage.after], stage).splitlines()]
    return lines


def compression(plan: Plan, stage: ResolvedStage) -> tuple[int, int, int]:
    """Pixels per latent (t, h, w) of a stage's autoencoder, which is loaded unless it is `pixels`."""
    encoder = plan.sets_of(stage.name)[0].extract.video_encoder
    if encoder.kind == "pixels":
        return (1, 1, 1)
    from stdit.encoders.video import load_video_encoder

    t, h, w = load_video_encoder(encoder).identity["compression"]
    return (t, h, w)
