"""A generation job: where the pipeline comes from and every video to generate, as one value that is sent to workers.

`open_job` validates it and records its settings in OUT/request.json; a folder of a job with other settings is refused.
No weights are loaded here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stdit.config import (
    Bucket,
    Config,
    ConfigError,
    DiffusionConfig,
    GenerateConfig,
    LoRASource,
    Precision,
    SamplerConfig,
    SealedSchema,
    Url,
    default_bucket,
    latent_shape,
    read_json,
    token_grid,
    validate,
)
from stdit.config.base import MAX_THREADS
from stdit.config.diff import changes
from stdit.config.identity import FrameSampling
from stdit.config.model import ClassConditioning, class_conditioning
from stdit.diffusion.guidance import check_channels, check_path_drop
from stdit.diffusion.schedulers import check_sampler, compatible_scheduler
from stdit.files import atomic_write, check_regular, check_writable, fingerprint_files, seal
from stdit.inference.components import read_index
from stdit.inference.inputs import DEFAULT_FPS
from stdit.inference.prompts import Item, Prompt, items, read_prompts
from stdit.training import adapters, checkpoint
from stdit.training.identity import Architecture, load_identity
from stdit.training.mirror import fetch_weights

MANIFEST, REQUEST, SHEET, MOVING = "manifest.jsonl", "request.json", "contact_sheet.png", "contact_sheet.gif"


class JobRequest(SealedSchema):
    """request.json: the settings of the videos in a folder, and their names."""

    settings: dict[str, Any]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where the pipeline comes from. `facts` go into every manifest row; `fingerprint` identifies the weights. url: of
    the checkpoint that was fetched to `path`; every machine fetches it for itself."""

    path: Path
    weights: Literal["ema", "model"]
    facts: dict[str, Any]
    fingerprint: str
    diffusion: DiffusionConfig
    default: SamplerConfig
    largest: Bucket | None
    # Frames per second of most videos that the run was trained on.
    fps: float | None = None
    classes: ClassConditioning = None
    # The base model of adapters or a control branch: its path, and the fingerprint of its weights.
    base: Path | None = None
    base_fingerprint: str | None = None
    # That the run was trained in.
    precision: Literal["fp32", "bf16"] = "fp32"
    url: Url | None = None

    def local_path(self) -> Path:
        """`path`, on this machine."""
        if self.url is None or self.path.is_dir():
            return self.path
        return fetch_weights(self.url, self.weights)[1]


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs; picklable."""

    source: Source
    out: Path
    items: tuple[Item, ...]
    sampler: SamplerConfig
    batch_size: int
    threads: int
    lora: tuple[LoRASource, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def protocol(self) -> dict[str, Any]:
        """How the videos are sampled, for their rows."""
        how = {**self.source.facts, **self.sampler.model_dump(), "batch_size": self.batch_size, "threads": self.threads}
        how["precision"] = self.precision
        if self.lora:
            how["lora"] = [adapter.model_dump(mode="json") for adapter in self.lora]
        return how

    @cached_property
    def batches(self) -> list[tuple[Item, ...]]:
        """Items that are sampled together: of one shape and frame rate, in their order."""
        groups: dict[tuple[Any, ...], list[Item]] = {}
        for item in self.items:
            groups.setdefault(item.batch_key, []).append(item)
        size = self.batch_size
        return [tuple(group[i : i + size]) for group in groups.values() for i in range(0, len(group), size)]

    def is_complete(self, item: Item) -> bool:
        file = self.out / item.file
        return file.is_file() and file.stat().st_size > 0

    def missing(self) -> list[int]:
        """Numbers of the batches with missing videos."""
        return [n for n, batch in enumerate(self.batches) if not all(self.is_complete(item) for item in batch)]


def find_source(run: Path | Url, weights: Literal["ema", "model"]) -> Source:
    """The newest complete checkpoint of a run directory, or of a run's mirror at a URL; or `run` itself, a checkpoint
    or a saved pipeline.

    ConfigError: none of these. CheckpointError: damaged files. StoreError: of the URL.
    """
    if isinstance(run, Url):
        url, folder = fetch_weights(run, weights)
        fetched = find_source(folder, weights)
        return replace(fetched, url=url, facts={**fetched.facts, "run": str(run)})
    if (run / "model_index.json").is_file():
        index = read_index(run)
        diffusion = validate(index["diffusion"], DiffusionConfig, f"{run}/model_index.json: diffusion")
        default = compatible_scheduler(SamplerConfig(), diffusion)
        sampling = _extracted_frames(index)
        facts = {"run": str(run), "checkpoint": None, "step": None, "weights": None, **sampling}
        return Source(
            run.resolve(),
            weights,
            facts,
            _fingerprint(run / "transformer"),
            diffusion,
            default,
            None,
            index.get("fps"),
            _classes_of(read_json(run / "transformer" / "config.json", Architecture)),
        )
    transformer = checkpoint.find_weights(run, weights)
    place = transformer.parent
    identity = load_identity(place)
    diffusion = validate(identity["diffusion"], DiffusionConfig, f"{place}/{checkpoint.IDENTITY}: diffusion")
    facts = {"run": str(run), "checkpoint": place.name, "step": identity["step"], "weights": weights}
    facts |= _extracted_frames(identity)
    sampler = validate(identity["config"]["samples"]["sampler"], SamplerConfig, f"{place}: samples.sampler")
    buckets = [Bucket(**{k: b[k] for k in Bucket.model_fields}) for b in identity["config"]["data"]["buckets"]]
    return Source(
        place.resolve(),
        weights,
        {**facts, "samples_seen": identity["samples_seen"]},
        _fingerprint(transformer),
        diffusion,
        compatible_scheduler(sampler, diffusion),
        default_bucket(buckets),
        checkpoint.common_frame_rate(identity),
        _classes_of(identity["architecture"]),
        precision="bf16" if identity["config"]["train"]["precision"] == "bf16" else "fp32",
    )


def _precision(source: Source, asked: Precision, device: str | None) -> Literal["fp32", "bf16"]:
    if asked != "auto":
        return asked
    from stdit.training.machine import multiplies_bfloat16

    native = multiplies_bfloat16(None if device is None else device == "cuda")
    return source.precision if native else "fp32"


def _extracted_frames(identity: Mapping[str, Any]) -> dict[str, Any]:
    """frame_sampling of an identity or saved pipeline, for the rows: with which real clips these videos compare.
    Nothing where those are a clip's first frames, or not known."""
    found = identity.get("frame_sampling")
    if found is None or FrameSampling.model_validate(found) == FrameSampling():
        return {}
    return {"frame_sampling": found}


