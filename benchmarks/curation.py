"""Curation: precision and recall of cuts beside PySceneDetect, speed of each part, agreement of workers, memory,
100,000 clips.

    python benchmarks/curation.py [--films 24] [--only cuts speed workers memory scale]

Cuts: films of stdit.curation.footage whose photographs, scans and textures the classifier was not trained on, at 24 and
30 frames a second; a hard cut counts at its exact frame, a dissolve or fade where a found one overlaps it.
PySceneDetect (`pip install scenedetect[opencv]`, left out where it is not installed): its detectors with their
defaults; a cut that they report within a dissolve or a fade counts as found. Prints one table a part and appends them
to benchmarks/results/curation.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from stdit.config import CurateConfig, CutsConfig, Where
from stdit.curation.analysis import Analysis, Measurements, NativeMeasures, analyse
from stdit.curation.curation import curate
from stdit.curation.footage import Detection, compare, make_film
from stdit.curation.transitions import Transition, find_transitions
from stdit.curation.work import Task, local_mapper
from stdit.media import write_video

RESULTS = Path(__file__).parent / "results" / "curation.md"


# ------------------------------------------------------------------------------------------------ cuts


def scenedetect_detectors() -> dict[str, Callable[[str], list[Transition]]]:
    try:
        from scenedetect import AdaptiveDetector, ContentDetector, HistogramDetector, detect  # pyright: ignore
    except ImportError:
        return {}

    def run(detector: Any) -> Callable[[str], list[Transition]]:
        def found(path: str) -> list[Transition]:
            starts = [start.frame_num for start, _ in detect(path, detector(), start_in_scene=True)][1:]
            return [Transition(t, t, "cut") for t in starts]

        return found

    names = {
        "AdaptiveDetector": AdaptiveDetector,
        "ContentDetector": ContentDetector,
        "HistogramDetector": HistogramDetector,
    }
    return {f"PySceneDetect {name}": run(detector) for name, detector in names.items()}


def as_dissolves(truth: Sequence[Transition], found: Sequence[Transition]) -> list[Transition]:
    """A detector of cuts alone: what it reports within a dissolve is one."""
    spans = [t for t in truth if t.kind == "dissolve"]
    return [
        Transition(f.start, f.start + 1, "dissolve") if any(t.start <= f.start <= t.end for t in spans) else f
        for f in found
    ]


def cuts(films: int, folder: Path) -> list[str]:
    counts: dict[str, dict[str, Detection]] = {}
    seconds: dict[str, float] = {}
    detectors = scenedetect_detectors()
    for seed in range(films):
        film = make_film(seed, "test", fps=(24, 30)[seed % 2])
        path = folder / "film.mp4"
        write_video(path, film.frames, film.fps)
        runs = {"stdit": lambda p: find_transitions(analyse(p), CutsConfig())} | detectors
        for name, run in runs.items():
            began = time.process_time()
            found = run(str(path))
            seconds[name] = seconds.get(name, 0) + time.process_time() - began
            found = found if name == "stdit" else as_dissolves(film.transitions, found)
            compare(film.transitions, found, counts.setdefault(name, {}))
    total = {kind: counts["stdit"][kind].found + counts["stdit"][kind].missed for kind in ("cut", "dissolve")}
    lines = [
        f"{films} films, {total['cut']} hard cuts, {total['dissolve']} dissolves and fades",
        "",
        "| detector | hard cuts: precision, recall | dissolves, fades: precision, recall | CPU seconds |",
        "|---|---|---|---|",
    ]
    for name, found in counts.items():
        cells = [f"{found[kind].precision:.3f}, {found[kind].recall:.3f}" for kind in ("cut", "dissolve")]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds[name]:.1f} |")
    return lines


# ----------------------------------------------------------------------------------------------- speed


def speed(folder: Path) -> list[str]:
    """A film of 640 x 360, 240 frames, one thread: clips of 4 s a second and core of each part, alone."""
    film = make_film(3, "test", shots=4, size=(360, 640), kinds=("cut",))
    path = folder / "film.mp4"
    write_video(path, film.frames, film.fps)
    clips = len(film.frames) / film.fps / 4
    frames = [av.VideoFrame.from_ndarray(f, format="rgb24").reformat(format="yuv420p") for f in film.frames]
    native, sampled = NativeMeasures(), frames[:: film.fps // 2]

    def decode() -> None:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass

    def measure_all() -> None:
        measured = Measurements(film.fps)
        measured.sample_every = 10**9
        for index, frame in enumerate(frames):
            measured.add(index, frame)
        measured.end_segment()

    analysis = analyse(path)
    parts: dict[str, Callable[[], Any]] = {
        "decoding (libav, one thread)": decode,
        "numbers of all frames (motion, freeze, black, brightness, contrast, shake, cuts)": measure_all,
        "numbers of two frames a second (blur, blockiness, hash, bars)": lambda: [native.measure(f) for f in sampled],
        "cuts and dissolves from the numbers": lambda: find_transitions(analysis, CutsConfig()),
        "the whole analysis": lambda: analyse(path),
    }
    lines = [
        f"640×360, {len(frames)} frames at {film.fps}, clips of 4 s",
        "",
        "| part | clips per second and core |",
        "|---|---|",
    ]
    for name, part in parts.items():
        best = min(_cpu(part) for _ in range(3))
        lines.append(f"| {name} | {clips / best:.1f} |")
    return lines


def _cpu(part: Callable[[], Any]) -> float:
    began = time.process_time()
    part()
    return time.process_time() - began


# --------------------------------------------------------------------------------------------- workers


def workers(folder: Path) -> list[str]:
    """The same footage by one process and by four: the manifests' bytes."""
    footage = folder / "footage"
    footage.mkdir()
    for seed in range(8):
        film = make_film(seed, "test", shots=4)
        write_video(footage / f"{seed}.mp4", film.frames, film.fps)
    made = []
    for count in (1, 4):
        config = CurateConfig(footage=str(footage), out=folder / f"out{count}", workers=count)
        config.out.mkdir()
        made.append(curate(config, local_mapper, lambda line: None).read_bytes())
    return [
        f"1 and 4 workers, 8 films, {made[0].count(b'path')} clips: manifests {'equal' if made[0] == made[1] else 'DIFFER'}"
    ]


