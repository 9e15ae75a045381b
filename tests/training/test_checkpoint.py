"""Whole or not: manifests of folders that need no training."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as quick
from hypothesis import strategies as st

from stdit import integrity
from stdit.config import ConfigError
from stdit.errors import CheckpointError
from stdit.training import checkpoint
from tests.support.rank_jobs import config_of
from tests.support.rank_jobs import settings as run_settings


def make(run_dir: Path, step: int, whole: bool = True) -> Path:
    folder = run_dir / "checkpoints" / checkpoint.folder_of_step(step)
    (folder / "transformer_ema").mkdir(parents=True)
    (folder / "shard.pt").write_bytes(bytes(range(256)) * 4)
    (folder / "transformer_ema/config.json").write_text('{"a": 1}')
    (folder / "identity.json").write_text(json.dumps({"step": step}))
    if whole:
        checkpoint.write_manifest(folder)
    return folder


def test_the_newest_whole_one_wins_whatever_latest_says(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    older = make(tmp_path, 9)
    newer = make(tmp_path, 10)
    (tmp_path / "checkpoints/latest").write_text(older.name)
    assert checkpoint.find_latest(tmp_path) == newer
    make(tmp_path, 11, whole=False)
    assert checkpoint.find_latest(tmp_path) == newer
    (tmp_path / "checkpoints/latest").unlink()
    assert checkpoint.find_latest(tmp_path) == newer
    assert checkpoint.find_latest(tmp_path) == newer


@quick(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_flipped_in_any_file_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoints/step-00000001"
    if not folder.exists():
        make(tmp_path, 1)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    reason = checkpoint.verify(folder)
    path.write_bytes(content)
    assert reason is not None
    assert path.name in reason
    assert checkpoint.verify(folder) is None


def test_missing_shortened_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "shard.pt").write_bytes(b"short")
    assert checkpoint.verify(folder) == "shard.pt has 5 bytes, its manifest says 1024"
    (folder / "shard.pt").unlink()
    assert checkpoint.verify(folder) == "shard.pt is missing"
    (folder / "manifest.json").write_text('{"files": ')
    assert "manifest.json is damaged" in str(checkpoint.verify(folder))
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        checkpoint.find_latest(tmp_path)


def steps(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(run_dir)]


def test_pruning_keeps_the_newest_and_torn_ones_go(tmp_path: Path) -> None:
    _, two, three = (make(tmp_path, step) for step in (1, 2, 3))
    torn = checkpoint.start_partial(checkpoint.partial_folder(three.with_name("step-00000004")))
    (torn / "transformer").mkdir()
    (torn / "transformer/shard.pt").write_bytes(b"half")
    checkpoint.prune(tmp_path, 2, {two, three})
    assert steps(tmp_path) == [3, 2]
    checkpoint.remove_partials(tmp_path)
    assert not torn.exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [two.name, three.name]


def test_pruning_counts_intact_checkpoints_alone(tmp_path: Path) -> None:
    _, two, three = (make(tmp_path, step) for step in (1, 2, 3))
    # Nothing is known of the older ones: none may go.
    checkpoint.prune(tmp_path, 2, {three})
    assert steps(tmp_path) == [3, 2, 1]
    # A newer one that nobody has verified does not stand for one of those kept.
    checkpoint.prune(tmp_path, 1, {two})
    assert steps(tmp_path) == [3, 2]


def test_damaged_checkpoints_are_renamed_and_count_for_nothing(tmp_path: Path) -> None:
    latest = make(tmp_path, 1)
    for _ in range(2):
        make(tmp_path, 2)
        (tmp_path / "checkpoints/step-00000002/shard.pt").write_bytes(b"")
        checkpoint.set_aside_damaged(tmp_path, latest)
        assert steps(tmp_path) == [1]
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-00000002*"))
    assert names == ["step-00000002.damaged", "step-00000002.damaged-2"]


# Beside our checkpoints: as another program, a person or a file manager leaves them.
NOT_OURS = (
    "step-best", "step-00000002.bak", "step-00000002-backup", "step-3", "step-1000", "step-00000004.damaged",
    "step-00000007.partial", "step-00000001.partial", ".universal",
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_what_has_not_our_mark_is_never_removed_or_renamed(tmp_path: Path) -> None:
    oldest, newest = make(tmp_path, 1), make(tmp_path, 5)
    for name in NOT_OURS:
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "pytorch_model.bin").write_bytes(b"theirs")
    # Called as a checkpoint, with a manifest of another program.
    other = tmp_path / "checkpoints/step-00000003"
    other.mkdir()
    (other / "manifest.json").write_text('{"files": {"a": 1}}')
    before = contents(tmp_path)
    assert checkpoint.find_latest(tmp_path) == newest
    checkpoint.remove_partials(tmp_path)
    checkpoint.set_aside_damaged(tmp_path, newest)
    checkpoint.prune(tmp_path, 1, {newest})  # step 1 is ours, and its place to be removed to is taken
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"step-00000007.partial: in the way, and not written by stdit"):
        checkpoint.start_partial(tmp_path / "checkpoints/step-00000007.partial")
    with pytest.raises(CheckpointError, match=r"step-00000003: in the way of a new checkpoint"):
        checkpoint.complete(newest, other)
    assert oldest.is_dir()


def test_whatever_has_a_name_that_a_run_may_write_is_found_before_it_begins(tmp_path: Path) -> None:
    newest, folder = make(tmp_path, 5), tmp_path / "checkpoints"
    checkpoint.start_partial(folder / "step-00000006.partial")
    (folder / "step-00000007.partial").mkdir()  # empty: it can be taken
    for name in ("step-best", "step-9", "step-00000009.bak", "step-00000009.damaged", "step-00000004.partial"):
        (folder / name).mkdir()
        (folder / name / "theirs").touch()
    (folder / "step-00000003").touch()
    checkpoint.check_in_the_way(tmp_path, newest)
    for name in ("step-00000009", "step-00000009.partial", ".universal", "latest"):
        for kind in ("folder", "file", "link"):
            path = folder / name
            if kind == "folder":
                path.mkdir()
                (path / "theirs").touch()
            elif kind == "file":
                path.touch()
            else:
                path.symlink_to("nothing")
            if name == "latest" and kind != "folder":
                checkpoint.check_in_the_way(tmp_path, newest)
            else:
                with pytest.raises(ConfigError, match=rf"{name} (is|was) .*move it elsewhere. Nothing was changed"):
                    checkpoint.check_in_the_way(tmp_path, newest)
            shutil.rmtree(path) if kind == "folder" else path.unlink()
    (tmp_path / "other").mkdir()
    checkpoint.check_in_the_way(tmp_path / "other", None)
    (tmp_path / "other/checkpoints").touch()
    with pytest.raises(ConfigError, match="checkpoints is no folder"):
        checkpoint.check_in_the_way(tmp_path / "other", None)


@pytest.mark.parametrize("call", ["stat", "iterdir"])
@pytest.mark.parametrize("where", ["", "shard.pt", "transformer_ema"])
def test_what_cannot_be_read_is_damage_and_the_one_before_it_is_used(
    call: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    real = getattr(Path, call)

    def failing(self: Path, **options: object) -> object:
        if self != newer and self.is_relative_to(newer / where):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, call, failing)
    reason = checkpoint.verify(newer)
    assert (reason is None) == (call == "iterdir" and where == "shard.pt")
    if reason is not None:
        assert "cannot be read (Input/output error)" in reason
        assert checkpoint.find_latest(tmp_path) == older
        checkpoint.check_in_the_way(tmp_path, older)
        shutil.rmtree(older)
        with pytest.raises(CheckpointError, match="no checkpoint is intact"):
            checkpoint.find_latest(tmp_path)


def test_damaged_checkpoints_are_not_among_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {1: 0.3, 2: 0.1, 3: 0.2, 4: None, 5: 0.9}
    folders = {step: make(tmp_path, step) for step in losses}
    monkeypatch.setattr(checkpoint, "load_identity", lambda c: {"validation_loss": losses[checkpoint.step_of(c)]})
    (folders[2] / "shard.pt").write_bytes(b"")
    intact = {folders[5]}
    # After a resume: those of before are verified, once.
    checkpoint.prune(tmp_path, 1, intact, best=2)
    assert steps(tmp_path) == [5, 3, 1]
    assert intact == {folders[5], folders[3], folders[1]}
    monkeypatch.setattr(checkpoint, "verify", lambda _: pytest.fail("verified again"))
    checkpoint.prune(tmp_path, 1, intact, best=1)
    assert steps(tmp_path) == [5, 3]


@pytest.mark.parametrize(("loss", "written"), [(math.nan, None), (math.inf, None), (None, None), (0.5, 0.5)])
def test_a_validation_loss_that_is_not_finite_is_none(loss: float, written: float | None, tmp_path: Path) -> None:
    config = config_of(run_settings(tmp_path))
    assert checkpoint.make_identity(config, {}, {}, 1, 8, {}, 1, validation_loss=loss)["validation_loss"] == written


def test_a_removal_that_was_cut_off_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 1)
    newest = make(tmp_path, 2)

    def cut(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 1, {newest})
    assert steps(tmp_path) == [2]
    checkpoint.remove_partials(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [newest.name]


def test_any_bit_flipped_in_a_manifest_is_damage(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for bit in range(0, len(content) * 8, 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        # White space and the case of an escape are the only bits that say nothing.
        if json_of(bytes(flipped)) != json_of(content):
            assert checkpoint.verify(folder) is not None, bit
    for nothing in ({}, [], {"files": {}}, {"files": {}, "sha256": integrity.digest({})}, None):
        manifest.write_text(json.dumps(nothing))
        assert "manifest.json is damaged" in str(checkpoint.verify(folder))


def json_of(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_what_nfs_keeps_of_removed_files_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, whole=False)
    (folder / ".nfs000000000000002a00000001").write_bytes(b"of a file that is mapped")
    checkpoint.write_manifest(folder)
    assert checkpoint.verify(folder) is None
    (folder / ".nfs000000000000002a00000001").unlink()
    assert checkpoint.verify(folder) is None


def test_a_manifest_is_not_written_without_the_shards_of_every_rank(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, whole=False)
    (entry,) = integrity.sync_files(folder, [folder / "shard.pt"]).values()
    with pytest.raises(CheckpointError, match="shard-of-rank-1.pt missing"):
        checkpoint.write_manifest(folder, {"shard.pt": entry, "shard-of-rank-1.pt": entry})
    with pytest.raises(CheckpointError, match="shard.pt missing or cut"):
        checkpoint.write_manifest(folder, {"shard.pt": {**entry, "size": 7}})
    assert not (folder / "manifest.json").exists()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        checkpoint.find_weights(tmp_path)
    torn = make(tmp_path, 1, whole=False)
    with pytest.raises(CheckpointError, match=r"no manifest.json"):
        checkpoint.read_identity(torn)
