"""Laws of the plan: order, what crosses, what a change invalidates, and what is refused before any work."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import changes, checks
from pipelines import plan as plans
from stdit.config import ConfigError, dump
from tests.support.paths import ROOT

STAGE = {
    "run_dir": "elsewhere",
    "model": {"hidden_size": 32, "depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": [1, 2, 2]},
    "data": {"features": "elsewhere", "buckets": [{"frames": 1, "height": 8, "width": 8, "batch_size": 4}]},
    "train": {"steps": 3},
}
PLAN = {
    "name": "tiny",
    "run_dir": "runs/tiny",
    "prepare": {"module": "stdit.data.digits", "args": ["--count", 4]},
    "extraction": {"buckets": [{"frames": 1, "height": 8, "width": 8}, {"frames": 2, "height": 8, "width": 8}]},
    "stages": {"one": {"config": "STAGE"}, "two": {"config": "STAGE", "after": "one"}},
}


@pytest.fixture
def write(tmp_path: Path):
    """Writes a stage file and a plan over it; returns the plan's path."""

    def write(change: dict | None = None, stages: dict | None = None, stage: dict | None = None) -> Path:
        stage_file = tmp_path / "stage.yaml"
        stage_file.write_text(yaml.safe_dump({**STAGE, **(stage or {})}))
        data = json.loads(json.dumps({**PLAN, **(change or {})}))
        if stages is not None:
            data["stages"] = stages
        for entry in data["stages"].values():
            if entry.get("config") == "STAGE":
                entry["config"] = str(stage_file)
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


def described(path: Path, overrides: tuple[str, ...] = (), sha: str | None = None) -> dict[str, changes.Settings]:
    plan = plans.read(path, overrides)
    return changes.describe(plan, plans.resolve(plan), dict.fromkeys(plan.feature_sets, sha))


def test_the_plan_places_everything_under_its_run_dir(write):
    plan = plans.read(write())
    assert plan.reference.extract.manifest == plan.reference.prepared == Path("runs/tiny/data/manifest.jsonl")
    assert plan.reference.extract.out == Path("runs/tiny/features")
    first, second = plans.resolve(plan)
    assert (first.config.run_dir, second.config.run_dir) == (Path("runs/tiny/one"), Path("runs/tiny/two"))
    assert first.config.data.features == plan.reference.extract.out
    assert first.config.init is None
    assert second.config.init is not None
    assert second.config.init.source == first.config.run_dir


def test_a_run_dir_set_on_the_command_line_moves_everything(write):
    plan = plans.read(write(), ["run_dir=/shared/x"])
    stages = plans.resolve(plan)
    assert plan.reference.extract.manifest == Path("/shared/x/data/manifest.jsonl")
    assert {s.config.run_dir.parent for s in stages} == {Path("/shared/x")}


def test_overrides_go_plan_then_stage_then_command_line(write):
    stages = {"one": {"config": "STAGE", "overrides": {"train": {"steps": 7}}}, "two": {"config": "STAGE"}}
    path = write({"overrides": {"train": {"steps": 5, "log_every": 2}}}, stages)
    steps = {s.name: (s.config.train.steps, s.config.train.log_every) for s in plans.resolve(plans.read(path))}
    assert steps == {"one": (7, 2), "two": (5, 2)}
    changed = plans.resolve(plans.read(path, ["stages.one.overrides.train.steps=9"]))
    assert changed[0].config.train.steps == 9


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_every_stage_comes_after_the_one_it_starts_from(parents, random):
    """Stage i comes from some stage below i, or from none; the file's order is shuffled."""
    after = {f"s{i}": (f"s{p}" if p < i else None) for i, p in enumerate(parents)}
    names = list(after)
    random.shuffle(names)
    stages = {name: {"config": "x.yaml", **({"after": after[name]} if after[name] else {})} for name in names}
    extraction = {"manifest": "m", "out": "o", "buckets": [{"frames": 1, "height": 8, "width": 8}]}
    plan = plans.Plan.model_validate({"name": "p", "run_dir": "r", "extraction": extraction, "stages": stages})
    order = plans.order(plan)
    assert sorted(order) == sorted(names)
    for name, before in after.items():
        assert before is None or order.index(before) < order.index(name)


# ----------------------------------------------------------------------------------- what is refused


def test_a_cycle_is_named(write):
    stages = {"a": {"config": "STAGE", "after": "b"}, "b": {"config": "STAGE", "after": "a"}}
    with pytest.raises(ConfigError, match="cycle: a comes after b comes after a"):
        plans.resolve(plans.read(write(stages=stages)))


