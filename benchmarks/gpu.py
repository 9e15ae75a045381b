"""What half an hour of one GPU should show (`make gpu`): one JSON, one table.

    python benchmarks/gpu.py --out runs/gpu [--parts tests attention parity speed recipe] [--rounds 5] [--quick]

    tests       the tests that need CUDA
    attention   every attention back end: time forward and forward + backward, error against float32
    parity      DiT, PixArt and Latte in float32 against diffusers; the bfloat16 error of both
    speed       their XL sizes in bfloat16, eager and compiled: forward (a step of sampling) and forward + backward,
                beside diffusers, and the share of the peak of a square product in the same run (FLOPs counted, 3
                forwards to a step)
    recipe      benchmarks/recipe.py with DiT-S/2 on the handwriting clips at 32 x 32

A part that fails is recorded with its error, and the others run. OUT/gpu.json and OUT/gpu.md are written after each
part. --quick runs all of it on tiny sizes, on a CPU too. benchmarks/model.py prints the part `speed` where there is
CUDA.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from peers import Peer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stdit.files import atomic_write
from stdit.models.attention import AttentionProcessor, plain_attention

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rows = list[dict[str, Any]]
# Back ends of diffusers; those that are missing or do not take these tensors are recorded with the reason.
BACKENDS = (
    "native",
    "_native_math",
    "_native_efficient",
    "_native_flash",
    "_native_cudnn",
    "flash",
    "_flash_3",
    "sage",
)
# Samples, tokens, heads, head width: DiT-XL/2 at 256 and 512 px, STDiT's frames of 512 px, a clip under full attention.
ATTENTION = ((32, 256, 16, 72), (8, 1024, 16, 72), (128, 1024, 16, 72), (1, 16384, 16, 72))
ATTENTION_QUICK = ((2, 16, 2, 8),)
RECIPE = (
    "--shapes", "1x32x32:16:4", "4x32x32:16:4", "--steps", "600", "--clips", "400", "--fractions", "1.0",
    "--recipes", "today", "adamw", "token routing", "contrastive", "all",
    "--set", "model.hidden_size=384", "--set", "model.depth=12", "--set", "model.patch_size=[1,2,2]", "--set", "model.position_base=16",
    "--set", "data.buckets=[{frames: 1, height: 32, width: 32, batch_size: 256}, {frames: 4, height: 32, width: 32, batch_size: 64}]",
    "--set", "train.precision=bf16", "--set", "train.optimizer.learning_rate=1e-3", "--set", "train.compile=true",
)  # fmt: skip
RECIPE_QUICK = ("--quick", "--recipes", "today", "token routing", "--seeds", "0", "--fractions", "1.0")


# ------------------------------------------------------------------------------------------ time


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of one run on the device."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def peak(side: int) -> float:
    """FLOP/s of a product of two square bfloat16 matrices, the best of ten."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b)
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(10))


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------ parts


def tests(args: argparse.Namespace) -> Rows:
    """pytest's outcomes of the tests marked gpu. RuntimeError: some failed, with the end of what pytest said."""
    where = ["tests/models/test_attention.py"] if args.quick else []
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode not in (0, 5):  # 5: none collected
        raise RuntimeError(
            f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        )
    counts = re.findall(r"(\d+) (passed|skipped|deselected)", done.stdout)
    return [{kind: int(count) for count, kind in counts}]


