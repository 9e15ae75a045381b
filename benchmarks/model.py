"""The model against diffusers' classes: same weights, same inputs, outputs compared before anything is timed.

    python benchmarks/model.py [--rounds 15] [--only DiT-S PixArt-B] [--rows forward sampling] [--quick]

One process, one thread, process CPU time; candidates in an order drawn anew each round; the ratio theirs / ours is taken
within a round, so that a busy machine weighs on both: above 1 ours is faster. "A/A" is theirs against theirs: what
the table cannot see. "floor" is the share of ours that its matrix products and attention take, run alone.
On a machine with CUDA also the XL sizes in bfloat16 (benchmarks/gpu.py). Prints one table and appends it to
benchmarks/results/model.md.
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
Row = tuple[str, Run, Run]  # what, theirs, ours


def quartiles(theirs: Run, ours: Run, rounds: int, clock: Callable[[], float]) -> tuple[list[float], float]:
    """Quartiles of theirs / ours within a round, and the median seconds of ours."""
    taken: dict[Run, list[float]] = {theirs: [], ours: []}
    for _ in range(rounds):
        for run in random.sample(list(taken), 2):
            began = clock()
            run()
            taken[run].append(clock() - began)
    ratios = [a / b for a, b in zip(taken[theirs], taken[ours], strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive"), statistics.median(taken[ours])


def check(what: str, theirs: Tensor, ours: Tensor, limit: float) -> None:
    apart = float((theirs - ours).abs().max() / theirs.abs().max())
    if not apart <= limit:
        raise SystemExit(f"{what}: outputs differ by {apart:.1e} of the largest, more than {limit:.0e}; not timed")


def forward(peer: Peer, batch: int, compiled: bool) -> Row:
    x, t, told = peer.latents(batch), torch.linspace(100, 900, batch), peer.told(batch)
    if compiled:
        peer = peer.compiled()

    @torch.no_grad()
    def theirs() -> Tensor:
        return peer.run_theirs(x, t, told)

    @torch.no_grad()
    def ours() -> Tensor:
        return peer.run_ours(x, t, told)

    return f"forward, {'compiled' if compiled else 'eager'}, batch {batch}", theirs, ours


def forward_backward(peer: Peer, batch: int) -> Row:
    x, t, told = peer.latents(batch), torch.linspace(100, 900, batch), peer.told(batch)

    def run(model: nn.Module, call: Callable[..., Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        y = call(x, t, told)
        y.square().mean().backward()
        return y.detach()

    def theirs() -> Tensor:
        return run(peer.theirs, peer.run_theirs)

    def ours() -> Tensor:
        return run(peer.ours, peer.run_ours)

    return f"forward + backward, batch {batch}", theirs, ours


def sampling(peer: Peer, side: int) -> Row:
    """Ten guided DDIM steps of one sample, theirs as diffusers' pipelines write it: everything at every step, for both halves."""
    x0 = peer.latents(1, side)
    told, null = peer.told(1), peer.null()
    both = {name: torch.cat([told[name], null[name]]) for name in told}

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
        conditions = precompute_conditions(peer.ours, times.timesteps, static)
        return sampled(lambda i, x: peer.run_ours(x, times.timesteps[i], {}, conditions=conditions[i]))

    return f"{STEPS} guided steps, {side}x{side} latents", theirs, ours


def training(peer: Peer, batch: int) -> Row:
    """A step of DiT's train.py (forward, loss, AdamW as it comes, its loop for the EMA) against ours: fused AdamW, our EMA."""
    peer = copy.deepcopy(peer)
    x, t, told = peer.latents(batch), torch.linspace(100, 900, batch), peer.told(batch)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    average = copy.deepcopy(peer.theirs)
    plain = torch.optim.AdamW(peer.theirs.parameters(), lr=1e-4, weight_decay=0)
    fused = torch.optim.AdamW(peer.ours.parameters(), lr=1e-4, weight_decay=0, fused=True)
    ema = EMA(lambda: list(peer.ours.parameters()), EMAConfig(decay=0.9999))

    def loss(call: Callable[..., Tensor]) -> Tensor:
        return F.mse_loss(call(x, t, told)[:, :4], noise)

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


class Heavy(TorchDispatchMode):
    """Keeps what is given to matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in HEAVY:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def floor(run: Run) -> Run:
    """The products and the attention of `run`, and nothing else."""
    with Heavy() as heavy:
        out = run()

    @torch.no_grad()
    def bare() -> Tensor:
        for func, args, kwargs in heavy.calls:
            func(*args, **kwargs)
        return out

    return bare


def rows(peer: Peer, batch: int, side: int, wanted: Sequence[str]) -> Iterator[Row]:
    eager = forward(peer, batch, False)
    if "forward" in wanted:
        yield "A/A, theirs", eager[1], lambda: eager[1]()
        yield eager
        yield "floor: products and attention alone", floor(eager[2]), eager[2]
    if "compiled" in wanted:
        yield forward(peer, batch, True)
    if "backward" in wanted:
        yield forward_backward(peer, batch)
    if "sampling" in wanted:
        yield sampling(peer, side)
    if "training" in wanted and peer.name.startswith("DiT-S"):
        yield training(peer, 1)
        yield training(peer, 4)


def table(made: Sequence[tuple[Callable[[], Peer], int]], args: argparse.Namespace) -> str:
    lines = [
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()} · torch {torch.__version__}, diffusers "
        f"{diffusers.__version__} · {args.rounds} rounds, one thread, CPU time{', same products' if args.same_products else ''} · theirs / ours, median (quartiles)\n",
        "| model | what | theirs / ours | ours, s |",
        "|---|---|---|---|",
    ]
    for make, batch in made:
        peer = make()
        if not args.same_products:
            onednn.apply(peer.ours)
        for what, theirs, ours in rows(peer, batch, args.sampling_side, args.rows):
            check(f"{peer.name}, {what}", theirs(), ours(), 1e-3 if "guided" in what else 1e-4)
            (low, middle, high), seconds = quartiles(theirs, ours, args.rounds, time.process_time)
            lines.append(f"| {peer.name} | {what} | {middle:.2f} ({low:.2f} to {high:.2f}) | {seconds:.3f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=["DiT-S", "DiT-B", "PixArt-B", "Latte-S"])
    parser.add_argument("--rows", nargs="*", default=["forward", "compiled", "backward", "sampling", "training"])
    parser.add_argument(
        "--sampling-side", type=int, default=16, help="latent pixels of what is sampled (16: 128 pixels)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, nothing written")
    parser.add_argument("--same-products", action="store_true", help="ours by torch's own products too, as theirs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    every: dict[str, tuple[Callable[[], Peer], int]] = {
        "DiT-S": (lambda: peers.dit("S"), 1),
        "DiT-B": (lambda: peers.dit("B"), 1),
        "PixArt-B": (lambda: peers.pixart("B"), 2),
        "Latte-S": (lambda: peers.latte("S", 8), 1),
    }
    if args.quick:
        args.rounds, args.sampling_side = 2, 8
        args.rows = [row for row in args.rows if row != "compiled"]
        peers.make_tiny()
    made = table([every[name] for name in args.only], args)
    if torch.cuda.is_available() and not args.quick:
        import gpu

        made += "\n" + gpu.table(args.rounds)
    print(made)
    if not args.quick:
        RESULTS.touch()
        with RESULTS.open("a") as file:
            file.write(made + "\n")


if __name__ == "__main__":
    main()
