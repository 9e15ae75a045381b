"""`python -m stdit.training.universal CHECKPOINT OUT`: DeepSpeed's shards made independent of the number of ranks.

A process of its own: DeepSpeed's converter starts others, and all of them must refuse to unpickle anything but data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from stdit.training.checkpoint import CheckpointError


def convert(checkpoint: Path, out: Path) -> None:
    """Writes the universal form of `checkpoint` to `out`. CheckpointError: the converter failed; its last lines follow."""
    command = [sys.executable, "-m", "stdit.training.universal", str(checkpoint), str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise CheckpointError(
            f"{checkpoint}: cannot be converted for another number of ranks\n{(done.stdout + done.stderr)[-2000:]}"
        )


def main(checkpoint: str, out: str) -> None:
    from stdit.training.engine import allow_only_data

    allow_only_data()
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    ds_to_universal(
        SimpleNamespace(
            input_folder=checkpoint,
            output_folder=out,
            # In this process: a worker would not know which classes are data.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # ZeRO-1 and 2 write less than the converter asks for.
            inject_missing_state=True,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
