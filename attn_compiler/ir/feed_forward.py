"""Feed-forward nets of a host graph, by what they compute.

    down(act(up(x)))              ReLU, GELU (both forms), SiLU, squared ReLU, ...
    down(act(gate(x)) * up(x))    gated: SwiGLU, GEGLU; gate and up may be halves of one map

Between its maps only the activation, a product of two maps, views and dropout may stand, so it is
token-wise. The activation is known by its values on a grid, however it is spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from attn_compiler.ir import axes as ax
from attn_compiler.ir import ops
from attn_compiler.ir.affine import Blocked, LinearMap
from attn_compiler.ir.token_wise import (
    CASTS,
    dropout_of,
    given_to,
    is_parameter,
    is_tensor,
    keeps_features,
    last,
    linear,
    unviewed,
)
from attn_compiler.ir.trace import execute

# what chooses among experts, or mixes tokens
_ROUTES = frozenset(
    {"topk", "softmax", "sort", "argsort", "nonzero", "gather", "index", "index_select", "where"}
    | {"scatter", "scatter_add", "index_add", "index_add_", "one_hot", "argmax", "bmm", "einsum"}
    | {"bincount", "cumsum", "index_put", "index_put_", "grouped_mm", "_grouped_mm"}
)
_POINTWISE = frozenset(
    {"gelu", "relu", "relu_", "silu", "silu_", "tanh", "sigmoid", "erf", "exp", "softplus", "mish"}
    | {"elu", "leaky_relu", "hardtanh", "relu6", "hardswish", "hardsigmoid", "logsigmoid", "square"}
    | {"mul", "add", "sub", "div", "pow", "neg", "abs", "sqrt", "clamp", "clamp_min", "square_"}
)
_PIECES = frozenset({"chunk", "split", "getitem", "narrow", "slice", "tensor_split"})
_MOST = 40
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "mish": functional.mish,
    "elu": functional.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
_CLOSE = 1e-6


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward net.

    Attributes:
        given: host node of its input [..., D], before any view.
        made: host node of its output, without the dropouts upon it.
        activation: "relu", "gelu", "gelu_tanh", "silu", ...
        gate: the map whose result is activated, where it is multiplied with that of `up`.
        up, down: the other maps, from D and back to D.
        packed: gate and up are one map, and this one's first outputs are activated (or, with
            "last", its last); "" otherwise.
        width: hidden features, those of `down`'s input.
        dropout: rate on the hidden features.
    """

    given: fx.Node
    made: fx.Node
    activation: str
    gate: LinearMap | None
    up: LinearMap
    down: LinearMap
    packed: str
    width: int
    dropout: float

    @property
    def gated(self) -> bool:
        return self.gate is not None


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """What `FeedForward.activation` names."""
    return _ACTIVATIONS[name]


def find_feed_forward(made: fx.Node) -> FeedForward:
    """The feed-forward net whose output a host node is.

    Raises:
        Blocked: `feed_forward.routes`, it chooses among experts or mixes tokens;
            `feed_forward.unlike`, it is no such net; `feed_forward.activation`, an unknown one.
    """
    end = unviewed(made)
    down = linear(end)
    if down is None:
        raise _unlike(end, "what is added to the residual is not made by a linear map")
    inner = _Inner(down.x)
    maps = list(inner.maps.values())
    given = {unviewed(m.x) for m in maps}
    if not maps or len(given) != 1 or len(maps) > 2:
        raise _unlike(end, f"its activation reads {len(maps)} linear maps of {len(given)} tensors")
    width = last(down.x)
    if not isinstance(width, int):
        raise _unlike(end, "its width is not a number")
    activation, gate, packed = inner.activation(width)
    up = maps[0] if gate is None or len(maps) == 1 else maps[1 - gate]
    return FeedForward(
        given=given.pop(),
        made=made,
        activation=activation,
        gate=None if gate is None else maps[gate if len(maps) > 1 else 0],
        up=up,
        down=down,
        packed=packed,
        width=width,
        dropout=1 - inner.kept,
    )


def _unlike(node: fx.Node, text: str) -> Blocked:
    return Blocked(node, ("feed_forward.unlike", text))


