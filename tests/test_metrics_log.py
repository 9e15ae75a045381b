from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stdit import metrics_log
from stdit.metrics_log import MetricsLog

Capture = pytest.CaptureFixture[str]
TORN = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n\n[]\n{"step": 2, "validation_loss": 1.0}\n{"step": 3, "lo'


def test_complete_entries_are_read_and_a_cut_line_is_skipped(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / metrics_log.FILE
    assert metrics_log.read(path) == []
    assert metrics_log.read_last(path) is None
    path.write_text(TORN.replace("[]\n", ""))
    assert [entry["step"] for entry in metrics_log.read(path)] == [1, 2, 2]
    assert not capsys.readouterr().err
    assert metrics_log.read_last(path) == {"step": 2, "loss": 1.5}


DAMAGES = [b"{", b"[]", b"null", b"7", b'{"loss": 1.0}', b'{"step": 1.5}', b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b'{"step": 1, "loss": "x"}',
    b'{"step": 1, "step": 2}', b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": 1e999}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 10_000,
    b'{"step": 1, "note": "\xff"}', bytes(range(32))]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_lines_are_left_out_and_counted_once(damage: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / metrics_log.FILE
    whole = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": 1.0, "bucket": "1x8x8"}', b'{"step": 3, "loss": null}']
    path.write_bytes(b"\n".join([whole[0], damage, whole[1], damage, whole[2], b""]))
    assert [entry["step"] for entry in metrics_log.read(path)] == [1, 2, 3]
    said = capsys.readouterr().err
    lines = damage.count(b"\n") * 2 + 2
    assert f"{path}: {lines} damaged lines are left out (line 2: " in said
    assert said.count("\n") == 1
    last = metrics_log.read_last(path)
    assert last is not None
    assert last["step"] == 3


def test_the_last_entry_of_a_long_log_is_found(tmp_path: Path) -> None:
    path = tmp_path / metrics_log.FILE
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0, "note": "x" * 100}) + "\n" for n in range(2000)))
    last = metrics_log.read_last(path)
    assert last is not None
    assert last["step"] == 1999


def test_entries_after_a_step_are_dropped_and_logged_again(tmp_path: Path) -> None:
    path = tmp_path / metrics_log.FILE
    metrics_log.truncate(path, 1)  # no file: nothing to do
    path.write_text(TORN)
    log = MetricsLog(tmp_path, 1)
    log.write({"step": 2, "loss": math.nan, "bucket": "1x8x8"})
    log.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "bucket": "1x8x8"}\n'
    metrics_log.truncate(path, 0)
    assert path.read_text() == ""


def test_a_failed_write_names_the_file_and_its_line_is_written_with_the_next(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1})
    disk = log._file
    with open("/dev/full", "wb", buffering=0) as full:
        log._file = full
        for step in (2, 3):
            with pytest.raises(OSError, match=f"No space left.*{metrics_log.FILE}"):
                log.write({"step": step})
    assert log.pending == 2
    log._file = disk
    log.write({"step": 4})
    assert log.pending == 0
    assert [entry["step"] for entry in metrics_log.read(log.path)] == [1, 2, 3, 4]
