"""Blind votes between two runs: clips of the same request, left and right shuffled; who is who stays in the server.

ballot = Ballot.shuffled(pairs, ("a", "b"), seed=0)
serve(ballot, Path("votes.jsonl"), port=8000)
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np

from stdit.config import FileSchema, check
from stdit.evaluation.comparison import Pair, frames_of, gif_of
from stdit.evaluation.metrics import accuracy
from stdit.files import read_jsonl
from stdit.media import Cell

Choice = Literal["left", "right", "same"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
MAX_BODY = 10_000


class Vote(FileSchema):
    """A row of votes.jsonl. winner: None for "same"; time: seconds since 1970."""

    runs: tuple[str, str]
    prompt: str
    seed: int | None
    left: str
    right: str
    choice: Choice
    winner: str | None
    voter: str
    time: float


@dataclass(frozen=True)
class Ballot:
    """Pairs in the order of voting; left[i]: the run that is shown on the left."""

    pairs: tuple[Pair, ...]
    left: tuple[str, ...]
    runs: tuple[str, str]

    @classmethod
    def shuffled(cls, pairs: Sequence[Pair], runs: tuple[str, str], seed: int) -> Ballot:
        """Order and sides are random and, over the pairs, even."""
        rng = np.random.default_rng(seed)
        sides = np.arange(len(pairs)) % 2
        order, sides = rng.permutation(len(pairs)), rng.permutation(sides)
        return cls(tuple(pairs[i] for i in order), tuple(runs[side] for side in sides), runs)

    def vote(self, number: int, choice: Choice, voter: str = "") -> dict[str, Any]:
        """The row of a vote. ValueError: no such pair or choice."""
        if choice not in CHOICES or not 0 <= number < len(self.pairs):
            raise ValueError(
                f"vote {choice!r} on pair {number}: expected left, right or same on 0 to {len(self.pairs) - 1}"
            )
        pair, left = self.pairs[number], self.left[number]
        right = self.runs[1] if left == self.runs[0] else self.runs[0]
        winner = {"left": left, "right": right, "same": None}[choice]
        return {
            "runs": list(self.runs), "prompt": pair.prompt, "seed": pair.seed, "left": left, "right": right, "choice": choice,
            "winner": winner, "voter": voter, "time": round(time.time(), 1),
        }  # fmt: skip


def tally(votes: Sequence[Mapping[str, Any]], runs: tuple[str, str]) -> dict[str, Any]:
    """Wins of each run, ties, and the share of decided votes for the first with its 95 % interval (None: no such
    vote)."""
    winners = [vote["winner"] for vote in votes if set(vote["runs"]) == set(runs)]
    decided = [winner for winner in winners if winner is not None]
    share = accuracy([runs[0]] * len(decided), decided) if decided else None
    return {
        "wins": {run: winners.count(run) for run in runs}, "same": winners.count(None),
        "share": share and share.value, "interval": share and [share.low, share.high],
    }  # fmt: skip


def read_votes(path: Path) -> list[dict[str, Any]]:
    """ValueError: a damaged file."""
    rows = read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, 1):
        check(row, Vote, f"{path}:{number}")
    return rows


def make_server(ballot: Ballot, votes: Path, port: int, voter: str = "") -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that shows pairs and appends votes to a JSONL file; port 0: a free one."""
    lock = Lock()

    @lru_cache(maxsize=16)
    def picture(number: int) -> bytes:
        left, pair = ballot.left[number], ballot.pairs[number]
        right = next(run for run in ballot.runs if run != left)
        return gif_of([Cell(frames_of(pair.files[run]), side) for run, side in ((left, "left"), (right, "right"))])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                return self._reply(200, _page(ballot).encode(), "text/html; charset=utf-8")
            name, _, number = self.path.strip("/").partition("/")
            if name == "pair" and number.isdecimal() and int(number) < len(ballot.pairs):
                return self._reply(200, picture(int(number)), "image/gif")
            return self._reply(404, b"", "text/plain")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            try:
                if (
                    self.path != "/vote"
                    or not 0 < length <= MAX_BODY
                    or self.headers.get_content_type() != "application/json"
                ):
                    raise ValueError("expected JSON at /vote")
                body = json.loads(self.rfile.read(length))
                row = ballot.vote(body["pair"], body["choice"], voter)
            except (ValueError, KeyError, TypeError) as error:
                return self._reply(400, str(error).encode(), "text/plain")
            with lock, votes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            return self._reply(204, b"", "text/plain")

        def _reply(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    votes.parent.mkdir(parents=True, exist_ok=True)
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _page(ballot: Ballot) -> str:
    pairs = "".join(
        f'<section id="p{i}"><p>{i + 1} of {len(ballot.pairs)}: {html.escape(pair.prompt)}</p><img src="/pair/{i}" alt="two clips">'
        "<p>"
        + "".join(f"<button onclick=\"vote({i}, '{choice}')\">{choice}</button>" for choice in CHOICES)
        + "</p></section>"
        for i, pair in enumerate(ballot.pairs)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which is better?</title><style>
body {{ background: #14171c; color: #e6e8eb; font: 17px/1.5 system-ui, sans-serif; text-align: center; margin: 3rem 1rem; }}
section {{ display: none; }} section.now {{ display: block; }} img {{ max-width: 100%; }}
button {{ font: inherit; margin: 0 .4rem; padding: .5rem 1.6rem; }}
</style></head><body><h1>Which is better?</h1>{pairs}<section id="p{len(ballot.pairs)}"><p>That was all. Thank you.</p></section>
<script>
const show = i => {{ document.querySelectorAll("section").forEach(s => s.classList.remove("now"));
  document.getElementById("p" + i).classList.add("now"); }};
const vote = async (i, choice) => {{
  const reply = await fetch("/vote", {{method: "POST", headers: {{"Content-Type": "application/json"}},
    body: JSON.stringify({{pair: i, choice}})}});
  if (reply.ok) show(i + 1); else alert(await reply.text()); }};
document.addEventListener("keydown", e => {{
  const choice = {{ArrowLeft: "left", ArrowRight: "right", ArrowDown: "same"}}[e.key];
  const now = document.querySelector("section.now button"); if (choice && now) vote(+now.closest("section").id.slice(1), choice); }});
show(0);
</script></body></html>
"""
