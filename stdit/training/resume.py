"""Writing a checkpoint and coming back from one. What makes it whole is in stdit.training.checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from stdit.config import Config, ConfigError, dump
from stdit.files import atomic_write
from stdit.models.control import Controlled
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint
from stdit.training.adapters import Base
from stdit.training.changes import check_resumable
from stdit.training.checkpoint import FOLDER, IDENTITY, TRANSFORMER, CheckpointError, tag_of
from stdit.training.checks import Data
from stdit.training.distributed import Ranks
from stdit.training.ema import EMA
from stdit.training.engine import Engine
from stdit.training.universal import convert

DONE = "done.json"
# Where a checkpoint is made ready for another number of ranks; removed once it is loaded.
UNIVERSAL = ".universal"


@dataclass
class Place:
    """Where a run stands."""

    step: int = 0
    samples_seen: int = 0
    data_position: dict[str, int] = field(default_factory=dict)
    # What to come back from, if anything.
    checkpoint: Path | None = None
    # Ranks that wrote it.
    world_size: int = 1
    notes: tuple[str, ...] = ()
    # The frozen weights that adapters or a control branch belong to.
    base: Base | None = None

    def advance(self, samples: int, data_position: dict[str, int]) -> None:
        """One step on, which took `samples`."""
        self.step += 1
        self.samples_seen += samples
        self.data_position = data_position


def finished(config: Config, data: Data, world_size: int) -> bool:
    """Whether the run directory says that this run is done, with a checkpoint to show for it. ConfigError: it holds
    another run."""
    path = config.run_dir / DONE
    if not path.is_file():
        return False
    done = json.loads(path.read_text())
    folder = config.run_dir / FOLDER / done["checkpoint"]
    if done["step"] < config.train.steps or not (folder / checkpoint.MANIFEST).is_file():
        return False
    check_resumable(json.loads((folder / IDENTITY).read_text()), config, world_size, data.fingerprint)
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.run_dir}: done already, at step {done['step']} of {config.train.steps}", file=sys.stderr)
    return True


def place_of(config: Config, data: Data, world_size: int) -> Place:
    """The place of the newest intact checkpoint of `config.run_dir`, or the beginning. Says what was passed over.

    ConfigError: the checkpoint is of a run with other settings. CheckpointError: no completed one is intact.
    """
    found = checkpoint.newest(config.run_dir)
    checkpoint.remove_torn(config.run_dir)
    shutil.rmtree(config.run_dir / FOLDER / UNIVERSAL, ignore_errors=True)
    if found is None:
        return Place()
    identity = json.loads((found / IDENTITY).read_text())
    notes = check_resumable(identity, config, world_size, data.fingerprint)
    return Place(
        identity["step"],
        identity["samples_seen"],
        identity["data_position"],
        found,
        identity["world_size"],
        tuple(notes),
        Base(**identity["base"]) if identity.get("base") else None,
    )


def begin(config: Config, ranks: Ranks) -> None:
    """Makes the run directory and writes the resolved config into it. OSError, on every rank: it cannot be written."""
    ranks.agree(lambda: atomic_write(config.run_dir / "config.yaml", dump(config)))


def init_folder(config: Config) -> Path:
    """The folder with weights that `init.source` means. ConfigError: there is none."""
    assert config.init is not None
    try:
        return adapters.weights_of(config.init.source, config.init.weights)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"init.source: {error}") from error


def make_model(config: Config, place: Place, ranks: Ranks, say: Callable[[str], None]) -> STDiT | Controlled:
    """The model to hand to the engine: of a checkpoint its moving average, which stdit.training.ema takes up before
    the weights themselves are loaded; of another run what carries over; else a new one. What `config` freezes is frozen."""
    beside = config.train.lora is not None or config.train.control is not None
    if place.checkpoint is not None and not beside:
        return STDiT.from_pretrained(place.checkpoint / TRANSFORMER["ema"])
    if config.init is None:
        return STDiT.from_settings(config.model, config.seed)
    # Looked up once: it reads every byte of the checkpoint to see that it is whole.
    if place.base is not None:
        held = place.base
        folder = ranks.agree(lambda: adapters.find_base(held, config))
        place.base = Base(str(folder.resolve()), held.fingerprint)  # it may have moved
    else:
        folder = ranks.agree(lambda: init_folder(config))
        place.base = ranks.agree(lambda: adapters.base_of(folder)) if beside else None
    model, carried = adapters.open_base(folder, config)
    say(carried)
    if place.checkpoint is None:
        trained = adapters.begin(model, config)
    else:
        kind = checkpoint.kind_of(config.train)
        trained = adapters.resume(model, place.checkpoint / checkpoint.folder_name(kind, "ema"), config)
    if beside:
        learns = {
            wants: sum(p.numel() for p in trained.parameters() if p.requires_grad is wants) for wants in (True, False)
        }
        say(f"trained: {learns[True]:,} weights, beside {learns[False]:,} that stay as they are")
    return trained


def load(engine: Engine, place: Place, ranks: Ranks) -> None:
    """Weights and optimizer of `place.checkpoint`, converted first if another number of ranks wrote it."""
    assert place.checkpoint is not None
    found, folder = place.checkpoint, place.checkpoint.parent
    if needs_conversion(place, engine.stage, ranks.size):
        folder = folder / UNIVERSAL
        ranks.agree(lambda: convert(found, folder / found.name))
    engine.load(folder, found.name)
    ranks.barrier()
    if ranks.first:
        shutil.rmtree(place.checkpoint.parent / UNIVERSAL, ignore_errors=True)


def needs_conversion(place: Place, zero_stage: int, world_size: int) -> bool:
    """Whether the shards of `place.checkpoint` are cut for another number of ranks."""
    return place.checkpoint is not None and zero_stage > 0 and place.world_size != world_size


def save(engine: Engine, ema: EMA, config: Config, data: Data, place: Place, ranks: Ranks) -> Path:
    """Writes the checkpoint of `place` and removes old ones. Collective.

    CheckpointError: a disk that is full, say. Only the rank that fails raises it; it must end the process, because
    the others wait for it in DeepSpeed's barriers. The checkpoints before this one stay as they are.
    """
    folder = config.run_dir / FOLDER / tag_of(place.step)
    if ranks.agree(lambda: (folder / checkpoint.MANIFEST).exists()):
        return folder
    try:
        _write(engine, ema, config, data, place, ranks, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(config.run_dir).free / 2**20
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
            f"{free:,.0f} MiB are free there. Checkpoints before it are as they were: make room and run the same command again"
        ) from error
    return folder


def _write(engine: Engine, ema: EMA, config: Config, data: Data, place: Place, ranks: Ranks, folder: Path) -> None:
    # A folder without manifest that a save left behind which was cut off.
    ranks.agree(lambda: shutil.rmtree(folder, ignore_errors=True))
    engine.save(folder.parent, folder.name)
    kind = checkpoint.kind_of(config.train)
    _write_trained(engine, folder / checkpoint.folder_name(kind, "model"))
    with ema.swapped():
        _write_trained(engine, folder / checkpoint.folder_name(kind, "ema"))
    if ranks.first:
        settings = adapters.parts(engine.module)[0].config
        identity = checkpoint.make_identity(
            config,
            architecture={k: v for k, v in settings.items() if not k.startswith("_")},
            data={
                "video_encoder": data.video_encoder,
                "text_encoder": data.text_encoder,
                "classes": list(data.classes),
                "features": data.fingerprint,
            },
            step=place.step,
            samples_seen=place.samples_seen,
            data_position=place.data_position,
            world_size=ranks.size,
            base=place.base and asdict(place.base),
        )
        atomic_write(folder / IDENTITY, json.dumps(identity, indent=1))
        checkpoint.seal(folder)
        checkpoint.prune(config.run_dir, config.train.keep_checkpoints)
    ranks.barrier()


def _write_trained(engine: Engine, folder: Path) -> None:
    """What the engine trains, as its masters have it, on rank 0."""
    state = engine.weights()
    if engine.ranks.first:
        adapters.write(engine.module, state, folder)


def finish(config: Config, place: Place, ranks: Ranks) -> None:
    """Writes done.json: the record, written last, that the run is complete."""
    if ranks.first:
        done = {"step": place.step, "samples_seen": place.samples_seen, "checkpoint": tag_of(place.step)}
        atomic_write(config.run_dir / DONE, json.dumps(done))
    ranks.barrier()
