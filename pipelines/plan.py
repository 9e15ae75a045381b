"""A training plan: data, stages and their order. Reads and resolves YAML; starts nothing.

plan = read("configs/plans/demo.yaml", ["run_dir=/tmp/x", "stages.images.overrides.train.steps=10"])
stages = resolve(plan)    # in training order, each with its complete Config
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from stdit.config import (
    Bucket,
    Config,
    ConfigError,
    CurateConfig,
    EvaluationConfig,
    ExtractConfig,
    Fps,
    Frozen,
    InitConfig,
    LocalPath,
    Location,
    NonNegative,
    Positive,
    SamplerConfig,
    Samples,
    ScoreConfig,
    Seconds,
    Threads,
    Transition,
    Url,
    Workers,
    apply_override,
    default_bucket,
    latent_shape,
    merge,
    read_extended,
    token_grid,
    validate,
)
from stdit.cores import available_cores

# ---------------------------------------------------------------------------------------- schema

# A stage's name is the name of its run directory, and a part of `--set stages.NAME.…`.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

# Names of other folders under run_dir and of other parts in its record.
_RESERVED = ("prepare", "curated", "extraction", "features", "ray", "replaced", "evaluation", "report")


class Prepare(Frozen):
    """A Python module that creates the clips: `python -m MODULE --out RUN_DIR/OUT ARGS…`."""

    module: str
    """Module with a command line."""
    args: tuple[str | int | float, ...] = ()
    """Its arguments, besides --out."""
    out: Name = "data"
    """Folder under run_dir."""
    manifest: str = "manifest.jsonl"
    """File in `out` that it writes when it is done."""


class Curation(CurateConfig):
    """A curation; `footage` defaults to the folder of `prepare`, `out` to RUN_DIR/curated."""

    footage: str | tuple[str, ...] = ""
    """Folder, pattern, list or manifest; default: the folder of `prepare`."""
    out: LocalPath = Path()
    """Folder of the manifest and the report; default: RUN_DIR/curated."""


class Extraction(ExtractConfig):
    """An extraction; `out` defaults to RUN_DIR/features, `manifest` to that of `curation`, else of `prepare`."""

    manifest: Location = Path()
    """Manifest of the clips; default: that of `curation`, else of `prepare`."""
    out: Location = Path()
    """Folder or URL of the features; default: RUN_DIR/features."""
    workers: Workers | Literal["auto"] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    """Actors that extract, each with the encoders; `auto`: one for each of this machine's CPUs."""


class Stage(Frozen):
    """One training run: the file `config` with the plan's and the stage's `overrides`. The plan sets run_dir, name,
    seed, data.features and, with `after`, init."""

    config: Path | None = None
    """Config file of the stage (docs/config.md: train). null: `overrides` is the whole config."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace those of `config`."""
    after: str | None = None
    """Stage whose weights initialise this one. null: `init` of its own config, or random initialisation."""
    weights: Literal["ema", "model"] = "ema"
    """Weights taken from `after`."""
    allow: tuple[Transition, ...] = ()
    """Permitted differences of architecture to `after`; any other is an error."""

    @model_validator(mode="after")
    def _check_allow(self) -> Stage:
        if self.allow and self.after is None:
            raise ValueError(f"allow: {', '.join(self.allow)} needs after: the stage to come from")
        return self


class Evaluation(Frozen):
    """Generation and metrics after each stage, for captions of the held-out split (`metrics.validation_split`)."""

    prompts: Samples = 100
    """Number of captions."""
    seed: NonNegative = 0
    """Selects the captions; seed of the first video."""
    sampler: SamplerConfig = SamplerConfig()
    """Scheduler, steps and guidance."""
    weights: Literal["ema", "model"] = "ema"
    """Weights to generate with."""
    batch_size: Samples = 25
    """Videos per batch."""
    fps: Fps | None = None
    """Frames per second of the files. null: of most videos that the stage was trained on."""
    workers: Workers = 1
    """Ray actors that generate, each with one pipeline; 1: in the driver."""
    threads: Threads | Literal["auto"] = 1
    """CPU threads of each pipeline; `auto`: this machine's CPUs over `workers`."""
    compare_with_previous: bool = False
    """Also evaluates the stage before at this stage's shape, where it differs: what the stage has added."""
    metrics: EvaluationConfig = EvaluationConfig()
    """How clips are measured."""
    scores: ScoreConfig | None = None
    """Published scores of the same clips against the held-out split, into evaluation/STAGE/scores; null: none."""

    @property
    def threads_each(self) -> int:
        """CPU threads of each pipeline."""
        return cpus_each(self.workers) if self.threads == "auto" else self.threads


