"""`python -m stdit.training.universal CHECKPOINT OUT`: converts a checkpoint to DeepSpeed's universal format, which any
number of ranks can load.

Runs in its own process: DeepSpeed's converter starts workers, and all must unpickle data only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from stdit.training.checkpoint import CheckpointError
from stdit.training.stopping import die_with_parent


def convert(checkpoint: Path, out: Path) -> None:
    """Writes `checkpoint` in universal format to `out`. CheckpointError: the converter failed, with its last lines."""
    command = [sys.executable, "-m", "stdit.training.universal", str(checkpoint), str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        raise CheckpointError(
            f"{checkpoint}: cannot be converted for another number of ranks\n{(done.stdout + done.stderr)[-2000:]}"
        )


def main(checkpoint: str, out: str) -> None:
    from stdit.training.engine import restrict_unpickling

    restrict_unpickling()
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    ds_to_universal(
        SimpleNamespace(
            input_folder=checkpoint,
            output_folder=out,
            # In this process: workers would not restrict unpickling.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # ZeRO-1 and 2 do not write all that the converter requires.
            inject_missing_state=True,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
