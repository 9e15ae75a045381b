"""What a rank sends in an optimizer step under ZeRO, and the time that takes: counted, not measured.

DeepSpeed 0.19 with `make_deepspeed_config`, of P trained parameters, w bytes a weight, g a gradient (both 2 in bf16,
else 4):

    stage   gradients                                        weights
    0       all-reduce of g P, once a step                   -
    1       as stage 0                                       all-gather of w P after the step
    2       all-reduce of g P for every micro-batch [1]      as stage 1
    3       reduce-scatter of g P for every micro-batch      all-gather for every forward, and again for backward [2]

[1] of buckets that several ranks' partitions share (`use_multi_rank_bucket_allreduce`, DeepSpeed's default): stage 2
    saves memory, and sends twice what a reduce-scatter would.
[2] Tensors up to `stage3_param_persistence_threshold` (100,000 elements) are gathered once a step. Prefetching holds up
    to `stage3_max_live_parameters` (1e9): so many weights, the last of forward, are still there in backward, and a
    model that is no larger is gathered once. Without prefetching, those are kept that are used again within
    `stage3_max_reuse_distance`. Frozen weights are gathered too. A forward whose modules differ from step to step
    (`train.dynamic`) keeps none.

Not counted: scalars (norms, losses), Muon's exchange of matrices, hpZ and quantized communication
(`zero_hpz_partition_size`, `zero_quantized_*`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stdit.config import TrainConfig
from stdit.training.deepspeed_config import make_deepspeed_config

if TYPE_CHECKING:
    from stdit.models.cost import ParameterSize


@dataclass(frozen=True)
class ZeroTraffic:
    """ZeRO's collectives of one optimizer step: bytes of their whole buffers, and how often each is called."""

    ranks: int
    all_reduced: int = 0
    all_reduces: int = 0
    reduce_scattered: int = 0
    reduce_scatters: int = 0
    all_gathered: int = 0
    all_gathers: int = 0

    @property
    def sent(self) -> int:
        """Bytes that a rank sends, in rings: an all-reduce sends its buffer twice, but for the own part."""
        buffers = 2 * self.all_reduced + self.reduce_scattered + self.all_gathered
        return buffers * (self.ranks - 1) // self.ranks


def zero_traffic(
    parameters: Sequence[ParameterSize], train: TrainConfig, ranks: int, micro_batches: int = 1
) -> ZeroTraffic:
    """Of a step of `micro_batches` on each of `ranks` (data times sequence parallel). parameters: in the order in which
    forward uses them. ConfigError: train.deepspeed cannot be used."""
    if ranks == 1:
        return ZeroTraffic(1)
    trained = sum(p.numel for p in parameters if p.trained)
    config = make_deepspeed_config(train, trained, "cpu")
    zero: dict[str, Any] = config["zero_optimization"]
    weight, gradient = 2 if train.precision == "bf16" else 4, exchanged_size(config, train)
    # Stages 0 and 1 reduce what the micro-batches have summed up.
    reductions = micro_batches if train.zero_stage >= 2 else 1
    reduces = reductions * math.ceil(trained / zero["reduce_bucket_size"])
    if train.zero_stage < 3:
        # DeepSpeed's optimizer for stage 1 in bf16 knows all-reduce alone.
        own_class = train.zero_stage == 0 or (train.zero_stage == 1 and train.precision == "bf16")
        to_owners = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
        gathered = weight * trained if train.zero_stage else 0
        # The weights of each of the optimizer's groups, which are two: with and without weight decay.
        gathers = 2 if train.zero_stage else 0
        reduced = reductions * gradient * trained
        if to_owners and not own_class:
            return ZeroTraffic(ranks, 0, 0, reduced, reduces * ranks, gathered, gathers)
        return ZeroTraffic(ranks, reduced, reduces, 0, 0, gathered, gathers)
    once, forward, again, _, prefetch = gathered_weights(parameters, train, zero, ranks)
    gathers = bool(once) + micro_batches * (math.ceil(forward / prefetch) + math.ceil(again / prefetch))
    gathered = weight * (once + micro_batches * (forward + again))
    if not zero.get("reduce_scatter", True):
        return ZeroTraffic(ranks, reductions * gradient * trained, reduces, 0, 0, gathered, gathers)
    scattered = reductions * gradient * sum(_padded(p.numel, ranks) for p in parameters if p.trained)
    return ZeroTraffic(ranks, 0, 0, scattered, reduces, gathered, gathers)