class _Inner:
    """What stands between the first maps and the last one.

    Attributes:
        maps: the first maps, by the node of their results.
        kept: share that dropouts keep.
    """

    def __init__(self, end: fx.Node) -> None:
        self.end, self.kept = end, 1.0
        self.maps: dict[fx.Node, LinearMap] = {}
        self._nodes: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node in self._nodes or node in self.maps:
                continue
            found = linear(node) if is_tensor(node) else None
            if found is not None:
                self.maps[node] = found
                continue
            self._take(node)
            stack += [a for a in given_to(node) if _is_data(a)]
        position = {n: i for i, n in enumerate(end.graph.nodes)}
        self._order = sorted(self._nodes, key=position.__getitem__)
        self.maps = dict(sorted(self.maps.items(), key=lambda item: position[item[0]]))

    def _take(self, node: fx.Node) -> None:
        called = ops.arithmetic(node)
        if node.op == "placeholder" or len(self._nodes) > _MOST:
            raise _unlike(node, "it reads something that no linear map of its input makes")
        if called in _ROUTES or ops.is_contraction(node):
            text = f"it calls {called}: it chooses among experts or mixes tokens"
            raise Blocked(node, ("feed_forward.routes", text))
        if node.op == "call_module":
            kind = type(ops.called_module(node)).__name__
            raise _unlike(node, f"it calls a {kind}, which is not looked into")
        rate = dropout_of(node)
        if rate is not None:
            self.kept *= 1 - rate
        elif called not in _POINTWISE | _PIECES | CASTS and not keeps_features(node):
            raise _unlike(node, f"{called or node.op} stands between its linear maps")
        if called in _PIECES and not self._cuts_features(node):
            raise _unlike(node, "it takes a part of the tokens")
        self._nodes.add(node)

    def _cuts_features(self, node: fx.Node) -> bool:
        """Does it leave all dimensions but the last alone?"""
        source, *chosen = node.all_input_nodes
        if any(_is_data(n) or is_parameter(n) for n in chosen):
            return False
        if not is_tensor(source):
            return True
        if ops.name(node) == "getitem":
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            *before, last_one = index
            whole = all(i is Ellipsis or i == slice(None) for i in before)
            return whole and isinstance(last_one, slice) and bool(before)
        pieces = ops.value(node)
        first = pieces[0] if isinstance(pieces, tuple | list) else pieces
        return not ax.equal(last(source), ax.size_of(first.shape[-1]))

    # ------------------------------------------------------------ by values

    def activation(self, width: int) -> tuple[str, int | None, str]:
        """Name, which of the maps is activated where two are multiplied, and of which half."""
        x = torch.linspace(-5, 5, 3 * width, dtype=torch.float64).view(3, width)
        y = torch.linspace(-3, 2, 3 * width, dtype=torch.float64).view(3, width).flip(0)
        if len(self.maps) == 2:
            return self._gated([x, y], [(0, ""), (1, "")])
        (node,) = self.maps
        if ax.equal(last(node), width):
            return self._named(self._run([x]), x, None), None, ""
        if ax.equal(last(node), 2 * width):
            return self._gated([torch.cat((x, y), -1)], [(0, "first"), (0, "last")], (x, y))
        raise _unlike(node, "its maps have other widths than its activation")

    def _gated(
        self,
        given: list[Tensor],
        ways: list[tuple[int, str]],
        halves: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[str, int | None, str]:
        found, (x, y) = self._run(given), halves or (given[0], given[1])
        for (number, half), first, second in ((ways[0], x, y), (ways[1], y, x)):
            name = self._named(found, first, second, raising=False)
            if name:
                return name, number, half
        raise self._unknown()

    def _run(self, given: list[Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip(self.maps, (x.clone() for x in given), strict=True))
        for node in self._order:
            plain = dropout_of(node) is not None or ops.name(node) in CASTS or keeps_features(node)
            try:
                env[node] = env[given_to(node)[0]] if plain else execute(node, env)
            except Exception as error:  # an operation with arguments that are no numbers
                raise self._unknown() from error
        found: Tensor = env[self.end].double()
        return found

    def _named(self, found: Tensor, x: Tensor, factor: Tensor | None, raising: bool = True) -> str:
        for name, function in _ACTIVATIONS.items():
            wanted = function(x) if factor is None else function(x) * factor
            if wanted.shape == found.shape and torch.allclose(
                wanted, found, rtol=_CLOSE, atol=_CLOSE
            ):
                return name
        if raising:
            raise self._unknown()
        return ""

    def _unknown(self) -> Blocked:
        called = sorted({ops.arithmetic(n) for n in self._order} - CASTS)
        text = f"its activation is none that is known: {', '.join(called)}"
        return Blocked(self.end, ("feed_forward.activation", text))


def _is_data(node: fx.Node) -> bool:
    """Is it computed, and no number, size or parameter?"""
    value = ops.value(node)
    if isinstance(value, tuple | list):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor) and not is_parameter(node)
