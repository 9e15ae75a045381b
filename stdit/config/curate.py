"""Schema of curation: raw footage in, a manifest of clips out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stdit.config.base import (
    MAX_SECONDS,
    Count,
    Frozen,
    NonNegative,
    Positive,
    Seconds,
    Share,
    Threads,
    Width,
    Workers,
)
from stdit.config.data import CacheConfig, Where
from stdit.config.location import LocalPath


class CutsConfig(Frozen):
    """Where footage is cut into clips: at hard cuts, and around dissolves and fades."""

    hard_ratio: float = Field(default=3.0, gt=1)
    """Hard cut: change from one frame to the next, relative to the median change within half a second."""
    hard_difference: float = Field(default=6.0, ge=0, le=255)
    """Hard cut: least mean absolute change of a pixel, in levels of 255."""
    dissolve_probability: float = Field(default=0.5, ge=0, le=1)
    """Dissolves and fades: frames that the classifier gives at least this probability. 1: they are not looked for."""
    margin_frames: NonNegative = 2
    """Frames that a clip loses at each cut."""
    min_seconds: float = Field(default=1.0, ge=0, le=MAX_SECONDS)
    """Shorter clips are dropped (`too_short`)."""
    max_seconds: Seconds = 20.0
    """Longer shots are divided evenly."""

    @model_validator(mode="after")
    def _check_lengths(self) -> CutsConfig:
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError(
                f"max_seconds {self.max_seconds:g} is less than twice min_seconds {self.min_seconds:g}: parts of a divided "
                "shot would be too short"
            )
        return self


class ScorerConfig(Frozen):
    """A scorer of clips besides those that are always computed (motion, blur, black, freeze, …; docs/curation.md)."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    """Name of its column, or the first part of its columns' names."""
    function: str
    """`module:function` or `module:Class`; a class is called with `settings`, and what that gives with each clip.
    Ours: stdit.curation.scorers.aesthetic:Aesthetic, .similarity:Similarity, .safety:Safety, .ocr:TextOnScreen."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a class, such as the path of its weights."""
    frames: Count = 4
    """Frames of each clip that it is shown, evenly spread."""
    version: str = ""
    """Change it to have all clips scored again; a change of `settings` or of the module's VERSION does so too."""

    @model_validator(mode="after")
    def _check_function(self) -> ScorerConfig:
        module, _, name = self.function.partition(":")
        if not module or not name:
            raise ValueError(f"function {self.function!r}: expected module:function")
        return self


class DuplicatesConfig(Frozen):
    """Near-duplicates within and between files, by perceptual hashes of their frames, two a second."""

    distance: int = Field(default=6, ge=0, le=11)
    """Bits of 64 in which hashes of the same picture may differ. From 8 on, the search takes several times as long."""
    min_share: float = Field(default=0.6, gt=0, le=1)
    """Share of the frames of the shorter clip that the other one has too."""
    embedding_similarity: float | None = Field(default=None, gt=0, le=1)
    """Least cosine similarity of two clips' embeddings, where a scorer gives them (SemDeDup). null: hashes alone."""


class CaptionServer(Frozen):
    """An OpenAI-compatible server: POST URL/chat/completions."""

    url: str = Field(pattern=r"^https?://")
    """Base address, such as http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    concurrency: Threads = 8
    """Requests at a time."""
    timeout_s: Seconds = 120.0
    """Seconds after which a request is given up."""
    attempts: Count = 5
    """Attempts for each clip: after 429, 5xx, a lost connection, a time-out or an answer that is no completion."""
    backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """Wait before the second attempt, doubled for each further one, unless the server states one (Retry-After)."""


class CaptionConfig(Frozen):
    """One caption of each clip, in column `caption_NAME`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the caption, such as dense; `original` is that of the footage itself."""
    style: Literal["short", "dense", "motion", "style"] = "dense"
    """Prompt template: short (one sentence), dense (a paragraph), motion (subject and camera), style (medium, light,
    colour)."""
    prompt: str | None = None
    """A prompt in place of the template. {caption}, {seconds}, {frames} stand for the clip's own."""
    path: str | None = None
    """Folder or hub id of an image-text-to-text model of transformers."""
    server: CaptionServer | None = None
    """A server in place of `path`."""
    function: str | None = None
    """`module:function` in place of `path`: clip -> text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the model at `path`."""
    frames: Count = 4
    """Frames that the model is shown, evenly spread."""
    max_side: Width = 512
    """Longer side of these frames, px; larger ones are shrunk."""
    batch_size: Count = 8
    """Clips per call of the model."""
    max_new_tokens: Width = 256
    """Length limit of an answer."""
    min_words: Positive = 3
    """A shorter answer is none (`short`)."""
    max_words: Positive = 250
    """A longer answer is cut after a sentence; one without sentences is none (`long`)."""
    language: str | None = "en"
    """Expected language (ISO 639-1): en, or one with a script of its own (zh, ja, ko, ru, ar, …). null: any."""
    required: bool = False
    """Whether a clip without this caption is dropped."""

    @model_validator(mode="after")
    def _check_source(self) -> CaptionConfig:
        sources = [name for name in ("path", "server", "function") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(f"caption {self.name!r}: give one of path, server and function; found {sources or 'none'}")
        if self.name == "original":
            raise ValueError("a caption can't be called 'original', which is the footage's own")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        return self


class CurateConfig(Frozen):
    """Curation: long videos and images in, a manifest of clips out (`stdit curate --config …`)."""

    footage: str | tuple[str, ...]
    """Folder, pattern (films/**/*.mp4), list of files (.txt, a path or URL a line) or manifest; or several of these.
    Paths or URLs (s3://…, gs://…)."""
    out: LocalPath
    """Folder of the manifest, the report and everything computed."""
    where: tuple[Where, ...] = ()
    """Filters on columns of the footage's own manifest."""
    cuts: CutsConfig = CutsConfig()
    """Where footage is cut."""
    scorers: tuple[ScorerConfig, ...] = ()
    """Further scorers."""
    filters: tuple[Where, ...] = ()
    """Filters on scores and columns; a clip is dropped by the first that it does not pass. Changing them computes
    nothing again."""
    letterbox: Literal["crop", "drop", "keep"] = "crop"
    """Clips with black bars: cropped to the picture (column `crop`), dropped, or left as they are."""
    duplicates: DuplicatesConfig | None = DuplicatesConfig()
    """Near-duplicates, of which one is kept. null: all are kept."""
    captions: tuple[CaptionConfig, ...] = ()
    """Captions to generate. The footage's own are kept as `caption`; a clip without one takes the first generated."""
    validation_share: Share = 0.0
    """Share of the files (of their clips all) in split validation, where the footage states no split."""
    seed: NonNegative = 0
    """Selects the validation files."""
    workers: Workers = 1
    """Processes that analyse footage (Ray actors under `pipelines.curate_clips`)."""
    decoder_workers: Workers | Literal["auto"] = "auto"
    """Processes that decode ahead for each captioner. auto: as that of extraction."""
    stall_timeout_s: Seconds = 60.0
    """Seconds without a frame after which a file is given up; the clips before that are kept."""
    max_bad_share: Share = 0.2
    """Share of the files that may be unusable before curation is an error."""
    cache: CacheConfig = CacheConfig()
    """Where footage is kept that is read by URL."""

    @model_validator(mode="after")
    def _check_names(self) -> CurateConfig:
        for kind, names in (("scorers", [s.name for s in self.scorers]), ("captions", [c.name for c in self.captions])):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}: {', '.join(repeated)} is listed twice")
        return self
