"""Memory of one rank in training: what it holds throughout, and what it takes beside in each phase of a step; counted,
not measured.

DeepSpeed 0.19 with `make_deepspeed_config`, of P trained parameters, n ranks, w bytes a weight, b = min(P,
reduce_bucket_size), by default P / 8 within 25 and 500 million (`bucket_size`). Always there:

    stage        weights   optimizer [1]   gradients              buffers
    0            w P       8 P [2]         -                      -
    1            w P       12 P / n        4 P in bf16            -
    2            w P       12 P / n        -                      -
    3            w P / n   12 P / n        4 P / n                gradient bucket: w reduce_bucket_size

[1] float32: AdamW's two moments (Muon has one, but for a few per cent of the weights), and the weights that it steps.
[2] 12 P in bf16. In float32 they are the model's own weights.

A step's phases follow each other, so that the largest counts. Activations are there in the first, and gradients, but
those summed up over several micro-batches, come as activations go:

    stage        reduction of gradients
    0            w P of gradients, and a flat copy of up to 5e8 of them
    1, bf16      2 P of bf16 gradients, a copy in the type that is sent, and a flat one in float32 of several parameter
                 groups
    1, 2         bucket [3], a flat copy of it (w b), this rank's part (4 P / n)
    3            a flat copy of the bucket (w b), this rank's part of it in float32 of bf16 (4 b / n)

[3] w reduce_bucket_size, or twice that with overlap_comm, which is the default on GPUs alone. Stage 1 in float32 keeps
    what is not yet in it: gradients (4 P) and bucket are there together.

Stage 3 also has the weights that forward has gathered (stdit.training.communication), and those in flight once more.

Measured on CPUs (tests/training/test_rank_memory.py), where gloo copies a reduce-scatter's buffer and gathers into a
second one; NCCL does not. Not counted: what one operation needs for its own, fragmentation, Muon's exchange of
matrices, hpZ and quantized communication, and pinned memory. What `train.deepspeed` offloads is not taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stdit.config import TrainConfig
from stdit.training.communication import exchanged_size, gathered_weights
from stdit.training.deepspeed_config import make_deepspeed_config

if TYPE_CHECKING:
    from stdit.models.cost import ParameterSize

# Elements of gradients that DeepSpeed's engine flattens at once without ZeRO's buckets (MEMORY_OPT_ALLREDUCE_SIZE).
FLATTENED = 500_000_000

Bytes = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. resident: throughout, by name. phases: beside that in each phase of a step, by name.

    In the host's memory, not in `total`: building, while the model is built or loaded, beside what the device has of
    it; of rank 0 checkpoint_copy, and full_weights, which it joins from all ranks' parts (and rounds for snapshots)
    while a checkpoint is written.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    checkpoint_copy: int = 0
    full_weights: int = 0
    building: int = 0

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + self.beside(self.peak)

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.beside)

    def beside(self, phase: str) -> int:
        """Bytes of a phase beside what is resident."""
        return sum(self.phases[phase].values())

    @property
    def activations(self) -> int:
        return self.phases[FORWARD]["activations"]

    @property
    def gradients(self) -> int:
        """Those that the optimizer's step takes."""
        return self.resident.get("gradients", 0) or self.phases[STEP]["gradients"]


FORWARD, REDUCTION = "forward and backward", "reduction of gradients"
STEP, EXCHANGE = "optimizer step", "exchange of weights"


