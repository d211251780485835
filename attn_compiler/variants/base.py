"""The contract of a variant: a frozen value made of functions, one file for each."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch

from attn_compiler.errors import BadOption
from attn_compiler.ir.score import Program
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.starts import Start

V = TypeVar("V")

# what a cost is asked for: a pass over a whole sequence, forward and backward, a step of generation
Work = Literal["prefill", "training", "decode"]


# a query of at most so many rows, with more keys, is a step of generation
_STEP = 16


class Scope(enum.Enum):
    """How much of the model a variant replaces."""

    CORE = "core"  # softmax and its two products
    SITE = "site"  # with projections, rotation and cache
    BLOCK = "block"  # with the feed-forward net
    SITE_AND_NET = "site and net"  # with the feed-forward net, each by itself


class Fidelity(enum.Enum):
    """What happens to the function the model computes."""

    EXACT = "exact"
    CALIBRATED = "calibrated"
    RETRAINED = "retrained"


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """What a user may ask for; the fields are the options. Equal values are equal specs, with
    equal hashes: Dynamo compares options, and caches are keyed by them.
    """

    def variant(self) -> Variant | None:
        """What serves a spec of another package, whose variants are not in this one's list."""
        return None


class ByPath(Mapping[str, V]):
    """One value for each module path, immutable and hashable, equal to a dict of the same."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V]) -> None:
        self._items = dict(sorted(items.items()))

    def __getitem__(self, path: str) -> V:
        return self._items[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def demand(spec: VariantSpec, field: str, holds: bool, do: str, why: str = "") -> None:
    """Raise BadOption about a field of a spec unless something holds."""
    if not holds:
        what = f"{type(spec).__name__} has {field}={getattr(spec, field)!r}"
        raise BadOption(what, where=f"option {field}", why=[why] if why else [], do=do)


def demand_one_of(spec: VariantSpec, field: str, *allowed: str | None) -> None:
    """Raise BadOption unless a field of a spec is one of a few words."""
    good = any(getattr(spec, field) == word for word in allowed)
    demand(spec, field, good, f"give one of {', '.join(map(repr, allowed))}")


def demand_flag(spec: VariantSpec, *names: str) -> None:
    """Raise BadOption unless fields of a spec are True or False."""
    for name in names:
        demand(spec, name, isinstance(getattr(spec, name), bool), "give True or False")


def is_size(value: object, least: int = 1) -> bool:
    """Is it a whole number, at least so large?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that a rewritten module gets. Those of a variant that is not RETRAINED are filled
    with one number and leave the function as it is.

    Attributes:
        name: of the attribute. With `home` it is the very name, and a number is added only from the
            second site of that module on; without, the site's number in its owner.
        shape, dtype, fill: how it starts.
        trained: a parameter, and no buffer.
        home: path below the owner of the module that gets it ("" the owner); None, the owner.
        device: None is that of the owner.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | Start
    trained: bool = False
    home: str | None = None
    device: torch.device | None = None

    @property
    def path(self) -> str:
        """Below the owner."""
        return f"{self.home}.{self.name}" if self.home else self.name


