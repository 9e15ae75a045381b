"""What curation has computed: OUT/cache.sqlite. Keys are contents and versions, so that nothing here is ever wrong, only unused.

Removing the file costs the time to compute it again, and nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stdit.config import ConfigError
from stdit.files import Closable, fingerprint_file

FILE = "cache.sqlite"
TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest TEXT);
CREATE TABLE IF NOT EXISTS analyses (key TEXT PRIMARY KEY, content BLOB, error TEXT);
CREATE TABLE IF NOT EXISTS clips (key TEXT PRIMARY KEY, scores TEXT);
CREATE TABLE IF NOT EXISTS ranges (key TEXT PRIMARY KEY, found TEXT);
CREATE TABLE IF NOT EXISTS captions (clip TEXT, captioner TEXT, text TEXT, reason TEXT, PRIMARY KEY (clip, captioner));
CREATE TABLE IF NOT EXISTS pictures (key TEXT PRIMARY KEY, content BLOB);
"""


class Cache(Closable):
    """A context manager. One process writes; each write is complete or not there."""

    def __init__(self, out: Path) -> None:
        self.path = out / FILE
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self.path}: damaged ({error}); remove it, and what it holds is computed again"
            ) from error

    def close(self) -> None:
        self._db.close()

    def digest(self, file: Path) -> str:
        """A file's fingerprint, read again where size or time have changed. OSError: it cannot be read."""
        state = file.stat()
        row = self._db.execute("SELECT size, mtime_ns, digest FROM files WHERE path = ?", (str(file),)).fetchone()
        if row and row[:2] == (state.st_size, state.st_mtime_ns):
            return row[2]
        digest = fingerprint_file(file)
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (str(file), state.st_size, state.st_mtime_ns, digest)
        )
        return digest

    # ----------------------------------------------------------------------------------- analyses

    def analysed(self) -> dict[str, str | None]:
        """Keys of all analyses, each with the error it ended in."""
        return dict(self._db.execute("SELECT key, error FROM analyses"))

    def analysis(self, key: str) -> bytes:
        return self._db.execute("SELECT content FROM analyses WHERE key = ?", (key,)).fetchone()[0]

    def store_analysis(self, key: str, content: bytes | None, error: str | None) -> None:
        self._db.execute("INSERT OR REPLACE INTO analyses VALUES (?, ?, ?)", (key, content, error))

    # ------------------------------------------------------------------------------- rows of JSON

    def load(self, table: str) -> dict[str, Any]:
        """All rows of `clips` or `ranges`."""
        return {key: json.loads(text) for key, text in self._db.execute(f"SELECT * FROM {table}")}

    def store(self, table: str, rows: Mapping[str, Any]) -> None:
        self._many(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", ((k, json.dumps(v)) for k, v in rows.items()))

    def captions(self, captioner: str) -> dict[str, tuple[str | None, str | None]]:
        """(text, or why there is none) by clip."""
        found = self._db.execute("SELECT clip, text, reason FROM captions WHERE captioner = ?", (captioner,))
        return {clip: (text, reason) for clip, text, reason in found}

    def store_captions(self, captioner: str, rows: Mapping[str, tuple[str | None, str | None]]) -> None:
        values = ((clip, captioner, text, reason) for clip, (text, reason) in rows.items())
        self._many("INSERT OR REPLACE INTO captions VALUES (?, ?, ?, ?)", values)

    def picture(self, key: str) -> bytes | None:
        row = self._db.execute("SELECT content FROM pictures WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def store_picture(self, key: str, content: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?)", (key, content))

    def _many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._db.execute("BEGIN")
        try:
            self._db.executemany(statement, rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
