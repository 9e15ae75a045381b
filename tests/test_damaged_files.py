"""Laws of damage: every file that stdit writes, damaged in every general way, is one clear error that names it, or is
made again. Never a traceback of a library's own, never taken for whole where that changes what it means."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipelines.record import Record
from stdit import cli, extract
from stdit.config import Bucket, Config, EvaluationConfig, SamplerConfig, dump, validate
from stdit.curation.curation import read_report as read_curation_report
from stdit.data.extraction import pending_shards, read_report
from stdit.data.features import FeatureSet
from stdit.errors import CheckpointError
from stdit.evaluation.comparison import RunResults, find_results, same_requests
from stdit.evaluation.evaluator import evaluate_videos
from stdit.evaluation.generated import read_generated
from stdit.evaluation.media_set import open_generated
from stdit.generate import generate
from stdit.inference.job import find_source, open_job
from stdit.inference.pipeline import STDiTPipeline
from stdit.inference.prompts import Prompt
from stdit.integrity import MANIFEST, check_saved, write_manifest
from stdit.models import lora
from stdit.models.stdit import STDiT
from stdit.training.checkpoint import read_done
from stdit.training.identity import load_identity
from stdit.training.run_dir import read_config, start
from stdit.weights.convert import load_published
from stdit.weights.transfer import transfer_file
from tests.support import clip_folder
from tests.support.runs import TEXT, make_run, model_config

STEP = "run/checkpoints/step-00000020"
PROMPTS = [Prompt("a wave", seed=1), Prompt("a beetle", seed=2)]
STILL = Bucket(frames=1, height=16, width=16)
METRICS = EvaluationConfig(classifier_steps=2, classifier_frames=8, classifier_size=8)


CURATED = {
    "files": 2, "files_excluded": 0, "files_bad": 1, "bad_files": [{"path": "footage/a.mp4", "reason": "no frame"}], "broken_files": [],
    "clips": 3, "kept": 2, "kept_seconds": 4.5, "kept_images": 0, "dropped": 1, "dropped_by_reason": {"blur": 1}, "cropped": 0,
    "captions": {"rules": {"captions": 2}}, "without_caption": 0, "notes": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each product."""
    home = tmp_path_factory.mktemp("products")
    config = clip_folder.config(home, clip_folder.rows(home, 7))
    extract.run(config)
    (home / "extract.yaml").write_text(dump(config))
    run = make_run(home / "run", model_config(**TEXT))
    STDiTPipeline.from_pretrained(run).save_pretrained(home / "pipeline")
    shutil.copytree(home / "pipeline", home / "bare", ignore=shutil.ignore_patterns(MANIFEST))
    shutil.copytree(home / STEP / "transformer_ema", home / "weights")
    transfer_file(home / "weights", home / "copied", None, [], (), 0)
    job(home)
    generate(run, PROMPTS, home / "videos", STILL, SamplerConfig(steps=1))
    metrics(home)
    Record(home / "plan.json", {"extraction": {"frame_stride": 1}}, {"extraction": 1.5}).write()
    start(read_identity_config(run))
    (run / "done.json").write_text(json.dumps({"step": 20, "samples_seen": 160, "checkpoint": "step-00000020"}))
    (home / "curated").mkdir()
    (home / "curated" / "report.json").write_text(json.dumps(CURATED))
    model = STDiT.from_settings(model_config(**TEXT))
    lora.add_adapter(model, 2)
    lora.save_adapter(model, home / "lora")
    return home


def read_identity_config(run: Path) -> Config:
    return validate(load_identity(run / "checkpoints/step-00000020")["config"], Config, "identity")


def job(home: Path) -> Any:
    return open_job(home / "run", PROMPTS, home / "videos", STILL, SamplerConfig(steps=1)).sampler


def metrics(home: Path) -> Any:
    found = evaluate_videos(home / "videos", home / "manifest.jsonl", METRICS)
    return {key: value for key, value in found.items() if key not in ("manifest", "sha256")}  # where it lies


def samples(home: Path) -> Any:
    features = FeatureSet(home / "features")
    return [features.sample(i).mean.sum().item() for i in features.ids]


def pending(home: Path) -> Any:
    """Numbers of the shards to extract again."""
    config = clip_folder.config(home, [json.loads(line) for line in (home / "manifest.jsonl").read_text().splitlines()])
    return [spec.number for spec in pending_shards(extract.plan_shards(config))[0]]


def settings(home: Path) -> Any:
    config = clip_folder.config(home, [json.loads(line) for line in (home / "manifest.jsonl").read_text().splitlines()])
    return len(extract.prepare(config)[1])


def pipeline(home: Path, folder: str = "pipeline") -> Any:
    pipe = STDiTPipeline.from_pretrained(home / folder)
    return sorted((k, str(v)) for k, v in pipe.config.items() if not k.startswith("_") and k != "diffusion")


