"""Gluon without a GPU: runs the text of a kernel on the CPU, its warps in a random order.

run(source, launch, seed)   ->   the tensors of the launch hold what the kernel wrote;
                                 the partitions in the order in which they started products

Every partition of a warp specialisation is a thread of which one runs at a time; at each barrier,
copy and product the next is drawn. What is asynchronous happens at any moment that the rules allow:
a copy spoils its tile at once and fills it later, a product reads its operands when it starts or
when it is waited for. Layouts are not looked at.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.kernels.launch import Launch


class Deadlock(Exception):
    """Every partition waits for a barrier that nobody will complete."""


class _Abandoned(BaseException):
    pass


# ---------------------------------------------------------------- partitions


@dataclass(eq=False)
class _Partition:
    """A thread that runs when it is told to and stops at every switch."""

    world: _World
    number: int
    work: Callable[[], Any]
    ready: Callable[[], bool] = lambda: True
    done: bool = False
    error: BaseException | None = None
    products: list[_Product] = field(default_factory=list)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        threading.Thread(target=self._main, daemon=True).start()

    def _main(self) -> None:
        self.go.acquire()
        try:
            if not self.world.abandoned:
                self.work()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.world.back.release()

    def pause(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.world.back.release()
        self.go.acquire()
        if self.world.abandoned:
            raise _Abandoned


@dataclass
class _World:
    """One program of the grid: its partitions, and the copies that are under way."""

    place: tuple[int, int, int]
    draw: random.Random
    copies: list[Callable[[], None]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    current: _Partition | None = None
    abandoned: bool = False
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def specialise(
        self, functions: Sequence[tuple[Any, tuple[Any, ...]]], *_: Sequence[int]
    ) -> None:
        partitions = [_Partition(self, i, partial(f, *a)) for i, (f, a) in enumerate(functions)]
        for partition in partitions:
            partition.start()
        try:
            while left := [p for p in partitions if not p.done]:
                self._advance([p for p in left if p.ready()])
        finally:
            self.abandoned = True
            for partition in partitions:
                partition.go.release()

    def _advance(self, partitions: list[_Partition]) -> None:
        choices = [*partitions, *self.copies]
        if not choices:
            raise Deadlock
        chosen = self.draw.choice(choices)
        if not isinstance(chosen, _Partition):
            self.copies.remove(chosen)
            chosen()
            return
        self.current = chosen
        chosen.go.release()
        self.back.acquire()
        self.current = None
        if chosen.error is not None:
            raise chosen.error

    def switch(self, ready: Callable[[], bool] = lambda: True) -> None:
        if self.current is not None:
            self.current.pause(ready)


# ---------------------------------------------------------------- shared memory


@dataclass
class _Barrier:
    """Phases end when `count` have arrived and all expected bytes are there."""

    count: int = 0
    phase: int = 0
    arrived: int = 0
    bytes: int = 0

    def add(self, arrivals: int = 0, transfer: int = 0) -> None:
        self.arrived += arrivals
        self.bytes += transfer
        if self.arrived > self.count:
            raise AssertionError("more arrivals than a phase has")
        if self.arrived == self.count and self.bytes == 0:
            self.phase, self.arrived = self.phase + 1, 0


@dataclass
class _Shared:
    """A view of shared memory."""

    data: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, place: int) -> _Shared:
        assert 0 <= place < len(self.data)
        return _Shared(self.data[place])

    def reshape(self, shape: Sequence[int]) -> _Shared:
        return _Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> _Shared:
        return _Shared(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype
        self.data.copy_(value)


class _Barriers(list[_Barrier]):
    def index(self, place: int) -> _Barrier:  # type: ignore[override]
        return self[place]


@dataclass
class _Product:
    """A product that has been started; its value may be had after a wait."""

    compute: Callable[[], Tensor]
    value: Tensor | None = None
    waited: bool = False

    def finish(self) -> None:
        self.waited = True
        if self.value is None:
            self.value = self.compute()


@dataclass
class _Pointer:
    data: Tensor  # flat
    offset: Any = 0

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.data, self.offset + offset)


class _Descriptor:
    """Blocks of a tensor: zeros outside for who reads, nothing outside for who writes."""

    def __init__(self, given: Any) -> None:
        strides = given.base.stride()
        assert all(
            n == 1 or a == b
            for n, a, b in zip(given.shape, strides, given.strides, strict=True)
        )  # fmt: skip
        self.data, self.dtype, self.layout = given.base, given.base.dtype, None
        size = self.data.element_size()
        for n in given.block_shape:
            size *= n
        self.block_type = SimpleNamespace(shape=list(given.block_shape), nbytes=size)

    def block(self, start: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the block that lies inside, and where in the block it stands."""
        piece, inside = self.data, []
        for axis, (first, size) in enumerate(zip(start, self.block_type.shape, strict=True)):
            length = max(0, min(size, self.data.shape[axis] - first))
            piece = piece.narrow(axis, min(first, self.data.shape[axis]), length)
            inside.append(slice(0, length))
        return piece, tuple(inside)


# ---------------------------------------------------------------- the language