def test_a_stage_after_itself_is_a_cycle(write):
    with pytest.raises(ConfigError, match="cycle: a comes after a"):
        plans.resolve(plans.read(write(stages={"a": {"config": "STAGE", "after": "a"}})))


def test_an_unknown_stage_is_named_with_those_there_are(write):
    with pytest.raises(ConfigError, match=r"stages\.b\.after: no stage is called 'nope'; there are: a, b"):
        plans.resolve(plans.read(write(stages={"a": {"config": "STAGE"}, "b": {"config": "STAGE", "after": "nope"}})))


def test_a_missing_config_file_is_named(write):
    with pytest.raises(ConfigError, match=r"plan\.yaml: stages\.a\.config: nowhere\.yaml: cannot be read"):
        path = write(stages={"a": {"config": "nowhere.yaml"}})
        plans.resolve(plans.read(path), str(path))


def test_a_name_given_twice_is_an_error(write, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: p\nstages:\n  a: {config: x.yaml}\n  a: {config: y.yaml}\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:4: key 'a' is given twice"):
        plans.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stagse": {}}, "stagse: unknown key"),
        ({"resources": {"workers": "2"}}, r"resources\.workers: .* found '2'"),
        ({"resources": {"workers": 0}}, r"resources\.workers: .* found 0"),
        ({"stages": {"a b": {"config": "x"}}}, "should match pattern"),
        ({"stages": {"features": {"config": "x"}}}, "a stage can't be called 'features'"),
        ({"stages": {"a": {"config": "x", "allow": ["class_to_text"]}}}, "needs after"),
        ({"stages": {}}, "at least 1"),
    ],
)
def test_bad_plans_name_file_and_key(write, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plans.read(write(change))
    assert "plan.yaml: " in str(caught.value)


def test_without_prepare_the_manifest_is_required(write):
    with pytest.raises(ConfigError, match=r"plan\.yaml: .*extraction\.manifest is needed"):
        plans.read(write({"prepare": None}))


def test_a_stage_bucket_that_is_not_extracted_is_named(write):
    data = {**STAGE["data"], "buckets": [{"frames": 9, "height": 8, "width": 8, "batch_size": 4}]}
    with pytest.raises(ConfigError, match=r"data\.buckets 9x8x8 not in .*extraction\.buckets 1x8x8, 2x8x8"):
        plans.resolve(plans.read(write(stage={"data": data})))


def test_init_in_both_places_is_an_error(write):
    with pytest.raises(ConfigError, match=r"stages\.two .*init is set in the config, and after: one"):
        plans.resolve(plans.read(write(stage={"init": {"source": "weights"}})))


def test_shapes_that_do_not_divide_give_both_numbers(write):
    stage = plans.resolve(plans.read(write()))[0]
    plans.check_shapes(stage, (1, 1, 1), 3)
    with pytest.raises(
        ConfigError, match=r"stages\.one .*height 8 is not divisible by the autoencoder's compression 3"
    ):
        plans.check_shapes(stage, (1, 3, 3), 3)
    with pytest.raises(ConfigError, match=r"latent height 1 is not divisible by model\.patch_size 2"):
        plans.check_shapes(stage, (1, 8, 8), 3)
    with pytest.raises(ConfigError, match=r"model\.in_channels 3, but .* 4 channels"):
        plans.check_shapes(stage, (1, 1, 1), 4)


# ------------------------------------------------------------------------------------ several sets

SETS = {
    "prepare": None,
    "extraction": {"buckets": PLAN["extraction"]["buckets"], "seed": 7},
    "sets": {
        "films": {"curation": {"footage": "films"}},
        "stills": {"extraction": {"manifest": "stills.jsonl", "seed": 8}},
    },
    "stages": {
        "one": {"config": "STAGE", "sets": {"stills": 1}},
        "two": {"config": "STAGE", "after": "one", "sets": {"films": 0.7, "stills": 0.3}},
        "three": {"config": "STAGE", "after": "one"},
    },
}


def test_each_set_has_its_own_folders_and_what_it_leaves_out_is_the_plans(write):
    plan = plans.read(write(SETS), ["sets.films.extraction.batch_size=3"])
    films, stills = plan.feature_sets.values()
    home = Path("runs/tiny/sets")
    assert films.curate is not None
    assert (films.curate.out, films.extract.out) == (home / "films" / "curated", home / "films" / "features")
    assert films.extract.manifest == home / "films" / "curated" / "manifest.jsonl"
    assert (stills.extract.manifest, stills.extract.out) == (Path("stills.jsonl"), home / "stills" / "features")
    assert (films.extract.seed, stills.extract.seed) == (7, 8)
    assert (films.extract.batch_size, stills.extract.batch_size) == (3, 16)
    assert films.extract.buckets == stills.extract.buckets
    assert plan.reference.name == "films"
    (path := write(SETS)).with_name("resolved.yaml").write_text(dump(plan))
    assert plans.read(path.with_name("resolved.yaml")) == plan


def test_a_stage_trains_on_the_sets_that_it_names_with_their_weights_and_else_on_all(write):
    one, two, three = plans.resolve(plans.read(write(SETS)))
    films, stills = (Path("runs/tiny/sets") / name / "features" for name in ("films", "stills"))
    assert one.config.data.features == stills
    assert (two.config.data.feature_paths, two.config.data.feature_weights) == ((films, stills), (0.7, 0.3))
    assert (three.config.data.feature_paths, three.config.data.feature_weights) == ((films, stills), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.two.sets={film: 1}", "stages.two.sets: no set is called 'film'; there are: films, stills"),
        ("stages.two.sets={films: 0}", "stages.two.sets.films: Input should be greater than 0"),
        ("evaluation={reference: film}", "evaluation.reference: no set is called 'film'; there are: films, stills"),
        ("prepare={module: m}", "prepare belongs to one of the sets, sets.NAME.prepare: films, stills"),
        ("sets.more={}", "sets.more.extraction.manifest is needed without `prepare` and `curation`"),
        ("sets.films.curation.footage=''", "sets.films.curation.footage is needed without `prepare`"),
        ("extraction.out=all", "sets.films.extraction.out and sets.stills.extraction.out are both all"),
        ("stages.sets={config: x.yaml}", "a stage can't be called 'sets'"),
    ],
)
def test_a_set_that_is_not_there_or_incomplete_is_named(write, change, message):
    with pytest.raises(ConfigError) as error:
        plans.resolve(plans.read(write(SETS), [change]))
    assert message in str(error.value)