class ElasticWorkers(Frozen):
    """A number of ranks that follows the cluster. Every bucket of every stage then states its global_batch."""

    min: Workers
    """With fewer, training waits."""
    max: Workers
    """More are not taken."""
    check_every_s: Seconds = 300
    """Seconds between looks for nodes that have come, or come back; taking them restarts the stage from its newest checkpoint."""

    @model_validator(mode="after")
    def _check_order(self) -> ElasticWorkers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _kind_of_workers(found: Any) -> str:
    return "elastic" if isinstance(found, dict | ElasticWorkers) else "fixed"


class Resources(Frozen):
    """Processes of training. Not part of a stage's identity, except for samples per step, which are a bucket's global_batch, or
    workers * batch_size * gradient_accumulation."""

    workers: Annotated[
        Annotated[Workers, Tag("fixed")] | Annotated[ElasticWorkers, Tag("elastic")], Discriminator(_kind_of_workers)
    ] = 1
    """Ranks, one process each; or {min: 2, max: 8}: as many as the cluster has."""
    cpus_per_worker: Threads | Literal["auto"] = 1
    """CPUs and threads of each worker; `auto`: this machine's CPUs over `workers`, at least 1."""
    use_gpu: bool = False
    """One GPU per worker and NCCL; false: CPU and gloo."""
    max_failures: NonNegative = 2
    """Restarts of a stage, each from its newest checkpoint, after a worker has died."""
    deadline_s: Positive | None = None
    """Seconds after which an unfinished stage stops the plan; null: never (a lost node would be waited for)."""

    @property
    def ranks(self) -> range:
        """The numbers of workers that there may be."""
        workers = self.workers
        return range(workers, workers + 1) if isinstance(workers, int) else range(workers.min, workers.max + 1)

    @property
    def threads(self) -> int:
        """CPUs and threads of each worker."""
        return cpus_each(self.ranks[-1]) if self.cpus_per_worker == "auto" else self.cpus_per_worker

    @property
    def cpus(self) -> int:
        """Logical CPUs of all workers, of the most that there may be."""
        return self.ranks[-1] * self.threads


def available_cpus() -> int:
    """CPUs that this process may use."""
    return available_cores()