def bare(home: Path) -> Any:
    """A pipeline without a manifest, as another program would have saved it."""
    return pipeline(home, "bare")


def copied(home: Path) -> Any:
    return sum(p.double().sum().item() for p in STDiT.from_pretrained(home / "copied").parameters())


def adapter(home: Path) -> Any:
    model = STDiT.from_settings(model_config(**TEXT))
    lora.load_adapter(model, home / "lora", "style")
    return sum(p.double().sum().item() for n, p in model.named_parameters() if "lora" in n)


def source(home: Path) -> Any:
    return find_source(home / "run", "ema").facts["step"]


def weights(home: Path) -> Any:
    return sum(p.double().sum().item() for p in STDiT.from_pretrained(home / "weights").parameters())


@dataclass(frozen=True)
class Product:
    """A file, and what reads it. mended: how `read` ends where damage is not an error but is noticed, such as the
    shard's number in the list of those to make again; `parsed`: of another library's format, whose keys are not ours to
    check."""

    file: str
    read: Callable[[Path], Any]
    mended: Any = None
    parsed: bool = True
    # What messages name, if not the file.
    named: str = ""
    # Whether a hash of it is kept.
    hashed: bool = True


JSON_FILES = [
    Product("features/index.json", samples),
    Product("features/extraction.json", settings),
    Product("features/report.json", lambda home: read_report(home / "features")["clips"]),
    Product(f"{STEP}/identity.json", source),
    Product(f"{STEP}/identity.json", lambda home: load_identity(home / STEP)),
    Product(f"{STEP}/{MANIFEST}", source),
    Product(f"{STEP}/transformer_ema/config.json", source),
    Product("pipeline/model_index.json", pipeline),
    Product(f"pipeline/{MANIFEST}", pipeline),
    Product("pipeline/scheduler/scheduler_config.json", pipeline, parsed=False),
    Product("copied/config.json", copied, parsed=False),
    Product(f"copied/{MANIFEST}", copied),
    Product("copied/config.json", lambda home: load_published(home / "copied").settings.depth, parsed=False),
    Product("bare/model_index.json", bare),
    Product("bare/transformer/config.json", bare, parsed=False),
    Product("bare/vae/config.json", bare, parsed=False, named="vae"),
    Product("bare/text_encoder/config.json", bare, parsed=False, named="text_encoder"),
    Product("bare/scheduler/scheduler_config.json", bare, parsed=False, named="bare"),
    Product("weights/config.json", weights, parsed=False),
    Product("videos/request.json", job),
    Product("videos/metrics.json", metrics, mended="equal"),
    Product("plan.json", lambda home: Record.read(home).parts),
    Product("curated/report.json", lambda home: read_curation_report(home / "curated")),
    Product("run/config.yaml", lambda home: read_config(home / "run"), parsed=False),
    Product("run/done.json", lambda home: read_done(home / "run")),
]
BINARY_FILES = [
    Product("features/samples.parquet", samples),
    Product("features/shards/00001.safetensors", samples),
    Product("features/shards/00001.safetensors", pending, mended=[1]),
    Product("features/parts/00001.parquet", pending, mended=[1]),
    Product(f"{STEP}/transformer_ema/diffusion_pytorch_model.safetensors", source),
    Product("lora/pytorch_lora_weights.safetensors", adapter),
    Product("pipeline/transformer/diffusion_pytorch_model.safetensors", pipeline),
    Product("pipeline/vae/diffusion_pytorch_model.safetensors", pipeline),
    Product("pipeline/text_encoder/model.safetensors", pipeline),
    Product("copied/diffusion_pytorch_model.safetensors", copied),
    Product("bare/transformer/diffusion_pytorch_model.safetensors", bare, hashed=False, named="transformer"),
]


