"""YAML files to validated settings: `extends`, `--set`, and errors that name the file, the key and the value.

stdit.config holds the schemas and passes these functions on; import them from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stdit import files
from stdit.config.base import SealedSchema
from stdit.config.location import hide_credentials
from stdit.files import read_text

_Section = TypeVar("_Section", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be used; the message names file, key and value."""


# Limits on one YAML document: the largest config here has 100 lines and is 6 deep.
MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_DIGITS = 64
# Of what is wrong with a file, so many lines are shown.
MAX_LINES = 20

_TAG = "tag:yaml.org,2002:"
# What stands behind the tag of each kind.
_NODES: dict[str, type[yaml.Node]] = {
    **dict.fromkeys(("null", "bool", "int", "float", "str"), yaml.ScalarNode),
    "seq": yaml.SequenceNode,
    "map": yaml.MappingNode,
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: null, true and false, decimal numbers, strings, lists, and maps with string keys.

    No dates, `yes`/`no`, octal or base-60 numbers, merge keys, aliases or other tags; a key stands once; limited depth.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own declaration)
    # How scalars of a kind are spelt, with its tag before them or without.
    patterns: ClassVar[dict[str, list[re.Pattern[str]]]] = {}
    depth = 0

    def error(self, node: yaml.Node | yaml.Event, message: str) -> ConfigError:
        return ConfigError(f"{self.name}:{node.start_mark.line + 1}: {message}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise self.error(event, "YAML aliases (*name) are not used here; write the value out or use extends")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None:
            self.check_kind(node)
        return node

    def check_kind(self, node: yaml.Node) -> None:
        """ConfigError: a tag that is not of the core schema, or not of what stands behind it; half a character."""
        kind = node.tag.removeprefix(_TAG)
        if kind not in _NODES or kind == node.tag:
            tag = shorten(node.tag.replace(_TAG, "!!"))
            raise self.error(node, f"tag {tag} is not one of !!{', !!'.join(_NODES)}")
        if not isinstance(node, _NODES[kind]):
            raise self.error(node, f"tag !!{kind} stands before a {type(node).__name__.removesuffix('Node').lower()}")
        if isinstance(node, yaml.ScalarNode):
            text = str(node.value)
            if kind in self.patterns and not any(pattern.fullmatch(text) for pattern in self.patterns[kind]):
                raise self.error(node, f"{shorten(text)!r} is no {kind}")
            if found := _SURROGATE.search(text):
                raise self.error(
                    node, f"\\u{ord(found[0]):x} is half of a surrogate pair, no character; write it as \\UXXXXXXXX"
                )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != f"{_TAG}str":
                raise self.error(key_node, f"a key must be a string, found {shorten(str(key_node.value))}")
            if key in seen:
                raise self.error(key_node, f"key {shorten(key)!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        kind, text = node.tag.rpartition(":")[2], str(node.value)
        if len(text) > MAX_DIGITS:
            raise self.error(node, f"a number of {len(text)} characters; at most {MAX_DIGITS}")
        try:
            return int(text) if kind == "int" else float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
        except ValueError:
            raise self.error(node, f"{text!r} is not a number ({kind})") from None


def _resolve(kind: str, pattern: str, first: Sequence[str]) -> None:
    """first: what a scalar of this kind begins with."""
    spelt = re.compile(f"^(?:{pattern})$", re.ASCII)
    _Loader.add_implicit_resolver(f"{_TAG}{kind}", spelt, list(first))
    _Loader.patterns.setdefault(kind, []).append(spelt)


_resolve("null", r"~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve("bool", r"true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789")
_resolve("float", r"[-+]?(?:\d[\d_]*)?\.\d[\d_]*(?:[eE][-+]?\d+)?", "-+.0123456789")
_resolve("float", r"[-+]?\d[\d_]*(?:\.(?:[eE][-+]?\d+)?|[eE][-+]?\d+)", "-+0123456789")
_resolve("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")
_Loader.patterns["float"] += _Loader.patterns["int"]  # !!float 1
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.construct_number)


def shorten(text: str, limit: int = 80) -> str:
    """`text` on one line and cut to `limit` characters, for messages."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def read_yaml(path: Path | str) -> Any:
    """The YAML document in `path`. ConfigError: file missing or not valid YAML."""
    try:
        text = read_text(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shorten(str(path), 300)}: cannot be read ({shorten(str(error), 300)})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The YAML document `text`; `name` stands in messages for its file. ConfigError: not valid YAML."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except ConfigError:
        raise
    # Of escapes beyond Unicode, and of numbers in directives, PyYAML passes on Python's own errors.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: not valid YAML ({shorten(str(error), 300)})") from error
    finally:
        if loader is not None:
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
    if _SURROGATE.search(key):  # bytes of the command line that are not UTF-8
        raise ConfigError(f"--set {shorten(text)}: the key is not UTF-8")
    if len(parts := key.split(".")) > MAX_DEPTH:
        raise ConfigError(f"--set {shorten(text)}: nested more than {MAX_DEPTH} deep")
    change: Any = parse_yaml(value, f"--set {text}")
    for part in reversed(parts):
        change = {part: change}
    return merge(data, change)


def validate(data: dict[str, Any], schema: type[_Section], name: str) -> _Section:
    """`data` as a `schema`; ConfigError lists every key that is wrong, with what was found. `name`: the file, for
    messages."""
    try:
        # Strict, and as JSON: lists serve as tuples and strings as paths, but "5" or true is no number.
        return schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            where = ".".join(_keys(data, e["loc"], e["type"] == "missing")) or "(top)"
            if e["type"] == "extra_forbidden":
                lines.append(f"{name}: {where}: unknown key")
            else:
                found = (
                    ""
                    if e["type"] in ("missing", "value_error")
                    else f", found {shorten(hide_credentials(repr(e['input'])), 200)}"
                )
                lines.append(f"{name}: {where}: {hide_credentials(e['msg'].removeprefix('Value error, '))}{found}")
        more = [f"{name}: and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise ConfigError("\n".join(lines[:MAX_LINES] + more)) from None


def _keys(data: Any, loc: Sequence[int | str], missing: bool) -> list[str]:
    """The keys of `data` that an error's `loc` goes through, without pydantic's names of union members among them.
    missing: the last is the key that is not there."""
    keys: list[str] = []
    for number, part in enumerate(loc):
        held: dict[Any, Any] = (
            data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list | tuple) else {}
        )
        if part in held:
            keys.append(str(part))
            data = held[part]
        elif missing and number == len(loc) - 1:
            keys.append(str(part))
    return keys


def read_json(path: Path | str, schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON object in `path`, checked against `schema`: the one reader of the files that stdit writes.

    ConfigError, one line for each thing that is wrong: the file cannot be read, is no JSON object, or has a key that is
    missing, unknown or of another kind.
    """
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check(found, schema, str(path))
    return found


def check(found: dict[str, Any], schema: type[BaseModel], name: str) -> None:
    """ConfigError unless `found` is a `schema`, and what was sealed if that is a SealedSchema. `name`: the file, for
    messages."""
    validate(found, schema, name)
    if issubclass(schema, SealedSchema) and found != files.seal(found):
        raise ConfigError(f"{name}: was changed after it was written (its content does not match its sha256)")


def load_config(path: Path | str, schema: type[_Section], overrides: Sequence[str] = ()) -> _Section:
    """The YAML file `path` (with what it extends) as a `schema`, after `--set` overrides.

    Raises ConfigError naming the file, the key and the value.
    """
    data = read_extended(path)
    for text in overrides:
        data = apply_override(data, text)
    return validate(data, schema, str(path))


def dump(config: BaseModel) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
