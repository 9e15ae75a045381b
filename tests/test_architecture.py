"""The layers of docs/architecture.md held against the imports: who may import whom, and where a library may appear."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("stdit", "pipelines", "cluster")

# Level of each package or module; a file may import only from lower levels, and from its own package.
LEVELS = {
    "stdit": 0,
    "stdit.config": 0,
    "stdit.errors": -2,
    "stdit.console": -1,
    "stdit.files": -1,
    "stdit.metrics_log": 0.1,
    "stdit.integrity": 0.1,
    "stdit.memory": 0.1,
    "stdit.cores": 0,
    "stdit.outputs": 0.1,
    "stdit.fonts": 0.25,
    "stdit.media": 0.5,
    "stdit.arguments": 0.5,
    "stdit.ops": 0.5,
    "stdit.models": 1,
    "stdit.diffusion": 1,
    "stdit.encoders": 1,
    "stdit.data": 1,
    "stdit.evaluation.metrics": 1,
    "stdit.evaluation.tables": 0,
    "stdit.weights": 2,
    "stdit.training": 3,
    "stdit.curation": 3,
    "stdit.inference": 3,
    "stdit.evaluation": 3,
    "stdit.train": 4,
    "stdit.init": 4,
    "stdit.extract": 4,
    "stdit.curate": 4,
    "stdit.generate": 4,
    # Generates what is missing.
    "stdit.evaluate": 4.2,
    "stdit.compare": 4.3,
    # Takes steps as training does.
    "stdit.find_batch_size": 4.2,
    "stdit.plan_compute": 4.2,
    "stdit.cli": 4.5,
    "pipelines": 5,
    "cluster": 6,
}

# Third-party packages that may appear in these places alone.
CONFINED = {
    "deepspeed": ("stdit/training/",),
    "flash_attn": ("stdit/models/attention.py",),
    "transformers": (
        "stdit/encoders/",
        "stdit/inference/pipeline.py",
        "stdit/evaluation/networks.py",
        "stdit/curation/",
    ),
    "ray": ("pipelines/", "cluster/submit.py"),
    "decord": ("stdit/data/decoding.py",),
}


def layer(module: str) -> str:
    """The longest prefix of `module` that has a level."""
    parts = module.split(".")
    return next(p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in LEVELS)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> list[Path]:
    return sorted(f for r in PACKAGES for f in (ROOT / r).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module imported, whether at the top of the file) for every import statement."""
    tree = ast.parse(file.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            if node.module in ("stdit", "pipelines", "cluster"):
                yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield node.module, id(node) in top


# stdit/__init__.py names the public objects of every level and imports none of them (tests/test_cli.py).
@pytest.mark.parametrize(
    "file", [f for f in files() if f != ROOT / "stdit" / "__init__.py"], ids=lambda f: str(f.relative_to(ROOT))
)
def test_a_file_imports_only_from_below(file: Path) -> None:
    own = layer(module_of(file))
    for name, _ in imports(file):
        if name.split(".")[0] not in PACKAGES:
            continue
        other = layer(name)
        allowed = other == own or LEVELS[other] < LEVELS[own] or (LEVELS[own] == LEVELS[other] == 3)
        assert allowed, (
            f"{file.relative_to(ROOT)} ({own}, level {LEVELS[own]}) imports {name} ({other}, level {LEVELS[other]})"
        )


# `echo` itself; text that its callers have made printable; a job's log, which is for a terminal; JSON of a child for
# its parent.
PRINTING = {"stdit/console.py", "pipelines/progress.py", "cluster/submit.py", "stdit/find_batch_size.py"}


def test_what_is_shown_is_made_printable() -> None:
    """Names of files, captions and errors may hold terminal escapes, or 10 MB."""
    for file in files():
        name = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if not isinstance(node, ast.Call) or called not in ("print", "tqdm"):
                continue
            assert called != "print" or name in PRINTING, f"{name}:{node.lineno}: print; use stdit.console.echo"
            for value in (keyword.value for keyword in node.keywords if keyword.arg in ("desc", "postfix")):
                safe = isinstance(value, ast.Constant) or ast.unparse(value).startswith("printable(")
                assert safe, f"{name}:{value.lineno}: {ast.unparse(value)[:80]} is shown without printable"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_confined_library_stays_in_its_layer(file: Path) -> None:
    path = str(file.relative_to(ROOT))
    for name, _ in imports(file):
        places = CONFINED.get(name.split(".")[0])
        assert places is None or path.startswith(places), f"{path} imports {name}, which belongs in {places}"


@pytest.mark.parametrize(
    "file", [f for f in files() if f.relative_to(ROOT).parts[0] == "pipelines"], ids=lambda f: f.name
)
def test_pipelines_import_only_settings_at_the_top(file: Path) -> None:
    for name, top in imports(file):
        if top and name.split(".")[0] == "stdit":
            assert LEVELS[layer(name)] <= 0.1, (
                f"{file.name} imports {name} at the top; heavy modules are imported inside tasks"
            )


def test_settings_need_no_torch() -> None:
    allowed = {"__future__", "json", "math", "re", "collections", "pathlib", "typing", "urllib"}
    allowed |= {"yaml", "pydantic", "pydantic_core", "stdit"}
    for file in (ROOT / "stdit" / "config").glob("*.py"):
        assert {name.split(".")[0] for name, _ in imports(file)} <= allowed


def test_no_file_under_stdit_shadows_a_module() -> None:
    # `deepspeed stdit/train.py` puts stdit/ first on sys.path.
    taken = sys.stdlib_module_names | set(packages_distributions())
    for path in (ROOT / "stdit").iterdir():
        assert path.name == "__init__.py" or path.stem not in taken or path.name == "__pycache__", (
            f"{path} shadows the module {path.stem}"
        )


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of code of its body, without docstring, comments and blank lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return sum(len(ast.unparse(node).splitlines()) for node in body)


def methods(file: str) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file, as `Class.name`."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {f"{prefix}{f.name}": f for f in inner if isinstance(f, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(
    ("file", "name"), [("stdit/models/stdit.py", "STDiT.forward"), ("stdit/models/control.py", "STDiTControl.forward")]
)
def test_the_forward_pass_is_read_in_a_minute(file: str, name: str) -> None:
    assert code_lines(methods(file)[name]) < 25


