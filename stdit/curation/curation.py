"""A curation from footage to manifest, step by step; each step computes what the cache lacks.

out/footage            a link to the footage, unless it is in an object store
    cache.sqlite       analyses, scores, captions: what is expensive
    clips.parquet      a row a clip, kept or dropped, with its scores and the reason
    report.json, curation.html
    manifest.jsonl     the kept clips, for extraction: written last
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from stdit.config import ConfigError, CurateConfig, FileSchema, NonNegative, Url, Where, read_json
from stdit.console import printable
from stdit.curation import scoring
from stdit.curation.analysis import VERSION, Analysis
from stdit.curation.cache import FILE as CACHE
from stdit.curation.cache import Cache
from stdit.curation.caption_text import check_caption
from stdit.curation.captioners import api_key, captioner_id
from stdit.curation.clips import cut_into_clips, view
from stdit.curation.duplicates import Candidate, find_duplicates
from stdit.curation.sources import Source, find_sources, make_links, object_digests, readable_name, stale_links
from stdit.curation.work import SCORED_AT_ONCE, Mapper, Task
from stdit.data.filters import passing, satisfies
from stdit.data.manifest import RESERVED_COLUMNS, STANDARD_COLUMNS, crop_text
from stdit.data.objects import StoreError
from stdit.errors import WorkFailed
from stdit.files import atomic_path, atomic_write
from stdit.outputs import claim_outputs, own_outputs

COMMAND = "curate"
MANIFEST, REPORT, CLIPS, PAGE = "manifest.jsonl", "report.json", "clips.parquet", "curation.html"
# Raised when the same numbers would be cut or compared in another way.
RANGES_VERSION = 2
# Share of the clips that a captioner or scorer may leave without an answer.
MAX_UNANSWERED = 0.5
# After so many clips in a row that a captioner does not answer for no reason of theirs, it is asked about no more.
GIVEN_UP = 100
# Columns that say which copy of a clip was kept, which scorers and captioners do not see.
OF_COPIES = ("duplicate_of", "duplicates", "kept_because")


class BadFile(FileSchema):
    path: str
    reason: str


class BrokenFile(FileSchema):
    path: str
    broken: tuple[str, ...]


class CurationReport(FileSchema):
    """report.json: every file and clip counted once."""

    files: NonNegative
    files_excluded: NonNegative
    files_bad: NonNegative
    bad_files: tuple[BadFile, ...]
    broken_files: tuple[BrokenFile, ...]
    clips: NonNegative
    kept: NonNegative
    kept_seconds: float
    kept_images: NonNegative
    dropped: NonNegative
    dropped_by_reason: dict[str, NonNegative]
    cropped: NonNegative
    captions: dict[str, dict[str, NonNegative]]
    without_caption: NonNegative
    notes: tuple[str, ...]


def read_report(out: Path) -> dict[str, Any]:
    """report.json of a curation. ConfigError: not there or damaged."""
    return read_json(out / REPORT, CurationReport)


class CurationError(WorkFailed):
    """A curation whose result cannot be used. report.json has been written and says why."""


@dataclass
class CandidateClip:
    """A clip on its way: what is known of it, and why it was dropped."""

    source: Source
    key: str  # in the cache: the file's digest (`digest`), and the frames
    start: int
    end: int
    fps: float
    height: int
    width: int
    reason: str | None = None
    detail: str | None = None
    split: str = "train"
    outranked: bool = False  # dropped as not in the `top` share of a filter
    columns: dict[str, Any] = field(default_factory=dict)
    picture: tuple[int, int, int, int] = (0, 0, 0, 0)
    hashes: Sequence[str] = ()
    errors: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str | None] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return _digest(self.key)

    @property
    def still(self) -> bool:
        return self.fps == 0

    @property
    def id(self) -> str:
        return self.source.key if self.still else f"{self.source.key}[{self.start}:{self.end}]"

    @property
    def frames(self) -> int:
        return self.end - self.start

    def drop(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail

    @property
    def crop(self) -> tuple[int, int, int, int] | None:
        """(top, left, height, width) within black bars; None: the whole picture."""
        return self.picture if self.picture != (0, 0, self.height, self.width) and self.picture[2] > 0 else None

    def row(self) -> dict[str, Any]:
        """The manifest's own columns, and the footage's."""
        frames = {} if self.still else {"start_frame": self.start, "end_frame": self.end}
        crop = {} if self.crop is None else {"crop": list(self.crop)}
        height, width = (self.crop or (0, 0, self.height, self.width))[2:]
        return {
            "path": self.source.key, "caption": self.source.caption, **frames, **crop,
            "class": self.source.class_name, "split": self.split, "fps": self.fps or None,
            "frames": self.frames, "height": height, "width": width, **self.source.extra,
        }  # fmt: skip

    def value(self, column: str) -> Any:
        """The value of a score or of a column that the manifest's row has; a crop as text."""
        if column == "crop":
            return crop_text(self.crop)
        return {**self.row(), **self.columns}.get(column)

    @property
    def visible(self) -> dict[str, Any]:
        """The columns that scorers and captioners see: the footage's, and scores."""
        return {k: v for k, v in {**self.source.extra, **self.columns}.items() if k not in OF_COPIES}

    def input_hash(self, reads: Iterable[str] = ("caption", "row")) -> str:
        """Of what a scorer or captioner sees of the clip beside its frames: crop, and its caption or columns."""
        about: list[Any] = [self.crop]
        about += [self.source.caption] if "caption" in reads else []
        about += [self.visible] if "row" in reads else []
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def input_key(self, reads: Iterable[str] = ("caption", "row")) -> str:
        """Of all that it sees."""
        return f"{self.key}#{self.input_hash(reads)}"


