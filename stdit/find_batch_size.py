"""The largest batch_size of each bucket that fits into memory: `stdit find-batch-size --config FILE`.

Every try is a process of its own, which takes two optimizer steps of one bucket on one rank, with new weights and the
config's data, and writes nothing. ZeRO on several ranks takes less than that; gradients exchanged over a network take
none of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from stdit.config import Config, ConfigError, TrainBucket, load_config
from stdit.console import echo
from stdit.errors import exit_code

# Exit code of a try that ran out of memory.
OUT_OF_MEMORY = 3
STEPS = 2


class Try(NamedTuple):
    """What became of `size` samples. bytes: the rank's peak memory; seconds: of an optimizer step."""

    size: int
    fits: bool
    reason: str = ""
    bytes: int = 0
    seconds: float = 0.0


def search(attempt: Callable[[int], Try], start: int, most: int, tries: int) -> Iterator[Try]:
    """At most `tries` sizes of 1 … `most`, from `start` on: doubled while they fit, halved until one fits, then in
    between."""
    fits, fails, size = 0, most + 1, max(1, min(start, most))
    for _ in range(tries):
        found = attempt(size)
        yield found
        fits, fails = (size, fails) if found.fits else (fits, size)
        if fails - fits <= 1:
            return
        size = min(2 * fits, most) if fails > most else max(1, (fits + fails) // 2)


def run_try(arguments: Sequence[str], key: str, size: int, memory: float | None, timeout_s: float) -> Try:
    """One try, in a process. ConfigError: what it says of the config. RuntimeError: it failed for another reason than
    memory."""
    command = [sys.executable, "-m", "stdit.find_batch_size", *arguments, "--bucket", key, "--size", str(size)]
    command += [] if memory is None else ["--memory", str(memory)]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=alone)
    except subprocess.TimeoutExpired:
        return Try(size, False, f"no end in {timeout_s:g} s")
    if done.returncode == OUT_OF_MEMORY:
        return Try(size, False, "out of memory")
    if done.returncode < 0:  # the kernel's own way to say so is SIGKILL; C++ libraries abort
        return Try(size, False, f"ended by {signal.Signals(-done.returncode).name}")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if done.returncode == 2:
        raise ConfigError(last)
    if done.returncode:
        raise RuntimeError(f"bucket {key}, batch_size {size}: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Try(size, True, "", found["bytes"], found["seconds"])


# ------------------------------------------------------------------------------------ in the try


def take_steps(config: Config, key: str, size: int, memory: float | None) -> dict[str, float]:
    """Two optimizer steps of `size` samples of a bucket: peak bytes and seconds of the last one."""
    from stdit.training.derive import complete

    config = with_bucket(complete(config), key, size)
    limit = None if memory is None else int(memory * 2**30)

    import torch

    from stdit.data.loader import Loader
    from stdit.models.fine_tuning import add_trainable
    from stdit.models.stdit import STDiT
    from stdit.train import prepare
    from stdit.training.data import open_data
    from stdit.training.ema import EMA
    from stdit.training.engine import Engine, init_distributed
    from stdit.training.inputs import Inputs
    from stdit.training.performance import peak_memory

    if torch.cuda.is_available():
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, limit / torch.cuda.get_device_properties(0).total_memory)
            )
    else:
        # Beyond it an allocation fails, instead of the machine.
        limit = limit or available_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    data = open_data(config)
    ranks = init_distributed()
    model = add_trainable(STDiT.from_settings(config.model, config.seed), config.train, config.seed)
    engine = Engine(prepare(model, config, ranks.device), config, ranks)
    ema = EMA(engine.masters, config.train.ema)
    inputs = Inputs(config, data.video_encoder, ranks.device, data.empty_caption)
    start = time.perf_counter()
    for number, step in zip(range(1, STEPS + 1), Loader(data.source, config.data, config.seed), strict=False):
        start = time.perf_counter()
        for batch in step.batches:
            engine.backward(inputs.loss(engine, batch, number).total, len(step.batches))
        engine.step(config.train.optimizer.learning_rate)
        ema.update(number)
    return {"bytes": peak_memory(ranks.device), "seconds": time.perf_counter() - start}


