"""Models of transformers from a folder or hub id: no code of theirs is run, and no weight is left random."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_pretrained(kind: Any, path: str | Path, unused: tuple[str, ...] = (), **options: Any) -> Any:
    """`kind.from_pretrained`, strictly. unused: beginnings of weights that may be missing, because nothing reads them.

    ValueError: a weight is missing or of another shape. OSError and others: as transformers raises them.
    """
    # By default, transformers asks on standard input whether to run code of the folder.
    model, info = kind.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **options)
    missing = sorted(str(key) for key in info["missing_keys"] if not str(key).startswith(unused))
    wrong = {"missing_keys": missing, "mismatched_keys": sorted(map(str, info["mismatched_keys"]))}
    if found := "; ".join(f"{name}: {keys[:5]}" for name, keys in wrong.items() if keys):
        raise ValueError(f"{path}: the weights do not fit {type(model).__name__}: {found}")
    return model
