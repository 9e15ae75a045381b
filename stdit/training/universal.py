"""`python -m stdit.training.universal CHECKPOINT OUT`: converts a checkpoint to DeepSpeed's universal format, which any
number of ranks can load, and `open_states` any ZeRO stage.

Runs in its own process: DeepSpeed's converter starts workers, and all must unpickle data only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stdit.errors import CheckpointError
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
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    if done.returncode:
        raise CheckpointError(
            f"{checkpoint}: cannot be converted for another number of ranks or ZeRO stage\n{(done.stdout + done.stderr)[-2000:]}"
        )


# Of each weight in a universal checkpoint: float32 master and Adam's moments.
STATES = ("fp32", "exp_avg", "exp_avg_sq")


class States(Mapping[str, dict[str, Tensor]]):
    """Full weights and optimizer state of a checkpoint, by the weight's name and then STATES, flat; read one weight at
    a time.

    step: the optimizer's. CheckpointError: one is missing.
    """

    def __init__(self, checkpoint: Path, names: Sequence[str], step: float) -> None:
        self.checkpoint, self.names, self.step = checkpoint, names, step

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        found = {}
        for state in STATES:
            path = self.checkpoint / "zero" / name / f"{state}.pt"
            if not path.is_file():
                raise CheckpointError(f"{self.checkpoint}: holds no {state} of {name}")
            content = _load(path)
            # Of stages 1 and 2 in a dict, of stage 3 alone.
            found[state] = (content["param"] if isinstance(content, dict) else content).flatten()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class UnpartitionedStates(States):
    """The same of a checkpoint without ZeRO (stage 0), from its one shard."""

    def __init__(self, checkpoint: Path, names: Sequence[str]) -> None:
        content = _load(checkpoint / "mp_rank_00_model_states.pt")
        optimizer = content["optimizer"]
        if "fp32_groups" in optimizer:  # bfloat16
            self._masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
            self._moments = optimizer["optimizer_state_dict"]["state"]
        else:
            self._masters = [content["module"][name] for name in names]
            self._moments = optimizer["state"]
        if len(self._masters) != len(names):
            raise CheckpointError(f"{checkpoint}: holds {len(self._masters)} weights, this model has {len(names)}")
        self._numbers = {name: number for number, name in enumerate(names)}
        super().__init__(checkpoint, names, _step(self._moments))

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        number = self._numbers[name]
        master = self._masters[number].detach()
        # A weight that never had a gradient has no moments.
        moments = self._moments.get(number, {})
        found = {state: moments.get(state, torch.zeros(()).expand(master.shape)) for state in STATES[1:]}
        return {"fp32": master.flatten(), **{state: tensor.flatten() for state, tensor in found.items()}}


def open_states(checkpoint: Path, converted: Path | None, names: Sequence[str]) -> States:
    """Weights and optimizer state in `checkpoint`. converted: its universal form; None: it was saved without ZeRO.
    names: of the weights, in the order of the optimizer's groups."""
    if converted is None:
        return UnpartitionedStates(checkpoint, names)
    optimizer = _load(min(checkpoint.glob("*zero_pp_rank_0*optim_states.pt")))["optimizer_state_dict"]
    inner = (
        optimizer["base_optimizer_state"] if "base_optimizer_state" in optimizer else optimizer["optimizer_state_dict"]
    )
    return States(converted, names, _step(inner["state"]))


def _step(states: Mapping[Any, Mapping[str, Any]]) -> float:
    """The optimizer's step, the same of all its weights; 0 before the first."""
    return max((float(state["step"]) for state in states.values() if "step" in state), default=0.0)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


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
