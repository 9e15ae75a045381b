"""YAML files to validated settings: `extends`, `--set`, and errors that name the file, the key and the value.

stdit.config holds the schemas and passes these functions on; import them from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

_Section = TypeVar("_Section", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be used; the message names file, key and value."""


class _Loader(yaml.SafeLoader):
    """safe_load with three mends: 1e-4 is a float, a key given twice is an error, aliases are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{self.name}:{key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(
                f"{self.name}:{mark.line + 1}: YAML aliases (*name) are not used here; write the value out or use extends"
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path | str) -> Any:
    """The YAML document in `path`. ConfigError: file missing or not valid YAML."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The YAML document `text`; `name` stands in messages for its file."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML ({error})") from error
    finally:
        loader.dispose()


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings are merged key by key, anything else (lists too) is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def read_extended(path: Path | str, depth: int = 0) -> dict[str, Any]:
    """The mapping in `path` laid over those that its `extends:` list names (relative to it), at most two deep."""
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(data).__name__}")
    parents = data.pop("extends", [])
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends must be a list of file names, found {parents!r}")
    if parents and depth == 2:
        raise ConfigError(f"{path}: extends is at most 2 deep, this would be {depth + 1}")
    below: dict[str, Any] = {}
    for parent in parents:
        below = merge(below, read_extended(path.parent / parent, depth + 1))
    return merge(below, data)


def apply_override(data: dict[str, Any], text: str) -> dict[str, Any]:
    """`data` with one `a.b=value` laid over it; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected key=value, such as train.steps=100")
    change: Any = parse_yaml(value, f"--set {text}")
    for part in reversed(key.split(".")):
        change = {part: change}
    return merge(data, change)


def validate(data: dict[str, Any], schema: type[_Section], name: str) -> _Section:
    """`data` as a `schema`; ConfigError lists every key that is wrong, with what was found. `name`: the file, for messages."""
    try:
        # Strict, and as JSON: lists serve as tuples and strings as paths, but "5" or true is no number.
        return schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            where = ".".join(str(part) for part in e["loc"]) or "(top)"
            if e["type"] == "extra_forbidden":
                lines.append(f"{name}: {where}: unknown key")
            else:
                found = "" if e["type"] in ("missing", "value_error") else f", found {e['input']!r}"
                lines.append(f"{name}: {where}: {e['msg'].removeprefix('Value error, ')}{found}")
        raise ConfigError("\n".join(lines)) from None


def load(path: Path | str, schema: type[_Section], overrides: Sequence[str] = ()) -> _Section:
    """The YAML file `path` (with what it extends) as a `schema`, after `--set` overrides.

    Raises ConfigError naming the file, the key and the value.
    """
    data = read_extended(path)
    for text in overrides:
        data = apply_override(data, text)
    return validate(data, schema, str(path))


def dump(config: BaseModel) -> str:
    """The resolved config as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