class Curation:
    """One run. `say` gets a line now and then."""

    def __init__(self, config: CurateConfig, cache: Cache, mapper: Mapper, say: Callable[[str], None]) -> None:
        self.config, self.cache, self.mapper, self.say = config, cache, mapper, say
        self.clips: list[CandidateClip] = []
        self.bad: list[dict[str, str]] = []
        self.broken: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.embeddings: dict[str, list[float]] = {}
        # Analyses of this run that the next one makes again: their files stood still.
        self.passing: set[str] = set()
        # Clips that each captioner and scorer was asked about, and why it has not answered (a scorer: for no reason of
        # the clip's own).
        self.asked: dict[str, int] = {}
        self.unanswered: dict[str, list[str]] = {}

    # ---------------------------------------------------------------------------------- analysis

    def analyse(self, sources: Sequence[Source]) -> dict[str, str]:
        """Analyses files that are new; keys of the analyses by source. StoreError: a store that does not answer, or
        gives no access."""
        keys: dict[str, str] = {}
        unreadable: dict[str, str] = {}
        digests = object_digests(sources)
        for source in sources:
            if readable_name(source.key) is not None:
                unreadable[source.key] = "its name is not UTF-8"
                continue
            try:
                digest = digests[source.file] if isinstance(source.file, Url) else self.cache.digest(source.file)
                if isinstance(digest, OSError):
                    raise digest
                keys[source.key] = f"{digest}:{VERSION}"
            except StoreError as error:
                unreadable[source.key] = str(error.strerror)
            except OSError as error:
                unreadable[source.key] = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        known = self.cache.analysed()
        files = {keys[s.key]: str(s.file) for s in sources if s.key in keys}
        todo = [{"key": key, "path": path, "digest": _digest(key)} for key, path in files.items() if key not in known]
        stalled = {}
        for result in self._work("analyse", todo, "analyse", "file"):
            self.cache.store_analysis(result["key"], result["content"], result["error"], result["again"])
            stalled |= {result["key"]: result["error"]} if result["again"] else {}
        self.passing |= stalled.keys()
        known = {**self.cache.analysed(), **stalled}
        for source in sources:
            if reason := unreadable.get(source.key) or known.get(keys.get(source.key, "")):
                self.bad.append({"path": readable_name(source.key) or source.key, "reason": reason})
                keys.pop(source.key, None)
        return keys

    def cut(self, sources: Sequence[Source], keys: dict[str, str]) -> None:
        """Clips of all files, with the scores that follow from the analysis."""
        ranges, scored = self.cache.load("ranges"), self.cache.load("clips")
        version = scoring.measured_version()
        new_ranges: dict[str, Any] = {}
        new_scores: dict[str, Any] = {}
        for source in sources:
            if source.key not in keys:
                continue
            about = [RANGES_VERSION, keys[source.key], self.config.cuts.model_dump(), source.limits]
            key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
            found, analysis = ranges.get(key), None
            if found is None:
                analysis = Analysis.loads(self.cache.analysis(keys[source.key]))
                found = ranges[key] = _ranges(analysis, self.config, source)
                if keys[source.key] not in self.passing:
                    new_ranges[key] = found
            if found["broken"]:
                self.broken.append({"path": source.key, "broken": found["broken"]})
            for start, end, reason, detail in found["clips"]:
                clip = CandidateClip(
                    source, f"{keys[source.key]}:{start}-{end}", start, end, found["fps"], found["height"], found["width"], reason, detail,
                    self._split(source),
                )  # fmt: skip
                self.clips.append(clip)
                if reason is not None:
                    continue
                known = scored.get(clip.key)
                if known is None or known.get("version") != version:
                    analysis = analysis or Analysis.loads(self.cache.analysis(keys[source.key]))
                    seen = view(analysis, source.key, start, end, source.caption, source.extra)
                    known = {
                        "version": version,
                        **scoring.measured_scores(seen),
                        "scorers": (known or {}).get("scorers", {}),
                    }
                    new_scores[clip.key] = scored[clip.key] = known
                clip.columns |= known["scores"]
                clip.columns["seconds"] = round(clip.frames / clip.fps, 4) if clip.fps else 0.0
                clip.picture, clip.hashes = tuple(known["picture"]), known["hashes"]
        self.cache.store("ranges", new_ranges)
        self.cache.store("clips", new_scores)

    # ----------------------------------------------------------------------------------- dropping

    def filter(self, filters: Iterable[Where]) -> None:
        """Drops each clip by the first filter that it does not pass."""
        filters = list(filters)
        for clip in self._alive():
            for condition in filters:
                value = clip.value(condition.column)
                try:
                    passed = satisfies(value, condition)
                except ValueError as error:
                    raise ConfigError(f"filters: {error}") from error
                if not passed:
                    wanted = " and ".join(
                        f"{k} {v}" for k, v in condition.model_dump(exclude_none=True).items() if k != "column"
                    )
                    missing = clip.errors.get(condition.column, "no value")
                    clip.drop(
                        condition.column,
                        f"{missing if value is None else f'{value:g}' if isinstance(value, float) else value}; {wanted}",
                    )
                    break

    def finest(self, filters: Iterable[Where]) -> None:
        """Drops what is not in the `top` share of a filter, of the clips that are left."""
        filters = [where for where in filters if where.top is not None]
        alive = self._alive()

        def values(column: str) -> list[Any]:
            if column == "duration" and not any(column in clip.source.extra for clip in alive):
                return [round(clip.value("seconds")) for clip in alive]
            return [clip.value(column) for clip in alive]

        try:
            kept = passing(len(alive), values, filters)
        except ValueError as error:
            raise ConfigError(f"filters: {error}") from error
        for clip, stays in zip(alive, kept, strict=True):
            if not stays:
                shares = ", ".join(
                    f"{w.column} of the top {w.top:g}" + (f" per {w.per}" if w.per else "") for w in filters
                )
                clip.drop(filters[0].column if len(filters) == 1 else "top", f"not in {shares}")
                clip.outranked = True

    def letterbox(self) -> None:
        """Crops or drops clips with black bars."""
        for clip in self._alive():
            if clip.picture != (0, 0, clip.height, clip.width):
                if self.config.letterbox == "drop":
                    clip.drop("letterbox", f"picture {crop_text(clip.picture)} of {clip.height}x{clip.width}")
                elif self.config.letterbox == "keep":
                    clip.picture = (0, 0, clip.height, clip.width)

    def deduplicate(self, by_embedding: bool = False) -> None:
        """Drops all but one of each group of near-duplicates."""
        settings = self.config.duplicates
        if settings is None or (by_embedding and settings.embedding_similarity is None):
            return
        alive = self._alive()
        candidates = [
            Candidate(
                clip.id,
                np.array([] if by_embedding else [int(bits, 16) for bits in clip.hashes], np.uint64),
                clip.picture[2] * clip.picture[3],
                clip.frames,
                clip.columns.get("blockiness") or 0.0,
                np.array(vector) if by_embedding and (vector := self.embeddings.get(clip.key)) else None,
            )
            for clip in alive
        ]
        chosen = settings if by_embedding else settings.model_copy(update={"embedding_similarity": None})
        for found in find_duplicates(candidates, chosen):
            clip, kept = alive[found.number], alive[found.kept]
            clip.drop("duplicate", f"of {kept.id}, which is kept: {found.why}")
            clip.columns["duplicate_of"] = kept.id
            kept.columns["duplicates"] = kept.columns.get("duplicates", 0) + 1
            kept.columns["kept_because"] = found.why

    # ------------------------------------------------------------------------- scorers, captions

    def score(self) -> None:
        """Scores of the config's scorers, of the clips that are left."""
        if not self.config.scorers:
            return
        scorers = {s.name: (scoring.scorer_id(s), scoring.reads(s)) for s in self.config.scorers}
        stored = self.cache.load("clips")
        alive = self._alive()
        # Of each clip, by scorer, the key of its result: all that this depends on.
        keys = [{name: f"{own}:{clip.input_hash(reads)}" for name, (own, reads) in scorers.items()} for clip in alive]
        todo: dict[str, int] = {}
        for i, clip in enumerate(alive):
            if any(key not in stored[clip.key]["scorers"] for key in keys[i].values()):
                todo.setdefault(clip.input_key(), i)
        tasks = []
        for i in todo.values():
            known = stored[alive[i].key]["scorers"]
            lacking = [name for name, key in keys[i].items() if key not in known]
            tasks.append({**self._task(alive[i]), "scorers": lacking})
        batches = [{"clips": tasks[i : i + SCORED_AT_ONCE]} for i in range(0, len(tasks), SCORED_AT_ONCE)]
        passing: dict[str, dict[str, dict[str, Any]]] = {}
        for result in self._work("score", batches, "score", "batch"):
            rows = {}
            for key, found in result["scores"].items():
                i = todo[key]
                for name, columns in found.items():
                    if scoring.AGAIN in columns:
                        passing.setdefault(alive[i].key, {})[keys[i][name]] = columns
                    else:
                        stored[alive[i].key]["scorers"][keys[i][name]] = columns
                        rows[alive[i].key] = stored[alive[i].key]
            self.cache.store("clips", rows)
        failed: Counter[str] = Counter()
        for clip, own in zip(alive, keys, strict=True):
            results = stored[clip.key]["scorers"] | passing.get(clip.key, {})
            for name, key in own.items():
                columns = dict(results[key])
                if scoring.ERROR in columns:
                    clip.errors[name] = columns[scoring.ERROR]
                    failed[name] += 1
                    if scoring.AGAIN in columns:
                        self.unanswered.setdefault(f"scorer {name}", []).append(columns[scoring.ERROR])
                    continue
                if vector := columns.pop("embedding", None):
                    self.embeddings[clip.key] = vector
                clip.columns |= columns
        self.asked |= {f"scorer {name}": len(alive) for name in scorers}
        self.notes += [f"scorer {name}: no score of {count} clips" for name, count in failed.items()]

    def caption(self) -> dict[str, Counter[str]]:
        """Captions of the clips that are left; by captioner, how many there are and why others are not."""
        counts: dict[str, Counter[str]] = {}
        for config in self.config.captions:
            own = captioner_id(config)
            known = self.cache.captions(own)
            alive = self._alive()
            in_prompt = ("caption",) if "{caption}" in (config.prompt or "") else ()
            keys = {clip.id: clip.input_key(("caption", "row") if config.function else in_prompt) for clip in alive}
            first = {keys[clip.id]: clip for clip in reversed(alive) if keys[clip.id] not in known}
            todo = [{**self._task(clip), "key": key} for key, clip in reversed(first.items())]
            size = config.server.concurrency * 4 if config.server else config.batch_size
            batches = [{"clips": todo[i : i + size]} for i in range(0, len(todo), size)]
            silent = 0
            for result in self._work(f"caption:{config.name}", batches, f"caption {config.name}", "batch"):
                answers = {key: tuple(answer) for key, answer in result["captions"].items()}
                known |= answers
                again = set(result["again"])
                self.cache.store_captions(own, {key: answer for key, answer in answers.items() if key not in again})
                silent = silent + len(again) if len(again) == len(answers) else 0
                if silent >= GIVEN_UP:
                    reason = next(iter(answers.values()))[1]
                    known = {**dict.fromkeys(first, (None, f"not asked, after {silent} times {reason}")), **known}
                    break
            counts[config.name] = Counter()
            self.asked[f"captions {config.name}"] = len(alive)
            for clip in alive:
                answer, reason = known[keys[clip.id]]
                if answer is None and reason != "no_text":
                    self.unanswered.setdefault(f"captions {config.name}", []).append(str(reason))
                text, refused = (None, reason) if answer is None else check_caption(answer, config)
                clip.captions[config.name] = text
                counts[config.name]["captions" if text else str(refused).split(":")[0]] += 1
                if text is None:
                    clip.errors[f"caption_{config.name}"] = str(refused)
                    if config.required:
                        clip.drop(f"caption_{config.name}", str(refused))
        return counts

    # -------------------------------------------------------------------------------------- output

    def rows(self) -> list[dict[str, Any]]:
        """The manifest's rows: the kept clips."""
        names = self._columns()
        return [self._row(clip, names) for clip in self.clips if clip.reason is None]

    def write_clips(self, out: Path) -> None:
        """clips.parquet: all clips, with the reason of each that was dropped."""
        names = self._columns()
        rows = [{**self._row(clip, names), "dropped": clip.reason, "detail": clip.detail} for clip in self.clips]
        columns = dict.fromkeys(name for row in rows for name in row) or ["path"]
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        with atomic_path(out / CLIPS) as temporary:
            parquet.write_table(table, temporary)

    def report(self, sources: int, excluded: int, captions: dict[str, Counter[str]]) -> dict[str, Any]:
        """report.json: every file and clip counted once."""
        reasons = Counter(clip.reason for clip in self.clips if clip.reason)
        kept = [clip for clip in self.clips if clip.reason is None]
        return {
            "files": sources,
            "files_excluded": excluded,
            "files_bad": len(self.bad),
            "bad_files": self.bad,
            "broken_files": self.broken,
            "clips": len(self.clips),
            "kept": len(kept),
            "kept_seconds": round(sum(clip.frames / clip.fps for clip in kept if clip.fps), 2),
            "kept_images": sum(clip.still for clip in kept),
            "dropped": sum(reasons.values()),
            "dropped_by_reason": dict(reasons.most_common()),
            "cropped": sum(clip.crop is not None for clip in kept),
            "captions": {name: dict(counts.most_common()) for name, counts in captions.items()},
            "without_caption": sum(self._caption(clip) is None for clip in kept),
            "notes": self.notes,
        }

    def _columns(self) -> list[str]:
        """Names of all columns of scores and captions, the same for all rows."""
        names = dict.fromkeys(name for clip in self.clips for name in clip.columns)
        captions = [f"caption_{config.name}" for config in self.config.captions]
        own = {name for clip in self.clips for name in clip.source.extra}
        if taken := sorted((set(names) | set(captions)) & own):
            raise ConfigError(f"footage: column {taken[0]!r} has the name of a score or caption; rename it")
        if taken := sorted(set(names) & {*STANDARD_COLUMNS, *RESERVED_COLUMNS}):
            raise ConfigError(
                f"scorers: {taken[0]!r} is a column of manifests or features; give the scorer another name"
            )
        return [*names, *captions]

    def _caption(self, clip: CandidateClip) -> str | None:
        generated = next((text for text in clip.captions.values() if text), None)
        return generated if clip.source.caption is None else clip.source.caption

    def _row(self, clip: CandidateClip, names: Sequence[str]) -> dict[str, Any]:
        captions = {f"caption_{name}": text for name, text in clip.captions.items()}
        scores = {**clip.columns, **captions}
        return {**clip.row(), "caption": self._caption(clip), **{name: scores.get(name) for name in names}}

    def _split(self, source: Source) -> str:
        if source.split is not None:
            return source.split
        bits = hashlib.sha256(f"{self.config.seed}:{source.key}".encode()).digest()
        return "validation" if int.from_bytes(bits[:8]) < self.config.validation_share * 2**64 else "train"

    def _alive(self) -> list[CandidateClip]:
        return [clip for clip in self.clips if clip.reason is None]

    def _task(self, clip: CandidateClip) -> Task:
        return {
            "key": clip.input_key(), "file": str(clip.source.file), "digest": clip.digest,
            "path": clip.source.key, "start": clip.start, "end": clip.end,
            "fps": clip.fps, "height": clip.picture[2], "width": clip.picture[3], "crop": clip.crop,
            "caption": clip.source.caption, "row": clip.visible,
        }  # fmt: skip

    def _work(self, kind: str, tasks: Sequence[Task], label: str, unit: str) -> Iterable[Task]:
        """Results of tasks, with progress; nothing is started where there are none."""
        from tqdm import tqdm

        if not tasks:
            return
        self.say(f"{label}: {len(tasks):,} {unit}{'' if len(tasks) == 1 else 's' if unit != 'batch' else 'es'}")
        yield from tqdm(self.mapper(kind, self.config, tasks), total=len(tasks), desc=printable(label), unit=unit)


