"""Runs a plan: prepare, curate, extract, train each stage, evaluate it, write the report. Finished parts are
skipped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import changes, checks, child, workers
from pipelines.plan import Evaluation, FeatureSource, Plan, ResolvedStage, resolve
from pipelines.progress import Clock, StepLine
from pipelines.record import Record, set_aside
from pipelines.sources import check_identities
from stdit.config import ConfigError, EvaluateConfig, ReferenceConfig, Url
from stdit.console import count_of
from stdit.cores import available_cores

if TYPE_CHECKING:
    from stdit.data.extraction import ExtractionPlan
    from stdit.data.records import ShardSpec


class PlanFailed(RuntimeError):
    """A part of the plan other than training failed; the message names it."""


class PlanRunner:
    """One run of a plan. `record` holds what earlier runs of it have done."""

    def __init__(self, plan: Plan, stages: Sequence[ResolvedStage], path: str, allow_changes: bool) -> None:
        self.plan, self.stages, self.path, self.allow_changes = plan, stages, path, allow_changes
        self.clock = Clock()
        self.record = Record.read(plan.run_dir)
        for stage in stages:  # Runs trained without the plan, by stdit/train.py, are described by their own config.
            run_dir, part = stage.config.run_dir, f"stages.{stage.name}"
            if part not in self.record.parts and (run_dir / "config.yaml").is_file():
                from stdit.training.run_dir import read_config

                self.record.parts[part] = changes.describe_stage(
                    read_config(run_dir), plan.resources, stage.after, stage.sets
                )

    @property
    def sets(self) -> list[FeatureSource]:
        """The plan's feature sets."""
        return list(self.plan.feature_sets.values())

    # -------------------------------------------------------------------------------------- changes

    def parts(self) -> dict[str, changes.Settings]:
        """Settings of every part, as far as they are known."""
        from stdit.data.manifest import fingerprint

        manifests = {one.name: fingerprint(one.extract.manifest) for one in self.sets}
        return changes.describe(self.plan, self.stages, manifests)

    def handle_changes(self) -> None:
        """Compares the plan with the record. ConfigError if results are invalid, unless changes are allowed: then these
        results are moved to RUN_DIR/replaced."""
        parts = self.parts()
        found = changes.differences(self.record.parts, parts)
        invalid = changes.invalidated(found, parts)
        invalid = {part: reason for part, reason in invalid.items() if part in self.record.parts}
        if not invalid:
            return
        lines = [f"the plan has changed since its results in {self.plan.run_dir}:"]
        lines += [f"  {part}.{change}" for part, some in found.items() for change in some]
        lines += ["which invalidates:", *(f"  {part} ({reason})" for part, reason in invalid.items())]
        if not self.allow_changes:
            lines.append(
                "Nothing was modified. --allow-changes moves these results to RUN_DIR/replaced and recomputes them; or "
                "use another run_dir"
            )
            raise ConfigError("\n".join(lines))
        for line in lines:
            self.clock.say(line)
        for part in invalid:
            for folder in self.folders(part):
                if (aside := set_aside(folder, self.plan.run_dir)) is not None:
                    self.clock.say(f"  {folder} is now {aside}")
            self.record.remove(part)

    def folders(self, part: str) -> list[Path]:
        """Folders that a part has written. ConfigError: features outside run_dir, which other plans may use."""
        run_dir = self.plan.run_dir
        for one in self.sets:
            if part == one.key("prepare"):
                return [one.prepare_out] if one.prepare_out else []
            if part == one.key("extraction"):
                out = one.extract.out
                if isinstance(out, Url) or not out.is_relative_to(run_dir):
                    raise ConfigError(
                        f"{one.key('extraction.out')} {out} holds features of other settings, and lies outside run_dir "
                        f"{run_dir}, where other plans may use it; set another {one.key('extraction.out')}"
                    )
                return [out]
        name = part.removeprefix("stages.")
        evaluation = run_dir / "evaluation"
        return [run_dir / name, evaluation / name, evaluation / f"{name}.previous"]

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Prints a line before and after, and adds the seconds to the record."""
        self.clock.say(f"{name}: {what}")
        start = time.monotonic()
        try:
            yield
        finally:
            self.record.add_seconds(name, time.monotonic() - start)
        self.clock.say(f"{name}: done in {time.monotonic() - start:.1f} s")

    def connect(self) -> None:
        """Joins or starts Ray, once."""
        start = time.monotonic()
        status = workers.connect(max(self.plan.resources.cpus, available_cores()))
        if status != "already":
            self.clock.say(f"ray: {status}, {time.monotonic() - start:.1f} s")

    # ----------------------------------------------------------------------------------------- data

    def prepare(self, one: FeatureSource) -> None:
        """Runs a set's module that creates the clips, unless their manifest exists."""
        module, manifest, out = one.prepare, one.prepared, one.prepare_out
        if module is None or manifest is None:
            return
        name = one.key("prepare")
        if manifest.is_file():
            self.clock.say(f"{name}: {manifest} exists, skipped")
            return
        self.record.start(name, self.parts()[name])
        command = [sys.executable, "-m", module.module, "--out", str(out), *map(str, module.args)]
        with self.phase(name, " ".join(command[1:])):
            code = child.run(command)
            if code != 0:
                raise PlanFailed(f"{name}: {module.module} ended with exit code {code}")
            if not manifest.is_file():
                raise PlanFailed(f"{name}: {module.module} succeeded, but did not write {manifest} ({name}.manifest)")

    def curation(self, one: FeatureSource) -> None:
        """Curates a set's footage; what is known is not computed again."""
        config = one.curate
        if config is None:
            return
        from pipelines.curate_clips import curate_footage

        if config.workers > 1:
            self.connect()
        with self.phase(one.key("curation"), str(config.out)):
            curate_footage(config)

    def extraction(self) -> None:
        """Extracts features of all sets that are missing or have changed. ConfigError, before the first: sets of other
        encoders."""
        from stdit.extract import prepare

        planned: dict[str, tuple[ExtractionPlan, list[ShardSpec]]] = {}
        for one in self.sets:
            planned[one.name] = prepare(one.extract)
            self.record.start(one.key("extraction"), self.parts()[one.key("extraction")])
        check_identities(self.plan, self.stages, {name: extraction for name, (extraction, _) in planned.items()})
        for one in self.sets:
            self._extract(one, *planned[one.name])

    def _extract(self, one: FeatureSource, extraction: ExtractionPlan, todo: Sequence[ShardSpec]) -> None:
        from pipelines.extract_features import extract_features
        from stdit.data.features import is_extracted

        name, config = one.key("extraction"), one.extract
        if not todo and is_extracted(config.out):
            extract_features(config)
            self.clock.say(f"{name}: {config.out} is complete")
            return
        self.connect()
        with self.phase(
            name,
            f"{count_of(extraction.clips, 'clip')}, {len(todo)} of {len(extraction.shards)} shards to extract, {config.out}",
        ):
            extract_features(config, summary=False)  # stage_lines say it, for all sets

    # ---------------------------------------------------------------------------------------- stages

    def is_finished(self, stage: ResolvedStage) -> bool:
        """Whether the stage's run is complete, on the current features."""
        from stdit.data.mixture import open_features
        from stdit.training.checkpoint import find_final
        from stdit.training.identity import load_identity

        checkpoint = find_final(stage.config.run_dir, stage.config.train.steps)
        if checkpoint is None:
            return False
        identity, fingerprint = load_identity(checkpoint), open_features(stage.config.data).index["fingerprint"]
        if identity["features"] != fingerprint:
            raise ConfigError(
                f"{stage.config.run_dir} was trained on features that have been re-extracted since, because clips "
                f"changed (fingerprint {identity['features'][:12]}…, now {fingerprint[:12]}…); use another run_dir, or "
                f"move {stage.config.run_dir} away"
            )
        return True

    def train(self, stage: ResolvedStage, number: int) -> None:
        """Trains a stage, or resumes it, unless it is finished."""
        label = f"stage {number}/{len(self.stages)} {stage.name}"
        if self.is_finished(stage):
            self.clock.say(f"{label}: finished, skipped")
            return
        self.record.start(f"stages.{stage.name}", self.parts()[f"stages.{stage.name}"])
        from stdit.training.checkpoint import list_checkpoints

        if saved := list_checkpoints(stage.config.run_dir):
            self.clock.say(f"{label}: resumes from {saved[0].name}")
        elif stage.after is not None and stage.config.init is not None:
            before = self.previous(stage)
            assert before is not None
            self.clock.say(f"{label}: initialised from stage {before.name}, its {stage.config.init.weights} weights")
            for line in checks.check_transition(before, stage).splitlines():
                self.clock.say(f"  {line}")
        self.connect()
        if warning := workers.check_capacity(self.plan.resources):
            self.clock.say(warning)
        progress = StepLine(stage.config, self.clock)
        with self.phase(
            stage.name, f"{label.removesuffix(stage.name)}{stage.config.train.steps} steps, {stage.config.run_dir}"
        ):
            try:
                self._train(stage, progress)
            finally:
                progress.close()
        from stdit.training.checkpoint import is_done

        if not is_done(stage.config.run_dir, stage.config.train.steps):
            raise PlanFailed(
                f"stage {stage.name}: its workers ended without an error, but {stage.config.run_dir} is not complete"
            )

    def _train(self, stage: ResolvedStage, progress: StepLine) -> None:
        """Trains a stage; where Ray's own processes have died, again from its newest checkpoint, resources.max_failures
        times. (Ray Train itself restarts workers.)"""
        resources = self.plan.resources
        for restarts in range(resources.max_failures + 1):
            try:
                workers.train_stage(stage.config, resources, self.plan.run_dir / "ray", progress.tick)
            except workers.RayLost as lost:
                if restarts == resources.max_failures:
                    raise
                self.clock.say(f"{lost}; restart {restarts + 1} of {resources.max_failures} (resources.max_failures)")
                workers.disconnect()
                self.connect()
            else:
                return

    def evaluate(self, stage: ResolvedStage) -> dict[str, Any] | None:
        """Videos for held-out captions, and their metrics; what exists is kept. None: the plan has no evaluation.
        PlanFailed."""
        if self.plan.evaluation is None:
            return None
        try:
            return self._evaluate(stage, self.plan.evaluation)
        except ValueError as error:  # what could be known before was checked before (pipelines.checks)
            raise PlanFailed(f"stage {stage.name}: evaluation: {error}") from error

    def _evaluate(self, stage: ResolvedStage, evaluation: Evaluation) -> dict[str, Any]:
        name, before = f"{stage.name}/evaluation", self.previous(stage)
        self.clock.say(f"{name}: {evaluation.prompts} prompts of split {evaluation.metrics.validation_split!r}")
        start = time.monotonic()
        metrics, computed = self._evaluate_run(stage, stage)
        self.clock.say(f"{name}: {summarize(metrics)}")
        self._score(stage)
        if evaluation.compare_with_previous and before is not None and comparable(before, stage):
            previous, more = self._evaluate_run(before, stage)
            metrics["previous"], computed = {"name": before.name, **previous}, computed or more
            self.clock.say(f"{name}: stage {before.name} at {stage.largest.key}: {summarize(previous)}")
        if computed:
            self.record.add_seconds(name, time.monotonic() - start)
        return metrics

    def _evaluate_run(self, run: ResolvedStage, stage: ResolvedStage) -> tuple[dict[str, Any], bool]:
        """Metrics of `run`'s model at the shape of `stage`, and whether anything was computed."""
        from stdit.evaluate import EvaluationPrompts, evaluate_run, generate_missing

        evaluation = self.plan.evaluation
        assert evaluation is not None
        generate = generate_missing
        if evaluation.workers > 1:
            from pipelines.generate_videos import generate_videos

            self.connect()
            generate = generate_videos
        folder = self.plan.run_dir / "evaluation"
        out = folder / (stage.name if run is stage else f"{stage.name}.previous")
        file = out / "videos" / "metrics.json"
        before = _mtime(file)
        prompts = EvaluationPrompts(count=evaluation.prompts, seed=evaluation.seed, **stage.largest.model_dump())
        metrics = evaluate_run(
            run.config.run_dir, self._local_manifest, out, prompts, evaluation.metrics, folder, generate,
            **evaluation.sampler.model_dump(), weights=evaluation.weights, batch_size=evaluation.batch_size,
            fps=evaluation.fps, workers=evaluation.workers, threads=evaluation.threads_each,
            precision=evaluation.precision, overwrite=True,
        )  # fmt: skip
        return metrics, _mtime(file) != before

    def _score(self, stage: ResolvedStage) -> None:
        """Published scores of the stage's clips, if the plan has any; features that exist are kept."""
        evaluation = self.plan.evaluation
        if evaluation is None or evaluation.scores is None:
            return
        from pipelines.evaluate_runs import FeaturePool
        from stdit.evaluation.feature_cache import compute_features
        from stdit.evaluation.scores import evaluate_media, scores_table

        folder = self.plan.run_dir / "evaluation"
        compute = compute_features
        if evaluation.workers > 1:
            self.connect()
            compute = FeaturePool(evaluation.workers)
        split = evaluation.metrics.validation_split
        config = EvaluateConfig(
            **dict(evaluation.scores), generated=folder / stage.name / "videos", out=folder / stage.name / "scores",
            reference=ReferenceConfig(path=self._local_manifest, split=split, crop=True), cache=folder / "cache",
            metrics=evaluation.metrics, threads=evaluation.threads_each,
        )  # fmt: skip
        for line in scores_table(evaluate_media(config, compute)).splitlines():
            self.clock.say(f"{stage.name}/scores: {line}")

    @property
    def _local_manifest(self) -> Path:
        """The manifest of a plan with an evaluation, which is refused with one at a URL (pipelines.plan)."""
        manifest = self.plan.reference.extract.manifest
        assert isinstance(manifest, Path)
        return manifest

    def previous(self, stage: ResolvedStage) -> ResolvedStage | None:
        """The stage that initialises this one."""
        return next((s for s in self.stages if s.name == stage.after), None)

    # ------------------------------------------------------------------------------------------ run

    def run(self) -> dict[str, Path]:
        """Runs everything, in order. Returns the paths of results by what they are."""
        from pipelines.report import write_report
        from stdit.curation.curation import PAGE

        self.handle_changes()
        for one in self.sets:
            self.prepare(one)
            self.curation(one)
        self.handle_changes()  # Again: the manifests are known now.
        checks.check_validation_split(self.plan, self.stages)
        self.extraction()
        self.stages = checks.complete(self.plan, resolve(self.plan, self.path))  # as the features are now
        lines = checks.stage_lines(self.plan, self.stages)
        for line in lines:
            self.clock.say(line)
        entries: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages, 1):
            self.train(stage, number)
            entries.append(self.entry(stage, self.evaluate(stage)))
        data = {**self.curated(), "forecast": lines}
        paths = write_report(self.plan.run_dir, self.plan.name, entries, self.record.total_seconds, data)
        checkpoints = {f"checkpoint of {entry['name']}": Path(entry["checkpoint"]) for entry in entries}
        videos = {f"videos of {entry['name']}": entry["videos"] for entry in entries if entry["videos"]}
        pages = {one.key("curation"): one.curate.out / PAGE for one in self.sets if one.curate}
        return {**checkpoints, **videos, **pages, **paths}

    def curated(self) -> dict[str, list[str]]:
        """What each curation found, for the report."""
        from stdit.curation.curation import PAGE, read_report, report_lines

        return {
            one.key("curation"): [
                *report_lines(read_report(config.out)),
                f"each clip and threshold: {config.out / PAGE}",
            ]
            for one in self.sets
            if (config := one.curate) is not None
        }

    def entry(self, stage: ResolvedStage, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        """A stage for pipelines.report."""
        from stdit.training.checkpoint import read_done

        run = stage.config.run_dir
        videos = self.plan.run_dir / "evaluation" / stage.name / "videos"
        return {
            "name": stage.name,
            "steps": stage.config.train.steps,
            "seconds": self.record.seconds.get(stage.name, 0.0),
            "run": run,
            "checkpoint": str(run / "checkpoints" / read_done(run)["checkpoint"]),
            "videos": videos if metrics is not None else None,
            "metrics": metrics,
        }


def comparable(before: ResolvedStage, stage: ResolvedStage) -> bool:
    """Whether two stages differ in the shape of their clips alone: same model, same conditions."""
    return before.config.model == stage.config.model and before.largest != stage.largest


def _mtime(file: Path) -> int | None:
    """Modification time of a file in nanoseconds; None if it does not exist."""
    return file.stat().st_mtime_ns if file.is_file() else None


def summarize(metrics: Mapping[str, Any]) -> str:
    """The main metrics in one line."""

    def percentage(key: str) -> str:
        return "-" if metrics.get(key) is None else f"{100 * metrics[key]:.1f} %"

    distance = metrics.get("frechet_distance")
    return (
        f"{metrics.get('class_name', 'class')} {percentage('class_accuracy')}, direction "
        f"{percentage('direction_accuracy')}, Fréchet {'-' if distance is None else f'{distance:.2f}'} "
        f"(classifier on held-out: {percentage('classifier_accuracy')})"
    )
