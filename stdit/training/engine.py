"""DeepSpeed engine: forward, backward and optimizer step under ZeRO 0 to 3, and access to the master weights.

Master weights are float32 and updated by the optimizer: under ZeRO this rank's partition, else all of them.
Model weights are used by the forward pass: the masters themselves in float32 without ZeRO, else copies of them.
Frozen weights (requires_grad False) have no masters, no optimizer state, and are in no checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stdit.config import Config
from stdit.training.deepspeed_config import make_deepspeed_config, set_accelerator
from stdit.training.deferred import DeferredTensors
from stdit.training.distributed import TIMEOUT, Ranks, init_process_group, set_timeout
from stdit.training.identity import load_identity
from stdit.training.muon import Muon, set_zero_layouts, zero3_fragment, zero12_fragment
from stdit.training.optimizer import make_optimizer
from stdit.training.snapshot import Fragment, MasterLayout
from stdit.training.universal import States


def init_distributed(sequence_parallel: int = 1) -> Ranks:
    """Initialises DeepSpeed and the process group (NCCL with CUDA, else gloo).

    sequence_parallel: DeepSpeed is not told: ZeRO partitions over all ranks, and averages gradients over all of them
    (stdit.models.sequence_parallel says why that is right).
    """
    set_accelerator()
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
    restrict_unpickling()
    ranks = init_process_group(
        lambda: deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False),
        accelerator,
        sequence_parallel,
    )
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return ranks


def restrict_unpickling() -> None:
    """Makes torch.load unpickle data only, for the whole process: tensors, plain values and three classes of
    DeepSpeed's checkpoints."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