def attention(args: argparse.Namespace) -> Rows:
    """Each back end's time, and its largest error over the largest value of float32's result."""
    rows: Rows = []
    for shape in ATTENTION_QUICK if args.quick else ATTENTION:
        q, k, v = (
            torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(i)) for i in range(3)
        )
        one = slice(0, 1), slice(0, 1024)  # of the largest, as many scores as fit the memory
        expected = plain_attention(q[one], k[:1], v[:1], None)
        half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
        for name in BACKENDS:
            processor = AttentionProcessor()
            row: dict[str, Any] = {"shape": "x".join(map(str, shape)), "backend": name}
            try:
                processor._attention_backend = AttentionBackendName(name)
                run = partial(processor, *half)
                error = (run()[one].float() - expected).abs().max() / expected.abs().max()
                row |= {"error": float(error), "forward_s": _median(torch.no_grad()(run), args.rounds)}
                row["forward_backward_s"] = _median(lambda run=run: run().sum().backward(), args.rounds)
            except Exception as reason:  # whatever a package raises that is not there, or does not know the device
                row["unavailable"] = (
                    f"{type(reason).__name__}: {str(reason).splitlines()[0][:120] if str(reason) else ''}"
                )
            rows.append(row)
    return rows


def parity(args: argparse.Namespace) -> Rows:
    """Ours against diffusers' in float32; and each one's bfloat16 against its own float32: largest difference over the
    largest value."""
    rows: Rows = []
    for make, batch in _models(args, small=True):
        peer, inputs = _on_device(make(), batch, torch.float32)
        with torch.no_grad():
            theirs, ours = peer.run_theirs(*inputs), peer.run_ours(*inputs)
        peer, inputs = _on_device(peer, batch, torch.bfloat16)
        with torch.no_grad():
            theirs_half, ours_half = peer.run_theirs(*inputs).float(), peer.run_ours(*inputs).float()
        largest = theirs.abs().max()
        rows.append(
            {
                "model": peer.name,
                "float32": float((ours - theirs).abs().max() / largest),
                "bfloat16_ours": float((ours_half - ours).abs().max() / largest),
                "bfloat16_theirs": float((theirs_half - theirs).abs().max() / largest),
            }
        )
    return rows


def speed(args: argparse.Namespace) -> Rows:
    """The XL sizes in bfloat16 beside diffusers. SystemExit: outputs differ."""
    best = peak(256 if args.quick else 8192)
    rows: Rows = []
    for make, batch in _models(args):
        peer, inputs = _on_device(make(), batch, torch.bfloat16)
        for compiled in (False,) if args.quick else (False, True):
            both = peer.compiled() if compiled else copy.copy(peer)
            calls: list[Callable[[], Tensor]] = [partial(both.run_theirs, *inputs), partial(both.run_ours, *inputs)]
            with torch.no_grad():
                apart = float((calls[0]() - calls[1]()).abs().max() / calls[0]().abs().max())
            if not apart < 0.1:
                raise RuntimeError(f"{peer.name}: outputs differ by {apart:.1e} of the largest; not timed")
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                peer.run_ours(*inputs)
            flops, kind = counter.get_total_flops(), "compiled" if compiled else "eager"
            for what, cost, runs in (
                ("forward", flops, [torch.no_grad()(call) for call in calls]),
                ("forward + backward", 3 * flops, [_training(both.theirs, calls[0]), _training(both.ours, calls[1])]),
            ):
                row = {"model": peer.name, "what": f"{what}, {kind}, batch {batch}", "peak_tflops": best / 1e12}
                rows.append(row | _compare(runs, args.rounds, cost, best))
                print(rows[-1], flush=True)
        del peer
    return rows


def recipe(args: argparse.Namespace) -> Rows:
    """The summary of benchmarks/recipe.py, of what it could measure in time. RuntimeError: it failed, with its last
    words."""
    out = args.out / "recipe"
    command = [
        sys.executable,
        "benchmarks/recipe.py",
        "--out",
        str(out.resolve()),
        *(RECIPE_QUICK if args.quick else RECIPE),
    ]
    said = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=args.recipe_minutes * 60, check=False
        )
        if done.returncode:
            said = f"benchmarks/recipe.py ended with {done.returncode}:\n{done.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        if not (out / "recipe.json").is_file():
            said = f"benchmarks/recipe.py: no run was done after {args.recipe_minutes:g} minutes"
    if said:
        raise RuntimeError(said)
    return json.loads((out / "recipe.json").read_text())["summary"]


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "tests": tests, "attention": attention, "parity": parity, "speed": speed, "recipe": recipe,
}  # fmt: skip


