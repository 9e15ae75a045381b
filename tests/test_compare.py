"""Laws of `stdit compare`: what is shared is shown, what cannot be compared is refused, votes don't reveal who is
who."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stdit import compare
from stdit.config import EvaluateConfig, validate
from stdit.evaluation.comparison import comparison_curves, find_results, flops_by_bucket, loss_curve, same_requests
from stdit.evaluation.scores import evaluate_media
from stdit.evaluation.votes import Ballot, make_server, read_votes, tally
from stdit.files import seal
from stdit.media import write_video


def save_run(folder: Path, shade: int, sampling: dict[str, Any], seconds: float = 0.5) -> Path:
    """A run as a plan leaves it: RUN with a log, evaluation/RUN with videos and scores."""
    run = folder / f"run{shade}"
    run.mkdir(parents=True)
    rows = [
        {"step": s, "loss": 1 / s + shade / 1000, "samples_seen": 4 * s, "seconds": seconds, "bucket": "3x16x16"}
        | ({"validation_loss": 1 / s} if s % 10 == 0 else {})
        for s in range(1, 41)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "evaluation" / run.name
    (out / "videos").mkdir(parents=True)
    rng, listing = np.random.default_rng(shade), []
    for i in range(4):
        video = np.full((3, 16, 16, 3), shade, np.uint8) + rng.integers(0, 20, (3, 16, 16, 3), dtype=np.uint8)
        write_video(out / "videos" / f"{i}.mp4", video, 8)
        protocol = {"run": str(run), "step": 40, **sampling}
        row = {"file": f"{i}.mp4", "prompt": f"clip <{i}>", "class": None, "seed": i, "fps": 8, "protocol": protocol}
        listing.append(row if i != 3 else row | {"seed": shade})
    (out / "videos" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listing))
    data = {"generated": str(out / "videos"), "out": str(out / "scores"), "bootstrap": 5}
    evaluate_media(validate(data, EvaluateConfig, "test"))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one protocol, and one that sampled with other steps. The last prompt's seed differs."""
    folder = tmp_path_factory.mktemp("runs")
    seeds: list[Path] = []
    for shade, steps in ((40, 20), (160, 20), (90, 50)):
        seeds.append(save_run(folder, shade, {"steps": steps, "weights": "ema"}))
    return seeds


@pytest.fixture
def comparable(runs: list[Path], tmp_path: Path) -> list[Path]:
    """The first two, their requests alike but for one that only each has."""
    for path in runs[:2]:
        scores = path.parent / "evaluation" / path.name / "scores" / "scores.json"
        found = json.loads(scores.read_text())
        for score in found["scores"].values():  # the fourth seed differs, which alone would be another protocol
            score["protocol"]["generated"]["seeds"] = [0, 3, "x"]
        scores.write_text(json.dumps(seal(found)))
    return runs[:2]


def test_a_page_has_scores_losses_and_the_shared_requests(comparable: list[Path], tmp_path: Path, capsys) -> None:
    assert compare.main([*map(str, comparable), "--out", str(tmp_path)]) == 0
    assert "compare.html is written" in capsys.readouterr().out
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/gif;base64,") == 3, "the fourth request has other seeds"
    assert page.count("data:image/png;base64,") == 2, "losses, light and dark"
    assert "clip &lt;0&gt;" in page
    assert "<script" not in page
    assert not re.findall(r"https?://", page)
    assert "vbench_temporal_flickering ↑" in page
    assert "vmaf_motion </td>" in page, "neither more nor less motion is better"
    assert "FLOPs are not known" in page


def test_a_run_is_found_from_any_of_its_folders(comparable: list[Path]) -> None:
    run = comparable[0]
    folder = run.parent / "evaluation" / run.name
    for path in (run, folder / "scores", folder / "videos"):
        found = find_results(path, "a")
        assert (found.run_dir, found.videos) == (run, folder / "videos")
        assert found.scores is not None


