"""Models of transformers from a folder or hub id: no code of theirs is run, and no weight is left random."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stdit.files import check_regular


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Where transformers would ask on standard input whether to run code of a folder or hub id, it raises a ValueError
    instead.

    By `trust_remote_code=False` alone it still asks: AutoProcessor and diffusers' pipelines do not pass it on to their
    parts.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # for an answer; 0: it is not asked for
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def from_pretrained(kind: Any, path: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a tokenizer, processor or config.

    ValueError: damaged files, or a pickle of more than tensors. OSError: as transformers raises it.
    """
    check_regular(Path(path, options.get("subfolder") or ""))
    try:
        with no_remote_code():
            return kind.from_pretrained(path, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:  # torch's own message advises to load without weights_only
        raise ValueError(f"{path}: its weights are refused: damaged, or they hold more than tensors") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever transformers, safetensors and torch raise for damaged files
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"{path}: cannot be loaded ({type(error).__name__}: {reason})") from error


def load_pretrained(kind: Any, path: str | Path, unused: tuple[str, ...] = (), **options: Any) -> Any:
    """`kind.from_pretrained`, strictly. unused: beginnings of weights that may be missing, because nothing reads them.

    ValueError: a weight is missing or of another shape, and as `from_pretrained`. OSError: as transformers raises it.
    """
    model, info = from_pretrained(kind, path, output_loading_info=True, **options)
    missing = sorted(str(key) for key in info["missing_keys"] if not str(key).startswith(unused))
    wrong = {"missing_keys": missing, "mismatched_keys": sorted(map(str, info["mismatched_keys"]))}
    if found := "; ".join(f"{name}: {keys[:5]}" for name, keys in wrong.items() if keys):
        raise ValueError(f"{path}: the weights do not fit {type(model).__name__}: {found}")
    return model
