"""The model against diffusers' classes: same weights, same inputs, outputs compared before anything is timed.

    python benchmarks/model.py [--rounds 15] [--only DiT-S/2 PixArt-B/2] [--rows forward sampling] [--quick]

One process, one thread, process CPU time; candidates in random order within each round; the ratio theirs / ours is
taken within a round, so that other load weighs on both: above 1 ours is faster. "A/A" times theirs against itself: the
noise. "floor" is ours against its matrix products and attention alone. Ours is timed with torch's float32 products and
with oneDNN's (stdit/ops/onednn.py); the header says which of them `auto` uses on this processor, and what both take for
one layer of 256 rows. On a machine with CUDA also the XL sizes in bfloat16 (benchmarks/gpu.py). Prints one table and
appends it to benchmarks/results/model.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import peers
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from peers import Peer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stdit.config import EMAConfig
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.ops import onednn
from stdit.training.ema import EMA

RESULTS = Path(__file__).parent / "results" / "model.md"
GUIDANCE, STEPS = 4.0, 10
# Operators of the floor.
HEAVY = {
    "addmm",
    "mm",
    "bmm",
    "baddbmm",
    "convolution",
    "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
}

Run = Callable[[], Tensor]
Row = tuple[str, Run, Run]  # name, theirs, ours


def quartiles(theirs: Run, ours: Run, rounds: int, clock: Callable[[], float]) -> tuple[list[float], float]:
    """Quartiles of theirs / ours within a round, and the median seconds of ours."""
    times_of: dict[Run, list[float]] = {theirs: [], ours: []}
    for _ in range(rounds):
        for run in random.sample(list(times_of), 2):
            began = clock()
            run()
            times_of[run].append(clock() - began)
    ratios = [a / b for a, b in zip(times_of[theirs], times_of[ours], strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive"), statistics.median(times_of[ours])


def check(name: str, theirs: Tensor, ours: Tensor, limit: float) -> None:
    apart = float((theirs - ours).abs().max() / theirs.abs().max())
    if not apart <= limit:
        raise SystemExit(f"{name}: outputs differ by {apart:.1e} of the largest, more than {limit:.0e}; not timed")


def forward(peer: Peer, batch: int, compiled: bool) -> Row:
    x, t, conditions = peer.latents(batch), torch.linspace(100, 900, batch), peer.conditions(batch)
    if compiled:
        peer = peer.compiled()

    @torch.no_grad()
    def theirs() -> Tensor:
        return peer.run_theirs(x, t, conditions)

    @torch.no_grad()
    def ours() -> Tensor:
        return peer.run_ours(x, t, conditions)

    return f"forward, {'compiled' if compiled else 'eager'}, batch {batch}", theirs, ours


def forward_backward(peer: Peer, batch: int) -> Row:
    x, t, conditions = peer.latents(batch), torch.linspace(100, 900, batch), peer.conditions(batch)

    def run(model: nn.Module, call: Callable[..., Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        y = call(x, t, conditions)
        y.square().mean().backward()
        return y.detach()

    def theirs() -> Tensor:
        return run(peer.theirs, peer.run_theirs)

    def ours() -> Tensor:
        return run(peer.ours, peer.run_ours)

    return f"forward + backward, batch {batch}", theirs, ours


def sampling(peer: Peer, side: int) -> Row:
    """Ten guided DDIM steps of one sample, theirs as diffusers' pipelines write it: everything at every step, for both
    halves."""
    x0 = peer.latents(1, side)
    conditions, null = peer.conditions(1), peer.null()
    both = {name: torch.cat([conditions[name], null[name]]) for name in conditions}

    def sampled(predict: Callable[[int, Tensor], Tensor]) -> Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        x = x0
        for i, t in enumerate(scheduler.timesteps):
            with_text, without = predict(i, torch.cat([x, x]))[:, :4].chunk(2)
            x = scheduler.step(without + GUIDANCE * (with_text - without), int(t), x, return_dict=False)[0]
        return x

    times = DDIMScheduler(clip_sample=False)
    times.set_timesteps(STEPS)

    @torch.no_grad()
    def theirs() -> Tensor:
        return sampled(lambda i, x: peer.run_theirs(x, times.timesteps[i], both))

    @torch.no_grad()
    def ours() -> Tensor:
        own: dict[str, Any] = dict(both)
        if "class_labels" in own:  # no class is -1 here, the row behind the last one there
            null_class = own["class_labels"] == peer.ours.settings.num_classes
            own["class_labels"] = own["class_labels"].masked_fill(null_class, -1)
        static = encode_static(peer.ours, ConditionInputs(**own))
        cached = precompute_conditions(peer.ours, times.timesteps, static)
        return sampled(lambda i, x: peer.run_ours(x, times.timesteps[i], {}, conditions=cached[i]))

    return f"{STEPS} guided steps, {side}x{side} latents", theirs, ours


def training(peer: Peer, batch: int) -> Row:
    """A step of DiT's train.py (forward, loss, AdamW as it comes, its loop for the EMA) against ours: fused AdamW, our
    EMA."""
    peer = copy.deepcopy(peer)
    x, t, conditions = peer.latents(batch), torch.linspace(100, 900, batch), peer.conditions(batch)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    average = copy.deepcopy(peer.theirs)
    plain = torch.optim.AdamW(peer.theirs.parameters(), lr=1e-4, weight_decay=0)
    fused = torch.optim.AdamW(peer.ours.parameters(), lr=1e-4, weight_decay=0, fused=True)
    ema = EMA(lambda: list(peer.ours.parameters()), EMAConfig(decay=0.9999))

    def loss(call: Callable[..., Tensor]) -> Tensor:
        return F.mse_loss(call(x, t, conditions)[:, :4], noise)

    def theirs() -> Tensor:
        found = loss(peer.run_theirs)
        plain.zero_grad()
        found.backward()
        plain.step()
        with torch.no_grad():
            of = dict(peer.theirs.named_parameters())
            for name, kept in average.named_parameters():
                kept.mul_(0.9999).add_(of[name].data, alpha=1 - 0.9999)
        return found.detach()

    def ours() -> Tensor:
        found = loss(peer.run_ours)
        fused.zero_grad()
        found.backward()
        fused.step()
        ema.update(100_000)
        return found.detach()

    return f"training step, batch {batch}", theirs, ours


class RecordHeavy(TorchDispatchMode):
    """Records the calls of matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in HEAVY:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def floor(run: Run) -> Run:
    """The products and the attention of `run`, and nothing else."""
    with RecordHeavy() as heavy:
        out = run()

    @torch.no_grad()
    def products_alone() -> Tensor:
        for func, args, kwargs in heavy.calls:
            func(*args, **kwargs)
        return out

    return products_alone


