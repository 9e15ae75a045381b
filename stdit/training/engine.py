"""The one place that runs DeepSpeed: forward, backward and step under ZeRO 0 to 3, and the weights that lie behind them.

Masters are the float32 weights that the optimizer steps: this rank's partition under ZeRO, all of them without it.
Live weights are what the forward pass uses: the masters themselves in float32 without ZeRO, else copies of them.
Weights that need no gradient are frozen: they have no master, no moments, and are in no checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stdit.config import Config
from stdit.training.deepspeed_config import say_accelerator, settings
from stdit.training.distributed import TIMEOUT, Ranks, join
from stdit.training.optimizer import parameter_groups


def start_ranks() -> Ranks:
    """Joins this process to the others (see stdit.training.distributed.join) under the backend of what device there is."""
    say_accelerator()
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    # Else the first launch compiles shared-memory collectives for 52 s, needs g++ and ninja, and leaves 69 MB a rank
    # in /dev/shm each time.
    cast(Any, deepspeed.ops).__compatible_ops__["deepspeed_shm_comm"] = False
    # `log_level` in train.deepspeed has it say more.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls what torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    accelerator = cast(Any, get_accelerator()).device_name()
    backend = "nccl" if accelerator == "cuda" else "gloo"
    allow_only_data()
    ranks = join(lambda: deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False), accelerator)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return ranks


def allow_only_data() -> None:
    """From here on a checkpoint cannot run code: torch.load unpickles tensors, plain values and the three classes that
    DeepSpeed's own checkpoints hold."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


class Engine:
    """A model under DeepSpeed. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, universal: bool = False) -> None:
        """universal: the checkpoint that `load` will be given was converted by stdit.training.universal."""
        import deepspeed

        self.train_config, self.ranks = config.train, ranks
        self.stage = config.train.zero_stage
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.made = settings(config.train, sum(p.numel() for p in model.parameters()), ranks.device.type)
        if universal:
            self.made["checkpoint"] = {**self.made.get("checkpoint", {}), "load_universal": True}
        optimizer = config.train.optimizer
        self.adamw = torch.optim.AdamW(
            parameter_groups(model, optimizer),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        rounded = self.dtype != torch.float32
        initial = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if rounded else {}
        # Its bfloat16 optimizer prints memory statistics.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine: Any = deepspeed.initialize(model=model, optimizer=cast(Any, self.adamw), config=self.made)[0]
        self.optimizer: Any = self.engine.optimizer
        if initial:
            # DeepSpeed makes the masters from weights already rounded; without ZeRO it also takes a step from zero
            # gradients, which counts in AdamW's bias correction.
            if not self.stage:
                self.adamw.state.clear()
            self.set_weights(initial)

    @property
    def module(self) -> Any:
        """The model, with DeepSpeed's hooks under ZeRO-3."""
        return self.engine.module

    def _trained(self) -> dict[str, Tensor]:
        """Live weights that are not frozen, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's mean loss. A loss that is not finite makes every gradient NaN, so that the
        gradient norm, which all ranks share, is the one place to look."""
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """Updates the weights after the last micro-batch's `backward`; returns the gradient norm before clipping.

        A norm that is not finite: nothing is updated, on no rank, and inf or NaN is returned.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage or self.dtype != torch.float32:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        # DeepSpeed's plain float32 path would apply NaN to the weights, and keeps the norm to itself.
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        limit = self.train_config.optimizer.max_grad_norm or float("inf")
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters], foreach=True)
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        else:
            # Without gradients the optimizer leaves weights and moments alone.
            self.engine.zero_grad()
        self.engine.step()
        return float(norm)

    # ------------------------------------------------------------------------------------- weights

    def masters(self) -> list[Tensor]:
        """This rank's masters, the tensors themselves."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if (held := getattr(self.optimizer, name, None)) is not None:
                return [t for t in held if t.numel()]
        if (groups := getattr(self.optimizer, "fp32_groups", None)) is not None:
            return [p.data for group in groups for p in group]
        return [p.data for p in self._trained().values()]

    @torch.no_grad()
    def publish(self) -> None:
        """Carries the masters, changed from outside, into the live weights of all ranks."""
        if self.stage == 3:
            optimizer = self.optimizer
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.stage:
            self.optimizer.update_lp_params()
        elif self.dtype != torch.float32:
            for live, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(list(live), list(masters))  # pyright: ignore

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """All masters, of all ranks, by name, float32 on the CPU, on rank 0 (empty on the others)."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = self._trained()
        replicas = self._replicated_masters()
        state: dict[str, Tensor] = {}
        for name, parameter in named.items():
            full = replicas[id(parameter)] if replicas is not None else safe_get_full_fp32_param(parameter)
            assert full is not None, f"DeepSpeed holds no float32 weights of {name}"
            if self.ranks.first:
                state[name] = full.detach().float().cpu().clone()
        if self.ranks.first:
            known = dict(self.module.named_parameters())
            for name, buffer in self.module.state_dict().items():
                if name not in known:
                    state[name] = buffer.detach().cpu().clone()
        return state

    @torch.no_grad()
    def set_weights(self, state: dict[str, Tensor]) -> None:
        """Masters and live weights from the float32 weights of all that is trained, by name, the same on every rank."""
        from deepspeed.utils import safe_set_full_fp32_param

        replicas = self._replicated_masters()
        for name, parameter in self._trained().items():
            value = state[name].to(self.ranks.device, torch.float32)
            if replicas is not None:
                replicas[id(parameter)].copy_(value)
            else:
                safe_set_full_fp32_param(parameter, value)
        self.publish()

    def _replicated_masters(self) -> dict[int, Tensor] | None:
        """Masters by id of the live parameter, where every rank holds all of them; None under ZeRO."""
        if self.stage:
            return None
        if self.dtype == torch.float32:
            return {id(p): p.data for p in self._trained().values()}
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {id(live): master.data for group in pairs for live, master in zip(*group, strict=True)}

    # --------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, tag: str) -> None:
        """Every rank's shards into folder/tag. Errors are left to end the process: a rank that went on would wait in
        DeepSpeed's barriers for one that failed."""
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Weights and optimizer from folder/tag. ValueError: DeepSpeed found nothing there."""
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        with contextlib.redirect_stdout(io.StringIO()):
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
        if path is None:
            raise ValueError(f"{folder / tag}: DeepSpeed loaded nothing from it")
        # From the universal form, ZeRO-3 gives every group the first one's weight decay, and all partitions one and the
        # same step counter, which each of them then advances.
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in self.adamw.state.values():
            if torch.is_tensor(step := state.get("step")):
                state["step"] = step.clone()

    def close(self) -> None:
        self.engine.destroy()


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Live weights of a checkpoint, which has none of those that are frozen. RuntimeError: it is of another model."""
    frozen = {name: p.data for name, p in dst.named_parameters() if not p.requires_grad}
    dst.load_state_dict({**frozen, **src})
