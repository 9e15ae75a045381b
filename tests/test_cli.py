"""The `stdit` command and `from stdit import …`: every verb answers at once, and unknown names list what there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stdit
from stdit import arguments
from stdit.cli import VERBS, main

# Packages that take seconds to import.
HEAVY = ("torch", "ray", "diffusers", "transformers", "deepspeed", "pyarrow")


def loaded_by(code: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*set(sys.modules) & set({HEAVY!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_no_help_imports_a_heavy_package() -> None:
    verbs = list(VERBS)
    code = f"from stdit.cli import main\n    for verb in {verbs!r}:\n        try:\n            main([verb, '--help'])\n        except SystemExit as end:\n            assert end.code == 0, verb"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_of_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"stdit {verb}" in capsys.readouterr().out


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generte"]) == 2
    said = capsys.readouterr().err
    assert "did you mean generate?" in said
    assert all(verb in said for verb in VERBS)


def test_a_config_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_the_layouts_of_convert_are_those_that_there_are() -> None:
    from stdit.weights.convert import layout_names

    assert list(arguments.LAYOUTS) == layout_names()


def test_importing_stdit_imports_nothing_heavy() -> None:
    assert loaded_by("import stdit; dir(stdit); stdit.load_config") == set()


def test_every_public_name_of_stdit_is_there() -> None:
    for name in stdit.__all__:
        assert getattr(stdit, name) is not None
        assert name in dir(stdit)
    with pytest.raises(AttributeError, match="no attribute 'STDIT'"):
        stdit.STDIT  # noqa: B018