def test_the_training_loop_is_read_from_top_to_bottom() -> None:
    found = methods("stdit/train.py")
    assert code_lines(found["train_from_checkpoint"]) < 35
    assert all(code_lines(f) < 60 for f in found.values())


def test_no_test_imports_another() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        names = {name for name, _ in imports(file) if name.split(".")[0] == "tests"}
        assert not [n for n in names if not n.startswith("tests.support")], f"{file.relative_to(ROOT)}: {names}"


def test_no_time_limit_reads_the_wall_clock() -> None:
    """A clock that jumps changes nothing: durations are of time.monotonic and time.perf_counter."""
    for file in files():
        if file == ROOT / "stdit" / "evaluation" / "votes.py":  # when a vote was cast, for people
            continue
        named = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        wall = named & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}
        assert not wall, f"{file.relative_to(ROOT)}: {wall}"


def test_no_module_is_called_common() -> None:
    assert not [f for f in files() if f.stem in ("utils", "common", "helpers", "misc")]


def packages() -> dict[str, set[str]]:
    """Modules of each package, by its folder."""
    found: dict[str, set[str]] = {}
    for file in files():
        if file.name != "__init__.py" and file.parts[len(ROOT.parts)] != "cluster":
            found.setdefault(f"{file.parent.relative_to(ROOT)}/", set()).add(file.stem)
    return found


def test_the_architecture_page_lists_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Packages")[1].split("```")[1]
    listed: dict[str, set[str]] = {}
    package = ""
    for line in page.splitlines():
        if line.startswith(("stdit/", "pipelines/")):
            package = line.split()[0]
            listed[package] = set()
        elif line.startswith("    ") and package in listed:
            listed[package] |= set(re.findall(r"\w+", line))
    assert listed == packages()