def cpus_each(workers: int) -> int:
    """This machine's CPUs over `workers`, at least 1."""
    return max(1, available_cpus() // workers)


class Plan(Frozen):
    """A complete training, from clips to report (`python -m pipelines.train_stages --plan …`)."""

    name: str
    """Title of the report."""
    run_dir: LocalPath
    """Folder of all results."""
    seed: NonNegative = 0
    """Seed of every stage."""
    prepare: Prepare | None = None
    """Creates the clips; null: `extraction.manifest` exists."""
    curation: Curation | None = None
    """Raw footage to a manifest of clips; null: the clips are there."""
    extraction: Extraction
    """Clips and captions to features."""
    resources: Resources = Resources()
    """Processes of training."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace those of every stage's config."""
    stages: dict[Name, Stage] = Field(min_length=1)
    """Training runs by name."""
    evaluation: Evaluation | None = None
    """Generation and metrics after each stage; null: none."""

    @model_validator(mode="after")
    def _folders(self) -> Plan:
        taken = [*_RESERVED, *([self.prepare.out] if self.prepare else [])]
        for name in self.stages:
            if name in taken:
                raise ValueError(f"a stage can't be called {name!r}: RUN_DIR/{name} holds something else")
        if self.prepare is None and self.curation is None and self.extraction.manifest == Path():
            raise ValueError("extraction.manifest is needed without `prepare` and `curation`")
        if self.evaluation is not None and isinstance(self.extraction.manifest, Url):
            raise ValueError(
                f"evaluation: compares with the clips of extraction.manifest, which are read from this machine; found "
                f"{self.extraction.manifest}"
            )
        if self.curation is not None and self.prepare is None and not self.curation.footage:
            raise ValueError("curation.footage is needed without `prepare`")
        if self.curation is not None and self.extraction.manifest != Path():
            raise ValueError(
                f"extraction.manifest {self.extraction.manifest}: with `curation` it is the one that is curated"
            )
        return self

    @property
    def prepared(self) -> Path | None:
        """The manifest that `prepare` writes."""
        return None if self.prepare is None else self.run_dir / self.prepare.out / self.prepare.manifest

    @property
    def curate(self) -> CurateConfig | None:
        """The curation with its default paths."""
        if self.curation is None:
            return None
        out = self.run_dir / "curated" if self.curation.out == Path() else self.curation.out
        footage = self.curation.footage or str(self.run_dir / self.prepare.out if self.prepare else "")
        return self.curation.model_copy(update={"out": out, "footage": footage})

    @property
    def extract(self) -> ExtractConfig:
        """The extraction with its default paths."""
        config = self.extraction
        written = self.curate.out / "manifest.jsonl" if self.curate else self.prepared
        manifest = written if written and config.manifest == Path() else config.manifest
        out = self.run_dir / "features" if config.out == Path() else config.out
        workers = available_cpus() if config.workers == "auto" else config.workers
        return config.model_copy(update={"manifest": manifest, "out": out, "workers": workers})


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its complete Config. `source`: file and key, for error messages."""

    name: str
    config: Config
    after: str | None
    source: str

    @property
    def largest(self) -> Bucket:
        """The shape of its evaluation, as of generation: the largest video bucket."""
        return default_bucket(self.config.data.buckets)


def read(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """The plan in `path` after `--set` overrides. ConfigError names file, key and value."""
    data = read_extended(path)
    for text in overrides:
        data = apply_override(data, text)
    return validate(data, Plan, str(path))


# --------------------------------------------------------------------------------------- resolving


def order(plan: Plan) -> list[str]:
    """Stage names in training order: each after its `after`, else as in the file. ConfigError: unknown stage, cycle."""
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
    """Every stage with its complete Config, in training order. `path`: the plan's file, for error messages.

    ConfigError: a missing or invalid config file, a cycle, a bucket that is not extracted.
    """
    return [_resolve_one(plan, name, path) for name in order(plan)]


def _resolve_one(plan: Plan, name: str, path: str) -> ResolvedStage:
    stage = plan.stages[name]
    source = f"{path}: stages.{name}" + (f" ({stage.config})" if stage.config else "")
    try:
        data = read_extended(stage.config) if stage.config else {}
    except ConfigError as error:
        raise ConfigError(f"{path}: stages.{name}.config: {error}") from error
    data = merge(merge(data, plan.overrides), stage.overrides)
    mirror = (plan.overrides.get("train") or {}).get("upload_to")
    if mirror and data["train"]["upload_to"] == mirror:  # of the whole plan
        data = merge(data, {"train": {"upload_to": f"{mirror}/{name}"}})
    data = merge(data, {"name": name, "run_dir": str(plan.run_dir / name), "seed": plan.seed})
    if isinstance((data.get("data") or {}).get("features"), list):
        raise ConfigError(
            f"{source}: data.features lists several sets, but a plan's stages train on its own features, {plan.extract.out}; train on "
            "several with `stdit train`"
        )
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
    """ConfigError with both numbers if a bucket is not divisible into latents and patches, or channels differ.

    `compression`: pixels per latent (t, h, w) of the autoencoder; `channels`: its latents' channels.
    """
    try:
        for bucket in stage.config.data.buckets:
            latent = latent_shape(bucket, compression)
            model = stage.config.model
            token_grid(latent, model.patch_size, f"data.buckets {bucket.key}", model.pad_latents)
    except ConfigError as error:
        raise ConfigError(f"{stage.source}: {error}") from error
    if stage.config.model.in_channels != channels:
        raise ConfigError(
            f"{stage.source}: model.in_channels {stage.config.model.in_channels}, but the autoencoder's latents have "
            f"{channels} channels"
        )
