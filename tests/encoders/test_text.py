"""Laws of text encoders, on tiny random T5 models saved to a folder and on the random ByteT5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    MT5Config,
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from stdit import memory
from stdit.config import ByteT5Config, ConfigError, TextEncoderConfig
from stdit.encoders import text
from stdit.encoders.byte_t5 import random_byte_t5
from stdit.encoders.text import TextEncoder
from stdit.encoders.text_loading import load_text_encoder, text_encoder_from_identity

TINY = {
    "vocab_size": 384,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}
CAPTIONS = ["the digit seven moves left", "", "ein süßer Käfer läuft nach links – 左へ", "x" * 500]
RANDOM = TextEncoderConfig(byte_t5=ByteT5Config(width=16, num_heads=2), max_text_tokens=40)


def saved(folder: Path, model: type = T5EncoderModel, config: type = T5Config) -> TextEncoderConfig:
    """A tiny random model with ByT5's tokenizer in a subfolder, as pipelines of diffusers lie."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model(config(**TINY)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return TextEncoderConfig(path=str(folder), tokenizer_subfolder="tokenizer", max_text_tokens=40)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (T5EncoderModel, T5Config),
        (T5ForConditionalGeneration, T5Config),
        (MT5EncoderModel, MT5Config),
        (UMT5EncoderModel, UMT5Config),
    ],
)
def test_features_are_the_models_own_for_any_t5(model: type, config: type, tmp_path: Path) -> None:
    encoder = load_text_encoder(saved(tmp_path, model, config))
    features, mask = encoder.encode(CAPTIONS)
    assert features.shape == (4, 40, 16) == (*mask.shape, encoder.dim)
    for i, caption in enumerate(CAPTIONS):
        tokens = encoder.tokenizer(caption, truncation=True, max_length=40, return_tensors="pt")
        own = encoder.model(**tokens).last_hidden_state[0]
        assert mask[i].sum() == len(own)
        torch.testing.assert_close(features[i][mask[i]], own, atol=1e-5, rtol=1e-4)


def test_a_sentencepiece_tokenizer_serves_too(tmp_path: Path) -> None:
    config = saved(tmp_path)
    pieces = ["<pad>", "</s>", "<unk>", "▁the", "▁digit", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0).save_pretrained(tmp_path)
    encoder = load_text_encoder(config.model_copy(update={"tokenizer_subfolder": None}))
    _, mask = encoder.encode(["the digit moves", ""])
    assert mask.sum(1).tolist() == [9, 1]