# ---------------------------------------------------------------------------------------------- memory


def memory(folder: Path) -> list[str]:
    """Two hours of film, 172,800 frames: largest resident size of the process that analyses it."""
    path, frames = folder / "long.mp4", 2 * 3600 * 24
    film = make_film(1, "test", shots=6).frames
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *film.shape[1:3], "yuv420p"
        made = [av.VideoFrame.from_ndarray(f, format="rgb24").reformat(format="yuv420p") for f in film]
        for i in range(frames):
            frame = made[i % len(made)]
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    began = time.process_time()
    found = analyse(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return [
        f"2 hours, {found.frame_count:,} frames of 128×72: {after} MB at most ({before} MB before), {time.process_time() - began:.0f} s of CPU; "
        f"{len(find_transitions(found, CutsConfig())):,} transitions; the analysis is {len(found.dumps()) / 1e6:.1f} MB"
    ]


# ----------------------------------------------------------------------------------------------- scale


def scale(folder: Path, files: int = 5000, shots: int = 20) -> list[str]:
    """files x shots clips of made-up numbers: curated, filtered again with other thresholds, and reported."""
    footage, random = folder / "many", np.random.default_rng(0)
    footage.mkdir()
    for i in range(files):
        (footage / f"{i:05d}.mp4").write_bytes(i.to_bytes(8))
    film = make_film(2, "test", shots=shots, kinds=("cut",))
    write_video(folder / "one.mp4", film.frames, film.fps)
    one = analyse(folder / "one.mp4")

    def synthetic(kind: str, config: CurateConfig, tasks: Sequence[Task]) -> Iterator[Task]:
        for task in tasks:
            samples = {**one.samples, "hash": random.integers(1, 2**63, len(one.samples["index"]), dtype=np.uint64)}
            own = Analysis(
                one.fps, one.height, one.width, one.frame_count, one.segments, [], False, one.frames, samples
            )
            own.frames = {**one.frames, "motion": one.frames["motion"] * np.float32(random.uniform(0.1, 3))}
            yield {"key": task["key"], "content": own.dumps(), "error": None, "again": False}

    lines = []
    for threshold in (0.5, 1.0):
        config = CurateConfig(
            footage=str(footage), out=folder / "scaled", filters=(Where(column="motion", at_least=threshold),)
        )
        config.out.mkdir(exist_ok=True)
        began = time.monotonic()
        curate(config, synthetic, lambda line: None)
        report = json.loads((config.out / "report.json").read_text())
        what = "first run (with making the numbers up)" if threshold == 0.5 else "another threshold"
        lines.append(f"| {what} | {time.monotonic() - began:.1f} | {report['clips']:,} | {report['kept']:,} |")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return [f"{files:,} files; {most} MB at most", "", "| | seconds | clips | kept |", "|---|---|---|---|", *lines]


def main() -> None:
    parts = ("cuts", "speed", "workers", "memory", "scale")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--films", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    lines = [
        f"\n## {datetime.date.today()} · {platform.processor() or platform.machine()} · {' '.join(sys.argv[1:])}\n"
    ]
    for part in args.only:
        with tempfile.TemporaryDirectory() as folder:
            made = cuts(args.films, Path(folder)) if part == "cuts" else globals()[part](Path(folder))
        lines += [f"**{part}**: {made[0]}", *made[1:], ""]
        print("\n".join([f"{part}: {made[0]}", *made[1:]]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines))


if __name__ == "__main__":
    main()
