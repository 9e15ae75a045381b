"""Speed of a training run: seconds of each section of a step, throughput, FLOPs, MFU, memory; profiler traces.

performance = Performance(config, ranks, data, clips)
for data_step in performance.waiting(loader):          # waiting for data is a section
    with performance.section("forward"):
        ...
    performance.count(data_step)
    metrics |= performance.metrics(step, samples_seen)  # at a logged step: means since the last one
print(performance.summary())
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from stdit.config import Bucket, Config, ModelConfig, token_grid
from stdit.data.loader import Batch, Step
from stdit.training.distributed import Ranks

if TYPE_CHECKING:
    from stdit.training.data import TrainData

SECTIONS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "validation", "checkpoint")
# What ranks exchange: under ZeRO within the sections (stdit.training.exchange), and at the end of a step.
EXCHANGE = "exchange"
# Not part of a step's throughput.
PAUSES = ("validation", "checkpoint")
# Dense bfloat16 (first) and TF32 TFLOP/s by the makers' data sheets, without sparsity. Longer names come first.
PEAK_TFLOPS = {
    "B200": (2250, 1125),
    "H200": (989, 494.5),
    "H100 NVL": (835, 417.5),
    "H100 PCIe": (756, 378),
    "H100": (989, 494.5),
    "A100": (312, 156),
    "A10G": (70, 35),
    "A40": (149.7, 74.8),
    "L40S": (362, 183),
    "L4": (121, 60),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
}
# A rank is slow if data and forward take it this many times the median's seconds.
STRAGGLER = 1.5


class Performance:
    """Measures one rank; `metrics` compares ranks and is called by all of them. clips: number of training clips, for
    the epoch."""

    def __init__(self, config: Config, ranks: Ranks, data: TrainData, clips: int) -> None:
        self.config, self.ranks, self.data, self._clips = config, ranks, data, clips
        self._totals = dict.fromkeys((*SECTIONS, EXCHANGE), 0.0)
        self._recent = dict.fromkeys((*SECTIONS, EXCHANGE), 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._costs: dict[str, tuple[int, int]] = {}
        # Seconds in which checkpoints were written while training went on, and those of them that are logged.
        self._written = self._written_logged = 0.0
        self._steps = self._samples = self._tokens = self._flops = self._all_steps = 0
        self._imbalance, self._useful, self._processed = 0.0, 0.0, 0
        self._begin = self._last = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times a part of the step, by CUDA events where there is a GPU, without waiting for it; labels it in
        traces."""
        with torch.profiler.record_function(name):
            if self.ranks.device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                yield
                last.record()
                self._events.append((name, first, last))
            else:
                start = time.perf_counter()
                yield
                self._recent[name] += time.perf_counter() - start

    def waiting(self, items: Iterable[Step]) -> Iterator[Step]:
        """`items`, with the time until each comes counted as the section "data"."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._recent["data"] += time.perf_counter() - start
            yield item

    def count(self, step: Step) -> None:
        """Adds the samples, tokens and FLOPs of a step (of all ranks)."""
        self._steps += 1
        self._samples += step.samples
        for key, samples in step.samples_by_bucket.items():
            tokens, flops = self._cost(Bucket.parse(key)) if self.ranks.is_main else (0, 0)
            self._tokens += samples * tokens
            self._flops += samples * flops
        self._imbalance = max(self._imbalance, step.imbalance)
        for part in step.parts:
            useful, processed = useful_tokens(part, self.config.model)
            self._useful += useful
            self._processed += processed

    def count_save(self, background_seconds: float) -> None:
        """Takes the seconds that this rank has written checkpoints in the background, in all. Training's own wait is
        section "checkpoint"."""
        self._written = background_seconds

    def metrics(self, step: int, samples_seen: int) -> dict[str, float]:
        """Means since the last call. Collective: ranks compare their times; a slow one is in "slow_rank"."""
        if self._events:
            torch.cuda.synchronize(self.ranks.device)
            for name, first, last in self._events:
                self._recent[name] += first.elapsed_time(last) / 1000
            self._events.clear()
        now = time.perf_counter()
        seconds = now - self._last
        training = max(seconds - sum(self._recent[name] for name in PAUSES), 1e-9)
        steps = max(self._steps, 1)
        self._all_steps += self._steps
        values: dict[str, float] = {
            "samples_per_second": self._samples / training,
            "tokens_per_second": self._tokens / training,
            "tokens_per_step": self._tokens / steps,
            "rank_imbalance": self._imbalance,
            "tflops_per_second": self._flops / training / 1e12,
            "mfu": self._flops / training / (self.peak_flops * self.ranks.size) if self.ranks.is_main else 0.0,
            "memory_gib": peak_memory(self.ranks.device) / 2**30,
            "epoch": samples_seen / max(1, self._clips),
            "hours_left": (self.config.train.steps - step) * (now - self._begin) / max(1, self._all_steps) / 3600,
        }
        for name in SECTIONS:
            if name not in PAUSES:
                values[f"seconds_{name}"] = self._recent[name] / steps
            elif self._recent[name] > 1e-3:
                values[f"seconds_{name}"] = self._recent[name]
        if self.ranks.size > 1:
            values["seconds_exchange"] = self._recent[EXCHANGE] / steps
        if self._written > self._written_logged:
            values["seconds_checkpoint_written"] = self._written - self._written_logged
            self._written_logged = self._written
        mine = (self._recent["data"] + self._recent["forward"]) / steps
        gathered = self.ranks.gather((mine, self._useful, self._processed))
        everyone = [seconds for seconds, _, _ in gathered]
        values["useful_tokens"] = sum(useful for _, useful, _ in gathered) / max(
            1, sum(processed for _, _, processed in gathered)
        )
        slowest = max(range(len(everyone)), key=everyone.__getitem__)
        if len(everyone) > 1 and everyone[slowest] > STRAGGLER * statistics.median_low(everyone) + 0.01:
            values |= {"slow_rank": slowest, "slow_rank_seconds": everyone[slowest]}
        for name in self._recent:
            self._totals[name] += self._recent[name]
            self._recent[name] = 0.0
        self._steps = self._samples = self._tokens = self._flops = 0
        self._imbalance, self._useful, self._processed = 0.0, 0.0, 0
        self._last = now
        return {name: float(f"{value:.6g}") for name, value in values.items()}

    def summary(self) -> str:
        """Where the time went, in seconds and per cent."""
        total = max(time.perf_counter() - self._begin, 1e-9)
        parts = {name: self._totals[name] + self._recent[name] for name in SECTIONS}
        parts["other"] = max(0.0, total - sum(parts.values()))
        shown = [f"{name} {value:.1f} s ({value / total:.0%})" for name, value in parts.items() if value >= 0.05]
        line = f"time: {total:.1f} s: " + ", ".join(shown)
        if (exchange := self._totals[EXCHANGE] + self._recent[EXCHANGE]) >= 0.05:
            line += f"; of these {exchange:.1f} s ({exchange / total:.0%}) in exchange between ranks"
        return f"{line}; checkpoints written meanwhile in {self._written:.1f} s" if self._written >= 0.05 else line

    @cached_property
    def peak_flops(self) -> float:
        """Peak FLOP/s of one device: train.peak_tflops, else the maker's figure, else measured by matrix products."""
        train = self.config.train
        if train.peak_tflops is not None:
            return train.peak_tflops * 1e12
        if self.ranks.device.type == "cuda":
            name = torch.cuda.get_device_name(self.ranks.device)
            for key, (bf16, tf32) in PEAK_TFLOPS.items():
                if key in name:
                    return (bf16 if train.precision == "bf16" else tf32) * 1e12
        return measured_peak(self.ranks.device, torch.bfloat16 if train.precision == "bf16" else torch.float32)

    def _cost(self, bucket: Bucket) -> tuple[int, int]:
        """(tokens, training FLOPs) of a sample of `bucket`."""
        if bucket.key not in self._costs:
            from stdit.models.cost import model_cost

            model = self.config.model
            grid = token_grid(self.data.latents[bucket.key], model.patch_size, bucket.key, model.pad_latents)
            cost = model_cost(model, grid, self.data.text_tokens, train=self.config.train)
            self._costs[bucket.key] = cost.tokens, cost.training_flops
        return self._costs[bucket.key]