def rows(peer: Peer, batch: int, side: int, selected: Sequence[str]) -> Iterator[Row]:
    eager = forward(peer, batch, False)
    if "forward" in selected:
        yield "A/A, theirs", eager[1], lambda: eager[1]()
        yield eager
        yield "floor: products and attention alone", floor(eager[2]), eager[2]
    if "compiled" in selected:
        yield forward(peer, batch, True)
    if "backward" in selected:
        yield forward_backward(peer, batch)
    if "sampling" in selected:
        yield sampling(peer, side)
    if "training" in selected and peer.name.startswith("DiT-S"):
        yield training(peer, 1)
        yield training(peer, 4)


def product_ratio(width: int, rounds: int) -> str:
    """torch / oneDNN of one MLP layer (256 x width x 4 width), forward and forward + backward."""
    x, layer, ratios = torch.randn(256, width).requires_grad_(), nn.Linear(width, 4 * width), []
    for backward in (False, True):

        def run(layer: nn.Linear, backward: bool = backward) -> Tensor:
            with torch.set_grad_enabled(backward):
                y = layer(x)
                if backward:
                    torch.autograd.grad(y, (x, *layer.parameters()), y.detach())
            return y

        fast = copy.deepcopy(layer)
        onednn.apply(fast)
        for warm_up in (layer, fast):
            run(warm_up)
        quarters, _ = quartiles(partial(run, layer), partial(run, fast), rounds, time.process_time)
        ratios.append(f"{quarters[1]:.2f} ({quarters[0]:.2f} to {quarters[2]:.2f})")
    return f"width {width}: {ratios[0]} forward, {ratios[1]} forward + backward"


def header(args: argparse.Namespace, backends: Sequence[str]) -> str:
    chosen, reason = onednn.preferred()
    text = (
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()} · torch {torch.__version__}, diffusers "
        f"{diffusers.__version__} · {args.rounds} rounds, one thread, CPU time · theirs / ours, median (quartiles)\n"
        f"\nFloat32 products: auto is {chosen} here ({reason})."
    )
    if "onednn" in backends:
        ratios = "; ".join(product_ratio(width, 2 if args.quick else 21) for width in (384, 768))
        text += f" One layer, torch / oneDNN, {ratios}."
    return text


def table(models: Sequence[tuple[Callable[[], Peer], int]], args: argparse.Namespace) -> str:
    backends: list[onednn.Backend] = ["torch"]
    if onednn.apply(nn.Linear(512, 512)):
        backends.append("onednn")
    lines = [header(args, backends), "\n| model | row | products | theirs / ours | ours, s |", "|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for make, batch in models:
        peer = make()
        for backend in backends:
            if not onednn.set_backend(peer.ours, backend) and backend == "onednn":
                continue  # no layer is large enough
            for row, theirs, ours in rows(peer, batch, args.sampling_side, args.rows):
                if row.startswith("A/A") and backend != backends[0]:
                    continue
                check(f"{peer.name}, {row}", theirs(), ours(), 1e-3 if "guided" in row else 1e-4)
                (low, middle, high), seconds = quartiles(theirs, ours, args.rounds, time.process_time)
                ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
                lines.append(f"| {peer.name} | {row} | {backend} | {ratio} | {seconds:.3f} |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


# Model and batch size.
MODELS: dict[str, tuple[Callable[[], Peer], int]] = {
    "DiT-S/2": (lambda: peers.dit("S"), 1),
    "DiT-B/2": (lambda: peers.dit("B"), 1),
    "PixArt-S/2": (lambda: peers.pixart("S"), 2),
    "PixArt-B/2": (lambda: peers.pixart("B"), 2),
    "Latte-S/2": (lambda: peers.latte("S", 8), 1),
}
ROWS = ["forward", "compiled", "backward", "sampling", "training"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", nargs="+", choices=list(MODELS), default=["DiT-S/2", "DiT-B/2", "PixArt-B/2", "Latte-S/2"]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--sampling-side", type=int, default=16, help="latent pixels a side of the sampling row")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.rounds, args.sampling_side = 2, 8
        args.rows = [row for row in args.rows if row != "compiled"]
        peers.make_tiny()
    result = table([MODELS[name] for name in args.only], args)
    if torch.cuda.is_available() and not args.quick:
        import gpu

        result += "\n" + gpu.table(args.rounds)
    if not args.quick:
        with RESULTS.open("a") as file:
            file.write(result + "\n")


if __name__ == "__main__":
    main()
