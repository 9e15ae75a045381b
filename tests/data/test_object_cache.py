"""Laws of the cache of objects: within its bound at any moment, least recently used first, one fetch for all
processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from stdit.config import CacheConfig, Url
from stdit.data import object_cache
from stdit.data.object_cache import ObjectCache, ReadAhead
from stdit.data.objects import ChangedObject, Digest, StoreError
from tests.support.object_store import ObjectStore, write

SIZE = 10_000
FOLDER = Url("s3://bucket/files")


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def url(number: int) -> Url:
    return FOLDER / f"{number}.bin"


def digest(number: int) -> Digest:
    return Digest(SIZE, hashlib.sha256(content(number)).hexdigest())


@pytest.fixture
def store(s3: ObjectStore) -> ObjectStore:
    (s3.folder / "bucket/files").mkdir(exist_ok=True)
    for number in range(12):
        (s3.folder / f"bucket/files/{number}.bin").write_bytes(content(number))
    return s3


def cache(folder: Path, files: float = 4) -> ObjectCache:
    return ObjectCache.of(CacheConfig(folder=folder / "cache", size_gb=files * SIZE / 1e9))


def used(found: ObjectCache) -> int:
    return sum(path.stat().st_size for path in found.folder.iterdir()) if found.folder.exists() else 0


def get(found: ObjectCache, number: int, hashed: bool = True) -> bytes:
    with found.local(url(number), digest(number) if hashed else None) as path:
        assert path.suffix == ".bin"
        return path.read_bytes()


def test_what_is_in_the_cache_is_not_fetched_again(store: ObjectStore, tmp_path: Path) -> None:
    found = cache(tmp_path)
    for hashed in (True, False):
        assert [get(found, n, hashed) for n in (1, 2, 1, 2)] == [content(1), content(2)] * 2
    assert len(store.fetches()) == 4  # by hash, and by URL and version


def test_a_path_of_this_machine_passes_through(tmp_path: Path) -> None:
    with cache(tmp_path).local(tmp_path / "x") as path:
        assert path == tmp_path / "x"
    assert not cache(tmp_path).folder.exists()


def test_the_files_used_longest_ago_make_room(store: ObjectStore, tmp_path: Path) -> None:
    found = cache(tmp_path, files=3)
    for number in (0, 1, 2, 0, 3):  # 1 is the one not used for longest
        get(found, number)
        time.sleep(0.01)
    store.heal()
    for number in (0, 2, 3):
        get(found, number)
    assert not store.fetches()
    get(found, 1)
    assert len(store.fetches()) == 1


def test_the_bound_holds_at_every_moment_for_many_readers(store: ObjectStore, tmp_path: Path) -> None:
    found, most, stop = cache(tmp_path, files=3.5), [0], threading.Event()
    store.latency_s = 0.005

    def watch() -> None:
        while not stop.is_set():
            total = 0
            with (found.folder / ".lock").open("a") as lock:
                fcntl.flock(
                    lock, fcntl.LOCK_EX
                )  # else a file that makes room and the one it makes room for are both summed up
                for path in found.folder.glob("*"):
                    with suppress(FileNotFoundError):
                        total += path.stat().st_size
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch)
    found.folder.mkdir(parents=True)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        for number, one in enumerate(pool.map(lambda n: get(found, n % 12), range(48))):
            assert one == content(number % 12)
    stop.set()
    watcher.join()
    assert SIZE < most[0] <= found.limit
    assert len(store.fetches()) >= 12


def test_a_file_in_use_stays(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_cache, "ROOM_WAIT_S", 0.3)
    found = cache(tmp_path, files=2)
    with found.local(url(0)) as first, found.local(url(1)) as second:
        with pytest.raises(
            StoreError, match=r"no room in .*cache: all of its 20,000 bytes are in use; raise cache.size_gb"
        ):
            get(found, 2)
        assert first.read_bytes() + second.read_bytes() == content(0) + content(1)
    assert get(found, 2) == content(2)
    assert used(found) <= found.limit


def test_an_object_larger_than_the_cache_is_an_error(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"1.bin: 10,000 bytes, more than the cache holds \(5,000 bytes, cache.size_gb\)"
    ):
        get(cache(tmp_path, files=0.5), 1)


def test_processes_of_one_machine_fetch_an_object_once(store: ObjectStore, tmp_path: Path) -> None:
    store.latency_s = 0.1
    code = (
        "import sys; from pathlib import Path; from stdit.config import Url; from stdit.data.object_cache import ObjectCache\n"
        "cache = ObjectCache(Path(sys.argv[1]), 10**6)\n"
        "for n in range(4):\n"
        "    with cache.local(Url(f's3://bucket/files/{n}.bin')) as path: assert path.read_bytes() == bytes([n]) * 10_000"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert sorted(store.fetches()) == [f"/bucket/files/{n}.bin" for n in range(4)]
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_what_a_killed_process_left_makes_room(store: ObjectStore, tmp_path: Path) -> None:
    found = cache(tmp_path, files=1.5)
    found.folder.mkdir(parents=True)
    (found.folder / f".{'0' * 64}.bin.part").write_bytes(bytes(SIZE // 2))
    assert get(found, 1) == content(1)
    assert len([path for path in found.folder.iterdir() if path.name != ".lock"]) == 1


def test_what_a_killed_process_left_of_an_object_takes_no_room_beside_it(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_cache, "ROOM_WAIT_S", 0.3)
    found = cache(tmp_path, files=1.5)
    found.folder.mkdir(parents=True)
    (found.folder / f".{digest(1).sha256}.bin.part").write_bytes(bytes(SIZE))  # as large as it would have been
    assert get(found, 1) == content(1)


def test_files_that_are_not_the_caches_are_neither_counted_nor_removed(store: ObjectStore, tmp_path: Path) -> None:
    found = cache(tmp_path, files=2)
    own = [
        found.folder / name for name in ("my-only-copy.mp4", ".download.part", f"{'0' * 63}.mp4", f"{'a' * 64}.x.mp4")
    ]
    (found.folder / f"{'b' * 64}.mp4").mkdir(parents=True)
    (found.folder / f"{'c' * 64}.mp4").symlink_to(own[0])
    for path in own:
        path.write_bytes(bytes(3 * SIZE))
        os.utime(path, (0, 0))
    for number in range(4):
        assert get(found, number) == content(number)
    assert all(path.stat().st_size == 3 * SIZE for path in own)
    assert len(list(found.folder.glob("*.bin"))) == 2


def test_a_changed_object_is_never_taken_for_the_old_one(store: ObjectStore, tmp_path: Path) -> None:
    found = cache(tmp_path)
    get(found, 1)
    assert get(found, 1, hashed=False) == content(1)
    (store.folder / "bucket/files/1.bin").write_bytes(content(99))
    assert get(found, 1) == content(1)  # by its hash, from the cache
    with found.local(url(1)) as path:  # by its version
        assert path.read_bytes() == content(99)
    for path in found.folder.glob("[!.]*"):
        path.unlink()
    with pytest.raises(ChangedObject, match=r"1.bin: sha256 .* it was changed or damaged"):
        get(found, 1)
    assert used(found) == 0


def test_reading_ahead_leaves_room_for_what_is_in_use(tmp_path: Path) -> None:
    found = cache(tmp_path, files=4)
    ahead, names = ReadAhead(found), [Url(f"memory://bucket/{number}.bin") for number in range(4)]
    for number, name in enumerate(names):
        write(name, content(number))
    announced = 0
    while not ahead.is_full:
        ahead.announce(names[announced], digest(announced))
        announced += 1
    assert announced == 2
    ahead.announce(names[0], digest(0))
    ahead.release(names[0])
    assert ahead.is_full
    ahead.release(names[0])
    assert not ahead.is_full
    until = time.monotonic() + 10
    while not found.path(names[1], digest(1)).exists():
        assert time.monotonic() < until
    ahead.close()
