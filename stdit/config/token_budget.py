"""`train.tokens_per_step`: how many samples a step takes, by their tokens, whatever the number of ranks: of one bucket,
or packed of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from stdit.config.load import ConfigError

# How far a rank's share of a step's samples may be from the mean.
MAX_IMBALANCE = 0.1
# Where samples_multiple_of is left out, steps are multiples of so many samples (a node's GPUs), or of a divisor of it.
NODE = 8


class StepSize(NamedTuple):
    """Samples of a bucket's steps over all ranks, and the most in a rank's micro-batch (None: no limit)."""

    global_batch: int
    batch_size: int | None


class PackingBudget(NamedTuple):
    """Video tokens of packed sequences: of a step over all ranks, and of a micro-batch at most (None: a rank's share of
    the step)."""

    tokens_per_step: int
    tokens_per_micro_batch: int | None


def check_packing_budget(tokens: Mapping[str, int], budget: PackingBudget, ranks: int) -> None:
    """ConfigError: on `ranks` data-parallel ranks some micro-batch might be empty. tokens: video tokens of a sample by
    bucket."""
    largest = max(tokens, key=lambda key: tokens[key])
    needed = {"tokens_per_step": ranks * tokens[largest]}
    if ranks > 1 and budget.tokens_per_micro_batch is not None:
        needed["tokens_per_micro_batch"] = 2 * tokens[largest]
    for name, least in needed.items():
        if getattr(budget, name) < least:
            raise ConfigError(
                f"train.{name} is {getattr(budget, name)}; with train.packing on {ranks} data-parallel ranks it takes {least} or more, as a sample "
                f"of bucket {largest} has {tokens[largest]} tokens: else a rank might have none"
            )


def step_sizes(
    tokens: Mapping[str, int], tokens_per_step: int, multiple_of: int | None, tokens_per_micro_batch: int | None
) -> dict[str, StepSize]:
    """The most samples of each bucket that fit into `tokens_per_step`, in multiples. tokens: video tokens of a sample
    by bucket.

    multiple_of: None: the greatest common divisor of NODE and the samples of the largest bucket. ConfigError: a sample,
    or `multiple_of` of them, does not fit; names bucket, tokens and budget.
    """
    largest = max(tokens, key=lambda key: tokens[key])
    count = multiple_of or 1
    if count * tokens[largest] > tokens_per_step:
        several = "one sample" if count == 1 else f"{count} samples (train.samples_multiple_of)"
        raise ConfigError(
            f"train.tokens_per_step is {tokens_per_step}, less than {several} of bucket {largest}, which has {tokens[largest]} tokens; "
            f"give {count * tokens[largest]} or more"
        )
    if tokens_per_micro_batch is not None and tokens[largest] > tokens_per_micro_batch:
        raise ConfigError(
            f"train.tokens_per_micro_batch is {tokens_per_micro_batch}, less than one sample of bucket {largest}, which has "
            f"{tokens[largest]} tokens"
        )
    unit = multiple_of or math.gcd(tokens_per_step // tokens[largest], NODE)
    return {
        key: StepSize(
            tokens_per_step // (unit * each) * unit, tokens_per_micro_batch and tokens_per_micro_batch // each
        )
        for key, each in tokens.items()
    }


def imbalance(samples: int, ranks: int) -> float:
    """How far the rank with the most or the fewest of `samples`, shared out as evenly as possible, is from the mean, as
    a share of it."""
    fewest, most = samples // ranks, -(-samples // ranks)
    return max(most * ranks - samples, samples - fewest * ranks) / samples
