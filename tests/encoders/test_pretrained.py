"""Models of transformers by path: code in their folders is never run, and a missing weight is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from stdit.config import CaptionConfig
from stdit.curation.captioners import ModelCaptioner
from stdit.curation.scorers.safety import Safety
from stdit.curation.vision import ImageTextModel
from stdit.encoders.pretrained import load_pretrained

EVIL = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel
Path(__file__).with_name("ran").touch()
class Settings(PretrainedConfig):
    model_type = "evil"
class Evil(PreTrainedModel):
    config_class = Settings
"""
USERS: dict[str, Callable[[str], Any]] = {
    "image and text": ImageTextModel,
    "unsafe content": lambda path: Safety(path, ["nsfw"]),
    "captions": lambda path: ModelCaptioner(CaptionConfig(name="dense", path=path)),
}


@pytest.mark.parametrize("user", USERS)
def test_code_in_a_models_folder_is_never_run(user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (
        "AutoModel",
        "AutoProcessor",
        "AutoImageProcessor",
        "AutoModelForImageClassification",
        "AutoModelForImageTextToText",
    )
    auto_map = {"AutoConfig": "evil.Settings", **dict.fromkeys(kinds, "evil.Evil")}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with pytest.raises(Exception):  # noqa: B017 (whatever transformers raises for a model that it does not know)
        USERS[user](str(tmp_path))
    assert not list(tmp_path.rglob("ran"))


def test_a_missing_weight_is_an_error_unless_nothing_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**size, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(CLIPVisionModel, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "post_layernorm" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit CLIPVisionModel: missing_keys: .*post_layernorm"):
        load_pretrained(CLIPVisionModel, str(tmp_path))
    load_pretrained(CLIPVisionModel, str(tmp_path), unused=(lost,))
