"""The record of a transformer block: two branches of tokens, each added to a residual.

x -> norm -> attention -> +, norm -> feed-forward net -> + -> y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from attn_compiler.ir.affine import LinearMap
from attn_compiler.ir.feed_forward import FeedForward
from attn_compiler.ir.site import Reason

Form = Literal["pre", "post", "parallel"]


@dataclass(frozen=True)
class Branch:
    """A function of tokens that is added to a residual.

    Attributes:
        given: host node that it reads, [B, T, D] or [T, B, D]: normed, or the residual itself.
        made: host node of its result, without the dropouts upon it.
        norm: "layer" or "rms" before it, "" where there is none.
        dropout: rates of the dropouts upon it.
        nodes: what computes it, `made` included, `given` and parameters left out.
        parameters: paths of the parameters that it alone reads.
    """

    given: fx.Node
    made: fx.Node
    norm: str
    dropout: tuple[float, ...]
    nodes: frozenset[fx.Node]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        x, y: host nodes of its input and output.
        form: where the norms stand, or that both branches read the same.
        attention, feed_forward: its two branches.
        net: what the feed-forward branch computes.
        projections: the linear maps that queries, keys and values are made by.
        out: the linear map behind the attention.
        norms: kinds of the norms, attention's first; behind the branches if the form is "post".
        width: D.
        batch_first: is x [B, T, D] and not [T, B, D]?
        update: the call of a cache that takes keys and values over, None where there is none.
        replaced: numbers that the parameters of both branches hold.
    """

    x: fx.Node
    y: fx.Node
    form: Form
    attention: Branch
    feed_forward: Branch
    net: FeedForward
    projections: tuple[LinearMap, ...]
    out: LinearMap
    norms: tuple[str, str]
    width: int
    batch_first: bool
    update: fx.Node | None
    replaced: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths of what a replacement of both branches makes needless."""
        return tuple(dict.fromkeys((*self.attention.parameters, *self.feed_forward.parameters)))

    def held(self) -> HeldBlock:
        """Where its weights are."""
        net = self.net
        return HeldBlock(
            tuple(map(_held, self.projections)),
            _held(self.out),
            None if net.gate is None else _held(net.gate),
            _held(net.up),
            _held(net.down),
            net.activation,
            net.packed,
        )


@dataclass(frozen=True)
class FoundBlock:
    """What was found, or why it is no such thing."""

    block: Block | None
    obstacles: tuple[Reason, ...]


# ---------------------------------------------------------------- where its weights are


@dataclass(frozen=True, slots=True)
class HeldMap:
    """A linear map by the paths of its parameters; the weight is [D, outputs] if transposed."""

    weight: str
    bias: str | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """The maps of a block, without its graph.

    Attributes:
        projections, out: of the attention.
        gate, up, down, activation, packed: of the net, see `FeedForward`.
    """

    projections: tuple[HeldMap, ...]
    out: HeldMap
    gate: HeldMap | None
    up: HeldMap
    down: HeldMap
    activation: str
    packed: str


def _held(found: LinearMap) -> HeldMap:
    return HeldMap(found.weight, found.bias, found.transposed)