def _models(args: argparse.Namespace, small: bool = False) -> Sequence[tuple[Callable[[], Peer], int]]:
    """Constructors and batch sizes; small: sizes S with four frames."""
    if args.quick or small:
        return (lambda: peers.dit("S"), 2), (lambda: peers.pixart("S"), 2), (lambda: peers.latte("S", 4), 1)
    return (lambda: peers.dit("XL"), 32), (lambda: peers.pixart("XL"), 32), (lambda: peers.latte("XL", 16, 28), 1)


def _on_device(peer: Peer, batch: int, dtype: torch.dtype) -> tuple[Peer, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """The peer's models, moved, and the inputs of both."""
    peer.theirs.to(DEVICE, dtype)
    peer.ours.to(DEVICE, dtype)
    conditions = {
        k: (v.to(dtype) if v.is_floating_point() else v).to(DEVICE) for k, v in peer.conditions(batch).items()
    }
    times = torch.linspace(100, 900, batch, device=DEVICE)
    return peer, (peer.latents(batch).to(DEVICE, dtype), times, conditions)


def _training(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        call().float().square().mean().backward()

    return run


def _median(run: Callable[[], Any], rounds: int) -> float:
    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def _compare(runs: list[Callable[[], Any]], rounds: int, flops: float, peak_flops: float) -> dict[str, Any]:
    """theirs / ours as quartiles of rounds in which both ran, in a random order; seconds; shares of the peak."""
    for run in runs:
        run()
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for which in random.sample([0, 1], 2):
            times[which].append(seconds(runs[which]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    theirs, ours = (statistics.median(t) for t in times)
    return {
        "theirs_over_ours": statistics.quantiles(ratios, n=4, method="inclusive"),
        "theirs_s": theirs,
        "ours_s": ours,
        "theirs_mfu": flops / theirs / peak_flops,
        "ours_mfu": flops / ours / peak_flops,
    }


# ------------------------------------------------------------------------------------------ results


def table(rounds: int) -> str:
    """The part `speed`, for benchmarks/model.py."""
    return markdown({"parts": {"speed": {"rows": speed(argparse.Namespace(rounds=rounds, quick=False))}}})


def markdown(result: dict[str, Any]) -> str:
    """A table for each part."""
    lines = [f"\n{datetime.date.today()} · {device_name()} · torch {torch.__version__}"]
    for name, part in result["parts"].items():
        taken = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines.append(
            f"\n**{name}**{taken}" + (f": failed: {part['failed'].splitlines()[0]}" if "failed" in part else "") + "\n"
        )
        rows = part.get("rows") or []
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if keys:
            lines += [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
            lines += [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts; JSON and table are written after each."""
    result: dict[str, Any] = {
        "date": str(datetime.date.today()), "device": device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "quick": args.quick, "parts": {},
    }  # fmt: skip
    for name in args.parts:
        start = time.perf_counter()
        try:
            part: dict[str, Any] = {"rows": PARTS[name](args)}
        except Exception as error:  # a GPU's half hour must not end with its first fault
            part = {"failed": f"{type(error).__name__}: {error}"}
        result["parts"][name] = {"seconds": round(time.perf_counter() - start, 1), **part}
        atomic_write(args.out / "gpu.json", json.dumps(result, indent=1))
        atomic_write(args.out / "gpu.md", markdown(result) + "\n")
        print(f"{name}: {part.get('failed', 'done')} ({result['parts'][name]['seconds']} s)", flush=True)
    return result


def main() -> int:
    """1 where a part failed, 2 without CUDA."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe-minutes", type=float, default=20, help="after which the recipes are cut off; a second call goes on")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.quick:
        print("error: no CUDA device; --quick runs tiny sizes on a CPU", file=sys.stderr)
        return 2
    if args.quick:
        args.rounds = 2
        peers.make_tiny()
    result = run(args)
    print(markdown(result))
    return int(any("failed" in part for part in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
