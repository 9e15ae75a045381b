"""One call's way through a plan: what is done is passed over, what is not is done, and all of it is said."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import changes, checks, workers
from pipelines.plan import Plan, ResolvedStage
from pipelines.progress import Clock, StepLine
from pipelines.record import Record, set_aside
from stdit.config import Config, ConfigError, load_config


class PlanFailed(RuntimeError):
    """A part of the plan that is not training failed; the message says which."""


class Walk:
    """One call's way through a plan."""

    def __init__(self, plan: Plan, stages: Sequence[ResolvedStage], path: str, allow_changes: bool) -> None:
        self.plan, self.stages, self.path, self.allow_changes = plan, stages, path, allow_changes
        self.clock = Clock()
        self.record = Record.read(plan.run_dir)
        self.extract = plan.extract
        for (
            stage
        ) in stages:  # Runs that were made by hand, with stdit/train.py: what they are made of, they say themselves.
            file, part = stage.config.run_dir / "config.yaml", f"stages.{stage.name}"
            if part not in self.record.parts and file.is_file():
                self.record.parts[part] = changes.describe_stage(load_config(file, Config), plan.resources, stage.after)

    # ------------------------------------------------------------------------------- before anything

    def parts(self) -> dict[str, changes.Piece]:
        """What everything is to be made of, as far as it is known now."""
        from stdit.data.manifest import fingerprint

        return changes.describe(self.plan, self.stages, fingerprint(self.extract.manifest))

    def settle_changes(self) -> None:
        """Compares the plan with what was made from it. ConfigError unless changes are allowed: then what they make
        void is set aside."""
        parts = self.parts()
        found = changes.differences(self.record.parts, parts)
        void = changes.invalidated(found, parts)
        void = {part: why for part, why in void.items() if part in self.record.parts}
        if not void:
            return
        lines = [f"the plan has changed since results were made in {self.plan.run_dir}:"]
        lines += [f"  {part}.{change}" for part, some in found.items() for change in some]
        lines += ["which makes void:", *(f"  {part} ({why})" for part, why in void.items())]
        if not self.allow_changes:
            lines.append(
                "Nothing was touched. --allow-changes sets these results aside and makes them anew; or give another run_dir"
            )
            raise ConfigError("\n".join(lines))
        for line in lines:
            self.clock.say(line)
        for part in void:
            for folder in self.folders(part):
                if (aside := set_aside(folder, self.plan.run_dir)) is not None:
                    self.clock.say(f"  {folder} is now {aside}")
            self.record.forget(part)

    def folders(self, part: str) -> list[Path]:
        """What a part has written. ConfigError: features outside run_dir, which other plans may read."""
        run_dir = self.plan.run_dir
        if part == "prepare":
            return [run_dir / self.plan.prepare.out] if self.plan.prepare else []
        if part == "extraction":
            if not self.extract.out.is_relative_to(run_dir):
                raise ConfigError(
                    f"extraction.out {self.extract.out} holds features of other settings, and lies outside run_dir "
                    f"{run_dir}, where other plans may read it; give another extraction.out"
                )
            return [self.extract.out]
        name = part.removeprefix("stages.")
        return [run_dir / name, run_dir / "evaluation" / name]

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """A line before and after, and its seconds in the record."""
        self.clock.say(f"{name}: {what}")
        began = time.monotonic()
        try:
            yield
        finally:
            self.record.spend(name, time.monotonic() - began)
        self.clock.say(f"{name}: done in {time.monotonic() - began:.1f} s")

    def connect(self) -> None:
        """Joins or starts Ray, once."""
        wanted = max(self.plan.resources.cpus, workers.available_cpus())
        began = time.monotonic()
        how = workers.connect(wanted)
        if how != "already":
            self.clock.say(f"ray: {how}, {time.monotonic() - began:.1f} s")

    # ----------------------------------------------------------------------------------------- data

    def prepare(self) -> None:
        """Has the plan's module make the clips, if they are not there."""
        wanted, manifest = self.plan.prepare, self.plan.prepared
        if wanted is None or manifest is None:
            return
        if manifest.is_file():
            self.clock.say(f"prepare: {manifest} is there")
            return
        self.record.begin("prepare", self.parts()["prepare"])
        command = [
            sys.executable,
            "-m",
            wanted.module,
            "--out",
            str(self.plan.run_dir / wanted.out),
            *map(str, wanted.args),
        ]
        with self.phase("prepare", " ".join(command[1:])):
            code = subprocess.run(command, check=False).returncode
            if code != 0:
                raise PlanFailed(f"prepare: {wanted.module} ended with exit code {code}")
            if not manifest.is_file():
                raise PlanFailed(f"prepare: {wanted.module} ended well, but there is no {manifest} (prepare.manifest)")

    def extraction(self) -> None:
        """Extracts what is missing or has changed."""
        from pipelines.extract_features import extract_features
        from stdit.extract import begin

        parts, todo = begin(self.extract)
        self.record.begin("extraction", self.parts()["extraction"])
        if not todo and (self.extract.out / "index.json").is_file():
            extract_features(self.extract)
            self.clock.say(f"extraction: {self.extract.out} is complete")
            return
        self.connect()
        with self.phase(
            "extraction", f"{parts.clips:,} clips, {len(todo)} of {len(parts.parts)} shards to make, {self.extract.out}"
        ):
            extract_features(self.extract)

    # ---------------------------------------------------------------------------------------- stages

    def is_finished(self, stage: ResolvedStage) -> bool:
        """Whether the stage's run says that it is done, from the features there are now."""
        done, features = stage.config.run_dir / "done.json", self.extract.out / "index.json"
        if not done.is_file():
            return False
        checkpoint = stage.config.run_dir / "checkpoints" / json.loads(done.read_text())["checkpoint"]
        identity = json.loads((checkpoint / "identity.json").read_text())
        fingerprint = json.loads(features.read_text())["fingerprint"]
        if identity["features"] != fingerprint:
            raise ConfigError(
                f"{stage.config.run_dir} was trained on features that have been extracted anew since, because clips "
                f"changed (fingerprint {identity['features'][:12]}…, now {fingerprint[:12]}…); give another run_dir, or "
                f"move {stage.config.run_dir} away"
            )
        return True

    def train(self, stage: ResolvedStage, number: int) -> None:
        """Trains a stage, or goes on with it, unless it is finished."""
        label = f"stage {number}/{len(self.stages)} {stage.name}"
        if self.is_finished(stage):
            self.clock.say(f"{label}: finished, skipped")
            return
        self.record.begin(f"stages.{stage.name}", self.parts()[f"stages.{stage.name}"])
        latest = stage.config.run_dir / "checkpoints" / "latest"
        if latest.is_file():
            self.clock.say(f"{label}: goes on from {latest.read_text().strip()}")
        elif stage.after is not None and stage.config.init is not None:
            before = next(s for s in self.stages if s.name == stage.after)
            self.clock.say(f"{label}: from stage {before.name}, its {stage.config.init.weights} weights")
            for line in checks.crossing(before, stage).splitlines():
                self.clock.say(f"  {line}")
        self.connect()
        if warning := workers.check_capacity(self.plan.resources):
            self.clock.say(warning)
        progress = StepLine(stage.config, self.clock)
        with self.phase(
            stage.name, f"{label.removesuffix(stage.name)}{stage.config.train.steps} steps, {stage.config.run_dir}"
        ):
            try:
                workers.train_stage(stage.config, self.plan.resources, self.plan.run_dir / "ray", progress.tick)
            finally:
                progress.close()
        if not (stage.config.run_dir / "done.json").is_file():
            raise PlanFailed(
                f"stage {stage.name}: its workers ended without an error, but {stage.config.run_dir} is not done"
            )

    def evaluate(self, stage: ResolvedStage) -> Mapping[str, Any] | None:
        """Videos for held-out captions, and their scores; what is there already is kept."""
        wanted = self.plan.evaluation
        if wanted is None:
            return None
        from pipelines.evaluate_runs import Drawing, evaluate_run

        out = self.plan.run_dir / "evaluation" / stage.name
        if wanted.workers > 1:
            self.connect()
        name, began, before = f"{stage.name}/evaluation", time.monotonic(), _written(out / "videos" / "scores.json")
        self.clock.say(f"{name}: {wanted.prompts} prompts of split {wanted.scores.validation_split!r}")
        scores = evaluate_run(
            stage.config.run_dir, self.extract.manifest, out, Drawing(count=wanted.prompts, seed=wanted.seed), wanted.scores,
            cache=self.plan.run_dir / "evaluation", **wanted.sampler.model_dump(), weights=wanted.weights,
            batch_size=wanted.batch_size, fps=float(wanted.fps), workers=wanted.workers, threads=wanted.threads, overwrite=True,
        )  # fmt: skip
        if _written(out / "videos" / "scores.json") != before:  # Else all was there.
            self.record.spend(name, time.monotonic() - began)
        self.clock.say(f"{name}: {in_words(scores)}")
        return scores

    # ----------------------------------------------------------------------------------------- the way

    def run(self) -> dict[str, Path]:
        """Everything, in order. Returns the paths of what was made, by what they are."""
        from pipelines.report import write_report

        self.settle_changes()
        self.prepare()
        self.settle_changes()  # Again: the manifest is known now.
        self.extraction()
        lines = checks.stage_lines(self.plan, self.stages)
        for line in lines:
            self.clock.say(line)
        told: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages, 1):
            self.train(stage, number)
            told.append(self.entry(stage, self.evaluate(stage)))
        paths = write_report(self.plan.run_dir, self.plan.name, told, self.record.whole, {"forecast": lines})
        checkpoints = {f"checkpoint of {entry['name']}": Path(entry["checkpoint"]) for entry in told}
        videos = {f"videos of {entry['name']}": entry["videos"] for entry in told if entry["videos"]}
        return {**checkpoints, **videos, **paths}

    def entry(self, stage: ResolvedStage, scores: Mapping[str, Any] | None) -> dict[str, Any]:
        """A stage as pipelines.report takes it."""
        run = stage.config.run_dir
        latest = (run / "checkpoints" / "latest").read_text().strip()
        videos = self.plan.run_dir / "evaluation" / stage.name / "videos"
        return {
            "name": stage.name,
            "steps": stage.config.train.steps,
            "seconds": self.record.seconds.get(stage.name, 0.0),
            "run": run,
            "checkpoint": str(run / "checkpoints" / latest),
            "videos": videos if scores is not None else None,
            "scores": scores,
        }


def _written(file: Path) -> int | None:
    """When a file was written, in nanoseconds; None if it is not there."""
    return file.stat().st_mtime_ns if file.is_file() else None


def in_words(scores: Mapping[str, Any]) -> str:
    """The scores that matter, in one line."""

    def share(key: str) -> str:
        return "-" if scores.get(key) is None else f"{100 * scores[key]:.1f} %"

    distance = scores.get("frechet_distance")
    return (
        f"{scores.get('class_name', 'class')} {share('class_accuracy')}, direction {share('direction_accuracy')}, Fréchet "
        f"{'-' if distance is None else f'{distance:.2f}'} (classifier on held-out: {share('classifier_accuracy')})"
    )
