"""curation.html: what became of the footage, and for each score its histogram, thresholds and frames on both sides of
them.

One file without scripts or links; frames are JPEG inside it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stdit.config import Where
from stdit.curation.captioners import jpeg, shrunk
from stdit.curation.sources import local_file
from stdit.data.decoding import DecodeError
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.files import atomic_write

if TYPE_CHECKING:
    from stdit.curation.curation import CandidateClip, Curation

# Longer side of a frame on the page, px; frames of each group; bars of a histogram; its size, px.
SIDE, SHOWN, BINS = 176, 4, 48
WIDTH, HEIGHT = 720, 120

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --ink: #1d2126; --faint: #6b7280; --plate: #f0f0ee; --line: #d9d9d5;
  --kept: #2f7d4f; --dropped: #c2553f; --mark: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --ink: #e8eaed; --faint: #9aa0a8; --plate: #20242c;
  --line: #343a44; --kept: #5fb382; --dropped: #e07a63; --mark: #58a6ff; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.8rem; } h2 { margin: 2.4rem 0 .2rem; font-size: 1.2rem; } h3 { font-size: .9rem; margin: .8rem 0 .3rem; }
p { max-width: 46rem; margin: .3rem 0; } .faint { color: var(--faint); font-size: .87rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; } td.n { text-align: right; }
.frames { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; width: 176px; } figure img { width: 100%; border-radius: 5px; display: block; background: #000; }
figcaption { font-size: .76rem; color: var(--faint); overflow-wrap: anywhere; } figcaption b { color: var(--ink); }
svg { max-width: 100%; height: auto; display: block; margin: .4rem 0; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
"""


def write_page(path: Path, run: Curation, report: Mapping[str, Any]) -> None:
    """Writes the page. Frames that cannot be fetched or decoded are left out of it."""
    with SubprocessDecoder("pyav", run.config.stall_timeout_s) as decoder:
        frames = Frames(run, decoder)
        sections = [
            _summary(run, report),
            *_scores(run, frames),
            _duplicates(run, frames),
            _captions(run, frames),
            _files(report),
        ]
    body = "\n".join(section for section in sections if section)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>curation</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>{body}</body></html>\n'
    )
    if not path.is_file() or path.read_bytes() != text.encode():
        atomic_write(path, text)


