"""Generates docs/scaling.md: memory, bytes and time of a step on 8 to 1,024 GPUs, by the functions of the forecast.

    python -m pipelines.scaling            writes it (`make docs`)

Its tables and the figures in its text are computed; the rest of the text is below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stdit.config import ModelConfig, TrainConfig, token_grid
from stdit.console import echo
from stdit.files import atomic_write

if TYPE_CHECKING:
    from stdit.models.cost import ModelCost, ParameterSize
    from stdit.training.communication import Interconnect, ZeroTraffic

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/scaling.md")

GPUS, DEGREES, STAGES = (8, 64, 256, 1024), (1, 4, 8), (1, 2, 3)
MODELS = {
    "STDiT-XL/2": {"size": "XL", "num_heads": 18},
    "3 B": {"hidden_size": 2304, "depth": 28, "num_heads": 18},
    "11 B": {"hidden_size": 4096, "depth": 32, "num_heads": 32},
}
COMMON = {"in_channels": 16, "patch_size": (1, 2, 2), "text_dim": 4096, "qk_norm": "rms", "positions": "rope"}
# 65 frames of 720 x 1280 behind an autoencoder of 4 x 8 x 8, and the tokens of a caption.
LATENT, TEXT = (17, 90, 160), 120
# Share of the peak FLOP/s that a step reaches while it computes, and the memory of a GPU that tensors may take.
MFU, MEMORY = 0.4, 72 * 2**30


@dataclass(frozen=True)
class Step:
    """A step of one clip for every `degree` of `gpus`, under each ZeRO stage: bytes of a rank, and seconds."""

    gpus: int
    degree: int
    memory: list[int]
    traffic: list[ZeroTraffic]
    exchanged: int
    compute: float
    exchange: list[float]


class Scaling:
    """Steps of one model."""

    def __init__(self, settings: dict[str, object]) -> None:
        from stdit.models.cost import model_cost, parameter_sizes

        self.model = ModelConfig.model_validate(COMMON | settings)
        self.sizes: list[ParameterSize] = parameter_sizes(self.model, self.train(1))
        grid = token_grid(LATENT, self.model.patch_size, "latent", False)
        self.costs: dict[int, ModelCost] = {n: model_cost(self.model, grid, TEXT, 2, 1, n) for n in DEGREES}

    @staticmethod
    def train(stage: int) -> TrainConfig:
        return TrainConfig(steps=1, precision="bf16", zero_stage=stage, activation_checkpointing=True)  # pyright: ignore

    @property
    def parameters(self) -> int:
        return self.costs[1].parameters

    @property
    def flops_per_token(self) -> float:
        return self.costs[1].training_flops / self.costs[1].tokens

    def traffic(self, gpus: int, stage: int) -> ZeroTraffic:
        from stdit.training.communication import zero_traffic

        return zero_traffic(self.sizes, self.train(stage), gpus)

    def step(self, gpus: int, degree: int, links: Interconnect) -> Step:
        from stdit.training.rank_memory import rank_memory

        cost, traffic = self.costs[degree], [self.traffic(gpus, stage) for stage in STAGES]
        saved = cost.activation_bytes_checkpointed
        memory = [rank_memory(self.sizes, self.train(stage), gpus, saved).total for stage in STAGES]
        exchanged = cost.exchanged_bytes_checkpointed
        compute = cost.training_flops / (peak_flops() * MFU)
        between = links.exchange_seconds(exchanged, degree)
        return Step(
            gpus, degree, memory, traffic, exchanged, compute, [links.zero_seconds(t) + between for t in traffic]
        )

    def tokens_needed(self, gpus: int, stage: int, links: Interconnect, share: float = 0.1) -> float:
        """Tokens of a GPU's step with which ZeRO's exchange takes `share` of the computing time."""
        return links.zero_seconds(self.traffic(gpus, stage)) / share * peak_flops() * MFU / self.flops_per_token


def peak_flops() -> float:
    from stdit.training.performance import PEAK_TFLOPS

    return PEAK_TFLOPS["H100"][0] * 1e12


def markdown() -> str:
    """The text of docs/scaling.md."""
    from stdit.training.communication import H100, Interconnect

    ethernet = Interconnect("100 Gb/s Ethernet", H100.gpus_per_node, H100.node_bandwidth, 12.5e9 / H100.gpus_per_node)
    models = {name: Scaling(settings) for name, settings in MODELS.items()}
    lines = [HEAD.format(ring=H100.ring_bandwidth(16) / 1e9, mfu=MFU, peak=peak_flops() / 1e12), CLIPS]
    for name, scaling in models.items():
        flops = scaling.costs[1].training_flops
        lines += [
            f"### {name}: {scaling.parameters / 1e9:.2f} B parameters, {flops / 1e15:.2f} PFLOPs a clip",
            "",
            "| GPUs | sp | memory, GiB | a rank sends in a step, GB | to other nodes, GB a GPU | computing, s | exchange / computing, % |",
            "|---|---|---|---|---|---|---|",
        ]
        for gpus in GPUS:
            lines += [_row(scaling.step(gpus, degree, H100), H100) for degree in DEGREES]
        lines.append("")
    lines += [TOKENS]
    for name, scaling in models.items():
        for gpus in (8, 64, 1024):
            cells = [
                " / ".join(f"{scaling.tokens_needed(gpus, stage, links) / 1000:,.0f}" for stage in STAGES)
                for links in (H100, ethernet)
            ]
            lines.append(f"| {name} | {gpus:,} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _limits(models, H100, ethernet)])


def _limits(models: dict[str, Scaling], links: Interconnect, slow: Interconnect) -> str:
    """Where each breaks, with the figures of the largest model and cluster. slow: links of a cheaper network."""
    name, large = next(reversed(models.items()))
    gpus = GPUS[-1]
    gathers, traffic = large.traffic(gpus, 3).all_gathers, {stage: large.traffic(gpus, stage) for stage in STAGES}
    seconds = {stage: links.zero_seconds(traffic[stage]) for stage in STAGES}
    bandwidth = traffic[3].sent / links.ring_bandwidth(gpus)
    shared = large.step(8, 8, links)
    within, across = (links.exchange_seconds(shared.exchanged, n) / shared.compute for n in (8, 16))
    long_clip = large.step(64, 1, slow)
    return LIMITS.format(
        name=name, gpus=gpus, gathers=gathers, zero3=seconds[3], latency=1 - bandwidth / seconds[3], zero1=seconds[1],
        within=within, across=across, ethernet=long_clip.exchange[0] / long_clip.compute,
    )  # fmt: skip


def _row(step: Step, links: Interconnect) -> str:
    memory = " / ".join(f"{m / 2**30:.0f}" if m <= MEMORY else f"({m / 2**30:.0f})" for m in step.memory)
    sent = " / ".join(f"{t.sent / 1e9:.1f}" for t in step.traffic) + (
        f" + {step.exchanged / 1e9:.1f}" if step.exchanged else ""
    )
    across = links.nodes(step.gpus) > 1
    outside = " / ".join(f"{t.sent / links.gpus_per_node / 1e9:.1f}" for t in step.traffic) if across else "0"
    shares = " / ".join(f"{100 * seconds / step.compute:.1f}" for seconds in step.exchange)
    return f"| {step.gpus:,} | {step.degree} | {memory} | {sent} | {outside} | {step.compute:.1f} | {shares} |"


HEAD = """# Scaling, on paper

