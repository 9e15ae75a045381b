"""Scores of clips: those that follow from the analysis, always, and those of the config's scorers, which see frames.

A score is identified by its scorer's version and settings, and kept for each clip: only what is new is computed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import UnidentifiedImageError

from stdit.config import ConfigError, ScorerConfig
from stdit.curation.analysis import VERSION
from stdit.curation.clips import ClipView, spread
from stdit.curation.scorers import black, blockiness, blur, brightness, contrast, freeze, letterbox, motion, shake
from stdit.data.decoding import DecodeError, DecodeTimeout
from stdit.data.subprocess_decoder import SubprocessDecoder

# Each module's function of its own name.
MEASURED = (motion, blur, black, freeze, blockiness, brightness, contrast, shake, letterbox)
Score = Callable[[ClipView], Any]
ERROR = "error"
# Beside it: it is for no reason of the clip's own (a time-out, memory, a share that is gone); the next run tries again.
AGAIN = "again"
# Of RuntimeErrors of an accelerator or its libraries, whichever it is.
OF_ACCELERATOR = re.compile(r"CUDA|CUDNN|CUBLAS|NCCL|HIP error|MPS backend|out of memory", re.IGNORECASE)


def measured_version() -> str:
    """Identity of the scores that follow from the analysis."""
    return f"{VERSION}:" + ",".join(f"{module.__name__.rpartition('.')[2]}{module.VERSION}" for module in MEASURED)


def measured_scores(clip: ClipView) -> dict[str, Any]:
    """All scores that follow from the analysis, and the picture within black bars."""
    names = [module.__name__.rpartition(".")[2] for module in MEASURED]
    found = {name: _number(getattr(m, name)(clip)) for name, m in zip(names, MEASURED, strict=True)}
    useful = [int(bits) for bits in clip.sample_numbers["hash"] if bits != 0]
    # As text: JSON readers differ beyond 53 bits.
    return {"scores": found, "picture": clip.picture, "hashes": [f"{bits:016x}" for bits in useful]}


def load_function(name: str, what: str) -> Any:
    """The object that `module:name` names. ConfigError: not there."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what}: {name} cannot be imported ({error})") from error


def scorer_id(scorer: ScorerConfig) -> str:
    """Identity of a scorer's results: its function, settings, frames and version, and its module's VERSION (else its
    source).

    ConfigError: not importable, or settings that it does not take.
    """
    function = load_function(scorer.function, f"scorers: {scorer.name}")
    own = code_version(scorer.function)
    if scorer.settings and not inspect.isclass(function):
        raise ConfigError(f"scorers: {scorer.name}: settings are for a class; {scorer.function} is a function")
    fingerprint = getattr(function, "fingerprint", None) if inspect.isclass(function) else None
    try:
        weights = fingerprint(**scorer.settings) if fingerprint else ""
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"scorers: {scorer.name}: {scorer.function} with {scorer.settings}: {error}") from error
    about = [scorer.function, scorer.settings, scorer.frames, scorer.version, own, weights]
    return f"{scorer.name}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"


def code_version(function: str) -> Any:
    """VERSION of the module of `module:name`, else the hash of its source."""
    module = importlib.import_module(function.partition(":")[0])
    own = getattr(module, "VERSION", None)
    if own is None:
        file = inspect.getsourcefile(module)
        own = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return own


def reads(scorer: ScorerConfig) -> tuple[str, ...]:
    """What of a clip a scorer's results depend on besides its frames: READS of its module, else "caption" and "row"."""
    return getattr(importlib.import_module(scorer.function.partition(":")[0]), "READS", ("caption", "row"))


def load_scorer(scorer: ScorerConfig) -> Score:
    """The function of a clip. ConfigError: not importable, or its class does not take `settings`."""
    found: Any = load_function(scorer.function, f"scorers: {scorer.name}")
    try:
        return cast(Score, found(**scorer.settings) if inspect.isclass(found) else found)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"scorers: {scorer.name}: {scorer.function} with {scorer.settings}: {error}") from error


class ClipScorer:
    """Scores clips by the config's scorers; decodes each clip once for all that take as many frames. `close` ends its
    decoder."""

    def __init__(self, scorers: Sequence[ScorerConfig], timeout_s: float = 60.0) -> None:
        self.scorers = {scorer.name: (scorer, load_scorer(scorer)) for scorer in scorers}
        self.decoder = SubprocessDecoder("pyav", timeout_s)

    def score(
        self, clip: ClipView, names: Iterable[str], crop: tuple[int, int, int, int] | None, file: Path
    ) -> dict[str, Any]:
        """By scorer: its scores by column, or {"error": why there are none}. A scorer that raises harms this score
        alone."""
        found: dict[str, Any] = {}
        chosen = [self.scorers[name] for name in names]
        shown: dict[int, np.ndarray | dict[str, Any]] = {}
        for scorer, function in chosen:
            if scorer.frames not in shown:
                try:
                    indices = spread(clip.start, clip.end, scorer.frames)
                    shown[scorer.frames] = self.decoder.read_part(file, indices, None, crop)
                except DecodeError as error:
                    shown[scorer.frames] = failure(error.reason, error)
            pictures = shown[scorer.frames]
            if isinstance(pictures, dict):
                found[scorer.name] = pictures
                continue
            clip.pictures = pictures
            try:
                found[scorer.name] = named_scores(scorer.name, function(clip))
            except Exception as error:  # the border to foreign code
                found[scorer.name] = failure(f"{type(error).__name__}: {error}", error)
        clip.pictures = None
        return found

    def close(self) -> None:
        self.decoder.close()


def failure(reason: str, error: Exception) -> dict[str, Any]:
    """What a clip has in place of a scorer's columns."""
    return {ERROR: reason, AGAIN: True} if is_passing(error) else {ERROR: reason}


def is_passing(error: Exception) -> bool:
    """Whether an error is about the machine, not the clip: time, memory, files and connections, the accelerator."""
    from stdit.training.out_of_memory import is_out_of_memory  # imports torch

    name = type(error).__name__
    accelerator = isinstance(error, RuntimeError) and (OF_ACCELERATOR.search(str(error)) or name == "AcceleratorError")
    # Clients of HTTP have time-outs of their own, that are no OSError: httpx.ReadTimeout, openai.APITimeoutError.
    late = isinstance(error, DecodeTimeout) or name.endswith(("Timeout", "TimeoutError"))
    system = isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError)
    return late or system or is_out_of_memory(error) or bool(accelerator)


def named_scores(name: str, value: Any) -> dict[str, Any]:
    """A scorer's result by column: NAME, or NAME_KEY of a mapping (NAME of key ""); `embedding`, a vector, stays one.
    ValueError: no number."""
    if not isinstance(value, Mapping):
        return {name: _number(value)}
    found: dict[str, Any] = {
        f"{name}_{key}" if key else name: _number(each) for key, each in value.items() if key != "embedding"
    }
    if "embedding" in value:
        found["embedding"] = [round(float(x), 5) for x in np.asarray(value["embedding"]).ravel()]
    return found


def _number(value: Any) -> float | int | bool | str | None:
    """A score as JSON has it, to six digits; None for what is not finite. ValueError: no scalar."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit 64 bits")
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float):
        raise ValueError(f"expected a number, text, true/false or None, found {type(value).__name__}")
    return float(f"{value:.6g}") if math.isfinite(value) else None
