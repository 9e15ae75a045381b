"""The work that may run elsewhere: analysing a file, scoring clips, captioning clips. One task in, one result out.

    worker = make_worker("analyse", config)
    result = worker({"key": …, "path": …, "digest": …})      # {"key": …, "content": bytes, "error": None}

Tasks and results hold plain values, so that threads, processes and Ray actors serve alike. Footage in an object store
is fetched by the worker, into the cache of its machine. StoreError, of a worker: a store that does not answer, or gives
no access.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stdit.config import CurateConfig, parse_location
from stdit.curation.clips import ClipView, spread
from stdit.curation.sources import local_file
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object

if TYPE_CHECKING:
    from stdit.data.subprocess_decoder import SubprocessDecoder

Task = dict[str, Any]
# Clips of a task of the scorers.
SCORED_AT_ONCE = 16


class Worker(Protocol):
    def __call__(self, task: Task) -> Task: ...

    def close(self) -> None: ...


Mapper = Callable[[str, CurateConfig, Sequence[Task]], Iterator[Task]]


def make_worker(kind: str, config: CurateConfig, clips: int | None = None, beside: int = 1) -> Worker:
    """kind: analyse, score, or caption:NAME. clips: to caption, where that is known; beside: captioners of this
    machine. ConfigError: weights or functions that are not there."""
    if kind == "analyse":
        return Analyser(config)
    if kind == "score":
        return Scoring(config)
    return Captioning(config, kind.partition(":")[2], clips, beside)


class Analyser:
    """{"key", "path", "digest"} -> {"key", "content": of Analysis.loads, "error", "again": whether a later run may do
    better}."""

    def __init__(self, config: CurateConfig) -> None:
        from stdit.curation.analysis_process import AnalysisProcess

        self.process = AnalysisProcess(config.stall_timeout_s)
        self.cache = ObjectCache.of(config.cache)

    def __call__(self, task: Task) -> Task:
        from stdit.data.decoding import DecodeError

        content, reason = None, None
        try:
            with local_file(self.cache, task["path"], task["digest"]) as path:
                content = self.process.analyse(path)
            again = self.process.stalled
        except DecodeError as error:
            reason, again = error.reason, self.process.stalled
        except StoreError as error:
            reason, again = _of_object(error), True
        return {"key": task["key"], "content": content, "error": reason, "again": again}

    def close(self) -> None:
        self.process.close()


class Scoring:
    """{"clips": […], each with the "scorers" it lacks} -> {"scores": {clip: {scorer: columns}}}."""

    def __init__(self, config: CurateConfig) -> None:
        from stdit.curation.scoring import ClipScorer

        self.scorer = ClipScorer(config.scorers, config.stall_timeout_s)
        self.cache = ObjectCache.of(config.cache)

    def __call__(self, task: Task) -> Task:
        return {"scores": {clip["key"]: self._score(clip) for clip in task["clips"]}}

    def _score(self, clip: Task) -> Task:
        from stdit.curation.scoring import AGAIN, ERROR

        try:
            with local_file(self.cache, clip["file"], clip["digest"]) as path:
                return self.scorer.score(clip_view(clip), clip["scorers"], clip["crop"], path)
        except StoreError as error:
            return {name: {ERROR: _of_object(error), AGAIN: True} for name in clip["scorers"]}

    def close(self) -> None:
        self.scorer.close()


@dataclass(frozen=True)
class _Look:
    """A clip with its pictures, or the reason why there are none; again: another time there may be."""

    key: str
    view: ClipView | None
    reason: str | None = None
    again: bool = False


class Captioning:
    """{"clips": […]} -> {"captions": {clip: (text or None, reason or None)}, "again": clips to ask about again another
    time}."""

    def __init__(self, config: CurateConfig, name: str, clips: int | None = None, beside: int = 1) -> None:
        from stdit.curation.captioners import load_captioner
        from stdit.data.decoder_pool import DecoderPool, decoder_workers

        self.config = next(caption for caption in config.captions if caption.name == name)
        self.captioner, self.cache = load_captioner(self.config), ObjectCache.of(config.cache)
        workers = decoder_workers(config.decoder_workers, clips, beside)
        self.pool = DecoderPool("pyav", config.stall_timeout_s, workers)

    def __call__(self, task: Task) -> Task:
        (result,) = self.map([task])
        return result

    def map(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Results in order; while one batch is captioned, clips of the next are decoded."""
        clips = (clip for task in tasks for clip in task["clips"])
        looked = self.pool.map(self._look, clips, max((len(task["clips"]) for task in tasks), default=1))
        for task in tasks:
            yield self._caption([next(looked) for _ in task["clips"]])

    def _look(self, decoder: SubprocessDecoder, clip: Task) -> _Look:
        """A clip with its pictures."""
        from stdit.data.decoding import DecodeError, DecodeTimeout

        view = clip_view(clip)
        try:
            indices = spread(view.start, view.end, self.config.frames)
            with local_file(self.cache, clip["file"], clip["digest"]) as path:
                view.pictures = decoder.read_part(path, indices, None, clip["crop"])
            return _Look(clip["key"], view)
        except DecodeError as error:
            return _Look(clip["key"], None, error.reason, isinstance(error, DecodeTimeout))
        except StoreError as error:
            return _Look(clip["key"], None, _of_object(error), True)

    def _caption(self, looks: Sequence[_Look]) -> Task:
        from stdit.curation.captioners import Failed

        found: dict[str, tuple[str | None, str | None]] = {k.key: (None, k.reason) for k in looks if k.view is None}
        again = [look.key for look in looks if look.again]
        views = {look.key: look.view for look in looks if look.view is not None}
        answers = self.captioner.caption(list(views.values())) if views else []
        for key, answer in zip(views, answers, strict=True):
            if isinstance(answer, Failed):
                found[key] = (None, answer.reason)
                again += [key] if answer.passing else []
            else:
                found[key] = (answer, None) if isinstance(answer, str) else (None, "no_text")
        return {"captions": found, "again": again}

    def close(self) -> None:
        self.pool.close()


