"""A training plan: feature sets, stages and their order. Reads and resolves YAML; starts nothing.

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
    Precision,
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
_RESERVED = ("prepare", "curated", "extraction", "features", "sets", "ray", "replaced", "evaluation", "report")


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


class SetConfig(Frozen):
    """One of several feature sets of a plan: its clips and their features, below RUN_DIR/sets/NAME as those of a plan's
    only set are below RUN_DIR."""

    prepare: Prepare | None = None
    """Creates the clips; null: they are there."""
    curation: Curation | None = None
    """Raw footage to a manifest of clips; null: the clips are there."""
    extraction: Extraction
    """Clips and captions to features; what it leaves out is as in the plan's `extraction`."""


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
    sets: dict[str, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Of the plan's `sets` those that the stage trains on, with their share of the samples: {films: 0.7, stills: 0.3}.
    null: all, each as many samples as it has clips."""

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
    precision: Precision = "auto"
    """Of the transformer; `auto`: as the stage was trained, where bfloat16 is native."""
    compare_with_previous: bool = False
    """Also evaluates the stage before at this stage's shape, where it differs: what the stage has added."""
    metrics: EvaluationConfig = EvaluationConfig()
    """How clips are measured."""
    scores: ScoreConfig | None = None
    """Published scores of the same clips against the held-out split, into evaluation/STAGE/scores; null: none."""
    reference: str | None = None
    """Of a plan's `sets` the one whose captions are generated, and whose held-out clips are compared with; null: the
    first."""

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
    """Seconds between looks for nodes that have come, or come back; taking them restarts the stage from its newest
    checkpoint."""

    @model_validator(mode="after")
    def _check_order(self) -> ElasticWorkers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _kind_of_workers(found: Any) -> str:
    return "elastic" if isinstance(found, dict | ElasticWorkers) else "fixed"


class Resources(Frozen):
    """Processes of training. Not part of a stage's identity, except for samples per step, which are a bucket's
    global_batch, or workers * batch_size * gradient_accumulation."""

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


def cpus_each(workers: int) -> int:
    """This machine's CPUs over `workers`, at least 1."""
    return max(1, available_cores() // workers)


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
    extraction: Extraction | None = None
    """Clips and captions to features. With `sets`: what their extractions have in common."""
    sets: dict[Name, SetConfig] = Field(default_factory=dict)
    """Several feature sets by name, in place of one: each with its own prepare, curation and extraction."""
    resources: Resources = Resources()
    """Processes of training."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings that replace those of every stage's config."""
    stages: dict[Name, Stage] = Field(min_length=1)
    """Training runs by name."""
    evaluation: Evaluation | None = None
    """Generation and metrics after each stage; null: none."""

    @model_validator(mode="after")
    def _check_sets(self) -> Plan:
        if self.extraction is None and not self.sets:
            raise ValueError("extraction is needed, or `sets` of which each has one")
        if own := [
            key for key in ("prepare", "curation", "extraction") if self.sets and getattr(self, key) is not None
        ]:
            raise ValueError(f"{own[0]} belongs to one of the sets, sets.NAME.{own[0]}: {', '.join(self.sets)}")
        if self.evaluation is not None and self.evaluation.reference is not None:
            self._check_name("evaluation.reference", self.evaluation.reference)
        for name, stage in self.stages.items():
            for one in stage.sets or ():
                self._check_name(f"stages.{name}.sets", one)
        return self

    def _check_name(self, key: str, name: str) -> None:
        if name not in self.sets:
            there = f"there are: {', '.join(self.sets)}" if self.sets else "the plan names no `sets`"
            raise ValueError(f"{key}: no set is called {name!r}; {there}")

    @model_validator(mode="after")
    def _check_folders(self) -> Plan:
        taken = [*_RESERVED, *([self.prepare.out] if self.prepare else [])]
        for name in self.stages:
            if name in taken:
                raise ValueError(f"a stage can't be called {name!r}: RUN_DIR/{name} holds something else")
        outs: dict[Path | Url, FeatureSource] = {}
        for one in self.feature_sets.values():
            one.check()
            if (other := outs.setdefault(one.extract.out, one)) is not one:
                raise ValueError(
                    f"{other.key('extraction.out')} and {one.key('extraction.out')} are both {one.extract.out}; each set has its own"
                )
        if self.evaluation is not None and isinstance(self.reference.extract.manifest, Url):
            raise ValueError(
                f"evaluation: compares with the clips of {self.reference.key('extraction.manifest')}, which are read from this machine; "
                f"found {self.reference.extract.manifest}"
            )
        return self

    @property
    def feature_sets(self) -> dict[str, FeatureSource]:
        """Each set with its default paths, by name; a plan's only set is called ""."""
        if self.extraction is not None:
            only = SetConfig(prepare=self.prepare, curation=self.curation, extraction=self.extraction)
            return {"": FeatureSource("", self.run_dir, only)}
        return {name: FeatureSource(name, self.run_dir / "sets" / name, own) for name, own in self.sets.items()}

    @property
    def reference(self) -> FeatureSource:
        """The set that evaluation compares with."""
        sets = self.feature_sets
        return sets[(self.evaluation and self.evaluation.reference) or next(iter(sets))]

    def sets_of(self, stage: str) -> list[FeatureSource]:
        """The sets that a stage trains on."""
        sets = self.feature_sets
        return [sets[name] for name in self.stages[stage].sets or sets]


@dataclass(frozen=True)
class FeatureSource:
    """A feature set of a plan, in `folder`: where its clips come from, and the settings of its parts with their default
    paths."""

    name: str
    folder: Path
    config: SetConfig

    def key(self, name: str) -> str:
        """A key of the plan, or a part of it, that is of this set: sets.films.extraction."""
        return f"sets.{self.name}.{name}" if self.name else name

    @property
    def prepare(self) -> Prepare | None:
        return self.config.prepare

    @property
    def prepare_out(self) -> Path | None:
        """The folder that `prepare` writes."""
        return None if self.prepare is None else self.folder / self.prepare.out

    @property
    def prepared(self) -> Path | None:
        """The manifest that `prepare` writes."""
        return None if self.prepare is None else self.folder / self.prepare.out / self.prepare.manifest

    @property
    def curate(self) -> CurateConfig | None:
        """The curation."""
        curation = self.config.curation
        if curation is None:
            return None
        out = self.folder / "curated" if curation.out == Path() else curation.out
        return curation.model_copy(update={"out": out, "footage": curation.footage or str(self.prepare_out or "")})

    @property
    def extract(self) -> ExtractConfig:
        """The extraction."""
        config = self.config.extraction
        written = self.curate.out / "manifest.jsonl" if self.curate else self.prepared
        manifest = written if written and config.manifest == Path() else config.manifest
        out = self.folder / "features" if config.out == Path() else config.out
        workers = available_cores() if config.workers == "auto" else config.workers
        return config.model_copy(update={"manifest": manifest, "out": out, "workers": workers})

    def check(self) -> None:
        """ValueError: nothing says where the clips come from, or two things do."""
        manifest = self.config.extraction.manifest
        if self.prepare is None and self.config.curation is None and manifest == Path():
            raise ValueError(f"{self.key('extraction.manifest')} is needed without `prepare` and `curation`")
        if self.config.curation is not None and self.prepare is None and not self.config.curation.footage:
            raise ValueError(f"{self.key('curation.footage')} is needed without `prepare`")
        if self.config.curation is not None and manifest != Path():
            raise ValueError(
                f"{self.key('extraction.manifest')} {manifest}: with `curation` it is the one that is curated"
            )


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its complete Config. `source`: file and key, for error messages; `sets`: the names of its feature
    sets."""

    name: str
    config: Config
    after: str | None
    source: str
    sets: tuple[str, ...] = ("",)

    @property
    def largest(self) -> Bucket:
        """The shape of its evaluation, as of generation: the largest video bucket."""
        return default_bucket(self.config.data.buckets)


def read(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """The plan in `path` after `--set` overrides. ConfigError names file, key and value."""
    data = read_extended(path)
    for text in overrides:
        data = apply_override(data, text)
    return validate(_complete_sets(data), Plan, str(path))


def _complete_sets(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of several sets with each one's extraction laid over the plan's."""
    common, sets = data.get("extraction"), data.get("sets")
    if not sets or not isinstance(sets, dict) or not isinstance(common, dict):
        return data
    complete = {}
    for name, one in sets.items():
        own = one.get("extraction", {}) if isinstance(one, dict) else None
        complete[name] = {**one, "extraction": merge(common, own)} if isinstance(own, dict) else one
    return {**data, "extraction": None, "sets": complete}


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
    sets = plan.sets_of(name)
    if isinstance((data.get("data") or {}).get("features"), list):
        raise ConfigError(
            f"{source}: data.features lists several sets, but a plan's stages train on its own features, "
            f"{', '.join(str(one.extract.out) for one in sets)}; name them in the plan's `sets`"
        )
    data = merge(data, {"data": {"features": _features(sets, stage.sets)}})
    if stage.after is not None:
        if data.get("init") is not None:
            raise ConfigError(f"{source}: init is set in the config, and after: {stage.after} in the plan; keep one")
        init = InitConfig(source=plan.run_dir / stage.after, weights=stage.weights, allow=stage.allow)
        data["init"] = init.model_dump(mode="json")
    config = validate(data, Config, source)
    extracted = {bucket.key for one in sets for bucket in one.extract.buckets}
    absent = [bucket.key for bucket in config.data.buckets if bucket.key not in extracted]
    if absent:
        keys = " and ".join(one.key("extraction.buckets") for one in sets)
        raise ConfigError(
            f"{source}: data.buckets {', '.join(absent)} not in {path}: {keys} {', '.join(sorted(extracted))}"
        )
    return ResolvedStage(name, config, stage.after, source, tuple(one.name for one in sets))


def _features(sets: Sequence[FeatureSource], weights: dict[str, float] | None) -> Any:
    """`data.features` of a stage."""
    if len(sets) == 1:
        return str(sets[0].extract.out)
    return [{"path": str(one.extract.out), **({"weight": weights[one.name]} if weights else {})} for one in sets]


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
