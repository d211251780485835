"""Residuals around an attention: sums, norms, and the branches that are added there.

    pre-norm     h = x + A(norm(x));  y = h + F(norm(h))
    post-norm    h = norm(x + A(x));  y = norm(h + F(h))
    parallel     y = x + A(norm(x)) + F(norm(x)), with one norm or two

`blocks` puts these together for an attention and a net, `net_piece` for several attentions.
"""

from __future__ import annotations

from torch import fx, nn

from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked, LinearMap
from attn_compiler.ir.block import Branch
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
    terms_of,
    undropped,
    unmoved,
    unviewed,
)

# nodes behind a residual among which its norm is looked for
_NEAR = 16


class Residuals:
    """The residuals around one attention.

    Args:
        end: host node of the attention's end.
    """

    def __init__(self, end: fx.Node) -> None:
        self.end = end
        self.live = live(end.graph)

    # ------------------------------------------------------------ the attention

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who needs its value, not its size."""
        found = list[fx.Node]()
        for user in node.users:
            if user in self.live and not is_number(user):
                found += self.readers(user) if itself(user) is node else [user]
        return list(dict.fromkeys(found))

    def projected(self) -> tuple[fx.Node, LinearMap]:
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

    # ------------------------------------------------------------ residuals and norms

    def sum_of(self, upon: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
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

    def residual(self, source: fx.Node, terms: list[fx.Node]) -> tuple[fx.Node, str]:
        """The term that the attention reads, and the norm between."""
        for term in terms:
            if unmoved(term) is source:
                return term, ""
            norm = norm_between(term, source)
            if norm:
                return term, norm
        text = "what is added to the attention's result is not what the attention reads, or normed"
        raise Blocked(self.end, ("block.no_residual", text))

    def norm_after(self, node: fx.Node) -> tuple[str, fx.Node]:
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

    def following(self, total: fx.Node, residual: fx.Node) -> tuple[fx.Node, Branch, FeedForward]:
        """The second sum of a block, and what is added there to a residual."""
        for user in self.readers(residual):
            others = [t for t in terms_of(user) if t is not residual]
            if ops.arithmetic(user) != "add" or len(others) != 1:
                continue
            norm, net = self._net(others[0], residual)
            if (residual is total) != bool(norm):
                text = "there is a norm before one branch, and none before the other"
                raise Blocked(user, ("block.no_norm", text))
            return user, self.branch(net.given, others[0], norm), net
        self._check_inside(residual)
        text = "no feed-forward net with a residual follows the attention"
        raise Blocked(residual, ("block.no_feed_forward", text))

    def parallel(self, x: fx.Node, norm: str, others: list[fx.Node]) -> tuple[Branch, FeedForward]:
        if len(others) != 1 or not norm:
            text = f"{len(others) + 2} tensors are added up" if norm else "nothing is normed"
            raise Blocked(x, ("block.no_residual" if norm else "block.no_norm", text))
        own, net = self._net(others[0], x)
        return self.branch(net.given, others[0], own), net

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

    def branch(self, given: fx.Node, upon: fx.Node, norm: str) -> Branch:
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
            # a mask in a buffer stays where it is
            if is_parameter(n) and isinstance(ops.value(n), nn.Parameter)
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

    def check_writes(self, branches: tuple[Branch, ...], residuals: tuple[fx.Node, ...]) -> None:
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
