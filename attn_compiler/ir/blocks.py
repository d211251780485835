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
from attn_compiler.ir.feed_forward import FeedForward, find_feed_forward
from attn_compiler.ir.token_wise import (
    CASTS,
    MOVES,
    VIEWS,
    behind,
    dropout_of,
    given_to,
    is_number,
    is_parameter,
    is_tensor,
    itself,
    keeps_features,
    linear,
    live,
    norm_between,
    same_shape,
    terms_of,
    undropped,
    unmoved,
    unviewed,
)

# nodes behind a residual among which its norm is looked for
_NEAR = 16


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


def find_net(end: fx.Node, core: Core) -> tuple[Branch, FeedForward]:
    """The feed-forward net in the block around an attention, and the branch that it is.

    Args:
        end: host node of the attention's end.
        core: what was recognised there.

    Raises:
        Blocked: there is no such block; `feed_forward.shared`, it is not the net's alone.
    """
    found = _Search(end, core).parts()
    branch, net = found.feed_forward, found.net
    held = {net.gate or net.up, net.up, net.down}
    weights = {path for m in held for path in (m.weight, m.bias) if path is not None}
    if weights != set(branch.parameters):
        text = "its weights are read elsewhere, too, or in a module that is not looked into"
        raise Blocked(branch.made, ("feed_forward.shared", text))
    if any(ops.value(node).dim() != 3 for node in (branch.given, branch.made)):
        text = "the feed-forward net does not take and give [batch, tokens, features]"
        raise Blocked(branch.made, ("block.layout", text))
    return branch, net


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