@pytest.mark.parametrize("recorded", ["run5", "run5/checkpoints"])
def test_a_run_is_found_by_a_path_relative_to_another_directory(
    recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(Path(), 5, {"run": recorded})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for folder in ("scores", "videos"):
        found = find_results(tmp_path / "evaluation" / "run5" / folder, "a")
        assert (found.run_dir, found.videos) == (tmp_path / "run5", tmp_path / "evaluation" / "run5" / "videos")


def test_scores_of_other_protocols_are_refused_with_the_differences(runs: list[Path], tmp_path: Path, capsys) -> None:
    assert compare.main([str(runs[0]), str(runs[2]), "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"run40 -> run90: generated\.steps: 20 -> 50 \(.*vmaf_motion", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere", "else"], "nowhere: no such folder"),
        ([".", "."], "duplicate run"),
        (["."], "two runs or more, found 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(paths: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert compare.main([*paths, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_scores_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"scores": {"fid": {}}}')
    with pytest.raises(ValueError, match=r"scores\.json: scores\.fid\.value: "):
        find_results(tmp_path, "a")
    whole = {"version": 1, "subject": {}, "scores": {}, "skipped": {}, "warnings": []}
    (tmp_path / "scores.json").write_text(json.dumps(seal(whole)))
    assert find_results(tmp_path, "a").scores is not None
    (tmp_path / "scores.json").write_text(json.dumps({**seal(whole), "warnings": ["edited"]}))
    with pytest.raises(ValueError, match=r"scores\.json: .*sha256"):
        find_results(tmp_path, "a")
    (tmp_path / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"holds no scores\.json"):
        find_results(tmp_path, "a")


def test_hours_and_samples_are_sums_over_steps_that_were_not_logged(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1.0, "samples_seen": 8 * s, "seconds": 36.0, "bucket": "b"} for s in (1, 50, 100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = loss_curve(find_results(tmp_path, "a"))
    assert curve is not None
    np.testing.assert_allclose(curve.axes["hours"], [0.01, 0.5, 1.0])
    np.testing.assert_allclose(curve.axes["samples"], [8, 400, 800])
    assert comparison_curves([curve, curve]).startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------- votes


def test_sides_are_even_and_shuffled_and_a_seed_repeats_them(comparable: list[Path]) -> None:
    pairs = same_requests([find_results(path, path.name) for path in comparable]) * 20
    names = (comparable[0].name, comparable[1].name)
    ballot = Ballot.shuffled(pairs, names, 0)
    assert ballot.left.count(names[0]) == len(pairs) // 2
    assert Ballot.shuffled(pairs, names, 0) == ballot != Ballot.shuffled(pairs, names, 1)


def test_votes_go_to_a_file_and_pages_do_not_tell_who_is_who(comparable: list[Path], tmp_path: Path) -> None:
    pairs = same_requests([find_results(path, path.name) for path in comparable])
    names = (comparable[0].name, comparable[1].name)
    ballot = Ballot.shuffled(pairs, names, 0)
    server = make_server(ballot, tmp_path / "votes.jsonl", 0, "ann")
    assert server.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def post(body: bytes, kind: str = "application/json") -> int:
        request = urllib.request.Request(f"{address}/vote", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            page = reply.read().decode()
        assert not any(name in page for name in names)
        with urllib.request.urlopen(f"{address}/pair/0", timeout=10) as reply:
            assert reply.read(6) == b"GIF89a"
        assert [
            post(json.dumps({"pair": i, "choice": c}).encode()) for i, c in enumerate(("left", "right", "same"))
        ] == [204] * 3
        for body in (b"", b"x", b"[]", b'{"pair": 99, "choice": "left"}', b'{"pair": 0, "choice": "up"}'):
            assert post(body) == 400
        assert post(b'{"pair": 0, "choice": "left"}', "text/plain") == 400
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    votes = read_votes(tmp_path / "votes.jsonl")
    assert [v["winner"] for v in votes] == [ballot.left[0], next(n for n in names if n != ballot.left[1]), None]
    assert all(v["voter"] == "ann" and set(v["runs"]) == set(names) for v in votes)
    found = tally(votes, names)
    assert sum(found["wins"].values()) == 2
    assert found["same"] == 1
    # The page counts them.
    compare.compare(comparable, tmp_path, 1)
    assert "Blind votes" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize("row", ['{"winner": "a"}', '{"runs": 7}', "[]", "{"])
def test_a_damaged_file_of_votes_is_named(row: str, comparable: list[Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "votes.jsonl").write_text(row + "\n")
    assert compare.main([*map(str, comparable), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"compare: {tmp_path / 'votes.jsonl'}:1")


def test_a_blind_vote_needs_two_runs_with_shared_requests(runs: list[Path], tmp_path: Path, capsys) -> None:
    assert compare.main([*map(str, runs), "--out", str(tmp_path), "--blind"]) == 2
    assert "--blind compares two runs, found 3" in capsys.readouterr().err


def test_flops_of_a_run_without_a_checkpoint_are_not_known(comparable: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml"):
        flops_by_bucket(comparable[0])
