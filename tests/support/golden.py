"""Golden losses: configs/debug.yaml and every kind of stage in tests/golden/stages.yaml, trained for a few steps.

    python -m tests.support.golden OUT     writes one JSON file per run into OUT; `make golden` rewrites tests/golden/

A refactoring must leave them unchanged: exactly on the machine that wrote them, to 1e-5 relative elsewhere.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = 1e-5


def stages() -> dict[str, dict[str, Any]]:
    """The overrides of each stage, merged over the base."""
    from stdit.config import merge

    content = yaml.safe_load((GOLDEN / "stages.yaml").read_text())
    base = content.pop("base")
    return {name: merge(base, overrides) for name, overrides in content.items()}


def names() -> list[str]:
    return ["debug", *stages()]


def fingerprint() -> dict[str, Any]:
    """What decides the last bit: processor, its vector instructions, torch, threads."""
    import torch

    fields = dict(line.replace("\t", "").split(": ", 1) for line in _lines("/proc/cpuinfo") if ": " in line)
    # Virtual machines name every generation alike ("AMD EPYC"); family and model tell them apart.
    cpu = [fields.get(key, "") for key in ("model name", "cpu family", "model")]
    return {
        "cpu": " ".join(cpu).strip() or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def losses(name: str, folder: Path) -> list[float]:
    """Trains one golden run into `folder`; the loss of each step."""
    from stdit import metrics_log
    from stdit.config import Config, load_config, validate
    from stdit.train import train

    run_dir = folder / name
    if name == "debug":
        config = load_config(ROOT / "configs" / "debug.yaml", Config, [f"run_dir={run_dir}"])
    else:
        data = {**stages()[name], "run_dir": str(run_dir)}
        if "init" in data:
            data["init"] = {**data["init"], "source": str(_base_weights(folder / "base"))}
        config = validate(data, Config, name)
    train(config)
    return [entry["loss"] for entry in metrics_log.read(run_dir / metrics_log.FILE)]


def _base_weights(folder: Path) -> Path:
    """A model without zero-initialised layers, for the stages that start from one."""
    from stdit.config import ModelConfig, validate
    from stdit.models.stdit import STDiT
    from tests.support.models import shaken

    if not folder.is_dir():
        shaken(STDiT.from_settings(validate(stages()["lora"]["model"], ModelConfig, "base"))).save_pretrained(folder)
    return folder


def main() -> int:
    import torch

    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names():
            content = {"machine": fingerprint(), "losses": losses(name, Path(folder))}
            (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
