"""What a model costs: parameters, tokens, multiply-adds, activation memory, for a given grid of patches.

    python -m stdit.models.summary --config configs/models/XL.yaml --latent 16 32 32 --text-length 120

N tokens · S tokens of a frame · T frames · D hidden size · L text tokens · r MLP ratio. Multiply-adds ("Gflops" of the DiT
paper) are counted for the matrix products and attention; a training step costs 3 forwards (one, and two backward).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from stdit.config import ConfigError, ModelConfig, read_extended, token_grid, validate


@dataclass(frozen=True)
class Summary:
    """Of one sample. Activations: what backward keeps, in bytes, with attention that keeps no matrix of scores."""

    parameters: int
    tokens: int
    forward_macs: int
    training_flops: int
    activation_bytes: int
    activation_bytes_checkpointed: int

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


def summary(
    model: ModelConfig, grid: tuple[int, int, int], text_length: int = 0, bytes_per_element: int = 4
) -> Summary:
    """What `model` costs on a grid (T, H, W) of patches (`stdit.config.token_grid`) with captions of `text_length` tokens."""
    tokens = math.prod(grid)
    macs = _forward_macs(model, grid, _text_length(model, text_length))
    width, depth, _ = model.dimensions
    kept = _block_activations(model, tokens, _text_length(model, text_length))
    ends = 2 * tokens * width + _text_length(model, text_length) * 3 * width
    return Summary(
        parameters=parameter_count(model),
        tokens=tokens,
        forward_macs=macs,
        training_flops=6 * macs,
        activation_bytes=bytes_per_element * (depth * kept + ends),
        activation_bytes_checkpointed=bytes_per_element * (depth * tokens * width + kept + ends),
    )


def parameter_count(model: ModelConfig) -> int:
    """Counted on the model itself, made without memory."""
    import torch

    from stdit.models.stdit import STDiT

    with torch.device("meta"):
        return sum(p.numel() for p in STDiT.from_settings(model).parameters())


def _text_length(model: ModelConfig, text_length: int) -> int:
    """A model with text reads at least the null caption's one token."""
    return 0 if model.text_dim is None else max(1, text_length)


def _forward_macs(model: ModelConfig, grid: tuple[int, int, int], text_length: int) -> int:
    (t, h, w), (width, depth, _) = grid, model.dimensions
    n, per_patch = t * h * w, math.prod(model.patch_size) * model.in_channels
    seen = n if model.attention == "full" else h * w
    block = n * (4 * width**2 + 2 * seen * width + 2 * width * int(width * model.mlp_ratio))
    if model.attention == "factorized" and model.temporal:
        block += n * (4 * width**2 + 2 * t * width)
    if model.text_dim is not None:
        block += n * (2 * width**2 + 2 * text_length * width) + text_length * 2 * width**2
    scalars = (1 + len(model.micro_conditions)) * (256 * width + width**2) + 6 * width**2
    text = text_length * ((model.text_dim or 0) * width + width**2)
    if model.pooled_text:
        scalars += (model.text_dim or 0) * (width + text_length) + width**2
    patches = n * width * per_patch * (3 if model.learned_variance else 2)
    return depth * block + scalars + text + patches


def _block_activations(model: ModelConfig, tokens: int, text_length: int) -> int:
    """Elements that one block keeps for its backward: inputs of norms and products, q, k, v, what gates multiply."""
    width, _, _ = model.dimensions
    # Attention: stream, normed, modulated, q, k, v, attended, projected. Queries and keys once more before norms or rotation.
    attention = 8 + (2 if model.qk_norm else 0) + (2 if model.positions == "rope" else 0)
    mlp = 4 + 2 * model.mlp_ratio
    over_time = attention if model.attention == "factorized" and model.temporal else 0
    text = 3 + model.qk_norm if model.text_dim is not None else 0
    return int(tokens * width * (attention + over_time + text + mlp)) + text_length * 2 * width * (text > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters, multiply-adds and memory of a model.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file with a `model:` section")
    parser.add_argument("--latent", type=int, nargs=3, metavar=("T", "H", "W"), default=(1, 32, 32), help="latent size")
    parser.add_argument("--text-length", type=int, default=0, help="tokens of a caption")
    args = parser.parse_args()
    data = read_extended(args.config)
    if "model" not in data:
        raise ConfigError(f"{args.config}: model: missing key")
    model = validate(data["model"], ModelConfig, f"{args.config}: model")
    grid = token_grid(tuple(args.latent), model.patch_size, f"--latent {args.latent}")
    print(summary(model, grid, args.text_length))


if __name__ == "__main__":
    main()