def rank_memory(
    parameters: Sequence[ParameterSize],
    train: TrainConfig,
    ranks: int,
    activations: int = 0,
    micro_batches: int = 1,
    device: str = "cuda",
) -> Memory:
    """Of a rank under DeepSpeed: weights, gradients and optimizer state are replicated, or partitioned over `ranks`
    from ZeRO stage 3, 2 and 1 on (Rajbhandari et al. 2020).

    parameters: in the order in which forward uses them; frozen ones are weights alone, and in no checkpoint.
    activations: bytes of the largest micro-batch. micro_batches: of a step. device: "cpu" or "cuda". ConfigError:
    train.deepspeed cannot be used.
    """
    stage, bf16 = train.zero_stage, train.precision == "bf16"
    trained = sum(p.numel for p in parameters if p.trained)
    frozen = sum(p.numel for p in parameters if not p.trained)
    weight = 2 if bf16 else 4

    def share(size: int, cut_from: int) -> int:
        return -(-size // (ranks if stage >= cut_from else 1))

    moments = 4 if train.optimizer.name == "muon" else 8
    master = 4 if bf16 or stage > 0 else 0
    weights, optimizer = share(weight * trained, 3), share((moments + master) * trained, 1)
    average = share(4 * trained * (1 + len(train.ema.widths)), 1)
    # ZeRO-3's shards have the masters alone (stdit.training.saving).
    copied = optimizer + average + (weights if stage < 3 else 0) if copies_checkpoints(train) else 0
    # The weights, then each average; of a profile also its snapshot, in float16.
    joined = (4 * trained if stage and ranks > 1 else 0) + (2 * trained if train.ema.widths else 0)
    # Whole, in float32, and once more those that bfloat16 rounds; ZeRO-3 has one weight at a time, and this rank's
    # parts of those rounded (stdit.training.deferred).
    unrounded = share(4 * trained if bf16 else 0, 3)
    building = unrounded if stage == 3 else 4 * (trained + frozen) + unrounded

    step = _Step(parameters, train, ranks, activations, micro_batches > 1, device)
    stage_1 = step.stage_1_bf16 if bf16 else step.buckets
    resident, phases = (step.without_zero, stage_1, step.buckets, step.stage_3)[stage]()
    resident = {"weights": weights + share(weight * frozen, 3), "optimizer": optimizer, "average": average} | resident
    return Memory(resident, phases, copied, joined, building)


def copies_checkpoints(train: TrainConfig) -> bool:
    """Whether checkpoints are written while training goes on: all but the last one."""
    return train.checkpoint_in_background and (
        train.checkpoint_every is not None or train.optimizer.lr_schedule == "wsd"
    )


class _Step:
    """What a step takes beside weights, optimizer state and averages: (resident, phases) of each of DeepSpeed's
    optimizers."""

    def __init__(
        self,
        parameters: Sequence[ParameterSize],
        train: TrainConfig,
        ranks: int,
        activations: int,
        accumulates: bool,
        device: str,
    ) -> None:
        self.parameters, self.train, self.ranks = parameters, train, ranks
        self.activations, self.accumulates = activations, accumulates
        self.trained = sum(p.numel for p in parameters if p.trained)
        self.part = -(-self.trained // ranks)
        config = make_deepspeed_config(train, self.trained, device)
        self.zero: dict[str, Any] = config["zero_optimization"]
        self.bf16, self.gloo = train.precision == "bf16", device == "cpu"
        # Bytes of a weight, and of a gradient as it is sent.
        self.weight, self.sent = 2 if self.bf16 else 4, exchanged_size(config, train)
        self.bucket = int(self.zero["reduce_bucket_size"])
        self.filled = min(self.trained, self.bucket)
        # Share of activations and gathered weights that is left when the first bucket is full.
        self.left = 1 - self.filled / max(1, self.trained)

    def without_zero(self) -> tuple[Bytes, dict[str, Bytes]]:
        gradients, flat = self.weight * self.trained, min(self.trained, FLATTENED)
        return {}, {
            FORWARD: {"activations": self.activations, "gradients": gradients if self.accumulates else 0},
            REDUCTION: {"gradients": gradients, "flat copy": flat * self.weight + self._converted(flat, self.weight)},
            STEP: {"gradients": gradients, "float32 copies": 4 * self.trained if self.bf16 else 0},
        }

    def stage_1_bf16(self) -> tuple[Bytes, dict[str, Bytes]]:
        rounded = 2 * self.trained
        optimizer = self.train.optimizer
        groups = 1 + bool(optimizer.weight_decay) + (optimizer.name == "muon") + (optimizer.mup is not None)
        # A single tensor needs no copy to be flat, as the first group has it that is larger than what is flattened at
        # once.
        flat = 4 * self.trained if groups > 1 and self.trained <= FLATTENED else 0
        return {"gradients": 4 * self.trained}, {
            FORWARD: {"activations": self.activations, "bf16 gradients": rounded if self.accumulates else 0},
            REDUCTION: {"bf16 gradients": rounded, "flat copy": flat + self._converted(self.trained, 4)},
            STEP: {"bf16 gradients": rounded},
        } | self._exchange({"bf16 gradients": rounded})

    def buckets(self) -> tuple[Bytes, dict[str, Bytes]]:
        """Stage 2, and stage 1 in float32."""
        stage_2, overlaps = self.train.zero_stage == 2, bool(self.zero.get("overlap_comm"))
        several, part = self.bucket < self.trained, 4 * self.part
        bucket = self.weight * self.bucket * (2 if overlaps else 1)
        # In float32 all is one rank's that has no others, and flat as it is.
        flat = self.filled * self.weight if self.ranks > 1 or self.bf16 else 0
        flat += self._converted(self.filled, self.weight)
        # In bf16 the part is there from the first bucket on, in float32 once this rank has something to keep.
        reduction = {"bucket": bucket, "flat copy": flat, "this rank's part": part if several or self.bf16 else 0}
        if stage_2 or overlaps:
            summed = (part if stage_2 else self.weight * self.trained) if self.accumulates else 0
            forward = {"activations": self.activations, "bucket": bucket, "gradients": summed}
            # In bf16 the part is what is summed up, in float32 it is added to that.
            reduction |= {
                "activations": int(self.left * self.activations),
                "gradients": 0 if self.bf16 else summed,
            }
        else:  # all gradients are there before the first is in a bucket
            gradients = self.weight * self.trained
            most = self.activations + gradients if self.accumulates else max(self.activations, gradients)
            forward = {"activations": self.activations, "gradients": most - self.activations, "bucket": bucket}
            reduction["gradients"] = self.weight * max(0, self.trained - 2 * self.filled)
        # The float32 gradients are made flat once more; in bf16 they are.
        update = {"gradients": part, "flat copy": 0 if self.bf16 else part}
        return {}, {FORWARD: forward, REDUCTION: reduction, STEP: update} | self._exchange({})

    def stage_3(self) -> tuple[Bytes, dict[str, Bytes]]:
        gathered = in_flight = 0
        if self.ranks > 1:
            found = gathered_weights(self.parameters, self.train, self.zero, self.ranks)
            gathered, in_flight = self.weight * found.resident, self.weight * found.in_flight
        part = 4 * self.part
        flat = self.filled * self.sent
        converted = -(-4 * self.filled // self.ranks) if self.bf16 else 0
        resident = {"gradients": part, "gradient bucket": self.sent * self.bucket}
        return resident, {
            FORWARD: {"activations": self.activations, "gathered weights": gathered, "in flight": in_flight},
            REDUCTION: {
                "activations": int(self.left * self.activations),
                "gathered weights": int(self.left * gathered),
                "flat copy": flat * (2 if self.gloo else 1),
                "this rank's part": converted,
            },
            STEP: {"gradients": part},
        }

    def _converted(self, elements: int, size: int) -> int:
        """A copy of gradients of `size` bytes in the type that is sent, if it is another one."""
        return elements * self.sent if self.sent != size else 0

    def _exchange(self, beside: Bytes) -> dict[str, Bytes]:
        """The weights that gloo gathers into a buffer of its own."""
        if not self.gloo or self.ranks == 1:
            return {}
        return {EXCHANGE: beside | {"gathered weights": self.weight * self.trained}}
