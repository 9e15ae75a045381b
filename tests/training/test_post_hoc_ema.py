"""Averages of any width from snapshots of two: the arithmetic, and `stdit ema` over a run whose weights are drawn, not
trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stdit.cli import main
from stdit.config import Config, ConfigError, EMAConfig, EMAProfilesConfig, validate
from stdit.inference.job import find_source
from stdit.models import lora
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint, ema_snapshots
from stdit.training.adapters import load_trained, resolve_weights
from stdit.training.ema import EMA
from stdit.training.post_hoc_ema import LeastSquares, Snapshot, _write_weights
from tests.support.rank_jobs import settings
from tests.support.runs import make_run, model_config

STEPS, EVERY = 64, 8
TRACKED, WANTED = (0.05, 0.1), 0.07


def tracked(*sigma_rel: float, every: int = EVERY) -> EMAConfig:
    return EMAConfig(profiles=EMAProfilesConfig(sigma_rel=sigma_rel, every=every))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of 64 steps with snapshots of two widths, and the true average of a third; weights walk at random."""
    run = make_run(tmp_path_factory.mktemp("profiles") / "run", model_config(), step=STEPS)
    identity = checkpoint.load_identity(run / checkpoint.FOLDER / checkpoint.folder_of_step(STEPS))
    config = tracked(*TRACKED)
    identity["config"]["train"] |= {"ema": config.model_dump(mode="json"), "checkpoint_every": EVERY}
    model = STDiT.from_settings(model_config())
    weights, generator = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    ema = EMA(lambda: list(weights.values()), tracked(*TRACKED, WANTED))
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for weight in weights.values():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        ema.update(step)
        if ema_snapshots.is_due(config, step, STEPS):
            with ema_snapshots.new_snapshot(run, step) as folder:
                for width in TRACKED:
                    state = ema_snapshots.half(dict(zip(weights, ema.profiles[width], strict=True)))
                    adapters.save_trained(model, state, folder / ema_snapshots.profile_name(width))
                (folder / checkpoint.IDENTITY).write_text(json.dumps({**identity, "step": step}))
    return run, dict(zip(weights, ema.profiles[WANTED], strict=True))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def error_of(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference as a share of that of what the weights have moved."""
    assert found.keys() == expected.keys()
    initial = dict(STDiT.from_settings(model_config()).named_parameters())
    off, moved = (
        sum(float((a[name].double() - b[name].double()).square().sum().detach()) for name in expected)
        for a, b in ((found, expected), (expected, initial))
    )
    return (off / moved) ** 0.5


# ------------------------------------------------------------------------------------- arithmetic


def test_profiles_are_inner_products_of_powers() -> None:
    time = np.linspace(0, 8, 80_001)[1:]
    for end_a, end_b in ((8, 8), (5, 8), (8, 5)):
        found = LeastSquares([end_a, end_b], TRACKED)
        assert found.gammas == pytest.approx([16.97, 6.94], rel=1e-2)  # as in the paper
        a, b = (
            np.where(time <= end, (g + 1) * time**g / end ** (g + 1), 0)
            for end, g in zip((end_a, end_b), found.gammas, strict=True)
        )
        expected = [[(a * a).sum(), (a * b).sum()], [(a * b).sum(), (b * b).sum()]]
        np.testing.assert_allclose(found.gram, np.array(expected) * 1e-4, rtol=2e-3)


def test_the_least_squares_give_a_snapshot_itself_and_what_stands_still_as_it_is() -> None:
    times = [1000.0 * number for number in range(1, 33) for _ in TRACKED]
    squares = LeastSquares(times, TRACKED * 32)
    for index, width in ((-2, 0.05), (-1, 0.1)):
        found = squares.solve(32_000, width)
        assert found.error < 1e-6
        np.testing.assert_allclose(found.coefficients, np.eye(64)[index], atol=1e-6)
    errors = {width: squares.solve(32_000, width).error for width in (0.02, 0.04, 0.07, 0.15, 0.25)}
    assert errors == pytest.approx({0.02: 0.04, 0.04: 0.0028, 0.07: 0.00098, 0.15: 0.0023, 0.25: 0.034}, rel=0.1)
    for few in (2, 8, 64):
        assert LeastSquares(times[:few], TRACKED * (few // 2)).solve(
            times[few - 1], 0.2
        ).coefficients.sum() == pytest.approx(1)


def test_the_error_is_that_of_the_profile() -> None:
    squares = LeastSquares([4, 4, 8, 8], TRACKED * 2)
    found = squares.solve(8, 0.15)
    time = np.linspace(0, 8, 80_001)[1:]

    def profile(end: float, gamma: float) -> np.ndarray:
        return np.where(time <= end, (gamma + 1) * time**gamma / end ** (gamma + 1), 0)

    wanted = profile(8, LeastSquares([8], [0.15]).gammas[0])
    summed = sum(c * profile(*tg) for c, *tg in zip(found.coefficients, squares.times, squares.gammas, strict=True))
    assert found.error == pytest.approx(np.linalg.norm(summed - wanted) / np.linalg.norm(wanted), rel=1e-2)
    assert found.error > 0.01


# ---------------------------------------------------------------------------------------- command


def test_a_third_width_comes_from_snapshots_of_two(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, true = made
    arguments = ["ema", str(run), "--sigma-rel", str(WANTED), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "sigma_rel 0.07 at step 64, from 8 snapshots of sigma_rel 0.05, 0.1; error of the profile 1.34%" in said
    folder = checkpoint.find_weights(tmp_path / "out")
    found = weights_of(folder)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    newest = ema_snapshots.list_snapshots(run)[-1]
    of_tracked = [error_of(weights_of(newest / ema_snapshots.profile_name(width)), true) for width in TRACKED]
    assert error_of(found, true) < 0.002 < 0.04 < min(of_tracked)
    # What takes weights takes these.
    assert resolve_weights(tmp_path / "out", "ema") == folder
    assert find_source(tmp_path / "out", "ema").facts["step"] == STEPS
    torch.testing.assert_close(load_trained(folder)[0].state_dict(), found)
    assert checkpoint.load_identity(tmp_path / "out")["ema_sigma_rel"] == WANTED
    before = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_tracked_width_gives_its_own_snapshot(made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    run, _ = made
    for width, step in ((0.05, 64), (0.1, 48)):
        out = tmp_path / f"{width}"
        assert main(["ema", str(run), "--sigma-rel", str(width), "--step", str(step), "--out", str(out)]) == 0
        own = run / ema_snapshots.FOLDER / checkpoint.folder_of_step(step) / ema_snapshots.profile_name(width)
        expected = {name: tensor.float() for name, tensor in weights_of(own).items()}
        torch.testing.assert_close(weights_of(checkpoint.find_weights(out)), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_averaged_is_said_in_a_line(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made
    out = tmp_path / "out"

    def refused(*arguments: str, run: Path = run) -> str:
        assert main(["ema", str(run), "--out", str(out), *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    assert "no snapshots of EMA profiles here" in refused("--sigma-rel", "0.1", run=tmp_path)
    for width in ("0.3", "0", "nan", "-1"):
        assert "expected 0.001 to 0.28" in refused("--sigma-rel", width)
    said = refused("--sigma-rel", "0.01")
    assert "0.01: 8 snapshots of sigma_rel 0.05, 0.1 give its profile with an error of 52.1% (10% at most)" in said
    assert "they serve for 0.0304 to 0.211" in said
    assert "no snapshot of it in" in refused("--sigma-rel", "0.1", "--step", "3")
    for inside in (ema_snapshots.FOLDER, checkpoint.FOLDER):
        assert "where the run itself writes" in refused("--sigma-rel", "0.1", "--out", str(run / inside / "x"))
    assert not out.exists()
    out.mkdir()
    (out / "thesis.md").write_text("mine")
    assert "stdit ema has not written; nothing was changed" in refused("--sigma-rel", "0.1")
    assert [p.name for p in out.iterdir()] == ["thesis.md"]


def test_a_damaged_snapshot_is_named_and_the_others_serve_without_it(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made
    (tmp_path / "run").mkdir()
    for folder in ema_snapshots.list_snapshots(run)[-3:]:
        (tmp_path / "run" / ema_snapshots.FOLDER).mkdir(exist_ok=True)
        (tmp_path / "run" / ema_snapshots.FOLDER / folder.name).symlink_to(folder)
    oldest = ema_snapshots.list_snapshots(tmp_path / "run")[0]
    arguments = ["ema", str(tmp_path / "run"), "--sigma-rel", "0.1", "--out", str(tmp_path / "out")]
    file = oldest / ema_snapshots.profile_name(0.05) / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(arguments) == 2
        assert f"{oldest}: {file.relative_to(oldest)} is not what was written" in capsys.readouterr().err
    finally:
        file.write_bytes(content)
    oldest.unlink()
    assert main(arguments) == 0


def test_adapters_are_averaged_as_adapters(tmp_path: Path) -> None:
    model = STDiT.from_settings(model_config())
    lora.add_adapter(model, rank=2, seed=0)
    state = {name: p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}
    for name, factor in (("a", 1.0), ("b", 3.0)):
        adapters.save_trained(model, {k: (factor * v).half() for k, v in state.items()}, tmp_path / name)
    snapshots = [Snapshot(tmp_path / name, 0.05, time) for time, name in enumerate("ab", 1)]
    _write_weights(snapshots, [-0.5, 1.5], tmp_path / "b", tmp_path / "out")
    adapters.save_trained(model, {k: 4.0 * v for k, v in state.items()}, tmp_path / "expected")
    lora.restore_adapter(model, tmp_path / "out")  # the same layers
    fresh = STDiT.from_settings(model_config())
    lora.load_adapter(fresh, tmp_path / "out", "average")  # its hash is that of its tensors
    found, expected = (load_file(tmp_path / name / lora.LORA_WEIGHT_NAME_SAFE) for name in ("out", "expected"))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


# ----------------------------------------------------------------------------------- what is kept


def test_half_keeps_values_that_float16_does_not_hold() -> None:
    found = ema_snapshots.half({"a": torch.tensor([0.1, 65504.0]), "b": torch.tensor([1e6]), "c": torch.zeros(0)})
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.float16, "b": torch.float32, "c": torch.float16,
    }  # fmt: skip


def test_a_run_that_goes_back_sets_later_snapshots_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        with ema_snapshots.new_snapshot(tmp_path, step) as folder:
            (folder / "x.json").write_text("{}")
    with pytest.raises(KeyError), ema_snapshots.new_snapshot(tmp_path, 8):
        raise KeyError
    checkpoint.start_partial(tmp_path / ema_snapshots.FOLDER / "step-00000008.partial")
    ema_snapshots.prepare(tmp_path, 4)
    assert sorted(p.name for p in (tmp_path / ema_snapshots.FOLDER).iterdir()) == [
        "step-00000002", "step-00000004", "step-00000006.replaced",
    ]  # fmt: skip


WRONG: list[tuple[Callable[[dict[str, object]], object], str]] = [
    (
        lambda e: e.update(profiles={"every": 3}),
        r"profiles.every is 3, but .*checkpoint_every is 2, which does not divide it",
    ),
    (lambda e: e.update(profiles={"every": 2, "sigma_rel": [0.1, 0.1]}), "expected different widths, found 0.1, 0.1"),
    (lambda e: e.update(profiles={"every": 2, "sigma_rel": [0.3]}), "less than or equal to 0.28"),
    (lambda e: e.update(profiles={"every": 2}, every=4), "profiles.every is 2, no multiple of every, 4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_profiles_that_cannot_be_kept_are_refused(
    change: Callable[[dict[str, object]], object], message: str, tmp_path: Path
) -> None:
    data = settings(tmp_path, train={"checkpoint_every": 2})
    change(data["train"]["ema"])
    with pytest.raises(ConfigError, match=message):
        validate(data, Config, "test")
