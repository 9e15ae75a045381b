"""Several text encoders as one: equal to StableDiffusion3Pipeline's arithmetic, rebuilt from an identity or
components."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from transformers import CLIPTextModel

from stdit.config import ByteT5Config, ConfigError, TextEncoderConfig, validate
from stdit.encoders.text import TextFeatures, concat_tokens
from stdit.encoders.text_loading import (
    components,
    feature_identity,
    feature_identity_of,
    from_components,
    load_text_encoder,
    text_encoder_from_identity,
)
from tests.support.encoders import CAPTIONS, LENGTH, T5, G, L, one, save_clip, sd3

RANDOM = {"byte_t5": {"width": 8, "depth": 1, "num_heads": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three encoders of an SD3."""
    home = tmp_path_factory.mktemp("sd3")
    sd3(home)
    return home


def config(**settings: Any) -> TextEncoderConfig:
    return validate(settings, TextEncoderConfig, "text_encoder")


def test_sd3s_recipe_gives_sd3s_features(folder: Path) -> None:
    """Penultimate hidden states of both CLIPs side by side, filled to T5's width, then T5; no masks; both
    projections."""
    encoder = load_text_encoder(sd3(folder))
    pipe = cast(Any, StableDiffusion3Pipeline)(transformer=None, scheduler=None, vae=None, **components(encoder))
    with torch.no_grad():
        theirs, none, pooled, none_pooled = pipe.encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), max_sequence_length=30
        )
    made = encoder.encode(CAPTIONS)
    assert made.features.shape == (4, LENGTH + 30, T5)
    assert torch.equal(made.features, theirs)
    assert torch.equal(made.pooled, pooled)
    assert made.mask.all()
    empty = encoder.encode([""] * 4)
    assert torch.equal(empty.features, none)
    assert torch.equal(empty.pooled, none_pooled)
    assert (encoder.dim, encoder.max_text_tokens, encoder.pooled_dim) == (T5, LENGTH + 30, L + G + 8)


def test_sdxls_recipe_gives_sdxls_features(folder: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "text_encoder", L, CLIPTextModel)
    first = one(tmp_path, "", layer=-2, keep_padding=True)
    encoder = load_text_encoder(
        config(channels=[first, one(folder, "_2", layer=-2, pooled=True, keep_padding=True)], width=64)
    )
    held = components(encoder)
    pipe = cast(Any, StableDiffusionXLPipeline)(unet=None, scheduler=None, vae=None, **held)
    with torch.no_grad():
        theirs, _, pooled, _ = pipe.encode_prompt(CAPTIONS, device=torch.device("cpu"))
    made = encoder.encode(CAPTIONS)
    assert torch.equal(made.features[..., : L + G], theirs)
    assert not made.features[..., L + G :].any()
    assert torch.equal(made.pooled, pooled)


def test_clip_alone_gives_its_own_features_and_vector(folder: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "text_encoder", L, CLIPTextModel)
    for home, projected in ((folder, True), (tmp_path, False)):
        encoder = load_text_encoder(config(**one(home, "", pooled=True)))
        made = encoder.encode(CAPTIONS)
        assert encoder.pooled_dim == (L + 4 if projected else L)
        for i, caption in enumerate(CAPTIONS):
            tokens = encoder.tokenizer(caption, truncation=True, max_length=LENGTH, return_tensors="pt")
            own = encoder.model(**tokens)
            torch.testing.assert_close(made.features[i][made.mask[i]], own.last_hidden_state[0], atol=1e-5, rtol=1e-4)
            vector = own.text_embeds if projected else own.pooler_output
            torch.testing.assert_close(made.pooled[i], vector[0], atol=1e-5, rtol=1e-4)


def test_tokens_of_a_caption_stand_without_gaps_whatever_its_batch() -> None:
    encoder = load_text_encoder(
        config(
            tokens=[{**RANDOM, "max_text_tokens": 12}, {"byte_t5": {"width": 12, "num_heads": 2}, "max_text_tokens": 9}]
        )
    )
    made = encoder.encode(CAPTIONS)
    assert made.mask.sum(1).tolist() == [12 + 9, 1 + 1, 4 + 4, 12 + 9]
    assert made.features.shape == (4, 21, 12)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert alone.mask.all()
        torch.testing.assert_close(made.features[i, : alone.features.shape[1]], alone.features[0], atol=1e-5, rtol=1e-4)
    assert not made.features[~made.mask].any()
    assert encoder.cuts(CAPTIONS) == [(27, 12), None, None, (121, 12)]


def test_encoded_captions_can_be_sent() -> None:
    made = load_text_encoder(config(**RANDOM)).encode(["a"])
    for sent in (made, TextFeatures(made.features, made.mask, torch.ones(1, 3))):
        again = pickle.loads(pickle.dumps(sent))
        assert torch.equal(again.features, sent.features)
        assert again.pooled is None if sent.pooled is None else torch.equal(again.pooled, sent.pooled)


def test_padding_is_closed_up_in_order() -> None:
    def part(*rows: list[float]) -> TextFeatures:
        values = torch.tensor(rows)
        return TextFeatures(values[..., None], values > 0)

    made = concat_tokens([part([1, 2, 0], [1, 0, 0]), part([3, 0], [4, 5])])
    assert made.features[..., 0].tolist() == [[1, 2, 3], [1, 4, 5]]
    assert made.mask.all()