def _digest(key: str) -> str:
    """The file's, of the key of an analysis or a clip."""
    return key.partition(":")[0]


def _ranges(analysis: Analysis, config: CurateConfig, source: Source) -> dict[str, Any]:
    found = cut_into_clips(analysis, config.cuts, source.limits)
    broken = list(analysis.broken)
    if source.limits and source.limits[1] > analysis.frame_count:
        broken.append(
            f"frames {source.limits[0]} to {source.limits[1]} were asked for, the file has {analysis.frame_count}"
        )
    return {
        "fps": analysis.fps,
        "height": analysis.height,
        "width": analysis.width,
        "broken": broken,
        "clips": [[r.start, r.end, r.dropped, r.detail] for r in found],
    }


def curate(config: CurateConfig, mapper: Mapper, say: Callable[[str], None]) -> Path:
    """Runs all steps; the path of the manifest. Errors as stdit.curate.run."""
    out = config.out
    for scorer in config.scorers:  # before any file is opened
        scoring.scorer_id(scorer)
    for caption in config.captions:
        if caption.function:
            scoring.load_function(caption.function, f"captions: {caption.name}")
        if caption.server:
            api_key(caption.name, caption.server)
    sources, links, excluded = find_sources(config)
    claim_outputs(out, COMMAND, [MANIFEST, REPORT, CLIPS, PAGE, CACHE, *links])
    make_links(out, links)
    for link in stale_links(out, own_outputs(out, COMMAND) - links.keys()):
        link.unlink()
    with Cache(out) as cache:
        run = Curation(config, cache, mapper, say)
        run.cut(sources, run.analyse(sources))
        measured = {name for clip in run.clips for name in (*clip.columns, *clip.source.extra)} | set(STANDARD_COLUMNS)
        run.letterbox()
        run.filter([where for where in config.filters if where.column in measured])
        run.deduplicate()
        run.score()
        _check_columns(run, config)
        run.filter(config.filters)
        run.deduplicate(by_embedding=True)
        run.finest(config.filters)
        captions = run.caption()
        report = run.report(len(sources) + excluded, excluded, captions)
        _write_if_new(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        run.write_clips(out)
        from stdit.curation.report import write_page

        write_page(out / PAGE, run, report)
        if len(run.bad) > config.max_bad_share * len(sources):
            (out / MANIFEST).unlink(missing_ok=True)
            shown = "\n".join(f"  {file['path']}: {file['reason']}" for file in run.bad[:5])
            raise CurationError(
                f"{len(run.bad)} of {len(sources)} files cannot be used, more than max_bad_share {config.max_bad_share:g} allows; "
                f"all are named in {out / REPORT}:\n{shown}"
            )
        for label, reasons in run.unanswered.items():
            if len(reasons) > MAX_UNANSWERED * run.asked[label]:
                (out / MANIFEST).unlink(missing_ok=True)
                often, times = Counter(reasons).most_common(1)[0]
                raise CurationError(
                    f"{label}: no answer for {len(reasons)} of {run.asked[label]} clips, {times} times: {often}. "
                    "What there is, is kept: the same command asks for the rest"
                )
        rows = run.rows()
        if not rows:
            (out / MANIFEST).unlink(missing_ok=True)
            reasons = ", ".join(f"{count} {reason}" for reason, count in report["dropped_by_reason"].items())
            raise CurationError(f"none of {len(run.clips)} clips is kept ({reasons or 'no clips'}); see {out / PAGE}")
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        _write_if_new(out / MANIFEST, text)
    return out / MANIFEST


def _check_columns(run: Curation, config: CurateConfig) -> None:
    """ConfigError: a filter on a column that no clip has."""
    alive = [clip for clip in run.clips if clip.columns]
    names = {name for clip in alive for name in (*clip.columns, *clip.source.extra, *clip.errors)} | set(
        STANDARD_COLUMNS
    )
    for where in config.filters:
        # Scorers run on clips that are left; where none is, their columns are not known.
        for column in (where.column, *([where.per] if where.per not in (None, "duration") else [])):
            if column not in names and any(clip.reason is None for clip in run.clips):
                raise ConfigError(f"filters: no column {column!r}; columns: {', '.join(sorted(names))}")
    first: dict[str, tuple[str, str]] = {}
    for clip in run.clips:
        for name, value in {**clip.source.extra, **clip.columns}.items():
            kind = "text" if isinstance(value, str) else "true/false" if isinstance(value, bool) else "a number"
            known, other = first.setdefault(name, (kind, clip.id)) if value is not None else (kind, "")
            if known != kind:
                where = "footage" if name in clip.source.extra else "scorers"
                raise ConfigError(
                    f"{where}: {name} is {known} for {other} and {kind} for {clip.id}; a column has one kind"
                )


def _write_if_new(path: Path, text: str) -> None:
    """Writes a file unless it has this content: what follows from it then stays up to date."""
    if not path.is_file() or path.read_bytes() != text.encode():
        atomic_write(path, text)


def report_lines(report: dict[str, Any]) -> list[str]:
    """report.json for people."""
    lines = [
        f"files: {report['files']:,}"
        + (f", {report['files_bad']:,} that can't be used" if report["files_bad"] else ""),
        f"clips: {report['clips']:,} = {report['kept']:,} kept + {report['dropped']:,} dropped"
        + (
            f" ({', '.join(f'{n:,} {reason}' for reason, n in report['dropped_by_reason'].items())})"
            if report["dropped"]
            else ""
        ),
    ]
    lines += [f"  {file['path']}: {file['reason']}" for file in report["bad_files"][:5]]
    lines += [f"  {file['path']}: {'; '.join(file['broken'])}" for file in report["broken_files"][:5]]
    lines += [
        f"captions {name}: {', '.join(f'{n:,} {what}' for what, n in found.items())}"
        for name, found in report["captions"].items()
    ]
    return lines + report["notes"]
