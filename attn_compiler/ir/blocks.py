"""The transformer block around an attention, by what it computes.

    pre-norm     h = x + A(norm(x));  y = h + F(norm(h))
    post-norm    h = norm(x + A(x));  y = norm(h + F(h))
    parallel     y = x + A(norm(x)) + F(norm(x)), with one norm or two

A is the attention with its linear maps, F a feed-forward net (`feed_forward`). Norms, residuals and
the dropouts upon A and F stay where they are when something takes the places of A and F.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from torch import fx

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked, LinearMap
from attn_compiler.ir.block import Block, Branch, Form, FoundBlock
from attn_compiler.ir.core import Core
from attn_compiler.ir.feed_forward import FeedForward
from attn_compiler.ir.residuals import Residuals
from attn_compiler.ir.token_wise import (
    given_to,
    is_number,
    is_parameter,
    is_tensor,
    linear,
    same_shape,
    unmoved,
)


def find_block(end: fx.Node, core: Core) -> FoundBlock:
    """The block around an attention.

    Args:
        end: host node of the attention's end.
        core: what was recognised there.
    """
    try:
        return FoundBlock(_Search(end, core).block(), ())
    except Blocked as blocked:
        return FoundBlock(None, blocked.reasons)


@dataclass(frozen=True)
class _Parts:
    """See `Block`."""

    x: fx.Node
    y: fx.Node
    form: Form
    attention: Branch
    feed_forward: Branch
    net: FeedForward
    projections: tuple[LinearMap, ...]
    out: LinearMap
    norms: tuple[str, str]


class _Search(Residuals):
    """The state of one search."""

    def __init__(self, end: fx.Node, core: Core) -> None:
        super().__init__(end)
        self.core = core

    def block(self) -> Block:
        parts = self._parts()
        attention, feed_forward, form = parts.attention, parts.feed_forward, parts.form
        width, batch_first = self._layout(parts.x, attention, feed_forward)
        return Block(
            x=parts.x,
            y=parts.y,
            form=form,
            attention=attention,
            feed_forward=feed_forward,
            net=parts.net,
            projections=parts.projections,
            out=parts.out,
            norms=parts.norms if form == "post" else (parts.norms[0], feed_forward.norm),
            width=width,
            batch_first=batch_first,
            update=self._update(attention),
            replaced=_numbers(self.end.graph, (attention, feed_forward)),
        )

    def _parts(self) -> _Parts:
        upon, out = self.projected()
        projections, source = self._read()
        total, terms = self.sum_of(upon)
        x, norm = self.residual(source, terms)
        attention = self.branch(source if norm else x, upon, norm)
        others = [t for t in terms if t is not x and t is not upon]
        form: Form = "pre"
        norms, y = (norm, ""), total
        if others:
            form = "parallel"
            feed_forward, net = self.parallel(x, norm, others)
        elif norm:
            y, feed_forward, net = self.following(total, total)
        else:
            kind, h = self.norm_after(total)
            y, feed_forward, net = self.following(total, h)
            form, norms = "post", (kind, self.norm_after(y)[0])
            y = self.norm_after(y)[1]
        self.check_writes((attention, feed_forward), (x, y))
        return _Parts(x, y, form, attention, feed_forward, net, projections, out, norms)

    # ------------------------------------------------------------ the attention

    def _read(self) -> tuple[tuple[LinearMap, ...], fx.Node]:
        """The linear maps before the attention, and the one tensor that they read."""
        seen, found = set[fx.Node](), dict[fx.Node, LinearMap]()
        stack = [self.end]
        while stack:
            for node in given_to(stack.pop()):
                if node in seen or node in found or is_parameter(node) or is_number(node):
                    continue
                made = linear(node) if is_tensor(node) else None
                if made is None:
                    seen.add(node)
                    stack.append(node)
                else:
                    found[node] = made
        sources = {unmoved(m.x): None for m in found.values()}
        text = "queries, keys and values are made of different tensors"
        if len(sources) == 1:
            (source,) = sources
            if source not in seen:
                return tuple(found.values()), source
            text = "the attention reads its input past its linear maps, too"
        elif not sources:
            text = "queries, keys and values are not made by linear maps of parameters"
        raise Blocked(self.end, ("block.sources", text))

    def _update(self, attention: Branch) -> fx.Node | None:
        """The call of a cache between the linear maps and the attention."""
        held = [n.meta["opaque"] for n in attention.nodes if "opaque" in n.meta]
        calls = {n.args[0] if n.target is operator.getitem else n for n in held}
        rows, keys = self.core.sizes["T"], self.core.sizes["S"]
        if not calls and ax.equal(rows, keys):
            return None
        (call,) = calls if len(calls) == 1 else (None,)
        if not isinstance(call, fx.Node) or call.target != "update" or len(call.args) < 4:
            text = "keys are not those of the same tokens, or of a cache with one `update`"
            raise Blocked(self.end, ("block.other_keys", text))
        return call

    def _layout(self, x: fx.Node, *branches: Branch) -> tuple[int, bool]:
        value, rows = ops.value(x), self.core.sizes["T"]
        same = [b.given for b in branches] + [b.made for b in branches]
        if value.dim() == 3 and all(same_shape(value, ops.value(n)) for n in same):
            first, second, width = (ax.size_of(n) for n in value.shape)
            found = (ax.equal(first, rows), ax.equal(second, rows))
            if isinstance(width, int) and found in ((False, True), (True, False)):
                return width, found[1]
        text = "it is not [batch, tokens, features], or which of these are tokens is not known"
        raise Blocked(x, ("block.layout", text))


# ---------------------------------------------------------------- graph


def _numbers(graph: fx.Graph, branches: tuple[Branch, ...]) -> int:
    """How many numbers the parameters of some branches hold."""
    paths = {path for branch in branches for path in branch.parameters}
    held = {str(n.target): ops.value(n) for n in graph.nodes if is_parameter(n)}
    return sum(math.prod(held[path].shape) for path in paths)
