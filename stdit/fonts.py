"""Text in any script on pictures: each character in the first font that has it.

    font = FallbackFont(12)
    font.draw(draw, (x, y), "a red ball 赤いボール 🎈", "#ffffff")

DejaVu Sans (matplotlib's), then Noto's emoji and scripts (manimgx-fonts), Noto Sans CJK (cvttf-notosanscjk-regular),
and last whatever fonts the system has. What none of them has appears as U+FFFD.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

# Packages of fonts, in the order in which they are asked; a package that is not installed is passed over.
FONT_PACKAGES = ("manimgx_fonts", "cvttf_NotoSansCJK_Regular")
MISSING = "\ufffd"


@functools.cache
def _font_files() -> tuple[Path, ...]:
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    found = [Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"]
    for package in FONT_PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            fonts = (path for path in Path(folder).iterdir() if path.suffix in (".ttf", ".otf"))
            # Emoji of one colour first: the symbols' own font has a few of them, too.
            found += sorted((p for p in fonts if "Italic" not in p.name), key=lambda p: ("Emoji" not in p.name, p.name))
    return tuple(found + sorted(map(Path, findSystemFonts())))


@functools.lru_cache(maxsize=256)
def _characters(path: Path) -> frozenset[int]:
    """Code points that a font has; none of a file that cannot be read."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            return frozenset(font.getBestCmap() or ())
    except (TTLibError, OSError, KeyError, ValueError):
        return frozenset()


@functools.lru_cache(maxsize=4096)
def _file_of(character: str) -> Path | None:
    return next((path for path in _font_files() if ord(character) in _characters(path)), None)


@functools.lru_cache(maxsize=256)
def _open(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


class FallbackFont:
    """Text of one size in pixels, on one base line."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ascent = _open(_font_files()[0], size).getmetrics()[0]

    def getlength(self, text: str) -> float:
        """Width of `text` in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str) -> None:
        """Draws `text`; `at`: the left upper corner of its line."""
        x, y = at
        for font, run in self._runs(text):
            draw.text((x, y + self._ascent), run, colour, font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Neighbouring characters of one font. Joiners and variation selectors that no font shows are left out."""
        found = [(_file_of(c), c) for c in text if not "\ufe00" <= c <= "\ufe0f"]
        found = [
            (path or _font_files()[0], c if path else MISSING)
            for path, c in found
            if path or unicodedata.category(c) not in ("Cf", "Mn", "Cc")
        ]
        for path, run in groupby(found, key=lambda pair: pair[0]):
            yield _open(path, self.size), "".join(c for _, c in run)
