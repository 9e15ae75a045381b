"""A plan: stages, their order, what crosses between them. Pure: reads YAML, decides, starts nothing.

plan = read("configs/plans/demo.yaml", ["run_dir=/tmp/x", "stages.images.overrides.train.steps=10"])
stages = resolve(plan)    # in the order to train, each with its whole Config
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from stdit.config import (
    Bucket,
    Config,
    ConfigError,
    EvaluationConfig,
    ExtractConfig,
    Frozen,
    InitConfig,
    NonNegative,
    Positive,
    SamplerConfig,
    Transition,
    apply_override,
    latent_shape,
    merge,
    read_extended,
    token_grid,
    validate,
)

# ---------------------------------------------------------------------------------------- schema

# A stage's name is its folder's, and a part of `--set stages.NAME.…`.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

# What stages may not be called: other folders under run_dir, other parts in its record.
_RESERVED = ("prepare", "extraction", "features", "ray", "replaced", "evaluation", "report")


class Prepare(Frozen):
    """A Python module that makes the clips: `python -m MODULE --out RUN_DIR/OUT ARGS…`."""

    module: str
    args: tuple[str | int | float, ...] = ()
    out: Name = "data"
    # What it leaves in `out` when it is done.
    manifest: str = "manifest.jsonl"


class Extraction(ExtractConfig):
    """An extraction whose paths may follow from the plan: `out` is RUN_DIR/features, `manifest` what `prepare` makes."""

    manifest: Path = Path()
    out: Path = Path()


class Stage(Frozen):
    """One training run. Its Config is the file `config` with the plan's and the stage's own `overrides` laid over it;
    the plan sets run_dir, name, seed, data.features and, with `after`, init."""

    config: Path
    overrides: dict[str, Any] = Field(default_factory=dict)
    # The stage whose weights this one starts from; None: from `init` in its own config, or from nothing.
    after: str | None = None
    weights: Literal["ema", "model"] = "ema"
    # Differences of architecture that may be crossed; any other is an error.
    allow: tuple[Transition, ...] = ()

    @model_validator(mode="after")
    def _crossing(self) -> Stage:
        if self.allow and self.after is None:
            raise ValueError(f"allow: {', '.join(self.allow)} needs after: the stage to come from")
        return self


class Evaluation(Frozen):
    """What is made and measured after each stage, from captions of the held-out split (`scores.validation_split`)."""

    prompts: Positive = 100
    seed: NonNegative = 0
    sampler: SamplerConfig = SamplerConfig()
    weights: Literal["ema", "model"] = "ema"
    batch_size: Positive = 25
    # Frames per second of the files written.
    fps: Positive = 8
    # Actors that generate, each holding one pipeline, and their CPU threads.
    workers: Positive = 1
    threads: Positive = 1
    scores: EvaluationConfig = EvaluationConfig()


class Resources(Frozen):
    """Who trains: `workers` processes, one rank each. Not part of what a stage is: a finished stage stays finished
    when these change; but the samples per step are workers * batch_size * gradient_accumulation."""

    workers: Positive = 1
    cpus_per_worker: Positive = 1
    # One GPU per worker and NCCL; False: CPU and gloo.
    use_gpu: bool = False
    # How often a stage is started again, from its newest checkpoint, after a worker has died.
    max_failures: NonNegative = 2
    # A stage that has not ended after this long stops the plan (a lost node without replacement would wait for ever).
    deadline_s: Positive | None = None

    @property
    def cpus(self) -> int:
        """Logical CPUs that training holds."""
        return self.workers * self.cpus_per_worker


class Plan(Frozen):
    """A whole training, from clips to report (`python -m pipelines.train_stages --plan …`)."""

    name: str
    run_dir: Path
    seed: NonNegative = 0
    prepare: Prepare | None = None
    extraction: Extraction
    resources: Resources = Resources()
    # Laid over every stage's config.
    overrides: dict[str, Any] = Field(default_factory=dict)
    stages: dict[Name, Stage] = Field(min_length=1)
    # None: stages are trained and not measured.
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _folders(self) -> Plan:
        taken = [*_RESERVED, *([self.prepare.out] if self.prepare else [])]
        for name in self.stages:
            if name in taken:
                raise ValueError(f"a stage can't be called {name!r}: RUN_DIR/{name} holds something else")
        if self.prepare is None and self.extraction.manifest == Path():
            raise ValueError("extraction.manifest is needed where no `prepare` makes one")
        return self

    @property
    def prepared(self) -> Path | None:
        """The manifest that `prepare` makes."""
        return None if self.prepare is None else self.run_dir / self.prepare.out / self.prepare.manifest

    @property
    def extract(self) -> ExtractConfig:
        """The extraction with its paths filled in."""
        given = self.extraction
        manifest = self.prepared if self.prepared and given.manifest == Path() else given.manifest
        out = self.run_dir / "features" if given.out == Path() else given.out
        return given.model_copy(update={"manifest": manifest, "out": out})


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its whole Config. `source`: the file and key it came from, for messages."""

    name: str
    config: Config
    after: str | None
    source: str

    @property
    def largest(self) -> Bucket:
        """The shape at which the stage is measured: most pixels, then most frames."""
        b = max(self.config.data.buckets, key=lambda b: (b.height * b.width, b.frames))
        return Bucket(frames=b.frames, height=b.height, width=b.width)


