"""Laws of the cache of a curation: what was damaged is computed again or refused, and never used."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stdit.config import ConfigError, CurateConfig
from stdit.curate import run
from stdit.curation.cache import FILE, Cache

ROWS: dict[str, Any] = {f"{i:064x}:{i}": {"version": "1", "scores": {"blur": i / 7}} for i in range(60)}
CAPTIONS = {key: (f"caption {i}", None) for i, key in enumerate(ROWS)}


def content(out: Path) -> dict[str, Any]:
    """All that a cache gives."""
    with Cache(out) as cache:
        found: dict[str, Any] = {
            f"{table} {k}": v for table in ("clips", "ranges") for k, v in cache.load(table).items()
        }
        found |= {f"caption {k}": v for k, v in cache.captions("rules").items()}
        analysed = cache.analysed()
        found |= {f"analysed {k}": v for k, v in analysed.items()}
        found |= {f"picture {k}": p for k in ROWS if (p := cache.picture(k)) is not None}
        for key in analysed:
            with suppress(ConfigError):
                found[f"analysis {key}"] = cache.analysis(key)
        return found


def fill(out: Path) -> None:
    with Cache(out) as cache:
        cache.store("clips", ROWS)
        cache.store("ranges", ROWS)
        cache.store_captions("rules", CAPTIONS)
        for i, key in enumerate(ROWS):
            cache.store_picture(key, bytes([i]) * 300)
            cache.store_analysis(key, bytes([i]) * 5000, None)


def test_flipped_bits_lose_rows_or_refuse_the_file_and_change_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    whole, file = content(tmp_path), tmp_path / FILE
    original, refused, lost = file.read_bytes(), 0, 0
    assert len(whole) == 6 * len(ROWS)
    for seed in range(80):
        generator, damaged = random.Random(seed), bytearray(original)
        for _ in range(generator.choice((1, 1, 1, 40))):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        for leftover in tmp_path.glob(f"{FILE}-*"):
            leftover.unlink()
        file.write_bytes(damaged)
        try:
            found = content(tmp_path)
        except (ConfigError, OSError):
            refused += 1
        else:
            assert found.items() <= whole.items(), seed
            lost += len(found) < len(whole)
    assert lost > 20
    assert refused + lost < 80  # some bits are in free space


@pytest.mark.parametrize("damage", [b"SQLite", b"\n" * 5000, bytes(range(256)) * 40])
def test_a_file_of_something_else_is_refused_by_name(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(ConfigError, match=rf"{FILE}: damaged .*; remove it"):
        content(tmp_path)


def test_a_cache_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE clips (key TEXT PRIMARY KEY, scores TEXT)")
    with pytest.raises(ConfigError, match=rf"{FILE}: of version 0, this is 1; remove it"):
        content(tmp_path)


def test_a_curation_computes_damaged_rows_again(
    curated: CurateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = curated.model_copy(update={"out": tmp_path / "out"})
    shutil.copytree(curated.out, config.out, symlinks=True)
    with sqlite3.connect(config.out / FILE) as db:
        db.execute("UPDATE clips SET scores = replace(scores, '0.', '1.')")
        db.execute("UPDATE captions SET text = 'another'")
        db.execute("UPDATE contents SET content = zeroblob(100) WHERE rowid = 1")
    db.close()
    with pytest.raises(ConfigError, match=r"an analysis in it was damaged and is removed; run the same command again"):
        run(config)
    run(config)
    said = capsys.readouterr().err
    assert said.count("damaged rows in clips are computed again") == 2  # of each run
    assert (config.out / "manifest.jsonl").read_bytes() == (curated.out / "manifest.jsonl").read_bytes()
