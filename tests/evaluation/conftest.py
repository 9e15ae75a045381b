"""The manifest of wandering shapes, how it is scored, and one trained classifier for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit.config import EvaluationConfig
from tests.support.shapes_dataset import save_manifest


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_manifest(tmp_path_factory.mktemp("shapes") / "clips")


@pytest.fixture(scope="session")
def settings_for_shapes() -> EvaluationConfig:
    return EvaluationConfig(
        class_column="shape", class_name="shape", direction_column="heading", classifier_steps=60, classifier_frames=200
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained classifier for all tests."""
    return tmp_path_factory.mktemp("classifier")
