"""What documents say: their pages, and the commands on them.

Commands are those of fenced and indented blocks and inline code, in README.md, docs/, CONTRIBUTING.md,
cluster/README.md and the comments of configs/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md")),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in ("log.md", "config.md")),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, and inline code; of YAML the comments."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        yield from (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        return
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    text = re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL)
    yield from (line.strip() for line in text.splitlines() if line.startswith("    "))
    yield from (found.replace("\n", " ") for found in re.findall(r"`([^`]+)`", text))


def commands(page: Path) -> list[str]:
    """Commands of this project on a page, without comments, explanations after three spaces, and those cut short
    (…)."""
    starts = ("stdit ", "python -m stdit.", "python -m pipelines.", "python -m cluster.", "deepspeed ", "python stdit/")
    lines = [re.split(r"   | # ", line.strip())[0].strip() for line in code(page)]
    return list(dict.fromkeys(line for line in lines if line.startswith(starts) and "…" not in line))
