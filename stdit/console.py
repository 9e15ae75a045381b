"""What is shown to people, on a terminal or in a log."""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

# In messages, a word (a path, say) is cut to so many characters, and everything to MAX_MESSAGE.
MAX_WORD = 300
MAX_MESSAGE = 100_000


class Writable(Protocol):
    """stdout, a file or anything else that `print` takes."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


def echo(text: object = "", file: Writable | None = None, flush: bool = False) -> None:
    """Prints `text` on a line of its own, made printable: names of files, captions and errors hold anything. Everything
    is printed through here."""
    print(printable(text), file=file, flush=flush)


def count_of(count: int, noun: str) -> str:
    """1 clip; 1,200 clips."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def printable(text: object) -> str:
    """`text` for a terminal or a log: control characters, terminal escapes and marks that reorder text appear as in
    "\\x1b", line breaks and tabs stay; words and texts that are too long are cut in the middle."""
    found = str(text)
    if len(found) > MAX_MESSAGE:
        found = f"{found[: MAX_MESSAGE // 2]}… ({len(found):,} characters) …{found[-MAX_MESSAGE // 4 :]}"
    if not found.isprintable():
        found = "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in found)
    return re.sub(
        rf"\S{{{MAX_WORD + 1},}}", lambda word: f"{word[0][: MAX_WORD * 2 // 3]}…{word[0][-MAX_WORD // 4 :]}", found
    )


def _is_harmless(character: str) -> bool:
    """Printable, a space of any script, a line break or tab, or a joiner, which emoji and several scripts need."""
    return character.isprintable() or character in "\n\t\u200c\u200d" or unicodedata.category(character) == "Zs"
