"""Raw footage in, a manifest of clips out: find cuts, score, drop near-duplicates, caption. Idempotent; nothing is
computed twice.

    stdit curate --config configs/curate/footage.yaml                        # processes of this machine
    python -m pipelines.curate_clips --config configs/curate/footage.yaml    # the same on a Ray cluster

Videos are not re-encoded: a row of the manifest names a file and a range of its frames, and `stdit extract` reads
these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stdit.config import ConfigError, CurateConfig, load_config
from stdit.console import echo
from stdit.errors import exit_code
from stdit.files import FolderLock
from stdit.outputs import own_outputs

# Imported late, so that --help answers at once.
if TYPE_CHECKING:
    from stdit.curation.work import Mapper


def run(config: CurateConfig, mapper: Mapper | None = None) -> Path:
    """Curates in this process and `config.workers` others, or by `mapper`; the path of the manifest.

    Raises ConfigError, ManifestError: footage, weights or functions that are not there, before work begins; a folder
    that holds something else, or another curation at work. CurationError: too many bad files, or nothing kept (after
    the report is written).
    """
    from stdit.curation.cache import FILE
    from stdit.curation.curation import COMMAND, curate, read_report, report_lines
    from stdit.curation.work import local_mapper

    out = config.out
    if out.exists() and (
        not out.is_dir() or (not own_outputs(out, COMMAND) and not (out / FILE).exists() and not _begun(out))
    ):
        raise ConfigError(f"out: {out} exists and holds no curation; give it a folder of its own")
    lock = FolderLock(out)
    try:
        lock.acquire()
    except BlockingIOError as error:
        raise ConfigError(f"out: another curation is at work in {out} ({error})") from None
    try:
        path = curate(config, mapper or local_mapper, lambda line: echo(line, file=sys.stderr))
        echo("\n".join(report_lines(read_report(out))), file=sys.stderr)
        return path
    finally:
        lock.release()


def _begun(out: Path) -> bool:
    """Whether a curation began here and ended before it computed anything."""
    return all(path.name == ".lock" or path.is_symlink() for path in out.iterdir())


def arguments(program: str) -> argparse.ArgumentParser:
    """The command line of `stdit curate` and of `python -m pipelines.curate_clips`."""
    parser = argparse.ArgumentParser(program, description="Raw footage in, a manifest of clips and a report out.")
    parser.add_argument("--config", required=True, help="YAML with the fields of CurateConfig (docs/config.md)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, such as out=DIR"
    )
    return parser


def main(
    argv: Sequence[str] | None = None,
    program: str = "stdit curate",
    curate: Callable[[CurateConfig], Path] = run,
) -> int:
    """Exit code 0: done; 1: too many bad files, nothing kept, or a write that failed; 2: unusable config or footage."""
    options = arguments(program).parse_args(argv)
    try:
        path = curate(load_config(options.config, CurateConfig, options.set))
    except (ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        echo("\ninterrupted; the same command again goes on", file=sys.stderr)
        return 130
    echo(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