def useful_tokens(batch: Batch, model: ModelConfig) -> tuple[float, int]:
    """(Tokens that are not padding, all tokens) of a micro-batch, or of one bucket's part of it: patches of latents,
    and caption tokens where the model takes them.

    Padding is what makes captions as long as the longest of the micro-batch, and latents whole patches
    (`model.pad_latents`).
    """
    size = batch.mean.shape[2:]
    patches = math.prod(-(-n // p) for n, p in zip(size, model.patch_size, strict=True))
    useful, processed = len(batch) * math.prod(size) / math.prod(model.patch_size), len(batch) * patches
    if batch.text_mask is not None and model.text_dim is not None:
        useful += int(batch.text_mask.sum())
        processed += batch.text_mask.numel()
    return useful, processed


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, the best of five."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


@contextlib.contextmanager
def profiler(config: Config, ranks: Ranks, first_step: int) -> Iterator[Callable[[], None]]:
    """Writes a trace of `train.profile`'s steps to RUN_DIR/profile (chrome://tracing, ui.perfetto.dev), one file a
    rank. Yields a function to call after each step; the first is `first_step`."""
    settings = config.train.profile
    if settings is None or settings.start + settings.steps <= first_step:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait = max(0, settings.start - first_step)
    warmup = min(1, wait)

    def write(profile: torch.profiler.profile) -> None:
        folder = config.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / f"step-{settings.start:08d}-rank-{ranks.rank}.json.gz"))

    schedule = torch.profiler.schedule(wait=wait - warmup, warmup=warmup, active=settings.steps, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as profile:
        yield profile.step