class _Search:
    """The state of one search."""

    def __init__(self, end: fx.Node, core: Core) -> None:
        self.end, self.core = end, core
        self.live = live(end.graph)

    def block(self) -> Block:
        parts = self.parts()
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

    def parts(self) -> _Parts:
        """The same without what only a replacement of the attention has to know."""
        upon, out = self._projected()
        projections, source = self._read()
        total, terms = self._sum(upon)
        x, norm = self._residual(source, terms)
        attention = self._branch(source if norm else x, upon, norm)
        others = [t for t in terms if t is not x and t is not upon]
        form: Form = "pre"
        norms, y = (norm, ""), total
        if others:
            form = "parallel"
            feed_forward, net = self._parallel(x, norm, others)
        elif norm:
            y, feed_forward, net = self._following(total, total)
        else:
            kind, h = self._norm_after(total)
            y, feed_forward, net = self._following(total, h)
            form, norms = "post", (kind, self._norm_after(y)[0])
            y = self._norm_after(y)[1]
        self._check_writes((attention, feed_forward), (x, y))
        return _Parts(x, y, form, attention, feed_forward, net, projections, out, norms)

    # ------------------------------------------------------------ the attention

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who needs its value, not its size."""
        found = list[fx.Node]()
        for user in node.users:
            if user in self.live and not is_number(user):
                found += self.readers(user) if itself(user) is node else [user]
        return list(dict.fromkeys(found))

    def _projected(self) -> tuple[fx.Node, LinearMap]:
        """From the attention forward: one linear map, then what is added, dropouts included."""
        node, out = self.end, None
        while True:
            readers = self.readers(node)
            if len(readers) != 1:
                text = f"the result of the attention is read by {len(readers)} operations"
                raise Blocked(node, ("block.read_elsewhere", text))
            (user,) = readers
            found = linear(user) if is_tensor(user) else None
            if found is not None and out is None:
                out = found
            elif not _passes(user, node, out is None):
                break
            node = user
        called = ops.name(user) or user.op
        if _leaves(user):
            raise Blocked(user, ("block.outside", "the attention's result leaves the module"))
        if out is None:
            text = f"{called} comes before a linear map of the attention's result"
            raise Blocked(user, ("block.no_output_map", text))
        if ops.arithmetic(user) != "add" or len(terms_of(user)) != 2:
            text = f"{called} stands where the attention's result should meet a residual"
            raise Blocked(user, ("block.no_residual", text))
        return node, out

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

    # ------------------------------------------------------------ residuals and norms

    def _sum(self, upon: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The sum that the attention's branch goes into, and its terms, two or three."""
        (total,) = self.readers(upon)
        terms = terms_of(total)
        for term in list(terms):
            inner = terms_of(term) if ops.arithmetic(term) == "add" else []
            if term is not upon and len(inner) == 2 and self.readers(term) == [total]:
                return total, [*(t for t in terms if t is not term), *inner]
        readers = self.readers(total)
        if len(readers) == 1 and ops.arithmetic(readers[0]) == "add":
            more = [t for t in terms_of(readers[0]) if t is not total]
            return readers[0], [*terms, *more]
        return total, terms

    def _residual(self, source: fx.Node, terms: list[fx.Node]) -> tuple[fx.Node, str]:
        """The term that the attention reads, and the norm between."""
        for term in terms:
            if unmoved(term) is source:
                return term, ""
            norm = norm_between(term, source)
            if norm:
                return term, norm
        text = "what is added to the attention's result is not what the attention reads, or normed"
        raise Blocked(self.end, ("block.no_residual", text))

    def _norm_after(self, node: fx.Node) -> tuple[str, fx.Node]:
        """The norm of a sum, and its result."""
        ends = list[tuple[str, fx.Node]]()
        following = node.next
        for _ in range(_NEAR):
            if following.op == "output":
                break
            kind = norm_between(node, following) if is_tensor(following) else ""
            further = any(is_tensor(u) and norm_between(node, u) for u in self.readers(following))
            if kind and not further and following in self.live:
                ends.append((kind, following))
            following = following.next
        if len(ends) != 1:
            self._check_inside(node)
            text = "there is no norm before the branches, nor one behind each residual"
            raise Blocked(node, ("block.no_norm", text))
        return ends[0]

    def _check_inside(self, node: fx.Node) -> None:
        if any(_leaves(user) for user in self.readers(node)):
            text = "the attention's result with its residual leaves the module"
            raise Blocked(node, ("block.outside", text))

    # ------------------------------------------------------------ the feed-forward net

    def _following(self, total: fx.Node, residual: fx.Node) -> tuple[fx.Node, Branch, FeedForward]:
        """The second sum of a block, and what is added there to a residual."""
        for user in self.readers(residual):
            others = [t for t in terms_of(user) if t is not residual]
            if ops.arithmetic(user) != "add" or len(others) != 1:
                continue
            norm, net = self._net(others[0], residual)
            if (residual is total) != bool(norm):
                text = "there is a norm before one branch, and none before the other"
                raise Blocked(user, ("block.no_norm", text))
            return user, self._branch(net.given, others[0], norm), net
        self._check_inside(residual)
        text = "no feed-forward net with a residual follows the attention"
        raise Blocked(residual, ("block.no_feed_forward", text))

    def _parallel(self, x: fx.Node, norm: str, others: list[fx.Node]) -> tuple[Branch, FeedForward]:
        if len(others) != 1 or not norm:
            text = f"{len(others) + 2} tensors are added up" if norm else "nothing is normed"
            raise Blocked(x, ("block.no_residual" if norm else "block.no_norm", text))
        own, net = self._net(others[0], x)
        return self._branch(net.given, others[0], own), net

    def _net(self, upon: fx.Node, residual: fx.Node) -> tuple[str, FeedForward]:
        net = find_feed_forward(undropped(upon)[0])
        if net.given is unviewed(residual):
            return "", net
        norm = norm_between(residual, net.given)
        if not norm:
            text = "the feed-forward net reads something else than its residual, or that normed"
            raise Blocked(upon, ("block.no_feed_forward", text))
        return norm, net

    # ------------------------------------------------------------ branches

    def _branch(self, given: fx.Node, upon: fx.Node, norm: str) -> Branch:
        made, rates = undropped(upon)
        nodes, stack = {made}, [made]
        while stack:
            for node in behind(stack.pop()):
                if itself(node) is given or node in nodes or is_parameter(node):
                    continue
                if node.op != "placeholder" or "opaque" in node.meta:
                    nodes.add(node)
                    stack.append(node)
        self._check_inner(given, made, nodes)
        parameters = {
            n: None
            for node in self.end.graph.nodes
            if node in nodes
            for n in node.all_input_nodes
            if is_parameter(n)
        }
        own = (p for p in parameters if nodes.issuperset(self.readers(p)))
        return Branch(given, made, norm, rates, frozenset(nodes), tuple(str(p.target) for p in own))

    def _check_inner(self, given: fx.Node, made: fx.Node, nodes: set[fx.Node]) -> None:
        """Nobody else may read what a branch computes of its input."""
        inner = {given}
        for node in self.end.graph.nodes:
            if node not in nodes or not inner.intersection(given_to(node)) or is_number(node):
                continue
            inner.add(node)
            outside = [u for u in self.readers(node) if u not in nodes]
            if node is not made and outside:
                text = f"{ops.name(outside[0]) or outside[0].op} reads what lies inside of it"
                raise Blocked(node, ("block.read_elsewhere", text))

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

    def _check_writes(self, branches: tuple[Branch, ...], residuals: tuple[fx.Node, ...]) -> None:
        """A write in place is harmless where nobody reads the old value afterwards."""
        position = {n: i for i, n in enumerate(self.end.graph.nodes)}
        nodes = {n for b in branches for n in (*b.nodes, b.given) if is_tensor(n)}
        nodes.update(residuals)
        touched = {s for n in nodes for s in ops.storages(n)}
        for writer in (n for n in position if n in self.live):
            for target in ops.written(writer):
                hit = ops.storages(target) & touched
                before = (n for n in position if position[n] < position[writer])
                for node in (n for n in before if hit and ops.storages(n) & hit):
                    late = any(position[u] > position[writer] for u in self.readers(node))
                    if late or node.op in ("placeholder", "get_attr"):
                        text = "something in it is written in place, and read afterwards"
                        raise Blocked(writer, ("block.written", text))


# ---------------------------------------------------------------- graph


def _leaves(user: fx.Node) -> bool:
    """Is it the output of the graph, or a container on the way to it?"""
    return user.op == "output" or (ops.value(user) is None and user.op == "call_function")


def _passes(user: fx.Node, node: fx.Node, before: bool) -> bool:
    """Does the branch go on through a view, or a dropout behind its linear map?"""
    if not is_tensor(user) or given_to(user)[:1] != [node]:
        return False
    called = ops.name(user)
    if called in MOVES or keeps_features(user) or (before and called in CASTS | VIEWS):
        return True
    return not before and (dropout_of(user) is not None or called in CASTS)


def _numbers(graph: fx.Graph, branches: tuple[Branch, ...]) -> int:
    """How many numbers the parameters of some branches hold."""
    paths = {path for branch in branches for path in branch.parameters}
    held = {str(n.target): ops.value(n) for n in graph.nodes if is_parameter(n)}
    return sum(math.prod(held[path].shape) for path in paths)
