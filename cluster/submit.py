"""Sends a plan to a running Ray cluster as a job, and follows it.

    python -m cluster.submit --plan configs/plans/demo.yaml --set run_dir=/shared/runs/demo
    python -m cluster.submit --address http://127.0.0.1:8265 --env WANDB_API_KEY --plan … --no-wait

The job server stays on the head's loopback; reach it from elsewhere with `ssh -L 8265:127.0.0.1:8265 HEAD`,
`ray dashboard cluster/ray/aws.yaml` or `kubectl port-forward` (docs/cluster.md says why).
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipelines import plan as plans
from stdit.config import ConfigError

# Uploads with the working directory would be slow and useless; .gitignore is honoured besides.
EXCLUDES = (".venv", "runs", "tests")

_NO_AGENT = "No available agent"
_NO_AGENT_MEANS = (
    "Another Ray on that machine, or what a killed one left behind, may hold port 52365: end it, or give "
    "`ray start --dashboard-agent-listen-port` another"
)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", required=True, type=Path, help="a file of configs/plans/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in train_stages")
    parser.add_argument("--allow-changes", action="store_true", help="passed on to train_stages")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the cluster's job server (%(default)s)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for every worker")
    parser.add_argument("--job-id", help="a name of your own; the server makes one up otherwise")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    return parser


def is_loopback(address: str) -> bool:
    """Whether an http address means this machine."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray would find an authentication token: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token").is_file()


def variables(given: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """`--env NAME=VALUE`, or `--env NAME` for the value that NAME has here. ConfigError: NAME is not set."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or (not equals and name not in environ):
            raise ConfigError(f"--env {text}: {name or 'the name'} is not set here; give --env NAME=VALUE")
        found[name] = value if equals else environ[name]
    return found


def check(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """ConfigError for what would only fail, or be lost, on the cluster."""
    plan = plans.read(args.plan, args.set)
    plans.resolve(plan, str(args.plan))
    if args.plan.is_absolute():
        raise ConfigError(f"--plan {args.plan}: give it relative to the checkout, which travels with the job")
    if is_loopback(args.address):
        return
    if not has_token(environ):
        raise ConfigError(
            f"--address {args.address} is not this machine, and there is no Ray token: whoever reaches a job server "
            "without one can run any command there. Set one up (docs/cluster.md), or tunnel to its loopback"
        )
    outputs = {"run_dir": plan.run_dir, "extraction.out": plan.extract.out}
    relative = [f"{key} {path}" for key, path in outputs.items() if not path.is_absolute()]
    if relative:
        raise ConfigError(
            f"{', '.join(relative)}: a job runs in a copy of the checkout that Ray deletes; give folders that "
            "every node sees, such as --set run_dir=/shared/runs/demo"
        )


def entrypoint(args: argparse.Namespace) -> str:
    """The job's shell command."""
    command = ["python", "-m", "pipelines.train_stages", "--plan", str(args.plan)]
    for text in args.set:
        command += ["--set", text]
    if args.allow_changes:
        command.append("--allow-changes")
    return shlex.join(command)


def submit(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Sends the job and, unless told not to, follows its output to the end. Returns the exit code."""
    if has_token(environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # It tells of every .gitignore that it heeds.
    try:
        client = JobSubmissionClient(args.address)
    except (ConnectionError, RuntimeError) as error:
        print(f"no Ray job server at {args.address} ({error}); is the cluster up, the tunnel open?", file=sys.stderr)
        return 2
    runtime_env = {
        "working_dir": ".",
        "excludes": list(EXCLUDES),
        "env_vars": variables(args.env, environ),
    }
    try:
        job = _send(
            lambda: client.submit_job(entrypoint=entrypoint(args), runtime_env=runtime_env, submission_id=args.job_id)
        )
    except RuntimeError as error:
        print(f"the job server at {args.address} did not take the job: {error}", file=sys.stderr)
        if _NO_AGENT in str(error):
            print(_NO_AGENT_MEANS, file=sys.stderr)
        return 2
    stop = f"ray job stop --address {args.address} {job}"
    print(f"job {job}: {entrypoint(args)}\n  to stop it: {stop}", flush=True)
    if args.no_wait:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nno longer following job {job}, which goes on; to stop it: {stop}", file=sys.stderr)
        return 130
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"job {job}: {info.status}: {info.message}", file=sys.stderr)
    return 1


def _send(submit_job: Callable[[], str], patience_s: float = 60.0) -> str:
    """The job's id. A cluster that has just started takes some seconds until its agent takes jobs."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return submit_job()
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > until:
                raise
            time.sleep(2)


async def _follow(client: object, job: str) -> None:
    async for lines in client.tail_job_logs(job):  # type: ignore[attr-defined]
        print(lines, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        check(args, os.environ)
        return submit(args, os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