Generated from the code by `make docs` (`python -m pipelines.scaling`); do not edit. **An estimate: nothing here was measured on
GPUs.** Bytes and memory are those of `stdit forecast`. Bytes were counted against DeepSpeed's own collectives, and memory compared with
what two ranks allocate on a CPU (tests/training/test_communication.py, test_rank_memory.py). Seconds are bytes over the makers' bandwidths, and
will be longer.

## What is sent

DeepSpeed 0.19, bf16, P trained parameters, n ranks (data times sequence parallel), A micro-batches a step. A rank sends, in rings, times
(n - 1) / n:

| ZeRO | gradients | weights | together, A = 1 |
|---|---|---|---|
| 0 | all-reduce: 4 P | | 4 P |
| 1 | all-reduce: 4 P | all-gather after the step: 2 P | 6 P |
| 2 | all-reduce [1]: 4 P A | as ZeRO-1: 2 P | 6 P |
| 3 | reduce-scatter: 2 P A | all-gather in forward, and in backward of what was dropped since [2]: 2 P A to 4 P A | 4 P to 6 P |

[1] The paper has a reduce-scatter, 2 P A. DeepSpeed's default `use_multi_rank_bucket_allreduce` all-reduces buckets, of which each rank
keeps its part: ZeRO-2 saves memory and no bandwidth.
[2] Prefetching holds up to 1e9 parameters, 2 GB (`stage3_max_live_parameters`): a smaller model is gathered once. The
tables' memory has them, and the buckets and copies of gradients by which ZeRO exchanges them (an eighth of the model, 25 to 500 million elements).

