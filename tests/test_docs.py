"""Documents name what there is: every command parses, every config and plan loads, every link and file exists."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import plan as plans
from pipelines import train_stages
from stdit import arguments, cli, curate, find_batch_size, init, plan_compute, train
from stdit import extract as extraction
from stdit.config import Config, CurateConfig, ExtractConfig, load_config, read_extended
from stdit.inference import prompts
from tests.support.documents import CONFIGS, PAGES, commands
from tests.support.paths import ROOT


def evaluate(prog: str) -> argparse.ArgumentParser:
    from stdit.evaluate import arguments as parser

    return parser(prog)


def compare(prog: str) -> argparse.ArgumentParser:
    from stdit.compare import arguments as parser

    return parser(prog)


def training(prog: str) -> argparse.ArgumentParser:
    parser = train.arguments(prog)
    parser.add_argument("--nproc", type=int)
    return parser


PARSERS: dict[str, Callable[[str], argparse.ArgumentParser]] = {
    "init": init.arguments,
    "curate": curate.arguments,
    "extract": extraction.arguments,
    "train": training,
    "find-batch-size": find_batch_size.arguments,
    "plan-compute": plan_compute.arguments,
    "train-stages": train_stages.arguments,
    "forecast": train_stages.arguments,
    "generate": prompts.arguments,
    "evaluate": evaluate,
    "compare": compare,
    "convert": arguments.convert,
    "transfer": arguments.transfer,
    "ema": arguments.ema,
    "summary": arguments.summary,
}
MODULES = {
    "stdit.curate": "curate",
    "pipelines.curate_clips": "curate",
    "stdit.extract": "extract",
    "stdit.generate": "generate",
    "stdit.evaluate": "evaluate",
    "stdit.compare": "compare",
    "stdit.find_batch_size": "find-batch-size",
    "stdit.plan_compute": "plan-compute",
    "stdit.weights.convert": "convert",
    "stdit.weights.transfer": "transfer",
    "stdit.training.post_hoc_ema": "ema",
    "stdit.models.cost": "summary",
    "pipelines.extract_features": "extract",
    "pipelines.train_stages": "train-stages",
    "pipelines.generate_videos": "generate",
    "pipelines.evaluate_runs": "evaluate",
}


def split(command: str) -> tuple[str | None, list[str]]:
    """The verb that a command runs, and its arguments; None: a module with no verb, which only has to exist."""
    words = shlex.split(command)
    if words[0] == "stdit":
        assert words[1] in (*cli.VERBS, "VERB"), f"{command}: no such verb"
        return (words[1], words[2:]) if words[1] != "VERB" else (None, [])
    if "stdit/train.py" in words:
        return "train", words[words.index("stdit/train.py") + 1 :]
    if words[0] == "deepspeed":
        return None, []
    assert importlib.util.find_spec(words[2]), f"{command}: no such module"
    return MODULES.get(words[2]), words[3:]


def load(verb: str, options: argparse.Namespace) -> None:
    """Loads the config or plan that a command names, with its overrides."""
    if verb in ("train-stages", "forecast"):
        plans.resolve(plans.read(options.plan, options.set), str(options.plan))
    elif verb == "extract":
        load_config(options.config, ExtractConfig, options.set)
    elif verb == "curate":
        load_config(options.config, CurateConfig, options.set)
    elif verb == "train":
        load_config(options.config, Config, options.set)
    elif verb == "summary":
        assert "model" in read_extended(options.config)


FOUND = [(page, command) for page in (*PAGES, *CONFIGS) for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"), FOUND, ids=lambda x: str(x.relative_to(ROOT)) if isinstance(x, Path) else x
)
def test_every_command_parses_and_its_config_loads(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, words = split(command)
    if verb is None or not words:  # a module with arguments of its own, or a verb's bare name
        return
    options = PARSERS[verb](f"stdit {verb}").parse_args(words)
    named = str(getattr(options, "plan", None) or getattr(options, "config", None) or "")
    if named.startswith("configs/"):
        load(verb, options)


def test_every_verb_is_documented() -> None:
    documented = {split(command)[0] for page, command in FOUND if page.suffix == ".md"}
    assert set(cli.VERBS) <= documented


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_named_config_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(
        r"\b(?:configs|docs|stdit|pipelines|cluster|benchmarks)/[\w./-]+\.(?:yaml|md|py|sbatch|json)\b", text
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("command", sorted({c for page, c in FOUND if c.startswith("stdit summary --config configs")}))
def test_every_summary_runs(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert " M" in capsys.readouterr().out


def test_the_cluster_stage_trains_on_the_features_of_its_extraction() -> None:
    extract = load_config(ROOT / "configs/extract/wan_t5xxl.yaml", ExtractConfig)
    plan = plans.read(ROOT / "configs/plans/cluster-64gpu.yaml")
    stage = load_config(ROOT / "configs/stages/cluster-1-images.yaml", Config)
    assert stage.data.features == extract.out == plan.reference.extract.out
    assert extract.buckets == plan.reference.extract.buckets
    assert extract.text_encoder == plan.reference.extract.text_encoder
    assert extract.video_encoder == plan.reference.extract.video_encoder
    assert {b.key for b in stage.data.buckets} <= {b.key for b in extract.buckets}