def damaged_json(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    """(damage, content) of a JSON object; None: a folder in place of the file."""
    yield "empty", b""
    yield "truncated", content[: len(content) // 2]
    yield "a list", b"[]"
    yield "null", b"null"
    yield "nested", b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    yield "garbage", bytes(range(256))
    yield "UTF-16", content.decode().encode("utf-16")
    yield "not UTF-8", content[:7] + b"\xff" + content[7:]
    yield "a folder", None


def edited_json(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(damage, content): valid JSON objects that are not what was written."""
    found = json.loads(content)

    def text(**changes: Any) -> bytes:
        return json.dumps({**found, **changes}).encode()

    yield "an object without keys", b"{}"
    yield "unknown key", text(surprise=1)
    for key, value in found.items():
        yield f"{key} removed", json.dumps({k: v for k, v in found.items() if k != key}).encode()
        yield f"{key} of another type", text(**{key: [["wrong"]] if not isinstance(value, list) else {"wrong": 1}})
        yield f"{key} huge", text(**{key: 10**400})
        yield f"{key} NaN", text(**{key: float("nan")})
        yield f"{key} infinite", content[: content.rindex(b"}")] + b', "' + key.encode() + b'": 1e999}'
        yield f"{key} given twice", content[: content.rindex(b"}")] + b', "' + key.encode() + b'": null}'


def damaged_binary(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    yield "empty", b""
    yield "truncated", content[:-7]
    yield "half", content[: len(content) // 2]
    yield "garbage", os.urandom(len(content))
    yield "text", b"this is no such file\n" * 9
    for share in (0.001, 0.02, 0.2, 0.5, 0.8, 0.999):
        at = int(share * len(content))
        yield f"flipped at {at}", content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
    yield "a folder", None


def check(products: Path, home: Path, product: Product, damage: str, content: bytes | None, whole: Any) -> str | None:
    """None if the damage was refused or mended as it must be; else what happened."""
    folder = Path(product.file).parts[0]
    target = home / folder
    shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
    original = products / folder
    shutil.copytree(original, target) if original.is_dir() else shutil.copy(original, target)
    file = home / product.file
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    try:
        found = product.read(home)
    except (ValueError, OSError, CheckpointError) as error:
        named = product.named or file.name
        if isinstance(error, ValidationError | UnicodeError | json.JSONDecodeError):
            return f"{damage}: a library's own {type(error).__name__}"
        if isinstance(error, CheckpointError):  # the file is named on stderr, the folder in the error
            named = "checkpoint"
        if named not in str(error):
            return f"{damage}: the message does not name {named}: {error}"
        return None if len(str(error)) < 20_000 else f"{damage}: a message of {len(str(error))} characters"
    except Exception as error:
        return f"{damage}: {type(error).__name__}: {error}"
    if damage.startswith("flipped") and found == whole:
        return None  # in bytes that nothing reads
    if product.mended == "equal":
        return None if found == whole else f"{damage}: other results"
    if product.mended is not None:
        return None if found == product.mended else f"{damage}: {found}"
    return f"{damage}: accepted"


def names(products: list[Product]) -> list[str]:
    return [f"{product.file}-{i}" for i, product in enumerate(products)]


@pytest.fixture
def home(products: Path, tmp_path: Path) -> Path:
    """A copy of all products."""
    shutil.copytree(products, tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("product", JSON_FILES, ids=names(JSON_FILES))
def test_a_damaged_text_file_is_one_error_that_names_it(product: Product, products: Path, home: Path) -> None:
    whole = product.read(home)
    content = (products / product.file).read_bytes()
    damages = list(damaged_json(content)) + (list(edited_json(content)) if product.parsed else [])
    wrong = [check(products, home, product, damage, changed, whole) for damage, changed in damages]
    assert not [line for line in wrong if line]


@pytest.mark.parametrize("product", BINARY_FILES, ids=names(BINARY_FILES))
def test_a_damaged_binary_file_is_one_error_that_names_it(product: Product, products: Path, home: Path) -> None:
    whole = product.read(home)
    content = (products / product.file).read_bytes()
    damages = [damage for damage in damaged_binary(content) if product.hashed or not damage[0].startswith("flipped")]
    wrong = [check(products, home, product, damage, changed, whole) for damage, changed in damages]
    assert not [line for line in wrong if line]


def requests_of(videos: Path) -> object:
    return same_requests([RunResults("run", None, videos, None)])


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"file": 7}', '{"file": "../../x.png"}', "\xff", '{"file": "x.png", "protocol": 5}', '{"file": "x.png", "class": [1]}'],
)  # fmt: skip
def test_a_damaged_row_of_generated_videos_is_named_by_every_reader(damage: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(b'{"file": "x.png"}\n' + damage.encode("latin-1") + b"\n")
    for read in (read_generated, open_generated, lambda videos: find_results(videos, "run"), requests_of):
        with pytest.raises(ValueError, match=r"manifest\.jsonl"):
            read(tmp_path)


def test_a_run_that_a_row_names_by_no_path_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"file": "x.png", "protocol": {"run": 5}}\n')
    assert find_results(tmp_path, "run").run_dir is None


@pytest.mark.parametrize(
    ("file", "verb"),
    [
        ("features/extraction.json", ["extract", "--config", "extract.yaml", "--set", "out=features", "--set", "manifest=manifest.jsonl"]),
        (f"{STEP}/identity.json", ["convert", "run", "--to", "out"]),
        (f"{STEP}/{MANIFEST}", ["transfer", "run", "--to", "out"]),
        ("weights/config.json", ["convert", "weights", "--to", "out.pt", "--layout", "dit"]),
        ("videos/request.json", ["generate", "--run", "run", "--prompts", "prompts.txt", "--out", "videos", "--steps", "1"]),
        (f"{STEP}/identity.json", ["generate", "--run", STEP, "--prompts", "prompts.txt", "--out", "more"]),
    ],
)  # fmt: skip
def test_a_verb_ends_with_2_and_one_line(
    file: str, verb: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    (home / "prompts.txt").write_text("a wave\n")
    (home / file).write_text("{")
    assert cli.main(verb) == 2
    said = capsys.readouterr().err
    assert Path(file).name in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------- components of a pipeline


@pytest.mark.parametrize(
    ("part", "file"),
    [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"), ("transformer", "diffusion_pytorch_model.safetensors")],
)  # fmt: skip
def test_a_component_that_lacks_a_tensor_is_refused_by_name(part: str, file: str, home: Path) -> None:
    weights_file = home / "bare" / part / file
    state = load_file(weights_file)
    name = sorted(state)[0]
    save_file(
        {"other": torch.zeros(1), **{k: v for k, v in state.items() if k != name}}, weights_file, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=re.escape(name)):
        STDiTPipeline.from_pretrained(home / "bare")


def test_a_saved_model_may_be_saved_again_and_edited_once_its_manifest_is_gone(home: Path) -> None:
    model = STDiT.from_pretrained(home / "copied")
    before = sum(p.double().sum().item() for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(home / "copied")  # over the old one: its manifest follows
    assert copied(home) != before
    STDiTPipeline.from_pretrained(home / "pipeline").save_pretrained(home / "pipeline")
    assert pipeline(home) == bare(home)
    (home / "pipeline" / "notes.md").write_text("ours")
    assert pipeline(home) == bare(home)
    index = home / "pipeline" / "model_index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(ValueError, match=r"If it was changed on purpose, remove its manifest\.json"):
        pipeline(home)
    (home / "pipeline" / MANIFEST).unlink()
    assert pipeline(home) == bare(home)


@pytest.mark.parametrize("lost", ["lora_A", "lora_B", "blocks.1", "attn.qkv"])
def test_half_an_adapter_is_refused(lost: str, home: Path) -> None:
    file = home / "lora" / "pytorch_lora_weights.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as whole:
        metadata = whole.metadata()
    state = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(state, file, metadata)
    with pytest.raises(ValueError, match=r"(other half is missing|missing, though the adapter's own config names it)"):
        adapter(home)


def test_weights_that_the_manifest_does_not_list_are_not_read(home: Path) -> None:
    """An index and a shard beside the written weights: diffusers would take them in their place."""
    folder = home / STEP / "transformer_ema"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in state.items()}, folder / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "other.safetensors")}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is not listed in its manifest"):
        find_source(home / STEP, "ema")
    assert cli.main(["convert", str(home / "run"), "--to", str(home / "out")]) == 2


@pytest.mark.parametrize("added", ["spiece.model", "vocab.txt", "merges.txt", "tokenizer.json"])
def test_a_tokenizers_file_that_the_manifest_does_not_list_is_not_read(added: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    write_manifest(tmp_path, [tmp_path / "tokenizer" / "tokenizer_config.json"])
    check_saved(tmp_path)
    (tmp_path / "tokenizer" / added).write_text("x")
    with pytest.raises(ValueError, match=rf"{added} is not listed in its manifest"):
        check_saved(tmp_path)


# -------------------------------------------------------------------------------------- writing weights


@pytest.mark.parametrize(
    "verb",
    [
        ["transfer", "image", "--to", "out"],
        ["convert", "image", "--to", "out.pt", "--layout", "pixart"],
        ["convert", "image", "--to", "out.safetensors", "--layout", "pixart"],
    ],
    ids=lambda verb: verb[3],
)
def test_a_disk_that_is_full_while_weights_are_written_is_one_line(
    verb: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    settings = model_config(text_dim=10, temporal=False, position_base=4, null_text="sequence")
    STDiT.from_settings(settings).save_pretrained("image")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes of a file
    try:
        assert cli.main(verb) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert f"{verb[3]}: cannot be written (File too large)" in said
    assert "Traceback" not in said
    assert not Path(verb[3]).exists()


@pytest.mark.parametrize(
    "verb",
    [
        ["convert", "weights", "--to", "/proc/out"],
        ["transfer", "weights", "--to", "/proc/out"],
        ["generate", "--run", "run", "--prompts", "prompts.txt", "--out", "/proc/out", "--overwrite"],
        ["extract", "--config", "extract.yaml", "--set", "out=/proc/out"],
        ["evaluate", "--run", "run", "--manifest", "manifest.jsonl", "--out", "/proc/out"],
    ],
    ids=lambda verb: verb[0],
)
def test_a_place_that_cannot_be_written_is_refused_before_work(
    verb: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("prompts.txt").write_text("a prompt\n")
    assert cli.main(verb) == 2
    said = capsys.readouterr().err
    assert "/proc" in said
    assert "cannot be written to" in said
    assert "Traceback" not in said
