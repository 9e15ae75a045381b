"""Captions: prompts, cleaning, refusals, languages; a server that is busy, broken, silent or wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stdit.config import CaptionConfig, CaptionServer, ConfigError
from stdit.curation import caption_text
from stdit.curation.caption_text import check_caption, clean, prompt_for
from stdit.curation.captioners import Failed, ServerCaptioner, captioner_id
from stdit.curation.clips import ClipView

CONFIG = CaptionConfig(name="dense", function="stdit.curation.rule_based:rule_based_caption")


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("The image shows a red bus in the rain.", "A red bus in the rain."),
        ("This video depicts two dogs.", "Two dogs."),
        ("Sure! Here is the caption: **A man** walks home.", "A man walks home."),
        ('"In this video, we see a boat on a lake."', "A boat on a lake."),
        ("Caption: A close-up of\n a leaf.", "A close-up of a leaf."),
        ("The footage captures a storm over the sea.", "A storm over the sea."),
        ("A woman shows a picture of her cat.", "A woman shows a picture of her cat."),
        ("The scene begins with a door.", "A door."),
    ],
)
def test_boilerplate_is_removed_and_content_stays(answer: str, caption: str) -> None:
    assert clean(answer) == caption


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (None, "no_text"),
        ({"text": "a"}, "no_text"),
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("As an AI language model I do not watch videos.", "refusal"),
        ("No video was provided, so nothing can be described here.", "refusal"),
        ("A dog", "short"),
        ("一个男人在街上走着,下着雨", "language"),
        ("Ein Mann geht bei Regen eine lange Straße entlang und trägt einen roten Schirm", "language"),
        ("word " * 400, "language"),
        ("the man is in the street " * 80, "long"),
    ],
)
def test_what_is_no_caption_has_a_reason(answer: Any, reason: str) -> None:
    assert check_caption(answer, CONFIG) == (None, reason)


def test_a_long_caption_is_cut_after_a_sentence() -> None:
    sentence = "A man in a red coat walks through the rain with his dog. "
    text, reason = check_caption(sentence * 10, CONFIG.model_copy(update={"max_words": 30}))
    assert reason is None
    assert text == (sentence * 2).strip()


def test_languages_with_their_own_script_are_told_apart() -> None:
    chinese = CONFIG.model_copy(update={"language": "zh"})
    assert check_caption("一个男人在街上走着,下着雨", chinese)[1] is None
    assert check_caption("A man walks in the rain", chinese)[1] == "language"
    assert check_caption("Ein Mann geht im Regen", CONFIG.model_copy(update={"language": None}))[1] is None


def test_prompts_name_an_image_as_one_and_fill_in_the_clips_own() -> None:
    assert "this image" in prompt_for(CONFIG, None, 1, 0.0)
    own = CONFIG.model_copy(update={"prompt": "{frames} frames of {seconds} s, called {caption}; {other}"})
    assert prompt_for(own, "a {frames}", 4, 2.0) == "4 frames of 2.0 s, called a {frames}; {other}"


# ------------------------------------------------------------------------------------------ the server


@contextmanager
def server(
    answer: Callable[[int, dict[str, Any]], tuple[int, bytes, dict[str, str]]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server on loopback; `answer` gets the number of the request and its body."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, content, headers = answer(len(seen), body)
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client gave up
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1", seen
    finally:
        http.shutdown()
        http.server_close()


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def ask(url: str, clips: int = 1, **settings: Any) -> list[Any]:
    own = CaptionServer(url=url, model="m", **{"backoff_s": 0.01, "attempts": 3, "timeout_s": 5.0, **settings})
    captioner = ServerCaptioner(CONFIG.model_copy(update={"function": None, "server": own}), own)
    view = ClipView("a.mp4", 0, 8, 8.0, 16, 16, None, pictures=np.zeros((2, 16, 16, 3), np.uint8))
    return captioner.caption([view] * clips)


def test_a_request_holds_the_frames_the_prompt_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret")
    with server(lambda number, body: (200, completion("A dog."), {})) as (url, seen):
        assert ask(url, api_key_env="CAPTION_KEY") == ["A dog."]
    parts = seen[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert (seen[0]["path"], seen[0]["key"], seen[0]["model"]) == ("/v1/chat/completions", "Bearer secret", "m")


@pytest.mark.parametrize(
    "failure", [(429, b"", {"Retry-After": "0"}), (500, b"oops", {}), (200, b"<html>", {}), (200, b"{}", {})]
)
def test_a_busy_or_broken_server_is_asked_again(failure: tuple[int, bytes, dict[str, str]]) -> None:
    with server(lambda number, body: failure if number < 3 else (200, completion("A dog."), {})) as (url, seen):
        assert ask(url) == ["A dog."]
    assert len(seen) == 3


def test_a_server_that_stays_broken_is_a_passing_failure_with_a_reason() -> None:
    with server(lambda number, body: (503, b"", {})) as (url, seen):
        assert ask(url) == [Failed("server: 503, 3 attempts", passing=True)]
    assert len(seen) == 3
    assert ask("http://127.0.0.1:9/v1")[0].reason.startswith("server: ConnectionError")


@pytest.mark.parametrize(("status", "passing"), [(400, False), (413, False), (401, True), (404, True)])
def test_a_request_that_is_refused_is_not_repeated_but_in_the_next_run_if_the_clip_is_not_to_blame(
    status: int, passing: bool
) -> None:
    with server(lambda number, body: (status, b"no", {})) as (url, seen):
        assert ask(url) == [Failed(f"server: {status}: no", passing)]
    assert len(seen) == 1


def test_a_server_that_never_answers_is_given_up() -> None:
    def slow(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(1.5)
        return 200, completion("late"), {}

    with server(slow) as (url, _):
        began = time.monotonic()
        assert ask(url, timeout_s=0.2, attempts=2)[0].passing
    assert time.monotonic() - began < 5


def test_a_wait_that_the_server_states_is_kept() -> None:
    with server(lambda n, body: (429, b"", {"Retry-After": "0.4"}) if n == 1 else (200, completion("A dog."), {})) as (
        url,
        _,
    ):
        began = time.monotonic()
        assert ask(url) == ["A dog."]
    assert time.monotonic() - began >= 0.4


def test_many_clips_are_asked_about_at_a_time() -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.1)
        with lock:
            at_once[0] -= 1
        return 200, completion("A dog."), {}

    with server(answer) as (url, _):
        assert ask(url, clips=12, concurrency=4) == ["A dog."] * 12
    assert 2 <= most[0] <= 4


def test_a_missing_key_is_an_error_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable CAPTION_KEY is not set"):
        ask("http://127.0.0.1:9/v1", api_key_env="CAPTION_KEY")


def test_how_answers_are_judged_asks_no_model_again() -> None:
    longer = CONFIG.model_copy(update={"max_words": 10, "language": "de", "batch_size": 3, "required": True})
    assert captioner_id(longer) == captioner_id(CONFIG)
    assert captioner_id(CONFIG.model_copy(update={"prompt": "x"})) != captioner_id(CONFIG)


# ------------------------------------------------------------------------------------ a whole curation


def test_captions_that_failed_in_passing_are_asked_for_again_and_the_others_are_not(tmp_path: Path) -> None:
    from stdit.config import CurateConfig
    from stdit.curate import run
    from tests.support.videos import lossless, smooth

    frames = smooth(60, 24, 32)
    (tmp_path / "in").mkdir()
    for name, part in (("a", frames), ("b", 255 - frames), ("c", frames[:, ::-1]), ("d", frames.transpose(0, 2, 1, 3))):
        lossless(tmp_path / "in" / f"{name}.mp4", part)
    answers = {
        1: (200, completion("The video shows a wave of soft colours that moves to the right."), {}),
        2: (200, completion("I'm sorry, I cannot describe this."), {}),
        3: (500, b"", {}),
        4: (200, completion(""), {}),
    }
    with server(lambda number, body: answers.get(number, (200, completion("A wave of colours."), {}))) as (url, seen):
        own = CaptionServer(url=url, model="m", attempts=1, concurrency=1, backoff_s=0.01)
        caption = CaptionConfig(name="dense", server=own)
        config = CurateConfig(footage=str(tmp_path / "in"), out=tmp_path / "out", captions=(caption,), duplicates=None)
        path = run(config)
        first = [json.loads(line)["caption_dense"] for line in path.read_text().splitlines()]
        report = json.loads((config.out / "report.json").read_text())
        assert report["captions"]["dense"] == {"captions": 1, "refusal": 1, "server": 1, "empty": 1}
        assert first == ["A wave of soft colours that moves to the right.", None, None, None]
        run(config)
        assert len(seen) == 5
        second = [json.loads(line)["caption_dense"] for line in path.read_text().splitlines()]
    assert second == [first[0], None, "A wave of colours.", None]


def test_clips_of_the_next_batch_are_decoded_while_one_is_captioned(monkeypatch: pytest.MonkeyPatch) -> None:
    from stdit.config import CurateConfig
    from stdit.curation import captioners
    from stdit.curation.work import local_mapper
    from stdit.data.decoding import DecodeError
    from stdit.data.subprocess_decoder import SubprocessDecoder

    read: list[str] = []

    def look(self: SubprocessDecoder, path: Path, *rest: Any) -> np.ndarray:
        read.append(path.name)
        if path.name == "5":
            raise DecodeError(path, "damaged")
        return np.full((1, 8, 8, 3), int(path.name), np.uint8)

    class Counting:
        def caption(self, clips: list[ClipView]) -> list[Any]:
            deadline = time.monotonic() + 10
            while len(read) < min(12, len(done) + 8) and time.monotonic() < deadline:
                time.sleep(0.001)
            done.extend(clips)
            behind.append(len(read) - len(done))
            return [str(clip.pictures[0, 0, 0, 0]) for clip in clips if clip.pictures is not None]

    done: list[ClipView] = []
    behind: list[int] = []
    monkeypatch.setattr(SubprocessDecoder, "read_part", look)
    monkeypatch.setattr(captioners, "load_captioner", lambda config: Counting())
    view = {"path": "a", "start": 0, "end": 9, "fps": 24.0, "height": 8, "width": 8, "caption": None, "row": {}}
    clips = [{**view, "key": f"k{i}", "file": f"/clips/{i}", "digest": "", "crop": None} for i in range(12)]
    config = CurateConfig(footage="a", out=Path("b"), captions=(CONFIG,), decoder_workers=3)
    results = list(local_mapper("caption:dense", config, [{"clips": clips[i : i + 4]} for i in (0, 4, 8)]))
    assert behind[0] >= 4
    found = {key: answer for result in results for key, answer in result["captions"].items()}
    assert found == {f"k{i}": (None, "damaged") if i == 5 else (str(i), None) for i in range(12)}


def test_another_template_is_another_captioner(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CaptionConfig(name="dense", path="hub/model")
    before = captioner_id(config)
    monkeypatch.setitem(caption_text.TEMPLATES, config.style, "Describe it.")
    assert captioner_id(config) != before
