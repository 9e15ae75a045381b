"""What the ranks of a pool run to measure their memory: module-level, so that they find it by name."""

from __future__ import annotations

from typing import Any

from tests.support.memory import AllocatedMemory
from tests.support.rank_jobs import config_of


def step_peak(data: dict[str, Any], count: int) -> tuple[int, int]:
    """Takes `count` steps as training does. Bytes of this rank in the last of them: as allocated at most, and by the
    forecast."""
    from stdit.data.loader import Loader
    from stdit.train import prepare
    from stdit.training import resume
    from stdit.training.data import open_data
    from stdit.training.engine import init_distributed
    from stdit.training.inputs import Inputs
    from stdit.training.machine import step_memory

    config = config_of(data)
    train, bucket = config.train, config.data.buckets[0]
    clips, ranks = open_data(config), init_distributed()
    inputs = Inputs(config, clips.video_encoder, ranks.device, clips.empty_caption)
    loader = Loader(clips.source, config.data, config.seed, ranks.rank, ranks.size, train.gradient_accumulation)
    with AllocatedMemory() as allocated:
        _, engine, ema = resume.restore(config, clips, ranks, lambda model: prepare(model, config, ranks.device))
        for number, step in zip(range(1, count + 1), loader, strict=False):
            allocated.start()
            for batch in step.batches:
                loss = inputs.loss(engine, batch, number)
                engine.backward(loss.total * batch.weight, len(step.batches))
            engine.step(train.optimizer.learning_rate)
            ema.update(number)
        engine.close()
    samples = config.micro_batches(ranks.size)[bucket.key].size
    latent, device = clips.latents[bucket.key], ranks.device.type
    forecast = step_memory(config, bucket, latent, clips.text_tokens, samples, ranks.size, device)
    return allocated.nbytes, forecast.total