def test_a_plan_of_one_set_names_none(write):
    with pytest.raises(ConfigError, match="stages.one.sets: no set is called 'films'; the plan names no `sets`"):
        plans.read(write(), ["stages.one.sets={films: 1}"])


def test_a_stage_bucket_that_none_of_its_sets_extracts_is_named(write):
    own = "sets.stills.extraction.buckets=[{frames: 4, height: 8, width: 8}]"
    with pytest.raises(ConfigError, match=r"stages\.one .*1x8x8 not in .*sets\.stills\.extraction\.buckets 4x8x8"):
        plans.resolve(plans.read(write(SETS), [own]))


@pytest.mark.parametrize(
    ("change", "key", "parts"),
    [
        ("sets.films.extraction.seed=1", "sets.films.extraction.seed", ["sets.films.extraction", "stages.two", "stages.three"]),
        ("sets.stills.extraction.seed=1", "sets.stills.extraction.seed", ["sets.stills.extraction", "stages.one", "stages.two", "stages.three"]),
        ("stages.two.sets.films=0.6", "stages.two.data.features.0.weight", ["stages.two"]),
        ("stages.two.sets=null", "stages.two.data.features.1.weight", ["stages.two"]),
        ("stages.one.sets={films: 1}", "stages.one.sets", ["stages.one", "stages.two", "stages.three"]),
    ],
)  # fmt: skip
def test_a_changed_set_invalidates_the_stages_that_train_on_it(write, change, key, parts):
    before, after = described(write(SETS)), described(write(SETS), (change,))
    found = changes.differences(before, after)
    assert key in {f"{part}.{c.key}" for part, some in found.items() for c in some}
    assert list(changes.invalidated(found, after)) == parts


# ------------------------------------------------------------------------------ what a change does


def test_the_same_plan_changes_nothing(write):
    assert changes.differences(described(write()), described(write())) == {}


def test_what_is_recorded_survives_json(write):
    pieces = described(write(), sha="00")
    assert changes.differences(json.loads(json.dumps(pieces)), pieces) == {}


