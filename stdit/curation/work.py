"""The work that may run elsewhere: analysing a file, scoring clips, captioning clips. One task in, one result out.

    worker = make_worker("analyse", config)
    result = worker({"key": …, "path": …})      # {"key": …, "content": bytes, "error": None}

Tasks and results hold plain values, so that threads, processes and Ray actors serve alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from stdit.config import CurateConfig
from stdit.curation.clips import ClipView, spread

Task = dict[str, Any]
# Clips of a task of the scorers.
SCORED_AT_ONCE = 16


class Worker(Protocol):
    def __call__(self, task: Task) -> Task: ...

    def close(self) -> None: ...


Mapper = Callable[[str, CurateConfig, Sequence[Task]], Iterator[Task]]


def make_worker(kind: str, config: CurateConfig) -> Worker:
    """kind: analyse, score, or caption:NAME. ConfigError: weights or functions that are not there."""
    if kind == "analyse":
        return Analyser(config)
    if kind == "score":
        return Scoring(config)
    return Captioning(config, kind.partition(":")[2])


class Analyser:
    """{"key", "path"} -> {"key", "content": of Analysis.loads, "error", "again": whether a later run may do better}."""

    def __init__(self, config: CurateConfig) -> None:
        from stdit.curation.analysis_process import AnalysisProcess

        self.process = AnalysisProcess(config.stall_timeout_s)

    def __call__(self, task: Task) -> Task:
        from stdit.data.decoding import DecodeError

        content, reason = None, None
        try:
            content = self.process.analyse(task["path"])
        except DecodeError as error:
            reason = error.reason
        return {"key": task["key"], "content": content, "error": reason, "again": self.process.stalled}

    def close(self) -> None:
        self.process.close()


class Scoring:
    """{"clips": […], each with the "scorers" it lacks} -> {"scores": {clip: {scorer: columns}}}."""

    def __init__(self, config: CurateConfig) -> None:
        from stdit.curation.scoring import ClipScorer

        self.scorer = ClipScorer(config.scorers, config.stall_timeout_s)

    def __call__(self, task: Task) -> Task:
        found = {
            clip["key"]: self.scorer.score(clip_view(clip), clip["scorers"], clip["crop"], Path(clip["file"]))
            for clip in task["clips"]
        }
        return {"scores": found}

    def close(self) -> None:
        self.scorer.close()


class Captioning:
    """{"clips": […]} -> {"captions": {clip: (text or None, reason or None)}, "again": clips to ask about again another time}."""

    def __init__(self, config: CurateConfig, name: str) -> None:
        from stdit.curation.captioners import load_captioner
        from stdit.data.subprocess_decoder import SubprocessDecoder

        self.config = next(caption for caption in config.captions if caption.name == name)
        self.captioner = load_captioner(self.config)
        self.decoder = SubprocessDecoder("pyav", config.stall_timeout_s)

    def __call__(self, task: Task) -> Task:
        from stdit.curation.captioners import Failed
        from stdit.data.decoding import DecodeError, DecodeTimeout

        found: dict[str, tuple[str | None, str | None]] = {}
        views, keys, again = [], [], []
        for clip in task["clips"]:
            view = clip_view(clip)
            try:
                indices = spread(view.start, view.end, self.config.frames)
                view.pictures = self.decoder.read_part(clip["file"], indices, None, clip["crop"])
            except DecodeError as error:
                found[clip["key"]] = (None, error.reason)
                again += [clip["key"]] if isinstance(error, DecodeTimeout) else []
                continue
            views.append(view)
            keys.append(clip["key"])
        for key, answer in zip(keys, self.captioner.caption(views) if views else [], strict=True):
            if isinstance(answer, Failed):
                found[key] = (None, answer.reason)
                again += [key] if answer.passing else []
            else:
                found[key] = (answer, None) if isinstance(answer, str) else (None, "no_text")
        return {"captions": found, "again": again}

    def close(self) -> None:
        self.decoder.close()


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
        worker = make_worker(kind, config)
        try:
            yield from map(worker, tasks)
        finally:
            worker.close()
        return
    own, started = threading.local(), []

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
