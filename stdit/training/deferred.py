"""Tensors without memory: a model larger than a host's memory is built and loaded by the code that builds any other
one.

    with DeferredTensors() as deferred:
        model = …                            # every operation is done, on one operation's tensors at a time
    for parameter in model.parameters():
        with deferred.resident(parameter):   # its operations are done again
            …                                # values, bit for bit as without

The idea is that of torchdistx's deferred_init. deepspeed.zero.Init does not serve: it partitions each
module's weights at the end of its __init__, before the code that initialises or loads whole models comes to them.

Within the context an operation's results are freed as soon as it is done; what is kept is how to make them again: the
operation, its inputs and the state of the random generator. Tensors that are mapped from a file are left as they are:
the file is read when their values are needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten: Any = torch.ops.aten
# Operations after which a tensor's old values do not matter.
OVERWRITES = frozenset(
    (aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default)
)  # fmt: skip
UNINITIALIZED = frozenset((aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default))


# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Has glibc map blocks of a mebibyte and more one by one within the context, so that they are returned as they are
    freed.

    In its heap the place of a freed tensor is too small for the next aligned one of the same size: a model that is
    built one tensor at a time would leave holes of its own size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        if mallopt is not None:  # as high as glibc itself raises them
            mallopt(M_MMAP_THRESHOLD, 2**25)
            mallopt(M_TRIM_THRESHOLD, 2**26)


@dataclass
class Operation:
    """One operation to be done again. output: number of the result that is kept; None: it changes the tensor in
    place."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[State]
    output: int | None
    generator: torch.Generator
    random_state: Tensor | None


@dataclass(eq=False)
class Deferred:
    """A storage without memory, and what made its values. resident: the values in its memory, while it has some."""

    storage: torch.UntypedStorage
    nbytes: int
    operations: list[Operation] = field(default_factory=list)
    resident: State | None = None

    def state(self) -> State:
        return State(self, self.operations, len(self.operations))


class State(NamedTuple):
    """The values that a storage had after the first `done` of some operations: another list after each overwriting."""

    of: Deferred
    operations: list[Operation]
    done: int


class DeferredTensors(TorchDispatchMode):
    """See the module. smallest: bytes below which tensors are kept as they are.

    Tensors must be read by torch's operations within the context, and by `resident` after it: `numpy` and the like find
    no memory there.
    """

    def __init__(self, smallest: int = 4096) -> None:
        super().__init__()
        Tensor.__repr__ = _repr  # pyright: ignore[reportAttributeAccessIssue]  # from now on: tensors outlive the context
        self._smallest = smallest
        self._by_storage: dict[int, Deferred] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = dict.fromkeys(found for tensor in _tensors((args, kwargs)) if (found := self._find(tensor)))
        if func.is_view:  # memory is wanted, its values do not matter
            with ExitStack() as stack:
                for found in used:
                    stack.enter_context(self._at(found.resident or State(found, [], 0)))
                return func(*args, **kwargs)
        written = self._written(func, args, kwargs)
        sources = [self._find(tensor) for tensor in _tensors(args[1:])]
        if func in OVERWRITES and written and _whole(args[0]) and written[0] not in sources:
            written[0].operations = []
        states = [found.state() for found in used]
        call = self._call(func, args, kwargs, states)
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(self._at(state))
            results = func(*args, **kwargs)
            for found in written:
                found.operations.append(call(None))
                found.resident = found.state()
            old = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
            for number, tensor in enumerate(_tensors(results)):
                storage = tensor.untyped_storage()
                if tensor.device.type == "cpu" and storage._cdata not in old and storage.nbytes() >= self._smallest:
                    self._by_storage[storage._cdata] = Deferred(storage, storage.nbytes(), [call(number)])
                    storage.resize_(0)
        return results

    @contextmanager
    def resident(self, tensor: Tensor) -> Iterator[None]:
        """Has the tensor's values in its memory within the context."""
        with ExitStack() as stack:
            if (found := self._find(tensor)) is not None:
                stack.enter_context(self._at(found.state()))
            yield

    def restore(self, tensor: Tensor) -> None:
        """Gives the tensor memory of its own, for good."""
        with self.resident(tensor):
            if self._find(tensor) is not None:
                tensor.data = tensor.detach().clone()

    def _find(self, tensor: Tensor) -> Deferred | None:
        return self._by_storage.get(tensor.untyped_storage()._cdata) if tensor.device.type == "cpu" else None

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Deferred]:
        """What the operation changes in place."""
        found = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                found += [each for tensor in _tensors(value) if (each := self._find(tensor))]
        return list(dict.fromkeys(found))

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[State]
    ) -> Callable[[int | None], Operation]:
        """Makes the Operation of this call. Tensors may be pointed elsewhere, and small ones be changed, before it is
        done again."""

        def keep(tensor: Tensor) -> Tensor:
            small = tensor.untyped_storage().nbytes() < self._smallest and self._find(tensor) is None
            return tensor.detach().clone() if small else tensor.detach()

        kept_args, kept_kwargs = tree_map_only(Tensor, keep, (args, kwargs))
        own = next((g for g in tree_flatten((args, kwargs))[0] if isinstance(g, torch.Generator)), None)
        generator = own or torch.default_generator
        state = generator.get_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        return lambda output: Operation(func, kept_args, kept_kwargs, inputs, output, generator, state)

    @contextmanager
    def _at(self, state: State) -> Iterator[None]:
        """Has the values of `state` in memory within the context."""
        found, before = state.of, state.of.resident
        if before is not None and before.operations is state.operations and before.done == state.done:
            yield
            return
        saved = found.storage.clone() if before is not None else None
        found.storage.resize_(found.nbytes)
        try:
            with torch.no_grad():
                for done, operation in enumerate(state.operations[: state.done]):
                    found.resident = state._replace(done=done)
                    self._do_again(found, operation)
            found.resident = state
            yield
        finally:
            found.resident = before
            if saved is None:
                found.storage.resize_(0)
            else:
                found.storage.copy_(saved)

    def _do_again(self, found: Deferred, operation: Operation) -> None:
        if operation.func in UNINITIALIZED:
            return
        with ExitStack() as stack:
            for state in operation.inputs:
                stack.enter_context(self._at(state))
            before = operation.generator.get_state()
            if operation.random_state is not None:
                operation.generator.set_state(operation.random_state)
            try:
                results = operation.func(*operation.args, **operation.kwargs)
            finally:
                operation.generator.set_state(before)
            if operation.output is not None:
                found.storage.copy_(_tensors(results)[operation.output].untyped_storage())


_repr_of_values = Tensor.__repr__


@wraps(_repr_of_values)
def _repr(tensor: Tensor, **kwargs: Any) -> str:
    """As torch's, which reads memory that is not there: a debugger, or a message with a tensor in it, would end the
    process."""
    if _has_no_memory(tensor):
        return f"tensor(..., size={tuple(tensor.shape)}, dtype={tensor.dtype}, deferred)"
    return _repr_of_values(tensor, **kwargs)


def _has_no_memory(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    try:
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # torch.func's, which have no storage
        return False


def _tensors(value: Any) -> Sequence[Tensor]:
    """The tensors in nested arguments or results."""
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


def _whole(tensor: Tensor) -> bool:
    """Whether the tensor is all that its storage holds."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
