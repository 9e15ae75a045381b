"""The XL sizes on a GPU, in bfloat16: forward and forward + backward against diffusers, and the share of the matmul peak.

Called by benchmarks/model.py where there is CUDA. The peak is that of a square bfloat16 product in the same run; FLOPs
are counted, 3 forwards to a training step. No GPU was lent when this was written: it has not been run on one.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of one run on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def peak(side: int = 8192) -> float:
    """FLOP/s of a product of two square bfloat16 matrices, the best of ten."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b)
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(10))


def table(rounds: int) -> str:
    best = peak()
    lines = [
        f"\n{torch.cuda.get_device_name()} · bfloat16 · peak of a product {best / 1e12:.0f} TFLOP/s\n",
        "| model | what | theirs / ours | ours, s | MFU, theirs | MFU, ours |",
        "|---|---|---|---|---|---|",
    ]
    for make, batch in (
        (lambda: peers.dit("XL"), 32),
        (lambda: peers.pixart("XL"), 32),
        (lambda: peers.latte("XL", 16, 28), 1),
    ):
        peer = make()
        x, time = peer.latents(batch).bfloat16().cuda(), torch.linspace(100, 900, batch, device="cuda")
        conditions = {
            k: (v.bfloat16() if v.is_floating_point() else v).cuda() for k, v in peer.conditions(batch).items()
        }
        peer.theirs.to("cuda", torch.bfloat16)
        peer.ours.to("cuda", torch.bfloat16)
        for compiled in (False, True):
            both = peer.compiled() if compiled else copy.copy(peer)
            calls: list[Callable[[], Tensor]] = [
                partial(both.run_theirs, x, time, conditions),
                partial(both.run_ours, x, time, conditions),
            ]
            with torch.no_grad():
                apart = float((calls[0]() - calls[1]()).abs().max() / calls[0]().abs().max())
            if not apart < 0.1:
                raise SystemExit(f"{peer.name} on CUDA: outputs differ by {apart:.1e} of the largest; not timed")
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                peer.run_ours(x, time, conditions)
            flops, kind = counter.get_total_flops(), "compiled" if compiled else "eager"
            for row, cost, runs in (
                (f"forward, {kind}", flops, [_without_grad(call) for call in calls]),
                (
                    f"forward + backward, {kind}",
                    3 * flops,
                    [_training(both.theirs, calls[0]), _training(both.ours, calls[1])],
                ),
            ):
                lines.append(f"| {peer.name} | {row}, batch {batch} | {_row(runs, rounds, cost, best)} |")
                print(lines[-1], flush=True)
        del peer
    return "\n".join(lines)


def _without_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


def _training(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        call().float().square().mean().backward()

    return run


def _row(runs: list[Callable[[], Any]], rounds: int, flops: float, peak_flops: float) -> str:
    for run in runs:
        run()
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for which in random.sample([0, 1], 2):
            times[which].append(seconds(runs[which]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    theirs, ours = (statistics.median(t) for t in times)
    mfu = " | ".join(f"{flops / t / peak_flops:.0%}" for t in (theirs, ours))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}) | {ours:.4f} | {mfu}"
