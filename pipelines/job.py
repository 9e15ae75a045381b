"""Inside a Ray job: a run directory that outlives the job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from stdit.config import ConfigError, Url


def go_to_checkout(plan: Path) -> Path | None:
    """In a Ray job submitted with `--working-dir`: changes into the checkout that it was submitted from.

    Such a job runs in a copy that Ray deletes, and a relative run_dir with it. If the folder in which `ray start` was
    run on this machine holds an identical plan file, it is the checkout, and paths are relative to it. Returns that
    folder; None outside a job, or without such a plan (the caller must then require absolute paths).
    """
    if not in_packaged_job():
        return None
    folder = _raylet_directory()
    if folder is None or plan.is_absolute():
        return None
    original = folder / plan
    if not original.is_file() or original.read_bytes() != plan.read_bytes():
        return None
    os.chdir(folder)
    return folder


def in_packaged_job() -> bool:
    """True in the driver of a Ray job whose working directory is a copy made by `--working-dir`."""
    return '"working_dir"' in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")


def _raylet_directory() -> Path | None:
    """The working directory of the raylet above this process, in which `ray start` was run."""
    import psutil

    process: psutil.Process | None = psutil.Process()
    while process is not None:
        try:
            if process.name() == "raylet":
                return Path(process.cwd())
        except psutil.Error:  # Another user's process.
            return None
        process = process.parent()
    return None


def require_absolute_paths(paths: Mapping[str, Path | Url]) -> None:
    """ConfigError naming the keys whose relative paths would be lost with a job's copy of the working directory."""
    relative = [f"{key} {path}" for key, path in paths.items() if isinstance(path, Path) and not path.is_absolute()]
    if relative:
        raise ConfigError(
            f"this Ray job runs in a copy of its --working-dir, which Ray deletes ({Path.cwd()}); relative results "
            f"would be lost: {', '.join(relative)}. Run `ray start` in the checkout, or set folders that every node "
            "sees, such as --set run_dir=/shared/runs/demo"
        )