def read(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """The plan in `path` after `--set` overrides. ConfigError names file, key and value."""
    data = read_extended(path)
    for text in overrides:
        data = apply_override(data, text)
    return validate(data, Plan, str(path))


# --------------------------------------------------------------------------------------- the walk


def order(plan: Plan) -> list[str]:
    """Stage names, each after the one it comes from, otherwise as in the file. ConfigError: unknown stage, cycle."""
    for name, stage in plan.stages.items():
        if stage.after is not None and stage.after not in plan.stages:
            raise ConfigError(
                f"stages.{name}.after: no stage is called {stage.after!r}; there are: {', '.join(plan.stages)}"
            )
    done: list[str] = []
    for name in plan.stages:
        chain = [name]
        while (after := plan.stages[chain[-1]].after) is not None and after not in done:
            if after in chain:
                raise ConfigError(f"stages form a cycle: {' comes after '.join([*chain[chain.index(after) :], after])}")
            chain.append(after)
        done += [n for n in reversed(chain) if n not in done]
    return done


def resolve(plan: Plan, path: str = "plan") -> list[ResolvedStage]:
    """Every stage with its whole Config, in the order to train. `path`: the plan's file, for messages.

    ConfigError: a config file that is missing or wrong, a cycle, a bucket that is not extracted.
    """
    return [_resolve_one(plan, name, path) for name in order(plan)]


def _resolve_one(plan: Plan, name: str, path: str) -> ResolvedStage:
    stage = plan.stages[name]
    source = f"{path}: stages.{name} ({stage.config})"
    try:
        data = read_extended(stage.config)
    except ConfigError as error:
        raise ConfigError(f"{path}: stages.{name}.config: {error}") from error
    data = merge(merge(data, plan.overrides), stage.overrides)
    data = merge(data, {"name": name, "run_dir": str(plan.run_dir / name), "seed": plan.seed})
    data = merge(data, {"data": {"features": str(plan.extract.out)}})
    if stage.after is not None:
        if data.get("init") is not None:
            raise ConfigError(f"{source}: init is set in the config, and after: {stage.after} in the plan; keep one")
        init = InitConfig(source=plan.run_dir / stage.after, weights=stage.weights, allow=stage.allow)
        data["init"] = init.model_dump(mode="json")
    config = validate(data, Config, source)
    extracted = {bucket.key for bucket in plan.extraction.buckets}
    absent = [bucket.key for bucket in config.data.buckets if bucket.key not in extracted]
    if absent:
        raise ConfigError(
            f"{source}: data.buckets {', '.join(absent)} not in {path}: extraction.buckets {', '.join(sorted(extracted))}"
        )
    return ResolvedStage(name, config, stage.after, source)


def check_shapes(stage: ResolvedStage, compression: tuple[int, int, int], channels: int) -> None:
    """ConfigError with both numbers where a bucket can't be cut into latents and patches, or channels differ.

    `compression`: pixels per latent (t, h, w) of the autoencoder; `channels`: its latents' channels.
    """
    try:
        for bucket in stage.config.data.buckets:
            latent = latent_shape(bucket, compression)
            token_grid(latent, stage.config.model.patch_size, f"data.buckets {bucket.key}")
    except ConfigError as error:
        raise ConfigError(f"{stage.source}: {error}") from error
    if stage.config.model.in_channels != channels:
        raise ConfigError(
            f"{stage.source}: model.in_channels {stage.config.model.in_channels}, but the autoencoder's latents have "
            f"{channels} channels"
        )
