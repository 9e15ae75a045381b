"""Prompts for captions, and what becomes of the answers: cleaned, cut to length, or refused with a reason."""

from __future__ import annotations

import re
import unicodedata

from stdit.config import CaptionConfig

TEMPLATES = {
    "short": "Describe this video in one short sentence. Name the subject, what it does and where.",
    "dense": (
        "Describe this video in one detailed paragraph for training a text-to-video model: the subjects and their "
        "appearance, what they do and in which order, the setting, the camera, the light and the style. State only what is "
        "visible. Do not begin with 'The video'."
    ),
    "motion": "Describe only the motion in this video in one or two sentences: what moves, how, and how the camera moves.",
    "style": "Describe only the visual style of this video in one sentence: medium, light, colours, framing, mood.",
}
IMAGE_WORDS = (("this video", "this image"), ("The video", "The image"), ("text-to-video", "text-to-image"))

# What models put before or around a caption.
_KIND = r"(?:image|video|clip|picture|photo(?:graph)?|scene|frames?|footage|sequence|shot)s?"
_SHOWS = r"(?:shows?|depicts?|features?|presents?|displays?|captures?|portrays?|illustrates?|contains?|showcases?|is of|begins with)"
PREFIXES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b[^.:!\n]*[.:!]\s*",
        r"(?:caption|description|answer|assistant|output)\s*:\s*",
        rf"(?:in|from) (?:this|the) (?:\w+ )?{_KIND},? (?:we (?:can )?see|there (?:is|are)|you (?:can )?see)\s*(?:that )?",
        rf"(?:this|the|these) (?:\w+ )?{_KIND} {_SHOWS}\s*(?:that )?",
        rf"(?:an?|the) {_KIND} (?:of|showing|depicting|featuring)\s+",
        r"we (?:can )?see\s+(?:that )?",
    )
)
MARKUP = re.compile(r"\*\*|__|^#+\s*|^[-*]\s+|<[^>]{1,40}>|```\w*", re.MULTILINE)
REFUSALS = re.compile(
    r"\b(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:can(?:'|no)t|cannot|can not|do not have|don't have|won't|will not)|as an AI|"
    r"unable to (?:view|see|process|describe|assist)|no (?:image|video|frames?) (?:was|were|is|has been) (?:provided|attached)|"
    r"please (?:provide|upload|share) (?:an?|the) )",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])")
# Languages told apart by their script: names in Unicode's character names.
SCRIPTS = {
    "zh": ("CJK",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ko": ("HANGUL",), "ru": ("CYRILLIC",), "uk": ("CYRILLIC",),
    "bg": ("CYRILLIC",), "el": ("GREEK",), "ar": ("ARABIC",), "fa": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",),
    "th": ("THAI",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",), "bn": ("BENGALI",), "ta": ("TAMIL",),
}  # fmt: skip
# Of English text, at least this share of the words are among its commonest; of German or French text one in fifty is.
ENGLISH_SHARE = 0.12
COMMON_ENGLISH = frozenset(
    """
    a an the and or but of in on at to from by with as is are was were be been being it its this that these those he
    she they his her their there which who while over under into onto through across near behind beside between
    against up down out off then not no one two three several some other each has have holding wearing standing
    sitting
    """.split()  # noqa: SIM905
)


def prompt_for(config: CaptionConfig, caption: str | None, frames: int, seconds: float) -> str:
    """The prompt of one clip: the config's own, or the template of its style."""
    text = config.prompt
    if text is None:
        text = TEMPLATES[config.style]
        if seconds == 0:
            for video, image in IMAGE_WORDS:
                text = text.replace(video, image)
        return text
    values = {"{caption}": caption or "", "{seconds}": f"{seconds:.1f}", "{frames}": str(frames)}
    return re.sub(r"\{caption\}|\{seconds\}|\{frames\}", lambda found: values[found.group()], text)


def check_caption(answer: object, config: CaptionConfig) -> tuple[str | None, str | None]:
    """(caption, None), or (None, reason): no_text, empty, refusal, short, long, language. Boilerplate is removed
    first."""
    if not isinstance(answer, str):
        return None, "no_text"
    if not answer.strip():
        return None, "empty"
    text = clean(answer)
    if REFUSALS.search(" ".join(answer.split())[:200]):
        return None, "refusal"
    if not text:
        return None, "empty"
    if not is_language(text, config.language):
        return None, "language"
    words = count_words(text)
    if words < config.min_words:
        return None, "short"
    if words > config.max_words:
        text = cut_sentences(text, config.max_words)
        if not text:
            return None, "long"
    return text, None


def clean(answer: str) -> str:
    """One line without markup, quotes around it, and what models say before a caption; it begins with a capital
    letter."""
    text = unicodedata.normalize("NFC", "".join(c for c in answer if c.isprintable() or c.isspace()))
    text = " ".join(MARKUP.sub(" ", text).split())
    for _ in range(3):
        before = text
        text = text.strip().strip("\"'“”‘’`").strip()
        for prefix in PREFIXES:
            if found := prefix.match(text):
                text = text[found.end() :]
        if text == before:
            break
    return text[:1].upper() + text[1:]


def count_words(text: str) -> int:
    """Words between blanks; in scripts without blanks, two characters are one."""
    dense = sum(1 for c in text if _named(c, ("CJK", "HIRAGANA", "KATAKANA", "THAI")))
    return dense // 2 if dense > len(text) / 3 else len(text.split())


def cut_sentences(text: str, most: int) -> str:
    """The first whole sentences of at most `most` words; empty if the first one is longer."""
    kept = ""
    for sentence in SENTENCE.split(text):
        longer = f"{kept} {sentence}".strip()
        if count_words(longer) > most:
            break
        kept = longer
    return kept if kept.endswith((".", "!", "?", "。", "！", "？", '"', "'")) else ""


def is_language(text: str, language: str | None) -> bool:
    """Whether a text may be in `language`: by script, English also by its commonest words. True: no such check is
    known."""
    letters = [c for c in text if c.isalpha()]
    if language is None or not letters:
        return bool(letters) or language is None
    if language in SCRIPTS:
        return sum(_named(c, SCRIPTS[language]) for c in letters) >= 0.5 * len(letters)
    if sum(_named(c, ("LATIN",)) for c in letters) < 0.8 * len(letters):
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    if language == "en" and len(words) >= 8:
        return sum(word in COMMON_ENGLISH for word in words) >= ENGLISH_SHARE * len(words)
    return True


def _named(character: str, scripts: tuple[str, ...]) -> bool:
    return unicodedata.name(character, "").startswith(scripts)
