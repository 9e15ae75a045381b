"""Errors that commands tell apart, and the exit codes that follow."""

from __future__ import annotations

import errno


class WorkFailed(ValueError):
    """Work that was done, and whose result cannot be used. Other ValueErrors are input that cannot."""


class NotRegularError(OSError):
    """A folder, pipe or device where a file is expected."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded or saved; the message names the folder and the reason."""


class SaveError(CheckpointError):
    """A checkpoint that could not be saved; earlier ones are intact."""


def exit_code(error: Exception) -> int:
    """Of a command that ends by `error`: 2, input that cannot be used, such as a damaged checkpoint; 1, work that
    failed (a full disk, a lost store)."""
    unusable = isinstance(error, ValueError | CheckpointError) and not isinstance(error, WorkFailed | SaveError)
    no_file = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | NotRegularError)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if unusable or no_file or too_long else 1
