"""No code of a folder runs and no question is asked on standard input, by whatever way the folder is opened."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit import STDiT, STDiTPipeline
from stdit.config import CaptionConfig, ModelConfig, TextEncoderConfig, VideoEncoderConfig
from stdit.curation.captioners import load_captioner
from stdit.curation.scorers.safety import Safety
from stdit.curation.vision import ImageTextModel
from stdit.encoders.text_loading import feature_sizes, load_text_encoder, load_text_model, load_tokenizer
from stdit.encoders.video import load_autoencoder, load_video_encoder
from stdit.evaluation.networks import Clip, DinoV2
from stdit.models.control import STDiTControl
from stdit.models.lora import load_adapter
from stdit.weights.convert import convert

AUTO = (
    *("AutoConfig", "AutoModel", "AutoModelForTextEncoding", "AutoModelForImageTextToText", "AutoProcessor"),
    *("AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor", "AutoModelForImageClassification"),
)
CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({marker!r}).touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()
"""


def hostile(folder: Path, marker: Path, model_type: str) -> Path:
    """A folder whose every file names the class Evil of the folder's own evil.py, which leaves `marker` when it is
    imported."""
    folder.mkdir(parents=True, exist_ok=True)
    mapped = {"auto_map": dict.fromkeys(AUTO, "evil.Evil")}
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    config = {"model_type": model_type, "_class_name": ["evil", "Evil"], "architectures": ["Evil"], **mapped}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    processor = {"image_processor_type": "Evil", "feature_extractor_type": "Evil", **mapped}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(json.dumps(mapped if model_type != "clip" else {}))
    return folder


def pipeline(**parts: list[str]) -> Callable[[Path], object]:
    """Opens the folder as a saved pipeline whose components are named so, each in a hostile folder of its own."""

    def load(folder: Path) -> object:
        index: dict[str, object] = {"_class_name": "STDiTPipeline", "_diffusers_version": "0.39.0"}
        index |= {"diffusion": None, "max_text_tokens": 8, "classes": None, "fps": None, "text_layout": None}
        named = {f"{part}{n}": [None, None] for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")}
        named |= {"transformer": ["stdit", "STDiT"], "scheduler": ["diffusers", "DDIMScheduler"]}
        named |= {"vae": ["stdit", "PixelAutoencoder"], "control": [None, None], **parts}
        for name in named:
            hostile(folder / name, folder / "marker", "unknown")
        (folder / "model_index.json").write_text(json.dumps(index | named))
        # So that only what `parts` names is left to open.
        return STDiTPipeline.from_pretrained(folder, **{name: None for name in named if name not in parts})  # pyright: ignore

    return load


def adapter(folder: Path) -> None:
    tiny = ModelConfig(
        hidden_size=16, depth=1, num_heads=1, in_channels=1, patch_size=(1, 2, 2), num_classes=2, text_dim=None
    )
    load_adapter(STDiT.from_settings(tiny), folder, "evil")


WAYS: dict[str, Callable[[Path], object]] = {
    "text encoder": lambda folder: load_text_encoder(TextEncoderConfig(path=str(folder), max_text_tokens=8)),
    "its sizes": lambda folder: feature_sizes(TextEncoderConfig(path=str(folder), max_text_tokens=8)),
    "text model": lambda folder: load_text_model(str(folder), None, None, "key"),
    "tokenizer": lambda folder: load_tokenizer(str(folder), None, "key"),
    "autoencoder": lambda folder: load_autoencoder(str(folder), None, None, "key"),
    "video encoder": lambda folder: load_video_encoder(VideoEncoderConfig(kind="video", path=str(folder))),
    "captioner": lambda folder: load_captioner(CaptionConfig(name="evil", path=str(folder))),
    "aesthetic scorer": lambda folder: ImageTextModel(str(folder)),
    "safety scorer": lambda folder: Safety(str(folder), ["nsfw"]),
    "evaluation network": lambda folder: DinoV2(folder)._net,
    "evaluation tokenizer": lambda folder: Clip(folder)._tokenizer,
    "transformer": STDiT.from_pretrained,
    "control branch": STDiTControl.from_pretrained,
    "conversion": lambda folder: convert(folder, folder / "out"),
    "adapter": adapter,
    "pipeline: text encoder": pipeline(text_encoder=["transformers", "AutoModel"]),
    "pipeline: tokenizer": pipeline(tokenizer=["transformers", "AutoTokenizer"]),
    "pipeline: tokenizer_2": pipeline(tokenizer_2=["transformers", "AutoProcessor"]),
    "pipeline: transformer": pipeline(transformer=["transformers", "AutoModel"]),
    "pipeline: control": pipeline(control=["transformers", "AutoModel"]),
    "pipeline: autoencoder": pipeline(vae=["diffusers", "AutoModel"]),
    "pipeline: scheduler": pipeline(scheduler=["transformers", "AutoConfig"]),
    "pipeline: a module": pipeline(scheduler=["evil", "Evil"]),
    "pipeline: an importable module": pipeline(scheduler=["elsewhere", "Evil"]),
    "pipeline: a part of its own": pipeline(extra=["transformers", "AutoTokenizer"]),
}


@pytest.mark.parametrize("model_type", ["unknown", "clip"])
@pytest.mark.parametrize("way", WAYS)
def test_no_code_of_a_folder_runs_and_nothing_is_asked(
    way: str, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(hostile(tmp_path / "module", tmp_path / "marker", model_type)))
    (tmp_path / "module" / "evil.py").rename(tmp_path / "module" / "elsewhere.py")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = hostile(tmp_path / "folder", tmp_path / "marker", model_type)
    with contextlib.suppress(Exception):  # most are refused; whether they are is no matter here
        WAYS[way](folder)
    assert not asked
    assert not [path for path in tmp_path.rglob("*") if path.name in ("ran", "marker")]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "vocab.json"])
@pytest.mark.parametrize(
    "way", [way for way in WAYS if not way.startswith("pipeline") and way not in ("adapter", "conversion")]
)
def test_pipes_and_devices_in_a_folder_are_refused_unread(way: str, name: str, tmp_path: Path) -> None:
    folder = hostile(tmp_path / "folder", tmp_path / "marker", "clip")
    (folder / name).unlink(missing_ok=True)
    if name == "vocab.json":
        (folder / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(folder / name)  # opened for reading, it would wait for ever
    with pytest.raises(Exception, match=rf"{name}: not a regular file|no config\.json|config\.json.*regular"):
        WAYS[way](folder)
