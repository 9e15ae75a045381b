"""What the ranks of a pool run to count what they send: module-level, so that they find it by name."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stdit.models.cost import parameter_sizes
from stdit.training.communication import zero_traffic
from tests.support.rank_jobs import config_of
from tests.support.sequence_jobs import train_steps

# A ring sends so often the part of the whole buffer that is not the rank's own. The first argument is the whole buffer,
# but of a reduce-scatter the rank's part of it.
ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "reduce_": 1}


class SentBytes(TorchDispatchMode):
    """Counts the bytes that a rank sends in rings, of the collectives that DeepSpeed calls; of any other the whole
    buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, ranks = func.overloadpacket.__name__, dist.get_world_size()
            buffers = [args[0]] if isinstance(args[0], Tensor) else args[0]
            size = sum(x.numel() * x.element_size() for x in buffers if isinstance(x, Tensor))
            size *= ranks if name == "_reduce_scatter_base_" else 1
            self.bytes += size * ROUNDS[name] * (ranks - 1) / ranks if name in ROUNDS else size
        return func(*args, **(kwargs or {}))


def step_traffic(data: dict[str, Any]) -> tuple[float, int]:
    """Bytes that this rank sends in a step, counted, and as `zero_traffic` has them. ZeRO-3 knows its modules' order,
    after which it keeps and fetches weights, from the third micro-batch on."""
    from stdit.training.engine import Engine

    config, step, counts = config_of(data), Engine.step, []

    def counted_step(self: Engine, learning_rate: float) -> float:
        norm = step(self, learning_rate)
        counts.append(counter.bytes)
        return norm

    Engine.step = counted_step
    try:
        with SentBytes() as counter:
            train_steps(data, 4)
    finally:
        Engine.step = step
    sizes = parameter_sizes(config.model, config.train)
    expected = zero_traffic(sizes, config.train, dist.get_world_size(), config.train.gradient_accumulation)
    return counts[3] - counts[2], expected.sent
