"""Scorers and captioners with weights: tiny random models, saved and read as published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stdit.config import CaptionConfig, ConfigError, ScorerConfig
from stdit.curation.captioners import Failed, ModelCaptioner
from stdit.curation.clips import ClipView
from stdit.curation.scorers.aesthetic import Aesthetic, read_head
from stdit.curation.scorers.safety import Safety
from stdit.curation.scorers.similarity import Similarity
from stdit.curation.scoring import named_scores, scorer_id
from tests.support.encoders import clip_tokenizer

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
WIDTH: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def view(caption: str | None = None) -> ClipView:
    return ClipView("a.mp4", 0, 3, 8.0, 40, 30, caption, pictures=PICTURES)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    text = WIDTH | {
        "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=WIDTH | {"image_size": 224, "patch_size": 32}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(folder)
    return folder


def test_the_aesthetic_score_is_the_head_of_unit_embeddings(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    layers = {
        "layers.0.weight": torch.randn(6, 8),
        "layers.0.bias": torch.randn(6),
        "layers.2.weight": torch.randn(1, 6),
    }
    save_file(layers, tmp_path / "head.safetensors")
    torch.save(layers, tmp_path / "head.pth")
    found = named_scores("aesthetic", Aesthetic(str(clip), str(tmp_path / "head.safetensors"))(view()))
    model: Any = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil()(list(PICTURES), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        own = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    hidden = own @ layers["layers.0.weight"].T + layers["layers.0.bias"]
    assert found["aesthetic"] == pytest.approx(float((hidden @ layers["layers.2.weight"].T).mean()), rel=1e-3, abs=1e-4)
    assert len(found["embedding"]) == 8
    for mine, theirs in zip(
        read_head(str(tmp_path / "head.pth")), read_head(str(tmp_path / "head.safetensors")), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("head.pth", {"weight": Hostile()}),
        ("head.pth", [torch.ones(1, 8)]),
        ("head.pth", {"weight": torch.ones(8)}),
        ("head.pth", b"no weights"),
        ("head.safetensors", b"no weights"),
    ],
)
def test_a_damaged_or_hostile_head_is_one_line(name: str, content: Any, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=name) as caught:
        read_head(str(tmp_path / name))
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_similarity_is_a_cosine_and_none_without_a_caption(clip: Path) -> None:
    scorer = Similarity(str(clip))
    assert -1 <= scorer(view("a red bar"))[""] <= 1
    assert scorer(view("a very long caption " * 20))[""] is not None
    assert scorer(view())[""] is None


def test_safety_is_the_largest_probability_of_the_unsafe_labels(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        **WIDTH, image_size=32, patch_size=16, id2label={0: "fine", 1: "NSFW"}, label2id={"fine": 0, "NSFW": 1}
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert 0 < Safety(str(tmp_path), ["nsfw"])(view()) < 1
    with pytest.raises(ValueError, match="has no gore; it has fine, nsfw"):
        Safety(str(tmp_path), ["gore"])


def test_other_weights_are_another_scorer(clip: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1, 8)}, tmp_path / "head.safetensors")
    function = "stdit.curation.scorers.aesthetic:Aesthetic"
    scorer = ScorerConfig(
        name="aesthetic", function=function, settings={"path": str(clip), "head": str(tmp_path / "head.safetensors")}
    )
    before = scorer_id(scorer)
    save_file({"weight": torch.zeros(1, 8)}, tmp_path / "head.safetensors")
    assert scorer_id(scorer) != before


def test_a_model_of_transformers_captions_batches_of_several_frames(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"w{i}" for i in range(60))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**WIDTH, image_size=32, patch_size=16),
        text_config=LlamaConfig(**WIDTH, vocab_size=len(words), max_position_embeddings=512, pad_token_id=0),
        image_token_index=4, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    own = CaptionConfig(name="dense", path=str(tmp_path), dtype="float32", max_new_tokens=5)
    captioner = ModelCaptioner(own)
    one = captioner.caption([view()])
    both = captioner.caption([view(), view()])
    assert not [answer for answer in (*one, *both) if isinstance(answer, Failed)], (one, both)
    assert len(both) == 2
    assert all(isinstance(answer, str) for answer in both)
    assert both[0] == both[1] == one[0]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="captions: dense: path"):
        ModelCaptioner(CaptionConfig(name="dense", path=str(tmp_path / "nothing")))
