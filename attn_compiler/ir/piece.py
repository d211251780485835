"""A piece of a host graph around an attention: what a variant with parameters of its own takes the
place of.

    x -> q_proj, k_proj, v_proj -> attention -> o_proj -> y        given x, y is replaced
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from attn_compiler.ir.score import Program
from attn_compiler.ir.site import Reason


@dataclass(frozen=True)
class Piece:
    """What is replaced, in nodes of the host graph.

    Attributes:
        end: its value is what the replacement computes.
        given: what the replacement reads, in order.
        nodes: may be dead afterwards, besides those of the attention's region.
        taken: paths of the modules and parameters that it is made of; they leave the model.
        home: path of the module that gets the new parameters, below the one that owns the graph.
        facts: sizes and whatever else the variant has to know.
    """

    end: fx.Node
    given: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    taken: tuple[str, ...]
    home: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Sought:
    """A piece, or why there is none: all reasons; `remaining` as of the site."""

    piece: Piece | None
    obstacles: tuple[Reason, ...] = ()
    remaining: Program | None = None
