"""What a model is told of time, class, text and size, and what all its blocks make of that ahead of a run of steps.

B batch · N times · T frames · K in-context tokens · L text tokens · D hidden size
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.blocks import FinalLayer, Prepared, Signals
from stdit.models.checks import check_known
from stdit.models.conditioning import ConditionEmbedder, TimestepEmbedder, Told
from stdit.models.dynamic import depths, is_shared
from stdit.models.embeddings import Grid, PatchEmbed3D, as_vector
from stdit.models.pruning import cut_ahead


class Conditions(NamedTuple):
    """Everything that the tokens are told at one time. code (B or 1, T or 1, D); text (B or 1, L, D) or None; mask
    (B, 1, 1, keys) bool or None; tokens (B or 1, T or 1, K, D), in-context ones; prepared: what each block made of it;
    depth: how many blocks run, one number or each sample's, (B or 1,); None: all."""

    code: Tensor
    signals: Signals
    text: Tensor | None
    mask: Tensor | None
    tokens: Tensor | None
    prepared: tuple[Prepared, ...] | None = None
    final: tuple[Tensor, Tensor] | None = None
    depth: Tensor | int | None = None


class Known(NamedTuple):
    """What the conditions come to but for the time. rest (B or 1, D): what is added to its code; keys_values: of each block."""

    rest: Tensor | None
    told: Told
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...]


