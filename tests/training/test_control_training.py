"""A control branch by the one loop: the base stays as it is, the run comes back bit for bit, and it draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stdit import cli, extract
from stdit.config import ConfigError
from stdit.data.features import Sample
from stdit.data.loader import collate
from stdit.models.control import STDiTControl
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint
from stdit.training.data import open_data
from stdit.training.inputs import Inputs, low_resolution
from tests.support import clip_folder
from tests.support.clip_folder import rows
from tests.support.rank_jobs import config_of, for_ranks, run, run_stopping_on_rank_1, settings
from tests.support.rank_pool import Pool

pytestmark = pytest.mark.distributed

PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to control."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = STDiT.from_settings(config_of(settings("unused")).model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def data_for(path: Path, base: Path, stage: int = 0, ranks: int = 2, control: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:  # fmt: skip
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    wanted = {"condition": "low_resolution", "factor": 2, **(control or {})}
    data = settings(path, train={"zero_stage": stage, "control": wanted, **extra, **train}, init={"source": str(base)})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


def place(run_dir: Path, step: int = 6) -> Path:
    return run_dir / "checkpoints" / checkpoint.folder_of_step(step)


def losses(found: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in found["metrics"]]


REST = [(3, "fp32"), (2, "fp32"), (2, "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), *(pytest.param(*c, marks=pytest.mark.slow) for c in REST)]
)
def test_a_branch_trains_at_every_stage_and_resumes_bitwise(
    pair: Pool, base: Path, stage: int, precision: str, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {
        "precision": precision,
        "control": {"dropout": 0.3},
        "activation_checkpointing": stage == 2,
    }
    whole = pair(run, data_for(tmp_path / "whole", base, stage, **extra))[0]
    broken = data_for(tmp_path / "broken", base, stage, **extra)
    pair(run_stopping_on_rank_1, broken, 3)
    assert losses(pair(run, broken)[0]) == losses(whole)
    for name in ("control", "control_ema"):
        a, b = (place(tmp_path / which) / name / WEIGHTS for which in ("whole", "broken"))
        assert a.read_bytes() == b.read_bytes()
    before, after = STDiTControl.of(STDiT.from_pretrained(base)).state_dict(), load_file(a)
    assert set(before) == set(after)
    assert any(not torch.equal(after[n], before[n]) for n in before if n.startswith("joins"))
    assert not (place(tmp_path / "whole") / "transformer").exists()


def test_a_checkpoint_is_the_base_with_its_branch_and_nothing_else(
    solo: Pool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look = {"validation": {"every": 2, "samples": 3, "times": [0.5]}, "samples": {"every": 2, "count": 2, "sampler": {"steps": 2, "guidance_scale": 2.0}}}  # fmt: skip
    found = solo(run, {**data_for(tmp_path, base, 0, 1, {"blocks": 2}, steps=2), **look})[0]
    assert "validation_loss" in found["metrics"][-1]
    assert list((tmp_path / "samples").iterdir())
    folder = checkpoint.find_weights(tmp_path)
    assert folder.name == "control_ema"
    said = json.loads((folder.parent / "identity.json").read_text())
    assert (said["trained"], said["base"]["folder"]) == ("control", str(base))
    assert said["architecture"]["depth"] == 2
    model, control = adapters.load_trained(folder)
    assert isinstance(control, STDiTControl)
    assert len(control.blocks) == 2
    original = STDiT.from_pretrained(base).state_dict()
    assert all(torch.equal(weight, original[n]) for n, weight in model.state_dict().items())
    with pytest.raises(ConfigError, match=f"trained a control branch, not a model; start from its base, {base}"):
        adapters.resolve_weights(tmp_path, "ema")

    # `stdit convert` writes the branch, of the run, the checkpoint or the folder; what it can't be is said with its
    # base.
    for source, out in ((tmp_path, "a"), (folder.parent, "b"), (folder, "c")):
        assert cli.main(["convert", str(source), "--to", str(tmp_path / out)]) == 0
        written = STDiTControl.from_pretrained(tmp_path / out).state_dict()
        assert all(torch.equal(weight, written[n]) for n, weight in control.state_dict().items())
    assert cli.main(["convert", str(tmp_path), "--to", str(tmp_path / "a"), "--weights", "model"]) == 0  # replaces it
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (folder.parent / "control" / WEIGHTS).read_bytes()
    capsys.readouterr()
    for verb, expected in (
        (["transfer", str(tmp_path), "--to", str(tmp_path / "d")], f"a control branch, not a model; take its base, {base}"),
        (["convert", str(tmp_path), "--to", str(tmp_path / "d"), "--layout", "diffusers"], f"for the model, convert its base, {base}"),
        (["convert", str(tmp_path), "--to", str(tmp_path / "d"), "--set", "depth=1"], "--set depth cannot be used"),
        (["convert", str(tmp_path / "a"), "--to", str(tmp_path / "d.pt"), "--layout", "dit"], "a control branch, which has no published layout"),
    ):  # fmt: skip
        assert cli.main(verb) == 2
        assert expected in capsys.readouterr().err
        assert not [p for p in tmp_path.iterdir() if p.name in ("d", "d.pt")]


def test_the_control_condition_is_computed_from_the_clip_or_comes_with_it(base: Path, tmp_path: Path) -> None:
    x0 = torch.arange(64.0).reshape(1, 1, 1, 8, 8)
    small = low_resolution(x0, 4)
    assert small.shape == x0.shape
    assert small[0, 0, 0, 0, 0] == x0[0, 0, 0, :4, :4].mean()
    assert torch.equal(small, low_resolution(small, 4))
    mean = torch.randn(1, 2, 8, 8)
    own = Sample(0, mean, None, None, 0, 8.0, 8, 8, "c", control=2 * mean[:, :1])
    batch = collate([own, own], [0, 1], for_bucket())

    def told(condition: str, **control: Any) -> torch.Tensor:
        data = data_for(tmp_path, base, 0, 1, {"condition": condition, **control})
        data["data"]["buckets"] = data["data"]["buckets"][:1]
        config = config_of(data)
        made = Inputs(config, {"shift": [1.0], "scale": [0.5]}, CPU)
        return made.control(batch, made.latents(batch, None), 1)["control"]

    assert torch.equal(told("first_frame")[0], (mean[:, :1] - 1) * 0.5)
    assert torch.equal(told("paired")[0], (2 * mean[:, :1] - 1) * 0.5)
    assert not told("paired", dropout=1.0).any()


def for_bucket() -> Any:
    return config_of(settings("runs/x")).data.buckets[0]


def test_what_cannot_be_is_refused_by_key(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train.control.condition is paired, but data.features synthetic holds no cond"
    ):
        open_data(config_of(data_for(tmp_path, base, 0, 1, {"condition": "paired"})))
    with pytest.raises(ConfigError, match=r"train.control.factor 3 does not divide bucket 2x8x8's latents, 8x8"):
        open_data(config_of(data_for(tmp_path, base, 0, 1, {"factor": 3})))
    with pytest.raises(ConfigError, match=r"first_frame: of an image \(bucket 1x8x8\)"):
        config_of(data_for(tmp_path, base, 0, 1, {"condition": "first_frame"}))
    with pytest.raises(ConfigError, match=r"train.control.blocks is 3, but the model has 2 blocks"):
        config_of(data_for(tmp_path, base, 0, 1, {"blocks": 3}))
    with pytest.raises(ConfigError, match=r"train.control needs init.source"):
        config_of({**data_for(tmp_path, base), "init": None})


def test_a_branch_learns_from_conditions_that_were_extracted(solo: Pool, tmp_path: Path) -> None:
    made = rows(tmp_path, 6)
    for row in made:
        row["depth"] = row["path"]  # the clip itself: all that there is to know
    features = extract.run(clip_folder.config(tmp_path, made, text_encoder=None, control_column="depth"))
    model = {"in_channels": 3, "num_classes": 2, "text_dim": None}
    data = data_for(tmp_path / "run", tmp_path / "base", 0, 1, {"condition": "paired"}, steps=2)
    data["model"] = {**data["model"], **model}
    STDiT.from_settings(config_of({**data, "init": {"source": "x"}}).model).save_pretrained(tmp_path / "base")
    data["data"] = {
        "features": str(features),
        "train_split": "train",
        "buckets": [{"frames": f, "height": 16, "width": 16, "batch_size": 2} for f in (1, 5)],
    }
    found = solo(run, data)[0]
    assert [line["step"] for line in found["metrics"]] == [1, 2]
    assert adapters.load_trained(checkpoint.find_weights(tmp_path / "run"))[1] is not None
