"""Out of memory in training: which bucket, its shape and tokens, what should fit by the forecast's estimate, and the
key to change.

with MemoryErrors(config, data, ranks) as memory:
    memory.start_step(step, data_step.key)        # what runs from here on is this bucket's, or packed
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from stdit.config import Bucket, Config, token_grid
from stdit.data.loader import PACKED
from stdit.training.distributed import Ranks
from stdit.training.machine import local_share, step_memory
from stdit.training.rank_memory import Memory

if TYPE_CHECKING:
    from stdit.training.data import TrainData


class OutOfMemory(RuntimeError):
    """A step did not fit into memory; the message says what should."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class MemoryErrors:
    """Raises OutOfMemory for an allocation that failed within its context."""

    def __init__(self, config: Config, data: TrainData, ranks: Ranks) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self._step, self._key = 0, None

    def start_step(self, step: int, key: str) -> None:
        """From here on memory is taken for `step`, of this bucket or PACKED."""
        self._step, self._key = step, key

    def __enter__(self) -> MemoryErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_out_of_memory(error):
            raise OutOfMemory(self.describe(error, self._step, self._key)) from error

    def describe(self, error: BaseException, step: int, key: str | None) -> str:
        """The message for an allocation that failed in a step of this bucket, or PACKED; None: before the first
        step."""
        available, place = local_share(self.ranks.device)
        request = _requested(str(error))
        if key is None:
            return (
                f"out of memory before the first step{request}: {place} has {_gib(available)} for this rank; a higher "
                "train.zero_stage, more ranks or a smaller model take less"
            )
        if key == PACKED:
            return f"step {step}: out of memory in a packed micro-batch{request}; {place} has {_gib(available)} for this rank. {self.packed_advice()}"
        (bucket,) = (b for b in self.config.data.buckets if b.key == key)
        samples = self.config.micro_batches(self.ranks.size)[bucket.key].size
        latent, model = self.data.latents[bucket.key], self.config.model
        t, h, w = token_grid(latent, model.patch_size, bucket.key, model.pad_latents)
        memory = self.estimate(self.config, bucket, samples)
        return (
            f"step {step}: out of memory in bucket {bucket.key} (latent {' x '.join(map(str, latent))}, {t * h * w:,} tokens, "
            f"micro-batches of {samples}){request}. By estimate a rank takes {_gib(memory.total)}, {_gib(memory.activations)} of it "
            f"activations; {place} has {_gib(available)} for it. {self.advice(bucket, samples, available)}"
        )

    def estimate(self, config: Config, bucket: Bucket, samples: int) -> Memory:
        """The forecast's memory of a rank with micro-batches of `samples`."""
        latent, ranks = self.data.latents[bucket.key], self.ranks
        return step_memory(config, bucket, latent, self.data.text_tokens, samples, ranks.size, ranks.device.type)

    def packed_advice(self) -> str:
        """Settings with which packed sequences take less."""
        train, largest = self.config.train, max(b.tokens or 0 for b in self.config.data.buckets)
        data_ranks = train.data_ranks(self.ranks.size)
        tokens = train.tokens_per_micro_batch or -(-(train.tokens_per_step or 0) // data_ranks)
        least = largest * min(2, data_ranks)
        found = [f"train.tokens_per_micro_batch: {max(tokens // 2, least)}"] if tokens > least else []
        if not train.activation_checkpointing:
            found.append("train.activation_checkpointing: true")
        if train.zero_stage < 2 and self.ranks.size > 1:  # ZeRO-3 does not go with packing
            found.append(f"train.zero_stage: {train.zero_stage + 1}")
        return f"It has at most {tokens:,} video tokens. To try: {'; '.join(found) or 'a smaller model'}"

    def advice(self, bucket: Bucket, samples: int, available: int) -> str:
        """Settings that should fit. What failed did not, whatever the estimate says of it: half of it at most."""
        train, size = self.config.train, samples
        number = [b.key for b in self.config.data.buckets].index(bucket.key)
        found: list[str] = []
        while size > 1:
            size //= 2
            if size == 1 or self.estimate(self.config, bucket, size).total <= available:
                key = f"data.buckets[{number}].batch_size: {size}"
                if train.tokens_per_step is not None:
                    key = f"train.tokens_per_micro_batch: {size * (self.config.data.buckets[number].tokens or 1)}"
                found.append(f"{key} ({_gib(self.estimate(self.config, bucket, size).total)})")
                break
        if not train.activation_checkpointing:
            changed = self.config.model_copy(
                update={"train": train.model_copy(update={"activation_checkpointing": True})}
            )
            found.append(
                f"train.activation_checkpointing: true ({_gib(self.estimate(changed, bucket, samples).total)})"
            )
        if train.zero_stage < 3 and self.ranks.size > 1:
            found.append(f"train.zero_stage: {train.zero_stage + 1}")
        if not found or size == 1:
            found.append("train.sequence_parallel over more ranks")
        return f"To try: {'; '.join(found)}. `stdit find-batch-size --config …` measures what fits"


def _requested(message: str) -> str:
    """What the failed allocation was for, by torch's message."""
    if found := re.search(r"tried to allocate ([\d.]+ [KMGT]iB)", message, re.IGNORECASE):
        return f", for {found[1]} more"
    if found := re.search(r"tried to allocate (\d+) bytes", message):
        return f", for {_gib(int(found[1]))} more"
    return ""


def _gib(count: float) -> str:
    return f"{count / 2**30:,.3g} GiB"