def filled(tensor: NewTensor, owner: torch.nn.Module, device: Any = None) -> torch.Tensor:
    """A new tensor as it starts, in an owner that still has what is replaced."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device or device)
    start = tensor.fill
    with torch.no_grad():
        if isinstance(start, Start):
            deviation = None if start.like is None else start.like.deviation(owner)
            start.write(made, *(start.numbers if deviation is None else (deviation,)))
        else:
            made.fill_(start)
    return made


@dataclass(frozen=True, slots=True)
class NewModule:
    """A module that a rewritten module gets, to remember something in, or to learn.

    Attributes:
        name: of the attribute; the site's number in its owner is added to it.
        kind: its class.
        arguments: what it is made with.
    """

    name: str
    kind: type[torch.nn.Module]
    arguments: tuple[Any, ...] = ()

    def made(self) -> torch.nn.Module:
        """The module as it starts."""
        return self.kind(*self.arguments)


@dataclass(frozen=True, slots=True)
class Lowering:
    """The operator that computes a core, where it is not the exact one.

    Attributes:
        program: its reads beyond those of the site are `reads`.
        reads: new tensors that the program reads.
        operator: name of the operator.
        extra: its positional arguments behind those of `attention`; new tensors stand for their
            values.
        options: its options beside those of `attention`.
        length: the only number of rows and keys that it holds for, None for any.
        own: weights of a head of its own, which reads what queries, keys and values are made of.
        memory: what a living module remembers of the site: it attends by a call that is given it.
        remembers: is it nothing without that memory?
        words: what it is, for the report, which then also says whether it pays.
    """

    program: Program
    reads: tuple[NewTensor, ...] = ()
    operator: str = "attention"
    extra: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    length: int | None = None
    own: tuple[NewTensor, ...] = ()
    memory: NewModule | None = None
    remembers: bool = False
    words: str = ""

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        return (*self.reads, *(x for x in self.extra if isinstance(x, NewTensor)), *self.own)


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """How a replaced layer works with a cache of keys and values.

    Attributes:
        write: write(cache, ((x_k, x_v), tensors), options, *index) -> keys, values, start, instead
            of the cache's `update`.
        read: read(x_q, keys, values, start, reads, ints, *tensors, **options) -> y.
        heads, width: keys and values are [B, heads, S, width].
    """

    write: Callable[..., Any]
    read: Callable[..., Any]
    heads: int
    width: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.heads, self.width


@dataclass(frozen=True, slots=True)
class Replacement:
    """What takes the place of a piece that is wider than a core.

    Attributes:
        function: computes it: `function(*given, *tensors, **options)`, a function of a module, of
            torch operations and the package's operators alone.
        tensors: of the module that gets them, in the order of the arguments; each has a `home`.
        options: keyword arguments.
        spec: what was asked for, with numbers for every "auto".
        words: what it is, for the report.
        training: does it depend on the mode? Then it is made once for each.
        cached: the same for a layer with a cache.
        net: what takes the place of the feed-forward net, where that is replaced by itself.
        origin: what is known of the weights that leave, for a start from them.
        listens: nothing is replaced, an ear is put beside (`variants.conversion.ear`).
        causal: see `Decision`.
    """

    function: Callable[..., Any]
    tensors: tuple[NewTensor, ...]
    options: tuple[tuple[str, Any], ...]
    spec: VariantSpec
    words: str = ""
    training: bool = False
    cached: CachedLayer | None = None
    net: Replacement | None = None
    origin: Any = None
    causal: bool | None = None
    listens: bool = False

    @property
    def all_tensors(self) -> tuple[NewTensor, ...]:
        """With those of the net, behind its own."""
        return (*self.tensors, *(self.net.tensors if self.net is not None else ()))


def _every(spec: Any) -> bool:
    return True


@dataclass(frozen=True)
class Variant:
    """One way to attend.

    Attributes:
        name: as the report spells it.
        spec: its options.
        scope, fidelity: see there.
        legality: yields every reason why it may not replace a site; none means it may.
        lower: what computes the core of a site, given the rows of the example (0 where they are
            not as many as keys) and how many tensors its program reads; None for the exact
            operator.
        remembers: do its sites remember something, and hand it to the cache of a generation?
        replace: what takes the place of the piece around a core that `Scope` names, given the
            piece as `ir` found it; None where only the core is replaced.
        serves: which specs of its kind it is for, where another variant serves the others.
    """

    name: str
    spec: type[VariantSpec]
    scope: Scope
    fidelity: Fidelity
    legality: Callable[[AttentionSite, Any], Iterator[Reason]]
    lower: Callable[[AttentionSite, Any, int, int], Lowering] | None = None
    remembers: bool = False
    replace: Callable[[AttentionSite, Any, Any], Replacement] | None = None
    serves: Callable[[Any], bool] = _every


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an attention.

    Attributes:
        batch, query, key, heads, head_dim: B, T, S, H, d.
        kv_heads, value_dim: None is heads, head_dim.
        width: of the model; None is heads times head dim.
        layers, beams: L that share a cache, K of each sample.
        causal: a token sees those before it.
        training: forward and backward.
        rotated: features of a key that are no linear image of what keys and values are made of;
            None is none of them.
        rotated_heads: kv heads that have such features of their own, 1 where all share them; None
            is all.
        norms: sizes of each token's keys, where a norm makes keys: kv heads, or 1; None is no norm.
    """

    batch: int
    query: int
    key: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    value_dim: int | None = None
    width: int | None = None
    layers: int = 1
    beams: int = 1
    causal: bool = True
    training: bool = False
    rotated: int | None = None
    rotated_heads: int | None = None
    norms: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise BadOption(
                    f"Shape has {field.name}={value!r}", do="give a whole number from 1"
                )
        if self.heads % self.groups:
            raise BadOption(
                f"Shape has {self.heads} heads over {self.groups} kv heads",
                do="the number of kv heads divides that of heads",
            )

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def channels(self) -> int:
        return self.width or self.heads * self.head_dim

    @property
    def work(self) -> Work:
        if self.training:
            return "training"
        return "decode" if self.query <= _STEP and self.key > self.query else "prefill"