def _of_object(error: StoreError) -> str:
    """The reason that an object cannot be used. StoreError, the error itself: it says nothing of the object."""
    if not is_of_object(error):
        raise error
    return str(error.strerror)


def clip_view(clip: Task) -> ClipView:
    """A clip of a task as scorers and captioners see it: without the numbers of its analysis."""
    return ClipView(
        clip["path"],
        clip["start"],
        clip["end"],
        clip["fps"],
        clip["height"],
        clip["width"],
        clip["caption"],
        clip["row"],
    )


def local_mapper(kind: str, config: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
    """Results as they come: files by `config.workers` processes, the rest in this one."""
    workers = min(config.workers, len(tasks)) if kind == "analyse" else 1
    if workers <= 1:
        worker = make_worker(kind, config, sum(len(task.get("clips", ())) for task in tasks))
        try:
            if isinstance(worker, Captioning):
                yield from worker.map(tasks)
            else:
                yield from map(worker, _ahead(config, tasks) if kind == "analyse" else tasks)
        finally:
            worker.close()
        return
    own, started = threading.local(), []  # while one worker fetches an object, others decode

    def work(task: Task) -> Task:
        if not hasattr(own, "worker"):
            own.worker = make_worker(kind, config)
            started.append(own.worker)
        return own.worker(task)

    from concurrent.futures import as_completed

    with ThreadPoolExecutor(workers, thread_name_prefix="curate") as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for worker in started:
                worker.close()


def _ahead(config: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
    """`tasks` of analysis; while one is at work, the next one's object is fetched."""
    files = ObjectCache.of(config.cache).ahead([parse_location(task["path"]) for task in tasks], 2)
    for task, _ in zip(tasks, files, strict=True):
        yield task
