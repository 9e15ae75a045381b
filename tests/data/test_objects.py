"""Laws of objects by URL, against an S3 server: what passes is tried again, what does not is one line without
credentials."""

from __future__ import annotations

import hashlib
import re
from io import BytesIO
from pathlib import Path

import pytest

from stdit.config import ConfigError, DataConfig, Url, parse_location, validate
from stdit.data import objects
from stdit.data.objects import ChangedObject, Digest, NoAccess, NoSuchBucket, NoSuchObject, StoreError, is_of_object
from stdit.init import main as init
from tests.support.object_store import SECRET, Kind, ObjectStore, write

CONTENT = bytes(range(256)) * 400
FILE = Url("s3://bucket/folder/a.bin")


@pytest.fixture
def store(s3: ObjectStore) -> ObjectStore:
    (s3.folder / "bucket/folder").mkdir(exist_ok=True)
    (s3.folder / "bucket/folder/a.bin").write_bytes(CONTENT)
    return s3


def fetch(url: Url = FILE, expected: Digest | None = None) -> bytes:
    target = BytesIO()
    objects.download(url, target, expected)
    return target.getvalue()


def test_objects_are_read_and_listed(store: ObjectStore) -> None:
    assert fetch() == CONTENT == objects.read(FILE, len(CONTENT))
    assert objects.stat(FILE).size == len(CONTENT)
    write(FILE.parent / "deep" / "b.txt", "text")
    assert objects.listing(FILE.parent) == {"a.bin": len(CONTENT), "deep/b.txt": 4}
    assert objects.listing(Url("s3://bucket/nothing")) == {}


def test_memory_is_a_store_too() -> None:
    write(Url("memory://bucket/x/y.txt"), "text")
    assert objects.read(Url("memory://bucket/x/y.txt"), 10) == b"text"
    assert objects.listing(Url("memory://bucket/x")) == {"y.txt": 4}
    with pytest.raises(NoSuchObject, match=r"^memory://bucket/z: no such object$"):
        objects.stat(Url("memory://bucket/z"))


@pytest.mark.parametrize("kind", ["500", "503", "429", "cut"])
def test_what_passes_is_tried_again_and_said(
    kind: Kind, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fail(kind, times=3)
    assert fetch() == CONTENT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].startswith(f"stdit: {FILE}: ")
    assert "try 2 of 12 in 0.0 s" in said[0]


def test_a_body_that_ends_early_is_read_on(store: ObjectStore) -> None:
    store.fail("truncate", times=3)
    assert fetch() == CONTENT


def test_a_store_that_stays_away_is_an_error_of_one_line(store: ObjectStore) -> None:
    store.fail("500", times=100, method="HEAD")
    with pytest.raises(StoreError, match=rf"^{FILE}: .*\(12 tries\)$") as found:
        fetch()
    assert "\n" not in str(found.value)
    assert len(store.requests) == objects.TRIES


def test_an_outage_of_a_minute_is_outlasted(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.undo()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects.time, "sleep", waits.append)
    monkeypatch.setattr(objects._waits, "uniform", lambda least, most: least)  # pyright: ignore[reportPrivateUsage]
    store.fail("500", times=100, method="HEAD")
    with pytest.raises(StoreError):
        objects.stat(FILE)
    assert 60 < sum(waits) < 180
    assert max(waits) == objects.LONGEST_WAIT_S / 2


def test_a_server_that_never_answers_is_left(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "READ_TIMEOUT_S", 1)
    monkeypatch.setenv("AWS_PROFILE_OF_THIS_TEST", "1")  # another client
    store.fail("silent", method="HEAD")
    assert fetch() == CONTENT


@pytest.mark.parametrize(("kind", "error"), [("403", NoAccess), ("404", NoSuchObject), ("400", StoreError)])
def test_what_does_not_pass_is_asked_once(kind: Kind, error: type[StoreError], store: ObjectStore) -> None:
    store.fail(kind, times=100, method="HEAD", path="a.bin")
    with pytest.raises(error, match=f"^{FILE}: "):
        fetch()
    assert sum("a.bin" in path for _, path, _ in store.requests) == 1


def test_only_an_object_that_is_missing_or_changed_says_nothing_of_the_store(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(url: Url) -> StoreError:
        with pytest.raises(StoreError) as found:
            objects.stat(url)
        return found.value

    assert is_of_object(error(FILE.parent / "missing"))
    for url in (Url("s3://nobucket/folder/a.bin"), Url("s3://nobucket")):
        assert str(missing := error(url)) == f"{url}: no such bucket as nobucket"
        assert isinstance(missing, NoSuchBucket)
        assert not is_of_object(missing)
    store.fail("403", method="HEAD", path="/bucket")  # of the object that is missing
    assert isinstance(error(FILE.parent / "missing"), NoAccess)
    store.fail("404", method="HEAD", path="a.bin")
    store.fail("403", method="HEAD", path="/bucket")  # no right to ask for the bucket
    assert isinstance(error(FILE), NoSuchObject)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-expired-secret")
    assert not is_of_object(error(FILE))


def test_wrong_credentials_are_refused_and_never_printed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "another-secret-not-to-be-printed")
    for attempt in (fetch, lambda: objects.listing(FILE.parent)):
        with pytest.raises(NoAccess, match="access denied") as found:
            attempt()
        assert wrong not in str(found.value)
        assert SECRET not in str(found.value) + capsys.readouterr().err
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token-of-the-test")
    text = f"Could not sign with {wrong} session-token-of-the-test; https://host/x?X-Amz-Signature=abc123&X-Amz-Credential=me"
    assert not set(objects.redacted(text).split("=")) & {wrong, "abc123"}
    assert "session-token" not in objects.redacted(text)
    assert "me" not in objects.redacted(text).rpartition("=")[2]


