"""Whether conditions are still what they were: what is made of them may then be kept. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Held:
    """The tensors of some mappings, as they now are: the very same ones, and not changed in place since.

    A tensor made in inference mode does not count its changes: of these only another tensor is noticed.
    """

    def __init__(self, *conditions: Mapping[str, Any]) -> None:
        self._held = [{name: (value, _version(value)) for name, value in _flat(each).items()} for each in conditions]

    def same(self, *conditions: Mapping[str, Any]) -> bool:
        """Whether these are they. Compares no values, and so waits for no device."""
        return len(self._held) == len(conditions) and all(
            held.keys() == each.keys()
            and all(held[name][0] is value and held[name][1] == _version(value) for name, value in each.items())
            for held, each in zip(self._held, map(_flat, conditions), strict=True)
        )


def _flat(conditions: Mapping[str, Any]) -> dict[str, Tensor]:
    """With those of added_cond_kwargs among the others."""
    own = {name: value for name, value in conditions.items() if name != "added_cond_kwargs"}
    return own | dict(conditions.get("added_cond_kwargs") or {})


def _version(value: Tensor) -> int | None:
    """How often a tensor, or what it is a view of, was changed in place; None where that is not counted."""
    return None if value.is_inference() else value._version