def test_padding_does_not_change_a_captions_features() -> None:
    encoder = load_text_encoder(RANDOM)
    features, mask = encoder.encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone, _ = encoder.encode([caption])
        torch.testing.assert_close(features[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
        assert not features[i][~mask[i]].any()


def test_empty_very_long_and_non_ascii_captions_have_features() -> None:
    encoder = load_text_encoder(RANDOM)
    _, mask = encoder.encode(CAPTIONS)
    assert mask.sum(1).tolist() == [27, 1, 40, 40]
    assert encoder.token_counts(CAPTIONS) == [27, 1, 48, 501]


def test_different_captions_have_different_features() -> None:
    encoder = load_text_encoder(RANDOM)
    (left, right), _ = encoder.encode(["the digit 7 moves left ", "the digit 7 moves right"])
    assert (left - right).abs().mean() > 0.05


def test_the_random_encoder_follows_from_its_config_alone() -> None:
    torch.manual_seed(1)
    first = load_text_encoder(RANDOM)
    state = torch.get_rng_state()
    again = text_encoder_from_identity(json.loads(json.dumps(first.identity)))
    assert again.identity == first.identity
    assert torch.equal(again.encode(CAPTIONS)[0], first.encode(CAPTIONS)[0])
    other = load_text_encoder(
        TextEncoderConfig(byte_t5=ByteT5Config(width=16, num_heads=2, seed=1), max_text_tokens=40)
    )
    assert other.identity["fingerprint"] != first.identity["fingerprint"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_encoder_is_the_same_on_every_machine() -> None:
    """The fingerprint stands in checkpoints, so it must not change with a library either: a golden value."""
    assert (
        load_text_encoder(RANDOM).identity["fingerprint"]
        == "7e723fa4987f92bda4194bfa8094b56a11b88e0a623a1aa1a10d8f49f9a84f73"
    )


def test_the_random_weights_have_t5s_variances() -> None:
    model = random_byte_t5(ByteT5Config(width=128, depth=1, num_heads=4))
    std = {
        name.rsplit(".", 2)[-2]: weight.std().item() for name, weight in model.named_parameters() if weight.ndim == 2
    }
    assert std["shared"] == pytest.approx(1, rel=0.05)
    assert std["q"] == pytest.approx((128 * 32) ** -0.5, rel=0.05)
    assert std["k"] == pytest.approx(128**-0.5, rel=0.05)
    assert std["wo"] == pytest.approx(256**-0.5, rel=0.05)
    assert std["relative_attention_bias"] == pytest.approx(2, rel=0.1)


def test_the_random_encoder_tells_words_of_the_same_letters_apart() -> None:
    """At T5's own scale of the position bias these captions' features differ by half a per cent."""
    encoder = load_text_encoder(TextEncoderConfig(byte_t5=ByteT5Config(width=128), max_text_tokens=40))
    features, mask = encoder.encode(["the digit three moves left", "the digit there moves left"])
    three, there = (features.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert (three - there).norm() > 0.08 * three.norm()


def test_a_rebuilt_encoder_that_differs_is_refused() -> None:
    identity = {**load_text_encoder(RANDOM).identity, "fingerprint": "0" * 64}
    with pytest.raises(
        ConfigError, match="byte_t5 is not the one that these features were made with: fingerprint: 000"
    ):
        text_encoder_from_identity(identity)


def test_an_identity_rebuilds_a_saved_encoder_and_notices_other_weights(tmp_path: Path) -> None:
    encoder = load_text_encoder(saved(tmp_path))
    again = text_encoder_from_identity(json.loads(json.dumps(encoder.identity)))
    assert torch.equal(again.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    file = tmp_path / "model.safetensors"
    save_file({k: v * 2 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="not the one that these features were made with: fingerprint"):
        text_encoder_from_identity(encoder.identity)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_loaded_in_the_dtype_and_not_cast_afterwards(dtype: str, tmp_path: Path) -> None:
    """T5's wo stays float32 under float16 when it is loaded so, and is corrupted when it is cast."""
    encoder = load_text_encoder(saved(tmp_path).model_copy(update={"dtype": dtype}))
    dtypes = {name: p.dtype for name, p in encoder.model.named_parameters()}
    assert dtypes["encoder.block.0.layer.0.SelfAttention.q.weight"] == getattr(torch, dtype)
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == (
        torch.float32 if dtype == "float16" else torch.bfloat16
    )
    features, _ = encoder.encode(CAPTIONS)
    assert features.dtype == torch.float32
    reference, _ = load_text_encoder(saved(tmp_path)).encode(CAPTIONS)
    assert (features - reference).abs().max() < 0.1


def test_a_model_and_a_tokenizer_may_lie_in_subfolders(tmp_path: Path) -> None:
    saved(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "tokenizer").rename(tmp_path / "tokenizer")
    config = TextEncoderConfig(path=str(tmp_path), subfolder="text_encoder", tokenizer_subfolder="tokenizer")
    assert load_text_encoder(config).encode(["a"])[0].shape == (1, 2, 16)


# ------------------------------------------------------------------------------------- bad input


def test_a_wrong_path_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text_encoder.path: .*nowhere: no such folder"):
        load_text_encoder(TextEncoderConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="no T5 or CLIP text encoder can be loaded"):
        load_text_encoder(TextEncoderConfig(path=str(tmp_path)))


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    config = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"missing_keys: .*{gone}"):
        load_text_encoder(config)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    model = T5EncoderModel(T5Config(**{**TINY, "vocab_size": 100}))
    with pytest.raises(ValueError, match="has 384 tokens, .* embeds 100"):
        TextEncoder(model, ByT5Tokenizer(), 10)


def test_an_indivisible_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 30 is not divisible by num_heads 4"):
        random_byte_t5(ByteT5Config(width=30))


def test_weights_and_attention_that_memory_does_not_hold_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ByteT5Config(width=16, num_heads=2)
    needed = 4 * random_byte_t5(config).num_parameters()
    monkeypatch.setattr(memory, "host_memory", lambda: needed)
    encoder = load_text_encoder(RANDOM)
    monkeypatch.setattr(memory, "host_memory", lambda: needed - 1)
    with pytest.raises(
        ConfigError, match=r"text_encoder.byte_t5: width 16 and depth 2 are 0 M parameters, which take 0.0 GiB"
    ):
        random_byte_t5(config)
    # Two captions of 5 bytes and </s>: the scores of 2 heads, float32.
    monkeypatch.setattr(text, "device_memory", lambda device: 2 * 2 * 6 * 6 * 4)
    encoder.encode(["abcde", "fghij"])
    with pytest.raises(
        ValueError, match="the attention of 2 captions of 7 tokens takes .* Lower max_text_tokens or batch"
    ):
        encoder.encode(["abcdef", "f"])


def test_code_in_an_encoders_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForTextEncoding": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="no T5 or CLIP text encoder"):
        load_text_encoder(TextEncoderConfig(path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
