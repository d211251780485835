"""SwitchHead in the place of a layer of a living model: where it may stand, sizes, parameters.

    q_proj, k_proj, v_proj, o_proj   ->   w_q, w_k, w_v, w_o, w_s, w_d, as many numbers

Source: SwitchHead (arXiv 2312.07987v3), sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from attn_compiler.ir.expr import Expr, Var, walk
from attn_compiler.ir.piece import Piece
from attn_compiler.ir.score import gain
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.kernels import switchhead_call
from attn_compiler.kernels.relative import programs
from attn_compiler.kernels.routing import mixture_deviation
from attn_compiler.variants.base import (
    CachedLayer,
    Fidelity,
    NewTensor,
    Replacement,
    Scope,
    Variant,
)
from attn_compiler.variants.starts import Like, Start, normal, rows_of_length
from attn_compiler.variants.switchhead import SwitchHead, filled, whole_width

if TYPE_CHECKING:
    from attn_compiler.ir.core import Core
    from attn_compiler.ir.layer import Layer

# how far the parameters may be from those that are replaced; the widths that are tried for it, the
# best for kernels first
_TOLERANCE = 0.01
_MULTIPLES = (16, 8, 4, 2, 1)
# share of the channels that turn, and the base of their angles
_TURNED = (0.5, 10000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(SwitchHead):
    """What is asked for where the layer to be converted was read already; doors make it.

    Attributes:
        speeds: at which its channels turn, radians a position.
        bias: is a vector added to its outputs?
    """

    speeds: tuple[float, ...] = ()
    bias: bool = False

    @staticmethod
    def of(spec: SwitchHead, speeds: tuple[float, ...], bias: bool) -> Prepared:
        """What a user asked for, with what was read."""
        return Prepared(**_fields(spec), speeds=speeds, bias=bias)

    def plain(self) -> SwitchHead:
        """What the user asked for."""
        return SwitchHead(**_fields(self))


def _fields(spec: SwitchHead) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in fields(SwitchHead)}


def converts(spec: Any) -> TypeGuard[SwitchHead]:
    """Does a spec ask for the conversion of trained layers?"""
    return isinstance(spec, SwitchHead) and spec.init == "convert"


def legality(site: AttentionSite, spec: SwitchHead) -> Iterator[Reason]:
    """Codes: one for each obstacle that `ir.layer` names (switchhead.no_projection, .no_output,
    .qk_norm, .between, .rotation, .cross_rotary, .cache_form, .layout, .positions, .hidden,
    .nested), and switchhead.per_head, .sink, .scale, .sizes, .convert_heads.
    """
    for obstacle in site.obstacles or ():
        yield replace(obstacle, code=f"switchhead.{obstacle.code}")
    program = site.remaining or site.program
    if site.remaining is not None and spec.init == "convert":
        text = (
            "trained heads cannot do without the relative positions that the layer makes of its "
            'own queries or keys; init="fresh" replaces them, "fastest" keeps the layer'
        )
        yield Reason("switchhead.positions", text, site.location)
    if _names_head(program.score) or _names_head(program.mask):
        text = "the scores depend on the head, and there are going to be other heads"
        yield Reason("switchhead.per_head", text, site.location)
    if program.sink is not None:
        text = "the softmax has a sink, which belongs to heads that are going to be others"
        yield Reason("switchhead.sink", text, site.location)
    if site.scale is None:
        text = "the scores are multiplied by a number that is known only when the model runs"
        yield Reason("switchhead.scale", text, site.location)
    if site.query_heads is None or site.head_dim is None:
        text = "heads and their width are known only when the model runs"
        yield Reason("switchhead.sizes", text, site.location)
    elif spec.init == "convert":
        yield from _unconvertible(site, spec, site.query_heads)


def _unconvertible(site: AttentionSite, spec: SwitchHead, heads: int) -> Iterator[Reason]:
    """switchhead.convert_heads: heads that do not become experts, each one of a group."""
    found = filled(replace(spec, head_dim=1), width=1, heads=heads, head_dim=1)
    if heads not in (found.heads, int(found.heads) * int(found.experts)):
        text = f"{heads} heads are not {found.heads} groups of {found.experts}"
        yield Reason("switchhead.convert_heads", text, site.location)


def _names_head(expr: Expr) -> bool:
    return any(isinstance(part, Var) and part.name == "h" for part in walk(expr))


@dataclass(frozen=True, slots=True)
class Widths:
    """Channels that queries, keys and values are made of, and that come out."""

    q: int
    k: int
    v: int
    o: int

    def parameters(self, spec: SwitchHead) -> tuple[int, int]:
        """Weights for each channel of a head, and those of routers."""
        heads, experts = int(spec.heads), int(spec.experts)
        each = sum(getattr(self, n) * (experts if n in spec.experts_on else 1) for n in "qkvo")
        each += self.q * (spec.positions == "transformer_xl")
        routers = sum(self.k if name == "w_s" else self.q for name in routers_of(spec))
        return heads * each, heads * experts * routers


def routers_of(spec: SwitchHead) -> tuple[str, ...]:
    """Names of the routers that a layer has."""
    if spec.shared_selection:
        return ("w_d",)
    source = ("w_s",) if {"k", "v"} & set(spec.experts_on) else ()
    return (*source, *(("w_d",) if {"q", "o"} & set(spec.experts_on) else ()))


def sized(
    spec: SwitchHead, site: AttentionSite, widths: Widths, budget: int
) -> tuple[SwitchHead, int]:
    """The spec with all numbers for a layer, and its parameters: within 1 % of the budget where
    whole widths allow it, in the largest steps that do.

    Raises:
        BadOption: a head would have no channel.
    """
    assert site.query_heads is not None and site.head_dim is not None
    width = 1 if spec.head_dim == "auto" else spec.head_dim
    found = filled(
        replace(spec, head_dim=width),
        width=widths.q, heads=site.query_heads, head_dim=site.head_dim, kv_heads=site.kv_heads,
    )  # fmt: skip
    each, routers = widths.parameters(found)
    if spec.head_dim == "auto":
        limit = (budget - routers) / each
        width = next(
            (
                near
                for step in _MULTIPLES
                if (near := step * round(limit / step))
                and abs(near * each + routers - budget) <= _TOLERANCE * budget
            ),
            round(limit) or whole_width(limit),
        )
    if spec.head_dim == "auto" and spec.init == "convert":
        # narrower heads would lose what they are converted from
        least = max(site.head_dim, site.value_dim or site.head_dim)
        width = least if found.heads == site.query_heads else max(width, least)
    return replace(found, head_dim=width), width * each + routers


def replacement(site: AttentionSite, piece: Piece, spec: SwitchHead) -> Replacement:
    """The layer of experts for a layer that was found; what the module has already stays.

    Raises:
        BadOption: the parameters of the layer are too few for a head of one channel.
    """
    before, facts, words = piece.facts["before"], piece.facts, ""
    if before is not None:
        made = before.spec
        fresh = {"dtype": facts["dtype"], "device": facts["device"]}
        tensors = tuple(replace(tensor, **fresh) for tensor in before.tensors)
    else:
        widths = Widths(**facts["widths"])
        asked = spec.plain() if isinstance(spec, Prepared) else _placed(spec, facts["layer"])
        made, count = sized(asked, site, widths, facts["parameters"])
        tensors = _tensors(made, widths, site, piece)
        if isinstance(spec, Prepared) and spec.bias:
            tensors = (*tensors, replace(tensors[0], name="b_o", shape=(widths.o,), fill=0.0))
        words = (
            f"{made.heads} heads {made.head_dim} wide, {made.k} of {made.experts} experts on "
            f"{', '.join(made.experts_on)}; {count:,} parameters for {facts['parameters']:,}"
        )
    program, later = _programs(facts["core"], made)
    options = (
        ("names", tuple(bare(t) for t in tensors)),
        ("heads", made.heads),
        ("experts", made.experts),
        ("k", made.k),
        ("experts_on", made.experts_on),
        ("shared", made.shared_selection),
        ("expert_dropout", made.expert_dropout if facts["training"] else 0.0),
        ("program", program),
        ("later", later),
        ("gain", gain(facts["core"].program.score) if made.init == "fresh" else 1.0),
        ("dropout", site.dropout),
        ("turned", _TURNED if made.positions == "rope" else None),
        ("speeds", spec.speeds if isinstance(spec, Prepared) else ()),
    )
    return Replacement(
        switchhead_call.layer,
        tensors,
        options,
        made,
        words,
        bool(made.expert_dropout),
        CachedLayer(switchhead_call.write, switchhead_call.read, made.heads, made.head_dim),
    )


def _placed(spec: SwitchHead, layer: Layer) -> SwitchHead:
    """The spec with the positions that a layer gets."""
    mine = layer.key is not None and layer.key.x is layer.query.x
    if spec.positions == "auto" or not mine:
        if layer.relative and mine:
            return replace(spec, positions="transformer_xl")
        return replace(spec, positions="rope" if layer.turned else "none")
    return spec


def _programs(core: Core, spec: SwitchHead) -> tuple[str, str]:
    """What happens between the products, and for later rows alone, where that is asked."""
    if spec.positions == "transformer_xl":
        return programs(core.program, len(core.reads), len(core.ints))
    return str(core.program), ""


def bare(tensor: NewTensor) -> str:
    """w_q of w_q and of w_q_1."""
    return "_".join(tensor.name.split("_")[:2])


def _tensors(
    spec: SwitchHead, widths: Widths, site: AttentionSite, piece: Piece
) -> tuple[NewTensor, ...]:
    """Shapes as the paper has them. Queries, keys, values and outputs start with the variance that
    those of the layer have: a model is made with deviations that suit its depth and its optimiser.
    Without numbers to go by, and for routers: as `switchhead_fresh` has it.
    """
    heads, experts, inner = int(spec.heads), int(spec.heads) * int(spec.experts), int(spec.head_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    starts: dict[str, Start] = {}
    replaced = _replaced(piece.facts["layer"])
    mixture = mixture_deviation(int(spec.k), int(spec.experts))
    for name in "qkvo":
        rows, width = experts if name in spec.experts_on else heads, getattr(widths, name)
        shapes[f"w_{name}"] = (rows, inner, width) if name == "o" else (rows, width, inner)
        inputs = heads * inner if name == "o" else width
        factor = 1 / mixture if name in spec.experts_on else 1.0
        if name == "o":
            factor *= math.sqrt(_inputs(site) / inputs)
        starts[f"w_{name}"] = Start(normal, (inputs**-0.5,), Like(replaced[name], factor))
    if spec.positions == "transformer_xl":
        shapes["w_p"] = (heads, widths.q, inner)
        starts["w_p"] = Start(normal, (widths.q**-0.5,), Like(replaced["k"]))
    for name in routers_of(spec):
        shapes[name] = (experts, widths.k if name == "w_s" else widths.q)
        starts[name] = Start(rows_of_length, (1.0,))
    facts = piece.facts
    return tuple(
        NewTensor(name, shape, facts["dtype"], starts[name], True, piece.home, facts["device"])
        for name, shape in shapes.items()
    )


def _inputs(site: AttentionSite) -> int:
    """Channels that the output map of a layer reads."""
    assert site.query_heads is not None and site.head_dim is not None
    return site.query_heads * (site.value_dim or site.head_dim)


def _replaced(layer: Layer) -> dict[str, tuple[str, ...]]:
    """Paths of the weights of queries, keys, values and outputs."""
    maps = {"q": layer.query, "k": layer.key, "v": layer.value, "o": layer.out}
    return {name: () if made is None else made.taken for name, made in maps.items()}


SWITCHHEAD = Variant(
    name="switchhead",
    spec=SwitchHead,
    scope=Scope.SITE,
    fidelity=Fidelity.RETRAINED,
    legality=legality,
    replace=replacement,
    serves=lambda spec: spec.feed_forward is None,
)
