"""Token routing, alignment, µP, contrastive flow matching, min-SNR and wsd in whole runs: resumed, on several ranks,
lengthened, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from stdit import extract
from stdit.config import ConfigError, VisionEncoderConfig, merge
from stdit.models.stdit import STDiT
from stdit.training import checkpoint
from stdit.training.adapters import HEAD
from stdit.training.data import open_data
from stdit.training.derive import complete
from tests.support import clip_folder
from tests.support.encoders import save_vision
from tests.support.rank_jobs import config_of, for_ranks, numbers, run, settings
from tests.support.rank_pool import Pool, RankError

pytestmark = pytest.mark.distributed

ROUTING = {"share": 0.5, "start": 1, "end": 3}
FLOW = {
    "model": {"depth": 4},
    "diffusion": {"contrastive_weight": 0.05},
    "train": {
        "token_routing": ROUTING,
        "alignment": {"block": 1},
        "optimizer": {"lr_schedule": "wsd", "decay_share": 0.5, "mup": {"base_width": 16}},
        "ema": {"profiles": {"sigma_rel": [0.1], "every": 3}},
        "checkpoint_every": 3,
    },
}
DDPM = {
    "model": {"depth": 4, "learned_variance": True},
    "diffusion": {"objective": "ddpm", "min_snr_gamma": 5.0},
    "train": {
        "token_routing": ROUTING,
        "alignment": {"block": 0, "weight": 2.0},
        "optimizer": {"mup": {"base_width": 16}},
        "precision": "bf16",
        "activation_checkpointing": True,
    },
}


SPARSE_DENSE = {
    "model": {"depth": 4, "sparse_dense": [1, 3]},
    "train": {"token_routing": ROUTING | {"path_drop": 0.3, "dense_finish": 0.34}, "checkpoint_every": 3},
}


def data_for(path: Path, ranks: int, stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    data = merge(settings(path), changes)
    data["data"]["buckets"] = for_ranks(ranks)
    return merge(data, {"train": {"zero_stage": stage}})


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / checkpoint.folder_of_step(step)
    names = ("transformer", "transformer_ema")
    return {name: (folder / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in names}


FEATURES = {"target": "features", "features_dim": 6, "projector_dim": 16, "block": 1}
REPA = {"model": {"depth": 3}, "train": {"alignment": FEATURES, "checkpoint_every": 3}}
IREPA = {"model": {"depth": 3}, "train": {"alignment": FEATURES | {"irepa": True}, "precision": "bf16"}}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, FLOW),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, FLOW), (3, FLOW), (2, DDPM), (2, REPA), (3, REPA), (2, IREPA), (3, IREPA))
        ),
    ],
)
def test_a_run_with_every_switch_resumes_bit_by_bit(pair: Pool, stage: int, changes: dict, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", 2, stage, changes))[0]
    broken = data_for(tmp_path / "broken", 2, stage, changes)
    pair(run, broken, 3)
    assert numbers(pair(run, broken)[0]["metrics"]) == numbers(whole["metrics"])
    assert weights(tmp_path / "broken", 6) == weights(tmp_path / "whole", 6)
    assert whole["metrics"][-1]["alignment_loss"] < whole["metrics"][0]["alignment_loss"] - 0.02
    last, again = (tmp_path / name / "checkpoints/step-00000006" for name in ("whole", "broken"))
    STDiT.from_pretrained(last / "transformer_ema")  # strict: without the head
    assert (again / HEAD).read_bytes() == (last / HEAD).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_fused_run_resumes_bit_by_bit_through_the_switch_to_dense_steps(
    pair: Pool, stage: int, tmp_path: Path
) -> None:
    whole = pair(run, data_for(tmp_path / "whole", 2, stage, SPARSE_DENSE))[0]
    for stop in (3, 5):  # dense from the fifth step of six
        broken = data_for(tmp_path / f"broken-{stop}", 2, stage, SPARSE_DENSE)
        pair(run, broken, stop)
        assert numbers(pair(run, broken)[0]["metrics"]) == numbers(whole["metrics"])
        assert weights(tmp_path / f"broken-{stop}", 6) == weights(tmp_path / "whole", 6)
    never = merge(SPARSE_DENSE, {"train": {"token_routing": {"dense_finish": 0.0}}})
    sparse = pair(run, data_for(tmp_path / "sparse", 2, stage, never))[0]
    same = [a["loss"] == b["loss"] for a, b in zip(whole["metrics"], sparse["metrics"], strict=True)]
    assert same == [True] * 4 + [False] * 2
    trained = STDiT.from_pretrained(tmp_path / "whole/checkpoints/step-00000006/transformer_ema")
    assert trained.fusion is not None
    assert trained.fusion.mask_token.any()


def test_routed_and_aligned_tokens_do_not_depend_on_the_number_of_ranks(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    switches = {"token_routing": ROUTING, "alignment": {"block": 2}, "optimizer": {"mup": {"base_width": 16}}}
    changes = {"model": {"depth": 4}, "train": switches}
    two = pair(run, data_for(tmp_path / "two", 2, 2, changes))[0]["metrics"]
    one = solo(run, data_for(tmp_path / "one", 1, 0, changes))[0]["metrics"]
    for key in ("loss", "alignment_loss"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-5)
    dense = solo(run, data_for(tmp_path / "dense", 1, 0, {"model": {"depth": 4}}))[0]["metrics"]
    assert [m["loss"] for m in one] != pytest.approx([m["loss"] for m in dense], rel=1e-5)


def test_a_model_is_aligned_to_features_that_were_extracted_and_to_no_others(solo: Pool, tmp_path: Path) -> None:
    made, vision = clip_folder.rows(tmp_path, 6), save_vision(tmp_path / "vision", width=6)
    encoder = VisionEncoderConfig(path=str(vision), pixels_per_feature=4)
    whole = clip_folder.config(tmp_path, made, text_encoder=None, vision_encoder=encoder)
    without = whole.model_copy(update={"vision_encoder": None, "out": tmp_path / "without"})
    wider = encoder.model_copy(update={"path": str(save_vision(tmp_path / "wider", width=8))})
    other = whole.model_copy(update={"vision_encoder": wider, "out": tmp_path / "other"})
    data = merge(settings(tmp_path / "run"), {"model": {"in_channels": 3, "num_classes": 2, "text_dim": None}})
    data["data"] = {
        "train_split": "train",
        "buckets": [{"frames": f, "height": 16, "width": 16, "batch_size": 2} for f in (1, 5)],
    }
    data = merge(data, {"train": {"steps": 3, "alignment": {"target": "features", "block": 0, "projector_dim": 16}}})
    data["diffusion"] = {}

    def on(chosen: clip_folder.LocalExtraction, **alignment: Any) -> dict[str, Any]:
        return merge(data, {"data": {"features": str(extract.run(chosen))}, "train": {"alignment": alignment}})

    found = solo(run, on(whole))[0]["metrics"]
    assert all(0 < line["alignment_loss"] < 2 for line in found)
    checkpoint_folder = tmp_path / "run/checkpoints/step-00000003"
    assert STDiT.from_pretrained(checkpoint_folder / "transformer_ema").settings.in_channels == 3  # strict: no head
    assert '"features_dim": 6' in (checkpoint_folder / "identity.json").read_text()
    with pytest.raises(RankError, match=r"train.alignment.features_dim: 6 -> 8"):
        solo(run, merge(on(other), {"train": {"steps": 4}}))
    with pytest.raises(
        RankError, match=r"target is features, but data.features .*without holds none of a vision encoder"
    ):
        solo(run, on(without))
    with pytest.raises(ConfigError, match=r"features_dim is 6, but .* has features of Dinov2Model, 8 wide"):
        open_data(config_of(on(other, features_dim=6)))
    with pytest.raises(ConfigError, match=r"without holds none of a vision encoder"):
        open_data(config_of(on(without, features_dim=6)))
    with pytest.raises(ConfigError, match=r"synthetic: train.alignment.features_dim cannot follow"):
        complete(config_of(merge(data, {"data": {"features": "synthetic"}})))


def test_the_logged_loss_is_without_weights_and_contrast(solo: Pool, tmp_path: Path) -> None:
    """Of the first step, before the weights differ: comparable between recipes."""
    for name, changes, plain in (
        ("flow", {"diffusion": {"contrastive_weight": 0.5}}, {}),
        (
            "ddpm",
            {"diffusion": {"objective": "ddpm", "min_snr_gamma": 0.05}},
            {"diffusion": {"objective": "ddpm"}},
        ),
    ):
        one, other = (
            solo(run, data_for(tmp_path / f"{name}-{i}", 1, 0, c))[0]["metrics"] for i, c in enumerate((changes, plain))
        )
        assert one[0]["loss"] == other[0]["loss"]
        assert one[0]["grad_norm"] != other[0]["grad_norm"]
        assert one[-1]["loss"] != other[-1]["loss"]


def schedule(steps: int, share: float) -> dict[str, Any]:
    return {"train": {"steps": steps, "optimizer": {"lr_schedule": "wsd", "decay_share": share, "warmup_steps": 2}}}


def test_a_stable_phase_that_goes_on_is_as_if_planned_so(solo: Pool, tmp_path: Path) -> None:
    solo(run, data_for(tmp_path / "short", 1, 1, schedule(8, 0.5)))
    saved = sorted(folder.name for folder in (tmp_path / "short/checkpoints").glob("step-*"))
    assert saved == ["step-00000004", "step-00000008"]  # before the decay, too
    shutil.copytree(tmp_path / "short/checkpoints/step-00000004", tmp_path / "long/checkpoints/step-00000004")
    long = solo(run, data_for(tmp_path / "long", 1, 1, schedule(10, 0.3)))[0]
    planned = solo(run, data_for(tmp_path / "planned", 1, 1, schedule(10, 0.3)))[0]
    assert numbers(long["metrics"]) == numbers(planned["metrics"])[4:]
    assert weights(tmp_path / "long", 10) == weights(tmp_path / "planned", 10)
    assert "train.steps: 8 -> 10" in long["said"]
    assert "train.optimizer.decay_share: 0.5 -> 0.3" in long["said"]


def test_a_decay_that_has_begun_cannot_be_taken_back(solo: Pool, tmp_path: Path) -> None:
    solo(run, data_for(tmp_path, 1, 1, schedule(4, 0.5)))
    with pytest.raises(RankError, match=r"train.steps: 4 -> 6 \(wsd: the decay began after step 2"):
        solo(run, data_for(tmp_path, 1, 1, schedule(6, 0.5)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"sequence_parallel": 2}}, "not spread evenly over the ranks"),
        ({"train": {"control": {"blocks": 1}}, "init": {"source": "runs/base"}}, "the branch's residuals"),
        ({"model": {"dynamic_tokens": True}}, "train.token_routing of blocks 1 to 2 does not go with dynamic"),
        ({"train": {"token_routing": {"path_drop": 0.1}}}, "path_drop 0.1 needs model.sparse_dense"),
        ({"model": {"sparse_dense": [1, 2]}}, "sparse_dense is .1, 2."),
        ({"samples": {"sampler": {"path_drop": True}}}, "sampler.path_drop: true needs"),
        ({"model": {"depth": 2}}, "train.token_routing has start 1, end 3"),
        ({"train": {"alignment": {"block": 4}}}, "train.alignment.block 4: expected 0 to 3"),
        ({"train": {"alignment": {"block": 0}}, "model": {"patch_size": [1, 1, 1]}}, "single numbers"),
        ({"train": {"alignment": {"block": 2}}, "model": {"exit_depths": [[0.8, 2]]}}, "only 2 blocks run"),
        (
            {"train": {"alignment": {"block": 0}, "lora": {"rank": 2}}, "init": {"source": "x"}},
            "lora and train.alignment",
        ),
    ],
)
def test_switches_are_refused_where_they_cannot_work(changes: dict[str, Any], named: str) -> None:
    base = {"model": {"depth": 4}, "train": {"token_routing": ROUTING}}
    with pytest.raises(ConfigError, match=named):
        config_of(merge(merge(settings("runs/x"), base), changes))
