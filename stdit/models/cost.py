"""Cost of a model: parameters, tokens, multiply-adds and activation memory for a grid of patches.

    python -m stdit.models.cost --config configs/models/XL.yaml --latent 16 32 32 --text-length 120
    python -m stdit.models.cost --config configs/models/pixart-XL-2.yaml --pixels 1 512 512 --compression 1 8 8

Measured by running the model on torch's meta device, not computed from formulas. Multiply-adds are half of the FLOPs of
matrix products, attention and convolutions (the DiT paper's Gflops); a training step costs three forwards, of the
tokens that token routing keeps. Beside frozen weights (LoRA, a control branch) it is counted: their gradients are not
computed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stdit import arguments
from stdit.config import (
    Bucket,
    ConfigError,
    ModelConfig,
    TrainConfig,
    latent_shape,
    read_extended,
    token_grid,
    validate,
)
from stdit.console import echo
from stdit.models.alignment import Aligned
from stdit.models.attention import Attention, CrossAttention
from stdit.models.control import Controlled
from stdit.models.fine_tuning import add_trainable, submodels
from stdit.models.sequence_parallel import SequenceParallel
from stdit.models.stdit import STDiT

META = torch.device("meta")
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class ModelCost:
    """Cost per sample. Activations: bytes saved for backward, with fused attention (no score matrix). trained:
    parameters that training changes; the others are frozen.

    Under sequence parallelism multiply-adds, activations and exchanged bytes (sent to other ranks in forward and
    backward) are those of the rank with the largest share.
    """

    parameters: int
    trained: int
    tokens: int
    forward_macs: int
    training_flops: int
    activation_bytes: int
    activation_bytes_checkpointed: int
    exchanged_bytes: int = 0
    exchanged_bytes_checkpointed: int = 0

    def __str__(self) -> str:
        return "\n".join(
            (
                f"parameters                    {self.parameters / 1e6:12.2f} M",
                f"tokens                        {self.tokens:12d}",
                f"forward multiply-adds         {self.forward_macs / 1e9:12.2f} G",
                f"training FLOPs a sample       {self.training_flops / 1e9:12.2f} G",
                f"activations a sample          {self.activation_bytes / 2**20:12.2f} MiB",
                f"  with checkpointing          {self.activation_bytes_checkpointed / 2**20:12.2f} MiB",
            )
        )


def model_cost(
    model: ModelConfig,
    grid: tuple[int, int, int],
    text_length: int = 0,
    bytes_per_element: int = 4,
    batch: int = 2,
    sequence_parallel: int = 1,
    train: TrainConfig | None = None,
) -> ModelCost:
    """Cost of `model` on a grid (T, H, W) of patches (`stdit.config.token_grid`) with captions of `text_length` tokens
    (0: the null caption), in float32 (bytes_per_element 4) or bfloat16 (2).

    batch: samples measured together, each with its own timestep; the result is per sample. (Alone, a sample saves less:
    norm and modulation are one kernel.) sequence_parallel: ranks that share each sample. train: its token routing,
    whose FLOPs and activations are fewer than those of three forwards, the head of its alignment, and its LoRA adapters
    or control branch, beside which the model is frozen; None: all of the model is trained, on all tokens. Dynamic
    models count in full.
    ValueError: arguments that the model rejects.
    """
    if bytes_per_element not in DTYPES:
        raise ValueError(f"bytes_per_element {bytes_per_element}; activations take 2 (bfloat16) or 4 (float32)")
    least_of = {"text_length": (text_length, 0), "batch": (batch, 1), "grid": (min(grid), 1)}
    least_of["sequence_parallel"] = (sequence_parallel, 1)
    for name, (value, least) in least_of.items():
        if value < least:
            raise ValueError(f"{name} {value}; expected {least} or more")
    t, h, w = grid
    arguments = model.model_dump_json(), (t, h, w), text_length, DTYPES[bytes_per_element], batch, sequence_parallel
    added = None
    if train is not None and (train.lora or train.control):
        added = train.model_dump_json(include={"steps", "lora", "control"})
    dense = _measure(*arguments, added)
    if train is None or not (train.token_routing or train.alignment):
        return dense
    added = train.model_dump_json(include={"steps", "lora", "control", "alignment", "token_routing"})
    return replace(_measure(*arguments, added), forward_macs=dense.forward_macs)


@lru_cache(maxsize=256)
def _measure(
    settings: str,
    grid: tuple[int, int, int],
    text_length: int,
    dtype: torch.dtype,
    batch: int,
    ranks: int,
    added: str | None = None,
) -> ModelCost:
    model = ModelConfig.model_validate_json(settings)
    train = None if added is None else TrainConfig.model_validate_json(added)
    fine_tuned = train is not None and (train.lora or train.control)
    built = _build(model.model_copy(update={"exit_depths": ()}), train).train()
    torch.nn.Module.to(built, dtype)  # diffusers' own warns
    for module in built.modules():
        if isinstance(module, (Attention, CrossAttention)):
            module.processor = _fused_attention
    for part in submodels(built):
        if ranks > 1:  # on the meta device the exchanges need no process group
            part.set_sequence_parallel(SequenceParallel("none", 0, ranks))
        if train is not None:
            part.set_token_routing(train.token_routing)
    saved = _SavedTensors(built)
    keeping = torch.autograd.graph.saved_tensors_hooks(saved.save, lambda x: x)
    exchanged = _Exchanged(saved)
    inputs = _inputs(model, grid, text_length, batch, dtype)
    if train is not None and train.control is not None:
        latents = inputs["hidden_states"]
        inputs["control"] = latents[:, :, :1] if train.control.condition == "first_frame" else latents
    if isinstance(built, Aligned):
        inputs["alignment_target"] = built.meta_target(inputs["hidden_states"], grid)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        with exchanged, keeping:
            output = built(**inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        if fine_tuned and ranks == 1:
            output.sum().backward()
            # Fused attention computes one of its five products once more, which is no part of the model's.
            by_operator = counter.get_flop_counts()["Global"].items()
            again = sum(flops for name, flops in by_operator if "attention_backward" in str(name)) // 5
            training = counter.get_total_flops() - again
        else:
            training = 3 * forward
    macs = forward // 2 // batch
    plain, checkpointed = saved.totals()
    return ModelCost(
        parameters=sum(p.numel() for p in built.parameters()),
        trained=sum(p.numel() for p in built.parameters() if p.requires_grad),
        tokens=math.prod(grid),
        forward_macs=macs,
        training_flops=training // batch if fine_tuned else 6 * macs,
        activation_bytes=plain // batch,
        activation_bytes_checkpointed=checkpointed // batch,
        exchanged_bytes=2 * (exchanged.in_blocks + exchanged.elsewhere) // batch,
        exchanged_bytes_checkpointed=(3 * exchanged.in_blocks + 2 * exchanged.elsewhere) // batch,
    )


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters, counted on a model on the meta device."""
    return sum(p.numel() for p in _build(model).parameters())