In float32 all are twice as much. EMA, gradient norm and losses send nothing or scalars. Sequence parallelism adds the exchange of
[cluster.md](cluster.md#sequence-parallelism), within its group of sp neighbouring ranks.

## Assumptions

* Nodes of 8 H100. NVLink 4: 450 GB/s in each direction ([900 GB/s in both](https://www.nvidia.com/en-us/data-center/h100/)). InfiniBand NDR: one
  400 Gb/s adapter a GPU, 50 GB/s
  ([DGX H100](https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html)).
  A ring over several nodes leaves each through all its adapters: {ring:.0f} GB/s.
* Latency of a call: (GPUs - nodes) hops of 1.9 µs and (nodes - 1) of 4 µs in a ring, less in all-reduce's tree, as
  [NCCL's model](https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc) has it. ZeRO-3 gathers up to 50 M parameters in one call.
* Computing: the FLOPs of `stdit summary` at {mfu:.0%} of {peak:.0f} TFLOP/s.
* No overlap. DeepSpeed sends gradients while backward computes and prefetches weights, so that part of ZeRO's time is hidden;
  sequence parallelism's exchange is not.
"""
CLIPS = """## Long clips: one of 65 frames, 720 x 1280, for each group of sp GPUs

61,200 tokens (latents 17 x 90 x 160, patches 1 x 2 x 2), captions of 120, `factorized` attention, bf16, AdamW, EMA, activation checkpointing, no
accumulation: GPUs / sp clips a step. Cells with two slashes are ZeRO-1 / 2 / 3; "+" is sequence parallelism's part; memory in
brackets is above the 72 GiB that an 80 GB GPU leaves to tensors.
"""
TOKENS = """## Short steps: tokens that a GPU needs

What a step computes shrinks with its samples, what ZeRO sends does not. Thousands of tokens that one GPU has to process in a step for ZeRO's
exchange to take 10 % of the computing time, for ZeRO-1 / 2 / 3 (of ZeRO-2 and 3 in every micro-batch). A 256 x 256 image has 256 tokens:

| model | GPUs | NVLink and InfiniBand NDR | one 100 Gb/s Ethernet adapter a node |
|---|---|---|---|"""
LIMITS = """## Where each breaks

* **ZeRO-1** by memory: gradients (4 bytes a parameter) and bf16 weights stay whole on every GPU, 6 bytes a parameter, whatever their number.
* **ZeRO-2** by accumulation: it sends 4 P more for every micro-batch, ZeRO-1 does not. Prefer ZeRO-1 with accumulation where it fits; without, they send alike.
* **ZeRO-3** by latency. {name} on {gpus:,} GPUs takes {gathers:.0f} all-gathers a step, each a ring of {gpus:,} hops: {zero3:.2f} s, of which {latency:.0%}
  is latency, where ZeRO-1's few calls take {zero1:.2f} s. Fewer, larger calls (`stage3_prefetch_bucket_size: 5e8` in `train.deepspeed`) or
  ZeRO-1 with sequence parallelism go further. It is the stage for what does not fit otherwise, on few nodes.
* **Sequence parallelism** by the node's edge, and by frames and patches. Of {name}, sp 8 exchanges {within:.1%} of the computing time over NVLink; groups of
  more than 8 GPUs would do it over one adapter each, {across:.0%}. It divides activations alone: what is in the way at sp 1 must not be weights. Each
  rank needs a frame: 17 latent frames are not shared out evenly over 8 ranks, so that the largest share is 3 of 17.
* **Data parallelism** by the batch: GPUs / sp clips a step at least. With a `global_batch` of 256, 1,024 GPUs need sp 4.
* **Short steps** (images, small batches) before all of these: see the table. With one Ethernet adapter a node even the long clip of {name}, on
  64 GPUs under ZeRO-1 with sp 1, exchanges for {ethernet:.0%} of its computing time; accumulation divides that.
"""


def main() -> None:
    atomic_write(ROOT / PAGE, markdown())
    echo(PAGE)


if __name__ == "__main__":
    main()
