"""The mirror of a run in an object store, at train.upload_to: what is needed to go on with it on another machine.

    URL/config.yaml, metrics.jsonl, rewinds.json
        checkpoints/step-00000020/…      the checkpoints that run_dir keeps; manifest.json, which completes one, is
                                         uploaded last
        ema_snapshots/step-00000020/…    all of them

    fetch(config, …)                     before a run resumes: the mirror's newest checkpoint, if run_dir has none as
                                         new
    mirror = RunMirror(config, …)        uploads in a thread, on rank 0
    mirror.begin()
    mirror.update()                      a checkpoint was completed
    mirror.finish()                      all is uploaded, or NotUploaded
    fetch_weights(url, "ema")            for inference: identity and weights of the newest checkpoint, and where they
                                         are

Uploads never hold up training, nor does their failure end it: what is missing is uploaded with the next checkpoint. One
is on its way at a time; its files are hard-linked first, so that they stay while older checkpoints are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from stdit.config import Config, ConfigError, Url, parse_yaml, validate
from stdit.console import echo
from stdit.data import objects
from stdit.data.objects import Digest, NoAccess, NoSuchBucket, NoSuchObject, StoreError, is_of_object
from stdit.errors import SaveError
from stdit.files import MAX_JSON_BYTES, atomic_path, flock, sha256, user_cache
from stdit.integrity import IDENTITY, MANIFEST, read_manifest, verify
from stdit.metrics_log import FILE as METRICS
from stdit.training import checkpoint, ema_snapshots, resume
from stdit.training.checkpoint import FOLDER, folder_of_step, partial_folder, step_of
from stdit.training.identity import load_identity
from stdit.training.run_dir import CONFIG
from stdit.training.spikes import REWINDS

# Files of a checkpoint that are on their way at a time.
TRANSFERS = 4
# In run_dir/checkpoints: links to the files of a checkpoint that is being uploaded.
LINKS = ".uploading"
# Files of run_dir that a run resumes with, besides its checkpoints.
FILES = (CONFIG, METRICS, REWINDS)
_FILE = re.compile(r"(\w+)/(step-\d{8,})/(.+)", re.DOTALL)


class NotUploaded(SaveError):
    """The run has ended, and its last checkpoint is on this machine alone."""


class _Damaged(Exception):
    """A checkpoint at the URL that cannot be used."""


class RunMirror:
    """Uploads the checkpoints of one run, on rank 0; on other ranks (`active` False), or without train.upload_to, it
    does nothing.

    say: gets a line about each failure. before_waiting: called before `finish` and `close` wait. Use as a context
    manager, or `close` it.
    """

    def __init__(
        self,
        config: Config,
        active: bool,
        say: Callable[[str], None],
        before_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self._say, self._before_waiting = config, say, before_waiting
        self.url = config.train.upload_to if active else None
        self.failed_in_a_row = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._due = False
        self._error: Exception | None = None

    def begin(self) -> None:
        """Uploads the config, and begins with what an earlier process has not uploaded. ConfigError: no such bucket, or
        no right to write there. SaveError: the store does not answer."""
        if self.url is not None:
            with _errors_of_the_start():
                objects.upload(self.config.run_dir / CONFIG, self.url / CONFIG)
            self.update()

    def update(self) -> None:
        """Begins to upload what is new in run_dir; at once, or when what is on its way has arrived."""
        if self.url is None:
            return
        with self._lock:
            self._due = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Waits until all is uploaded. NotUploaded: it failed."""
        self.close()
        if self._error is not None:
            raise NotUploaded(
                f"train.upload_to: {self._error}. The last checkpoint is complete in {self.config.run_dir}, and not at {self.url}: the same "
                "command uploads it"
            )

    def close(self) -> None:
        """Waits for what is on its way, and what came after it."""
        if (thread := self._thread) is not None:
            self._before_waiting()
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._due:
                    self._thread = None
                    return
                self._due = False
            try:
                self._upload_missing()
            except Exception as error:  # of the store, of the disk; whatever it is, training goes on
                self._error = error
                self.failed_in_a_row += 1
                self._say(
                    f"WARNING: train.upload_to: {resume.first_line(error)}. Training goes on; the next checkpoint is uploaded with what is "
                    f"missing ({self.failed_in_a_row} failed in a row)"
                )
            else:
                self._error, self.failed_in_a_row = None, 0

    def _upload_missing(self) -> None:
        """Uploads the log, then checkpoints that are kept and not at the URL, the newest first; then removes those that
        are not kept."""
        assert self.url is not None
        run_dir = self.config.run_dir
        names = objects.listing(self.url)
        snapshots = _whole(_steps(names, ema_snapshots.FOLDER))
        for name in FILES:
            if (run_dir / name).is_file():
                objects.upload(run_dir / name, self.url / name)
        # What resumes from a checkpoint does not make the snapshots before it.
        for folder in ema_snapshots.list_snapshots(run_dir):
            if step_of(folder) not in snapshots:
                self._upload(folder)
        there = _steps(names, FOLDER)
        whole = _whole(there)
        here = {step_of(c): c for c in checkpoint.list_checkpoints(run_dir) if (c / MANIFEST).is_file()}
        kept = self._kept(whole, here)
        for step in sorted(kept & here.keys() - whole, reverse=True):
            try:
                self._upload(here[step])
            except OSError:
                if here[step].exists():
                    raise
                # else removed meanwhile, for a newer one, which is the next to be uploaded
        for step in sorted(there.keys() - kept):
            self._remove(step, there[step])

    def _kept(self, there: set[int], here: Mapping[int, Path]) -> set[int]:
        """Steps of the checkpoints to keep, of those at the URL and in run_dir together, by the rules of run_dir."""
        assert self.url is not None
        train, steps = self.config.train, sorted(there | here.keys(), reverse=True)
        kept = set(steps[: train.keep_checkpoints])
        if train.keep_every is not None:
            kept |= {step for step in steps if step % train.keep_every == 0}
        if train.keep_best:
            losses = []
            for step in steps:
                with suppress(ConfigError, _Damaged, NoSuchObject):
                    at = self.url / FOLDER / folder_of_step(step)
                    identity = load_identity(here[step]) if step in here else _remote_identity(at)
                    if identity["validation_loss"] is not None:
                        losses.append((identity["validation_loss"], step))
            kept |= {step for _, step in sorted(losses)[: train.keep_best]}
        return kept

    def _upload(self, folder: Path) -> None:
        assert self.url is not None
        target = self.url / folder.parent.name / folder.name
        with _linked(folder) as linked:
            try:
                names = sorted(read_manifest(linked))
            except ValueError as error:
                raise OSError(f"{folder}: {error}") from error
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: objects.upload(linked / name, target / name), names))
            objects.upload(linked / MANIFEST, target / MANIFEST)

    def _remove(self, step: int, files: set[str]) -> None:
        """Removes a checkpoint, its manifest first, so that it never counts as a whole one."""
        assert self.url is not None
        folder = self.url / FOLDER / folder_of_step(step)
        if MANIFEST in files:
            with suppress(NoSuchObject):
                objects.delete(folder / MANIFEST)
        objects.delete_folder(folder)


