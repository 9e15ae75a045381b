"""Which files of a folder are a command's own: `.stdit-COMMAND.json` beside them lists their names. No other file is
overwritten.

claim_outputs(out, "evaluate", ["metrics.json"])    # before long work; ConfigError: it is another program's
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from stdit.config import ConfigError, SealedSchema, read_json
from stdit.files import atomic_write, seal


class Outputs(SealedSchema):
    """.stdit-COMMAND.json: names of the files and folders that the command has written here, or is about to."""

    format: Literal[1]
    outputs: list[str]


def own_outputs(folder: Path, command: str) -> set[str]:
    """Names that `command` has claimed in `folder`. ConfigError: the list of them is damaged or edited."""
    file = _file(folder, command)
    return set(read_json(file, Outputs)["outputs"]) if os.path.lexists(file) else set()


def check_outputs(folder: Path, command: str, names: Iterable[str]) -> None:
    """ConfigError, one line: something with one of these names is in `folder` and `command` has not written it."""
    own = own_outputs(folder, command)
    foreign = [name for name in names if name not in own and os.path.lexists(folder / name)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"{folder}: holds {foreign[0]}{more} that stdit {command} has not written; nothing was changed. Choose another folder, or move it away"
        )


def claim_outputs(folder: Path, command: str, names: Iterable[str]) -> None:
    """Notes that `command` writes files or folders of these names in `folder`, which need not exist. Errors as
    `check_outputs`."""
    names = set(names)
    check_outputs(folder, command, sorted(names))
    if not names <= (own := own_outputs(folder, command)):
        content = seal({"format": 1, "outputs": sorted(own | names)})
        atomic_write(_file(folder, command), json.dumps(content, indent=1) + "\n")


def _file(folder: Path, command: str) -> Path:
    return folder / f".stdit-{command}.json"
