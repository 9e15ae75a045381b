"""torch-fidelity, for comparison. `make setup` installs it into .venv/oracles, apart from the packages.

It imports torchvision, which PyPI has for CUDA builds of torch alone and which nothing that is used here calls: while
it is imported, an empty module stands in. And it brings a package `tests`, which would hide ours.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

ORACLES = Path(sys.prefix) / "oracles"
NAMES = (
    "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional",
    "torchvision.models",
)  # fmt: skip


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock if name[0].isupper() else MagicMock()


def torch_fidelity(module: str) -> Any:
    """torch_fidelity.MODULE; skips the test where torch-fidelity is not installed (`make setup` does)."""
    if not (ORACLES / "torch_fidelity").is_dir():
        pytest.skip(f"torch-fidelity is not in {ORACLES} (make setup)")
    before = {name: sys.modules.get(name) for name in NAMES}
    sys.modules.update({name: _Anything(name) for name in NAMES})
    sys.path.append(str(ORACLES))
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    finally:
        sys.path.remove(str(ORACLES))
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
