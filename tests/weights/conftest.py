"""Fixtures of tiny models."""

from tests.support.models import noise, reset_compiler, settings, tiny

__all__ = ["noise", "reset_compiler", "settings", "tiny"]
