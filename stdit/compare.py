"""Several runs on one page: scores with intervals, losses over steps, samples, FLOPs and hours, the same requests side
by side.

    stdit compare runs/demo/clips runs/demo/finest --out comparison
    stdit compare runs/demo/clips runs/demo/finest --out comparison --blind

A run is named by its run directory, by what `stdit evaluate --config` wrote, or by a folder that `stdit generate`
wrote. OUT then holds compare.html, one file without scripts or network access. Scores of different protocols are an
error.

--blind serves pairs of clips on 127.0.0.1, left and right shuffled, and appends votes to OUT/votes.jsonl; the page
counts them.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.console import echo
from stdit.errors import CheckpointError, exit_code
from stdit.files import atomic_write
from stdit.outputs import claim_outputs

if TYPE_CHECKING:
    from stdit.evaluation.comparison import Curve, Pair, RunResults

PAGE, VOTES = "compare.html", "votes.jsonl"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --ground: #ffffff; --line: #d8dee4; --best: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa3ad; --ground: #14171c; --line: #343a44;
  --best: #5fd38a; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.8rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; }
.faint { color: var(--faint); font-size: .88rem; } .best { color: var(--best); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--faint); font-weight: 600; }
img { max-width: 100%; height: auto; border-radius: 8px; display: block; margin: .6rem 0; }
.clips { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; max-width: 32rem; }
pre { white-space: pre-wrap; font-size: .82rem; } summary { cursor: pointer; color: var(--faint); }
"""


def compare(paths: Sequence[Path], out: Path, count: int = 12) -> Path:
    """Writes OUT/compare.html; returns its path. ValueError: unusable folders; ProtocolMismatch: other protocols."""
    from stdit.evaluation.comparison import loss_curve, same_requests
    from stdit.evaluation.scores import check_comparable

    runs = open_runs(paths)
    check_comparable({run.name: run.scores for run in runs if run.scores is not None})
    claim_outputs(out, "compare", [PAGE])
    curves = [curve for run in runs if (curve := loss_curve(run)) is not None]
    page = render(runs, curves, same_requests(runs), _read_votes(out), count)
    atomic_write(out / PAGE, page)
    return out / PAGE


def open_runs(paths: Sequence[Path]) -> list[RunResults]:
    """ValueError: fewer than two, the same twice, a folder without results."""
    from stdit.evaluate import run_names
    from stdit.evaluation.comparison import find_results

    if len(paths) < 2:
        raise ValueError(f"a comparison needs two runs or more, found {len(paths)}")
    return [find_results(path, name) for name, path in run_names(paths).items()]


def _read_votes(out: Path) -> list[dict[str, Any]]:
    from stdit.evaluation.votes import read_votes

    return read_votes(out / VOTES)


# -------------------------------------------------------------------------------------------- page


def render(
    runs: Sequence[RunResults],
    curves: Sequence[Curve],
    pairs: Sequence[Pair],
    votes: Sequence[dict[str, Any]],
    count: int,
) -> str:
    """The page's HTML."""
    title = " · ".join(html.escape(run.name) for run in runs)
    sections = [
        f"<h1>{title}</h1>",
        _scores(runs),
        _votes(runs, votes),
        _losses(curves),
        _clips(runs, pairs, count),
        _protocols(runs),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(s for s in sections if s) + "\n</body></html>\n"
    )


