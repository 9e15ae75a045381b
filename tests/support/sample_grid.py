"""What ranks run to draw a sample grid: module-level, so that they find it by name."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch


def grid(data: dict[str, Any]) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """The sample grid of an engine whose weights are all drawn (rank 0's; None elsewhere), and the micro-conditions of
    each preparation of conditions ahead."""
    from stdit.models import sampling
    from stdit.models.stdit import STDiT
    from stdit.training.data import open_data
    from stdit.training.engine import Engine, init_distributed
    from stdit.training.inputs import Inputs
    from stdit.training.validation import Validator
    from tests.support.rank_jobs import config_of

    config = config_of(data)
    checked = open_data(config)
    ranks = init_distributed()
    engine = Engine(STDiT.from_settings(config.model, config.seed), config, ranks)
    generator = torch.Generator().manual_seed(0)
    drawn = STDiT.from_settings(config.model).state_dict()
    engine.set_weights({k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in drawn.items()})
    validator = Validator(config, checked, Inputs(config, checked.video_encoder, ranks.device), ranks)
    engine.module.eval()
    added, encode = [], sampling.encode_static
    cast(Any, sampling).encode_static = lambda model, inputs: (
        added.append(inputs.added_cond_kwargs or {}) or encode(model, inputs)
    )
    try:
        picture = validator.sample_grid(engine.module)
    finally:
        sampling.encode_static = encode
    engine.close()
    values = [{k: v.tolist() for k, v in each.items()} for each in added]
    return None if picture is None else np.asarray(picture), values