class ParameterSize(NamedTuple):
    """Elements of one parameter tensor, and whether training changes it."""

    numel: int
    trained: bool


def parameter_sizes(model: ModelConfig, train: TrainConfig) -> list[ParameterSize]:
    """Every parameter tensor, in the order of the modules."""
    return [ParameterSize(p.numel(), p.requires_grad) for p in _build(model, train).parameters()]


def _build(model: ModelConfig, train: TrainConfig | None = None) -> STDiT | Controlled | Aligned:
    """The model on the meta device; train: with its adapters or control branch, and otherwise frozen, if it has any, or
    with the head of its alignment."""
    with META:
        built = STDiT.from_settings(model)
        return built if train is None else add_trainable(built, train)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Memory-efficient attention: (B, N, H, d) and twice (B, M, H, d) -> (B, N, H, d); one number per query is
    saved."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    bias = None if mask is None or mask.dtype == torch.bool else mask
    y, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first, bias, True)
    return y.transpose(1, 2)


class _SavedTensors:
    """Records tensors saved for backward, each storage once, without parameters, by block."""

    def __init__(self, model: STDiT | Controlled | Aligned) -> None:
        self.block: int | None = None
        self.alive: list[Any] = []  # keeps storages alive, so that addresses are not reused
        self.owned = {self._address(p) for p in model.parameters()}
        # Bytes by address: all; saved within each block; saved outside; inputs of each block.
        self.everything: dict[int, int] = {}
        self.inside: list[dict[int, int]] = []
        self.outside: dict[int, int] = {}
        self.inputs: list[dict[int, int]] = []
        for block in (block for part in submodels(model) for block in part.blocks):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def save(self, tensor: Tensor) -> Tensor:
        address, size = self._note(tensor)
        if address not in self.owned:
            self.everything[address] = size
            (self.outside if self.block is None else self.inside[self.block])[address] = size
        return tensor

    def totals(self) -> tuple[int, int]:
        """Bytes saved; and with checkpointing: every block's inputs, plus the largest block's own."""
        inputs = self.outside | {a: s for each in self.inputs for a, s in each.items() if a not in self.owned}
        own = [sum(s for a, s in block.items() if a not in inputs) for block in self.inside]
        return sum(self.everything.values()), sum(inputs.values()) + max(own)

    @staticmethod
    def _address(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _note(self, tensor: Tensor) -> tuple[int, int]:
        self.alive.append(tensor)
        return self._address(tensor), tensor.untyped_storage().nbytes()

    def _enter(self, block: Any, args: tuple[Any, ...]) -> None:
        self.block = len(self.inside)
        self.inside.append({})
        self.inputs.append(dict(self._note(x) for x in tree_leaves(args) if isinstance(x, Tensor)))

    def _leave(self, block: Any, args: tuple[Any, ...], output: Any) -> None:
        self.block = None


class _Exchanged(TorchDispatchMode):
    """Counts the bytes of a forward that rank 0 sends to others; backward sends as many."""

    def __init__(self, saved: _SavedTensors) -> None:
        super().__init__()
        self.saved = saved
        self.in_blocks = self.elsewhere = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sent, _ = args
            size = sum(sent[1:]) * x.element_size()
            if self.saved.block is None:
                self.elsewhere += size
            else:
                self.in_blocks += size
        return func(*args, **(kwargs or {}))


def _inputs(
    model: ModelConfig, grid: tuple[int, int, int], text_length: int, batch: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Inputs of every kind that the model takes."""
    size = [n * p for n, p in zip(grid, model.patch_size, strict=True)]
    inputs: dict[str, Any] = {
        "hidden_states": torch.empty(batch, model.in_channels, *size, device=META, dtype=dtype),
        "timestep": torch.empty(batch, device=META),
        # Values do not matter; 8 pixels per latent.
        "added_cond_kwargs": {"fps": 24.0, "frames": 24.0, "height": 8.0 * size[1], "width": 8.0 * size[2]},
    }
    if model.text_dim is not None and (text_length or model.null_text == "empty"):
        inputs["encoder_hidden_states"] = torch.empty(
            batch, max(1, text_length), model.text_dim, device=META, dtype=dtype
        )
    if model.pooled_dim is not None:
        inputs["pooled_projections"] = torch.empty(batch, model.pooled_dim, device=META, dtype=dtype)
    if model.num_classes is not None:
        inputs["class_labels"] = torch.zeros(batch, device=META, dtype=torch.int64)
    return inputs


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.summary().parse_args(argv)
    try:
        echo(_table(args))
    except (ConfigError, ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _table(args: argparse.Namespace) -> str:
    """What the command prints. ValueError: the config, or an argument."""
    for name in ("latent", "pixels", "compression"):
        values = getattr(args, name)
        if values and min(values) < 1:
            raise ValueError(f"--{name} {' '.join(map(str, values))}: expected whole numbers, 1 or more")
    if args.text_length < 0:
        raise ValueError(f"--text-length {args.text_length}: expected 0 (the null caption) or more")
    data = read_extended(args.config)
    if "model" not in data:
        raise ConfigError(f"{args.config}: model: missing key")
    model = validate(data["model"], ModelConfig, f"{args.config}: model")
    latent, name = tuple(args.latent), f"--latent {tuple(args.latent)}"
    if args.pixels:
        frames, height, width = args.pixels
        latent = latent_shape(Bucket(frames=frames, height=height, width=width), tuple(args.compression))
        name = f"--pixels {tuple(args.pixels)}, latent {latent}"
    grid = token_grid(latent, model.patch_size, name, model.pad_latents)
    cost = model_cost(model, grid, args.text_length, 2 if args.precision == "bf16" else 4)
    return f"latent (T, H, W)              {' x '.join(map(str, latent)):>12}\n{cost}"


if __name__ == "__main__":
    main()