def fetch(config: Config, features_fingerprint: str, world_size: int) -> None:
    """Fetches the mirror's newest whole checkpoint into run_dir, with the run's log, unless run_dir has one as new;
    every file is compared with its hash. A damaged one is reported, and the one before it taken.

    ConfigError: the mirror is of a run with other settings; no such bucket, no access. SaveError: the store does not
    answer.
    """
    url, run_dir = config.train.upload_to, config.run_dir
    if url is None:
        return
    with _errors_of_the_start():
        there = objects.listing(url)
        own = next((step_of(c) for c in checkpoint.list_checkpoints(run_dir) if verify(c) is None), -1)
        for step in sorted(_whole(_steps(there, FOLDER)), reverse=True):
            source = url / FOLDER / folder_of_step(step)
            try:
                identity = _remote_identity(source)
                _check_same_run(identity, config, world_size, features_fingerprint)
                if step <= own:
                    return
                echo(f"stdit: fetching {source}", file=sys.stderr)
                if not (run_dir / CONFIG).exists():  # marks the folder as a run's
                    _fetch_file(url / CONFIG, run_dir / CONFIG)
                for snapshot in sorted(_whole(_steps(there, ema_snapshots.FOLDER))):
                    folder = run_dir / ema_snapshots.FOLDER / folder_of_step(snapshot)
                    if snapshot <= step and not folder.exists():
                        _fetch_folder(url / ema_snapshots.FOLDER / folder.name, folder, checkpoint.seal_partial)
                _fetch_folder(source, run_dir / FOLDER / source.name, checkpoint.complete)
            except (_Damaged, StoreError) as error:
                if isinstance(error, StoreError) and not is_of_object(error):
                    raise
                echo(f"stdit: checkpoint {source} is skipped: {error}", file=sys.stderr)
                with suppress(NoSuchObject):  # it counts for nothing, so that this step is uploaded again
                    objects.delete(source / MANIFEST)
                continue
            for name in FILES[1:]:
                if name in there:
                    _fetch_file(url / name, run_dir / name)
            return