@contextlib.contextmanager
def _frozen_objects() -> Iterator[None]:
    """Lets the garbage collector pass over the objects there are: half a million of imports, 0.35 s each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Engine:
    """A model under DeepSpeed. Every method is collective: all ranks call it, in the same order."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        ranks: Ranks,
        universal: bool = False,
        deferred: DeferredTensors | None = None,
    ) -> None:
        """universal: `load` will read a universal checkpoint (stdit.training.universal). deferred: under ZeRO-3, has
        the weights of `model`, which no rank then holds whole."""
        import deepspeed

        self.train_config, self.ranks = config.train, ranks
        self._micro_batch = 0  # that the gradients of this step have
        self.stage = config.train.zero_stage
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.ds_config = make_deepspeed_config(
            config.train, sum(p.numel() for p in trained.values()), ranks.device.type
        )
        if universal:
            self.ds_config["checkpoint"] = {**self.ds_config.get("checkpoint", {}), "load_universal": True}
        self.base_optimizer = make_optimizer(model, config.train.optimizer)
        groups = [group["params"] for group in self.base_optimizer.param_groups]
        names = {id(p): name for name, p in model.named_parameters()}
        # Trained weights in the order of the optimizer's groups.
        self.optimizer_names = [names[id(p)] for group in groups for p in group]
        # DeepSpeed makes the masters from weights already rounded.
        rounded = self.dtype != torch.float32
        initial = {n: p.detach().clone() for n, p in trained.items()} if rounded and self.stage < 3 else {}
        parts = self._partition(model, deferred or DeferredTensors()) if self.stage == 3 else {}
        # Its bfloat16 optimizer prints memory statistics, and collects garbage before each.
        with contextlib.redirect_stdout(io.StringIO()), _frozen_objects():
            self.engine: Any = deepspeed.initialize(
                model=model, optimizer=cast(Any, self.base_optimizer), config=self.ds_config
            )[0]
        # Of the groups that DeepSpeed has created; the watchdog comes first.
        set_timeout(max(TIMEOUT, timedelta(seconds=2 * config.train.step_timeout_s)))
        # Convenience scripts beside the checkpoints, whose failure on rank 0 would leave the others waiting.
        self.engine._copy_recovery_script = lambda folder: None
        self.optimizer: Any = self.engine.optimizer
        if isinstance(self.base_optimizer, Muon) and self.stage:
            set_zero_layouts(self.base_optimizer, self.optimizer, self._partitions(), self.stage, groups, ranks.device)
        if initial:
            # Without ZeRO DeepSpeed also takes a step from zero gradients, which counts in AdamW's bias correction.
            if not self.stage:
                self.base_optimizer.state.clear()
            self.set_weights(initial)
        if parts:
            self._set_parts(parts)

    @torch.no_grad()
    def _partition(self, model: nn.Module, deferred: DeferredTensors) -> dict[str, Tensor]:
        """Partitions the weights over the ranks one by one, as deepspeed.zero.Init does those of a whole model; returns
        this rank's parts of those trained, in float32, if they are rounded."""
        from deepspeed.runtime.zero import Init

        parts, first, ranks = {}, None, self.ranks
        for name, parameter in model.named_parameters():
            with deferred.resident(parameter):
                if parameter.requires_grad and self.dtype != torch.float32:
                    length = -(-parameter.numel() // ranks.size)
                    parts[name] = parameter.flatten()[ranks.rank * length :][:length].clone()
                # A copy: what is mapped from a file is not written to.
                parameter.data = parameter.detach().to(ranks.device, self.dtype, copy=True)
            if first is None:
                first = cast(Any, parameter)
                Init(module=nn.ParameterList([first]), config_dict_or_path=self.ds_config)
            else:
                first.convert_to_zero_parameters([parameter])
        for buffer in model.buffers():
            deferred.restore(buffer)
            buffer.data = buffer.to(ranks.device)
        return parts

    @torch.no_grad()
    def _set_parts(self, parts: dict[str, Tensor]) -> None:
        """Sets masters and model weights from this rank's parts of them, which it takes out of `parts`."""
        masters = self.masters()
        for name, (master, _, offset, numel) in self._fragments().items():
            masters[master].view(-1)[offset : offset + numel].copy_(parts.pop(name)[:numel])
        self.sync_from_masters()

    @property
    def module(self) -> Any:
        """The model, with DeepSpeed's hooks under ZeRO-3."""
        return self.engine.module

    def _trainable(self) -> dict[str, Tensor]:
        """Model weights that are not frozen, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, micro_batches: int = 1) -> None:
        """Accumulates the gradients of a micro-batch's mean loss, one of `micro_batches` in this step. A loss that is
        not finite makes every gradient NaN, so that checking the gradient norm, which all ranks share, suffices."""
        self._micro_batch += 1
        last = self._micro_batch == micro_batches
        # The number may differ from step to step, by bucket.
        self.engine._config.gradient_accumulation_steps = micro_batches
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        if last:
            self._micro_batch = 0
        else:
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """Optimizer step after the last micro-batch's `backward`; returns the gradient norm before clipping.

        If the norm is not finite, no rank updates anything.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.stage or self.dtype != torch.float32:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        # DeepSpeed's plain float32 path would apply NaN to the weights, and keeps the norm to itself.
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        max_norm = self.train_config.optimizer.max_grad_norm or float("inf")
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters], foreach=True)
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        else:
            # Without gradients the optimizer leaves weights and moments alone.
            self.engine.zero_grad()
        self.engine.step()
        return float(norm)

    # ------------------------------------------------------------------------------------- weights

    def masters(self) -> list[Tensor]:
        """This rank's master weights: the tensors themselves, to be updated in place."""
        partitioned = bool(self._partitions())
        return [tensor if partitioned else tensor.data for tensor in self.optimized()]

    def _partitions(self) -> list[Tensor]:
        """ZeRO's flat partitions of the master weights, empty ones included; [] without ZeRO."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if (partitions := getattr(self.optimizer, name, None)) is not None:
                return list(partitions)
        return []

    @torch.no_grad()
    def sync_from_masters(self) -> None:
        """Copies the masters, changed from outside, into the model weights of all ranks."""
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
            for weights, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(list(weights), list(masters))  # pyright: ignore

    def master_layout(self) -> MasterLayout:
        """Where each weight is in the ranks' `masters`."""
        shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in self._trainable().items()}
        mine = self._fragments()
        return MasterLayout(shapes, self.ranks.gather(mine) if self.stage else [mine])

    def _fragments(self) -> dict[str, Fragment]:
        """What this rank has of each weight in its `masters`."""
        named = self._trainable()
        # By address: `masters` makes tensors anew.
        numbers = {tensor.data_ptr(): number for number, tensor in enumerate(self.masters())}
        if (replicas := self._replicated_masters()) is not None:
            whole = {n: replicas[id(p)] for n, p in named.items()}
            return {n: Fragment(numbers[t.data_ptr()], 0, 0, t.numel()) for n, t in whole.items()}
        groups: list[list[nn.Parameter]] = []
        if self.stage < 3:  # bf16_groups: of bfloat16 at stage 1
            groups = getattr(self.optimizer, "bit16_groups", None) or self.optimizer.bf16_groups
        number = {id(p): i for i, group in enumerate(groups) for p in group}
        mine = {}
        for name, p in named.items():
            if self.stage == 3:
                found = zero3_fragment(self.optimizer, p, self.ranks.rank)
            else:
                found = zero12_fragment(number[id(p)], p)
            if found.numel:
                mine[name] = found._replace(master=numbers[self._partitions()[found.master].data_ptr()])
        return mine

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name."""
        parameters = dict(self.module.named_parameters())
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in parameters}

    @torch.no_grad()
    def set_weights(self, state: dict[str, Tensor]) -> None:
        """Sets masters and model weights from full float32 weights by name, the same on every rank."""
        from deepspeed.utils import safe_set_full_fp32_param

        replicas = self._replicated_masters()
        for name, parameter in self._trainable().items():
            value = state[name].to(self.ranks.device, torch.float32)
            if replicas is not None:
                replicas[id(parameter)].copy_(value)
            else:
                safe_set_full_fp32_param(parameter, value)
        self.sync_from_masters()

    def _replicated_masters(self) -> dict[int, Tensor] | None:
        """Master weights by id of the model's parameter; None under ZeRO, where they are partitioned."""
        if self.stage:
            return None
        if self.dtype == torch.float32:
            return {id(p): p.data for p in self._trainable().values()}
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {id(weight): master.data for group in pairs for weight, master in zip(*group, strict=True)}

    # --------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, tag: str, keep: Callable[[Any], Any]) -> ShardWriter:
        """What DeepSpeed would write on this rank into folder/tag; `ShardWriter.write` writes it.

        keep: what is to become of each file's state until then; the identity, where weights do not change before.
        """
        writer = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = shards = ShardWriter(writer, keep)
        try:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self.engine.checkpoint_engine = writer
        return shards

    def state_tensors(self) -> list[Tensor]:
        """This rank's master weights and optimizer state."""
        state = [v for values in self.base_optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
        return [*self.masters(), *state]

    def load(self, folder: Path, tag: str) -> None:
        """Loads weights and optimizer state from folder/tag. ValueError: DeepSpeed found nothing there."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        with contextlib.redirect_stdout(io.StringIO()):
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
        if path is None:
            raise ValueError(f"{folder / tag}: DeepSpeed loaded nothing from it")
        # From the universal form, ZeRO-3 gives every group the first one's settings, and all partitions one and the
        # same step counter, which each of them then advances.
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            params = group["params"]
            group.clear()
            group.update(own, params=params)
        for state in self.base_optimizer.state.values():
            if torch.is_tensor(step := state.get("step")):
                state["step"] = step.clone()

    @torch.no_grad()
    def set_from_full(self, targets: Sequence[Tensor], full: Callable[[str], Tensor]) -> None:
        """Sets this rank's parts in `targets`, tensors like `masters`, from full weights, which `full` reads by name,
        one at a time."""
        for name, fragment in self._fragments().items():
            _set_part(targets[fragment.master], fragment, full(name))

    @torch.no_grad()
    def load_states(self, states: States) -> None:
        """Sets masters, model weights and optimizer state from full ones, of which every rank reads its parts, a weight
        at a time."""
        masters, optimizer = self.masters(), self.base_optimizer
        for name, fragment in self._fragments().items():
            full, key = states[name], self.optimized()[fragment.master]
            state = optimizer.state[key]
            if "exp_avg" not in state:
                state |= {"exp_avg": torch.zeros_like(key.detach()), "exp_avg_sq": torch.zeros_like(key.detach())}
            targets = {"fp32": masters[fragment.master], "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for which, target in targets.items():
                _set_part(target, fragment, full[which])
        for key, state in optimizer.state.items():
            device = key.device if optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.tensor(states.step, dtype=torch.float32, device=device)
        self.sync_from_masters()

    def optimized(self) -> list[Tensor]:
        """The tensors that the optimizer has for `masters`, and its state by them."""
        if partitions := self._partitions():
            return [t for t in partitions if t.numel()]
        if (groups := getattr(self.optimizer, "fp32_groups", None)) is not None:
            return [p for group in groups for p in group]
        return list(self._trainable().values())

    def close(self) -> None:
        self.engine.destroy()


def _set_part(target: Tensor, fragment: Fragment, full: Tensor) -> None:
    """Sets the elements of `fragment` in its master tensor, or one like it, from the whole weight."""
    part = full.view(-1)[fragment.start : fragment.start + fragment.numel]
    target.view(-1)[fragment.offset : fragment.offset + fragment.numel] = part.to(target.device)


class ShardWriter:
    """DeepSpeed's checkpoint engine, which collects what is to be written and writes it later, without the other ranks.

    `error` is the first one of collecting, which is remembered instead of raised: a rank that left `save_checkpoint`
    would leave the others waiting in its barriers.
    """

    def __init__(self, writer: Any, keep: Callable[[Any], Any]) -> None:
        self._writer, self._keep = writer, keep
        self._states: list[tuple[Any, str]] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        """Called by DeepSpeed for each file of this rank."""
        if self.error is None:
            try:
                self._states.append((self._keep(state_dict), path))
            except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
                self.error = error

    def write(self) -> list[Path]:
        """Writes the files and frees what they hold; returns their paths."""
        paths = []
        while self._states:
            state, path = self._states.pop(0)
            self._writer.save(state, path)
            paths.append(Path(path))
        return paths


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads a checkpoint without the frozen weights. RuntimeError: it is of another model."""
    frozen = {name: p.data for name, p in dst.named_parameters() if not p.requires_grad}
    dst.load_state_dict({**frozen, **src})


def unreadable_shard(checkpoint: Path) -> str | None:
    """Why DeepSpeed could not load the shards in `checkpoint`; None if it can, as far as one process sees.

    Reads their structure alone. A rank that fails while loading would leave the others waiting in collectives.
    """
    identity = load_identity(checkpoint)
    shards = len(list(checkpoint.glob("*optim_states.pt")))
    if identity["config"]["train"]["zero_stage"] and shards != identity["world_size"]:
        return f"it holds the optimizer state of {shards} ranks, and was saved by {identity['world_size']}"
    for path in sorted(checkpoint.glob("*.pt")):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            return f"{path.name} holds more than tensors and plain values, and is not loaded"
        except Exception as error:  # whatever torch raises for a file that it did not write
            return f"{path.name} is no file of torch.save ({type(error).__name__})"
        key = "optimizer_state_dict" if path.name.endswith("optim_states.pt") else "module"
        if not isinstance(content, dict) or key not in content:
            return f"{path.name} is no shard of DeepSpeed's (it has no {key!r})"
    return None
