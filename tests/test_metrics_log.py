from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stdit import metrics_log
from stdit.metrics_log import MetricsLog

TORN = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n\n[]\n{"step": 2, "validation_loss": 1.0}\n{"step": 3, "lo'


def test_complete_entries_are_read_and_a_cut_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / metrics_log.FILE
    assert metrics_log.read(path) == []
    assert metrics_log.read_last(path) is None
    path.write_text(TORN)
    assert [entry["step"] for entry in metrics_log.read(path)] == [1, 2, 2]
    assert metrics_log.read_last(path) == {"step": 2, "loss": 1.5}


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
