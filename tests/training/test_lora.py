"""LoRA by the one loop: adapters alone are trained, averaged and saved, and the run comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stdit import cli
from stdit.config import Config, ConfigError, merge, validate
from stdit.models import lora
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint
from stdit.training.data import open_data
from tests.support.rank_jobs import for_ranks, run, run_spoiled, run_stopping_on_rank_1, settings
from tests.support.rank_pool import Pool, RankError

pytestmark = pytest.mark.distributed

PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
FILE = "pytorch_lora_weights.safetensors"


def shaken(model: STDiT, seed: int = 0) -> STDiT:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to adapt."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = validate(settings("unused"), Config, "test")
    shaken(STDiT.from_settings(config.model)).save_pretrained(folder)
    return folder


def data_for(path: Path, base: Path, stage: int = 0, ranks: int = 2, adapter: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:  # fmt: skip
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    train = {"zero_stage": stage, "lora": {"rank": 2, **(adapter or {})}, **extra, **train}
    data = settings(path, train=train, init={"source": str(base)})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


def place(run_dir: Path, step: int = 6) -> Path:
    return run_dir / "checkpoints" / checkpoint.folder_of_step(step)


def result(run_dir: Path, step: int = 6) -> dict[str, bytes]:
    """The files of adapters and their averages."""
    return {name: (place(run_dir, step) / name / FILE).read_bytes() for name in ("lora", "lora_ema")}


def losses(found: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in found["metrics"]]


EVERY = [(0, "fp32"), (2, "bf16")]
REST = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"), [*EVERY, *(pytest.param(*combination, marks=pytest.mark.slow) for combination in REST)]
)
def test_adapters_train_at_every_stage_and_resume_bitwise(
    pair: Pool, base: Path, stage: int, precision: str, tmp_path: Path
) -> None:
    whole = pair(run, data_for(tmp_path / "whole", base, stage, precision=precision))[0]
    broken = data_for(tmp_path / "broken", base, stage, precision=precision)
    pair(run_stopping_on_rank_1, broken, 3)
    resumed = pair(run, broken)[0]
    assert losses(resumed) == losses(whole)
    assert result(tmp_path / "broken") == result(tmp_path / "whole")
    state = load_file(place(tmp_path / "whole") / "lora_ema" / FILE)
    assert any(weight.any() for name, weight in state.items() if "lora_B" in name)


def test_nothing_but_adapters_is_trained_or_saved(pair: Pool, base: Path, tmp_path: Path) -> None:
    told = pair(run, data_for(tmp_path, base, 2, optimizer={"learning_rate": 3e-3}))[0]["said"]
    folder = place(tmp_path)
    count = sum(weight.numel() for weight in load_file(folder / "lora" / FILE).values())
    assert f"{count:,} trainable parameters, " in told
    assert not list(folder.rglob("diffusion_pytorch_model*"))
    state = load_file(folder / "lora" / FILE)
    assert {name.rsplit(".", 2)[1] for name in state} == {"lora_A", "lora_B"}
    layers = {name.rsplit(".lora_", 1)[0].split(".", 2)[2] for name in state}
    assert layers == {f"{a}.{b}" for a in ("attn", "attn_temp") for b in ("qkv", "proj")} | {
        f"cross_attn.{b}" for b in ("q_linear", "kv_linear", "proj")
    }
    # No shard holds the base: all that is saved is a fraction of it.
    whole = (base / "diffusion_pytorch_model.safetensors").stat().st_size
    trained = sum(weight.numel() for weight in state.values()) * 4
    assert sum(p.stat().st_size for p in folder.glob("*.pt")) < 4 * trained + 2**16 < whole + 2**17
    said = json.loads((folder / "identity.json").read_text())
    assert said["trained"] == "lora"
    assert said["base"] == {"folder": str(base), "fingerprint": adapters.weights_fingerprint(base)}


def test_the_result_is_base_plus_adapter_here_and_in_diffusers(solo: Pool, base: Path, tmp_path: Path) -> None:
    lively = {"rank": 2, "targets": ["attn.qkv", "mlp.fc1", "final_layer.linear"], "alpha": 4.0}
    solo(run, data_for(tmp_path, base, 0, 1, lively, steps=3, optimizer={"learning_rate": 0.1, "warmup_steps": 0}))
    folder = checkpoint.find_weights(tmp_path)
    model, control = adapters.load_trained(folder)
    assert control is None
    plain = STDiT.from_pretrained(base)
    x = torch.linspace(-1, 1, 128).reshape(1, 1, 2, 8, 8)
    told = {"timestep": 500.0, "class_labels": torch.tensor([1])}
    before = plain(x, **told).sample
    plain.load_lora_adapter(folder, prefix=None, use_safetensors=True)  # diffusers' own
    # By whether weights want gradients torch chooses how it takes some products.
    found = model.eval().requires_grad_(False)(x, **told).sample
    assert torch.equal(found, plain.requires_grad_(False)(x, **told).sample)
    assert not torch.allclose(found, before, atol=1e-3)
    # By hand, and so with alpha / rank = 2.
    state, byhand = load_file(folder / FILE), STDiT.from_pretrained(base)
    for name, layer in byhand.named_modules():
        if f"{name}.lora_A.weight" in state:
            layer.weight.data += 2.0 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]  # type: ignore
    torch.testing.assert_close(byhand(x, **told).sample, found, rtol=1e-4, atol=1e-5)
    # A later run begins with both in one.
    merged = adapters.load_merged(folder)
    assert not lora.adapter_names(merged)
    torch.testing.assert_close(merged.eval()(x, **told).sample, found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_another_number_of_ranks_goes_on_with_the_same_losses(
    pair: Pool, solo: Pool, base: Path, stage: int, tmp_path: Path
) -> None:
    whole = pair(run, data_for(tmp_path / "whole", base, stage))[0]
    pair(run, data_for(tmp_path / "broken", base, stage), 3)
    resumed = solo(run, data_for(tmp_path / "broken", base, stage, 1))[0]
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_dropout_and_recomputed_activations_resume_bitwise_too(pair: Pool, base: Path, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"adapter": {"dropout": 0.5}, "activation_checkpointing": True}
    whole = pair(run, data_for(tmp_path / "whole", base, 2, **extra))[0]
    without = pair(run, data_for(tmp_path / "plain", base, 2, adapter={"dropout": 0.5}))[0]
    assert losses(without) == losses(whole)
    broken = data_for(tmp_path / "broken", base, 2, **extra)
    pair(run_stopping_on_rank_1, broken, 3)
    assert losses(pair(run, broken)[0]) == losses(whole)
    assert result(tmp_path / "broken") == result(tmp_path / "whole")
    undropped = pair(run, data_for(tmp_path / "undropped", base, 2))[0]
    assert losses(undropped) != losses(whole)


def test_a_run_begins_from_an_adapter_as_from_a_model(solo: Pool, base: Path, tmp_path: Path) -> None:
    solo(run, data_for(tmp_path / "lora", base, 0, 1, steps=3))
    whole = settings(tmp_path / "next", train={"steps": 1}, init={"source": str(tmp_path / "lora")})
    assert "lora_ema" in solo(run, whole)[0]["said"]
    again = data_for(tmp_path / "again", tmp_path / "lora", 0, 1, steps=1)
    solo(run, again)
    assert json.loads((place(tmp_path / "again", 1) / "identity.json").read_text())["base"]["folder"].endswith(
        "lora_ema"
    )
    adapters.load_trained(checkpoint.find_weights(tmp_path / "again"))

    # `stdit transfer` and `stdit convert` take what init.source takes: the adapters, merged into their base.
    merged = adapters.load_merged(checkpoint.find_weights(tmp_path / "lora")).state_dict()
    for source, out in ((tmp_path / "lora", "run"), (place(tmp_path / "lora", 3), "checkpoint")):
        assert cli.main(["transfer", str(source), "--to", str(tmp_path / out)]) == 0
        found = STDiT.from_pretrained(tmp_path / out).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in merged.items())
    assert cli.main(["convert", str(tmp_path / "lora"), "--to", str(tmp_path / "ours")]) == 2  # our own layout already
    assert cli.main(["convert", str(tmp_path / "lora"), "--to", str(tmp_path / "ours"), "--set", "drop_path=0.1"]) == 0
    found = STDiT.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in merged.items())


def test_another_base_is_noticed(solo: Pool, base: Path, tmp_path: Path) -> None:
    import shutil

    own = shutil.copytree(base, tmp_path / "own")
    solo(run, data_for(tmp_path / "run", own, 0, 1, steps=2))
    shaken(STDiT.from_pretrained(own)).save_pretrained(own)
    with pytest.raises(RankError, match="not those of the training") as error:
        solo(run, data_for(tmp_path / "run", own, 0, 1, steps=4))
    assert error.value.kind == "ConfigError"
    folder = checkpoint.find_weights(tmp_path / "run")
    with pytest.raises(ConfigError, match="not those of the training"):
        adapters.load_trained(folder)
    with pytest.raises(ConfigError, match=r"^base .*nowhere: neither a checkpoint"):
        adapters.load_trained(folder, tmp_path / "nowhere")
    shutil.rmtree(own)
    with pytest.raises(ConfigError, match=r"own are gone, and init\.source .*if they were moved, set init\.source"):
        adapters.load_trained(folder)
    adapters.load_trained(folder, base)


def test_a_run_goes_on_bitwise_from_a_base_that_was_moved(solo: Pool, base: Path, tmp_path: Path) -> None:
    import shutil

    own, moved = shutil.copytree(base, tmp_path / "own"), tmp_path / "moved"
    whole = solo(run, data_for(tmp_path / "whole", own, 0, 1))[0]
    solo(run, data_for(tmp_path / "broken", own, 0, 1), 3)
    own.rename(moved)
    with pytest.raises(RankError, match=r"own are gone, and init\.source .*if they were moved, set init\.source"):
        solo(run, data_for(tmp_path / "broken", own, 0, 1))
    resumed = solo(run, data_for(tmp_path / "broken", moved, 0, 1))[0]
    assert losses(resumed) == losses(whole)
    assert result(tmp_path / "broken") == result(tmp_path / "whole")
    # From now on it is known to lie there.
    said = json.loads((place(tmp_path / "broken") / "identity.json").read_text())
    assert said["base"] == {"folder": str(moved), "fingerprint": adapters.weights_fingerprint(moved)}
    adapters.load_trained(checkpoint.find_weights(tmp_path / "broken"))
    # Other weights there are noticed as ever.
    shutil.copytree(base, own)
    shaken(STDiT.from_pretrained(own)).save_pretrained(own)
    shutil.rmtree(moved)
    with pytest.raises(RankError, match="not those of the training"):
        solo(run, data_for(tmp_path / "broken", own, 0, 1, steps=8))


def test_what_cannot_be_is_refused_by_key(base: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> Config:
        return validate(merge(data_for(tmp_path, base, 0, 1), changes), Config, "test")

    with pytest.raises(
        ConfigError, match=r"train\.lora\.targets: no linear layer is called attn\.q; there are .*attn\.qkv"
    ):
        open_data(config(train={"lora": {"targets": ["attn.q", "mlp.fc1"]}}))
    open_data(config(train={"lora": {"targets": ["mlp.fc1", "blocks.0.attn.qkv", "proj"]}}))
    with pytest.raises(ConfigError, match=r"train\.lora needs init\.source"):
        config(init=None)
    with pytest.raises(ConfigError, match="train.lora and train.control"):
        config(train={"control": {"condition": "low_resolution"}})


def test_adapters_and_bases_that_are_not_finite_are_refused(solo: Pool, base: Path, tmp_path: Path) -> None:
    data = data_for(tmp_path / "run", base, 2, 1, steps=3)
    with pytest.raises(RankError, match=r"step 3: the weights or optimizer state are not finite") as error:
        solo(run_spoiled, data, 3, "weights")
    assert error.value.kind == "Diverged"
    assert not checkpoint.list_checkpoints(tmp_path / "run")
    model = STDiT.from_pretrained(base)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = torch.inf  # pyright: ignore
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        RankError, match=r"init.source .*: its weights: blocks.1.mlp.fc1.weight hold NaN or infinity"
    ) as error:
        solo(run, data_for(tmp_path / "other", tmp_path / "base", 2, 1))
    assert error.value.kind == "ConfigError"


def test_equal_adapters_have_equal_bytes(tmp_path: Path) -> None:
    model = STDiT.from_settings(validate(settings("unused"), Config, "test").model, 0)
    lora.add_adapter(model, 2, None, None, 0.0, 0)
    # Entries of the metadata: by their names, not as they come.
    written = set()
    for number in range(16):
        lora.save_adapter(model, tmp_path / str(number))
        written.add((tmp_path / str(number) / FILE).read_bytes())
    assert len(written) == 1
    (content,) = written
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert list(json.loads(content[8 : 8 + header])["__metadata__"]) == sorted(
        ["format", "lora_adapter_metadata", lora.DIGEST_KEY]
    )
