"""What a plan starts ends with it, and what is held back is shown when it matters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import child
from tests.support.paths import ROOT

# A plan's module that starts a program of its own, and waits.
PREPARES = """
import subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
with open(sys.argv[1], "w") as file:
    file.write(f"{inner.pid}")
time.sleep(120)
"""
DRIVER = """
import sys
from pipelines import child
try:
    child.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
except child.Terminated as signal:
    print("ended by", signal)
    sys.exit(143)
"""


def is_running(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_the_plan_ends_its_children_and_theirs(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which a child inherits
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, PREPARES, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGHUP, ignored)
    until = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    inner = int(file.read_text())
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=200)
    assert (driver.returncode, said) == (143, f"ended by {number.name}\n")
    until = time.monotonic() + 10
    while is_running(inner):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_childs_exit_code_is_returned() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert child.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("ending", "shown"),
    [("os.abort()", True), ("os._exit(1)", True), ("raise OSError('no port')", True), ("pass", False)],
)
def test_what_was_held_back_is_shown_when_a_start_fails(ending: str, shown: bool, tmp_path: Path) -> None:
    program = f"import os\nfrom pipelines.child import stderr_on_failure\nwith stderr_on_failure():\n    os.write(2, b'the reason, from C')\n    {ending}\nprint('after')"
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # other tests start Ray meanwhile
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )
    assert ("the reason, from C" in done.stderr) is shown
    assert ("after" in done.stdout) is not shown
    assert ("no port" in done.stderr) is ("no port" in ending)
    assert not list(tmp_path.iterdir())
