"""What curation has computed: OUT/cache.sqlite. Keys are contents and versions, so that nothing here is ever wrong,
only unused.

Every row has a hash of itself. One that does not match is said, and computed again. Removing the file costs the time to
compute it again, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stdit.config import ConfigError
from stdit.console import echo
from stdit.files import Closable, fingerprint_file

FILE = "cache.sqlite"
# Raised when the tables change.
VERSION = 1
# The last column of each is the hash of those before it.
TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest TEXT, hash TEXT);
CREATE TABLE IF NOT EXISTS analyses (key TEXT PRIMARY KEY, error TEXT, hash TEXT);
CREATE TABLE IF NOT EXISTS contents (key TEXT PRIMARY KEY, content BLOB, hash TEXT);
CREATE TABLE IF NOT EXISTS clips (key TEXT PRIMARY KEY, scores TEXT, hash TEXT);
CREATE TABLE IF NOT EXISTS ranges (key TEXT PRIMARY KEY, found TEXT, hash TEXT);
CREATE TABLE IF NOT EXISTS captions (clip TEXT, captioner TEXT, text TEXT, reason TEXT, hash TEXT, PRIMARY KEY (clip, captioner));
CREATE TABLE IF NOT EXISTS pictures (key TEXT PRIMARY KEY, content BLOB, hash TEXT);
"""
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
Row = tuple[Any, ...]


class Cache(Closable):
    """A context manager. One process writes; each write is complete or not there.

    Every method raises ConfigError for a damaged file, OSError for one that cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / FILE
        # Rows that did not match their hash, by table.
        self.damaged: Counter[str] = Counter()
        with self._errors():
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.text_factory = lambda text: text.decode(errors="replace")
            if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                self._db.execute(f"PRAGMA user_version={VERSION}")
            elif (found := self._db.execute("PRAGMA user_version").fetchone()[0]) != VERSION:
                raise self._error(f"of version {found}, this is {VERSION}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(TABLES)

    def close(self) -> None:
        self._db.close()

    def digest(self, file: Path) -> str:
        """A file's fingerprint, read again where size or time have changed. OSError: it cannot be read."""
        state = file.stat()
        for _, size, time, digest in self._rows("files", path=str(file)):
            if (size, time) == (state.st_size, state.st_mtime_ns):
                return digest
        digest = fingerprint_file(file)
        self._store("files", [(str(file), state.st_size, state.st_mtime_ns, digest)])
        return digest

    # ----------------------------------------------------------------------------------- analyses

    def analysed(self) -> dict[str, str | None]:
        """Keys of all analyses, each with the error it ended in."""
        return dict(self._rows("analyses"))

    def analysis(self, key: str) -> bytes:
        """ConfigError: damaged; it is removed, so that the same command computes it again."""
        found = next(self._rows("contents", key=key), None)
        if found is None:
            with self._errors():
                self._db.execute("DELETE FROM analyses WHERE key = ?", (key,))
            raise ConfigError(f"{self.path}: an analysis in it was damaged and is removed; run the same command again")
        return found[1]

    def store_analysis(self, key: str, content: bytes | None, error: str | None, again: bool = False) -> None:
        """again: for this run alone; the next one analyses the file anew."""
        self._store("contents", [(key, content)])
        if not again:
            self._store("analyses", [(key, error)])

    # ------------------------------------------------------------------------------- rows of JSON

    def load(self, table: str) -> dict[str, Any]:
        """All rows of `clips` or `ranges`."""
        return {key: json.loads(text) for key, text in self._rows(table)}

    def store(self, table: str, rows: Mapping[str, Any]) -> None:
        self._store(table, ((k, json.dumps(v)) for k, v in rows.items()))

    def captions(self, captioner: str) -> dict[str, tuple[str | None, str | None]]:
        """(text, or why there is none) by clip."""
        return {clip: (text, reason) for clip, _, text, reason in self._rows("captions", captioner=captioner)}

    def store_captions(self, captioner: str, rows: Mapping[str, tuple[str | None, str | None]]) -> None:
        self._store("captions", ((clip, captioner, text, reason) for clip, (text, reason) in rows.items()))

    def picture(self, key: str) -> bytes | None:
        return next((content for _, content in self._rows("pictures", key=key)), None)

    def store_picture(self, key: str, content: bytes) -> None:
        self._store("pictures", [(key, content)])

    # --------------------------------------------------------------------------------------- rows

    def _rows(self, table: str, **column: str) -> Iterator[Row]:
        """Rows of `table`, without their hash, where a column has a value; what does not match its hash is left out and
        counted."""
        where = "".join(f" WHERE {name} = ?" for name in column)
        with self._errors():
            found = self._db.execute(f"SELECT * FROM {table}{where}", tuple(column.values()))
            for *row, stored in found:
                if stored == _hash(row):
                    yield tuple(row)
                else:
                    self.damaged[table] += 1
                    if self.damaged[table] == 1:
                        echo(f"{self.path}: damaged rows in {table} are computed again", file=sys.stderr)

    def _store(self, table: str, rows: Iterable[Row]) -> None:
        with self._errors():
            self._db.execute("BEGIN")
            try:
                for row in rows:
                    places = ", ".join("?" for _ in range(len(row) + 1))
                    self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", (*row, _hash(row)))
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(_DAMAGED):
                raise self._error(f"damaged ({error})") from error
            raise OSError(f"{self.path}: {error}") from error

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}; remove it, and what it holds is computed again")


def _hash(row: Iterable[Any]) -> str:
    """Of a row's values and their types."""
    digest = hashlib.sha256()
    for value in row:
        content = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        digest.update(f"{type(value).__name__} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
