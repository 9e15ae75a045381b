"""Models of transformers by path: code in their folders is never run, and a missing weight is an error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel

from stdit.config import CaptionConfig, ConfigError
from stdit.curation.captioners import ModelCaptioner
from stdit.curation.scorers.safety import Safety
from stdit.curation.vision import ImageTextModel
from stdit.encoders.pretrained import load_pretrained
from stdit.encoders.text_loading import load_text_model
from tests.support.encoders import save_clip

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


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


WEIGHTS: dict[str, Callable[[Path, bytes], object]] = {
    "code": lambda folder, _: torch.save({"a": Hostile()}, folder / "pytorch_model.bin"),
    "old pickle with code": lambda folder, _: (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"a": Hostile()}, 2)
    ),
    "garbage": lambda folder, _: (folder / "pytorch_model.bin").write_bytes(b"no weights" * 99),
    "empty": lambda folder, _: (folder / "pytorch_model.bin").write_bytes(b""),
    "cut": lambda folder, whole: (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2]),
    "garbage safetensors": lambda folder, whole: (folder / "model.safetensors").write_bytes(b"x" * len(whole)),
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_or_hostile_weights_are_one_line_without_advice_to_trust_them(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text_encoder"
    save_clip(folder, 16)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    WEIGHTS[damage](folder, whole)
    with pytest.raises(ConfigError, match=r"text_encoder\.path: .*(weights are refused|cannot be loaded)") as caught:
        load_text_model(str(folder), None, None, "text_encoder.path")
    with pytest.raises(ValueError, match=str(folder)):  # what scorers and captioners turn into one line
        load_pretrained(CLIPTextModelWithProjection, str(folder))
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert "code ran" not in capsys.readouterr().out
