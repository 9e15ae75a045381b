"""Captioners: an image-text-to-text model of transformers, an OpenAI-compatible server, or a function. Each: clips ->
answers.

An answer is a text, or `Failed` with the reason; what is done with it is caption_text.check_caption's business.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from stdit.config import CaptionConfig, CaptionServer, ConfigError
from stdit.curation.caption_text import TEMPLATES, prompt_for
from stdit.curation.clips import ClipView
from stdit.curation.scoring import code_version, is_passing, load_function
from stdit.encoders.pretrained import from_pretrained, load_pretrained, no_remote_code
from stdit.files import fingerprint_files

# Of a server's answer, at most so much is read.
MAX_ANSWER_BYTES = 4 << 20
MAX_WAIT_S = 60.0
# What a server answers to a request that it will never take. Others (401, 404, …) are about its key or address.
OF_THE_REQUEST = (400, 413, 422)


@dataclass(frozen=True)
class Failed:
    """No answer. passing: for no reason of the clip's own (a server that is busy or away, a wrong key); the next run
    tries again."""

    reason: str
    passing: bool = False


class Captioner(Protocol):
    def caption(self, clips: Sequence[ClipView]) -> list[Any]:
        """An answer for each clip, whose `pictures` are set."""
        ...


def captioner_id(config: CaptionConfig) -> str:
    """Identity of a captioner's answers: the model's weights, the server's model or the function's version, prompt and
    frames."""
    about = config.model_dump(
        mode="json", exclude={"batch_size", "required", "server", "min_words", "max_words", "language"}
    )
    if config.server:
        about["server"] = config.server.model
    if config.prompt is None and not config.function:
        about["template"] = TEMPLATES[config.style]
    if config.function:
        load_function(config.function, f"captions: {config.name}")
        about["version"] = code_version(config.function)
    if config.path:
        folder = Path(config.path)
        about["path"] = (
            fingerprint_files(sorted(f for f in folder.glob("*") if f.is_file())) if folder.is_dir() else config.path
        )
    return f"{config.name}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"


def load_captioner(config: CaptionConfig) -> Captioner:
    """ConfigError: a model or function that is not there, a key that is not set."""
    if config.server:
        return ServerCaptioner(config, config.server)
    if config.function:
        return FunctionCaptioner(load_function(config.function, f"captions: {config.name}"))
    return ModelCaptioner(config)


class FunctionCaptioner:
    """A function of a clip."""

    def __init__(self, function: Callable[[ClipView], Any]) -> None:
        self.function = function

    def caption(self, clips: Sequence[ClipView]) -> list[Any]:
        answers: list[Any] = []
        for clip in clips:
            try:
                answers.append(self.function(clip))
            except Exception as error:  # the border to foreign code
                answers.append(Failed(f"{type(error).__name__}: {error}", is_passing(error)))
        return answers


class ModelCaptioner:
    """Any image-text-to-text model of transformers with a chat template, by folder or hub id."""

    def __init__(self, config: CaptionConfig) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

        assert config.path is not None
        self.config = config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            processor = from_pretrained(AutoProcessor, config.path)
            model = load_pretrained(AutoModelForImageTextToText, config.path, dtype=getattr(torch, config.dtype))
            with no_remote_code():
                self.pipe: Any = pipeline(
                    "image-text-to-text", model=model, processor=processor, device=device, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"captions: {config.name}: path {config.path}: {str(error).splitlines()[0]}") from error

    def caption(self, clips: Sequence[ClipView]) -> list[Any]:
        config = self.config
        chats = []
        for clip in clips:
            images = [{"type": "image", "image": image} for image in shrunk(clip.pictures, config.max_side)]
            text = prompt_for(config, clip.caption, len(images), clip.seconds)
            chats.append([{"role": "user", "content": [*images, {"type": "text", "text": text}]}])
        try:
            found = self.pipe(
                text=chats, batch_size=len(chats), return_full_text=False, generate_kwargs={"max_new_tokens": config.max_new_tokens, "do_sample": False},
            )  # fmt: skip
        except Exception as error:  # the border to foreign code
            if len(clips) > 1:  # one clip may have spoilt the batch
                return [answer for clip in clips for answer in self.caption([clip])]
            reason = str(error).splitlines()[0] if str(error) else ""
            return [Failed(f"{type(error).__name__}: {reason}", is_passing(error))]
        rows = found if len(chats) > 1 or isinstance(found[0], list) else [found]
        return [(row[0] if isinstance(row, list) else row)["generated_text"] for row in rows]


class ServerCaptioner:
    """POST URL/chat/completions, several requests at a time, with back-off."""

    def __init__(self, config: CaptionConfig, server: CaptionServer) -> None:
        self.config, self.server = config, server
        key = api_key(config.name, server)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def caption(self, clips: Sequence[ClipView]) -> list[Any]:
        with ThreadPoolExecutor(self.server.concurrency, thread_name_prefix="caption") as pool:
            return list(pool.map(self._ask, clips))

    def _ask(self, clip: ClipView) -> Any:
        import requests

        server, reason, wait = self.server, "", self.server.backoff_s
        body = self._body(clip)
        for attempt in range(server.attempts):
            if attempt:
                time.sleep(min(wait, MAX_WAIT_S))
                wait = 2 * max(wait, 1e-3)
            try:
                with requests.post(
                    f"{server.url.rstrip('/')}/chat/completions",
                    json=body, headers=self.headers, timeout=(10, server.timeout_s), stream=True,
                ) as answer:  # fmt: skip
                    if answer.status_code == 429 or answer.status_code >= 500:
                        reason = f"server: {answer.status_code}"
                        wait = _retry_after(answer.headers.get("Retry-After"), wait)
                        continue
                    content = _limited(answer, time.monotonic() + server.timeout_s)
                    if answer.status_code != 200:
                        reason = f"server: {answer.status_code}: {content[:200].decode(errors='replace')}"
                        return Failed(reason, passing=answer.status_code not in OF_THE_REQUEST)
                text = json.loads(content)["choices"][0]["message"]["content"]
                return text if isinstance(text, str) else ""
            except (requests.RequestException, TimeoutError) as error:
                reason = f"server: {type(error).__name__}"
            except (ValueError, KeyError, IndexError, TypeError):
                reason = "server: the answer is no completion"
        return Failed(f"{reason}, {server.attempts} attempts", passing=True)

    def _body(self, clip: ClipView) -> dict[str, Any]:
        images = shrunk(clip.pictures, self.config.max_side)
        parts: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg(image)).decode()}"},
            }
            for image in images
        ]
        parts.append({"type": "text", "text": prompt_for(self.config, clip.caption, len(images), clip.seconds)})
        return {
            "model": self.server.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": 0,
        }


def api_key(name: str, server: CaptionServer) -> str | None:
    """The server's key, from the environment. ConfigError: it is not set."""
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env)
    if not key:
        raise ConfigError(f"captions: {name}: environment variable {server.api_key_env} is not set")
    return key


def _retry_after(value: str | None, wait: float) -> float:
    """Seconds that a server asks to wait; `wait` if it states none."""
    try:
        return min(max(float(value or ""), 0.0), MAX_WAIT_S)
    except ValueError:
        return wait


def _limited(answer: Any, deadline: float) -> bytes:
    """The body of an answer. ValueError: too long; TimeoutError: a server that sends a byte now and then for ever."""
    content = b""
    for part in answer.iter_content(1 << 16):
        content += part
        if len(content) > MAX_ANSWER_BYTES:
            raise ValueError("too long")
        if time.monotonic() > deadline:
            raise TimeoutError
    return content


def shrunk(pictures: np.ndarray | None, max_side: int) -> list[Image.Image]:
    """Frames as images whose longer side is at most `max_side`."""
    assert pictures is not None
    images = [Image.fromarray(picture) for picture in pictures]
    for image in images:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return images


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