def _classes_of(architecture: Mapping[str, Any]) -> ClassConditioning:
    return class_conditioning(architecture.get("num_classes"), architecture.get("text_dim"))


def _with_base(source: Source, base: Path | None) -> Source:
    """`source` with the base model of its adapters or control branch; base: its path, if it was moved.

    ConfigError: it is missing or changed; one is passed for a complete model.
    """
    path = source.path / checkpoint.IDENTITY
    identity = load_identity(source.path) if path.is_file() else {}
    if not identity.get("base"):
        if base is not None:
            raise ConfigError(f"base {base}: {source.path} holds a complete model, which has no base")
        return source
    recorded = adapters.Base(**identity["base"])
    found = adapters.find_base(recorded, validate(identity["config"], Config, f"{path}: config"), base)
    return replace(source, base=found.resolve(), base_fingerprint=recorded.fingerprint)


def _fingerprint(folder: Path) -> str:
    """Hex SHA-256 of a diffusers folder's config and weights."""
    check_regular(folder)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no weights")
    return fingerprint_files(files)


def open_job(
    run: Path | Url | str,
    prompts: Sequence[Prompt],
    out: Path | str,
    shape: Bucket | None = None,
    sampler: SamplerConfig | None = None,
    *,
    weights: Literal["ema", "model"] = "ema",
    batch_size: int = 8,
    fps: float | None = None,
    threads: int = 1,
    videos_per_prompt: int = 1,
    lora: Sequence[LoRASource] = (),
    base: Path | str | None = None,
    precision: Precision = "auto",
    device: str | None = None,
    overwrite: bool = False,
) -> Job:
    """Validates the job, claims `out` for it and writes request.json there. Loads no weights.

    shape: None: the run's largest video bucket (or image bucket, if it has no other). sampler: None: the run's own.
    fps:
    None: of most videos that the run was trained on (8 if not known). base: path of the base model of adapters or a
    control branch, if it was moved. precision: of the transformer; auto: as the run was trained, where `device` (None:
    cuda where there is one) multiplies bfloat16 natively. ValueError: no prompts; threads that are not 1 to
    MAX_THREADS; a sampler of another objective; sizes that don't divide; a folder with the videos of another job
    (overwrite: they are removed).
    """
    if not prompts:
        raise ValueError("no prompts: the list is empty")
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads: expected 1 to {MAX_THREADS}, found {threads}")
    source = find_source(run if isinstance(run, Url) else Path(run), weights)
    source = _with_base(source, None if base is None else Path(base))
    sampler, shape = sampler or source.default, shape or source.largest
    fps = float(fps or source.fps or DEFAULT_FPS)
    for number, prompt in enumerate(prompts):
        prompt.check(f"prompt {number}")
    rows = [prompt.row() for prompt in prompts]
    try:
        digest = hashlib.sha256(json.dumps(rows, allow_nan=False).encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompts: a column cannot be written as JSON ({error})") from error
    try:
        videos = tuple(items(prompts, videos_per_prompt, shape, fps))
    except ValueError as error:
        raise ConfigError(f"{run}: {error}") from error
    check_sampler(sampler, source.diffusion)
    for one in {item.shape.key: item.shape for item in videos}.values():
        _check_shape(source, one, sampler)
    job = Job(
        source,
        Path(out).absolute(),
        videos,
        sampler,
        batch_size,
        int(threads),
        tuple(lora),
        _precision(source, precision, device),
    )
    # By the weights: the same path may hold others tomorrow.
    added = [[adapters.weights_fingerprint(adapters.resolve_lora(one.path, weights))[:16], one.scale] for one in lora]
    settings = {
        "checkpoint": f"{source.facts['checkpoint'] or 'saved pipeline'} {source.fingerprint[:16]}",
        "prompts": digest,
        "shape": shape and shape.key,
        **sampler.model_dump(),
        "weights": weights,
        "videos_per_prompt": videos_per_prompt,
        "fps": fps,
        "batch_size": batch_size,
        "threads": job.threads,
        "precision": job.precision,
        "lora": added or None,
        # By the weights: a base that was moved samples the same.
        "base": source.base_fingerprint and source.base_fingerprint[:16],
    }
    _claim(job, settings, overwrite)
    return job


def _check_shape(source: Source, shape: Bucket, sampler: SamplerConfig) -> None:
    """ConfigError or ValueError: a shape that autoencoder or patches don't divide, more guided channels than the
    latents have; as far as that is known without loading weights."""
    path = source.path / checkpoint.IDENTITY
    if path.is_file():
        identity = load_identity(source.path)
        t, h, w = identity["video_encoder"]["compression"]
        latent, model = latent_shape(shape, (t, h, w)), identity["architecture"]
        token_grid(latent, tuple(model["patch_size"]), f"shape {shape.key}", model.get("pad_latents", False))
        check_channels(sampler.guidance_channels, identity["architecture"]["in_channels"])
        check_path_drop(sampler.path_drop, model.get("sparse_dense"))


def _claim(job: Job, settings: dict[str, Any], overwrite: bool) -> None:
    """Writes request.json. ValueError: `out` holds videos of another job, or files of unknown origin."""
    check_writable(job.out)
    path = job.out / REQUEST
    files = [item.file for item in job.items]
    if path.exists():
        try:
            old = read_json(path, JobRequest)
        except ConfigError as error:
            raise ConfigError(f"{error}; give another folder, or move {path} away") from error
        changed = changes(old["settings"], settings)
        if not changed:
            return
        if not overwrite:
            listed = "; ".join(map(str, changed))
            raise ValueError(
                f"{job.out} holds videos with other settings ({listed}); give another folder, or --overwrite"
            )
        for name in {*old["files"], MANIFEST, SHEET, MOVING}:
            (job.out / Path(name).name).unlink(missing_ok=True)
        path.unlink()
    strangers = [name for name in (*files, MANIFEST, SHEET, MOVING) if (job.out / name).exists()]
    if strangers:
        raise ValueError(
            f"{job.out} holds {len(strangers)} files such as {strangers[0]}, and no {REQUEST} that says how they were made; "
            "give another folder, or move them away"
        )
    atomic_write(path, json.dumps(seal({"settings": settings, "files": files}), indent=1))


def job_from_config(config: GenerateConfig) -> Job:
    """The job of a config; defaults are the run's. Errors: as `open_job`."""
    source = find_source(config.run, config.weights)
    names = ("scheduler", "steps", "guidance_scale", "guidance_channels", "path_drop")
    options = {name: getattr(config, name) for name in names}
    sampler = source.default.model_copy(update={k: v for k, v in options.items() if v is not None})
    sizes = {"frames": config.frames, "height": config.height, "width": config.width}
    known = source.largest.model_dump() if source.largest else {}
    known |= {k: v for k, v in sizes.items() if v is not None}
    prompts = read_prompts(config.prompts)
    shape = None
    if len(known) == len(sizes):
        shape = Bucket(**known)
    elif known:  # of a saved pipeline: prompts without a size of their own take these
        prompts = [replace(p, **{k: v for k, v in known.items() if getattr(p, k) is None}) for p in prompts]
    return open_job(
        config.run, prompts, config.out, shape, sampler,
        weights=config.weights, batch_size=config.batch_size, fps=config.fps, threads=config.threads,
        videos_per_prompt=config.videos_per_prompt, lora=config.lora, base=config.base,
        precision=config.precision, device=config.device, overwrite=config.overwrite,
    )  # fmt: skip
