"""The model's benchmark runs from end to end, on tiny models: outputs are compared, and nothing is written."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_benchmark_compares_and_prints_a_table() -> None:
    results = ROOT / "benchmarks" / "results" / "model.md"
    before = results.read_bytes() if results.exists() else None
    done = subprocess.run(
        [sys.executable, "benchmarks/model.py", "--quick"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in ("A/A", "forward, eager", "floor", "forward + backward", "guided steps", "training step, batch 1"):
        assert row in done.stdout
    for model in ("DiT-S/2", "DiT-B/2", "PixArt-B/2", "Latte-S/2"):
        assert model in done.stdout
    assert "| torch |" in done.stdout
    assert "auto is " in done.stdout
    assert (results.read_bytes() if results.exists() else None) == before


def test_unknown_names_list_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = runpy.run_path(str(ROOT / "benchmarks" / "model.py"))["main"]
    for option, name in (("--only", "DiT-S/2"), ("--rows", "sampling")):
        monkeypatch.setattr(sys, "argv", ["model.py", option, "DiT-Z/2"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert name in capsys.readouterr().err
