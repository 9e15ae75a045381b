from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The ranks of a pool import the tests' own modules by name.
sys.path.insert(0, str(Path(__file__).parent))

from tests.support.rank_pool import Pool


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def solo() -> Iterator[Pool]:
    """One rank, in a process of its own: the tests' process keeps no process group and no changed environment."""
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
