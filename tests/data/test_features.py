"""Laws of feature shards: what is read is what was written, in any order, by any process, and damage is noticed."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stdit import extract
from stdit.config import Bucket, ConfigError, Where
from stdit.data import features as room
from stdit.data.features import FeatureSet, pad_texts, unpad, write_shard
from tests.support import clip_folder, encoders
from tests.support.clip_folder import BUCKETS, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 12 clips in four shards."""
    home = tmp_path_factory.mktemp("clips")
    return Path(extract.run(clip_folder.config(home, rows(home, 12))))


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), width=st.integers(1, 4))
def test_padding_inverts_packing(lengths: list[int], width: int) -> None:
    texts = [torch.rand(length, width) for length in lengths]
    features, mask = pad_texts(texts)
    assert features.shape == (len(lengths), max(lengths), width)
    assert mask.sum(1).tolist() == lengths
    assert not features[~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(unpad(features, mask), texts, strict=True))


def test_buckets_and_splits_divide_the_samples(folder: Path) -> None:
    features = FeatureSet(folder)
    by_split = {split: features.select(split, BUCKETS) for split in ("train", "validation")}
    everything = features.select(None, BUCKETS)
    assert list(everything) == [bucket.key for bucket in BUCKETS]
    assert sorted(np.concatenate(list(everything.values()))) == features.ids.tolist() == list(range(12))
    for key, ids in everything.items():
        assert sorted(np.concatenate([chosen[key] for chosen in by_split.values()])) == ids.tolist()
        assert {features.sample(i).mean.shape[1:] for i in ids} <= {tuple(map(int, key.split("x")))}
    assert {len(v) for v in features.select("nobody", BUCKETS).values()} == {0}


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ((Where(column="score", at_least=0.5),), range(6, 12)),
        ((Where(column="score", at_least=0.25), Where(column="score", at_most=0.5)), range(3, 7)),
        ((Where(column="direction", one_of=("left",)),), range(1, 12, 2)),
        ((Where(column="class", one_of=("wave",)), Where(column="frames", at_least=5)), [2, 8]),
    ],
)
def test_conditions_on_columns_known_and_free_choose_samples(
    where: tuple[Where, ...], kept: list[int], folder: Path
) -> None:
    chosen = FeatureSet(folder).select(None, BUCKETS, where)
    assert sorted(np.concatenate(list(chosen.values()))) == list(kept)


def test_samples_are_the_same_in_any_order_thread_or_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = FeatureSet(folder)
    first = [features.sample(i) for i in features.ids]
    monkeypatch.setattr(room, "OPEN_SHARDS", 1)
    again = pickle.loads(pickle.dumps(features))
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(again.sample, reversed(features.ids.tolist())))[::-1]
    assert len(again._open) == 1
    for a, b in zip(first, others, strict=True):
        assert torch.equal(a.mean, b.mean)
        assert a.text is not None
        assert b.text is not None
        assert torch.equal(a.text, b.text)
        assert (a.id, a.class_label, a.caption, a.fps, a.height, a.width) == (
            b.id,
            b.class_label,
            b.caption,
            b.fps,
            b.height,
            b.width,
        )


def test_a_sample_changed_by_its_reader_does_not_change_the_features(folder: Path) -> None:
    features = FeatureSet(folder)
    sample = features.sample(3)
    before = sample.mean.clone()
    sample.mean.add_(1)
    assert torch.equal(features.sample(3).mean, before)


def test_text_lengths_are_known_without_the_shards(folder: Path) -> None:
    features = FeatureSet(folder)
    texts = [features.sample(i).text for i in features.ids]
    assert features.text_lengths(features.ids).tolist() == [len(text) for text in texts if text is not None]
    assert features.text_lengths(np.array([5, 1])).tolist() == features.text_lengths(features.ids)[[5, 1]].tolist()


def test_the_index_names_the_encoders(folder: Path) -> None:
    features = FeatureSet(folder)
    assert features.video_encoder["kind"] == "pixels"
    assert features.text_encoder is not None
    assert features.text_encoder["byte_t5"]["width"] == 16
    assert features.classes == ["beetle", "wave"]
    assert features.index["samples"] == len(features) == 12


# ------------------------------------------------------------------------------------- bad input


def test_what_was_not_extracted_is_an_error_that_says_what_was(folder: Path) -> None:
    features = FeatureSet(folder)
    with pytest.raises(ConfigError, match="buckets 9x9x9 were not extracted; there are 1x16x16, 5x16x16, 5x16x32"):
        features.select(None, [Bucket(frames=9, height=9, width=9)])
    with pytest.raises(ConfigError, match="no column 'beauty'; columns: id, shard"):
        features.select(None, BUCKETS, [Where(column="beauty", at_least=1)])
    with pytest.raises(ConfigError, match="column 'caption' holds text"):
        features.select(None, BUCKETS, [Where(column="caption", at_least=1)])
    with pytest.raises(KeyError, match="no sample 99"):
        features.sample(99)