def test_side_by_side_different_numbers_of_tokens_are_refused(folder: Path) -> None:
    clip, t5 = one(folder, ""), one(folder, "_3")
    with pytest.raises(ValueError, match=r"caption 'two' has 5 and 4 tokens; .*keep_padding"):
        load_text_encoder(config(channels=[clip, t5])).encode(["two"])
    with pytest.raises(ConfigError, match=r"channels of 20 and 9 tokens \(max_text_tokens\)"):
        config(channels=[clip, {**t5, "max_text_tokens": 9}])


def test_identity_and_components_rebuild_the_encoders(folder: Path) -> None:
    settings = sd3(folder)
    encoder = load_text_encoder(settings)
    identity = json.loads(json.dumps(encoder.identity))
    again = text_encoder_from_identity(identity)
    third = from_components(components(again), json.loads(json.dumps(again.layout)), 9)
    for other in (again, third):
        for ours, theirs in ((encoder.encode(CAPTIONS), other.encode(CAPTIONS)),):
            assert torch.equal(ours.features, theirs.features)
            assert torch.equal(ours.mask, theirs.mask)
            assert torch.equal(ours.pooled, theirs.pooled)
    assert again.identity == encoder.identity
    assert feature_identity(settings) == feature_identity_of(identity)


def test_other_weights_of_one_of_several_are_noticed(tmp_path: Path) -> None:
    encoder = load_text_encoder(sd3(tmp_path))
    save_clip(tmp_path / "text_encoder_2", G)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        save_clip(tmp_path / "text_encoder_2", G + 2)
    with pytest.raises(ConfigError, match="not the one that these features were made with: fingerprint"):
        text_encoder_from_identity(encoder.identity)


def test_an_identity_from_before_these_settings_is_understood() -> None:
    encoder = load_text_encoder(config(**RANDOM))
    old = {k: v for k, v in encoder.identity.items() if k not in ("layer", "keep_padding", "pooled_dim", "width")}
    assert torch.equal(text_encoder_from_identity(old).encode(["a"])[0], encoder.encode(["a"])[0])
    assert (
        feature_identity_of(old)
        == {k: old[k] for k in ("fingerprint", "dtype", "max_text_tokens")}
        == feature_identity(config(**RANDOM))
    )


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of .*; found none"),
        ({"path": "a", "tokens": [RANDOM, RANDOM]}, "found path and tokens"),
        ({"tokens": [RANDOM]}, "tokens"),
        ({"tokens": [RANDOM, RANDOM], "max_text_tokens": 9}, "max_text_tokens belongs to each of the tokens"),
        ({"tokens": [RANDOM] * 4}, "4 encoders; a pipeline holds at most 3"),
        ({"tokens": [RANDOM, {"byte_t5": {}, "layer": 1}]}, r"tokens\.1\.layer: .*found 1"),
        ({"tokens": [RANDOM, {"path": "x", "kind": "clip"}]}, r"tokens\.1\.kind: unknown key"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("suffix", "settings", "message"),
    [
        ("", {"max_text_tokens": 77}, "max_text_tokens is 77, CLIPTextModelWithProjection has positions for 20"),
        ("", {"layer": -5}, "layer is -5, CLIPTextModelWithProjection has 3 layers"),
        ("_3", {"pooled": True}, "pooled: T5EncoderModel makes no vector of the whole caption"),
        ("_2", {"width": 8}, "width is 8, the features of CLIPTextModelWithProjection are 24 wide"),
        ("", {"tokenizer_subfolder": "tokenizer_3"}, "has 384 tokens, .* embeds 190"),
    ],
)
def test_a_missing_encoder_output_is_reported_with_both_numbers(
    suffix: str, settings: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text_encoder(config(**one(folder, suffix, **settings)))


def test_components_and_layout_must_be_as_many(folder: Path) -> None:
    encoder = load_text_encoder(sd3(folder))
    held = components(encoder)
    with pytest.raises(ValueError, match="3 text encoders: text_layout says how"):
        from_components(held, None, 77)
    with pytest.raises(ValueError, match="text_encoder_2 and tokenizer_2: give both or neither"):
        from_components({**held, "tokenizer_2": None}, encoder.layout, 77)
    with pytest.raises(ValueError, match="names 3, the pipeline has 2"):
        from_components({**held, "text_encoder_3": None, "tokenizer_3": None}, encoder.layout, 77)
    assert from_components({}, None, 77) is None


def test_a_random_encoder_may_be_one_of_several() -> None:
    encoder = load_text_encoder(
        TextEncoderConfig(
            channels=(
                TextEncoderConfig(byte_t5=ByteT5Config(width=8, num_heads=2), max_text_tokens=9),
                TextEncoderConfig(
                    byte_t5=ByteT5Config(width=8, num_heads=2, seed=1), max_text_tokens=9, dtype="bfloat16"
                ),
            ),
            width=20,
        )
    )
    made = encoder.encode(["a", "longer than nine"])
    assert made.features.shape == (2, 9, 20)
    assert made.pooled is None
    assert encoder.dtype == torch.float32
