"""docs/config.md and the schemas of configs/schema/ are what the code says; every key has a meaning, every YAML a
schema."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipelines.config_reference import DOCUMENTS, EXAMPLES, files, schema, sections
from stdit.config import validate
from tests.support.paths import ROOT

SECTIONS = {name: section for root, _ in DOCUMENTS.values() for name, section in sections(root).items()}
YAML = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", files(), ids=str)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == files()[path], f"{path} differs from the code: run `make docs`"


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_key_has_a_meaning(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert not [key for key, field in section.model_fields.items() if not (field.description or "").strip()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_valid(name: str) -> None:
    example = yaml.safe_load(EXAMPLES[name])
    assert validate(example, SECTIONS[name], name).model_fields_set == set(example)


def kind_of(path: Path) -> str:
    """Which schema a YAML file of configs/ is written by."""
    folder = path.relative_to(ROOT / "configs").parts[0]
    return {"curate": "curate", "extract": "extract", "plans": "plan", "evaluate": "evaluate"}.get(folder, "train")


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_yaml_names_its_schema_in_the_first_line(path: Path) -> None:
    found = os.path.relpath(ROOT / "configs" / "schema" / f"{kind_of(path)}.json", path.parent)
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={found}"
    assert set(yaml.safe_load(path.read_text())) <= set(schema(kind_of(path))["properties"])
