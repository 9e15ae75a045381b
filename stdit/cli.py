"""The `stdit` command: one verb for each step from clips to videos.

Each verb calls the `main` of the module that does the work. Modules are imported when their verb runs, so that
`stdit --help` and `stdit VERB --help` take a fraction of a second.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stdit.console import echo


class Verb(NamedTuple):
    help: str
    run: Callable[[list[str]], int | None]


def _main(module: str, arguments: Sequence[str]) -> int | None:
    return importlib.import_module(module).main(arguments)


def _pipeline(name: str, prog: str, arguments: Sequence[str]) -> int | None:
    """A Ray program, which is above this package and so imported by name. Its parser runs first under the verb's
    name."""
    module = importlib.import_module(f"pipelines.{name}")
    module.arguments(prog).parse_args(arguments)
    return module.main(arguments)


# ------------------------------------------------------------------------------------------- verbs


def _init(arguments: list[str]) -> int | None:
    return _main("stdit.init", arguments)


def _curate(arguments: list[str]) -> int | None:
    return _main("stdit.curate", arguments)


def _extract(arguments: list[str]) -> int | None:
    from stdit.config import ExtractConfig, load_config
    from stdit.extract import arguments as parser

    options = parser("stdit extract").parse_args(arguments)
    workers = load_config(options.config, ExtractConfig, options.set).workers
    return _main("stdit.extract" if workers == 1 else "pipelines.extract_features", arguments)


def _train(arguments: list[str]) -> int | None:
    from stdit import train
    from stdit.config import MAX_WORKERS

    parser = train.arguments("stdit train")
    parser.add_argument("--nproc", type=int, default=1, help="processes (one a GPU), started by DeepSpeed's launcher")
    options = parser.parse_args(arguments)
    if not 1 <= options.nproc <= MAX_WORKERS:
        parser.error(f"--nproc {options.nproc}: expected 1 to {MAX_WORKERS}")
    own = ["--config", options.config, *(f"--set={text}" for text in options.set)]
    if options.nproc == 1:
        return _main("stdit.train", own)
    from stdit.config import Config, load_config
    from stdit.training.launcher import launch

    return launch(options.nproc, own, load_config(options.config, Config, options.set))


def _find_batch_size(arguments: list[str]) -> int | None:
    return _main("stdit.find_batch_size", arguments)


def _plan_compute(arguments: list[str]) -> int | None:
    return _main("stdit.plan_compute", arguments)


def _train_stages(arguments: list[str]) -> int | None:
    return _pipeline("train_stages", "stdit train-stages", arguments)


def _forecast(arguments: list[str]) -> int | None:
    return _pipeline("train_stages", "stdit forecast", ["--forecast", *arguments])


def _generate(arguments: list[str]) -> int | None:
    from stdit.inference import prompts

    parser = prompts.arguments("Generates a video or an image for each prompt of a file.")
    parser.prog = "stdit generate"
    workers = prompts.settings(parser.parse_args(arguments)).workers
    return _main("stdit.generate" if workers == 1 else "pipelines.generate_videos", arguments)


def _evaluate(arguments: list[str]) -> int | None:
    return _pipeline("evaluate_runs", "stdit evaluate", arguments)


def _compare(arguments: list[str]) -> int | None:
    from stdit.compare import arguments as parser

    parser("stdit compare").parse_args(arguments)
    return _main("stdit.compare", arguments)


def _convert(arguments: list[str]) -> int | None:
    from stdit.arguments import convert

    convert("stdit convert").parse_args(arguments)
    from stdit.training.adapters import full_model
    from stdit.weights.convert import main

    return main(arguments, full_model)


def _transfer(arguments: list[str]) -> int | None:
    from stdit.arguments import transfer

    transfer("stdit transfer").parse_args(arguments)
    from stdit.training.adapters import full_model
    from stdit.weights.transfer import main

    return main(arguments, full_model)


def _ema(arguments: list[str]) -> int | None:
    from stdit.arguments import ema

    ema("stdit ema").parse_args(arguments)
    return _main("stdit.training.post_hoc_ema", arguments)


def _summary(arguments: list[str]) -> int | None:
    from stdit.arguments import summary

    summary("stdit summary").parse_args(arguments)
    return _main("stdit.models.cost", arguments)


VERBS = {
    "init": Verb("manifest and plan for a folder of clips", _init),
    "curate": Verb("find, score, filter and caption clips of raw footage", _curate),
    "extract": Verb("encode clips and captions into feature shards", _extract),
    "train": Verb("train one config", _train),
    "find-batch-size": Verb("the largest batch_size of each bucket that fits into memory", _find_batch_size),
    "plan-compute": Verb("size and steps for a budget of FLOPs, from a ladder of small runs", _plan_compute),
    "train-stages": Verb("run a plan: extract, train each stage, generate, evaluate", _train_stages),
    "forecast": Verb("clips per bucket, tokens, FLOPs and memory of a plan; starts nothing", _forecast),
    "generate": Verb("videos or images for a file of prompts", _generate),
    "evaluate": Verb("score generated media; or generate clips for held-out captions and compute metrics", _evaluate),
    "compare": Verb("several runs on one page: scores, losses, clips; blind votes", _compare),
    "convert": Verb("convert weights between published layouts and ours", _convert),
    "transfer": Verb("initialise a model of another architecture from trained weights", _transfer),
    "ema": Verb("average a run's weights over any width, from snapshots of its EMA profiles", _ema),
    "summary": Verb("parameters, FLOPs and activation memory of a model", _summary),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the verb; 2: unknown verb or a config that cannot be used."""
    from stdit import __version__

    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        "stdit",
        description="Train and run spatial-temporal diffusion transformers for text-to-image and text-to-video.",
        epilog="verbs:\n"
        + "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
        + "\n\n`stdit VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=True,
    )
    parser.add_argument("--version", action="version", version=f"stdit {__version__}")
    parser.add_argument("verb", metavar="VERB", help="one of the verbs below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    verb = VERBS.get(options.verb)
    if verb is None:
        close = difflib.get_close_matches(options.verb, VERBS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        echo(f"stdit: unknown verb {options.verb!r}{hint} Verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return verb.run(options.arguments) or 0
    except ValueError as error:  # ConfigError, before the verb's own main
        echo(f"stdit {options.verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
