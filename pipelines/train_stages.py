"""Runs a training plan from clips to report: prepare, curate, extract, train stage by stage, generate, evaluate.

    python -m pipelines.train_stages --plan configs/plans/demo.yaml
    python -m pipelines.train_stages --plan … --set run_dir=/shared/x --set stages.clips.overrides.train.steps=500
    python -m pipelines.train_stages --plan … --forecast

Run the same command again: finished parts are skipped, unfinished ones resumed. If the plan has changed, the command
lists the invalid results and stops; with --allow-changes they are moved to RUN_DIR/replaced and recomputed.
Exit code 0: done; 1: a part failed; 2: invalid plan or input; 75: stopped, with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pipelines import checks, curate_clips, job, workers
from pipelines import plan as plans
from pipelines.child import Terminated
from pipelines.record import lock_run_dir
from pipelines.report import OUTPUTS
from pipelines.runner import PlanFailed, PlanRunner
from stdit.console import echo
from stdit.errors import CheckpointError, exit_code
from stdit.outputs import check_outputs, claim_outputs

COMMAND = "train-stages"
STOPPED = 75  # stdit.training.stopping.STOPPED.


def run_plan(
    path: Path, overrides: Sequence[str] = (), *, allow_changes: bool = False, only_forecast: bool = False
) -> dict[str, Path]:
    """Runs the plan in `path`; the paths of its results (none for a forecast).

    ConfigError and other ValueErrors: invalid input, found before long work. StageFailed, PlanFailed, StageStopped.
    """
    checkout = job.go_to_checkout(path)
    plan = plans.read(path, overrides)
    if job.in_packaged_job() and checkout is None:
        outs = {one.key("extraction.out"): one.extract.out for one in plan.feature_sets.values()}
        job.require_absolute_paths({"run_dir": plan.run_dir, **outs})
    resolved = plans.resolve(plan, str(path))
    if not only_forecast:
        check_outputs(plan.run_dir, COMMAND, OUTPUTS)
    for one in plan.feature_sets.values():
        if one.curate and not one.prepare and not only_forecast and not one.extract.has_manifest:
            # First: stages may leave out what follows from its manifest.
            curate_clips.curate_footage(one.curate)
    stages = checks.complete(plan, resolved)
    checks.check_early(plan, stages)
    if plan.reference.extract.has_manifest:
        checks.check_validation_split(plan, stages)
    if only_forecast:
        echo("\n".join(checks.forecast_lines(plan, stages)), flush=True)
        return {}
    checks.check_manifests(plan)
    with lock_run_dir(plan.run_dir):
        claim_outputs(plan.run_dir, COMMAND, OUTPUTS)
        runner = PlanRunner(plan, stages, str(path), allow_changes)
        if checkout is not None:
            runner.clock.say(f"results go to the checkout {checkout}, not to this job's copy of it")
        runner.clock.say(f"plan {plan.name}: {' -> '.join(stage.name for stage in stages)}, in {plan.run_dir}")
        try:
            return runner.run()
        finally:
            if "ray" in sys.modules:
                workers.disconnect()


def arguments(prog: str = "pipelines.train_stages") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True, help="a file of configs/plans/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as run_dir=runs/x"
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="move results that a changed plan invalidates to RUN_DIR/replaced, and recompute them",
    )
    parser.add_argument(
        "--forecast", "--dry-run", action="store_true", help="print the cost of the plan, and start nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        paths = run_plan(args.plan, args.set, allow_changes=args.allow_changes, only_forecast=args.forecast)
    except workers.StageStopped as stopped:
        echo(stopped, file=sys.stderr)
        return STOPPED
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, RuntimeError) and not isinstance(
            error, workers.StageFailed | PlanFailed | CheckpointError
        ):
            echo(traceback.format_exc(), file=sys.stderr)
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except Terminated as signal:
        echo(f"ended by {signal}; run the same command again to resume", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        echo("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return 130
    if paths:
        width = max(map(len, paths))
        echo("\n".join(f"{name:<{width}}  {path}" for name, path in paths.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