class _Language:
    """What a kernel calls, for one program of the grid."""

    def __init__(self, world: _World) -> None:
        self.world = world

    def names(self) -> dict[str, Any]:
        gl = SimpleNamespace(
            program_id=lambda axis: torch.tensor(self.world.place[axis]),
            warp_specialize=self.world.specialise,
            allocate_shared_memory=self._allocate,
            static_range=range,
            barrier=lambda: None,
            **_ARITHMETIC,
        )
        return {
            "gl": gl,
            "tl": gl,
            "gluon": SimpleNamespace(jit=lambda f: f),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self._mma,
            "warpgroup_mma_wait": self._mma_wait,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=self._init,
                wait=self._wait,
                expect=lambda barrier, size: self._arrive(barrier, 1, size),
                arrive=lambda barrier, count: self._arrive(barrier, count, 0),
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=self._load,
                async_copy_shared_to_global=self._store,
                store_wait=lambda pending: None,
            ),
        }

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if dtype is torch.int64:
            return _Barriers(_Barrier() for _ in range(shape[0]))
        return _Shared(torch.full(list(shape), float("nan"), dtype=dtype))

    def _init(self, barrier: _Barrier, count: int) -> None:
        barrier.count = count

    def _wait(self, barrier: _Barrier, phase: int, pred: Any = True) -> None:
        if pred:
            self.world.switch(lambda: barrier.phase & 1 != int(phase))

    def _arrive(self, barrier: _Barrier, count: int, size: int) -> None:
        self.world.switch()
        barrier.add(count, size)

    def _load(
        self, source: _Descriptor, start: Sequence[int], barrier: _Barrier, into: _Shared
    ) -> None:
        into.data.fill_(float("nan"))
        start = [int(n) for n in start]

        def arrive() -> None:
            piece, inside = source.block(start)
            into.data.zero_()
            into.data[inside] = piece
            barrier.add(0, -source.block_type.nbytes)

        self.world.copies.append(arrive)
        self.world.switch()

    def _store(self, into: _Descriptor, start: Sequence[int], source: _Shared) -> None:
        piece, inside = into.block([int(n) for n in start])
        piece.copy_(source.data[inside])

    def _mma(
        self, a: Any, b: _Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> _Product:
        assert is_async and self.world.current is not None
        assert a.dtype == b.dtype and acc.dtype == torch.float32

        def compute() -> Tensor:
            left = a.data if isinstance(a, _Shared) else a
            found = left.float() @ b.data.float()
            return found + acc if use_acc else found

        product = _Product(compute)
        if self.world.draw.random() < 0.5:
            product.value = compute()
        self.world.current.products.append(product)
        self.world.started.append(self.world.current.number)
        self.world.switch()
        return product

    def _mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        self.world.switch()
        assert self.world.current is not None
        started = self.world.current.products
        while len(started) > outstanding:
            started.pop(0).finish()
        assert all(d.waited for d in deps if isinstance(d, _Product))
        found = tuple(d.value if isinstance(d, _Product) else d for d in deps)
        return found if len(found) > 1 else found[0]


def _load_number(pointer: _Pointer) -> int:
    return int(pointer.data[pointer.offset])


def _store_rows(pointer: _Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.data[pointer.offset[mask]] = value[mask]


def _largest(a: Any, b: Any, propagate_nan: Any = None) -> Any:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _smallest(a: Any, b: Any, propagate_nan: Any = None) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


_ARITHMETIC: dict[str, Any] = {
    "constexpr": lambda value: value,
    **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "exp", "exp2", "abs")},
    **{name: getattr(torch, name) for name in ("log2", "where", "floor", "ceil")},
    "arange": lambda start, end, layout=None: torch.arange(start, end),
    "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    "cast": lambda x, dtype: torch.as_tensor(x).to(dtype),
    "max": lambda x, axis: x.amax(axis),
    "sum": lambda x, axis: x.sum(axis),
    "maximum": _largest,
    "minimum": _smallest,
    "load": _load_number,
    "store": _store_rows,
    "convert_layout": lambda x, layout: x,
    "PropagateNan": SimpleNamespace(ALL=None),
    **dict.fromkeys(
        ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"), lambda *args, **named: None
    ),
}


# ---------------------------------------------------------------- running


def run(source: str, launch: Launch, seed: int) -> list[list[int]]:
    """Run every program of a launch; `source` is the text of its kernel."""
    draw, found = random.Random(seed), []
    constants = {n: c for n, c in launch.constants.items() if n.isupper()}
    code = compile(source[source.index("LOG2E") :], "kernel", "exec")
    for x in range(launch.grid[0]):
        for y in range(launch.grid[1]):
            world = _World((x, y, 0), draw)
            names = _Language(world).names()
            exec(code, names)
            names["forward"](*(_argument(a) for a in launch.args), **constants)
            found.append(world.started)
    return found


def _argument(given: Any) -> Any:
    if isinstance(given, Tensor):
        # results lie in memory as they like; offsets are by stride
        size = given.untyped_storage().nbytes() // given.element_size()
        return _Pointer(given.as_strided((size,), (1,), 0))
    return _Descriptor(given) if hasattr(given, "block_shape") else given
