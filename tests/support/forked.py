"""Processes forked from one that has imported torch, DeepSpeed and diffusers: their imports cost seconds at every
start."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.support.paths import ROOT

IMPORTED = ["deepspeed", "stdit.training.engine", "stdit.training.resume", "stdit.training.validation"]


def context() -> ForkServerContext:
    """Starts processes by the fork server of this test worker, which ends with it."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def run(
    module: str, *arguments: object, env: dict[str, str] | None = None, timeout_s: float = 280
) -> subprocess.CompletedProcess[str]:
    """`module`'s main(), as `python -m module arguments` in the repository's folder. TimeoutError: it was ended."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context().Process(
            target=_main, args=(module, given, dict(os.environ if env is None else env), outputs)
        )
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{module} has not ended after {timeout_s} s: {outputs[1].read_text()}")
        return subprocess.CompletedProcess([module, *given], process.exitcode, *(path.read_text() for path in outputs))


def _main(module: str, arguments: list[str], env: dict[str, str], outputs: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())