def _scores(runs: Sequence[RunResults]) -> str:
    """A row a score; the best value is set apart where its interval meets no other."""
    from stdit.evaluation.scores import ARROWS

    scored = [run for run in runs if run.scores is not None]
    if not scored:
        return "<h2>Scores</h2><p class='faint'>None of these runs has scores (stdit evaluate --config).</p>"
    names = list(dict.fromkeys(name for run in scored for name in run.scores["scores"]))  # pyright: ignore[reportOptionalSubscript]
    rows = []
    for name in names:
        found = {run.name: run.scores["scores"].get(name) for run in scored}  # pyright: ignore[reportOptionalSubscript]
        present = {run: score for run, score in found.items() if score is not None}
        better = next(iter(present.values()))["better"]
        best = None
        if better is not None and len(present) > 1:
            best = min(present, key=lambda run: present[run]["value"] * (1 if better == "lower" else -1))
            if not all(_apart(present[best]["interval"], s["interval"]) for run, s in present.items() if run != best):
                best = None
        cells = "".join(_score_cell(score, run == best) for run, score in found.items())
        rows.append(f"<tr><td>{html.escape(name)} {ARROWS[better]}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in scored)
    return (
        f"<h2>Scores</h2><div class='wide'><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
        "<p class='faint'>In brackets 95 % intervals over the media that were drawn, not over training seeds. Green: the best value, "
        "where its interval meets no other.</p>"
    )


def _apart(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[1] < b[0] or b[1] < a[0]


def _score_cell(score: dict[str, Any] | None, best: bool) -> str:
    if score is None:
        return "<td class='faint'>n/a</td>"
    low, high = score["interval"]
    title = html.escape("; ".join(score.get("notes", [])))
    style = " class='best'" if best else ""
    return f"<td{style} title='{title}'>{score['value']:.4g} <span class='faint'>[{low:.4g}, {high:.4g}]</span></td>"


def _votes(runs: Sequence[RunResults], votes: Sequence[dict[str, Any]]) -> str:
    from stdit.evaluation.votes import tally

    lines = []
    for i, first in enumerate(runs):
        for second in runs[i + 1 :]:
            found = tally(votes, (first.name, second.name))
            wins = found["wins"]
            if sum(wins.values()) + found["same"]:
                share = "" if found["share"] is None else (
                    f"; of decided votes {100 * found['share']:.0f} % for {html.escape(first.name)} "
                    f"[{100 * found['interval'][0]:.0f}, {100 * found['interval'][1]:.0f}]"
                )  # fmt: skip
                listed = ", ".join(f"{html.escape(name)} {wins[name]}" for name in (first.name, second.name))
                lines.append(f"<li>{listed}, same {found['same']}{share}</li>")
    return f"<h2>Blind votes</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _losses(curves: Sequence[Curve]) -> str:
    from stdit.evaluation.comparison import comparison_curves

    if not curves:
        return "<h2>Losses</h2><p class='faint'>None of these runs has a log of its training.</p>"
    light, dark = (_url(comparison_curves(curves, dark), "image/png") for dark in (False, True))
    notes = "".join(f"<li>{html.escape(note)}</li>" for curve in curves for note in curve.notes)
    return (
        "<h2>Losses</h2><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)"><img src="{light}" alt="loss curves"></picture>'
        "<p class='faint'>Lines: training loss, smoothed over 2 % of its steps; points: validation loss. FLOPs: forward and "
        "backward of one model, captions at full length. Hours: of the steps alone. Losses of different objectives, data or buckets "
        f"are not comparable.</p><ul class='faint'>{notes}</ul>"
    )


def _clips(runs: Sequence[RunResults], pairs: Sequence[Pair], count: int) -> str:
    from stdit.evaluation.comparison import frames_of, gif_of
    from stdit.media import Cell

    if not pairs:
        return "<h2>The same requests</h2><p class='faint'>These runs have no clips of the same prompts and seeds.</p>"
    parts = []
    for pair in pairs[:count]:
        gif = gif_of([Cell(frames_of(file), name) for name, file in pair.files.items()])
        prompt = html.escape(pair.prompt)
        parts.append(
            f"<figure><img src='{_url(gif, 'image/gif')}' alt='{prompt}'>"
            f"<figcaption>{prompt} <span class='faint'>seed {pair.seed}</span></figcaption></figure>"
        )
    absent = ", ".join(html.escape(run.name) for run in runs if run.videos is None)
    return (
        f"<h2>The same requests</h2><p class='faint'>The first {min(count, len(pairs))} of {len(pairs)} requests (prompt and seed) that all "
        f"runs answered, not selected.{f' Without clips: {absent}.' if absent else ''}</p><div class='clips'>{''.join(parts)}</div>"
    )


def _protocols(runs: Sequence[RunResults]) -> str:
    import json

    parts = [
        f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(json.dumps(run.scores, indent=1, ensure_ascii=False))}</pre></details>"
        for run in runs
        if run.scores is not None
    ]
    return "<h2>Protocols</h2>" + "".join(parts) if parts else ""


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ----------------------------------------------------------------------------------- command line


def arguments(prog: str = "stdit.compare") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of scores or media"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and the votes")
    parser.add_argument("--count", type=int, default=12, help="requests shown side by side (default: 12)")
    parser.add_argument("--blind", action="store_true", help="serve a blind vote between two runs on 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="of --blind; 0 for a free one (default: 8000)")
    parser.add_argument("--seed", type=int, default=0, help="of --blind: shuffles pairs and sides (default: 0)")
    parser.add_argument("--voter", default="", help="of --blind: a name that goes into every vote")
    return parser


def serve(options: argparse.Namespace) -> None:
    """Serves the vote until it is interrupted. ValueError: not two runs, or no requests that both answered."""
    from stdit.evaluation.comparison import same_requests
    from stdit.evaluation.votes import Ballot, make_server

    runs = open_runs(options.runs)
    if len(runs) != 2:
        raise ValueError(f"--blind compares two runs, found {len(runs)}")
    if absent := [run.name for run in runs if run.videos is None]:
        raise ValueError(f"--blind: no generated media of {', '.join(absent)}")
    pairs = same_requests(runs)
    if not pairs:
        raise ValueError("--blind: the runs have no clips of the same prompts and seeds")
    claim_outputs(options.out, "compare", [VOTES])
    ballot = Ballot.shuffled(pairs, (runs[0].name, runs[1].name), options.seed)
    server = make_server(ballot, options.out / VOTES, options.port, options.voter)
    host, port = server.server_address[:2]
    echo(
        f"vote at http://{host}:{port}/ ({len(pairs)} pairs); votes go to {options.out / VOTES}; Ctrl-C ends",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        echo()
    finally:
        server.server_close()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1: a file cannot be written; 2: unusable folders, or scores of different protocols."""
    options = arguments().parse_args(argv)
    try:
        if options.count < 0:
            raise ValueError(f"--count {options.count}: expected 0 or more")
        if options.blind:
            serve(options)
        else:
            echo(f"{compare(options.runs, options.out, options.count)} is written")
    except (ValueError, CheckpointError, OSError) as error:
        echo(f"compare: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