def fetch_weights(url: Url, weights: checkpoint.Weights) -> tuple[Url, Path]:
    """The newest whole checkpoint of the run at `url`, or the one that is there: its URL, and a folder in the user's
    cache with its identity and these weights alone. Every file is compared with its hash; what is there already is not
    fetched again.

    ConfigError: no run there, or only damaged checkpoints, which are reported. StoreError: as `objects.download`.
    """
    names = objects.listing(url)
    steps = sorted(_whole(_steps(names, FOLDER)), reverse=True)
    sources = [url] if IDENTITY in names else [url / FOLDER / folder_of_step(step) for step in steps]
    for source in sources:
        try:
            identity = _remote_identity(source)
            manifest = objects.read(source / MANIFEST, MAX_JSON_BYTES)
            kept = (IDENTITY, checkpoint.weights_folder(checkpoint.trained_kind(identity), weights))
            # By content: a run of the same name may have other weights tomorrow.
            version = hashlib.sha256(manifest + weights.encode()).hexdigest()[:32]
            folder = user_cache() / "checkpoints" / version / source.name
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (folder.parent / ".lock").open("w") as lock:
                flock(lock, fcntl.LOCK_EX)  # for other processes of this machine
                if not folder.exists() or verify(folder) is not None:
                    _fetch_folder(source, folder, checkpoint.seal_partial, kept)
            return source, folder
        except (_Damaged, StoreError) as error:
            if isinstance(error, StoreError) and not is_of_object(error):
                raise
            echo(f"stdit: checkpoint {source} is skipped: {error}", file=sys.stderr)
    raise ConfigError(
        f"{url}: neither a checkpoint (no {IDENTITY}) nor a run with an intact one (no whole {FOLDER}/step-*)"
    )


def upload_finished(config: Config) -> None:
    """Uploads what is missing of a run that is complete, on rank 0. ConfigError, NotUploaded: as RunMirror."""
    if config.train.upload_to is not None and os.environ.get("RANK", "0") == "0":
        mirror = RunMirror(config, True, lambda line: echo(line, file=sys.stderr))
        mirror.begin()
        mirror.finish()


def read_config(url: Url) -> Config | None:
    """The config of the run at a mirror; None: there is none yet. ConfigError: damaged, no such bucket, no access.
    SaveError."""
    with _errors_of_the_start():
        try:
            text = objects.read(url / CONFIG, MAX_JSON_BYTES).decode()
        except NoSuchObject:
            return None
        return validate(parse_yaml(text, url / CONFIG), Config, url / CONFIG)


