"""Muon: orthogonal steps of whole matrices, the same ones under every ZeRO stage and on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import ConfigError, ModelConfig, OptimizerConfig
from stdit.models.control import STDiTControl
from stdit.models.stdit import STDiT
from stdit.training.muon import Piece, ZeroLayout, hidden_matrices, orthogonalize
from stdit.training.optimizer import make_optimizer, parameter_groups
from tests.support.rank_jobs import config_of, engine_steps, for_ranks, numbers, run, run_stopping_on_rank_1, settings
from tests.support.rank_pool import Pool

MUON = {"name": "muon", "learning_rate": 3e-3}


def data_for(path: Path, stage: int, ranks: int = 2, **train: Any) -> dict[str, Any]:
    # Tiny models lie below ZeRO-3's threshold for parameters that are kept whole: here all are partitioned.
    extra = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    data = settings(path, train={"zero_stage": stage, "optimizer": MUON, **extra, **train})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 24), (2, 24, 96), (1, 1, 8)])
def test_singular_values_end_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    step = orthogonalize(matrices) / (0.2 * max(shape[1:]) ** 0.5)
    before = torch.linalg.svdvals(matrices / matrices.norm(dim=(1, 2), keepdim=True))
    after = torch.linalg.svdvals(step)
    assert ((after > 0.75).sum(1) >= (before > 0.004).sum(1)).all()
    assert (after < 1.25).all()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ step @ vh.mT  # diagonal: the same singular vectors
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)


def test_a_matrix_of_rank_one_does_not_diverge() -> None:
    torch.manual_seed(0)
    matrix = torch.outer(torch.randn(96), torch.randn(24))
    step = orthogonalize(matrix[None])[0] / (0.2 * 96**0.5)
    torch.testing.assert_close(step / step.norm(), matrix / matrix.norm(), rtol=1e-3, atol=1e-4)
    assert 0.75 < step.norm() < 1.25


def test_a_step_is_that_of_torchs_muon() -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(24, 48), torch.randn(4, 24, 48)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    from stdit.training.muon import Muon

    mine = Muon([{"params": [ours], "parts": [1], "weight_decay": 0.1}], 0.95, lr=0.02)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for p, optimizer in ((ours, mine), (theirs, peer)):
            p.grad = gradient.clone()
            optimizer.step()
    # Singular values of both are near 1, by other polynomials.
    moved, expected = (ours - weight).detach().flatten(), (theirs - weight).detach().flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.97
    assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.2)


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    from stdit.training.muon import Muon

    fused = torch.nn.Parameter(torch.zeros(24, 8))
    apart = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    gradient = torch.randn(24, 8)
    fused.grad = gradient.clone()
    for p, part in zip(apart, gradient.chunk(3), strict=True):
        p.grad = part.clone()
    Muon([{"params": [fused], "parts": [3], "weight_decay": 0.0}], 0.9, lr=0.1).step()
    Muon([{"params": apart, "parts": [1, 1, 1], "weight_decay": 0.0}], 0.9, lr=0.1).step()
    torch.testing.assert_close(fused, torch.cat(list(apart)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "full"},
        {"conditioning": "joint", "num_classes": None, "pooled_dim": 8},
        {"mlp": "swiglu"},
        {"conditioning": "adaln_zero", "text_dim": None},
        {"dynamic_width": True, "dynamic_tokens": True},
    ],
)
def test_muon_trains_the_matrices_of_attention_and_mlps_alone(changes: dict[str, Any]) -> None:
    config = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "text_dim": 8, **changes}
    model = STDiT.from_settings(ModelConfig.model_validate(config))
    names = {id(p): n for n, p in model.named_parameters()}
    hidden = {names[id(p)]: parts for p, parts in hidden_matrices(model).items()}
    last = {name.rsplit(".", 2)[1] for name in hidden}
    assert last <= {"qkv", "proj", "q_linear", "kv_linear", "fc1", "fc2", "w12", "w3"}
    assert {"qkv", "proj"} <= last
    assert all(
        parts == {"qkv": 3, "kv_linear": 2, "w12": 2}.get(name.rsplit(".", 2)[1], 1) for name, parts in hidden.items()
    )
    in_groups = [
        p for group in parameter_groups(model, OptimizerConfig(name="muon", weight_decay=0.1)) for p in group["params"]
    ]
    assert sorted(names[id(p)] for p in in_groups) == sorted(names.values())


def test_muon_trains_the_copied_blocks_of_a_control_branch() -> None:
    base = STDiT.from_settings(ModelConfig(hidden_size=32, depth=4, num_heads=2))
    branch = STDiTControl.of(base, 2)
    per_block = len(hidden_matrices(base)) // 4
    assert len(hidden_matrices(branch)) == 2 * per_block > 0
    assert not any(p is join.weight for p in hidden_matrices(branch) for join in branch.joins)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_of_ranks_become_the_steps_of_whole_matrices(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange, without processes: ranks take turns, each called with what the others sent."""
    torch.manual_seed(0)
    matrices = [torch.randn(6, 4), torch.randn(4, 6), torch.randn(5, 5), torch.randn(3, 9)]
    flat = torch.cat([m.flatten() for m in matrices])
    length = -(-len(flat) // size)
    partitions = [torch.nn.functional.pad(part, (0, length - len(part))) for part in flat.split(length)]
    pieces: list[list[Piece]] = [[] for _ in range(size)]
    begin = 0
    for i, matrix in enumerate(matrices):
        for rank in range(size):
            first, last = max(begin, rank * length), min(begin + matrix.numel(), (rank + 1) * length)
            if first < last:
                pieces[rank].append(Piece(i, first - begin, first - rank * length, last - first))
        begin += matrix.numel()
    layouts = [ZeroLayout([(m.shape[0], m.shape[1]) for m in matrices], pieces, rank) for rank in range(size)]
    assert sorted(i for layout in layouts for i in layout.owned) == [0, 1, 2, 3]
    found = in_turns(layouts, partitions, monkeypatch)
    expected = torch.cat([orthogonalize(m[None])[0].flatten() for m in matrices])
    torch.testing.assert_close(torch.cat(found)[: len(flat)], expected, rtol=1e-4, atol=1e-5)


def in_turns(
    layouts: list[ZeroLayout], partitions: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """`orthogonalize` of all ranks in threads, whose all-to-all meets at a barrier."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    size = len(layouts)
    barrier, posted = threading.Barrier(size), {}
    local = threading.local()

    def exchange(result: torch.Tensor, values: torch.Tensor, incoming: list[int], outgoing: list[int]) -> None:
        posted[local.rank] = values.split(outgoing)
        barrier.wait(30)
        result.copy_(torch.cat([posted[other][local.rank] for other in range(size)]))
        barrier.wait(30)

    monkeypatch.setattr("torch.distributed.all_to_all_single", exchange)

    def turn(rank: int) -> torch.Tensor:
        local.rank = rank
        return layouts[rank].orthogonalize(partitions[rank], torch.device("cpu"))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(turn, range(size)))


@pytest.fixture(scope="module")
def reference(solo: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, no ZeRO."""
    return solo(engine_steps, data_for(tmp_path_factory.mktemp("run"), 0, 1), 0)[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((stage, "fp32") for stage in range(4)),
        (1, "bf16"),
        *(pytest.param(stage, "bf16", marks=pytest.mark.slow) for stage in (0, 2, 3)),
    ],
)
def test_two_ranks_at_every_zero_stage_equal_one_rank(
    pair: Pool, reference: dict[str, Any], stage: int, precision: str, tmp_path: Path
) -> None:
    found, other = pair(engine_steps, data_for(tmp_path, stage, precision=precision), 1)
    assert found["losses"] == pytest.approx(other["losses"], rel=0, abs=0, nan_ok=True)
    if precision == "bf16":
        assert found["losses"] == pytest.approx(reference["losses"], rel=2e-2, nan_ok=True)
        return
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-4, nan_ok=True)
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((s, "fp32") for s in range(3)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, "fp32"), (1, "bf16"))),
    ],
)
def test_muon_resumes_bitwise(pair: Pool, stage: int, precision: str, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", stage, precision=precision))[0]
    broken = data_for(tmp_path / "broken", stage, precision=precision)
    pair(run_stopping_on_rank_1, broken, 3)
    assert numbers(pair(run, broken)[0]["metrics"]) == numbers(whole["metrics"])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_muon_goes_on_with_another_number_of_ranks(pair: Pool, solo: Pool, stage: int, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", stage))[0]["metrics"]
    pair(run, data_for(tmp_path / "broken", stage), 3)
    resumed = solo(run, data_for(tmp_path / "broken", stage, 1))[0]
    assert [m["loss"] for m in resumed["metrics"]] == pytest.approx([m["loss"] for m in whole], rel=1e-4)


@pytest.mark.distributed
def test_offloaded_partitions_take_the_same_steps(pair: Pool, tmp_path: Path) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    plain = pair(run, data_for(tmp_path / "plain", 2))[0]["metrics"]
    found = pair(run, data_for(tmp_path / "offloaded", 2, deepspeed=offload))[0]["metrics"]
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in plain], rel=1e-5)


def test_muon_with_lora_is_refused(tmp_path: Path) -> None:
    data = settings(tmp_path, train={"optimizer": MUON, "lora": {"rank": 2}}, init={"source": str(tmp_path)})
    with pytest.raises(ConfigError, match="muon.*train.lora"):
        config_of(data)


def test_adamw_is_what_it_was() -> None:
    model = STDiT.from_settings(ModelConfig(hidden_size=32, depth=1, num_heads=2))
    assert type(make_optimizer(model, OptimizerConfig())) is torch.optim.AdamW