def test_an_object_that_changed_is_named_and_fetched_no_further(store: ObjectStore) -> None:
    whole = Digest(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert fetch(expected=whole) == CONTENT
    file = store.folder / "bucket/folder/a.bin"
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(ChangedObject, match=r"has 102,399 bytes where 102,400 were written; it was changed"):
        fetch(expected=whole)
    file.write_bytes(b"\1" + CONTENT[1:])
    before = objects.stat(FILE)
    with pytest.raises(ChangedObject, match=r"sha256 [0-9a-f]{12}… where [0-9a-f]{12}… was written; it was changed"):
        fetch(expected=whole)
    file.write_bytes(b"\2" + CONTENT[1:])
    assert objects.stat(FILE).version != before.version


# ------------------------------------------------------------------------------------------------ URLs


def test_urls_are_joined_and_taken_apart_like_paths() -> None:
    url = Url.parse("S3://bucket//a/b/")
    assert url == "s3://bucket/a/b"
    assert url / "c.mp4" == "s3://bucket/a/b/c.mp4"
    assert (url / "c.mp4").suffix == ".mp4"
    assert (url.name, url.parent, url.key) == ("b", "s3://bucket/a", "bucket/a/b")
    assert url.is_relative_to(Url("s3://bucket/a"))
    assert not url.is_relative_to(Url("s3://bucket/a/b/c"))
    assert parse_location("file:///data/my%20clips") == Path("/data/my clips")
    assert parse_location("clips/x") == Path("clips/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://host/x", r"a URL begins with file://, s3://, gs://, memory://; found 'http'"),
        ("s3:///x", r"expected s3://BUCKET/KEY"),
        ("s3://bucket/../other", r"expected s3://BUCKET/KEY"),
        ("s3://KEY:hidden@bucket/x", r"credentials and endpoints are given to the store's client"),
        ("s3://bucket/x?X-Amz-Signature=hidden", r"signed URLs are not read"),
        ("s3://bucket?X-Amz-Signature=hidden", r"signed URLs are not read"),
        ("s3://bucket/../x?X-Amz-Signature=hidden", r"signed URLs are not read"),
        ("file://host/x", r"expected file:///PATH"),
    ],
)
def test_other_urls_are_refused_with_what_is_accepted(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for features, key in (
        (text, "features"),
        ([{"path": text}], "features.0.path"),
        ([{"path": "x"}, {"path": text, "weight": 1}], "features.1.path"),
    ):
        with pytest.raises(ConfigError, match=message) as found:
            validate({"features": features}, DataConfig, "f")
        (line,) = str(found.value).splitlines()
        assert line.startswith(f"f: {key}: ")
        assert "hidden" not in line
    with pytest.raises(SystemExit) as code:
        init([str(tmp_path / "run"), "--clips", text])
    said = capsys.readouterr().err
    assert code.value.code == 2
    assert re.search(message, said)
    assert "hidden" not in said


@pytest.mark.parametrize(
    "features",
    [
        {"path": "s3://KEY:hid/den@bucket/x"},
        [{"path": "x", "weight": "s3://KEY:hid/den@bucket/x"}],
        ["s3://KEY:hid/den@bucket/x"],
        [["https://host/x?X-Amz-Signature=hidden&X-Amz-Credential=hidden"]],
    ],
)
def test_no_message_of_a_config_holds_a_credential(features: object) -> None:
    with pytest.raises(ConfigError) as found:
        validate({"features": features}, DataConfig, "f")
    assert not re.search("hid|den", str(found.value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"features": [{"path": "a", "weight": 0}]},
            r"^f: features.0.weight: Input should be greater than 0, found 0$",
        ),
        ({"features": [{"weight": 1}]}, r"^f: features.0.path: Field required$"),
        ({"features": [{"path": "a", "wait": 1}]}, r"^f: features.0.wait: unknown key$"),
        ({"features": 3}, r"^f: features: expected a path or a URL, found 3$"),
        ({"features": []}, r"^f: .*features: an empty list; expected one set or more"),
        ({}, r"^f: features: Field required$"),
    ],
)
def test_errors_name_the_keys_that_the_file_has(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(data, DataConfig, "f")