def _fetch_folder(
    source: Url,
    folder: Path,
    complete: Callable[[Path, Path, Mapping[str, Any]], None],
    kept: Sequence[str] | None = None,
) -> None:
    """A folder with a manifest, by way of a partial one, which goes on where it was interrupted; kept: of it these
    files and folders alone.
    _Damaged, StoreError: as it is at the URL."""
    partial = partial_folder(folder)
    if not (partial / checkpoint.PARTIAL_MARK).is_file():
        checkpoint.start_partial(partial)
    _fetch_file(source / MANIFEST, partial / MANIFEST)
    try:
        files = read_manifest(partial)
    except ValueError as error:
        raise _Damaged(f"{source}: {error}") from error
    if outside := [name for name in files if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise _Damaged(f"{source}: {MANIFEST} lists {outside[0]!r}, which lies outside the checkpoint")

    if kept is not None:
        files = {name: entry for name, entry in files.items() if name.partition("/")[0] in kept}

    def fetch_one(name: str) -> None:
        expected, target = Digest(files[name]["size"], files[name]["sha256"]), partial / name
        if not target.is_file() or target.stat().st_size != expected.size or sha256(target) != expected.sha256:
            _fetch_file(source / name, target, expected)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(fetch_one, files))
    if folder.exists():
        checkpoint.set_aside(folder, "damaged")
    complete(partial, folder, files)


def _fetch_file(source: Url, target: Path, expected: Digest | None = None) -> None:
    with atomic_path(target) as part, part.open("wb") as file:
        objects.download(source, file, expected)


def _remote_identity(folder: Url) -> dict[str, Any]:
    """identity.json of a checkpoint at a URL. _Damaged; StoreError."""
    with tempfile.TemporaryDirectory() as copy:
        _fetch_file(folder / IDENTITY, Path(copy) / IDENTITY)
        try:
            return load_identity(Path(copy))
        except ConfigError as error:
            raise _Damaged(str(error).replace(copy, folder)) from error


def _check_same_run(identity: dict[str, Any], config: Config, world_size: int, features_fingerprint: str) -> None:
    """ConfigError: the mirror is of another run."""
    try:
        resume.check_resumable(identity, config, world_size, features_fingerprint)
    except ConfigError as error:
        raise ConfigError(
            str(error).replace(str(config.run_dir), f"train.upload_to: {config.train.upload_to}", 1)
        ) from error


@contextmanager
def _linked(folder: Path) -> Iterator[Path]:
    """A folder with hard links to all files of `folder`, which stay when those are removed; `folder` itself where there
    are none."""
    links = folder.parent / LINKS
    shutil.rmtree(links, ignore_errors=True)
    try:
        try:
            shutil.copytree(folder, links, copy_function=os.link)
        except (shutil.Error, OSError):
            if not folder.exists():
                raise
            yield folder
        else:
            yield links
    finally:
        shutil.rmtree(links, ignore_errors=True)


@contextmanager
def _errors_of_the_start() -> Iterator[None]:
    """Errors of the store before training has begun. ConfigError: no such bucket, no access. SaveError: it does not
    answer."""
    try:
        yield
    except (NoAccess, NoSuchBucket) as error:
        raise ConfigError(f"train.upload_to: {error}") from error
    except StoreError as error:
        raise SaveError(f"train.upload_to: {error}") from error


def _steps(names: Iterable[str], kind: str) -> dict[int, set[str]]:
    """Of objects' names, those of files below KIND/step-…, whole folders or not, by step."""
    found: dict[int, set[str]] = {}
    for match in filter(None, map(_FILE.fullmatch, names)):
        if match[1] == kind:
            found.setdefault(step_of(Path(match[2])), set()).add(match[3])
    return found


def _whole(steps: Mapping[int, set[str]]) -> set[int]:
    return {step for step, files in steps.items() if MANIFEST in files}