class Frames:
    """Middle frames of clips as figures; decoded once, then from the cache."""

    def __init__(self, run: Curation, decoder: SubprocessDecoder) -> None:
        self.cache, self.decoder = run.cache, decoder
        self.objects = ObjectCache.of(run.config.cache)

    def figure(self, clip: CandidateClip, caption: str) -> str:
        """HTML of a frame with a line below; empty where it cannot be decoded."""
        key = f"{clip.key}:{clip.crop}:{SIDE}"
        content = self.cache.picture(key)
        if content is None:
            try:
                with local_file(self.objects, clip.source.file, clip.digest) as file:
                    frame = self.decoder.read_part(file, [(clip.start + clip.end) // 2], None, clip.crop)
            except (DecodeError, StoreError):
                return ""
            image = shrunk(frame, SIDE)[0]
            # Very small frames are enlarged, so that there is something to see.
            if (factor := SIDE // max(image.size) // 2) > 1:
                image = image.resize((image.width * factor, image.height * factor), 0)
            content = jpeg(image, 80)
            self.cache.store_picture(key, content)
        source = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        return f'<figure><img src="{source}" alt=""><figcaption>{caption}<br>{html.escape(_short(clip.id))}</figcaption></figure>'

    def row(self, title: str, clips: Iterable[tuple[CandidateClip, str]]) -> str:
        figures = "".join(self.figure(clip, caption) for clip, caption in clips)
        heading = f"<h3>{title}</h3>" if title else ""
        return f"{heading}<div class='frames'>{figures}</div>" if figures else ""


def _summary(run: Curation, report: Mapping[str, Any]) -> str:
    kept, dropped = report["kept"], report["dropped_by_reason"]
    rows = "".join(
        f"<tr><td>{html.escape(reason)}</td><td class='n'>{count:,}</td></tr>" for reason, count in dropped.items()
    )
    minutes = report["kept_seconds"] / 60
    files = f"{report['files']:,} files" + (f", {report['files_bad']:,} unusable" if report["files_bad"] else "")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report["notes"])
    return (
        f"<h1>{kept:,} of {report['clips']:,} clips kept</h1>"
        f"<p class='faint'>{files} · {minutes:.1f} minutes of video and {report['kept_images']:,} images kept · {report['cropped']:,} cropped "
        f"to the picture within black bars · {report['without_caption']:,} without caption</p>{notes}"
        + (f"<table><tr><th>dropped for</th><th>clips</th></tr>{rows}</table>" if rows else "")
        + "<p class='faint'>A clip counts for the first filter that it does not pass. Thresholds are <code>filters</code> of the config; "
        "with others, run the same command again: nothing is computed twice.</p>"
    )


def _scores(run: Curation, frames: Frames) -> list[str]:
    """A section for each column of numbers: those with a filter first."""
    columns = dict.fromkeys(
        [where.column for where in run.config.filters]
        + [
            name
            for clip in run.clips
            for name, value in clip.columns.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
    )
    return [section for column in columns if column != "duplicates" and (section := _score(run, frames, column))]


def _score(run: Curation, frames: Frames, column: str) -> str:
    scored = [
        (clip, float(value))
        for clip in run.clips
        if clip.reason != "too_short" and isinstance(value := clip.value(column), int | float)
    ]
    if len(scored) < 2:
        return ""
    scored.sort(key=lambda item: (item[1], item[0].id))
    values = np.array([value for _, value in scored])
    conditions = [where for where in run.config.filters if where.column == column]
    passed = (
        np.all([_passes(values, where) for where in conditions], axis=0) if conditions else np.ones(len(values), bool)
    )
    bounds = [bound for where in conditions for bound in (where.at_least, where.at_most) if bound is not None]
    kept = [i for i, (clip, _) in enumerate(scored) if clip.reason is None]
    tops = [where for where in conditions if where.top is not None]
    cut = np.array([bool(tops) and clip.outranked for clip, _ in scored])
    passed &= ~cut
    # With `per`, each group has a threshold of its own.
    bounds += [scored[kept[0]][1] for where in tops if where.per is None and kept]
    parts = [f"<h2>{html.escape(column)}</h2>", _line(conditions, values, passed), _histogram(values, passed, bounds)]

    def shown(indices: Sequence[int]) -> list[tuple[CandidateClip, str]]:
        return [(scored[i][0], f"<b>{scored[i][1]:.4g}</b>") for i in indices]

    def rows(title: str, good: Sequence[int], bad: Sequence[int]) -> list[str]:
        """good, bad: from the worst."""
        far = bad[: max(0, min(SHOWN, len(bad) - SHOWN))]
        return [
            frames.row(title, shown(good[:SHOWN])),
            frames.row("just dropped", shown(bad[-SHOWN:][::-1])),
            frames.row("far from it", shown(far)),
        ]

    for where in tops:
        title = f"just kept, by top {where.top:g}" + (f" per {html.escape(where.per)}" if where.per else "")
        parts += rows(title, kept, np.flatnonzero(cut).tolist())
    for where in conditions:
        for bound, sign in ((where.at_least, 1), (where.at_most, -1)):
            if bound is None:
                continue
            order = range(len(values)) if sign > 0 else range(len(values) - 1, -1, -1)
            good = [i for i in order if sign * (values[i] - bound) >= 0]
            bad = [i for i in order if sign * (values[i] - bound) < 0]
            parts += rows(f"just kept, by {'at_least' if sign > 0 else 'at_most'} {bound:g}", good, bad)
    if not bounds and not tops:
        middle = max(0, len(scored) // 2 - SHOWN // 2)
        parts.append(frames.row("lowest", shown(range(min(SHOWN, len(scored))))))
        if len(scored) > 3 * SHOWN:
            parts.append(frames.row("middle", shown(range(middle, middle + SHOWN))))
        if len(scored) > SHOWN:
            parts.append(frames.row("highest", shown(range(max(SHOWN, len(scored) - SHOWN), len(scored)))))
    return "".join(parts)


def _passes(values: np.ndarray, where: Where) -> np.ndarray:
    low = values >= where.at_least if where.at_least is not None else np.ones(len(values), bool)
    high = values <= where.at_most if where.at_most is not None else np.ones(len(values), bool)
    return low & high & (np.isin(values, [v for v in where.one_of if not isinstance(v, str)]) if where.one_of else True)


def _line(conditions: Sequence[Where], values: np.ndarray, passed: np.ndarray) -> str:
    quantiles = ", ".join(f"{q:.0%}: {np.quantile(values, q):.4g}" for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    if not conditions:
        return f"<p class='faint'>no filter · {len(values):,} clips · {quantiles}</p>"
    return f"<p class='faint'>{passed.sum():,} of {len(values):,} clips pass · {quantiles}</p>"


def _histogram(values: np.ndarray, passed: np.ndarray, bounds: Sequence[float]) -> str:
    """Stacked bars of kept and dropped clips, with a line at each threshold, as SVG."""
    low, high = min(values.min(), *bounds, values.max()), max(values.max(), *bounds, values.min())
    # A few extreme values must not push all others into one bar; they count in the outermost.
    edge_low, edge_high = np.quantile(values, [0.005, 0.995])
    if high - low > 4 * (edge_high - edge_low) > 0:
        low, high = min(edge_low, *bounds, edge_high), max(edge_high, *bounds, edge_low)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    clipped = values.clip(low, high)
    kept, edges = np.histogram(clipped[passed], BINS, (low, high))
    dropped, _ = np.histogram(clipped[~passed], BINS, (low, high))
    most, bar = max(1, int((kept + dropped).max())), WIDTH / BINS
    shapes = []
    for i, (k, d) in enumerate(zip(kept.tolist(), dropped.tolist(), strict=True)):
        for count, below, colour in ((k, 0, "kept"), (d, k, "dropped")):
            if count:
                # At least one pixel: a single clip among thousands is to be seen.
                tall = max(1.0, (HEIGHT - 20) * count / most)
                y = HEIGHT - 18 - (HEIGHT - 20) * below / most - tall
                shapes.append(
                    f'<rect x="{i * bar + 0.5:.1f}" y="{y:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}" fill="var(--{colour})"/>'
                )
    for bound in bounds:
        x = (bound - low) / (high - low) * WIDTH
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT - 18}" stroke="var(--mark)" stroke-width="2"/>'
        )
    anchors = ((0, "start", edges[0]), (WIDTH / 2, "middle", (low + high) / 2), (WIDTH, "end", edges[-1]))
    labels = "".join(
        f'<text x="{x}" y="{HEIGHT - 4}" text-anchor="{anchor}">{value:.4g}</text>' for x, anchor, value in anchors
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(shapes)}{labels}</svg>'


def _duplicates(run: Curation, frames: Frames) -> str:
    by_id = {clip.id: clip for clip in run.clips}
    pairs = [clip for clip in run.clips if clip.reason == "duplicate"]
    if not pairs:
        return ""
    shown = []
    for clip in pairs[:SHOWN]:
        kept = by_id[clip.columns["duplicate_of"]]
        shown += [(clip, "dropped"), (kept, f"kept: {html.escape(str(kept.columns['kept_because']))}")]
    return f"<h2>near-duplicates</h2><p class='faint'>{len(pairs):,} clips; the first pairs</p>" + frames.row("", shown)


def _captions(run: Curation, frames: Frames) -> str:
    alive = [clip for clip in run.clips if clip.captions]
    if not alive:
        return ""
    chosen = [alive[i * len(alive) // min(6, len(alive))] for i in range(min(6, len(alive)))]
    shown = []
    for clip in chosen:
        texts = {"original": clip.source.caption, **clip.captions}
        lines = [
            f"<b>{name}</b> {html.escape(text if text else clip.errors.get(f'caption_{name}', 'none'))}"
            for name, text in texts.items()
        ]
        shown.append((clip, "<br>".join(lines)))
    return "<h2>captions</h2>" + frames.row("", shown)


def _files(report: Mapping[str, Any]) -> str:
    rows = [(file["path"], file["reason"]) for file in report["bad_files"]]
    rows += [(file["path"], "; ".join(file["broken"])) for file in report["broken_files"]]
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(path)}</td><td>{html.escape(reason)}</td></tr>" for path, reason in rows[:200]
    )
    more = f"<p class='faint'>and {len(rows) - 200:,} more in report.json</p>" if len(rows) > 200 else ""
    return f"<h2>files with trouble</h2><table>{cells}</table>{more}"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"…{text[-limit + 1 :]}"