class Telling(nn.Module):
    """The part of STDiT that turns conditions into what its blocks take."""

    settings: ModelConfig
    patch_size: Grid
    x_embedder: PatchEmbed3D
    t_embedder: TimestepEmbedder
    t_block: nn.Sequential | None
    y_embedder: ConditionEmbedder | None
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    @property
    def _full(self) -> bool:
        return self.settings.attention == "full"

    @torch.no_grad()
    def prepare(
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        class_labels: Tensor | None = None,
        drop_condition: Tensor | None = None,
        conditioning_frames: Tensor | None = None,
        known: Known | None = None,
        **micro: Tensor | None,
    ) -> list[Conditions]:
        """What `forward` takes as `conditions`, for each of `timesteps` (N,), the rest as forward's: all times in one
        product, the text and its keys and values once. Memory: N times each block's modulation.

        known: of `know`, in place of all but conditioning_frames; it serves any number of calls."""
        weight = self.x_embedder.proj.weight
        if known is None:
            text = (encoder_hidden_states, encoder_attention_mask, pooled_projections)
            known = self.know(text, class_labels, drop_condition, micro)
        rest, told, keys_values = known
        time = self.t_embedder(timesteps.to(weight.device), weight.dtype)
        own = code = time[:, None, None]  # (N, 1, 1, D)
        if conditioning_frames is not None:
            still = self.t_embedder(torch.zeros(1, device=weight.device), weight.dtype)
            code = torch.where(self._given(conditioning_frames)[..., None], still, code)
        code, own = (c if rest is None else c + rest[:, None] for c in (code, own))  # (N, B or 1, T or 1, D)
        if self.settings.conditioning in ("in_context", "cross_attention"):
            each = [self._assembled(*both, told) for both in zip(code, own, strict=True)]
            return self._timed_each(each, timesteps, time)
        steps = len(timesteps)
        whole = self._assembled(code.flatten(0, 1), own.flatten(0, 1), told)
        prepared = [block.prepare(whole.signals) for block in self._blocks()]
        final = self._final(whole.code)

        def at(step: int, made: Any) -> Any:
            """Of what has all steps along its first axis, one's."""
            if isinstance(made, Tensor):
                return made.unflatten(0, (steps, -1))[step]
            return made and tuple(at(step, m) for m in made)

        each = [
            whole._replace(
                code=at(step, whole.code),
                signals=Signals(*at(step, whole.signals)),
                prepared=tuple(
                    Prepared(at(step, p.modulation), at(step, p.text_modulation), kv)
                    for p, kv in zip(prepared, keys_values, strict=True)
                ),
                final=at(step, final),
            )
            for step in range(steps)
        ]
        return self._timed_each(each, timesteps, time)

    def _final(self, code: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the final layer makes of the code (B or 1, T or 1, D); None where it reads none."""
        return self.final_layer.prepare(code)

    def _timed_each(self, each: list[Conditions], times: Tensor, time: Tensor) -> list[Conditions]:
        """The conditions of each of `times` (N,), whose codes are `time` (N, D), with what dynamic compute goes by."""
        c = self.settings
        if c.dynamic_width and not self.training:
            ahead = cut_ahead([(block.parts, block.dynamic.choose(time, None, None)) for block in self._blocks()])
            each = [
                made
                if made.prepared is None
                else made._replace(
                    prepared=tuple(p._replace(parts=parts) for p, parts in zip(made.prepared, cuts, strict=True))
                )
                for made, cuts in zip(each, ahead, strict=True)
            ]
        return [self._timed(*one) for one in zip(each, times.split(1), time.split(1), strict=True)]

    def _timed(self, conditions: Conditions, times: Tensor, time: Tensor) -> Conditions:
        """Conditions of times (B or 1,), whose codes are `time`, with what dynamic compute goes by: at inference one time
        for the batch, where it has one, so that only what is chosen runs."""
        c = self.settings
        if not (c.dynamic_width or c.exit_depths):
            return conditions
        one = not self.training and is_shared(times)
        if c.dynamic_width:
            signals = conditions.signals._replace(time=time[:1] if one else time)
            conditions = conditions._replace(signals=signals)
        if c.exit_depths:
            depth = depths(c, times)
            conditions = conditions._replace(depth=int(depth[0]) if one else depth)
        return conditions

    @torch.no_grad()
    def know(
        self,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop_condition: Tensor | None,
        micro: dict[str, Any],
    ) -> Known:
        """The part of `prepare` that no time enters. text: features, mask and pooled vector. ValueError as forward's."""
        check_known(self.settings, text, class_labels, drop_condition, micro)
        weight = self.x_embedder.proj.weight
        rest, told = self._told(text, class_labels, drop_condition, micro, weight.device, weight.dtype)
        reads = (
            told.text is not None and self.settings.conditioning != "cross_attention"
        )  # that text has the time in it
        crosses = [block.cross_attn for block in self._blocks()]
        return Known(rest, told, tuple(c.keys_values(told.text) if c is not None and reads else None for c in crosses))

    def _conditions(
        self,
        timestep: Tensor | float,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop: Tensor | None,
        conditioning_frames: Tensor | None,
        micro: dict[str, Any],
        x: Tensor,
    ) -> Conditions:
        rest, told = self._told(text, class_labels, drop, micro, x.device, x.dtype)
        times = as_vector(timestep, x.device)
        time = self.t_embedder(times, x.dtype)  # (B or 1, D)
        own = code = time[:, None]
        if conditioning_frames is not None:
            still = self.t_embedder(torch.zeros(1, device=x.device), x.dtype)
            code = torch.where(self._given(conditioning_frames)[..., None], still, code)
        code, own = (c if rest is None else c + rest[:, None] for c in (code, own))
        return self._timed(self._assembled(code, own, told), times, time)

    def _given(self, conditioning_frames: Tensor) -> Tensor:
        """(B, T) of latent frames -> (B, T) of patches: those of which every frame is given."""
        return conditioning_frames.bool().unflatten(1, (-1, self.patch_size[0])).all(2)

    def _told(
        self,
        text: tuple[Tensor | None, Tensor | None, Tensor | None],
        class_labels: Tensor | None,
        drop: Tensor | None,
        micro: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Told]:
        """What is added to the code of the time, (B or 1, D) or None, and what comes of text and class."""
        told = Told(None, None, None)
        if self.y_embedder is not None:
            features, mask, pooled = text
            seen = None if mask is None else mask.bool()
            told = self.y_embedder(class_labels, features, seen, pooled, drop, dtype)
        codes = [self._micro(name, micro, device, dtype) for name in self.settings.micro_conditions]
        if told.code is not None and self.settings.conditioning not in ("in_context", "cross_attention"):
            codes.append(told.code)
        return (sum(codes[1:], codes[0]) if codes else None), told

    def _micro(self, name: str, micro: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """A micro-condition's code, (B or 1, D)."""
        if name != "size":
            return self.get_submodule(f"{name}_embedder")(as_vector(micro[name], device), dtype)
        height, width = (as_vector(micro[n], device).float() for n in ("height", "width"))
        ratio = micro.get("aspect_ratio")
        ratio = height / width if ratio is None else as_vector(ratio, device)
        size, aspect = self.get_submodule("csize_embedder"), self.get_submodule("ar_embedder")
        thirds = torch.broadcast_tensors(size(height, dtype), size(width, dtype), aspect(ratio, dtype))
        return torch.cat(thirds, dim=1)

    def _assembled(self, code: Tensor, own: Tensor, told: Told) -> Conditions:
        """The conditions of a code (B or 1, T or 1, D); own (B or 1, 1, D): the same without given frames."""
        c = self.settings
        if c.conditioning == "adaln_single":
            assert self.t_block is not None
            return Conditions(code, Signals(self.t_block(code)), told.text, told.mask, None)
        if c.conditioning in ("adaln", "adaln_zero", "joint"):
            signal = F.silu(code)
            per_text = F.silu(own) if self._full else signal
            return Conditions(signal, Signals(signal, per_text), told.text, told.mask, None)
        # Time and class are tokens, which come before the text's.
        tokens = code[:, :, None]  # (B or 1, T or 1, 1, D)
        if told.code is not None:
            label = told.code[:, None, None].expand(-1, tokens.shape[1], -1, -1)
            tokens = torch.cat(_with_batch(tokens, label), dim=2)
        text, mask = told.text, told.mask
        if c.conditioning == "cross_attention":
            tokens = tokens[:, 0]
            text = tokens if text is None else torch.cat(_with_batch(tokens, text), dim=1)
            mask = None if mask is None else F.pad(mask, (tokens.shape[1], 0), value=True)
            return Conditions(code, Signals(None), text, mask, None)
        if text is not None:
            tokens = torch.cat(_with_batch(tokens, text[:, None].expand(-1, tokens.shape[1], -1, -1)), dim=2)
        return Conditions(code, Signals(None), None, mask, tokens)


def _with_batch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger batch of the two; one may be 1."""
    batch = max(a.shape[0], b.shape[0])
    return a.expand(batch, *a.shape[1:]), b.expand(batch, *b.shape[1:])
