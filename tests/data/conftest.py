from __future__ import annotations

from collections.abc import Iterator

import pytest

from stdit.data import objects
from tests.support.object_store import ObjectStore


@pytest.fixture(scope="package")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder = tmp_path_factory.mktemp("store")
    (folder / "bucket").mkdir()
    with ObjectStore(folder) as store:
        yield store


@pytest.fixture
def s3(_s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server with bucket `bucket`, whose failures last milliseconds."""
    for name, value in _s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(objects, "LONGEST_WAIT_S", 0.02)
    _s3.heal()
    yield _s3
    _s3.heal()