@pytest.mark.parametrize(
    ("override", "key", "parts"),
    [
        ("prepare.args=[--count, 5]", "prepare.args", ["prepare", "extraction", "stages.one", "stages.two"]),
        ("extraction.seed=1", "extraction.seed", ["extraction", "stages.one", "stages.two"]),
        ("stages.one.overrides.train.steps=4", "stages.one.train.steps", ["stages.one", "stages.two"]),
        ("stages.two.overrides.train.optimizer.learning_rate=1e-3", "stages.two.train.optimizer.learning_rate", ["stages.two"]),
        ("stages.two.weights=model", "stages.two.init.weights", ["stages.two"]),
        ("stages.two.allow=[add_temporal]", "stages.two.init.allow", ["stages.two"]),
        ("seed=3", "stages.one.seed", ["stages.one", "stages.two"]),
    ],
)  # fmt: skip
def test_a_change_invalidates_what_depends_on_it_and_nothing_else(write, override, key, parts):
    before, after = described(write()), described(write(), (override,))
    found = changes.differences(before, after)
    assert key in {f"{part}.{c.key}" for part, some in found.items() for c in some}
    assert list(changes.invalidated(found, after)) == parts
    for part in after:
        same = changes.fingerprint(before, part) == changes.fingerprint(after, part)
        assert same == (part not in parts)


def test_a_change_is_reported_by_key_with_old_and_new_values(write):
    found = changes.differences(described(write()), described(write(), ("stages.one.overrides.train.steps=4",)))
    assert {p: [str(c) for c in some] for p, some in found.items()} == {"stages.one": ["train.steps: 3 -> 4"]}


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=/other",
        "name=other",
        "resources.cpus_per_worker=4",
        "resources={cpus_per_worker: 2, use_gpu: true, deadline_s: 5}",
        "extraction.workers=4",
        "overrides.train.log_every=5",
        "overrides.samples.every=5",
        "overrides.train.matmul_precision=high",
        "overrides.train.deepspeed={log_level: info}",
    ],
)
def test_where_and_how_visibly_it_runs_is_no_change(write, override):
    assert changes.differences(described(write()), described(write(), (override,))) == {}


def test_half_the_batch_on_twice_the_workers_is_no_change_but_more_workers_alone_are(write):
    data = {**STAGE["data"], "buckets": [{"frames": 1, "height": 8, "width": 8, "batch_size": 2}]}
    before = described(write({"resources": {"workers": 2}}))
    assert changes.differences(before, described(write({"resources": {"workers": 4}}, stage={"data": data}))) == {}
    found = changes.differences(before, described(write({"resources": {"workers": 4}})))
    assert str(found["stages.one"][0]) == "samples_per_step.1x8x8: 8 -> 16"


def test_a_changed_manifest_invalidates_everything_that_depends_on_it(write):
    found = changes.differences(described(write(), sha="a"), described(write(), sha="b"))
    assert [c.key for c in found["extraction"]] == ["manifest_sha256"]
    assert list(changes.invalidated(found, described(write()))) == ["extraction", "stages.one", "stages.two"]


def test_a_manifest_not_written_yet_is_no_change(write):
    assert changes.differences(described(write(), sha="a"), described(write())) == {}


def test_a_new_stage_invalidates_nothing_and_neither_does_one_that_has_gone(write):
    shorter = write(stages={"one": {"config": "STAGE"}})
    before = described(shorter)
    after = described(write())
    assert changes.differences(before, after) == {}
    assert changes.differences(after, before) == {}


def test_joining_another_branch_is_a_change_of_after(write):
    stages = {n: {"config": "STAGE"} for n in ("one", "side")} | {"two": {"config": "STAGE", "after": "one"}}
    before = described(write(stages=stages))
    stages["two"]["after"] = "side"
    found = changes.differences(before, described(write(stages=stages)))
    assert {p: [str(c) for c in some] for p, some in found.items()} == {"stages.two": ["after: one -> side"]}


# ------------------------------------------------------------------------------- the plans there are


