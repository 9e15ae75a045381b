"""Forecast of a plan: clips kept and dropped, tokens, steps, FLOPs, memory of a rank, and what it sends to others.

Counts come from the extraction's report and index; before there is one, from the manifest alone (nothing is decoded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.plan import ResolvedStage, Resources
from stdit.config import Bucket, ConfigError, ExtractConfig, Url, Where, latent_shape
from stdit.config.token_budget import imbalance
from stdit.console import count_of

if TYPE_CHECKING:
    import numpy as np

    from stdit.data.loader import ClipIndex
    from stdit.training.communication import ZeroTraffic
    from stdit.training.rank_memory import Memory

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class BucketForecast:
    """One bucket of a stage: `clips` of its training split, `left_out` of them by `where`, and the samples that `steps`
    steps take."""

    key: str
    clips: int
    left_out: int
    samples: int
    steps: int
    tokens: int
    # Share of train.tokens_per_step that a step takes, and how far ranks are from equal work; None without it.
    budget: tuple[float, float] | None = None
    # That a rank sends to those which share its clips, in a step.
    exchanged_bytes: int = 0
    # ZeRO's collectives in a step; None on one rank.
    zero: ZeroTraffic | None = None

    @property
    def epochs(self) -> float:
        """Passes over the clips of the bucket."""
        return self.samples / max(1, self.clips)

    @property
    def samples_per_step(self) -> float:
        """Of the steps that take any; packed, their mean."""
        return self.samples / max(1, self.steps)


@dataclass(frozen=True)
class Forecast:
    """What one stage will take. FLOPs: of all its steps, over all ranks."""

    name: str
    steps: int
    ranks: int
    zero_stage: int
    precision: str
    buckets: tuple[BucketForecast, ...]
    where: str
    text_length: int
    parameters: int
    trained: int
    flops: int
    memory: Memory
    sequence_parallel: int = 1
    use_gpu: bool = False

    def __str__(self) -> str:
        samples = sum(b.samples for b in self.buckets)
        trained = "" if self.trained == self.parameters else f" ({self.trained / 1e6:.2f} M trained)"
        lines = [
            f"stage {self.name}: {self.steps} steps, {self.ranks} ranks, {samples:,} samples, "
            f"{self.parameters / 1e6:.2f} M parameters{trained}, {_si(self.flops)}FLOPs"
            + (f", captions of {self.text_length} tokens (mean)" if self.text_length else "")
        ]
        for b in self.buckets:
            kept = count_of(b.clips, "clip") + (f" ({b.left_out:,} left out: not {self.where})" if self.where else "")
            lines.append(
                f"  {b.key:<12} {kept}; {b.tokens} tokens; {b.steps} steps of {_count(b.samples_per_step)}, {b.epochs:.1f} epochs"
                + (
                    f"; {b.budget[0]:.0%} of tokens_per_step, ranks {b.budget[1]:.0%} from equal work"
                    if b.budget
                    else ""
                )
                + self._sent(b)
            )
        m, shared = self.memory, self.sequence_parallel
        if shared > 1:
            lines.append(f"  {self.ranks} ranks = {self.ranks // shared} data parallel x {shared} sequence parallel")
        lines.append(
            f"  memory of a rank (ZeRO-{self.zero_stage}, {self.precision}): {_bytes(m.total)} = {_terms(m.resident)} + {_bytes(m.beside(m.peak))} in {m.peak}"
        )
        lines += [f"    {phase}: {_bytes(m.beside(phase))} = {_terms(terms)}" for phase, terms in m.phases.items()]
        lines.append(
            "  building the model: "
            + (f"{_bytes(m.building)} of the host's memory a rank" if m.building else "")
            + (", and " if m.building and self.zero_stage == 3 else "")
            + ("one weight at a time in the host's memory" if self.zero_stage == 3 else "")
        )
        if m.checkpoint_copy:
            lines.append(
                f"  checkpoints: a copy of {_bytes(m.checkpoint_copy)} in the host's memory (train.checkpoint_in_background)"
                + (f", and {_bytes(m.full_weights)} there while rank 0 joins full weights" if m.full_weights else "")
            )
        return "\n".join(lines)

    def _sent(self, bucket: BucketForecast) -> str:
        """What a rank sends in a step, and on GPUs how long that takes."""
        if bucket.zero is None:
            return ""
        from stdit.training.communication import H100

        zero = f"{_bytes(bucket.zero.sent)} (ZeRO-{self.zero_stage})"
        seconds = H100.zero_seconds(bucket.zero)
        if self.sequence_parallel > 1:
            zero += f" + {_bytes(bucket.exchanged_bytes)} (sequence parallelism)"
            seconds += H100.exchange_seconds(bucket.exchanged_bytes, self.sequence_parallel)
        return f"; a rank sends {zero} a step" + (f", {1000 * seconds:.1f} ms on {H100.name}" if self.use_gpu else "")


def forecast(
    stage: ResolvedStage, resources: Resources, source: ClipIndex, compression: Grid, text_length: int
) -> Forecast:
    """Of one stage. `source`: says how many clips each bucket has; `text_length`: mean tokens of a caption.

    ConfigError: a bucket without clips, sizes that do not divide or that the model does not take, a column of `where`
    that is not there.
    """
    from stdit.data.loader import BucketSchedule
    from stdit.models.cost import parameter_sizes
    from stdit.training.communication import zero_traffic
    from stdit.training.data import check_sequence_parallel
    from stdit.training.machine import sample_cost, saved_bytes
    from stdit.training.rank_memory import rank_memory

    config, shared = stage.config, stage.config.train.sequence_parallel
    ranks = resources.ranks[0]  # the fewest: the most memory each
    data_ranks = config.train.data_ranks(ranks)
    packing = config.train.packing_budget
    try:
        schedule = BucketSchedule(source, config.data, data_ranks, config.train.gradient_accumulation, packing)
    except ConfigError as error:
        raise ConfigError(f"{stage.source}: {error}") from error
    micro_batches = config.micro_batches(ranks)
    latents = {b.key: latent_shape(b, compression) for b in config.data.buckets}
    check_sequence_parallel(config, latents, ranks)
    check_validation_clips(stage, source)
    everything = source.select(config.data.train_split, config.data.buckets)
    taken = dict.fromkeys(schedule.counts, 0)
    steps = dict.fromkeys(schedule.counts, 0)
    for _ in range(config.train.steps):
        step = schedule.plan_step(taken)
        taken = step.position
        for key in step.samples_by_bucket:
            steps[key] += 1
    text = text_length if config.model.text_dim is not None else 0
    sizes = parameter_sizes(config.model, config.train)
    device = "cuda" if resources.use_gpu else "cpu"
    buckets, memories, flops, parameters, trained = [], [], 0, 0, 0
    for bucket in config.data.buckets:
        batch, count, size = micro_batches[bucket.key]
        try:
            cost = sample_cost(config, bucket, latents[bucket.key], text, batch)
            own = cost if shared == 1 else sample_cost(config, bucket, latents[bucket.key], text, batch, shared)
        except ConfigError as error:
            raise ConfigError(f"{stage.source}: {error}") from error
        kept, samples = schedule.counts[bucket.key], taken[bucket.key]
        left_out = len(everything[bucket.key]) - kept
        checkpointed = config.train.activation_checkpointing
        exchanged = own.exchanged_bytes_checkpointed if checkpointed else own.exchanged_bytes
        exchanged *= batch * count
        budget = None
        if config.train.tokens_per_step is not None and packing is None:
            budget = size * cost.tokens / config.train.tokens_per_step, imbalance(size, data_ranks)
        zero = zero_traffic(sizes, config.train, ranks, count) if ranks > 1 else None
        buckets.append(
            BucketForecast(bucket.key, kept, left_out, samples, steps[bucket.key], cost.tokens, budget, exchanged, zero)
        )
        flops += samples * cost.training_flops
        activations = saved_bytes(own, batch, checkpointed)
        memories.append(rank_memory(sizes, config.train, ranks, activations, count, device))
        parameters, trained = cost.parameters, cost.trained
    return Forecast(
        name=stage.name,
        steps=config.train.steps,
        ranks=ranks,
        zero_stage=config.train.zero_stage,
        precision=config.train.precision,
        buckets=tuple(buckets),
        where=" and ".join(_condition(w) for w in config.data.where),
        text_length=text,
        parameters=parameters,
        trained=trained,
        flops=flops,
        memory=max(memories, key=lambda memory: memory.total),
        sequence_parallel=shared,
        use_gpu=resources.use_gpu,
    )


def check_validation_clips(stage: ResolvedStage, source: ClipIndex) -> None:
    """ConfigError: the stage validates or draws samples, and its buckets hold no clip of the validation split."""
    config, data = stage.config, stage.config.data
    key = "validation.every" if config.validation.every else "samples.every" if config.samples.every else None
    if key and not any(map(len, source.select(data.validation_split, data.buckets, data.where).values())):
        raise ConfigError(
            f"{stage.source}: {key}: no clip of split {data.validation_split!r} (data.validation_split) is in the stage's buckets, "
            f"{', '.join(bucket.key for bucket in data.buckets)}"
        )


# ----------------------------------------------------------------------------------------- clips


class ManifestSource:
    """Clips by bucket as extraction would sort them, by the sizes in the manifest, or in the file where it states none.

    `failures`: files that were opened and cannot be used, with the reason. Damage to other files is not noticed.
    """

    def __init__(self, config: ExtractConfig) -> None:
        from stdit.data import filters, manifest
        from stdit.data.buckets import assign_clip, tally
        from stdit.data.decoding import ClipInfo
        from stdit.data.features import ORIGINAL
        from stdit.data.probe import probe_clips, stated_info
        from stdit.data.transforms import frame_step, frames_available, window_count

        self._manifest = manifest.read(config.manifest)
        self.captions = (ORIGINAL, *config.captions)
        filters.check_where(self._manifest, config.where)
        self._clips: list[tuple[Any, str]] = []  # one for each window
        outcomes: list[Any] = []
        kept = filters.filtered(self._manifest, config.where)
        self._filtered = len(self._manifest) - len(kept)
        rated = config.target_fps is not None or any(b.min_fps or b.max_fps for b in config.buckets)
        unstated = [clip for clip in kept if stated_info(clip, rated) is None]
        probed = probe_clips(unstated, config.decoder, config.decode_timeout_s, cache=config.cache) if unstated else []
        by_key = dict(zip((clip.id for clip in unstated), probed, strict=True))
        self.failures = {key: found for key, found in by_key.items() if isinstance(found, str)}
        for clip in kept:
            found = by_key.get(clip.id)
            if isinstance(found, str):
                continue
            info = stated_info(clip, rated) or found
            assert isinstance(info, ClipInfo)
            outcome = assign_clip(info, config, clip.id)
            outcomes.append(outcome)
            if isinstance(outcome, Bucket):
                frames = frames_available(
                    info.frame_count, frame_step(info.fps, config.frame_stride, config.target_fps)
                )
                windows = (config.windows.stride, config.windows.max) if config.windows else (1, 1)
                self._clips += [(clip, outcome.key)] * window_count(frames, outcome.frames, windows)
        self._tally = tally(outcomes, config.buckets)
        self.size = len(self._clips)
        self._windows = config.windows is not None

    def lines(self) -> list[str]:
        """As stdit.data.extraction.report_lines, as far as headers and manifest tell."""
        dropped = {**({"where": self._filtered} if self._filtered else {}), **self._tally["dropped"]}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        samples = f" (as {len(self._clips):,} samples)" if self._windows else ""
        lines = [
            f"clips: {len(self._manifest):,} in the manifest, not extracted yet: {sum(self._tally['kept'].values()):,} would be kept{samples}, "
            f"{sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
            + (f", {len(self.failures):,} can't be used" if self.failures else "")
        ]  # fmt: skip
        lines += [f"  {key:<12} {count:,}" for key, count in self._tally["kept"].items()]
        return lines + [f"  {path}: {reason}" for path, reason in list(self.failures.items())[:5]]

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """As FeatureSet.select."""
        import numpy as np

        from stdit.data.filters import check_where, passing

        check_where(self._manifest, where)
        found: dict[str, list[int]] = {bucket.key: [] for bucket in buckets}
        numbers = [n for n, (clip, key) in enumerate(self._clips) if key in found and split in (None, clip.split)]

        def values(column: str) -> list[Any]:
            if column == "duration" and column not in self._manifest.columns:
                return [Bucket.parse(self._clips[n][1]).frames for n in numbers]
            return [self._clips[n][0].value(column) for n in numbers]

        for number, kept in zip(numbers, passing(len(numbers), values, where), strict=True):
            if kept:
                found[self._clips[number][1]].append(number)
        return {key: np.array(ids, dtype=np.int64) for key, ids in found.items()}


class EqualSource:
    """The same number of clips in every bucket, without a manifest: enough for the cost of a step."""

    CLIPS = size = 1_000_000

    def __init__(self, manifest: Path | Url, captions: Sequence[str] = ()) -> None:
        from stdit.data.features import ORIGINAL

        self.manifest, self.captions = manifest, (ORIGINAL, *captions)

    def lines(self) -> list[str]:
        return [f"clips: {self.manifest} is not there; as if every bucket had {self.CLIPS:,}"]

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """As FeatureSet.select, without looking at conditions."""
        import numpy as np

        return {bucket.key: np.arange(self.CLIPS) for bucket in buckets}


# ------------------------------------------------------------------------------------- formatting


def _condition(where: Where) -> str:
    parts = [f"{where.column} at least {where.at_least:g}"] if where.at_least is not None else []
    parts += [f"{where.column} at most {where.at_most:g}"] if where.at_most is not None else []
    parts += [f"{where.column} one of {', '.join(map(str, where.one_of))}"] if where.one_of is not None else []
    if where.top is not None:
        parts.append(f"{where.column} in the top {where.top:g}" + (f" per {where.per}" if where.per else ""))
    return " and ".join(parts)


def _terms(terms: Mapping[str, int]) -> str:
    """weights 1.2 GiB + …, but for those that are 0."""
    return " + ".join(f"{name} {_bytes(size)}" for name, size in terms.items() if size) or "nothing more"


def _count(mean: float) -> str:
    """12, or 11.7."""
    return f"{mean:.1f}".removesuffix(".0")


def _si(value: float) -> str:
    """12.3 T for 12.3e12."""
    for unit, name in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value / 1e6:.1f} M"


def _bytes(value: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value / 2**10:.1f} KiB"
