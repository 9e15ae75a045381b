"""Laws of the configuration: what is written is read, what is wrong is refused by name."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipelines import plan
from stdit import config as c
from stdit.config import data as dataconfig
from stdit.config import model as modelconfig
from stdit.evaluation.networks import NETWORKS
from tests.support.paths import ROOT

MINIMAL = """
run_dir: runs/x
model: {size: S}
data: {features: synthetic, buckets: [{frames: 1, height: 16, width: 16, batch_size: 4}]}
train: {steps: 20, optimizer: {learning_rate: 1e-4}}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_dumped_config_loads_as_an_equal_one(minimal: Path) -> None:
    config = c.load_config(minimal, c.Config, ["train.steps=7"])
    again = minimal.with_name("again.yaml")
    again.write_text(c.dump(config))
    assert c.load_config(again, c.Config) == config
    assert config.train.steps == 7


def test_an_exponent_without_a_dot_is_a_number(minimal: Path) -> None:
    assert c.load_config(minimal, c.Config).train.optimizer.learning_rate == 1e-4


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(value: float) -> None:
    assert c.parse_yaml(f"x: {value!r}", "f") == {"x": value}


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("train.stepz=1", "train.stepz", "unknown key"),
        ("train.steps=true", "train.steps", "True"),
        ("train.steps=0", "train.steps", "found 0"),
        ("train.steps=2.5", "train.steps", "2.5"),
        ('train.optimizer.learning_rate="1"', "train.optimizer.learning_rate", "found '1'"),
        ("model.size=Q", "model.size", "'Q'"),
        ("data.buckets=[]", "data.buckets", "at least 1"),
        (
            "model={hidden_size: 100, depth: 2, num_heads: 3}",
            "model",
            "hidden_size 100 is not divisible by num_heads 3",
        ),
        ("model={hidden_size: 64}", "model", "depth, num_heads"),
        ("diffusion.caption_dropout=1.5", "diffusion.caption_dropout", "1.5"),
        ("train.zero_stage=4", "train.zero_stage", "4"),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_value(minimal: Path, override: str, key: str, found: str) -> None:
    with pytest.raises(c.ConfigError) as error:
        # `size` and explicit sizes together are legal, so the size is taken away first where they are tested.
        c.load_config(minimal, c.Config, [*(["model.size=null"] if override.startswith("model={") else []), override])
    assert str(minimal) in str(error.value)
    assert key in str(error.value)
    assert found in str(error.value)


def test_every_error_is_listed_not_only_the_first(minimal: Path) -> None:
    with pytest.raises(c.ConfigError) as error:
        c.load_config(minimal, c.Config, ["train.steps=0", "nonsense=1"])
    assert "train.steps" in str(error.value)
    assert "nonsense" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(c.ConfigError, match="absent.yaml"):
        c.load_config(tmp_path / "absent.yaml", c.Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "given twice"),
        ("a: &x 1\nb: *x", "aliases"),
        ("a: [1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("extends: base.yaml", "must be a list"),
        ("a: !!python/object/apply:os.system [ls]", "tag .*os.system is not one of"),
        ("a: !!binary aGk=", "tag !!binary is not one of"),
        ("a: !!set {x}", "tag !!set is not one of"),
        ("a: !!timestamp 2024-01-01", "tag !!timestamp is not one of"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!bool yes", "'yes' is no bool"),
        ("a: !!null hello", "'hello' is no null"),
        ("a: !!int ٧", "'٧' is no int"),
        ("a: !!float 1.٧", "'1.٧' is no float"),
        ("a: !!map [1]", "tag !!map stands before a sequence"),
        ("a: !!map x", "tag !!map stands before a scalar"),
        ("a: !!str {b: 1}", "tag !!str stands before a mapping"),
        ("a: !<str> b", "tag str is not one of"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ('a: "\\U00110000"', "not valid YAML"),
        (f"%YAML 1.{'1' * 5000}\n--- {{}}", "not valid YAML"),
        ('a: "\\ud800"', r":1: \\ud800 is half of a surrogate pair"),
        ('"\\udfff": 1', r":1: \\udfff is half of a surrogate pair"),
        ("1: x", "a key must be a string, found 1"),
        ("2024-01-01T00:00:00Z: x\n? [a]\n: 1", "a key must be a string"),
        ("? {a: 1}\n: 1", "a key must be a string"),
        ("a: \x00", "not valid YAML"),
        ("a: \x1b[31m", "not valid YAML"),
        ("a: " + "9" * 5000, "a number of 5000 characters; at most 64"),
        ("[" * 500 + "]" * 500, "nested more than 40 deep"),
        ("a: " + "x" * (1 << 20), "more than the 1,048,576 bytes allowed"),
    ],
)
def test_yaml_that_could_mislead_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, bad=text)
    with pytest.raises(c.ConfigError, match=message) as error:
        c.load_config(path, c.Config)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", 1000),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("~", None),
        ("", None),
        ("True", True),
        ("1.٧", "1.٧"),
        ("!!str 5", "5"),
        ("!!float 1", 1.0),
        ("!!bool TRUE", True),
        ("!!null", None),
        ('"\\U0001f600"', "\U0001f600"),
    ],
)
def test_plain_and_tagged_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    assert c.parse_yaml(f"a: {text}", "f") == {"a": value}


def test_a_merge_key_is_an_unknown_key(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "<<: {seed: 1}\n")
    with pytest.raises(c.ConfigError, match="<<: unknown key"):
        c.load_config(minimal, c.Config)