def test_a_folder_without_whole_features_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        FeatureSet(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no index\.json"):
        FeatureSet(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({**FeatureSet(folder).index, "format": 99}))
    with pytest.raises(ConfigError, match="format: 99, this version reads 2"):
        FeatureSet(tmp_path)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("fault", ["truncated", "gone", "another", "header"])
def test_a_damaged_shard_is_named(fault: str, folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    shard = copy / "shards" / "00001.safetensors"
    if fault == "another":
        write_shard(shard, {"7.mean": torch.zeros(1)})
    elif fault == "gone":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[:-100] if fault == "truncated" else content.replace(b'"F32"', b'"I32"'))
    features = FeatureSet(copy)
    assert features.sample(0).id == 0
    with pytest.raises(
        ConfigError, match=r"00001\.safetensors: (damaged or gone|sample 4 (cannot be read|is not what))"
    ):
        features.sample(4)


@pytest.mark.parametrize("kind", ["mean", "text"])
def test_one_flipped_bit_of_a_sample_is_noticed_before_it_is_used(kind: str, folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    shard = copy / "shards" / "00001.safetensors"
    tensors = load_file(shard)
    tensors[f"4.{kind}"].view(-1).view(torch.uint8)[5] ^= 1
    size = shard.stat().st_size
    write_shard(shard, tensors)
    assert shard.stat().st_size == size
    features = FeatureSet(copy)
    assert features.sample(3).id == 3
    with pytest.raises(ConfigError, match=r"00001\.safetensors: sample 4 is not what was written.*extraction again"):
        features.sample(4)


def test_latents_of_another_size_than_their_buckets_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    shard = copy / "shards" / "00001.safetensors"
    tensors = load_file(shard)
    tensors["4.mean"] = tensors["4.mean"][..., ::2].contiguous()
    write_shard(shard, tensors)
    with pytest.raises(
        ConfigError, match=r"sample 4: latents of shape \(3, 1, 16, 8\), its bucket has \(3, 1, 16, 16\)"
    ):
        FeatureSet(copy).sample(4)


@pytest.mark.parametrize("change", ["removed", "doubled", "edited"])
def test_rows_that_were_not_written_are_refused(change: str, folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    table = parquet.read_table(copy / "samples.parquet")
    if change == "edited":
        table = table.set_column(0, "id", pa.array(range(1, len(table) + 1)))
    else:
        table = table.slice(1) if change == "removed" else pa.concat_tables([table.slice(0, 1), table])
    parquet.write_table(table, copy / "samples.parquet")
    with pytest.raises(ConfigError, match=r"samples\.parquet: is not what was written"):
        FeatureSet(copy)


def test_an_edited_index_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["video_encoder"]["scale"][0] *= 2
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index\.json: was changed after it was written"):
        FeatureSet(copy)


@pytest.mark.parametrize("several", [False, True])
def test_facts_are_what_a_training_config_can_leave_out_and_are_known_before_extraction(
    several: bool, tmp_path: Path
) -> None:
    text = encoders.sd3(tmp_path / "sd3") if several else clip_folder.TEXT
    config = clip_folder.config(tmp_path, rows(tmp_path, 8), text_encoder=text, frame_stride=1)
    expected = extract.expected_facts(config)
    found = FeatureSet(extract.run(config)).facts()
    assert found == expected
    assert (found.in_channels, found.num_classes, found.fps) == (3, 2, 24.0)
    assert found.latents == {"1x16x16": (1, 16, 16), "5x16x16": (5, 16, 16), "5x16x32": (5, 16, 32)}
    assert found.smallest_latent == (1, 16, 16)
    widths = (48, 50, 48) if several else (16, clip_folder.TEXT.feature_tokens, None)
    assert (found.text_dim, found.max_text_tokens, found.pooled_dim) == widths


def test_facts_of_features_without_text_classes_or_moving_clips(tmp_path: Path) -> None:
    made = [{k: v for k, v in row.items() if k != "class"} for row in rows(tmp_path, 2)]
    found = FeatureSet(extract.run(clip_folder.config(tmp_path, made, text_encoder=None))).facts()
    assert (found.text_dim, found.max_text_tokens, found.pooled_dim) == (None, None, None)
    assert (found.num_classes, found.fps) == (None, None)