def with_bucket(config: Config, key: str, size: int) -> Config:
    """`config` with one bucket alone, of `size` samples."""
    (bucket,) = (b for b in config.data.buckets if b.key == key)
    shape = {name: getattr(bucket, name) for name in ("frames", "height", "width")}
    buckets = (TrainBucket(**shape, batch_size=size),)
    alone = {"tokens_per_step": None, "tokens_per_micro_batch": None, "samples_multiple_of": None, "packing": False}
    train = config.train.model_copy(update={"gradient_accumulation": 1, **alone})
    return config.model_copy(update={"data": config.data.model_copy(update={"buckets": buckets}), "train": train})


def available_memory() -> int:
    """Bytes that this process may still take."""
    import psutil

    from stdit.memory import host_memory

    return min(psutil.virtual_memory().available, host_memory())


# ---------------------------------------------------------------------------------------- command


def arguments(prog: str = "stdit find-batch-size") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of a training run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--bucket", help="one bucket, such as 17x256x256 (default: each)")
    parser.add_argument(
        "--most", type=int, default=1024, help="largest batch_size that is tried (default: %(default)s)"
    )
    parser.add_argument("--tries", type=int, default=8, help="tries for each bucket (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one try (default: %(default)s)")
    parser.add_argument("--memory", type=float, help="GiB that a try may take (default: what there is)")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # this process is a try
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, a line a try, and the settings found. 0; 1: a bucket of which nothing fits; 2: a config that
    can't be used."""
    args = arguments().parse_args(argv)
    own = ["--config", args.config, *(f"--set={text}" for text in args.set)]
    try:
        if (
            min(args.most, args.tries) < 1
            or min(args.timeout, args.memory or 1.0) <= 0
            or not math.isfinite(args.timeout)
        ):
            raise ConfigError("--most, --tries, --timeout and --memory: expected numbers above 0")
        config = load_config(args.config, Config, args.set)
        if args.size is not None:
            return _try(config, args.bucket, args.size, args.memory)
        return _find(config, own, args)
    except (ConfigError, RuntimeError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def _try(config: Config, key: str, size: int, memory: float | None) -> int:
    from stdit.training.out_of_memory import is_out_of_memory

    try:
        found: dict[str, Any] = take_steps(config, key, size, memory)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = {}
    if found:
        print(json.dumps(found), flush=True)
    # Not sys.exit: libraries' exit handlers may want memory that there is not.
    os._exit(0 if found else OUT_OF_MEMORY)


def _find(config: Config, own: list[str], args: argparse.Namespace) -> int:
    from stdit.training.derive import complete

    if config.train.sequence_parallel > 1:
        raise ConfigError(
            f"train.sequence_parallel is {config.train.sequence_parallel}, but a try has one rank; give --set train.sequence_parallel=1"
        )
    buckets = complete(config).data.buckets
    if args.bucket is not None:
        if args.bucket not in (keys := [b.key for b in buckets]):
            raise ConfigError(f"--bucket {args.bucket}: the config has {', '.join(keys)}")
        buckets = tuple(b for b in buckets if b.key == args.bucket)
    echo(f"{'bucket':<14} {'batch_size':>10}  {'result':<18} {'memory':>12} {'samples/s':>10}", flush=True)
    best: dict[str, int] = {}
    for bucket in buckets:

        def attempt(size: int, key: str = bucket.key) -> Try:
            return run_try(own, key, size, args.memory, args.timeout)

        for found in search(attempt, bucket.batch_size or 1, args.most, args.tries):
            shown = f"{found.bytes / 2**30:>8.2f} GiB {found.size / found.seconds:>10.3g}" if found.fits else ""
            echo(
                f"{bucket.key:<14} {found.size:>10}  {found.reason or 'fits':<18} {shown}".rstrip(),
                flush=True,
            )
            if found.fits:
                best[bucket.key] = max(best.get(bucket.key, 0), found.size)
    if config.train.tokens_per_step is not None and best:
        tokens = {bucket.key: best[bucket.key] * (bucket.tokens or 0) for bucket in buckets if bucket.key in best}
        least = min(tokens, key=lambda key: tokens[key])
        echo(f"train.tokens_per_micro_batch: {tokens[least]}   # {best[least]} of {least}")
    else:
        for number, bucket in enumerate(complete(config).data.buckets):
            if bucket.key in best:
                echo(f"data.buckets[{number}].batch_size: {best[bucket.key]}   # {bucket.key}")
    if missing := [b.key for b in buckets if b.key not in best]:
        echo(
            f"error: nothing fits of bucket {', '.join(missing)}; train.activation_checkpointing and train.zero_stage save memory",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
