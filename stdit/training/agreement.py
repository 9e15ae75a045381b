"""What all ranks of a run must have in common, compared when they have met: hosts may differ in their checkout, their
config, their disks."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from stdit.config import Config, ConfigError
from stdit.config.diff import changes
from stdit.config.location import hide_credentials
from stdit.files import atomic_write
from stdit.training.distributed import Ranks

PACKAGE = Path(__file__).parents[1]
# In the run directory, while it is looked for.
MARK = ".seen-by-all-hosts"
# A file on NFS may be seen by other hosts as late as that.
SEEN_S = 10.0
# Differing settings that are named.
MAX_NAMED = 3


def check_ranks(config: Config, ranks: Ranks) -> None:
    """ConfigError, on every rank and with the first one that differs: another code or config than rank 0's, or a run
    directory of its own. Collective."""
    if ranks.size == 1:
        return
    values = config.model_dump(mode="json")
    code, settings = code_digest(PACKAGE), hashlib.sha256(repr(values).encode()).hexdigest()
    found = ranks.gather((os.uname().nodename, code, settings))
    hosts = [host for host, _, _ in found]
    for rank, (host, other_code, _) in enumerate(found):
        if other_code != found[0][1]:
            raise _shared(
                f"rank {rank} on {host} runs another code of stdit than rank 0 on {hosts[0]}; all need the same"
            )
    if len({other for _, _, other in found}) > 1:
        main = ranks.broadcast(lambda: values)
        for rank, differing in enumerate(ranks.gather(changes(main, values))):
            if differing:
                named = hide_credentials(", ".join(map(str, differing[:MAX_NAMED])))
                raise _shared(
                    f"rank {rank} on {hosts[rank]} has another config than rank 0 on {hosts[0]} (0 -> {rank}): {named}"
                )
    if len(set(hosts)) > 1:
        for rank, seen in enumerate(ranks.gather(_sees_mark(config.run_dir, ranks))):
            if not seen:
                raise _shared(
                    f"run_dir: {config.run_dir} is another folder on {hosts[rank]} (rank {rank}) than on {hosts[0]}; all hosts need a shared one"
                )


def code_digest(package: Path) -> str:
    """Of all modules of a package, by path and content."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sees_mark(run_dir: Path, ranks: Ranks) -> bool:
    """Whether this rank sees what rank 0 writes into the run directory. Collective."""
    token, mark = ranks.broadcast(lambda: secrets.token_hex(8)), run_dir / MARK
    ranks.broadcast(lambda: atomic_write(mark, token))
    try:
        until = time.monotonic() + SEEN_S
        while True:
            with suppress(OSError):
                if mark.read_text() == token:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
    finally:
        ranks.barrier()
        if ranks.is_main:
            mark.unlink(missing_ok=True)


def _shared(message: str) -> ConfigError:
    """An error that all ranks raise, and rank 0 says."""
    error = ConfigError(message)
    setattr(error, "shared", True)  # noqa: B010  (pyright knows no such attribute)
    return error