@pytest.mark.parametrize("path", sorted((ROOT / "configs/plans").glob("*.yaml")), ids=lambda p: p.name)
def test_every_plan_resolves_and_its_stages_join(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plans.read(path)
    checks.check_early(plan, plans.resolve(plan, str(path)))


def test_the_demo_goes_from_classes_to_captions_to_larger_and_longer_clips(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plans.read("configs/plans/demo.yaml")
    first, second, third = plans.resolve(plan)
    assert first.config.model.num_classes
    assert second.config.model.text_dim
    assert {b.frames == 1 for b in second.config.data.buckets} == {True, False}, "images and clips"
    assert third.largest.height > second.largest.height
    assert third.largest.frames > second.largest.frames
    assert third.config.data.where, "the finest part of the data"
    assert [stage.sets for stage in (first, second, third)] == [("digits",), ("digits", "films"), ("digits",)]
    films = plan.feature_sets["films"]
    assert films.curate is not None
    assert films.curate.captions[0].function == "stdit.curation.rule_based:rule_based_caption"
    assert second.config.data.feature_weights == (0.98, 0.02)
    assert plan.reference.name == "digits"
    assert plan.resources.workers == 2
    assert all(stage.config.train.zero_stage > 0 for stage in (first, second, third))


def test_auto_takes_the_cores_there_are(write, monkeypatch) -> None:
    """Four, two and one core: two workers share them, extraction has one each."""
    path = write({"resources": {"workers": 2, "cpus_per_worker": "auto"}, "evaluation": {"threads": "auto"}})
    described_parts = []
    for cores, threads in ((4, 2), (2, 1), (1, 1)):
        monkeypatch.setattr(plans, "available_cores", lambda cores=cores: cores)
        plan = plans.read(path, ["extraction.workers=auto"])
        assert (plan.resources.threads, plan.resources.cpus) == (threads, 2 * threads)
        assert plan.reference.extract.workers == cores
        assert plan.evaluation is not None
        assert plan.evaluation.threads_each == cores
        described_parts.append(described(path, ("extraction.workers=auto",)))
    assert described_parts[0] == described_parts[1] == described_parts[2], "other cores are no change"


def test_every_field_of_a_plan_is_read_somewhere() -> None:
    read = {
        node.attr
        for file in (ROOT / "pipelines").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for schema in (plans.Plan, plans.SetConfig, plans.Prepare, plans.Stage, plans.Evaluation, plans.Resources):
        assert set(schema.model_fields) <= read, schema.__name__


def test_transitions_between_the_demo_s_stages_are_reported() -> None:
    path = ROOT / "configs/plans/demo.yaml"
    images, clips, finest = plans.resolve(plans.read(path), str(path))
    report = checks.check_transition(images, clips)
    assert "dropped: y_embedder.embedding_table.weight" in report
    assert "class_to_text" in report
    assert "positions" not in report
    assert "positions: 12x12 to 16x16 px; rescaled, every grid spans the same 0 to 4" in checks.check_transition(
        clips, finest
    )


def test_positions_that_are_not_rescaled_are_reported_too() -> None:
    path = ROOT / "configs/plans/demo.yaml"
    _, clips, finest = plans.resolve(plans.read(path, ["overrides.model.position_base=null"]), str(path))
    assert checks.positions(clips, clips) == []
    assert "exceed those of training" in checks.positions(clips, finest)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{position_base: null, position_reference: 16}", "each clip's size, against model.position_reference 16"),
        ("{positions: learned, position_grid: [4, 4], position_frames: 6}", "the centre of a table, model.position_grid [4, 4]"),
        ("{positions: none}", None),
    ],
)  # fmt: skip
def test_what_becomes_of_positions_depends_on_their_kind(change: str, message: str | None) -> None:
    path = ROOT / "configs/plans/demo.yaml"
    _, clips, finest = plans.resolve(plans.read(path, [f"overrides.model={change}"]), str(path))
    report = checks.positions(clips, finest)
    assert (message in report[0]) if message else report == []


def test_growing_between_stages_is_tried_and_reported(write) -> None:
    """DiT's classes on images to captions on clips, blocks over time between, and told the rate."""
    old = {"conditioning": "adaln_zero", "temporal": False, "num_classes": 4, "depth": 2}
    new = {
        "conditioning": "adaln_single", "temporal": True, "num_classes": None, "depth": 4, "attention": "alternating",
        "text_dim": 6, "micro_conditions": ["fps"],
    }  # fmt: skip
    allow = ["class_to_text", "add_temporal", "add_micro_conditions", "adaln_to_single"]

    def stages(allow: list[str]) -> list[plans.ResolvedStage]:
        entries = {
            "one": {"config": "STAGE", "overrides": {"model": old}},
            "two": {"config": "STAGE", "overrides": {"model": new}, "after": "one", "allow": allow},
        }
        return plans.resolve(plans.read(write(stages=entries)))

    report = checks.check_transition(*stages(allow))
    assert "image block i is now block 2i" in report
    assert "dropped: y_embedder.embedding_table.weight, blocks.*.adaLN_modulation.1.weight" in report
    with pytest.raises(ConfigError, match=r"after one: .*\n.*conditioning .*needs init.allow: \[adaln_to_single\]"):
        checks.check_transition(*stages(allow[:3]))
