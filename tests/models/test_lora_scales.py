"""By how much adapters are added: finite numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
