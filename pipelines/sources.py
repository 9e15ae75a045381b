"""The clips of a plan's feature sets: of the features if they are extracted, else of the manifest, else as if there
were some.

sources = Sources(plan)
index = sources.of_stage(stage)        # of one set, or of several with their shares
facts = sources.facts(stage)           # what follows from them (stdit.training.derive)
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.forecast import EqualSource, ManifestSource
from pipelines.plan import FeatureSource, Plan, ResolvedStage
from stdit.config import ENCODERS, ConfigError
from stdit.console import echo

if TYPE_CHECKING:
    from stdit.data.extraction import ExtractionPlan
    from stdit.data.features import FeatureFacts, FeatureSet
    from stdit.data.loader import ClipIndex

# Of encoders' settings, where their weights lie and how they run: the same weights may be in two places.
_PLACES = ("path", "subfolder", "tokenizer_subfolder", "frames_at_once")


def extracted_features(one: FeatureSource) -> FeatureSet | None:
    """A set's features; None before they are extracted, or where they are damaged and the extraction will mend them."""
    from stdit.data.features import FeatureSet, is_extracted

    if not is_extracted(one.extract.out):
        return None
    try:
        return FeatureSet(one.extract.out, one.extract.cache)
    except ConfigError as error:
        echo(f"{error}", file=sys.stderr)
        return None


class Sources:
    """Each set's clips, read once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._found: dict[str, FeatureSet | ManifestSource | EqualSource] = {}
        self._facts: dict[str, FeatureFacts] = {}

    def of(self, one: FeatureSource) -> FeatureSet | ManifestSource | EqualSource:
        """A set's clips. ManifestError."""
        if one.name not in self._found:
            config = one.extract
            self._found[one.name] = extracted_features(one) or (
                ManifestSource(config) if config.has_manifest else EqualSource(config.manifest, config.captions)
            )
        return self._found[one.name]

    def lines(self, one: FeatureSource) -> list[str]:
        """What a set has: kept and dropped clips."""
        from stdit.data.extraction import read_report, report_lines

        source = self.of(one)
        if isinstance(source, ManifestSource | EqualSource):
            return source.lines()
        return report_lines(read_report(one.extract.out))

    def of_stage(self, stage: ResolvedStage) -> ClipIndex:
        """The clips of a stage's sets, with their shares."""
        from stdit.data.mixture import MixedIndex

        sets = self.plan.sets_of(stage.name)
        if len(sets) == 1:
            return self.of(sets[0])
        found = [self.of(one) for one in sets]
        keys = [self._buckets(one) for one in sets]
        weights = stage.config.data.feature_weights
        return MixedIndex(found, weights, [one.name for one in sets], keys, [_size(source) for source in found])

    def _buckets(self, one: FeatureSource) -> Collection[str]:
        from stdit.data.features import FeatureSet

        source = self.of(one)
        return source.index["buckets"] if isinstance(source, FeatureSet) else [b.key for b in one.extract.buckets]

    def facts(self, stage: ResolvedStage) -> FeatureFacts:
        """What a stage's config can take from its sets, which are of equal encoders. ConfigError, ManifestError: no
        manifest or encoder."""
        from stdit.data.features import FeatureSet
        from stdit.extract import expected_facts

        sets = self.plan.sets_of(stage.name)
        for one in sets:
            if one.name not in self._facts:
                source = self.of(one)
                extracted = source if isinstance(source, FeatureSet) else None
                self._facts[one.name] = extracted.facts() if extracted is not None else expected_facts(one.extract)
        found = [self._facts[one.name] for one in sets]
        latents = {key: shape for facts in found for key, shape in facts.latents.items()}
        return replace(found[0], latents=latents)


def _size(source: FeatureSet | ManifestSource | EqualSource) -> int:
    """Ids that there may be."""
    return source.size if isinstance(source, ManifestSource | EqualSource) else int(source.ids[-1]) + 1


def check_encoders(plan: Plan, stage: ResolvedStage) -> None:
    """ConfigError with both values where a stage's sets are of other encoders, as far as their settings tell."""
    sets = plan.sets_of(stage.name)
    _compare(stage, sets, [_settings(one) for one in sets])


def check_identities(plan: Plan, stages: Sequence[ResolvedStage], extractions: dict[str, ExtractionPlan]) -> None:
    """As check_encoders, of loaded encoders: their weights and latent statistics. extractions: by set."""
    for stage in stages:
        sets = plan.sets_of(stage.name)
        _compare(stage, sets, [{key: extractions[one.name].settings.get(key) for key in ENCODERS} for one in sets])


def _compare(stage: ResolvedStage, sets: Sequence[FeatureSource], settings: Sequence[dict[str, Any]]) -> None:
    from stdit.data.mixture import check_compatible

    for one, other in zip(sets[1:], settings[1:], strict=True):
        check_compatible(settings[0], other, f"{stage.source}: sets {sets[0].name} and {one.name}")


def _settings(one: FeatureSource) -> dict[str, Any]:
    """What determines whether a model can train on a set beside another one, without places."""
    from stdit.config.diff import flatten

    config = one.extract
    encoders = flatten(config.model_dump(mode="json", include=set(ENCODERS)))
    kept = {key: value for key, value in encoders.items() if key.rpartition(".")[2] not in _PLACES}
    return {**kept, "control_column": config.control_column is not None}
