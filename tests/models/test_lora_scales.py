"""Which adapters are added, and by how much: the file that was checked, and finite numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stdit.models import lora
from stdit.models.stdit import STDiT


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_finite_number_is_refused(tmp_path: Path, tiny: Callable[..., STDiT], scale: float) -> None:
    trained, model = tiny(), tiny()
    lora.add_adapter(trained, 2)
    lora.save_adapter(trained, tmp_path)
    with pytest.raises(ValueError, match=f"adapter style: scale {scale}; expected a finite number"):
        lora.load_adapter(model, tmp_path, "style", scale)
    assert lora.adapter_names(model) == []
    lora.load_adapter(model, tmp_path, "style", 0.5)
    with pytest.raises(ValueError, match=f"found style {scale}"):
        lora.set_adapters(model, {"style": scale})
    assert lora.active_adapters(model) == {"style": 0.5}


def test_other_adapters_in_the_folder_are_not_read(
    tmp_path: Path, tiny: Callable[..., STDiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    for rank, target in ((4, tmp_path / f"old_{file.name}"), (2, file)):
        trained = tiny()
        lora.add_adapter(trained, rank)
        lora.save_adapter(trained, tmp_path)
        file.rename(target)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *place: sorted(listed(*place)))  # the old one first
    model: Any = tiny()
    lora.load_adapter(model, tmp_path, "style")
    assert model.peft_config["style"].r == 2