@pytest.mark.timeout(20)
def test_only_regular_files_are_read_as_configs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", Path("/dev/zero"), tmp_path):
        with pytest.raises(c.ConfigError, match="not a regular file"):
            c.load_config(path, c.Config)


def test_every_error_is_one_printable_line(tmp_path: Path) -> None:
    for i, text in enumerate(["a: [1", "a: b: c", "a: \x00", "? [a]\n: 1", "x: '" + "\\u001b" * 999 + "'\nx: 1"]):
        path = write(tmp_path, **{f"bad{i}": text})
        with pytest.raises(c.ConfigError) as error:
            c.load_config(path, c.Config)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="extends: [a, b]\nx: {q: 3}\n".replace("a,", "a.yaml,").replace("b]", "b.yaml]"),
        a="x: {p: 1, q: 1}\nl: [1, 2]",
        b="x: {q: 2}\nl: [3]",
    )
    assert c.read_extended(path) == {"x": {"p": 1, "q": 3}, "l": [3]}


def test_extends_is_at_most_two_deep(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: [b.yaml]", b="extends: [c.yaml]", c="extends: [d.yaml]", d="x: 1")
    assert c.read_extended(tmp_path / "b.yaml") == {"x": 1}
    with pytest.raises(c.ConfigError, match="at most 2 deep"):
        c.read_extended(path)


def test_an_override_of_thousands_of_parts_is_refused() -> None:
    with pytest.raises(c.ConfigError, match="nested more than 40 deep"):
        c.apply_override({}, ".".join("a" * 3000) + "=1")


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=3"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(c.ConfigError, match="expected key=value"):
        c.apply_override({}, text)


def test_an_override_of_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(c.ConfigError, match="the key is not UTF-8"):
        c.apply_override({}, "a.\udcff=1")


def test_latents_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(c.ConfigError, match=r"16x100x64: height 100 .* 8"):
        c.latent_shape(c.Bucket(frames=16, height=100, width=64), (1, 8, 8))
    with pytest.raises(c.ConfigError, match=r"frames - 1 = 15 .* 4"):
        c.latent_shape(c.Bucket(frames=16, height=64, width=64), (4, 8, 8))
    with pytest.raises(c.ConfigError, match=r"latent width 9 .* 2"):
        c.token_grid((1, 8, 9), (1, 2, 2), "bucket 1x8x9")


def fields(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


def schemas() -> list[type[BaseModel]]:
    found = [v for module in (c, dataconfig, modelconfig) for v in vars(module).values()]
    return sorted({v for v in found if isinstance(v, type) and issubclass(v, c.Frozen)}, key=lambda v: v.__name__)


@pytest.mark.parametrize("schema", schemas(), ids=lambda s: s.__name__)
def test_no_number_may_be_infinite_or_nan_or_beyond_64_bits(schema: type[BaseModel]) -> None:
    for name in schema.model_fields:
        for value in (float("inf"), float("-inf"), float("nan"), 10**30):
            with pytest.raises(ValidationError) as error:
                schema.model_validate({name: value}, strict=True)
            assert any(e["loc"][:1] == (name,) for e in error.value.errors()), f"{schema.__name__}.{name} = {value}"


@cache
def attributes_read() -> set[str]:
    """Every attribute or keyword name that the program reads, over all packages."""
    read: set[str] = set()
    for package in ("stdit", "pipelines", "cluster"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    return read


@pytest.mark.parametrize("schema", schemas(), ids=lambda s: s.__name__)
def test_every_config_field_is_read_somewhere(schema: type[BaseModel]) -> None:
    # The fields of NetworkPaths are read by the keys of the networks.
    read = attributes_read() | (set(NETWORKS) if schema is c.NetworkPaths else set())
    assert fields(schema) - read == set()


def plain_configs() -> list[Path]:
    return sorted(p for p in (ROOT / "configs").rglob("*.yaml"))


def schema_of(data: dict[str, Any]) -> type[BaseModel] | None:
    """Which schema a YAML file of configs/ is for: known by its keys. None: a fragment that others extend."""
    if "stages" in data:
        return plan.Plan
    if "manifest" in data:
        return c.ExtractConfig
    if "generated" in data:
        return c.EvaluateConfig
    if "footage" in data:
        return c.CurateConfig
    if {"model", "data", "train"} <= set(data):
        return c.Config
    return None


@pytest.mark.parametrize("path", plain_configs(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_in_configs_loads(path: Path) -> None:
    data = c.read_extended(path)
    schema = schema_of(data)
    if schema is c.Config:
        # Stages leave run_dir to whoever launches them.
        data.setdefault("run_dir", "runs/test")
    if schema is None:
        assert set(data) <= fields(c.Config), "a fragment holds sections of Config"
        for key, value in data.items():
            annotation = c.Config.model_fields[key].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel) and key != "data":
                assert set(value) <= fields(annotation)
    elif schema is plan.Plan:
        plan.read(path)  # which lays its sets' extractions over the common one
    else:
        c.validate(data, schema, str(path))


@pytest.mark.parametrize(("key", "limit"), [("threads", 1024), ("workers", 4096)])
def test_more_threads_or_workers_than_a_machine_can_start_are_refused_with_the_limit(key: str, limit: int) -> None:
    data = {"run": "r", "prompts": "p", "out": "o"}
    assert getattr(c.validate({**data, key: limit}, c.GenerateConfig, "x"), key) == limit
    with pytest.raises(c.ConfigError, match=rf"{key}: Input should be less than or equal to {limit}, found 1000000"):
        c.validate({**data, key: 1_000_000}, c.GenerateConfig, "x")
