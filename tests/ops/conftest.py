"""Fixtures of tiny models."""

import pytest
import torch

from tests.support.models import noise, settings, tiny

__all__ = ["noise", "settings", "tiny"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Compiled code belongs to functions, not models, and torch keeps eight a function: begin each test without any."""
    torch._dynamo.reset()