def exchanged_size(config: dict[str, Any], train: TrainConfig) -> int:
    """Bytes of a gradient as ranks exchange it. config: DeepSpeed's."""
    return {"fp32": 4, "fp16": 2, "bf16": 2}[config.get("communication_data_type") or train.precision]


class GatheredWeights(NamedTuple):
    """Elements that stage 3 gathers once a step, in a forward, and once more in its backward; those that it keeps
    between; those that it fetches together."""

    once: int
    forward: int
    again: int
    kept: int
    prefetch: int

    @property
    def resident(self) -> int:
        """That a rank has whole at once, beside its own part."""
        return self.once + min(self.forward, self.kept)

    @property
    def in_flight(self) -> int:
        """Whose buffer is still there while its weights, which are copies, are used."""
        return min(self.forward, self.prefetch)


def gathered_weights(
    parameters: Sequence[ParameterSize], train: TrainConfig, zero: dict[str, Any], ranks: int
) -> GatheredWeights:
    """By the keys of zero_optimization. parameters: in the order in which forward uses them."""
    persistent = _stage3(zero, "param_persistence_threshold", 100_000)
    # Modules between a weight's use in forward and its next one run forward and backward, recomputed ones forward once
    # more.
    kept = _stage3(zero, "max_reuse_distance", 1_000_000_000) // (3 if train.activation_checkpointing else 2)
    if _stage3(zero, "prefetch_bucket_size", 50_000_000):
        kept = max(kept, _stage3(zero, "max_live_parameters", 1_000_000_000))
    if train.dynamic:
        kept = 0
    once = forward = again = 0
    after = sum(p.numel for p in parameters)
    for numel, _ in parameters:
        after -= numel
        padded = _padded(numel, ranks)
        if numel <= persistent:
            once += padded
            continue
        forward += padded
        if after >= kept:
            again += padded
    prefetch = max(1, _stage3(zero, "prefetch_bucket_size", 50_000_000))
    return GatheredWeights(once, forward, again, kept, prefetch)


def _stage3(zero: dict[str, Any], key: str, default: int) -> int:
    """A key of zero_optimization that DeepSpeed reads under two names."""
    return int(zero.get(f"stage3_{key}", zero.get(key, default)))


def _padded(numel: int, ranks: int) -> int:
    """Elements of a tensor in equal parts for all ranks."""
    return -(-numel // ranks) * ranks


# ------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Interconnect:
    """Links of a cluster, by their makers' figures: bytes a second that a GPU sends within its node, and through its
    own adapter to others."""

    name: str
    gpus_per_node: int
    node_bandwidth: float
    network_bandwidth: float
    # Seconds of a hop within and between nodes, in a ring and in a tree: NCCL's own model of its LL128 protocol
    # (src/graph/tuning.cc, hwLat).
    ring_hop: tuple[float, float] = (1.9e-6, 4.0e-6)
    tree_hop: tuple[float, float] = (1.25e-6, 8.5e-6)

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.gpus_per_node)

    def ring_bandwidth(self, ranks: int) -> float:
        """Bytes a second through each GPU of a ring, whose data enters and leaves a node once, over all its
        adapters."""
        if self.nodes(ranks) == 1:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.gpus_per_node * self.network_bandwidth)

    def zero_seconds(self, traffic: ZeroTraffic) -> float:
        """Of ZeRO's collectives in a step, were nothing computed meanwhile: bytes over bandwidth, and a latency for
        each call."""
        if traffic.ranks == 1:
            return 0.0
        ranks, nodes = traffic.ranks, self.nodes(traffic.ranks)
        ring = (ranks - nodes) * self.ring_hop[0] + (nodes - 1) * self.ring_hop[1]
        tree = 2 * ((min(ranks, self.gpus_per_node) - 1) * self.tree_hop[0] + math.log2(nodes) * self.tree_hop[1])
        latency = (traffic.all_gathers + traffic.reduce_scatters) * ring + traffic.all_reduces * min(tree, 2 * ring)
        return traffic.sent / self.ring_bandwidth(ranks) + latency

    def exchange_seconds(self, sent: int, sequence_parallel: int) -> float:
        """Of sequence parallelism's exchange, of whose bytes all go within a node, if it holds the group."""
        return sent / (self.node_bandwidth if self.nodes(sequence_parallel) == 1 else self.network_bandwidth)


# NVLink 4: 900 GB/s in both directions together (NVIDIA H100 data sheet); ConnectX-7: one 400 Gb/s adapter a GPU (DGX
# H100).
H100 = Interconnect("H100 (NVLink 4, InfiniBand NDR)", 8, 450e9, 50e9)
